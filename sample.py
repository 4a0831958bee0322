"""The denoising loop: from a canvas of masks to text, and what each step throws away.

Papers: LLaDA (arXiv 2502.09992, low-confidence remasking, blocks, guidance), Dream (2508.15487, its four orders),
Fast-dLLM (2505.22618, confidence threshold). Token for token the official samplers in fp32; test_all.py holds ten-line
references. Three differences: with noise and steps > gen_length the official loop goes on drawing random numbers after a block
is full, this one goes on to the next block; Dream in bf16 (see dream_token); a [MASK] written in a prompt is never filled in.
In bf16 a row alone and the same row padded in a batch may differ, as in the official code: its kernels round differently.
Idea: predict all masked tokens at once, commit the few one is surest of, repeat. What a step knew beyond the committed
tokens is lost before the next one; the two memories are two ways to keep it. So the loop takes the memory as an argument:
`memory(backbone, xt, attend, start) -> predict, state` is called once, `predict(xt, t, state, at) -> logits, state` every step.
Without memory the state is None, for MetaState it is the slots, for MemDLM the fast weights phi.
Shapes: B batch, L canvas = prompt (left-padded) + generated part, V vocabulary, N = chosen positions, row-major
Read as: logits are computed only where a token can be chosen (masked, up to the end of the block); ties in `topk` are kept
as the official code has them, because it is the same call on the same full-length row. A row whose end-of-text has no mask
before it is finished: what lies behind is set to end-of-text and it takes no further part.
Run: python sample.py --checkpoint runs/memdlm --prompt "river = 47 . the sky is blue . ? river =" --watch
"""
import argparse
import dataclasses
import resource
import sys
import time
from pathlib import Path

import torch

from backbone import cli, encode_prompt, load_backbone, load_tokenizer, read_json

DREAM_ORDERS = ("origin", "maskgit_plus", "topk_margin", "entropy")


def no_memory(backbone, xt, attend, start):
    """The plain model: each step sees the canvas and nothing else."""
    def predict(xt, t, state, at):
        return backbone(xt, attend, at), state                              # (N, V)
    return predict, None


def left_pad(prompts, pad_id, device):
    """A list of 1-D id tensors of any lengths -> ids (B, L), attend (B, L) with the padding on the left."""
    L = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), L), pad_id, dtype=torch.long)
    attend = torch.zeros(len(prompts), L, dtype=torch.bool)
    for row, p in enumerate(prompts):
        ids[row, L - len(p):], attend[row, L - len(p):] = torch.as_tensor(p), True
    return ids.to(device), attend.to(device)


