"""One bidirectional transformer for the tiny default, LLaDA-8B, Dream-7B and LLaDA-MoE-7B.

Papers: MDLM (arXiv 2406.07524) and LLaDA (2502.09992): the forward process and its loss. MetaState
(2603.01331) and MemDLM (2603.22241) need a backbone that runs slice by slice.
Idea: masked diffusion replaces tokens by [MASK] with probability t and learns to put them back.
The network is a Llama without the causal mask. Both memories work between its layers, so the pass
is cut there: embed -> run(start, stop) -> head. Memory goes in as an argument and comes out as a
value; nothing is stored, nothing is hooked.
Equations: q(x_t | x_0) -> corrupt; the masked loss -> masked_loss
Shapes: B batch, L tokens, V vocabulary, D width, H heads, d head width, N chosen positions, r rank
Convention: logits[:, i] predicts token i in every family. Dream reads that prediction one position
to the left; `head` does so. t = 0 is clean, t = 1 all masked; one t per row.
Holds: padding is never attended to, and positions count from the first real token, so a row gives
the same logits alone and inside any padded batch.
Left out: causal attention, KV caches (the canvas changes), LLaDA2's block mask, dropout but LoRA's.
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
import zlib
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


# 1. Configuration ---------------------------------------------------------------------------------

def option(default, text, low=None, high=math.inf, choices=None, repr=True):
    """A field of a configuration: its default (MISSING: none), --help text, allowed values."""
    metadata = dict(help=text, low=low, high=high, choices=choices)
    return field(default=default, repr=repr, metadata=metadata)


@dataclass
class BackboneConfig:
    """Every option that some checkpoint needs. Defaults: the tiny preset, 0.2 M parameters."""
    family: str = option("tiny", "which format", choices=["tiny", "llada", "dream", "llada_moe"])
    vocab_size: int = option(139, "V, unused rows included; 139: niah.vocabulary()", 2, 10**7)
    d_model: int = option(64, "D", 1, 10**6)
    n_layers: int = option(3, "number of blocks", 1, 10**4)
    n_heads: int = option(2, "H, heads of q", 1, 10**4)
    n_kv_heads: int = option(None, "heads of k and v, a divisor of H; None: H", 1, 10**4)
    head_dim: int = option(None, "d; None: D / H", 2, 10**4)
    d_ff: int = option(192, "inner width of SwiGLU (of one expert in a mixture)", 1, 10**6)
    norm_eps: float = option(1e-5, "added to the mean square in RMSNorm", 0, 1)
    rope_theta: float = option(10000.0, "base of RoPE's wavelengths", 1)
    rope_fp32: bool = option(True, "rotate q and k in fp32 (LLaDA), not in the model's dtype")
    qkv_bias: bool = option(False, "biases on q, k and v (Dream)")
    qk_norm: bool = option(False, "RMSNorm over each head, before RoPE (LLaDA-MoE)")
    n_experts: int = option(0, "0: one SwiGLU; LLaDA-MoE: 64", 0, 10**4)
    experts_per_token: int = option(0, "LLaDA-MoE: 8", 0)
    # Tiny preset only: so small a model learns to look up "key = value" in minutes only if a token
    # sees the one before it, and to bind them with phi only if the layers that hold phi see it, too
    conv_width: int = option(5, "depthwise convolution before attention, 0: none", 0, 999)
    # repr=False: not in the fingerprint of a backbone that a MetaState checkpoint holds
    conv_residual: bool = option(False, "it goes into the residual stream", repr=False)
    ffn_convs: int = option(0, "so many last layers have one before the FFN", 0, 10**4, repr=False)
    shift: bool = option(False, "the prediction for token i is read at position i - 1 (Dream)")
    max_len: int = option(8192, "longest canvas that the model was trained for", 1)
    mask_id: int = option(1, "[MASK]", 0)
    eos_id: int = option(2, "end of text", 0)
    pad_id: int = option(0, "fills up rows, never attended to", 0)
    chat: bool = option(False, "Instruct model: prompts go through the chat template")
    bos_id: int = option(None, "put before the prompt (Dream Base), else None", 0)
    eot_id: int = option(None, "end of turn (Instruct models), else None", 0)
    extra_stop_ids: tuple = option((), "further ids that end an answer", 0, repr=False)

    def __post_init__(self):
        """Relations between fields only; check_value looks at each field alone."""
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.head_dim = self.head_dim or self.d_model // self.n_heads
        H, G, k, E = self.n_heads, self.n_kv_heads, self.experts_per_token, self.n_experts
        if H % G:
            raise ValueError(f"n_heads={H} is not a multiple of n_kv_heads={G}")
        if self.head_dim % 2 or not self.head_dim:
            raise ValueError(f"head_dim={self.head_dim}: RoPE needs two equal halves")
        if self.conv_width and not self.conv_width % 2:
            raise ValueError(f"conv_width={self.conv_width} is even, and so it has no middle")
        if self.ffn_convs > self.n_layers * bool(self.conv_width):
            raise ValueError(f"ffn_convs={self.ffn_convs} is more than the layers with convolution")
        if not (E > 0) <= k <= E:
            raise ValueError(f"experts_per_token={k} does not fit n_experts={E}")
        ids = dict(mask_id=self.mask_id, pad_id=self.pad_id, eos_id=self.eos_id)
        for name, i in [*ids.items(), *(("extra_stop_ids", i) for i in self.extra_stop_ids)]:
            if i >= self.vocab_size:
                raise ValueError(f"{name}={i} lies outside the vocabulary of {self.vocab_size}")

    @property
    def stop_ids(self):
        return [i for i in (self.eos_id, self.eot_id, *self.extra_stop_ids) if i is not None]


class LowRank(NamedTuple):
    """A low-rank change of one weight matrix, W + scale * B A (LoRA, arXiv 2106.09685). With a
    batch dimension each row has its own: MemDLM's fast weights phi."""
    A: torch.Tensor  # (r, d_in) or (B, r, d_in)
    B: torch.Tensor  # (d_out, r) or (B, d_out, r)
    scale: float  # alpha / r

    def map(self, f):
        return self._replace(A=f(self.A), B=f(self.B))


