"""MemDLM: memory in weights. Gradient steps write a text into low-rank fast weights, phi.

Paper: MemDLM (arXiv 2603.22241), sections 3 and 4; the authors' code is
github.com/JarvisPei/MemDLM.
Idea: a diffusion LM is trained on single masked states but used on whole trajectories. MemDLM
simulates a trajectory inside each training step: an inner loop fits fast weights on a noisier state
and then on the state itself, and the outer loss trains the base model with those fast weights in
place. At inference the same inner loop runs on the prompt.
Equations: Eq. 6 -> inner_step; Eq. 7 -> adapt_to_response; Eq. 8 -> adapt_to_response;
           Eq. 9 -> loss_memdlm; Eq. 10 -> inner_step
Shapes: B batch, L tokens, D width, V vocabulary, r rank, N masked positions (row-major)
Read as:
- One phi per sample (the first abstract): LoRA factors with a batch dimension. Sections 3.1 and 3.3
  write "a batch", and the released code shares one phi between the rows of a micro-batch.
- phi_0: B = 0. A is drawn from the seed and the row's own prompt, so that the memory of a row does
  not depend on its place in the batch (loss_prompt: from the step's seed alone, one A for all).
- Stage 1 targets all masked tokens, not only those that the anchor reveals: Eq. 7 writes x_t, but
  section 4.6 and the code do this.
- Inner loss: mean over a row's masked tokens, times 1 / mask ratio on a response (training), times
  1 on a prompt. With complementary masks (ours) it is a sum.
- Clipping: each tensor of each sample on its own (section 4.4: 0.684 against 0.632 with one norm).
Beware: in the paper's training the inner loop sees the labels that the outer loss scores. A low
MemDLM training loss proves nothing.
Ours: the closed book (loss_prompt). The inner loop writes the context, the outer pass hides it and
sees the question alone, so whatever is recalled was in the weights. There every token of the
context is a target once (complementary masks), a long one is written in chunks, what is predicted
already is hardly written at inference (surprise), and the gradient may be exact.
"""
import zlib
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from backbone import LowRank, corrupt, masked_loss, option, smallest


@dataclass
class MemDLMConfig:
    """The inner loop. Defaults: the paper's; `for_backbone` has the tiny model's closed book."""
    rank: int = option(32, "r of the fast weights", low=1)
    alpha: float = option(64.0, "the change of a matrix is scaled by alpha / r", low=0)
    fraction: float = option(0.1, "share of the layers, counted from the top, whose FFN carries "
                             "phi; at least one layer", low=0, high=1)
    inner_lr: float = option(0.1, "eta, step size of the inner SGD", low=0)
    clip: float = option(1.0, "largest gradient norm of one tensor of one sample; 0 = no limit",
                         low=0)
    s_pre: float = option(1.5, "the pre-anchor state masks s_pre times as many tokens", low=1)
    prompt_ratio: float = option(0.2, "mask ratio of the anchor when a prompt is written",
                                 low=0, high=1)
    masks: int = option(0, "prompts: 0 = the paper's two nested states; n = n complementary masks "
                        "of every n-th token, one step each", low=0)
    chunk: int = option(0, "prompts: tokens written at a time, one chunk after the other; "
                        "0 = the whole prompt at once", low=0)
    inner_on: str = option("response", "response: the paper, which sees the labels; prompt: no "
                           "leak; closed_book: the prompt, which the outer loss then hides",
                           choices=["response", "prompt", "closed_book"])
    surprise: float = option(0.0, "gamma, at inference only: a token is written with weight "
                             "(1 - p)^gamma, p its probability before the step", low=0)
    questions: int = option(1, "closed book: consecutive rows that ask about one text and share "
                            "its phi; the writing costs most", low=1)
    exact_from: float = option(1.0, "share of the training steps after which the gradient goes "
                               "back through the inner steps; 1 = never (Eq. 10)", low=0, high=1)
    window: int = option(0, "exact gradient: it goes back through the last chunks of a text, so "
                         "many of them; 0 = through all", low=0)


def for_backbone(config, inner_on=None):
    """The inner loop's settings for a backbone: the closed book on the tiny one, else the
    paper's."""
    if inner_on is None:
        inner_on = "closed_book" if config.family == "tiny" else "response"
    if inner_on == "closed_book":
        return MemDLMConfig(inner_lr=0.125, clip=0, masks=4, chunk=64, inner_on=inner_on,
                            questions=4, exact_from=0.6, window=4, surprise=8.0)
    return MemDLMConfig(inner_on=inner_on)


