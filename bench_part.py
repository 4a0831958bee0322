import dataclasses
import multiprocessing
import time

import torch

import memdlm
import metastate
from backbone import Backbone, BackboneConfig, corrupt, default_device, load_backbone, masked_loss
from memdlm import MemDLMConfig
from metastate import MetaState, MetaStateConfig
from sample import generate, peak_memory

# ------------------------------------------------------------------------------------------------
# Benchmark: everything side by side in one run (python test_all.py --bench).

BENCH = BackboneConfig(vocab_size=2048, d_model=256, n_layers=20, n_heads=4, n_kv_heads=4,
                       head_dim=64, d_ff=768, conv_width=0)
BENCH_SLOTS = MetaStateConfig(inject_layers=(10,))


def bench_steps(batch=4, length=256):
    """{name: a function that runs one training step}, on equal data, answers as long as prompts."""
    torch.manual_seed(0)
    device = default_device()
    model = Backbone(BENCH).init_weights().to(device)
    meta = MetaState(BENCH, BENCH_SLOTS).to(device)
    settings = MemDLMConfig()
    x0 = torch.randint(3, 2048, (batch, length), device=device)
    attend = torch.ones_like(x0, dtype=torch.bool)
    given = attend.clone()
    given[:, length // 2:] = False
    ones = torch.ones(batch, device=device)
    t = 0.5 * ones
    u = torch.rand(batch, length, device=device)
    n = batch * length // 2

    def mdlm_step():
        model.requires_grad_(True)
        xt, masked = corrupt(x0, t, given, 1, u)
        masked_loss(model(xt, attend, masked), x0, masked, ones, n).backward()

    def memdlm_step():
        model.requires_grad_(True)
        loss = memdlm.loss_memdlm(model, x0, given, attend, t, u, ones, n, settings)
        loss.backward()

    def recomputed():
        """The trunk again for each inner step and for the outer pass."""
        model.requires_grad_(True)
        first = memdlm.first_fast_layer(model, settings)
        ctx = model.context(x0)
        phi = memdlm.init_phi(model, batch, settings)
        for ratio in (1.5 * t, t):
            xt, masked = corrupt(x0, ratio, given, 1, u)
            with torch.no_grad():
                h = model.run(model.embed(xt), ctx, 0, first)
            phi = memdlm.inner_step(model, phi, h, ctx, x0, masked, ones, settings)
        masked_loss(model(xt, attend, masked, phi), x0, masked, ones, n).backward()

    def unrolled():
        model.requires_grad_(False)
        stay = torch.zeros(batch, dtype=torch.bool, device=device)
        loss = metastate.loss_unrolled(meta, model, x0, given, attend, t, stay, 4, 0, u, batch)
        loss.backward()
    return {"mdlm": mdlm_step, "memdlm": memdlm_step, "memdlm, trunk recomputed": recomputed,
            "metastate, K = 4, frozen": unrolled}


def bench_peak(name):
    """Peak memory of one kind of training step, measured in a process of its own."""
    torch.set_num_threads(2)
    for _ in range(2):
        bench_steps()[name]()
    return peak_memory()


def clock(functions, rounds):
    """Seconds per call, median over rounds. In each round every function runs once, so that a
    drift of the machine hits all alike; the first round only warms up."""
    seconds = {name: [] for name in functions}
    for r in range(rounds + 1):
        for name, f in functions.items():
            began = time.perf_counter()
            f()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if r > 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: sorted(s)[len(s) // 2] for name, s in seconds.items()}


@torch.no_grad()
def bench_denoising():
    """Seconds of one denoising step: plain, with phi, with slots."""
    device = default_device()
    torch.manual_seed(0)
    model = Backbone(BENCH).init_weights().to(device)
    meta = MetaState(BENCH, BENCH_SLOTS).to(device)
    xt = torch.randint(3, 2048, (4, 256), device=device)
    at = torch.zeros_like(xt, dtype=torch.bool)
    at[:, 128:] = True
    ctx = model.context(xt)
    ones = torch.ones(4, device=device)
    phi = memdlm.adapt_to_prompt(model, xt, None, ~at, MemDLMConfig())
    return clock({"plain": lambda: model(xt, at=at),
                  "with phi": lambda: model(xt, at=at, phi=phi),
                  "with slots": lambda: meta.step(model, ctx, xt, ones, None, at, 128)}, 10)


@torch.no_grad()
def bench_head():
    """Seconds a step at a large vocabulary: logits where a token can be chosen, or everywhere."""
    device = default_device()
    torch.manual_seed(0)
    large = dataclasses.replace(BENCH, vocab_size=100_000, n_layers=4)
    model = Backbone(large).init_weights().to(device)
    prompt = torch.randint(3, 2048, (1, 192), device=device)
    settings = dict(gen_length=64, steps=8, block_length=64)
    ids = {}

    def everywhere(backbone, xt, attend, start):
        def predict(xt, t, state, at):
            return backbone(xt, attend)[at], state
        return predict, None

    def chosen():
        ids["chosen"] = generate(model, prompt, **settings)

    def whole():
        ids["whole"] = generate(model, prompt, memory=everywhere, **settings)
    seconds = clock({"logits where selectable": chosen, "logits everywhere": whole}, 3)
    assert torch.equal(ids["chosen"], ids["whole"])
    return {name: s / settings["steps"] for name, s in seconds.items()}


@torch.no_grad()
def bench_adaptation():
    """Seconds of the inner loop on 16 prompts of the tiny model, at once and one by one."""
    device = default_device()
    torch.manual_seed(0)
    tiny = load_backbone("tiny", device)
    prompts = torch.randint(3, 139, (16, 64), device=device)
    every = torch.ones_like(prompts, dtype=torch.bool)

    def at_once():
        memdlm.adapt_to_prompt(tiny, prompts, None, every, MemDLMConfig())

    def one_by_one():
        for row in prompts:
            memdlm.adapt_to_prompt(tiny, row[None], None, every[:1], MemDLMConfig())
    return clock({"16 prompts at once": at_once, "one by one": one_by_one}, 10)


def bench():
    """Prints one table; a few minutes on a CPU."""
    print(f"20 layers, width 256, batch 4 x 256 tokens; torch {torch.__version__}, "
          f"{default_device()}, {torch.get_num_threads()} threads")
    seconds = clock(bench_steps(), 8)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peak = {name: pool.apply(bench_peak, (name,)) for name in seconds}
    print(f"{'training step':<30}{'ms':>8}{'x mdlm':>8}{'peak GB':>9}")
    for name, s in seconds.items():
        ratio = s / seconds["mdlm"]
        print(f"{name:<30}{1000 * s:>8.0f}{ratio:>8.2f}{peak[name] / 1e9:>9.2f}")
    for title, measure in (("one denoising step", bench_denoising),
                           ("a step at V = 100,000", bench_head),
                           ("prompt adaptation", bench_adaptation)):
        seconds = measure()
        first = next(iter(seconds.values()))
        print(f"{title:<30}{'ms':>8}{'x first':>8}")
        for name, s in seconds.items():
            print(f"  {name:<28}{1000 * s:>8.1f}{s / first:>8.2f}")
