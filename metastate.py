"""MetaState: memory in activations. A fixed-size bank of slots persists across the denoising steps
of a frozen backbone.

Paper: MetaState (arXiv 2603.01331). Its two abstracts were read, its body and code could NOT be.
What is known of them second-hand comes from a later paper ("On Trajectory-Aware Training for Masked
Diffusion LMs", 2026, appendices F and G) and a design note of another memory. Check the PDF.
Idea: between two denoising steps a diffusion LM keeps only the committed tokens; whatever else it
had worked out is computed again (the "Information Island"). MetaState carries it over in slots: the
Injector writes them into the activations, the backbone runs, the Mixer reads the activations, the
Updater merges what was read into the slots. On the tiny model this is one hop of reasoning more
with every step (task `resolve`; README).
Equations: s_k = Updater(Mixer(h_k, s_{k-1}), s_{k-1}) -> step; the unrolled loss -> loss_unrolled
Shapes: B batch, L tokens, D backbone width, M slots, S slot width (d_s), C conditioner width,
        N chosen positions, H heads, K denoising steps
Published (abstracts): a frozen backbone; slots of a fixed size, whatever the length; Mixer,
GRU-style Updater, Injector and what each does; one time conditioner for all; K-step unrolling;
0.6 % more parameters.
Second-hand: K = 4; the loss; K steps that partition the trajectory; random reveals; slots with
learned identities; AdaRMSNorm from the time conditioner; queries of the tokens that know their
position; detaching the slots between steps hurts (control `Detached`).
Ours:
- Order in a step: inject s_{k-1}, run the backbone, read, update; s_0 is learned.
- Size: 0.66 % of LLaDA-8B's parameters, 0.64 % of Dream-7B's, 64 % of the tiny backbone's.
- Places: inject before `inject_layers` (real models: the middle one), read after the last layer.
- The Injector's output projection starts at zero: an untrained MetaState is the frozen backbone.
- Positions: a sinusoidal code of the offset from the start of the answer, on the Mixer's keys and
  the Injector's queries; each slot has a learned place to read at and one to write at. At the
  embedding all masks look the same, so without it nothing is learned.
- Time: t is the actual mask ratio of the answer.
- lambda = 0.5; a Dirichlet of concentration 0.5 (real models: 1); on the tiny model K = 5, for
  four hops, and a curriculum, without which it does not always learn to use the slots.
Run: python train.py --method metastate
"""
import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from backbone import (answer_start, config_from_dict, load_backbone, open_shard, option, read_json,
                      save_tensors, smallest, validate, write_json)


@dataclass
class MetaStateConfig:
    """Defaults: the tiny preset. `for_backbone` gives those of a real one."""
    num_slots: int = option(32, "M, memory slots", low=1)
    slot_dim: int = option(64, "S, width of a slot and of the attention", low=2)
    slot_heads: int = option(4, "H, attention heads", low=1)
    cond_dim: int = option(64, "C, width of the time conditioner", low=2)
    span: int = option(64, "tokens before the answer that the slots' places cover at first", low=1)
    inject_layers: tuple = option((0,), "inject before these layers (or their number: the head)", 0)
    read_layer: int = option(-1, "read after this layer; -1 = the last one")
    unroll: int = option(5, "K, denoising steps of a training update", low=1)
    balance: float = option(0.5, "lambda: share of the loss on all masked tokens", 0, 1)
    curriculum: float = option(0.4, "share of the training in which one step reveals all", 0, 1)
    concentration: float = option(0.5, "of the Dirichlet of reveals; small: most in one step", 0.01)
    memory: str = option("slots", "slots, or a control: reset, detached, feedback, logits",
                         choices=["slots", "reset", "detached", "feedback", "logits"])

    def check(self, n_layers):
        """Validate for a backbone of n_layers layers. Returns the layers to inject before and the
        one to read after; ValueError for what cannot be built."""
        validate(self)
        head_dim, left = divmod(self.slot_dim, self.slot_heads)
        if left:
            raise ValueError(f"slot_dim={self.slot_dim} is not a multiple of "
                             f"slot_heads={self.slot_heads}")
        if head_dim % 2 or self.cond_dim % 2:
            raise ValueError(f"slot_dim / slot_heads = {head_dim} and cond_dim={self.cond_dim} "
                             f"must be even: their codes are pairs of sine and cosine")
        layers = sorted(set(self.inject_layers))
        where = f"inject_layers={self.inject_layers}, read_layer={self.read_layer}"
        if not layers or layers[-1] > n_layers or not -n_layers <= self.read_layer < n_layers:
            raise ValueError(f"{where}: there are layers 0..{n_layers - 1}; {n_layers} is the head")
        read_layer = self.read_layer % n_layers
        if read_layer + 1 < layers[0]:
            raise ValueError(f"{where}: the slots are read before they are first injected")
        return layers, read_layer


