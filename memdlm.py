"""MemDLM: memory in weights. Two gradient steps write a sample's denoising trajectory into fast weights, phi.

Paper: MemDLM (arXiv 2603.22241), sections 3 and 4; the authors' code at github.com/JarvisPei/MemDLM.
Idea: a diffusion LM is trained on single masked states but used on whole trajectories. MemDLM simulates a trajectory inside
each training step: an inner loop fits low-rank fast weights on a noisier state and on the state itself, then the outer loss
trains the base model with those fast weights in place. At inference the same inner loop can run on the prompt.
Equations: Eq. 6 -> inner_step; Eq. 7 -> loss_memdlm; Eq. 8 -> loss_memdlm; Eq. 9 -> loss_memdlm; Eq. 10 -> loss_memdlm
Shapes: B batch, L tokens, D width, V vocabulary, r rank, N masked positions (row-major)
Read as:
- One phi per sample (the abstract): LoRA factors with a batch dimension. The released code shares one phi per micro-batch.
- phi_0: B = 0, A one random draw that all rows start from, so that a row's memory never depends on its neighbours.
- Stage 1 targets all masked tokens, not only those the anchor reveals (Eq. 7 writes x_t; section 4.6 and the code do this).
- Inner loss: mean over a row's masked tokens, in training times 1 / its mask ratio, at inference times 1 (released code).
- Clipping: each tensor of each sample on its own, to norm 1 (section 4.4: 0.684 against 0.632 with one global norm).
- First order: phi_K is a constant in the outer backward pass (Eq. 10).
Left out: the inner losses the paper finds worse (KL, hidden states), inner_steps beyond 2, phi shared by a batch.
Beware: in training the inner loop sees the labels that the outer loss scores. A low MemDLM training loss proves nothing.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from backbone import LowRank, corrupt, masked_loss, option


@dataclass
class MemDLMConfig:
    """Defaults: the paper's."""
    rank: int = option(32, "r of the fast weights", low=1)
    alpha: float = option(64.0, "the change is scaled by alpha / r")
    fraction: float = option(0.1, "share of the layers, counted from the top, whose FFN carries phi; "
                             "at least one layer", low=0, high=1)
    inner_lr: float = option(0.1, "eta, step size of the inner SGD", low=0)
    clip: float = option(1.0, "gradient norm of one tensor of one sample", low=0)
    s_pre: float = option(1.5, "pre-anchor time t_pre = min(1, max(s_pre * t, t))", low=0)
    prompt_ratio: float = option(0.2, "anchor mask ratio when the inner loop runs on the prompt",
                                 low=0, high=1)
    inner_on: str = option("response", "response (the paper: sees the labels) or prompt (ours: no leak) "
                           "in training", choices=["response", "prompt"])


def first_fast_layer(backbone, mem):
    """Layers below form the trunk: they hold no phi, so their output on a state is computed once. N = 32 -> 28, N = 3 -> 2."""
    N = backbone.cfg.n_layers
    return min(int(N * (1 - mem.fraction)), N - 1)


def init_phi(backbone, batch, mem, seed=0):
    """phi_0 for every gate, up and down matrix (of each expert) of the fast layers: {name: LowRank}, fp32, adds nothing."""
    generator, phi = torch.Generator().manual_seed(seed), {}
    for name, module in backbone.named_modules():
        layer = name.split(".")
        if layer[0] == "layers" and name.endswith((".gate", ".up", ".down")) and int(layer[1]) >= first_fast_layer(backbone, mem):
            bound = module.in_features ** -0.5                              # Kaiming-uniform, a = sqrt(5)
            A = torch.empty(mem.rank, module.in_features).uniform_(-bound, bound, generator=generator).to(backbone.device)
            phi[name] = LowRank(A.expand(batch, -1, -1), torch.zeros(batch, module.out_features, mem.rank, device=A.device),
                                mem.alpha / mem.rank)
    return phi


