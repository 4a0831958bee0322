from test_all import *


def test_a_residual_convolution_reaches_the_feed_forward_layers_and_ignores_padding():
    """With attention silenced, token i's output depends on token i - 1 only if the convolution is residual."""
    def influence(**options):
        model = random_backbone(**options)
        for layer in model.layers:
            layer.attn.o.weight.zero_()
        ids = torch.randint(3, 40, (1, 9))
        other = ids.clone()
        other[0, 3] = (other[0, 3] - 2) % 37 + 3
        return (model(ids) - model(other))[0, 4].abs().max()
    assert influence() == 0
    assert influence(conv_residual=True) > 0
    model = random_backbone(conv_residual=True)
    row = torch.randint(3, 40, (1, 9))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), row], 1)
    attend = torch.arange(14)[None] >= 5
    torch.testing.assert_close(model(padded, attend)[:, 5:], model(row), atol=1e-5, rtol=1e-4)
