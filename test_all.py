"""The claims of this repository, executable: `python -m pytest -q test_all.py` (CPU, no network).

Each test's name is a sentence that can turn out false. Facts are checked against code we did not
write (transformers' Llama, Qwen2 and Qwen3-MoE under a full mask, torch.nn.GRUCell) or against a
short loop written from the paper, without our helpers.
By hand:
  SLOW=1 python -m pytest -q test_all.py -k learns    the learning run, 12 minutes
  python test_all.py --card --family llada            times and memory of a real size on this card
  python test_all.py --full-size DIR                  writes a random 16 GB checkpoint laid out as
                                                      LLaDA-8B's (README, "Running the real models")
"""
import argparse
import ast
import contextlib
import glob
import inspect
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import backbone as bb
import memdlm
import metastate
import niah
import sample
import train
from backbone import Backbone, BackboneConfig, corrupt, load_backbone, load_tokenizer, masked_loss
from memdlm import MemDLMConfig
from metastate import MetaState, MetaStateConfig

HERE = Path(__file__).parent
torch.set_num_threads(2)


# --------------------------------------------------------------------------------------------------
# 0. What the tests share: tiny models, and checkpoints laid out as the official ones.

def random_backbone(seed=0, **options):
    """A small backbone whose output depends on every weight (freshly initialised, its output
    projections would be zero)."""
    sizes = {"vocab_size": 40, "d_model": 32, "head_dim": 16, "d_ff": 48}
    torch.manual_seed(seed)
    model = Backbone(BackboneConfig(**{**sizes, **options})).requires_grad_(False)
    for p in model.parameters():
        if p.ndim > 1:
            p.normal_(0, 0.3)
        else:
            p.uniform_(0.5, 1.5)
    # As trained models do, it never predicts [MASK].
    model.lm_head.weight[model.cfg.mask_id] = 0
    return model.eval()


MIXTURE = dict(conv_width=0, n_experts=4, experts_per_token=2)
MEM = MemDLMConfig(rank=4, alpha=8.0, inner_lr=0.5)


@pytest.fixture
def model():
    return random_backbone()


@pytest.fixture
def batch():
    """x0 (4, 14): rows of different length, padded on the left; the answer is the last 6 tokens."""
    g = torch.Generator().manual_seed(1)
    x0 = torch.randint(3, 40, (4, 14), generator=g)
    attend = torch.ones(4, 14, dtype=torch.bool)
    for row, pads in enumerate([0, 3, 5, 1]):
        attend[row, :pads] = False
    given = torch.ones_like(attend)
    given[:, 8:] = False
    t = torch.tensor([0.3, 0.9, 0.6, 1.0])
    return train.Batch(x0, given, attend, t, torch.rand(4, 14, generator=g))


CONFIGS = {
    "llada": dict(
        architectures=["LLaDAModelLM"], model_type="llada", d_model=64, n_layers=2, n_heads=4,
        n_kv_heads=4, mlp_hidden_size=96, vocab_size=70, embedding_size=80, rms_norm_eps=1e-5,
        rope_theta=500000.0, rope_full_precision=True, max_sequence_length=128, mask_token_id=60,
        eos_token_id=61, block_type="llama", activation_type="silu", layer_norm_type="rms",
        rope=True, weight_tying=False),
    "dream": dict(
        architectures=["DreamModel"], model_type="Dream", hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, vocab_size=80,
        rms_norm_eps=1e-6, rope_theta=1000000.0, hidden_act="silu", max_position_embeddings=128,
        mask_token_id=60, eos_token_id=61, tie_word_embeddings=False, rope_scaling=None),
    "llada_moe": dict(
        architectures=["LLaDAMoEModelLM"], model_type="llada", hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, expert_intermediate_size=24, num_experts=8,
        num_experts_per_tok=3, vocab_size=80, rms_norm_eps=1e-5, rope_theta=50000.0,
        qk_layernorm=True, max_position_embeddings=128, mask_token_id=60, eos_token_id=61,
        moe_layer_freq=[1, 1], hidden_act="silu", tie_word_embeddings=False),
}
# The published sizes. LLaDA-MoE's config.json names no mask token.
REAL = {
    "llada": dict(
        CONFIGS["llada"], d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32,
        mlp_hidden_size=12288, vocab_size=126464, embedding_size=126464, max_sequence_length=4096,
        mask_token_id=126336, eos_token_id=126081),
    "dream": dict(
        CONFIGS["dream"], hidden_size=3584, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, intermediate_size=18944, vocab_size=152064,
        max_position_embeddings=131072, mask_token_id=151666, eos_token_id=151643),
    "llada_moe": dict(
        CONFIGS["llada_moe"], hidden_size=2048, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=16, expert_intermediate_size=1024, num_experts=64,
        num_experts_per_tok=8, vocab_size=157184, max_position_embeddings=8192,
        moe_layer_freq=[1] * 16, mask_token_id=None, eos_token_id=156892),
}


def official_keys(family, config):
    """Key -> shape as the official checkpoints have them, written from the fact sheet, not from
    backbone.py."""
    return llada_keys(config) if family == "llada" else qwen_keys(family, config)


def llada_keys(c):
    D, V, ffn = c["d_model"], c["embedding_size"], c["mlp_hidden_size"]
    keys = {"model.transformer.wte.weight": (V, D),
            "model.transformer.ln_f.weight": (D,),
            "model.transformer.ff_out.weight": (V, D)}
    for i in range(c["n_layers"]):
        block = f"model.transformer.blocks.{i}."
        for name in ("attn_norm", "ff_norm"):
            keys[f"{block}{name}.weight"] = (D,)
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            keys[f"{block}{name}.weight"] = (D, D)
        keys[f"{block}ff_proj.weight"] = (ffn, D)
        keys[f"{block}up_proj.weight"] = (ffn, D)
        keys[f"{block}ff_out.weight"] = (D, ffn)
    return keys


def qwen_keys(family, c):
    D, V = c["hidden_size"], c["vocab_size"]
    d = D // c["num_attention_heads"]
    kv = c["num_key_value_heads"] * d
    keys = {"model.embed_tokens.weight": (V, D),
            "model.norm.weight": (D,),
            "lm_head.weight": (V, D)}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            keys[f"{layer}{name}.weight"] = (D,)
        for x, rows in zip("qkvo", (D, kv, kv, D)):
            keys[f"{layer}self_attn.{x}_proj.weight"] = (rows, D)
        if family == "dream":
            ffn = c["intermediate_size"]
            mlps = ["mlp"]
            for x, rows in zip("qkv", (D, kv, kv)):
                keys[f"{layer}self_attn.{x}_proj.bias"] = (rows,)
        else:
            ffn = c["expert_intermediate_size"]
            for x in "qk":
                keys[f"{layer}self_attn.{x}_norm.weight"] = (d,)
            keys[f"{layer}mlp.gate.weight"] = (c["num_experts"], D)
            mlps = [f"mlp.experts.{e}" for e in range(c["num_experts"])]
        for mlp in mlps:
            keys[f"{layer}{mlp}.gate_proj.weight"] = (ffn, D)
            keys[f"{layer}{mlp}.up_proj.weight"] = (ffn, D)
            keys[f"{layer}{mlp}.down_proj.weight"] = (D, ffn)
    return keys


def write_checkpoint(folder, family, dtype=torch.float32, **overrides):
    """A random checkpoint in the official layout, in two shards with an index: {name: tensor}."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIGS[family], **overrides}
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in official_keys(family, config).items():
        is_norm = len(shape) == 1 and key.endswith("weight")
        tensors[key] = (torch.randn(shape, generator=g) * 0.2 + is_norm).to(dtype)
    # Every second tensor goes to the same shard: shards need not follow the layers.
    weight_map = {}
    for number in (1, 2):
        names = sorted(tensors)[number - 1::2]
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({k: tensors[k] for k in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


SHARED_SIZES = dict(vocab_size=80, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                    attn_implementation="eager", max_position_embeddings=128)


def as_llama(tensors, folder):
    """LLaDA is a Llama but for its names, which are told apart here by their parts."""
    import transformers
    ours_to_llama = {
        "wte": "embed_tokens", "ln_f": "norm", "blocks": "layers",
        "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
        "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
        "attn_out": "self_attn.o_proj", "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj",
        "ff_out": "mlp.down_proj"}
    state = {}
    for key, tensor in tensors.items():
        parts = key.replace("transformer.", "").split(".")
        state[".".join(ours_to_llama.get(part, part) for part in parts)] = tensor
    # "ff_out" is used twice: outside the blocks it is the head.
    state["lm_head.weight"] = state.pop("model.mlp.down_proj.weight")
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **SHARED_SIZES, num_key_value_heads=4, intermediate_size=96, rms_norm_eps=1e-5,
        rope_theta=500000.0))
    other.load_state_dict(state)
    return other


def as_qwen2(tensors, folder):
    import transformers
    other = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        **SHARED_SIZES, num_key_value_heads=2, intermediate_size=96, rms_norm_eps=1e-6,
        rope_theta=1000000.0))
    other.load_state_dict(tensors)
    return other


def as_qwen3_moe(tensors, folder):
    """Through a file: transformers 5 fuses the experts of a checkpoint while it loads it."""
    import transformers
    config = transformers.Qwen3MoeConfig(
        **SHARED_SIZES, num_key_value_heads=4, head_dim=16, moe_intermediate_size=24,
        num_experts=8, num_experts_per_tok=3, norm_topk_prob=False, rms_norm_eps=1e-5,
        rope_theta=50000.0, intermediate_size=24, attention_bias=False, decoder_sparse_step=1,
        mlp_only_layers=[])
    target = folder / "as_qwen3_moe"
    target.mkdir()
    config.save_pretrained(target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    dtype = next(iter(tensors.values())).dtype
    return transformers.Qwen3MoeForCausalLM.from_pretrained(
        target, attn_implementation="eager", dtype=dtype)


def independent_model(family, tensors, folder):
    """The same weights in a model of transformers. Its decoders are causal by default; an all-zero
    additive mask makes them attend fully."""
    build = {"llada": as_llama, "dream": as_qwen2, "llada_moe": as_qwen3_moe}[family]
    dtype = next(iter(tensors.values())).dtype
    return build(tensors, folder).to(dtype).eval()


# --------------------------------------------------------------------------------------------------
# 1. backbone.py

@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_logits_of_a_checkpoint_equal_an_independent_model_with_a_full_mask(
        tmp_path, family, dtype, tolerance):
    tensors = write_checkpoint(tmp_path / "checkpoint", family, dtype)
    model = load_backbone(tmp_path / "checkpoint", "cpu")
    other = independent_model(family, tensors, tmp_path)
    ids = torch.randint(0, 80, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(ids)
        full = torch.zeros(2, 1, 11, 11, dtype=dtype)
        theirs = other(input_ids=ids, attention_mask=full).logits
    # Dream's sampler shifts the logits by one position; position 0 keeps its own.
    if family == "dream":
        theirs = torch.cat([theirs[:, :1], theirs[:, :-1]], dim=1)
    assert model.dtype == dtype
    error = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
    assert error < tolerance


@pytest.mark.parametrize("family, parameters, mask_id", [
    ("llada", 8_015_581_184, 126336),
    ("dream", 7_615_616_512, 151666),
    ("llada_moe", 7_356_880_896, 156895)])
def test_the_real_sizes_have_the_published_parameter_counts_and_key_sets(
        family, parameters, mask_id):
    cfg = bb.config_from_json(REAL[family])
    with torch.device("meta"):
        model = Backbone(cfg)
    assert sum(p.numel() for p in model.parameters()) == parameters
    ours = {bb.official_name(n, family): tuple(p.shape) for n, p in model.named_parameters()}
    assert ours == official_keys(family, REAL[family])
    assert cfg.mask_id == mask_id


@pytest.mark.parametrize("options", [
    dict(),
    dict(conv_width=0, shift=True, n_kv_heads=1),
    dict(MIXTURE, qk_norm=True)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_has_the_same_logits_alone_and_in_any_padded_batch(options, side):
    model = random_backbone(**options)
    row = torch.randint(3, 40, (1, 9))
    row_ids = F.pad(row, (5, 0) if side == "left" else (0, 5))                      # (1, 14)
    row_attend = F.pad(row >= 0, (5, 0) if side == "left" else (0, 5))
    ids = torch.cat([row_ids, torch.randint(3, 40, (1, 14))])                       # (2, 14)
    attend = torch.cat([row_attend, torch.ones(1, 14, dtype=torch.bool)])
    together = model(ids, attend)[0][attend[0]]                                     # (9, V)
    torch.testing.assert_close(together, model(row)[0], atol=1e-5, rtol=1e-4)


def test_a_tokenizers_mask_of_zeros_and_ones_does_as_well_as_booleans(model, batch):
    assert torch.equal(model(batch.x0, batch.attend.long()), model(batch.x0, batch.attend))


def test_slices_of_layers_compose_to_the_whole(model):
    ids = torch.randint(3, 40, (2, 7))
    ctx = model.context(ids)
    h = model.run(model.embed(ids), ctx, 0, 2)
    h = model.run(h, ctx, 2)
    assert torch.equal(model.head(h, ctx), model(ids))


def test_the_head_on_chosen_positions_gives_the_logits_of_the_whole_there(model):
    ids = torch.randint(3, 40, (2, 7))
    at = torch.rand(2, 7) < 0.5
    torch.testing.assert_close(model(ids, at=at), model(ids)[at])


def test_no_mask_tensor_is_built_when_nothing_is_padded(model):
    ids = torch.randint(3, 40, (2, 7))
    assert model.context(ids, torch.ones(2, 7, dtype=torch.bool)).bias is None


def test_the_tiny_tokenizer_gives_back_every_text_it_was_given():
    tokenizer = load_tokenizer("tiny")
    text = "[PAD] the sky is blue . river = 47 . [MASK] ? river = [EOS]"
    assert tokenizer.decode(bb.encode(tokenizer, text)) == text


def test_the_tiny_tokenizer_and_the_tiny_model_agree_on_the_special_ids():
    tokenizer = load_tokenizer("tiny")
    ids = (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.eos_token_id)
    cfg = BackboneConfig()
    assert ids == (cfg.pad_id, cfg.mask_id, cfg.eos_id)


def test_words_outside_the_closed_vocabulary_are_named():
    with pytest.raises(ValueError, match="outside the closed vocabulary: hello world"):
        bb.encode(load_tokenizer("tiny"), "the hello sky world")


def test_dreams_tokenizer_loads_from_its_own_files_without_remote_code(tmp_path):
    """Dream ships vocab.json and merges.txt and no tokenizer.json; here a BPE without merges."""
    from tokenizers.pre_tokenizers import ByteLevel
    write_checkpoint(tmp_path, "dream")
    vocabulary = {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
    added = {s: len(vocabulary) + i for i, s in enumerate(specials)}
    config = {"tokenizer_class": "DreamTokenizer",
              "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = load_tokenizer(tmp_path)
    assert type(tokenizer).__name__.startswith("Qwen2")
    assert tokenizer.decode(bb.encode(tokenizer, "naive 12 café")) == "naive 12 café"


# LLaDA's template opens the assistant's turn whatever add_generation_prompt says.
LLADA_TEMPLATE = (
    "{{ '<|startoftext|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")
LLADA_TURNS = ("<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nhow far?<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n")


@pytest.fixture
def llada_chat():
    """A byte-level tokenizer with LLaDA's special tokens and chat template, and a configuration."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<|startoftext|>", "<|endoftext|>", "<|start_header_id|>",
                            "<|end_header_id|>", "<|eot_id|>", "<|mdm_mask|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=LLADA_TEMPLATE)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in
           dict(eot_id="<|eot_id|>", eos_id="<|endoftext|>", mask_id="<|mdm_mask|>").items()}
    cfg = BackboneConfig(family="llada", vocab_size=300, conv_width=0, chat=True, **ids)
    return tokenizer, cfg


