"""The claims of this repository, executable: `python -m pytest -q test_all.py` (CPU, no network).

Each test's name is a sentence that can turn out false. Facts are checked against code we did not
write (transformers' Llama, Qwen2 and Qwen3-MoE under a full mask, torch.nn.GRUCell) or against a
short loop written from the paper, without our helpers. Sections 1 and 2 teach: the papers and the
samplers as short loops; 3 the real checkpoints, 4 memory, 5 tasks, 6 training, 8 what is refused.
By hand:
  SLOW=1 python -m pytest -q test_all.py -k learns    the learning run, 12 minutes
  python test_all.py --tables [NAME] [--seeds 0]      the README's tables: read from runs/, or run
  python test_all.py --bench [--family llada]         times and memory of all methods, here
  python test_all.py --slots CHECKPOINT               what happens when slots are exchanged or reset
  python test_all.py --exposure CHECKPOINT            exposure bias of every arm
  python test_all.py --starter DIR                    the student's copy: the course (README)
  python test_all.py --grade FOLDER                   points for a class of students
With LLaDA-8B-Instruct's own files `python sample.py --checkpoint GSAI-ML/LLaDA-8B-Instruct
--explain --prompt "Lily can run 12 kilometers per hour for 4 hours. After that, she runs 6
kilometers per hour. How many kilometers can she run in 8 hours?"` must print 49 prompt ids that
start 126080 126346 3840 126347 198 198 86059 (not checked: they could not be had here).
"""
import argparse
import ast
import contextlib
import csv
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from safetensors.torch import save_file

import backbone as bb
import memdlm
import metastate
import niah
import sample
import train
from backbone import Backbone, BackboneConfig, corrupt, load_backbone, load_tokenizer, masked_loss
from memdlm import ClosedBook, MemDLMConfig
from metastate import MetaStateConfig


# 0. What the tests share: tiny models, checkpoints laid out as the official ones, command lines ---

HERE = Path(__file__).parent


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """More of them only wait for each other at these sizes."""
    torch.set_num_threads(1)


def random_backbone(seed=0, **options):
    """Its output depends on every weight; freshly initialised, output projections would be zero."""
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
    attend = torch.arange(14) >= torch.tensor([0, 3, 5, 1])[:, None]
    given = (torch.arange(14) < 8).expand(4, 14).clone()
    t = torch.tensor([0.3, 0.9, 0.6, 1.0])
    u = torch.rand(4, 14, generator=g)
    return train.Batch(x0, given, attend, t, u, torch.zeros_like(given))


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
        moe_layer_freq=[1, 1], hidden_act="silu", tie_word_embeddings=False)}

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
        moe_layer_freq=[1] * 16, mask_token_id=None, eos_token_id=156892)}


def official_keys(family, c):
    """Key -> shape as the official checkpoints have them, by the fact sheet, not by backbone.py."""
    D, V = c.get("d_model", c.get("hidden_size")), c.get("embedding_size", c["vocab_size"])
    if family == "llada":
        ffn, layers = c["mlp_hidden_size"], "model.transformer.blocks"
        keys = {"model.transformer.wte": (V, D), "model.transformer.ln_f": (D,),
                "model.transformer.ff_out": (V, D)}
        layer = {"attn_norm": (D,), "q_proj": (D, D), "k_proj": (D, D), "v_proj": (D, D),
                 "attn_out": (D, D), "ff_norm": (D,), "ff_proj": (ffn, D), "up_proj": (ffn, D),
                 "ff_out": (D, ffn)}
    else:
        head, layers = D // c["num_attention_heads"], "model.layers"
        kv = c["num_key_value_heads"] * head
        keys = {"model.embed_tokens": (V, D), "model.norm": (D,), "lm_head": (V, D)}
        layer = {"input_layernorm": (D,), "self_attn.q_proj": (D, D), "self_attn.k_proj": (kv, D),
                 "self_attn.v_proj": (kv, D), "self_attn.o_proj": (D, D),
                 "post_attention_layernorm": (D,)}
        mlps, ffn = ["mlp"], c.get("expert_intermediate_size", c.get("intermediate_size"))
        if family == "llada_moe":
            mlps = [f"mlp.experts.{e}" for e in range(c["num_experts"])]
            layer |= {"mlp.gate": (c["num_experts"], D), "self_attn.q_norm": (head,),
                      "self_attn.k_norm": (head,)}
        for mlp in mlps:
            layer |= {f"{mlp}.gate_proj": (ffn, D), f"{mlp}.up_proj": (ffn, D),
                      f"{mlp}.down_proj": (D, ffn)}
    for i in range(c.get("n_layers", c.get("num_hidden_layers"))):
        keys |= {f"{layers}.{i}.{name}": shape for name, shape in layer.items()}
    keys = {f"{name}.weight": shape for name, shape in keys.items()}
    if family == "dream":
        keys |= {key.replace("weight", "bias"): shape[:1] for key, shape in keys.items()
                 if re.search(r"[qkv]_proj", key)}
    return keys


def write_checkpoint(folder, family, dtype=torch.float32, shards=2, config=None, **overrides):
    """A random checkpoint in the official layout; of two shards the tensors, {name: tensor}."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**(config or CONFIGS[family]), **overrides}
    keys = official_keys(family, config)
    scale = 1.6 * config.get("d_model", config.get("hidden_size")) ** -0.5
    g = torch.Generator().manual_seed(0)
    tensors, weight_map = {}, {}
    for number in range(shards):
        part = {}
        # Every second (sixth) tensor goes to the same shard: shards need not follow the layers.
        for name in sorted(keys)[number::shards]:
            is_norm = len(keys[name]) == 1 and name.endswith("weight")
            part[name] = torch.randn(keys[name], generator=g).mul_(scale).add_(is_norm).to(dtype)
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
        tensors |= part if shards == 2 else {}
    bb.write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    bb.write_json(folder / "config.json", config)
    return tensors


# LLaDA is a Llama but for its names, which are told apart here by their parts.
LLADA_TO_LLAMA = {
    "wte": "embed_tokens", "ln_f": "norm", "blocks": "layers",
    "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj", "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj"}

# A family's class in transformers, and what its configuration has under another name.
INDEPENDENT = {
    "llada": ("Llama", dict(
        vocab_size=80, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4)),
    "dream": ("Qwen2", dict()),
    "llada_moe": ("Qwen3Moe", dict(
        model_type="qwen3_moe", head_dim=16, moe_intermediate_size=24, norm_topk_prob=False))}


def independent_model(family, tensors):
    """The same weights in a model of transformers, causal unless its additive mask is zeros."""
    import transformers
    kind, renamed = INDEPENDENT[family]
    if family == "llada":
        tensors = {re.sub(r"\w+", lambda part: LLADA_TO_LLAMA.get(part[0], part[0]),
                          key.replace("transformer.", "")): x for key, x in tensors.items()}
        # "ff_out" is used twice: outside the blocks it is the head.
        tensors["lm_head.weight"] = tensors.pop("model.mlp.down_proj.weight")
    config = getattr(transformers, f"{kind}Config")(**{**CONFIGS[family], **renamed})
    return getattr(transformers, f"{kind}ForCausalLM").from_pretrained(
        None, config=config, state_dict=tensors, attn_implementation="eager",
        dtype=next(iter(tensors.values())).dtype).eval()


SMALL = "--n_eval 0 --batch_size 4 --length 32 --lr 1e-3 --device cpu".split()
MDLM = ["--method", "mdlm", *SMALL]
SLOTS = ["--method", "metastate", *SMALL]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory; pretraining takes two steps, held-out losses are of two texts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    short = dict(train.DEFAULTS["pretrain"], steps=2, batch_size=4, lr=1e-3)
    monkeypatch.setitem(train.DEFAULTS, "pretrain", short)
    for function in (train.Run.held_out, train.Run.recalled):
        monkeypatch.setattr(function, "__defaults__", (2,))
    return tmp_path


def run_train(*argv):
    sys.argv = ["train.py", *map(str, argv)]
    train.main()


def main_of(module, argv):
    """A script's command line in this process: its exit code, as a shell would see it."""
    sys.argv = [f"{module.__name__}.py", *argv]
    try:
        bb.cli(module.main)
    except SystemExit as e:
        return e.code or 0
    return 0


def weights_of(folder):
    from safetensors.torch import load_file
    files = sorted(Path(folder).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def log_of(folder):
    return [json.loads(row) for row in Path(folder, "log.jsonl").read_text().splitlines()]


def read_jsonl(file, max_len=64):
    return train.read_jsonl(file, niah.tiny_tokenizer(), BackboneConfig(), max_len)


GOOD_LINE = '{"prompt": "river = 47 . ? river =", "response": "47"}'
GOOD_CHAT = ('{"messages": [{"role": "user", "content": "stone = 12 . ? stone ="}, '
             '{"role": "assistant", "content": "12"}]}')
ASKED = '{"prompt": "how far?", "response": "72"}'
CHAT_OF = ('{"messages": [{"role": "user", "content": "how far?"}, '
           '{"role": "assistant", "content": %s}]}')


def size(module):
    return sum(p.numel() for p in module.parameters())


def synchronize(device):
    getattr(torch, torch.device(device).type).synchronize()


def measured(function, device):
    """Seconds of a call, and the peak of the device's memory (on the CPU: of the process)."""
    def timed():
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        return time.perf_counter() - began
    first = timed()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = first if first > 10 else sorted(timed() for _ in range(3))[1]
    return seconds, sample.peak_memory()


def share(rows, hops, after, steps):
    """"donor / own / neither" in % of one cell."""
    got = [r["follows"] for r in rows
           if (r["hops"], r["after"], r["steps"]) == (hops, after, steps)]
    return "/".join(f"{100 * got.count(name) / len(got):.0f}"
                    for name in ("donor", "own", "neither")) if got else "-"


# 1. What the papers say: against loops and modules written from them, and torch.nn.GRUCell --------

def test_corrupt_masks_at_rate_t_never_what_is_given_and_a_superset_at_a_larger_t():
    g = torch.Generator().manual_seed(0)
    x0 = torch.randint(3, 40, (400, 100), generator=g)              # enough tokens to count
    given = torch.rand(400, 100, generator=g) < 0.3
    u = torch.rand(400, 100, generator=g)
    (_, none), (xt, masked), (_, more), (_, every) = (
        corrupt(x0, torch.full((400,), t), given, 1, u) for t in (0.0, 0.4, 0.6, 1.0))
    n = (~given).sum()
    assert abs(masked.sum() / n - 0.4) < 4 * math.sqrt(0.4 * 0.6 / n)
    assert torch.equal(xt, x0.masked_fill(masked, 1))
    assert not (masked & given).any()
    assert not (masked & ~more).any()
    assert torch.equal(every, ~given)
    assert not none.any()


@sdpa_kernel(SDPBackend.MATH)               # fast kernels have no second derivative
def paper_loop(model, x0, given, attend, t, u, inner, seed, exact=False):
    """MemDLM's loss from the paper, one sample at a time, nothing shared: whole forward passes,
    merged weights, no batch dimension. Only the random start of a row is drawn with our code."""
    seeds = memdlm.row_seeds(x0, given & attend, seed)
    total = 0.0
    for b in range(len(x0)):
        real = attend[b]
        phi0 = memdlm.init_phi(model, [seeds[b]], inner)
        total = total + paper_sample(model, x0[b, real], given[b, real], t[b], u[b, real],
                                     phi0, inner, exact) / t[b]
    return total / (~given).sum()


def paper_sample(model, x0, given, t, u, phi0, inner, exact):
    """The outer cross-entropy of one sample, summed over its masked tokens, those with u < t.

    x0, given, u (L,); t a number; phi0 {name of a matrix: LowRank A (1, r, d_in), B (1, d_out, r)}.
    Inner losses: a mean over the masked tokens, times 1 / the actual mask ratio."""
    weights = dict(model.named_parameters())
    matrices = list(phi0)
    phi = [phi0[m].A[0] for m in matrices] + [phi0[m].B[0] for m in matrices]

    def cross_entropy(phi, masked):
        merged = dict(weights)
        for name, A, B in zip(matrices, phi, phi[len(matrices):]):
            name = f"{name}.weight"
            merged[name] = weights[name] + inner.alpha / inner.rank * B @ A
        xt = x0.masked_fill(masked, model.cfg.mask_id)[None]                        # (1, L)
        logits = torch.func.functional_call(model, merged, (xt,))[0]                # (L, V)
        return F.cross_entropy(logits[masked], x0[masked], reduction="sum")

    order = [i for i in u.argsort().tolist() if not given[i]]
    n = len(order)
    k = int((u[order] < t).sum())
    anchor = torch.zeros_like(given)
    anchor[order[:k]] = True
    pre_anchor = torch.zeros_like(given)                    # noisier: s_pre times as many
    pre_anchor[order[:int(min(n, inner.s_pre * k))]] = True
    # A mean over masked tokens times 1 / the realised mask ratio.
    for masked in (pre_anchor, anchor):
        phi = [(w if exact else w.detach()).requires_grad_() for w in phi]
        loss = cross_entropy(phi, masked) / masked.sum() * n / masked.sum()
        grads = torch.autograd.grad(loss, phi, create_graph=exact)
        scales = [(inner.clip / (g.norm() + 1e-6)).clamp(max=1) for g in grads]
        phi = [w - inner.inner_lr * c * g for w, c, g in zip(phi, scales, grads)]
    return cross_entropy(phi if exact else [w.detach() for w in phi], anchor)


@pytest.mark.parametrize("exact", [False, True], ids=["first order", "exact"])
@pytest.mark.parametrize("options, clip", [
    (dict(), 1.0), (dict(), 0.05), (MIXTURE, 1.0), (dict(n_layers=12), 1.0)],
    ids=["one fast layer", "clip 0.05", "experts", "attention above a phi"])
def test_batched_memdlm_equals_a_plain_loop_from_the_paper_in_loss_and_gradient(
        batch, options, clip, exact):
    """Eq. 10, with exact=True Eq. 5; each tensor of each sample is clipped by its own norm."""
    model = random_backbone(**options).double().requires_grad_(True)
    inner = dataclasses.replace(MEM, clip=clip)
    rows = batch[:5]                                        # x0, given, attend, t, u
    paper = paper_loop(model, *rows, inner, 7, exact)
    ours = memdlm.loss_memdlm(model, *rows, 1 / batch.t, 24, inner, 7, exact)
    torch.testing.assert_close(ours.double(), paper, atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
                 for loss in (ours, paper)]
    for (name, _), a, b in zip(model.named_parameters(), *gradients):
        # An expert that no token was sent to has no gradient in either.
        if a is not None or b is not None:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("method", ["plain MDLM", "first order", "exact"])
def test_recomputed_activations_change_no_gradient_bit_for_bit(batch, method):
    model = random_backbone(n_layers=12).requires_grad_(True)
    gradients = []
    for model.checkpointing in (False, True):
        if method == "plain MDLM":
            loss = prompt_loss(model, batch, CLOSED, text=batch.text)
        else:
            loss = memdlm.loss_memdlm(model, *batch[:5], 1 / batch.t, 24, MEM, 7, method == "exact")
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("layers, first", [
    (3, 2), (10, 9), (12, 10), (16, 14), (20, 18), (28, 25), (32, 28)])
def test_fast_weights_sit_on_the_ffn_of_the_last_tenth_of_the_layers(layers, first):
    assert set(memdlm.init_phi(random_backbone(n_layers=layers), [0], MEM)) == {
        f"layers.{i}.ffn.{x}" for i in range(first, layers) for x in ("gate", "up", "down")}


CLOSED = ClosedBook(rank=4, alpha=8.0, inner_lr=0.1, clip=0, chunk=4, inner_on="closed_book",
                    surprise=0.0, questions=1, window=0)
OPEN = dataclasses.replace(MEM, inner_on="prompt")


def prompt_loss(model, batch, inner, x0=None, text=None, exact=False):
    """loss_closed_book with the first five columns as the text to write (padding left out)."""
    text = batch.attend & (torch.arange(14) < 5) if text is None else text
    attend = batch.attend & ~text if inner.inner_on == "closed_book" else batch.attend
    x0 = batch.x0 if x0 is None else x0
    return memdlm.loss_closed_book(model, x0, text, batch.given, attend, batch.t, batch.u,
                                   torch.ones(4), 24, inner, 7, exact)


def phi_of(model, batch, inner, text, x0=None):
    """The fast weights that loss_closed_book answers with."""
    seen = []
    with model.register_forward_pre_hook(lambda model, args: seen.append(args[-1])):
        prompt_loss(model, batch, inner, x0, text)
    return seen[-1]


def test_in_training_a_prompt_is_written_as_at_inference_but_from_one_random_start(model, batch):
    trained = phi_of(model, batch, OPEN, batch.given & batch.attend)
    start = memdlm.init_phi(model, [7] * 4, OPEN)
    used = memdlm.adapt_to_prompt(model, batch.x0[:, :8], batch.attend[:, :8], OPEN, 7, start)
    assert all(torch.equal(trained[name].B, used[name].B) for name in used)


@pytest.mark.parametrize("fraction", [0.1, 1.0])           # with 1.0 attention lies above a phi
def test_the_exact_gradient_is_that_of_the_bilevel_loss_and_first_order_is_not(batch, fraction):
    inner = dataclasses.replace(CLOSED, fraction=fraction)
    model = random_backbone().double().requires_grad_(True)
    p = model.layers[0].ffn.up.weight
    direction = torch.randn_like(p)
    exact, first_order = (
        (torch.autograd.grad(prompt_loss(model, batch, inner, exact=way), p)[0] * direction).sum()
        for way in (True, False))
    ends = []
    for move in (2e-4, -4e-4):                             # to one side of p, then to the other
        p.data += move * direction
        ends.append(prompt_loss(model, batch, inner))
    slope = (ends[0] - ends[1]) / 4e-4
    assert abs(exact - slope) < 0.01 * abs(slope)
    assert abs(first_order - slope) > 10 * abs(exact - slope)


def test_a_window_cuts_the_exact_gradient_and_changes_no_phi(model):
    """Twelve tokens are three chunks, and each token's embedding is used in one of them."""
    model.requires_grad_(True)
    ids = torch.arange(3, 27).view(2, 12)
    phi, reached = {}, {}
    for window in (0, 1, 2):
        inner = dataclasses.replace(CLOSED, window=window)
        phi[window] = memdlm.write_text(model, ids, ids > 0, inner, exact=True)
        length = sum(w.B.pow(2).sum() for w in phi[window].values())
        grad, = torch.autograd.grad(length, model.embed_tokens.weight)
        reached[window] = (grad[ids] != 0).any(-1).all(0).tolist()                      # (12,)
        for name, w in phi[window].items():
            torch.testing.assert_close(w.B, phi[0][name].B)
    assert reached == {0: [True] * 12, 1: [False] * 8 + [True] * 4, 2: [False] * 4 + [True] * 8}


def recorded_masks(model, ids, inner, monkeypatch):
    """The positions that each inner step on a prompt has for targets."""
    masks = []
    monkeypatch.setattr(memdlm, "inner_step", lambda _, phi, *rest: masks.append(rest[3]) or phi)
    memdlm.at_inference(inner)(model, ids, ids > 0, inner)
    return masks


@pytest.mark.parametrize("n", range(1, 13))
def test_a_prompt_is_written_on_a_pre_anchor_then_on_the_nested_anchor_never_on_a_mask_token(
        model, n, monkeypatch):
    """Of n tokens and a [MASK] k tokens are hidden, at first as many as the released code hides."""
    ids = F.pad(torch.randint(3, 40, (1, n)), (1, 0), value=model.cfg.mask_id)
    for k in range(n + 1):
        inner = dataclasses.replace(MEM, prompt_ratio=k / n)
        pre_anchor, anchor = recorded_masks(model, ids, inner, monkeypatch)
        assert (int(pre_anchor.sum()), int(anchor.sum())) == (min(n, 3 * k // 2), k)
        assert (pre_anchor | ~anchor).all() and not pre_anchor[0, 0]


def test_complementary_masks_cover_a_token_once_a_mask_token_never_and_leave_neighbours_in_view(
        model, monkeypatch):
    ids = torch.randint(3, 40, (2, 21))
    ids[1, ::4] = model.cfg.mask_id
    whole = dataclasses.replace(CLOSED, chunk=0)
    masks = torch.stack(recorded_masks(model, ids, whole, monkeypatch))
    assert torch.equal(masks.sum(0), (ids != model.cfg.mask_id).long())
    for distance in (1, 2, 3):
        assert not (masks[..., distance:] & masks[..., :-distance]).any()


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("length", [3, 12])
def test_the_closed_book_sums_over_tokens_scaled_by_surprise_at_inference_not_in_training(
        model, batch, length, gamma):
    """A sum: a fact is as strong in a longer text. With one mask of all targets, one step:
    phi = phi_0 - eta * gradient of the sum of (1 - p)^gamma * CE, the scale a constant."""
    inner = dataclasses.replace(CLOSED, masks=1, chunk=0, surprise=gamma)
    ids = torch.randint(3, 40, (1, length))
    phi = memdlm.init_phi(model, memdlm.row_seeds(ids, ids > 0, 0), inner)
    for w in phi.values():
        w.B.requires_grad_()
    learned = torch.arange(length)[None] != 1                        # the second token is only read
    logits = model(ids.masked_fill(learned, model.cfg.mask_id), at=learned, phi=phi)        # (N, V)
    p = logits.detach().softmax(-1).gather(1, ids[learned][:, None])[:, 0]
    ((1 - p) ** gamma * F.cross_entropy(logits, ids[learned], reduction="none")).sum().backward()
    written = memdlm.at_inference(inner)(model, ids, ids > 0, inner, targets=learned)
    for name, w in written.items():
        torch.testing.assert_close(w.B, -inner.inner_lr * phi[name].B.grad, atol=1e-5, rtol=1e-3)
    surprised = dataclasses.replace(CLOSED, surprise=gamma)
    assert torch.equal(prompt_loss(model, batch, surprised), prompt_loss(model, batch, CLOSED))
    ours, papers = (set(c.__dataclass_fields__) for c in (ClosedBook, MemDLMConfig))
    assert ours - papers == {"masks", "chunk", "surprise", "questions", "window"}


SMALL_META = dict(num_slots=4, slot_dim=16, slot_heads=2, cond_dim=16)


@pytest.fixture
def meta(model):
    torch.manual_seed(0)
    return metastate.build(model.cfg, MetaStateConfig(**SMALL_META))


def trained_meta(model, **options):
    """Random weights everywhere, so that the zero-initialised parts act."""
    torch.manual_seed(0)
    meta = metastate.build(model.cfg, MetaStateConfig(**{**SMALL_META, **options}))
    for p in meta.parameters():
        p.data.normal_(0, 0.3)
    return meta


def passes(model, meta, batch, number, t=1.0):
    """Logits (N, V) of each denoising step over one canvas, the answer fully masked."""
    at = ~batch.given
    xt = batch.x0.masked_fill(at, model.cfg.mask_id)
    ctx = model.context(xt, batch.attend)
    found, slots = [], None
    for _ in range(number):
        logits, slots, _ = meta.step(model, ctx, xt, torch.full((4,), t), slots, at, 8)
        found.append(logits)
    return found


def test_metastates_grucell_attention_of_slots_and_untrained_norm_equal_torchs(meta, batch):
    read, slots = torch.randn(2, 5, 16)                                             # (M, S)
    x, s = meta.updater.x, meta.updater.s
    cell = torch.gru_cell(read, slots, x.weight, s.weight, x.bias, s.bias)     # torch.nn.GRUCell's
    torch.testing.assert_close(meta.updater.cell(read, slots), cell)
    q, k, v = torch.randn(4, 3, 16), torch.randn(4, 14, 16), torch.randn(4, 14, 16)
    heads = [x.unflatten(-1, (2, 8)).transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads, attn_mask=batch.attend[:, None, None])
    read, weights = metastate.attention(q, k, v, 2, batch.attend)
    torch.testing.assert_close(read, expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2, 3))
    torch.testing.assert_close(metastate.AdaRMSNorm(16, 8)(q, torch.randn(4, 8)),
                               torch.nn.RMSNorm(16, eps=1e-5)(q))


# six tokens in each row, shared out to three steps
REVEALS = torch.tensor([[1, 2, 3], [0, 0, 6], [6, 0, 0], [2, 4, 0]])


@pytest.mark.parametrize("memory", ["slots", "reset"])
def test_every_module_gets_a_gradient_and_the_backbone_none(model, batch, memory):
    meta = trained_meta(model, memory=memory)
    metastate.loss_unrolled(meta, model, batch.x0, batch.given, batch.attend, batch.u, REVEALS,
                            4).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in meta.parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("K", [1, 2, 4])
def test_a_real_backbone_trains_on_dirichlet_multinomial_reveals_from_the_start(K):
    settings = metastate.for_backbone(bb.config_from_json(REAL["llada"]))
    assert settings.unroll == 4
    n = torch.full((2000,), 100)
    reveals = metastate.draw_reveals(n, dataclasses.replace(settings, unroll=K), 0.0, seed=0)
    assert reveals.shape == (2000, K)
    assert torch.equal(reveals.sum(1), n)
    assert (reveals.double().mean(0) - 100 / K).abs().max() < 1.5
    # uniform over all ways to share out: the variance of a Beta(1, K - 1), times n (n + K)
    variance = (K - 1) / K ** 2 / (K + 1) * 100 * (100 + K)
    assert (reveals.double().var(0) - variance).abs().max() <= 0.1 * variance


@pytest.mark.parametrize("progress, steps", [(0.0, {1}), (0.15, {1, 2}), (0.39, {1, 2, 3, 4})])
def test_training_starts_with_ever_more_passes_over_an_unchanged_canvas(progress, steps):
    drawn = [metastate.draw_reveals(torch.tensor([6] * 4), MetaStateConfig(), progress, seed)
             for seed in range(50)]
    # one step, the same in every row, reveals all
    assert all((r == 6).sum() == 4 for r in drawn)
    assert {k for r in drawn for k in r.argmax(1).tolist()} == steps


def test_the_curriculum_of_metastate_begins_with_rows_that_need_memory(here, monkeypatch):
    seen = []
    monkeypatch.setattr(niah, "make_samples", lambda tasks, *args, real=niah.make_samples:
                        seen.append(set(tasks)) or real(tasks, *args))
    run_train(*SLOTS, *"--steps 5 --eval_every 9 --unroll 2 --curriculum 0.4 --tasks resolve single"
              .split())
    # the tiny backbone's pretraining draws from all tasks
    seen = [tasks for tasks in seen if len(tasks) < 3]
    assert seen[:5] == [{"resolve"}, {"resolve"}] + [{"resolve", "single"}] * 3


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_the_unrolled_loss_equals_the_published_formula_row_by_row(model, batch, balance):
    """L = sum over k of w_k [lambda dense_k + (1 - lambda) reveal_k], w_k = n_k / N_m."""
    meta = trained_meta(model, balance=balance)
    whole = metastate.loss_unrolled(meta, model, batch.x0, batch.given, batch.attend, batch.u,
                                    REVEALS, 4)
    total = 0.0
    for b in range(4):
        pads = int((~batch.attend[b]).sum())
        x = batch.x0[b:b + 1, pads:]
        hidden = (~batch.given[b, pads:]).nonzero()[:, 0]
        hidden = hidden[batch.u[b, pads:][hidden].argsort()].tolist()      # in order of reveal
        slots = None
        for n_k in REVEALS[b].tolist():
            xt = x.clone()
            xt[0, hidden] = 1
            masked = xt == 1
            logits, slots, _ = meta.step(model, model.context(xt), xt, masked.sum(1) / 6, slots,
                                         masked, 8 - pads)
            if n_k:
                ce = dict(zip(masked[0].nonzero()[:, 0].tolist(),
                              F.cross_entropy(logits, x[masked], reduction="none")))
                dense = sum(ce.values()) / len(ce)
                reveal = sum(ce[i] for i in hidden[:n_k]) / n_k
                total += n_k / 6 * (balance * dense + (1 - balance) * reveal) / 4
            hidden = hidden[n_k:]
        assert slots.shape == (1, 4, 16)            # whatever the length of the row
    torch.testing.assert_close(whole, total, atol=1e-5, rtol=1e-5)


# 2. The official samplers: against references written from their description ----------------------

def reference_llada(model, prompt, gen_length, steps, block_length, temperature=0.0,
                    cfg_scale=0.0, remasking="low_confidence"):
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
            if cfg_scale > 0:
                free = model(torch.where(fixed, mask_id, x))       # guidance: without the prompt
                logits = free + (cfg_scale + 1) * (logits - free)
            noisy = logits
            if temperature > 0:
                gumbel = -torch.rand_like(logits, dtype=torch.float64).log()
                noisy = logits.double().exp() / gumbel ** temperature               # Gumbel-max
            token = noisy.argmax(-1)                                                # (B, L)
            if remasking == "low_confidence":
                p = logits.softmax(-1).gather(-1, token[..., None])[..., 0]
            else:
                p = torch.rand(x.shape)
            p[:, end:] = -torch.inf                                # later blocks wait
            p = torch.where(x == mask_id, p, -torch.inf)
            for row in range(B):
                quota = int(n[row] // S + (s < n[row] % S))
                top = torch.topk(p[row], quota).indices
                x[row, top] = token[row, top]
    return x[:, prompt.shape[1]:]


@pytest.mark.parametrize("options", [
    dict(), dict(temperature=0.7), dict(cfg_scale=1.5), dict(remasking="random", temperature=0.5),
    dict(steps=6, block_length=4), dict(steps=5, block_length=12),
    dict(block_length=3, temperature=0.3, cfg_scale=0.5)], ids=str)
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
        remove[:, 1:] = remove[:, :-1].clone()              # the token that passes top_p is kept
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
            # as in training, each mask on its own
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
    dict(), dict(temperature=0.4, top_p=0.9), dict(temperature=0.4, top_k=5, alg_temp=0.3),
    dict(top_k=3), dict(steps=5)], ids=str)
def test_dream_sampler_is_token_identical_to_the_official_description(alg, options):
    model = random_backbone(conv_width=0, shift=True)
    prompt = torch.randint(3, 40, (2, 5))
    options = {"steps": 10, **options}
    torch.manual_seed(3)
    ours = sample.generate(model, prompt, gen_length=10, remasking=alg, stop_early=False, **options)
    torch.manual_seed(3)
    assert torch.equal(ours, reference_dream(model, prompt, 10, alg=alg, **options))


@pytest.mark.parametrize("alg, options", [
    ("origin", dict()), ("entropy", dict(temperature=0.4)), ("topk_margin", dict(alg_temp=0.5))],
    ids=str)
def test_a_row_that_ends_early_changes_no_draw_of_its_neighbours_in_dreams_orders(alg, options):
    """Up to each row's end-of-text; some rows must end before others."""
    model = random_backbone(conv_width=0, shift=True)
    model.lm_head.weight[model.cfg.eos_id] = 3 * model.lm_head.weight[5:9].sum(0)
    lengths = set()
    for seed, prompt in enumerate(torch.randint(3, 40, (8, 3, 5))):
        torch.manual_seed(seed)
        ours = sample.generate(model, prompt, gen_length=8, remasking=alg, **options)
        torch.manual_seed(seed)
        for row, other in zip(ours, reference_dream(model, prompt, 8, 8, alg, **options)):
            answer = sample.cut(row, model.cfg)
            assert answer == sample.cut(other, model.cfg)
            assert set(row[len(answer):].tolist()) <= {model.cfg.eos_id}
            lengths.add(len(answer))
    assert len(lengths) > 4


@pytest.mark.parametrize("masks, steps, expected", [
    (32, 32, [0] + [1] * 30 + [2]), (128, 128, [0] + [1] * 126 + [2]),
    (128, 64, [1] + [2] * 62 + [3]), (128, 32, [3] + [4] * 30 + [5])])
def test_dreams_fp32_schedule_commits_as_many_tokens_a_step_as_published(masks, steps, expected):
    at = torch.ones(1, masks, dtype=torch.bool)
    how = sample.Decoding(steps=steps, remasking="entropy")
    counts = []
    for step in range(steps):
        new, _ = sample.choose_dream(torch.randn(int(at.sum()), 5), at, step, how)
        counts.append(int(new.sum()))
        at &= ~new
    assert counts == expected


def test_a_memory_is_told_the_answers_mask_ratio_and_guidances_copy_gets_no_state(model):
    """Three tokens, one a step; the state counts the calls that carry it on."""
    seen = []

    def memory(backbone, xt, attend, start):
        def predict(xt, t, state, at):
            seen.append((round(3 * t.item()), state))
            return backbone(xt, attend, at), (state or 0) + 1
        return predict, 10
    sample.generate(model, [[5, 6]], gen_length=3, memory=memory, cfg_scale=0.5, eos="forbid")
    assert seen == [(3, 10), (3, None), (2, 11), (2, None), (1, 12), (1, None)]


class Eager:
    """A predictor that wants end-of-text everywhere; `memory` is what sample.generate takes."""
    calls = 0

    def memory(self, backbone, xt, attend, start):
        def predict(xt, t, state, at):
            self.calls += 1
            wanted = torch.full((int(at.sum()),), backbone.cfg.eos_id)
            return F.one_hot(wanted, backbone.cfg.vocab_size) - 2.0, state         # (N, V)
        return predict, None


def test_end_of_text_can_be_allowed_forbidden_or_put_last(model):
    """Put last, the surest token waits because it is a stop token."""
    for policy, share in (("allow", 1.0), ("forbid", 0.0)):
        ids = sample.generate(model, [[5, 6]], gen_length=6, eos=policy, memory=Eager().memory)
        assert (ids == model.cfg.eos_id).float().mean() == share, policy
    logits = torch.randn(6, 40)                                                     # (N, V)
    logits[2, model.cfg.eos_id] = 50.0
    at = torch.ones(1, 6, dtype=torch.bool)
    for last in ([], [model.cfg.eos_id]):
        new, token = sample.choose_llada(logits, at, torch.tensor([1]), sample.Decoding(), last)
        assert token[0, 2] == model.cfg.eos_id
        assert new[0, 2] == (not last)


def test_a_row_is_done_once_no_mask_is_left_before_its_first_stop_token_and_cut_there(model):
    eos, mask = model.cfg.eos_id, model.cfg.mask_id
    rows = torch.tensor([[5, eos, mask, 9], [5, mask, eos, 9]])
    finished, done = sample.finish_rows(rows, 0, model.cfg)
    assert done.tolist() == [True, False]
    assert finished.tolist() == [[5, eos, eos, eos], [5, mask, eos, 9]]
    assert sample.cut(torch.tensor([5, 6, eos, 9]), model.cfg) == [5, 6]


def test_a_threshold_commits_all_tokens_that_are_sure_in_float64_and_at_least_one(model):
    """In a bf16 softmax 0.89837 passes for 0.9; in Fast-dLLM's float64 it does not."""
    for threshold, steps, commits in ((0.0, 8, [8]), (1.1, 1, [1] * 8)):
        seen = []
        sample.generate(model, [[5, 6]], gen_length=8, steps=steps, threshold=threshold,
                        stop_early=False, on_step=lambda xt, new, _: seen.append(int(new.sum())))
        assert seen == commits, threshold
    odds = torch.log(torch.tensor(0.8977 / 0.1023))
    # the second position is the less sure one: only by passing the threshold it is committed
    logits = torch.tensor([[9.0, 0.0], [odds, 0.0]]).bfloat16()                     # (N, V)
    exact = logits.double().softmax(-1)[1, 0].item()
    at = torch.ones(1, 2, dtype=torch.bool)
    for threshold, passes in ((exact - 1e-6, True), (exact + 1e-6, False)):
        new, _ = sample.choose_llada(logits, at, None, sample.Decoding(threshold=threshold), [])
        assert new[0].tolist() == [True, passes]


@pytest.mark.parametrize("options", [
    dict(), dict(block_length=3), dict(threshold=0.1), dict(remasking="entropy")], ids=str)
def test_a_mask_token_in_a_prompt_uses_up_no_commits_and_stays(model, options):
    prompt = torch.randint(3, 40, (1, 9))
    prompt[0, [1, 4, 7]] = model.cfg.mask_id
    seen = []
    ids = sample.generate(model, prompt, gen_length=6, stop_early=False,
                          on_step=lambda *step: seen.append(step), **options)
    assert not (ids == model.cfg.mask_id).any()
    assert all(torch.equal(xt[:, :9], prompt) and not new[:, :9].any() for xt, new, _ in seen)


def test_dream_samples_in_bf16_at_any_temperature_and_never_crashes():
    for seed, temperature in itertools.product(range(43, 60), (0.2, 1.0, 1e-38)):
        torch.manual_seed(seed)
        how = sample.Decoding(temperature=temperature, top_p=0.95)
        token, probs = sample.dream_token(torch.randn(50, 40).bfloat16() * 3, how)
        assert token.shape == (50,) and (probs.gather(1, token[:, None]) > 0).all()
    # it samples: not the likeliest token everywhere
    torch.manual_seed(0)
    logits = torch.randn(20).expand(4000, 20).bfloat16()
    token, probs = sample.dream_token(logits, sample.Decoding(temperature=1.0))
    counts = F.one_hot(token, 20).float().mean(0)
    assert (counts - probs[0].float()).abs().max() < 0.03


# 3. The real checkpoints: against independent models of transformers, and their own formats -------

@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_logits_of_a_checkpoint_equal_an_independent_model(tmp_path, family, dtype, tolerance):
    tensors = write_checkpoint(tmp_path, family, dtype)
    model = load_backbone(tmp_path, "cpu")
    other = independent_model(family, tensors)
    ids = torch.randint(0, 80, (2, 11), generator=torch.Generator().manual_seed(0))
    full = torch.zeros(2, 1, 11, 11, dtype=dtype)
    theirs = other(input_ids=ids, attention_mask=full).logits.float()
    # Dream's sampler shifts the logits by one position; position 0 keeps its own.
    if family == "dream":
        theirs = torch.cat([theirs[:, :1], theirs[:, :-1]], dim=1)
    assert model.dtype == dtype
    assert (model(ids) - theirs).abs().max() < tolerance * theirs.abs().max()


@pytest.mark.parametrize("family, parameters, mask_id", [
    ("llada", 8_015_581_184, 126336), ("dream", 7_615_616_512, 151666),
    ("llada_moe", 7_356_880_896, 156895)])
def test_the_real_sizes_have_the_published_parameters_and_keys_and_metastate_adds_little_to_them(
        family, parameters, mask_id):
    """Under a percent of the parameters, and under five of the FLOPs at a length of 1,024."""
    from torch.utils.flop_counter import FlopCounterMode
    cfg = bb.config_from_json(REAL[family])
    with torch.device("meta"):
        model, meta = Backbone(cfg), metastate.build(cfg, metastate.for_backbone(cfg))
        ids = torch.zeros(1, 1024, dtype=torch.long)
    assert (size(model), cfg.mask_id) == (parameters, mask_id)
    ours = {bb.official_name(n, family): tuple(p.shape) for n, p in model.named_parameters()}
    assert ours == official_keys(family, REAL[family])
    if family == "llada_moe":
        return
    assert 0.005 < size(meta) / parameters < 0.007
    with torch.device("meta"), FlopCounterMode(display=False) as plain:
        model(ids)
    with torch.device("meta"), FlopCounterMode(display=False) as whole:
        meta.step(model, model.context(ids), ids, torch.ones(1), None, None, 900)
    assert 1 < whole.get_total_flops() / plain.get_total_flops() < 1.05


def test_llada_in_bf16_rotates_in_fp32_and_dream_does_not():
    """RoPE is a multiplication of complex numbers, one rounding after it."""
    x = torch.randn(1, 2, 50, 16).bfloat16()                                        # (B, H, L, d)
    ctx = random_backbone().context(torch.zeros(1, 50))
    turn = torch.complex(ctx.cos.double(), ctx.sin.double())[..., :8]
    turned = torch.complex(*x.double().chunk(2, -1)) * turn
    exact = torch.cat([turned.real, turned.imag], -1).bfloat16()
    llada, dream = ((bb.rotate(x, ctx.cos, ctx.sin, fp32) != exact).float().mean()
                    for fp32 in (True, False))
    assert llada < 0.001 and dream > 0.1
    assert [bb.config_from_json(CONFIGS[f]).rope_fp32 for f in CONFIGS] == [True, False, False]


@pytest.mark.parametrize("change, expected", [
    (dict(eos_token_id=[61, 62]), dict(eos_id=61, pad_id=61, stop_ids=[61, 62])),
    (dict(mask_token_id=0, eos_token_id=0), dict(mask_id=0, eos_id=0)),
    (dict(mlp_hidden_size=None), dict(d_ff=256)),
    (dict(mlp_hidden_size=None, mlp_ratio=2), dict(d_ff=128)),
    (dict(bias_for_layer_norm=None, n_kv_heads=None), dict(n_kv_heads=4)),
    (dict(rms_norm_eps=0, rope_theta=10000), dict(norm_eps=0)),
    (dict(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 7e4}),
     dict(rope_theta=7e4)),
    (dict(rope_scaling={"rope_type": "default"}), dict(rope_theta=5e5))], ids=str)
