from test_all import *


def test_dream_samples_in_bf16_at_any_temperature_and_never_crashes():
    for seed in range(43, 60):
        for temperature in (0.2, 1.0, 1e-38):
            torch.manual_seed(seed)
            logits = torch.randn(50, 40).bfloat16() * 3
            how = sample.Decoding(temperature=temperature, top_p=0.95)
            token, probs = sample.dream_token(logits, how)
            assert token.shape == (50,) and (probs.gather(1, token[:, None]) > 0).all()
    # it samples: not the likeliest token everywhere
    torch.manual_seed(0)
    logits = torch.randn(1, 20).expand(4000, 20).bfloat16()
    token, probs = sample.dream_token(logits, sample.Decoding(temperature=1.0))
    counts = F.one_hot(token, 20).float().mean(0)
    assert (counts - probs[0].float()).abs().max() < 0.03


def test_threshold_decoding_ranks_in_float64():
    """In a bf16 softmax 0.89837 passes for 0.9; in Fast-dLLM's float64 it does not."""
    wanted = torch.tensor([0.8977, 0.5])
    odds = torch.log(wanted / (1 - wanted))
    logits = torch.stack([odds, torch.zeros(2)], -1).bfloat16()             # (N=2, V=2)
    exact = logits.double().softmax(-1)[:, 0]
    at = torch.ones(1, 2, dtype=torch.bool)
    for share in (exact[0].item() - 1e-6, exact[0].item() + 1e-6):
        # the second position is the less sure one: only by passing the threshold it is committed
        more = torch.cat([torch.tensor([[9.0, 0.0]]).bfloat16(), logits[:1]])
        new, _ = sample.choose_llada(more, at, None, sample.Decoding(threshold=share), [])
        assert new[0].tolist() == [True, share < exact[0].item()]


def test_a_mask_token_in_a_prompt_uses_up_no_commits_and_stays(model):
    mask, plain = model.cfg.mask_id, torch.randint(3, 40, (1, 9))
    prompt = plain.clone()
    prompt[0, [1, 4, 7]] = mask
    for options in (dict(), dict(block_length=3), dict(threshold=0.1), dict(remasking="entropy")):
        seen = []

        def keep(xt, new, state):
            seen.append((xt, new))
        settings = {"gen_length": 6, "steps": 6, "block_length": 6, "stop_early": False, **options}
        ids = sample.generate(model, prompt, on_step=keep, **settings)
        assert not (ids == mask).any()
        assert all(torch.equal(xt[:, :9], prompt) and not new[:, :9].any() for xt, new in seen)


@pytest.mark.parametrize("name, values", [
    ("temperature", ["-1", "nan", "inf"]), ("cfg", ["nan", "-0.5"]), ("threshold", ["nan", "-1"]),
    ("top_p", ["-1", "nan", "1.5"]), ("top_k", ["0", "-3"]), ("alg_temp", ["nan", "-1"])])
def test_settings_out_of_range_are_refused_by_flags_and_by_generate(model, name, values, capsys):
    for value in values:
        # before the checkpoint, which does not exist, is looked for
        argv = ["--checkpoint", "none", "--prompt", "river", f"--{name}={value}"]
        assert main_of(sample, argv) == 2
        assert re.search(rf"error: --{name} must be", capsys.readouterr().err)
        number = int(value) if name == "top_k" else float(value)
        with pytest.raises(ValueError, match=f"^{name} must be"):
            sample.generate(model, torch.randint(3, 40, (1, 5)), gen_length=6, remasking="entropy",
                            **{name: number})


def test_memory_settings_beside_a_checkpoint_are_checked(here):
    for text, message in (('{"inner_lr": NaN}', "inner_lr"), ('{"rank": "many"}', "rank must be int"),
                          ('{"speed": 1}', "expected .* not 'speed'"), ('[1]', "expected")):
        Path("memory.json").write_text(text)
        with pytest.raises(ValueError, match=f"^memory.json: .*{message}"):
            sample.inner_loop_settings(".")


def test_watching_and_answers_print_no_control_characters(here, capsys, monkeypatch):
    class Hostile:
        """A tokenizer every token of which clears the screen."""
        def decode(self, ids, skip_special_tokens=True):
            return "\x1b[2J\x9b2J\x07\rx" * len(ids)
    model = random_backbone()
    how = sample.Decoding().filled(model.cfg)
    prompts = [torch.tensor([5, 6])]
    sample.decode_and_print("off", sample.no_memory, model, Hostile(), prompts, how, True)
    said = capsys.readouterr().out
    assert "x" in said and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", said)