def test_a_chat_prompt_ends_with_an_open_turn_of_the_assistant(llada_chat):
    tokenizer, cfg = llada_chat
    assert tokenizer.decode(bb.encode_prompt(tokenizer, cfg, "how far?")) == LLADA_TURNS


def test_a_chat_pair_is_the_open_turn_and_a_response_that_ends_it(llada_chat):
    tokenizer, cfg = llada_chat
    pair = {"prompt": "how far?", "response": "72 km"}
    texts = [tokenizer.decode(ids) for ids in bb.encode_pair(tokenizer, cfg, pair)]
    assert texts == [LLADA_TURNS, "72 km<|eot_id|>"]


def test_without_chat_a_prompt_is_its_own_text_and_a_response_ends_with_end_of_text(llada_chat):
    tokenizer, cfg = llada_chat
    cfg.chat = False
    pair = {"prompt": "how far?", "response": "72 km"}
    texts = [tokenizer.decode(ids) for ids in bb.encode_pair(tokenizer, cfg, pair)]
    assert texts == ["how far?", "72 km<|endoftext|>"]
    assert tokenizer.decode(bb.encode_prompt(tokenizer, cfg, "how far?")) == "how far?"


@pytest.fixture
def noise():
    """x0, given, u (400, 100), enough tokens to count."""
    g = torch.Generator().manual_seed(0)
    x0 = torch.randint(3, 40, (400, 100), generator=g)
    given = torch.rand(400, 100, generator=g) < 0.3
    return x0, given, torch.rand(400, 100, generator=g)


def test_corrupt_masks_at_rate_t(noise):
    x0, given, u = noise
    _, masked = corrupt(x0, torch.full((400,), 0.4), given, 1, u)
    n = (~given).sum()
    assert abs(masked.sum() / n - 0.4) < 4 * math.sqrt(0.4 * 0.6 / n)


def test_corrupt_puts_the_mask_where_it_says_and_never_on_what_is_given(noise):
    x0, given, u = noise
    xt, masked = corrupt(x0, torch.full((400,), 0.4), given, 1, u)
    assert torch.equal(xt[~masked], x0[~masked])
    assert (xt[masked] == 1).all()
    assert not (masked & given).any()


def test_a_larger_t_masks_a_superset(noise):
    x0, given, u = noise
    _, masked = corrupt(x0, torch.full((400,), 0.4), given, 1, u)
    _, more = corrupt(x0, torch.full((400,), 0.6), given, 1, u)
    assert not (masked & ~more).any()


def test_at_t_1_all_that_is_not_given_is_masked_and_at_t_0_nothing(noise):
    x0, given, u = noise
    assert torch.equal(corrupt(x0, torch.ones(400), given, 1, u)[1], ~given)
    assert torch.equal(corrupt(x0, torch.zeros(400), given, 1, u)[0], x0)


@pytest.mark.parametrize("weight, expected", [
    ([2.0, 1.0], (2 * math.log(2) + 2 * math.log(4)) / 4),
    ([1.0, 1.0], (math.log(2) + 2 * math.log(4)) / 4)])
def test_loss_equals_a_hand_computed_case(weight, expected):
    """Two rows of two tokens, three of the four masked; p(x0) = 1/2, 1/4, 1/4."""
    x0 = torch.tensor([[0, 1], [1, 0]])
    masked = torch.tensor([[True, False], [True, True]])
    logits = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.25, 0.75]]).log()           # (N, V)
    loss = masked_loss(logits, x0, masked, torch.tensor(weight), 4)
    assert loss.item() == pytest.approx(expected)


def test_gradient_checkpointing_changes_no_gradient(model, batch):
    model.requires_grad_(True)
    masked = ~batch.given

    def gradients(checkpointing):
        model.checkpointing = checkpointing
        model.zero_grad()
        logits = model(batch.x0, batch.attend, masked)
        masked_loss(logits, batch.x0, masked, torch.ones(4), 24).backward()
        return [p.grad.clone() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True)))


def test_a_saved_backbone_gives_the_same_logits_and_its_tokenizer_loads(tmp_path):
    model = random_backbone(vocab_size=139)
    bb.save_backbone(model, tmp_path, load_tokenizer("tiny"))
    ids = torch.randint(3, 40, (2, 7))
    assert torch.equal(load_backbone(tmp_path, "cpu")(ids), model(ids))
    assert load_tokenizer(tmp_path).mask_token_id == 1


def test_a_tokenizer_with_another_vocabulary_than_the_models_is_refused(tmp_path):
    bb.save_backbone(random_backbone(vocab_size=139), tmp_path, load_tokenizer("tiny"))
    vocabulary = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(vocabulary.replace('"river"', '"lake"'))
    with pytest.raises(ValueError, match="another vocabulary"):
        load_tokenizer(tmp_path)


def truncate(folder, tensors):
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def leave_out_the_last_norm(folder, tensors):
    kept = {k: v for k, v in tensors.items() if "ln_f" not in k}
    save_file(kept, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()


def remove_the_config(folder, tensors):
    (folder / "config.json").unlink()


def break_the_config(folder, tensors):
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize("damage, message", [
    (truncate, "truncated or corrupted"),
    (leave_out_the_last_norm, "missing model.transformer.ln_f.weight"),
    (remove_the_config, "config.json is missing"),
    (break_the_config, "not valid JSON")])
def test_a_damaged_checkpoint_is_refused_and_the_damage_named(tmp_path, damage, message):
    damage(tmp_path, write_checkpoint(tmp_path, "llada"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_backbone(tmp_path, "cpu")


@pytest.mark.parametrize("changes, message", [
    (dict(n_layers=1), "unexpected model.transformer.blocks.1"),
    (dict(mlp_hidden_size=95), "has shape"),
    (dict(weight_tying=True), "weight_tying = True is not supported"),
    (dict(architectures=["GPT2LMHeadModel"]), "architecture 'GPT2LMHeadModel' is not supported"),
    (dict(architectures=["LLaDA2MoeModelLM"]), "not supported")])
def test_a_config_that_does_not_fit_is_refused_and_the_entry_named(tmp_path, changes, message):
    write_checkpoint(tmp_path, "llada")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS["llada"], **changes}))
    with pytest.raises(ValueError, match=message):
        load_backbone(tmp_path, "cpu")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint folder at .*nowhere"):
        load_backbone(str(tmp_path / "nowhere"))


def random_adapter(base):
    """The backbone in `base` with a rank-4 LoRA whose B is no longer zero."""
    model = load_backbone(base, "cpu").add_lora(4, 8)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_a_new_adapter_changes_no_logit(tmp_path, family):
    write_checkpoint(tmp_path, family)
    ids = torch.randint(0, 60, (2, 7))
    plain = load_backbone(tmp_path, "cpu")(ids)
    assert torch.equal(load_backbone(tmp_path, "cpu").add_lora(4, 8)(ids), plain)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_saved_adapter_gives_the_same_logits_and_not_its_bases(tmp_path, family):
    write_checkpoint(tmp_path / "base", family)
    model = random_adapter(tmp_path / "base")
    bb.save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    ids = torch.randint(0, 60, (2, 7))
    loaded = load_backbone(tmp_path / "adapter", "cpu")(ids)
    assert torch.equal(loaded, model(ids))
    assert not torch.equal(loaded, load_backbone(tmp_path / "base", "cpu")(ids))


