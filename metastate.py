"""MetaState: memory in activations. A fixed-size bank of slots persists across denoising steps of a frozen backbone.

Paper: MetaState (arXiv 2603.01331); of its body only the abstracts (v1, v2) could be read here, so the details are ours.
Idea: between two denoising steps a diffusion LM keeps only the committed tokens; whatever else it had worked out is computed
again ("Information Island"). MetaState lets every step read what the last one wrote: the Injector adds the slots to the
activations, the backbone runs, the Mixer reads the activations, the Updater merges what was read into the slots. On the tiny
model this is one hop of reasoning more with every step (task `resolve`; README, Results).
Equations (ours): s_k = Updater(Mixer(h_k, s_{k-1}), s_{k-1}) -> step; K-step unrolled loss -> loss_unrolled
Shapes: B batch, L tokens, D backbone width, M slots, S slot width (d_s), C conditioner width, N chosen positions, H heads
Read as (the abstracts leave it open; measured effects are in the README):
- Order in a step: inject s_{k-1}, run the backbone, read, update. The first step injects the learned s_0.
- Where: inject before `inject_layers`, read after `read_layer`. Layers below the first injection never get a gradient.
- The Injector's output projection starts at zero: an untrained MetaState is the frozen backbone, bit for bit.
- Positions: a sinusoidal code of the offset from the start of the answer is added to the Mixer's keys and the Injector's
  queries; each slot has a learned place to read at and one to write at, at first spread over prompt and answer. At the embedding
  all masks look the same, so without a code nothing is learned; with places on the answer alone hardly anything either: what a
  second pass needs is what the first one worked out about the prompt.
- Time: one conditioner c(t), t = the actual mask ratio of the answer, scales and shifts the norms of all modules.
Controls: memory = "reset" (slots put back to s_0 at every step: same modules, no persistence) and "feedback" (an MLP on all
activations of the previous step, no bottleneck: an upper bound).
Run: python train.py --method metastate
"""
import dataclasses
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from backbone import corrupt, load_backbone, open_shard, option, read_json, save_tensors, write_atomically


@dataclass
class MetaStateConfig:
    """Defaults: the tiny preset. At LLaDA-8B and Dream-7B `for_backbone` gives 0.6 % trainable parameters."""
    num_slots: int = option(32, "M, memory slots", low=1)
    slot_dim: int = option(64, "S; also the width of the attention", low=2)
    slot_heads: int = option(4, "H, attention heads", low=1)
    cond_dim: int = option(64, "C, width of the time conditioner", low=2)
    span: int = option(64, "tokens before the answer over which the slots' places are spread at the "
                       "start", low=1)
    inject_layers: tuple = option((0,), "inject before these layers; the number of layers = before "
                                  "the head", low=0, nargs="+")
    read_layer: int = option(-1, "read after this layer; -1 = the last one")
    unroll: int = option(4, "K, denoising steps per training update", low=1)
    memory: str = option("slots", "slots | reset | feedback", choices=["slots", "reset", "feedback"])

    def check(self, n_layers):
        """ValueError for what cannot be built on a backbone of n_layers layers."""
        if self.slot_dim % self.slot_heads:
            raise ValueError(f"slot_dim={self.slot_dim} is not a multiple of slot_heads={self.slot_heads}")
        if self.slot_dim // self.slot_heads % 2 or self.cond_dim % 2:
            raise ValueError(f"slot_dim / slot_heads = {self.slot_dim // self.slot_heads} and cond_dim={self.cond_dim} must "
                             f"be even: their codes are pairs of sine and cosine")
        if min(self.num_slots, self.unroll, self.span) < 1:
            raise ValueError(f"num_slots={self.num_slots}, unroll={self.unroll} and span={self.span} must be at least 1")
        layers = sorted(set(self.inject_layers))
        if not layers or not 0 <= layers[0] <= layers[-1] <= n_layers or not -n_layers <= self.read_layer < n_layers:
            raise ValueError(f"inject_layers={self.inject_layers}, read_layer={self.read_layer}: the backbone has layers "
                             f"0..{n_layers - 1} (inject at {n_layers}: before the head)")
        if self.memory not in ("slots", "reset", "feedback"):
            raise ValueError(f"unknown memory {self.memory!r}: slots, reset, feedback")
        return layers, self.read_layer % n_layers