def inner_step(backbone, phi, h, ctx, x0, masked, weight, mem):
    """One SGD step of every row's phi on its own masked tokens. h (B, L, D): the trunk's output on the state, no gradient.

    Returns the new phi. theta gets no gradient: autograd.grad is asked for phi alone, and h is a constant."""
    phi = {name: LowRank(w.A.detach().requires_grad_(), w.B.detach().requires_grad_(), w.scale) for name, w in phi.items()}
    with torch.enable_grad():
        logits = backbone.head(backbone.run(h, ctx, first_fast_layer(backbone, mem), phi=phi), ctx, masked)     # (N, V)
        ce = F.cross_entropy(logits.float(), x0[masked], reduction="none")                                      # (N,)
        per_row = weight / masked.sum(1).clamp(min=1)                                                           # (B,)
        # a sum over rows: row b's phi occurs in row b's term only, so its gradient is its own
        loss = (ce * per_row[masked.nonzero()[:, 0]]).sum()
        grads = iter(torch.autograd.grad(loss, [x for w in phi.values() for x in (w.A, w.B)]))

    def sgd(w):
        g = next(grads)
        norm = g.flatten(1).norm(dim=1)[:, None, None]                      # (B, 1, 1)
        # Eq. 6
        return w.detach() - mem.inner_lr * g * (mem.clip / (norm + 1e-6)).clamp(max=1)
    return {name: LowRank(sgd(w.A), sgd(w.B), w.scale) for name, w in phi.items()}


def loss_memdlm(backbone, x0, given, attend, t, u, weight, n_maskable, mem, seed=0):
    """The bilevel loss of one batch (Eq. 5). x0, given, attend, u (B, L); t, weight (B,): the outer loss is masked_loss's.

    Passes: the trunk once on each of the two states, the few fast layers three times."""
    first, ctx = first_fast_layer(backbone, mem), backbone.context(x0, attend)
    ratio = lambda masked: masked.sum(1) / (~given).sum(1)                  # (B,) the state's actual mask ratio
    # 1. Two nested states of one trajectory: the same u, more of it masked before the anchor
    xt, masked = corrupt(x0, t, given, backbone.cfg.mask_id, u)
    xt_pre, masked_pre = corrupt(x0, (mem.s_pre * t).clamp(max=1).maximum(t), given, backbone.cfg.mask_id, u)
    # 2. The anchor's trunk, once: with gradient for the outer pass; the inner loop sees it as a constant
    h = backbone.run(backbone.embed(xt), ctx, 0, first)
    # 3. Inner loop
    if mem.inner_on == "prompt":                                            # differs: no leak, as at inference
        phi = adapt_to_prompt(backbone, x0, attend, given, mem, seed)
    else:
        with torch.no_grad():
            h_pre = backbone.run(backbone.embed(xt_pre), ctx, 0, first)
        phi = init_phi(backbone, len(x0), mem, seed)
        # Eq. 7
        phi = inner_step(backbone, phi, h_pre, ctx, x0, masked_pre, 1 / ratio(masked_pre).clamp(min=1e-3), mem)
        # Eq. 8
        phi = inner_step(backbone, phi, h.detach(), ctx, x0, masked, 1 / ratio(masked).clamp(min=1e-3), mem)
    # 4. Outer loss; phi came out of inner_step as a constant, so the gradient is first order. Eq. 10
    logits = backbone.head(backbone.run(h, ctx, first, phi=phi), ctx, masked)
    # Eq. 9
    return masked_loss(logits, x0, masked, weight, n_maskable)


