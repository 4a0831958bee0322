"""MemDLM: memory in weights. Gradient steps write a text into low-rank fast weights, phi.

Paper: MemDLM (arXiv 2603.22241), sections 3 and 4; the authors' code: github.com/JarvisPei/MemDLM.
Idea: a diffusion LM is trained on single masked states but used on whole trajectories. So in each
training step an inner loop fits fast weights on a noisier state, then on the state itself, and the
outer loss trains the base with them in place. At inference the inner loop runs on the prompt.
Equations: Eq. 5 -> loss_memdlm; Eq. 6 -> inner_step; Eq. 7 -> adapt_to_response;
           Eq. 8 -> adapt_to_response; Eq. 9 -> loss_memdlm; Eq. 10 -> inner_step
Shapes: B batch, L tokens, D width, V vocabulary, r rank, N masked positions (row-major)
The paper stands above the line of =, ours below: the closed book, what `train.py --method memdlm`
trains on the tiny model. Where the paper is silent, or its code differs:
- Whose phi? A sample's (abstract), "a batch" (section 3), one for the 2 rows of a batch (code).
  Here: a sample's. phi_0 has B = 0, and A from the seed and the row's own prompt.
- Stage 1 targets all masked tokens (section 4.6, code; BABILong 0.684), not only those that the
  anchor reveals (x_t, as Eq. 7 is printed; BABILong 0.668).
- Inner loss: a mean over masked tokens, times 1 / mask ratio on a response, 1 on a prompt (code).
- Clipping: each tensor of each sample alone (section 4.4; BABILong 0.684), not all by one (0.632).
- phi on gate, up and down (text); the code's default names find one of them on LLaDA-8B.
- The pre-anchor masks floor(s_pre k) tokens; the code's float32 at times one fewer.
- A prompt's mask: exactly a fifth; code: each token with probability 0.2, LoRA's dropout active.
Beware: the inner loop sees the labels that the loss scores: a low training loss proves nothing.
"""
import zlib
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from backbone import LowRank, corrupt, masked_loss, option, smallest


@dataclass
class MemDLMConfig:
    """The inner loop of section 4.1; exact_from, and two choices of inner_on, are ours."""
    rank: int = option(32, "r of the fast weights", low=1)
    alpha: float = option(64.0, "the change of a matrix is scaled by alpha / r", low=0)
    fraction: float = option(0.1, "share of the layers, from the top, whose FFN carries phi", 0, 1)
    inner_lr: float = option(0.1, "eta, step size of the inner SGD", low=0)
    clip: float = option(1.0, "largest gradient norm of a tensor of a sample; 0: no limit", low=0)
    s_pre: float = option(1.5, "the pre-anchor state masks s_pre times as many tokens", low=1)
    prompt_ratio: float = option(0.2, "mask ratio of the anchor of a prompt", low=0, high=1)
    inner_on: str = option("response", "what phi is fitted to; response: the paper, a leak",
                           choices=["response", "prompt", "closed_book"])
    exact_from: float = option(1.0, "share of the steps after which the gradient is exact", 0, 1)


def first_fast_layer(backbone, inner):
    """Index of the first layer with fast weights, 28 of 32 or 2 of 3. The layers below are the
    trunk: no phi, so their output on a state is computed once."""
    layers = backbone.cfg.n_layers
    return min(int(layers * (1 - inner.fraction)), layers - 1)


def row_seeds(ids, prompt, seed):
    """One integer per row from the seed and the row's own prompt tokens. ids, prompt (B, L)."""
    rows = [row[own].cpu().numpy().tobytes() for row, own in zip(ids, prompt)]
    return [zlib.crc32(row, seed % 2 ** 32) for row in rows]


def init_phi(backbone, seeds, inner):
    """phi_0, {name: LowRank} in fp32, for every gate, up and down matrix (of each expert) of the
    fast layers; one row a seed. B = 0, so it adds nothing."""
    first = first_fast_layer(backbone, inner)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    phi = {}
    for name, module in backbone.named_modules():
        place = name.split(".")
        if place[-1] in ("gate", "up", "down") and int(place[1]) >= first:
            bound = module.in_features ** -0.5                      # Kaiming-uniform, a = sqrt(5)
            A = torch.empty(len(seeds), inner.rank, module.in_features)
            for row, generator in zip(A, generators):
                row.uniform_(-bound, bound, generator=generator)
            B = torch.zeros(len(seeds), module.out_features, inner.rank, device=backbone.device)
            phi[name] = LowRank(A.to(backbone.device), B, inner.alpha / inner.rank)
    return phi


