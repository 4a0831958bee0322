"""One bidirectional transformer for every masked-diffusion LM here, from the tiny default to LLaDA-8B, Dream-7B and LLaDA-MoE-7B.

Papers: MDLM (arXiv 2406.07524) and LLaDA (2502.09992) for the forward process and its loss. MetaState (2603.01331) and
MemDLM (2603.22241) both need what stands here: a backbone that can be run slice by slice.
Idea: masked diffusion replaces tokens by [MASK] with probability t and learns to put them back. The network is a Llama
without the causal mask. Both memories work between its layers, so the forward pass is cut at the layers:
embed -> run(a, b) -> head. Memory goes in as an argument and comes out as a value; nothing is stored, nothing is hooked.
Equations: q(xt | x0) -> corrupt; the masked loss -> masked_loss
Shapes: B batch, L tokens, V vocabulary, D width, H heads, d head width, N chosen positions, r rank of a low-rank pair
Convention: logits[:, i] predicts token i in every family. Dream reads that prediction one position to the left; `head` does so.
Read as: t = 0 is clean, t = 1 all masked; one t per row. Padding is never attended to, and positions count from the
first real token, so a row gives the same logits alone and inside any padded batch.
Left out: causal attention and KV caches (the canvas changes everywhere at every step), dropout, LLaDA2's block mask.
Run: python backbone.py --check GSAI-ML/LLaDA-8B-Instruct      (a hub name or a folder: loads it and shows what it predicts)
"""
import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import zlib
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


# ----------------------------------------------------------------------------------------------------------------------
# 0. Settings: what a field may be stands beside it, and one function checks flags and files alike.

def option(default, text, low=None, high=None, choices=None, repr=True, **more):
    """A field of a configuration: its default (MISSING: none), its --help text, the values it may take."""
    metadata = dict(help=text, low=low, high=high, choices=choices, **more)
    return dataclasses.field(default=default, repr=repr, metadata=metadata)


def check_value(rule, value, name):
    """ValueError, which begins with `name`, unless `value` is what the dataclass field `rule` allows."""
    if value is None and rule.default is None:
        return
    many = rule.type in (list, tuple)
    if many and not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list, not {value!r:.80}")
    kind = {list: str, tuple: int}.get(rule.type, rule.type)
    low, high, choices = (rule.metadata.get(key) for key in ("low", "high", "choices"))
    for v in value if many else [value]:
        right_type = isinstance(v, kind) or (kind is float and isinstance(v, int))
        if not right_type or (isinstance(v, bool) and kind is not bool):
            raise ValueError(f"{name} must be {kind.__name__}, not {v!r:.80}")
        if choices and v not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {v!r:.80}")
        if low is not None and not v >= low or high is not None and not v <= high:
            limits = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
            raise ValueError(f"{name} must be {' and '.join(limits)}, not {v}")
        if isinstance(v, float) and not math.isfinite(v):
            raise ValueError(f"{name} must be a finite number, not {v}")


def validate(config, where="--"):
    """Check every field of a dataclass; returns it. ValueError names the first field that is wrong,
    after `where`: "--" for a flag, "FILE: " for an entry of a file."""
    for rule in dataclasses.fields(config):
        check_value(rule, getattr(config, rule.name), where + rule.name)
    return config


def config_from_dict(cls, raw, where):
    """A JSON object -> a validated dataclass; entries that are missing take their defaults. ValueError
    names the file, `where`, and the entry that is unknown, missing or wrong."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected an object, found {type(raw).__name__}")
    rules = {rule.name: rule for rule in dataclasses.fields(cls)}
    unknown = [name for name in raw if name not in rules]
    if unknown:
        raise ValueError(f"{where}: unknown entry {unknown[0]!r}; known: {', '.join(rules)}")
    for name, rule in rules.items():
        if name in raw:
            check_value(rule, raw[name], f"{where}: {name}")
        elif rule.default is MISSING:
            raise ValueError(f"{where}: the entry {name} is missing")
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) and rules[k].type is tuple else v
                      for k, v in raw.items()})
    except ValueError as e:                     # from __post_init__: entries that do not fit each other
        raise ValueError(f"{where}: {e}") from None


# --------------------------------------------------------------------------------------------------
# 1. Configuration. The defaults are the tiny preset; real models are read from their config.json.

@dataclass
class BackboneConfig:
    """Every option that some checkpoint needs. Defaults: the tiny preset, 0.2 M parameters."""
    family: str = option("tiny", "names of tensors, tokenizer, chat format",
                         choices=["tiny", "llada", "dream", "llada_moe"])
    vocab_size: int = option(139, "V, embedding rows, unused padding rows included; 139 words: "
                             "niah.vocabulary()", low=2, high=10**7)
    d_model: int = option(64, "D", low=1, high=10**6)
    n_layers: int = option(3, "number of blocks", low=1, high=10**4)
    n_heads: int = option(2, "H; four heads of 16 did not learn key-value lookup in minutes, two of "
                          "32 do", low=1, high=10**4)
    n_kv_heads: int = option(2, "fewer than n_heads: each serves n_heads / n_kv_heads consecutive "
                             "query heads", low=1, high=10**4)
    head_dim: int = option(32, "d, even: RoPE rotates its halves", low=2, high=10**4)
    d_ff: int = option(192, "SwiGLU inner width (of one expert in a mixture)", low=1, high=10**6)
    norm_eps: float = option(1e-5, "added to the mean square in RMSNorm", low=0, high=1)
    rope_theta: float = option(10000.0, "base of RoPE's wavelengths", low=1)
    rope_fp32: bool = option(True, "rotate q and k in fp32 (LLaDA), not in the model's dtype")
    qkv_bias: bool = option(False, "biases on q, k and v (Dream)")
    qk_norm: bool = option(False, "RMSNorm over each head, before RoPE (LLaDA-MoE)")
    n_experts: int = option(0, "0: one SwiGLU; LLaDA-MoE: 64", low=0, high=10**4)
    experts_per_token: int = option(0, "LLaDA-MoE: 8 of its experts see a token", low=0)
    conv_width: int = option(5, "depthwise convolution before attention, 0 = none: the tiny preset "
                             "ONLY, as without it a model of this size does not learn key-value "
                             "lookup in minutes (it cannot see the token before)", low=0, high=999)
    # repr=False: the fingerprints in existing MetaState checkpoints were taken over the other fields
    conv_residual: bool = option(False, "True: the convolution is added to the residual stream, "
                                 "h = h + conv(norm(h)), before attention, so that the feed-forward "
                                 "layers see the token before as well; False: it feeds attention "
                                 "alone", repr=False)
    shift: bool = option(False, "the prediction for token i is read at position i - 1 (Dream)")
    max_len: int = option(4096, "longest canvas that the model was trained for", low=1)
    mask_id: int = option(1, "the id of [MASK]", low=0)
    eos_id: int = option(2, "end of text", low=0)
    pad_id: int = option(0, "fills up rows, never attended to", low=0)
    chat: bool = option(False, "Instruct model: prompts go through the chat template")
    bos_id: int = option(None, "put before the prompt (Dream Base), else None", low=0)
    eot_id: int = option(None, "end of turn (Instruct models), else None", low=0)
    extra_stop_ids: tuple = option((), "further ids that end an answer", low=0, repr=False)

    def __post_init__(self):
        """Relations between the fields; validate checks each field alone."""
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2 or (self.conv_width and self.conv_width % 2 == 0):
            raise ValueError(f"head_dim={self.head_dim} must be even, conv_width={self.conv_width} odd or 0")
        if (self.n_experts > 0) != (self.experts_per_token > 0) or self.experts_per_token > self.n_experts:
            raise ValueError(f"experts_per_token={self.experts_per_token} does not fit n_experts={self.n_experts}")
        ids = dict(mask_id=[self.mask_id], pad_id=[self.pad_id], bos_id=[self.bos_id],
                   eos_id=self.stop_ids)
        for name, values in ids.items():
            for value in values:
                if value is not None and value >= self.vocab_size:
                    raise ValueError(f"{name}={value} lies outside the vocabulary of {self.vocab_size}")

    @property
    def stop_ids(self):
        ids = (self.eos_id, self.eot_id, *self.extra_stop_ids)
        return [i for i in ids if i is not None]


class LowRank(NamedTuple):
    """A low-rank change of one weight matrix, W + scale * B A (LoRA, arXiv 2106.09685). Without the batch dimension it is
    an adapter shared by all rows; with it, every row of the batch has its own: MemDLM's fast weights phi."""
    A: torch.Tensor               # (r, d_in) or (batch, r, d_in)
    B: torch.Tensor               # (d_out, r) or (batch, d_out, r)
    scale: float                  # alpha / r


