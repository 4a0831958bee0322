"""The denoising loop: from a canvas of masks to text, and what each step throws away.

Papers: LLaDA (arXiv 2502.09992), Dream (2508.15487: four orders), Fast-dLLM (2505.22618: threshold)
Idea: predict all masked tokens at once, commit the few one is surest of, repeat. What a step knew
beyond the committed tokens is lost before the next one. MetaState carries it on in slots; MemDLM
writes the prompt into weights that all steps use. So the loop takes the memory as an argument:
  memory(backbone, xt, attend, start) -> predict, state       once
  predict(xt, t, state, at) -> logits, state                  at every step
  state: None without memory; phi with MemDLM; (slots, phi or None, what was read) with MetaState
Shapes: B batch, L canvas = prompt (left-padded) + answer, V vocabulary, N chosen positions
Holds: token for token the official samplers in fp32 (test_all.py holds ten-line references; in
bf16 a row may come out differently alone and padded in a batch, as theirs do), except that
- a row whose end-of-text has no mask before it is finished and takes no further part (where Dream
  draws random numbers it does, for its neighbours' sake: what comes behind the end is dropped);
- eos = last holds back both stop tokens at any temperature, the official flag above 0 only one;
- with noise and steps > gen_length the official loop draws on after a block is full, this one not;
- Dream in bf16 is never silently greedy (see dream_token);
- a [MASK] written in a prompt is text: it is never filled in and uses up no commits.
Run: python sample.py --checkpoint runs/memdlm --prompt "river = 47 . ? river =" --watch
"""
import argparse
import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import memdlm
import metastate
from backbone import (Backbone, BackboneConfig, add_flags, are_messages, cli, config_from_dict,
                      encode, encode_prompt, given_flags, load_backbone, load_tokenizer, option,
                      read_json, read_lines, validate)

DREAM_ORDERS = ("origin", "maskgit_plus", "topk_margin", "entropy")


@dataclass
class Decoding:
    """How to decode: the keywords of generate and the flags of the command line."""
    gen_length: int = option(None, "answer tokens (default: 6 for the tiny model, else 128)", 1)
    steps: int = option(None, "forward passes for the whole answer (default: gen_length)", 1)
    block_length: int = option(None, "decode left to right in blocks (default: one block)", 1)
    temperature: float = option(0.0, "LLaDA's Gumbel noise, Dream's softmax; 0 = no randomness", 0)
    cfg_scale: float = option(0.0, "guidance scale w: u + (w + 1)(c - u), u without the prompt", 0)
    remasking: str = option(None, "which tokens to commit first; the last four are Dream's "
                            "(default: entropy for Dream, else low_confidence)",
                            choices=("low_confidence", "random", *DREAM_ORDERS))
    threshold: float = option(None, "commit every token at least this sure, and ignore steps", 0)
    eos: str = option("allow", "end of text; last = commit it only when nothing else is left",
                      choices=("allow", "last", "forbid"))
    top_p: float = option(None, "Dream's orders only: keep the likeliest up to this mass", 0, 1)
    top_k: int = option(None, "Dream's orders only: keep this many tokens", 1)
    alg_temp: float = option(None, "Dream's orders only: randomness of the order", 0)

    def filled(self, config, prompt_length=0):
        """A copy without open settings, for this backbone. ValueError says what to change."""
        validate(self, "")
        n = self.gen_length or (6 if config.family == "tiny" else 128)
        order = self.remasking or ("entropy" if config.family == "dream" else "low_confidence")
        size = self.block_length or n
        how = replace(self, gen_length=n, steps=self.steps or n, block_length=size, remasking=order)
        if n % size:
            raise ValueError(f"gen_length={n} is not a multiple of block_length={size}")
        if how.steps % how.blocks:
            raise ValueError(f"steps={how.steps}: use a multiple of {how.blocks}, the blocks")
        blockwise = how.blocks > 1 or self.threshold is not None or self.eos == "last"
        if order in DREAM_ORDERS and blockwise:
            raise ValueError(f"{order} decodes one block: no block_length, threshold or eos last")
        if order not in DREAM_ORDERS and (self.top_p, self.top_k, self.alg_temp) != (None,) * 3:
            raise ValueError(f"top_p, top_k and alg_temp belong to Dream's orders, not to {order}")
        if prompt_length + n > config.max_len:
            raise ValueError(f"prompt of {prompt_length} + gen_length={n} tokens exceeds the "
                             f"model's limit of {config.max_len}")
        return how

    @property
    def blocks(self):
        return self.gen_length // self.block_length

    def explain(self):
        """The schedule in words: tokens per step and forward passes (LLaDA's orders)."""
        blocks = f"{self.blocks} block(s) of {self.block_length} tokens, left to right; "
        if self.threshold is not None:
            return f"{blocks}a step commits all tokens as sure as {self.threshold}, or the surest"
        steps = self.steps // self.blocks
        counts = split_evenly(torch.tensor([self.block_length]), steps)[0].tolist()
        runs = ", then ".join(f"{n} x {counts.count(n)}" for n in dict.fromkeys(counts))
        return (f"{blocks}{steps} steps a block committing {runs} tokens; "
                f"{self.steps * (2 if self.cfg_scale else 1)} forward passes in all")


