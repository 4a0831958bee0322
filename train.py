"""Training: one loop per method; data, checkpoints and evaluation around them.

Papers: LLaDA (the plain loss), MemDLM (2603.22241, bilevel), MetaState (2603.01331, unrolled)
Idea: the three methods differ in the few lines of their loop: train_mdlm, train_memdlm,
train_metastate. Read those first; the rest is plumbing:
  main -> Run, by plan: flags and config.json -> settings
       -> Run.load: backbone (tiny: first pretrained, if need be), data, memory, optimizer
       -> train: the loop of the method. A step: Run.steps (log, checkpoint) -> Run.batch
          (chosen -> collate) -> Run.micro_batches -> a loss -> Run.sum_over_ranks -> AdamW
       -> report: held-out loss and recall, memory off and on
Shapes: B rows of the whole batch (all micro-batches, all ranks), L tokens
Holds: every random number of a step comes from (seed, step), never from a running state. So a
resumed run is bit for bit the run that was not killed, and any split of a batch over micro-batches
or ranks gives the same loss (but for the dropout of a LoRA, which is drawn by each rank).
Left out: mixed precision beyond bf16 weights with fp32 adapters, 4-bit weights.
Run: python train.py --method memdlm      (tiny, CPU: the closed book, from noise)
     python train.py --method memdlm --backbone GSAI-ML/LLaDA-8B-Base --data train.jsonl
     torchrun --nproc_per_node=8 train.py --method mdlm --backbone ...
"""
import argparse
import contextlib
import dataclasses
import json
import math
import random
import re
import time
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import memdlm
import metastate
import niah
from backbone import (Backbone, BackboneConfig, adapter_base, adapter_config, add_flags,
                      are_messages, cli, config_from_json, corrupt, default_device, encode,
                      encode_pair, find_folder, given_flags, load_backbone, load_tokenizer,
                      masked_loss, option, read_json, read_lines, sample_t, save_adapter,
                      save_backbone, write_atomically, write_json)
from memdlm import ClosedBook
from metastate import MetaStateConfig
from sample import (device_memory, estimate, join_ranks, left_pad, no_memory, peak_memory, ranks,
                    show_estimate)


@dataclass
class TrainConfig:
    """The command line is built from these fields. None: by the rest of the command, see plan."""
    method: str = option("memdlm", "which loop trains", choices=["mdlm", "memdlm", "metastate"])
    backbone: str = option("tiny", "tiny, a hub name such as GSAI-ML/LLaDA-8B-Base, or a folder")
    init: str = option(None, "checkpoint to start from (tiny: pretrained once where it is needed)")
    data: str = option("niah", "niah (made on the fly) or a JSONL file of {\"prompt\", "
                       "\"response\"} or {\"messages\"}; for the closed book with a \"context\"")
    tasks: list = option(None, "niah tasks (default: the first eight; metastate: half resolve)",
                         choices=list(niah.ALL_TASKS))
    out: str = option(None, "output folder (default: runs/METHOD)")
    steps: int = option(None, "optimizer steps", low=1)
    epochs: int = option(None, "JSONL: passes over the data, if --steps is not given", low=1)
    batch_size: int = option(None, "rows per forward pass and process", low=1)
    accumulate: int = option(1, "forward passes per step, with the loss of all their rows", low=1)
    lr: float = option(None, "peak learning rate (AdamW, warm-up, cosine to zero)", low=0)
    warmup: float = option(None, "share of the steps with rising learning rate", low=0, high=1)
    beta2: float = option(None, "AdamW's second beta", low=0, high=0.999999)
    weight_decay: float = option(None, "AdamW's, for matrices", low=0)
    loss_weight: str = option(None, "1/t: the likelihood bound", choices=["uniform", "1/t"])
    plain_share: float = option(0.25, "closed book: share of plain MDLM batches, on --tasks", 0, 1)
    full_share: float = option(None, "share of batches with the prompt masked too", low=0, high=1)
    length: int = option(64, "niah: longest training text, in tokens (closed book: a quarter)", 0)
    chat: bool = option(None, "prompts go through the chat template (default: as data, backbone)")
    max_len: int = option(4096, "JSONL: longer examples are left out, and counted", low=2)
    lora: int = option(None, "rank of the LoRA, alpha = 2 r; 0 = all weights are trained", low=0)
    lora_dropout: float = option(None, "dropout before the LoRA", low=0, high=0.99)
    seed: int = option(0, "fixes data, noise and initialisation", low=0, high=2 ** 31)
    eval_every: int = option(None, "steps between held-out losses (default: a tenth)", low=1)
    save_every: int = option(200, "steps between checkpoints", low=1)
    n_eval: int = option(100, "niah samples per task in the table at the end; 0 = no table", low=0)
    checkpointing: bool = option(None, "recompute activations (default: on for real backbones)")
    device: str = option(None, "default: cuda, mps or cpu, whichever is there")
    dtype: str = option(None, "default: the checkpoint's own", choices=["float32", "bfloat16"])
    resume: bool = option(False, "go on from the last checkpoint in --out")

    @property
    def source(self):
        """What training starts from."""
        return self.init or self.backbone


# What None stands for, by what is trained. Rates and steps are ours, but for "published", MemDLM's
# recipe (mdlm and memdlm on real backbones): section 4.1, and the authors' scripts for what it
# leaves open (betas, decay, dropout, weight of the loss).
TINY = dict(warmup=0.03, beta2=0.98, weight_decay=0.01, loss_weight="uniform", lora=0,
            lora_dropout=0.0, tasks=list(niah.TASKS))