class Context(NamedTuple):
    """What every layer needs to know about the canvas; computed once per forward pass, shared by all slices of it."""
    cos: torch.Tensor             # (1 or B, 1, L, d) fp32
    sin: torch.Tensor             # (1 or B, 1, L, d) fp32
    bias: torch.Tensor | None     # (B, 1, 1, L) bool, True = may be attended to; None when nothing is padded
    source: torch.Tensor | None   # (B, L) where the prediction for token i is read; None: at i


# ----------------------------------------------------------------------------------------------------------------------
# 2. Layers. The order of casts matters: it is the published models' arithmetic, so that bf16 results can be compared.

class Linear(nn.Linear):
    """A linear layer that can add a LoRA of its own (trained by the outer loop) and a fast weight that is passed in."""
    lora_rank = 0                                                           # no adapter until add_lora

    def forward(self, x, fast=None):                                        # x (..., d_in); with fast: (B, L, d_in)
        y = F.linear(x, self.weight, self.bias)
        if self.lora_rank:
            low = F.dropout(x.to(self.lora_A.dtype), self.lora_dropout, self.training)
            low = F.linear(F.linear(low, self.lora_A), self.lora_B)
            y = y + (self.lora_scale * low).to(y.dtype)
        if fast is not None:
            low = x.to(fast.A.dtype) @ fast.A.mT @ fast.B.mT                # (B, L, d_out)
            y = y + (fast.scale * low).to(y.dtype)
        return y

    def add_lora(self, rank, alpha, generator=None, dropout=0.0):
        """B is zero: the model is unchanged until the adapter is trained. fp32, whatever the dtype of
        the frozen weight. dropout: on the input of A, while training, as in PEFT."""
        self.lora_rank = rank
        self.lora_scale = alpha / rank
        self.lora_dropout = dropout
        A = torch.empty(rank, self.in_features, device=self.weight.device)
        if not A.is_meta:
            # Kaiming-uniform with a = sqrt(5), as in PEFT; drawn on the CPU: the same on every device
            bound = 1 / math.sqrt(self.in_features)
            A = torch.empty(A.shape).uniform_(-bound, bound, generator=generator).to(A.device)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=self.weight.device))


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)                                # cast first, then the weight: not the same in bf16