def no_memory(backbone, xt, attend, start):
    """The plain model: each step sees the canvas and nothing else."""
    def predict(xt, t, state, at):
        return backbone(xt, attend, at), state                              # (N, V)
    return predict, None


def left_pad(prompts, pad_id, device):
    """A list of 1-D id tensors of any lengths -> ids (B, L), attend (B, L), padding on the left."""
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    prompts = [torch.as_tensor(prompt) for prompt in prompts]
    ids = pad_sequence(prompts, True, pad_id, "left")
    attend = pad_sequence([torch.ones_like(p, dtype=torch.bool) for p in prompts], True, 0, "left")
    return ids.to(device), attend.to(device)


@torch.no_grad()
def generate(backbone, prompts, *, attend=None, memory=no_memory, stop_early=True, on_step=None,
             **settings):
    """Denoise gen_length masks behind each prompt; returns the generated ids (B, gen_length).
    prompts: (B, L), with attend (B, L) bool if they are padded on the left; or a list of 1-D
    tensors of any lengths. settings: see Decoding. memory: see the header. stop_early: a row ends
    with its end-of-text. on_step(xt, new, state): called after every commit of new (B, L) bool."""
    config = backbone.cfg
    if isinstance(prompts, (list, tuple)):
        prompts, attend = left_pad(prompts, config.pad_id, backbone.device)
    B, start = prompts.shape
    how = Decoding(**settings).filled(config, start)
    last = config.stop_ids if how.eos == "last" else []
    # 1. The canvas: the prompts, and behind them nothing but masks
    answer = torch.full((B, how.gen_length), config.mask_id, device=backbone.device)
    xt = torch.cat([prompts.to(answer), answer], dim=1)                     # (B, L)
    if attend is not None:
        attend = torch.cat([attend.to(answer.device).bool(), answer == config.mask_id], dim=1)
    position = torch.arange(xt.shape[1], device=xt.device)
    done = torch.zeros(B, dtype=torch.bool, device=xt.device)
    # Dream draws for masks alone: without a finished row's, its neighbours' draws would be others
    draws = how.temperature or how.alg_temp or how.remasking == "origin"
    # 2. The memory sees the prompt
    predict, state = memory(backbone, xt, attend, start)
    for end in range(start + how.block_length, xt.shape[1] + 1, how.block_length):
        # 3. How many tokens each step of this block commits; with a threshold at least one
        reached = (position >= start) & (position < end)
        masks = (xt == config.mask_id) & reached
        in_block = (masks & (position >= end - how.block_length)).sum(1)
        counts = split_evenly(in_block, how.steps // how.blocks)            # (B, steps)
        if how.threshold is not None:
            counts = torch.ones(B, int(masks.sum(1).max()), dtype=torch.long)
        for step in range(counts.shape[1]):
            at = (xt == config.mask_id) & reached
            if done.all() or not at.any():
                break
            # 4. Predict the masked tokens; t (B,) is the answer's actual mask ratio
            t = (xt[:, start:] == config.mask_id).float().mean(1)
            logits, state = predict(xt, t, state, at)                       # (N, V)
            if how.cfg_scale > 0:
                # guidance: the same canvas without its prompt, and without a memory of it
                free, _ = predict(xt.masked_fill(position < start, config.mask_id), t, None, at)
                logits = free + (how.cfg_scale + 1) * (logits - free)
            if how.eos == "forbid":
                logits[:, config.eos_id] = -torch.inf
            # 5. Choose which of them to commit
            if how.remasking in DREAM_ORDERS:
                new, tokens = choose_dream(logits, at, step, how)
            else:
                new, tokens = choose_llada(logits, at, counts[:, step], how, last)
            # 6. Commit; everything else the step knew is forgotten, but for the state
            xt = torch.where(new, tokens, xt)
            if stop_early:
                ended, done = finish_rows(xt, start, config)
                xt = xt if draws and how.remasking in DREAM_ORDERS else ended
            if on_step:
                on_step(xt, new, state)
    return (finish_rows(xt, start, config)[0] if stop_early else xt)[:, start:]


def split_evenly(n, steps):
    """n (B,) tokens over the steps (B, steps): 32 over 12 = 3 x 8, then 2 x 4."""
    return n[:, None] // steps + (torch.arange(steps, device=n.device) < n[:, None] % steps)


def on_canvas(values, at, fill):
    """values (N,) at their places on the canvas (B, L), fill everywhere else."""
    canvas = torch.full(at.shape, fill, dtype=values.dtype, device=values.device)
    return canvas.masked_scatter(at.to(values.device), values)


def choose_llada(logits, at, counts, how, last):
    """LLaDA's remasking: positions to commit (B, L) bool, and a token for each (B, L).
    logits (N, V) at the positions `at` (B, L); counts (B,): how many to commit in each row, unless
    there is a threshold. last: ids that are committed only when nothing else is left."""
    scores = logits
    device = "cpu" if logits.is_mps else logits.device          # Apple's MPS has no float64
    if how.temperature > 0:
        # Gumbel-max: argmax of exp(logits) / (-ln U)^T. In float64, because float32 noise distorts
        # the draw (arXiv 2409.02908); drawn for the whole canvas, as the official code does
        scores = logits.to(device).double().exp()
        u = torch.rand(*at.shape, logits.shape[-1], dtype=torch.float64, device=scores.device)
        scores = scores / (-torch.log(u[at.to(u.device)])) ** how.temperature
    token = scores.argmax(-1)                                               # (N,)
    if how.remasking == "random":
        confidence = torch.rand(at.shape, device=at.device).masked_fill(~at, -torch.inf)
    else:
        ranked = logits.clone() if last else logits
        ranked[:, last] = -torch.inf                    # they keep their place, at confidence 0
        if how.threshold is not None:
            # Fast-dLLM's precision: in bf16 0.89837 passes for 0.9. LLaDA ranks in the model's own
            ranked = ranked.to(device).double()
        p = ranked.softmax(-1).gather(1, token.to(ranked.device)[:, None])[:, 0]
        confidence = on_canvas(p, at, -torch.inf)                           # (B, L)
    if how.threshold is not None:
        new = (confidence >= how.threshold).scatter(1, confidence.argmax(1, keepdim=True), True)
    else:
        new = torch.zeros_like(confidence, dtype=torch.bool)
        # row by row, the official code's own call: it decides which of equals go first
        for row, count in enumerate(counts.tolist()):
            new[row, torch.topk(confidence[row], count).indices] = True
    return new.to(at.device) & at, on_canvas(token.to(at.device), at, 0)


def choose_dream(logits, at, step, how, eps=1e-3):
    """Dream's diffusion_generate: t runs from 1 to eps, a share 1 - s/t of the masks is committed.
    logits (N, V) at the positions `at` (B, L). Returns positions (B, L) bool and tokens (B, L)."""
    schedule = torch.linspace(1, eps, how.steps + 1)    # in fp32: counts are truncated from it
    share = 1.0 if step == how.steps - 1 else (1 - schedule[step + 1] / schedule[step]).item()
    if how.remasking == "origin":                       # as in training, each mask on its own
        new = on_canvas(torch.rand(len(logits), device=at.device) < share, at, False)
        return new, on_canvas(dream_token(logits[new[at]], how)[0], new, 0)
    token, probs = dream_token(logits, how)                                 # (N,), (N, V)
    if how.remasking == "maskgit_plus":
        p = probs.gather(1, token[:, None])[:, 0]
    elif how.remasking == "topk_margin":
        p = -probs.topk(2).values.diff()[:, 0]                              # first - second
    else:
        p = (probs * torch.log(probs + 1e-10)).sum(-1)                      # negative entropy
    confidence = on_canvas(p, at, -torch.inf)
    new = torch.zeros_like(at)
    left = at.sum(1)                                                        # (B,)
    for n in left.unique().tolist():
        # the official batch has equally many masks in every row; rows that have share one call
        rows = (left == n).nonzero()[:, 0]
        count = int(n * share)
        if count and how.alg_temp:
            picked = torch.multinomial(torch.softmax(confidence[rows] / how.alg_temp, -1), count)
        else:
            picked = confidence[rows].topk(count).indices
        new[rows[:, None], picked] = True
    return new & at, on_canvas(token, at, 0)


def dream_token(logits, how):
    """A token per row (N,) and the distribution it came from (N, V), reshaped by top_p and top_k at
    any temperature. Differs in bf16: the draw is from an fp32 softmax. The official one need not
    sum to 1; torch then refuses it, and the loop swallows that and takes the likeliest tokens."""
    lowest = torch.finfo(logits.dtype).min
    if how.temperature > 0:
        logits = (logits / how.temperature).clamp(lowest, -lowest)
    if how.top_p is not None and how.top_p < 1:
        ordered, index = logits.sort(descending=True)
        beyond = (ordered.softmax(-1).cumsum(-1) > how.top_p).roll(1, -1)
        beyond[:, 0] = False                            # the token that passes top_p is kept
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), lowest)
    if how.top_k is not None:
        weakest = logits.topk(min(how.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, lowest)
    probs = logits.softmax(-1)
    if how.temperature == 0:
        return probs.argmax(-1), probs
    draw = torch.distributions.Categorical(probs=logits.float().softmax(-1), validate_args=False)
    return draw.sample(), probs


def finish_rows(xt, start, config):
    """A row is done once its first stop token has no mask before it; then comes end-of-text."""
    answer = xt[:, start:]
    stop = torch.isin(answer, torch.tensor(config.stop_ids, device=xt.device))
    before = stop.long().cumsum(1) - stop.long() == 0   # up to and including the first stop token
    done = stop.any(1) & ~((answer == config.mask_id) & before).any(1)
    answer = answer.masked_fill(done[:, None] & ~before, config.eos_id)
    return torch.cat([xt[:, :start], answer], dim=1), done


def cut(ids, config):
    """Generated ids (L,) up to the first stop token, as a list."""
    ids = ids.tolist()
    ends = [ids.index(stop) for stop in config.stop_ids if stop in ids]
    return ids[:min(ends)] if ends else ids


# Command line: everything above takes any memory, from here on it is one of the two --------------

def load_arms(checkpoint, device=None, dtype=None, chat=None):
    """A checkpoint -> backbone, tokenizer, {arm: memory}: the plain model, then the memory.
    Any backbone: off, on (fast weights adapted to the prompt). MetaState: frozen, metastate, wiped
    (slots put back at every step), both (fast weights under it). A control: frozen, its name."""
    path = Path(checkpoint)
    if not (path / "metastate.json").exists():
        backbone = load_backbone(checkpoint, device, dtype, chat)
        arms = {"off": no_memory, "on": memdlm.memory_of(inner_loop_settings(path))}
        return backbone, load_tokenizer(checkpoint), arms
    meta, backbone, base = metastate.load(path, device, dtype, chat)
    arms = {"frozen": no_memory, metastate.ARMS[meta.settings.memory]: meta.memory()}
    if meta.settings.memory == "slots":
        arms["wiped"] = metastate.wiped(meta, backbone.cfg)
        arms["both"] = meta.memory(under=memdlm.memory_of(inner_loop_settings(base)))
    return backbone, load_tokenizer(base), arms


def chosen_arms(arms, names):
    """Those of the arms that are asked for. ValueError if the checkpoint has no such arm."""
    unknown = ", ".join(name for name in names if name not in arms)
    if unknown:
        raise ValueError(f"this checkpoint has the arms {', '.join(arms)}, not {unknown}")
    return {name: arms[name] for name in names}


def inner_loop_settings(folder):
    """What train.py wrote beside a checkpoint; the paper's settings for any other."""
    path = Path(folder) / "memory.json"
    raw = read_json(path) if path.exists() else {}
    closed = raw.get("inner_on") == "closed_book"
    return config_from_dict(memdlm.ClosedBook if closed else memdlm.MemDLMConfig, raw, path)


def write_texts(backbone, tokenizer, texts, inner, phi=None, cover=None):
    """Texts -> the phi in which they are written (on top of phi, if given), ids, attend (B, L).
    cover: a list of texts whose tokens are no targets, one for each row."""
    ids, attend = left_pad([encode(tokenizer, text, backbone.cfg) for text in texts],
                           backbone.cfg.pad_id, backbone.device)
    targets = [~torch.isin(row, row.new_tensor(encode(tokenizer, text)))
               for row, text in zip(ids, cover or ())]
    options = dict(targets=torch.stack(targets)) if cover else {}
    return memdlm.at_inference(inner)(backbone, ids, attend, inner, phi=phi, **options), ids, attend


def close_book(backbone, tokenizer, texts, folder):
    """Prompts -> their questions, {arm: memory}, the hidden texts (ids, attend)."""
    questions, contexts = [], []
    for text in map(str.strip, texts):
        at = text.rfind("\n") + 1 or text.rfind("?")
        if at < 1:
            raise ValueError(f"--closed_book: {text!r:.60} has no question behind a text: end it "
                             "with a line of its own, or with \"? ...\"")
        contexts.append(text[:at].strip())
        questions.append(text[at:])
    phi, *hidden = write_texts(backbone, tokenizer, contexts, inner_loop_settings(folder))
    return questions, {"none": no_memory, "written": memdlm.fixed_memory(phi)}, hidden


def peak_memory():
    """Bytes: of the accelerator if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")      # getrusage would count what the parent process held
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    if os.name == "nt":
        return float("nan")
    import resource                                         # there is none on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def join_ranks(cfg):
    """Under torchrun: one device for each process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    local = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.is_available() and cfg.device != "cpu"
    if on_gpu:  # first of all: NCCL and fully_shard put what they make on the current device
        torch.cuda.set_device(local)
    # one rank may wait for another's longest text; a dead one is torchrun's to notice
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(days=1))
    cfg.device = f"cuda:{local}" if on_gpu else "cpu"