@pytest.mark.parametrize("family", CONFIGS)
def test_an_adapter_equals_weights_to_which_it_was_added(tmp_path, family):
    write_checkpoint(tmp_path, family)
    model = random_adapter(tmp_path)
    merged = load_backbone(tmp_path, "cpu")
    for name, module in model.named_modules():
        if isinstance(module, bb.Linear) and module.lora_rank:
            change = 8 / 4 * module.lora_B.data @ module.lora_A.data                # alpha / r
            merged.get_submodule(name).weight.data += change
    ids = torch.randint(0, 60, (2, 7))
    torch.testing.assert_close(merged(ids), model(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_pattern_in_an_adapters_file_finds_all_linear_layers_but_the_head(tmp_path, family):
    """PEFT matches target_modules with fullmatch."""
    write_checkpoint(tmp_path, family)
    bb.save_adapter(random_adapter(tmp_path), tmp_path / "adapter", tmp_path)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    matrices = {key.removesuffix(".weight") for key, shape
                in official_keys(family, CONFIGS[family]).items() if len(shape) == 2}
    found = {name for name in matrices if re.fullmatch(config["target_modules"], name)}
    if family == "llada":
        assert matrices - found == {"model.transformer.wte", "model.transformer.ff_out"}
    else:
        assert matrices - found == {"model.embed_tokens", "lm_head"}


# --------------------------------------------------------------------------------------------------
# 2. sample.py, against references written from the description of the official samplers

def reference_llada(model, prompt, gen_length, steps, block_length, temperature=0.0, cfg=0.0,
                    remasking="low_confidence"):
    """prompt (B, P) -> the answer (B, gen_length)."""
    B = len(prompt)
    mask_id = model.cfg.mask_id
    x = torch.cat([prompt, torch.full((B, gen_length), mask_id)], 1)                # (B, L)
    fixed = x != mask_id
    blocks = gen_length // block_length
    for end in range(prompt.shape[1] + block_length, x.shape[1] + 1, block_length):
        S = steps // blocks
        n = (x[:, end - block_length:end] == mask_id).sum(1)                        # (B,)
        for s in range(S):
            logits = model(x)                                                       # (B, L, V)
            if cfg > 0:
                free = model(torch.where(fixed, mask_id, x))
                logits = free + (cfg + 1) * (logits - free)
            noisy = logits
            if temperature > 0:
                gumbel = -torch.rand_like(logits, dtype=torch.float64).log()
                noisy = logits.double().exp() / gumbel ** temperature
            token = noisy.argmax(-1)                                                # (B, L)
            if remasking == "low_confidence":
                p = logits.softmax(-1).gather(-1, token[..., None])[..., 0]
            else:
                p = torch.rand(x.shape)
            p[:, end:] = -torch.inf
            p = torch.where(x == mask_id, p, -torch.inf)
            for row in range(B):
                quota = int(n[row] // S + (s < n[row] % S))
                top = torch.topk(p[row], quota).indices
                x[row, top] = token[row, top]
    return x[:, prompt.shape[1]:]


@pytest.mark.parametrize("options", [
    dict(),
    dict(temperature=0.7),
    dict(cfg=1.5),
    dict(remasking="random", temperature=0.5),
    dict(steps=6, block_length=4),
    dict(steps=6, block_length=12),
    dict(block_length=3, temperature=0.3, cfg=0.5)])
def test_llada_sampler_is_token_identical_to_the_official_description(model, options):
    options = {"gen_length": 12, "steps": 12, "block_length": 6, **options}
    prompt = torch.randint(3, 40, (3, 5))
    torch.manual_seed(5)
    ours = sample.generate(model, prompt, stop_early=False, **options)
    torch.manual_seed(5)
    assert torch.equal(ours, reference_llada(model, prompt, **options))


def reference_dream_token(logits, temperature, top_p, top_k):
    """logits (N, V) -> a token each (N,) and the distribution it came from (N, V)."""
    lowest = torch.finfo(logits.dtype).min
    if temperature > 0:
        logits = logits / temperature
    if top_p is not None:
        value, index = logits.sort(descending=True)
        remove = value.softmax(-1).cumsum(-1) > top_p
        remove[:, 1:] = remove[:, :-1].clone()
        remove[:, 0] = False
        for row in range(len(logits)):
            logits[row, index[row][remove[row]]] = lowest
    if top_k is not None:
        logits[logits < logits.topk(top_k).values[:, -1:]] = lowest
    probs = logits.softmax(-1)
    if temperature > 0 and len(probs):
        return torch.distributions.Categorical(probs).sample(), probs
    return probs.argmax(-1), probs


def reference_dream(model, prompt, gen_length, steps, alg, temperature=0.0, top_p=None,
                    top_k=None, alg_temp=None):
    """prompt (B, P) -> the answer (B, gen_length)."""
    B = len(prompt)
    mask_id = model.cfg.mask_id
    x = torch.cat([prompt, torch.full((B, gen_length), mask_id)], 1)                # (B, L)
    time = torch.linspace(1, 1e-3, steps + 1)
    for i in range(steps):
        masks = x == mask_id
        share = 1 - time[i + 1] / time[i] if i < steps - 1 else 1.0
        logits = model(x)[masks]                                                    # (N, V)
        if alg == "origin":
            move = torch.rand(len(logits)) < share
            values = torch.full((len(move),), mask_id)
            values[move], _ = reference_dream_token(logits[move], temperature, top_p, top_k)
            x[masks] = values
            continue
        token, probs = reference_dream_token(logits, temperature, top_p, top_k)
        first, second = probs.topk(2).values.T
        confidence = {"maskgit_plus": probs.gather(1, token[:, None])[:, 0],
                      "topk_margin": first - second,
                      "entropy": (probs * (probs + 1e-10).log()).sum(-1)}[alg]      # (N,)
        number = int(masks.sum() / B * share)
        if number == 0:
            continue
        full = torch.full(x.shape, -torch.inf)
        full[masks] = confidence
        tokens = torch.full(x.shape, mask_id)
        tokens[masks] = token
        if alg_temp:
            chosen = torch.multinomial((full / alg_temp).softmax(-1), number)
        else:
            chosen = full.topk(number).indices
        x.scatter_(1, chosen, tokens.gather(1, chosen))
    return x[:, prompt.shape[1]:]


@pytest.mark.parametrize("alg", sample.DREAM_ORDERS)
@pytest.mark.parametrize("options", [
    dict(),
    dict(temperature=0.4, top_p=0.9),
    dict(temperature=0.4, top_k=5, alg_temp=0.3),
    dict(top_k=3),
    dict(steps=5)])
def test_dream_sampler_is_token_identical_to_the_official_description(alg, options):
    model = random_backbone(conv_width=0, shift=True)
    prompt = torch.randint(3, 40, (2, 5))
    options = {"steps": 10, **options}
    torch.manual_seed(3)
    ours = sample.generate(model, prompt, gen_length=10, block_length=10, remasking=alg,
                           stop_early=False, **options)
    torch.manual_seed(3)
    assert torch.equal(ours, reference_dream(model, prompt, 10, alg=alg, **options))


@pytest.mark.parametrize("masks, quota", [(32, [3] * 8 + [2] * 4), (8, [1] * 8 + [0] * 4)])
def test_llada_shares_out_its_masks_over_12_steps_as_published(masks, quota):
    assert sample.split_evenly(torch.tensor([masks]), 12).tolist() == [quota]


@pytest.mark.parametrize("masks, steps, expected", [
    (32, 32, [0] + [1] * 30 + [2]),
    (128, 128, [0] + [1] * 126 + [2]),
    (128, 64, [1] + [2] * 62 + [3]),
    (128, 32, [3] + [4] * 30 + [5])])
def test_dreams_fp32_schedule_commits_the_published_number_of_tokens_at_each_step(
        masks, steps, expected):
    at = torch.ones(1, masks, dtype=torch.bool)
    counts = []
    for step in range(steps):
        logits = torch.randn(int(at.sum()), 5)                                      # (N, V)
        new, _ = sample.choose_dream(logits, at, step, steps, "entropy", 0.0, None, None, None)
        counts.append(int(new.sum()))
        at = at & ~new
    assert counts == expected


@pytest.mark.parametrize("options", [
    dict(),
    dict(block_length=3),
    dict(threshold=0.2),
    dict(cfg=0.7),
    dict(remasking="entropy")])
def test_ragged_prompts_decode_as_each_prompt_alone(model, options):
    prompts = [torch.randint(3, 40, (n,)) for n in (4, 9, 1)]
    options = {"gen_length": 6, "steps": 6, "block_length": 6, **options}
    together = sample.generate(model, prompts, **options)
    alone = [sample.generate(model, [p], **options) for p in prompts]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("threshold, steps, commits", [(0.0, 8, [8]), (1.1, 1, [1] * 8)])
def test_threshold_decoding_commits_all_sure_tokens_and_at_least_one(
        model, threshold, steps, commits):
    seen = []

    def count(xt, new, state):
        seen.append(int(new.sum()))
    sample.generate(model, torch.randint(3, 40, (1, 5)), gen_length=8, steps=steps,
                    block_length=8, threshold=threshold, stop_early=False, on_step=count)
    assert seen == commits


class Eager:
    """A predictor that wants end-of-text everywhere; `memory` is what sample.generate takes."""
    calls = 0

    def memory(self, backbone, xt, attend, start):
        def predict(xt, t, state, at):
            self.calls += 1
            logits = backbone(xt, attend, at)                                       # (N, V)
            logits[:, backbone.cfg.eos_id] = logits.max() + 1
            return logits, state
        return predict, None


@pytest.mark.parametrize("policy, share", [("allow", 1.0), ("forbid", 0.0)])
def test_end_of_text_can_be_allowed_or_forbidden(model, policy, share):
    ids = sample.generate(model, torch.randint(3, 40, (4, 5)), gen_length=6, steps=6,
                          block_length=6, eos=policy, memory=Eager().memory)
    assert (ids == model.cfg.eos_id).float().mean() == share


def test_decoding_stops_at_the_block_in_which_every_row_has_ended(model):
    eager = Eager()
    sample.generate(model, torch.randint(3, 40, (4, 5)), gen_length=6, steps=6, block_length=1,
                    memory=eager.memory)
    assert eager.calls == 1


def test_an_answer_is_cut_at_its_first_stop_token(model):
    assert sample.cut(torch.tensor([5, 6, model.cfg.eos_id, 9]), model.cfg) == [5, 6]


def test_a_row_is_done_once_no_mask_is_left_before_its_first_stop_token(model):
    eos, mask = model.cfg.eos_id, model.cfg.mask_id
    rows = torch.tensor([[5, eos, mask, 9], [5, mask, eos, 9]])
    finished, done = sample.finish_rows(rows, 0, model.cfg)
    assert done.tolist() == [True, False]
    assert finished.tolist() == [[5, eos, eos, eos], [5, mask, eos, 9]]


@pytest.mark.parametrize("last, is_first", [(False, True), (True, False)])
def test_the_surest_token_goes_first_unless_it_is_a_stop_token_to_be_put_last(
        model, last, is_first):
    logits = torch.randn(6, 40)                                                     # (N, V)
    logits[2, model.cfg.eos_id] = 50.0
    at = torch.ones(1, 6, dtype=torch.bool)
    stop_ids = [model.cfg.eos_id] if last else []
    new, token = sample.choose_llada(logits, at, torch.tensor([1]), None, 0.0, "low_confidence",
                                     stop_ids)
    assert token[0, 2] == model.cfg.eos_id
    assert bool(new[0, 2]) == is_first


GOOD_SETTINGS = dict(gen_length=8, steps=8, block_length=8)


@pytest.mark.parametrize("bad, message", [
    (dict(block_length=3), "not a multiple"),
    (dict(block_length=4, steps=3), "multiple of 2"),
    (dict(remasking="best"), "unknown remasking"),
    (dict(eos="never"), "unknown eos"),
    (dict(gen_length=5000, block_length=5000), "limit"),
    (dict(remasking="entropy", block_length=4), "one block")])
def test_bad_sampler_settings_are_refused_with_advice(model, bad, message):
    with pytest.raises(ValueError, match=message):
        sample.generate(model, torch.randint(3, 40, (1, 5)), **{**GOOD_SETTINGS, **bad})


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="at least one token"):
        sample.generate(model, [torch.tensor([], dtype=torch.long)], **GOOD_SETTINGS)


# --------------------------------------------------------------------------------------------------
# 3. memdlm.py

def paper_loop(model, x0, given, attend, t, u, mem, seed):
    """MemDLM's loss from the paper, one sample at a time, nothing shared: whole forward passes,
    merged weights, no batch dimension."""
    phi0 = memdlm.init_phi(model, 1, mem, seed)
    total = 0.0
    for b in range(len(x0)):
        real = attend[b]
        total = total + paper_sample(model, x0[b, real], given[b, real], t[b].item(), u[b, real],
                                     phi0, mem) / t[b]
    return total / (~given).sum()


def paper_sample(model, x0, given, t, u, phi0, mem):
    """x0, given, u (L,): the outer cross-entropy of one sample, summed over its masked tokens."""
    weights = dict(model.named_parameters())
    matrices = list(phi0)
    phi = [phi0[m].A[0] for m in matrices] + [phi0[m].B[0] for m in matrices]

    def cross_entropy(phi, mask_ratio):
        merged = dict(weights)
        for name, A, B in zip(matrices, phi, phi[len(matrices):]):
            name = f"{name}.weight"
            merged[name] = weights[name] + mem.alpha / mem.rank * B @ A
        masked = (u < mask_ratio) & ~given
        xt = x0.masked_fill(masked, model.cfg.mask_id)[None]                        # (1, L)
        logits = torch.func.functional_call(model, merged, (xt,))[0]                # (L, V)
        return F.cross_entropy(logits[masked], x0[masked], reduction="sum"), masked.sum()

    # Pre-anchor, then anchor: a mean over masked tokens times 1 / the realised mask ratio.
    for mask_ratio in (min(1.0, mem.s_pre * t), t):
        phi = [w.detach().requires_grad_() for w in phi]
        loss, n = cross_entropy(phi, mask_ratio)
        grads = torch.autograd.grad(loss / n * (~given).sum() / n, phi)
        steps = [mem.inner_lr * min(1.0, mem.clip / (g.norm().item() + 1e-6)) * g for g in grads]
        phi = [(w - step).detach() for w, step in zip(phi, steps)]
    return cross_entropy(phi, t)[0]


@pytest.mark.parametrize("options, clip", [
    (dict(), 1.0),
    (dict(), 0.05),
    (MIXTURE, 1.0),
    (dict(n_layers=12), 1.0)])
def test_batched_memdlm_equals_a_plain_loop_from_the_paper_in_loss_and_gradient(
        batch, options, clip):
    model = random_backbone(**options).requires_grad_(True)
    mem = MemDLMConfig(rank=4, alpha=8.0, inner_lr=0.5, clip=clip)
    x0, given, attend, t, u = batch
    ours = memdlm.loss_memdlm(model, x0, given, attend, t, u, 1 / t, (~given).sum(), mem, 7)
    paper = paper_loop(model, x0, given, attend, t, u, mem, 7)
    torch.testing.assert_close(ours, paper, atol=1e-5, rtol=1e-4)
    names = [n for n, _ in model.named_parameters()]
    gradients = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
                 for loss in (ours, paper)]
    for name, a, b in zip(names, *gradients):
        # An expert that no token was sent to has no gradient in either.
        if a is not None or b is not None:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=name)