def test_unusual_but_valid_entries_of_config_json_mean_what_they_mean_officially(change, expected):
    cfg = bb.config_from_json({**CONFIGS["llada"], **change})
    assert {name: getattr(cfg, name) for name in expected} == expected


def test_a_second_convolution_reaches_the_feed_forward_layers():
    """Without attention, token i depends on token i - 1 through the second convolution alone."""
    ids = torch.arange(3, 12)[None]
    other = ids.where(ids != 6, 30)                                     # another token 3
    for convs in (0, 1):
        model = random_backbone(ffn_convs=convs)
        for layer in model.layers:
            layer.attn.o.weight.zero_()
        assert torch.equal(model(ids)[0, 4], model(other)[0, 4]) != convs


def random_adapter(model, dropout=0.0):
    """The backbone with a rank-4 LoRA whose B is no longer zero."""
    model.add_lora(4, 8, dropout=dropout)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_an_adapter_adds_nothing_when_new_then_B_A_to_all_layers_but_the_head_also_once_loaded(
        tmp_path, family):
    write_checkpoint(tmp_path / "base", family)
    base, new, model = (load_backbone(tmp_path / "base", "cpu") for _ in range(3))
    ids = torch.randint(0, 60, (2, 7))
    plain, trained = base(ids), random_adapter(model, dropout=0.05)(ids)
    assert torch.equal(new.add_lora(4, 8)(ids), plain)
    for name, module in model.named_modules():
        if isinstance(module, bb.Linear) and name != "lm_head":
            change = 8 / 4 * module.lora_B.data @ module.lora_A.data                # alpha / r
            base.get_submodule(name).weight.data += change
    torch.testing.assert_close(base(ids), trained, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, trained, atol=1e-2)
    bb.save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    path = tmp_path / "adapter/adapter_config.json"
    config = bb.read_json(path)
    for key, shape in official_keys(family, CONFIGS[family]).items():
        named = re.fullmatch(config["target_modules"], key.removesuffix(".weight"))  # as in PEFT
        is_head = re.search(r"(embed_tokens|lm_head|wte|transformer\.ff_out)\.", key)
        assert bool(named) == (len(shape) == 2 and not is_head), key
    # initial values that change nothing in the base
    for harmless in (True, False, "gaussian", "eva"):
        bb.write_json(path, {**config, "init_lora_weights": harmless})
        loaded = load_backbone(tmp_path / "adapter", "cpu")
        assert torch.equal(loaded(ids), trained)
        assert loaded.layers[0].attn.q.lora_dropout == 0.05
    with pytest.raises(ValueError, match="carries an adapter already"):
        loaded.add_lora(8, 16)


def test_lora_and_fast_weights_are_added_in_fp32_and_rounded_once_and_dropout_acts_in_training_only(
        model):
    """As PEFT 0.21 does it: logits of all three families are then equal bit for bit."""
    layer = random_adapter(model.bfloat16(), dropout=0.5).layers[0].attn.o
    x = torch.randn(2, 9, layer.in_features).bfloat16()
    A, B = layer.lora_A.data, layer.lora_B.data
    y = F.linear(x, layer.weight).float()
    torch.manual_seed(3)
    dropped = (y + 8 / 4 * (F.dropout(x.float(), 0.5) @ A.T @ B.T)).bfloat16()
    torch.manual_seed(3)
    assert torch.equal(layer.train()(x), dropped)
    once = (y + 8 / 4 * (x.float() @ A.T @ B.T)).bfloat16()
    assert torch.equal(layer.eval()(x), once)
    layer.lora_rank = 0
    assert torch.equal(layer(x, bb.LowRank(A.expand(2, -1, -1), B.expand(2, -1, -1), 2.0)), once)


def test_an_adapter_is_all_that_is_trained_with_its_own_rank_and_metastate_trains_on_it(here):
    run_train(*MDLM, "--lora", 4, "--steps", 2, "--out", "first")
    run_train(*MDLM, "--init", "first", "--steps", 2, "--out", "second")
    for folder in ("first", "second"):
        trained = train.read_state(f"{folder}/resume.pt")["trained"]
        assert trained and all(4 in p.shape for p in trained)
        config = bb.read_json(f"{folder}/adapter_config.json")
        assert (config["r"], config["base_model_name_or_path"]) == (4, "runs/pretrained-seed0")
    first, second = weights_of("first"), weights_of("second")
    assert any(not torch.equal(v, second[k]) for k, v in first.items())
    for flags, rank, said in ((MDLM, 0, "of rank 4"), (MDLM, 8, "of rank 4"), (SLOTS, 4, "frozen")):
        with pytest.raises(ValueError, match=said):
            run_train(*flags, "--init", "first", "--lora", rank, "--out", "third")
    assert not Path("third").exists()
    run_train(*SLOTS, "--unroll", 2, "--steps", 2, "--init", "second", "--out", "both")
    assert bb.read_json("both/metastate.json")["backbone"] == "second"
    assert sample.load_arms("both", "cpu")[0].layers[0].attn.q.lora_rank == 4
    assert main_of(sample, "--checkpoint both --prompt 47 --device cpu".split()) == 0


def test_the_tiny_tokenizer_gives_back_every_text_and_agrees_with_its_model_on_special_ids():
    tokenizer, cfg = niah.tiny_tokenizer(), BackboneConfig()
    text = "[PAD] the sky is blue . river = 47 . [MASK] ? river = [EOS]"
    assert tokenizer.decode(bb.encode(tokenizer, text)) == text
    ids = (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.eos_token_id)
    assert ids == (cfg.pad_id, cfg.mask_id, cfg.eos_id)


def test_dreams_tokenizer_loads_from_its_own_files_without_remote_code(tmp_path, monkeypatch):
    """Dream ships vocab.json and merges.txt and no tokenizer.json; here a BPE without merges.
    Before transformers 5 Qwen2Tokenizer is a slow class, which has no backend."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel
    monkeypatch.setattr(transformers, "Qwen2TokenizerFast", transformers.Qwen2TokenizerFast)
    monkeypatch.setattr(transformers, "Qwen2Tokenizer", None)
    write_checkpoint(tmp_path, "dream")
    vocabulary = {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}
    added = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258, "<|mask|>": 259}
    config = {"tokenizer_class": "DreamTokenizer",
              "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    bb.write_json(tmp_path / "vocab.json", vocabulary)
    bb.write_json(tmp_path / "added_tokens.json", added)
    bb.write_json(tmp_path / "tokenizer_config.json", config)
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
    cfg = BackboneConfig(family="llada", vocab_size=300, conv_width=0, chat=True, eos_id=257,
                         eot_id=260, mask_id=261)                   # after the 256 bytes
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=LLADA_TEMPLATE), cfg


@pytest.mark.parametrize("chat, templates, prompt, end", [
    (True, LLADA_TEMPLATE, LLADA_TURNS, "<|eot_id|>"),
    (True, {"tools": "no", "default": LLADA_TEMPLATE}, LLADA_TURNS, "<|eot_id|>"),
    (False, LLADA_TEMPLATE, "how far?", "<|endoftext|>")], ids=["chat", "several", "bare"])
def test_a_chat_prompt_opens_the_assistants_turn_a_bare_one_is_its_text_and_a_response_ends_each(
        llada_chat, chat, templates, prompt, end):
    tokenizer, cfg = llada_chat
    tokenizer.chat_template, cfg.chat = templates, chat
    assert tokenizer.decode(bb.encode_prompt(tokenizer, cfg, "how far?")) == prompt
    pair = bb.encode_pair(tokenizer, cfg, {"prompt": "how far?", "response": "72 km"})
    assert list(map(tokenizer.decode, pair)) == [prompt, f"72 km{end}"]


def chat_folder(folder, tokenizer, cfg, template=LLADA_TEMPLATE):
    write_checkpoint(folder, "llada", vocab_size=300, embedding_size=300,
                     mask_token_id=cfg.mask_id, eos_token_id=cfg.eos_id, max_sequence_length=512)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name, template, chat, why", [
    ("n/llada-8b-instruct", None, True, "its name says instruct"),
    ("my-ChatGPT-paper/LLaDA-8B-Base", LLADA_TEMPLATE, False, "its name says base"),
    ("models--o--LLaDA-8B-Base/snapshots/9f3c", LLADA_TEMPLATE, False, "its name says base"),
    ("mine", LLADA_TEMPLATE, True, "its folder holds a template"),
    ("database", None, False, "its folder holds no template")])
def test_instruct_or_base_is_told_by_the_last_name_and_the_template_and_said(
        llada_chat, tmp_path, capsys, name, template, chat, why):
    chat_folder(tmp_path / name, *llada_chat, template)
    assert load_backbone(tmp_path / name, "cpu").cfg.chat is chat
    assert why in capsys.readouterr().out
    bb.save_backbone(load_backbone(tmp_path / name, "cpu", chat=not chat), tmp_path / "base-chat")
    assert load_backbone(tmp_path / "base-chat", "cpu").cfg.chat is not chat


@pytest.mark.parametrize("line, chat", [(CHAT_OF % '"72"', True), (ASKED, False)])
@pytest.mark.parametrize("flags", [("--lora", 2), ("--lora", 0), ("--method", "metastate")])
def test_a_base_model_is_decoded_and_evaluated_with_the_template_only_if_it_was_trained_with_it(
        here, llada_chat, monkeypatch, flags, line, chat):
    chat_folder(here / "LLaDA-Base", *llada_chat)
    Path("data.jsonl").write_text(f"{line}\n" * 4)
    prompts = []
    monkeypatch.setattr(niah, "generate", lambda b, p, real=niah.generate, **more:
                        prompts.extend(p) or real(b, p, **more))
    run_train(*MDLM, *"--batch_size 2 --backbone LLaDA-Base --data data.jsonl --steps 1 --n_eval 1 "
              "--tasks single --unroll 1 --slot_dim 16 --slot_heads 4 --cond_dim 4 --out r".split(),
              *flags)
    start = llada_chat[0].convert_tokens_to_ids("<|startoftext|>")
    assert prompts and all((list(p)[0] == start) is chat for p in prompts)
    assert sample.load_arms("r", "cpu")[0].cfg.chat is chat
    assert sample.load_arms("r", "cpu", chat=not chat)[0].cfg.chat is not chat


def test_an_adapters_own_tokenizer_and_template_are_used(llada_chat, tmp_path):
    base, adapter = tmp_path / "LLaDA-Base", tmp_path / "sft"
    chat_folder(base, *llada_chat, None)
    bb.save_adapter(random_adapter(load_backbone(base, "cpu")), adapter, base)
    save_file(weights_of(adapter), adapter / "adapter_model.safetensors")    # as PEFT writes it
    assert not load_backbone(adapter, "cpu").cfg.chat
    llada_chat[0].chat_template = LLADA_TEMPLATE
    llada_chat[0].save_pretrained(adapter)
    assert load_tokenizer(adapter).chat_template == LLADA_TEMPLATE
    assert load_backbone(adapter, "cpu").cfg.chat


def test_a_file_may_mix_pairs_and_chats_and_only_the_closed_book_reads_a_chats_context(here):
    Path("good.jsonl").write_text("\n".join([GOOD_LINE, GOOD_CHAT] * 4))
    assert len(read_jsonl("good.jsonl")) == 8
    run_train(*MDLM, "--data", "good.jsonl", "--steps", 1)
    Path("chats.jsonl").write_text(GOOD_CHAT.replace("{", '{"context": "stone = 12 .", ', 1))
    with pytest.raises(ValueError, match="chats.jsonl, line 1: .*closed book"):
        read_jsonl("chats.jsonl")


# 4. Invariants of memory: off is the plain model, no row sees another, the same alone and padded --

@pytest.mark.parametrize("pads", [(5, 0), (0, 5)], ids=["left", "right"])
@pytest.mark.parametrize("options", [
    dict(), dict(ffn_convs=1), dict(conv_width=0, shift=True, n_kv_heads=1),
    dict(MIXTURE, qk_norm=True)], ids=str)
def test_a_row_has_the_same_logits_alone_and_in_any_padded_batch(options, pads):
    model = random_backbone(**options)
    row = torch.randint(3, 40, (1, 9))
    ids = torch.cat([F.pad(row, pads), torch.randint(3, 40, (1, 14))])              # (2, 14)
    attend = torch.cat([F.pad(row >= 0, pads), torch.ones(1, 14, dtype=torch.bool)])
    together = model(ids, attend.long())[0][attend[0]]         # (9, V); a tokenizer's mask is 0, 1
    torch.testing.assert_close(together, model(row)[0], atol=1e-5, rtol=1e-4)
    assert model.context(row, row >= 0).attend is None         # nothing padded, nothing to compute


def adapted(model, batch, inner=MEM):
    return memdlm.at_inference(inner)(model, batch.x0[:, :8], batch.attend[:, :8], inner)


def test_no_phi_phi_0_and_inner_lr_0_move_no_logit_and_one_samples_phi_its_own_alone(model, batch):
    plain = model(batch.x0, batch.attend)
    for phi in ({}, memdlm.init_phi(model, [0, 1, 2, 3], MEM),
                adapted(model, batch, MemDLMConfig(rank=4, inner_lr=0.0))):
        assert torch.equal(model(batch.x0, batch.attend, phi=phi), plain)
    other = batch._replace(x0=batch.x0.clone())
    other.x0[0, :8] = 30
    before, after = (model(batch.x0, batch.attend, phi=adapted(model, b)) for b in (batch, other))
    assert torch.equal(before[1:], after[1:])
    assert not torch.allclose(before[0], after[0], atol=1e-3)


@pytest.mark.parametrize("options, inner", [
    pytest.param(dict(), MEM, id="the paper's"),
    pytest.param(MIXTURE, MEM, id="the paper's, in experts"),
    pytest.param(dict(), CLOSED, id="the closed book's, in chunks")])
def test_a_rows_phi_has_a_start_of_its_own_and_is_the_same_alone_and_padded(batch, options, inner):
    model = random_backbone(**options)
    seeds = memdlm.row_seeds(batch.x0, batch.given & batch.attend, 0)
    assert all(len(w.A.unique(dim=0)) == 4 for w in memdlm.init_phi(model, seeds, inner).values())
    together = adapted(model, batch, inner)
    for row in range(4):
        real = batch.attend[row, :8]
        ids = batch.x0[row, :8][real][None]                                         # (1, L)
        alone = memdlm.at_inference(inner)(model, ids, real[real][None], inner)
        for name, w in alone.items():
            torch.testing.assert_close(together[name].B[row], w.B[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("inner, ends, hidden", [
    pytest.param(OPEN, [8, 8, 8, 8], (slice(None), slice(8, None)), id="of a prompt: the answer"),
    # row 0's question begins where the texts of the others still go on
    pytest.param(CLOSED, [3, 5, 5, 5], (0, slice(3, 5)), id="of a closed book: the question")])
def test_phi_knows_the_text_that_is_written_and_not(model, batch, inner, ends, hidden):
    text = batch.attend & (torch.arange(14) < torch.tensor(ends)[:, None])
    other = batch.x0.clone()
    other[hidden] = (other[hidden] + 1) % 37 + 3
    mine, theirs = (phi_of(model, batch, inner, text, x0) for x0 in (batch.x0, other))
    assert all(torch.equal(mine[name].B, theirs[name].B) for name in mine)


def test_a_closed_book_leaves_the_canvas_of_its_question_and_a_phi_of_its_text_for_all_who_ask(
        model, batch):
    other = batch.x0.clone()
    other[:, :5] = (other[:, :5] + 1) % 37 + 3
    still = dataclasses.replace(CLOSED, inner_lr=0.0)
    assert torch.equal(prompt_loss(model, batch, still), prompt_loss(model, batch, still, other))
    assert prompt_loss(model, batch, CLOSED) != prompt_loss(model, batch, CLOSED, other)
    for hidden, inner in ((5, still), (0, CLOSED)):         # without a text it is plain MDLM
        text = batch.attend & (torch.arange(14) < hidden)
        x0, given, attend, _, u = (x[..., hidden:] for x in batch[:5])
        xt, masked = corrupt(x0, batch.t, given, 1, u)
        plain = masked_loss(model(xt, attend, masked), x0, masked, torch.ones(4), 24)
        torch.testing.assert_close(prompt_loss(model, batch, inner, text=text), plain)
    shared = batch._replace(x0=batch.x0.clone(), attend=torch.ones_like(batch.attend))
    shared.x0[1::2, :5] = shared.x0[::2, :5]
    two = dataclasses.replace(CLOSED, questions=2)
    torch.testing.assert_close(prompt_loss(model, shared, two), prompt_loss(model, shared, CLOSED))


def test_untrained_metastate_equals_the_frozen_backbone_bit_for_bit(model, batch):
    at = ~batch.given
    plain = model(batch.x0.masked_fill(at, model.cfg.mask_id), batch.attend, at)
    for layers in ((0,), (1, 2)):
        meta = metastate.build(model.cfg, MetaStateConfig(**SMALL_META, inject_layers=layers))
        assert all(torch.equal(logits, plain) for logits in passes(model, meta, batch, 2)), layers


@pytest.mark.parametrize("memory", ["slots", "reset", "detached", "feedback", "logits"])
def test_memory_and_time_reach_the_logits_but_reset_and_slots_alone_train_through_time(
        model, batch, memory):
    """s_0 is injected at the first step; a loss at the third feels it through two writes."""
    meta = trained_meta(model, memory=memory)
    first, second, third = passes(model, meta, batch, 3)
    assert torch.equal(first, second) == (memory == "reset")
    if memory in ("slots", "detached"):
        assert not torch.allclose(first, passes(model, meta, batch, 1, t=0.5)[0], atol=1e-3)
        third.sum().backward()
        assert (meta.s0.grad is not None) == (memory == "slots")


@pytest.mark.parametrize("slots", [False, True], ids=["plain", "metastate"])
@pytest.mark.parametrize("options", [
    dict(), dict(block_length=3), dict(threshold=0.2), dict(cfg_scale=0.7),
    dict(remasking="entropy")], ids=str)
def test_a_row_decodes_the_same_alone_and_in_any_order_or_padding(model, slots, options):
    prompts = [torch.randint(3, 40, (n,)) for n in (4, 9, 1)]
    memory = trained_meta(model).memory() if slots else sample.no_memory

    def decode(prompts):
        return sample.generate(model, prompts, gen_length=6, memory=memory, **options)
    together = decode(prompts)
    assert torch.equal(together, torch.cat([decode([p]) for p in prompts]))
    assert torch.equal(together.flip(0), decode(prompts[::-1]))


@pytest.fixture
def meta_checkpoint(tmp_path):
    """A MetaState in tmp_path/meta, trained on the backbone in tmp_path/base."""
    model = random_backbone(vocab_size=139)
    bb.save_backbone(model, tmp_path / "base", niah.tiny_tokenizer())
    meta = trained_meta(model)
    metastate.save(meta, tmp_path / "meta", tmp_path / "base", metastate.fingerprint(model))
    return meta


def test_a_metastate_and_its_backbone_load_as_saved_and_run_in_four_ways(tmp_path, meta_checkpoint):
    """The wiped arm starts every step from s_0, with the trained weights; both has phi, too."""
    loaded, _, _ = metastate.load(tmp_path / "meta", "cpu")
    assert all(map(torch.equal, meta_checkpoint.parameters(), loaded.parameters()))
    model, tokenizer, arms = sample.load_arms(tmp_path / "meta", "cpu")
    assert tokenizer.mask_token_id == 1
    assert list(arms) == ["frozen", "metastate", "wiped", "both"]
    xt = torch.randint(3, 40, (2, 14))
    assert torch.equal(model(xt), random_backbone(vocab_size=139)(xt))
    at = torch.arange(14).expand(2, -1) > 8
    first, second = {}, {}
    for arm, memory in arms.items():
        predict, state = memory(model, xt, None, 9)
        first[arm], state = predict(xt, torch.ones(2), state, at)
        second[arm], _ = predict(xt, torch.ones(2), state, at)
    same, others = first["metastate"], (first["frozen"], first["both"], second["metastate"])
    assert torch.equal(first["wiped"], same) and torch.equal(second["wiped"], same)
    assert not any(torch.allclose(logits, same, atol=1e-4) for logits in others)


class LargestLogits(TorchDispatchMode):
    """The most rows of a tensor whose last dimension is the vocabulary."""
    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if getattr(x, "shape", ())[-1:] == (1999,):
                self.rows = max(self.rows, x.numel() // 1999)
        return out


def test_no_tensor_over_the_vocabulary_has_more_rows_than_there_are_targets():
    """Writing a prompt masks 0.2, then 0.3 of it; decoding looks at the answer alone."""
    model = random_backbone(vocab_size=1999, conv_width=0)
    prompt = torch.randint(3, 1999, (1, 1000))
    for memory, rows in ((sample.no_memory, 40), (memdlm.prompt_memory(MEM), 300)):
        with LargestLogits() as largest:
            sample.generate(model, prompt, gen_length=40, steps=1, memory=memory)
        assert largest.rows == rows, memory


# 5. Tasks and scores: RULER, BABILong, the closed book --------------------------------------------

def new_checkpoint():
    """An untrained tiny checkpoint in the working directory, as a command line names it."""
    torch.manual_seed(0)
    bb.save_backbone(load_backbone("tiny", "cpu"), "new", niah.tiny_tokenizer())
    return "--checkpoint", "new"


@pytest.fixture(scope="module")
def tiny():
    """An untrained tiny model and its tokenizer."""
    torch.manual_seed(0)
    return load_backbone("tiny", "cpu"), niah.tiny_tokenizer()


@pytest.mark.parametrize("text, question", [
    ("river = 47 . ? river =", "? river ="),
    ("where ? river = 47 . ? river =", "? river ="),
    ("river = 47 . ? stone\nriver =", "river ="),
    ("  river = 47 .\n? river =\n", "? river =")])
def test_a_closed_book_prompt_ends_with_a_line_or_a_question_mark_that_starts_the_question(
        tiny, text, question):
    longer = "stone = 12 . the sky is blue ."
    questions, arms, _ = sample.close_book(*tiny, [f"{longer} ? stone =", text], ".")
    assert questions == ["? stone =", question] and list(arms) == ["none", "written"]
    written = text.strip().removesuffix(question).strip()
    expected, *_ = sample.write_texts(*tiny, [longer, written], MemDLMConfig())
    _, phi = arms["written"](tiny[0], torch.ones(2, 1), None, 1)
    assert all(torch.equal(phi[name].B, w.B) for name, w in expected.items())


def pairs_in(text):
    """Every "left = right ." of a text, in order."""
    return re.findall(r"(\w+) = (\w+) \.", text)


def solved(s):
    """The words of a sample's answer, from its text alone."""
    pairs = pairs_in(s.prompt)
    *words, asked, last = s.prompt.split()
    if s.task == "common":
        listed = words[1:-1]
        return sorted(sorted(set(listed), key=listed.count)[-3:], key=niah.KEYS.index)
    if s.task == "stories":
        place = dict(re.findall(r"(\w+) moved (\w+)", s.prompt))
        [holder] = re.findall(rf"(\w+) took {last}", s.prompt)
        return [holder, place[holder]]
    if s.task not in ("tracking", "tracking4", "resolve"):
        return [value for key, value in pairs if key == asked]
    # a chain is followed up, from name to value, or down to all that hold it
    up = s.task == "resolve"
    path, after = [asked if up else last], dict(pair[::1 if up else -1] for pair in pairs)
    while path[-1] in after:
        path.append(after[path[-1]])
    assert len(path) == s.hops + 2
    return path[-1:] if up else path[1:]