def ranks():
    """This process's rank and the number of processes; 0 and 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def append_rows(jobs, work, out):
    """The rows work(job) of all jobs in their order, appended to the JSONL file `out` as they come.
    The processes of torchrun share out the jobs, one each at a time; the first of them writes."""
    rank, world = ranks() if out else (0, 1)
    rows = []
    with tqdm(total=len(jobs), unit="batch", leave=False, disable=rank > 0) as bar:
        for i in range(0, len(jobs), world):
            mine = [row for job in jobs[i + rank:i + rank + 1] for row in work(job)]
            parts = [mine] * world
            if world > 1:
                dist.all_gather_object(parts, mine)
            new = [row for part in parts for row in part]
            if out and rank == 0:
                with open(out, "a") as f:
                    f.writelines(json.dumps(row) + "\n" for row in new)
            rows += new
            bar.update(min(world, len(jobs) - i))
    return rows


def estimate(cfg, method, batch, length, lora, scored=1.0, inner=None, meta_cfg=None,
             weight_bytes=2, checkpointing=True):
    """Bytes on the device, by kind, while training, or (method "adapt") while a prompt is written
    into fast weights: good to about 20 %, without fragmentation and the framework's own memory
    (about 1 GB). scored: share of the positions with logits. What is trained is in fp32."""
    adapt, frozen = method == "adapt", lora or method in ("metastate", "adapt")
    inner = inner or memdlm.MemDLMConfig()
    with torch.device("meta"):
        module = Backbone(cfg)
        weights = sum(p.numel() for p in module.parameters()) if frozen else 0
        phi = memdlm.init_phi(module, [0], inner) if method in ("memdlm", "adapt") else {}
        passes, first = 1, memdlm.first_fast_layer(module, inner) if adapt else 0
        if method == "metastate":
            module = metastate.build(cfg, meta_cfg)
            passes, first = meta_cfg.unroll, meta_cfg.inject_layers[0]
        elif lora:
            module.add_lora(lora, 2 * lora)
        trained = 0 if adapt else sum(p.numel() for p in module.parameters() if p.requires_grad)
    tokens, layers = batch * length, cfg.n_layers - first       # those below keep nothing
    experts = max(1, cfg.experts_per_token)
    ffn = cfg.d_ff * experts
    # what one layer keeps for the backward pass
    layer = tokens * weight_bytes * (10 * cfg.d_model + 4 * ffn + 3 * cfg.n_heads * cfg.head_dim)
    if adapt:                               # phi is computed in fp32, from a copy of its inputs
        layer += tokens * 4 * (2 * cfg.d_model * experts + ffn)
        closed = isinstance(inner, memdlm.ClosedBook)
        scored = 1 / inner.masks if closed else min(1, inner.s_pre * inner.prompt_ratio)
    kept = layers * layer
    if checkpointing and not adapt:         # inputs; one layer at a time is computed again
        kept = layers * tokens * weight_bytes * cfg.d_model + layer
    return {"weights": weights * weight_bytes, "trained, gradient, Adam": 16 * trained,
            # phi, its gradient, the new phi, a temporary
            "fast weights": 16 * batch * sum(w.A.numel() + w.B.numel() for w in phi.values()),
            "activations": passes * kept,
            # as computed, in fp32, and their gradient
            "logits": int(tokens * scored) * cfg.vocab_size * (weight_bytes + 8) * passes}


def show_estimate(sizes):
    kinds = ", ".join(f"{kind} {size / 1e9:.3g}" for kind, size in sizes.items() if size)
    return f"{kinds}; together {sum(sizes.values()) / 1e9:.3g} GB"


def device_memory(device):
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):                          # Windows
        return float("inf")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def printable(text):
    """Without control characters: a tokenizer may hold sequences that a terminal would obey."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


