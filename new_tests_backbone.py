from test_all import *


def test_a_residual_convolution_reaches_the_feed_forward_layers_and_ignores_padding():
    """Without attention, token i depends on token i - 1 only if the convolution is residual."""
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


# Family, changed entries of its config.json (a text: the whole file), what the message must say.
OURS = '{"architectures": ["Backbone"], "backbone": %s}'
BAD_CONFIGS = [
    ("llada", dict(n_layers="2"), "n_layers must be int, not '2'"),
    ("llada", dict(d_model=64.0), "d_model must be int, not 64.0"),
    ("llada", dict(n_heads=0), "n_heads must be at least 1"),
    ("llada", dict(n_heads=None), "a llada config needs the entry n_heads"),
    ("llada", dict(rms_norm_eps="1e-5"), "rms_norm_eps must be float"),
    ("llada", dict(rms_norm_eps=math.nan), "rms_norm_eps must be"),
    ("llada", dict(rope_theta=[1]), "rope_theta must be float"),
    ("llada", dict(rope_full_precision="yes"), "rope_full_precision must be bool"),
    ("llada", dict(n_kv_heads=3), "n_heads=4 is not a multiple of n_kv_heads=3"),
    ("llada", dict(mask_token_id="60"), "mask_token_id must be int, not '60'"),
    ("llada", dict(mask_token_id=80), "mask_id=80 lies outside the vocabulary of 80"),
    ("llada", dict(mask_token_id=-1), "mask_token_id must be at least 0"),
    ("llada", dict(mask_token_id=None), "mask_id=126336 lies outside the vocabulary of 80"),
    ("llada", dict(eos_token_id=[61, 80]), "extra_stop_ids=80 lies outside the vocabulary of 80"),
    ("llada", dict(eos_token_id=[61, "62"]), "eos_token_id must be int, not '62'"),
    ("llada", dict(eos_token_id=[]), "eos_token_id must be int"),
    ("llada", dict(rope_scaling={"factor": 2}), "rope_scaling = {'factor': 2} is not supported"),
    ("llada", dict(quantization_config={"bits": 4}), "quantization_config = {'bits': 4} is not"),
    ("llada", dict(weight_tying=1), "weight_tying = 1 is not supported"),
    ("llada", dict(rope=None), "rope = None is not supported"),
    ("llada", dict(mlp_hidden_size="96"), "mlp_hidden_size must be int"),
    ("llada", dict(mlp_ratio="4", mlp_hidden_size=None), "needs the entry mlp_hidden_size"),
    ("llada", dict(architectures="LLaDAModelLM"), "architectures must be a list of one name"),
    ("llada", dict(architectures=[]), "architectures must be a list"),
    ("llada", dict(architectures=None), "architectures must be a list"),
    ("llada", dict(architectures=[["LLaDAModelLM"]]), "is not supported; known: "),
    ("dream", dict(num_attention_heads="4"), "num_attention_heads must be int, not '4'"),
    ("dream", dict(num_key_value_heads=3), "n_heads=4 is not a multiple of n_kv_heads=3"),
    ("dream", dict(intermediate_size=None), "a dream config needs the entry intermediate_size"),
    ("dream", dict(head_dim=15), "head_dim=15: RoPE needs two equal halves"),
    ("dream", dict(quantization_config={"bits": 4}), "quantization_config = "),
    ("dream", dict(rope_scaling={"type": "yarn"}), "rope_scaling = "),
    ("llada_moe", dict(num_experts_per_tok=9), "experts_per_token=9 does not fit n_experts=8"),
    ("llada_moe", dict(num_experts=0), "experts_per_token=3 does not fit n_experts=0"),
    ("llada_moe", dict(moe_layer_freq=[1, 0]), "moe_layer_freq: only ones"),
    ("llada_moe", dict(moe_layer_freq="x"), "moe_layer_freq: only ones"),
    ("llada_moe", dict(qk_layernorm=None), "a llada_moe config needs the entry qk_layernorm"),
    ("llada", "[]", "must hold an object, not a list"),
    ("llada", "[" * 100_000, "is not valid JSON"),
    ("llada", '{"architectures": ["Backbone"]}', "backbone: expected an object, found NoneType"),
    ("llada", OURS % '{"n_layer": 3}', "backbone: n_layer is an unknown entry"),
    ("llada", OURS % '{"n_layers": "3"}', "backbone: n_layers must be int"),
    ("llada", OURS % '{"conv_width": 4}', "conv_width=4 is even"),
    ("llada", OURS % '{"extra_stop_ids": 3}', "extra_stop_ids must be a list"),
]