@torch.no_grad()
def generate(backbone, prompts, *, gen_length, steps, block_length, temperature=0.0, cfg=0.0, remasking="low_confidence",
             threshold=None, eos="allow", stop_early=True, top_p=None, top_k=None, alg_temp=None, attend=None,
             memory=no_memory, on_step=None):
    """Denoise gen_length masks behind each prompt; returns the generated ids (B, gen_length).

    prompts: (B, L) tensor, or a list of 1-D tensors of any lengths (padded left, positions counted from the first token).
    steps: forward passes for the whole answer, shared out over gen_length / block_length blocks, left to right.
    remasking: which tokens to commit. LLaDA: "low_confidence" (keep the surest) or "random". Dream: "origin",
        "maskgit_plus", "topk_margin", "entropy", with top_p, top_k, alg_temp; they need one block.
    threshold: commit every token at least this sure, one at the least, and ignore `steps` (Fast-dLLM).
    temperature: Gumbel noise in float64. cfg: guidance scale w, logits = u + (w + 1)(c - u), two passes a step.
    eos: "allow"; "last" = a stop token is committed only when nothing else is left to commit; "forbid" = no end-of-text.
    memory: see the header. on_step(xt, new, state): called after every commit; new (B, L) bool marks the new tokens.
    """
    mask_id, device = backbone.cfg.mask_id, backbone.device
    if isinstance(prompts, (list, tuple)):
        if not prompts or any(len(p) == 0 for p in prompts):
            raise ValueError("every prompt needs at least one token")
        prompts, attend = left_pad(prompts, backbone.cfg.pad_id, device)
    check_settings(gen_length, steps, block_length, remasking, eos, threshold, prompts.shape[1], backbone.cfg.max_len)
    B, start = prompts.shape
    xt = torch.cat([prompts.to(device), torch.full((B, gen_length), mask_id, device=device)], dim=1)
    if attend is not None:
        attend = torch.cat([attend.to(device).bool(), torch.ones(B, gen_length, dtype=torch.bool, device=device)], dim=1)
    position = torch.arange(xt.shape[1], device=device)
    predict, state = memory(backbone, xt, attend, start)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    blocks = gen_length // block_length
    for block in range(blocks):
        end = start + (block + 1) * block_length
        masked = (xt == mask_id) & (position >= start) & (position < end)   # a [MASK] in a prompt is text, not a place to fill
        quota = split_evenly((masked & (position >= end - block_length)).sum(1), steps // blocks)
        # with a threshold: as many passes as there are masks, since each pass commits at least one
        for step in range(steps // blocks if threshold is None else int(masked.sum(1).max())):
            at = (xt == mask_id) & (position >= start) & (position < end) & ~done[:, None]  # (B, L) may be chosen now
            if not at.any():
                break
            t = (xt[:, start:] == mask_id).float().mean(1)                  # (B,) the actual mask ratio
            logits, state = predict(xt, t, state, at)                       # (N, V)
            if cfg > 0:                                                     # the same canvas without its prompt, no memory of it
                free, _ = predict(xt.masked_fill(position < start, mask_id), t, None, at)
                logits = free + (cfg + 1) * (logits - free)
            if eos == "forbid":
                logits[:, backbone.cfg.eos_id] = -torch.inf
            if remasking in DREAM_ORDERS:
                new, tokens = choose_dream(logits, at, step, steps, remasking, temperature, top_p, top_k, alg_temp)
            else:
                last = backbone.cfg.stop_ids if eos == "last" else []
                new, tokens = choose_llada(logits, at, quota[:, step] if threshold is None else None, threshold,
                                           temperature, remasking, last)
            xt = torch.where(new, tokens, xt)
            if stop_early:
                xt, done = finish_rows(xt, start, backbone.cfg)
            if on_step:
                on_step(xt, new, state)
    return xt[:, start:]


def split_evenly(n, steps):
    """n (B,) tokens over the steps, the first n % steps get one more: 32 over 12 = 3 x 8, then 2 x 4. Returns (B, steps)."""
    return n[:, None] // steps + (torch.arange(steps, device=n.device) < n[:, None] % steps)


def float64(x):
    """In double precision; on the CPU where the device has none (Apple's MPS)."""
    return (x.cpu() if x.is_mps else x).double()


def choose_llada(logits, at, quota, threshold, temperature, remasking, last):
    """Which positions to commit (B, L) bool, and a token for each (B, L)."""
    # Gumbel-max: argmax of exp(logits) / (-ln U)^T. float64 because float32 noise distorts the draw (arXiv 2409.02908).
    scores = logits
    if temperature > 0:                                                     # drawn for the whole canvas, as the official code
        scores = float64(logits).exp()
        u = torch.rand(*at.shape, logits.shape[-1], dtype=torch.float64, device=scores.device)
        scores = scores / (-torch.log(u[at.to(u.device)])) ** temperature
    token = scores.argmax(-1).to(at.device)                                 # (N,)
    if remasking == "random":
        confidence = torch.rand(at.shape, device=at.device)
    else:
        ranked = logits.clone() if last else logits
        ranked[:, last] = -torch.inf                                        # chosen stop tokens keep their place, at confidence 0
        if threshold is not None:
            ranked = float64(ranked)                                        # as Fast-dLLM: a bf16 0.9 may stand for 0.89837
        # without a threshold in the logits' own dtype, as LLaDA's official code
        p = ranked.softmax(-1).gather(1, token.to(ranked.device)[:, None])[:, 0].to(at.device)
        confidence = torch.zeros(at.shape, dtype=p.dtype, device=at.device).masked_scatter(at, p)
    confidence = confidence.masked_fill(~at, -torch.inf)                    # (B, L)
    new = torch.zeros_like(at)
    for row in range(at.shape[0]):
        if threshold is None:
            new[row, torch.topk(confidence[row], int(quota[row])).indices] = True
        else:
            new[row] = confidence[row] >= threshold
            new[row, confidence[row].argmax()] = True
    return new & at, torch.zeros(at.shape, dtype=torch.long, device=at.device).masked_scatter(at, token)


def choose_dream(logits, at, step, steps, order, temperature, top_p, top_k, alg_temp, eps=1e-3):
    """Dream's diffusion_generate: t runs from 1 to eps, a share 1 - s/t of the masks is committed at each step."""
    time = torch.linspace(1, eps, steps + 1)                                # fp32: the counts are truncated from it
    share = 1.0 if step == steps - 1 else (1 - time[step + 1] / time[step]).item()
    tokens = torch.zeros(at.shape, dtype=torch.long, device=at.device)
    if order == "origin":                                                   # as in training: each mask on its own
        chosen = torch.rand(len(logits), device=at.device) < share
        new = torch.zeros_like(at).masked_scatter(at, chosen)
        if chosen.any():
            tokens[new] = dream_token(logits[chosen], temperature, top_p, top_k)[0]
        return new, tokens
    token, probs = dream_token(logits, temperature, top_p, top_k)           # (N,), (N, V)
    if order == "maskgit_plus":
        p = probs.gather(1, token[:, None])[:, 0]
    elif order == "topk_margin":
        p = (probs.topk(2).values * torch.tensor([1, -1], device=probs.device)).sum(-1)
    else:
        p = (probs * torch.log(probs + 1e-10)).sum(-1)                      # negative entropy
    confidence = torch.full(at.shape, -torch.inf, dtype=logits.dtype, device=at.device).masked_scatter(at, p)
    new = torch.zeros_like(at)
    for n in at.sum(1).unique().tolist():                                   # rows with equally many masks share one call
        rows = (at.sum(1) == n).nonzero()[:, 0]
        k = int(n * share)
        if k and alg_temp:
            picked = torch.multinomial(torch.softmax(confidence[rows] / alg_temp, -1), k)
        else:
            picked = confidence[rows].topk(k).indices
        new[rows[:, None], picked] = True
    return new & at, tokens.masked_scatter(at, token)


def dream_token(logits, temperature, top_p, top_k):
    """A token per row (N,) and the distribution it came from (N, V), in the logits' own dtype. top_p and top_k reshape the
    confidence even at temperature 0.

    Differs: the draw is from an fp32 softmax. In bf16 the probabilities need not sum to 1, torch's Categorical refuses them, and
    the official loop swallows that error and takes the likeliest token at every position of the step. In fp32 nothing differs."""
    lowest = torch.finfo(logits.dtype).min
    if temperature > 0:
        logits = (logits / temperature).clamp(lowest, -lowest)
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(descending=True)
        beyond = ordered.softmax(-1).cumsum(-1) > top_p
        beyond = torch.cat([torch.zeros_like(beyond[:, :1]), beyond[:, :-1]], dim=-1)  # keep the first token past the threshold
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), lowest)
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], lowest)
    probs = logits.softmax(-1)
    if temperature > 0:
        drawn = torch.distributions.Categorical(probs=logits.float().softmax(-1), validate_args=False).sample()
        return drawn, probs
    return probs.argmax(-1), probs