class Frame(NamedTuple):
    """What one step left behind: of the answers (B, gen_length), and of the prompts (B, L)."""
    tokens: torch.Tensor        # where a mask is left, its likeliest token
    sure: torch.Tensor          # the model's probability of that token; -1 where never asked
    kind: torch.Tensor          # 0 a mask, 1 committed, 2 committed in this step
    read: torch.Tensor = None   # of the prompts: the Mixer's mean weights; None without slots


class Viewer:
    """Looks over a memory's shoulder: counts forward passes and keeps a frame of every step."""
    def __init__(self, name, memory, backbone, tokenizer, watch=False, record=False):
        self.name, self.watched = name, memory
        self.backbone, self.tokenizer = backbone, tokenizer
        self.watch, self.record = watch, watch or record    # a softmax over the vocabulary a step
        self.passes, self.tokens, self.slots, self.asked = 0, 0, 0, None

    def memory(self, backbone, xt, attend, start):
        """The `memory` argument of generate."""
        self.start, self.prompt, self.attend = start, xt[:, :start], attend[:, :start]
        self.sure = torch.full(xt.shape, -1.0, device=xt.device)
        self.frames = [Frame(*(x[:, start:] for x in (xt, self.sure, torch.zeros_like(xt))))]
        predict, state = self.watched(backbone, xt, attend, start)
        self.phi = state[1] if isinstance(state, tuple) else state

        def counting(xt, t, state, at):
            self.passes += 1
            logits, state = predict(xt, t, state, at)
            if self.record:
                self.asked = self.asked or (logits, at)     # a second pass is guidance's
            return logits, state
        return counting, state

    def step(self, xt, new, state):
        """The `on_step` argument of generate."""
        (logits, at), self.asked = self.asked, None
        masked = xt == self.backbone.cfg.mask_id
        probs = logits.float().softmax(-1)                                  # (N, V)
        tokens = torch.where(masked & at, on_canvas(probs.argmax(-1), at, 0), xt)
        p = probs.gather(1, tokens[at][:, None])[:, 0]
        self.sure = torch.where(at, on_canvas(p, at, 0.0), self.sure)       # (B, L)
        kind = torch.where(masked, 0, 1 + new.long())
        slots, _, weights = state if isinstance(state, tuple) else (None, None, None)
        read = None if weights is None else weights.mean((1, 2))[:, :self.start]
        self.frames.append(Frame(*(x[:, self.start:] for x in (tokens, self.sure, kind)), read))
        if self.watch:
            self.show(self.frames[-1], slots)

    def show(self, frame, slots):
        """Print the canvas; how far the slots moved, where the Mixer of the first row looked."""
        looks = ["·", "{}", "\x1b[32;1m{}\x1b[0m" if sys.stdout.isatty() else "*{}*"]
        for row, kinds in zip(frame.tokens, frame.kind.tolist()):
            words = [looks[kind].format(word) for kind, word in zip(kinds, self.words(row))]
            print(f"  pass {self.passes:>3} | {' '.join(words)}")
        if frame.read is not None:
            places = frame.read[0].topk(min(3, self.start)).indices
            most = zip(self.words(self.prompt[0, places]), places.tolist())
            print(f"           slots moved by {(slots - self.slots).norm(dim=-1).mean():.2f}; in "
                  f"the prompt the Mixer read most: {', '.join(f'{w}@{i}' for w, i in most)}")
            self.slots = slots

    def words(self, ids):
        """A text that can be shown for each token (L,)."""
        texts = ["·" if i == self.backbone.cfg.mask_id else self.tokenizer.decode([i])
                 for i in ids.tolist()]
        return [" ".join(printable(text).split()) or "␣" for text in texts]

    def answers(self, prompts, how, seed):
        """What the model says behind the prompts; every arm sees the same random numbers."""
        torch.manual_seed(seed)
        ids = generate(self.backbone, prompts, memory=self.memory,
                       on_step=self.step if self.record else None, **asdict(how))
        rows = [cut(row, self.backbone.cfg) for row in ids]
        self.tokens += sum(map(len, rows))
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    def decode(self, prompts, how, seed=0):
        """Print the answers and their cost; returns the answers."""
        if self.watch:
            print(f"{self.name}:")
        began = time.time()
        answers = [printable(answer) for answer in self.answers(prompts, how, seed)]
        print(*(f"{self.name:>10}: {answer}" for answer in answers), sep="\n")
        print(f"            {cost([self], began)}")
        return answers


