"""One table over training seeds from the JSONL files that niah.py wrote."""
import argparse
import json
import re
from pathlib import Path

import numpy as np

import niah


def read_rows(files, metric, by, tasks):
    """{(task, line): {column: {(training seed, text): value}}}.

    Each row also counts for the task "all". A line's name is that of the run's folder, without
    "-seedN", and the arm. ValueError names file and line of what niah.py did not write."""
    groups = {}
    for file in files:
        name, seed = re.fullmatch(r"(.*?)(?:-seed(\d+))?", Path(file).parent.name).groups()
        for number, line in enumerate(Path(file).read_text().splitlines(), 1):
            try:
                r = json.loads(line)
                text = tuple(str(r[k]) for k in ("task", "seed", "length", "steps", "prompt"))
                column = int(r[by])
                value = float(r[metric])
                arm = r["arm"]
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f"{file}, line {number}: not a row that niah.py wrote "
                                 f"({type(e).__name__}: {e})") from None
            for task in (text[0], "all") if text[0] in tasks else ():
                line_cells = groups.setdefault((task, f"{name} {arm}"), {})
                line_cells.setdefault(column, {})[seed, text] = value
    if not groups:
        raise ValueError(f"no rows of {', '.join(tasks)} in {', '.join(map(str, files))}")
    return groups


def mean_and_interval(cell, draws=2000):
    """{(training seed, text): value} -> mean, and half the 95 % interval over both levels.

    A bootstrap (percentiles, fixed seed) that draws training seeds and, within each task, texts,
    with replacement; every seed has seen the same texts, so a drawn text counts for all seeds. With
    one seed it is over texts alone; three say little about a fourth. Never narrower than
    Wilson's interval where all values are alike: then a resampled mean cannot move, although the
    next text might. With one text: None."""
    seeds = {seed: i for i, seed in enumerate(sorted({s for s, _ in cell}, key=str))}
    texts = {text: i for i, text in enumerate(sorted({t for _, t in cell}))}
    values = np.zeros((len(seeds), len(texts)))
    present = np.zeros((len(seeds), len(texts)))
    for (seed, text), value in cell.items():
        values[seeds[seed], texts[text]] = value
        present[seeds[seed], texts[text]] = 1
    mean = values.sum() / present.sum()
    if len(texts) < 2:
        return mean, None
    rng = np.random.default_rng(0)
    # how often a seed (draws, S) and a text (draws, T) was drawn; texts are sorted by task
    _, sizes = np.unique([text[0] for text in texts], return_counts=True)
    seed_counts = rng.multinomial(len(seeds), [1 / len(seeds)] * len(seeds), draws)
    text_counts = np.concatenate([rng.multinomial(n, [1 / n] * n, draws) for n in sizes], axis=1)
    totals = ((seed_counts @ values) * text_counts).sum(1)
    numbers = ((seed_counts @ present) * text_counts).sum(1)
    means = totals[numbers > 0] / numbers[numbers > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    floor = niah.interval([0.0] * len(texts))[1]
    return mean, max((high - low) / 2, floor)


def differences(cell, base):
    """The same texts and training seeds in both: their differences."""
    return {key: value - base[key] for key, value in cell.items() if key in base}


def show_cell(cell, signed):
    """Mean ± half the 95 % interval, in %; a difference that lies within a point is marked."""
    if not cell:
        return f"{'-':>15}"
    mean, half = mean_and_interval(cell)
    text = f"{100 * mean:>{'+' if signed else ''}8.1f} ±"
    if half is None:
        return f"{text}{'-':>4} "
    return f"{text}{100 * half:>4.1f}" + ("≈" if signed and abs(mean) + half <= 0.01 else " ")


def table_over_seeds(files, metric, by, against=None, tasks=tuple(niah.TASKS)):
    """Tasks x lengths or steps from saved JSONL files, one line per run and arm, in %.

    against: the name of a line; then every line shows its mean difference to that one, on the same
    texts and training seeds. ± is always half the 95 % interval over texts and training seeds."""
    groups = read_rows(files, metric, by, tasks)
    names = sorted({name for _, name in groups})
    if against and against not in names:
        raise ValueError(f"--against {against!r}: the lines are {', '.join(names)}")
    columns = sorted({column for cells in groups.values() for column in cells})
    head = f"{metric + ' by ' + by:<18}{'run, arm':<26}"
    lines = [head + "".join(f"{c:>14} " for c in columns) + "  seeds"]
    found = {task for task, _ in groups} - {"all"}
    order = [task for task in niah.TASKS if task in found] + ["all"] * (len(found) > 1)
    for task, name in sorted(g for g in groups if g[0] in order):
        cells = groups[task, name]
        if against:
            base = groups.get((task, against), {})
            cells = {c: differences(cells[c], base.get(c, {})) for c in cells}
        n_seeds = max(len({seed for seed, _ in cell}) for cell in cells.values())
        shown = "".join(show_cell(cells.get(c), bool(against)) for c in columns)
        lines.append((order.index(task), f"{task:<18}{name:<26}{shown}{n_seeds:>7}"))
    return "\n".join(lines[:1] + [line for _, line in sorted(lines[1:])])


def rows_main(argv):
    """`python test_all.py --rows FILES ...`"""
    parser = argparse.ArgumentParser(description=rows_main.__doc__)
    parser.add_argument("--rows", nargs="+", metavar="JSONL", required=True)
    parser.add_argument("--against", metavar="LINE",
                        help="differences to this line on the same texts, for example \"mdlm off\"")
    parser.add_argument("--by", choices=["length", "steps"], default="length", help="the columns")
    parser.add_argument("--metric", choices=["recall", "exact"], default="recall")
    parser.add_argument("--tasks", nargs="+", default=list(niah.TASKS), choices=list(niah.TASKS),
                        metavar="TASK", help=", ".join(niah.TASKS))
    args = parser.parse_args(argv)
    print(table_over_seeds(args.rows, args.metric, args.by, args.against, args.tasks))
    print("± half the 95 % interval over texts and, with several, training seeds; "
          "≈ the whole interval lies within one point of zero")