# half of MetaState's rows need memory (resolve), the other half keeps what the model can do
OTHERS = [task for task in niah.TASKS if task != "resolve"]
DEFAULTS = {
    "pretrain": dict(steps=8000, batch_size=48, lr=3e-3, full_share=0.3, **TINY),
    "finetune": dict(steps=400, batch_size=32, lr=2e-5, full_share=0.5, **TINY),
    "closed_book": dict(steps=1600, batch_size=128, lr=3e-3, full_share=0.3, **TINY),
    "metastate": {**TINY, **dict(steps=2000, batch_size=32, lr=2e-3, full_share=0.0,
                                 tasks=["resolve"] * len(OTHERS) + OTHERS)},
    "published": dict(steps=1000, epochs=5, batch_size=2, lr=2e-5, full_share=0.0, warmup=0.1,
                      beta2=0.999, weight_decay=0.0, loss_weight="1/t", lora=32,
                      lora_dropout=0.05, tasks=list(niah.TASKS))}


class Batch(NamedTuple):
    """Rows of data with their noise: prompts, padded on the left, then answers."""
    x0: torch.Tensor            # (B, L) clean tokens
    given: torch.Tensor         # (B, L) bool, prompt or padding: never masked, no loss
    attend: torch.Tensor        # (B, L) bool, False = padding, or hidden (the closed book)
    t: torch.Tensor             # (B,)
    u: torch.Tensor             # (B, L) uniform numbers: token i is masked where u < t
    text: torch.Tensor          # (B, L) bool, what MemDLM's inner loop writes, unless a response


# 1. The three methods -----------------------------------------------------------------------------

def train_mdlm(run):
    """Masked diffusion: one random state per row."""
    backbone = run.backbone
    for step in run.steps():
        # 1. A batch of clean tokens, t and u for each row
        batch, n_maskable = run.batch(step)
        loss_sum = 0.0
        run.optimizer.zero_grad()
        for rows in run.micro_batches(batch):
            # 2. Forward process
            xt, masked = corrupt(rows.x0, rows.t, rows.given, backbone.cfg.mask_id, rows.u)
            # 3. One pass; logits at the masked positions only
            logits = backbone(xt, rows.attend, masked)
            # 4. Loss
            loss = masked_loss(logits, rows.x0, masked, run.weight(rows.t), n_maskable)
            loss.backward()
            loss_sum += loss.item()
        # 5. Update theta
        run.loss = run.sum_over_ranks(loss_sum)
        run.grad_norm = clip_grad_norm_(run.trained, 1.0)
        run.optimizer.step()
        run.schedule.step()


def train_memdlm(run):
    """Bilevel: the inner loop writes into phi, the outer loss trains theta given phi."""
    for step in run.steps():
        # 1. A batch of clean tokens, t and u for each row
        batch, n_maskable = run.batch(step)
        loss_sum = 0.0
        run.optimizer.zero_grad()
        for rows in run.micro_batches(batch):
            options = dict(weight=run.weight(rows.t), n_maskable=n_maskable, inner=run.inner,
                           seed=run.step_seed(step), exact=step >= run.exact_step)
            if run.inner.inner_on == "response":
                # 2. As published (Eq. 5-10): the inner loop writes the response into phi
                loss = memdlm.loss_memdlm(run.backbone, rows.x0, rows.given, rows.attend,
                                          rows.t, rows.u, **options)
            else:
                # 2. Ours: it writes a text
                loss = memdlm.loss_closed_book(run.backbone, rows.x0, rows.text, rows.given,
                                               rows.attend, rows.t, rows.u, **options)
            loss.backward()
            loss_sum += loss.item()
        # 3. Update theta; phi is thrown away
        run.loss = run.sum_over_ranks(loss_sum)
        run.grad_norm = clip_grad_norm_(run.trained, 1.0)
        run.optimizer.step()
        run.schedule.step()


def train_metastate(run):
    """K-step unrolling: K denoising steps in one graph, slots carried along, backbone frozen."""
    for step in run.steps():
        # 1. A batch, and how many tokens each of its rows reveals at each of the K steps
        batch, _ = run.batch(step)
        reveals = metastate.draw_reveals((~batch.given).sum(1), run.meta.settings,
                                         step / run.cfg.steps, run.step_seed(step))
        loss_sum = 0.0
        run.optimizer.zero_grad()
        for rows, counts in zip(run.micro_batches(batch), run.split(reveals)):
            # 2. The unrolled loss: metastate.loss_unrolled
            loss = metastate.loss_unrolled(run.meta, run.backbone, rows.x0, rows.given, rows.attend,
                                           rows.u, counts.to(run.device), len(batch.x0))
            loss.backward()
            loss_sum += loss.item()
        # 3. Update Mixer, Updater, Injector and time conditioner
        run.loss = run.sum_over_ranks(loss_sum)
        run.grad_norm = clip_grad_norm_(run.trained, 1.0)
        run.optimizer.step()
        run.schedule.step()


LOOPS = {"mdlm": train_mdlm, "memdlm": train_memdlm, "metastate": train_metastate}
# What the first line and the last table of a run say.
LOSSES = {"mdlm": "plain MDLM, without a memory", "metastate": "MetaState's loss, K steps unrolled",
          "response": "MemDLM's loss: the inner loop sees the labels that the outer loss scores",
          "prompt": "a variant of MemDLM's loss (ours): the inner loop reads the prompt alone",
          "closed_book": "the closed book (ours): a text is written into phi and hidden. MemDLM's "
                         "own loss: --inner_on response"}
ARMS = {"off": "no memory", "on": "phi, adapted to the prompt by the inner loop",
        "frozen": "the backbone alone", "metastate": "slots carried from step to step",
        "wiped": "control: the same weights, slots put back at every step"}