@pytest.mark.parametrize("task", [*niah.TASKS, "more_hops"])
@pytest.mark.parametrize("length", [0, 64, 256])
def test_a_task_fills_its_length_with_known_words_is_solved_from_its_text_and_fixed_by_its_seed(
        task, length):
    """59 words hold the longest task without any filler."""
    vocabulary = niah.vocabulary()
    n_refs = dict(multivalue=4, tracking=2 + 1, tracking4=4 + 1, common=3).get(task, 1)
    once, again, other = (niah.make_samples([task], length, 100, i, "eval") for i in (0, 0, 1))
    assert once == again != other
    for s in once:
        answer = s.answer.split()
        assert 0.75 * length < len(s.prompt.split()) <= max(length, 59)
        assert all(word in vocabulary for word in s.prompt.split() + answer)
        assert solved(s) == answer
        assert s.refs == answer[-n_refs:] and len(answer) == n_refs + (task == "stories")
        assert s.score(s.answer) == (1.0, 1.0)
        assert 0 < s.chance <= 1 and 0 <= s.depth <= 1


def test_a_pair_of_the_evaluation_never_occurs_in_training_and_all_evaluations_ask_for_those(tiny):
    """Each pair belongs to one of the two. A chain's "b = a" was drawn as b after a."""
    tasks = ["multikey", "multivalue", "tracking4", "resolve"]
    for split in ("train", "eval"):
        for s in niah.make_samples(tasks, 64, 500, 0, split):
            for left, right in pairs_in(s.prompt):
                drawn = (left, right) if right.isdigit() else (right, left)
                assert niah.for_evaluation(*drawn) == (split == "eval")
    arguments = (*tiny, {"off": sample.no_memory}, ["multikey"], [16], 20, 0)
    rows = niah.evaluate(*arguments) + niah.evaluate(*arguments, passes=1)
    rows += niah.closed_book(*tiny, CLOSED, arms=["none"], n_facts=[4], lengths=[0], n=20, seed=0)
    assert len(rows) == 60
    for row in rows:
        assert all(niah.for_evaluation(*pair) for pair in pairs_in(row["prompt"]))


@pytest.mark.parametrize("task, least, most", [("multikey", 0.25, 0.25), ("stories", 0.2, 0.28)])
def test_chance_is_what_a_guesser_gets_who_names_a_value_or_a_place_of_the_text(task, least, most):
    rng, hits, chances = random.Random(0), 0, []
    for s in niah.make_samples([task], 64, 2000, 0, "eval"):
        places = sorted(set(s.prompt.split()) & set(niah.PLACES))
        guess = rng.choice(places or [value for _, value in pairs_in(s.prompt)])
        hits += niah.recall(s.refs, guess) / 2000
        chances.append(s.chance)
    chance = sum(chances) / 2000
    assert least <= chance <= most and abs(hits - chance) < 0.03


def test_intervals_are_wilsons_near_zero_and_one():
    """Wilson's formula for k right of n; the normal approximation has width 0 at k = n."""
    for k, n in ((100, 100), (0, 100), (97, 100), (1, 1), (40, 80)):
        p, z = k / n, 1.96
        half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        assert niah.interval([1.0] * k + [0.0] * (n - k)) == pytest.approx((p, half))


def test_recall_is_the_share_of_references_found_but_a_storys_first_sentence_names_one_place():
    assert niah.recall(["47", "Blue"], "it is BLUE .") == 0.5
    tokenizer, config = niah.tiny_tokenizer(), BackboneConfig()
    s = niah.make_samples(["stories"], 64, 1, 0, "eval")[0]
    right = s.refs[0]
    wrong = next(p for p in niah.PLACES if p != right)
    for output, value in ((f"mary {right}", 1), (right, 1), (f"{wrong} {right}", 0), (wrong, 0),
                          ("mary", 0), (f"{right} . mary moved {wrong}", 1)):
        ids = torch.tensor(tokenizer.encode(output) + [config.eos_id])
        assert niah.scored(s, ids, tokenizer, config)["recall"] == value, output