class Context(NamedTuple):
    """What every layer must know about the canvas; computed once per forward pass."""
    cos: torch.Tensor  # (1 or B, 1, L, d) fp32
    sin: torch.Tensor  # (1 or B, 1, L, d) fp32
    attend: torch.Tensor | None  # (B, L) bool, False = padding; None when nothing is padded
    source: torch.Tensor | None  # (B, L) where the prediction for token i is read; None: at i
    twice: bool = False  # attention must have a second derivative, which fast kernels have not


# --------------------------------------------------------------------------------------------------
# 2. Layers. The order of casts is that of the published models: bf16 results can be compared.

class Linear(nn.Linear):
    """y = W x, plus a LoRA of its own (trained by the outer loop), plus a fast weight passed in."""
    lora_rank = 0  # no adapter until add_lora

    def forward(self, x, fast=None):  # x (..., d_in); with fast: (B, L, d_in)
        y = F.linear(x, self.weight, self.bias)
        if self.lora_rank:
            low = F.dropout(x.to(self.lora_A.dtype), self.lora_dropout, self.training)
            low = F.linear(F.linear(low, self.lora_A), self.lora_B)
            y = (y + self.lora_alpha / self.lora_rank * low).to(y.dtype)  # rounded once, as in PEFT
        if fast is not None:
            low = x.to(fast.A.dtype) @ fast.A.mT @ fast.B.mT  # (B, L, d_out)
            y = (y + fast.scale * low).to(y.dtype)
        return y

    def add_lora(self, rank, alpha, generator=None, dropout=0.0):
        """B = 0: nothing changes until it is trained. fp32, whatever the dtype of the frozen W."""
        self.lora_rank, self.lora_alpha, self.lora_dropout = rank, alpha, dropout
        # Kaiming-uniform with a = sqrt(5), as in PEFT; drawn on the CPU: the same for every device
        bound = 1 / math.sqrt(self.in_features)
        A = torch.empty(rank, self.in_features, device="meta" if self.weight.is_meta else "cpu")
        A.uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(A.to(self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=self.weight.device))


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), the mean over the last dimension."""
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)  # cast first: the other order differs in bf16


def rotate(x, cos, sin, fp32):  # x (B, H, L, d)
    """RoPE, half-split layout (arXiv 2104.09864): with x = (a, b) in halves, position p and angles
    p * theta^(-2 i / d), the result is (a cos - b sin, b cos + a sin)."""
    kind = x.dtype
    x = x.float() if fp32 else x
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(kind)


class Attention(nn.Module):
    """y = W_o softmax(q k^T / sqrt(d)) v, over all tokens that are no padding: no causal mask."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.q = Linear(cfg.d_model, cfg.n_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.k = Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.v = Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.o = Linear(cfg.n_heads * cfg.head_dim, cfg.d_model, bias=False)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)
            self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)

    def forward(self, x, ctx):  # (B, L, D)
        cfg, (B, L, _) = self.cfg, x.shape
        q, k, v = (f(x).view(B, L, -1, cfg.head_dim) for f in (self.q, self.k, self.v))
        if cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, L, d)
        q, k = (rotate(x, ctx.cos, ctx.sin, cfg.rope_fp32) for x in (q, k))
        if cfg.n_kv_heads < cfg.n_heads:  # each serves n_heads / n_kv_heads heads of q in a row
            k, v = (x.repeat_interleave(cfg.n_heads // cfg.n_kv_heads, dim=1) for x in (k, v))
        mask = None if ctx.attend is None else ctx.attend[:, None, None]  # (B, 1, 1, L)
        with sdpa_kernel(SDPBackend.MATH) if ctx.twice else nullcontext():
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(y.transpose(1, 2).reshape(B, L, -1))


class FFN(nn.Module):
    """SwiGLU: y = W_down (silu(W_gate x) * W_up x), silu(z) = z * sigmoid(z). `phi`: fast weights
    by the full name of the matrix; None, or a name that is absent, changes nothing."""
    def __init__(self, d_model, d_ff):
        super().__init__()
        self.gate = Linear(d_model, d_ff, bias=False)
        self.up = Linear(d_model, d_ff, bias=False)
        self.down = Linear(d_ff, d_model, bias=False)

    def forward(self, x, phi=None, name=""):
        phi = phi or {}
        gate = F.silu(self.gate(x, phi.get(name + "gate")))
        return self.down(gate * self.up(x, phi.get(name + "up")), phi.get(name + "down"))


class MixtureFFN(nn.Module):
    """LLaDA-MoE: y = sum over the k best experts e of p_e FFN_e(x), p = softmax(W_router x) in fp32
    over all experts; the chosen p_e are NOT renormalised."""
    def __init__(self, cfg):
        super().__init__()
        self.top = cfg.experts_per_token
        self.router = Linear(cfg.d_model, cfg.n_experts, bias=False)
        self.experts = nn.ModuleList(FFN(cfg.d_model, cfg.d_ff) for _ in range(cfg.n_experts))

    def forward(self, x, phi=None, name=""):  # (B, L, D)
        if phi and len(x) > 1:  # an expert sees tokens of all rows, but each row has its own phi
            own = [{k: w.map(lambda z: z[b:b + 1]) for k, w in phi.items()} for b in range(len(x))]
            return torch.cat([self(x[b:b + 1], own[b], name) for b in range(len(x))])
        flat = x.reshape(-1, x.shape[-1])  # (B L, D)
        probs = F.softmax(self.router(flat), dim=-1, dtype=torch.float32)  # (B L, experts)
        weight, chosen = probs.topk(self.top, dim=-1)
        weight = weight.to(x.dtype)
        y = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):  # in index order: rounding depends on it
            token, rank = torch.where(chosen == e)
            out = expert(flat[token][None], phi, f"{name}experts.{e}.")[0]
            y = y.index_add(0, token, out * weight[token, rank, None])
        return y.view_as(x)


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.attn_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attn = Attention(cfg)
        self.ffn_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.ffn = MixtureFFN(cfg) if cfg.n_experts else FFN(cfg.d_model, cfg.d_ff)
        if cfg.conv_width:
            self.conv = nn.Parameter(torch.zeros(cfg.conv_width, cfg.d_model))
        self.ffn_conv = None  # until Backbone.add_ffn_convs

    def forward(self, h, ctx, phi=None, name=""):  # (B, L, D)
        x = self.attn_norm(h)
        if self.cfg.conv_width:
            near = neighbours(x, self.conv, ctx.attend)
            if self.cfg.conv_residual:
                h = h + near
                x = self.attn_norm(h)
            else:
                x = x + near
        h = h + self.attn(x, ctx)
        x = self.ffn_norm(h)
        if self.ffn_conv is not None:
            x = x + neighbours(x, self.ffn_conv, ctx.attend)
        return h + self.ffn(x, phi, name + "ffn.")


def neighbours(x, conv, attend):
    """y[i] = sum_j conv[j] * x[i + j - width // 2], with zeros for padding and beyond the ends.
    x (B, L, D), conv (width, D), attend (B, L) bool or None."""
    x = x if attend is None else x * attend[..., None]
    return F.conv1d(x.mT, conv.mT[:, None], padding="same", groups=x.shape[-1]).mT


# 3. The backbone and its seam: embed, run a slice of layers, head ---------------------------------

class Backbone(nn.Module):
    """`backbone(ids, attend=None) -> logits (B, L, V)`; context, embed, run, head are its pieces.
    at (B, L) bool: the positions where logits are wanted, then (N, V) in row-major order. At a
    vocabulary of 126,464 the head is the largest matrix, and most positions are never looked at."""
    def __init__(self, cfg: BackboneConfig):
        super().__init__()
        self.cfg = cfg
        self.checkpointing = False  # True: keep one activation per layer, recompute the rest
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.lm_head = Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.add_ffn_convs(cfg.ffn_convs)

    def context(self, ids, attend=None):
        """ids (B, L); attend (B, L) bool, False = padding, wherever it stands. Once per canvas."""
        cfg = self.cfg
        index = positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, L)
        attend = None if attend is None or attend.bool().all() else attend.bool()
        if attend is not None:  # counted from the first real token
            positions = (attend.long().cumsum(1) - 1).clamp(min=0)  # (B, L)
        # angles p * theta^(-2 i / d) in fp32: no buffer, which .to(bfloat16) would cast
        even = torch.arange(0, cfg.head_dim, 2, device=ids.device).float()
        angles = positions[..., None].float() * (1.0 / cfg.rope_theta ** (even / cfg.head_dim))
        angles = torch.cat([angles, angles], dim=-1)[:, None]  # (1 or B, 1, L, d)
        # the first real token has none before it and is read at its own position
        source = (index - (positions > 0).long()).expand(ids.shape) if cfg.shift else None
        return Context(angles.cos(), angles.sin(), attend, source)

    def embed(self, ids):
        return self.embed_tokens(ids)  # (B, L, D)

    def run(self, h, ctx, start=0, stop=None, phi=None):
        """Layers start .. stop - 1 on h (B, L, D). phi: fast weights by name, or None."""
        for i in range(start, self.cfg.n_layers if stop is None else stop):
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(self.layers[i], h, ctx, phi, f"layers.{i}.", use_reentrant=False)
            else:
                h = self.layers[i](h, ctx, phi, f"layers.{i}.")
        return h

    def head(self, h, ctx, at=None):
        if ctx.source is not None:
            h = h.gather(1, ctx.source[..., None].expand_as(h))
        return self.lm_head(self.norm(h if at is None else h[at]))

    def forward(self, ids, attend=None, at=None, phi=None):
        ctx = self.context(ids, attend)
        return self.head(self.run(self.embed(ids), ctx, phi=phi), ctx, at)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """For training from noise. Output projections are zero: a block starts out as nothing."""
        for name, p in self.named_parameters():
            if name.endswith(("attn.o.weight", "ffn.down.weight")):
                p.zero_()
            elif name.endswith("conv"):
                # what the FFN hears of neighbours must be loud beside a token's own embedding
                bound = (4 if self.cfg.conv_residual or "ffn" in name else 1) * len(p) ** -0.5
                p.uniform_(-bound, bound, generator=generator)
            elif "embed" in name:
                p.normal_(0, 0.5, generator=generator)
            elif p.ndim == 2:
                p.normal_(0, p.shape[1] ** -0.5, generator=generator)
        return self

    def add_lora(self, rank=32, alpha=64, seed=0, dropout=0.0):
        """Freeze all, then put a trainable LoRA on all linear layers but the head (MemDLM, 4.1)."""
        linear = [m for n, m in self.named_modules() if isinstance(m, Linear) and n != "lm_head"]
        if any(module.lora_rank for module in linear):
            raise ValueError("the model carries an adapter already")
        generator = torch.Generator().manual_seed(seed)
        self.requires_grad_(False)
        for module in linear:
            module.add_lora(rank, alpha, generator, dropout)
        return self

    def add_ffn_convs(self, layers, generator=None):
        """A convolution before the FFN of the last layers, for phi to see a token's neighbours."""
        self.cfg.ffn_convs = layers
        for layer in self.layers[self.cfg.n_layers - layers:]:
            conv = torch.empty(self.cfg.conv_width, self.cfg.d_model)
            bound = 4 * len(conv) ** -0.5  # as in init_weights
            conv.uniform_(-bound, bound, generator=generator)
            layer.ffn_conv = nn.Parameter(conv.to(self.device, self.dtype))

    device = property(lambda self: self.embed_tokens.weight.device)
    dtype = property(lambda self: self.embed_tokens.weight.dtype)