def rotate(x, cos, sin, fp32):                                              # x (B, H, L, d)
    """RoPE, half-split layout (arXiv 2104.09864)."""
    dtype = x.dtype
    if fp32:
        x = x.float()
    else:
        cos, sin = cos.to(dtype), sin.to(dtype)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(dtype)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.q = Linear(cfg.d_model, cfg.n_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.k = Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.v = Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.o = Linear(cfg.n_heads * cfg.head_dim, cfg.d_model, bias=False)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps), RMSNorm(cfg.head_dim, cfg.norm_eps)

    def forward(self, x, ctx):                                              # (B, L, D)
        cfg, (B, L, _) = self.cfg, x.shape
        q = self.q(x).view(B, L, cfg.n_heads, cfg.head_dim)
        k = self.k(x).view(B, L, cfg.n_kv_heads, cfg.head_dim)
        v = self.v(x).view(B, L, cfg.n_kv_heads, cfg.head_dim).transpose(1, 2)
        if cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q.transpose(1, 2), ctx.cos, ctx.sin, cfg.rope_fp32)      # (B, H, L, d)
        k = rotate(k.transpose(1, 2), ctx.cos, ctx.sin, cfg.rope_fp32)
        if cfg.n_kv_heads < cfg.n_heads:                                    # query heads 0..g-1 share kv head 0, and so on
            k, v = (z.repeat_interleave(cfg.n_heads // cfg.n_kv_heads, dim=1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=ctx.bias)     # no causal mask: every token sees every token
        return self.o(y.transpose(1, 2).reshape(B, L, -1))


class FFN(nn.Module):
    """SwiGLU. `phi` is a dict of fast weights by the full name of the matrix; a name that is absent changes nothing."""
    def __init__(self, d_model, d_ff):
        super().__init__()
        self.gate = Linear(d_model, d_ff, bias=False)
        self.up = Linear(d_model, d_ff, bias=False)
        self.down = Linear(d_ff, d_model, bias=False)

    def forward(self, x, phi={}, name=""):
        return self.down(F.silu(self.gate(x, phi.get(name + "gate"))) * self.up(x, phi.get(name + "up")),
                         phi.get(name + "down"))


class MixtureFFN(nn.Module):
    """LLaDA-MoE: softmax over all experts in fp32, the best few kept, their weights NOT renormalised."""
    def __init__(self, cfg):
        super().__init__()
        self.top = cfg.experts_per_token
        self.router = Linear(cfg.d_model, cfg.n_experts, bias=False)
        self.experts = nn.ModuleList(FFN(cfg.d_model, cfg.d_ff) for _ in range(cfg.n_experts))

    def forward(self, x, phi={}, name=""):                                  # (B, L, D)
        if phi and x.shape[0] > 1:                                          # each row owns its experts' fast weights
            rows = [{k: LowRank(w.A[b:b + 1], w.B[b:b + 1], w.scale) for k, w in phi.items()} for b in range(x.shape[0])]
            return torch.cat([self.forward(x[b:b + 1], rows[b], name) for b in range(x.shape[0])])
        flat = x.reshape(-1, x.shape[-1])                                   # (B L, D)
        probs = F.softmax(self.router(flat), dim=-1, dtype=torch.float32)   # (B L, experts)
        weight, chosen = probs.topk(self.top, dim=-1)
        weight, y = weight.to(x.dtype), torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):                           # in index order: the sum's rounding depends on it
            token, rank = torch.where(chosen == e)
            out = expert(flat[token][None], phi, f"{name}experts.{e}.")[0]
            y = y.index_add(0, token, out * weight[token, rank, None])
        return y.view_as(x)


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(cfg.d_model, cfg.norm_eps), Attention(cfg)
        self.ffn_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.ffn = MixtureFFN(cfg) if cfg.n_experts else FFN(cfg.d_model, cfg.d_ff)
        self.conv = nn.Parameter(torch.zeros(cfg.conv_width, cfg.d_model)) if cfg.conv_width else None
        self.conv_residual = cfg.conv_residual

    def forward(self, h, ctx, phi={}, name=""):                             # (B, L, D)
        x = self.attn_norm(h)
        if self.conv is not None:
            c = depthwise(x if ctx.bias is None else x * ctx.bias[:, 0, 0, :, None], self.conv)
            if self.conv_residual:
                h = h + c
                x = self.attn_norm(h)
            else:
                x = x + c
        h = h + self.attn(x, ctx)
        return h + self.ffn(self.ffn_norm(h), phi, name + "ffn.")


def depthwise(x, weight):                                                   # (B, L, D), (width, D)
    """A depthwise convolution over L with zeros beyond the ends: y[i] = sum_j weight[j] * x[i + j - width // 2]."""
    return F.conv1d(x.mT, weight.mT[:, None], padding=weight.shape[0] // 2, groups=x.shape[-1]).mT


# ----------------------------------------------------------------------------------------------------------------------
# 3. The backbone and its seam: embed, run a slice of layers, head.

class Backbone(nn.Module):
    """`backbone(ids, attend=None) -> logits (B, L, V)`; the three methods below are the same pass in pieces."""

    def __init__(self, cfg: BackboneConfig):
        super().__init__()
        self.cfg = cfg
        self.checkpointing = False          # True: keep one activation per layer, recompute the rest in the backward pass
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.lm_head = Linear(cfg.d_model, cfg.vocab_size, bias=False)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """For training from noise (the papers' backbones come pretrained; the tiny one does not). Output projections are
        zero, so every block starts as the identity and depth costs nothing at the first step."""
        for name, p in self.named_parameters():
            if name.endswith(("attn.o.weight", "ffn.down.weight")):
                p.zero_()
            elif name.endswith("conv"):
                p.uniform_(-p.shape[0] ** -0.5, p.shape[0] ** -0.5, generator=generator)
            elif "embed" in name:
                p.normal_(0, 0.5, generator=generator)
            elif p.ndim == 2:
                p.normal_(0, p.shape[1] ** -0.5, generator=generator)
        return self

    @property
    def device(self):
        return self.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.embed_tokens.weight.dtype

    def context(self, ids, attend=None):
        """ids (B, L); attend (B, L) bool, False = padding, wherever it stands. Call once per canvas, use for every slice."""
        L, cfg, bias, source = ids.shape[1], self.cfg, None, None
        positions = torch.arange(L, device=ids.device)[None]                # (1, L)
        if attend is not None and not attend.bool().all():
            positions = (attend.long().cumsum(1) - 1).clamp(min=0)          # (B, L) counted from the first real token
            bias = attend.bool()[:, None, None, :]
        # fp32 and never a buffer: a buffer would be cast by .to(bfloat16) or left uninitialised by a load from meta
        inv_freq = 1.0 / cfg.rope_theta ** (torch.arange(0, cfg.head_dim, 2, device=ids.device).float() / cfg.head_dim)
        angles = positions[..., None].float() * inv_freq
        angles = torch.cat([angles, angles], dim=-1)[:, None]               # (1 or B, 1, L, d)
        if cfg.shift:                                                       # the first real token reads its own position
            source = (torch.arange(L, device=ids.device) - (positions > 0).long()).expand(ids.shape)
        return Context(angles.cos(), angles.sin(), bias, source)

    def embed(self, ids):
        return self.embed_tokens(ids)                                       # (B, L, D)

    def run(self, h, ctx, start=0, stop=None, phi={}):
        """Layers start .. stop - 1 on h (B, L, D). phi: fast weights by name (see memdlm.py); empty = the plain model."""
        for i in range(start, self.cfg.n_layers if stop is None else stop):
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(self.layers[i], h, ctx, phi, f"layers.{i}.", use_reentrant=False)
            else:
                h = self.layers[i](h, ctx, phi, f"layers.{i}.")
        return h

    def head(self, h, ctx, at=None):
        """Logits (B, L, V), or with at (B, L) bool only the chosen positions, (N, V) in row-major order: at a vocabulary of
        126,464 the head is the largest matrix of the model, and most positions are neither scored nor sampled."""
        if ctx.source is not None:
            h = h.gather(1, ctx.source[..., None].expand_as(h))
        return self.lm_head(self.norm(h if at is None else h[at]))

    def forward(self, ids, attend=None, at=None, phi={}):
        ctx = self.context(ids, attend)
        return self.head(self.run(self.embed(ids), ctx, phi=phi), ctx, at)

    def add_lora(self, rank=32, alpha=64, seed=0, dropout=0.0):
        """Freeze everything, then put a trainable LoRA on every linear layer except the head (MemDLM,
        section 4.1). ValueError if the model carries one already."""
        if any(isinstance(m, Linear) and m.lora_rank for m in self.modules()):
            raise ValueError("the model carries an adapter already")
        generator = torch.Generator().manual_seed(seed)
        self.requires_grad_(False)
        for name, module in self.named_modules():
            if isinstance(module, Linear) and name != "lm_head":
                module.add_lora(rank, alpha, generator, dropout)
        return self


# ----------------------------------------------------------------------------------------------------------------------
# 4. The forward process and the loss.

def corrupt(x0, t, given, mask_id, u=None, generator=None):
    """q(xt | x0): each token that is not `given` becomes [MASK] with probability t.

    x0 (B, L) long; t (B,) in [0, 1]; given (B, L) bool, True = prompt or padding, never masked.
    u (B, L) uniform numbers: the same u at a larger t masks a superset, which is how nested states are made.
    Returns xt (B, L) and masked (B, L) bool. Example: t = 1 masks all that is not given, t = 0 nothing.
    """
    if u is None:
        u = torch.rand(x0.shape, generator=generator, device=x0.device if generator is None else generator.device)
    masked = (u.to(x0.device) < t.to(x0.device)[:, None]) & ~given
    return x0.masked_fill(masked, mask_id), masked


def sample_t(batch, eps=1e-3, generator=None):
    """One t ~ U(eps, 1) per row (LLaDA and MDLM: eps = 1e-3 keeps 1/t finite)."""
    return eps + (1 - eps) * torch.rand(batch, generator=generator)


def masked_loss(logits, x0, masked, weight, n_maskable):
    """Sum over masked tokens of weight * CE(p_theta(x0_i | xt)), divided by the number of maskable tokens.

    logits (N, V) at the masked positions in row-major order; weight (B,): 1/t gives the bound on the likelihood, ones the
    uniform loss that the tiny preset trains with (a prototype, one seed: 90 % in 35 against 53 CPU-seconds; 1/t spends its
    gradient on rows with almost nothing masked). n_maskable: of the whole batch, all micro-batches and ranks, so that
    splitting it is exact.
    """
    ce = F.cross_entropy(logits.float(), x0[masked], reduction="none")      # (N,)
    return (ce * weight.to(ce)[masked.nonzero()[:, 0]]).sum() / n_maskable


# ----------------------------------------------------------------------------------------------------------------------
# 5. Checkpoints. The official files are read as data: no code from a checkpoint is ever executed (their remote code breaks on
# transformers 5, three times out of four silently). Dispatch is on `architectures`: LLaDA-MoE calls itself model_type "llada".

FAMILIES = {"Backbone": None, "LLaDAModelLM": "llada", "DreamModel": "dream", "LLaDAMoEModelLM": "llada_moe"}

# our module name -> the checkpoint's; {} are the layer and expert numbers
QWEN_NAMES = {"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head",
              "layers.{}.attn_norm": "model.layers.{}.input_layernorm",
              "layers.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
              **{f"layers.{{}}.attn.{x}": f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkvo"}}
NAMES = {
    "llada": {"embed_tokens": "model.transformer.wte", "norm": "model.transformer.ln_f",
              "lm_head": "model.transformer.ff_out",                        # "ff_out" is used twice: here the head ...
              "layers.{}.attn_norm": "model.transformer.blocks.{}.attn_norm",
              "layers.{}.ffn_norm": "model.transformer.blocks.{}.ff_norm",
              **{f"layers.{{}}.attn.{x}": f"model.transformer.blocks.{{}}.{x}_proj" for x in "qkv"},
              "layers.{}.attn.o": "model.transformer.blocks.{}.attn_out",
              "layers.{}.ffn.gate": "model.transformer.blocks.{}.ff_proj",
              "layers.{}.ffn.up": "model.transformer.blocks.{}.up_proj",
              "layers.{}.ffn.down": "model.transformer.blocks.{}.ff_out"},  # ... and here the down-projection
    "dream": {**QWEN_NAMES, **{f"layers.{{}}.ffn.{x}": f"model.layers.{{}}.mlp.{x}_proj" for x in ("gate", "up", "down")}},
    "llada_moe": {**QWEN_NAMES, "layers.{}.ffn.router": "model.layers.{}.mlp.gate",
                  "layers.{}.attn.q_norm": "model.layers.{}.self_attn.q_norm",
                  "layers.{}.attn.k_norm": "model.layers.{}.self_attn.k_norm",
                  **{f"layers.{{}}.ffn.experts.{{}}.{x}": f"model.layers.{{}}.mlp.experts.{{}}.{x}_proj"
                     for x in ("gate", "up", "down")}},
}

# What all checkpoints of a family share, and special ids that their config.json does not reliably hold.
FIXED = {"llada": dict(mask_id=126336, eos_id=126081, eot_id=126348),
         "dream": dict(mask_id=151666, eos_id=151643, eot_id=151645, bos_id=151665, rope_fp32=False,
                       qkv_bias=True, shift=True),
         "llada_moe": dict(mask_id=156895, eos_id=156892, rope_fp32=False)}

# Entry of config.json -> our field; of two for one field, the later one counts unless it is null.
SHARED_ENTRIES = {"rms_norm_eps": "norm_eps", "rope_theta": "rope_theta", "head_dim": "head_dim",
                  "mask_token_id": "mask_id", "eos_token_id": "eos_id"}
QWEN_ENTRIES = {"vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "n_layers",
                "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads",
                "max_position_embeddings": "max_len", **SHARED_ENTRIES}
ENTRIES = {
    "llada": {"vocab_size": "vocab_size", "embedding_size": "vocab_size", "d_model": "d_model",
              "n_layers": "n_layers", "n_heads": "n_heads", "n_kv_heads": "n_kv_heads",
              "mlp_ratio": "d_ff", "mlp_hidden_size": "d_ff", "rope_full_precision": "rope_fp32",
              "max_sequence_length": "max_len", **SHARED_ENTRIES},
    "dream": {**QWEN_ENTRIES, "intermediate_size": "d_ff"},
    "llada_moe": {**QWEN_ENTRIES, "expert_intermediate_size": "d_ff", "num_experts": "n_experts",
                  "num_experts_per_tok": "experts_per_token", "qk_layernorm": "qk_norm"},
}

# Entries that change the arithmetic in ways this file does not implement: any other value is refused.
# A missing entry means this value, and null the same as false.
REQUIRED = {
    "llada": dict(block_type="llama", activation_type="silu", layer_norm_type="rms", rope=True,
                  weight_tying=False, scale_logits=False, input_emb_norm=False, include_bias=False,
                  include_qkv_bias=False, alibi=False, attention_layer_norm=False,
                  bias_for_layer_norm=False, multi_query_attention=False),
    "dream": dict(hidden_act="silu", tie_word_embeddings=False, use_sliding_window=False,
                  use_mrope=False),
    "llada_moe": dict(hidden_act="silu", tie_word_embeddings=False, attention_bias=False,
                      clip_qkv=None, shared_expert_intermediate_size=None, partial_rotary_factor=1.0,
                      moe_router_enable_expert_bias=False, routed_scaling_factor=1.0),
}


def refuse_unsupported(raw, required, where):
    """ValueError names the first entry of the JSON object `raw` that is not as in `required`."""
    for key, value in required.items():
        found = raw.get(key, value)
        if found != value and (found or value):
            raise ValueError(f"{where}: {key} = {found!r:.80} is not supported (only {value!r})")


def official_name(name, family):
    """Our parameter or module name -> the one in the official checkpoint ("layers.3.ffn.up.weight" -> ...)."""
    if family == "tiny":
        return name
    stem, _, last = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
    template = NAMES[family][re.sub(r"\d+", "{}", stem)].format(*re.findall(r"\d+", stem))
    return f"{template}.{last}" if last else template


def family_of(raw, where):
    """The family that a config.json names; None: written by save_backbone."""
    names = raw.get("architectures")
    if not isinstance(names, list) or not names:
        raise ValueError(f"{where}: architectures must be a list of one name, not {names!r:.80}")
    if names[0] not in list(FAMILIES):
        raise ValueError(f"{where}: architecture {names[0]!r:.80} is not supported; "
                         f"known: {', '.join(FAMILIES)}")
    return FAMILIES[names[0]]


def config_from_json(raw, where="config.json"):
    """The official config.json (a dict) -> BackboneConfig. ValueError names the first wrong entry."""
    family = family_of(raw, where)
    if family is None:
        return config_from_dict(BackboneConfig, raw.get("backbone"), f"{where}: backbone")
    refuse_unsupported(raw, REQUIRED[family] | dict(rope_scaling=None, quantization_config=None), where)
    rules = {rule.name: rule for rule in dataclasses.fields(BackboneConfig)}
    values = dict(FIXED[family])
    for entry, name in ENTRIES[family].items():
        value = raw.get(entry)
        if entry == "eos_token_id" and isinstance(value, list) and value:
            check_value(rules["extra_stop_ids"], value, f"{where}: {entry}")
            values["extra_stop_ids"] = tuple(value[1:])
            value = value[0]
        if value is None and entry == "mlp_hidden_size":
            value = values.get("d_ff", 4) * values["d_model"]               # d_ff holds mlp_ratio
        if value is None and name == "n_kv_heads":
            value = values["n_heads"]
        if value is None and name == "head_dim":
            value = values["d_model"] // values["n_heads"]
        if value is not None:
            check_value(rules[name], value, f"{where}: {entry}")
            values[name] = value
        elif name not in values and entry not in ("mlp_ratio", "rope_full_precision"):
            raise ValueError(f"{where}: a {family} config needs the entry {entry}")
    if raw.get("moe_layer_freq") not in (None, 1, [1] * values["n_layers"]):
        raise ValueError(f"{where}: moe_layer_freq = {raw['moe_layer_freq']!r:.80} is not supported "
                         f"(only ones)")
    for name in ("eot_id", "bos_id"):           # the family's own; a small test model lacks them
        if values.get(name, 0) >= values["vocab_size"]:
            del values[name]
    try:
        return BackboneConfig(family=family, conv_width=0, pad_id=values["eos_id"], **values)
    except ValueError as e:                     # names our fields; the reader knows the entries
        entries = {name: entry for entry, name in ENTRIES[family].items()}
        text = re.sub(r"\w+", lambda m: entries.get(m[0], m[0]), str(e))
        raise ValueError(f"{where}: {text}") from None


def find_folder(name_or_path):
    """A folder as it is; a hub name through huggingface_hub (its cache first, then a download with a progress bar)."""
    path = Path(name_or_path)
    if path.is_dir() and str(name_or_path):
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)) or str(name_or_path).startswith((".", "runs/")):
        raise FileNotFoundError(f"no checkpoint folder at {name_or_path}")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=["*.json", "*.safetensors", "merges.txt"]))
    except Exception as e:                                                  # its own errors are many; the cause is kept
        raise FileNotFoundError(f"{name_or_path} is no folder and could not be fetched from the hub "
                                f"({brief(e)})") from e


