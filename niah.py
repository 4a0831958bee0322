"""Needle-in-a-haystack tasks, for training and evaluation: the answer lies somewhere in the text.

Sources: RULER (arXiv 2404.06654) and BABILong (2406.10149), the benchmarks behind MemDLM's tables.
Idea: the haystack is filler, the needles are facts "key = value ." between its sentences, the
question comes last with the asked key right before the answer. Each task is a miniature of the
original and says what was changed. Without distractor needles "copy every value" scores 100 %.
Scoring: RULER's recall = mean over the references of [reference is a substring of the output, upper
and lower case alike]. BABILong's (stories) = the target is the only place that the output's first
sentence names, as in its own code; the harness that MemDLM used takes any output that holds the
target. Beside it exact match, which is stricter: order and number count too.
Held out: training and evaluation draw from different seeds and, in all tasks but stories and
common, from disjoint sets of pairs: a right answer was read from the prompt, not remembered.
Left out: essays as filler, 7-digit numbers, UUIDs (closed vocabulary), RULER's one-shot examples.
Run: python niah.py --checkpoint runs/memdlm
"""
import math
import os
import random
import re
from argparse import ArgumentParser
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

from backbone import add_flags, cli, encode, encode_prompt, given_flags, option, read_lines
from memdlm import ClosedBook, MemDLMConfig, fixed_memory
from sample import (append_rows, chosen_arms, cut, estimate, generate, inner_loop_settings,
                    join_ranks, left_pad, load_arms, ranks, show_estimate, write_texts)

# 0. The closed vocabulary: every text of the tiny model is made of these words --------------------

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
    """Word -> id, 139 entries. A word outside it is an error that names it, never an [UNK]."""
    words = (SPECIALS + FUNCTION_WORDS + KEYS + VALUES + PEOPLE + PLACES + OBJECTS
             + FILLER_NOUNS + FILLER_ADJECTIVES)
    return {word: i for i, word in enumerate(words)}


