"""Training: one loop per method, each written out whole; data, checkpoints, evaluation and the benchmark around them.

Papers: MDLM / LLaDA (the plain loss), MemDLM (arXiv 2603.22241, bilevel loss), MetaState (2603.01331, K-step unrolling).
Idea: all three methods see the same data and differ in the few lines of their loop: train_mdlm, train_memdlm,
train_metastate. Read those first; the rest is plumbing.
Shapes: B rows of the joined batch (all micro-batches, all ranks), L tokens
Read as: every random number of a step comes from (seed, step), never from a running state. So a resumed run is bit for bit
the run that was not killed, and any split of a batch over micro-batches or ranks gives the same loss.
Left out: mixed precision beyond bf16 weights with fp32 adapters, 4-bit weights, dropout.
Run: python train.py --method memdlm                                    (tiny, CPU: pretrains once, then fine-tunes)
     python train.py --method memdlm --backbone GSAI-ML/LLaDA-8B-Base --data train.jsonl --max_len 2048 --batch_size 2
     torchrun --nproc_per_node=8 train.py --method mdlm --backbone ...  (frozen layers sharded, data split)
"""
import argparse
import dataclasses
import json
import math
import os
import random
import shutil
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import memdlm
import metastate
import niah
from backbone import (Backbone, BackboneConfig, cli, config_from_json, corrupt, default_device, encode_pair, find_folder,
                      load_backbone, load_tokenizer, masked_loss, option, read_json, sample_t, save_adapter, save_backbone,
                      write_atomically)
from memdlm import MemDLMConfig
from metastate import MetaState, MetaStateConfig
from sample import generate, no_memory, peak_memory


@dataclass
class TrainConfig:
    """The only defaults; the command line is built from these fields. None = depends on the method, see DEFAULTS."""
    method: str = option("memdlm", "mdlm: plain; memdlm: memory in weights; metastate: memory in activations",
                         choices=["mdlm", "memdlm", "metastate"])
    backbone: str = option("tiny", "tiny, a hub name such as GSAI-ML/LLaDA-8B-Base, or a folder")
    init: str = option(None, "folder of a trained checkpoint to start from (tiny memdlm and metastate: pretrained once if missing)")
    data: str = option("niah", "niah (made on the fly) or a JSONL file of {\"prompt\", \"response\"} or {\"messages\"}")
    tasks: list = option(None, "niah tasks to train on (default: all alike; metastate: half of the rows resolve)", nargs="+",
                         choices=list(niah.TASKS))
    out: str = option(None, "output folder (default: runs/METHOD)")
    steps: int = option(None, "optimizer steps")
    batch_size: int = option(None, "rows per forward pass and process")
    accumulate: int = option(1, "forward passes per optimizer step; the loss is exactly that of the joined batch")
    lr: float = option(None, "peak learning rate (AdamW, warm-up, cosine to zero)")
    warmup: float = option(0.03, "share of the steps with rising learning rate")
    loss_weight: str = option("uniform", "uniform: each masked token counts alike; 1/t: the bound on the likelihood",
                              choices=["uniform", "1/t"])
    full_share: float = option(None, "share of batches in which the prompt is masked too: the model learns to denoise prompts")
    context: int = option(64, "niah: longest training text, in tokens")
    max_len: int = option(4096, "JSONL: longer examples are left out, and counted")
    lora: int = option(None, "rank of the trained LoRA, alpha = 2 r; 0 = all weights (default: 0 for tiny, 32 for others)")
    seed: int = option(0, "fixes data, noise and initialisation")
    eval_every: int = option(None, "steps between held-out evaluations (default: a tenth of the run)")
    save_every: int = option(200, "steps between checkpoints")
    n_eval: int = option(100, "niah samples per task in the table at the end; 0 = no table")
    checkpointing: bool = option(None, "recompute activations in the backward pass (default: on for real backbones)")
    device: str = option(None, "default: cuda, mps or cpu, whichever is there")
    dtype: str = option(None, "default: the checkpoint's own", choices=["float32", "bfloat16"])
    resume: bool = option(False, "go on from the last checkpoint in --out")
    overwrite: bool = option(False, "delete what is in --out and start anew")


# steps, batch_size, lr, full_share, by what is trained. Pretraining at 2e-3 for 6,000 steps left one seed of three without two
# of the tasks; 3e-3 for 8,000 learns all (but the hops of resolve) in all three. Fine-tuning 2e-5 as in MemDLM, section 4.1:
# at 2e-4 its shortcut cost that weak seed half of its multikey accuracy.
DEFAULTS = {"pretrain": (8000, 48, 3e-3, 0.3), "finetune": (400, 32, 2e-5, 0.5), "lora": (1000, 2, 2e-5, 0.0),
            "metastate": (3000, 32, 2e-3, 0.0)}