@pytest.mark.parametrize("family, change, message", BAD_CONFIGS)
def test_a_bad_config_json_is_refused_with_file_and_entry(tmp_path, family, change, message):
    path = tmp_path / "config.json"
    if isinstance(change, dict):
        change = json.dumps({**CONFIGS[family], **change})
    path.write_text(change)
    with pytest.raises(ValueError) as caught:
        load_backbone(tmp_path, "cpu")
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("change, expected", [
    (dict(eos_token_id=[61, 62]), dict(eos_id=61, pad_id=61, stop_ids=[61, 62])),
    (dict(mask_token_id=0), dict(mask_id=0)),
    (dict(eos_token_id=0), dict(eos_id=0)),
    (dict(mlp_hidden_size=None), dict(d_ff=256)),
    (dict(mlp_hidden_size=None, mlp_ratio=2), dict(d_ff=128)),
    (dict(bias_for_layer_norm=None, n_kv_heads=None), dict(n_kv_heads=4)),
    (dict(rms_norm_eps=0, rope_theta=10000), dict(norm_eps=0)),
])
def test_unusual_but_valid_entries_of_config_json_mean_what_they_mean_officially(change, expected):
    cfg = bb.config_from_json({**CONFIGS["llada"], **change})
    assert {name: getattr(cfg, name) for name in expected} == expected


@pytest.mark.parametrize("change, message", [
    (lambda index: index.pop("weight_map"), "weight_map must be an object"),
    (lambda index: index.update(weight_map=["a"]), "weight_map must be an object"),
    (lambda index: index["weight_map"].update(x="../x.bin"), "'../x.bin', which is"),
    (lambda index: index["weight_map"].update(x="/etc/passwd"), "'/etc/passwd', which is no file"),
    (lambda index: index["weight_map"].update(x=3), "3, which is no file"),
    (lambda index: index["weight_map"].clear(), "missing model.transformer"),
])
def test_a_bad_index_of_the_weights_is_named(tmp_path, change, message):
    write_checkpoint(tmp_path, "llada")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        load_backbone(tmp_path, "cpu")


@pytest.mark.parametrize("dtype, message", [
    (torch.int8, "q_proj.weight is I8"), (torch.float8_e4m3fn, "q_proj.weight is F8_E4M3"),
    (torch.bool, "q_proj.weight is BOOL"),
    (torch.bfloat16, "q_proj.weight is BF16, not F32 .*mixed"),
    (None, "q_proj.weight holds NaN")])
def test_weights_that_are_no_usable_floats_are_named(tmp_path, dtype, message):
    key = "model.transformer.blocks.1.q_proj.weight"
    tensors = write_checkpoint(tmp_path, "llada")
    if dtype is None:
        tensors[key][3, 3] = math.nan
    else:
        tensors[key] = tensors[key].to(dtype)
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_backbone(tmp_path, "cpu")
    if dtype is torch.bfloat16:
        assert load_backbone(tmp_path, "cpu", torch.bfloat16).dtype == torch.bfloat16


# Changed entries of adapter_config.json (None: taken out), what the message must say.
BAD_ADAPTERS = [
    (dict(init_lora_weights="pissa"), "init_lora_weights = 'pissa' is not supported"),
    (dict(init_lora_weights="pissa_niter_16"), "init_lora_weights = "),
    (dict(init_lora_weights="olora"), "init_lora_weights = 'olora' is not supported"),
    (dict(init_lora_weights="corda"), "init_lora_weights = "),
    (dict(init_lora_weights="loftq"), "init_lora_weights = "),
    (dict(peft_type="LOHA"), "peft_type = 'LOHA' is not supported"),
    (dict(use_dora=True), "use_dora = True is not supported"),
    (dict(rank_pattern={"q": 2}), "rank_pattern = "),
    (dict(r=8), r"expected floats of shape \[8, .*r = 8"),
    (dict(r="4"), "r must be int"),
    (dict(r=0), "r must be at least 1"),
    (dict(r=None), ": r is missing"),
    (dict(lora_alpha=None), ": lora_alpha is missing"),
    (dict(lora_alpha=-8), "lora_alpha must be"),
    (dict(lora_alpha=math.nan), "lora_alpha must be"),
    (dict(lora_alpha="8"), "lora_alpha must be float"),
    (dict(lora_alpha=9), "trained with lora_alpha = 8"),
    (dict(lora_dropout="no"), "lora_dropout must be float"),
    (dict(base_model_name_or_path=None), ": base_model_name_or_path is missing"),
    (dict(base_model_name_or_path=3), "base_model_name_or_path must be str"),
]