def for_backbone(config):
    """The tiny preset's settings, as above; for a real backbone slots of width 1,024, injected in
    the middle, where activations know their positions and half of the layers can use them."""
    if config.family == "tiny":
        return MetaStateConfig()
    return MetaStateConfig(num_slots=64, slot_dim=1024, slot_heads=16, cond_dim=1024, span=1024,
                           unroll=4, curriculum=0.0, concentration=1.0,
                           inject_layers=(config.n_layers // 2,))


# 1. The modules -----------------------------------------------------------------------------------

def sinusoid(x, dim, longest):
    """x (...) real numbers -> (..., dim): pairs of sine and cosine, wavelengths 4 to 4 * longest.
    The dot product of two codes falls with the distance of their numbers."""
    frequency = math.pi / 2 * longest ** (-torch.arange(dim // 2, device=x.device) / (dim // 2))
    angles = x[..., None].float() * frequency
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def linear(d_in, d_out, zero=False):
    """nn.Linear with unit gain (by default it shrinks a signal by 0.58), or (zero) the zero map."""
    layer = nn.Linear(d_in, d_out)
    nn.init.normal_(layer.weight, 0, 0.0 if zero else d_in ** -0.5)
    nn.init.zeros_(layer.bias)
    return layer


class TimeConditioner(nn.Module):
    """c(t) (B, C), shared by all three modules."""
    def __init__(self, cond_dim):
        super().__init__()
        self.cond_dim = cond_dim
        self.mlp = nn.Sequential(nn.Linear(cond_dim, cond_dim), nn.SiLU(),
                                 nn.Linear(cond_dim, cond_dim), nn.SiLU())

    def forward(self, t):                                                   # (B,)
        # 1000 t: the usual scale of time features
        return self.mlp(sinusoid(1000 * t, self.cond_dim, longest=10000))


class AdaRMSNorm(nn.Module):
    """x / rms(x) * (1 + scale(c)) + shift(c), with scale = shift = 0 at the start."""
    def __init__(self, dim, cond_dim):
        super().__init__()
        self.dim = dim
        self.scale_shift = nn.Linear(cond_dim, 2 * dim)
        nn.init.zeros_(self.scale_shift.weight)
        nn.init.zeros_(self.scale_shift.bias)

    def forward(self, x, c):                                                # (B, n, dim), (B, C)
        scale, shift = self.scale_shift(c)[:, None].chunk(2, dim=-1)        # (B, 1, dim)
        return F.rms_norm(x, (self.dim,), eps=1e-5) * (1 + scale) + shift


def attention(q, k, v, heads, visible=None):
    """(B, Q, S), (B, n, S), (B, n, S) -> (B, Q, S) and the weights (B, H, Q, n). Q or n is the
    number of slots, so the cost is linear in L. visible (B, n) bool hides padding."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))     # (B, H, _, d)
    # softmax(q k^T / sqrt(d)) v
    scores = q @ k.mT / math.sqrt(q.shape[-1])                                      # (B, H, Q, n)
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    weights = scores.softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2), weights


class Mixer(nn.Module):
    """Reads: slots are the queries, the backbone's activations the keys and values."""
    def __init__(self, D, settings):
        super().__init__()
        S = settings.slot_dim
        self.heads = settings.slot_heads
        self.norm_slots = AdaRMSNorm(S, settings.cond_dim)
        self.norm_h = AdaRMSNorm(D, settings.cond_dim)
        self.q = linear(S, S)
        self.k = linear(D, S)
        self.v = linear(D, S)
        self.o = linear(S, S)

    def forward(self, slots, h, c, read_at, place, visible):
        """slots (B, M, S), h (B, L, D), c (B, C), read_at (M, S), place (1, L, S), visible (B, L)
        -> what was read (B, M, S), the weights (B, H, M, L)."""
        h = self.norm_h(h, c)
        q = self.q(self.norm_slots(slots, c)) + read_at                     # (B, M, S)
        k = self.k(h) + place                                               # (B, L, S)
        read, weights = attention(q, k, self.v(h), self.heads, visible)
        return self.o(read), weights


class Updater(nn.Module):
    """Merges: a GRU cell per slot. What was read is its input, the old slot its hidden state."""
    def __init__(self, settings):
        super().__init__()
        S = settings.slot_dim
        self.norm_read = AdaRMSNorm(S, settings.cond_dim)
        # gates r and z and the candidate n, in the order of torch.nn.GRUCell
        self.x = linear(S, 3 * S)
        self.s = linear(S, 3 * S)
        # z = 0.27: at first a slot keeps mostly what was just read
        nn.init.constant_(self.x.bias[S:2 * S], -1.0)

    def cell(self, read, slots):                                            # (B, M, S) twice
        x_r, x_z, x_n = self.x(read).chunk(3, -1)
        s_r, s_z, s_n = self.s(slots).chunk(3, -1)
        # r = sigma(W_r x + U_r s)
        r = torch.sigmoid(x_r + s_r)
        # z = sigma(W_z x + U_z s)
        z = torch.sigmoid(x_z + s_z)
        # n = tanh(W_n x + r * U_n s)
        n = torch.tanh(x_n + r * s_n)
        # s' = (1 - z) * n + z * s
        return (1 - z) * n + z * slots

    def forward(self, read, slots, c):                          # (B, M, S), (B, M, S), (B, C)
        return self.cell(self.norm_read(read, c), slots)


class Injector(nn.Module):
    """Writes: activations are the queries, slots the keys and values; the result is added."""
    def __init__(self, D, settings):
        super().__init__()
        S = settings.slot_dim
        self.heads = settings.slot_heads
        self.norm_slots = AdaRMSNorm(S, settings.cond_dim)
        self.norm_h = AdaRMSNorm(D, settings.cond_dim)
        self.q = linear(D, S)
        self.k = linear(S, S)
        self.v = linear(S, S)
        self.o = linear(S, D, zero=True)

    def forward(self, h, slots, c, write_at, place):
        """h (B, L, D), slots (B, M, S), c (B, C), write_at (M, S), place (1, L, S) -> (B, L, D)."""
        slots = self.norm_slots(slots, c)
        q = self.q(self.norm_h(h, c)) + place                               # (B, L, S)
        k = self.k(slots) + write_at                                        # (B, M, S)
        written, _ = attention(q, k, self.v(slots), self.heads)
        return self.o(written)


# 2. One denoising step with memory ----------------------------------------------------------------

class MetaState(nn.Module):
    """The trainable part, in fp32. It holds parameters only: slots go in and come out."""
    def __init__(self, backbone_config, settings):
        super().__init__()
        self.settings = settings
        self.inject_layers, self.read_layer = settings.check(backbone_config.n_layers)
        self.time = TimeConditioner(settings.cond_dim)
        self.add_modules(backbone_config.d_model, settings)

    def add_modules(self, D, settings):
        M = settings.num_slots
        self.s0 = nn.Parameter(0.02 * torch.randn(M, settings.slot_dim))
        # places: at first even over the last `span` tokens of the prompt, span / 8 of the answer
        offsets = torch.linspace(-settings.span, settings.span / 8, M)
        self.read_at = nn.Parameter(self.place_code(offsets))               # (M, S)
        self.write_at = nn.Parameter(self.place_code(offsets))              # (M, S)
        self.mixer = Mixer(D, settings)
        self.updater = Updater(settings)
        self.injectors = nn.ModuleList(Injector(D, settings) for _ in self.inject_layers)

    def place_code(self, offset):
        """The place `offset` tokens from the start of the answer, (...) -> (..., S), for each head
        the same, in units of span / M. The factor 3 lets a slot look at about one place."""
        heads = self.settings.slot_heads
        unit = self.settings.span / self.settings.num_slots
        code = sinusoid(offset / unit, self.settings.slot_dim // heads, longest=64)
        return 3 * code.tile(heads)

    def step(self, backbone, ctx, xt, t, slots, at, start, phi=None):
        """One denoising step: s_k = Updater(Mixer(h_k, s_{k-1}), s_{k-1}).

        xt (B, L); t (B,) actual mask ratio; slots (B, M, S), None for s_0; at (B, L) where logits
        are wanted; start: index of the first answer token; phi: MemDLM's fast weights, to use both
        memories. Returns logits (N, V), slots (B, M, S), the Mixer's weights (B, H, M, L)."""
        # 1. Time, places, the slots of the last step
        c = self.time(t)
        offset = torch.arange(xt.shape[1], device=xt.device)[None] - start
        place = self.place_code(offset)                                     # (1, L, S)
        slots = self.carry(slots, len(xt))
        # 2. The layers below the first injection: they do not depend on the slots, no gradient
        done = self.inject_layers[0]
        with torch.no_grad():
            h = backbone.run(backbone.embed(xt), ctx, 0, done, phi)
        # 3. Inject and read where it is due. Gradients pass through the frozen layers in between
        injectors = dict(zip(self.inject_layers, self.injectors))
        for stop in sorted({*injectors, self.read_layer + 1}):
            h = backbone.run(h, ctx, done, stop, phi)
            if stop in injectors:
                h = self.inject(injectors[stop], h, slots, c, place, ctx.attend)
            if stop == self.read_layer + 1:
                new_slots, weights = self.read(h, slots, c, place, ctx.attend)
            done = stop
        # 4. The remaining layers and the logits
        h = backbone.run(h, ctx, done, phi=phi)
        return backbone.head(h, ctx, at), new_slots, weights

    def carry(self, slots, batch):
        """What the step starts from: the slots of the last one, s_0 at the first."""
        return self.s0.expand(batch, -1, -1) if slots is None else slots

    def inject(self, injector, h, slots, c, place, visible):
        return h + injector(h.float(), slots, c, self.write_at, place).to(h.dtype)

    def read(self, h, slots, c, place, visible):
        # s_k = Updater(Mixer(h_k, s_{k-1}), s_{k-1});  h (B, L, D), slots and read (B, M, S)
        read, weights = self.mixer(slots, h.float(), c, self.read_at, place, visible)
        return self.updater(read, slots, c), weights

    def memory(self, under=None):
        """The `memory` argument of sample.generate. Slots start at s_0 and run on through all
        blocks; guidance's copy without a prompt, called with state None, starts at every step.

        under: a memory whose state is phi (memdlm.memory_of), for both at once. The state:
        (slots, phi, weights); weights (B, H, M, L) is what the Mixer looked at, for display."""
        def memory(backbone, xt, attend, start):
            phi = under(backbone, xt, attend, start)[1] if under else None

            def predict(xt, t, state, at):
                slots, phi, _ = state or (None, None, None)
                ctx = backbone.context(xt, attend)
                logits, slots, weights = self.step(backbone, ctx, xt, t, slots, at, start, phi)
                return logits, (slots, phi, weights)
            return predict, (None, phi, None)
        return memory


# 3. K-step unrolling ------------------------------------------------------------------------------

def draw_reveals(n, settings, progress, seed):
    """n_1 .. n_K: how many of its masked tokens a row reveals at each step, Dirichlet-multinomial.
    n (B,) -> (B, K); every row sums to its n. progress: see curriculum_step."""
    rng = np.random.default_rng(seed)
    K = settings.unroll
    share = rng.dirichlet([settings.concentration] * K, len(n))                         # (B, K)
    if progress < settings.curriculum and K > 1:
        share[:] = np.eye(K)[curriculum_step(settings, progress, rng)]
    return torch.from_numpy(rng.multinomial(n.numpy(), share))


def curriculum_step(settings, progress, rng):
    """Ours: at first all tokens are revealed in one step, in the beginning the second, later any up
    to the last. Every pass before it sees an unchanged canvas, so that only memory can help.
    progress: share of the training that is done, in [0, 1)."""
    last = 1 + int(progress / settings.curriculum * (settings.unroll - 1))
    return rng.integers(1, last + 1)


def loss_unrolled(model, backbone, x0, given, attend, u, reveals, n_rows):
    """The K-step unrolled loss: K steps that partition the trajectory from all masked to nothing
    masked. Gradients reach the modules through the slots of all K steps. lambda is `balance`.

    x0, given, attend (B, L), answers at the end of the rows; u (B, L) random: tokens are revealed
    in the order of u, with their true values; reveals (B, K): draw_reveals; n_rows: of the whole
    batch, all micro-batches and ranks."""
    balance = model.settings.balance
    ctx = backbone.context(x0, attend)
    start = answer_start(given)
    N_m = (~given).sum(1)                                                   # (B,)
    masked = ~given                                                         # (B, L) at step 1
    slots = None                                                            # s_0
    loss = 0.0
    # steps after the last reveal would bear no loss
    for k in range(int(reveals.any(0).nonzero().max()) + 1):
        # 1. One denoising step with memory
        count = masked.sum(1)                                               # (B,)
        xt = x0.masked_fill(masked, backbone.cfg.mask_id)
        n_k = reveals[:, k]
        # rows that reveal nothing have w_k = 0: no logits are needed there
        at = masked & (n_k > 0)[:, None]
        logits, slots, _ = model.step(backbone, ctx, xt, count / N_m, slots, at, start)
        # 2. The tokens that it reveals
        revealed = smallest(u.masked_fill(~masked, 2.0), n_k)               # (B, L)
        # 3. L_k = w_k [lambda dense_k + (1 - lambda) reveal_k],  w_k = n_k / N_m
        #    dense_k  = sum over masked of CE / count:  a token weighs lambda w_k / count
        #    reveal_k = sum over revealed of CE / n_k:  (1 - lambda) w_k / n_k = (1 - lambda) / N_m
        w_dense = (balance * n_k / N_m / count.clamp(min=1))[:, None]       # (B, 1)
        w_reveal = (1 - balance) * revealed / N_m[:, None]                  # (B, L)
        ce = F.cross_entropy(logits.float(), x0[at], reduction="none")      # (N,)
        loss = loss + (ce * (w_dense + w_reveal)[at]).sum() / n_rows
        masked = masked & ~revealed
    return loss


# 4. Controls: what is taken away, or given without limit ------------------------------------------

class Wiped(MetaState):
    """No persistence: a trained MetaState whose slots are put back to s_0 at every step."""
    def carry(self, slots, batch):
        return super().carry(None, batch)


def wiped(meta, backbone_cfg):
    """The memory of a trained MetaState, but nothing crosses a step."""
    control = Wiped(backbone_cfg, meta.settings).to(meta.s0.device)
    control.load_state_dict(meta.state_dict())
    return control.memory()


class Reset(Wiped):
    """The same as a control to train. So that Mixer and Updater have work to do and get a gradient,
    they first fill the slots from the activations at the injection."""
    def inject(self, injector, h, slots, c, place, visible):
        slots, _ = self.read(h, slots, c, place, visible)
        return super().inject(injector, h, slots, c, place, visible)


class Detached(MetaState):
    """Slots are carried, but not trained through time: a write learns from the next step alone."""
    def read(self, h, slots, c, place, visible):
        return super().read(h.detach(), slots.detach(), c, place, visible)


class Feedback(MetaState):
    """No bottleneck: `slots` are all activations of the previous step (B, L, D), through an MLP, as
    in Loopholing (arXiv 2510.19304)."""
    def add_modules(self, D, settings):
        self.injectors = nn.ModuleList(FeedbackMLP(D, settings) for _ in self.inject_layers)

    def carry(self, slots, batch):
        return slots

    def inject(self, injector, h, slots, c, place, visible):
        return h if slots is None else h + injector(slots, c).to(h.dtype)

    def read(self, h, slots, c, place, visible):
        return h.float(), None


class FeedbackMLP(nn.Module):
    def __init__(self, D, settings):
        super().__init__()
        self.norm = AdaRMSNorm(D, settings.cond_dim)
        self.up = nn.Linear(D, 4 * D)
        self.o = nn.Linear(4 * D, D)
        nn.init.zeros_(self.o.weight)
        nn.init.zeros_(self.o.bias)

    def forward(self, previous, c):                                         # (B, L, D), (B, C)
        return self.o(F.silu(self.up(self.norm(previous, c))))


class LogitFeedback(Feedback):
    """Beliefs about the answer and nothing else: the expected embedding of the last prediction is
    added where a mask was (soft masking, arXiv 2510.17206). Two numbers are trained."""
    def add_modules(self, D, settings):
        self.gain = nn.Parameter(torch.zeros(()))
        self.sharpness = nn.Parameter(torch.ones(()))
        # no conditioner, no modules: `slots` are expected embeddings (B, L, D), added as they are
        self.time = nn.Identity()
        self.injectors = [None] * len(self.inject_layers)

    def inject(self, injector, h, slots, c, place, visible):
        return h if slots is None else h + (self.gain * slots).to(h.dtype)

    def step(self, backbone, ctx, xt, t, slots, at, start, phi=None):
        masks = xt == backbone.cfg.mask_id
        logits, _, _ = super().step(backbone, ctx, xt, t, slots, masks, start, phi)
        p = (self.sharpness * logits.float()).softmax(-1)                   # (N, V)
        expected = p @ backbone.embed_tokens.weight.float()                 # (N, D)
        new = torch.zeros(*xt.shape, expected.shape[-1], device=xt.device)
        return logits[at[masks]], new.masked_scatter(masks[..., None], expected), None


# settings.memory -> the class, and the arm's name in tables
KINDS = {"slots": MetaState, "reset": Reset, "detached": Detached, "feedback": Feedback,
         "logits": LogitFeedback}
ARMS = {**{name: name for name in KINDS}, "slots": "metastate"}


def build(backbone_config, settings):
    """The MetaState, or the control, that the settings name."""
    return KINDS[settings.memory](backbone_config, settings)


# 5. Checkpoints -----------------------------------------------------------------------------------

def save(model, folder, backbone_name, print_of_backbone, chat=None):
    """metastate.safetensors; metastate.json: settings, the backbone's name, fingerprint, chat."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(dict(model.named_parameters()), folder / "metastate.safetensors")
    entries = dict(backbone=str(backbone_name), fingerprint=print_of_backbone, chat=chat,
                   config=dataclasses.asdict(model.settings))
    write_json(folder / "metastate.json", entries)


def load(folder, device=None, dtype=None, chat=None):
    """The model, its backbone, the backbone's name. ValueError if they do not fit each other."""
    folder = Path(folder)
    where = folder / "metastate.json"
    entries = read_json(where)
    for key, kind in (("backbone", str), ("fingerprint", str), ("config", dict)):
        if not isinstance(entries, dict) or not isinstance(entries.get(key), kind):
            raise ValueError(f"{where}: the entry {key!r} is missing or is no {kind.__name__}")
    name = entries["backbone"]
    chat = entries.get("chat") if chat is None else chat
    try:
        backbone = load_backbone(name, device, dtype, chat).requires_grad_(False)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{e} (named in {where}, from the current folder)") from None
    if fingerprint(backbone) != entries["fingerprint"]:
        raise ValueError(f"{folder} was trained on another backbone or dtype than that at {name}")
    settings = config_from_dict(MetaStateConfig, entries["config"], where)
    model = build(backbone.cfg, settings)
    parameters = dict(model.named_parameters())
    shard = open_shard(folder / "metastate.safetensors")
    shapes = {key: shard.get_slice(key).get_shape() for key in shard.keys()}
    if shapes != {key: list(p.shape) for key, p in parameters.items()}:
        raise ValueError(f"{folder}/metastate.safetensors does not fit its metastate.json")
    model.load_state_dict({key: shard.get_tensor(key) for key in parameters})
    return model.to(backbone.device).eval(), backbone, name


def fingerprint(backbone):
    """A short hash of the configuration, the dtype and the first weights of every tensor."""
    about = (dataclasses.replace(backbone.cfg, chat=False), backbone.dtype)
    digest = hashlib.sha256(repr(about).encode())
    for name, p in backbone.named_parameters():
        first = p.detach().flatten()[:16].float().cpu()
        digest.update(name.encode() + first.numpy().tobytes())
    return digest.hexdigest()[:16]