class Batch(NamedTuple):
    """Rows of data with their noise. The answer stands at the end of every row; prompts are padded on the left."""
    x0: torch.Tensor            # (B, L) clean tokens
    given: torch.Tensor         # (B, L) bool, prompt or padding: never masked, no loss
    attend: torch.Tensor        # (B, L) bool, False = padding
    t: torch.Tensor             # (B,)
    u: torch.Tensor             # (B, L) the uniform numbers that decide which tokens are masked at t

    def rows(self, start, stop, device):
        return Batch(*(x[start:stop].to(device) for x in self))


# ----------------------------------------------------------------------------------------------------------------------
# 1. The three methods.

def train_mdlm(run):
    """Masked diffusion: one random state per row."""
    backbone, mask_id = run.backbone, run.backbone.cfg.mask_id
    for step in run.steps():
        # 1. A batch of clean tokens, t and u for each row
        batch, n_maskable = run.batch(step)
        total = 0.0
        for part in run.parts(batch):
            # 2. Forward process
            xt, masked = corrupt(part.x0, part.t, part.given, mask_id, part.u)
            # 3. One pass; logits at the masked positions only
            logits = backbone(xt, part.attend, masked)
            # 4. Loss
            loss = masked_loss(logits, part.x0, masked, run.weight(part.t), n_maskable)
            loss.backward()
            total += loss.item()
        # 5. Update theta
        run.update(step, total)


def train_memdlm(run):
    """Bilevel: the inner loop writes each row's trajectory into its phi, the outer loss trains theta given phi."""
    for step in run.steps():
        # 1. A batch of clean tokens, t and u for each row
        batch, n_maskable = run.batch(step)
        total = 0.0
        for part in run.parts(batch):
            # 2.-4. Two nested states, inner loop on phi, outer loss on theta: memdlm.loss_memdlm
            loss = memdlm.loss_memdlm(run.backbone, part.x0, part.given, part.attend, part.t, part.u, run.weight(part.t),
                                      n_maskable, run.mem, seed=1_000_003 * run.cfg.seed + step)
            loss.backward()
            total += loss.item()
        # 5. Update theta; phi is thrown away
        run.update(step, total)


def train_metastate(run):
    """K-step unrolling: K denoising steps in one graph, slots carried along; the backbone is frozen."""
    for step in run.steps():
        # 1. A batch; four rows of five start fully masked
        batch, _ = run.batch(step)
        rng = torch.Generator().manual_seed(1_000_003 * run.cfg.seed + step)
        B = len(batch.x0)
        t = torch.where(torch.rand(B, generator=rng) < 0.8, 1.0, batch.t)
        # 2. Curriculum: first passes over an unchanged canvas, where only memory can help; then trajectories
        if step < 0.4 * run.cfg.steps:
            stay, unroll, first_loss = torch.ones(B, dtype=torch.bool), 3, 1
        else:
            stay, first_loss = torch.rand(B, generator=rng) < 0.4, 0
            unroll = int(torch.randint(2, run.meta.cfg.unroll + 2, (), generator=rng))
        batch, total = batch._replace(t=t), 0.0
        for part, part_stay in zip(run.parts(batch), run.split(stay)):
            # 3. The unrolled loss: metastate.loss_unrolled
            loss = metastate.loss_unrolled(run.meta, run.backbone, part.x0, part.given, part.attend, part.t,
                                           part_stay.to(run.device), unroll, first_loss, part.u, B)
            loss.backward()
            total += loss.item()
        # 4. Update Mixer, Updater, Injector and time conditioner
        run.update(step, total)


LOOPS = {"mdlm": train_mdlm, "memdlm": train_memdlm, "metastate": train_metastate}


# ----------------------------------------------------------------------------------------------------------------------
# 2. Data.

def niah_pairs(tokenizer, cfg, tasks, length, n, seed, split="train"):
    """n niah samples as (prompt ids, response ids)."""
    samples = niah.make_samples(tasks, length, n, seed, split, niah.token_counter(tokenizer, cfg))
    if cfg.family != "tiny":
        return [encode_pair(tokenizer, cfg, dict(prompt=niah.INTRO + s.prompt, response=s.answer)) for s in samples]
    ids = tokenizer([s.prompt for s in samples] + [s.answer for s in samples], add_special_tokens=False)["input_ids"]
    return [(p, r + [cfg.eos_id]) for p, r in zip(ids[:n], ids[n:])]


