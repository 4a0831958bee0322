"""Needle-in-a-haystack tasks: text whose answer lies somewhere in it, at any length; training data and evaluation alike.

Sources: RULER (arXiv 2404.06654) and BABILong (2406.10149), the benchmarks behind MemDLM's tables. Each task below is a
miniature with the same structure and the same scoring rule; its docstring says what was kept and what was dropped.
Idea: the haystack is filler, the needles are facts "key = value ." between its sentences, the question comes last with the
asked key right before the answer. Distractor needles are mandatory: without them "copy every value you see" scores 100 %.
Scoring: RULER's recall = mean over the reference strings of [reference is a substring of the output, case-folded];
BABILong's = the target word is a substring. Beside it exact match, which is stricter: order and number count too.
Held out: training and evaluation draw from different seeds, and from disjoint sets of pairs: a "key = value" of the
evaluation never occurs in training, so a right answer was read from the prompt, not remembered.
Left out: essays as filler, 7-digit numbers and UUIDs (closed vocabulary), RULER's one-shot examples.
Run: python niah.py --checkpoint runs/memdlm        (table tasks x lengths, memory off and on; depth grid; JSONL)
"""
import argparse
import json
import math
import random
import re
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from backbone import cli, encode, encode_prompt
from memdlm import exposure_bias
from sample import cut, generate, left_pad, load_arms


# ----------------------------------------------------------------------------------------------------------------------
# 0. The closed vocabulary: every text of the tiny model is made of these words.

SPECIALS = ["[PAD]", "[MASK]", "[EOS]"]
KEYS = ("river stone cloud table horse piano candle forest bridge mirror anchor basket castle "
        "desert engine feather garden hammer island jacket kettle ladder marble needle orange "
        "pepper quartz ribbon saddle temple violin window").split()
VALUES = [str(n) for n in range(10, 74)]
PEOPLE = "mary john daniel sandra".split()
PLACES = "bathroom bedroom hallway kitchen office cellar".split()
OBJECTS = "apple football milk".split()
FILLER_NOUNS = "grass sky sun moon sea road wall door".split()
FILLER_ADJECTIVES = "green blue yellow white deep long old dark".split()
FUNCTION_WORDS = "the is . = ? moved took dropped where common list".split()


def vocabulary():
    """Word -> id, 139 entries. A word outside it is an error that names the word, never an [UNK]."""
    words = (SPECIALS + FUNCTION_WORDS + KEYS + VALUES + PEOPLE + PLACES + OBJECTS
             + FILLER_NOUNS + FILLER_ADJECTIVES)
    return {word: i for i, word in enumerate(words)}


def tiny_tokenizer():
    """Splits at white space; text -> ids -> text is the identity. A transformers tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel(vocabulary(), unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, mask, eos = SPECIALS
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, mask_token=mask, eos_token=eos)


@dataclass
class Sample:
    task: str
    prompt: str
    answer: str                  # what the response should be, word for word (exact match)
    refs: list                   # what must occur in it (recall)
    chance: float                # recall of a guesser who copies random candidates of the right kind from the prompt
    depth: float = 0.0           # where the asked needle lies: 0 = first sentence, 1 = last
    hops: int = 0                # facts to go through before the one that holds the answer
    length: int = 0              # nominal context length


# ----------------------------------------------------------------------------------------------------------------------
# 1. Pieces.

@lru_cache(maxsize=None)
def held_out(first, second):
    """A fixed fifth of all pairs of words: they occur in evaluation texts only, all others in training texts only."""
    return random.Random(f"{first} {second}").random() < 0.2


def pick(rng, words, used, split, after=None):
    """A word that is not in `used`; with `after`, one whose pair (after, word) belongs to the split."""
    for _ in range(300):
        word = rng.choice(words)
        if word not in used and (after is None or held_out(after, word) == (split == "eval")):
            used.add(word)
            return word
    raise LookupError("no partner left")                                     # rare; make_samples draws another text


def filler(rng, n):
    """n sentences "the sky is blue ." in which a noun keeps its adjective throughout the text (drawn anew for each text), so
    that the haystack has a structure of its own to learn, unlike random words and unlike RULER's five fixed sentences."""
    adjective = {noun: rng.choice(FILLER_ADJECTIVES) for noun in FILLER_NOUNS}
    return [f"the {noun} is {adjective[noun]} ." for noun in rng.choices(FILLER_NOUNS, k=n)]