# 2. Data ------------------------------------------------------------------------------------------

class Example(NamedTuple):
    """Ids of one example. Only the closed book has a text, to be written into phi and hidden."""
    text: list
    prompt: list
    response: list


def niah_examples(tokenizer, model_cfg, samples, closed=False):
    """niah samples -> Examples."""
    if model_cfg.family != "tiny":
        return [encode_example(dict(context=niah.INTRO + s.text, prompt=s.question,
                                    response=s.answer), tokenizer, model_cfg, closed)
                for s in samples]
    # word by word: for the hundreds of texts of a step encode_example would be too slow
    number, examples = tokenizer.get_vocab(), []
    for s in samples:
        prompt, answer = ([number[word] for word in text.split()] for text in (s.prompt, s.answer))
        hidden = len(s.text.split()) if closed else 0
        examples.append(Example(prompt[:hidden], prompt[hidden:], [*answer, model_cfg.eos_id]))
    return examples


def read_jsonl(path, tokenizer, model_cfg, max_len, closed=False):
    """A JSONL file -> Examples; those longer than max_len tokens are left out and counted."""
    def read(raw, size):
        if isinstance(raw, dict):
            raw = {key: value for key, value in raw.items() if value is not None}
        if not is_example(raw):
            raise ValueError("expected {\"prompt\": text, \"response\": text}, or {\"messages\": "
                             "[at least two {\"role\", \"content\"}]}; the last message is the "
                             f"assistant's; nothing that would be dropped: {', '.join(DROPPED)}")
        # a tokenizer takes minutes over 100 MB, and no token has 100 bytes on average
        if size <= 100 * max_len:
            example = encode_example(raw, tokenizer, model_cfg, closed)
            return example if sum(map(len, example)) <= max_len else None
    examples = read_lines(path, read)
    fit = [example for example in examples if example]
    if len(fit) < len(examples):
        print(f"{path}: left out {len(examples) - len(fit)} examples longer than {max_len} tokens")
    if len(fit) < 2:
        raise ValueError(f"{path}: {len(fit)} usable examples; 2 are needed, one is held out")
    return fit


# entries of other formats, which would be lost here
DROPPED = ("tool_calls", "function_call", "tools", "reasoning_content", "weight", "train")


def is_example(raw):
    """Is the JSON of a line {"prompt", "response"} or {"messages"}, all of it text?"""
    if not isinstance(raw, dict) or not isinstance(raw.get("context", ""), str):
        return False
    pair = [{"role": "user", "content": raw.get("prompt")},
            {"role": "assistant", "content": raw.get("response")}]
    turns = raw.get("messages", pair)
    return (are_messages(turns) and len(turns) > 1 and turns[-1]["role"] == "assistant"
            and all(turn.get(k, raw.get(k)) in (None, 1, "", []) for k in DROPPED
                    for turn in turns))


def encode_example(raw, tokenizer, model_cfg, closed):
    """What is_example accepts, perhaps with a "context" -> Example."""
    context = raw.get("context")
    if closed and not context:
        raise ValueError("the closed book needs a \"context\", the text to write and to hide")
    if context and not closed:
        if "messages" in raw:
            raise ValueError("messages with a \"context\" are for the closed book only")
        raw = dict(raw, prompt=f"{context} {raw['prompt']}")
    hidden = encode(tokenizer, context, model_cfg) if closed else []
    return Example(hidden, *encode_pair(tokenizer, model_cfg, raw))


def collate(examples, model_cfg, width, generator):
    """Texts and prompts padded on the left, responses filled up to `width` or more tokens with
    end-of-text, which is masked and learned, as in LLaDA's SFT."""
    prompts, attend = left_pad([e.text + e.prompt for e in examples], model_cfg.pad_id, "cpu")
    width = max(width, *(len(e.response) for e in examples))
    responses = torch.tensor([e.response + [model_cfg.eos_id] * (width - len(e.response))
                              for e in examples])
    x0 = torch.cat([prompts, responses], dim=1)                         # (B, L)
    given = (torch.arange(x0.shape[1]) < prompts.shape[1]).repeat(len(examples), 1)
    attend = torch.cat([attend, torch.ones_like(responses, dtype=torch.bool)], dim=1)
    number = attend.long().cumsum(1)                                    # of a real token, from 1
    text = attend & (number <= torch.tensor([len(e.text) for e in examples])[:, None])
    t = sample_t(len(examples), generator=generator)
    u = torch.rand(x0.shape, generator=generator)
    return Batch(x0, given, attend, t, u, text)


def hidden_text(batch, generator):
    """The closed book: the outer pass cannot see the text. Most rows have t = 1, as in decoding."""
    whole = torch.rand(len(batch.t), generator=generator) < 0.75
    return batch._replace(t=batch.t.masked_fill(whole, 1.0), attend=batch.attend & ~batch.text)


def whole_sequence(batch):
    """The prompt is masked and learned, too, as in pretraining; nothing is written."""
    return batch._replace(given=~batch.attend, text=torch.zeros_like(batch.text))


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    """The order of n examples in an epoch, a new one each."""
    return random.Random(f"{seed} epoch {epoch}").sample(range(n), n)


# 3. One run: what every loop above needs ----------------------------------------------------------