def inner_step(backbone, phi, h, ctx, x0, masked, weight, inner, exact=False,
               token_weight=torch.ones_like):
    """phi_{k-1} -> phi_k: one SGD step of every row's phi on its own masked tokens.

    h (B, L, D): the trunk's output on the state; x0, masked (B, L); weight (B,). exact: keep the
    graph for the outer loss. token_weight: cross-entropies (N,) -> (N,), here 1 for every token."""
    if not exact:
        # Eq. 10, first order, d phi_k / d theta := 0: here phi and h are constants
        phi = {name: w.map(torch.Tensor.detach) for name, w in phi.items()}
        h = h.detach()
    factors = [x.requires_grad_() for w in phi.values() for x in (w.A, w.B)]
    first = first_fast_layer(backbone, inner)
    ctx = ctx._replace(twice=exact and first < backbone.cfg.n_layers - 1)  # attention above a phi
    with torch.enable_grad():
        h = backbone.run(h, ctx, first, phi=phi)
        ce = F.cross_entropy(backbone.head(h, ctx, masked).float(), x0[masked], reduction="none")
        # L_inner = weight / |masked| * sum over masked of -log p_{theta, phi}(x0_i | xt), of all
        # rows in one sum: the phi of a row occurs in its own tokens alone
        weights = (weight / masked.sum(1).clamp(min=1))[masked.nonzero()[:, 0]]         # (N,)
        inner_loss = (weights * token_weight(ce.detach()) * ce).sum()
        gradients = torch.autograd.grad(inner_loss, factors, create_graph=exact)
    stepped = []
    with torch.set_grad_enabled(exact):
        for x, g in zip(factors, gradients):
            if inner.clip:
                norm = g.flatten(1).norm(dim=1)[:, None, None]                          # (B, 1, 1)
                g = g * (inner.clip / (norm + 1e-6)).clamp(max=1)
            # Eq. 6: phi_k = phi_{k-1} - eta * grad_phi L_inner(theta, phi_{k-1})
            stepped.append(x - inner.inner_lr * g)
    return {name: phi[name]._replace(A=A, B=B)
            for name, A, B in zip(phi, stepped[::2], stepped[1::2])}


def nested_states(backbone, x0, masked, u, given, ctx, inner, exact=False):
    """Two states of one trajectory, [(h_pre, masked_pre), (h, masked)], h the trunk's output.

    Of n tokens that are not given, the anchor masks k, those with the smallest u, the pre-anchor
    floor(min(n, s_pre * k)). x0, masked, u, given (B, L)."""
    n = (~given).sum(1)
    count = (inner.s_pre * masked.sum(1)).clamp(max=n).floor()                          # (B,)
    masked_pre = smallest(u.masked_fill(given, 2.0).masked_fill(masked, -1.0), count)

    def trunk(masked):
        xt = x0.masked_fill(masked, backbone.cfg.mask_id)
        return backbone.run(backbone.embed(xt), ctx, 0, first_fast_layer(backbone, inner))
    # the outer pass goes on from the anchor's trunk; first order, the other one needs no gradient
    with torch.set_grad_enabled(exact):
        h_pre = trunk(masked_pre)
    return [(h_pre, masked_pre), (trunk(masked), masked)]


def adapt_to_response(backbone, x0, given, attend, t, u, inner, seed=0, exact=False):
    """The inner loop of training: phi fitted to the very tokens that are scored afterwards.

    Returns phi_2, the trunk's output on the anchor state (B, L, D), the context, masked (B, L)."""
    ctx = backbone.context(x0, attend)
    _, masked = corrupt(x0, t, given, backbone.cfg.mask_id, u)                          # (B, L)
    states = nested_states(backbone, x0, masked, u, given, ctx, inner, exact)
    (h_pre, masked_pre), (h, masked) = states
    w_pre, w = ((~given).sum(1) / m.sum(1).clamp(min=1) for _, m in states)    # 1 / mask ratio
    phi = init_phi(backbone, row_seeds(x0, given & attend, seed), inner)
    # Eq. 7, stage 1, pre-anchor: xt_pre -> x0 (not x_t: see the header)
    phi = inner_step(backbone, phi, h_pre, ctx, x0, masked_pre, w_pre, inner, exact)
    # Eq. 8, stage 2, anchor to target: xt -> x0
    phi = inner_step(backbone, phi, h, ctx, x0, masked, w, inner, exact)
    return phi, h, ctx, masked