def hide(rng, facts, query, length, count):
    """Facts in their order between as many filler sentences as fit into `length` tokens; `count` measures a text in tokens of
    the model's own tokenizer, as RULER does. Returns the text and the depth of each fact, 0..1."""
    room = length - count(" ".join(facts + [query]))
    hay = filler(rng, max(0, room) // count("the sky is blue ."))
    while hay and count(" ".join(facts + hay + [query])) > length:
        hay.pop()
    n = len(facts) + len(hay)
    slots = sorted(rng.sample(range(n), len(facts)))
    lines = hay
    for slot, fact in zip(slots, facts):                # in ascending order each insertion lands at its final index
        lines.insert(slot, fact)
    return " ".join(lines + [query]), [slot / max(1, n - 1) for slot in slots]


def count_words(text):
    return text.count(" ") + 1


# ----------------------------------------------------------------------------------------------------------------------
# 2. Tasks. Each takes (rng, length, split, count) and returns a Sample.

def needles(task, rng, length, split, count, n_keys, n_values):
    """One key with n_values values is asked for, among n_keys - 1 distractor keys with one value each."""
    keys, values = set(), set()
    asked = pick(rng, KEYS, keys, split)
    refs = [pick(rng, VALUES, values, split, after=asked) for _ in range(n_values)]
    facts = [(asked, v) for v in refs]
    for _ in range(n_keys - 1):
        key = pick(rng, KEYS, keys, split)
        facts.append((key, pick(rng, VALUES, values, split, after=key)))
    rng.shuffle(facts)
    refs = [v for k, v in facts if k == asked]                               # order of appearance
    text, depths = hide(rng, [f"{k} = {v} ." for k, v in facts], f"? {asked} =", length, count)
    return Sample(task, text, " ".join(refs), refs, n_values / len(values), depths[[k for k, _ in facts].index(asked)], 0, length)


def single(*args):
    """RULER niah_single: one needle. Kept: random depth. No distractor, so copying the only number scores 100: a smoke test."""
    return needles("single", *args, n_keys=1, n_values=1)


def multikey(*args):
    """RULER niah_multikey_1: four keys, one is asked for."""
    return needles("multikey", *args, n_keys=4, n_values=1)


def multivalue(*args):
    """RULER niah_multivalue: four values of one key, all asked for. Ours adds three distractor keys (RULER has none)."""
    return needles("multivalue", *args, n_keys=4, n_values=4)


def chains(task, rng, length, split, count, hops, shuffled, direct=False):
    used, values, chain_list = set(), set(), []
    for _ in range(2):
        names = [pick(rng, KEYS, used, split)]
        for _ in range(hops):
            names.append(pick(rng, KEYS, used, split, after=names[-1]))
        chain_list.append((pick(rng, VALUES, values, split, after=names[0]), names))
    (value, names), (other, distractors) = chain_list
    lines = [[f"{a} = {b} ." for a, b in zip(ns, [v] + ns)] for v, ns in chain_list]
    order = [0] * len(lines[0]) + [1] * len(lines[1])
    rng.shuffle(order)
    facts = [lines[c].pop(0) for c in order]                                 # definition before use, chains interleaved
    if shuffled:
        rng.shuffle(facts)
    query, refs = (f"? {names[-1]} is", [value]) if direct else (f"? = {value}", names)
    text, depths = hide(rng, facts, query, length, count)
    return Sample(task, text, " ".join(refs), refs, 0.5, depths[facts.index(f"{names[0]} = {value} .")], hops, length)


def tracking(*args):
    """RULER variable tracking with 2 hops and one distractor chain: "a = 47 . b = a . c = b ." and the question which names
    hold 47. Kept: definition before use, random gaps, recall over the names."""
    return chains("tracking", *args, hops=2, shuffled=False)


def tracking4(*args):
    """Variable tracking with RULER's 4 hops, one distractor chain, and the lines shuffled, so that no reading order helps."""
    return chains("tracking4", *args, hops=4, shuffled=True)


def resolve(rng, length, split, count):
    """Variable tracking the other way round, answered at once: "? c is" asks for the value c holds, 0 to 4 hops up its chain.
    No name on the way may be written down, so what one pass has worked out is lost to the next, unless there is a memory."""
    return chains("resolve", rng, length, split, count, hops=rng.randint(0, 4), shuffled=True, direct=True)


def common(rng, length, split, count):
    """RULER common words: 3 words stand 6 times as often as all others (its own ratio below 4K tokens). Longer texts repeat
    more; there is no filler. Answer in vocabulary order."""
    words = rng.sample(KEYS, len(KEYS))
    top, rest = sorted(words[:3], key=KEYS.index), words[3:]
    per_word = (count(" ".join(KEYS)) + 2) / len(KEYS)
    times = max(1, round((length / per_word - 4) / (6 * len(top) + len(rest))))
    rest = rest[:max(6, int((length / per_word - 4) / times) - 6 * len(top))]
    listing = top * (6 * times) + rest * times
    rng.shuffle(listing)
    return Sample("common", " ".join(["list"] + listing + [". ? common"]), " ".join(top), top, 3 / len(top + rest), 0.0, 0, length)


def stories(rng, length, split, count):
    """BABILong qa2, two supporting facts: people take objects and move; where is the object? Kept: the latest fact wins, an
    object moves with its holder, facts keep their order between filler sentences. Dropped: putting objects down. The answer
    names the holder, then the place (the place alone was not learned in minutes); only the place is scored."""
    place, holder, facts = {}, {}, []
    while len(facts) < 8:
        who, thing = rng.choice(PEOPLE), rng.choice(OBJECTS)
        if who in place and thing not in holder and (rng.random() < 0.3 or len(facts) == 7 and not holder):
            holder[thing] = who
            facts.append(f"{who} took {thing} .")
        else:
            place[who] = rng.choice([p for p in PLACES if p != place.get(who)])
            facts.append(f"{who} moved {place[who]} .")
    if not holder:
        raise LookupError("nothing was taken")
    asked = rng.choice(sorted(holder))
    who = holder[asked]
    text, depths = hide(rng, facts, f"? where {asked}", length, count)
    last = facts.index(f"{who} took {asked} .")
    return Sample("stories", text, f"{who} {place[who]}", [place[who]], 1 / len(set(place.values())), depths[last], 1, length)


TASKS = {f.__name__: f for f in (single, multikey, multivalue, tracking, tracking4, resolve, common, stories)}


def make_samples(tasks, length, n, seed, split="train", count=count_words):
    """n samples, tasks drawn at random; the same arguments give the same samples. split: "train" or "eval"."""
    rng, samples = random.Random(f"{split} {seed}"), []
    while len(samples) < n:
        try:
            samples.append(TASKS[rng.choice(tasks)](rng, length, split, count))
        except LookupError:
            continue
    return samples


# ----------------------------------------------------------------------------------------------------------------------
# 3. Evaluation: the same samples for every arm.

BUDGET = 6                      # answer tokens of the tiny model: five names and the end of text. RULER, too, fixes a budget per task
INTRO = "Answer the question after the question mark from the facts hidden in this text, with the bare words.\n"


def token_counter(tokenizer, cfg):
    """How long is a text, in tokens of this model. The tiny tokenizer splits at spaces, so counting them is the same, faster."""
    return count_words if cfg.family == "tiny" else lambda text: len(encode(tokenizer, text))


def recall(refs, output):
    """RULER's string_match_all: the share of references that are substrings of the output, upper and lower case alike."""
    return sum(ref.lower() in output.lower() for ref in refs) / len(refs)


def run_arm(backbone, tokenizer, samples, memory, batch_size=100, gen_length=BUDGET, steps=None, progress=None):
    """Decode all samples with one memory, LLaDA's settings for these tasks: one block, one token a step, temperature 0.

    Returns a list of {output, recall, exact}, in the order of the samples."""
    results, intro = [], "" if backbone.cfg.family == "tiny" else INTRO
    for i in range(0, len(samples), batch_size):
        part = samples[i:i + batch_size]
        prompts = [torch.tensor(encode_prompt(tokenizer, backbone.cfg, intro + s.prompt)) for s in part]
        ids = generate(backbone, prompts, gen_length=gen_length, steps=steps or gen_length, block_length=gen_length, memory=memory)
        for sample, row in zip(part, ids):
            output = tokenizer.decode(cut(row, backbone.cfg), skip_special_tokens=False)
            results.append(dict(output=output, recall=recall(sample.refs, output),
                                exact=float(output.split() == sample.answer.split())))
        if progress:
            progress.update(len(part))
    return results


def interval(values):
    """Mean and half the width of its 95 % interval (normal approximation over samples)."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), 1.96 * (x.var().item() / len(x)) ** 0.5 if len(x) > 1 else math.inf


def paired(values, baseline):
    """Mean difference on the same samples, half the width of its 95 % interval."""
    return interval([a - b for a, b in zip(values, baseline)])


def evaluate(backbone, tokenizer, arms, tasks, lengths, n, seed, out=None, gen_length=BUDGET, steps=(None,), **columns):
    """Every arm on the same samples. Returns rows {task, length, steps, arm, depth, output, recall, exact, ...}, one a sample,
    and appends them to the JSONL file `out`."""
    count, rows = token_counter(tokenizer, backbone.cfg), []
    bar = tqdm(total=len(tasks) * len(lengths) * len(arms) * len(steps) * n, desc="niah", unit="sample", leave=False)
    for task in tasks:
        for length in lengths:
            samples = make_samples([task], length, n, seed, "eval", count)
            for arm, memory in arms.items():
                for passes in (p or gen_length for p in steps):
                    size = max(1, 6400 // max(64, length))                  # long texts in smaller batches
                    results = run_arm(backbone, tokenizer, samples, memory, size, gen_length, passes, bar)
                    rows += [{**columns, "arm": arm, "steps": passes, "seed": seed, **asdict(s), **r}
                             for s, r in zip(samples, results)]
    bar.close()
    append_jsonl(out, rows)
    return rows


def append_jsonl(path, rows):
    if path:
        with open(path, "a") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)


def answers_masked(backbone, tokenizer, samples):
    """Samples as one batch: x0 (n, L) with the answers at the end, filled up with end-of-text, attend, and where they start."""
    cfg = backbone.cfg
    prompts = [torch.tensor(encode_prompt(tokenizer, cfg, s.prompt)) for s in samples]
    prompts, attend = left_pad(prompts, cfg.pad_id, backbone.device)
    answers = torch.full((len(samples), BUDGET), cfg.eos_id, device=prompts.device)
    for row, s in zip(answers, samples):
        ids = encode(tokenizer, s.answer)[:BUDGET]
        row[:len(ids)] = torch.tensor(ids)
    return torch.cat([prompts, answers], 1), torch.cat([attend, torch.ones_like(answers, dtype=torch.bool)], 1), prompts.shape[1]


def exposure(backbone, tokenizer, arms, tasks, length, n, seed):
    """A table: exposure bias per step for every arm (memdlm.exposure_bias), all tasks mixed."""
    samples = make_samples(tasks, length, n, seed, "eval", token_counter(tokenizer, backbone.cfg))
    x0, attend, start = answers_masked(backbone, tokenizer, samples)
    given = torch.arange(x0.shape[1], device=x0.device).expand_as(x0) < start
    lines = [f"{'exposure bias':<14}{'mask ratio':>11}{'sequential':>12}{'static':>9}{'clean':>9}{'seq/static':>12}{'seq/clean':>11}"]
    for arm, memory in arms.items():
        for r in exposure_bias(backbone, x0, given, attend, BUDGET, memory):
            lines.append(f"{arm:<14}{r['mask_ratio']:>11.2f}{r['sequential']:>12.3f}{r['static']:>9.3f}{r['clean']:>9.3f}"
                         f"{r['published_ratio']:>12.2f}{r['clean_ratio']:>11.2f}")
    return "\n".join(lines)


@torch.no_grad()
def recompute(backbone, tokenizer, arms, tasks, length, n, seed, passes, out=None):
    """Redundant recomputation, MetaState's "Information Island": up to `passes` passes over the same, fully masked answer, then
    all tokens committed at once. A frozen model computes the same logits every time; with slots a pass can use the last one.

    Returns rows {task, arm, steps = number of passes, recall, exact}, one a sample."""
    rows, cfg = [], backbone.cfg
    for task in tasks:
        samples = make_samples([task], length, n, seed, "eval", token_counter(tokenizer, cfg))
        xt, attend, start = answers_masked(backbone, tokenizer, samples)
        xt[:, start:] = cfg.mask_id
        for arm, memory in arms.items():
            predict, state = memory(backbone, xt, attend, start)
            for p in range(1, passes + 1):
                logits, state = predict(xt, torch.ones(n, device=xt.device), state, xt == cfg.mask_id)
                for s, row in zip(samples, logits.view(n, BUDGET, -1).argmax(-1)):
                    output = tokenizer.decode(cut(row, cfg))
                    rows.append({"arm": arm, "steps": p, "seed": seed, **asdict(s), "output": output,
                                 "recall": recall(s.refs, output), "exact": float(output.split() == s.answer.split())})
    append_jsonl(out, rows)
    return rows


@torch.no_grad()
def probe(backbone, tokenizer, memory, length, n, seed, passes):
    """What do the slots hold? A linear read-out of resolve's answer from the slots after each pass (ridge regression onto the
    values, fitted on 4 n texts, scored on n others). Returns rows {arm, hops, steps, recall}, one a text and pass."""
    samples = make_samples(["resolve"], length, 5 * n, seed, "eval", token_counter(tokenizer, backbone.cfg))
    y = F.one_hot(torch.tensor([VALUES.index(s.answer) for s in samples])).double()
    slots, rows = [], []
    for i in range(0, len(samples), n):
        xt, attend, start = answers_masked(backbone, tokenizer, samples[i:i + n])
        xt[:, start:] = backbone.cfg.mask_id
        (predict, state), after = memory(backbone, xt, attend, start), []
        for _ in range(passes):
            state = predict(xt, torch.ones(n, device=xt.device), state, xt == backbone.cfg.mask_id)[1]
            after.append(state[0].flatten(1).double().cpu())                # (n, M S)
        slots.append(torch.stack(after))
    for p, x in enumerate(torch.cat(slots, 1), 1):                          # (5 n, M S)
        x, held_out = F.pad(x[n:], (0, 1), value=1.0), F.pad(x[:n], (0, 1), value=1.0)
        w = torch.linalg.solve(x.mT @ x + torch.eye(x.shape[1]), x.mT @ y[n:])
        right = (held_out @ w).argmax(1) == y[:n].argmax(1)
        rows += [dict(arm="probe", hops=s.hops, steps=p, recall=float(ok)) for s, ok in zip(samples, right)]
    return rows


def table(rows, metric="recall", by="length"):
    """Tasks x lengths (or by="steps": x forward passes), one line per task and arm: mean +- half the 95 % interval, in %."""
    columns = sorted({r[by] for r in rows})
    head = f"{metric + ' by ' + by:<18}{'arm':<9}" + "".join(f"{c:>14}" for c in columns)
    lines = [head + ("      chance" if metric == "recall" else "")]
    for task in dict.fromkeys(r["task"] for r in rows):
        for arm in dict.fromkeys(r["arm"] for r in rows):
            cells = [[r for r in rows if (r["task"], r["arm"], r[by]) == (task, arm, c)] for c in columns]
            stats = [interval([r[metric] for r in cell]) for cell in cells]
            chance = 100 * sum(r["chance"] for r in cells[0]) / len(cells[0])
            lines.append(f"{task:<18}{arm:<9}" + "".join(f"{100 * m:>8.1f} ±{100 * w:>4.1f}" for m, w in stats)
                         + (f"{chance:>12.1f}" if metric == "recall" else ""))
    return "\n".join(lines)


def bootstrap(values, draws=2000):
    """Half the width of the 95 % bootstrap interval of the mean (percentiles, fixed seed)."""
    x = np.asarray(values)
    means = x[np.random.default_rng(0).integers(len(x), size=(draws, len(x)))].mean(1)
    return (np.quantile(means, 0.975) - np.quantile(means, 0.025)) / 2


def table_over_seeds(files, metric, by, against=None, tasks=TASKS):
    """One table from saved JSONL files, in %: mean over training seeds ± their standard deviation. A line's name is that of the
    run's folder, without "-seedN", and the arm. against: the name of a line; then every line shows its mean difference to that
    one on the same texts and training seeds, ± half the 95 % bootstrap interval over texts. ValueError: file and line."""
    groups, columns = {}, set()                 # {(task, line): {column: {(training seed, text): value}}}
    for file in files:
        name, seed = re.fullmatch(r"(.*?)(?:-seed(\d+))?", Path(file).parent.name).groups()
        for number, line in enumerate(Path(file).read_text().splitlines(), 1):
            try:
                r = json.loads(line)
                text, column, value = (seed, *(r[k] for k in ("task", "seed", "length", "steps", "prompt"))), r[by], float(r[metric])
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f"{file}, line {number}: not a row that niah.py wrote ({type(e).__name__}: {e})") from None
            if r["task"] in tasks:
                columns.add(column)
                for task in (r["task"], "all"):
                    groups.setdefault((task, f"{name} {r['arm']}"), {}).setdefault(column, {})[text] = value
    if against and not any(line == against for _, line in groups):
        raise ValueError(f"--against {against!r}: the lines are {', '.join(sorted({line for _, line in groups}))}")
    lines = [f"{metric + ' by ' + by:<18}{'run, arm':<26}" + "".join(f"{c:>14}" for c in sorted(columns)) + "  seeds"]
    for (task, name), cells in sorted(groups.items(), key=lambda g: [*TASKS, "all"].index(g[0][0])):
        if task == "all" and len({t for t, _ in groups}) == 2:              # one task: no average of its own
            continue
        text, n_seeds = "", 0
        for c in sorted(columns):
            cell, base = cells.get(c, {}), groups.get((task, against), {}).get(c, {})
            values, n_seeds = {}, max(n_seeds, len({key[0] for key in cell}))
            for key, value in cell.items():                                 # averaged over texts, or differences over seeds
                if not against or key in base:
                    values.setdefault(key[1:] if against else key[0], []).append(value - base[key] if against else value)
            means = [sum(v) / len(v) for v in values.values()]
            spread = bootstrap(means) if against and means else np.std(means, ddof=min(1, len(means) - 1)) if means else 0
            text += f"{100 * np.mean(means):>{'+' if against else ''}8.1f} ±{100 * spread:>4.1f}" if means else f"{'-':>14}"
        lines.append(f"{task:<18}{name:<26}{text}{n_seeds:>7}")
    return "\n".join(lines)


def grid(rows, arm, down, across, label, colour):
    """Recall, %, of one arm by two properties of a row: down and across are functions of it; a coloured background where the
    output is a terminal."""
    cells = {}
    for r in rows:
        if r["arm"] == arm:
            cells.setdefault(down(r), {}).setdefault(across(r), []).append(r["recall"])
    columns = sorted({c for row in cells.values() for c in row})
    lines = [f"  {label:<18}" + "".join(f"{c:>5} " for c in columns) + f"  arm: {arm}"]
    for name in sorted(cells):
        means = [sum(x) / len(x) if (x := cells[name].get(c)) else math.nan for c in columns]
        shades = [0 if math.isnan(m) else [196, 208, 226, 118, 46][min(4, int(m * 5))] for m in means]
        texts = ["    - " if math.isnan(m) else f"{100 * m:5.0f} " for m in means]
        lines.append(f"  {name:<18}" + "".join(f"\x1b[30;48;5;{shade}m{text}\x1b[0m" if colour else text
                                              for text, shade in zip(texts, shades)))
    return "\n".join(lines)


def arguments():
    parser = argparse.ArgumentParser(description="Needle-in-a-haystack accuracy, memory off and on, on the same samples.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="JSONL", help="instead: one table from saved files, mean ± sd over seeds")
    parser.add_argument("--against", metavar="LINE", help="with --rows: paired differences to this line, for example \"mdlm off\"")
    parser.add_argument("--by", choices=["length", "steps"], default="length", help="columns of the --rows table")
    parser.add_argument("--checkpoint", help="a folder written by train.py, a hub name, or an adapter folder")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 128, 256],
                        help="context lengths in tokens; the tiny model is trained up to 64")
    parser.add_argument("--n", type=int, default=100, help="samples per cell")
    parser.add_argument("--seed", type=int, default=1, help="seed of the evaluation texts")
    parser.add_argument("--exposure", action="store_true",
                        help="instead: exposure bias per denoising step, published and clean ratio")
    parser.add_argument("--probe", action="store_true",
                        help="instead: a linear probe: can resolve's answer be read from MetaState's slots after each pass?")
    parser.add_argument("--gen_length", type=int, default=BUDGET, help="answer tokens")
    parser.add_argument("--steps", nargs="+", type=int, default=[None],
                        help="denoising steps (default: one per answer token); several: a table by steps")
    parser.add_argument("--passes", type=int,
                        help="instead: recall after 1..PASSES passes over an unchanged, fully masked answer")
    parser.add_argument("--arms", nargs="+", help="only these arms (default: all that the checkpoint has)")
    parser.add_argument("--metric", choices=["recall", "exact"], default="recall",
                        help="recall: RULER's; exact: order and number count")
    parser.add_argument("--out", help="JSONL of every sample's output (default: niah.jsonl, with --passes passes.jsonl, "
                        "in CHECKPOINT; for a hub name here)")
    parser.add_argument("--device", help="default: cuda, mps or cpu, whichever is there")
    return parser


def main():
    parser = arguments()
    args = parser.parse_args()
    counts = [args.n, args.gen_length, *args.lengths, *(x for x in (*args.steps, args.passes) if x is not None)]
    if min(counts) < 1:
        raise ValueError("--n, --lengths, --gen_length, --steps and --passes must be at least 1")
    if args.rows:
        return print(table_over_seeds(args.rows, args.metric, args.by, args.against, args.tasks))
    if not args.checkpoint:
        parser.error("--checkpoint (or --rows) is needed")
    backbone, tokenizer, arms = load_arms(args.checkpoint, args.device)
    unknown = set(args.arms or []) - set(arms)
    if unknown:
        raise ValueError(f"this checkpoint has the arms {', '.join(arms)}, not {', '.join(sorted(unknown))}")
    arms = {a: arms[a] for a in args.arms or arms}
    if max(args.lengths) + args.gen_length > backbone.cfg.max_len:
        raise ValueError(f"length {max(args.lengths)} + {args.gen_length} exceeds the model's limit of {backbone.cfg.max_len}")
    file = "passes.jsonl" if args.passes else "niah.jsonl"
    out = args.out or (Path(args.checkpoint) / file if Path(args.checkpoint).is_dir() else file)
    by_steps = len(args.steps) > 1 or args.passes
    if (by_steps or args.exposure or args.probe) and len(args.lengths) > 1:
        raise ValueError("--passes, --exposure, --probe and several --steps need one length, for example --lengths 64")
    if args.exposure:
        return print(exposure(backbone, tokenizer, arms, args.tasks, args.lengths[0], args.n, args.seed))
    if args.probe:
        if "metastate" not in arms:
            raise ValueError(f"--probe reads MetaState's slots; this checkpoint has the arms {', '.join(arms)}")
        rows = probe(backbone, tokenizer, arms["metastate"], args.lengths[0], args.n, args.seed, args.passes or BUDGET)
        return print(grid(rows, "probe", lambda r: r["hops"], lambda r: r["steps"], "hops, by steps", sys.stdout.isatty()))
    if args.passes:
        rows = recompute(backbone, tokenizer, arms, args.tasks, args.lengths[0], args.n, args.seed, args.passes, out)
    else:
        rows = evaluate(backbone, tokenizer, arms, args.tasks, args.lengths, args.n, args.seed, out, args.gen_length, args.steps,
                        checkpoint=args.checkpoint)
    print(table(rows, args.metric, "steps" if by_steps else "length"))
    needle_rows, hop_rows = ([r for r in rows if r["task"] in some] for some in (("single", "multikey"), ("resolve",)))
    fifths, colour = ("0-20 %", "20-40 %", "40-60 %", "60-80 %", "80-100 %"), sys.stdout.isatty()
    for arm in arms:
        if needle_rows and not by_steps:
            depth = lambda r: fifths[min(4, int(5 * r["depth"]))]
            print("\n" + grid(needle_rows, arm, depth, lambda r: r["length"], "depth, by length", colour))
        if hop_rows and by_steps:
            print("\n" + grid(hop_rows, arm, lambda r: r["hops"], lambda r: r["steps"], "hops, by steps", colour))
    print(f"\n{args.n} samples a cell, 95 % intervals over samples; every output: {out}")


if __name__ == "__main__":
    cli(main)
