from test_all import *

from rows_part import rows_main, table_over_seeds


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
    for text, message in (('{"inner_lr": NaN}', "inner_lr"), ('{"rank": "many"}', "rank must be"),
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


def saved_run(folder, values, n_texts=None, task="single", arm="off"):
    """A JSONL file as niah.py writes it: one text for each value."""
    folder.mkdir(exist_ok=True)
    rows = [dict(task=task, arm=arm, length=64, steps=6, seed=1, prompt=f"text {i}", recall=v)
            for i, v in enumerate(values)]
    niah.append_jsonl(folder / "niah.jsonl", rows)
    return folder / "niah.jsonl"


def test_differences_over_seeds_are_paired_by_text_and_training_seed(tmp_path):
    runs = {"old-seed0": [0, 1, 0], "old-seed1": [1, 1, 1],
            "new-seed0": [1, 0, 1], "new-seed1": [1, 1, 1]}
    files = [saved_run(tmp_path / name, values) for name, values in runs.items()]
    means = [line.split() for line in table_over_seeds(files, "recall", "length").splitlines()]
    assert means[1][:4] == ["single", "new", "off", "83.3"] and means[1][-1] == "2"
    assert means[2][:4] == ["single", "old", "off", "66.7"]
    difference = table_over_seeds(files, "recall", "length", "old off").splitlines()[1].split()
    assert difference[:4] == ["single", "new", "off", "+16.7"]
    # folders without -seedN are paired too
    plain = [saved_run(tmp_path / "one", [0, 1, 0]), saved_run(tmp_path / "two", [1, 1, 0])]
    lines = table_over_seeds(plain, "recall", "length", "one off").splitlines()
    assert lines[2].split()[:4] == ["single", "two", "off", "+33.3"]
    with pytest.raises(ValueError, match="the lines are new off, old off"):
        table_over_seeds(files, "recall", "length", "old")
    with pytest.raises(ValueError, match="no rows of common"):
        table_over_seeds(files, "recall", "length", tasks=["common"])
    for bad in ("{", "[]", '{"task": "single"}'):
        files[1].write_text(files[0].read_text() + bad)
        with pytest.raises(ValueError, match="old-seed1/niah.jsonl, line 4: not a row"):
            table_over_seeds(files, "recall", "length")


def width(line):
    return float(re.search(r"± *([\d.]+)", line)[1])


def test_an_interval_covers_training_seeds_as_well_as_texts(tmp_path, capsys):
    """One seed of three loses 44 points: the others say that this is no property of the method."""
    for seed in range(3):
        lost = 44 if seed == 2 else 0
        saved_run(tmp_path / f"old-seed{seed}", [1] * 100)
        saved_run(tmp_path / f"new-seed{seed}", [0] * lost + [1] * (100 - lost))
    files = [str(f) for f in sorted(tmp_path.glob("*/niah.jsonl"))]
    rows_main(["--rows", *files, "--against", "old off"])
    new, old = capsys.readouterr().out.splitlines()[1:3]
    assert "-14.7" in new and width(new) > 15
    # equal on 100 texts is no proof of equality on the next
    assert "+0.0" in old and width(old) == pytest.approx(1.8, abs=0.1) and "≈" not in old
    for seed in range(3):
        saved_run(tmp_path / f"old-seed{seed}", [1] * 600)
        saved_run(tmp_path / f"new-seed{seed}", [1] * 600)
    assert "≈" in table_over_seeds(files, "recall", "length", "old off").splitlines()[1]


def test_one_seed_has_an_interval_over_texts_and_one_text_has_none(tmp_path):
    one = saved_run(tmp_path / "one-seed0", [1, 0, 1, 1, 0, 1, 1, 1])
    text = saved_run(tmp_path / "text-seed0", [1])
    lines = table_over_seeds([one, text], "recall", "length").splitlines()
    assert width(lines[1]) == pytest.approx(100 * 1.96 * (0.1875 / 8) ** 0.5, abs=4)
    assert lines[2].split()[3:5] == ["100.0", "±"] and lines[2].split()[5] == "-"


def test_intervals_are_wilsons_near_zero_and_one():
    """Wilson's formula for k right of n; the normal approximation has width 0 at k = n."""
    for k, n in ((100, 100), (0, 100), (97, 100), (1, 1), (40, 80)):
        p, z = k / n, 1.96
        half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        assert niah.interval([1.0] * k + [0.0] * (n - k)) == pytest.approx((p, half))


def test_the_chance_of_a_story_is_that_of_a_guesser_who_names_a_place_of_the_text():
    rng, hits, chance = random.Random(0), [], []
    for s in niah.make_samples(["stories"], 64, 2000, 0, "eval"):
        guess = rng.choice(sorted(set(s.prompt.split()) & set(niah.PLACES)))
        hits.append(guess == s.refs[0])
        chance.append(s.chance)
    assert abs(sum(hits) - sum(chance)) / 2000 < 0.03 and 0.2 < sum(chance) / 2000 < 0.28


def test_a_story_counts_only_if_the_place_is_the_only_one_named():
    tokenizer, config = load_tokenizer("tiny"), BackboneConfig()
    s = niah.make_samples(["stories"], 64, 1, 0, "eval")[0]
    right = s.refs[0]
    wrong = next(p for p in niah.PLACES if p != right)
    for output, value in ((f"mary {right}", 1), (right, 1), (f"{wrong} {right}", 0), (wrong, 0),
                          ("mary", 0), (f"{right} . mary moved {wrong}", 1)):
        ids = torch.tensor(tokenizer.encode(output) + [config.eos_id])
        assert niah.scored(s, ids, tokenizer, config)["recall"] == value


def counting(memory, calls):
    def counted(*inputs):
        calls.append(inputs)
        return memory(*inputs)
    return counted


def test_a_bad_out_file_or_length_is_refused_before_anything_is_decoded(here, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(sample, "generate", None)
    load_arms = niah.load_arms

    def watched(*inputs):
        backbone, tokenizer, arms = load_arms(*inputs)
        backbone.cfg.max_len = 100
        return backbone, tokenizer, {arm: counting(memory, calls) for arm, memory in arms.items()}
    monkeypatch.setattr(niah, "load_arms", watched)
    common = ["--checkpoint", "tiny", "--n", "2", "--device", "cpu"]
    for argv, message in ((["--out", "none/rows.jsonl"], "--out none/rows.jsonl cannot be written"),
                          (["--out", "."], "--out . cannot be written"),
                          (["--lengths", "64", "95"], "--lengths 95"),
                          (["--lengths", "64", "--gen_length", "45"], "limit of 100")):
        assert main_of(niah, common + argv) == 2
        assert message in capsys.readouterr().err
    # a text that fits alone but not with the introduction of a real model
    monkeypatch.setattr(niah, "encode_sample", lambda tokenizer, config, s: torch.ones(97).long())
    assert main_of(niah, common + ["--lengths", "64"]) == 2
    assert "a prompt of 97 tokens + 6" in capsys.readouterr().err
    assert not calls and not list(Path().iterdir())


def test_rows_are_written_as_they_come_and_an_error_does_not_stick_to_the_bar(here, capsys):
    model, tokenizer = load_backbone("tiny", "cpu"), load_tokenizer("tiny")

    def failing(*inputs):
        raise ValueError("the power is gone")
    sys.argv = ["niah.py"]
    arms = {"off": sample.no_memory, "on": failing}

    def run():
        niah.evaluate(model, tokenizer, arms, ["single"], [16], 3, 0, "rows.jsonl")
    with pytest.raises(SystemExit):
        bb.cli(run)
    assert capsys.readouterr().err.split("\r")[-1] == "error: the power is gone\n"
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [r["arm"] for r in rows] == ["off"] * 3


def test_every_mode_sees_the_introduction_and_the_answer_length(here, monkeypatch):
    """On a real model --passes, --exposure and --probe read the prompt that decoding reads."""
    model = random_backbone(vocab_size=400, family="llada")
    seen = []

    class Characters:
        """A tokenizer with one token a character, so that answers are long."""
        unk_token = "?"

        def encode(self, text, add_special_tokens=False):
            return [ord(c) for c in text]

        def decode(self, ids, skip_special_tokens=False):
            return "".join(chr(i) for i in ids)

    def memory(backbone, xt, attend, start):
        seen.append(("".join(map(chr, xt[0, :start].tolist())), xt.shape[1] - start))
        predict, _ = sample.no_memory(backbone, xt, attend, start)

        def slots_too(xt, t, state, at):
            return predict(xt, t, state, at)[0], (torch.ones(len(xt), 2, 2), {}, None)
        return slots_too, None
    tokenizer = Characters()
    assert niah.answer_budget(load_tokenizer("tiny")) == niah.BUDGET
    longest = max(len(s.answer) for s in niah.make_samples(list(niah.TASKS), 64, 2000, 0))
    assert niah.answer_budget(tokenizer) >= longest + 1
    arguments = (model, tokenizer, {"off": memory}, ["resolve"])
    niah.evaluate(*arguments, [64], 1, 0, gen_length=12)
    niah.recompute(*arguments, 64, 1, 0, 2, gen_length=12)
    niah.exposure(*arguments, 64, 1, 0, gen_length=12)
    niah.probe(model, tokenizer, memory, 64, 1, 0, 2, gen_length=12)
    assert len(seen) >= 4
    for prompt, gen_length in seen:
        assert niah.INTRO in prompt and gen_length == 12


def test_the_probe_works_on_a_device_without_float64(monkeypatch):
    """Apple's MPS: only on the CPU may a tensor become float64."""
    model, tokenizer = load_backbone("tiny", "cpu"), load_tokenizer("tiny")

    class OnDevice:
        def __init__(self, tensor):
            self.tensor = tensor

        def flatten(self, first):
            return OnDevice(self.tensor.flatten(first))

        def cpu(self):
            return self.tensor

    def memory(backbone, xt, attend, start):
        def predict(xt, t, state, at):
            return None, (OnDevice(torch.ones(len(xt), 2, 2)), {}, None)
        return predict, None
    assert len(niah.probe(model, tokenizer, memory, 32, 4, 3, 2)) == 8