def loss_memdlm(backbone, x0, given, attend, t, u, weight, n_maskable, inner, seed=0, exact=False):
    """The bilevel loss of one batch (Eq. 5): min over theta of the masked loss given phi_2(theta).

    x0, given, attend, u (B, L); t, weight (B,). exact: Eq. 5 as it stands; else by Eq. 10."""
    phi, h, ctx, masked = adapt_to_response(backbone, x0, given, attend, t, u, inner, seed, exact)
    h = backbone.run(h, ctx, first_fast_layer(backbone, inner), phi=phi)
    # Eq. 9: L = sum over rows of weight * sum over masked of -log p_{theta, phi_2} / n_maskable
    return masked_loss(backbone.head(h, ctx, masked), x0, masked, weight, n_maskable)


def adapt_to_prompt(backbone, ids, attend, inner, seed=0, phi=None, exact=False):
    """The inner loop at inference: the same two steps on the prompt, weight 1. Returns phi_2.

    ids, attend (B, L). phi: phi_0, by default random, from the seed and each row's own tokens."""
    prompt = attend & (ids != backbone.cfg.mask_id)
    seeds = row_seeds(ids, prompt, seed)
    u = torch.full(ids.shape, 2.0, device=ids.device)                                   # (B, L)
    for row, own, s in zip(u, prompt, seeds):
        row[own] = torch.rand(int(own.sum()), generator=torch.Generator().manual_seed(s + 1)).to(u)
    anchor = smallest(u, (inner.prompt_ratio * prompt.sum(1)).round())
    ctx = backbone.context(ids, attend)
    phi = phi or init_phi(backbone, seeds, inner)
    with torch.set_grad_enabled(exact):
        states = nested_states(backbone, ids, anchor, u, ~prompt, ctx, inner, exact)
    for h, masked in states:
        phi = inner_step(backbone, phi, h, ctx, ids, masked, torch.ones_like(u[:, 0]), inner, exact)
    return phi


def prompt_memory(inner, seed=0, adapt=adapt_to_prompt):
    """The `memory` argument of sample.generate: adapt to the prompt once, keep phi."""
    def memory(backbone, xt, attend, start):
        ids = xt[:, :start]
        real = torch.ones_like(ids).bool() if attend is None else attend[:, :start]
        phi = adapt(backbone, ids, real, inner, seed)

        def predict(xt, t, state, at):
            # the state is phi, or None for guidance's copy without a prompt
            return backbone(xt, attend, at, state), state                               # (N, V)
        return predict, phi
    return memory


# ==================================================================================================
# Ours: the closed book. The inner loop writes a text, the outer pass hides it and sees the question
# alone, so whatever is recalled was in the weights. It differs from the paper, above, in
# - what is written: a text that is never scored, so that no label leaks;
# - the states: `masks` complementary ones, in which each token is masked once, instead of two
#   nested ones; a long text goes in chunk after chunk;
# - the step: a sum over tokens instead of a mean, eta 0.125, no clipping; at inference a token that
#   phi predicts already is hardly written (surprise);
# - the outer gradient: exact after 60 % of the steps, back through the last `window` chunks;
# - training (train.py): four questions share a text's phi, all texts of a step one A; a quarter of
#   the batches is plain MDLM; three quarters of the other rows have t = 1; texts grow from the bare
#   facts to four times the usual length;
# - the tiny model (backbone.py): its fast layers see a token's neighbours through a convolution.
# ==================================================================================================

@dataclass
class ClosedBook(MemDLMConfig):
    """The inner loop on a text that is then hidden."""
    masks: int = option(4, "complementary masks of every n-th token, one inner step each", low=1)
    chunk: int = option(64, "tokens written at a time, one chunk after the other; 0 = all", low=0)
    surprise: float = option(8.0, "gamma, at inference only: a token is written with weight "
                             "(1 - p)^gamma, p its probability before the step", low=0)
    questions: int = option(4, "consecutive rows that ask about one text and share its phi", low=1)
    window: int = option(4, "exact gradient: back through so many chunks of a text; 0: all", low=0)


def for_backbone(config, inner_on=None):
    """The inner loop's settings: the closed book on the tiny backbone, the paper's on others."""
    if inner_on is None:
        inner_on = "closed_book" if config.family == "tiny" else "response"
    if inner_on == "closed_book":
        return ClosedBook(inner_on=inner_on, inner_lr=0.125, clip=0, exact_from=0.6)
    return MemDLMConfig(inner_on=inner_on)