def read_json(path):
    """A JSON object from a file; ValueError if it holds anything else, or not what write_json wrote."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold an object, not a {type(raw).__name__}")
    expected = raw.pop("crc32", None)
    if expected not in (None, json_checksum(raw)):
        raise ValueError(f"{path}: its checksum does not match: corrupted, or edited by hand (then "
                         f"take out its entry crc32)")
    return raw


def write_json(path, raw, checksum=True):
    """checksum=False: for a file that readers are meant to edit; its values are validated instead."""
    entries = {**raw, "crc32": json_checksum(raw)} if checksum else raw
    write_atomically(path, lambda part: Path(part).write_text(json.dumps(entries, indent=1)))


def json_checksum(raw):
    return f"{zlib.crc32(json.dumps(raw, sort_keys=True).encode()):08x}"


def brief(e):
    """An exception as one line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"


def open_shard(path, device="cpu"):
    """A safetensors file, opened. ValueError if it is cut short or, for a file of ours, if a single bit of it has changed."""
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
        raise ValueError(f"{path} cannot be read ({e}): truncated or corrupted? Fetch or save it again") from None


def checksum(names, get):
    """CRC-32 of names and bytes, one tensor get(name) at a time. The format has none of its own, and a flipped bit in a weight
    is a wrong number in a table."""
    crc = 0
    for name in sorted(names):
        crc = zlib.crc32(get(name).cpu().reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def save_tensors(tensors, path, **more):
    """{name: tensor} -> a safetensors file with its checksum in the header, and `more`, all text."""
    from safetensors.torch import save_file
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    metadata = {"crc32": checksum(tensors, tensors.get), **more}
    write_atomically(path, lambda part: save_file(tensors, part, metadata=metadata))


def shard_files(folder):
    """The names of a checkpoint's weight files. ValueError if its index is not one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: weight_map must be an object of tensor names and file names, "
                         f"not {weight_map!r:.80}")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index}: weight_map names {file!r:.80}, which is no file of this folder")
    return sorted(set(weight_map.values()))


def misfits(target, home, dtype):
    """What is wrong with the tensors of a checkpoint, from their headers alone: a list of texts.
    target: {name: the parameter it fills}; home: {name: the open file it is in}."""
    found = {key: shard.get_slice(key) for key, shard in home.items()}
    texts = [f"missing {key}" for key in sorted(target.keys() - found.keys())]
    texts += [f"unexpected {key}" for key in sorted(found.keys() - target.keys())]
    kinds = {}
    for key in sorted(target.keys() & found.keys()):
        shape, expected, kind = found[key].get_shape(), list(target[key].shape), found[key].get_dtype()
        if shape != expected:
            texts.append(f"{key} has shape {shape}, expected {expected}")
        if kind not in ("F64", "F32", "F16", "BF16"):
            texts.append(f"{key} is {kind}: quantized or no numbers at all; floats are needed")
        kinds.setdefault(kind, key)
    if len(kinds) > 1 and dtype is None:
        texts.append("the dtypes differ (" + ", ".join(f"{key} is {kind}" for kind, key in kinds.items())
                     + "): name the one to use (dtype=, --dtype)")
    return texts


def load_weights(model, folder, device="cpu", dtype=None):
    """Fill a model that lies on `meta` shard by shard: each tensor goes straight to its place, in its dtype, once.

    On the CPU in the checkpoint's own dtype (dtype=None) the tensors stay views of the mapped files: nothing is copied.
    Raises ValueError naming missing, unexpected, misshapen and non-float tensors before any weight is read, and NaN and
    infinity where looking is cheap: on an accelerator, and in small tensors. (To look into the large ones on the CPU would
    read every page of a file that is mapped so that it need not be read.)"""
    folder, family = Path(folder), model.cfg.family
    names = {official_name(n, family): n for n, _ in model.named_parameters()}
    shards = [open_shard(folder / file, device) for file in shard_files(folder)]
    home = {key: shard for shard in shards for key in shard.keys()}
    target = {key: model.get_parameter(name) for key, name in names.items()}
    problems = misfits(target, home, dtype)
    if problems:
        raise ValueError(f"{folder}: the weights do not fit {family} config.json: " + "; ".join(problems[:5])
                         + (f"; and {len(problems) - 5} more" if len(problems) > 5 else ""))
    bar = tqdm(total=len(home), desc=f"loading {len(shards)} files", unit="tensor", disable=len(shards) == 1)
    for key, shard in home.items():
        module, _, attribute = names[key].rpartition(".")
        value = shard.get_tensor(key).to(dtype)
        if (value.device.type != "cpu" or value.numel() < 10**6) and not value.isfinite().all():
            raise ValueError(f"{folder}: {key} holds NaN or infinity")
        setattr(model.get_submodule(module), attribute, nn.Parameter(value, requires_grad=False))
        bar.update()
    bar.close()
    return model


def default_device(wanted=None):
    """`wanted` if it can be used here (else ValueError), by default the fastest there is."""
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"device {wanted!r} cannot be used here ({brief(e)}); cpu always can") from None
    return wanted


def load_backbone(name_or_path, device=None, dtype=None):
    """"tiny" (new, initialised from torch's seed), a folder written by train.py, an official checkpoint (hub name or folder),
    or an adapter folder in PEFT's format (its base is loaded first). Returns a Backbone in eval mode.

    device: None picks cuda, mps or cpu. dtype: None keeps the checkpoint's. Errors: FileNotFoundError, ValueError."""
    device = default_device(device)
    if name_or_path == "tiny":
        return Backbone(BackboneConfig()).init_weights().to(device, dtype).eval()
    folder = find_folder(name_or_path)
    if (folder / "adapter_config.json").exists():
        return load_adapter(load_backbone(adapter_base(folder), device, dtype), folder)
    cfg = config_from_json(read_json(folder / "config.json"), folder / "config.json")
    cfg.chat = cfg.chat or bool(re.search(r"Instruct|Chat|LLaDA-1\.5", str(name_or_path)))
    with torch.device("meta"):
        model = Backbone(cfg)
    return load_weights(model, folder, device, dtype).eval()


def save_backbone(model, folder, tokenizer=None):
    """The tokenizer, model.safetensors and config.json, in our own layout; load_backbone reads it back.

    config.json comes last, and each file is replaced in one move: a folder that has it is complete."""
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
        "architectures": ["Backbone"], "backbone": dataclasses.asdict(model.cfg),
        "vocabulary": tokenizer and vocabulary_hash(tokenizer)})