# --------------------------------------------------------------------------------------------------
# 1. Fast weights and one step on them.

def first_fast_layer(backbone, inner):
    """Index of the first layer with fast weights. The layers below are the trunk: no phi, so their
    output on a state is computed once. 32 layers -> 28, 3 layers -> 2."""
    layers = backbone.cfg.n_layers
    return min(int(layers * (1 - inner.fraction)), layers - 1)


def row_seeds(ids, prompt, seed):
    """One integer per row from the seed and the row's own prompt tokens. ids, prompt (B, L)."""
    rows = [row[own].cpu().numpy().tobytes() for row, own in zip(ids, prompt)]
    return [zlib.crc32(row, seed % 2 ** 32) for row in rows]


def init_phi(backbone, seeds, inner):
    """phi_0 for every gate, up and down matrix (of each expert) of the fast layers, one row a seed:
    {name: LowRank}, fp32. B = 0, so it adds nothing."""
    first = first_fast_layer(backbone, inner)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    phi = {}
    for name, module in backbone.named_modules():
        layer = name.split(".")
        if layer[-1] not in ("gate", "up", "down") or int(layer[1]) < first:
            continue
        bound = module.in_features ** -0.5                          # Kaiming-uniform, a = sqrt(5)
        A = torch.empty(len(seeds), inner.rank, module.in_features)
        for row, generator in zip(A, generators):
            row.uniform_(-bound, bound, generator=generator)
        B = torch.zeros(len(seeds), module.out_features, inner.rank)
        phi[name] = LowRank(A.to(backbone.device), B.to(backbone.device), inner.alpha / inner.rank)
    return phi


def inner_step(backbone, phi, h, ctx, x0, masked, weight, inner, exact=False):
    """One SGD step of every row's phi on its own masked tokens. Returns the new phi.

    h (B, L, D): the trunk's output on the state; x0, masked (B, L); weight (B,).
    exact: keep the graph, so that the outer loss can be differentiated through this step."""
    if not exact:
        # Eq. 10, first order: phi and the state are constants of the outer backward pass
        phi = {name: LowRank(w.A.detach(), w.B.detach(), w.scale) for name, w in phi.items()}
        h = h.detach()
    factors = [x for w in phi.values() for x in (w.A, w.B)]
    for x in factors:
        x.requires_grad_()              # no change to a factor that is already part of the graph
    first = first_fast_layer(backbone, inner)
    # fast attention kernels have no second derivative, which attention above a phi needs
    slow = exact and first < backbone.cfg.n_layers - 1
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if slow else nullcontext():
        # L_inner = weight / |masked| * sum over masked of -log p_{theta, phi}(x0_i | xt)
        h = backbone.run(h, ctx, first, phi=phi)
        logits = backbone.head(h, ctx, masked)                                          # (N, V)
        ce = F.cross_entropy(logits.float(), x0[masked], reduction="none")              # (N,)
        per_row = weight / masked.sum(1).clamp(min=1)                                   # (B,)
        # a sum over rows: phi of row b occurs in the term of row b only, so its gradient is its own
        # (1 - p)^gamma scales a token's gradient; the inner loop does not differentiate it
        weights = per_row[masked.nonzero()[:, 0]] * (1 - (-ce).exp()) ** inner.surprise
        gradients = torch.autograd.grad(ce, factors, weights, create_graph=exact)
    stepped = []
    with torch.set_grad_enabled(exact):
        for x, g in zip(factors, gradients):
            if inner.clip:
                norm = g.flatten(1).norm(dim=1)[:, None, None]                          # (B, 1, 1)
                g = g * (inner.clip / (norm + 1e-6)).clamp(max=1)
            # Eq. 6: phi_k = phi_{k-1} - eta * grad_phi L_inner(theta, phi_{k-1})
            stepped.append(x - inner.inner_lr * g)
    pairs = zip(phi, stepped[::2], stepped[1::2])
    return {name: LowRank(A, B, phi[name].scale) for name, A, B in pairs}


def inner_loop(backbone, phi, states, ctx, x0, inner, exact=False):
    """phi_0 -> phi_K: one step on each state (h, masked, weight), in their order."""
    for h, masked, weight in states:
        phi = inner_step(backbone, phi, h, ctx, x0, masked, weight, inner, exact)
    return phi