def cost(viewers, began):
    passes, tokens = sum(v.passes for v in viewers), sum(v.tokens for v in viewers)
    return (f"{passes:,} forward passes, {tokens:,} tokens, {tokens / (time.time() - began):.1f} "
            f"tokens/s, {peak_memory() / 1e9:.2f} GB peak memory")


def decode_file(args, how, backbone, tokenizer, viewers):
    """--data: its lines, with one arm after the other, go to --out in this order. What --out holds
    is kept, but for half a line at its end, and not decoded again."""
    def read(raw, size):
        prompt = isinstance(raw, dict) and (raw.get("messages") or raw.get("prompt"))
        if not isinstance(prompt, str) and not are_messages(prompt) \
                or {"arm", "answer", "settings"} & set(raw):
            raise ValueError('expected {"prompt": text} or {"messages": [{"role", "content"}, '
                             '...]}, and no "arm", "answer", "settings"')
        ids = encode_prompt(tokenizer, backbone.cfg, prompt)
        how.filled(backbone.cfg, len(ids))
        return raw, torch.tensor(ids)
    raws, prompts = zip(*read_lines(args.data, read))
    n, began = len(raws), time.time()
    settings = dict(asdict(how), checkpoint=args.checkpoint, seed=args.seed)
    rows = [dict(raw, settings=settings, arm=viewer.name) for viewer in viewers for raw in raws]
    # 1. What is there already: each line is a row, and behind it the answer
    old = Path(args.out).read_bytes() if Path(args.out).exists() else b""
    whole = old[:old.rfind(b"\n") + 1]
    kept = whole.decode().splitlines()
    starts = [json.dumps(row)[:-1] for row in rows]
    if len(kept) > len(rows) or not all(map(str.startswith, kept, starts)):
        raise ValueError(f"--out {args.out} holds other answers: name another, or remove it")
    if ranks()[0] == 0:
        with open(args.out, "ab") as f:     # a path that cannot be written is refused here
            f.truncate(len(whole))
    # 2. The rest, in the batches of a run that was not stopped
    jobs = [range(first + i, first + min(i + args.batch_size, n))
            for first in range(0, len(rows), n) for i in range(0, n, args.batch_size)]

    def work(job):
        arm, first = divmod(job.start, n)
        answers = viewers[arm].answers([prompts[i % n] for i in job], how, args.seed + first)
        return [dict(rows[i], answer=text) for i, text in zip(job, answers) if i >= len(kept)]
    append_rows([job for job in jobs if job.stop > len(kept)], work, args.out)
    print(cost(viewers, began))