def write_atomically(path, write):
    """A reader, or a run that is killed here or finds the disk full, sees the old file or the new one,
    never half of one."""
    part = f"{path}.part"
    try:
        write(part)
        with open(part, "rb") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException as e:                  # Ctrl-C is no Exception, and leaves no .part behind either
        Path(part).unlink(missing_ok=True)
        if not isinstance(e, Exception):
            raise
        # torch and safetensors have their own errors for a full disk
        raise OSError(f"{path} could not be written ({brief(e)}); "
                      f"what was there before is intact. Disk full? Make room and go on with "
                      f"--resume") from e


# -- adapters in PEFT's format -----------------------------------------------------------------------------------------

# Entries of adapter_config.json that change the arithmetic; refused as in REQUIRED. Of the ways to
# initialise, only those are read that leave the base's weights alone: pissa, olora, corda and loftq
# subtract something from them, so that their adapters do not fit the base as it is published.
ADAPTER_REQUIRED = dict(peft_type="LORA", use_dora=False, use_rslora=False, rank_pattern=None,
                        alpha_pattern=None, modules_to_save=None, fan_in_fan_out=False,
                        layer_replication=None, lora_bias=False, target_parameters=None)
HARMLESS_INITIAL_VALUES = [True, False, None, "gaussian", "eva", "orthogonal"]