@torch.no_grad()
def adapt_to_prompt(backbone, ids, attend, prompt, mem, seed=0):
    """The inner loop on the prompt alone: phi_2 for each row. ids, prompt (B, L), prompt True = a token to learn from.

    Masks are drawn by position in the prompt, the same for every row: a row's phi is the same alone and in any batch."""
    prompt = prompt & (ids != backbone.cfg.mask_id)
    if attend is not None:
        prompt = prompt & attend
    generator = torch.Generator().manual_seed(seed)
    number = (prompt.long().cumsum(1) - 1).clamp(min=0)                     # (B, L) position counted within the prompt
    u = torch.rand(ids.shape[1], generator=generator).to(ids.device)[number]
    t = torch.full((len(ids),), mem.prompt_ratio, device=ids.device)
    # nothing below the fast weights needs a gradient here, so both states share one batched pass through the trunk
    states = [corrupt(ids, x, ~prompt, backbone.cfg.mask_id, u) for x in ((mem.s_pre * t).clamp(max=1).maximum(t), t)]
    xt, both = torch.cat([states[0][0], states[1][0]]), None if attend is None else torch.cat([attend, attend])
    h = backbone.run(backbone.embed(xt), backbone.context(xt, both), 0, first_fast_layer(backbone, mem))
    ctx, phi = backbone.context(ids, attend), init_phi(backbone, len(ids), mem, seed)
    for h_state, (_, masked) in zip(h.chunk(2), states):
        phi = inner_step(backbone, phi, h_state, ctx, ids, masked, torch.ones_like(t), mem)
    return phi


def prompt_memory(mem, seed=0):
    """The `memory` argument of sample.generate: adapt to the prompt once, keep phi for the whole decode."""
    def memory(backbone, xt, attend, start):
        ids = xt[:, :start]
        pad = None if attend is None else attend[:, :start]
        phi = adapt_to_prompt(backbone, ids, pad, torch.ones_like(ids, dtype=torch.bool), mem, seed)

        def predict(xt, t, phi, at):                                        # phi is None for guidance's copy without a prompt
            return backbone(xt, attend, at, phi or {}), phi
        return predict, phi
    return memory


@torch.no_grad()
def exposure_bias(backbone, x0, given, attend, steps, memory, seed=0):
    """How much worse is the model on its own trajectory than on ground truth? Lists over `steps` mask ratios 1, 1 - 1/S, ...

    sequential: CE on what is still masked after denoising down to this ratio with its own, surest tokens.
    static: CE with equally many random positions masked, the rest ground truth (published ratio = sequential / static).
    clean: CE at the sequential run's positions, the rest ground truth: free of the selection effect (ours).
    The response must stand at the end of every row. Losses are means over all masked tokens of the batch."""
    mask_id, n = backbone.cfg.mask_id, (~given).sum(1)                      # (B,)
    start = int(given.all(0).long().cumprod(0).sum())
    predict, state = memory(backbone, x0.masked_fill(~given, mask_id), attend, start)
    u = torch.rand(x0.shape, generator=torch.Generator().manual_seed(seed)).to(x0.device).masked_fill(given, 2.0)
    xt, rows = x0.masked_fill(~given, mask_id), []

    def loss(xt, masked):
        logits, _ = predict(xt, masked.sum(1) / n, state, masked)
        return F.cross_entropy(logits.float(), x0[masked]).item(), logits
    for step in range(steps):
        masked = (xt == mask_id) & ~given
        sequential, logits = loss(xt, masked)
        random_mask = u.argsort(1).argsort(1) < masked.sum(1, keepdim=True)  # as many, at random
        static, _ = loss(x0.masked_fill(random_mask, mask_id), random_mask)
        clean, _ = loss(x0.masked_fill(masked, mask_id), masked)
        rows.append(dict(mask_ratio=1 - step / steps, sequential=sequential, static=static, clean=clean,
                         published_ratio=sequential / static, clean_ratio=sequential / clean))
        p, token = logits.float().softmax(-1).max(-1)
        confidence = torch.full(xt.shape, -1.0, device=xt.device).masked_scatter(masked, p)
        keep = (n * (1 - (step + 1) / steps)).round().long()                # masks left after this step
        reveal = masked & (confidence.argsort(1, descending=True).argsort(1) < (masked.sum(1) - keep)[:, None])
        xt = torch.where(reveal, torch.zeros_like(xt).masked_scatter(masked, token), xt)
    return rows