@pytest.mark.parametrize("change, message", BAD_ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused_with_file_and_entry(tmp_path, change, message):
    model = random_backbone()
    bb.save_backbone(model, tmp_path / "base", None)
    bb.save_adapter(model.add_lora(4, 8), tmp_path / "adapter", tmp_path / "base")
    path = tmp_path / "adapter/adapter_config.json"
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone(tmp_path / "adapter", "cpu")
    assert str(tmp_path / "adapter") in str(caught.value)


@pytest.mark.parametrize("kind", [True, False, "gaussian", "eva"])
def test_an_adapter_with_harmless_initial_values_loads(tmp_path, kind):
    model = random_backbone()
    bb.save_backbone(model, tmp_path / "base", None)
    bb.save_adapter(model.add_lora(4, 8, dropout=0.05), tmp_path / "adapter", tmp_path / "base")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": kind}))
    loaded = load_backbone(tmp_path / "adapter", "cpu")
    assert loaded.layers[0].attn.q.lora_dropout == 0.05
    with pytest.raises(ValueError, match="carries an adapter already"):
        loaded.add_lora(8, 16)


def test_an_adapter_whose_base_is_an_adapter_or_itself_is_refused(tmp_path):
    model = random_backbone().add_lora(4, 8)
    for name, base in (("a", "a"), ("b", "c"), ("c", "b")):
        bb.save_adapter(model, tmp_path / name, tmp_path / base)
    for name in "abc":
        for load in (load_backbone, load_tokenizer):
            with pytest.raises(ValueError, match="is an adapter too"):
                load(tmp_path / name)


def test_lora_dropout_acts_on_the_input_of_a_in_training_only(model):
    ids = torch.randint(3, 40, (2, 7))
    model.add_lora(4, 8, dropout=0.5)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.3)
    layer = model.layers[0].attn.q
    x = torch.randn(2, 7, 32)
    torch.manual_seed(3)
    ours = layer.train()(x)
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(x, 0.5)
    low = 2 * dropped @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(ours, x @ layer.weight.T + low)
    model.eval()
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_a_changed_byte_in_our_json_is_found_and_files_without_checksum_still_load(tmp_path):
    bb.save_backbone(random_backbone(), tmp_path)
    path = tmp_path / "config.json"
    good = path.read_text()
    path.write_text(good.replace('"rope_theta": 10000.0', '"rope_theta": 10001.0'))
    with pytest.raises(ValueError, match="checksum does not match"):
        load_backbone(tmp_path, "cpu")
    raw = json.loads(good)
    del raw["crc32"]                            # as older versions wrote it
    del raw["backbone"]["conv_residual"]
    del raw["backbone"]["extra_stop_ids"]
    path.write_text(json.dumps(raw))
    load_backbone(tmp_path, "cpu")
    bb.write_json(tmp_path / "edit.json", {"a": 1}, checksum=False)
    assert (tmp_path / "edit.json").read_text() == '{\n "a": 1\n}'
    assert bb.read_json(tmp_path / "edit.json") == {"a": 1}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    def write(part):
        Path(part).write_text("half")
        raise error
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises((KeyboardInterrupt, SystemExit, OSError)):
        bb.write_atomically(path, write)
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {"file": "old"}


def test_tokenizer_files_are_replaced_whole(tmp_path, monkeypatch):
    tokenizer, model = load_tokenizer("tiny"), random_backbone(vocab_size=139)
    bb.save_backbone(model, tmp_path, tokenizer)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def interrupted(folder):
        (Path(folder) / "tokenizer.json").write_text("half")
        raise KeyboardInterrupt
    monkeypatch.setattr(tokenizer, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bb.save_backbone(model, tmp_path, tokenizer)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_half_a_character_is_refused_by_name():
    with pytest.raises(ValueError, match="lone surrogate '.ud800', at position 6"):
        bb.encode(load_tokenizer("tiny"), "river \ud800")


def test_an_error_starts_on_a_line_of_its_own_when_a_progress_bar_is_open():
    code = ("import backbone\nfrom tqdm import tqdm\n"
            "def main():\n    bar = tqdm(total=3)\n    bar.update()\n    raise ValueError('no')\n"
            "backbone.cli(main)\n")
    ended = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == "error: no" and "\nerror: no" in ended.stderr


@pytest.mark.parametrize("device", ["meta", "abacus", "cuda:99"])
def test_a_device_on_which_nothing_can_be_computed_is_refused(device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here .*cpu always can"):
        bb.default_device(device)