def adapted(model, batch, mem=MEM):
    return memdlm.adapt_to_prompt(model, batch.x0, batch.attend, batch.given, mem)


def test_memory_off_is_the_plain_model_bit_for_bit(model, batch):
    plain = model(batch.x0, batch.attend)
    assert torch.equal(model(batch.x0, batch.attend, phi={}), plain)


def test_phi_0_changes_no_logit(model, batch):
    phi = memdlm.init_phi(model, 4, MEM)
    plain = model(batch.x0, batch.attend)
    assert torch.equal(model(batch.x0, batch.attend, phi=phi), plain)


def test_inner_lr_zero_changes_no_logit(model, batch):
    phi = adapted(model, batch, MemDLMConfig(rank=4, inner_lr=0.0))
    plain = model(batch.x0, batch.attend)
    assert torch.equal(model(batch.x0, batch.attend, phi=phi), plain)


def test_adapting_to_the_prompt_moves_the_logits(model, batch):
    plain = model(batch.x0, batch.attend)
    moved = model(batch.x0, batch.attend, phi=adapted(model, batch))
    assert not torch.allclose(moved, plain, atol=1e-3)


def test_one_samples_phi_never_moves_another_samples_logits(model, batch):
    before = model(batch.x0, batch.attend, phi=adapted(model, batch))
    other = batch._replace(x0=batch.x0.clone())
    other.x0[0, :8] = torch.randint(3, 40, (8,))
    after = model(batch.x0, batch.attend, phi=adapted(model, other))
    assert torch.equal(before[1:], after[1:])
    assert not torch.allclose(before[0], after[0], atol=1e-3)


@pytest.mark.parametrize("options", [dict(), MIXTURE])
def test_a_rows_phi_is_the_same_alone_and_in_a_padded_batch(batch, options):
    model = random_backbone(**options)
    together = adapted(model, batch)
    for row in range(4):
        real = batch.attend[row]
        x0 = batch.x0[row, real][None]                                              # (1, L)
        prompt = batch.given[row, real][None]
        alone = memdlm.adapt_to_prompt(model, x0, None, prompt, MEM)
        for name in alone:
            torch.testing.assert_close(together[name].B[row], alone[name].B[0],
                                       atol=1e-5, rtol=1e-3)


def test_clipping_is_per_tensor_and_per_sample(model, batch):
    """Every gradient here is larger than the clip, so every step has exactly its norm."""
    clip = 0.01
    mem = MemDLMConfig(rank=4, alpha=8.0, inner_lr=1.0, clip=clip)
    masked = ~batch.given
    ctx = model.context(batch.x0, batch.attend)
    h = model.run(model.embed(batch.x0.masked_fill(masked, model.cfg.mask_id)), ctx, 0, 2)
    old = memdlm.init_phi(model, 4, mem)
    new = memdlm.inner_step(model, old, h, ctx, batch.x0, masked, torch.ones(4), mem)
    for name in old:
        length = (new[name].B - old[name].B).flatten(1).norm(dim=1)                 # (B,)
        torch.testing.assert_close(length, torch.full((4,), clip), rtol=1e-3, atol=0)


@pytest.mark.parametrize("layers, first", [
    (3, 2), (10, 9), (12, 10), (16, 14), (20, 18), (28, 25), (32, 28)])
def test_fast_weights_sit_on_the_ffn_of_the_last_tenth_of_the_layers(layers, first):
    model = random_backbone(n_layers=layers)
    assert memdlm.first_fast_layer(model, MEM) == first
    expected = {f"layers.{i}.ffn.{matrix}" for i in range(first, layers)
                for matrix in ("gate", "up", "down")}
    assert set(memdlm.init_phi(model, 1, MEM)) == expected


def blind(backbone, xt, attend, start):
    """A predictor that ignores its context: every token is equally likely."""
    def predict(xt, t, state, at):
        return torch.zeros(int(at.sum()), backbone.cfg.vocab_size), None            # (N, V)
    return predict, None


def test_exposure_bias_is_one_while_nothing_is_revealed_and_not_one_later(model, batch):
    rows = memdlm.exposure_bias(model, batch.x0, batch.given, batch.attend, 6, sample.no_memory)
    assert len(rows) == 6
    assert rows[0]["published_ratio"] == rows[0]["clean_ratio"] == 1.0
    assert any(abs(r["clean_ratio"] - 1) > 1e-3 for r in rows[1:])


def test_exposure_bias_of_a_model_that_ignores_context_is_one_throughout(model, batch):
    rows = memdlm.exposure_bias(model, batch.x0, batch.given, batch.attend, 6, blind)
    assert all(r["published_ratio"] == r["clean_ratio"] == 1.0 for r in rows)


# --------------------------------------------------------------------------------------------------
# 4. metastate.py

SMALL_META = dict(num_slots=4, slot_dim=16, slot_heads=2, cond_dim=16)


@pytest.fixture
def meta(model):
    torch.manual_seed(0)
    return MetaState(model.cfg, MetaStateConfig(**SMALL_META))


def trained_meta(model, **options):
    """Random weights everywhere, so that the zero-initialised parts act."""
    torch.manual_seed(0)
    meta = MetaState(model.cfg, MetaStateConfig(**{**SMALL_META, **options}))
    for p in meta.parameters():
        p.data.normal_(0, 0.3)
    return meta


def two_steps(model, meta, batch):
    """Logits (N, V) of two denoising steps over one canvas, the answer fully masked."""
    at = ~batch.given
    xt = batch.x0.masked_fill(at, model.cfg.mask_id)
    ctx = model.context(xt, batch.attend)
    first, slots, _ = meta.step(model, ctx, xt, torch.ones(4), None, at, 8)
    second, _, _ = meta.step(model, ctx, xt, torch.ones(4), slots, at, 8)
    return first, second


def test_untrained_metastate_equals_the_frozen_backbone_bit_for_bit(model, meta, batch):
    at = ~batch.given
    plain = model(batch.x0.masked_fill(at, model.cfg.mask_id), batch.attend, at)
    assert all(torch.equal(logits, plain) for logits in two_steps(model, meta, batch))


def test_updater_equals_torch_grucell(meta):
    read = torch.randn(5, 16)                                                       # (M, S)
    slots = torch.randn(5, 16)
    ours = meta.updater
    cell = torch.nn.GRUCell(16, 16)
    cell.load_state_dict({"weight_ih": ours.x.weight, "bias_ih": ours.x.bias,
                          "weight_hh": ours.s.weight, "bias_hh": ours.s.bias})
    torch.testing.assert_close(ours.gates(read, slots), cell(read, slots))


@pytest.mark.parametrize("memory, persists", [
    ("slots", True), ("reset", False), ("feedback", True)])
def test_memory_reaches_the_next_steps_logits_and_reset_cuts_it(model, batch, memory, persists):
    first, second = two_steps(model, trained_meta(model, memory=memory), batch)
    assert torch.equal(first, second) != persists


@pytest.mark.parametrize("memory, persists", [("slots", True), ("reset", False)])
def test_the_next_steps_gradient_reaches_the_updater_and_reset_cuts_it(
        model, batch, memory, persists):
    meta = trained_meta(model, memory=memory)
    two_steps(model, meta, batch)[1].sum().backward()
    grad = meta.updater.x.weight.grad
    assert (grad is not None and grad.abs().max() > 0) == persists


@pytest.fixture
def unrolled(model, batch):
    """A MetaState and its loss over three steps, backpropagated."""
    meta = trained_meta(model)
    stay = torch.zeros(4, dtype=torch.bool)
    metastate.loss_unrolled(meta, model, batch.x0, batch.given, batch.attend, batch.t, stay,
                            3, 0, batch.u, 4).backward()
    return meta


def test_every_module_of_metastate_gets_a_gradient(unrolled):
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in unrolled.parameters())


def test_the_backbone_gets_no_gradient_and_keeps_its_weights(model, unrolled):
    untouched = dict(random_backbone().named_parameters())
    for name, p in model.named_parameters():
        assert p.grad is None
        assert torch.equal(p, untouched[name])