# 4. The forward process and the loss --------------------------------------------------------------

def corrupt(x0, t, given, mask_id, u=None, generator=None):
    """The forward process q(x_t | x_0) of MDLM and LLaDA.
    x0 (B, L) long; t (B,) in [0, 1]; given (B, L) bool, True = prompt or padding, never masked.
    u (B, L) uniform: the same u at a larger t masks a superset, so nested states can be made.
    Returns xt (B, L) and masked (B, L) bool: t = 1 masks all that is not given, t = 0 nothing."""
    if u is None:
        device = x0.device if generator is None else generator.device
        u = torch.rand(x0.shape, generator=generator, device=device)
    # q(x_t^i | x_0^i): [MASK] with probability t, x_0^i with probability 1 - t, each i alone
    masked = (u.to(x0.device) < t.to(x0.device)[:, None]) & ~given
    return x0.masked_fill(masked, mask_id), masked


def sample_t(batch, eps=1e-3, generator=None):
    """One t ~ U(eps, 1) per row; LLaDA and MDLM: eps = 1e-3 keeps 1/t finite."""
    return eps + (1 - eps) * torch.rand(batch, generator=generator)


def masked_loss(logits, x0, masked, weight, n_maskable):
    """The loss of masked diffusion. logits (N, V) at the masked positions in row-major order.
    weight (B,): w(t) = 1/t gives the bound on the likelihood; w = 1 the uniform loss of the tiny
    preset, which learns faster, because 1/t spends its gradient on rows with almost nothing masked.
    n_maskable: of the whole batch, all micro-batches and ranks, so that splitting it is exact."""
    # L = - 1 / n_maskable * sum over rows of w(t) sum_{i: x_t^i = [MASK]} log p_theta(x_0^i | x_t)
    ce = F.cross_entropy(logits.float(), x0[masked], reduction="none")  # (N,)
    return (ce * weight.to(ce)[masked.nonzero()[:, 0]]).sum() / n_maskable


