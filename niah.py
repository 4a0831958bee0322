"""Needle-in-a-haystack tasks: text whose answer lies somewhere in it, at any length; for training
and for evaluation alike.

Sources: RULER (arXiv 2404.06654) and BABILong (2406.10149), the benchmarks behind MemDLM's tables.
Each task below is a miniature with the same structure; its docstring says what was changed.
Idea: the haystack is filler, the needles are facts "key = value ." between its sentences, the
question comes last with the asked key right before the answer. Distractor needles are mandatory:
without them "copy every value you see" scores 100 %.
Scoring: RULER's recall = mean over the references of [reference is a substring of the output, upper
and lower case alike]. BABILong's (stories) = the target is the only place that the output's first
sentence names, as in its own code; the harness that MemDLM used takes any output that holds the
target. Beside it exact match, which is stricter: order and number count too.
Held out: training and evaluation draw from different seeds. In all tasks but stories and common
they also draw from disjoint sets of pairs: a "key = value" of the evaluation never occurs in
training, so a right answer was read from the prompt, not remembered.
Left out: essays as filler, 7-digit numbers, UUIDs (closed vocabulary), RULER's one-shot examples.
Run: python niah.py --checkpoint runs/memdlm  (tasks x lengths, memory off and on; depth grid; rows)
"""
import json
import math
import random
import re
import sys
from argparse import ArgumentParser
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from backbone import LowRank, add_flags, cli, encode, encode_prompt, given_flags, option
from memdlm import adapt_to_prompt, exposure_bias, written
from sample import cut, generate, inner_loop_settings, left_pad, load_arms

# --------------------------------------------------------------------------------------------------
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
# "dropped" stands in no text. It stays because all ids, and so all measured numbers, depend on it.
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
    pad, mask, eos = SPECIALS
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, mask_token=mask,
                                   eos_token=eos)


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

    @property
    def context(self):
        """What the closed book writes into the weights and then hides."""
        return self.prompt[:self.prompt.rindex("?")].strip()

    @property
    def question(self):
        return self.prompt[self.prompt.rindex("?"):]


# --------------------------------------------------------------------------------------------------
# 1. Pieces.

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
    # rare; make_samples draws another text
    raise LookupError("no partner left")


def filler(rng, n):
    """n sentences "the sky is blue ." in which a noun keeps its adjective throughout a text: there
    is a structure to learn, unlike in random words and in RULER's five fixed sentences."""
    adjective = {noun: rng.choice(FILLER_ADJECTIVES) for noun in FILLER_NOUNS}
    return [f"the {noun} is {adjective[noun]} ." for noun in rng.choices(FILLER_NOUNS, k=n)]