def finish_rows(xt, start, cfg):
    """A row is done once its first stop token has no mask before it; everything behind becomes end-of-text."""
    answer = xt[:, start:]
    stop = torch.isin(answer, torch.tensor(cfg.stop_ids, device=xt.device))
    before = stop.long().cumsum(1) - stop.long() == 0                       # up to and including the first stop token
    done = stop.any(1) & ~((answer == cfg.mask_id) & before).any(1)
    answer = answer.masked_fill(done[:, None] & ~before, cfg.eos_id)
    return torch.cat([xt[:, :start], answer], dim=1), done


def check_settings(gen_length, steps, block_length, remasking, eos, threshold, prompt_length, max_len):
    """ValueError with what to change, before any forward pass."""
    if gen_length < 1 or block_length < 1 or gen_length % block_length:
        raise ValueError(f"gen_length={gen_length} is not a multiple of block_length={block_length}")
    blocks = gen_length // block_length
    if steps < 1 or steps % blocks:
        raise ValueError(f"steps={steps} cannot be shared out over {blocks} blocks: use a multiple of {blocks}")
    if remasking not in ("low_confidence", "random", *DREAM_ORDERS):
        raise ValueError(f"unknown remasking {remasking!r}: low_confidence, random, {', '.join(DREAM_ORDERS)}")
    if remasking in DREAM_ORDERS and (blocks > 1 or threshold is not None or eos == "last"):
        raise ValueError(f"{remasking} decodes one block: set block_length = gen_length, no threshold, eos allow or forbid")
    if eos not in ("allow", "last", "forbid"):
        raise ValueError(f"unknown eos policy {eos!r}: allow, last, forbid")
    if prompt_length + gen_length > max_len:
        raise ValueError(f"prompt of {prompt_length} + gen_length={gen_length} tokens exceeds the model's limit of {max_len}")