def test_the_unrolled_loss_equals_denoising_step_by_step(model, batch):
    """Rows alone, one state after the other: a mean over a row's masked tokens, over rows and over
    steps; after each step the surest token is revealed, except in row 1, which stays."""
    meta = trained_meta(model)
    stay = torch.tensor([False, True, False, False])
    whole = metastate.loss_unrolled(meta, model, batch.x0, batch.given, batch.attend,
                                    torch.ones(4), stay, 3, 0, batch.u, 4)
    total = 0.0
    for row in range(4):
        real = batch.attend[row]
        x0 = batch.x0[row, real][None]                                              # (1, L)
        masked = ~batch.given[row, real][None]
        slots = None
        start = x0.shape[1] - 6
        for _ in range(3):
            xt = x0.masked_fill(masked, model.cfg.mask_id)
            ratio = masked.sum(1) / 6
            logits, slots, _ = meta.step(model, model.context(xt), xt, ratio, slots, masked, start)
            total = total + F.cross_entropy(logits, x0[masked]) / 12
            if not stay[row]:
                surest = logits.softmax(-1).max(-1).values.argmax()
                masked = masked.clone()
                masked[0, masked[0].nonzero()[surest, 0]] = False
    torch.testing.assert_close(whole, total, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [
    dict(), dict(block_length=3), dict(threshold=0.3), dict(cfg=0.5)])
def test_metastate_rows_do_not_depend_on_batch_order_or_padding(model, options):
    prompts = [torch.randint(3, 40, (n,)) for n in (4, 9, 2)]
    memory = trained_meta(model).memory()

    def decode(prompts):
        settings = {"gen_length": 6, "steps": 6, "block_length": 6, **options}
        return sample.generate(model, prompts, memory=memory, **settings)
    together = decode(prompts)
    assert torch.equal(together, torch.cat([decode([p]) for p in prompts]))
    assert torch.equal(together.flip(0), decode(prompts[::-1]))


@pytest.mark.parametrize("length", [10, 200])
def test_slots_have_the_same_shape_at_any_length(model, meta, length):
    xt = torch.randint(3, 40, (2, length))
    ctx = model.context(xt)
    _, slots, _ = meta.step(model, ctx, xt, torch.ones(2), None, xt > 20, length - 5)
    assert slots.shape == (2, 4, 16)


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_metastate_adds_under_a_percent_of_parameters_and_under_five_of_flops(family):
    """At the real sizes. FLOPs per token at L = 1,024: 2 per weight a token passes through; the
    slots' own matrices work on M tokens instead of L."""
    cfg = bb.config_from_json(REAL[family])
    meta_cfg = metastate.for_backbone(cfg)
    with torch.device("meta"):
        meta = MetaState(cfg, meta_cfg)
        backbone = Backbone(cfg)
    assert 0.005 < size(meta) / size(backbone) < 0.007
    per_token = meta.mixer.k.weight.numel() + meta.mixer.v.weight.numel()
    per_token += sum(i.q.weight.numel() + i.o.weight.numel() for i in meta.injectors)
    # The Mixer and the Injectors, each q k and weights v.
    scores = (1 + len(meta.injectors)) * 2 * meta_cfg.num_slots * meta_cfg.slot_dim
    own = size(meta) * meta_cfg.num_slots / 1024
    without_embedding = size(backbone) - cfg.vocab_size * cfg.d_model
    assert (per_token + scores + own) / without_embedding < 0.05


@pytest.fixture
def meta_checkpoint(tmp_path):
    """A MetaState in tmp_path/meta, trained on the backbone in tmp_path/base."""
    model = random_backbone(vocab_size=139)
    bb.save_backbone(model, tmp_path / "base", load_tokenizer("tiny"))
    meta = trained_meta(model)
    metastate.save(meta, tmp_path / "meta", tmp_path / "base", metastate.fingerprint(model))
    return meta


def test_a_saved_metastate_loads_with_the_same_weights(tmp_path, meta_checkpoint):
    loaded, _, _ = metastate.load(tmp_path / "meta", "cpu")
    pairs = zip(meta_checkpoint.parameters(), loaded.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_metastate_checkpoint_can_be_run_in_four_ways(tmp_path, meta_checkpoint):
    _, _, arms = sample.load_arms(tmp_path / "meta", "cpu")
    assert list(arms) == ["frozen", "metastate", "reset", "both"]


def test_a_metastate_checkpoint_refuses_another_backbone(tmp_path, meta_checkpoint):
    bb.save_backbone(random_backbone(seed=1, vocab_size=139), tmp_path / "base")
    with pytest.raises(ValueError, match="another backbone"):
        metastate.load(tmp_path / "meta", "cpu")


@pytest.mark.parametrize("bad, message", [
    (dict(slot_heads=3), "multiple of slot_heads"),
    (dict(inject_layers=(4,)), "layers 0..2"),
    (dict(read_layer=5), "layers 0..2"),
    (dict(inject_layers=()), "layers 0..2"),
    (dict(num_slots=0), "at least 1"),
    (dict(memory="x"), "unknown memory")])
def test_impossible_metastate_settings_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        MetaStateConfig(**bad).check(3)


# --------------------------------------------------------------------------------------------------
# 5. niah.py

def pairs_in(text):
    """Every "left = right ." of a text, in order."""
    return re.findall(r"(\w+) = (\w+) \.", text)


@pytest.mark.parametrize("task", niah.TASKS)
@pytest.mark.parametrize("length", [0, 64, 256])
def test_tasks_fill_their_length_without_exceeding_it_and_stay_in_the_vocabulary(task, length):
    """56 words hold the longest task without any filler."""
    vocabulary = niah.vocabulary()
    for s in niah.make_samples([task], length, 50, 0, "eval"):
        words = s.prompt.split()
        assert 0.75 * length < len(words) <= max(length, 56)
        assert all(word in vocabulary for word in words + s.answer.split())


@pytest.mark.parametrize("task", niah.TASKS)
@pytest.mark.parametrize("length", [0, 64, 256])
def test_a_tasks_own_answer_scores_full_recall(task, length):
    for s in niah.make_samples([task], length, 50, 0, "eval"):
        assert niah.recall(s.refs, s.answer) == 1.0
        assert 0 < s.chance <= 1
        assert 0 <= s.depth <= 1


@pytest.mark.parametrize("task", ["single", "multikey", "multivalue"])
@pytest.mark.parametrize("length", [0, 64, 256])
def test_each_needle_occurs_once_in_the_order_of_the_answer(task, length):
    for s in niah.make_samples([task], length, 50, 0, "eval"):
        key = s.prompt.split()[-2]
        assert [value for name, value in pairs_in(s.prompt) if name == key] == s.refs


@pytest.mark.parametrize("task, hops", [("tracking", 2), ("tracking4", 4)])
def test_variable_tracking_can_be_solved_by_following_the_chain(task, hops):
    for s in niah.make_samples([task], 64, 50, 0, "eval"):
        name_of = {value: name for name, value in pairs_in(s.prompt)}
        names = []
        word = s.prompt.split()[-1]
        while word in name_of:
            word = name_of[word]
            names.append(word)
        assert names == s.refs == s.answer.split()
        assert len(names) == hops + 1


def test_resolve_can_be_solved_by_following_as_many_links_as_it_tells():
    for s in niah.make_samples(["resolve"], 64, 200, 0, "eval"):
        holds = dict(pairs_in(s.prompt))
        word = re.search(r"\? (\w+) is$", s.prompt)[1]
        for _ in range(s.hops + 1):
            word = holds[word]
        assert word.isdigit()
        assert [word] == s.refs
        assert word == s.answer


def test_stories_can_be_solved_by_replaying_them():
    for s in niah.make_samples(["stories"], 64, 100, 0, "eval"):
        place, holder = {}, {}
        for who, did, what in re.findall(r"(\w+) (moved|took) (\w+) \.", s.prompt):
            if did == "moved":
                place[who] = what
            else:
                holder[what] = who
        who = holder[s.prompt.split()[-1]]
        assert s.answer == f"{who} {place[who]}"
        assert s.refs == [place[who]]


def test_common_words_are_the_most_frequent_ones():
    for s in niah.make_samples(["common"], 64, 50, 0, "eval"):
        words = s.prompt.split()[1:-3]
        assert set(sorted(set(words), key=words.count)[-3:]) == set(s.refs)


def links_of(split):
    """All pairs of 1,500 texts, as they were drawn: a chain's "b = a" was drawn as b after a."""
    links = set()
    for s in niah.make_samples(["multikey", "multivalue", "tracking4"], 64, 1500, 0, split):
        for left, right in pairs_in(s.prompt):
            links.add((left, right) if right.isdigit() else (right, left))
    return links


def test_pairs_of_the_evaluation_never_occur_in_training():
    trained, held_out = links_of("train"), links_of("eval")
    assert len(trained) > 1000
    assert len(held_out) > 300
    assert not trained & held_out


def test_the_same_seed_gives_the_same_texts_and_another_seed_others():
    tasks = list(niah.TASKS)
    texts = niah.make_samples(tasks, 64, 20, 3)
    assert texts == niah.make_samples(tasks, 64, 20, 3)
    assert texts != niah.make_samples(tasks, 64, 20, 4)


def test_recall_is_rulers_the_share_of_references_that_occur_in_any_case():
    assert niah.recall(["47", "Blue"], "it is BLUE .") == 0.5


def test_chance_is_what_a_guesser_gets_who_copies_a_value_from_the_text():
    rng = random.Random(0)
    samples = niah.make_samples(["multikey"], 64, 2000, 0, "eval")
    guesses = [rng.choice(pairs_in(s.prompt))[1] for s in samples]
    hits = sum(niah.recall(s.refs, guess) for s, guess in zip(samples, guesses))
    assert {s.chance for s in samples} == {0.25}
    assert abs(hits / 2000 - 0.25) < 4 * 0.5 / 2000 ** 0.5


@pytest.fixture
def four_runs(tmp_path):
    """The evaluation rows of two methods, two training seeds each, on the same three texts."""
    return [evaluation(tmp_path / "old-seed0", [0, 1, 0]),
            evaluation(tmp_path / "old-seed1", [1, 1, 1]),
            evaluation(tmp_path / "new-seed0", [1, 0, 1]),
            evaluation(tmp_path / "new-seed1", [1, 1, 1])]


def evaluation(folder, recalls):
    """niah.jsonl in a run's folder."""
    folder.mkdir()
    same = dict(task="single", arm="off", length=64, steps=6, seed=1)
    rows = [dict(same, prompt=f"text {i}", recall=r) for i, r in enumerate(recalls)]
    niah.append_jsonl(folder / "niah.jsonl", rows)
    return folder / "niah.jsonl"


def test_the_table_over_seeds_shows_mean_spread_and_number_of_seeds(four_runs):
    lines = niah.table_over_seeds(four_runs, "recall", "length").splitlines()
    assert lines[1].split()[3:] == ["66.7", "±47.1", "2"]
    assert lines[2].split()[3:] == ["83.3", "±23.6", "2"]


def test_differences_over_seeds_are_paired_by_text_and_training_seed(four_runs):
    """The texts differ by 50, -50 and 50 points: resampled means lie between -50 and 50."""
    table = niah.table_over_seeds(four_runs, "recall", "length", "old off")
    difference = table.splitlines()[2].split()
    assert difference[:4] == ["single", "new", "off", "+16.7"]
    assert float(difference[4].lstrip("±")) == pytest.approx(50, abs=1)


def test_differences_between_folders_without_a_seed_are_paired_too(tmp_path):
    files = [evaluation(tmp_path / "one", [0, 1, 0]), evaluation(tmp_path / "two", [1, 1, 0])]
    table = niah.table_over_seeds(files, "recall", "length", "one off")
    assert table.splitlines()[2].split()[:4] == ["single", "two", "off", "+33.3"]


def test_a_baseline_that_is_not_in_the_table_is_answered_with_those_that_are(four_runs):
    with pytest.raises(ValueError, match="the lines are new off, old off"):
        niah.table_over_seeds(four_runs, "recall", "length", "old")


@pytest.mark.parametrize("bad", ["{", "[]", '{"task": "single"}'])
def test_a_line_that_is_no_evaluation_row_is_named_with_file_and_number(four_runs, bad):
    four_runs[1].write_text(four_runs[0].read_text() + bad)
    with pytest.raises(ValueError, match="old-seed1/niah.jsonl, line 4: not a row"):
        niah.table_over_seeds(four_runs, "recall", "length")


def telling(answers):
    """A memory whose slots hold the next answer of each row."""
    def memory(backbone, xt, attend, start):
        told = torch.tensor([[int(next(answers).answer)] for _ in xt])              # (B, M)
        slots = F.one_hot(told, 100).float()                                        # (B, M, S)

        def predict(xt, t, state, at):
            return None, (slots, {}, None)
        return predict, None
    return memory


def silent(backbone, xt, attend, start):
    """A memory whose slots hold nothing."""
    def predict(xt, t, state, at):
        return None, (torch.zeros(len(xt), 4, 8), {}, None)
    return predict, None


def probe_accuracy(memory):
    model = load_backbone("tiny", "cpu")
    rows = niah.probe(model, load_tokenizer("tiny"), memory, 32, 40, 3, 2)
    return sum(r["recall"] for r in rows) / len(rows)


def test_the_probe_finds_what_is_in_the_slots():
    answers = iter(niah.make_samples(["resolve"], 32, 200, 3, "eval"))
    assert probe_accuracy(telling(answers)) > 0.9


def test_the_probe_finds_nothing_in_empty_slots():
    assert probe_accuracy(silent) < 0.2


# --------------------------------------------------------------------------------------------------
# 6. train.py

SMALL = ["--n_eval", "0", "--batch_size", "4", "--context", "32", "--lr", "1e-3"]


def run_train(*argv):
    """train.py's main() in this process."""
    sys.argv = ["train.py", *map(str, argv)]
    train.main()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory; the tiny backbone is pretrained for two steps where needed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setitem(train.DEFAULTS, "pretrain", (2, 4, 1e-3, 0.3))
    return tmp_path


@contextlib.contextmanager
def killed_at(fatal_step):
    """Ctrl-C in this training step, before the weights change."""
    update = train.Run.update

    def killed(self, step, loss):
        if step == fatal_step:
            raise KeyboardInterrupt
        update(self, step, loss)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Run, "update", killed)
        yield


