from test_all import *


def test_dream_samples_in_bf16_at_any_temperature_and_never_crashes():
    for seed in range(43, 60):
        for temperature in (0.2, 1.0, 1e-38):
            torch.manual_seed(seed)
            logits = torch.randn(50, 40).bfloat16() * 3
            token, probs = sample.dream_token(logits, temperature, 0.95, None)
            assert token.shape == (50,) and (probs.gather(1, token[:, None]) > 0).all()
    torch.manual_seed(0)                                    # it samples: not the likeliest token everywhere
    logits = torch.randn(1, 20).expand(4000, 20).bfloat16()
    token, probs = sample.dream_token(logits, 1.0, None, None)
    counts = F.one_hot(token, 20).float().mean(0)
    assert (counts - probs[0].float()).abs().max() < 0.03


def test_threshold_decoding_ranks_in_float64():
    """In a bf16 softmax 0.89837 passes for 0.9; in Fast-dLLM's float64 it does not."""
    wanted = torch.tensor([0.8977, 0.5])
    logits = torch.stack([torch.log(wanted / (1 - wanted)), torch.zeros(2)], -1).bfloat16()     # (N=2, V=2)
    exact = logits.double().softmax(-1)[:, 0]
    at = torch.ones(1, 2, dtype=torch.bool)
    for share in (exact[0].item() - 1e-6, exact[0].item() + 1e-6):
        # the second position is the less sure one, so that it is committed only by passing the threshold
        more = torch.cat([torch.tensor([[9.0, 0.0]]).bfloat16(), logits[:1]])
        new, _ = sample.choose_llada(more, at, None, share, 0.0, "low_confidence", [])
        assert new[0].tolist() == [True, share < exact[0].item()]


def test_a_mask_token_in_a_prompt_uses_up_no_commits_and_stays(model):
    mask, plain = model.cfg.mask_id, torch.randint(3, 40, (1, 9))
    prompt = plain.clone()
    prompt[0, [1, 4, 7]] = mask
    for options in (dict(), dict(block_length=3), dict(threshold=0.1), dict(remasking="entropy"), dict(remasking="random")):
        seen = []
        settings = {"gen_length": 6, "steps": 6, "block_length": 6, "stop_early": False, **options}
        ids = sample.generate(model, prompt, on_step=lambda xt, new, s: seen.append((xt, new)), **settings)
        assert not (ids == mask).any()
        assert all(torch.equal(xt[:, :9], prompt) and not new[:, :9].any() for xt, new in seen)