def read_jsonl(path, tokenizer, cfg, max_len):
    """A JSONL file -> list of (prompt ids, response ids). Bad lines are errors with file and line number; examples longer than
    max_len are left out and counted (as MemDLM does)."""
    pairs, long = [], 0
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            where = f"{path}, line {number}"
            try:
                example = json.loads(line)
            except ValueError as e:
                raise ValueError(f"{where}: not valid JSON ({e})") from None
            check_example(example, where)
            try:
                prompt, response = encode_pair(tokenizer, cfg, example)
            except ValueError as e:
                raise ValueError(f"{where}: {e}") from None
            if len(prompt) + len(response) > max_len:
                long += 1
            else:
                pairs.append((prompt, response))
    if long:
        print(f"{path}: left out {long} examples longer than --max_len {max_len}")
    if len(pairs) < 2:
        raise ValueError(f"{path}: {len(pairs)} usable examples; at least 2 are needed (one is held out)")
    return pairs


def check_example(example, where):
    if not isinstance(example, dict):
        raise ValueError(f"{where}: expected an object, found {type(example).__name__}")
    if "messages" in example:
        messages = example["messages"]
        if not isinstance(messages, list) or len(messages) < 2 or not all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages):
            raise ValueError(f"{where}: messages must be a list of at least two {{\"role\", \"content\"}} objects")
        if messages[-1]["role"] != "assistant" or any(m["role"] not in ("system", "user", "assistant") for m in messages):
            raise ValueError(f"{where}: roles are system, user and assistant, and the last message is the assistant's")
    elif not isinstance(example.get("prompt"), str) or not isinstance(example.get("response"), str):
        raise ValueError(f"{where}: expected {{\"prompt\": text, \"response\": text}} or {{\"messages\": [...]}}, "
                         f"found the keys {sorted(example)}")
    elif not example["response"].strip() or not example["prompt"].strip():
        raise ValueError(f"{where}: the {'prompt' if example['response'].strip() else 'response'} is empty")