@dataclass
class AdapterConfig:
    """The entries of PEFT's adapter_config.json that are used here."""
    base_model_name_or_path: str = option(MISSING, "hub name or folder of the backbone")
    r: int = option(MISSING, "rank", low=1)
    lora_alpha: float = option(MISSING, "the change is alpha / r * B A", low=1e-6)
    lora_dropout: float = option(0.0, "on the input of A, while training", low=0, high=1)


def adapter_config(folder):
    """The AdapterConfig of an adapter folder. ValueError names the entry that is wrong or unsupported,
    and a base that is an adapter again (itself, for example)."""
    path = Path(folder) / "adapter_config.json"
    raw = read_json(path)
    used = {f.name: raw[f.name] for f in dataclasses.fields(AdapterConfig) if f.name in raw}
    config = config_from_dict(AdapterConfig, used, path)
    refuse_unsupported(raw, ADAPTER_REQUIRED, path)
    if raw.get("init_lora_weights") not in HARMLESS_INITIAL_VALUES:
        raise ValueError(f"{path}: init_lora_weights = {raw['init_lora_weights']!r:.80} is not supported: it "
                         f"changes the base's weights. Convert it to plain LoRA with PEFT")
    if (Path(config.base_model_name_or_path) / "adapter_config.json").exists():
        raise ValueError(f"{path}: its base {config.base_model_name_or_path} is an adapter too; only an "
                         f"adapter on a whole model can be read")
    return config