def cut(ids, cfg):
    """Generated ids (L,) up to the first stop token, as a list."""
    ids = ids.tolist()
    ends = [ids.index(stop) for stop in cfg.stop_ids if stop in ids]
    return ids[:min(ends)] if ends else ids


def explain(gen_length, steps, block_length, cfg, threshold):
    """The schedule in words: tokens per step and forward passes (LLaDA's orders)."""
    blocks = gen_length // block_length
    quota = split_evenly(torch.tensor([block_length]), steps // blocks)[0].tolist()
    runs = [f"{q} x {quota.count(q)}" for q in dict.fromkeys(quota)]
    if threshold is not None:
        return f"{blocks} block(s) of {block_length}; each step commits every token with confidence >= {threshold}, at least one"
    return (f"{blocks} block(s) of {block_length} tokens, left to right; {steps // blocks} steps a block committing "
            f"{', then '.join(runs)} tokens; {steps * (2 if cfg else 1)} forward passes in all")


# ----------------------------------------------------------------------------------------------------------------------
# Command line. Only from here on is it known which memories exist.

def load_arms(checkpoint, device=None, dtype=None):
    """A checkpoint -> backbone, tokenizer, {arm: memory}: the ways in which this checkpoint can be run.

    Any backbone: "off" (plain) and "on" (fast weights adapted to the prompt, with the settings it was trained with). A MetaState
    checkpoint: "frozen" (its backbone alone), "metastate", "reset" (its slots put back at every step) and "both" (fast weights
    adapted to the prompt under it); a control: "frozen" and its own name. First comes the plain model, then the memory."""
    import memdlm
    import metastate
    path = Path(checkpoint)
    if (path / "metastate.json").exists():
        meta, backbone, base = metastate.load(path, device, dtype)
        arms = {"frozen": no_memory, metastate.ARMS[meta.cfg.memory]: meta.memory()}
        if meta.cfg.memory == "slots":
            reset = metastate.MetaState(backbone.cfg, dataclasses.replace(meta.cfg, memory="reset")).to(backbone.device)
            reset.load_state_dict(meta.state_dict())
            arms |= {"reset": reset.memory(), "both": meta.memory(under=memdlm.prompt_memory(memory_settings(base)))}
        return backbone, load_tokenizer(base), arms
    backbone = load_backbone(checkpoint, device, dtype)
    return backbone, load_tokenizer(checkpoint), {"off": no_memory, "on": memdlm.prompt_memory(memory_settings(path))}


def memory_settings(folder):
    """The inner loop's settings that train.py wrote beside a checkpoint; the paper's for any other."""
    import memdlm
    path = Path(folder) / "memory.json"
    return memdlm.MemDLMConfig(**read_json(path)) if path.exists() else memdlm.MemDLMConfig()


def peak_memory():
    """Bytes: of the accelerator if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")                                      # getrusage would count what the parent process held
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def show_canvas(xt, new, start, tokenizer, cfg, colour):
    """One line: committed tokens, the ones just committed in green (or in [brackets] in plain text), masks as a dot."""
    words = []
    for i in range(start, len(xt)):
        word = "·" if xt[i] == cfg.mask_id else tokenizer.decode([xt[i]]).strip() or "␣"
        words.append((f"\x1b[32;1m{word}\x1b[0m" if colour else f"[{word}]") if new[i] else word)
    return " ".join(words)


def arguments():
    parser = argparse.ArgumentParser(description="Decode prompts with a masked-diffusion LM, with and without its memory.")
    parser.add_argument("--checkpoint",
                        help="a folder written by train.py, a hub name (GSAI-ML/LLaDA-8B-Instruct), or an adapter folder")
    parser.add_argument("--prompt", nargs="+", help="one or more prompts; they are decoded as one batch")
    parser.add_argument("--arm", help="off | on; frozen | metastate | reset | both. Default: the plain model, then the memory")
    parser.add_argument("--gen_length", type=int, help="answer tokens (default: 6 for the tiny model, 128 for others)")
    parser.add_argument("--steps", type=int, help="forward passes for the answer (default: gen_length, one token each)")
    parser.add_argument("--block_length", type=int,
                        help="decode left to right in blocks of this size (default: gen_length, one block)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = the likeliest token; above 0 Gumbel noise (default 0)")
    parser.add_argument("--cfg", type=float, default=0.0, help="guidance scale; above 0 each step costs two passes (default 0)")
    parser.add_argument("--remasking", default=None, choices=["low_confidence", "random", *DREAM_ORDERS],
                        help="which tokens to commit first (default: entropy for Dream, low_confidence for all others)")
    parser.add_argument("--threshold", type=float, help="commit every token at least this sure, e.g. 0.9, in place of --steps")
    parser.add_argument("--eos", default="allow", choices=["allow", "last", "forbid"],
                        help="end of text: allow; last = commit it only when nothing else is left; forbid")
    parser.add_argument("--top_p", type=float, help="Dream's orders only")
    parser.add_argument("--top_k", type=int, help="Dream's orders only")
    parser.add_argument("--alg_temp", type=float, help="Dream's orders only: randomness of the order")
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, help="chat template (default: on for Instruct models)")
    parser.add_argument("--watch", action="store_true", help="show the canvas after every step, and what the slots read")
    parser.add_argument("--explain", action="store_true", help="print the schedule, tokens per step and forward passes, and stop")
    parser.add_argument("--vocabulary", action="store_true", help="print the closed vocabulary of the tiny model and stop")
    parser.add_argument("--seed", type=int, default=0, help="for temperature > 0 and random orders (default 0)")
    parser.add_argument("--device", help="default: cuda, mps or cpu, whichever is there")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the checkpoint's own")
    return parser


def main():
    parser = arguments()
    args = parser.parse_args()
    if args.vocabulary:
        from niah import vocabulary
        return print(" ".join(vocabulary()))
    if not args.explain and (not args.checkpoint or not args.prompt):
        parser.error("--checkpoint and --prompt are needed")
    for name in ("gen_length", "steps", "block_length"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.explain and not args.checkpoint:
        gen = args.gen_length or 128
        steps, block = args.steps or gen, args.block_length or gen
        check_settings(gen, steps, block, args.remasking or "low_confidence", args.eos, args.threshold, 0, gen)
        return print(explain(gen, steps, block, args.cfg, args.threshold))
    backbone, tokenizer, arms = load_arms(args.checkpoint, args.device, args.dtype and getattr(torch, args.dtype))
    cfg = backbone.cfg
    cfg.chat = cfg.chat if args.chat is None else args.chat
    gen = args.gen_length or (6 if cfg.family == "tiny" else 128)
    settings = dict({name: getattr(args, name) for name in ("temperature", "cfg", "threshold", "eos", "top_p", "top_k", "alg_temp")},
                    gen_length=gen, steps=args.steps or gen, block_length=args.block_length or gen,
                    remasking=args.remasking or ("entropy" if cfg.family == "dream" else "low_confidence"))
    if settings["remasking"] not in DREAM_ORDERS and (args.top_p or args.top_k or args.alg_temp):
        raise ValueError(f"--top_p, --top_k and --alg_temp belong to Dream's orders, not to {settings['remasking']}")
    if args.explain:
        return print(explain(gen, settings["steps"], settings["block_length"], args.cfg, args.threshold))
    if args.arm and args.arm not in arms:
        raise ValueError(f"this checkpoint has the arms {', '.join(arms)}, not {args.arm}")
    names = [args.arm] if args.arm else list(arms)[:2]
    prompts = [torch.tensor(encode_prompt(tokenizer, cfg, p)) for p in args.prompt]
    colour, answers = sys.stdout.isatty(), {}
    for name in names:
        torch.manual_seed(args.seed)                                        # the arms see the same random numbers
        passes, slots_before = [0], []

        def counted(backbone, xt, attend, start):
            predict, state = arms[name](backbone, xt, attend, start)

            def counting(*inputs):
                passes[0] += 1
                return predict(*inputs)
            return counting, state

        def watch(xt, new, state):
            for row in range(len(xt)):
                line = show_canvas(xt[row].tolist(), new[row].tolist(), xt.shape[1] - gen, tokenizer, cfg, colour)
                print(f"  pass {passes[0]:>3} | {line}")
            if isinstance(state, tuple) and state[2] is not None:            # MetaState: what the slots did
                slots, _, weights = state
                moved = (slots - (slots_before[-1] if slots_before else 0)).norm(dim=-1).mean().item()
                slots_before.append(slots)
                looked = weights[0].sum((0, 1))[:xt.shape[1] - gen]         # (prompt tokens,), first row
                top = [f"{tokenizer.decode([int(xt[0, i])])}@{i}" for i in looked.topk(min(3, len(looked))).indices.tolist()]
                print(f"           slots moved by {moved:.2f}; in the prompt the Mixer read most: {', '.join(top)}")
        if args.watch:
            print(f"{name}:")
        began = time.time()
        ids = generate(backbone, prompts, memory=counted, on_step=watch if args.watch else None, **settings)
        seconds = time.time() - began
        answers[name] = [tokenizer.decode(cut(row, cfg), skip_special_tokens=True) for row in ids]
        tokens = sum(len(cut(row, cfg)) for row in ids)
        for text in answers[name]:
            print(f"{name:>10}: {text}")
        peak = f", {peak_memory() / 1e9:.2f} GB peak memory"
        print(f"            {passes[0]} forward passes, {tokens} tokens, {tokens / seconds:.1f} tokens/s{peak}")
    if len(names) == 2:
        changed = sum(a != b for a, b in zip(*answers.values()))
        print(f"the memory changed {changed} of {len(prompts)} answers")


if __name__ == "__main__":
    cli(main)