def smallest(u, count):
    """(B, L) bool: the count[b] smallest entries of row b. u (B, L), count (B,)."""
    rank = u.argsort(1).argsort(1)  # the second argsort turns an order into ranks
    return rank < count[:, None]


def answer_start(given):
    """Index of the first answer token: the first column that is not given in every row."""
    return int(given.all(0).long().cumprod(0).sum())


# ==================================================================================================
# Below: flags, files, official checkpoints, tokenizers; not needed to follow the papers.
# ==================================================================================================
# 5. Command lines and settings: fields of a configuration, flags and entries of files, all alike.

ITEMS = {list: str, tuple: int}  # what a list in a configuration holds


def check_value(rule, value, name):
    """`value` as the dataclass field `rule` holds it. ValueError about `name` if it may not be."""
    if value is None and rule.default is None:
        return None
    kind, many = ITEMS.get(rule.type, rule.type), rule.type in ITEMS
    low, high, choices = (rule.metadata[key] for key in ("low", "high", "choices"))
    if many and not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list, not {value!r:.80}")
    for v in value if many else [value]:
        if type(v) is not kind and not (kind is float and type(v) is int):
            raise ValueError(f"{name} must be {kind.__name__}, not {v!r:.80}")
        if choices and v not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {v!r:.80}")
        if kind is float and not abs(v) < math.inf:
            raise ValueError(f"{name} must be a finite number, not {v}")
        if low is not None and not low <= v <= high:
            most = "" if high == math.inf else f" and at most {high}"
            raise ValueError(f"{name} must be at least {low}{most}, not {v}")
    return tuple(value) if rule.type is tuple else value


def validate(config, where="--"):
    """A dataclass, all its fields checked. ValueError names the first wrong one after `where`."""
    for rule in fields(config):
        check_value(rule, getattr(config, rule.name), where + rule.name)
    return config


def config_from_dict(cls, raw, where, entry_names=None):
    """A JSON object -> a checked dataclass. ValueError names the file, `where`, and the entry that
    is unknown, missing or wrong (entry_names: {field: its name in the file}, where they differ)."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected an object, found {type(raw).__name__}")
    rules = {rule.name: rule for rule in fields(cls)}
    values = {}
    for name in [*raw, *rules]:
        entry = f"{where}: {(entry_names or {}).get(name, name)}"
        if name not in rules:
            raise ValueError(f"{entry} is an unknown entry; known: {', '.join(rules)}")
        if name in raw:
            values[name] = check_value(rules[name], raw[name], entry)
        elif rules[name].default is MISSING:
            raise ValueError(f"{entry} is missing")
    try:
        return cls(**values)
    except ValueError as e:  # from __post_init__: entries that do not fit each other
        raise ValueError(f"{where}: {e}") from None


def add_flags(parser, cls, defaults=True):
    """A flag for every field of a dataclass. defaults=False: None where a flag is not given."""
    for rule in fields(cls):
        text = rule.metadata["help"].replace("%", "%%")
        default = rule.default if defaults else None
        more = dict(type=ITEMS.get(rule.type, rule.type), choices=rule.metadata["choices"])
        if rule.type in ITEMS:
            more.update(nargs="+", metavar=rule.name.upper())
        if rule.type is bool:
            more = dict(action=argparse.BooleanOptionalAction)
        elif default is not None:
            text += f" (default: {default})"
        parser.add_argument(f"--{rule.name}", help=text, default=default, **more)


def given_flags(cls, args):
    """{field: value} of the flags of a dataclass that are not None, each checked."""
    given = [rule for rule in fields(cls) if getattr(args, rule.name) is not None]
    return {r.name: check_value(r, getattr(args, r.name), f"--{r.name}") for r in given}


def cli(main):
    """Run main(); bad input ends as one line on stderr and exit code 2, not as a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # Windows' code pages lack most characters
            stream.reconfigure(errors="replace")
    try:
        return main()
    except (ValueError, OSError) as e:
        message, code = f"error: {e}", 2
    except KeyboardInterrupt:
        message, code = "interrupted (a training run goes on with --resume)", 130
    for bar in list(tqdm._instances):  # an open progress bar has not ended its line
        bar.close()
    print(message, file=sys.stderr)
    sys.exit(code)


# --------------------------------------------------------------------------------------------------
# 6. Loading a model. Official files are read as data: no code from a checkpoint is ever executed.
# The path: load_backbone finds the files; config_from_json turns config.json into a BackboneConfig;
# official_name says under which key a file holds our tensor; load_weights puts it into its place.

def load_backbone(name_or_path, device=None, dtype=None, chat=None):
    """"tiny" (new, from torch's seed), a folder of train.py, an official checkpoint (hub name or
    folder) or a PEFT adapter -> Backbone in eval mode. FileNotFoundError or ValueError if it fails.
    dtype: None keeps the files'. chat: prompts in a template? None: as saved, else guess_chat."""
    device = default_device(device)
    if name_or_path == "tiny":
        return Backbone(BackboneConfig()).init_weights().to(device, dtype).eval()
    folder = find_folder(name_or_path)
    if (folder / "adapter_config.json").exists():
        if chat is None:
            saved = (open_shard(folder / "adapter_model.safetensors").metadata() or {}).get("chat")
            chat = saved == "True" if saved else guess_chat(name_or_path, folder)[0] or None
        return load_adapter(load_backbone(adapter_base(folder), device, dtype, chat), folder)
    raw = read_json(folder / "config.json")
    cfg = config_from_json(raw, folder / "config.json")
    why = "as asked for or saved"
    if chat is None and "backbone" not in raw:
        chat, why = guess_chat(name_or_path, folder)
    cfg.chat = cfg.chat if chat is None else chat
    if cfg.family != "tiny" and os.environ.get("RANK", "0") == "0":
        print(f"{name_or_path}: chat template {'on' if cfg.chat else 'off'} ({why}; --[no-]chat)")
    with torch.device("meta"):
        model = Backbone(cfg)
    names = {official_name(n, cfg.family): n for n, _ in model.named_parameters()}
    shards = [open_shard(folder / file, device) for file in shard_files(folder)]
    return load_weights(model, names, shards, folder, dtype).eval()