def weights_of(folder):
    from safetensors.torch import load_file
    files = sorted(Path(folder).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def log_of(folder):
    return [json.loads(row) for row in Path(folder, "log.jsonl").read_text().splitlines()]


def contents(folder, but=()):
    """{name: bytes} of the files in a folder."""
    return {f.name: f.read_bytes() for f in Path(folder).iterdir() if f.name not in but}


def without(row, key):
    return {k: v for k, v in row.items() if k != key}


@pytest.mark.parametrize("method", ["mdlm", "memdlm", "metastate"])
def test_a_run_killed_at_any_step_and_resumed_equals_the_whole_run_bit_for_bit(here, method):
    """Killed after the log of step 2, before the checkpoint of step 4."""
    options = ["--method", method, "--steps", 5, "--save_every", 2, "--unroll", 2, *SMALL]
    run_train(*options, "--out", "whole")
    with killed_at(3):
        run_train(*options, "--out", "parts")
    run_train(*options, "--out", "parts", "--resume")
    whole, parts = weights_of("whole"), weights_of("parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    logs = [[without(row, "seconds") for row in log_of(folder)] for folder in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", ["mdlm", "memdlm", "metastate"])
def test_gradient_accumulation_equals_one_large_batch(here, method):
    options = ["--method", method, "--steps", 1, "--n_eval", 0, "--context", 32, "--unroll", 2]
    run_train(*options, "--batch_size", 6, "--out", "one")
    run_train(*options, "--batch_size", 2, "--accumulate", 3, "--out", "three")
    assert log_of("one")[0]["loss"] == pytest.approx(log_of("three")[0]["loss"], abs=1e-6)


def run_train_in_processes(number, *argv):
    """train.py under torchrun, `number` processes on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={number}",
               "--standalone", HERE / "train.py", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*map(str, command)], check=True, capture_output=True, timeout=300,
                   env=environment)


def write_data(file, n):
    """n multikey samples as a JSONL file."""
    samples = niah.make_samples(["multikey"], 40, n, 0)
    rows = [json.dumps({"prompt": s.prompt, "response": s.answer}) for s in samples]
    Path(file).write_text("\n".join(rows))


def test_two_processes_with_sharded_frozen_layers_equal_one_with_the_joined_batch(here):
    write_checkpoint(here / "base", "llada", vocab_size=139, embedding_size=139, mask_token_id=1,
                     eos_token_id=2)
    load_tokenizer("tiny").save_pretrained(here / "base")
    write_data("data.jsonl", 40)
    options = ["--method", "memdlm", "--backbone", "base", "--data", "data.jsonl", "--steps", 3,
               "--lr", "1e-2", "--lora", 4, "--rank", 4, "--n_eval", 0, "--max_len", 64,
               "--device", "cpu"]
    run_train(*options, "--batch_size", 4, "--out", "one")
    run_train_in_processes(2, *options, "--batch_size", 2, "--out", "two")
    losses = [[row["loss"] for row in log_of(folder)] for folder in ("one", "two")]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    two = weights_of("two")
    for name, weight in weights_of("one").items():
        torch.testing.assert_close(weight, two[name], atol=1e-4, rtol=1e-3)


GOOD_LINE = '{"prompt": "river = 47 . ? river =", "response": "47"}'
GOOD_CHAT = ('{"messages": [{"role": "user", "content": "stone = 12 . ? stone ="}, '
             '{"role": "assistant", "content": "12"}]}')


def read_jsonl(file, max_len=64):
    return train.read_jsonl(file, load_tokenizer("tiny"), BackboneConfig(), max_len)


def test_a_model_trains_on_prompts_with_responses_and_on_chats(here):
    Path("good.jsonl").write_text("\n".join([GOOD_LINE, GOOD_CHAT] * 4))
    assert len(read_jsonl("good.jsonl")) == 8
    run_train("--method", "mdlm", "--data", "good.jsonl", "--steps", 1, *SMALL)
    assert len(log_of("runs/mdlm")) == 1


@pytest.mark.parametrize("bad, message", [
    ('{"prompt": "river', "not valid JSON"),
    ('["river"]', "expected an object"),
    ('{"prompt": "river"}', "expected {"),
    ('{"prompt": "river", "response": " "}', "response is empty"),
    ('{"prompt": "", "response": "47"}', "prompt is empty"),
    ('{"prompt": "hello", "response": "47"}', "outside the closed vocabulary: hello"),
    ('{"messages": []}', "at least two"),
    ('{"messages": [{"role": "user", "content": "river"}, {"role": "user", "content": "river"}]}',
     "last message is the assistant's")])
def test_a_bad_line_of_data_is_named_with_file_and_number(here, bad, message):
    Path("bad.jsonl").write_text(f"{GOOD_LINE}\n{bad}")
    with pytest.raises(ValueError, match=f"bad.jsonl, line 2: .*{re.escape(message)}"):
        read_jsonl("bad.jsonl")


def test_data_of_which_nothing_fits_is_refused(here):
    Path("long.jsonl").write_text("\n".join([GOOD_LINE] * 4))
    with pytest.raises(ValueError, match="0 usable examples"):
        read_jsonl("long.jsonl", max_len=3)


JUNK = ["", '"', "{", "}", "null", "NaN", "[1]", ",", "\\", "é", '"response": 3, ', "\\u0000"]


def test_a_line_of_data_with_a_random_edit_is_read_or_refused_with_file_and_number(here):
    rng = random.Random(0)
    refused = 0
    for _ in range(200):
        at = rng.randrange(len(GOOD_LINE))
        edited = GOOD_LINE[:at] + rng.choice(JUNK) + GOOD_LINE[at + rng.randint(0, 9):]
        Path("edited.jsonl").write_text(f"{GOOD_LINE}\n{edited}\n{GOOD_LINE}")
        try:
            assert len(read_jsonl("edited.jsonl")) == 3
        except ValueError as e:
            assert str(e).startswith("edited.jsonl, line 2: ")
            refused += 1
    assert refused > 100


# Per script: a line to start from, flags, and values of which each makes that line a bad one.
# "taken" is the folder of a finished run.
MDLM = ["--method", "mdlm", *SMALL]
SLOTS = ["--method", "metastate", *SMALL]
CHECKPOINT = ["--checkpoint", "taken"]
PROMPT = [*CHECKPOINT, "--prompt", "river"]
WORDS = ["magic", "_0", "a-b"]
BAD_LINES = {
    train: [
        (MDLM, ["--magic", "--_0-q"], ["", "-", "nan", "inf", "-1", "1e999", "zwölf", "{}", " "]),
        (MDLM, ["--method", "--tasks", "--init", "--backbone", "--data", "--dtype"], WORDS),
        (MDLM, ["--device"], ["magic", "cuda:99", "cpuq"]),
        (MDLM, ["--out"], ["taken"]),
        (MDLM, ["--steps", "--batch_size", "--accumulate", "--save_every"],
         ["0", "-3", "x", "1.5", "nan", "zwölf", "0x10", ""]),
        (MDLM, ["--lr", "--inner_lr", "--clip"], ["-1", "nan", "inf", "1e999", "x"]),
        (MDLM, ["--warmup", "--full_share", "--prompt_ratio", "--fraction"],
         ["2", "-0.1", "nan", "x"]),
        (MDLM, ["--inner_on"], ["both"]),
        (SLOTS, ["--num_slots", "--unroll", "--span"], ["0", "-2", "x"]),
        (SLOTS, ["--slot_heads"], ["5", "x"]),
        (SLOTS, ["--inject_layers", "--read_layer"], ["9", "-9", "x"])],
    niah: [
        ([], ["--checkpoint", "--rows"], WORDS),
        (CHECKPOINT, ["--arms"], WORDS),
        (CHECKPOINT, ["--lengths"], ["0", "-5", "x", "9999999"]),
        (CHECKPOINT, ["--n", "--gen_length"], ["0", "-1", "x"]),
        ([*CHECKPOINT, "--lengths", "16"], ["--steps"], ["0", "-1", "x"])],
    sample: [
        (["--prompt", "river"], ["--checkpoint"], WORDS),
        (CHECKPOINT, ["--prompt"], ["", *WORDS]),
        (PROMPT, ["--gen_length", "--steps", "--block_length"], ["0", "-1", "x", "7.5"]),
        (PROMPT, ["--remasking", "--arm"], WORDS),
        (PROMPT, ["--top_p"], ["0.5"])],
    bb: [
        ([], ["--check"], WORDS),
        (["--check", "taken"], ["--prompt"], WORDS)]}


@pytest.fixture
def taken(here):
    run_train("--method", "mdlm", "--steps", 1, *SMALL, "--out", "taken")
    return here


def main_of(module, argv):
    """A script's command line in this process: its exit code, as a shell would see it."""
    sys.argv = [f"{module.__name__}.py", *argv]
    try:
        bb.cli(bb.check if module is bb else module.main)
    except SystemExit as e:
        return e.code or 0
    return 0


@pytest.mark.parametrize("module", BAD_LINES)
def test_every_bad_command_line_ends_with_one_message_and_exit_code_2_and_touches_no_file(
        taken, capsys, module):
    before = contents("taken")
    lines = [[*start, flag, value] for start, flags, values in BAD_LINES[module]
             for flag in flags for value in values]
    for argv in lines:
        capsys.readouterr()
        code = main_of(module, argv)
        said = capsys.readouterr().err.strip()
        assert code == 2, (argv, said)
        assert "error: " in said.splitlines()[-1], (argv, said)
        assert "Traceback" not in said, (argv, said)
        assert set(Path().iterdir()) == {Path("taken")}, argv
    assert contents("taken") == before


@pytest.mark.parametrize("module, argv", [(niah, []), (sample, []), (sample, CHECKPOINT), (bb, [])])
def test_a_command_line_without_what_the_script_works_on_is_refused(taken, module, argv):
    assert main_of(module, argv) == 2


@pytest.mark.parametrize("argv, message", [
    (["--out", "taken"], "exists already"),
    (["--out", "taken", "--resume"], "belongs to another run"),
    (["--init", "nowhere"], "no checkpoint folder"),
    (["--data", "none.jsonl"], "no such file"),
    (["--steps", "0"], "at least 1"),
    (["--lr", "-1"], "positive number"),
    (["--prompt_ratio", "2"], "between 0 and 1"),
    (["--inner_on", "both"], "response or prompt"),
    (["--method", "metastate", "--unroll", "99"], "99 denoising steps"),
    (["--method", "metastate", "--slot_heads", "5"], "multiple of slot_heads")])
def test_a_training_run_that_cannot_work_is_refused_with_what_to_change(taken, argv, message):
    before = contents("taken")
    with pytest.raises((ValueError, OSError), match=message):
        run_train(*MDLM, *argv)
    assert contents("taken") == before


WITH_LIMITED_FILES = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def run_train_on_a_full_disk(*argv):
    """train.py in a process that can write no file beyond 300 kB."""
    command = [sys.executable, "-c", WITH_LIMITED_FILES, HERE / "train.py", *argv]
    return subprocess.run([*map(str, command)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(HERE)})


def test_a_full_disk_is_named_and_the_last_checkpoint_survives_and_can_be_resumed(here):
    options = [*MDLM, "--save_every", 1, "--out", "run", "--steps", 3]
    with killed_at(1):
        run_train(*options)
    before = contents("run", but=["log.jsonl"])
    full = run_train_on_a_full_disk(*options, "--resume")
    assert full.returncode == 2
    assert "could not be written" in full.stderr
    assert "Traceback" not in full.stderr
    assert contents("run", but=["log.jsonl"]) == before
    run_train(*options, "--resume")
    assert train.read_state("run/resume.pt")["step"] == 3


def flip_a_bit(data, rng):
    """In the middle half of the bytes, where the weights are."""
    bad = bytearray(data)
    bad[rng.randrange(len(bad) // 4, len(bad) * 3 // 4)] ^= 1 << rng.randrange(8)
    return bytes(bad)


def cut_short(data, rng):
    return data[:rng.randrange(len(data))]


@pytest.mark.parametrize("file, method", [
    ("model.safetensors", "mdlm"), ("metastate.safetensors", "metastate"), ("resume.pt", "mdlm")])
def test_a_flipped_bit_or_a_missing_end_is_found_in_every_file_with_weights(here, file, method):
    options = ["--method", method, *SMALL, "--out", "run", "--steps", 1]
    run_train(*options)
    rng = random.Random(0)
    path = Path("run") / file
    good = path.read_bytes()
    for damage in [flip_a_bit] * 8 + [cut_short] * 2:
        path.write_bytes(damage(good, rng))
        with pytest.raises(ValueError, match="truncated or corrupted"):
            if file == "resume.pt":
                run_train(*options, "--resume")
            else:
                sample.load_arms("run", "cpu")


def test_a_damaged_pretrained_backbone_is_named_before_it_is_used(here):
    Path("runs/pretrained-seed0").mkdir(parents=True)
    Path("runs/pretrained-seed0/resume.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="pretrained-seed0/resume.pt cannot be read"):
        run_train("--method", "memdlm", *SMALL)


def test_a_nan_loss_stops_with_step_and_seed_and_keeps_the_last_checkpoint(here):
    with pytest.raises(ValueError, match="the loss is nan at step .* seed 0"):
        run_train(*MDLM, "--steps", 20, "--save_every", 1, "--lr", "1e30")
    load_backbone("runs/mdlm", "cpu")


def test_metastate_on_llada_8b_is_estimated_to_fit_a_card_of_80_gb():
    llada = bb.config_from_json(REAL["llada"])
    parts = train.estimate(llada, "metastate", 1, 1024, 0, meta_cfg=metastate.for_backbone(llada))
    assert parts["weights"] == 16_031_162_368
    assert sum(parts.values()) < 80e9


def test_a_run_that_needs_more_memory_than_there_is_is_refused(here):
    with pytest.raises(ValueError, match="more memory than"):
        run_train(*MDLM, "--batch_size", 10 ** 9)


# --------------------------------------------------------------------------------------------------
# 7. The files themselves and the README

FILES = ["backbone.py", "sample.py", "metastate.py", "memdlm.py", "niah.py", "train.py",
         "test_all.py"]


def readme_commands():
    """Every indented `python ...` or `torchrun ...` line of the README, without its comment."""
    text = (HERE / "README.md").read_text()
    lines = re.findall(r"^    (?:.*&& )?((?:python|torchrun) .*)$", text, flags=re.M)
    commands = [re.sub(r"^torchrun \S+", "python", line.split("   #")[0].strip()) for line in lines]
    return [c for c in commands if "pytest" not in c and "-m " not in c]


def write_word_tokenizer(folder, words):
    """A tokenizer that knows these words, split at white space."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


REAL_NAMES = {"LLaDA-8B-Instruct": "llada", "LLaDA-8B-Base": "llada",
              "Dream-v0-Instruct-7B": "dream", "LLaDA-MoE-7B-A1B-Base": "llada_moe"}


def write_small_checkpoints(folder, commands):
    """Tiny checkpoints of the right layout that know every word they will be asked for."""
    texts = [niah.INTRO, bb.DEMO_QUESTION, *commands]
    words = [word for text in texts for word in [*text.split(), *re.findall(r"[\w?']+", text)]]
    vocabulary = dict.fromkeys([*niah.vocabulary(), *words])
    sizes = dict(vocab_size=len(vocabulary), embedding_size=len(vocabulary), mask_token_id=1,
                 eos_token_id=2, max_position_embeddings=512, max_sequence_length=512)
    for name, family in REAL_NAMES.items():
        known = {k: v for k, v in sizes.items() if k in CONFIGS[family]}
        write_checkpoint(folder / name, family, **known)
        write_word_tokenizer(folder / name, vocabulary)


SHORT = {"train.py": ["--steps", "1", "--n_eval", "1", "--overwrite", "--batch_size", "2",
                      "--accumulate", "1", "--max_len", "500", "--device", "cpu"],
         "niah.py": ["--n", "2", "--device", "cpu"],
         "sample.py": ["--device", "cpu"],
         "backbone.py": ["--device", "cpu"]}
SMALL_SLOTS = ["--unroll", "2", "--slot_dim", "32", "--slot_heads", "4", "--cond_dim", "32"]


def shortened(command):
    """A command of the README -> its script and its arguments, at sizes that take a second."""
    _, script, *argv = shlex.split(re.sub(r"(GSAI-ML|Dream-org|inclusionAI)/", "Org/", command))
    if script == "train.py" and "--backbone" in argv and "--unroll" not in argv:
        argv += SMALL_SLOTS
    if script == "niah.py" and "--lengths" in argv:
        start = stop = argv.index("--lengths") + 1
        while stop < len(argv) and not argv[stop].startswith("--"):
            stop += 1
        argv[start:stop] = ["64"]
    # The shell would have expanded file patterns.
    files = [sorted(glob.glob(a)) if "?" in a and "/" in a else [a] for a in argv]
    argv = [a for some in files for a in some]
    return script, argv if "--explain" in argv else argv + SHORT[script]


def test_every_command_of_the_readme_runs(here):
    """But for the measurements by hand: flags of test_all.py, and --bench."""
    commands = readme_commands()
    assert len(commands) >= 10
    write_data("train.jsonl", 12)
    write_small_checkpoints(here / "Org", commands)
    main = {"train.py": train.main, "niah.py": niah.main, "sample.py": sample.main,
            "backbone.py": bb.check}
    for command in commands:
        if "--bench" in command or "test_all.py" in command:
            continue
        script, argv = shortened(command)
        sys.argv = [script, *argv]
        main[script]()


@pytest.mark.parametrize("file", FILES)
def test_only_the_five_packages_and_what_transformers_brings_are_imported(file):
    allowed = {"torch", "transformers", "numpy", "tqdm", "pytest",
               "safetensors", "huggingface_hub", "tokenizers"}
    allowed |= set(sys.stdlib_module_names) | {f.removesuffix(".py") for f in FILES}
    names = set()
    for node in ast.walk(ast.parse((HERE / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    assert {name.split(".")[0] for name in names} <= allowed


@pytest.mark.parametrize("file", FILES[:-1])
def test_no_code_from_a_checkpoint_is_ever_run(file):
    text = (HERE / file).read_text()
    assert not re.search(r"trust_remote_code\s*=", text)
    assert text.count("torch.load(") == text.count("weights_only=True")


def equations_in(docstring):
    """The header's "Eq. 6 -> inner_step; Eq. 7, Eq. 8 -> loss_memdlm" as (number, function)."""
    header = re.search(r"^Equations.*?(?=^\w[\w ]*:)", docstring, flags=re.M | re.S)[0]
    parts = re.findall(r"([^>]*)-> (\w+)", header)
    return [(n, function) for text, function in parts for n in re.findall(r"Eq\. (\d+)", text)]


def test_every_equation_in_memdlms_header_stands_in_the_function_it_points_to():
    found = equations_in(memdlm.__doc__)
    assert {"6", "7", "8", "9", "10"} <= {number for number, _ in found}
    for number, function in found:
        comments = re.findall(r"#.*", inspect.getsource(getattr(memdlm, function)))
        assert any(re.search(rf"Eq\. {number}\b", c) for c in comments), (number, function)


# --------------------------------------------------------------------------------------------------
# 8. By hand: the learning run, and a checkpoint of the real size.

@pytest.fixture(scope="module")
def learned_recall(tmp_path_factory):
    """The default MetaState run -> recall(arm, passes, hops) over an unchanged canvas."""
    folder = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py"])
        run_train("--method", "metastate")
        backbone, tokenizer, arms = sample.load_arms("runs/metastate", "cpu")
    rows = niah.recompute(backbone, tokenizer, arms, ["resolve"], 64, 500, 2, 5)

    def recall(arm, passes, hops=range(5)):
        some = [row["recall"] for row in rows if row["arm"] == arm and row["steps"] == passes
                and row["hops"] in hops]
        return sum(some) / len(some)
    return recall


slow = pytest.mark.skipif("SLOW" not in os.environ,
                          reason="minutes: SLOW=1 python -m pytest -q test_all.py -k learns")


@slow
def test_the_frozen_backbone_learns_nothing_from_more_passes(learned_recall):
    assert all(learned_recall("frozen", p) == learned_recall("frozen", 1) for p in range(2, 6))


@slow
def test_metastate_learns_to_follow_one_hop_more_with_every_pass_over_an_unchanged_canvas(
        learned_recall):
    """A question of h hops needs h + 1 passes."""
    assert learned_recall("metastate", 2, [1]) > learned_recall("frozen", 2, [1]) + 0.1
    assert learned_recall("metastate", 5) > learned_recall("reset", 5) + 0.2


# The shards of the official release: which tensors lie in which of six files.
LLADA_SHARDS = ["wte|ln_f|attn_out", "ff_out", "norm|q_proj", "k_proj|v_proj", "ff_proj", "up_proj"]


def write_full_size(folder):
    """A random bf16 checkpoint in LLaDA-8B's true layout: 291 tensors in six files, 16.0 GB."""
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    left = llada_keys(REAL["llada"])
    weight_map = {}
    for number, pattern in enumerate(LLADA_SHARDS, 1):
        keys = [key for key in left if re.search(pattern, key)]
        tensors = {}
        for key in keys:
            tensor = torch.ones(left.pop(key), dtype=torch.bfloat16)
            tensors[key] = tensor if tensor.ndim == 1 else tensor.normal_(0, 0.02, generator=g)
        file = f"model-{number:05}-of-00006.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, file)
        print(file, len(keys), "tensors", flush=True)
    assert not left
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "config.json").write_text(json.dumps(REAL["llada"]))
    # The tiny tokenizer stands in for LLaDA's: its words are ids below 139.
    load_tokenizer("tiny").save_pretrained(folder)


# --------------------------------------------------------------------------------------------------
# 9. By hand: what one card can do. `python test_all.py --card --family llada`

STEPS = {"mdlm": "MDLM + LoRA", "memdlm": "MemDLM + LoRA", "metastate": "MetaState"}
LORA = 32
FORMULA = """\
ms: the median of three after a warm-up; a training step includes AdamW and recomputes the layers in
its backward pass. Tokens/s: tokens of the canvas. TFLOP/s: 2 FLOPs per weight and token forward and
2 more for the gradient that passes through it, of the weights a token meets (the head: answer
tokens only); LoRA, phi, slots, attention's scores and the recomputation are not counted. Peak on
the CPU: of the whole process so far."""


def build_on(device, cfg):
    """A bf16 backbone whose random weights are made where they stay: no file, no copy."""
    with torch.device("meta"):
        model = Backbone(cfg).to(torch.bfloat16)
    model.to_empty(device=device).requires_grad_(False)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.normal_(0, 0.02)
        else:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def card_batch(cfg, length, device):
    """One row, the second half of it the answer. t = 1 masks all of the answer in every state, so
    the methods compute equally many logits, and as many as they ever will."""
    x0 = torch.randint(3, max(cfg.mask_id, 100), (1, length), device=device)        # (1, L)
    attend = torch.ones_like(x0, dtype=torch.bool)
    given = attend.clone()
    given[:, length // 2:] = False
    t = torch.ones(1, device=device)
    return train.Batch(x0, given, attend, t, torch.rand(1, length, device=device))


def synchronize(device):
    getattr(torch, torch.device(device).type).synchronize()


def measured(function, device):
    """Seconds of a call, and the peak of the device's memory (on the CPU: of the process)."""
    function()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(3):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[1], sample.peak_memory()


def pass_flops(model, meta_cfg, length):
    """{what: FLOPs}, by FORMULA: a forward pass, or a training step of a method."""
    N = model.cfg.n_layers
    layer = size(model.layers[0])
    if model.cfg.n_experts:
        unused = model.cfg.n_experts - model.cfg.experts_per_token
        layer -= unused * size(model.layers[0].ffn.experts[0])
    first = memdlm.first_fast_layer(model, MemDLMConfig())
    start = meta_cfg.inject_layers[0]
    # (layers, heads) that a canvas passes through; with a gradient they count twice. MemDLM: the
    # trunk once without and once with, the fast layers three times with. MetaState: K passes, with
    # a gradient from the first injection on.
    passes = {"pass": (N, 1),
              "mdlm": (2 * N, 2),
              "memdlm": (3 * first + 6 * (N - first), 6),
              "metastate": (meta_cfg.unroll * (start + 2 * (N - start)), 2 * meta_cfg.unroll)}
    return {what: 2 * length * (layers * layer + heads * size(model.lm_head) / 2)
            for what, (layers, heads) in passes.items()}


def card_passes(model, meta, b):
    """{name: one denoising pass}: the logits of the answer."""
    at = ~b.given
    xt = b.x0.masked_fill(at, model.cfg.mask_id)
    ctx = model.context(xt)
    phi = memdlm.adapt_to_prompt(model, xt, b.attend, b.given, MemDLMConfig())
    start = xt.shape[1] // 2
    return {"plain": lambda: model(xt, None, at),
            "with phi": lambda: model(xt, None, at, phi),
            "with slots": lambda: meta.step(model, ctx, xt, b.t, None, at, start)}


@torch.no_grad()
def measure_passes(model, meta, b, flops):
    for name, function in card_passes(model, meta, b).items():
        seconds, _ = measured(function, model.device)
        show_row(f"denoising pass, {name}", seconds, flops, b.x0.shape[1])


def card_step(method, model, meta, b):
    """One training step of a method, as a function to call again and again."""
    module = meta if method == "metastate" else model
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    n_answer = int((~b.given).sum())
    stay = torch.zeros_like(b.t, dtype=torch.bool)

    def loss():
        if method == "mdlm":
            xt, masked = corrupt(b.x0, b.t, b.given, model.cfg.mask_id, b.u)
            return masked_loss(model(xt, b.attend, masked), b.x0, masked, b.t, n_answer)
        if method == "memdlm":
            return memdlm.loss_memdlm(model, b.x0, b.given, b.attend, b.t, b.u, b.t, n_answer,
                                      MemDLMConfig())
        return metastate.loss_unrolled(meta, model, b.x0, b.given, b.attend, b.t, stay,
                                       meta.cfg.unroll, 0, b.u, 1)

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return step


def what_fits(parts, length, memory):
    """From the estimate for one row: the largest batch of that length, else the longest row, as
    (batch, length); None if no row of 64 tokens fits."""
    tokens = parts["activations"] + parts["logits"]
    room = memory - parts["weights"] - parts["trained, gradient, Adam"]
    batch = int(room // (tokens + parts["fast weights"]))
    if batch >= 1:
        return batch, length
    shorter = int((room - parts["fast weights"]) / tokens * length)
    return (1, shorter) if shorter >= 64 else None


def show_row(name, seconds, flops, tokens=None, peak=None, estimate=None):
    cells = [f"{1000 * seconds:.1f}",
             f"{tokens / seconds:,.0f}" if tokens else "",
             f"{flops / seconds / 1e12:.2f}",
             f"{peak / 1e9:.2f}" if peak else "",
             f"{estimate / 1e9:.2f}" if estimate else ""]
    print(f"{name:<28}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


def card_arguments(argv):
    parser = argparse.ArgumentParser(prog="test_all.py --card", description=(
        "Times and memory of a backbone of the real size, random weights, no files."))
    parser.add_argument("--family", choices=["tiny", *REAL], default="llada")
    parser.add_argument("--device", help="default: cuda, mps or cpu, whichever is there")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the one row")
    args = parser.parse_args(argv)
    cfg = BackboneConfig() if args.family == "tiny" else bb.config_from_json(REAL[args.family])
    if not 64 <= args.length <= cfg.max_len:
        raise ValueError(f"--length must lie between 64 and {cfg.max_len}, not {args.length}")
    return args, cfg, bb.default_device(args.device)


def card(argv):
    """Prints one table, each row when it is known. What does not fit is not tried."""
    args, cfg, device = card_arguments(argv)
    length = args.length
    meta_cfg = metastate.for_backbone(cfg)
    # The framework itself takes about 1 GB.
    memory = train.device_memory(device) - 1e9
    name = torch.cuda.get_device_name(device) if str(device).startswith("cuda") else device
    print(f"{args.family} on {name}, {memory / 1e9:.1f} GB to use, torch {torch.__version__}, "
          f"1 x {length:,} tokens, half of them the answer\n{FORMULA}", flush=True)
    parts = {method: train.estimate(cfg, method, batch=1, length=length, scored=0.5,
                                    lora=0 if method == "metastate" else LORA, meta_cfg=meta_cfg)
             for method in STEPS}
    fits = {method: what_fits(parts[method], length, memory) for method in STEPS}
    for method, largest in fits.items():
        verdict = "does not fit" if largest is None else "fits up to {} x {:,}".format(*largest)
        print(f"{STEPS[method]} {verdict} (estimate: {train.show_estimate(parts[method])})")
    if memory < parts["metastate"]["weights"]:
        return print("the weights alone are larger than that: nothing to measure")
    began = time.perf_counter()
    model = build_on(device, cfg)
    meta = MetaState(cfg, meta_cfg).to(device)
    synchronize(device)
    print(f"{size(model):,} parameters, built in {time.perf_counter() - began:.1f} s\n\n{'':<28}"
          f"{'ms':>11}{'tokens/s':>11}{'TFLOP/s':>11}{'peak GB':>11}{'estimate':>11}", flush=True)
    flops = pass_flops(model, meta_cfg, length)
    batch = card_batch(cfg, length, device)
    measure_passes(model, meta, batch, flops["pass"])
    model.checkpointing = True
    # MetaState first: its backbone is without adapters.
    for method in ("metastate", "mdlm", "memdlm"):
        if method == "mdlm":
            meta = None
            model.add_lora(LORA, 2 * LORA)
        if fits[method] is None or fits[method][1] < length:
            print(f"{STEPS[method]:<28} not tried, see above", flush=True)
            continue
        try:
            seconds, peak = measured(card_step(method, model, meta, batch), device)
        except torch.cuda.OutOfMemoryError:
            print(f"{STEPS[method]:<28} out of memory, though it was estimated to fit", flush=True)
            continue
        show_row(f"training, {STEPS[method]}", seconds, flops[method], length, peak,
                 sum(parts[method].values()))


def test_the_card_command_measures_three_passes_and_three_steps(capsys):
    card(["--family", "tiny", "--device", "cpu", "--length", "64"])
    rows = re.findall(r"^(denoising pass|training), (.+?)  +[\d.]+ ", capsys.readouterr().out, re.M)
    assert [name for _, name in rows] == ["plain", "with phi", "with slots", "MetaState",
                                          "MDLM + LoRA", "MemDLM + LoRA"]


def test_a_card_that_is_too_small_is_told_so_before_anything_is_built(capsys, monkeypatch):
    monkeypatch.setattr(train, "device_memory", lambda device: 8e9)
    monkeypatch.setattr(sys.modules[__name__], "build_on", None)
    card(["--family", "dream", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "MemDLM + LoRA does not fit" in said
    assert "the weights alone are larger" in said


@pytest.mark.parametrize("memory, largest", [(100, (4, 256)), (32, (1, 142)), (24, None)])
def test_what_fits_is_a_larger_batch_or_a_shorter_row_or_nothing(memory, largest):
    parts = {"weights": 10, "trained, gradient, Adam": 10, "fast weights": 2,
             "activations": 12.8, "logits": 5.12}
    assert what_fits(parts, 256, memory) == largest


def by_hand():
    """`python test_all.py --WHAT ...`: the measurements that are no tests."""
    what, *argv = sys.argv[1:] or [""]
    if what == "--card":
        card(argv)
    elif what == "--full-size" and len(argv) == 1:
        write_full_size(Path(argv[0]))
    else:
        raise ValueError("python test_all.py --card | --full-size DIR; the tests themselves: "
                         "python -m pytest -q test_all.py")


def test_an_unknown_measurement_is_answered_with_those_there_are(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["test_all.py", "--magic"])
    with pytest.raises(ValueError, match="--card"):
        by_hand()


if __name__ == "__main__":
    bb.cli(by_hand)