def for_backbone(cfg):
    """The configuration for a backbone: the tiny preset's as above; for a real one slots of width 1,024 (0.6 % of LLaDA-8B),
    injected in the middle, where activations know their positions and half the layers are left to use what comes in."""
    if cfg.family == "tiny":
        return MetaStateConfig()
    return MetaStateConfig(num_slots=64, slot_dim=1024, slot_heads=16, cond_dim=1024, span=1024,
                           inject_layers=(cfg.n_layers // 2,))


def sinusoid(x, dim, longest):
    """x (...) real numbers -> (..., dim): pairs of sine and cosine with wavelengths from 4 to 4 * longest. Two codes agree (dot
    product dim / 2) where their numbers do, and the less the farther apart they are."""
    freq = math.pi / 2 * longest ** (-torch.arange(dim // 2, device=x.device) / (dim // 2))
    angles = x[..., None].float() * freq
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def linear(d_in, d_out):
    """nn.Linear with unit gain: its default init shrinks a signal by 0.58, and six of them lie between reading and injecting."""
    layer = nn.Linear(d_in, d_out)
    nn.init.normal_(layer.weight, 0, d_in ** -0.5), nn.init.zeros_(layer.bias)
    return layer


class TimeConditioner(nn.Module):
    """c(t) (B, C), shared by all three modules."""
    def __init__(self, cond_dim):
        super().__init__()
        self.cond_dim = cond_dim
        self.mlp = nn.Sequential(nn.Linear(cond_dim, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim), nn.SiLU())

    def forward(self, t):                                                   # (B,); 1000 t: the usual scale of time features
        return self.mlp(sinusoid(1000 * t, self.cond_dim, longest=10000))


class AdaRMSNorm(nn.Module):
    """RMSNorm whose scale and shift come from c(t); zero-initialised, so it starts as a plain RMSNorm."""
    def __init__(self, dim, cond_dim):
        super().__init__()
        self.dim, self.scale_shift = dim, nn.Linear(cond_dim, 2 * dim)
        nn.init.zeros_(self.scale_shift.weight), nn.init.zeros_(self.scale_shift.bias)

    def forward(self, x, c):                                                # (B, n, dim), (B, C)
        scale, shift = self.scale_shift(c)[:, None].chunk(2, dim=-1)        # (B, 1, dim)
        return F.rms_norm(x, (self.dim,), eps=1e-5) * (1 + scale) + shift


def attention(q, k, v, heads, attend=None):
    """(B, Q, S), (B, n, S), (B, n, S) -> (B, Q, S) and the weights (B, H, Q, n). Q or n is the number of slots, so this is
    linear in L. attend (B, n) bool hides padding."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])                              # (B, H, Q, n)
    if attend is not None:
        scores = scores.masked_fill(~attend[:, None, None], -torch.inf)
    weights = scores.softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2), weights


class Mixer(nn.Module):
    """Reads: slots are the queries, the backbone's activations the keys and values."""
    def __init__(self, D, cfg):
        super().__init__()
        S, self.heads = cfg.slot_dim, cfg.slot_heads
        self.norm_slots, self.norm_h = AdaRMSNorm(S, cfg.cond_dim), AdaRMSNorm(D, cfg.cond_dim)
        self.q, self.k, self.v, self.o = linear(S, S), linear(D, S), linear(D, S), linear(S, S)

    def forward(self, slots, h, c, own, place, attend):                     # (B, M, S), (B, L, D), (B, C), (M, S), (1, L, S)
        h = self.norm_h(h, c)
        read, weights = attention(self.q(self.norm_slots(slots, c)) + own, self.k(h) + place, self.v(h), self.heads, attend)
        return self.o(read), weights                                        # (B, M, S), (B, H, M, L)


class Updater(nn.Module):
    """Merges: a GRU cell per slot, what was read is its input, the old slot its hidden state (torch.nn.GRUCell's gates)."""
    def __init__(self, cfg):
        super().__init__()
        S = cfg.slot_dim
        self.norm_read = AdaRMSNorm(S, cfg.cond_dim)
        self.x, self.s = linear(S, 3 * S), linear(S, 3 * S)                 # gates r, z and candidate n, in GRUCell's order
        nn.init.constant_(self.x.bias[S:2 * S], -1.0)                       # z = 0.27: at first mostly what was just read

    def gates(self, read, slots):
        (xr, xz, xn), (sr, sz, sn) = self.x(read).chunk(3, -1), self.s(slots).chunk(3, -1)
        r, z = torch.sigmoid(xr + sr), torch.sigmoid(xz + sz)
        n = torch.tanh(xn + r * sn)
        return (1 - z) * n + z * slots

    def forward(self, read, slots, c):                                      # (B, M, S), (B, M, S), (B, C)
        return self.gates(self.norm_read(read, c), slots)


class Injector(nn.Module):
    """Writes back: activations are the queries, slots the keys and values; the result is added to the activations."""
    def __init__(self, D, cfg):
        super().__init__()
        S, self.heads = cfg.slot_dim, cfg.slot_heads
        self.norm_slots, self.norm_h = AdaRMSNorm(S, cfg.cond_dim), AdaRMSNorm(D, cfg.cond_dim)
        self.q, self.k, self.v, self.o = linear(D, S), linear(S, S), linear(S, S), linear(S, D)
        nn.init.zeros_(self.o.weight), nn.init.zeros_(self.o.bias)

    def forward(self, h, slots, c, own, place):                             # (B, L, D), (B, M, S), (B, C), (M, S), (1, L, S)
        slots = self.norm_slots(slots, c)
        return self.o(attention(self.q(self.norm_h(h, c)) + place, self.k(slots) + own, self.v(slots), self.heads)[0])


class Feedback(nn.Module):
    """Control, an upper bound: all activations of the previous step through an MLP, at every position, no bottleneck."""
    def __init__(self, D, cfg):
        super().__init__()
        self.norm, self.up, self.o = AdaRMSNorm(D, cfg.cond_dim), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        nn.init.zeros_(self.o.weight), nn.init.zeros_(self.o.bias)

    def forward(self, h, previous, c, own, place):                          # (B, L, D) twice; h, own and place are not used
        return self.o(F.silu(self.up(self.norm(previous, c))))


class MetaState(nn.Module):
    """The trainable part, fp32 whatever the backbone's dtype. Holds parameters only: slots go in and come out."""
    def __init__(self, backbone_cfg, cfg):
        super().__init__()
        self.cfg, (self.inject_layers, self.read_layer) = cfg, cfg.check(backbone_cfg.n_layers)
        D = backbone_cfg.d_model
        self.time = TimeConditioner(cfg.cond_dim)
        if cfg.memory == "feedback":
            self.injectors = nn.ModuleList(Feedback(D, cfg) for _ in self.inject_layers)
        else:
            self.s0 = nn.Parameter(0.02 * torch.randn(cfg.num_slots, cfg.slot_dim))
            # at the start the slots' places are spread evenly over the end of the prompt and the start of the answer; all learned
            at = torch.linspace(-cfg.span, cfg.span / 8, cfg.num_slots)
            self.read_at, self.write_at = nn.Parameter(self.place_code(at)), nn.Parameter(self.place_code(at))  # (M, S)
            self.mixer, self.updater = Mixer(D, cfg), Updater(cfg)
            self.injectors = nn.ModuleList(Injector(D, cfg) for _ in self.inject_layers)

    def place_code(self, offset):
        """The place `offset` tokens from the start of the answer, the same code for each head: (...) -> (..., S).

        In units of the distance between two slots; the factor 3 lets a slot start out looking at about one place."""
        unit = self.cfg.span / self.cfg.num_slots
        return 3 * sinusoid(offset / unit, self.cfg.slot_dim // self.cfg.slot_heads, longest=64).tile(self.cfg.slot_heads)

    def step(self, backbone, ctx, xt, t, slots, at, start, phi={}):
        """One denoising step with memory. xt (B, L); t (B,); slots (B, M, S) or None for s_0; at (B, L) where logits are wanted;
        start: index of the first answer token; phi: MemDLM's fast weights, when both memories are used.
        Returns logits (N, V), slots (B, M, S), the Mixer's weights (B, H, M, L)."""
        c, weights, last = self.time(t), None, backbone.cfg.n_layers
        place = self.place_code(torch.arange(xt.shape[1], device=xt.device)[None] - start)                     # (1, L, S)
        attend = ctx.attend                                               # (B, L)
        fresh = slots is None or self.cfg.memory == "reset"
        old = self.s0.expand(len(xt), -1, -1) if fresh and self.cfg.memory != "feedback" else slots
        with torch.no_grad():                                               # the same for every memory: no gradient needed
            h = backbone.run(backbone.embed(xt), ctx, 0, self.inject_layers[0], phi)
        for i in range(self.inject_layers[0], last + 1):
            # inject what the previous step left
            if i in self.inject_layers and old is not None:
                injector = self.injectors[self.inject_layers.index(i)]
                h = h + injector(h.float(), old, c, getattr(self, "write_at", None), place).to(h.dtype)
            # read and update
            if i == self.read_layer + 1:
                if self.cfg.memory == "feedback":
                    slots = h.float()
                else:
                    read, weights = self.mixer(old, h.float(), c, self.read_at, place, attend)
                    slots = self.updater(read, old, c)
            # a frozen layer: gradients pass through it to the Injector, its weights get none
            h = backbone.run(h, ctx, i, min(i + 1, last), phi)
        logits = backbone.head(h, ctx, at)
        return logits, slots, weights

    def memory(self, under=None):
        """The `memory` argument of sample.generate. Slots start at s_0 and run on through all blocks. Guidance's copy without a
        prompt is called with state None: it starts from s_0 at every step and never carries the prompt's slots.

        under: a memory whose state is phi (memdlm.prompt_memory), for both memories at once. The state is (slots, phi, weights);
        weights (B, H, M, L) is what the Mixer looked at, for display."""
        def memory(backbone, xt, attend, start):
            phi = under(backbone, xt, attend, start)[1] if under else {}

            def predict(xt, t, state, at):
                slots, phi, _ = state or (None, {}, None)
                logits, slots, weights = self.step(backbone, backbone.context(xt, attend), xt, t, slots, at, start, phi)
                return logits, (slots, phi, weights)
            return predict, (None, phi, None)
        return memory


ARMS = {"slots": "metastate", "reset": "reset", "feedback": "feedback"}     # MetaStateConfig.memory -> the arm's name in tables


def loss_unrolled(model, backbone, x0, given, attend, t, stay, steps, first_loss, u, n_rows):
    """The K-step unrolled loss. x0, given, attend, u (B, L); t (B,) the first state's mask ratio; stay (B,) bool: rows whose
    canvas does not change; steps = K; first_loss: the first step that bears loss; n_rows: of the whole batch, all micro-batches
    and ranks. Answers stand at the end of the rows.

    Gradients reach the modules through all K steps: through the slots, and through the frozen layers above the injection."""
    mask_id, ctx = backbone.cfg.mask_id, backbone.context(x0, attend)
    start = int(given.all(0).long().cumprod(0).sum())
    # 1. The first state, M_1; at least one token of each row is masked, so that every row has a trajectory
    u = u.masked_fill(given, 2.0)
    xt, masked = corrupt(x0, torch.maximum(t, u.min(1).values + 1e-6), given, mask_id, u)
    slots, loss = None, 0.0                                                 # None = s_0
    for k in range(steps):
        # 2. One denoising step with memory
        count = masked.sum(1)
        logits, slots, _ = model.step(backbone, ctx, xt, count / (~given).sum(1), slots, masked, start)
        # 3. Its loss: mean over a row's masked tokens, mean over rows, mean over the steps that bear loss
        if k >= first_loss:
            ce = F.cross_entropy(logits.float(), x0[masked], reduction="none")
            loss = loss + (ce / count[masked.nonzero()[:, 0]]).sum() / n_rows / (steps - first_loss)
        # 4. The next state: reveal the surest masked token, as the sampler will, with its true value: M_{k+1} inside M_k
        p = logits.detach().float().softmax(-1).max(-1).values              # (N,)
        confidence = torch.full(xt.shape, -1.0, device=xt.device).masked_scatter(masked, p)
        reveal = F.one_hot(confidence.argmax(1), xt.shape[1]).bool()
        reveal &= (~stay & (count > 1))[:, None]                            # the last mask stays: every state has a loss
        xt, masked = torch.where(reveal, x0, xt), masked & ~reveal
    return loss


def save(model, folder, base, mark):
    """metastate.safetensors + metastate.json, which names the backbone (folder or hub name) and its fingerprint, `mark`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(dict(model.named_parameters()), folder / "metastate.safetensors")
    config = dict(backbone=str(base), fingerprint=mark, config=asdict(model.cfg))
    write_atomically(folder / "metastate.json", lambda path: Path(path).write_text(json.dumps(config, indent=1)))


def load(folder, device=None, dtype=None):
    """Returns model, its backbone, and the backbone's name. ValueError if the backbone is not the one it was trained on."""
    folder = Path(folder)
    config = read_json(folder / "metastate.json")
    try:
        backbone = load_backbone(config["backbone"], device, dtype).requires_grad_(False)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{e} (the backbone named in {folder}/metastate.json; a relative path counts from here)") from None
    if fingerprint(backbone) != config["fingerprint"]:
        raise ValueError(f"{folder} was trained on another backbone (or in another dtype) than the one now at "
                         f"{config['backbone']}")
    model = MetaState(backbone.cfg, MetaStateConfig(**config["config"]))
    shard, own = open_shard(folder / "metastate.safetensors"), dict(model.named_parameters())
    if set(shard.keys()) != own.keys() or any(shard.get_slice(k).get_shape() != list(p.shape) for k, p in own.items()):
        raise ValueError(f"{folder}/metastate.safetensors does not fit its metastate.json")
    model.load_state_dict({k: shard.get_tensor(k) for k in own})
    return model.to(backbone.device).eval(), backbone, config["backbone"]


def fingerprint(backbone):
    """A short hash of the configuration, the dtype and the first weights of every tensor."""
    digest = hashlib.sha256(repr((dataclasses.replace(backbone.cfg, chat=False), backbone.dtype)).encode())
    for name, p in backbone.named_parameters():
        digest.update(name.encode() + p.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