# By `architectures`, for LLaDA-MoE calls itself model_type "llada". None: written by save_backbone.
FAMILIES = {"Backbone": None, "LLaDAModelLM": "llada", "DreamModel": "dream",
            "LLaDAMoEModelLM": "llada_moe"}

# What a family's checkpoints share, and special ids that their config.json does not reliably hold.
FIXED = {"llada": dict(mask_id=126336, eos_id=126081, eot_id=126348),
         "dream": dict(mask_id=151666, eos_id=151643, eot_id=151645, bos_id=151665, shift=True,
                       qkv_bias=True, rope_fp32=False),
         "llada_moe": dict(mask_id=156895, eos_id=156892, rope_fp32=False)}

# Entry of config.json -> our field; of two entries for one the later counts, unless it is null.
ALL_ENTRIES = dict(vocab_size="vocab_size", rms_norm_eps="norm_eps", rope_theta="rope_theta",
                   head_dim="head_dim", mask_token_id="mask_id", eos_token_id="eos_id")
QWEN_ENTRIES = dict(ALL_ENTRIES, hidden_size="d_model", num_hidden_layers="n_layers",
                    num_attention_heads="n_heads", num_key_value_heads="n_kv_heads",
                    max_position_embeddings="max_len")
ENTRIES = {
    "llada": dict(ALL_ENTRIES, embedding_size="vocab_size", d_model="d_model", n_layers="n_layers",
                  n_heads="n_heads", n_kv_heads="n_kv_heads", mlp_hidden_size="d_ff",
                  rope_full_precision="rope_fp32", max_sequence_length="max_len"),
    "dream": dict(QWEN_ENTRIES, intermediate_size="d_ff"),
    "llada_moe": dict(QWEN_ENTRIES, expert_intermediate_size="d_ff", num_experts="n_experts",
                      num_experts_per_tok="experts_per_token", qk_layernorm="qk_norm")}

# Entries that change the arithmetic in ways that this file does not implement: any other value is
# refused. A missing entry means this value, and null the same as false.
REQUIRED = dict(
    dict.fromkeys("""quantization_config alibi weight_tying scale_logits input_emb_norm include_bias
        include_qkv_bias attention_layer_norm bias_for_layer_norm multi_query_attention clip_qkv
        attention_bias use_sliding_window use_mrope shared_expert_intermediate_size
        moe_router_enable_expert_bias""".split(), False),
    block_type="llama", activation_type="silu", hidden_act="silu", layer_norm_type="rms",
    rope=True, partial_rotary_factor=1.0, routed_scaling_factor=1.0)
PLAIN_ROPE = dict(rope_type="default", type="default", partial_rotary_factor=1.0)


def family_of(raw, where):
    """The family that a config.json names; None: written by save_backbone."""
    names = raw.get("architectures")
    if not isinstance(names, list) or not names:
        raise ValueError(f"{where}: architectures must be a list of one name, not {names!r:.80}")
    if names[0] not in list(FAMILIES):  # names[0] may be a list, which no dict can look up
        raise ValueError(f"{where}: {names[0]!r:.80} is not supported, but {', '.join(FAMILIES)}")
    return FAMILIES[names[0]]


def refuse_unsupported(raw, required, where):
    """ValueError names an entry of `raw` that is not as in `required` (a list: one of these)."""
    for key, value in required.items():
        allowed = value if isinstance(value, list) else [value]
        if key in raw and raw[key] not in allowed and (raw[key] or value):
            raise ValueError(f"{where}: {key} = {raw[key]!r:.80} is not supported (only {value!r})")


def config_from_json(raw, where="config.json"):
    """config.json, official or ours -> BackboneConfig. ValueError names the entry to blame."""
    family = family_of(raw, where)
    if family is None:
        return config_from_dict(BackboneConfig, raw.get("backbone"), f"{where}: backbone")
    tied = {} if family == "llada" else dict(tie_word_embeddings=False)  # LLaDA's is weight_tying
    refuse_unsupported(raw, {**REQUIRED, **tied}, where)
    raw = {entry: value for entry, value in raw.items() if value is not None}
    for entry in ("rope_scaling", "rope_parameters"):  # transformers 5 writes the second
        rope = raw.get(entry, {})
        rope = rope if isinstance(rope, dict) else {"": rope}
        raw["rope_theta"] = raw.get("rope_theta") or rope.get("rope_theta")
        plain = dict(PLAIN_ROPE, rope_theta=raw["rope_theta"])
        if any(rope[key] != plain.get(key) for key in rope):
            raise ValueError(f"{where}: {entry} = {raw[entry]!r:.150} is not supported")
    values = dict(FIXED[family], family=family, conv_width=0)
    if isinstance(raw.get("eos_token_id"), list) and raw["eos_token_id"]:  # each ends an answer
        raw["eos_token_id"], *values["extra_stop_ids"] = raw["eos_token_id"]
    width, ratio = raw.get("d_model"), raw.get("mlp_ratio", 4)
    if type(width) is type(ratio) is int:  # LLaDA's own rule
        raw.setdefault("mlp_hidden_size", ratio * width)
    values.update({name: raw[entry] for entry, name in ENTRIES[family].items() if entry in raw})
    entry_names = {name: entry for entry, name in ENTRIES[family].items()}
    for name in entry_names.keys() - {"n_kv_heads", "head_dim", "rope_fp32"} - values.keys():
        raise ValueError(f"{where}: a {family} config needs the entry {entry_names[name]}")
    values["pad_id"] = values["eos_id"]
    entry_names["extra_stop_ids"] = "eos_token_id"
    cfg = config_from_dict(BackboneConfig, values, where, entry_names)
    for name in ("bos_id", "eot_id"):  # the family's own; a small test model lacks them
        if (getattr(cfg, name) or 0) >= cfg.vocab_size:
            setattr(cfg, name, None)
    if raw.get("moe_layer_freq", 1) not in (1, [1] * cfg.n_layers):
        raise ValueError(f"{where}: moe_layer_freq: only ones are supported")
    return cfg