class Run:
    """Settings, data by step, optimizer, log, evaluation, checkpoints. It holds no random state."""

    def __init__(self, cfg, inner_options, meta_options):
        """From flags alone: prints the memory that the run needs."""
        self.rank, self.world = ranks()
        self.cfg = cfg
        self.plan = plan(cfg, inner_options, meta_options, self.world)
        self.inner, self.closed = self.plan.inner, self.plan.closed
        self.out = Path(cfg.out)
        if self.rank == 0:
            loss = self.inner.inner_on if cfg.method == "memdlm" else cfg.method
            print(f"trains {LOSSES[loss]}")
            print(f"memory for {cfg.method} on {cfg.source}, {cfg.batch_size} rows of "
                  f"{self.plan.length} tokens: {show_estimate(self.plan.sizes)}")

    def load(self):
        """Backbone and data, and what is trained. ValueError or OSError for what cannot work."""
        cfg = self.cfg
        self.device = default_device(cfg.device)
        needed, there = sum(self.plan.sizes.values()), device_memory(self.device)
        if needed > there:
            raise ValueError(f"this needs {needed / 1e9:.1f} GB, more memory than {self.device} has"
                             f" ({there / 1e9:.1f} GB): smaller --batch_size or --max_len, --lora?")
        dtype = cfg.dtype and getattr(torch, cfg.dtype)
        source = "tiny" if self.plan.to_pretrain else cfg.source
        self.tokenizer = niah.tiny_tokenizer() if source == "tiny" else load_tokenizer(source)
        torch.manual_seed(cfg.seed)
        if source == "tiny":
            self.backbone = Backbone(BackboneConfig(conv_residual=self.closed)).init_weights()
            self.backbone.to(self.device, dtype)
        else:
            self.backbone = load_backbone(source, self.device, dtype, cfg.chat)
        if self.backbone.dtype != torch.float32 and not cfg.lora and cfg.method != "metastate":
            raise ValueError(f"--lora 0 trains weights in {self.backbone.dtype}, too coarse for "
                             f"most steps to change one: add --dtype float32")
        self.examples = self.held_examples = None
        if cfg.data != "niah":
            max_len = min(cfg.max_len, self.backbone.cfg.max_len)
            rows = read_jsonl(cfg.data, self.tokenizer, self.backbone.cfg, max_len, self.closed)
            held = max(1, min(64, len(rows) // 10))
            self.examples, self.held_examples = rows[:-held], rows[-held:]
        if cfg.steps is None:
            cfg.steps = math.ceil(cfg.epochs * len(self.examples) / self.plan.rows)
        cfg.eval_every = cfg.eval_every or max(1, cfg.steps // 10)
        if self.plan.to_pretrain:
            pretrain(cfg)
            self.backbone = load_backbone(cfg.init, self.device, dtype)
        if self.closed and not cfg.lora:
            self.show_keys_to_ffn()
        self.backbone.checkpointing = cfg.checkpointing
        self.width = niah.BUDGET if self.examples is None else 0        # of an answer, at least
        self.exact_step = self.inner.exact_from * cfg.steps
        self.first_step, self.seconds = 0, 0.0
        self.fingerprint = metastate.fingerprint(self.backbone)         # before layers are split
        self.content = zlib.crc32(json.dumps(self.examples).encode())
        self.add_memory()
        self.make_optimizer()

    def show_keys_to_ffn(self):
        """A tiny backbone whose FFN cannot see a token's neighbours gets convolutions there."""
        config = self.backbone.cfg
        if config.family == "tiny" and not (config.conv_residual or config.ffn_convs):
            fast = config.n_layers - memdlm.first_fast_layer(self.backbone, self.inner)
            self.backbone.add_ffn_convs(fast, torch.Generator().manual_seed(self.cfg.seed))

    def add_memory(self):
        """The arms, plain first; the loss of the watched one is logged."""
        cfg = self.cfg
        self.meta, self.watched, self.passes = None, "off", 1
        self.arms = {"off": no_memory, "on": memdlm.memory_of(self.inner)}
        if cfg.method == "metastate":
            torch.manual_seed(cfg.seed)
            self.meta = metastate.build(self.backbone.cfg, self.plan.meta).to(self.device)
            # the second pass over a canvas is the first that can use the slots
            self.watched, self.passes = metastate.ARMS[self.plan.meta.memory], 2
            self.arms = {"frozen": no_memory, self.watched: self.meta.memory()}

    def make_optimizer(self):
        """Choose what is trained: all weights, a LoRA (new or the adapter's), or MetaState."""
        cfg = self.cfg
        if cfg.lora and self.plan.base is None:
            self.backbone.add_lora(cfg.lora, 2 * cfg.lora, cfg.seed)
        for module in self.backbone.modules():
            if getattr(module, "lora_rank", 0):
                module.lora_dropout = cfg.lora_dropout
        for name, p in self.backbone.named_parameters():
            p.requires_grad_(self.meta is None and (not cfg.lora or "lora" in name))
        module = self.backbone if self.meta is None else self.meta
        self.trained = [p for p in module.parameters() if p.requires_grad]
        shard(self.backbone)
        # norms and gains are not decayed
        groups = [dict(params=[p for p in self.trained if p.ndim > 1]),
                  dict(params=[p for p in self.trained if p.ndim <= 1], weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2),
                                           weight_decay=cfg.weight_decay)
        from transformers import get_cosine_schedule_with_warmup
        rising = max(1, int(cfg.warmup * cfg.steps))
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, rising, cfg.steps)

    # -- data ------------------------------------------------------------------------------------

    def batch(self, step):
        """The whole batch of a step, on the CPU, and its number of maskable tokens."""
        cfg = self.cfg
        rng = random.Random(f"{cfg.seed} {step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        closed = self.closed and rng.random() >= cfg.plain_share
        batch = collate(self.chosen(step, rng, closed), self.backbone.cfg, self.width, generator)
        # a new model first learns to look up, then to write prompts, too
        ready = self.plan.stage != "pretrain" or step > 0.5 * cfg.steps
        if closed:
            batch = hidden_text(batch, generator)
        elif rng.random() < cfg.full_share and ready:
            batch = whole_sequence(batch)
        elif self.inner.inner_on == "prompt":
            batch = batch._replace(text=batch.given & batch.attend)
        else:
            batch = batch._replace(text=torch.zeros_like(batch.text))
        return batch, int((~batch.given).sum())

    def chosen(self, step, rng, closed):
        """The Examples of a step: the next ones of the file, or niah texts made for it."""
        if self.examples is None:
            samples = self.closed_samples(step, rng) if closed else self.samples(step, rng)
            return niah_examples(self.tokenizer, self.backbone.cfg, samples, closed)
        size, rows = len(self.examples), self.plan.rows
        return [self.examples[epoch_order(self.cfg.seed, n // size, size)[n % size]]
                for n in range(step * rows, (step + 1) * rows)]

    def samples(self, step, rng):
        """niah samples of mixed lengths: without them lookup is not learned."""
        c, tasks = self.cfg.length, self.cfg.tasks
        if self.meta and step < self.meta.settings.curriculum * self.cfg.steps:
            # the first hop is learned sooner where every row needs the memory
            tasks = [task for task in tasks if task == "resolve"] or tasks
        count = niah.token_counter(self.tokenizer, self.backbone.cfg)
        return niah.make_samples(tasks, rng.choice([0, c // 4, c // 2, c]), self.plan.rows,
                                 f"{self.cfg.seed} {step}", "train", count)

    def closed_samples(self, step, rng):
        """Texts with some questions each: first facts alone; once the gradient is exact, or after
        60 %, among ever more filler, in the end up to four times the usual length."""
        c, length = self.cfg.length, 0
        alone = min(self.exact_step, 0.6 * self.cfg.steps)
        if step >= alone:
            done = (step - alone) / (self.cfg.steps - alone)
            length = rng.choice([0, c // 2, c, 2 * c, 4 * c][:2 + int(4 * done)])
        count = niah.token_counter(self.tokenizer, self.backbone.cfg)
        task = partial(niah.facts, most=12)
        texts = niah.make_samples([task], length, self.plan.rows // self.inner.questions,
                                  f"{self.cfg.seed} {step}", "train", count)
        return [s for text in texts for s in niah.ask(text, self.inner.questions, rng)]

    def split(self, rows):
        """This rank's micro-batches of a tensor with one entry per row."""
        first = self.rank * self.cfg.accumulate
        return rows.split(self.cfg.batch_size)[first:first + self.cfg.accumulate]

    def micro_batches(self, batch):
        for fields in zip(*(self.split(x) for x in batch)):
            yield Batch(*(x.to(self.device) for x in fields))

    def weight(self, t):
        return 1 / t if self.cfg.loss_weight == "1/t" else torch.ones_like(t)

    def step_seed(self, step):
        return 1_000_003 * self.cfg.seed + step

    # -- around a step ---------------------------------------------------------------------------

    def steps(self):
        """The numbers of the steps to do; after each: log, held-out loss, checkpoint."""
        cfg, held_out = self.cfg, math.nan
        by_recall = self.closed and self.examples is None
        column = "recalled" if by_recall else f"held_out_{self.watched}"
        for step in range(self.first_step, cfg.steps):
            began = time.time()
            if cfg.lora_dropout:
                torch.manual_seed(self.step_seed(step) * self.world + self.rank)
                self.backbone.train()
            yield step
            self.backbone.eval()
            self.seconds += time.time() - began
            if not math.isfinite(self.loss):
                there = (self.out / "resume.pt").exists()
                kept = f"the last checkpoint in {self.out} is intact" if there \
                    else "no checkpoint was written yet"
                raise ValueError(f"the loss is {self.loss} at step {step}, seed {cfg.seed}; {kept}."
                                 f" Try a smaller --lr or --inner_lr, or look for bad examples")
            done = step + 1
            row = dict(step=step, loss=self.loss, grad_norm=float(self.grad_norm),
                       lr=self.schedule.get_last_lr()[0], seconds=round(self.seconds, 2))
            if done % cfg.eval_every == 0 or done == cfg.steps:
                held_out = row[column] = self.recalled() if by_recall \
                    else self.held_out_loss(self.arms[self.watched], self.passes)
            if self.rank == 0:
                with open(self.out / "log.jsonl", "a") as f:
                    f.write(json.dumps(row) + "\n")
                self.bar.set_postfix({"loss": f"{self.loss:.3f}", column: f"{held_out:.3f}"})
                self.bar.update()
            if done % cfg.save_every == 0 or done == cfg.steps:
                self.save(done)

    def sum_over_ranks(self, loss):
        """Each rank has its rows' share of loss and gradient: they add up. Returns the loss."""
        if self.world == 1:
            return loss
        total = torch.tensor(loss, device=self.device)
        dist.all_reduce(total)
        for p in self.trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
        return total.item()

    def recalled(self, n=50):
        """Closed book: the share of n held-out texts of four facts that phi answers from."""
        rows = niah.closed_book(self.backbone, self.tokenizer, self.inner, arms=["written"],
                                n_facts=[4], lengths=[0], n=n, seed=0)
        return sum(r["recall"] for r in rows) / n

    def held_out_loss(self, memory, passes=1):
        """Mean CE per masked token on held-out data, after so many passes over the same canvas."""
        def logits_of(rows, xt, masked):
            predict, state = memory(self.backbone, xt, rows.attend, int(rows.given[0].sum()))
            ratio = masked.sum(1) / (~rows.given).sum(1)                # (B,)
            for _ in range(passes):
                logits, state = predict(xt, ratio, state, masked)       # (N, V)
            return logits
        return self.held_out(logits_of)

    def leaky_loss(self):
        """The same with phi fitted to the very tokens that are scored (MemDLM, Fig. 4): a bound."""
        def logits_of(rows, xt, masked):
            phi, *_ = memdlm.adapt_to_response(self.backbone, rows.x0, rows.given, rows.attend,
                                               rows.t, rows.u, self.inner)
            return self.backbone(xt, rows.attend, masked, phi)          # (N, V)
        return self.held_out(logits_of)

    @torch.no_grad()
    def held_out(self, logits_of, n=128):
        """Mean CE per masked token of logits_of(rows, xt, masked) -> (N, V), t even in (0, 1)."""
        backbone, generator = self.backbone, torch.Generator().manual_seed(0)
        size = self.cfg.batch_size if backbone.cfg.family != "tiny" else 64
        examples = self.held_examples
        if examples is None:
            counter = niah.token_counter(self.tokenizer, backbone.cfg)
            samples = niah.make_samples(self.cfg.tasks, self.cfg.length, n, 0, "eval", counter)
            examples = niah_examples(self.tokenizer, backbone.cfg, samples)
        total, count = 0.0, 0
        for i in range(0, len(examples), size):
            batch = collate(examples[i:i + size], backbone.cfg, self.width, generator)
            t = (torch.arange(len(batch.t)) + 0.5) / len(batch.t)
            rows = Batch(*(x.to(self.device) for x in batch._replace(t=t)))
            xt, masked = corrupt(rows.x0, rows.t, rows.given, backbone.cfg.mask_id, rows.u)
            if masked.any():
                logits = logits_of(rows, xt, masked).float()
                total += F.cross_entropy(logits, rows.x0[masked], reduction="sum").item()
                count += int(masked.sum())
        return total / max(1, count)

    # -- checkpoints -----------------------------------------------------------------------------

    def save(self, done):
        """resume.pt holds all that is needed to go on; beside it lies what sample.py reads."""
        if self.rank > 0:
            return
        state = dict(step=done, seconds=self.seconds, settings=self.settings(),
                     trained=[p.detach().cpu() for p in self.trained],
                     optimizer=self.optimizer.state_dict(), schedule=self.schedule.state_dict())
        write_atomically(self.out / "resume.pt", lambda path: torch.save(state, path))
        if self.meta is not None:
            metastate.save(self.meta, self.out, self.cfg.source, self.fingerprint,
                           self.backbone.cfg.chat)
            return
        if self.cfg.lora:
            save_adapter(self.backbone, self.out, self.plan.base or self.cfg.source)
        else:
            save_backbone(self.backbone, self.out, self.tokenizer)
        write_json(self.out / "memory.json", dataclasses.asdict(self.inner))

    def settings(self):
        """What must be the same for a resumed run to be the same run."""
        free = ("out", "resume", "device", "n_eval", "save_every", "eval_every", "checkpointing",
                "backbone", "init", "data")                     # the last three by their contents
        fixed = {k: v for k, v in dataclasses.asdict(self.cfg).items() if k not in free}
        slots = dataclasses.asdict(self.meta.settings) if self.meta else {}
        return {**fixed, **dataclasses.asdict(self.inner), **slots, "world": self.world,
                "the backbone": self.fingerprint, "the data": self.content}

    def resume(self):
        """Go on from resume.pt, from the start if there is none yet. The log is cut there."""
        path = self.out / "resume.pt"
        said = f"--resume: {self.out} holds no checkpoint, the run starts from the beginning"
        if path.exists():
            state = read_state(path)
            saved = state["settings"]
            changed = [f"{k} was {saved[k]!r}, is {v!r}" for k, v in self.settings().items()
                       if saved.get(k, v) != v]
            if changed:
                raise ValueError(f"{path} belongs to another run: {'; '.join(changed)}")
            with torch.no_grad():
                for p, value in zip(self.trained, state["trained"]):
                    p.copy_(value)
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.first_step = state["step"]
            self.seconds = state["seconds"]
            said = f"resumed {self.out} at step {self.first_step}"
        log = self.out / "log.jsonl"
        if self.rank == 0 and log.exists():
            kept = "".join(log.read_text().splitlines(keepends=True)[:self.first_step])
            write_atomically(log, lambda part: Path(part).write_text(kept))
        if self.rank == 0:
            print(said)


def read_state(path):
    """The contents of a resume.pt. ValueError if damaged, OSError if it cannot be opened."""
    try:
        if zipfile.ZipFile(path).testzip():                 # torch.load looks at no checksum
            raise ValueError("a checksum does not match")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise OSError(f"{path} cannot be opened ({e})") from None
    except Exception as e:
        raise ValueError(f"{path} cannot be read ({type(e).__name__}): truncated or corrupted. "
                         f"Deleting its folder starts that run anew") from None


# 4. Several processes, and one folder for each run ------------------------------------------------

def shard(backbone):
    """Several processes: frozen layers are split over the ranks (FSDP2, one unit a layer); trained
    weights stay whole on every rank, and their gradients are added up."""
    if dist.is_initialized() and not all(p.requires_grad for p in backbone.parameters()):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        # by itself fully_shard takes a GPU where there is one, also for a run on the CPU
        mesh = init_device_mesh(backbone.device.type, (dist.get_world_size(),))
        for layer in backbone.layers:
            whole = {p for p in layer.parameters() if p.requires_grad}
            fully_shard(layer, mesh=mesh, ignored_params=whole)


def check_out(cfg, base):
    """ValueError if --out is taken, or if writing there could touch what the run reads."""
    out = Path(cfg.out).resolve()
    for folder in {base, cfg.init, cfg.backbone} - {None, "tiny"}:
        if out.is_relative_to(Path(folder).resolve()):
            raise ValueError(f"--out {cfg.out} lies in {folder}, which the run reads: name another")
    if cfg.data != "niah" and Path(cfg.data).resolve().is_relative_to(out):
        raise ValueError(f"--data {cfg.data} lies in --out {cfg.out}: name another --out")
    if not cfg.resume and out.exists() and {f.name for f in out.iterdir()} - {".lock"}:
        raise ValueError(f"{cfg.out} exists already: --resume goes on, --out names another folder; "
                         f"to start anew there, remove the folder yourself")


@contextlib.contextmanager
def locked(out):
    """One run in a folder at a time. The system frees the lock however the process ends."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as f:
        try:
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out} is in use by another run: use another --out") from None
        except (ImportError, OSError):
            pass                                            # Windows, or no locks in this folder
        yield


# 5. From flags to a run ---------------------------------------------------------------------------

def check_flags(cfg):
    """ValueError for flags that contradict each other whatever the backbone is."""
    cfg.out = cfg.out or f"runs/{cfg.method}"
    if cfg.data != "niah" and not Path(cfg.data).is_file():
        raise ValueError(f"--data {cfg.data}: no such file (niah, or a JSONL file)")
    if cfg.data != "niah" and cfg.chat is None:
        with open(cfg.data, "rb") as f:  # messages teach the template: the checkpoint remembers it
            cfg.chat = any(re.search(rb'"messages"\s*:\s*\[', line) for line in f) or None
    if cfg.epochs and cfg.data == "niah":
        raise ValueError("--epochs needs --data FILE; niah texts never repeat: use --steps")
    if cfg.method == "metastate" and cfg.lora:
        raise ValueError("--lora: MetaState's backbone is frozen; train an adapter with --method "
                         "mdlm first, and give its folder as --init")


class Plan(NamedTuple):
    """What follows from the flags and config.json, before anything is loaded."""
    base: str | None            # the backbone under the adapter that training starts from
    inner: memdlm.MemDLMConfig
    meta: MetaStateConfig
    closed: bool                # the closed book is trained
    to_pretrain: bool           # the tiny backbone has to be pretrained first
    stage: str                  # key of DEFAULTS
    rows: int                   # of an optimizer step: all micro-batches, all ranks
    length: int                 # tokens of the longest row (closed book: four times --length)
    sizes: dict                 # bytes by kind, see sample.estimate


def plan(cfg, inner_options, meta_options, world=1):
    """Flags -> Plan; fills in what was None in cfg. ValueError or OSError for what cannot work."""
    check_flags(cfg)
    base = find_base(cfg)
    model_cfg = BackboneConfig()
    if cfg.source != "tiny":
        path = find_folder(base or cfg.source, weights=False) / "config.json"
        model_cfg = config_from_json(read_json(path), path)
    meta = dataclasses.replace(metastate.for_backbone(model_cfg), **meta_options)
    meta.check(model_cfg.n_layers)
    # other methods' backbones write a prompt as published: they were not trained to be written to
    default = None if cfg.method == "memdlm" else "response"
    inner = memdlm.for_backbone(model_cfg, inner_options.get("inner_on", default))
    ours = inner_options.keys() - vars(inner).keys()
    if ours:
        raise ValueError(f"--{min(ours)} belongs to --inner_on closed_book, not {inner.inner_on}")
    if cfg.data != "niah" and isinstance(inner, ClosedBook):
        inner.questions = 1
    inner = dataclasses.replace(inner, **inner_options)
    closed = cfg.method == "memdlm" and inner.inner_on == "closed_book"
    to_pretrain = cfg.source == "tiny" and not closed and (cfg.method != "mdlm" or bool(cfg.lora))
    if to_pretrain:
        cfg.init = f"runs/pretrained-seed{cfg.seed}"
    stage = fill_in(cfg, model_cfg.family, closed)
    shared = getattr(inner, "questions", 1)
    if shared > 1 and (cfg.batch_size % shared or not closed or cfg.data != "niah"):
        raise ValueError(f"--questions {shared}: only the closed book on niah texts asks so often; "
                         f"--batch_size must be a multiple of it, not {cfg.batch_size}")
    length = cfg.length * (4 if closed else 1) + niah.BUDGET if cfg.data == "niah" else cfg.max_len
    weight_bytes = 4 if cfg.dtype == "float32" or model_cfg.family == "tiny" else 2
    sizes = estimate(model_cfg, cfg.method, cfg.batch_size, length, cfg.lora, 1.0, inner, meta,
                     weight_bytes, cfg.checkpointing)
    rows = cfg.batch_size * cfg.accumulate * world
    return Plan(base, inner, meta, closed, to_pretrain, stage, rows, length, sizes)


def find_base(cfg):
    """The backbone under the adapter that training starts from, or None."""
    folder = Path("tiny") if cfg.source == "tiny" else find_folder(cfg.source, weights=False)
    if not (folder / "adapter_config.json").exists():
        return None
    rank = adapter_config(folder).r
    if cfg.lora not in (None, rank):
        raise ValueError(f"--lora {cfg.lora}: {cfg.source} is an adapter of rank {rank}; omit it")
    cfg.lora = None if cfg.method == "metastate" else rank
    return adapter_base(folder)


def fill_in(cfg, family, closed):
    """Replace every None by what it stands for, but steps that follow from epochs -> the stage."""
    if cfg.method == "metastate":
        stage = "metastate"
    elif family != "tiny":
        stage = "published"
    elif closed:
        stage = "closed_book"
    else:
        stage = "pretrain" if cfg.source == "tiny" else "finetune"
    defaults = {"checkpointing": family != "tiny", **DEFAULTS[stage]}
    if cfg.data != "niah" and (cfg.epochs or "epochs" in defaults):
        del defaults["steps"]
    for name, value in defaults.items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    return stage


def pretrain(cfg):
    """The tiny backbone that memories and adapters start from, trained once with plain MDLM."""
    out, wanted = Path(cfg.init), DEFAULTS["pretrain"]["steps"]
    print(f"no --init: starting from the tiny backbone in {out}, pretrained with plain MDLM for "
          f"{wanted} steps (now, unless it is there; delete the folder to do it again)")
    if not (out / "resume.pt").exists() or read_state(out / "resume.pt")["step"] != wanted:
        train(Run(TrainConfig(method="mdlm", seed=cfg.seed, out=cfg.init, device=cfg.device,
                              resume=out.exists()), {}, {}))


def train(run):
    """One run from start to end."""
    cfg = run.cfg
    check_out(cfg, run.plan.base)
    run.load()
    with locked(run.out) if run.rank == 0 else contextlib.nullcontext():
        if run.rank == 0:
            check_out(cfg, run.plan.base)                   # another run may have just ended here
            trained = sum(p.numel() for p in run.trained)
            print(f"{cfg.method} from {cfg.source} into {cfg.out}: {cfg.steps} steps of "
                  f"{run.plan.rows} rows, lr {cfg.lr}, seed {cfg.seed}, torch "
                  f"{torch.__version__} on {run.device}\n{trained:,} trained parameters")
        if run.world > 1:
            dist.barrier()
        if cfg.resume:
            run.resume()
        with tqdm(total=cfg.steps, initial=run.first_step, desc=run.plan.stage, unit="step",
                  disable=run.rank > 0) as run.bar:
            LOOPS[cfg.method](run)


def report(run):
    """What the memory does: off first, then on, controls; and how to go on."""
    cfg, model = run.cfg, (run.backbone, run.tokenizer)
    what, arms, flag, lengths = ARMS, run.arms, "", "64 128 256"
    # two, so that no lucky guess hides what the memory does
    prompts = ('"the sky is blue . river = 47 . stone = 12 . ? river =" '
               '"piano = 21 . cloud = 30 . the moon is old . ? cloud ="')
    if run.closed:
        what, flag, lengths = niah.CLOSED_ARMS, " --closed_book", "0 64 256 1024 4096 --n 200"
        arms = ["none", "written", "phi", "other", "open"]
        if cfg.n_eval:
            rows = niah.closed_book(*model, run.inner, arms=arms, n_facts=[4, 8], n=cfg.n_eval,
                                    lengths=[0, cfg.length, 4 * cfg.length], seed=1,
                                    out=run.out / "closed_book.jsonl")
            print("\nclosed book: the text is written into the weights, then hidden; recall in %")
            print(niah.closed_table(rows))
    else:
        off, on = (run.held_out_loss(memory, run.passes) for memory in arms.values())
        if run.meta is None:
            print(f"\nheld-out loss: memory off {off:.3f}, adapted to the prompt {on:.3f}; leaky, "
                  f"an upper bound and no result: {run.leaky_loss():.3f}")
        else:
            lengths = "64 --tasks resolve --passes 8"
            text = ("saddle = jacket . table = 34 . pepper = table . the sky is blue . "
                    "ladder = saddle . candle = pepper . jacket = 59 .")
            prompts = f'"{text} ? candle is" "{text} ? ladder is"'
            print(f"\nheld-out loss: frozen {off:.3f}, second pass over the same canvas {on:.3f}")
            if "metastate" in arms:
                arms["wiped"] = metastate.wiped(run.meta, run.backbone.cfg)
        if cfg.n_eval:
            rows = niah.evaluate(*model, arms, list(dict.fromkeys(cfg.tasks)), [cfg.length],
                                 cfg.n_eval, 1, run.out / "niah.jsonl")
            print(niah.table(rows))
    if cfg.n_eval:
        print(f"n = {cfg.n_eval} a cell, 95 % intervals over texts")
        print("\n".join(f"  {arm:<11}{what.get(arm, 'control: --memory ' + arm)}" for arm in arms))
    print(f"{cfg.steps} steps in {run.seconds / 60:.1f} min, peak memory "
          f"{peak_memory() / 1e9:.2f} GB\n\ngo on with\n"
          f"  python niah.py --checkpoint {cfg.out}{flag} --lengths {lengths}\n"
          f"  python sample.py --checkpoint {cfg.out}{flag} --watch --prompt {prompts}")


# 6. Command line ----------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(
        description="Train a masked-diffusion LM, plain or with a memory. `--method memdlm` alone "
                    "trains a tiny model in minutes and prints what its weights remember.")
    add_flags(parser, TrainConfig)
    for title, cls in (("MemDLM", ClosedBook), ("MetaState", MetaStateConfig)):
        group = parser.add_argument_group(f"{title}; defaults depend on the backbone")
        add_flags(group, cls, defaults=False)
    parser.add_argument("--estimate", action="store_true", help="print the memory needed, and stop")
    args = parser.parse_args()
    cfg = TrainConfig(**given_flags(TrainConfig, args))
    join_ranks(cfg)
    run = Run(cfg, given_flags(ClosedBook, args), given_flags(MetaStateConfig, args))
    if args.estimate:
        return
    train(run)
    if run.world == 1:
        report(run)
    else:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    cli(main)