def pre_anchor(masked, u, given, s_pre):
    """The noisier state's mask: floor(min(n, s_pre * k)) of n maskable tokens, the k masked ones
    among them. The extra ones have the smallest u; the anchor's are smaller still. (B, L) bool."""
    n = (~given).sum(1)
    count = (s_pre * masked.sum(1)).clamp(max=n).floor()
    return smallest(u.masked_fill(given, 2.0).masked_fill(masked, -1.0), count)


# --------------------------------------------------------------------------------------------------
# 2. As published: the inner loop on the response.

def adapt_to_response(backbone, x0, given, attend, t, u, inner, seed=0):
    """The paper's inner loop: phi fitted to the very tokens that are scored afterwards.

    Returns phi_2, the trunk's output on the anchor state (B, L, D), the context, masked (B, L)."""
    first = first_fast_layer(backbone, inner)
    ctx = backbone.context(x0, attend)
    n = (~given).sum(1)
    # 1. Two nested states of one trajectory; both predict x0 at all of their masks
    # Eq. 8, stage 2, anchor to target: xt -> x0
    xt, masked = corrupt(x0, t, given, backbone.cfg.mask_id, u)                         # (B, L)
    # Eq. 7, stage 1, pre-anchor: xt_pre -> x0 (printed with target x_t, see "Read as")
    masked_pre = pre_anchor(masked, u, given, inner.s_pre)                              # (B, L)
    xt_pre = x0.masked_fill(masked_pre, backbone.cfg.mask_id)
    # 2. Trunks: the anchor's serves the inner loop and the outer pass; the other needs no gradient
    h = backbone.run(backbone.embed(xt), ctx, 0, first)
    with torch.no_grad():
        h_pre = backbone.run(backbone.embed(xt_pre), ctx, 0, first)
    # 3. Two steps, each weighted by 1 / its state's actual mask ratio
    phi = init_phi(backbone, row_seeds(x0, given & attend, seed), inner)
    # phi_1 = phi_0 - eta * grad L(x0 | xt_pre);  phi_2 = phi_1 - eta * grad L(x0 | xt)
    states = [(h_pre, masked_pre, n / masked_pre.sum(1).clamp(min=1)),
              (h, masked, n / masked.sum(1).clamp(min=1))]
    return inner_loop(backbone, phi, states, ctx, x0, inner), h, ctx, masked


def loss_memdlm(backbone, x0, given, attend, t, u, weight, n_maskable, inner, seed=0):
    """The bilevel loss of one batch (Eq. 5): min over theta of the masked loss given phi_2(theta).

    x0, given, attend, u (B, L); t, weight (B,); the outer loss is backbone.masked_loss.
    Passes: the trunk once on each of the two states, the few fast layers three times."""
    phi, h, ctx, masked = adapt_to_response(backbone, x0, given, attend, t, u, inner, seed)
    h = backbone.run(h, ctx, first_fast_layer(backbone, inner), phi=phi)
    # Eq. 9: L = weight * sum over masked of -log p_{theta, phi_2}(x0_i | xt) / n_maskable
    return masked_loss(backbone.head(h, ctx, masked), x0, masked, weight, n_maskable)


# --------------------------------------------------------------------------------------------------
# 3. The inner loop on a prompt: the paper's inference, and training without a leak.

def adapt_to_prompt(backbone, ids, attend, prompt, inner, seed=0, exact=False, one_start=False,
                    phi=None):
    """Write a prompt into fast weights: phi_K for each row. ids, prompt (B, L), prompt True = a
    token to learn from; attend (B, L) or None.

    All random numbers of a row come from the seed and its own prompt, and chunks are counted from
    the right end: the phi of a row is the same alone and in any batch padded on the left.
    one_start: all rows start from the A of the seed alone. phi: what is written already; the prompt
    is added to it."""
    attend = torch.ones_like(prompt) if attend is None else attend
    prompt = prompt & attend & (ids != backbone.cfg.mask_id)
    seeds = row_seeds(ids, prompt, seed)
    u = torch.full(ids.shape, 2.0)                                                      # (B, L)
    for row, own, s in zip(u, prompt.cpu(), seeds):
        row[own] = torch.rand(int(own.sum()), generator=torch.Generator().manual_seed(s + 1))
    u = u.to(ids.device)
    phi = phi or init_phi(backbone, [seed] * len(ids) if one_start else seeds, inner)
    L = ids.shape[1]
    size = inner.chunk or L
    for stop in reversed(range(L, 0, -size)):
        piece = slice(max(0, stop - size), stop)
        columns = (x[:, piece] for x in (ids, attend, prompt, u))
        # truncated back-propagation: what earlier chunks wrote is a constant. Through all 64 steps
        # of 1,024 tokens training diverged
        near = not inner.window or L - stop < inner.window * size
        phi = write_chunk(backbone, phi, *columns, inner, exact and near)
    return phi