# Our names of tensors -> the checkpoint's: regular expressions, applied from left to right. LLaDA:
# layers.0.ffn.gate -> model.transformer.blocks.0.ff_proj   embed_tokens -> model.transformer.wte
# layers.0.ffn.down -> model.transformer.blocks.0.ff_out    norm         -> model.transformer.ln_f
# layers.0.attn.o   -> model.transformer.blocks.0.attn_out  lm_head      -> model.transformer.ff_out
QWEN_NAMES = [(r"attn_norm", "input_layernorm"), (r"ffn_norm", "post_attention_layernorm"),
              (r"attn\.([qkvo])\b", r"attn.\1_proj"), (r"\b(gate|up|down)\b", r"\1_proj"),
              (r"\battn\.", "self_attn."), (r"ffn\.router", "mlp.gate"), (r"\bffn\.", "mlp."),
              (r"^(?!lm_head)", "model.")]
NAMES = {
    "llada": [(r"\b(lm_head|ffn\.down)\b", "ff_out"), (r"ffn\.gate", "ff_proj"),
              (r"ffn\.up", "up_proj"), (r"ffn_norm", "ff_norm"), (r"attn\.o\b", "attn_out"),
              (r"attn\.([qkv])\b", r"\1_proj"), (r"^norm", "ln_f"), (r"^embed_tokens", "wte"),
              (r"^layers", "blocks"), (r"^", "model.transformer.")],
    "dream": QWEN_NAMES, "llada_moe": QWEN_NAMES, "tiny": []}


def official_name(name, family):
    """The checkpoint's name of our parameter or module."""
    for ours, theirs in NAMES[family]:
        name = re.sub(ours, theirs, name)
    return name


def load_weights(model, names, shards, where, dtype=None):
    """Fill parameters, also on `meta`; names: {key in the files: parameter}. dtype=None: as in the
    files (on the CPU: views of the mapped files). ValueError names what does not fit before any
    weight is read, then NaN or infinity in files without a checksum of ours."""
    home = {key: shard for shard in shards for key in shard.keys()}
    problems = [f"missing {key}" for key in sorted(names.keys() - home.keys())]
    problems += [f"unexpected {key}" for key in sorted(home.keys() - names.keys())]
    kinds = {"F64", "F32", "F16", "BF16"}
    for key in sorted(names.keys() & home.keys()):
        found, expected = home[key].get_slice(key), list(model.get_parameter(names[key]).shape)
        shape, kind = found.get_shape(), found.get_dtype()
        if shape != expected:
            problems.append(f"{key} has shape {shape}, expected {expected}")
        if kind not in kinds:
            problems.append(f"{key} is {kind}, not {' or '.join(sorted(kinds))} "
                            f"(quantized? Or mixed: then choose one with dtype=, --dtype)")
        elif dtype is None:  # the first tensor decides for the rest
            kinds = {kind}
    if problems:
        raise ValueError(f"{where}: the weights do not fit the {model.cfg.family} config "
                         f"({len(problems)} problems): {'; '.join(problems[:5])}")
    for key, shard in tqdm(home.items(), f"loading {len(shards)} files", disable=len(shards) == 1):
        value = shard.get_tensor(key).to(dtype)
        trusted = "crc32" in (shard.metadata() or {})
        # aminmax passes on NaN, in one pass and without a copy
        if not trusted and not torch.stack(value.aminmax()).isfinite().all():
            raise ValueError(f"{where}: {key} holds NaN or infinity")
        module, _, attribute = names[key].rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(value, requires_grad=False))
    return model


def save_backbone(model, folder, tokenizer=None):
    """The tokenizer, model.safetensors and config.json in our own layout, for load_backbone. Each
    file is replaced in one move, config.json last: a folder that has it is complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        with tempfile.TemporaryDirectory(dir=folder, prefix="tokenizer.part") as part:
            tokenizer.save_pretrained(part)
            for name in os.listdir(part):
                os.replace(Path(part) / name, folder / name)
    tensors = {official_name(n, model.cfg.family): p for n, p in model.named_parameters()}
    save_tensors(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", {
        "architectures": ["Backbone"], "backbone": asdict(model.cfg),
        "vocabulary": tokenizer and vocabulary_hash(tokenizer)})


# 7. Files: found, read with their checksums, replaced whole ---------------------------------------

def default_device(wanted=None):
    """`wanted` if it can be used here (else ValueError), by default the fastest there is."""
    if wanted is None:
        slow = "mps" if torch.backends.mps.is_available() else "cpu"
        return "cuda" if torch.cuda.is_available() else slow
    try:
        torch.zeros(1, device=wanted).item()  # fails on `meta`, where nothing can be computed
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"device {wanted!r} cannot be used here ({e!r:.70}); cpu always can")
    return wanted


def find_folder(name_or_path, weights=True):
    """A folder as it is, a hub name through huggingface_hub; weights=False: without the weights."""
    name = str(name_or_path)
    if name and Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or not re.fullmatch(r"(?!\.|runs/)[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError(f"no checkpoint folder at {name}")
    from huggingface_hub import snapshot_download
    files = ["*.json", "*.jinja", "merges.txt"] + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as e:  # its own errors are many
        raise FileNotFoundError(f"{name}: no folder, nor fetched from the hub ({e!r:.200})") from e


def read_json(path):
    """The JSON object in a file. ValueError if it holds something else or was damaged."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold an object, not a {type(raw).__name__}")
    return raw