@dataclass
class Command:
    """What is decoded and what is shown: the flags beside Decoding's."""
    checkpoint: str = option(None, "a folder written by train.py, a hub name, or an adapter folder")
    prompt: list = option(None, "one or more prompts, decoded as one batch")
    data: str = option(None, 'instead of --prompt: a JSONL file of {"prompt": text} or {"messages":'
                       ' [...]} lines, for --out; under torchrun each process takes a share')
    out: str = option(None, "--data's lines with arm and answer; started again, it goes on there")
    batch_size: int = option(8, "--data: lines decoded at once", 1)
    arm: list = option(None, "off, on; or frozen, metastate, wiped, both (default: the first two)")
    chat: bool = option(None, "prompts go through the chat template (default: as trained)")
    closed_book: bool = option(False, "write each prompt but its question (the last line, or from "
                               "the last ? on) into fast weights, hide it, and ask the question")
    watch: bool = option(False, "show the canvas after every step, and what the slots read")
    html: str = option(None, "write a page that shows every step and what the memory read")
    explain: bool = option(False, "print ids of each --prompt, schedule, forward passes, and stop")
    seed: int = option(0, "for temperature > 0 and random orders")
    device: str = option(None, "default: cuda, mps or cpu, whichever is there")
    dtype: str = option(None, "default: the checkpoint's own", choices=["float32", "bfloat16"])