def write_lines(file, lines):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def rows_in(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


PROMPTS = [{"prompt": "river = 47 . ? river =", "task_id": "HumanEval/0"},
           {"messages": [{"role": "user", "content": "stone = 12 . ? stone ="}]},
           {"prompt": "? river ="}]
DECODE = "--checkpoint new --device cpu --data prompts.jsonl --batch_size 2 --temperature 1".split()


def test_a_file_of_prompts_is_decoded_by_every_arm_and_goes_on_after_its_last_whole_line(
        here, capsys):
    write_lines("prompts.jsonl", PROMPTS)
    new_checkpoint()
    assert main_of(sample, [*DECODE, "--out", "whole.jsonl"]) == 0
    assert re.search(r"\d+ forward passes, \d+ tokens, [\d.]+ tokens/s", capsys.readouterr().out)
    rows = rows_in("whole.jsonl")
    assert [row["arm"] for row in rows] == ["off"] * 3 + ["on"] * 3
    for row, given in zip(rows, PROMPTS * 2):
        assert given.items() <= row.items() and isinstance(row["answer"], str)
    whole = Path("whole.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for kept in (10, ends[0], ends[3] + 10, ends[5]):
        Path("parts.jsonl").write_bytes(whole[:kept])
        assert main_of(sample, [*DECODE, "--out", "parts.jsonl"]) == 0
        assert Path("parts.jsonl").read_bytes() == whole
    # answers with other settings are never mixed
    for wrong, words in (("none/rows.jsonl", ""), ("rows.jsonl --watch", ""),
                         ("whole.jsonl --steps 3", "holds other answers")):
        assert main_of(sample, [*DECODE, "--out", *wrong.split()]) == 2
        assert words in capsys.readouterr().err
    assert Path("whole.jsonl").read_bytes() == whole


TWO_RANKS = """
from test_all import itertools, main_of, niah, sample, sys, train
train.dist.destroy_process_group = lambda: None
main_of(train, {learn} + ["--batch_size", "2", "--out", "two"])
niah.join_ranks = sample.join_ranks = lambda how: None
main_of(sample, {decode} + ["--out", "two_prompts.jsonl"])
main_of(niah, {evaluate} + ["--out", "two.jsonl"])
generate, turn = niah.generate, itertools.count(1)

def failing(*inputs, **settings):
    if next(turn) == 2 and niah.ranks()[0] == 1:
        raise ValueError("the power is gone")
    return generate(*inputs, **settings)
niah.generate = failing
sys.exit(main_of(niah, {evaluate} + ["--out", "dead.jsonl"]))
"""


def test_two_processes_with_sharded_frozen_layers_work_as_one_and_a_dead_one_ends_the_run(
        on_data, capsys):
    write_lines("prompts.jsonl", PROMPTS)
    new_checkpoint()
    learn = [*RESPONSE, *on_data, *"--steps 3 --lr 1e-2 --lora 4 --lora_dropout 0 --rank 4".split()]
    evaluate = [*DECODE[:4], *"--n 3 --lengths 32 64 --tasks single common resolve".split()]
    Path("two.py").write_text(TWO_RANKS.format(learn=learn, decode=DECODE, evaluate=evaluate))
    command = [sys.executable, *"-m torch.distributed.run --nproc_per_node=2 --standalone".split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    with subprocess.Popen([*command, "two.py"], env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as processes:
        run_train(*learn, "--batch_size", "4", "--out", "one")
        assert main_of(sample, [*DECODE, "--out", "one_prompts.jsonl"]) == 0
        assert main_of(niah, [*evaluate, "--out", "one.jsonl"]) == 0
        said, errors = processes.communicate(timeout=300)
    table = capsys.readouterr().out.split("recall by length")[1].split(" answers,")[0]
    one, two = ([row["loss"] for row in log_of(folder)] for folder in ("one", "two"))
    assert len(one) == 3 and one == pytest.approx(two, abs=1e-5)
    torch.testing.assert_close(weights_of("one"), weights_of("two"), atol=1e-4, rtol=1e-3)
    for one, two in (("one_prompts.jsonl", "two_prompts.jsonl"), ("one.jsonl", "two.jsonl")):
        assert Path(one).read_bytes() == Path(two).read_bytes()
    assert said.count(table) == 1
    # the second process died in its second turn: the first turn's rows are there
    assert processes.returncode and "error: the power is gone" in errors
    assert rows_in("dead.jsonl") == rows_in("one.jsonl")[:6]


def test_every_mode_sees_the_introduction_and_the_answer_length(monkeypatch):
    """On a real model. With one token a character answers are long."""
    characters = argparse.Namespace(
        unk_token="?", encode=lambda text, add_special_tokens: [ord(c) for c in text],
        decode=lambda ids, skip_special_tokens: "".join(map(chr, ids)))
    assert niah.answer_budget(niah.tiny_tokenizer()) == niah.BUDGET
    longest = max(len(s.answer) for s in niah.make_samples(list(niah.TASKS), 64, 2000, 0))
    assert niah.answer_budget(characters) >= longest + 1
    calls = spied(monkeypatch, sample, "no_memory")
    model = random_backbone(vocab_size=400, family="llada")
    arguments = (model, characters, {"off": sample.no_memory}, ["resolve"])
    niah.evaluate(*arguments, [64], 1, 0, gen_length=12)
    niah.evaluate(*arguments, [64], 1, 0, gen_length=12, passes=2)
    exposure(*arguments, 64, 1, 0, gen_length=12)
    assert len(calls) == 3
    for (_, xt, _, start), _ in calls:
        assert niah.INTRO in "".join(map(chr, xt[0, :start])) and xt.shape[1] - start == 12


def test_a_text_of_facts_asked_several_times_keeps_its_text_and_has_the_right_answers():
    [text] = niah.make_samples([niah.facts], 40, 1, 0, "eval")
    for asked in niah.ask(text, 4, random.Random(0)):
        assert asked.text == text.text and solved(asked) == [asked.answer]


def test_the_arms_of_the_closed_book_are_what_they_are_called(tiny):
    model, tokenizer = tiny
    samples = niah.make_samples([niah.facts], 40, 3, 0, "eval")

    def phi_of(arm, some=samples, **changes):
        return niah.phi_of_arm(*tiny, some, arm, dataclasses.replace(CLOSED, **changes))
    phi = {arm: phi_of(arm) for arm in niah.CLOSED_ARMS}
    assert phi["none"] is None and phi["open"] is None
    for name, w in phi["written"].items():
        assert torch.equal(phi["other"][name].B[1:], w.B[:-1])
        torch.testing.assert_close(phi["random"][name].B.norm(dim=(1, 2)), w.B.norm(dim=(1, 2)))
        assert not torch.equal(phi["uncovered"][name].B, w.B)
    # one step from B = 0, then: the same the other way round
    once, flipped = (phi_of(arm, masks=1, chunk=0) for arm in ("written", "flipped"))
    assert all(torch.equal(flipped[name].B, -w.B) for name, w in once.items())
    assert any(w.B.any() for w in once.values())
    # all arms start from the same A
    start, cover = (phi_of(arm, inner_lr=0.0) for arm in ("written", "uncovered"))
    assert all(torch.equal(cover[name].A, w.A) for name, w in start.items())
    # the question is written behind its text, as a chunk of its own
    phi = phi_of("phi", chunk=16)
    inner = dataclasses.replace(CLOSED, chunk=16)
    for row, s in enumerate(samples):
        ids = torch.tensor([tokenizer.encode(s.question)])
        every = torch.ones_like(ids, dtype=torch.bool)
        one = memdlm.write_chunk(model, phi_of("written", [s], chunk=16), ids, every, every, inner,
                                 False, torch.ones_like)
        for name, w in one.items():
            torch.testing.assert_close(phi[name].B[row], w.B[0], rtol=1e-3, atol=1e-4)


def test_the_closed_book_flag_decodes_and_measures_and_leaves_out_what_a_length_does_not_hold(
        here, capsys):
    argv = [*new_checkpoint(), "--closed_book", "--device", "cpu"]
    prompts = ["--prompt", "river = 47 . ? river =", "stone = 12 . ? stone ="]
    assert main_of(sample, [*argv, *prompts]) == 0
    said = capsys.readouterr().out
    arms = re.findall("^ +(none|written): ", said, flags=re.M)
    assert sorted(arms) == ["none"] * 2 + ["written"] * 2 and "of 2 answers" in said
    argv += ["--n", "3", "--facts", "2", "--lengths", "0"]
    assert main_of(niah, [*argv, "--out", "all.jsonl"]) == 0
    assert {row["arm"] for row in rows_in("all.jsonl")} == niah.CLOSED_ARMS.keys() - {"uncovered"}
    assert main_of(niah, [*argv, "40", "--facts", "2", "16", "--arms", "none", "written"]) == 0
    rows = rows_in("new/closed_book.jsonl")
    cells = {(row["arm"], row["facts"], row["length"]) for row in rows}
    assert cells == {(a, *c) for a in ("none", "written") for c in ((2, 0), (2, 40), (16, 0))}
    assert len(rows) == 3 * len(cells) and {row["recall"] for row in rows} <= {0.0, 1.0}
    table = capsys.readouterr().out.split("recall by length")[-1].split("\n")[1:6]
    # facts, whether the longer length is left out, chance
    lines = [(line[1], line[-2] == "-", line[-1]) for line in map(str.split, table[:4])]
    assert lines == [("2", False, "50.0")] * 2 + [("16", True, "6.2")] * 2
    assert "facts alone" in table[4]


@torch.no_grad()
def exposure_bias(backbone, x0, given, attend, steps, memory):
    """How much worse is the model on its own trajectory than on ground truth? At mask ratios 1,
    1 - 1/S, ... three losses, means over the batch's masked tokens; the response ends every row.
    sequential: what is masked after denoising down to this ratio with its own, surest tokens;
    static: as many random masks in the ground truth; the paper's ratio is sequential / static;
    clean (ours): the sequential masks in the ground truth, free of the selection effect.
    All three start from the memory that the sequential run has left."""
    mask_id = backbone.cfg.mask_id
    n = (~given).sum(1)                                                                 # (B,)
    xt = x0.masked_fill(~given, mask_id)
    u = torch.rand(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
    u = u.masked_fill(given, 2.0)
    predict, state = memory(backbone, xt, attend, bb.answer_start(given))
    rows = []

    def measure(xt, masked):
        logits, new_state = predict(xt, masked.sum(1) / n, state, masked)
        return F.cross_entropy(logits.float(), x0[masked]).item(), logits, new_state
    for step in range(steps):
        masked = (xt == mask_id) & ~given
        at_random = bb.smallest(u, masked.sum(1))
        static, clean = (measure(x0.masked_fill(m, mask_id), m)[0] for m in (at_random, masked))
        sequential, logits, state = measure(xt, masked)
        rows.append(dict(mask_ratio=1 - step / steps, sequential=sequential, static=static,
                         clean=clean, published_ratio=sequential / static,
                         clean_ratio=sequential / clean))
        p, token = logits.float().softmax(-1).max(-1)
        unsure = torch.full(xt.shape, 2.0, device=xt.device).masked_scatter(masked, 1 - p)
        masks_left = (n * (1 - (step + 1) / steps)).round()
        reveal = bb.smallest(unsure, masked.sum(1) - masks_left)
        xt = torch.where(reveal, torch.zeros_like(xt).masked_scatter(masked, token), xt)
    return rows


def exposure(backbone, tokenizer, arms, tasks, length, n, seed, gen_length=None):
    """A table: exposure bias per step for every arm, all tasks mixed."""
    gen_length = gen_length or niah.answer_budget(tokenizer)
    encoded = niah.encoded_samples(backbone, tokenizer, tasks, length, n, seed, gen_length)
    examples = [train.Example([], prompt, bb.encode(tokenizer, s.answer)[:gen_length])
                for s, prompt in zip(*encoded)]
    batch = train.collate(examples, backbone.cfg, gen_length, torch.Generator())
    inputs, lines = [x.to(backbone.device) for x in (batch.x0, batch.given, batch.attend)], []
    for arm, memory in arms.items():
        rows = exposure_bias(backbone, *inputs, gen_length, memory)
        lines += [f"{arm:<14}" + "".join(f"{x:>16.3f}" for x in r.values()) for r in rows]
    return "\n".join([f"{'exposure bias':<14}" + "".join(f"{c:>16}" for c in rows[0]), *lines])


def blind(backbone, xt, attend, start):
    """A predictor that ignores its context: every token is equally likely."""
    def predict(xt, t, state, at):
        return torch.zeros(int(at.sum()), backbone.cfg.vocab_size), None            # (N, V)
    return predict, None


# 6. Training: resume, accumulation, processes, defaults -------------------------------------------

RESPONSE = ["--method", "memdlm", "--inner_on", "response", *SMALL]
CLOSED_BOOK = ["--method", "memdlm", *SMALL, "--batch_size", "8", "--rank", "4"]
DROPOUT = [*MDLM, "--lora", "4", "--lora_dropout", "0.5"]
METHODS = {"mdlm": MDLM, "memdlm": RESPONSE, "closed": CLOSED_BOOK, "metastate": SLOTS}


@pytest.fixture
def quick(here, monkeypatch):
    """As `here`, without the report at the end of a run: it takes longer than the steps."""
    monkeypatch.setattr(train, "report", lambda run: None)
    return here


@pytest.mark.parametrize("method, loss, arm", [
    ("closed", "the closed book (ours)", "other      control: phi of another text"),
    ("metastate", "MetaState's loss", "wiped      control: the same weights"),
    ("memdlm", "MemDLM's loss", "on         phi, adapted")], ids=["closed", "metastate", "memdlm"])
def test_a_run_says_first_which_loss_it_trains_and_last_what_each_arm_is(
        here, capsys, method, loss, arm):
    run_train(*METHODS[method], *"--n_eval 1 --length 16 --tasks resolve --steps 1".split())
    said = capsys.readouterr().out
    assert said.startswith(f"trains {loss}") and f"\n  {arm}" in said


@contextlib.contextmanager
def killed_at(fatal_step):
    """Ctrl-C in this training step, before the weights change."""
    batch = train.Run.batch

    def killed(self, step):
        if step == fatal_step:
            raise KeyboardInterrupt
        return batch(self, step)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Run, "batch", killed)
        yield


def contents(folder, but=()):
    """{name: bytes} of the files in a folder."""
    return {f.name: f.read_bytes() for f in Path(folder).iterdir() if f.name not in but}


@pytest.mark.parametrize("method, save_every, watched", [
    (MDLM, 2, "held_out_off"), (RESPONSE, 2, "held_out_off"), (CLOSED_BOOK, 2, "recalled"),
    (SLOTS, 2, "held_out_metastate"), (DROPOUT, 2, "held_out_off"), (MDLM, 9, "held_out_off")],
    ids=[*METHODS, "dropout", "before the first checkpoint"])
def test_a_killed_run_resumed_equals_the_whole_run_bit_for_bit_and_logs_what_its_memory_learns(
        quick, capsys, method, save_every, watched):
    """Killed after the log of step 2, before the checkpoint of step 4."""
    options = [*method, "--steps", 4, "--save_every", save_every, "--eval_every", 2, "--unroll", 2]
    run_train(*options, "--out", "whole")
    with killed_at(3):
        run_train(*options, "--out", "parts")
    run_train(*options, "--out", "parts", "--resume")
    assert ("starts from the beginning" in capsys.readouterr().out) == (save_every == 9)
    # an adapter's file has its metadata in any order
    others = ["resume.pt", "log.jsonl", "adapter_model.safetensors"]
    assert contents("whole", but=others) == contents("parts", but=others)
    torch.testing.assert_close(weights_of("whole"), weights_of("parts"), atol=0, rtol=0)
    log, other = ([{**row, "seconds": 0} for row in log_of(name)] for name in ("whole", "parts"))
    assert log == other
    columns = [(row["step"], *list(row)[5:]) for row in log]
    assert columns == [(0,), (1, watched), (2,), (3, watched)]
    # of MetaState's, too: the loss of its frozen backbone alone would stay
    assert watched == "recalled" or log[1][watched] != log[3][watched]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_accumulation_is_one_large_batch_the_gradient_is_clipped_to_norm_1_and_only_matrices_decay(
        quick, method, monkeypatch):
    """Clipped as AdamW sees it, after it was made a million times as large."""
    total = train.Run.sum_over_ranks

    def enlarged(self, loss):
        for p in self.trained:
            p.grad.mul_(1e6)
        return total(self, loss)
    monkeypatch.setattr(train.Run, "sum_over_ranks", enlarged)
    options = [*method, *"--steps 1 --unroll 2 --plain_share 0 --weight_decay 0.25".split()]
    options += ["--questions", 2] * (method is CLOSED_BOOK)
    run_train(*options, "--batch_size", 6, "--out", "one")
    run_train(*options, "--batch_size", 2, "--accumulate", 3, "--out", "three")
    [one], [three] = log_of("one"), log_of("three")
    assert one["loss"] == pytest.approx(three["loss"], abs=1e-6)
    assert one["grad_norm"] == pytest.approx(three["grad_norm"], rel=1e-3)
    for folder in ("one", "three"):
        # after one step the first moment is a tenth of the gradient
        state, groups = train.read_state(f"{folder}/resume.pt")["optimizer"].values()
        moments = {i: x["exp_avg"] for i, x in state.items()}
        norm = torch.nn.utils.get_total_norm(moments.values())
        assert norm.item() == pytest.approx(0.1, rel=1e-3)
        decays = {(moments[i].ndim > 1, g["weight_decay"]) for g in groups for i in g["params"]}
        assert decays == {(True, 0.25), (False, 0.0)}


def spied(monkeypatch, owner, name):
    """From now on the calls of a function: a list of its arguments and results."""
    calls, function = [], getattr(owner, name)

    def spy(*inputs, **more):
        result = function(*inputs, **more)
        calls.append(((*inputs, *more.values()), result))
        return result
    monkeypatch.setattr(owner, name, spy)
    return calls


@pytest.mark.parametrize("method, loss", [("closed", "closed_book"), ("memdlm", "memdlm")])
def test_the_gradient_is_exact_in_the_last_steps_and_a_text_to_write_hidden_from_the_canvas(
        quick, monkeypatch, method, loss):
    losses = spied(monkeypatch, memdlm, f"loss_{loss}")
    batches = spied(monkeypatch, train.Run, "batch")
    run_train(*METHODS[method], *("--steps 4 --exact_from 0.5 --plain_share 0 --full_share 0 "
                                  "--eval_every 4").split())
    assert [inputs[-1] for inputs, _ in losses] == [False, False, True, True]
    for _, (batch, _) in batches[-4:]:
        assert batch.text.any() == (method == "closed")
        assert not (batch.text & batch.attend).any()


def write_data(file, n):
    """n multikey samples as a JSONL file."""
    samples = niah.make_samples(["multikey"], 40, n, 0)
    write_lines(file, [{"prompt": s.prompt, "response": s.answer} for s in samples])


def small_folder(folder, family="llada", **more):
    """A miniature of a real backbone with the tiny tokenizer."""
    sizes = dict(vocab_size=139, embedding_size=139, mask_token_id=1, eos_token_id=2, **more)
    write_checkpoint(folder, family, **{k: v for k, v in sizes.items() if k in CONFIGS[family]})
    niah.tiny_tokenizer().save_pretrained(folder)


@pytest.fixture
def on_data(quick):
    """The flags of a run on the miniature of LLaDA in `base` and the examples in data.jsonl."""
    small_folder(quick / "base")
    write_data("data.jsonl", 40)
    return ["--backbone", "base", "--data", "data.jsonl", "--max_len", "64"]


def test_a_byte_order_mark_empty_lines_and_nulls_change_nothing(here):
    null = GOOD_LINE.replace("}", ', "messages": null, "context": null}')
    chat = GOOD_CHAT.replace("}]", ', "tool_calls": null}]').replace("]}", '], "prompt": null}')
    Path("odd.jsonl").write_bytes(f"\ufeff{null}\r\n\n  \n{chat}\n\n".encode())
    Path("good.jsonl").write_text(f"{GOOD_LINE}\n{GOOD_CHAT}")
    assert read_jsonl("odd.jsonl") == read_jsonl("good.jsonl")


def test_a_run_and_a_metastate_belong_to_what_their_data_and_paths_hold_however_those_are_spelled(
        on_data):
    options = [*SLOTS, *on_data, *"--slot_heads 2 --slot_dim 16 --cond_dim 16 --steps 2".split(),
               "--save_every", 1, "--out", "run"]
    with killed_at(1):
        run_train(*options)
    shutil.copytree("base", "moved")
    other = load_backbone("base", "cpu")
    other.norm.weight.data += 1
    bb.save_backbone(other, "other", load_tokenizer("base"))
    write_lines("less.jsonl", rows_in("data.jsonl")[5:])
    for flag, other in (("--data", "less.jsonl"), ("--backbone", "other")):
        with pytest.raises(ValueError, match=f"belongs to another run: the {flag[2:]} was"):
            run_train(*options, "--resume", flag, other)
    run_train(*options, "--resume", "--backbone", "moved", "--data", "./data.jsonl")
    assert len(log_of("run")) == 2
    shutil.rmtree("moved")
    shutil.copytree("other", "moved")
    with pytest.raises(ValueError, match="run was trained on another backbone"):
        metastate.load("run", "cpu")


def test_an_estimate_for_a_hub_name_fetches_no_weights_and_counts_every_unrolled_step(
        tmp_path, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: tmp_path)
    calls = spied(monkeypatch, huggingface_hub, "snapshot_download")
    (tmp_path / "config.json").write_text(json.dumps(REAL["llada"]))
    cfg = train.TrainConfig(method="metastate", backbone="GSAI-ML/LLaDA-8B-Base")
    two, four, eight = (train.plan(cfg, {}, dict(unroll=K)).sizes for K in (2, 4, 8))
    assert calls and not any("*.safetensors" in patterns for (_, patterns), _ in calls)
    for part in ("activations", "logits"):
        assert eight[part] == 2 * four[part] == 4 * two[part]


def test_a_real_backbone_trains_with_the_papers_recipe_on_no_held_out_row_and_ever_new_noise(
        on_data, monkeypatch):
    calls = spied(monkeypatch, train.Run, "batch")
    run_train("--method", "memdlm", *on_data, "--epochs", 1, "--device", "cpu", "--n_eval", 0)
    state = train.read_state("runs/memdlm/resume.pt")
    wanted = dict(loss_weight="1/t", warmup=0.1, lora=32, lora_dropout=0.05, beta2=0.999,
                  weight_decay=0.0, lr=2e-5, batch_size=2, full_share=0.0, rank=32, alpha=64.0,
                  inner_lr=0.1, clip=1.0, inner_on="response")
    assert {k: state["settings"][k] for k in wanted} == wanted
    # one of 40 examples in ten is held out; two rows a step
    [(run, _), (first, _)], [_, (second, _)], *_ = calls
    assert (len(run.held_examples), len(run.examples), state["step"]) == (4, 36, 18)
    assert not any(row in run.examples for row in run.held_examples)
    assert not torch.equal(first.t, second.t)
    groups = state["optimizer"]["param_groups"]
    assert {(g["betas"], g["weight_decay"]) for g in groups} == {((0.9, 0.999), 0.0)}
    adapter = json.loads(Path("runs/memdlm/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (32, 64)


def test_defaults_depend_on_the_backbone_and_on_the_data():
    for stage, family, closed, options, expected in (
            ("published", "llada", False, dict(data="x"), dict(epochs=5, steps=None, max_len=4096)),
            ("published", "llada", False, {}, dict(steps=1000)),
            ("pretrain", "tiny", False, dict(method="mdlm"),
             dict(loss_weight="uniform", warmup=0.03, beta2=0.98, weight_decay=0.01)),
            ("closed_book", "tiny", True, {}, {})):
        cfg = train.TrainConfig(**options)
        assert train.fill_in(cfg, family, closed) == stage
        assert expected.items() <= vars(cfg).items(), stage


def test_dropout_is_on_in_training_and_off_in_the_held_out_loss(quick, monkeypatch):
    calls = spied(monkeypatch, F, "dropout")
    run_train(*DROPOUT, "--steps", 2)
    on = [key for key, _ in itertools.groupby(training for (_, _, training), _ in calls)]
    assert on == [True, False, True, False]


def test_every_process_sets_its_own_gpu_before_anything_else_touches_cuda(monkeypatch):
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(train.dist, "init_process_group", lambda kind, timeout: calls.append(kind))
    asked = [train.TrainConfig(device=device) for device in (None, "cpu")]
    for cfg in asked:
        train.join_ranks(cfg)
    assert [cfg.device for cfg in asked] == ["cuda:1", "cpu"] and calls == [1, "nccl", "gloo"]


def test_a_run_on_the_cpu_shards_over_a_cpu_mesh_also_where_there_is_a_gpu(monkeypatch):
    from torch.distributed import device_mesh, fsdp
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(device_mesh, "init_device_mesh", lambda *mesh: mesh)
    monkeypatch.setattr(fsdp, "fully_shard", lambda layer, mesh, **_: mesh)
    calls = spied(monkeypatch, fsdp, "fully_shard")
    train.shard(random_backbone())
    assert [mesh for _, mesh in calls] == [("cpu", (2,))] * 3


BOOK = [dict(context="river = 47 . stone = 12 .", prompt="? river =", response="47"),
        dict(context="river = 33 .", prompt="? river =", response="33")]


def test_a_context_is_hidden_in_the_closed_book_which_needs_one_and_in_the_prompt_elsewhere(here):
    write_lines("open.jsonl", [BOOK[0], json.loads(GOOD_LINE)])
    with pytest.raises(ValueError, match='open.jsonl, line 2: .*needs a "context"'):
        run_train(*CLOSED_BOOK, "--data", "open.jsonl")
    assert not Path("runs").exists()
    whole = read_jsonl(write_lines("book.jsonl", BOOK))[0]
    hidden = train.read_jsonl("book.jsonl", niah.tiny_tokenizer(), BackboneConfig(), 64, True)[0]
    assert whole.text == [] and len(hidden.prompt) == 3
    assert (hidden.text + hidden.prompt, hidden.response) == (whole.prompt, whole.response)
    batch = train.collate([hidden, whole], BackboneConfig(), 6, torch.Generator())
    assert batch.text.sum(1).tolist() == [8, 0] and torch.equal(batch.x0[0], batch.x0[1])


def test_the_closed_books_loss_is_a_sum_over_rows_however_long_the_questions_of_the_others(tiny):
    rows = [train.Example(list(range(20, 29)), [5, 6], [9, 2]),
            train.Example(list(range(40, 46)), [7] * 7, [8, 2])]

    def loss(rows):
        b = train.collate(rows, BackboneConfig(), 2, torch.Generator())
        one = torch.ones(len(rows))
        return memdlm.loss_closed_book(tiny[0], b.x0, b.text, b.given, b.attend & ~b.text, one, b.u,
                                       one, 4, dataclasses.replace(CLOSED, questions=1))
    torch.testing.assert_close(loss(rows), loss(rows[:1]) + loss(rows[1:]))


def test_each_row_of_a_closed_book_file_is_answered_from_its_own_text(quick, monkeypatch):
    """Rows that share one phi must ask about one text; the rows of a file are shuffled."""
    write_lines("book.jsonl", BOOK * 10)
    written = spied(monkeypatch, memdlm, "write_text")
    options = [*CLOSED_BOOK, "--data", "book.jsonl", "--full_share", 0, "--steps", 2]
    for plain_share in (0, 1):
        run_train(*options, "--plain_share", plain_share, "--out", f"plain-{plain_share}")
        assert [len(ids) for (_, ids, *_), _ in written] == [8, 8]
        assert len(log_of(f"plain-{plain_share}")) == 2
    with pytest.raises(ValueError, match="--questions"):
        run_train(*options, "--questions", 4, "--out", "shared")


def test_the_closed_book_gives_a_model_that_reads_a_convolution_where_its_fast_weights_are(quick):
    for run, argv, residual, ffn in (
            ("reader", MDLM, False, 0), ("noise", CLOSED_BOOK, True, 0),
            ("one", [*CLOSED_BOOK, "--init", "reader"], False, 1),
            ("two", [*CLOSED_BOOK, "--init", "one", "--fraction", 1], False, 1),
            ("lora", [*CLOSED_BOOK, "--init", "reader", "--lora", 2], False, 0)):
        run_train(*argv, "--steps", 1, "--out", run)
        model = load_backbone(run, "cpu")
        found = [model.cfg.conv_residual, *(layer.ffn_conv is not None for layer in model.layers)]
        assert found == [residual, False, False, ffn], run


ON_PRETRAINED = "--init runs/pretrained-seed{s}"
ON_256 = "--init runs/pretrained-256-seed{s}"
UP_TO_256 = "--length 256 --lr 3e-3 --batch_size 48 --full_share 0 --steps 2000"
PLAIN = f"--method mdlm {ON_PRETRAINED}"
UNROLLED = f"--method metastate {ON_PRETRAINED}"
# without slots: about as many seconds as MetaState's updates take, on the same tasks
SAME_COST = (f"{PLAIN} --steps 8000 --batch_size 32 --full_share 0 --tasks "
             + " ".join(train.DEFAULTS["metastate"]["tasks"]))
# of MetaState on longer texts: tokens of the longest, over which the slots are spread; slots
PLACES = (64, 32), (128, 32), (128, 64), (256, 32), (256, 64), (256, 128)
# four answers of five are a coin's toss
ON_RESOLVE = "--tasks resolve --full_share 0 --lr 1e-3"
# name of a run -> arguments of train.py; {s}: the training seed; the folder: runs/NAME-seed{s}
RUNS = {
    "pretrained": "--method mdlm",
    "metastate": UNROLLED,
    **{name: f"{UNROLLED} --memory {name}" for name in ("reset", "detached", "logits", "feedback")},
    "no-curriculum": f"{UNROLLED} --curriculum 0",
    **{f"slots-{n}": f"{UNROLLED} --num_slots {n}" for n in (2, 4, 8, 16)},
    **{f"unroll-{n}": f"{UNROLLED} --unroll {n}" for n in (1, 2, 4, 8)},
    **{f"lambda-{n}": f"{UNROLLED} --balance {n}" for n in (0, 1)},
    **{f"places-{length}-slots-{n}": f"--method metastate {ON_256} --length {length} "
                                     f"--span {length} --num_slots {n}" for length, n in PLACES},
    "lora": f"{SAME_COST} --lora 30 --lr 3e-3",
    **{f"lora-{lr}": f"{SAME_COST} --lora 30 --lr {lr}" for lr in ("1e-3", "3e-4")},
    "all-weights": f"{SAME_COST} --lr 1e-3",
    "closed": "--method memdlm",
    "pretrained-256": f"{PLAIN} {UP_TO_256}",
    # without the clip the inner loop of one seed blew up when texts reached 256 tokens
    "reads": (f"--method memdlm {ON_256} --plain_share 0.3 --exact_from 0.5 --surprise 16 "
              "--clip 10 --steps 2400"),
    "reads-mdlm": f"--method mdlm {ON_256} --tasks facts {UP_TO_256}",
    "first-order": "--method memdlm --exact_from 1",
    "first-order-long": "--method memdlm --exact_from 1 --steps 3000",  # as long as "closed" takes
    **{f"rank-{n}": f"--method memdlm --rank {n} --alpha {2 * n}" for n in (4, 16, 64)},
    "layers-2": "--method memdlm --fraction 0.5",
    "open-long": f"{PLAIN} --tasks facts --length 1024 --lr 1e-3 --full_share 0 --steps 800",
    "published": f"--method memdlm --inner_on response {ON_PRETRAINED}",
    "published-mdlm": f"{PLAIN} --steps 400",
    "trap": f"--method memdlm --inner_on response --inner_lr 1 {ON_PRETRAINED} {ON_RESOLVE}",
    "trap-mdlm": f"{PLAIN} {ON_RESOLVE}"}


def ensure(name, seed):
    """The folder of a run, trained first if it is not there."""
    folder = Path(f"runs/{name}-seed{seed}")
    for needed in re.findall(r"--init runs/(\S+)-seed", RUNS[name]):
        ensure(needed, seed)
    part = Path(f"{folder}-unfinished")     # a run that was stopped goes on, and is not read
    if not folder.exists():
        run_script("train.py", *RUNS[name].format(s=seed).split(), "--seed", seed, "--n_eval", 0,
                   *["--resume"] * part.exists(), "--out", part)
        part.rename(folder)
    return folder


def run_script(name, *arguments):
    command = [sys.executable, HERE / name, *arguments]
    print("$ python", *command[1:], flush=True)
    subprocess.run([str(x) for x in command], check=True)


def log_rows(run, seed):
    return log_of(ensure(run, seed))


def losses(runs, seeds):
    """The training loss of the last 50 steps, and the last held-out loss, memory off. Both per
    masked token: the log divides the training loss by all tokens, of which half are masked."""
    lines = [f"{'run':<16}{'training loss':>16}{'held-out loss':>16}"]
    for run, seed in itertools.product(runs, seeds):
        rows = log_rows(run, seed)
        last = np.mean([2 * row["loss"] for row in rows[-50:]])
        lines.append(f"{f'{run}-seed{seed}':<16}{last:>16.3f}{rows[-1]['held_out_off']:>16.3f}")
    return "\n".join(lines)


# 7. What is shown: traces, pages, files and the README --------------------------------------------

def data_of(page):
    return json.loads(re.search(r'json">(.*)</script>', page)[1])


def viewer_after(memory, prompts, tokenizer=None, watch=False, **settings):
    model = random_backbone()
    viewer = sample.Viewer("arm", memory, model, tokenizer or niah.tiny_tokenizer(), watch, True)
    viewer.decode([*map(torch.tensor, prompts)], sample.Decoding(**settings).filled(model.cfg))
    return viewer


def test_tokens_send_no_control_characters_and_no_markup_and_a_page_needs_no_network(capsys):
    text = "\x1b[2J\x9b2J\x07\rx</script><b>&amp;"
    hostile = argparse.Namespace(decode=lambda ids, **_: text * len(ids))
    viewer = viewer_after(sample.no_memory, [[5, 6]], hostile, watch=True, gen_length=3)
    said = capsys.readouterr().out
    assert "x" in said and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", said)
    page = sample.page("</script><img src=x>", [viewer])
    assert page.count("<") == sample.PAGE.count("<")
    assert data_of(page)["title"] == "</script><img src=x>"
    assert data_of(page)["rows"][0]["panels"][0]["words"] == ["[2J2Jx</script><b>&amp;"] * 2
    assert not re.search(r"https?://|//\w|@import|url\(|<link|src=", sample.PAGE)


@pytest.mark.parametrize("settings", [
    dict(), dict(cfg_scale=1.5), dict(temperature=0.8), dict(block_length=3), dict(threshold=0.1)])
def test_a_page_holds_all_tokens_of_all_steps_and_the_models_probability_of_what_it_committed(
        settings):
    viewer = viewer_after(sample.no_memory, [[5, 6, 7], [8]], gen_length=6, **settings)
    rows = data_of(sample.page("plain", [viewer]))["rows"]
    assert len(rows) == 2
    for row, shown in enumerate(rows):
        frames = shown["arms"][0]["frames"]
        assert [f["words"] for f in frames] == [viewer.words(f.tokens[row]) for f in viewer.frames]
        masks = [f["kind"].count(0) for f in frames]
        assert masks == sorted(range(7), reverse=True) or "threshold" in settings
        assert shown["panels"][0]["words"] == viewer.words(viewer.prompt[row, 2 * row:])
    for before, after in zip(viewer.frames, viewer.frames[1:]):
        canvas = before.tokens.masked_fill(before.kind == 0, viewer.backbone.cfg.mask_id)
        attend = torch.cat([viewer.attend, torch.ones_like(canvas)], 1)
        logits = viewer.backbone(torch.cat([viewer.prompt, canvas], 1), attend)[:, 3:]
        p = logits.softmax(-1).gather(-1, after.tokens[..., None])[..., 0]
        now = after.kind == 2
        assert now.any()
        torch.testing.assert_close(after.sure[now], p[now])


def test_a_page_says_how_much_phi_raises_each_log_probability_and_what_the_mixer_reads(meta):
    memory = memdlm.prompt_memory(MEM)
    viewer = viewer_after(memory, [[5, 6, 7], [8, 9]], gen_length=3)
    gains = data_of(sample.page("phi", [viewer]))["rows"][1]["panels"][0]["values"][0]
    model, mask = viewer.backbone, viewer.backbone.cfg.mask_id
    _, phi = memory(model, torch.tensor([[8, 9]]), None, 2)
    for i, canvas in enumerate([[mask, 9], [8, mask]]):
        off, on = (model(torch.tensor([canvas]), phi=p)[0, i].log_softmax(-1) for p in (None, phi))
        assert gains[i] == pytest.approx((on - off)[8 + i].item(), abs=1e-4)
    viewer = viewer_after(meta.memory(), [[5, 6, 7]], gen_length=3)
    values = data_of(sample.page("slots", [viewer]))["rows"][0]["panels"][0]["values"]
    assert values[0] is None and len(values) == 4
    assert all(len(step) == 3 and 0 < sum(step) < 1 for step in values[1:])


FILES = {"backbone.py": 2, "sample.py": 0, "metastate.py": 2, "memdlm.py": 5, "niah.py": 0,
         "train.py": 0, "test_all.py": 0}                   # equations in its header, at least


def write_word_tokenizer(folder, words):
    """A tokenizer that knows these words, split at white space."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(niah, "vocabulary", lambda: {word: i for i, word in enumerate(words)})
        niah.tiny_tokenizer().save_pretrained(folder)


def test_every_command_of_the_readme_runs_and_the_page_holds_both_arms_and_the_hidden_text(
        here, monkeypatch):
    """Every indented `python ...` or `torchrun ...` line, at sizes that take a second."""
    for file, n in (("train", 12), ("longalpaca", 12), ("gsm8k", 2)):
        write_data(f"{file}.jsonl", n)
    write_lines("4096/data/vt/validation.jsonl", RULER)
    # real backbones in miniature, and an introduction in words that they know
    monkeypatch.setattr(niah, "INTRO", "the road is long .\n")
    for name, family in (("Org/LLaDA-8B-Instruct", "llada"), ("Org/Dream-v0-Instruct-7B", "dream"),
                         ("Org/LLaDA-MoE-7B-A1B-Base", "llada_moe")):
        small_folder(Path(name), family, max_position_embeddings=512, max_sequence_length=512)
    short = {"test_all.py": (by_hand, "--n 2 --passes 2"),
             "niah.py": (niah.main, "--n 2 --device cpu"),
             "sample.py": (sample.main, "--gen_length 6 --device cpu"),
             "train.py": (train.main, "--steps 1 --n_eval 1 --batch_size 4 --accumulate 1 "
                          "--length 16 --max_len 500 --unroll 2 --slot_dim 32 --slot_heads 4 "
                          "--cond_dim 32 --device cpu")}
    text = re.sub(r"(GSAI-ML|Dream-org|inclusionAI)/", "Org/", (HERE / "README.md").read_text())
    lines = re.findall(r"^    (?:.*&& )?(?:python|torchrun \S+) (\w+\.py .*)$", text, flags=re.M)
    assert len(lines) >= 9
    for script, *argv in (shlex.split(line, comments=True) for line in lines):
        if script == "train.py":                # which never writes over an earlier run
            shutil.rmtree(f"runs/{argv[argv.index('--method') + 1]}", ignore_errors=True)
        main, more = short[script]
        sys.argv = [script, *argv, *more.split()]
        main()
    if not (HERE / "stored.pt").exists():       # in a student's copy the README shows no page
        row = data_of(Path("page.html").read_text())["rows"][0]
        assert [arm["name"] for arm in row["arms"]] == ["none", "written"]
        hidden, question = (" ".join(panel["words"]) for panel in row["panels"])
        assert question.startswith("?") and f'"{hidden} {question}"' in text


@pytest.mark.parametrize("file, equations", FILES.items())
def test_a_file_imports_five_packages_has_100_columns_and_an_equation_where_its_header_says(
        file, equations):
    """There as a number or a formula; an equation that is only named must have a function."""
    text = (HERE / file).read_text()
    assert [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 100] == []
    nodes = list(ast.walk(ast.parse(text)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    others = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    # the five, and what transformers brings
    assert others - {Path(own).stem for own in FILES} <= {
        "torch", "transformers", "numpy", "tqdm", "pytest",
        "safetensors", "huggingface_hub", "tokenizers"}
    if file != "test_all.py":                   # no code of a checkpoint is run
        assert not re.search(r"trust_remote_code\s*=", text)
        assert text.count("torch.load(") == text.count("weights_only=True")
    # "Eq. 6 -> inner_step; the unrolled loss -> loss_unrolled"
    header = re.search(r"^Equations:(.*?)(?=^\w[\w ]*:)", text, flags=re.M | re.S)
    found = re.findall(r"([^;\s][^;]*?)\s*->\s*(\w+)", header[1] if header else "")
    assert len(found) >= equations
    functions = {node.name: node for node in reversed(nodes) if isinstance(node, ast.FunctionDef)}
    for equation, function in found:
        source = ast.get_source_segment(text, functions[function])
        if re.search(r"\d|=|\(", equation):
            assert re.search(rf"{re.escape(equation)}(?!\d)", source), equation


# 8. Refusals: what was wrong, where, what to do; and nothing is lost ------------------------------

def why(call, *inputs, **options):
    """The message with which a call refuses what it is given."""
    with pytest.raises((ValueError, OSError)) as caught:
        call(*inputs, **options)
    return str(caught.value)


def says(message, words):
    """Does a message hold each of these words, and not only as a part of another?"""
    return all(re.search(rf"(?<!\w){re.escape(w)}(?!\w)", message) for w in words.split())


OURS = '{"architectures": ["Backbone"], "backbone": %s}'
# Family, changed entries of its config.json (a text: the whole file), words of the message.
BAD_CONFIGS = [
    ("llada", dict(n_layers=1), "unexpected model.transformer.blocks.1"),
    ("llada", dict(n_layers=3), "missing model.transformer.blocks.2"),
    ("llada", dict(mlp_hidden_size=95), "shape [96, 64] [95, 64]"),
    ("llada", dict(mlp_ratio="4", mlp_hidden_size=None), "llada entry mlp_hidden_size"),
    ("llada", dict(rms_norm_eps=math.nan), "rms_norm_eps finite nan"),
    ("llada", dict(n_kv_heads=3), "n_heads=4 n_kv_heads=3"),
    ("llada", dict(mask_token_id=None), "mask_id=126336 vocabulary 80"),
    ("llada", dict(eos_token_id=[61, 80]), "extra_stop_ids=80 vocabulary 80"),
    ("llada", dict(eos_token_id=[61, "62"]), "eos_token_id int '62'"),
    ("llada", dict(eos_token_id=[]), "eos_token_id int []"),
    ("llada", dict(quantization_config={"bits": 4}), "quantization_config {'bits': 4} supported"),
    ("llada", dict(rope=None), "rope None supported"),
    ("llada", dict(rope_scaling={"factor": 2}), "rope_scaling {'factor': 2} supported"),
    ("llada", dict(rope_parameters={"rope_theta": 1e4}), "rope_parameters rope_theta 10000.0"),
    ("llada", dict(rope_parameters="linear"), "rope_parameters 'linear' supported"),
    ("llada", dict(rope_theta=None), "rope_theta float None"),
    ("dream", dict(head_dim=15), "head_dim=15 RoPE"),
    ("llada_moe", dict(num_experts_per_tok=9), "experts_per_token=9 n_experts=8"),
    ("llada_moe", dict(moe_layer_freq=[1, 0]), "moe_layer_freq ones"),
    ("llada", dict(architectures=[["LLaDAModelLM"]]), "['LLaDAModelLM'] supported DreamModel"),
    ("llada", dict(architectures="LLaDAModelLM"), "architectures list 'LLaDAModelLM'"),
    ("llada", dict(architectures=[]), "architectures list []"),
    ("llada", "[]", "object list"),
    ("llada", "[" * 100_000, "valid JSON"),
    ("llada", '{"architectures": ["Backbone"]}', "backbone: object NoneType"),
    ("llada", OURS % '{"n_layer": 3}', "backbone: n_layer unknown"),
    ("llada", OURS % '{"conv_width": 4}', "conv_width=4 even"),
    ("llada", OURS % '{"ffn_convs": 4}', "ffn_convs=4 layers"),
    ("llada", OURS % '{"extra_stop_ids": 3}', "extra_stop_ids list 3")]


@pytest.mark.parametrize("family, change, words", BAD_CONFIGS, ids=lambda x: str(x)[:60])
def test_a_bad_config_json_is_refused_with_folder_and_entry(tmp_path, family, change, words):
    write_checkpoint(tmp_path, family)
    if isinstance(change, dict):
        change = json.dumps({**CONFIGS[family], **change})
    (tmp_path / "config.json").write_text(change)
    assert says(why(load_backbone, tmp_path, "cpu"), f"{tmp_path} config {words}")


def test_weights_and_files_that_are_unusable_missing_or_of_another_checkpoint_are_named(tmp_path):
    tensors = write_checkpoint(tmp_path / "a", "llada", torch.bfloat16, embedding_size=16_000)
    index, single = (tmp_path / f"a/model.safetensors{end}" for end in (".index.json", ""))
    for files, words in ((["a"], "['a']"), ({"x": 3}, "3"), ({"x": "../x.bin"}, "'../x.bin'")):
        index.write_text(json.dumps({"weight_map": files}))
        assert says(why(load_backbone, tmp_path / "a", "cpu"), f"{index} weight_map {words}")
    # what save_pretrained leaves behind in a sharded folder
    index.write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}))
    single.touch()
    assert says(why(load_backbone, tmp_path / "a", "cpu"), f"{index} model.safetensors two")
    index.unlink()
    key = "model.transformer.wte.weight"
    for value, dtype, words in (
            (math.nan, torch.bfloat16, "NaN"), (math.inf, torch.bfloat16, "infinity"),
            (-math.inf, torch.bfloat16, "infinity"), (0, torch.float8_e4m3fn, "F8_E4M3"),
            (0, torch.float32, "F32 BF16 mixed")):
        bad = tensors[key].clone()
        bad[-1, -2] = value
        save_file({**tensors, key: bad.to(dtype)}, single)
        assert says(why(load_backbone, tmp_path / "a", "cpu"), f"{key} {words}")
    assert load_backbone(tmp_path / "a", "cpu", torch.float32).dtype == torch.float32
    (tmp_path / "a/config.json").unlink()
    assert says(why(load_backbone, tmp_path / "a", "cpu"), f"{tmp_path}/a/config.json missing")
    bb.save_backbone(random_backbone(vocab_size=139), tmp_path / "c", niah.tiny_tokenizer())
    file = tmp_path / "c/tokenizer.json"
    file.write_text(file.read_text().replace('"river"', '"lake"'))
    assert says(why(load_tokenizer, tmp_path / "c"), f"{tmp_path}/c tokenizer another vocabulary")
    (tmp_path / "c/memory.json").write_text('{"inner_lr": NaN}')
    assert says(why(sample.inner_loop_settings, tmp_path / "c"), "c/memory.json: inner_lr nan")
    for name, base in (("d", "d"), ("e", "f"), ("f", "e")):
        bb.save_adapter(random_backbone().add_lora(4, 8), tmp_path / name, tmp_path / base)
    for name, load in itertools.product("def", (load_backbone, load_tokenizer)):
        assert says(why(load, tmp_path / name), f"{tmp_path}/{name} adapter too")


# All entries of PEFT 0.21.2's LoraConfig. Refused: a value other than the default, for the
# arithmetic is another then. Harmless: where an adapter sits is told by its tensors; configs of
# initial values act through init_lora_weights alone; ensure_weight_tying needs tied weights.
PEFT_REFUSED = """peft_type revision fan_in_fan_out bias use_rslora use_dora modules_to_save
    init_lora_weights rank_pattern alpha_pattern trainable_token_indices velora_config use_qalora
    alora_invocation_tokens monteclora_config layer_replication target_parameters use_bdlora
    lora_bias arrow_config kasa_config""".split()

PEFT_HARMLESS = """task_type auto_mapping peft_version inference_mode target_modules exclude_modules
    layers_to_transform layers_pattern megatron_config megatron_core loftq_config eva_config
    corda_config lora_ga_config qalora_group_size runtime_config ensure_weight_tying""".split()


def test_every_entry_of_an_adapter_is_used_harmless_or_refused_by_name(tmp_path):
    model = random_backbone()
    bb.save_backbone(model, tmp_path / "base", None)
    bb.save_adapter(model.add_lora(4, 8), tmp_path / "adapter", tmp_path / "base")
    path = tmp_path / "adapter/adapter_config.json"
    config = {**json.loads(path.read_text()), **dict.fromkeys(PEFT_HARMLESS, "any")}
    path.write_text(json.dumps(config))
    load_backbone(tmp_path / "adapter", "cpu")
    for entry, value, words in [                # None: the entry is missing
            *((entry, "pissa", f"{entry} 'pissa' supported") for entry in PEFT_REFUSED),
            ("r", 8, "lora_A.weight shape [4, 32] [8, 32]"), ("r", 0, "r at least 1"),
            ("r", None, "r missing"), ("lora_dropout", "no", "lora_dropout float"),
            ("lora_alpha", -8, "lora_alpha -8"), ("lora_alpha", 9, "trained lora_alpha 8 9"),
            ("base_model_name_or_path", 3, "base_model_name_or_path str")]:
        bad = {k: v for k, v in {**config, entry: value}.items() if v is not None}
        path.write_text(json.dumps(bad))
        assert says(why(load_backbone, tmp_path / "adapter", "cpu"), f"{tmp_path}/adapter {words}")
    used = {f.name for f in dataclasses.fields(bb.AdapterConfig)}
    assert used == {"base_model_name_or_path", "r", "lora_alpha", "lora_dropout"}
    assert set(bb.ADAPTER_REQUIRED) == set(PEFT_REFUSED)


@pytest.mark.parametrize("template, line, words", [
    ("{{ messages[0].content }}{% if add_generation_prompt %}<think>{% endif %}", ASKED,
     "start prompt <think>"),
    ("{{ raise_exception('roles!') }}", ASKED, "template roles!"),
    (LLADA_TEMPLATE, CHAT_OF % '""', "response empty"),
    (LLADA_TEMPLATE, ASKED.replace("72", "<extra>"), "'<extra>' 262")])
def test_what_a_template_or_a_tokenizer_would_spoil_is_refused_with_file_and_line(
        llada_chat, here, template, line, words):
    tokenizer, cfg = llada_chat
    tokenizer.chat_template, cfg.vocab_size = template, len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    Path("a.jsonl").write_text(line)
    assert says(why(train.read_jsonl, "a.jsonl", tokenizer, cfg, 200), f"a.jsonl line 1: {words}")


def test_an_interrupted_write_leaves_the_old_files_and_a_whole_one_is_flushed(
        tmp_path, monkeypatch):
    import fcntl
    modes = []
    monkeypatch.setattr(os, "fsync", lambda f: modes.append(fcntl.fcntl(f, fcntl.F_GETFL)))
    tokenizer = niah.tiny_tokenizer()
    model = random_backbone(vocab_size=138)
    bb.save_backbone(model, tmp_path, tokenizer)
    assert {mode & os.O_ACCMODE for mode in modes} == {os.O_RDWR}   # Windows refuses any other
    before = contents(tmp_path)
    for error in (KeyboardInterrupt, SystemExit, MemoryError):
        def half(path):
            file = Path(path)
            (file / "tokenizer.json" if file.is_dir() else file).write_text("half")
            raise error
        monkeypatch.setattr(tokenizer, "save_pretrained", half)
        with pytest.raises(error):
            bb.save_backbone(model, tmp_path, tokenizer)
        with pytest.raises((KeyboardInterrupt, SystemExit, OSError)):
            bb.write_atomically(tmp_path / "config.json", half)
        assert contents(tmp_path) == before


def test_scripts_start_where_windows_lacks_modules_and_characters_and_errors_have_their_own_line():
    code = ("import sys\nsys.modules['resource'] = sys.modules['fcntl'] = None\n"
            "import backbone, niah, sample, train\nbar = backbone.tqdm(total=3)\ndef main():\n"
            "    print('42 \u2603')\n    bar.update()\n    raise ValueError('no')\n"
            "backbone.cli(main)")
    ended = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                           env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert (ended.returncode, ended.stdout) == (2, "42 ?\n"), ended.stderr
    assert ended.stderr.splitlines()[-1] == "error: no" and "\nerror: no" in ended.stderr


def test_decoding_stops_at_the_block_in_which_every_row_has_ended(model):
    eager = Eager()
    sample.generate(model, torch.randint(3, 40, (4, 5)), gen_length=6, steps=6, block_length=1,
                    memory=eager.memory)
    assert eager.calls == 1


def test_keywords_that_cannot_work_are_refused_as_flags_are_before_a_checkpoint_is_looked_for(
        model, capsys):
    for name, values in dict(temperature="-1 nan inf", cfg_scale="nan -0.5", threshold="nan -1",
                             top_p="-1 nan 1.5", top_k="0 -3", alg_temp="nan -1").items():
        for value in values.split():
            number = int(value) if name == "top_k" else float(value)
            message = why(sample.generate, model, [[5]], **{name: number})
            flags = ["--checkpoint", "none", "--prompt", "river", f"--{name}", value]
            assert main_of(sample, flags) == 2 and says(message, f"{name} must {value}")
            assert capsys.readouterr().err == f"error: --{message}\n"
    assert says(why(sample.generate, model, [[5]], remasking="best"), "remasking 'best' entropy")
    assert says(why(sample.generate, model, [[5], []]), "prompt at least one token")
    assert says(why(MetaStateConfig(inject_layers=()).check, 3), "inject_layers=() layers 0..2")
    MetaStateConfig(inject_layers=(2, 3), read_layer=1).check(3)


# Per script: a line to start from, flags, values that each spoil it, words (None: the flag).
TAKEN = ["--checkpoint", "taken"]
PROMPT = [*TAKEN, "--prompt", "river"]
RESUME = [*MDLM, "--resume"]

BAD_LINES = {
    train: [
        (MDLM, "--magic --method --tasks --dtype --inner_on --memory", "magic ''", None),
        (MDLM, "--init --backbone", "magic a-b", "no checkpoint folder"),
        (MDLM, "--data", "none.jsonl", "--data none.jsonl no such file"),
        (MDLM, "--device", "magic cuda:99 meta", "device used cpu"),
        (MDLM, "--out", "taken", "taken exists"),
        (RESUME, "--out", "taken", "taken/resume.pt another run"),
        ([*RESUME, "--init", "taken"], "--out", "taken taken/new base", "reads"),
        ([*RESUME, "--backbone", "taken"], "--out", "./taken/", "reads"),
        ([*SLOTS, "--resume"], "--out", "runs/pretrained-seed0", "reads"),
        ([*RESUME, "--data", "taken/resume.pt"], "--out", "taken", "--data taken/resume.pt --out"),
        (MDLM, "--batch_size", "1000000000", "more memory"),
        (MDLM, "--steps --epochs --batch_size --accumulate --save_every --max_len --questions "
               "--num_slots --slot_heads --slot_dim --cond_dim --unroll --span",
         "0 -3 x 1.5 nan zwölf 0x10 ''", None),
        (MDLM, "--epochs", "2", "--epochs --data"),
        (MDLM, "--dtype", "bfloat16", "--lora 0 --dtype float32"),
        (SLOTS, "--seed", "2", "runs/pretrained-seed2/resume.pt opened ([Errno"),
        (SLOTS, "--seed", "3", "runs/pretrained-seed3/resume.pt cannot be read corrupted"),
        (MDLM, "--lora --length --n_eval --seed --chunk --s_pre", "-1 x", None),
        (MDLM, "--seed", "99999999999999999999", None),
        (MDLM, "--lr --inner_lr --clip --alpha --weight_decay", "-1 nan inf 1e999 x", None),
        (MDLM, "--warmup --full_share --plain_share --prompt_ratio --fraction --lora_dropout "
               "--exact_from", "2 -0.1 nan x", None),
        (CLOSED_BOOK, "--batch_size", "6", None),
        ([*CLOSED_BOOK, "--inner_on", "prompt"], "--questions", "2 4", None),
        (SLOTS, "--slot_heads", "5", "slot_dim=64 multiple slot_heads=5"),
        (SLOTS, "--cond_dim", "15", "cond_dim=15 even"),
        (SLOTS, "--inject_layers", "4 -9 x", None),
        (SLOTS, "--read_layer", "3 -9 x", None),
        ([*SLOTS, "--inject_layers", "2"], "--read_layer", "0", "inject_layers=(2,) before first")],
    niah: [
        ([], "--n", "1", "--checkpoint needed"),
        ([], "--checkpoint", "magic _0", "no checkpoint folder"),
        (TAKEN, "--arms", "magic", "arms off, on, magic"),
        (TAKEN, "--data", "none.jsonl", "--data none.jsonl"),
        (TAKEN, "--out", "none/rows.jsonl .", "--out written"),
        (TAKEN, "--passes", "2", "--lengths 64"),
        ([*TAKEN, "--n", "1"], "--lengths", "0 -5 x 8190 9999999", None),
        # 1 + 8190 tokens would fit, but the shortest text has 7
        ([*TAKEN, "--n", "1", "--lengths", "1"], "--gen_length", "8190", "--lengths 1: 7 8192"),
        ([*TAKEN, "--closed_book"], "--facts", "0 25 x", None),
        (TAKEN, "--n --gen_length --steps", "0 -1 x", None)],
    sample: [
        ([], "--prompt", "river", "--checkpoint"),
        (TAKEN, "--seed", "1", "--prompt"),
        (["--prompt", "river"], "--checkpoint", "magic _0", "no checkpoint folder"),
        (TAKEN, "--prompt", "''", "prompt empty"),
        (PROMPT, "--gen_length --steps --block_length", "0 -1 x 7.5", None),
        (PROMPT, "--block_length", "4", "gen_length=6 multiple block_length=4"),
        ([*PROMPT, "--block_length", "3"], "--steps", "5", "steps=5 multiple 2"),
        ([*PROMPT, "--block_length", "3"], "--remasking", "entropy", "entropy one block"),
        (PROMPT, "--remasking --eos", "magic", None),
        (PROMPT, "--arm", "magic", "arms off, on, magic"),
        (PROMPT, "--top_p", "0.5", "top_p low_confidence"),
        (PROMPT, "--html", "no/page", "no/page"),
        ([*TAKEN, "--closed_book"], "--prompt",
         "river '? river =' 'river =' ' \n? river =' 'river = 47 .'", "no question text")]}


RULER = [{"input": "river = 47 . stone = 12 . river = 30 . ? river", "outputs": ["47", "30"],
          "length": 20, "answer_prefix": " =", "index": 7},
         {"input": "window = 11 . ? window =", "outputs": ["11"], "length": 19}]
BABILONG = [{"input": "mary moved kitchen .", "question": "? where mary", "target": "kitchen"}]
USER = {"role": "user", "content": "river"}
REPLY = {"role": "assistant", "content": "47"}

# Per script: its flags, a good line, words of the message and bad lines (bytes: a whole file).
BAD_DATA = {
    train: ([*SLOTS, "--seed", "1"], json.loads(GOOD_LINE), {
        "json, an array load_dataset('json' data_files='qa1.jsonl'": [b"\xef\xbb\xbf[\n{}]"],
        "json, gzip load_dataset('json' data_files='qa1.jsonl'": [b"\x1f\x8b\x08\0"],
        "parquet load_dataset('parquet' data_files='qa1.jsonl'": [b"PAR1\x15\x04"],
        "line 1: valid JSON": [b'{"prompt": "river', b'{"prompt": "river \xff", "response": "47"}',
                               b'{"a":' * 100_000],
        r"line 1: '\ud800' position 6": [rb'{"prompt": "river \ud800", "response": "47"}'],
        "line 1: limit": [b'{"prompt": ' + b"1" * 5000 + b"}"],
        "expected at least two last message assistant's dropped tool_calls weight": [
            ["river"], {"prompt": "river"}, {"context": 1, "prompt": "river", "response": "47"},
            {"messages": [USER]}, {"messages": [USER, USER]},
            {"messages": [USER, {**REPLY, "tool_calls": [{"name": "f"}]}]},
            {"messages": [USER, {**REPLY, "weight": 0}]}],
        "response empty": [{"prompt": "river", "response": " "}],
        "vocabulary: hello world": [{"prompt": "the hello sky world", "response": "47"}]}),
    niah: (TAKEN, RULER[0], {
        "expected RULER's": [[], {"input": "river", "outputs": "47"}, {"input": None},
                             {"input": "river", "outputs": [""]}],
        "expected BABILong's": [{"input": "river", "target": "kitchen"}],
        "'moon' no answer qa1": [{**BABILONG[0], "target": "moon"}]}),
    sample: ([*TAKEN, "--out", "rows.jsonl"], {"prompt": "river = 47 . ? river ="}, {
        'expected no "arm" "answer"': [[], {"messages": [{"role": "user"}]},
                                       {"prompt": "river", "answer": "47"}],
        "vocabulary: unheard-of": [{"prompt": "unheard-of"}],
        "9000 limit 8192": [{"prompt": "river " * 9000}]})}


def bad_inputs(script):
    """Bad command lines, the file qa1.jsonl that goes with each, and words of the message."""
    for start, flags, values, words in BAD_LINES[script]:
        for flag, value in itertools.product(flags.split(), shlex.split(values)):
            yield [*start, flag, value], b"", words or flag[2:]
    start, good, bad = BAD_DATA[script]
    for words, lines in bad.items():
        for line in lines:
            data, place = line, ""
            if not isinstance(line, bytes):
                data, place = f"{json.dumps(good)}\n{json.dumps(line)}".encode(), "line 2: "
            yield [*start, "--data", "qa1.jsonl"], data, f"qa1.jsonl {place}{words}"


@pytest.mark.parametrize("script", BAD_LINES)
def test_bad_flags_and_bad_data_end_with_one_message_and_exit_code_2_and_touch_no_file(
        here, monkeypatch, capsys, script):
    """Before anything is decoded, trained or written, the tiny backbone's pretraining, too."""
    model = load_backbone("tiny", "cpu")
    bb.save_backbone(model, "base", niah.tiny_tokenizer())
    bb.save_adapter(model.add_lora(2, 4), "taken", "base")
    torch.save({"settings": {"steps": 1}}, "taken/resume.pt")
    Path("taken/.lock").touch()
    Path("runs/pretrained-seed2/resume.pt").mkdir(parents=True)
    write_lines("runs/pretrained-seed3/resume.pt", [])
    for module, name in ((sample, "generate"), (niah, "generate"), (train.Run, "batch")):
        monkeypatch.setattr(module, name, None)

    def files():
        return {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    for argv, data, words in bad_inputs(script):
        Path("qa1.jsonl").write_bytes(data)
        before = files()
        code = main_of(script, argv)
        said = capsys.readouterr().err.strip()
        assert (code, files()) == (2, before) and "Traceback" not in said, (argv, data[:80], said)
        assert says(said.splitlines()[-1], f"error: {words}"), (argv, data[:80], said)


def test_a_line_of_data_with_a_random_edit_is_read_or_refused_with_file_and_number(here):
    rng = random.Random(0)
    junk = ["", '"', "{", "}", "null", "NaN", "[1]", ",", "\\", "é", '"response": 3, ', "\\u0000"]
    refused = 0
    for _ in range(200):
        at = rng.randrange(len(GOOD_LINE))
        edited = GOOD_LINE[:at] + rng.choice(junk) + GOOD_LINE[at + rng.randint(0, 9):]
        Path("edited.jsonl").write_text(f"{GOOD_LINE}\n{edited}\n{GOOD_LINE}")
        try:
            assert len(read_jsonl("edited.jsonl")) == 3
        except ValueError as e:
            assert str(e).startswith("edited.jsonl, line 2: ")
            refused += 1
    assert refused > 100


def test_a_line_beyond_max_len_is_left_out_counted_and_never_reaches_the_tokenizer(
        here, monkeypatch, capsys):
    long = json.dumps({"prompt": "river " * 10_000, "response": "47"})
    Path("long.jsonl").write_text("\n".join([GOOD_LINE, GOOD_LINE, long]))
    calls = spied(monkeypatch, train, "encode_pair")
    assert len(read_jsonl("long.jsonl")) == 2
    assert max(len(example["prompt"]) for (*_, example), _ in calls) < 100
    assert "left out 1 examples" in capsys.readouterr().out
    assert says(why(read_jsonl, "long.jsonl", max_len=3), "long.jsonl: 0 usable")


def test_a_full_disk_is_named_and_the_last_checkpoint_survives_and_can_be_resumed(here):
    import resource
    options = [*MDLM, "--save_every", "1", "--out", "run", "--steps", "3"]
    with killed_at(1):
        run_train(*options)
    before = contents("run", but=["log.jsonl"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        message = why(run_train, *options, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert says(message, "run/resume.pt could not be written")
    assert contents("run", but=["log.jsonl"]) == before
    run_train(*options, "--resume")
    assert train.read_state("run/resume.pt")["step"] == 3


@pytest.mark.parametrize("file, method", [
    ("model.safetensors", MDLM), ("metastate.safetensors", SLOTS), ("resume.pt", MDLM),
    ("adapter_model.safetensors", [*MDLM, "--lora", "2", "--dtype", "bfloat16"])])
def test_a_flipped_bit_or_a_missing_end_is_found_in_every_file_with_weights(here, file, method):
    options = [*method, "--out", "run", "--steps", 1]
    run_train(*options)
    rng = random.Random(0)
    path = Path("run") / file
    good = path.read_bytes()
    load = (run_train, *options, "--resume") if file == "resume.pt" else (sample.load_arms, "run")
    for i in range(10):
        bad = bytearray(good)
        # in the middle half, where the weights are
        bad[rng.randrange(len(good) // 4, len(good) * 3 // 4)] ^= 1 << rng.randrange(8)
        path.write_bytes(bad if i < 8 else good[:rng.randrange(len(good))])
        assert says(why(*load), f"run/{file} truncated corrupted")


def test_a_nan_loss_stops_with_step_and_seed_and_keeps_the_last_checkpoint(here):
    options = [*MDLM, "--steps", 20, "--lr", "1e30", "--out"]
    assert says(why(run_train, *options, "once", "--save_every", 1), "nan step seed 0 once intact")
    load_backbone("once", "cpu")
    assert says(why(run_train, *options, "never"), "no checkpoint written")


def test_a_second_run_in_a_folder_is_refused_and_a_killed_one_frees_it(here):
    import multiprocessing
    options = [*MDLM, "--steps", 1, "--out", "run"]
    with train.locked(Path("run")):
        other = multiprocessing.get_context("fork").Process(target=time.sleep, args=[60])
        other.start()                           # it has the lock, too, and keeps it
    for more in ([], ["--resume"]):
        assert says(why(run_train, *options, *more), "run in use by another")
    assert [f.name for f in Path("run").iterdir()] == [".lock"]
    other.kill()
    other.join()
    run_train(*options)
    assert len(log_of("run")) == 1


# 9. The benchmarks' own files, and estimates of memory --------------------------------------------

LIST = {"input": "list of words", "outputs": ["mary", "john"]}
HEDGE = {"input": "", "question": "before the kitchen?", "target": "hallway"}
GIFTS = {"input": "", "question": "what?", "target": "apple,milk"}


@pytest.mark.parametrize("file, line, scores", [             # {output: (recall, exact)}
    ("niah_single_1.jsonl", RULER[0], {"it is 47": (0.5, 0), "30 and 47": (1, 0), "47 30": (1, 1)}),
    ("vt/validation.jsonl", LIST, {"MARY": (0.5, 0)}),
    ("qa_1/validation.jsonl", LIST, {"MARY": (1, 0)}),
    ("qa1_4k.jsonl", BABILONG[0], {"In the Kitchen. Or the office.": (1, 1)}),
    ("qa1.jsonl", BABILONG[0], {"kitchen or office": (1, 0)}),
    ("qa1.jsonl", HEDGE, {"From the kitchen to the hallway": (1, 1),
                          "I do not know. The hallway": (1, 0)}),
    ("qa2/4k.jsonl", BABILONG[0], {"office": (0, 0)}),
    ("qa8.jsonl", GIFTS, {"milk and apple": (0, 1)})], ids=itertools.count())
def test_a_benchmarks_line_is_scored_by_its_own_rules(here, monkeypatch, file, line, scores):
    monkeypatch.setattr(niah, "encode_prompt", lambda *a: [3])
    _, [s], _ = niah.read_benchmark(write_lines(file, [line]), random_backbone(), None)
    assert {output: s.score(output) for output in scores} == scores


def test_benchmark_files_are_decoded_with_memory_off_and_on_and_what_is_too_long_is_counted(
        here, capsys):
    small_folder(here / "moe", "llada_moe", max_position_embeddings=52)
    ruler = write_lines("vt/validation.jsonl",
                        [RULER[0], {"input": "river " * 23, "outputs": ["47"]}, *RULER])
    files = [ruler, write_lines("qa1_4k.jsonl", BABILONG)]
    assert main_of(niah, ["--checkpoint", "moe", "--device", "cpu", "--data", *files]) == 0
    said = capsys.readouterr().out
    assert "left out 1 of 4 samples longer than the model's limit of 52 tokens, 30 of" in said
    # one batch for each file and arm; two inner steps to write each of the files' batches
    assert f"at most {2 * (30 + 16)} forward passes and 4 inner steps" in said
    rows = rows_in("moe/benchmark.jsonl")
    assert [(r["task"], r["arm"], r["length"], r["steps"]) for r in rows] == [
        *[("vt", "off", 20, 30)] * 3, *[("vt", "on", 20, 30)] * 3,
        ("qa1", "off", 7, 16), ("qa1", "on", 7, 16)]
    # what one arm says of the first line is what the model says after text and prefix
    first, last = rows[0], rows[-1]
    assert (first["prompt"], first["index"], first["refs"]) == (RULER[0]["input"], 7, ["47", "30"])
    backbone, tokenizer, _ = sample.load_arms("moe", "cpu")
    prompt = torch.tensor([tokenizer.encode(RULER[0]["input"] + " =")])
    ids = sample.generate(backbone, prompt, gen_length=30)[0]
    assert first["output"] == tokenizer.decode(sample.cut(ids, backbone.cfg))
    assert last["prompt"] == "mary moved kitchen .\n? where mary"


def test_a_card_of_80_gb_is_estimated_to_write_8192_tokens_into_llada_moe_and_train_metastate():
    parts = sample.estimate(bb.config_from_json(REAL["llada_moe"]), "adapt", 1, 8192, 0)
    assert parts["weights"] == 2 * 7_356_880_896 and parts["trained, gradient, Adam"] == 0
    # logits at 0.3 of the tokens; the fast weights of 2 layers, 64 experts, 3 matrices of rank 32
    assert parts["logits"] == 2457 * 157184 * 10
    assert parts["fast weights"] == 16 * 2 * 64 * 3 * 32 * (2048 + 1024)
    assert sum(parts.values()) < 30e9
    llada = bb.config_from_json(REAL["llada"])
    parts = train.estimate(llada, "metastate", 1, 1024, 0, meta_cfg=metastate.for_backbone(llada))
    assert parts["weights"] == 16_031_162_368
    assert sum(parts.values()) < 80e9


# 10. By hand: the learning run --------------------------------------------------------------------

slow = pytest.mark.skipif("SLOW" not in os.environ,
                          reason="minutes: SLOW=1 python -m pytest -q test_all.py -k learns")


@pytest.fixture(scope="module")
def learned_recall(tmp_path_factory):
    """The default MetaState run -> recall(arm, passes, hops) over an unchanged canvas."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("learned"))
        patch.setattr(sys, "argv", ["train.py"])
        run_train("--method", "metastate")
        model = sample.load_arms("runs/metastate", "cpu")
    rows = niah.evaluate(*model, ["resolve"], [64], 500, 2, passes=5)

    def recall(arm, passes, hops=range(5)):
        return np.mean([row["recall"] for row in rows if row["arm"] == arm
                        and row["steps"] == passes and row["hops"] in hops])
    return recall


@slow
def test_the_frozen_backbone_learns_nothing_from_more_passes(learned_recall):
    assert all(learned_recall("frozen", p) == learned_recall("frozen", 1) for p in range(2, 6))


@slow
def test_metastate_learns_to_follow_one_hop_more_with_every_pass_over_an_unchanged_canvas(
        learned_recall):
    assert learned_recall("metastate", 2, [1]) > learned_recall("frozen", 2, [1]) + 0.1
    assert learned_recall("metastate", 5) > learned_recall("reset", 5) + 0.2


# 11. By hand: how fast is it here? `python test_all.py --bench --family llada` --------------------

# MetaState first: its backbone is without adapters
STEPS = {"metastate": "MetaState", "mdlm": "MDLM + LoRA", "memdlm": "MemDLM + LoRA",
         "official": "MemDLM, official"}
LORA = 32
UNITS = """\
ms: the median of three after two warm-ups, or the second call if over 10 s; a training step has
AdamW and recomputes layers in its backward pass. Tokens/s: of the canvas. TFLOP/s: all matrix
products, as torch counts them (CPU: without attention's scores). Peak on a CPU: of the process."""


def build_on(device, cfg):
    """A bf16 backbone whose random weights are made where they stay: no file, no copy."""
    with torch.device("meta"):
        model = Backbone(cfg).to(torch.bfloat16)
    model.to_empty(device=device).requires_grad_(False)
    for p in model.parameters():
        p.normal_(1.0 if p.ndim == 1 else 0.0, 0.02)
    return model


def bench_passes(model, meta, b):
    """{name: one denoising pass, with the logits of the answer, or writing of the prompts}."""
    at, start = ~b.given, b.x0.shape[1] // 2
    xt = b.x0.masked_fill(at, model.cfg.mask_id)

    def write(rows=slice(None)):
        return memdlm.adapt_to_prompt(model, b.x0[rows, :start], b.attend[rows, :start],
                                      MemDLMConfig())
    ctx, phi = model.context(xt), write()
    passes = {"denoising pass, plain": lambda: model(xt, None, at),
              "denoising pass, with phi": lambda: model(xt, None, at, phi),
              "denoising pass, with slots": lambda: meta.step(model, ctx, xt, b.t, None, at, start),
              "writing the prompts": write}
    if model.cfg.family == "tiny":      # as the official loops have it
        passes["  writing them one by one"] = lambda: [write([row]) for row in range(len(xt))]
        passes["  pass, logits everywhere"] = lambda: model(xt)[at]
    return passes


def bench_loss(method, model, meta, b):
    """A method's training loss of the batch."""
    (B, L), inner, n_answer, phi = b.x0.shape, MemDLMConfig(), int((~b.given).sum()), None
    if method == "metastate":
        K = meta.settings.unroll
        reveals = torch.full((B, K), L // 2 // K, device=model.device)
        return metastate.loss_unrolled(meta, model, b.x0, b.given, b.attend, b.u, reveals, B)
    if method == "memdlm":
        return memdlm.loss_memdlm(model, b.x0, b.given, b.attend, b.t, b.u, b.t, n_answer, inner)
    xt, masked = corrupt(b.x0, b.t, b.given, model.cfg.mask_id, b.u)
    # official: a whole pass for each of the two inner steps, and one for the outer loss
    for _ in range(2 * (method == "official")):
        phi, ctx = phi or memdlm.init_phi(model, range(B), inner), model.context(b.x0)
        with torch.no_grad():
            h = model.run(model.embed(xt), ctx, 0, memdlm.first_fast_layer(model, inner))
        phi = memdlm.inner_step(model, phi, h, ctx, b.x0, masked, b.t, inner)
    return masked_loss(model(xt, b.attend, masked, phi), b.x0, masked, b.t, n_answer)


class Flops(TorchDispatchMode):
    """Counts the FLOPs of what runs inside, by torch's own formulas."""
    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function._overloadpacket in flop_registry:
            self.total += flop_registry[function._overloadpacket](*args, **kwargs, out_val=out)
        return out


def bench_row(name, function, device, tokens, estimate=0):
    try:
        with Flops() as flops:
            function()
        seconds, peak = measured(function, device)
    except torch.cuda.OutOfMemoryError:
        return print(f"{name:<28} out of memory, though it was estimated to fit", flush=True)
    gigabytes = "".join(f"{x / 1e9:>11.2f}" for x in (peak, estimate) if x)
    print(f"{name:<28}{1000 * seconds:>11.1f}{tokens / seconds:>11,.0f}"
          f"{flops.total / seconds / 1e12:>11.2f}{gigabytes}", flush=True)


def bench_from_disk(folder, family, device):
    """The same size as a checkpoint in six files: loaded, saved, trained, resumed, evaluated."""
    base, ids, models, logits = folder / "base", torch.arange(3, 67, device=device)[None], [], []
    if not (base / "config.json").exists():
        write_checkpoint(base, family, torch.bfloat16, 6, REAL[family])
        write_word_tokenizer(base, dict.fromkeys([*niah.vocabulary(), *niah.INTRO.split()]))
        write_data(folder / "data.jsonl", 4)
    run = shlex.split(f"--method memdlm --backbone '{base}' --data '{folder}/data.jsonl' --out "
                      f"'{folder}/run' --steps 2 --save_every 1 --batch_size 1 --max_len 64 "
                      f"--n_eval 0 --device {device}")
    evaluate = shlex.split(f"--checkpoint '{base}' --n 1 --tasks single --lengths 64 "
                           f"--gen_length 4 --device {device}")
    for name, function in {
            "load six files": lambda: models.append(load_backbone(base, device)),
            "a pass over 64 tokens": lambda: logits.append(models[0](ids, at=ids < 7)),
            "save": lambda: bb.save_backbone(models.pop(), folder / "saved"),
            "load what was saved": lambda: models.append(load_backbone(folder / "saved", device)),
            "the same pass": lambda: logits.append(models.pop()(ids, at=ids < 7)),
            "a MemDLM step, then killed": lambda: killed_at(1)(run_train)(*run),
            "resumed for one step": lambda: run_train(*run, "--resume"),
            "niah.py, memory off and on": lambda: main_of(niah, evaluate)}.items():
        began = time.perf_counter()
        function()
        print(f"{name:<28}{time.perf_counter() - began:>9.1f} s, peak memory "
              f"{sample.peak_memory() / 1e9:.1f} GB", flush=True)
    print("its logits are equal bit for bit:", torch.equal(*logits))


def bench(argv):
    """Prints one table, each row when it is known. What does not fit is not tried."""
    parser = argparse.ArgumentParser(prog="test_all.py --bench")
    parser.add_argument("--family", choices=["tiny", *REAL], default="tiny")
    parser.add_argument("--device", help="default: cuda, mps or cpu, whichever is there")
    parser.add_argument("--length", type=int, help="tokens of a row (default: 1024; tiny: 64)")
    parser.add_argument("--full-size", type=Path, metavar="DIR", help="then write that size to "
                        "DIR in six files (16 GB, twice) and load, save, resume and evaluate it")
    args = parser.parse_args(argv)
    tiny = args.family == "tiny"
    cfg = BackboneConfig() if tiny else bb.config_from_json(REAL[args.family])
    rows, length = 16 if tiny else 1, args.length or (64 if tiny else 1024)
    if not 64 <= length <= cfg.max_len:
        raise ValueError(f"--length must lie between 64 and {cfg.max_len}, not {length}")
    if args.full_size and tiny:
        raise ValueError("--full-size needs a --family that has one: llada, dream, llada_moe")
    device, meta_cfg = bb.default_device(args.device), metastate.for_backbone(cfg)
    memory = train.device_memory(device) - 1e9          # the framework itself takes about 1 GB
    name = torch.cuda.get_device_name(device) if "cuda" in str(device) else device
    print(f"{cfg.family} on {name}, {memory / 1e9:.1f} GB to use, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, {rows} x {length:,} tokens, half of them the answer",
          UNITS, sep="\n")
    estimates = {"official": 0}
    for method in [*STEPS][:-1]:
        parts = train.estimate(cfg, method, rows, length, LORA * (method != "metastate"),
                               scored=0.5, meta_cfg=meta_cfg)
        estimates[method] = sum(parts.values())
        verdict = "fits" if estimates[method] <= memory else "does not fit"
        print(f"{STEPS[method]} {verdict} (estimate: {train.show_estimate(parts)})", flush=True)
    if memory < parts["weights"]:
        return print("the weights alone are larger than that: nothing to measure")
    model, meta = build_on(device, cfg), metastate.build(cfg, meta_cfg).to(device)
    print(f"{size(model):,} parameters\n\n{'ms':>39}   tokens/s    TFLOP/s    peak-GB   estimate")
    x0 = torch.randint(3, max(cfg.mask_id, 100), (rows, length), device=device)     # (B, L)
    given = (torch.arange(length, device=device) < length // 2).repeat(rows, 1)
    # t = 1 masks the whole answer in every state: all methods compute equally many logits, the most
    t, u = torch.ones(rows, device=device), torch.rand(rows, length, device=device)
    batch = train.Batch(x0, given, torch.ones_like(given), t, u, torch.zeros_like(given))
    prompt = [rows * length // 2, sum(train.estimate(cfg, "adapt", rows, length // 2, 0).values())]
    for what, function in bench_passes(model, meta, batch).items():
        with torch.no_grad():
            bench_row(what, function, device, *(prompt if "writing" in what else [rows * length]))
    model.checkpointing = True
    for method in STEPS if tiny else [*STEPS][:-1]:
        if method == "mdlm":
            meta = None
            model.add_lora(LORA, 2 * LORA)
        if estimates[method] > memory:
            print(f"{STEPS[method]:<28} not tried, see above", flush=True)
            continue
        optimizer = torch.optim.AdamW(p for p in (meta or model).parameters() if p.requires_grad)

        def step():
            optimizer.zero_grad()
            bench_loss(method, model, meta, batch).backward()
            optimizer.step()
        bench_row(f"training, {STEPS[method]}", step, device, rows * length, estimates[method])
    if args.full_size:
        del model, function                             # a function holds a model
        bench_from_disk(args.full_size, args.family, device)


def test_the_bench_command_measures_passes_steps_and_the_official_loops(capsys, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "measured", lambda function, device: (0.1, 1e9))
    bench(["--device", "cpu"])
    rows = re.findall(r"^(.{28}) +[\d.]+ +[\d,]+ ", capsys.readouterr().out, re.M)
    assert [name.strip() for name in rows] == [
        *(f"denoising pass, {memory}" for memory in ("plain", "with phi", "with slots")),
        "writing the prompts", "writing them one by one", "pass, logits everywhere",
        *(f"training, {name}" for name in STEPS.values())]


def test_a_card_that_is_too_small_is_told_so_before_anything_is_built(capsys, monkeypatch):
    monkeypatch.setattr(train, "device_memory", lambda device: 8e9)
    monkeypatch.setattr(sys.modules[__name__], "build_on", None)
    bench(["--family", "dream", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "MemDLM + LoRA does not fit" in said and "the weights alone are larger" in said


# 12. By hand: one table over training seeds -------------------------------------------------------

def mean_and_interval(cell, draws=2000):
    """{(training seed, text): value} -> "mean ± half the 95 % interval over both levels", in %.

    A bootstrap (percentiles) that draws training seeds and, within each task, texts for all seeds.
    One seed: over texts alone; three say little about a fourth. Never narrower than Wilson's where
    all values are alike: a resampled mean cannot move then, although the next text might."""
    if not cell:
        return f"{'-':>15}"
    seeds, texts = sorted({seed for seed, _ in cell}, key=str), sorted({text for _, text in cell})
    values = np.array([[cell.get((seed, text), np.nan) for text in texts] for seed in seeds])
    mean = f"{100 * np.nanmean(values):>8.1f} ±"
    if len(texts) < 2:
        return f"{mean}{'-':>4} "
    rng = np.random.default_rng(0)
    # how often a seed (draws, S) and a text (draws, T) was drawn; texts are sorted by task
    _, sizes = np.unique([text[0] for text in texts], return_counts=True)
    seed_counts = rng.multinomial(len(seeds), [1 / len(seeds)] * len(seeds), draws)
    text_counts = np.concatenate([rng.multinomial(n, [1 / n] * n, draws) for n in sizes], axis=1)
    totals, numbers = (((seed_counts @ x) * text_counts).sum(1)
                       for x in (np.nan_to_num(values), ~np.isnan(values)))
    low, high = np.quantile(totals[numbers > 0] / numbers[numbers > 0], [0.025, 0.975])
    half = max((high - low) / 2, niah.interval([0.0] * len(texts))[1])
    return f"{mean}{100 * half:>4.1f} "


def table_over_seeds(files, by):
    """Recall in % by task, run (a folder's name without "-seedN") and arm (down) and length, steps
    or facts (across), from niah.py's JSONL files; rows of several tasks also count for "all"."""
    cells = {}                          # {(task, run and arm, column): {(seed, text): recall}}
    for file in map(Path, files):
        run, seed = re.fullmatch(r"(.*?)(?:-seed(\d+))?", file.parent.name).groups()
        for r in bb.read_lines(file, lambda row, size: row):
            if "facts" in r:            # a row of the closed book has no steps
                r.update(task="facts" if by == "facts" else f"{r['facts']} facts", steps=0)
            text = tuple(str(r[k]) for k in ("task", "seed", "length", "steps", "prompt"))
            for task in (text[0], "all"):
                cell = cells.setdefault((task, f"{run} {r['arm']}", r[by]), {})
                cell[seed, text] = r["recall"]
    tasks, names, columns = map(set, zip(*cells))
    order = [*niah.TASKS, *sorted(tasks - {*niah.TASKS, "all"})] + ["all"] * (len(tasks) > 2)
    columns = sorted(columns)
    across = "".join(f"{column:>14} " for column in columns)
    lines = [f"{'recall by ' + by:<18}{'run, arm':<30}{across}  seeds"]
    for task, name in itertools.product(order, sorted(names)):
        row = [cells.get((task, name, column), {}) for column in columns]
        if any(row):
            seeds = max(len({seed for seed, _ in cell}) for cell in row)
            lines.append(f"{task:<18}{name:<30}{''.join(map(mean_and_interval, row))}{seeds:>7}")
    return "\n".join(lines)


def saved_run(folder, values):
    """A JSONL file as niah.py writes it: one text for each value."""
    same = dict(task="single", arm="off", length=64, steps=6, seed=1)
    return write_lines(folder / "niah.jsonl", [dict(same, prompt=f"text {i}", recall=value)
                                               for i, value in enumerate(values)])


def test_a_tables_means_and_intervals_cover_texts_and_training_seeds_and_a_bad_line_is_named(
        tmp_path):
    """One seed of three loses 44 points: the others say that this is no property of the method."""
    runs = dict.fromkeys([f"{run}-seed{n}" for run in ("new", "old") for n in range(3)], [1] * 100)
    runs |= {"new-seed2": [0] * 44 + [1] * 56, "one-seed0": [1, 0, 1, 1, 0, 1, 1, 1], "plain": [1]}
    files = [saved_run(tmp_path / name, values) for name, values in runs.items()]
    lines = re.findall(r"single +(\w+) off +([\d.]+) ± *([\d.]+|-) +(\d+)$",
                       table_over_seeds(files, "length"), re.M)
    assert [(name, mean, seeds) for name, mean, _, seeds in lines] == [
        ("new", "85.3", "3"), ("old", "100.0", "3"), ("one", "75.0", "1"), ("plain", "100.0", "1")]
    wide, narrow, one = (float(line[2]) for line in lines[:3])
    # right on 100 texts is no proof for the next; one seed: over texts alone; one text: no interval
    assert wide > 15 and narrow == pytest.approx(1.8, abs=0.1) and lines[3][2] == "-"
    assert one == pytest.approx(100 * 1.96 * (0.1875 / 8) ** 0.5, abs=4)
    Path(files[1]).write_text(Path(files[6]).read_text() + "{")
    with pytest.raises(ValueError, match="new-seed1/niah.jsonl, line 9: not valid JSON"):
        table_over_seeds(files, "length")


# 13. By hand: what a memory holds. `python test_all.py --slots | --exposure CHECKPOINT` -----------

# Whose slots a text of resolve gets. The answer of a twin is the other value of the same text.
DONORS = {"question": "a twin: the same text, asked for the end of its other chain",
          "values": "a twin: the same text with its two values exchanged",
          "text": "another text of equally many hops"}


def resolve_text(hops, twin, *args):
    """A text of resolve with that many hops, or its twin (a key of DONORS)."""
    s = niah.chains("resolve", *args, hops=hops, shuffled=True, direct=True)
    if twin not in ("question", "values"):
        return s
    words, (lefts, rights) = s.prompt.split(), zip(*pairs_in(s.prompt))
    other, = (word for word in rights if word.isdigit() and word != s.answer)
    if twin == "question":
        words[-2], = {*lefts} - {*rights, words[-2]}
    else:
        words = [{s.answer: other, other: s.answer}.get(word, word) for word in words]
    return dataclasses.replace(s, prompt=" ".join(words), answer=other, refs=[other])


def disturbed(memory, after, exchange):
    """The memory with its state changed once, behind pass number `after` (0 = never): the two
    halves of a batch exchange their slots, or they are put back to what they were at first."""
    def changed_memory(backbone, xt, attend, start):
        predict, first = memory(backbone, xt, attend, start)
        numbers = itertools.count(1)

        def changed(xt, t, state, at):
            logits, state = predict(xt, t, state, at)
            if next(numbers) == after:
                state = (state[0].roll(len(xt) // 2, 0), *state[1:]) if exchange else first
            return logits, state
        return changed, first
    return changed_memory


@torch.no_grad()
def slot_rows(backbone, tokenizer, memory, n, seed, passes, out=None):
    """What do the slots cause? resolve with 1 to 4 hops; once, behind pass `after` (0: never), the
    state is changed, and the passes go on with the own prompt in view.

    exchange ...: another text, the donor, gives its slots. Twins tell what is carried: a walk up
    from the asked name follows a donor with another question and not one with other values; values
    that come down the chain the other way round. What follows an unrelated text holds its answer.
    reset: slots are put back to s_0. If nothing else is carried, h hops need after + h + 1 passes.

    Returns rows {table, hops, after, steps, recall, follows: own, donor or neither, ...} of the
    passes behind the change, also in the file `out`, without pairs of texts with one answer."""
    gen_length = niah.answer_budget(tokenizer)

    def texts(hops, twin, seed):
        task = functools.partial(resolve_text, hops, twin)
        return niah.encoded_samples(backbone, tokenizer, [task], 64, n, seed, gen_length)

    def work(job):
        kind, hops, after = job
        table = kind if kind == "reset" else f"exchange {kind}"
        own, donor = texts(hops, None, seed), texts(hops, kind, seed + (kind == "text"))
        changed = disturbed(memory, after, kind != "reset")
        for samples, prompts, donors, theirs in niah.batches(64, *own, *donor):
            steps = niah.repeat(backbone, changed, prompts + theirs, passes, gen_length)
            for number, (ids, _) in itertools.islice(enumerate(steps, 1), after, None):
                for s, d, row in zip(samples, donors, ids):
                    r = niah.scored(s, row, tokenizer, backbone.cfg, after=after, steps=number,
                                    table=table)
                    other = "donor" if niah.recall(d.refs, r["output"]) else "neither"
                    if kind == "reset" or s.answer != d.answer:
                        yield dict(r, follows="own" if r["recall"] else other)
    jobs = list(itertools.product((*DONORS, "reset"), range(1, 5), range(passes)))
    return sample.append_rows(jobs, work, out)


def slots_table(rows, passes):
    """% of donor's answer / own / neither, at the first pass behind the change that answers if
    undisturbed (h hops: pass h + 1) and shows what was carried, and at the last."""
    lines = [f"exchange {donor}: the slots of {what}" for donor, what in DONORS.items()]
    lines += ["reset: slots put back to s_0 once", "in %: donor's answer / own / neither"]
    for title in ("first answer", "last pass"):
        lines += [f"{title + ', changed after':<28}" + "".join(f"{p:>12}" for p in range(passes))]
        for table, hops in itertools.product(dict.fromkeys(r["table"] for r in rows), range(1, 5)):
            some = [r for r in rows if r["table"] == table]
            cells = [share(some, hops, p, passes if title == "last pass" else max(p, hops) + 1)
                     for p in range(passes)]
            lines += [f"{f'{table}, {hops} hops':<28}" + "".join(f"{cell:>12}" for cell in cells)]
    return "\n".join(lines)


def measurement(argv):
    """--slots CHECKPOINT: slots_table; every row in slots.jsonl there. --exposure CHECKPOINT: per
    step the published ratio and the clean one."""
    slots = argv[0] == "--slots"
    parser = argparse.ArgumentParser(prog="test_all.py", description=measurement.__doc__)
    parser.add_argument(argv[0], dest="checkpoint", metavar="CHECKPOINT", required=True)
    more = (dict(n=200, seed=1000, passes=6) if slots
            else dict(n=100, seed=1, length=64, gen_length=None))
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    if not slots:
        parser.add_argument("--tasks", nargs="+", choices=niah.TASKS, default=[*niah.TASKS])
    args = vars(parser.parse_args(argv))
    folder = args.pop("checkpoint")
    backbone, tokenizer, arms = sample.load_arms(folder)
    if not slots:
        return print(exposure(backbone, tokenizer, arms, **args))
    if "metastate" not in arms:
        raise ValueError(f"{folder} has no slots: its arms are {', '.join(arms)}")
    out = Path(folder, "slots.jsonl")
    rows = slot_rows(backbone, tokenizer, arms["metastate"], **args, out=out)
    print(f"{slots_table(rows, args['passes'])}\n{args['n']} texts a cell; after 0: undisturbed; "
          f"every row: {out}")


def walker_rows(remembers=True, out=None):
    """slot_rows of a memory that goes one line up the chain at every pass and answers with where it
    is. Its slot holds the word it has reached; with remembers=False it always starts anew."""
    equals = niah.vocabulary()["="]

    def memory(backbone, xt, attend, start):
        holds = [{left: right for left, sign, right in zip(ids, ids[1:], ids[2:]) if sign == equals}
                 for ids in xt[:, :start].tolist()]

        def predict(xt, t, state, at):
            words = state[0] if state and remembers else xt[:, start - 2]
            words = torch.tensor([h.get(word, word) for h, word in zip(holds, words.tolist())])
            answer = torch.full((len(xt), xt.shape[1] - start), backbone.cfg.eos_id)
            answer[:, 0] = words
            logits = F.one_hot(answer.flatten(), backbone.cfg.vocab_size).float()
            return logits, (words,)
        return predict, None
    return slot_rows(load_backbone("tiny", "cpu"), niah.tiny_tokenizer(), memory, 8, 3, 5, out)


def test_slots_exchanged_or_reset_tell_a_walk_from_values_that_come_down_and_from_no_carry_at_all():
    rows = walker_rows()

    def seen(table, hops, after):
        return share([r for r in rows if r["table"] == table], hops, after, 5)
    for hops, after in itertools.product(range(1, 5), range(5)):
        late = after + hops + 1 > 5
        assert seen("reset", hops, after) == ("0/0/100" if late else "0/100/0")
        if after:
            met = after > hops                          # a walk meets a value at pass h + 1
            assert seen("exchange question", hops, after) == "100/0/0"
            assert seen("exchange values", hops, after) == ("100/0/0" if met else "0/100/0")
            assert seen("exchange text", hops, after).startswith("100/" if met else "0/")
    assert {r["follows"] for r in walker_rows(remembers=False)} == {"neither"}


def test_the_table_of_the_slots_shows_shares_of_donor_own_and_neither(tmp_path):
    rows = walker_rows(out=tmp_path / "slots.jsonl")
    assert rows == rows_in(tmp_path / "slots.jsonl")
    rows = [r for r in rows if r["steps"] <= 3]
    lines = [line.split()[-3:] for line in slots_table(rows, 3).splitlines()]
    assert [lines[6], lines[8], lines[-4]] == [
        ["0/100/0", "100/0/0", "100/0/0"], ["-"] * 3, ["0/100/0", "0/100/0", "0/0/100"]]


def test_exposure_bias_of_a_model_is_one_at_first_and_later_only_without_context(model, batch):
    first, *later = exposure_bias(model, *batch[:3], 6, sample.no_memory)
    assert len(later) == 5 and first["published_ratio"] == first["clean_ratio"] == 1.0
    assert any(abs(r["clean_ratio"] - 1) > 1e-3 for r in later)
    for row in exposure_bias(model, *batch[:3], 6, blind):
        assert row["published_ratio"] == row["clean_ratio"] == 1.0


def test_exposure_bias_carries_the_memory_of_the_sequential_run(model, batch):
    seen = []

    def counting(backbone, xt, attend, start):
        def predict(xt, t, state, at):
            seen.append(state)
            return backbone(xt, attend, at), state + 1
        return predict, 0
    exposure_bias(model, *batch[:3], 3, counting)
    # static, clean and sequential start from the same state; only the last one is carried on
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 2]


# 14. By hand: the README's tables, read again or run again. `python test_all.py --tables` ---------

# arguments of niah.py, and the file that its rows go to
PASSES = "--tasks resolve --lengths 64 --passes 8 --n 500 --arms {arm}", "passes.jsonl"
DECODED = "--lengths 64 --n 500 --arms frozen {arm}", "niah.jsonl"
BY_LENGTH = "--tasks resolve --lengths 64 128 256 --n 500 --arms frozen {arm}", "niah.jsonl"
EIGHT = "--lengths 64 128 256 --n 200 --arms off on", "niah.jsonl"
STRONGER = "--tasks multikey tracking stories --lengths 64 128 256 --n 200 --arms on", "niah.jsonl"
RECALL = "--closed_book --n 200 --facts"
HIDDEN = f"{RECALL} 4 8 --lengths 0 64 256 1024 --arms none written phi other", "closed_book.jsonl"
CAPACITY = f"{RECALL} 1 2 4 8 16 24 --lengths 0 --arms written", "capacity.jsonl"
IN_VIEW = f"{RECALL} 4 8 --lengths 64 256 1024 --arms open", "reads.jsonl"
BOTH = f"{IN_VIEW[0]} none written phi open+phi other", "reads.jsonl"
WRONG = f"{RECALL} 4 8 --lengths 64 256 1024 --arms random flipped uncovered", "wrong.jsonl"
FAR = "--closed_book --n 100 --facts 4 8 --lengths 2048 4096 --arms written", "far.jsonl"


def measured_rows(folder, measure):
    """The JSONL file of a measurement of a run, made first if it is not there."""
    arguments, file = measure
    if not (folder / file).exists():
        run = re.sub(r"-seed\d+$", "", folder.name)
        arm = metastate.ARMS.get(run, "metastate" if "metastate" in RUNS.get(run, "") else "off")
        run_script("niah.py", "--checkpoint", folder, "--out", folder / file, "--seed", 1000,
                   *arguments.format(arm=arm).split())
    return folder / file


def learning_curve(runs, seeds):
    """Recall of four facts alone, on 50 texts, at every tenth of the training, in %."""
    rows = [dict(row, step=row["step"] + 1, run=run, seed=seed, chance=0)
            for run, seed in itertools.product(runs, seeds)
            for row in log_rows(run, seed) if "recalled" in row]
    return niah.table(rows, "recalled", "step", down=("run", "seed"), short=True)


def doses(runs, seeds):
    """Recall by length, off and on; then on, with larger steps of the inner loop at inference."""
    files = []
    for folder in itertools.starmap(ensure, itertools.product(runs, seeds)):
        files.append(measured_rows(folder, EIGHT))
        for inner_lr in 1, 3, 10:
            copy = Path(str(folder).replace("-seed", f"-lr{inner_lr}-seed"))
            if not (copy / "niah.jsonl").exists():
                shutil.copytree(folder, copy, dirs_exist_ok=True,
                                ignore=shutil.ignore_patterns("niah.jsonl"))
                settings = json.loads((copy / "memory.json").read_text())
                bb.write_json(copy / "memory.json", dict(settings, inner_lr=inner_lr))
            files.append(measured_rows(copy, STRONGER))
    return table_over_seeds(files, "length")


# name: runs; a measurement, or a function of runs and seeds; its columns; training seeds 0, 1, ...;
# what was seen and may be expected again, expected: str
TABLES = {
    "reads": (["reads"], BOTH, "length", 3, """Three seeds at 64 and 1,024 tokens: written 98 to
100, 92 to 97; open 98 to 100, 2 to 32; open+phi 99 to 100, 48 to 69; phi as written; none and other
0 to 4. 4 facts, training seeds 0 / 1 / 2, n = 200, texts of seed 1000 (a guess: 25; +- 1 at 100, 3
at 95, 7 at 50), 64, 256, 1,024 tokens:
  open      100/100/100  96/99/96    4/31.5/7     written  99.5/100/100  99/98/99.5     95/96.5/96.5
  open+phi  100/100/100  99/100/100  51.5/53.5/69 phi      99/100/100    99.5/98.5/99.5 95/97/96.5
Training: up to 256 tokens, 25 minutes a seed on one busy core. Phi is a seventh of the model's
parameters; writing is linear in the text; no chunk meets a position beyond the training: why
weights may keep what attention loses. With the text in view, too, phi loses 28 to 44 points in
1,024 tokens (never trained so); open+phi is 1 to 24 above the control reads-mdlm, 8 to 24 above
attention before the closed book (--tables attention). A question in one chunk with its fact costs
the fact (its key is copied, not bound): in 64 tokens phi gave 39 / 36.5 / 40 at first (another key
99; seed 0, n = 100); now it is a chunk of its own. Surprise, at inference: a token's gradient times
(1 - p)^gamma, gamma 16; without ("surprise": 0 in memory.json) written has 69.5 / 67 / 94 in 1,024
tokens, in shorter ones hardly less. Settings: three rounds on these texts (gamma: texts of seed 1);
--clip 10: seed 1 blew up. Fresh texts, looked at once (seed 2000, n = 100): written 96 / 97 / 97 of
4, 97 / 100 / 100 of 8 in 1,024 tokens, 99 / 100 / 100, 94 / 100 / 99 in 64."""),
    "far": (["reads"], FAR, "length", 3, """Three seeds: 81 to 98 at 2,048 tokens, 66 to 96 at
4,096: 8 and 16 times the longest trained on. 4 facts, n = 100: 81 / 94 / 95 and 66 / 94 / 96."""),
    "wrong": (["reads"], WRONG, "length", 1, """Seed 0: 0 to 4 for random phi of equal norm, steps
uphill, or an asked value that was no target. None and other: --tables reads."""),
    "attention": (["pretrained-256", "reads-mdlm"], IN_VIEW, "length", 3, """Three seeds: 99 to 100
up to 256 tokens, at 1,024 35 to 49 and 27 to 57. 4 facts: 100 / 100 / 100 at 64 and at 256; at
1,024 pretrained-256 (before the closed book) 35 / 45.5 / 45.5, reads-mdlm 27.5 / 52.5 / 53: a
control, from the same model, of this task alone, in view, up to 24 facts (closed book: 12), 7
minutes (9; loss 0 from the second on)."""),
    "long-attention": (["open-long"], IN_VIEW, "length", 1, """Seed 0: 97 to 100 everywhere, 99 for
4 facts in 1,024 tokens: trained on so many (18 minutes), attention reads them."""),
    "closed": (["closed", "first-order", "first-order-long"], HIDDEN, "length", 3, """Three seeds:
written at 64 tokens 90 to 100 (closed), 23 to 48 (first-order), 49 to 75 (first-order-long), at
1,024 81 to 95, 6 to 25, 3 to 22; none and other 0 to 4. Arm written, training seeds 0 / 1 / 2: the
facts alone, 64, 256 and 1,024 tokens:
  closed, 4 facts     99 / 99.5 / 100     99.5 / 98.5 / 96.5  99 / 98.5 / 98   94.5 / 91.5 / 90.5
          8 facts     98.5 / 99.5 / 98.5  96 / 97.5 / 90      93 / 94 / 90.5   88 / 88.5 / 81.5
  first-order, 4      83.5 / 90 / 86.5    48 / 47.5 / 37      29.5 / 35 / 30   19.5 / 25 / 18.5
  first-order-long    85 / 89.5 / 94.5    75 / 61.5 / 72      57.5 / 35 / 45   22 / 7 / 17.5
closed: no pretraining, 5 minutes; it cannot read. first-order: nothing flows back through the inner
steps (Eq. 10), to the end; long: for as many seconds as closed, 3,000 steps. First order binds
values to keys; the exact gradient keeps them bound in longer texts. Surprise counts more: gamma is
8; with 0, 4 facts in 1,024 tokens are 18 / 14 / 54, with 4 89 / 84 / 87.5."""),
    "capacity": (["closed", "rank-4", "rank-16", "rank-64", "layers-2"],
        CAPACITY, "facts", 1, """Seed 0, 1 to 24 facts alone: rank 4 98, 49, 18, 10, 2, 1 (the
values without their keys: a guess); others 97 to 100 up to 8, then rank 16 92 and 61, rank 32
(closed) 97 and 68 (24, twice the most of the training: 68.5), rank 64 98 and 74 (73.5), rank 32 in
two of the three layers (--fraction 0.5) 98 and 88."""),
    "curve": (["closed", "first-order"], learning_curve, "", 3, """Up to step 960, facts alone, one
run: 94 / 94 / 92 (n = 50). Longer texts: closed, exact now, 98 to 100, first-order 80 to 96."""),
    "published": (["published", "published-mdlm"], doses, "length", 3, """400 steps at lr 2e-5 from
the pretrained model. Adapted to the prompt or not, 10, 6, 25 of 4,800 answers differ (training seed
0, 1, 2; n = 200): 2, 2, 4 are better, 5, 1, 8 worse. Held-out loss 0.119 (adapted 0.118), 0.105,
0.152. Off, at 64/128/256 tokens (on, if other):
  single      100.0/100.0/50.5        100.0/100.0/79.5              100.0/99.5/46.5
  multikey    100.0/97.5/41.0         100.0/95.5/51.5               100.0/96.5/48.5
  multivalue  99.2/27.0/21.4          99.8/25.0/22.8                99.4/25.0/23.4
  tracking    100.0/42.2 (41.2)/1.0   99.7/69.3/30.5                100.0/16.2/0.0
  tracking4   98.7/39.2/8.5           99.2/45.0/24.1                98.3/35.6 (35.9)/0.1
  resolve     59.0/58.5/21.0 (21.5)   61.5/59.0/35.0                59.0 (58.5)/64.5 (64.0)/28.0
  common      100.0/98.3/88.7 (88.3)  99.3/99.0 (99.2)/94.2 (94.3)  100.0/99.8 (99.7)/97.7 (97.5)
  stories     99.5/89.5 (90.0)/31.0   99.5/85.0 (84.5)/42.0         97.0/94.0/11.0 (11.5)
With inner lr 1, 3, 10 in place of 0.1; in brackets plain MDLM, trained the same 400 steps, which
differs by at most 1.5 points in seed 1 and 3 in seed 2: no training with an inner loop is needed.
  multikey  100.0/97.5/41.0   92.0/97.0/40.5 (92.5/97.0/40.5)   50.0/73.5/40.5 (51.5/73.0/40.5)
    seed 1  99.5/95.5/51.5    84.5/95.0/51.5                    43.0/74.5/45.0
    seed 2  95.5/96.5/48.0    84.5/91.0/47.0                    27.5/29.5/20.0
  tracking  100.0/41.5/1.0    95.0/40.2/1.7 (94.7/39.7/1.7)     43.5/27.3/5.2 (44.5/27.8/5.2)
    seed 1  98.8/69.2/30.5    85.0/69.7/31.5                    27.2/43.2/18.0
    seed 2  95.3/16.3/0.2     77.3/15.8/1.3                     16.2/8.5/1.7
  stories   100.0/90.0/32.0   87.0/88.5/40.5 (88.0/88.5/40.5)   23.5/41.0/27.0 (23.0/41.0/28.0)
    seed 1  95.0/85.0/43.5    75.0/79.0/41.0                    4.5/8.0/3.5
    seed 2  94.0/96.0/17.0    66.0/75.0/12.5                    4.0/2.5/0.0"""),
    "hops": (["metastate", "detached", "feedback", "reset", "logits", "no-curriculum", "lora"],
        PASSES, "steps", 3, """metastate 59 / 69 / 78 / 88 / 97 after 1 to 5 passes, detached and
feedback the same, or (seed 2) 10 points less; no-curriculum 57, 94, 81 after 5; the others 57 to 63
at every pass, but for lora in seed 1: 70. The floor is 20 + 40 = 60: no hop is always answered,
half of the others by a guess. After 5 passes, n = 500, +- 1 to 4, training seeds 0 / 1 / 2 (live
parameters beside the backbone's 178,944):
  metastate, and reset (114,304)       98.4/96.0/95.8  reset: nothing crosses a step  58.2/59.8/61.8
  detached: no gradient through time   94.0/94.6/86.0  frozen: the backbone alone     59.0/60.4/61.8
  feedback: all activations (49,728)   98.0/95.8/85.8  logits: last prediction (2)    57.4/60.2/62.4
  no-curriculum (--curriculum 0)       57.4/94.2/81.4  six layers, plain MDLM         59.8/57.6/59.0
Six layers from noise: one pass, 16 minutes; the others up to 8 a seed. By hops (down) and passes
(across), seed 0, about 100 texts a row, +- 10 at 50; 250 at 5 and 6 hops, which no training text
has (--tasks more_hops --passes 9); no hop: 100 at every pass.
  hops 1    46 100 100 100 100 100 100 100      hops 4    51  49  47  47  95  95  94  94
  hops 2    54  44  99  99  97  97  96  96      hops 5    46  48  50  50  50  83  80  76
  hops 3    51  47  50  99 100 100  99  98      hops 6    51  55  56  54  54  52  72  71
A question of h hops is answered after h + 1 passes, of 1 to 6 hops 100, 100, 97, 86, 77, 64 % in
seed 1 and 100, 97, 89, 89, 78, 66 in seed 2; one pass before, of up to 4 hops, it is nearly a guess
(42 to 65). Feedback, which has no slots, walks too; training through time adds 1 to 10 points. As
published, without our curriculum (real backbones have none by default), one seed learns nothing and
one nearly all. A frozen model follows no hop at once: with three and six layers, in this training.
Is it the slots? `python test_all.py --slots runs/metastate --n 100`: two questions on a text swap
slots behind pass h, the last before the answer; then come, in %, seed 0 / 1 / 2, for 1, 2, 3, 4
hops, the other's answer 100 / 100 / 98, 100 / 98 / 95, 97 / 100 / 94, 95 / 84 / 89; its own, if
nothing is swapped, 100 / 98 / 99, 100 / 100 / 99, 98 / 97 / 95, 93 / 80 / 85. If only the values
differ, each keeps its own, as if undisturbed: slots hold the place, not yet the value. Put back to
s_0 behind pass p, the answer comes p later (2 hops, six passes: p = 3 99 to 100, p = 4 47 to
51)."""),
    "rates": (["lora", "lora-1e-3", "lora-3e-4", "all-weights"], PASSES, "steps", 3, """At every
pass 57 to 61, but in seed 1, where one hop is learned, 70 (lora-3e-4: 61). Seeds 0 / 1 / 2, n =
500; MetaState's CPU seconds and mix of tasks (but its first 40 %: resolve alone):
  LoRA of rank 30, lr 3e-3   57.0 / 70.0 / 59.2      LoRA, lr 3e-4           56.8 / 60.8 / 60.4
                   lr 1e-3   58.0 / 70.0 / 60.0      all weights, lr 1e-3    58.0 / 70.0 / 61.4
Without a carry, more training learns one hop at best (seed 1: 92 to 93 %); of 2 to 4 hops (chance
50) LoRA and all weights answer 54 there, MetaState 94."""),
    "sizes": ([*(f"slots-{n}" for n in (2, 4, 8, 16)), *(f"unroll-{n}" for n in (1, 2, 4, 8)),
        "lambda-0", "lambda-1"], PASSES, "steps", 3, """After 5 passes, training seeds 0 / 1 / 2; by
default 32 slots, K = 5 (steps of an update), lambda = 0.5 (weight of all masked tokens, after the
curriculum). K = 1 learns no hop, K = 2 one (two in seed 1), K = 8 a little more than 5.
  2 slots  56.4 / 61.0 / 61.4   K = 1  58.4 / 58.0 / 60.6    lambda = 0  98.6 / 97.6 / 94.2
  4        57.6 / 59.4 / 61.0   2      68.0 / 76.4 / 68.8    1           98.8 / 95.2 / 96.2
  8        64.0 / 71.4 / 64.2   4      96.4 / 93.4 / 89.6
  16       95.2 / 92.4 / 86.6   8      99.4 / 98.2 / 98.6"""),
    "places": ([f"places-{length}-slots-{n}" for length, n in PLACES],
        BY_LENGTH, "length", 1, """resolve, six decoding steps, seed 0, n = 500, at 64, 128, 256
tokens, from pretrained-256 (no hop: all right); trained on up to 128 is --length 128 --span 128:
  frozen                         56.4  61.0  62.6   64 slots, trained on up to 128  99.4  98.6  66.4
  32 slots, trained on up to 64  98.6  67.8  63.2   64 slots, on up to 256          94.6  96.6  96.2
  32 slots, on up to 128         93.0  96.2  65.8   128 slots, the same, 18 minutes 99.4  99.8  97.8
  32 slots on 256 did not learn  56.0  60.8  62.8
Slots reach as far as the texts they were trained on and hardly farther; one bank of 64 serves 64 to
256 tokens (one seed; the number of slots sets the unit of the place code, too)."""),
    "decoded": (["metastate"], DECODED, "length", 3, """Six tokens in six steps: resolve rises from
59.2 / 58.6 / 62.6 to 98.2 / 97.0 / 98.0; it thinks while it commits end-of-text. The other seven
tasks stay within a point. Where the answer may list the steps (tracking4, four hops), the frozen
model has 98.7 already, and slots 98.9."""),
    "trap": (["trap", "trap-mdlm"], losses, "", 3, """trap: training loss 0.000, held-out loss 0.5
to 0.8; trap-mdlm 0.06 to 0.07, 0.15 to 0.18. 400 steps on resolve from the pretrained model, larger
than the paper's (inner lr 1, lr 1e-3; its: 0.1, 2e-5), 5 minutes. Training seeds 0 / 1 / 2,
training loss x 2 (half of its tokens are masked) and held-out loss (128 texts), memory off (before
the training 0.13 / 0.18 / 0.14): plain MDLM 0.14 / 0.12 / 0.12 and 0.15 / 0.18 / 0.16, MemDLM, its
own (leaky) loss, 0.00 / 0.00 / 0.00 and 0.57 / 0.80 / 0.59. --inner_on prompt leaks nothing."""),
    "papers": ([], lambda *_: "nothing is run: commands for the published weights",
        "", 3, """MemDLM's Table 1 (LLaDA-MoE; RULER and BABILong at 4K and 8K). Data: the scripts
of https://github.com/NVIDIA/RULER write RULER/.../4096/data/niah_multivalue/validation.jsonl;
BABILong (RMT-team/babilong): one {"input", "question", "target"} a line, files named qa1_4k.jsonl
... qa5_8k.jsonl. Train by the README's command (runs/moe), and by the same with --method mdlm --out
runs/standard. Then (`torchrun --nproc_per_node=8` for `python`: 8 GPUs, the same rows):
  FILES=$(ls {4096,8192}/data/{niah_multivalue,vt,cwe}/validation.jsonl)
  python niah.py --checkpoint runs/standard --arms off --data $FILES
  python niah.py --checkpoint runs/moe --data $FILES
  python niah.py --checkpoint runs/moe --data qa?_4k.jsonl qa?_8k.jsonl --out babilong.jsonl
As in the paper: one block, one token a step, greedy, the benchmark's length (NIAH 128, VT 30, CWE
120, FWE 50, QA 32, BABILong 16). Scores: RULER's string_match_all (qa: string_match_part);
BABILong's as in the harness (the target is a substring; --metric exact: its official rule). The
paper's recall in % (500 samples, no error bars; none of this was run here):
                                  MV 4K   8K     VT 4K  8K     CWE 4K 8K     BABILong 4K 8K
  Standard MDLM (standard, off)   87.90  92.50   99.40  78.84  69.10  55.18  45.60  41.80
  MemDLM, train only (moe, off)   95.85  96.95   99.52  94.84  75.72  58.20  50.60  45.60
  train + inference (moe, on)     96.80  97.00   99.60  95.80  83.70  61.96  51.20  47.00
BABILong's two examples and instruction (the harness's): write them into `input`. The column is a
file's longest sample, in steps of 1,024; one beyond the model's limit is left out.
MetaState (against frozen, on GSM8K, say): the README's two commands, then --gen_length 256. Lines:
{"prompt": text} or {"messages": [...]}; other entries are kept (rename a reference called
"answer"), "arm", "answer", settings added, for its own scorer. A stopped run goes on after its last
line.""")}


def tables(argv):
    """The README's tables. What lies in runs/ is read again, what does not is run."""
    parser = argparse.ArgumentParser(prog="test_all.py --tables", description=tables.__doc__)
    parser.add_argument("tables", nargs="*", metavar="NAME", help=", ".join(TABLES))
    parser.add_argument("--seeds", nargs="+", type=int, help="of the training (default: README's)")
    args = parser.parse_args(argv)
    for name in args.tables or TABLES:
        if name not in TABLES:
            raise ValueError(f"--tables {name}: there are {', '.join(TABLES)}")
        runs, measure, by, n_seeds, expected = TABLES[name]
        seeds = args.seeds or range(n_seeds)
        shown = measure(runs, seeds) if callable(measure) else table_over_seeds(
            [measured_rows(ensure(run, seed), measure) for run in runs for seed in seeds], by)
        print(f"\n{name}\n{shown}\nexpected: {expected}")


def test_a_table_reads_what_is_there_runs_what_is_not_and_leaves_the_trained_settings(
        here, monkeypatch, capsys):
    def run_it(script, *arguments):
        commands.append(f"{script} {arguments[1]}")
        if script == "niah.py":
            saved_run(arguments[1], [0, 1])
        else:
            shutil.copytree("runs/pretrained-seed3", arguments[-1])
    commands = []
    monkeypatch.setattr(sys.modules[__name__], "run_script", run_it)
    write_lines("runs/pretrained-seed3/memory.json", [dict(rank=32, inner_lr=0.1)])
    shutil.copytree("runs/pretrained-seed3", "runs/published-seed3")
    saved_run(Path("runs/published-seed3"), [1, 1])
    tables(["published", "--seeds", "3"])
    copies = [f"niah.py runs/published-lr{inner_lr}-seed3" for inner_lr in (1, 3, 10)]
    assert commands == [*copies, "train.py mdlm", "niah.py runs/published-mdlm-seed3",
                        *(copy.replace("-lr", "-mdlm-lr") for copy in copies)]
    said = " ".join(capsys.readouterr().out.split())
    for shown in ("published off 100.0", "published-lr10 off 50.0", "expected: 400 steps at lr"):
        assert shown in said
    files = sorted(Path("runs").glob("published-*[0-9]/memory.json"))
    assert [json.loads(file.read_text())["inner_lr"] for file in files] == [
        1, 10, 3, 1, 10, 3, 0.1, 0.1]


@pytest.mark.parametrize("name, rows, shown", [
    ("trap", [dict(loss=9.0)] + [dict(loss=0.25)] * 49 + [dict(loss=0.25, held_out_off=1.5)],
     "trap-seed3 0.500 1.500"),
    ("curve", [dict(step=0, loss=9.0), dict(step=9, recalled=0.25), dict(step=19, recalled=1.0)],
     "recalled by step seed 10 20 closed seed 3 25 100")], ids=["losses", "recall by step"])
def test_a_table_of_what_was_logged_shows(here, name, rows, shown):
    runs, measure, *_ = TABLES[name]
    Path("runs/pretrained-seed3").mkdir(parents=True)
    write_lines(f"runs/{runs[0]}-seed3/log.jsonl", rows)
    assert shown in " ".join(measure(runs[:1], [3]).split())


def test_a_table_reads_the_rows_that_the_closed_book_writes(here):
    file = Path(write_lines("closed-seed3/closed_book.jsonl", []))
    niah.closed_book(random_backbone(vocab_size=139), niah.tiny_tokenizer(), CLOSED,
                     arms=["none", "written"], n_facts=[1, 2], lengths=[0], n=3, seed=1, out=file)
    by_facts, by_length = (table_over_seeds([file], by).splitlines() for by in ("facts", "length"))
    assert [line.split()[:3] for line in by_facts[1:]] == [
        ["facts", "closed", "none"], ["facts", "closed", "written"]]
    assert by_facts[1].count("±") == 2
    assert [line.split()[0] for line in by_length[1:]] == ["1", "1", "2", "2", "all", "all"]


# 15. The course: what each function to be written gives for fixed inputs --------------------------
# This section stays in the student's copy; there each case is a test, and what the originals gave
# lies in stored.pt.

WITHIN = "within: "     # so starts the label of an intermediate: it is shown, never judged
INNER = MemDLMConfig(rank=4, alpha=12.0, inner_lr=0.5, prompt_ratio=0.3)
# {assignment and function: {case: options of `world`}}; the arguments are found by their names
VARIANTS = {
    "A1: corrupt": dict(plain={}, ends=dict(t=torch.tensor([1.0, 0.0, 0.5])), drawn=dict(u=None)),
    "A1: masked_loss": dict(fp32={}, bf16=dict(dtype=torch.bfloat16),
                            no_masks=dict(masked=torch.zeros(3, 16, dtype=torch.bool))),
    "A1: split_evenly": dict(twelve=dict(steps=12), five=dict(steps=5), one=dict(steps=1)),
    "A2: paper_sample": dict(first_order=dict(row=0), short=dict(row=2),
                             clipped=dict(row=1, clip=0.05), exact=dict(row=0, exact=True)),
    "A3: inner_step": dict(
        plain=dict(clip=0.0), clipped=dict(clip=0.05), partly_clipped={},
        in_generate=dict(no_grad=True),
        surprise=dict(token_weight=functools.partial(memdlm.surprise, gamma=2.0)),
        exact=dict(exact=True, fraction=0.7), experts=dict(base=MIXTURE)),
    "A3: adapt_to_response": dict(first_order={}, exact=dict(exact=True),
                                  no_masks=dict(t=torch.tensor([0.0, 0.72, 0.875]))),
    "A3: loss_memdlm": dict(first_order={}, exact=dict(exact=True),
                            no_masks=dict(t=torch.tensor([0.0, 0.72, 0.875]))),
    "A3: adapt_to_prompt": dict(first_order=dict(phi=None), exact=dict(phi=None, exact=True),
                                started={}),
    "A5: Mixer.forward": dict(padded={}, unpadded=dict(visible=None)),
    "A5: Updater.cell": dict(plain={}), "A5: Updater.forward": dict(plain={}),
    "A5: Injector.forward": dict(plain={}),
    "A5: MetaState.step": dict(
        first=dict(phi=None, slots=None), later=dict(phi=None),
        meeting=dict(phi=None, inject_layers=(1, 3), read_layer=0),
        before_the_head=dict(phi=None, inject_layers=(0, 3)),
        with_phi=dict(fraction=1.0, inject_layers=(1, 2), read_layer=1),
        reset=dict(phi=None, memory="reset", inject_layers=(1,))),
    "A6: loss_unrolled": dict(both=dict(balance=0.3), reveal=dict(balance=0.0),
                              dense=dict(balance=1.0, n_rows=5))}
CASES = {f"{function} {word}": options for function, variants in VARIANTS.items()
         for word, options in variants.items()}


def world(seed, trained, row=None, base={}, dtype=torch.float32, **options):
    """{name of a parameter: its value}. Three rows, padded on the left, with answers of 8, 7 and 4
    tokens of which 3, 5 and 3 are masked, whatever the seed; the pre-anchor masks 4, 7 and 4.

    trained: the backbone and phi are. row: that one alone. base: of the backbone. dtype: of logits
    and activations. options: settings of INNER and of MetaState, and values in place of these."""
    def settings(kind):
        return {name: x for name, x in options.items() if hasattr(kind, name)}

    inner = dataclasses.replace(INNER, **settings(MemDLMConfig))
    backbone = random_backbone(seed, **base).requires_grad_(trained)
    meta = trained_meta(backbone, **settings(MetaStateConfig))
    torch.manual_seed(seed)
    x0 = torch.randint(3, 40, (3, 16))
    attend = torch.arange(16) >= torch.tensor([0, 5, 2])[:, None]
    given = torch.arange(16) < torch.tensor([8, 9, 12])[:, None]
    t = torch.tensor([0.4375, 0.72, 0.875])             # in two rows one u is t: not masked
    u = torch.rand(3, 16)
    for values, hidden in zip(u, ~given):
        n = int(hidden.sum())
        values[hidden] = (torch.randperm(n) + 0.5) / n
    masked = (u < t[:, None]) & ~given
    masked[1] = False                                   # a row without a target
    masked = options.get("masked", masked)
    at = ~given & (u < 0.7)
    phi = {name: w.map(lambda x: (x + torch.randn_like(x) / 9).requires_grad_(trained))
           for name, w in memdlm.init_phi(backbone, [4, 5, 6], inner).items()}
    shapes = dict(logits=(int(masked.sum()), 40), h=(3, 16, 32), slots=(3, 4, 16), read=(3, 4, 16),
                  c=(3, 16), read_at=(4, 16), write_at=(4, 16), place=(1, 16, 16))
    found = {name: torch.randn(shape).to(dtype).requires_grad_() for name, shape in shapes.items()}
    found |= dict(
        backbone=backbone, model=meta, meta=meta, inner=inner, ctx=backbone.context(x0, attend),
        x0=x0, given=given, attend=attend, visible=attend, t=t, u=u, masked=masked, at=at, phi=phi,
        ids=x0.index_fill(1, torch.arange(6, 9), 1), xt=x0.masked_fill(at, 1), mask_id=1,
        generator=torch.Generator().manual_seed(seed + 1), seed=seed + 3, exact=False,
        token_weight=torch.ones_like, weight=torch.tensor([0.5, 1.0, 3.0]), n_maskable=23,
        n_rows=3, start=7,
        n=torch.tensor([32, 0, 7, 12, 30 + seed % 10]),
        reveals=torch.tensor([[1, 2, 5, 0], [0, 4, 3, 0], [4, 0, 0, 0]]))
    if row is not None:
        phi0 = {name: w.map(lambda x: x[row, None].detach()) for name, w in phi.items()}
        found |= dict(model=backbone, x0=x0[row], given=given[row], t=t[row], u=u[row], phi0=phi0)
    return found | options


def tensors_in(label, value):
    """Pairs of a label and a tensor for all tensors and numbers in a nested value."""
    if isinstance(value, (torch.Tensor, bool, int, float)):
        yield label, torch.as_tensor(value)
    elif isinstance(value, bb.LowRank):
        yield from tensors_in(label, value._asdict())
    elif isinstance(value, (dict, tuple, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_in(f"{label} {key}", inner)


def noting(notes, label, function):
    """The function, which also notes what it is given and what it returns."""
    signature = inspect.signature(function)

    def noted(*args, **options):
        given = dict(signature.bind(*args, **options).arguments)
        result = function(*args, **options)
        call = f"{WITHIN}{len(notes) // 2 + 1}. {label}"
        notes.extend([(f"{call} got", given), (f"{call} gave", result)])
        return result
    return noted


def module_of(function):
    """Where a function to be written stands: paper_sample here, and in a copy in memdlm.py."""
    modules = bb, sample, memdlm, metastate, sys.modules[__name__]
    return next(m for m in modules if hasattr(m, function.split(".")[0]))


def values_of(name, seed):
    """{label: tensor} of a case, in the order of computation: intermediates, results, gradients of
    a random sum of them (none is 0, and so are rounding errors), arguments afterwards."""
    assignment, function = name.split()[:2]
    w = world(seed, assignment in ("A2:", "A3:"), **CASES[name])
    meta, notes = w["meta"], []
    w["self"] = {"Mixer": meta.mixer, "Updater": meta.updater, "Injector": meta.injectors[0],
                 "MetaState": meta}.get(function.split(".")[0])
    function = functools.reduce(getattr, function.split("."), module_of(function))
    args = {p: w[p] for p in inspect.signature(function).parameters}
    for label, part in list(meta.named_modules())[1:]:
        part.forward = noting(notes, label, part.forward)
    with pytest.MonkeyPatch.context() as patch:
        for owner, label in (memdlm, "inner_step"), (torch.func, "functional_call"), (meta, "step"):
            patch.setattr(owner, label, noting(notes, label, getattr(owner, label)))
        with torch.set_grad_enabled(not CASES[name].get("no_grad")):
            results = dict(tensors_in("result", function(**args)))
    inputs = {}
    for label, value in args.items():
        value = dict(value.named_parameters()) if isinstance(value, torch.nn.Module) else value
        inputs |= {name: x for name, x in tensors_in(label, value) if x.requires_grad}
    found = [pair for note in notes for pair in tensors_in(*note)] + list(results.items())
    if inputs:
        g = torch.Generator().manual_seed(0)
        total = 0 * sum(x.sum() for x in inputs.values())       # so each has a gradient
        total = total + sum((x * torch.randn(x.shape, generator=g)).sum()
                            for x in results.values() if x.is_floating_point())
        for label, d in zip(inputs, torch.autograd.grad(total, list(inputs.values()))):
            found.append((f"gradient of {label}", d * (d.norm() > 1e-4)))
    found += tensors_in("afterwards:", args)
    return {label: x.detach().clone() for label, x in found}


def apart(got, expected):
    """Where numbers differ by more than 0.1 %; all of them where the shape or the kind differs."""
    kinds = [(x.shape, x.is_floating_point(), x.dtype == torch.bool) for x in (got, expected)]
    if kinds[0] != kinds[1]:
        return torch.ones_like(expected, dtype=torch.bool)
    got, expected = got.double(), expected.double()
    scale = expected.abs().max().item() if expected.numel() else 0
    return ~torch.isclose(got, expected, rtol=1e-3, atol=1e-4 * scale + 1e-9)


def difference(name, got, expected):
    """What a case got wrong, or raised, in three lines; "" if its results are right.
    Intermediates say where it begins, but a result may be reached in other ways."""
    if isinstance(got, str):
        return got

    def differs(label):
        return apart(got.get(label, torch.zeros(0)), expected[label]).any()

    wrong = [label for label in expected if not label.startswith(WITHIN) and differs(label)]
    if not wrong:
        return ""
    # a value without a finite number may be harmless on the way
    first = next((label for label in expected if label in got and differs(label)
                  and (label in wrong or got[label].isfinite().all())), wrong[0])
    a, b = got.get(first, torch.zeros(0)), expected[first]
    lines = [f"{name}: wrong is {wrong[0]}, and {len(wrong) - 1} others", f"differs first: {first}"]
    if a.shape == b.shape:
        where = apart(a, b).nonzero()
        at, rows = tuple(where[0].tolist()), sorted(set(where[:, :1].flatten().tolist()))
        lines.append(f"at {list(at)} of {list(b.shape)}: got {a[at].item():.6g}, expected "
                     f"{b[at].item():.6g}; {len(where)} of {b.numel()} numbers differ, rows {rows}")
    else:
        lines.append(f"got {list(a.shape)} {a.dtype}, expected {list(b.shape)} {b.dtype}")
    return "\n".join(f"{line[:160]} ..." if len(line) > 160 else line for line in lines)


def attempt(name, seed):
    """The values of a case, or what it raised, and in which of the lines before us."""
    try:
        return values_of(name, seed)
    except (Exception, SystemExit) as e:
        frames = [f for f in traceback.extract_tb(e.__traceback__)
                  if Path(f.filename).parent == HERE]
        where = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}, in {frames[-1].name}"
        return f"{name}: {type(e).__name__}: {e!s:.300}\n{where}: {frames[-1].line}"


def write_values(assignment, seed):
    """The values of an assignment's cases, or what they raised -> values.pt: for the grades."""
    torch.set_num_threads(1)
    found = {}
    for name in [name for name in CASES if name.startswith(assignment)]:
        found[name] = attempt(name, seed)
        torch.save(found, "values.pt")


# 16. The course: the student's copy (`--starter`) and the grades of a class (`--grade`) -----------

BLANKS = dict(reversed(name.split(": ")) for name in VARIANTS)      # {function: its assignment}
NEEDS = {"A3": "A1", "A6": "A5"}                                    # solved by us in its grade
PARSING = threading.Lock()         # ast.parse of Python 3.11 fails in two threads at a time
COURSE = """\
# The course: two memories for diffusion language models, written by you

The functions named below raise NotImplementedError; their docstrings say what they must do. Write
their bodies, helpers and imports inside, in this order: nothing else is graded. Change no test.

    python -m pytest -q test_all.py -k A1:    # then A2:, A3:, ...
    python -m pytest -q test_all.py           # in the end all pass, but for two that need minutes

A failure says what differs first, and in which rows; "within" is an intermediate of one way to get
there, and you may take another. Hand in this folder, and for each assignment its measurement with a
95 % interval (n = 1 seed will do) and half a page that explains it. Points of 100: tests 60 (A4:
its tables), measurement 20, explanation 20.

**MemDLM** (arXiv 2603.22241), memory in weights.
{memdlm}

**MetaState** (arXiv 2603.01331), memory in activations.
{metastate}

## A1: The loss (2 h)
Read: MDLM and LLaDA, forward process and loss. Write: {A1}. A token is masked where u < t; without
u, `torch.rand` draws it with the generator. `x0` stays as it is; the loss is computed in fp32.
Measure: the share of masked tokens at t = 0.1, 0.5 and 0.9 in 1,000 rows of 100 tokens.

## A2: MemDLM for one sample (3 h)
Read: MemDLM, Eq. 6-10. Write: {A2}. The anchor masks the k tokens with u < t, the pre-anchor
floor(s_pre k) of the n that are not given (at most n), those with the smallest u. The gradient g of
each factor is scaled by min(1, clip / (norm of g + 1e-6)); exact keeps the graph, else each step
starts from constants.
Measure: by how many nats do the two inner steps lower the outer loss of a masked token (`inner_lr`
0.1, 0.5, 2; t = 1; 20 texts of 14 random tokens; test_all's `random_backbone()`, `MEM`)? Why?

## A3: MemDLM in a batch (8 h; measured against A2)
Read: MemDLM, sections 3.1 and 4.4. Write: {A3}. As A2, for all rows at once. `given` may include
padding, so a row's prompt is `given & attend`; its `row_seeds` give phi_0. clip 0 clips nothing.
A token's cross-entropy is multiplied by token_weight, a function of all of them, as a constant.
Inside `inner_step`, which `generate` calls under no_grad: a gradient all the same; exact, the
context needs `twice`, and the clip factor has a gradient, too. The weight of a state is 1 / (its
masked share of what is not given). `adapt_to_prompt`: the prompt is what is attended and no [MASK]
(no target); from its `row_seeds` come phi_0 and, with a generator seeded one higher, `torch.rand`
of the prompt's n numbers u, elsewhere u is larger than 1. The anchor masks round(prompt_ratio n)
tokens, those with the smallest u; weight 1.
Measure: how many times longer than `loss_memdlm` does a loop over `paper_sample` take for four rows
of 14 tokens (t = 1, first order, all weights' gradients, one thread, the median of 20 calls after
3)?

## A4: First order against exact, and the leak (2 h + 30 min of runs)
Read: MemDLM, Eq. 5 and 10, Fig. 4. Write: no code.
Measure: recall of 4 facts alone and in 64 tokens (a guess: a quarter); and, of the last two runs,
`loss` (mean of the last 50 steps) and `held_out_off` (last) in `runs/*/log.jsonl`, as a table.
Which of the two losses deceives?

    python train.py --method memdlm --exact_from 1 --n_eval 0 --out runs/first-order    # 4 minutes
    python train.py --method memdlm --n_eval 0 --out runs/exact    # 5 minutes
    python niah.py --checkpoint runs/first-order --closed_book --facts 4 --lengths 0 64 --n 200 \
--arms written    # and the same with runs/exact
    python train.py --method mdlm --n_eval 0 --out runs/pretrained    # 8 minutes
    python train.py --method memdlm --inner_on response --inner_lr 1 --init runs/pretrained \
--tasks resolve --full_share 0 --lr 1e-3 --n_eval 0 --out runs/leak    # 3 minutes
    python train.py --method mdlm --init runs/pretrained --tasks resolve --full_share 0 --lr 1e-3 \
--n_eval 0 --out runs/no-leak    # 1 minute

## A5: MetaState's modules (2 h)
Read: MetaState, the three modules. Write: {A5}. Every input of attention is normed with c; places
are added to queries or keys, never to values. In a step use `carry`, `inject` and `read`; all
injections and the reading get the slots of the step before; where an injection and the reading
meet, the injection comes first.
Measure: how many times longer is a denoising step with slots than without (`load_backbone('tiny')`,
`metastate.build`, no gradients, one row, one thread), at 64, 256 and 1,024 tokens? Why?

## A6: MetaState's unrolled loss (3 h + 20 min of runs)
Read: MetaState, K-step unrolling. Write: {A6}. The time of a step is the share of the answer that
is masked, row by row.
Measure: recall on `resolve` at five passes by hops for the arms frozen, metastate and wiped. Then,
from the last command: two questions about one text exchange their slots after pass h of h hops;
whose answer comes?

    python train.py --method metastate --init runs/pretrained --n_eval 0 --out runs/slots    # 6 min
    python niah.py --checkpoint runs/slots --tasks resolve --lengths 64 --passes 5 --n 500 \
--arms frozen metastate wiped
    python test_all.py --slots runs/slots --n 100
"""
LECTURER = """\
python test_all.py --starter DIR                     writes the student's copy
python test_all.py --grade FOLDER [--out scores.csv] [--seed N] [--seconds 120]
  FOLDER holds a folder or a zip for each student. Only the bodies of the named functions are taken
  from it, into a fresh copy; inputs come from a seed drawn anew (printed; --seed repeats it), and
  what the originals give never enters the process of the student's code. An assignment has a
  process of its own, with earlier ones solved by us where it needs them: 60 points, shared evenly
  among its cases. Written: a CSV with the points of each function, and scores-texts, a text for
  each student. Not protected: files of your account, the machine from many processes; copied code
  is not found. Run it in a container. Memory (8 GB) and network are limited on Linux alone.
Explanation, 20 points: the cause 10, what else could explain the number and does not 5, limits 5.
Measurement, 20: right command and arms 5, a 95 % interval 5, in this interval 10:
A1: t within 0.004; half a width of the interval: 0.0019, 0.0031, 0.0019
A2: 0.15 to 0.25, 1.2 to 1.7, 1.4 to 2.5 nats on random tokens: the labels leak
A3: 3 to 5 times
A4: first order 83 to 90 alone, 37 to 48 in 64 tokens; exact 96 to 100 twice. The leak: training
    loss below 0.01, held out 0.5 to 0.9; without it 0.05 to 0.08, 0.14 to 0.19
A5: 1.3 to 1.8, 1.2 to 1.5, 1.03 to 1.2 times
A6: metastate 94 to 100 in the mean, frozen and wiped 57 to 63 (0 hops 100, the others about 50);
    after the exchange the other question's, 84 to 100 %

To change an assignment: a line of VARIANTS (its arguments are named in `world`), its text in
COURSE, and lines in MISTAKES and EQUALS, whose test says whether the cases find what they should.
Public: the whole solution is this repository. What is graded is understanding, and a measurement.
"""
CONFTEST = '''\
"""A test that is not of the course is skipped while it needs a function not yet written."""
import pytest
@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    unwritten = report.failed and "NotImplementedError: A" in report.longreprtext
    if unwritten and not item.name.startswith("test_course"):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, "to be written")
    return report
'''
TEST_OF_THE_COPY = '''\
@pytest.mark.parametrize("name", CASES)
def test_course(name):
    expected = torch.load(HERE / "stored.pt", weights_only=True)[name]
    failure = difference(name, attempt(name, 0), expected)
    if failure:
        pytest.fail(failure, pytrace=False)


'''
# (file, text, what stands in its place in a copy); each text must be there once
EDITS = [
    ("backbone.py", "(ValueError, OSError) as", "(ValueError, OSError, NotImplementedError) as"),
    ("test_all.py", "n[row] // S + (s < n[row] % S)", "sample.split_evenly(n, S)[row, s]"),
    ("test_all.py", '    elif what == "--tables":\n        tables(argv)\n', ""),
    ("test_all.py",
     '    elif what in ("--starter", "--grade"):\n        course([what, *argv])\n', "")]
SECTIONS = {"The course: the student's": TEST_OF_THE_COPY, "By hand: the README's tables": ""}
REMOVED = ["paper_loop", "paper_sample",        # these hold a solution
           "test_the_unrolled_loss_equals_the_published_formula_row_by_row",
           "test_batched_memdlm_equals_a_plain_loop_from_the_paper_in_loss_and_gradient"]


def node_of(text, name):
    """The syntax tree of "function" or "Class.method" in a file."""
    node = ast.parse(text)
    for part in name.split("."):
        node = {inner.name: inner for inner in node.body if hasattr(inner, "name")}[part]
    return node


def with_body(text, name, body):
    """The text with this body below a function's docstring; None: a blank, comments stay."""
    node, lines = node_of(text, name), text.splitlines()
    start = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
    if body is None:
        body = [line.strip() for line in lines[start:node.end_lineno] if re.match(" *#", line)]
        body.append(f'raise NotImplementedError("{BLANKS[name]}: write {name}")')
    lines[start:node.end_lineno] = [" " * node.body[0].col_offset + line for line in body]
    return "\n".join(lines) + "\n"


def file_of(function):
    return "memdlm.py" if function == "paper_sample" else f"{module_of(function).__name__}.py"


def readme_of_the_copy():
    write = {a: ", ".join(f"`{f}` in {file_of(f)}" for f in BLANKS if BLANKS[f] == a)
             for a in BLANKS.values()}
    # of a module's docstring from the idea to the shapes, without what came out
    ideas = {m.__name__: re.search(r"(?ms)^Idea: .*?(?=^Shapes)", m.__doc__)[0].strip()
             for m in (memdlm, metastate)}
    return re.sub(r" On the tiny model[^.]*\.", "", COURSE.format(**write, **ideas))


def write_copy(folder, bodies):
    """A copy of the project with these bodies of the course's functions, {function: lines or None};
    those that are not named stay."""
    texts = {file: (HERE / file).read_text() for file in [*FILES, "requirements.txt", "LICENSE"]}
    tests = texts["test_all.py"]
    for title, instead in SECTIONS.items():
        tests = re.sub(rf"^# \d+\. {title}.*?(?=^# \d+\. [^\n]*-$)", lambda _: instead, tests,
                       flags=re.M | re.S)
    # top-level definitions stand two blank lines apart
    texts["test_all.py"] = "\n\n\n".join(block for block in tests.split("\n\n\n") if not re.search(
        rf"^def ({'|'.join(REMOVED)})\(", block, re.M))
    texts["memdlm.py"] += f"\n\n# A2, from the paper.\n\n{inspect.getsource(paper_sample)}"
    for file, old, new in EDITS:
        assert texts[file].count(old) == 1, f"{file} does not hold {old!r} once: correct EDITS"
        texts[file] = texts[file].replace(old, new)
    for function, body in bodies.items():
        file = file_of(function)
        texts[file] = with_body(texts[file], function, body)
    texts |= {"conftest.py": CONFTEST, "README.md": readme_of_the_copy()}
    folder.mkdir(parents=True)
    for file, text in texts.items():
        (folder / file).write_text(text)


def write_starter(folder, blanks=BLANKS):
    """The student's copy, with what the originals give."""
    write_copy(folder, dict.fromkeys(blanks))
    torch.save({name: values_of(name, 0) for name in CASES}, folder / "stored.pt")


def body_of(submission, function):
    """The lines of a function of a student's folder or zip; ValueError if they cannot be read."""
    file = file_of(function)
    try:
        if submission.is_dir():
            found = [p for p in submission.rglob(file) if p.is_file()]
        else:
            found = [zipfile.Path(submission, name) for name
                     in zipfile.ZipFile(submission).namelist() if Path(name).name == file]
        text = min(found, key=lambda p: str(p).count("/")).open(encoding="utf-8").read(10 ** 6)
        return "\n".join(map(ast.unparse, node_of(text, function).body)).splitlines()
    except Exception as e:
        raise ValueError(f"{file} cannot be read: {type(e).__name__}: {e}") from None


def graded(submission, assignment, seed, expected, seconds, shut_in):
    """{case: what is wrong, or ""}. The student's code runs in a process of its own, in a copy that
    holds what it may need, and which is given the inputs alone."""
    values, ended = {}, "it ended before this case"
    code = f"import test_all; test_all.write_values({assignment!r}, {seed})"
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "copy"
        try:
            with PARSING:
                write_copy(copy, {f: body_of(submission, f) if a == assignment else None
                                  for f, a in BLANKS.items() if a != NEEDS.get(assignment)})
            with open(copy / "said", "wb") as said:
                subprocess.run([*shut_in, sys.executable, "-c", code], cwd=copy, timeout=seconds,
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said)
            ended = (copy / "said").read_text(errors="replace")[-300:].strip() or ended
        except Exception as e:              # a limit of time, too
            ended = str(e)
        with contextlib.suppress(Exception):
            values = torch.load(copy / "values.pt", weights_only=True)
    wrong = {}
    for name in [name for name in CASES if name.startswith(assignment)]:
        try:
            wrong[name] = difference(name, values.get(name, f"{assignment}: {ended}"),
                                     expected[name])
        except Exception as e:
            wrong[name] = f"{name}: these are no values: {e}"
    return wrong


def grade(folder, out, seed, seconds):
    """Grades every folder and zip in a folder: a CSV, and a text a student."""
    submissions = sorted(p for p in folder.iterdir() if p.is_dir() or p.suffix == ".zip")
    if not submissions:
        raise ValueError(f"{folder} holds no folder and no zip of a student")
    expected = {name: values_of(name, seed) for name in CASES}
    assignments = sorted(set(BLANKS.values()))
    texts = out.with_name(f"{out.stem}-texts")
    texts.mkdir(parents=True, exist_ok=True)
    shut_in = "prlimit --as=8000000000 --fsize=200000000 unshare -rnpf --kill-child".split()
    if not shutil.which("prlimit") or subprocess.run([*shut_in, "true"]).returncode:
        shut_in = []
    print(f"seed {seed}; memory and network {'' if shut_in else 'un'}limited; points of 60")
    with open(out, "w", newline="") as f, ThreadPoolExecutor(os.cpu_count()) as pool:
        table = csv.DictWriter(f, ["student", *VARIANTS, *assignments])
        table.writeheader()
        jobs = [[pool.submit(graded, s, a, seed, expected, seconds, shut_in) for a in assignments]
                for s in submissions]
        for student, job in zip(submissions, jobs):
            wrong = {name: text for part in job for name, text in part.result().items()}
            points = dict(student=student.name)
            for part in [*VARIANTS, *assignments]:
                right = [not text for name, text in wrong.items() if name.startswith(part)]
                points[part] = round(60 * sum(right) / len(right))
            table.writerow(points)
            f.flush()
            print(f"{student.name:<24}", *(f" {a} {points[a]:>2}" for a in assignments), flush=True)
            said = dict.fromkeys(filter(None, wrong.values())) or ["all is right"]
            (texts / f"{student.name}.txt").write_text("\n\n".join(said) + "\n")


def course(argv):
    """`python test_all.py --starter DIR`, `--grade FOLDER`; `--starter --help`: for lecturers."""
    parser = argparse.ArgumentParser(description=LECTURER,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starter", type=Path, metavar="DIR")
    parser.add_argument("--grade", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path("scores.csv"))
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1, 10 ** 6))
    parser.add_argument("--seconds", type=int, default=120, help="limit of an assignment")
    args = parser.parse_args(["--help"] if "--help" in argv else argv)
    if args.starter:
        write_starter(args.starter)
    if args.grade:
        grade(args.grade, args.out, args.seed, args.seconds)


# Mistakes of students. A function: a piece of its body >> what stands there instead >> or this
MISTAKES = """
corrupt: [:, None] >> [0] ;; < t. >> > 1 - t. >> <= t. ;; & ~given >>
    x0.masked_fill(masked >> x0.masked_fill_(masked ;; mask_id), masked >> mask_id), ~given
    u.to(x0.device) < >> u.argsort(1).argsort(1) / len(x0[0]) < ;; generator=generator, >>
masked_loss: weight.to(ce)[masked.nonzero()[:, 0]] >> weight.to(ce)[0] >> weight.mean()
    / n_maskable >> / masked.sum() ;; logits.float() >> logits ;; "none" >> "mean"
split_evenly: n[:, None] % steps) >> n[0] % steps) ;; < n >> <= n
paper_sample: inner.alpha / inner.rank * B >> inner.alpha * B ;; if not given[i] >>
    (min(n, inner.s_pre * k) >> (min(n, inner.s_pre * k) + 0.6 ;; * n / masked.sum() >>
    (pre_anchor, anchor) >> (anchor, pre_anchor) >> (anchor,) ;; * c * g >> * g ;; "sum" >> "mean"
    (g.norm() + 1e-6) >> sum(x.norm() ** 2 for x in grads) ** 0.5
    w if exact else w.detach() >> w.detach()
inner_step: masked.sum(1).clamp >> masked.sum().clamp ;; .clamp(max=1) >> ;; inner.clip: >> True:
    g.flatten(1).norm(dim=1)[:, None, None] >> g.norm() ;; create_graph=exact >> create_graph=False
    g.flatten(1) >> torch.cat([x.flatten(1) for x in gradients], 1) ;; A=A, B=B) >> B=B)
    x - inner.inner_lr >> x + inner.inner_lr ;; ce.detach() >> ce
    weights * token_weight(ce.detach()) >> weights ;; with torch.enable_grad() >> if 1
adapt_to_response: m.sum(1).clamp(min=1) for >> (~given).sum(1) for ;; w_pre, w = >> w, w_pre =
    x0, masked_pre, >> x0, masked, ;; masked, w, inner, exact) >> masked, w, inner)
    attend, seed) >> attend, 0) ;; given & attend, >> given, ;; return phi, h, >> return phi, h_pre,
loss_memdlm: inner), phi=phi) >> inner)) ;; seed, exact) >> 0, exact) >> seed)
    weight, n_maskable) >> torch.ones_like(weight), n_maskable)
adapt_to_prompt: attend & (ids >> (ids ;; & (ids != backbone.cfg.mask_id) >> ;; 2.0 >> 0.0
    prompt, seed) >> prompt, 0) ;; set_grad_enabled(exact) >> no_grad() ;; phi or init >> init
    torch.ones_like(u[:, 0]) >> prompt.sum(1) / masked.sum(1)
Mixer.forward: heads, visible) >> heads) ;; self.heads >> 1 ;; + read_at >> ;; + place >>
    self.norm_slots(slots, c) >> slots ;; self.v(h) >> k
    self.o(read), >> self.o(self.v(h).mean(1, keepdim=True).expand_as(q)),
Updater.cell: (1 - z) * n + z >> z * n + (1 - z) ;; r * s_n >> s_n ;; x_r, x_z, x_n >> x_z, x_r, x_n
Updater.forward: (read, c), slots >> (slots, c), read ;; self.norm_read(read, c) >> read
Injector.forward: self.o(written) >> h + self.o(written) ;; + write_at >> ;; + place >>
MetaState.step: injectors[stop], h >> self.injectors[0], h ;; self.read_layer + 1 >> self.read_layer
    self.carry(slots, len(xt)) >> self.s0.expand(len(xt), -1, -1) if slots is None else slots
    - start >> ;; self.time(t) >> self.time(t.mean().expand_as(t)) ;; stop, phi) >> stop)
    self.read(h, >> self.read(h.detach(), ;; done, phi=phi) >> done) >> done, phi=phi).detach()
loss_unrolled: / n_rows >> / len(x0) ;; count / N_m, slots >> n_k / N_m, slots
    N_m, slots, at >> N_m, slots if slots is None else slots.detach(), at
    u.masked_fill(~masked, 2.0) >> u ;; balance * n_k / N_m >> balance / N_m
    (1 - balance) * revealed >> balance * revealed ;; masked & ~revealed >> masked
    answer_start(given) >> 0
"""
# Other ways to be right.
EQUALS = """
corrupt: x0.masked_fill(masked, mask_id) >> torch.where(masked, mask_id, x0)
    & ~given >> * given.logical_not()
masked_loss: weight.to(ce)[masked.nonzero()[:, 0]] >> weight.repeat_interleave(masked.sum(1))
split_evenly: n[:, None] // steps >> (n - n % steps)[:, None] // steps
paper_sample: inner_lr * c * g >> inner_lr * g * c ;; order[:k] >> [i for i in order if u[i] < t]
inner_step: * ce).sum() >> ) @ ce ;; h = h.detach() >> pass
    .clamp(min=1))[masked >> )[masked ;; head(h, ctx, masked) >> head(h, ctx)[masked]
adapt_to_response: corrupt(x0, t, given, backbone.cfg.mask_id, u) >> 0, (u < t[:, None]) & ~given
loss_memdlm: head(h, ctx, masked) >> forward(x0.masked_fill(masked, 1), attend, masked, phi)
adapt_to_prompt: 2.0 >> 1.5
Mixer.forward: self.v(h), self.heads, visible >> visible=visible, heads=self.heads, v=self.v(h)
Updater.cell: (1 - z) * n + z * slots >> n + z * (slots - n)
    torch.sigmoid(x_r + s_r) >> 1 / (1 + (-x_r - s_r).exp())
MetaState.step: torch.no_grad() >> torch.enable_grad() ;; head(h, ctx, at) >> head(h, ctx)[at]
loss_unrolled: masked & (n_k > 0)[:, None] >> masked ;; max()) + 1 >> max() * 0) + reveals.shape[1]
"""


def changes(table):
    """Triples of a function, a piece of its body, and what stands there instead."""
    for block in re.split(r"\n(?=\w)", table.strip()):
        function, entries = block.split(": ", 1)
        for entry in re.split(r" ;; *|\n", entries):
            old, *instead = map(str.strip, entry.split(">>"))
            yield from ((function, old, new) for new in instead)


known_values = functools.cache(values_of)


def verdicts(function, old, new):
    """What the function's own cases say once this piece of it is replaced, one after the other."""
    module = module_of(function)
    original = functools.reduce(getattr, function.split("."), module)
    source = textwrap.dedent(inspect.getsource(original))
    assert old in source, (function, old)
    scope = dict(vars(module))
    exec(source.replace(old, new), scope)
    for name in [name for name in CASES if name.split()[1] == function]:
        expected = known_values(name, 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(original, "__code__", scope[original.__name__].__code__)
            yield difference(name, attempt(name, 0), expected)


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=slow)])
def test_each_mistake_is_found_by_the_cases_of_the_function_in_which_it_was_made(every):
    mistakes = list(changes(MISTAKES))
    assert len(mistakes) >= 60
    found = {mistake: next(filter(None, verdicts(*mistake)), "") for mistake in mistakes[::every]}
    assert [mistake for mistake, said in found.items() if not said] == []
    assert all(len(said.splitlines()) <= 8 and m[0] in said for m, said in found.items())


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=slow)])
def test_no_other_way_to_be_right_is_called_wrong(every):
    others = list(changes(EQUALS))
    assert len(others) >= 12
    for other in others[::every]:
        assert not any(verdicts(*other)), other


def numbers(text):
    return set(re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.]*\d)", text))


def test_a_starter_holds_no_solution_no_measured_outcome_and_ends_in_one_line(tmp_path, capsys):
    write_copy(tmp_path / "starter", dict.fromkeys(BLANKS))
    texts = {f.name: f.read_text() for f in (tmp_path / "starter").glob("*.[pm][yd]")}
    for function in BLANKS:
        source = inspect.getsource(module_of(function))
        node = node_of(source, function)
        end = source.splitlines()[node.body[-2:][0].lineno - 1:node.end_lineno]
        assert "\n".join(end) not in "".join(texts.values()), function
    assert not (numbers(LECTURER) - numbers(COURSE)) & numbers(texts["README.md"])
    assert not re.search("LECTURER|MISTAKES|expected: str", texts["test_all.py"])
    exec(texts["backbone.py"], scope := {"__name__": "backbone"})
    with pytest.raises(SystemExit):
        scope["cli"](lambda: scope["corrupt"](0, 0, 0, 0))
    assert capsys.readouterr().err == "error: A1: write corrupt\n"


@slow
@pytest.mark.parametrize("blanks, which", [
    (["loss_unrolled"], "A1: or A2: or A3: or A5: or A6: or unknown_measure or every_module_gets"),
    ([], "test_ and not test_a1_to_a6")])
def test_in_a_copy_what_is_written_passes_and_the_rest_says_what_it_needs(tmp_path, blanks, which):
    """Other tests that need it are skipped. A test with a1 in its name is none of A1."""
    write_starter(tmp_path / "copy", blanks)
    with open(tmp_path / "copy/test_all.py", "a") as f:
        f.write("\n\ndef test_a1_to_a6():\n    assert False\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "500"}
    environment.pop("SLOW", None)
    p = subprocess.run([sys.executable, "-m", "pytest", "-q", "test_all.py", "-k", which],
                       cwd=tmp_path / "copy", env=environment, text=True, capture_output=True)
    failed = re.findall(r"^(?:FAILED|ERROR) test_all.py::(.*?) - (.*)$", p.stdout, re.M)
    missing = [f"test_course[{name}]" for name in CASES if name.split()[1] in blanks]
    assert [name for name, _ in failed] == missing, p.stdout
    assert all("NotImplementedError: A6: write loss_unrolled" in reason for _, reason in failed)
    # without a blank only the two learning runs, which take minutes
    assert re.search(r" [1-9]\d* skipped" if blanks else " 2 skipped", p.stdout)


def test_a_class_is_graded_whatever_it_hands_in(tmp_path):
    """A folder with a loop without end; a zip in which functions exit, one is gone, one file does
    not parse, one is missing, and tests are forged."""
    bad = tmp_path / "class/bad"
    write_copy(bad, {"corrupt": ["while True:", "    pass"], "Updater.cell": ["raise SystemExit"],
                     "MetaState.step": ["import os", "os._exit(0)"]})
    wrong = graded(bad, "A1", 5, dict.fromkeys(CASES), 1, [])
    assert wrong and all("timed out" in text for text in wrong.values())
    text = (bad / "metastate.py").read_text()
    (bad / "metastate.py").write_text(text.replace("def loss_unrolled", "def loss"))
    (bad / "memdlm.py").write_text("def inner_step(:")
    (bad / "sample.py").unlink()
    for file in ("test_all.py", "conftest.py", "torch.py"):
        (bad / file).write_text("import os\nos._exit(0)\n")
    shutil.make_archive(str(bad), "zip", bad)
    shutil.rmtree(bad)
    course(["--grade", str(tmp_path / "class"), "--out", str(tmp_path / "scores.csv")])
    row, = csv.DictReader((tmp_path / "scores.csv").read_text().splitlines())
    assert [row[p] for p in row if p.startswith("A5: ")] == ["60", "0", "0", "60", "0"]
    assert row["student"] == "bad.zip" and row["A5"] == "16" and row["A3"] == "0"
    text = (tmp_path / "scores-texts/bad.zip.txt").read_text()
    for said in ("memdlm.py cannot be read: SyntaxError", "Updater.cell plain: SystemExit",
                 "KeyError: 'loss_unrolled'", "A5: it ended before this case"):
        assert said in text


# 17. Which measurement ----------------------------------------------------------------------------

def by_hand():
    """`python test_all.py --WHAT ...`: the measurements that are no tests."""
    what, *argv = sys.argv[1:] or [""]
    if what == "--bench":
        bench(argv)
    elif what == "--tables":
        tables(argv)
    elif what in ("--slots", "--exposure"):
        measurement([what, *argv])
    elif what == "--help":
        print(__doc__)
    elif what in ("--starter", "--grade"):
        course([what, *argv])
    else:
        raise ValueError("python test_all.py --bench | --tables | --slots, --exposure CHECKPOINT | "
                         "--starter DIR | --grade FOLDER; "
                         "the tests themselves: python -m pytest -q test_all.py")


def test_an_unknown_measurement_is_answered_with_those_there_are(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["test_all.py", "--magic"])
    with pytest.raises(ValueError, match="--bench . --tables"):
        by_hand()


if __name__ == "__main__":
    bb.cli(by_hand)