def tiny_tokenizer():
    """Splits at white space; text -> ids -> text is the identity. A transformers tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel(vocabulary(), unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(zip(("pad_token", "mask_token", "eos_token"), SPECIALS))
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


@dataclass
class Sample:
    task: str
    prompt: str
    answer: str          # what the response should be, word for word (exact match)
    refs: list           # what must occur in it (recall)
    chance: float        # recall of a guesser who copies random candidates of the right kind
    depth: float = 0.0   # where the asked needle lies: 0 = first sentence, 1 = last
    hops: int = 0        # facts to go through before the one that holds the answer
    length: int = 0      # nominal context length

    def score(self, output):
        """Recall, and whether the output is the answer word for word."""
        found = recall(self.refs, output)
        if self.task == "stories":
            found = float(labels_in(output.split(".")[0]) == self.refs)
        return found, float(output.split() == self.answer.split())

    @property
    def text(self):
        """What the closed book writes into the weights and then hides."""
        return self.prompt[:self.prompt.rindex("?")].strip()

    @property
    def question(self):
        return self.prompt[self.prompt.rindex("?"):]


# 1. What the tasks are made of --------------------------------------------------------------------

@lru_cache(maxsize=None)
def for_evaluation(first, second):
    """A fixed fifth of all pairs of words: in evaluation texts only, the others in training."""
    return random.Random(f"{first} {second}").random() < 0.2


def pick(rng, words, used, split, after=None):
    """A word not in `used`; with `after`, one whose pair (after, word) belongs to the split."""
    for _ in range(300):
        word = rng.choice(words)
        allowed = after is None or for_evaluation(after, word) == (split == "eval")
        if allowed and word not in used:
            used.add(word)
            return word
    raise LookupError("no partner left")        # rare; make_samples draws another text


def hide(rng, facts, query, length, count, asked):
    """Facts in their order between as many filler sentences as fit into `length` tokens, counted by
    count(text). Returns the text and the depth, 0..1, of the asked fact."""
    # a noun keeps its adjective in a text: a structure to learn, unlike RULER's five sentences
    adjective = {noun: rng.choice(FILLER_ADJECTIVES) for noun in FILLER_NOUNS}
    room = max(0, length - count(" ".join(facts + [query])))
    nouns = rng.choices(FILLER_NOUNS, k=room // count("the sky is blue ."))
    lines = [f"the {noun} is {adjective[noun]} ." for noun in nouns]
    while lines and count(" ".join(facts + lines + [query])) > length:
        lines.pop()
    n = len(facts) + len(lines)
    places = sorted(rng.sample(range(n), len(facts)))
    for place, fact in zip(places, facts):
        lines.insert(place, fact)               # in ascending order: at its final index
    return " ".join(lines + [query]), places[facts.index(asked)] / max(1, n - 1)


def count_words(text):
    return text.count(" ") + 1


# 2. Tasks. Each takes (rng, length, split, count) and returns a Sample ----------------------------

def needles(task, rng, length, split, count, n_keys, n_values):
    """One key with n_values values is asked for, among n_keys - 1 distractors with one each."""
    keys, values, facts = set(), set(), []
    for n in [n_values] + [1] * (n_keys - 1):
        key = pick(rng, KEYS, keys, split)
        facts += [(key, pick(rng, VALUES, values, split, after=key)) for _ in range(n)]
    asked = facts[0][0]
    rng.shuffle(facts)
    refs = [value for key, value in facts if key == asked]      # in the order of appearance
    lines = [f"{key} = {value} ." for key, value in facts]
    text, depth = hide(rng, lines, f"? {asked} =", length, count, f"{asked} = {refs[0]} .")
    return Sample(task, text, " ".join(refs), refs, n_values / len(values), depth, 0, length)


def chains(task, rng, length, split, count, hops, shuffled, direct=False):
    """Two chains "a = 47 . b = a .": which names hold 47, or (direct) what does the last hold?"""
    used, values, pair = set(), set(), []
    for _ in range(2):
        names = [pick(rng, KEYS, used, split)]
        for _ in range(hops):
            names.append(pick(rng, KEYS, used, split, after=names[-1]))
        pair.append((pick(rng, VALUES, values, split, after=names[0]), names))
    lines = [[f"{a} = {b} ." for a, b in zip(names, [value] + names)] for value, names in pair]
    # the two chains are interleaved, each with its definitions before their use
    order = [0] * (hops + 1) + [1] * (hops + 1)
    rng.shuffle(order)
    facts = [lines[chain].pop(0) for chain in order]
    if shuffled:
        rng.shuffle(facts)
    value, names = pair[0]
    query, refs = (f"? {names[-1]} is", [value]) if direct else (f"? = {value}", names)
    text, depth = hide(rng, facts, query, length, count, f"{names[0]} = {value} .")
    return Sample(task, text, " ".join(refs), refs, 0.5, depth, hops, length)


def resolve(rng, length, split, count, least=0, most=4):
    """Variable tracking the other way round: "? c is" asks for the value c holds, `least` to `most`
    hops up its chain. No name on the way may be written down: without a memory it is lost."""
    hops = rng.randint(least, most)
    return chains("resolve", rng, length, split, count, hops=hops, shuffled=True, direct=True)


def common(rng, length, split, count):
    """RULER common words, no filler: 3 words (RULER: 10) stand 6 times as often as all others."""
    words = rng.sample(KEYS, len(KEYS))
    top = sorted(words[:3], key=KEYS.index)
    per_word = (count(" ".join(KEYS)) + 2) / len(KEYS)
    room = length / per_word - 4
    times = max(1, round(room / (6 * 3 + len(words) - 3)))
    rest = words[3:][:max(6, int(room / times) - 6 * 3)]
    listing = top * (6 * times) + rest * times
    rng.shuffle(listing)
    text = " ".join(["list"] + listing + [". ? common"])
    return Sample("common", text, " ".join(top), top, 3 / (3 + len(rest)), 0.0, 0, length)


def stories(rng, length, split, count):
    """BABILong qa2: people take objects and move; where is the object? Left out: putting it down.
    The answer names holder and place (alone it was not learned in minutes); the place counts."""
    place, holder, facts = {}, {}, []
    while len(facts) < 8:
        who, thing = rng.choice(PEOPLE), rng.choice(OBJECTS)
        free = who in place and thing not in holder
        if free and (rng.random() < 0.3 or len(facts) == 7 and not holder):
            holder[thing] = who
            facts.append(f"{who} took {thing} .")
        else:
            place[who] = rng.choice([p for p in PLACES if p != place.get(who)])
            facts.append(f"{who} moved {place[who]} .")
    if not holder:
        raise LookupError("nothing was taken")
    asked = rng.choice(sorted(holder))
    who = holder[asked]
    text, depth = hide(rng, facts, f"? where {asked}", length, count, f"{who} took {asked} .")
    chance = 1 / len(labels_in(text))
    return Sample("stories", text, f"{who} {place[who]}", [place[who]], chance, depth, 1, length)


def facts(rng, length, split, count, n=None, most=24):
    """For fast weights: n keys with one value each (default: 1 to `most`), one is asked for."""
    return needles("facts", rng, length, split, count, n or rng.randint(1, most), n_values=1)


def ask(sample, questions, rng):
    """The same text with several of its facts asked for, one a sample, all equally often."""
    found = re.findall(r"(\w+) = (\w+) \.", sample.text)
    rng.shuffle(found)
    asked = (found * questions)[:questions]
    return [replace(sample, prompt=f"{sample.text} ? {key} =", answer=value, refs=[value])
            for key, value in asked]


TASKS = {
    # RULER niah_single. No distractor, so copying the only number scores 100: a smoke test.
    "single": partial(needles, "single", n_keys=1, n_values=1),
    # RULER niah_multikey_1: four keys, one is asked for.
    "multikey": partial(needles, "multikey", n_keys=4, n_values=1),
    # RULER niah_multivalue: all four values of one key. The three distractor keys are ours.
    "multivalue": partial(needles, "multivalue", n_keys=4, n_values=4),
    # RULER variable tracking: "a = 47 . b = a . c = b ." and the question which names hold 47.
    # Differs: a second chain as distractor, and the number of names is not told.
    "tracking": partial(chains, "tracking", hops=2, shuffled=False),
    # The same with RULER's 4 hops, and lines shuffled, so that no reading order helps.
    "tracking4": partial(chains, "tracking4", hops=4, shuffled=True),
    "resolve": resolve, "common": common, "stories": stories}
# No backbone is pretrained on these: facts is for fast weights, more_hops for longer walks of slots
ALL_TASKS = {**TASKS, "facts": facts, "more_hops": partial(resolve, least=5, most=6)}


def make_samples(tasks, length, n, seed, split="train", count=count_words):
    """n samples of tasks (names or functions) drawn at random; equal arguments, equal samples."""
    rng = random.Random(f"{split} {seed}")
    samples = []
    while len(samples) < n:
        task = rng.choice(tasks)
        with suppress(LookupError):
            samples.append(ALL_TASKS.get(task, task)(rng, length, split, count))
    return samples


# 3. From texts to ids, and from answers to scores -------------------------------------------------

BUDGET = 6              # answer tokens of the tiny model: five names and the end of text
INTRO = ("Answer the question after the question mark from the facts hidden in this text, "
         "with the bare words.\n")


def answer_budget(tokenizer):
    """Tokens for the longest answer, five names, and the end of text. RULER has one per task."""
    longest = sorted(KEYS, key=lambda name: len(encode(tokenizer, f" {name}")))[-5:]
    return len(encode(tokenizer, " ".join(longest))) + 1


def token_counter(tokenizer, config):
    """A text's length in tokens of this model, as in RULER; for the tiny one spaces are faster."""
    return count_words if config.family == "tiny" else lambda text: len(encode(tokenizer, text))