def collate(pairs, cfg, width, generator):
    """Prompts padded on the left, responses filled up with end-of-text, which is maskable and learned, as in LLaDA's SFT."""
    longest, width = max(len(p) for p, _ in pairs), max(width, max(len(r) for _, r in pairs))
    x0 = torch.full((len(pairs), longest + width), cfg.eos_id)
    attend = torch.ones(x0.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(pairs):
        x0[row, longest - len(prompt):longest + len(response)] = torch.tensor(prompt + response)
        x0[row, :longest - len(prompt)], attend[row, :longest - len(prompt)] = cfg.pad_id, False
    given = torch.zeros_like(attend)
    given[:, :longest] = True
    return Batch(x0, given, attend, sample_t(len(pairs), generator=generator), torch.rand(x0.shape, generator=generator))


# ----------------------------------------------------------------------------------------------------------------------
# 3. One run: what every loop above needs.

class Run:
    """Data by step, optimizer, logging, evaluation, checkpoints. Holds no random state: see the file's header."""

    def __init__(self, cfg, mem, meta_cfg, backbone, tokenizer, base, stage):
        self.cfg, self.mem, self.backbone, self.tokenizer, self.base, self.stage = cfg, mem, backbone, tokenizer, base, stage
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.device, self.out = backbone.device, Path(cfg.out)
        self.joined = cfg.batch_size * cfg.accumulate * self.world          # rows per optimizer step
        self.pairs = None
        if cfg.data != "niah":
            self.pairs = read_jsonl(cfg.data, tokenizer, backbone.cfg, min(cfg.max_len, backbone.cfg.max_len))
            held = max(1, min(64, len(self.pairs) // 10))
            self.held, self.pairs = self.pairs[-held:], self.pairs[:-held]
        self.meta = None
        if cfg.method == "metastate":
            torch.manual_seed(cfg.seed)
            self.meta = MetaState(backbone.cfg, meta_cfg).to(self.device)
            backbone.requires_grad_(False)
            self.mark = metastate.fingerprint(backbone)                     # before its layers are split over the ranks
            width = niah.BUDGET if self.pairs is None else min(len(r) for _, r in self.pairs)
            if meta_cfg.unroll > width:
                raise ValueError(f"unroll={meta_cfg.unroll} denoising steps need as many maskable tokens; an answer has {width}")
        self.trained = [p for m in (self.meta, backbone) if m is not None for p in m.parameters() if p.requires_grad]
        shard(backbone, self.trained)
        # norms and gains are not decayed; betas as in LLaDA-style training of small models (arbitrary, not tuned)
        groups = [dict(params=[p for p in self.trained if p.ndim > 1], weight_decay=0.01),
                  dict(params=[p for p in self.trained if p.ndim <= 1], weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98))
        from transformers import get_cosine_schedule_with_warmup
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, max(1, int(cfg.warmup * cfg.steps)), cfg.steps)
        self.first_step, self.seconds = 0, 0.0

    # -- data ----------------------------------------------------------------------------------------------------------

    def batch(self, step):
        """The joined batch of a step on the CPU, the same on every rank, and its number of maskable tokens."""
        cfg, rng = self.cfg, random.Random(f"{self.cfg.seed} {step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        if self.pairs is None:                                              # mixed lengths: without them lookup is not learned
            length = rng.choice([0, cfg.context // 4, cfg.context // 2, cfg.context])
            pairs = niah_pairs(self.tokenizer, self.backbone.cfg, cfg.tasks, length, self.joined, f"{cfg.seed} {step}")
        else:                                                               # epochs: a new order each, no row twice before all once
            numbers = range(step * self.joined, (step + 1) * self.joined)
            pairs = [self.pairs[self.order(n // len(self.pairs))[n % len(self.pairs)]] for n in numbers]
        batch = collate(pairs, self.backbone.cfg, niah.BUDGET if self.pairs is None else 0, generator)
        # from noise, lookup has to emerge before half of the gradient goes to the prompts
        if rng.random() < cfg.full_share and (self.stage != "pretrain" or step > 0.5 * cfg.steps):
            batch = batch._replace(given=~batch.attend)
        return batch, int((~batch.given).sum())

    def order(self, epoch):
        if getattr(self, "_epoch", None) != epoch:
            rng, n = random.Random(f"{self.cfg.seed} epoch {epoch}"), len(self.pairs)
            self._epoch, self._order = epoch, rng.sample(range(n), n)
        return self._order

    def split(self, rows):
        """This rank's micro-batches of a tensor with one entry per row."""
        n = self.cfg.batch_size
        return [rows[i * n:(i + 1) * n] for i in range(self.rank * self.cfg.accumulate, (self.rank + 1) * self.cfg.accumulate)]

    def parts(self, batch):
        return (Batch(*(x.to(self.device) for x in part)) for part in zip(*(self.split(x) for x in batch)))

    def weight(self, t):
        return 1 / t if self.cfg.loss_weight == "1/t" else torch.ones_like(t)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def steps(self):
        self.log = self.out / "log.jsonl"
        self.bar = tqdm(total=self.cfg.steps, initial=self.first_step, desc=self.stage, unit="step", disable=self.rank > 0)
        self.held_out = math.nan
        for step in range(self.first_step, self.cfg.steps):
            began = time.time()
            yield step
            self.seconds += time.time() - began
            self.bar.update()
            done = step + 1
            if self.rank == 0:
                self.bar.set_postfix(loss=f"{self.loss:.3f}", held_out_off=f"{self.held_out:.3f}")
            if done % self.cfg.eval_every == 0 or done == self.cfg.steps:
                self.held_out = self.held_out_loss("off")
            self.write_log(step, done)
            if done % self.cfg.save_every == 0 or done == self.cfg.steps:
                self.save(done)
        self.bar.close()

    def update(self, step, loss):
        """Average over ranks, clip, step. loss: this rank's share of the joined batch's loss."""
        loss = torch.tensor(loss, device=self.device)
        if self.world > 1:
            dist.all_reduce(loss)
            for p in self.trained:                                          # the shares of the joined loss add up
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
        self.loss = loss.item()
        if not math.isfinite(self.loss):
            raise ValueError(f"the loss is {self.loss} at step {step} ({self.cfg.method}, seed {self.cfg.seed}); the last "
                             f"checkpoint in {self.out} is intact. Try a smaller --lr or --inner_lr, or look for broken examples")
        self.grad_norm = nn.utils.clip_grad_norm_(self.trained, 1.0).item()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def write_log(self, step, done):
        if self.rank == 0:
            row = dict(step=step, loss=self.loss, grad_norm=self.grad_norm, lr=self.schedule.get_last_lr()[0],
                       seconds=round(self.seconds, 2))
            if done % self.cfg.eval_every == 0 or done == self.cfg.steps:
                row["held_out_off"] = self.held_out
            with open(self.log, "a") as f:
                f.write(json.dumps(row) + "\n")

    # -- held-out loss -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def held_out_loss(self, arm, n=128):
        """Mean CE per masked token on held-out data, t stratified over (0, 1). arm: off (plain), prompt (phi adapted to the
        prompt), leak (phi adapted to the very tokens that are scored, as in the paper's Fig. 4: an upper bound, no result),
        metastate (slots after one pass over the same canvas)."""
        generator, cfg, total, count = torch.Generator().manual_seed(0), self.backbone.cfg, 0.0, 0
        size = self.cfg.batch_size if cfg.family != "tiny" else 64
        if self.pairs is None:
            pairs = niah_pairs(self.tokenizer, cfg, self.cfg.tasks, self.cfg.context, n, 0, "eval")
        else:
            pairs = self.held
        for i in range(0, len(pairs), size):
            b = collate(pairs[i:i + size], cfg, niah.BUDGET if self.pairs is None else 0, generator)
            b = b._replace(t=(torch.arange(len(b.t)) + 0.5) / len(b.t)).rows(0, size, self.device)
            xt, masked = corrupt(b.x0, b.t, b.given, cfg.mask_id, b.u)
            if not masked.any():
                continue
            if arm == "metastate":
                start, ctx, slots = int(b.given.all(0).long().cumprod(0).sum()), self.backbone.context(xt, b.attend), None
                ratio = masked.sum(1) / (~b.given).sum(1)
                for _ in range(2):
                    logits, slots, _ = self.meta.step(self.backbone, ctx, xt, ratio, slots, masked, start)
            else:
                phi = {}
                if arm == "prompt":
                    phi = memdlm.adapt_to_prompt(self.backbone, xt, b.attend, b.given, self.mem)
                elif arm == "leak":
                    first, ctx = memdlm.first_fast_layer(self.backbone, self.mem), self.backbone.context(xt, b.attend)
                    phi = memdlm.init_phi(self.backbone, len(xt), self.mem)
                    h = self.backbone.run(self.backbone.embed(xt), ctx, 0, first)
                    ratio = (masked.sum(1) / (~b.given).sum(1)).clamp(min=1e-3)
                    for _ in range(2):
                        phi = memdlm.inner_step(self.backbone, phi, h, ctx, b.x0, masked, 1 / ratio, self.mem)
                logits = self.backbone(xt, b.attend, masked, phi)
            total += F.cross_entropy(logits.float(), b.x0[masked], reduction="sum").item()
            count += int(masked.sum())
        return total / max(1, count)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self, done):
        """resume.pt holds everything needed to go on, in one file that is replaced in one move; beside it the checkpoint as
        sample.py and niah.py read it."""
        if self.rank > 0:
            return
        state = dict(step=done, seconds=self.seconds, trained=[p.detach().cpu() for p in self.trained],
                     optimizer=self.optimizer.state_dict(), schedule=self.schedule.state_dict(), settings=self.settings())
        write_atomically(self.out / "resume.pt", lambda path: torch.save(state, path))
        if self.meta is not None:
            metastate.save(self.meta, self.out, self.base, self.mark)
        else:
            if self.cfg.lora:
                save_adapter(self.backbone, self.out, self.base)
            else:
                save_backbone(self.backbone, self.out, self.tokenizer)
            text = json.dumps(dataclasses.asdict(self.mem), indent=1)
            write_atomically(self.out / "memory.json", lambda path: Path(path).write_text(text))

    def settings(self):
        """What must be the same for a resumed run to be the same run."""
        free = ("out", "resume", "overwrite", "device", "n_eval", "save_every", "eval_every", "checkpointing")
        own = {k: v for k, v in dataclasses.asdict(self.cfg).items() if k not in free}
        slots = dataclasses.asdict(self.meta.cfg) if self.meta else {}
        return {**own, **dataclasses.asdict(self.mem), **slots, "world": self.world}

    def resume(self):
        path = self.out / "resume.pt"
        if not path.exists():                                               # killed before the first checkpoint
            return
        state = read_state(path)
        saved = state["settings"]
        changed = [f"{k} was {saved.get(k)!r}, is {v!r}" for k, v in self.settings().items() if saved.get(k) != v]
        if changed:
            raise ValueError(f"{path} belongs to another run: {'; '.join(changed)}")
        with torch.no_grad():
            for p, value in zip(self.trained, state["trained"]):
                p.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.first_step, self.seconds = state["step"], state["seconds"]
        if self.rank == 0 and (self.out / "log.jsonl").exists():            # rows after the checkpoint will be written again
            rows = (self.out / "log.jsonl").read_text().splitlines()
            keep = [row for row in rows if row.endswith("}") and json.loads(row)["step"] < self.first_step]
            write_atomically(self.out / "log.jsonl", lambda p: Path(p).write_text("".join(row + "\n" for row in keep)))
        print(f"resumed {self.out} at step {self.first_step}")


def read_state(path):
    """The contents of a resume.pt; ValueError if anything in it is not as it was written."""
    try:
        if zipfile.ZipFile(path).testzip():                                 # torch.load does not look at the checksums
            raise ValueError
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {key: state[key] for key in ("step", "seconds", "trained", "optimizer", "schedule", "settings")}
    except Exception as e:
        raise ValueError(f"{path} cannot be read ({type(e).__name__}): truncated or corrupted. --overwrite starts that run "
                         f"anew, and so does deleting its folder") from None


def shard(backbone, trained):
    """More than one process: frozen layers are split over the ranks (FSDP2, one unit a layer); trained weights stay whole on
    every rank, and update() adds up their gradients."""
    if dist.is_initialized() and not all(p.requires_grad for p in backbone.parameters()):
        from torch.distributed.fsdp import fully_shard
        for layer in backbone.layers:
            fully_shard(layer, ignored_params={p for p in layer.parameters() if p.requires_grad})


# ----------------------------------------------------------------------------------------------------------------------
# 4. Memory, before it is needed.

def estimate(cfg, method, batch, length, lora, scored=1.0, mem=None, meta_cfg=None, weight_bytes=2, checkpointing=True):
    """Bytes on the device while training, by kind; cfg: a BackboneConfig. Weights of `weight_bytes`, all that is trained in
    fp32 with gradient and two Adam moments. scored: share of the positions at which logits are computed. An estimate by
    counting tensors, good to about 20 %; fragmentation and the framework's own memory (about 1 GB) come on top."""
    mem, D, L = mem or MemDLMConfig(), cfg.d_model, cfg.n_layers
    with torch.device("meta"):
        model = Backbone(cfg)
        weights = sum(p.numel() for p in model.parameters())
        if method == "metastate":
            trained = sum(p.numel() for p in MetaState(cfg, meta_cfg).parameters())
        elif lora:
            model.add_lora(lora, 2 * lora)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        else:
            trained = weights
        fast = memdlm.init_phi(model, 1, mem) if method == "memdlm" else {}
        phi = sum(w.A[0].numel() + w.B[0].numel() for w in fast.values())
    tokens, passes = batch * length, meta_cfg.unroll if method == "metastate" else 1
    ffn = cfg.d_ff * max(1, cfg.experts_per_token)
    layer = tokens * (10 * D + 3 * cfg.n_heads * cfg.head_dim + 4 * ffn) * weight_bytes     # kept for one layer's backward
    start = meta_cfg.inject_layers[0] if method == "metastate" else 0
    kept = tokens * D * weight_bytes * (L - start) + layer if checkpointing else layer * (L - start)
    return {"weights": weights * weight_bytes if lora or method == "metastate" else 0,
            "trained, gradient, Adam": 16 * trained,
            "fast weights": 4 * 4 * phi * batch,                            # phi, its gradient, the new phi, a temporary
            "activations": kept * passes,
            # as computed, in fp32, and their gradient
            "logits": int(tokens * scored) * cfg.vocab_size * (weight_bytes + 8) * passes}


def show_estimate(parts):
    unit, size = ("GB", 1e9) if sum(parts.values()) > 1e9 else ("MB", 1e6)
    return ", ".join(f"{k} {v / size:.1f}" for k, v in parts.items() if v) + f"; together {sum(parts.values()) / size:.1f} {unit}"


def device_memory(device):
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


# ----------------------------------------------------------------------------------------------------------------------
# 5. Command line.

def add_options(parser, cls, defaults=True):
    """One flag for each field of a configuration. defaults: False = only what is given is set."""
    for f in dataclasses.fields(cls):
        default = f.default if defaults else None
        text = f.metadata["help"].replace("%", "%%")
        if f.type is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(f"--{f.name}", action=action, default=default, help=text)
            continue
        if default is not None:
            text += f" (default {default})"
        kind = {list: str, tuple: int}.get(f.type, f.type)
        more = {k: f.metadata[k] for k in ("choices", "nargs") if k in f.metadata}
        parser.add_argument(f"--{f.name}", type=kind, default=default, help=text, **more)


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description="Train a masked-diffusion LM, plain or with a memory. `--method memdlm` alone runs on a laptop in minutes: "
                    "it pretrains a tiny backbone once, fine-tunes it, and prints what the memory does.")
    add_options(parser, TrainConfig)
    group = parser.add_argument_group("MemDLM (memdlm.py)")
    add_options(group, MemDLMConfig)
    group = parser.add_argument_group("MetaState (metastate.py); defaults depend on the backbone")
    add_options(group, MetaStateConfig, defaults=False)
    parser.add_argument("--estimate", action="store_true",
                        help="print the memory that training would need, and stop (reads config.json only)")
    args = parser.parse_args(argv)
    take = lambda cls: cls(**{f.name: getattr(args, f.name) for f in dataclasses.fields(cls)})
    meta = {f.name: getattr(args, f.name) for f in dataclasses.fields(MetaStateConfig) if getattr(args, f.name) is not None}
    return take(TrainConfig), take(MemDLMConfig), meta, args


def resolve(cfg, mem, family):
    """Fill in what depends on the method; refuse what cannot work. ValueError says what to change."""
    stage = "metastate" if cfg.method == "metastate" else "lora" if (family != "tiny" if cfg.lora is None else cfg.lora) \
        else "finetune" if cfg.init or cfg.backbone != "tiny" else "pretrain"
    for name, value in zip(("steps", "batch_size", "lr", "full_share"), DEFAULTS[stage]):
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    if cfg.lora is None:
        cfg.lora = 32 if stage == "lora" else 0
    if cfg.checkpointing is None:
        cfg.checkpointing = family != "tiny"
    if cfg.eval_every is None:
        cfg.eval_every = max(1, cfg.steps // 10)
    # metastate: half of the rows need memory (resolve), the other half keeps what the frozen model can do
    others = [task for task in niah.TASKS if task != "resolve"]
    cfg.tasks = cfg.tasks or (["resolve"] * len(others) + others if cfg.method == "metastate" else list(niah.TASKS))
    cfg.out = cfg.out or f"runs/{cfg.method}"
    for name in ("steps", "batch_size", "accumulate", "eval_every", "save_every", "max_len"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(cfg, name)}")
    for name, value in (("lr", cfg.lr), ("inner_lr", mem.inner_lr), ("rank", mem.rank), ("clip", mem.clip)):
        if not (value > 0 or (name != "rank" and value == 0)) or not math.isfinite(value):
            raise ValueError(f"--{name} must be a positive number, not {value}")
    for name, value in (("full_share", cfg.full_share), ("warmup", cfg.warmup), ("prompt_ratio", mem.prompt_ratio),
                        ("fraction", mem.fraction)):
        if not 0 <= value <= 1:
            raise ValueError(f"--{name} must lie between 0 and 1, not {value}")
    if mem.inner_on not in ("response", "prompt"):
        raise ValueError(f"--inner_on must be response or prompt, not {mem.inner_on!r}")
    if cfg.data != "niah" and not Path(cfg.data).is_file():
        raise ValueError(f"--data {cfg.data}: no such file (niah, or a JSONL file)")
    return stage


def pretrained(cfg):
    """The tiny backbone that memdlm and metastate start from, trained once with plain MDLM and then reused."""
    out = Path("runs") / f"pretrained-seed{cfg.seed}"
    first = TrainConfig(method="mdlm", seed=cfg.seed, out=str(out), n_eval=0, device=cfg.device, resume=True)
    wanted = DEFAULTS["pretrain"][0]
    if (out / "resume.pt").exists() and read_state(out / "resume.pt")["step"] == wanted:
        print(f"starting from {out} (pretrained earlier with plain MDLM; delete the folder to do it again)")
    else:
        print(f"no --init: first pretraining the tiny backbone with plain MDLM, {wanted} steps, into {out}; "
              f"later runs reuse it")
        train(first, MemDLMConfig(), {})
    return str(out)


def prepare_out(cfg):
    out = Path(cfg.out)
    if out.exists() and any(out.iterdir()):
        if cfg.overwrite:
            if not ((out / "log.jsonl").exists() or (out / "resume.pt").exists()):
                raise ValueError(f"--overwrite: {out} does not look like a run of train.py (no log.jsonl); delete it by hand")
            shutil.rmtree(out)
        elif not cfg.resume:
            raise ValueError(f"{out} exists already: --resume goes on, --overwrite deletes it, --out names another folder")
    out.mkdir(parents=True, exist_ok=True)


def train(cfg, mem, meta_options):
    """One run from start to end; returns the Run."""
    source = cfg.init or cfg.backbone
    if source != "tiny":                                                    # read configurations before any long work
        find_folder(source)
    tokenizer = load_tokenizer(source)
    if source == "tiny" and cfg.method != "mdlm":
        resolve(dataclasses.replace(cfg, init="pretrained"), mem, "tiny")
        metastate_config(BackboneConfig(), meta_options)
        if not cfg.resume and not cfg.overwrite and Path(cfg.out or f"runs/{cfg.method}").exists():
            prepare_out(dataclasses.replace(cfg, out=cfg.out or f"runs/{cfg.method}"))
        source = cfg.init = pretrained(cfg)
    torch.manual_seed(cfg.seed)
    device = default_device(cfg.device)
    backbone = load_backbone(source, device, cfg.dtype and getattr(torch, cfg.dtype))
    stage = resolve(cfg, mem, backbone.cfg.family)
    meta_cfg = metastate_config(backbone.cfg, meta_options)
    backbone.checkpointing = cfg.checkpointing
    if cfg.lora and not any("lora" in n for n, _ in backbone.named_parameters()):
        backbone.add_lora(cfg.lora, 2 * cfg.lora, cfg.seed)
    for name, p in backbone.named_parameters():
        p.requires_grad_(cfg.method != "metastate" and (not cfg.lora or "lora" in name))
    length = cfg.context + niah.BUDGET if cfg.data == "niah" else cfg.max_len
    parts = estimate(backbone.cfg, cfg.method, cfg.batch_size, length, cfg.lora, 1.0, mem, meta_cfg,
                     backbone.embed_tokens.weight.element_size(), cfg.checkpointing)
    if sum(parts.values()) > device_memory(device):
        raise ValueError(f"this needs more memory than {device} has ({device_memory(device) / 1e9:.1f} GB): "
                         f"{show_estimate(parts)}. "
                         f"Try a smaller --batch_size (with --accumulate), a shorter --max_len, --lora, --checkpointing")
    run = Run(cfg, mem, meta_cfg, backbone, tokenizer, base_name(source), stage)
    if run.rank == 0:
        prepare_out(cfg)
        trained = sum(p.numel() for p in run.trained)
        frozen = sum(p.numel() for p in backbone.parameters() if not p.requires_grad)
        print(f"{cfg.method} from {source} into {cfg.out}: {cfg.steps} steps of {run.joined} rows, lr {cfg.lr}, seed {cfg.seed}, "
              f"torch {torch.__version__} on {device}\n{trained:,} trained parameters"
              + (f", {frozen:,} frozen ({100 * trained / frozen:.2f} %)" if frozen else ""))
        if stage == "pretrain":
            print(f"first loss about ln V = {math.log(backbone.cfg.vocab_size):.2f} x the share of masked tokens")
        print(f"memory estimate: {show_estimate(parts)}")
    if run.world > 1:
        dist.barrier()
    if cfg.resume:
        run.resume()
    LOOPS[cfg.method](run)
    return run


def metastate_config(backbone_cfg, options):
    meta_cfg = dataclasses.replace(metastate.for_backbone(backbone_cfg), **options)
    meta_cfg.inject_layers = tuple(meta_cfg.inject_layers)
    meta_cfg.check(backbone_cfg.n_layers)
    return meta_cfg


def base_name(source):
    """An adapter folder's base, so that an adapter trained further still names the official checkpoint."""
    config = Path(source) / "adapter_config.json"
    return read_json(config)["base_model_name_or_path"] if config.exists() else source


def report(run):
    """The table at the end: held-out loss and NIAH accuracy, memory off first; and how to go on."""
    cfg = run.cfg
    arms = {"off": no_memory, "on": memdlm.prompt_memory(run.mem)}
    if run.meta is not None:
        arms = {"frozen": no_memory, metastate.ARMS[run.meta.cfg.memory]: run.meta.memory()}
        print(f"\nheld-out loss: frozen {run.held_out_loss('off'):.3f}, "
              f"second pass over the same canvas {run.held_out_loss('metastate'):.3f}")
    else:
        print(f"\nheld-out loss: memory off {run.held_out_loss('off'):.3f}, adapted to the prompt {run.held_out_loss('prompt'):.3f}"
              f"   (leaky, fitted to the scored tokens: {run.held_out_loss('leak'):.3f}; an upper bound, no result)")
    if cfg.n_eval:
        tasks = list(dict.fromkeys(cfg.tasks))
        if run.meta is not None:
            print("\npasses over an unchanged, fully masked answer, then one commit")
            file = run.out / "passes.jsonl"
            rows = niah.recompute(run.backbone, run.tokenizer, arms, tasks, cfg.context, cfg.n_eval, 1, 8, file)
            print(f"{niah.table(rows, by='steps')}\n\ndecoding")
        rows = niah.evaluate(run.backbone, run.tokenizer, arms, tasks, [cfg.context], cfg.n_eval, 1, run.out / "niah.jsonl")
        print(f"{niah.table(rows)}\nn = {cfg.n_eval} a cell, 95 % intervals over samples")
    question = "table = 34 . pepper = table . the sky is blue . candle = pepper . ? candle is" if run.meta is not None else \
        "the sky is blue . river = 47 . stone = 12 . ? river ="
    print(f"{cfg.steps} steps in {run.seconds / 60:.1f} min, peak memory {peak_memory() / 1e9:.2f} GB\n\ngo on with\n"
          f"  python niah.py --checkpoint {cfg.out} --lengths 64 128 256\n"
          f"  python sample.py --checkpoint {cfg.out} --watch --prompt \"{question}\"")


def main():
    cfg, mem, meta_options, args = parse()
    if args.estimate:
        return print_estimate(cfg, mem, meta_options)
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        cuda = torch.cuda.is_available() and cfg.device != "cpu"
        dist.init_process_group("nccl" if cuda else "gloo")
        cfg.device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else cfg.device
    run = train(cfg, mem, meta_options)
    if run.world == 1:
        report(run)
    else:
        dist.barrier()
        dist.destroy_process_group()


def print_estimate(cfg, mem, meta_options):
    source = cfg.init or cfg.backbone
    folder = find_folder(source) if source != "tiny" else None
    backbone_cfg = config_from_json(read_json(folder / "config.json"), folder / "config.json") if folder else BackboneConfig()
    resolve(cfg, mem, backbone_cfg.family)
    parts = estimate(backbone_cfg, cfg.method, cfg.batch_size, cfg.max_len, cfg.lora, 1.0, mem,
                     metastate_config(backbone_cfg, meta_options), checkpointing=cfg.checkpointing)
    print(f"{cfg.method} on {source}, batch {cfg.batch_size} x {cfg.max_len} tokens:\n{show_estimate(parts)}")


if __name__ == "__main__":
    cli(main)