def main():
    parser = argparse.ArgumentParser(description="Decode prompts, with and without a memory.")
    add_flags(parser, Command)
    add_flags(parser, Decoding)
    flags = parser.parse_args()
    args, how = (kind(**given_flags(kind, flags)) for kind in (Command, Decoding))
    if args.explain and not args.checkpoint:
        return print(how.filled(BackboneConfig(family="llada", max_len=sys.maxsize)).explain())
    if not args.checkpoint or not (args.prompt or args.explain or args.data and args.out):
        parser.error("--checkpoint and --prompt, or --data and --out, are needed")
    if args.data and (args.prompt or args.closed_book or args.watch or args.html):
        parser.error("--data goes without --prompt, --closed_book, --watch and --html")
    if args.data:
        join_ranks(args)
    dtype = args.dtype and getattr(torch, args.dtype)
    backbone, tokenizer, arms = load_arms(args.checkpoint, args.device, dtype, args.chat)
    texts, hidden = args.prompt or (), None
    if args.closed_book and texts:
        texts, arms, hidden = close_book(backbone, tokenizer, texts, args.checkpoint)
    how = how.filled(backbone.cfg)
    viewers = [Viewer(name, memory, backbone, tokenizer, args.watch, bool(args.html))
               for name, memory in chosen_arms(arms, args.arm or list(arms)[:2]).items()]
    if args.data and not args.explain:
        return decode_file(args, how, backbone, tokenizer, viewers)
    prompts = [torch.tensor(encode_prompt(tokenizer, backbone.cfg, text)) for text in texts]
    if args.explain:
        for ids in prompts:
            print(f"prompt ({len(ids)} ids): {' '.join(map(str, ids.tolist()))}")
        return print(how.explain())
    if args.html:
        Path(args.html).touch()             # what cannot be written is refused before the work
    answers = [viewer.decode(prompts, how, args.seed) for viewer in viewers]
    if len(answers) == 2:
        changed = sum(plain != remembered for plain, remembered in zip(*answers))
        print(f"the memory changed {changed} of {len(prompts)} answers")
    if args.html:
        Path(args.html).write_text(page(args.checkpoint, viewers, hidden), encoding="utf-8")


# The page of --html -------------------------------------------------------------------------------

@torch.no_grad()
def gained(backbone, phi, ids, attend):
    """How much phi raises the log-probability of each token where it alone is masked, (B, L) in
    nats. The text stands alone, without question and answer, as when it was written."""
    gains = []
    for i in range(ids.shape[1]):
        at = (torch.arange(ids.shape[1], device=ids.device) == i).expand_as(ids)
        xt = ids.masked_fill(at, backbone.cfg.mask_id)
        off, on = (backbone(xt, attend, at, p).float().log_softmax(-1) for p in (None, phi))
        gains.append((on - off).gather(1, ids[:, i:i + 1]))                 # (B, 1)
    return torch.cat(gains, dim=1)