def adapter_base(folder):
    """Hub name or folder of the model that an adapter was trained on."""
    return adapter_config(folder).base_model_name_or_path


def save_adapter(model, folder, base):
    """adapter_config.json + adapter_model.safetensors with the key names that PEFT gives the official model class."""
    folder, family = Path(folder), model.cfg.family
    folder.mkdir(parents=True, exist_ok=True)
    adapted = {n: m for n, m in model.named_modules() if isinstance(m, Linear) and m.lora_rank}
    tensors = {f"base_model.model.{official_name(n, family)}.lora_{x}.weight": getattr(m, f"lora_{x}")
               for n, m in adapted.items() for x in "AB"}
    first = next(iter(adapted.values()))
    alpha = round(first.lora_scale * first.lora_rank, 6)
    # a regular expression over full names: by its last name alone, LLaDA's head (also "ff_out") would be adapted too
    names = sorted({re.sub(r"\d+", r"\\d+", official_name(n, family).replace(".", r"\.")) for n in adapted})
    config = dict(peft_type="LORA", task_type=None, base_model_name_or_path=str(base), r=first.lora_rank,
                  lora_alpha=int(alpha) if alpha == int(alpha) else alpha, lora_dropout=first.lora_dropout,
                  bias="none", fan_in_fan_out=False, inference_mode=True, target_modules="|".join(names))
    # PEFT refuses or warns of entries that it does not know, so the one number that would be silently wrong, alpha, is
    # repeated beside the weights instead of a checksum
    save_tensors(tensors, folder / "adapter_model.safetensors", lora_alpha=str(config["lora_alpha"]))
    write_json(folder / "adapter_config.json", config, checksum=False)


def load_adapter(model, folder):
    """Put a PEFT LoRA adapter on a loaded backbone. ValueError names what does not fit."""
    folder = Path(folder)
    config, shard = adapter_config(folder), open_shard(folder / "adapter_model.safetensors")
    alpha = (shard.metadata() or {}).get("lora_alpha", str(config.lora_alpha))
    if alpha != str(config.lora_alpha):
        raise ValueError(f"{folder}: trained with lora_alpha = {alpha}, but adapter_config.json says {config.lora_alpha}")
    ours = {official_name(n, model.cfg.family): m for n, m in model.named_modules() if isinstance(m, Linear)}
    keys = set(shard.keys())
    for key in sorted(keys):                    # an A stands before its B
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        other = match and f"base_model.model.{match[1]}.lora_{'B' if match[2] == 'A' else 'A'}.weight"
        if not match or match[1] not in ours or other not in keys:
            raise ValueError(f"{folder}: adapter tensor {key} belongs to no linear layer of this {model.cfg.family} backbone")
        module = ours[match[1]]
        if match[2] == "A":
            module.add_lora(config.r, config.lora_alpha, dropout=config.lora_dropout)
        parameter, value = getattr(module, f"lora_{match[2]}"), shard.get_tensor(key)
        if value.shape != parameter.shape or not value.is_floating_point():
            raise ValueError(f"{folder}: {key} is {value.dtype} of shape {list(value.shape)}, expected floats of shape "
                             f"{list(parameter.shape)} (r = {config.r})")
        if not value.isfinite().all():
            raise ValueError(f"{folder}: {key} holds NaN or infinity")
        parameter.data = value.float().to(model.device)
    return model.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Tokenizers and chat formats.

