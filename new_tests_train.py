from test_all import *
from backbone import encode_pair


def small(*argv):
    run_train(*SMALL, "--device", "cpu", *argv)


def llada_folder(folder, rows=40):
    """A miniature LLaDA with the tiny tokenizer, and a JSONL file of `rows` examples beside it."""
    sizes = {"vocab_size": 139, "embedding_size": 139, "mask_token_id": 1, "eos_token_id": 2}
    write_checkpoint(folder, "llada", **sizes)
    load_tokenizer("tiny").save_pretrained(folder)
    samples = niah.make_samples(["multikey"], 40, rows, 0)
    text = [json.dumps({"prompt": s.prompt, "response": s.answer}) for s in samples]
    Path("data.jsonl").write_text("\n".join(text))


def test_metastate_trained_on_an_adapter_loads_and_samples(here, capsys):
    small("--method", "mdlm", "--lora", 4, "--steps", 2, "--out", "adapter")
    small("--method", "metastate", "--unroll", 2, "--steps", 2, "--init", "adapter", "--out", "both")
    assert json.loads(Path("both/metastate.json").read_text())["backbone"] == "adapter"
    backbone, _, arms = sample.load_arms("both", "cpu")
    assert any(m.lora_rank == 4 for m in backbone.modules() if isinstance(m, bb.Linear)) and "metastate" in arms
    assert main_of(sample, ["--checkpoint", "both", "--prompt", "? river =", "--device", "cpu"]) == 0


def test_training_goes_on_with_an_adapters_own_rank_and_refuses_another(here):
    small("--method", "mdlm", "--lora", 4, "--steps", 2, "--out", "first")
    small("--method", "mdlm", "--init", "first", "--steps", 2, "--out", "second")
    first, second = (json.loads(Path(f"{d}/adapter_config.json").read_text()) for d in ("first", "second"))
    assert first["r"] == second["r"] == 4
    assert first["base_model_name_or_path"] == second["base_model_name_or_path"] == "runs/pretrained-seed0"
    moved = [not torch.equal(v, weights_of("second")[k]) for k, v in weights_of("first").items()]
    assert any(moved)
    load_backbone("second", "cpu")
    for rank in (0, 8):
        with pytest.raises(ValueError, match="adapter of rank 4"):
            small("--method", "mdlm", "--init", "first", "--lora", rank, "--out", "third")
    with pytest.raises(ValueError, match="backbone is frozen"):
        small("--method", "metastate", "--init", "first", "--lora", 4, "--out", "third")
    assert not Path("third").exists()


def test_overwrite_deletes_what_the_run_wrote_and_nothing_else(here):
    small("--method", "mdlm", "--steps", 1, "--out", "run")
    Path("run/notes.txt").write_text("mine")
    Path("run/sub").mkdir()
    Path("run/sub/log.jsonl").write_text("mine too")
    Path("run/memory.json.old").write_text("and mine")
    small("--method", "metastate", "--unroll", 2, "--steps", 1, "--out", "run", "--overwrite")
    left = {f.name for f in Path("run").iterdir()}
    assert left == {"notes.txt", "sub", "memory.json.old", ".lock", "log.jsonl", "resume.pt",
                    "metastate.json", "metastate.safetensors"}
    assert Path("run/sub/log.jsonl").read_text() == "mine too"
    Path("notes.txt").write_text("mine")
    Path("log.jsonl").write_text("")
    small("--method", "mdlm", "--steps", 1, "--out", ".", "--overwrite")
    assert Path("notes.txt").exists() and Path("runs").exists() and Path("run/notes.txt").exists()


def test_every_name_that_a_run_writes_is_on_the_list_that_overwrite_deletes(here):
    small("--method", "mdlm", "--steps", 1, "--out", "a")
    small("--method", "mdlm", "--lora", 2, "--steps", 1, "--out", "b")
    run_train(*SMALL, "--method", "metastate", "--unroll", 2, "--steps", 1, "--out", "c", "--n_eval", 1)
    written = {f.name for d in "abc" for f in Path(d).iterdir()}
    assert written - {".lock"} <= set(train.WRITTEN)