def read_lines(path, read, most=None):
    """[read(value, bytes) for each line] of a JSONL file, or of its first `most` lines; empty lines
    are skipped. ValueError, also read's own, names file and line."""
    found = []
    with open(path, "rb") as f:
        start = f.peek(9).lstrip(b"\xef\xbb\xbf \r\n")
        kinds = {b"[": "json, an array", b"\x1f\x8b": "json, gzip", b"PAR1": "parquet"}
        for kind in [kinds[first] for first in kinds if start.startswith(first)]:
            raise ValueError(f"{path} is no JSON Lines ({kind}). This converts it: python -c \""
                             f"import datasets; datasets.load_dataset('{kind.split(',')[0]}', "
                             f"data_files='{path}', split='train').to_json('new.jsonl')\"")
        for number, line in enumerate(itertools.islice(f, most), 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # Windows' BOM
                if text.strip():
                    found.append(read(json.loads(text), len(line)))
            except (ValueError, RecursionError) as e:
                what = "" if type(e) is ValueError else "not valid JSON: "
                raise ValueError(f"{path}, line {number}: {what}{e}") from None
    if not found:
        raise ValueError(f"{path} is empty")
    return found


def write_json(path, raw):
    write_atomically(path, lambda part: Path(part).write_text(json.dumps(raw, indent=1)))


def write_atomically(path, write):
    """Whoever reads, is killed here or finds the disk full sees the old file or the new one."""
    part = f"{path}.part"
    try:
        write(part)
        with open(part, "r+b") as f:  # Windows flushes no file that is open for reading only
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException as e:  # also Ctrl-C; torch and safetensors have errors of their own
        Path(part).unlink(missing_ok=True)
        if not isinstance(e, Exception):
            raise
        raise OSError(f"{path} could not be written ({e!r:.200}); what was there before is intact. "
                      f"Disk full? Make room and go on with --resume") from e


def shard_files(folder):
    """The names of a checkpoint's weight files. ValueError if its index is not one."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    weight_map = read_json(index).get("weight_map") if index.exists() else {"": single.name}
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: weight_map must be an object, not {weight_map!r:.80}")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index}: weight_map names {file!r:.80}, which is no file here")
    if single.exists() and single.name not in weight_map.values():
        raise ValueError(f"{index} and {single} are two sets of weights: delete the older one")
    return sorted(set(weight_map.values()))


def open_shard(path, device="cpu"):
    """A safetensors file, opened. ValueError if it is cut short or, where it is ours, changed."""
    from safetensors import SafetensorError, safe_open
    try:
        shard = safe_open(str(path), framework="pt", device=str(device))
        expected = (shard.metadata() or {}).get("crc32")
        if expected and expected != checksum(shard.keys(), shard.get_tensor):
            raise ValueError("its checksum does not match")
        return shard
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"{path} cannot be read ({e}): truncated or corrupted? Get it anew") from e


def save_tensors(tensors, path, **more):
    """{name: tensor} -> a safetensors file; its header holds the checksum and `more` (texts)."""
    from safetensors.torch import save_file
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    metadata = {"crc32": checksum(tensors, tensors.get), **more}
    write_atomically(path, lambda part: save_file(tensors, part, metadata=metadata))


def checksum(names, get):
    """CRC-32 of names and bytes, one tensor get(name) at a time; the format has none of its own."""
    crc = 0
    for name in sorted(names):
        data = get(name).cpu().reshape(-1).view(torch.uint8).numpy()
        crc = zlib.crc32(data, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


# 8. Adapters in PEFT's format ---------------------------------------------------------------------

# As REQUIRED. Other initial values (pissa, olora, ...) change the base: PEFT can convert those.
ADAPTER_REQUIRED = dict(dict.fromkeys(
    """use_dora use_rslora rank_pattern alpha_pattern modules_to_save fan_in_fan_out lora_bias
    layer_replication target_parameters trainable_token_indices alora_invocation_tokens arrow_config
    kasa_config monteclora_config velora_config use_bdlora use_qalora""".split()),
    peft_type="LORA", bias=["none", None], revision=[None, "main"],
    init_lora_weights=[True, False, None, "gaussian", "eva", "orthogonal", "mica"])


@dataclass
class AdapterConfig:
    """The entries of adapter_config.json that are used here."""
    base_model_name_or_path: str = option(MISSING, "hub name or folder of the backbone")
    r: int = option(MISSING, "rank", 1)
    lora_alpha: float = option(MISSING, "the change is alpha / r * B A", 1e-6)
    lora_dropout: float = option(0.0, "on the input of A, in training", 0, 1)


def adapter_config(folder):
    """The AdapterConfig of a folder. ValueError names the entry that is wrong or not supported."""
    path = Path(folder) / "adapter_config.json"
    raw = read_json(path)
    refuse_unsupported(raw, ADAPTER_REQUIRED, path)
    used = {f.name: raw[f.name] for f in fields(AdapterConfig) if f.name in raw}
    return config_from_dict(AdapterConfig, used, path)


def adapter_base(folder):
    """Hub name or folder of an adapter's model. ValueError if that is an adapter again."""
    base = adapter_config(folder).base_model_name_or_path
    if (find_folder(base, weights=False) / "adapter_config.json").exists():
        raise ValueError(f"{folder}/adapter_config.json: its base {base} is an adapter too")
    return base


def save_adapter(model, folder, base):
    """adapter_config.json, adapter_model.safetensors; PEFT's key names for the official class."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    adapted = {official_name(n, model.cfg.family): m for n, m in model.named_modules()
               if isinstance(m, Linear) and m.lora_rank}
    tensors = {f"base_model.model.{n}.lora_{x}.weight": getattr(m, f"lora_{x}")
               for n, m in adapted.items() for x in "AB"}
    first = next(iter(adapted.values()))
    # full names: by its last name alone, LLaDA's head (also "ff_out") would be adapted too
    names = sorted({re.sub(r"\d+", r"\\d+", name.replace(".", r"\.")) for name in adapted})
    config = dict(peft_type="LORA", task_type=None, base_model_name_or_path=str(base),
                  r=first.lora_rank, lora_alpha=first.lora_alpha, lora_dropout=first.lora_dropout,
                  bias="none", fan_in_fan_out=False, inference_mode=True,
                  target_modules="|".join(names))
    # beside the weights: alpha, for a wrong one is silent, and chat, an entry unknown to PEFT
    save_tensors(tensors, folder / "adapter_model.safetensors",
                 lora_alpha=str(first.lora_alpha), chat=str(model.cfg.chat))
    write_json(folder / "adapter_config.json", config)


def load_adapter(model, folder):
    """Put a PEFT LoRA adapter on a loaded backbone. ValueError names what does not fit."""
    config = adapter_config(folder)
    shard = open_shard(folder / "adapter_model.safetensors", model.device)
    alpha = (shard.metadata() or {}).get("lora_alpha", str(config.lora_alpha))
    if alpha != str(config.lora_alpha):
        raise ValueError(f"{folder}/adapter_config.json: trained with lora_alpha = {alpha}, not "
                         f"{config.lora_alpha}")
    names = {}
    for name, module in model.named_modules():
        official = f"base_model.model.{official_name(name, model.cfg.family)}"
        pair = {f"{official}.lora_{x}.weight": f"{name}.lora_{x}" for x in "AB"}
        if isinstance(module, Linear) and not pair.keys().isdisjoint(shard.keys()):
            module.add_lora(config.r, config.lora_alpha, dropout=config.lora_dropout)
            names.update(pair)
    return load_weights(model, names, [shard], folder, torch.float32).requires_grad_(False)


# 9. Tokenizers and chat formats -------------------------------------------------------------------

# Assumed: LLaDA-MoE has the format of the same authors' LLaDA2. Only for a tokenizer without one.
MOE_CHAT = ("{% for m in messages %}<role>{{ m.role | upper | replace('USER', 'HUMAN') }}</role>"
            "{{ m.content }}<|role_end|>{% endfor %}"
            "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}")


def guess_chat(name, folder):
    """Do prompts go through a chat template, and why? By name: Base tokenizers bring one, too."""
    name = re.sub(r"[/\\]snapshots[/\\]\w+$", "", os.path.abspath(name).lower())  # the hub's cache
    said = re.findall(r"(?<![a-z])(base|instruct|chat|llada-1\.5)(?![a-z\d])", Path(name).name)
    if said:
        return said != ["base"], f"its name says {said[0]}"
    held = (folder / "chat_template.jinja").exists() or any(
        read_json(file).get("chat_template") for file in folder.glob("tokenizer_config.json"))
    return held, f"its folder holds {'a' if held else 'no'} template"


def load_tokenizer(name_or_path):
    """The transformers tokenizer of a checkpoint, without trust_remote_code."""
    from transformers import PreTrainedTokenizerFast, Qwen2TokenizerFast
    folder = home = find_folder(name_or_path, weights=False)
    if (folder / "adapter_config.json").exists():
        home = find_folder(adapter_base(folder), weights=False)
        folder = folder if (folder / "tokenizer_config.json").exists() else home
    config = read_json(home / "config.json")
    dream = family_of(config, home / "config.json") == "dream" and (folder / "vocab.json").exists()
    kind = Qwen2TokenizerFast if dream else PreTrainedTokenizerFast  # AutoTokenizer: remote code
    try:
        tokenizer = kind.from_pretrained(str(folder))
    except Exception as e:
        raise ValueError(f"{folder}: no tokenizer could be read ({e!r:.200})") from e
    if folder == home and config.get("vocabulary") not in (None, vocabulary_hash(tokenizer)):
        raise ValueError(f"{folder}: the tokenizer has another vocabulary than the model's")
    return tokenizer


def vocabulary_hash(tokenizer):
    words = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def are_messages(turns):
    """A list of {"role", "content"}, all of it text?"""
    return isinstance(turns, list) and len(turns) > 0 and all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str)
        and turn.get("role") in ("system", "user", "assistant") for turn in turns)


def chat_text(tokenizer, cfg, messages, reply):
    """messages as text; reply: end where the assistant's answer starts. LLaDA's template always
    opens an assistant turn; for a finished conversation (training) that is cut off again."""
    own = tokenizer.chat_template
    if not own and cfg.family != "llada_moe":
        text = " ".join(m["content"] for m in messages)
        return text + " " if messages[-1]["role"] == "user" else text
    try:  # of several templates with names, transformers takes "default"
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply,
                                             chat_template=None if own else MOE_CHAT)
    except Exception as e:  # a template may raise what it likes
        raise ValueError(f"the chat template refuses these messages ({e!r:.200})") from None
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    return text.removesuffix(header) if cfg.family == "llada" and not reply else text


def encode(tokenizer, text, cfg=None):
    """Text -> list of ids, which the model with `cfg` must know. ValueError names what is wrong."""
    half = re.search("[\ud800-\udfff]", text)
    if half:
        raise ValueError(f"half a character, {half[0]!r}, at position {half.start()}")
    if tokenizer.unk_token is None and "WordLevel" in str(type(tokenizer.backend_tokenizer.model)):
        unknown = sorted(set(text.split()).difference(tokenizer.get_vocab()))
        if unknown:
            raise ValueError(f"words not in python niah.py --vocabulary: {' '.join(unknown)[:80]}")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if cfg and max(ids, default=0) >= cfg.vocab_size:
        raise ValueError(f"the token {tokenizer.decode([max(ids)])!r} has the id {max(ids)}, but "
                         f"the model has only {cfg.vocab_size} embeddings")
    return ids


def encode_prompt(tokenizer, cfg, prompt, begun=""):
    """A text -> ids, through the chat template or, Base models, as it is (Dream: after BOS); a list
    of messages -> ids, always through it. begun: first words of the answer. ValueError: no ids."""
    chat = cfg.chat or isinstance(prompt, list)
    start = [] if chat or cfg.bos_id is None else [cfg.bos_id]
    if chat:
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        prompt = chat_text(tokenizer, cfg, messages, reply=True)
    ids = start + encode(tokenizer, prompt + begun, cfg)
    if not ids:
        raise ValueError("the prompt is empty")
    return ids


def encode_pair(tokenizer, cfg, example):
    """{"prompt", "response"} or {"messages"} (the last one is the response) -> prompt ids, response
    ids with their end. ValueError if one of them is empty."""
    prompt, answer, messages = (example.get(key) for key in ("prompt", "response", "messages"))
    if messages and not cfg.chat and cfg.family != "tiny":
        raise ValueError("\"messages\" go through the chat template: leave out --no-chat")
    if messages or cfg.chat:
        messages = messages or [dict(role="user", content=prompt),
                                dict(role="assistant", content=answer)]
        prompt = messages[:-1]
        text = chat_text(tokenizer, cfg, prompt, reply=True)
        whole = chat_text(tokenizer, cfg, messages, reply=False)
        if not whole.startswith(text):
            raise ValueError(f"by the chat template a conversation does not start with its prompt, "
                             f"which ends with {text[-30:]!r}: the answer cannot be told from it")
        # a template adds to an empty answer, too
        answer = whole[len(text):] if messages[-1]["content"].strip() else ""
    prompt, response = encode_prompt(tokenizer, cfg, prompt), encode(tokenizer, answer, cfg)
    if not response:
        raise ValueError("the response is empty")
    return prompt, response if response[-1] in cfg.stop_ids else [*response, cfg.eos_id]