def encoded_samples(backbone, tokenizer, tasks, length, n, seed, gen_length):
    """n samples, the ids of their prompts, with an introduction for a model not trained on them."""
    config, count = backbone.cfg, token_counter(tokenizer, backbone.cfg)
    # no text is made that is far too long
    samples = make_samples(tasks, min(length, 2 * config.max_len), n, seed, "eval", count)
    intro = "" if config.family == "tiny" else INTRO
    prompts = [encode_prompt(tokenizer, config, intro + sample.prompt) for sample in samples]
    longest = max(length, *map(len, prompts))
    if longest + gen_length > config.max_len:
        raise ValueError(f"--lengths {length}: a prompt of {longest} tokens + {gen_length} for the "
                         f"answer exceeds the model's limit of {config.max_len}")
    return samples, prompts


def batches(length, *lists):
    """Equal pieces of all lists, smaller ones for long texts."""
    size = max(1, 6400 // max(64, length))
    for i in range(0, len(lists[0]), size):
        yield [some[i:i + size] for some in lists]


def recall(refs, output):
    """RULER's string_match_all: the share of references that are substrings of the output."""
    return sum(ref.lower() in output.lower() for ref in refs) / len(refs)


def labels_in(text):
    """The places that a text names: BABILong's labels."""
    return [place for place in PLACES if place in text.lower()]


def scored(sample, ids, tokenizer, config, **columns):
    """A row of results: columns, the sample, and what the answer ids (gen_length,) are worth."""
    output = tokenizer.decode(cut(ids, config), skip_special_tokens=False)
    found, exact = sample.score(output)
    fields = asdict(sample)
    entries = fields.pop("entries", {})
    return {**entries, **columns, **fields, "output": output, "recall": found, "exact": exact}


def results(jobs, answer, tokenizer, config, out):
    """The rows of all jobs (samples, ...), one a sample; answer(*job) yields ids, {column: value}.
    Without `out`, in training, every process has a part of the layers, and so it does all jobs."""
    def work(job):
        return [scored(s, row, tokenizer, config, **columns)
                for ids, columns in answer(*job) for s, row in zip(job[0], ids)]
    return append_rows(jobs, work, out)


# 4. The benchmarks' own files ---------------------------------------------------------------------

# official answer lengths, by a part of the names of RULER's tasks; BABILong's is 16
BUDGETS = dict(niah=128, vt=30, cwe=120, fwe=50, qa=32)
ROOMS = "bathroom bedroom garden hallway kitchen office"     # the answers of BABILong's qa1 to qa4
LABELS = dict(qa5="bill fred jeff mary apple football milk", qa6="yes no", qa9="yes no",
              qa7="none one two three", qa8="apple football milk nothing", qa10="yes no maybe")


@dataclass
class Line(Sample):
    """A line of a benchmark's own file."""
    labels: tuple = ()      # all answers that the BABILong task knows
    entries: dict = None    # all that the line holds, but for the text

    def score(self, output):
        """RULER: string_match_all, qa: string_match_part. BABILong: recall is the harness's rule,
        exact the official: of labels not in the question the first sentence names the target."""
        found, exact = super().score(output)
        if self.labels:
            first, asked = output.lower().split(".")[0], self.entries["question"].lower()
            named = {label for label in self.labels if label in first and label not in asked}
            return found, float(named == set(self.answer.lower().split(",")))
        return float(found > 0) if self.task.startswith("qa") else found, exact


def read_benchmark(path, backbone, tokenizer, n=None, gen_length=None):
    """The first n lines of a RULER or BABILong file, without what the model's limit excludes -> a
    cell of `decode`. Task: its name or its folder's; length: the longest, in steps of 1,024."""
    task, limit = re.sub(r"[_-]?\d+k$", "", Path(path).stem), backbone.cfg.max_len
    if task in ("", "validation"):                      # RULER: niah_single_1/validation.jsonl
        task = Path(path).absolute().parent.name
    labels = tuple(LABELS.get(task.split("_")[-1], ROOMS).split())

    def read(raw, size):
        raw = raw if isinstance(raw, dict) and isinstance(raw.get("outputs", []), list) else {}
        ruler, begun, length = map(raw.get, ("outputs", "answer_prefix", "length"))
        text, *refs = [raw.get("input"), *(ruler or [raw.get("target"), raw.get("question")])]
        if not all(isinstance(x, str) for x in [text, begun or "", *refs]) or not all(refs) \
                or not isinstance(length or 0, int):
            raise ValueError("expected RULER's {\"input\": text, \"outputs\": [texts]} or "
                             "BABILong's {\"input\", \"question\", \"target\"}")
        if not ruler:
            text = f"{text}\n{refs.pop()}"
            if not set(refs[0].lower().split(",")) <= set(labels):
                raise ValueError(f"target {refs[0]!r:.40} is no answer of {task}: name a file of "
                                 "BABILong after its task, qa1 to qa10")
        fits = size < 100 * limit                       # no token has 100 bytes on average
        ids = encode_prompt(tokenizer, backbone.cfg, text, begun or "") if fits else []
        entries = {k: v for k, v in raw.items() if k != "input"}
        return ids, Line(task, text, " ".join(refs), refs, 0.0 if ruler else 1 / len(labels),
                         length=length or len(ids), entries=entries, labels=() if ruler else labels)
    lines = read_lines(path, read, n)
    official = [16 for _, s in lines if s.labels] + [BUDGETS[x] for x in BUDGETS if x in task]
    gen_length = gen_length or [*official, 128][0]
    fit = [(ids, s) for ids, s in lines if ids and len(ids) + gen_length <= limit]
    if len(fit) < len(lines) and ranks()[0] == 0:
        print(f"{path}: left out {len(lines) - len(fit)} of {len(lines)} samples longer than the "
              f"model's limit of {limit} tokens, {gen_length} of them for the answer")
    if not fit:
        raise ValueError(f"{path}: no sample is left")
    longest = max(s.length for _, s in fit)
    length = longest if longest <= 1024 else 1024 * math.ceil(longest / 1024)
    return gen_length, [replace(s, length=length) for _, s in fit], [ids for ids, _ in fit]


# 5. Evaluation: the same samples for every arm ----------------------------------------------------

def evaluate(backbone, tokenizer, arms, tasks, lengths, n, seed, out=None, gen_length=None,
             steps=None, **columns):
    """Decode n texts a task and length with every arm: `decode`."""
    gen_length = gen_length or answer_budget(tokenizer)
    # the longest first, so that one that does not fit is found at once
    cells = {cell: encoded_samples(backbone, tokenizer, [cell[1]], cell[0], n, seed, gen_length)
             for cell in product(sorted(lengths, reverse=True), tasks)}
    cells = [(gen_length, *cells[length, task]) for task, length in product(tasks, lengths)]
    return decode(backbone, tokenizer, arms, cells, out, steps, seed=seed, **columns)


def decode(backbone, tokenizer, arms, cells, out=None, steps=None, threshold=None, passes=None,
           inner=MemDLMConfig(), **columns):
    """The rows {task, length, steps, arm, depth, output, recall, exact, ...} of all cells
    (gen_length, samples, prompts), in LLaDA's settings for these tasks: one block, temperature 0.
    steps: numbers of denoising steps, by default (and with a threshold) one per answer token.
    passes: `repeat` instead. inner: of the arms that write prompts, whose cost is told."""
    numbers = [passes] if passes else steps if threshold is None else None
    jobs = [(*batch, gen_length, arm, number) for gen_length, samples, prompts in cells
            for arm, number in product(arms, numbers or [gen_length])
            for batch in batches(samples[0].length, samples, prompts)]

    def answer(samples, prompts, gen_length, arm, number):
        if passes:
            found = enumerate(repeat(backbone, arms[arm], prompts, passes, gen_length), 1)
        else:
            ids = generate(backbone, prompts, memory=arms[arm], gen_length=gen_length,
                           steps=number, remasking="low_confidence", threshold=threshold)
            found = [(number, (ids, None))]
        for number, (ids, _) in found:
            yield ids, dict(columns, arm=arm, steps=number)
    if out and ranks()[0] == 0:
        print(cost(backbone, jobs, inner), flush=True)
    return results(jobs, answer, tokenizer, backbone.cfg, out)


def cost(backbone, jobs, inner):
    """What the jobs of `decode` will take, in words."""
    text = f"at most {sum(passes for *_, passes in jobs):,} forward passes"
    sizes = [(len(ids), max(map(len, ids))) for _, ids, _, arm, _ in jobs if arm in ("on", "both")]
    if not sizes:
        return text
    # the paper: one step on each of two states of the whole prompt
    masks, chunk = getattr(inner, "masks", 2), getattr(inner, "chunk", 0) or backbone.cfg.max_len
    steps = sum(masks * math.ceil(n / chunk) for _, n in sizes)
    batch, length = max(sizes, key=math.prod)
    parts = estimate(backbone.cfg, "adapt", batch, min(length, chunk), 0, inner=inner,
                     weight_bytes=backbone.dtype.itemsize)
    parts = show_estimate(parts)
    return f"{text} and {steps:,} inner steps; memory to write {batch} x {length:,} tokens: {parts}"


@torch.no_grad()
def repeat(backbone, memory, prompts, passes, gen_length):
    """Redundant passes over the same, fully masked answers, MetaState's "Information Island": each
    yields the likeliest ids (n, gen_length) and the memory's state."""
    ids, attend = left_pad(prompts, backbone.cfg.pad_id, backbone.device)
    xt = F.pad(ids, (0, gen_length), value=backbone.cfg.mask_id)
    at, attend = (F.pad(x, (0, gen_length), value=True) for x in (torch.zeros_like(attend), attend))
    predict, state = memory(backbone, xt, attend, ids.shape[1])
    for _ in range(passes):
        logits, state = predict(xt, torch.ones(len(xt), device=xt.device), state, at)
        yield logits.argmax(-1).view(-1, gen_length), state


# 6. The closed book: the prompt is written into fast weights and then hidden ----------------------

CLOSED_ARMS = {
    "none": "no phi: the question alone",
    "written": "phi of the text, written before the question is known",
    "phi": "phi of the text, and of the question behind it",
    "other": "control: phi of another text",
    "random": "control: random factors of equal norm",
    "flipped": "control: every step with the wrong sign",
    "uncovered": "control: the asked value is in view while writing, but never a target",
    "open": "the prompt in view, no phi: what attention alone can do",
    "open+phi": "the prompt in view, and phi"}


def phi_of_arm(backbone, tokenizer, samples, arm, inner):
    """The fast weights that an arm of the closed book answers with, a row for each sample."""
    if arm in ("none", "open"):
        return None
    if arm == "flipped":
        inner = replace(inner, inner_lr=-inner.inner_lr)
    cover = [s.answer for s in samples] if arm == "uncovered" else None
    phi, *_ = write_texts(backbone, tokenizer, [s.text for s in samples], inner, cover=cover)
    if arm in ("phi", "open+phi"):
        # a chunk of its own: beside its fact the asked key would be copied, not bound to its value
        phi, *_ = write_texts(backbone, tokenizer, [s.question for s in samples], inner, phi)
    change = {"other": lambda x: x.roll(1, 0), "random": like}.get(arm)
    return {name: w.map(change) for name, w in phi.items()} if change else phi


def like(x):
    """Gaussian noise with the norm of each row of x (B, r, d)."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device)
    return noise * (x.norm(dim=(1, 2), keepdim=True) / noise.norm(dim=(1, 2), keepdim=True))


def closed_book(backbone, tokenizer, inner, *, arms, n_facts, lengths, n, seed, out=None,
                gen_length=None):
    """Recall with the prompt hidden: the canvas holds the question and the answer, nothing else.
    n_facts, lengths: lists; length 0 = the facts alone. Rows {arm, facts, length, recall, ...}."""
    config, count = backbone.cfg, token_counter(tokenizer, backbone.cfg)
    gen_length = gen_length or answer_budget(tokenizer)
    jobs = []
    for length, k in product(dict.fromkeys(lengths), dict.fromkeys(n_facts)):
        samples = make_samples([partial(facts, n=k)], length, n, f"{seed} {k} facts", "eval", count)
        # where so many facts do not fit, the texts are longer than the column would say
        if length == 0 or max(count(sample.prompt) for sample in samples) <= length:
            jobs += [(some, arm, k) for arm in arms for [some] in batches(length, samples)]

    def answer(samples, arm, k):
        phi = phi_of_arm(backbone, tokenizer, samples, arm, inner)
        shown = [s.prompt if arm.startswith("open") else s.question for s in samples]
        prompts = [encode_prompt(tokenizer, config, text) for text in shown]
        ids = generate(backbone, prompts, memory=fixed_memory(phi), gen_length=gen_length,
                       remasking="low_confidence")
        yield ids, dict(arm=arm, facts=k, seed=seed)
    return results(jobs, answer, tokenizer, config, out)


# 7. Tables ----------------------------------------------------------------------------------------

def interval(values):
    """Mean of values in 0..1, and half of Wilson's 95 % interval, which has a width where all are
    alike. The values' own variance stands for p (1 - p), the same where each is 0 or 1."""
    x = torch.tensor(values, dtype=torch.float64)
    n, z = len(x), 1.96
    spread = x.var(correction=0).item() / n + (z / (2 * n)) ** 2
    return x.mean().item(), z / (1 + z * z / n) * math.sqrt(spread)


def table(rows, metric="recall", by="length", down=("task", "arm"), short=False):
    """A line for each pair of values of two columns (down), a column for each value of a third
    (by): mean in %, and half the 95 % interval over texts; short: the mean alone."""
    def cell(values):
        if not values:
            return "-"
        mean, half = interval(values)
        return f"{100 * mean:.0f}" if short else f"{100 * mean:.1f} ±{100 * half:>4.1f}"
    columns, width = sorted({r[by] for r in rows}), 6 if short else 14
    groups = {}
    for r in rows:
        names = (f"{c} {r[c]}" if isinstance(r[c], int) else r[c] for c in down)
        groups.setdefault(tuple(names), []).append(r)
    lines = [(f"{metric} by {by}", down[1], columns, "chance")]
    for names, group in groups.items():
        cells = [cell([r[metric] for r in group if r[by] == c]) for c in columns]
        chance = sum(r["chance"] for r in group) / len(group)
        lines.append((*names, cells, f"{100 * chance:.1f}"))
    with_chance = metric == "recall" and not short
    return "\n".join(f"{first:<18}{second:<11}" + "".join(f"{c:>{width}}" for c in cells)
                     + f"{chance:>12}" * with_chance for first, second, cells, chance in lines)


def finer_table(rows, by):
    """For each arm single and multikey by depth and length, or resolve by hops and steps."""
    tasks, down = (["resolve"], "hops") if by == "steps" else (["single", "multikey"], "depth")
    fifths = [f"{low}-{low + 20} %" for low in range(0, 100, 20)]
    some = [dict(r, depth=fifths[min(4, int(5 * r["depth"]))]) for r in rows if r["task"] in tasks]
    some.sort(key=lambda r: (r["arm"], r[down]))
    return "\n" + table(some, by=by, down=("arm", down), short=True) if some else ""


def closed_table(rows):
    """The closed book's. Chance is what a memory of the values without their keys would give."""
    return (f"{table(rows, down=('facts', 'arm'))}\nlength 0: the facts alone; chance: one of the "
            f"values in the text (any value at all: {100 / len(VALUES):.1f})")


# 8. Command line ----------------------------------------------------------------------------------

@dataclass
class Evaluation:
    """What to measure: the flags of the command line."""
    checkpoint: str = option(None, "a folder written by train.py, a hub name, or an adapter folder")
    tasks: list = option(tuple(TASKS), "tasks", choices=tuple(ALL_TASKS))
    lengths: tuple = option((64, 128, 256), "context lengths in tokens; tiny is trained to 64", 0)
    data: list = option(None, "instead of --tasks and --lengths: files of RULER or BABILong")
    n: int = option(None, "samples per cell (default: 100; --data: the whole file)", 1)
    seed: int = option(1, "seed of the evaluation texts")
    gen_length: int = option(None, "answer tokens (default: the longest's; --data: official)", 1)
    steps: tuple = option(None, "denoising steps (default: one per answer token)", 1)
    threshold: float = option(None, "commit every token at least this sure, and ignore steps", 0)
    passes: int = option(None, "instead: recall after 1..PASSES passes over masked answers", 1)
    closed_book: bool = option(False, "instead: recall with the prompt hidden; --lengths may be 0")
    facts: tuple = option((1, 2, 4, 8, 16, 24), "closed book: numbers of facts in a text", 1, 24)
    arms: list = option(None, "only these arms (default: all that the checkpoint has)")
    metric: str = option("recall", "exact: order and number count; BABILong: its official rule, "
                         "recall the harness's", choices=("recall", "exact"))
    out: str = option(None, "all rows (default: CHECKPOINT/niah.jsonl, or what is measured .jsonl)")
    chat: bool = option(None, "prompts go through the chat template (default: as trained)")
    device: str = option(None, "default: cuda, mps or cpu, whichever is there")
    vocabulary: bool = option(False, "print the words of the tiny model's texts, and stop")


def main():
    parser = ArgumentParser(description="Needle-in-a-haystack accuracy, memory off and on.")
    add_flags(parser, Evaluation)
    how = Evaluation(**given_flags(Evaluation, parser.parse_args()))
    # 1. What can be told without the model
    if how.vocabulary:
        return print(" ".join(vocabulary()))
    if how.checkpoint is None:
        raise ValueError("--checkpoint is needed")
    if 0 in how.lengths and not how.closed_book:
        raise ValueError("--lengths must be at least 1, not 0 (--closed_book: 0 = the facts alone)")
    by = "steps" if how.passes or len(how.steps or ()) > 1 else "length"
    if by == "steps" and len(how.lengths) > 1 and not how.data:
        raise ValueError("--passes and several --steps need one length, for example --lengths 64")
    for path in how.data or ():
        if not Path(path).is_file():
            raise ValueError(f"--data {path}: no such file")
    name = ("closed_book" if how.closed_book else "passes" if how.passes
            else "benchmark" if how.data else "niah")
    folder = Path(how.checkpoint) if Path(how.checkpoint).is_dir() else Path()
    out = Path(how.out or folder / f"{name}.jsonl")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise OSError(f"--out {out} cannot be written: it must be a file, in a folder that exists")
    # 2. The arms
    join_ranks(how)
    *model, arms = load_arms(how.checkpoint, how.device, None, how.chat)
    inner = inner_loop_settings(how.checkpoint)
    arms = dict(CLOSED_ARMS) if how.closed_book else arms
    if not isinstance(inner, ClosedBook):
        arms.pop("uncovered", None)                     # the paper's loop has no choice of targets
    arms = chosen_arms(arms, how.arms or arms)
    # 3. The rows, and a table of them
    texts = dict(n=how.n or 100, seed=how.seed, out=out, gen_length=how.gen_length)
    more = dict(steps=how.steps, threshold=how.threshold, passes=how.passes,
                inner=inner, checkpoint=how.checkpoint)
    if how.closed_book:
        rows = closed_book(*model, inner, arms=arms, n_facts=how.facts, lengths=how.lengths,
                           **texts)
    elif how.data:
        cells = [read_benchmark(path, *model, how.n, how.gen_length) for path in how.data]
        rows = decode(*model, arms, cells, out, **more)
    else:
        rows = evaluate(*model, arms, how.tasks, how.lengths, **texts, **more)
    if ranks()[0] > 0:
        return
    if how.closed_book:
        print(closed_table(rows))
    else:
        print(table(rows, how.metric, by), finer_table(rows, by), sep="\n")
    print(f"\n{len(rows):,} answers, in %, ± half the 95 % interval over texts, all in {out}")


if __name__ == "__main__":
    cli(main)