def load_tokenizer(name_or_path):
    """The transformers tokenizer of a checkpoint, without trust_remote_code."""
    if name_or_path == "tiny":
        from niah import tiny_tokenizer         # the closed vocabulary lives where the texts are made
        return tiny_tokenizer()
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
    folder = find_folder(name_or_path)
    if (folder / "adapter_config.json").exists():
        return load_tokenizer(adapter_base(folder))
    config = read_json(folder / "config.json")
    dream = family_of(config, folder / "config.json") == "dream" and (folder / "vocab.json").exists()
    try:                                        # AutoTokenizer would ask for Dream's remote class; Qwen2's gives the same ids
        tokenizer = (Qwen2Tokenizer if dream else PreTrainedTokenizerFast).from_pretrained(str(folder))
    except Exception as e:
        raise ValueError(f"{folder}: no tokenizer could be read ({brief(e)})") from e
    if config.get("vocabulary") not in (None, vocabulary_hash(tokenizer)):
        raise ValueError(f"{folder}: the tokenizer has another vocabulary than the one the model was trained with")
    return tokenizer


def vocabulary_hash(tokenizer):
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


# LLaDA-MoE's card could not be read here; this is the format of the same authors' LLaDA2 (assumed)
ROLE_TEMPLATE = ("{% for m in messages %}<role>{{ {'system':'SYSTEM','user':'HUMAN','assistant':'ASSISTANT'}[m.role] }}</role>"
                 "{{ m.content }}<|role_end|>{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}")


def chat_text(tokenizer, cfg, messages, reply):
    """messages as text; reply: end where the assistant's answer starts. LLaDA's template always opens an assistant turn, so
    for a finished conversation (training) that spurious header is cut off again."""
    template = tokenizer.chat_template or (ROLE_TEMPLATE if cfg.family == "llada_moe" else None)
    if template is None:
        return " ".join(m["content"] for m in messages) + (" " if messages[-1]["role"] == "user" else "")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply, chat_template=template)
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    return text.removesuffix(header) if cfg.family == "llada" and not reply else text


def encode(tokenizer, text):
    """Text -> list of ids, nothing added. ValueError names words outside a closed vocabulary and half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"the text holds half a character, a lone surrogate {text[e.start]!r}, at position "
                         f"{e.start}") from None
    if tokenizer.unk_token is None and tokenizer.backend_tokenizer.model.__class__.__name__ == "WordLevel":
        unknown = [w for w in dict.fromkeys(text.split()) if w not in tokenizer.get_vocab()]
        if unknown:
            raise ValueError(f"words outside the closed vocabulary: {' '.join(unknown[:10])}"
                             f"{' ...' if len(unknown) > 10 else ''} (python sample.py --vocabulary lists it)")
    return tokenizer.encode(text, add_special_tokens=False)


def encode_prompt(tokenizer, cfg, text):
    """A prompt as the model expects it: through the chat template for Instruct models, raw (with BOS for Dream) for Base."""
    if cfg.chat:
        ids = encode(tokenizer, chat_text(tokenizer, cfg, [{"role": "user", "content": text}], reply=True))
    else:
        ids = ([cfg.bos_id] if cfg.bos_id is not None else []) + encode(tokenizer, text)
    if not ids:
        raise ValueError("the prompt is empty")
    return ids


def encode_pair(tokenizer, cfg, example):
    """{"prompt", "response"} or {"messages": [...]} (the last one is the response) -> prompt ids, response ids with its end."""
    if "messages" in example or cfg.chat:
        messages = example.get("messages") or [{"role": "user", "content": example["prompt"]},
                                               {"role": "assistant", "content": example["response"]}]
        prompt = chat_text(tokenizer, cfg, messages[:-1], reply=True)
        response = encode(tokenizer, chat_text(tokenizer, cfg, messages, reply=False)[len(prompt):])
        prompt = encode(tokenizer, prompt)
    else:
        prompt, response = encode_prompt(tokenizer, cfg, example["prompt"]), encode(tokenizer, example["response"])
    if not prompt or not response:
        raise ValueError(f"the {'response' if prompt else 'prompt'} is empty")
    return prompt, response + ([] if response[-1] in cfg.stop_ids else [cfg.eos_id])


# ----------------------------------------------------------------------------------------------------------------------
# 7. Command line.

def cli(main):
    """Run main(); bad input ends as one line on stderr and exit code 2, not as a traceback."""
    try:
        main()
    except (ValueError, OSError) as e:
        close_bars()
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        close_bars()
        print("interrupted (a training run goes on with --resume)", file=sys.stderr)
        sys.exit(130)


def close_bars():
    """End every open progress bar's line, so that what is printed next starts on its own."""
    for bar in list(tqdm._instances):
        bar.close()


DEMO_QUESTION = ("Lily can run 12 kilometers per hour for 4 hours. After that, she runs 6 kilometers per hour. "
                 "How many kilometers can she run in 8 hours?")


def check():
    parser = argparse.ArgumentParser(description="Load a checkpoint and show what it predicts.")
    parser.add_argument("--check", metavar="REPO", required=True, help="hub name or folder")
    parser.add_argument("--device", help="default: cuda, mps or cpu, whichever is there")
    parser.add_argument("--prompt", help="default: the question of LLaDA's official demo (49 ids through its chat template)")
    args = parser.parse_args()
    tokenizer, model = load_tokenizer(args.check), load_backbone(args.check, args.device)
    question = args.prompt or DEMO_QUESTION
    size = sum(p.numel() for p in model.parameters())
    print(f"{args.check}: {model.cfg.family}, {size:,} parameters, {model.dtype}, {model.device}")
    ids = encode_prompt(tokenizer, model.cfg, question)
    print(f"prompt ({len(ids)} ids): {' '.join(map(str, ids))}")
    xt = torch.tensor([ids + [model.cfg.mask_id]], device=model.device)
    with torch.no_grad():
        probs = model(xt, at=xt == model.cfg.mask_id)[-1].float().softmax(-1)
    top = zip(*(x.tolist() for x in probs.topk(5)))
    print("at one [MASK] after it:", ", ".join(f"{tokenizer.decode([i])!r} {p:.3f}" for p, i in top))


if __name__ == "__main__":
    cli(check)