def at_inference(inner):
    """How a prompt is written once training is over: adapt_to_prompt, or write_text."""
    if isinstance(inner, ClosedBook):
        return partial(write_text, token_weight=partial(surprise, gamma=inner.surprise))
    return adapt_to_prompt


def memory_of(inner):
    """prompt_memory, the prompt being written as these settings say."""
    return prompt_memory(inner, adapt=at_inference(inner))


def surprise(ce, gamma):
    """Cross-entropies (N,) -> (1 - p)^gamma, p = exp(-ce)."""
    return (1 - (-ce).exp()) ** gamma


def write_text(backbone, ids, attend, book, seed=0, phi=None, exact=False,
               token_weight=torch.ones_like, targets=None):
    """Write a text into fast weights; the arguments are those of adapt_to_prompt. Chunks are
    counted from the right end: the phi of a row is the same alone and in any batch padded on the
    left. targets (B, L) bool: the tokens to learn, by default all."""
    own = attend & (ids != backbone.cfg.mask_id)
    phi = phi or init_phi(backbone, row_seeds(ids, own, seed), book)
    targets = own if targets is None else own & targets
    L = ids.shape[1]
    size = book.chunk or L
    for stop in reversed(range(L, 0, -size)):
        columns = (x[:, max(0, stop - size):stop] for x in (ids, attend, targets))
        # truncated back-propagation: what earlier chunks wrote is a constant
        near = not book.window or L - stop < book.window * size
        phi = write_chunk(backbone, phi, *columns, book, exact and near, token_weight)
    return phi


def write_chunk(backbone, phi, ids, attend, targets, book, exact, token_weight):
    """One inner step on each of the complementary masks of a chunk; ids, attend, targets (B, l)."""
    # every n-th token: with four masks no value is masked together with its key
    number = targets.long().cumsum(1)                                                   # (B, l)
    masks = [targets & (number % book.masks == k) for k in range(book.masks)]
    xt = torch.cat([ids.masked_fill(m, backbone.cfg.mask_id) for m in masks])
    # below the fast weights no state depends on another: one pass through the trunk for all of them
    with torch.set_grad_enabled(exact):
        ctx = backbone.context(xt, attend.repeat(len(masks), 1))
        h = backbone.run(backbone.embed(xt), ctx, 0, first_fast_layer(backbone, book))
    ctx = backbone.context(ids, attend)
    for h, masked in zip(h.chunk(len(masks)), masks):
        # a sum over tokens, not a mean: a fact is written as strongly in a long text as in a short
        weight = masked.sum(1).float()
        phi = inner_step(backbone, phi, h, ctx, ids, masked, weight, book, exact, token_weight)
    return phi


def loss_closed_book(backbone, x0, text, given, attend, t, u, weight, n_maskable, inner, seed=0,
                     exact=False):
    """The bilevel loss whose inner loop writes tokens that are never scored: no leak.

    text (B, L) bool: the tokens to write, left of the answer. Where attend is False for them the
    book is closed: the outer pass cannot see them. (--inner_on prompt: they stay in view, and the
    paper's two steps write them.) A batch without a text is plain MDLM. The rest: loss_memdlm."""
    phi = None
    if text.any():
        shared = getattr(inner, "questions", 1)
        end = int(text.any(0).nonzero().max()) + 1
        ids, own = x0[::shared, :end], text[::shared, :end]
        # texts to the right: a row's chunks do not depend on the length of other rows' questions
        order = own.long().argsort(dim=1, stable=True)
        ids, own = ids.gather(1, order), own.gather(1, order)
        # one A a step, from its seed: training is faster than with one for each row
        phi_0 = init_phi(backbone, [seed] * len(ids), inner)
        write = write_text if isinstance(inner, ClosedBook) else adapt_to_prompt
        phi = write(backbone, ids, own, inner, seed, phi_0, exact)
        phi = {name: w.map(lambda x: x.repeat_interleave(shared, 0)) for name, w in phi.items()}
        # columns that no row sees can go: positions count from the first visible token
        seen = slice(int(attend.any(0).float().argmax()), None)
        x0, given, attend, u = (x[:, seen] for x in (x0, given, attend, u))
    xt, masked = corrupt(x0, t, given, backbone.cfg.mask_id, u)
    return masked_loss(backbone(xt, attend, masked, phi), x0, masked, weight, n_maskable)


def fixed_memory(phi):
    """The `memory` argument of sample.generate for a phi that is ready. If the prompt is the
    question alone, this is the closed book."""
    return prompt_memory(None, adapt=lambda *_: phi)