def page(title, viewers, hidden=None):
    """A self-contained page of what the viewers recorded. hidden: ids and attend (B, L) of the
    texts from which phi was written, if the prompts do not hold them (close_book)."""
    words, prompt = viewers[0].words, (viewers[0].prompt, viewers[0].attend)
    text = hidden or prompt
    # heading, what its colours mean, ids, attend, a value for each token at step 0, 1, ...
    panels = []
    for v in viewers:
        if v.frames[-1].read is not None:
            panels.append((f"{v.name}: what the Mixer reads", "share of its attention, mean over "
                           "heads and slots", *prompt, [frame.read for frame in v.frames]))
        if v.phi is not None:
            panels.append((f"{v.name}: what phi knows", "log-probability of each token, masked "
                           "alone: with phi minus without, in nats", *text,
                           [gained(v.backbone, v.phi, *text)]))
    if hidden or not panels:
        panels.append(("what every arm sees", "", *prompt, [None]))

    rows = []
    for b in range(len(prompt[0])):
        shown = [dict(name=name, about=about, words=words(ids[b, attend[b]]),
                      values=[None if x is None else x[b, attend[b]].tolist() for x in steps])
                 for name, about, ids, attend, steps in panels]
        arms = [dict(name=v.name, frames=[
            dict(words=words(frame.tokens[b]), kind=frame.kind[b].tolist(),
                 sure=[None if p < 0 else p for p in frame.sure[b].tolist()])
            for frame in v.frames]) for v in viewers]
        rows.append(dict(panels=shown, arms=arms))
    # without any "<", because a tokenizer may hold "</script>"
    return PAGE.replace("DATA", json.dumps(dict(title=title, rows=rows)).replace("<", "\\u003c"))


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Denoising, step by step</title>
<style> /* --scale is viridis: the colour-blind can read it too */
:root { --scale: linear-gradient(90deg, #440154, #3b528b, #21918c, #5ec962, #fde725);
        color-scheme: light dark; font: clamp(18px, 1.5vw, 34px)/1.5 system-ui, sans-serif }
body { margin: 0 2rem 2rem }
header { position: sticky; top: 0; padding: .5rem 0; background: Canvas }
.row { display: flex; gap: 2rem }
.row > div { flex: 1; min-width: 0; font-size: 1.2rem }
.row + h2 { border-top: 2px solid; margin-top: 2rem }
header .row { align-items: center }
input { flex: 1; height: 1.5rem }
h1, h2 { margin: .6rem 0 0; font-size: 1.2rem }
.token { display: inline-block; margin: .15em; padding: 0 .35em; border: 3px solid transparent;
         border-radius: .3em; overflow-wrap: anywhere }
.mask { font-style: italic; border: 3px dashed CanvasText }
.new { font-weight: bold; border-color: CanvasText }
.bar { display: inline-block; width: 8rem; height: .7em; margin: 0 .5em; background: var(--scale) }
.map { display: grid; gap: 2px; margin-top: 1rem; font-size: min(1rem, 30vh / var(--steps)) }
.map div { height: 1.3em; line-height: 1.3; text-align: center; white-space: nowrap }
.map .later { visibility: hidden }
</style>
<header>
<div class="row"><h1></h1><input type="range" min="0" value="0" aria-label="step"><b></b></div>
<small>probability 0<i class="bar"></i>1 &emsp; dashed: a mask, with its best guess &emsp;
framed or &#9679;: committed now &emsp; keys &larr; &rarr;</small>
</header>
<main></main>
<script type="application/json">DATA</script>
<script>
const [slider, main, data, heading, place] = ["input", "main", "script", "h1", "b"].map(
  tag => document.querySelector(tag))
const {title, rows} = JSON.parse(data.textContent)
function add(parent, tag, className = "", textContent = "", value = null, top = 1) {
  const element = Object.assign(document.createElement(tag), {className, textContent})
  parent.append(element)
  if (value !== null) {
    const v = Math.min(1, Math.max(0, value / top))
    // a thin slice of the scale, stretched
    element.style.background = `var(--scale) ${99 * v + 0.5}% / 30000% padding-box`
    element.style.color = v < 0.45 ? "white" : "black"
    element.title = value.toPrecision(3)
  }
  return element
}
function addPanel({name, about, words, values}, step) {
  const all = values.flat(), top = all.reduce((a, b) => Math.max(a, b), 1e-9)
  const least = all.some(v => v < 0) ? ": ≤ 0" : ": 0"
  add(main, "h2", "", name)
  const legend = add(main, "small", "", about), text = add(main, "div")
  if (about) legend.append(least, add(legend, "i", "bar"), top.toPrecision(2))
  const now = values[Math.min(step, values.length - 1)]
  words.forEach((word, i) => add(text, "span", "token", word, now && now[i], top))
}
function addArm(parent, {name, frames}, step) {
  add(parent, "h2", "", name)
  const canvas = add(parent, "div"), map = add(parent, "div", "map")
  const {words, sure, kind} = frames[Math.min(step, frames.length - 1)]
  const looks = ["token mask", "token", step < frames.length ? "token new" : "token"]
  words.forEach((word, i) => add(canvas, "span", looks[kind[i]], word, sure[i]))
  map.style = `--steps: ${frames.length};
    grid-template-columns: 5em repeat(${words.length}, minmax(0, 3em))`
  frames.slice(1).forEach(({sure, kind}, k) => {
    const when = k < step ? "" : "later"
    add(map, "div", when, `step ${k + 1}`)
    kind.forEach((x, i) => add(map, "div", when, x === 2 ? "●" : "", x === 1 ? null : sure[i]))
  })
}
function show() {
  const step = Number(slider.value)
  place.textContent = `step ${step} of ${slider.max}`
  main.replaceChildren()
  for (const {panels, arms} of rows) {
    panels.forEach(panel => addPanel(panel, step))
    const row = add(main, "div", "row")
    arms.forEach(arm => addArm(add(row, "div"), arm, step))
  }
}
heading.textContent = title
slider.max = Math.max(...rows[0].arms.map(arm => arm.frames.length - 1))
slider.oninput = show
onkeydown = event => {
  // PageUp and PageDown are what a presenter's clicker sends
  const move = {ArrowLeft: -1, PageUp: -1, ArrowRight: 1, PageDown: 1}[event.key]
  if (!move) return
  event.preventDefault()
  slider.value = Number(slider.value) + move
  show()
}
show()
</script>
"""


if __name__ == "__main__":
    cli(main)