def write_chunk(backbone, phi, ids, attend, prompt, u, inner, exact):
    """The steps on one chunk of the prompt; everything (B, l)."""
    if inner.masks:
        # Every token is a target once, and its nearest neighbours are in view. With random masks a
        # fifth of the values would be masked together with their keys, and never bound to them.
        number = prompt.long().cumsum(1)                                                # (B, l)
        masks = [prompt & (number % inner.masks == k) for k in range(inner.masks)]
        # a sum over tokens, not a mean: a fact is written as strongly in a long text as in a short
        weights = [m.sum(1).float() for m in masks]
    else:
        anchor = smallest(u, (inner.prompt_ratio * prompt.sum(1)).round())
        masks = [pre_anchor(anchor, u, ~prompt, inner.s_pre), anchor]
        weights = [torch.ones(len(ids), device=ids.device)] * 2
    xt = torch.cat([ids.masked_fill(m, backbone.cfg.mask_id) for m in masks])
    # below the fast weights no state depends on another: one pass through the trunk for all of them
    with torch.set_grad_enabled(exact):
        ctx = backbone.context(xt, attend.repeat(len(masks), 1))
        h = backbone.run(backbone.embed(xt), ctx, 0, first_fast_layer(backbone, inner))
    states = zip(h.chunk(len(masks)), masks, weights)
    return inner_loop(backbone, phi, states, backbone.context(ids, attend), ids, inner, exact)


def loss_prompt(backbone, x0, context, given, attend, t, u, weight, n_maskable, inner, seed=0,
                exact=False):
    """The bilevel loss whose inner loop writes tokens that are never scored: no leak.

    context (B, L) bool: the tokens to write, at the left of the answer. Where attend is False for
    them the book is closed: the outer pass cannot see them, and what it recalls was in the weights.
    A batch without context has nothing to write and is plain MDLM.
    exact: the gradient goes back through the inner steps (Eq. 5 as it stands); else Eq. 10."""
    # Trained with it, too, it helps less: recall at 1,024 tokens 82 in place of 93 (one seed,
    # gamma = 2 in both)
    inner = replace(inner, surprise=0.0)
    phi = None
    if context.any():
        end = int(context.any(0).nonzero().max()) + 1
        # attend = context: a longer question begins left of `end`, and must stay unread
        columns = (x[::inner.questions, :end] for x in (x0, context, context))
        # one A a step: with one for each row the loss fell more slowly (a trial, one seed: 0.42
        # in place of 0.26 after 400 steps)
        phi = adapt_to_prompt(backbone, *columns, inner, seed, exact, one_start=True)
        phi = {name: LowRank(w.A.repeat_interleave(inner.questions, 0),
                             w.B.repeat_interleave(inner.questions, 0), w.scale)
               for name, w in phi.items()}
        # columns that no row sees can go: positions count from the first visible token
        seen = slice(int(attend.any(0).float().argmax()), None)
        x0, given, attend, u = (x[:, seen] for x in (x0, given, attend, u))
    xt, masked = corrupt(x0, t, given, backbone.cfg.mask_id, u)
    logits = backbone(xt, attend, masked, phi)
    return masked_loss(logits, x0, masked, weight, n_maskable)


def prompt_memory(inner, seed=0):
    """The `memory` argument of sample.generate: adapt to the prompt once, keep phi for the
    decode."""
    def memory(backbone, xt, attend, start):
        ids = xt[:, :start]
        pad = None if attend is None else attend[:, :start]
        every = torch.ones_like(ids, dtype=torch.bool)
        return written(adapt_to_prompt(backbone, ids, pad, every, inner, seed))(
            backbone, xt, attend, start)
    return memory


def written(phi):
    """The `memory` argument of sample.generate for a phi that is ready. If the prompt is the
    question alone, this is the closed book."""
    def memory(backbone, xt, attend, start):
        def predict(xt, t, state, at):
            # the state is phi, or None for guidance's copy without a prompt
            return backbone(xt, attend, at, state), state                               # (N, V)
        return predict, phi
    return memory