def test_the_output_folder_is_never_one_that_the_run_reads(here):
    small("--method", "mdlm", "--lora", 2, "--steps", 1, "--out", "d")
    before = {f: f.read_bytes() for f in Path("d").iterdir()}
    Path("d/data.jsonl").write_text('{"prompt": "? river =", "response": "47"}\n' * 4)
    for argv, message in ((["--init", "d", "--out", "d"], "which the run reads"),
                          (["--backbone", "d", "--out", "./d/"], "which the run reads"),
                          (["--init", "d", "--out", "d/new"], "which the run reads"),
                          (["--init", "d", "--out", "runs/pretrained-seed0"], "which the run reads"),
                          (["--data", "d/data.jsonl", "--out", "d"], "lies in --out"),
                          (["--out", "d", "--resume"], "not both")):
        with pytest.raises(ValueError, match=message):
            small("--method", "mdlm", "--steps", 1, *argv, "--overwrite")
    with pytest.raises(ValueError, match="which the run reads"):
        small("--method", "memdlm", "--steps", 1, "--out", "runs/pretrained-seed0", "--overwrite")
    assert {f: f.read_bytes() for f in before} == before


def test_a_nan_is_reported_with_what_is_really_on_disk(here):
    options = ["--method", "mdlm", "--steps", 20, "--lr", "1e30"]
    with pytest.raises(ValueError, match="no checkpoint was written yet"):
        small(*options, "--out", "never")
    with pytest.raises(ValueError, match="last checkpoint in once is intact"):
        small(*options, "--save_every", 1, "--out", "once")


def test_a_resume_file_that_cannot_be_opened_is_not_called_corrupted(here):
    small("--method", "mdlm", "--steps", 1, "--out", "run")
    Path("run/resume.pt").unlink()
    Path("run/resume.pt").mkdir()
    with pytest.raises(OSError) as e:
        small("--method", "mdlm", "--steps", 1, "--out", "run", "--resume")
    assert "resume.pt" in str(e.value) and "overwrite" not in str(e.value) and "corrupt" not in str(e.value)