def hide(rng, facts, query, length, count):
    """Facts in their order between as many filler sentences as fit into `length` tokens.

    count(text) measures in tokens of the model's own tokenizer, as RULER does. Returns the text and
    the depth of each fact, 0..1."""
    room = length - count(" ".join(facts + [query]))
    lines = filler(rng, max(0, room) // count("the sky is blue ."))
    while lines and count(" ".join(facts + lines + [query])) > length:
        lines.pop()
    n = len(facts) + len(lines)
    places = sorted(rng.sample(range(n), len(facts)))
    # in ascending order each insertion lands at its final index
    for place, fact in zip(places, facts):
        lines.insert(place, fact)
    return " ".join(lines + [query]), [place / max(1, n - 1) for place in places]


def count_words(text):
    return text.count(" ") + 1


# --------------------------------------------------------------------------------------------------
# 2. Tasks. Each takes (rng, length, split, count) and returns a Sample.

def needles(task, rng, length, split, count, n_keys, n_values):
    """One key with n_values values is asked for, among n_keys - 1 distractors with one each."""
    keys = set()
    values = set()
    asked = pick(rng, KEYS, keys, split)
    facts = [(asked, pick(rng, VALUES, values, split, after=asked)) for _ in range(n_values)]
    for _ in range(n_keys - 1):
        key = pick(rng, KEYS, keys, split)
        facts.append((key, pick(rng, VALUES, values, split, after=key)))
    rng.shuffle(facts)
    # in the order of appearance
    refs = [value for key, value in facts if key == asked]
    lines = [f"{key} = {value} ." for key, value in facts]
    text, depths = hide(rng, lines, f"? {asked} =", length, count)
    depth = depths[[key for key, _ in facts].index(asked)]
    return Sample(task, text, " ".join(refs), refs, n_values / len(values), depth, 0, length)


def single(*args):
    """RULER niah_single: one needle at a random depth. No distractor, so copying the only number
    scores 100: a smoke test."""
    return needles("single", *args, n_keys=1, n_values=1)


def multikey(*args):
    """RULER niah_multikey_1: four keys, one is asked for."""
    return needles("multikey", *args, n_keys=4, n_values=1)


def multivalue(*args):
    """RULER niah_multivalue: four values of one key, all asked for. Ours adds three distractor keys
    (RULER has none)."""
    return needles("multivalue", *args, n_keys=4, n_values=4)


def chains(task, rng, length, split, count, hops, shuffled, direct=False):
    """Two chains "a = 47 . b = a .": which names hold 47, or (direct) what does the last hold?"""
    used = set()
    values = set()
    pair = []
    for _ in range(2):
        names = [pick(rng, KEYS, used, split)]
        for _ in range(hops):
            names.append(pick(rng, KEYS, used, split, after=names[-1]))
        value = pick(rng, VALUES, values, split, after=names[0])
        pair.append((value, names))
    lines = [[f"{a} = {b} ." for a, b in zip(names, [value] + names)] for value, names in pair]
    # the two chains are interleaved, each with its definitions before their use
    order = [0] * (hops + 1) + [1] * (hops + 1)
    rng.shuffle(order)
    facts = [lines[chain].pop(0) for chain in order]
    if shuffled:
        rng.shuffle(facts)
    value, names = pair[0]
    query = f"? {names[-1]} is" if direct else f"? = {value}"
    refs = [value] if direct else names
    text, depths = hide(rng, facts, query, length, count)
    depth = depths[facts.index(f"{names[0]} = {value} .")]
    return Sample(task, text, " ".join(refs), refs, 0.5, depth, hops, length)


def tracking(*args):
    """RULER variable tracking with 2 hops: "a = 47 . b = a . c = b ." and the question which names
    hold 47. Kept: definition before use, random gaps, recall over the names. Differs: RULER has one
    chain, in order, and its prompt tells how many variables to name; here is a second chain as
    distractor, and the number is not told."""
    return chains("tracking", *args, hops=2, shuffled=False)


def tracking4(*args):
    """Variable tracking with RULER's 4 hops. Differs as tracking does, and the lines are shuffled,
    so that no reading order helps."""
    return chains("tracking4", *args, hops=4, shuffled=True)


def resolve(rng, length, split, count):
    """Variable tracking the other way round, answered at once: "? c is" asks for the value c holds,
    0 to 4 hops up its chain. No name on the way may be written down, so what one pass has worked
    out is lost to the next, unless there is a memory."""
    hops = rng.randint(0, 4)
    return chains("resolve", rng, length, split, count, hops=hops, shuffled=True, direct=True)


def common(rng, length, split, count):
    """RULER common words: 3 words stand 6 times as often as all others (its own ratio below 4K
    tokens). Longer texts repeat more; there is no filler. Differs: RULER asks for ten words, in a
    numbered list; the answer here is in vocabulary order."""
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
    """BABILong qa2, two supporting facts: people take objects and move; where is the object? Kept:
    the latest fact wins, an object moves with its holder, facts keep their order between filler
    sentences. Left out: putting objects down. The answer names the holder, then the place (the
    place alone was not learned in minutes); only the place is scored. Chance: one of its places."""
    place, holder, facts = {}, {}, []
    while len(facts) < 8:
        who = rng.choice(PEOPLE)
        thing = rng.choice(OBJECTS)
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
    text, depths = hide(rng, facts, f"? where {asked}", length, count)
    depth = depths[facts.index(f"{who} took {asked} .")]
    chance = 1 / len(labels_in(text))
    return Sample("stories", text, f"{who} {place[who]}", [place[who]], chance, depth, 1, length)


def facts(rng, length, split, count, n=None, most=24):
    """For fast weights: n keys with one value each (default: 1 to `most`), one is asked for."""
    n_keys = n or rng.randint(1, most)
    return needles("facts", rng, length, split, count, n_keys=n_keys, n_values=1)


def ask(sample, questions, rng):
    """The same text with several of its facts asked for, one a sample, each at most once more often
    than another."""
    found = re.findall(r"(\w+) = (\w+) \.", sample.context)
    rng.shuffle(found)
    asked = (found * questions)[:questions]
    return [replace(sample, prompt=f"{sample.context} ? {key} =", answer=value, refs=[value])
            for key, value in asked]


TASKS = {f.__name__: f for f in (single, multikey, multivalue, tracking, tracking4, resolve, common,
                                 stories)}
# facts is for fast weights: no backbone is pretrained on it
ALL_TASKS = {**TASKS, "facts": facts}


def make_samples(tasks, length, n, seed, split="train", count=count_words):
    """n samples, tasks drawn at random; equal arguments, equal samples. split: train or eval.
    tasks: names in ALL_TASKS, or functions."""
    rng = random.Random(f"{split} {seed}")
    samples = []
    while len(samples) < n:
        task = rng.choice(tasks)
        try:
            samples.append(ALL_TASKS.get(task, task)(rng, length, split, count))
        except LookupError:
            continue
    return samples


# --------------------------------------------------------------------------------------------------
# 3. From texts to ids, and from answers to scores.

BUDGET = 6              # answer tokens of the tiny model: five names and the end of text
INTRO = ("Answer the question after the question mark from the facts hidden in this text, "
         "with the bare words.\n")


def answer_budget(tokenizer):
    """Tokens for the longest answer, five names, and the end of text. RULER has one per task."""
    longest = sorted(KEYS, key=lambda name: len(encode(tokenizer, f" {name}")))[-5:]
    return len(encode(tokenizer, " ".join(longest))) + 1


def token_counter(tokenizer, config):
    """How long is a text, in tokens of this model. For the tiny one counting spaces is faster."""
    return count_words if config.family == "tiny" else lambda text: len(encode(tokenizer, text))


def encode_sample(tokenizer, config, sample):
    """A prompt's ids (L,), with an introduction for a model that was not trained on the tasks."""
    intro = "" if config.family == "tiny" else INTRO
    return torch.tensor(encode_prompt(tokenizer, config, intro + sample.prompt))


def encoded_samples(backbone, tokenizer, tasks, length, n, seed, gen_length):
    """n evaluation samples and their prompts (1-D id tensors). ValueError if one is too long."""
    config = backbone.cfg

    def check(tokens):
        if tokens + gen_length > config.max_len:
            raise ValueError(f"--lengths {length}: a prompt of {tokens} tokens + {gen_length} for "
                             f"the answer exceeds the model's limit of {config.max_len}")
    # first the nominal length, before a text of that length is made
    check(length)
    samples = make_samples(tasks, length, n, seed, "eval", token_counter(tokenizer, config))
    prompts = [encode_sample(tokenizer, config, sample) for sample in samples]
    check(max(len(prompt) for prompt in prompts))
    return samples, prompts


def batches(samples, prompts, length):
    """Both in equal pieces, smaller ones for long texts."""
    size = max(1, 6400 // max(64, length))
    for i in range(0, len(samples), size):
        yield samples[i:i + size], prompts[i:i + size]


def with_answers(backbone, tokenizer, samples, prompts, gen_length):
    """One batch: x0 (n, L) with the answers at the end, filled up with end-of-text; attend (n, L);
    the place where the answers start."""
    ids, attend = left_pad(prompts, backbone.cfg.pad_id, backbone.device)
    answers = torch.full((len(samples), gen_length), backbone.cfg.eos_id, device=ids.device)
    for row, sample in zip(answers, samples):
        answer = encode(tokenizer, sample.answer)[:gen_length]
        row[:len(answer)] = torch.tensor(answer)
    attend = torch.cat([attend, torch.ones_like(answers, dtype=torch.bool)], dim=1)
    return torch.cat([ids, answers], dim=1), attend, ids.shape[1]


def recall(refs, output):
    """RULER's string_match_all: the share of references that are substrings of the output."""
    return sum(ref.lower() in output.lower() for ref in refs) / len(refs)


def labels_in(text):
    """The places that a text names: BABILong's labels."""
    return [place for place in PLACES if place in text.lower()]


def scored(sample, ids, tokenizer, config, **columns):
    """A row of results: columns, the sample, and what the answer ids (gen_length,) are worth."""
    output = tokenizer.decode(cut(ids, config), skip_special_tokens=False)
    found = recall(sample.refs, output)
    if sample.task == "stories":
        found = float(labels_in(output.split(".")[0]) == sample.refs)
    exact = float(output.split() == sample.answer.split())
    return {**columns, **asdict(sample), "output": output, "recall": found, "exact": exact}


def append_jsonl(path, rows):
    if path:
        with open(path, "a") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)


# --------------------------------------------------------------------------------------------------
# 4. Evaluation: the same samples for every arm.

def evaluate(backbone, tokenizer, arms, tasks, lengths, n, seed, out=None, gen_length=None,
             steps=None, **columns):
    """Decode with every arm, in LLaDA's settings for these tasks: one block, temperature 0.

    steps: numbers of denoising steps, by default one per answer token. Returns rows {task, length,
    steps, arm, depth, output, recall, exact, ...}, one a sample, and appends them to the JSONL file
    `out` as they come. ValueError, before anything is decoded, where a text is too long."""
    config = backbone.cfg
    gen_length = gen_length or answer_budget(tokenizer)
    steps = steps or [gen_length]
    cells = {}
    for length, task in product(sorted(lengths, reverse=True), tasks):
        cells[task, length] = encoded_samples(backbone, tokenizer, [task], length, n, seed,
                                              gen_length)
    rows = []
    total = len(cells) * len(arms) * len(steps) * n
    with tqdm(total=total, desc="niah", unit="sample", leave=False) as bar:
        for task, length, arm, passes in product(tasks, lengths, arms, steps):
            for samples, prompts in batches(*cells[task, length], length):
                ids = generate(backbone, prompts, memory=arms[arm], gen_length=gen_length,
                               steps=passes, remasking="low_confidence")
                new = [scored(sample, row, tokenizer, config, **columns, arm=arm, steps=passes,
                              seed=seed) for sample, row in zip(samples, ids)]
                append_jsonl(out, new)
                rows += new
                bar.update(len(new))
    return rows


@torch.no_grad()
def recompute(backbone, tokenizer, arms, tasks, length, n, seed, passes, out=None, gen_length=None):
    """Redundant recomputation, MetaState's "Information Island": up to `passes` passes over the
    same, fully masked answer, then all tokens committed at once. A frozen model computes the same
    logits every time; with slots a pass can use the last one. Rows as evaluate's, steps = pass."""
    config = backbone.cfg
    gen_length = gen_length or answer_budget(tokenizer)
    cells = {task: encoded_samples(backbone, tokenizer, [task], length, n, seed, gen_length)
             for task in tasks}
    rows = []
    for task, arm in product(tasks, arms):
        for samples, prompts in batches(*cells[task], length):
            steps = repeat(backbone, tokenizer, arms[arm], samples, prompts, passes, gen_length)
            for number, (logits, _) in enumerate(steps, 1):
                new = [scored(sample, ids, tokenizer, config, arm=arm, steps=number, seed=seed)
                       for sample, ids in zip(samples, logits.argmax(-1).view(-1, gen_length))]
                append_jsonl(out, new)
                rows += new
    return rows


def repeat(backbone, tokenizer, memory, samples, prompts, passes, gen_length):
    """Passes over fully masked answers; yields logits (n gen_length, V) and the memory's state."""
    x0, attend, start = with_answers(backbone, tokenizer, samples, prompts, gen_length)
    xt = x0.clone()
    xt[:, start:] = backbone.cfg.mask_id
    at = torch.arange(xt.shape[1], device=xt.device).expand_as(xt) >= start
    predict, state = memory(backbone, xt, attend, start)
    for _ in range(passes):
        logits, state = predict(xt, torch.ones(len(xt), device=xt.device), state, at)
        yield logits, state


@torch.no_grad()
def probe(backbone, tokenizer, memory, length, n, seed, passes, gen_length=None):
    """What do the slots hold? A linear read-out of resolve's answer from the slots after each pass.

    Ridge regression onto the values, fitted on 4 n texts, scored on n others. Returns rows {arm,
    hops, steps, recall}, one a text and pass."""
    gen_length = gen_length or answer_budget(tokenizer)
    samples, prompts = encoded_samples(backbone, tokenizer, ["resolve"], length, 5 * n, seed,
                                       gen_length)
    y = F.one_hot(torch.tensor([VALUES.index(sample.answer) for sample in samples])).double()
    slots = []
    for batch in batches(samples, prompts, length):
        steps = repeat(backbone, tokenizer, memory, *batch, passes, gen_length)
        # to the CPU first: Apple's MPS has no float64
        slots.append(torch.stack([state[0].flatten(1).cpu().double() for _, state in steps]))
    rows = []
    for number, x in enumerate(torch.cat(slots, dim=1), 1):                 # (5 n, M S)
        x = F.pad(x, (0, 1), value=1.0)
        fit = x[n:]
        w = torch.linalg.solve(fit.mT @ fit + torch.eye(x.shape[1]), fit.mT @ y[n:])
        right = (x[:n] @ w).argmax(1) == y[:n].argmax(1)
        rows += [dict(arm="probe", hops=sample.hops, steps=number, recall=float(ok))
                 for sample, ok in zip(samples, right)]
    return rows


def exposure(backbone, tokenizer, arms, tasks, length, n, seed, gen_length=None):
    """A table: exposure bias per step for every arm (memdlm.exposure_bias), all tasks mixed."""
    gen_length = gen_length or answer_budget(tokenizer)
    encoded = encoded_samples(backbone, tokenizer, tasks, length, n, seed, gen_length)
    x0, attend, start = with_answers(backbone, tokenizer, *encoded, gen_length)
    given = torch.arange(x0.shape[1], device=x0.device).expand_as(x0) < start
    columns = ("mask_ratio", "sequential", "static", "clean", "published_ratio", "clean_ratio")
    lines = [f"{'exposure bias':<14}" + "".join(f"{c:>16}" for c in columns)]
    for arm, memory in arms.items():
        for r in exposure_bias(backbone, x0, given, attend, gen_length, memory):
            lines.append(f"{arm:<14}" + "".join(f"{r[c]:>16.3f}" for c in columns))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# 5. The closed book: the prompt is written into fast weights and then hidden.

CLOSED_ARMS = {
    "none": "no phi: the question alone",
    "blind": "phi of the text, written before the question is known",
    "phi": "phi of the whole prompt, question included, as in the paper's inference",
    "other": "control: phi of another text",
    "random": "control: random factors of equal norm",
    "flipped": "control: every step with the wrong sign",
    "uncovered": "control: the asked value is in view while writing, but never a target",
    "open": "the prompt in view, no phi: what attention alone can do",
    "open+phi": "the prompt in view, and phi"}


def write_texts(backbone, tokenizer, samples, arm, inner):
    """The fast weights that an arm of the closed book answers with, a row for each sample."""
    if arm in ("none", "open"):
        return None
    whole = arm in ("phi", "open+phi")
    texts = [sample.prompt if whole else sample.context for sample in samples]
    pad_id = backbone.cfg.pad_id
    ids, attend = left_pad([encode(tokenizer, text) for text in texts], pad_id, backbone.device)
    targets = attend
    if arm == "uncovered":
        answers = [encode(tokenizer, sample.answer) for sample in samples]
        answers, _ = left_pad(answers, pad_id, backbone.device)
        targets = attend & ~(ids[:, :, None] == answers[:, None]).any(-1)
    if arm == "flipped":
        inner = replace(inner, inner_lr=-inner.inner_lr)
    phi = adapt_to_prompt(backbone, ids, attend, targets, inner)
    if arm == "other":
        phi = {name: LowRank(w.A.roll(1, 0), w.B.roll(1, 0), w.scale) for name, w in phi.items()}
    if arm == "random":
        phi = {name: LowRank(like(w.A), like(w.B), w.scale) for name, w in phi.items()}
    return phi


def like(x):
    """Gaussian noise with the norm of each row of x (B, ...)."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device)
    dims = tuple(range(1, x.ndim))
    return noise * (x.norm(dim=dims, keepdim=True) / noise.norm(dim=dims, keepdim=True))


def closed_book(backbone, tokenizer, inner, arms, n_facts, lengths, n, seed, out=None,
                gen_length=None):
    """Recall with the prompt hidden: the canvas holds the question and the answer, nothing else.

    n_facts, lengths: lists; length 0 = the facts alone. A length that the facts do not fit is left
    out. Returns rows {arm, facts, length, recall, output, ...}, one a sample, and appends them to
    the JSONL file `out` as they come."""
    config = backbone.cfg
    gen_length = gen_length or answer_budget(tokenizer)
    count = token_counter(tokenizer, config)
    rows = []
    cells = list(product(lengths, n_facts))
    with tqdm(total=len(cells) * len(arms) * n, desc="closed book", unit="sample",
              leave=False) as bar:
        for length, k in cells:
            task = partial(facts, n=k)
            samples = make_samples([task], length, n, f"{seed} {k} facts", "eval", count)
            if length and max(count(sample.prompt) for sample in samples) > length:
                # so many facts do not fit: their texts are longer than the column would say
                bar.update(len(arms) * n)
                continue
            for arm, (part, _) in product(arms, list(batches(samples, samples, length))):
                phi = write_texts(backbone, tokenizer, part, arm, inner)
                shown = [s.prompt if arm.startswith("open") else s.question for s in part]
                prompts = [torch.tensor(encode_prompt(tokenizer, config, text)) for text in shown]
                ids = generate(backbone, prompts, memory=written(phi), gen_length=gen_length,
                               remasking="low_confidence")
                new = [scored(sample, row, tokenizer, config, arm=arm, facts=k, seed=seed)
                       for sample, row in zip(part, ids)]
                append_jsonl(out, new)
                rows += new
                bar.update(len(new))
    return rows


def closed_table(rows):
    """Recall in % by facts and arm (down) and length (across). Two chances: any value at all, and
    one of the values in the text, which a memory of the set without its keys would give."""
    lengths = sorted({r["length"] for r in rows})
    names = ["facts alone" if length == 0 else f"{length} tokens" for length in lengths]
    lines = [f"{'facts':<7}{'arm':<11}" + "".join(f"{name:>14}" for name in names)
             + f"{'any value':>12}{'1 / facts':>11}"]
    groups = {}
    for r in rows:
        groups.setdefault((r["facts"], r["arm"]), []).append(r)
    for (k, arm), group in groups.items():
        line = f"{k:<7}{arm:<11}"
        for length in lengths:
            values = [r["recall"] for r in group if r["length"] == length]
            if not values:
                line += f"{'-':>14}"
                continue
            mean, half = interval(values)
            line += f"{100 * mean:>8.1f} ±{100 * half:>4.1f}"
        lines.append(line + f"{100 / len(VALUES):>12.1f}{100 / k:>11.1f}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# 6. Tables.

def interval(values):
    """Mean of values in 0..1, and half the width of Wilson's 95 % interval.

    Wilson's and not the normal one, which has width 0 where all values are alike. The values' own
    variance stands for p (1 - p); where each is 0 or 1 that is the same."""
    x = torch.tensor(values, dtype=torch.float64)
    n, z = len(x), 1.96
    spread = x.var(correction=0).item() / n + (z / (2 * n)) ** 2
    return x.mean().item(), z / (1 + z * z / n) * math.sqrt(spread)


def table(rows, metric="recall", by="length"):
    """Tasks x lengths (or by="steps": x forward passes), one line per task and arm: mean, and half
    the 95 % interval over texts, in %."""
    columns = sorted({r[by] for r in rows})
    head = f"{metric + ' by ' + by:<18}{'arm':<9}" + "".join(f"{c:>14}" for c in columns)
    lines = [head + ("      chance" if metric == "recall" else "")]
    groups = {}
    for r in rows:
        groups.setdefault((r["task"], r["arm"]), []).append(r)
    for (task, arm), group in groups.items():
        line = f"{task:<18}{arm:<9}"
        for c in columns:
            mean, half = interval([r[metric] for r in group if r[by] == c])
            line += f"{100 * mean:>8.1f} ±{100 * half:>4.1f}"
        if metric == "recall":
            line += f"{100 * sum(r['chance'] for r in group) / len(group):>12.1f}"
        lines.append(line)
    return "\n".join(lines)


def grid(rows, arm, down, across, colour):
    """Recall of one arm, %, by depth or hops (down) and length or steps (across)."""
    cells = {}
    for r in rows:
        name = r[down]
        if down == "depth":
            fifth = 20 * min(4, int(5 * name))
            name = f"{fifth}-{fifth + 20} %"
        if r["arm"] == arm:
            cells.setdefault(name, {}).setdefault(r[across], []).append(r["recall"])
    columns = sorted({c for row in cells.values() for c in row})
    head = f"{down}, by {across}"
    lines = [f"  {head:<18}" + "".join(f"{c:>5} " for c in columns) + f"  arm: {arm}"]
    for name in sorted(cells):
        line = f"  {name:<18}"
        for c in columns:
            values = cells[name].get(c)
            mean = sum(values) / len(values) if values else 0
            text = f"{100 * mean:5.0f} " if values else "    - "
            shade = [196, 208, 226, 118, 46][min(4, int(mean * 5))] if values else 0
            line += f"\x1b[30;48;5;{shade}m{text}\x1b[0m" if colour else text
        lines.append(line)
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# 7. Command line.

@dataclass
class Evaluation:
    """What to measure: the flags of the command line."""
    checkpoint: str = option(None, "a folder written by train.py, a hub name, or an adapter folder")
    tasks: list = option(tuple(TASKS), "tasks", choices=tuple(ALL_TASKS))
    lengths: tuple = option((64, 128, 256), "context lengths in tokens; tiny is trained to 64", 0)
    n: int = option(100, "samples per cell", 1)
    seed: int = option(1, "seed of the evaluation texts")
    gen_length: int = option(None, "answer tokens (default: enough for the longest answer)", 1)
    steps: tuple = option(None, "denoising steps (default: one per answer token)", 1)
    passes: int = option(None, "instead: recall after 1..PASSES passes over masked answers", 1)
    exposure: bool = option(False, "instead: exposure bias per step, published and clean ratio")
    probe: bool = option(False, "instead: can resolve's answer be read from MetaState's slots?")
    closed_book: bool = option(False, "instead: recall with the prompt hidden; by --facts and "
                               "--lengths (0 = the facts alone)")
    facts: tuple = option((1, 2, 4, 8, 16, 24), "closed book: numbers of facts in a text", 1, 24)
    arms: list = option(None, "only these arms (default: all that the checkpoint has)")
    metric: str = option("recall", "recall: RULER's and BABILong's; exact: order and number count",
                         choices=("recall", "exact"))
    out: str = option(None, "file of all rows (default: in CHECKPOINT niah.jsonl, passes.jsonl or "
                      "closed_book.jsonl)")
    device: str = option(None, "default: cuda, mps or cpu, whichever is there")

    @property
    def by_steps(self):
        return bool(self.passes) or len(self.steps or []) > 1


def check_before_loading(how):
    """What can be told without the model: ValueError or OSError; returns the file for the rows."""
    if how.checkpoint is None:
        raise ValueError("--checkpoint is needed")
    if 0 in how.lengths and not how.closed_book:
        raise ValueError("--lengths must be at least 1, not 0 (0 is for --closed_book: the facts "
                         "alone)")
    if (how.by_steps or how.exposure or how.probe) and len(how.lengths) > 1:
        raise ValueError("--passes, --exposure, --probe and several --steps need one length, "
                         "for example --lengths 64")
    name = "closed_book.jsonl" if how.closed_book else "niah.jsonl"
    if how.passes:
        name = "passes.jsonl"
    folder = Path(how.checkpoint)
    out = Path(how.out or (folder / name if folder.is_dir() else name))
    existed = out.exists()
    try:
        append_jsonl(out, [])
    except OSError as e:
        raise OSError(f"--out {out} cannot be written: {e.strerror}") from None
    if not existed:
        out.unlink()
    return out


def main():
    parser = ArgumentParser(description="Needle-in-a-haystack accuracy, memory off and on.")
    add_flags(parser, Evaluation)
    how = Evaluation(**given_flags(Evaluation, parser.parse_args()))
    out = check_before_loading(how)
    backbone, tokenizer, arms = load_arms(how.checkpoint, how.device)
    if how.closed_book:
        arms = dict(CLOSED_ARMS)
    chosen = ["metastate"] if how.probe else how.arms or list(arms)
    unknown = ", ".join(arm for arm in chosen if arm not in arms)
    if unknown:
        raise ValueError(f"this checkpoint has the arms {', '.join(arms)}, not {unknown}")
    arms = {arm: arms[arm] for arm in chosen}
    model = (backbone, tokenizer)
    length = how.lengths[0]
    colour = sys.stdout.isatty()
    if how.closed_book:
        inner = inner_loop_settings(how.checkpoint)
        rows = closed_book(*model, inner, arms, how.facts, how.lengths, how.n, how.seed, out,
                           how.gen_length)
        print(f"{closed_table(rows)}\n{how.n} texts a cell, 95 % intervals over texts; rows: {out}")
        return
    if how.exposure:
        print(exposure(*model, arms, how.tasks, length, how.n, how.seed, how.gen_length))
        return
    if how.probe:
        rows = probe(*model, arms["metastate"], length, how.n, how.seed, how.passes or BUDGET,
                     how.gen_length)
        print(grid(rows, "probe", "hops", "steps", colour))
        return
    if how.passes:
        rows = recompute(*model, arms, how.tasks, length, how.n, how.seed, how.passes, out,
                         how.gen_length)
    else:
        rows = evaluate(*model, arms, how.tasks, how.lengths, how.n, how.seed, out, how.gen_length,
                        how.steps, checkpoint=how.checkpoint)
    # the table; below it, for each arm, resolve by hops and steps, or needles by depth and length
    down, across = ("hops", "steps") if how.by_steps else ("depth", "length")
    print(table(rows, how.metric, across))
    tasks = ("resolve",) if how.by_steps else ("single", "multikey")
    some = [r for r in rows if r["task"] in tasks]
    for arm in arms if some else ():
        print("\n" + grid(some, arm, down, across, colour))
    print(f"\n{how.n} samples a cell, ± half the 95 % interval over texts; every output: {out}")


if __name__ == "__main__":
    cli(main)