def test_a_second_run_in_a_folder_is_refused_and_a_killed_one_frees_it(here):
    code = ("import pathlib, sys, time; sys.path.insert(0, sys.argv[1]); import train\n"
            "with train.locked(pathlib.Path('run')): print('held', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code, str(HERE)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    for more in ([], ["--resume"], ["--overwrite"]):
        with pytest.raises(ValueError, match="in use by another run"):
            small("--method", "mdlm", "--steps", 1, "--out", "run", *more)
    assert [f.name for f in Path("run").iterdir()] == [".lock"]
    other.kill()
    other.wait()
    small("--method", "mdlm", "--steps", 1, "--out", "run")
    assert len(Path("run/log.jsonl").read_text().splitlines()) == 1


def test_killed_before_the_first_checkpoint_a_resumed_run_logs_each_step_once(here, monkeypatch, capsys):
    options = ["--method", "mdlm", "--steps", 4, "--out", "run"]
    batch_of = train.Run.batch

    def killed(self, step):
        if step == 2:
            raise KeyboardInterrupt
        return batch_of(self, step)
    monkeypatch.setattr(train.Run, "batch", killed)
    with pytest.raises(KeyboardInterrupt):
        small(*options)
    monkeypatch.setattr(train.Run, "batch", batch_of)
    small(*options, "--resume")
    assert "starts from the beginning" in capsys.readouterr().out
    steps = [json.loads(row)["step"] for row in Path("run/log.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]


def test_the_logged_held_out_loss_is_that_of_the_memory_that_is_trained(here):
    small("--method", "metastate", "--unroll", 2, "--steps", 4, "--eval_every", 1, "--lr", "1e-2", "--out", "run")
    rows = [json.loads(row) for row in Path("run/log.jsonl").read_text().splitlines()]
    losses = {row["held_out_metastate"] for row in rows}
    assert len(losses) == 4 and "held_out_off" not in rows[0]
    small("--method", "memdlm", "--steps", 1, "--out", "memdlm")
    assert "held_out_off" in json.loads(Path("memdlm/log.jsonl").read_text())


def test_metastates_memory_estimate_counts_every_unrolled_step():
    llada = bb.config_from_json(REAL["llada"])
    sizes = {K: train.estimate(llada, "metastate", 1, 256, 0, meta_cfg=MetaStateConfig(unroll=K)) for K in (2, 4, 8)}
    assert sizes[8]["activations"] == 2 * sizes[4]["activations"]
    assert sizes[2]["activations"] == 3 / 4 * sizes[4]["activations"]       # its curriculum starts with three passes


def test_the_papers_recipe_is_what_a_real_backbone_trains_with_by_default(here):
    llada_folder(here / "base")
    small_batch = ["--device", "cpu", "--n_eval", "0", "--max_len", "64"]
    run_train("--method", "memdlm", "--backbone", "base", "--data", "data.jsonl", *small_batch, "--epochs", 2)
    state = train.read_state("runs/memdlm/resume.pt")
    wanted = dict(loss_weight="1/t", warmup=0.1, lora=32, lora_dropout=0.05, beta2=0.999, weight_decay=0.0,
                  lr=2e-5, batch_size=2, full_share=0.0, rank=32, alpha=64.0, inner_lr=0.1)
    assert {k: state["settings"][k] for k in wanted} == wanted
    assert state["step"] == 2 * (40 - 4) // 2                               # two epochs of 36 rows, two at a time
    assert {g["betas"] for g in state["optimizer"]["param_groups"]} == {(0.9, 0.999)}
    assert {g["weight_decay"] for g in state["optimizer"]["param_groups"]} == {0.0}
    adapter = json.loads(Path("runs/memdlm/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (32, 64)
    cfg = train.TrainConfig(data="data.jsonl")
    train.fill_in(cfg, "llada", n_examples=100)
    assert (cfg.epochs, cfg.steps, cfg.max_len) == (5, 250, 4096)
    cfg = train.TrainConfig()
    train.fill_in(cfg, "llada")
    assert cfg.steps == 1000
    cfg = train.TrainConfig(method="mdlm")
    train.fill_in(cfg, "tiny")
    assert (cfg.loss_weight, cfg.warmup, cfg.beta2, cfg.weight_decay) == ("uniform", 0.03, 0.98, 0.01)
    with pytest.raises(ValueError, match="--epochs needs --data"):
        run_train("--method", "mdlm", "--epochs", 2)


def test_dropout_is_drawn_from_seed_and_step_and_is_off_outside_of_training(here, monkeypatch):
    llada_folder(here / "base")
    options = ["--method", "mdlm", "--backbone", "base", "--data", "data.jsonl", "--max_len", "64", "--steps", "4",
               "--lora", "4", "--lora_dropout", "0.5", "--save_every", "2", "--lr", "1e-2", "--n_eval", "0", "--device", "cpu"]
    modes, batch_of, held_out_loss = [], train.Run.batch, train.Run.held_out_loss

    def noted(self, *inputs):
        modes.append(self.backbone.training)
        return held_out_loss(self, *inputs)
    monkeypatch.setattr(train.Run, "held_out_loss", noted)
    run_train(*options, "--out", "whole")

    def killed(self, step):
        if step == 3:
            raise KeyboardInterrupt
        assert self.backbone.training
        return batch_of(self, step)
    monkeypatch.setattr(train.Run, "batch", killed)
    with pytest.raises(KeyboardInterrupt):
        run_train(*options, "--out", "parts")
    monkeypatch.setattr(train.Run, "batch", batch_of)
    run_train(*options, "--out", "parts", "--resume")
    whole, parts = weights_of("whole"), weights_of("parts")
    assert all(torch.equal(whole[k], parts[k]) for k in whole) and not any(modes)


@pytest.mark.parametrize("line, message", [
    (b"[" * 100_000, "not valid JSON"),
    (rb'{"prompt": "river \ud800", "response": "47"}', "not valid JSON"),
    (b'{"prompt": "river \xff", "response": "47"}', "not valid JSON"),
    (b'{"prompt": NaN, "response": "47"}', "expected"),
    (b'{"prompt": 1, "response": {"a": 2}}', "expected"),
    (b'{"prompt": ' + b"1" * 5000 + b"}", "Exceeds the limit")],
    ids=["deep", "surrogate", "bytes", "nan", "types", "digits"])
def test_a_line_that_no_reader_expects_is_named_with_file_and_line(here, line, message):
    good = b'{"prompt": "river = 47 . ? river =", "response": "47"}\n'
    Path("bad.jsonl").write_bytes(good + line + b"\n" + good)
    with pytest.raises(ValueError, match=f"bad.jsonl, line 2: {message}"):
        train.read_jsonl("bad.jsonl", load_tokenizer("tiny"), BackboneConfig(), 64)


def test_a_line_far_beyond_max_len_never_reaches_the_tokenizer(here, monkeypatch, capsys):
    good = '{"prompt": "river = 47 . ? river =", "response": "47"}\n'
    Path("long.jsonl").write_text(good * 2 + json.dumps({"prompt": "river " * 10_000, "response": "47"}))
    lengths = []

    def noted(tokenizer, cfg, example):
        lengths.append(len(example["prompt"]))
        return encode_pair(tokenizer, cfg, example)
    monkeypatch.setattr(train, "encode_pair", noted)
    assert len(train.read_jsonl("long.jsonl", load_tokenizer("tiny"), BackboneConfig(), 64)) == 2
    assert max(lengths) < 100 and "left out 1 examples" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [
    "--lora -1", "--alpha nan", "--s_pre -5", "--context -5", "--n_eval -1", "--device meta", "--seed -1",
    "--lora_dropout 1", "--weight_decay nan", "--max_len 0", "--epochs 0", "--seed 99999999999999999999",
    "--method metastate --slot_dim 0", "--method metastate --slot_heads -4", "--method metastate --cond_dim 0",
    "--method metastate --num_slots 0", "--method metastate --inject_layers -1"])
def test_settings_out_of_range_are_refused_before_any_file_is_written(here, capsys, flags):
    assert main_of(train, ["--steps", "1", *flags.split()]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in said and flags.split()[-2].lstrip("-") in said
    assert not list(Path().iterdir())


def test_a_bad_line_of_data_is_found_before_the_tiny_backbone_is_pretrained(here):
    Path("bad.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1: not valid JSON"):
        run_train("--method", "memdlm", "--data", "bad.jsonl")
    assert not Path("runs").exists()


def test_every_process_sets_its_own_gpu_before_anything_else_touches_cuda(monkeypatch):
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(train.dist, "init_process_group", lambda backend: calls.append(backend))
    cfg = train.TrainConfig()
    train.join_ranks(cfg)
    assert calls == [1, "nccl"] and cfg.device == "cuda:1"
    calls.clear()
    cfg = train.TrainConfig(device="cpu")
    train.join_ranks(cfg)
    assert calls == ["gloo"] and cfg.device == "cpu"


def test_a_run_on_the_cpu_shards_over_a_cpu_mesh_also_where_there_is_a_gpu(here, monkeypatch):
    import torch.distributed.fsdp
    meshes = []
    monkeypatch.setattr(torch.distributed.fsdp, "fully_shard", lambda layer, mesh, ignored_params: meshes.append(mesh))
    train.dist.init_process_group("gloo", init_method=f"file://{here}/store", rank=0, world_size=1)
    try:
        train.shard(random_backbone())
    finally:
        train.dist.destroy_process_group()
    assert len(meshes) == 3 and {mesh.device_type for mesh in meshes} == {"cpu"}
