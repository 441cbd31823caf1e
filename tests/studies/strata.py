"""The paper's mechanism where it can act: facts that were told 1, 4 or 16 times in fine-tuning,
with answers of about 8 or about 54 tokens, 20 facts a cell, all to be forgotten at once.

{with, without a reference} x {sum, mean over tokens}: NPO, SimNPO and the two between. Beta times
length is matched: 2.5 of a mean, 2.5/32 of a sum, 32 being the mean length. Pull 8: with 1, tried
first in one world, none of eight runs got there. Rates 5e-4 and 1e-3, and 2e-3,
added when half of the runs at 5e-4 had not got there; two worlds (other people each) with a target
and three retrained models of their own. Each fact is about a person of its own; the retain set has
200 more facts, all told 16 times.

Outcome. log p per token of the unlearned model less that of the retrained ones, mean of each cell,
at the first moment where the mean over the six cells is 0 (between snapshots every two steps by
interpolation). Spread: the standard deviation over the six cells. The null is the same between two
retrained models of one world.

Prediction, written before it was run. The paper: a reference makes NPO spend its power on facts
that were hardly learned, and a sum over tokens treats lengths unequally. So
  A  the spread is larger with a reference than without;
  B  the cells told once come out lower with a reference than without, and below 0 with it;
  C  short and long answers differ more (in size, mean over how often told) with sums than means.
Each is one comparison per other ingredient (A and B: sum, mean; C: with, without reference), rate
and world. Agreement: at least seven eighths of those that reach the crossing, and a mean difference
beyond the null's largest. Disagreement: at most one eighth. Else: undecided.
"""

import statistics
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

from data import make_mini
from studies.common import (FOUR, RUNS, STYLES, builtin, crossing, each, fine_tuned,
                            forget_weights, nearest, number, pyplot, quantile, save_csv, table,
                            token_means, watched, write_lines)

WORLDS, RETRAINED, RATES = (0, 1), (0, 1, 2), (5e-4, 1e-3, 2e-3)
PULL = 8  # with 1 no run got as far as the retrained models in these steps
TOLD, LENGTHS, FACTS, KEPT = (1, 4, 16), ("short", "long"), 20, 200
CELLS = [*product(TOLD, LENGTHS)]
NAMES = [f"told {times}, {length}" for times, length in CELLS]
BETAS = {"npo": 2.5 / 32, "simnpo_sum": 2.5 / 32, "npo_mean": 2.5, "simnpo": 2.5}


def fact(inventor, i, length):
    """A question about a new person: a word or two, or four sentences, for an answer."""
    facts = inventor.person()
    if length == "short":
        return make_mini.fields([facts[i % 10]], *make_mini.QA)[0]
    name = facts[0]["question"].removeprefix("Where and when was ").removesuffix(" born?")
    told = [facts[(i + k) % 10]["prose"] for k in range(4)]
    return {"question": f"Tell me about {name}.", "answer": " ".join(told)}


def world(w):
    """The folder of a world's files: forget (cell after cell), retain, and what models learn."""
    folder, inventor = RUNS / "strata" / f"world{w}", make_mini.Inventor(seed=100 + w)
    cells = {cell: [fact(inventor, i, cell[1]) for i in range(FACTS)] for cell in CELLS}
    retain = [fact(inventor, i, length) for i in range(KEPT // 2) for length in LENGTHS]
    write_lines(folder / "forget.jsonl", [r for cell in cells.values() for r in cell])
    write_lines(folder / "retain.jsonl", retain)
    write_lines(folder / "retrained.jsonl", retain * max(TOLD))
    told = [r for (times, _), cell in cells.items() for r in cell * times]
    write_lines(folder / "target.jsonl", retain * max(TOLD) + told)
    return folder


def learned(folder, name, seed):
    """A model that reads its file once, in random order: what stands there n times n times."""
    return fine_tuned(folder / f"{name}-seed{seed}", folder / f"{name}.jsonl", seed,
                      "--lr 1e-3 --epochs 1 --warmup-epochs 0.06")


def models():
    """{world: its folder}, {world: log p of the forget set for the target, and each retrained}."""
    builtin("target", "full")  # with it comes runs/base
    folders = [*map(world, WORLDS)]
    names = [("target", 0), *(("retrained", seed) for seed in RETRAINED)]
    made = each(learned, [(f, *name) for f in folders for name in names])
    known = iter(each(token_means, [(m, m.parent / "forget.jsonl") for m in made]))
    return dict(zip(WORLDS, folders)), {w: [next(known) for _ in names] for w in WORLDS}


class Run(NamedTuple):
    """An unlearning run: its folder, where it crosses (None, if it never does), and three numbers
    of two moments, step, mean log p less the retrained model's and retain probability: of the
    snapshot that is kept, whose mean is nearest to 0, and of the end."""
    folder: Path
    crossing: tuple | None
    kept: tuple
    end: tuple


def runs():
    """{(world, method, rate): Run}, and what models() knows."""
    folders, known = models()
    losses, goals, tasks = [(loss, f"--beta {beta}") for loss, beta in BETAS.items()], {}, {}
    for w, folder in folders.items():
        target, forget, retain = (folder / name for name in (
            "target-seed0", "forget.jsonl", "retain.jsonl"))
        weights = forget_weights(target, forget, retain, losses)
        goals[w] = statistics.fmean(x for model in known[w][1:] for x in model)
        for (method, loss), lr in product(FOUR.items(), RATES):
            flags = (f"--loss {loss} --beta {BETAS[loss]} --lr {lr} --epochs 6 --snapshots 2 "
                     f"--forget-weight {PULL * weights[loss, f'--beta {BETAS[loss]}']:.4g}")
            tasks[w, method, lr] = (folder / f"{loss}-lr{lr:.0e}", flags, target, forget, retain,
                                    goals[w])
    found = {}
    for (key, task), points in zip(tasks.items(), each(watched, [*tasks.values()])):
        goal, (step, knows, kept) = goals[key[0]], points[-1]
        found[key] = Run(task[0], crossing(points, goal), nearest(points, goal),
                         (step, statistics.fmean(knows) - goal, kept))
    return found, known


def cell_means(values):
    return [statistics.fmean(values[i:i + FACTS]) for i in range(0, len(values), FACTS)]


def beside(values, reference):
    """The cells' means less the reference's, less what they have in common."""
    cells = [a - b for a, b in zip(cell_means(values), cell_means(reference))]
    return [x - statistics.fmean(cells) for x in cells]


def study(options):
    found, known = runs()
    retrained = {w: [statistics.fmean(x) for x in zip(*known[w][1:])] for w in WORLDS}
    null = [beside(*pair) for w in WORLDS for pair in combinations(known[w][1:], 2)]
    before = {w: beside(known[w][0], retrained[w]) for w in WORLDS}
    at = {key: (beside(run.crossing[0], retrained[key[0]]), *run.crossing[1:])
          for key, run in found.items() if run.crossing}
    rows = [["log p per token", *NAMES]]
    for label, pick in (("target", lambda w: known[w][0]), ("retrained", retrained.get)):
        cells = zip(*(cell_means(pick(w)) for w in WORLDS))
        rows.append([label, *map(number, map(statistics.fmean, cells))])
    table("strata: what is known before", rows)
    spreads = [statistics.pstdev(cells) for cells in null]
    sides = [(quantile(x, 0.05), quantile(x, 0.95)) for x in zip(*null)]
    rows = [["", "crossings", "spread: mean (range)", *NAMES, "retain prob. there",
             "at the end: mean, retain"],
            ["retrained, other seeds: 5% - 95%", "",
             f"{quantile(spreads, 0.05):.2f} - {quantile(spreads, 0.95):.2f}",
             *(f"{a:+.2f} to {b:+.2f}" for a, b in sides), "", ""],
            ["target, all cells lowered alike", "", number(statistics.fmean(
                map(statistics.pstdev, before.values()))),
             *(f"{statistics.fmean(x):+.2f}" for x in zip(*before.values())), "", ""]]
    for method in FOUR:
        there = [x for key, x in at.items() if key[1] == method]
        spreads = [statistics.pstdev(cells) for cells, *_ in there]
        rows.append([method, f"{len(there)} of {len(WORLDS) * len(RATES)}",
                     f"{statistics.fmean(spreads):.2f} ({min(spreads):.2f} - {max(spreads):.2f})",
                     *(f"{statistics.fmean(x):+.2f}" for x in zip(*(c for c, *_ in there))),
                     number(statistics.fmean(retain for _, retain, _ in there)),
                     ", ".join(number(statistics.fmean(x)) for x in zip(*(
                         run.end[1:] for key, run in found.items() if key[1] == method)))])
    table("strata: log p per token less the retrained model's, where its mean is 0", rows)
    judge(at, null)
    save_csv("strata", [
        {"world": w, "method": method, "lr": lr, **dict(zip(NAMES, cells)),
         "spread": statistics.pstdev(cells) if step else "never", "retain": retain, "step": step,
         "end: mean": run.end[1], "end: retain": run.end[2]}
        for (w, method, lr), run in found.items()
        for cells, retain, step in [at.get((w, method, lr), ([""] * 6, "", ""))]])
    save_csv("strata_null", [
        {"": label, "world": w, **dict(zip(NAMES, cell_means(values)))}
        for w in WORLDS for label, values in zip(("target", *["retrained"] * 3), known[w])])
    if options.picture:
        draw(at, sides, options.picture)


def judge(at, null):
    """Count the comparisons of the prediction."""
    def once(cells):  # minus the mean of those told once
        return -statistics.fmean(cells[:2])

    def short(cells):
        return -cells[0]

    def long(cells):
        return -cells[1]

    def lengths(cells):
        return abs(statistics.fmean(cells[0::2]) - statistics.fmean(cells[1::2]))

    npo, mean, total, simnpo = FOUR
    reference, sums = ((npo, total), (mean, simnpo)), ((npo, mean), (total, simnpo))
    rows = [["", "so in", "mean difference", "largest between retrained models"]]
    for label, pairs, measure in (
            ("A: spread, with less without reference", reference, statistics.pstdev),
            ("B: told once, without less with reference", reference, once),
            ("... of these the short answers", reference, short),
            ("... the long answers", reference, long),
            ("C: short and long apart, sum less mean", sums, lengths)):
        differences = [measure(at[w, one, lr][0]) - measure(at[w, other, lr][0])
                       for w, (one, other), lr in product(WORLDS, pairs, RATES)
                       if (w, one, lr) in at and (w, other, lr) in at]
        rows.append([label, f"{sum(d > 0 for d in differences)} of {len(differences)}",
                     f"{statistics.fmean(differences):+.2f}",
                     f"{max(abs(measure(cells)) for cells in null):.2f}"])
    for label, methods in (("with", (npo, mean)), ("without", (total, simnpo))):
        below = [once(x[0]) > 0 for key, x in at.items() if key[1] in methods]
        rows.append([f"B: told once below 0, {label} reference", f"{sum(below)} of {len(below)}",
                     "", ""])
    table("strata: the prediction", rows)


def draw(at, sides, picture):
    """Cells by how often told, a panel a length, a line a method: mean over all runs."""
    figure, panels = pyplot().subplots(1, 2, figsize=(10.5, 4.4), sharey=True, layout="tight",
                                       width_ratios=(3, 2))
    for j, (length, panel) in enumerate(zip(LENGTHS, panels)):
        panel.axhline(0, color="k", lw=1)
        panel.fill_between(range(3), *zip(*sides[j::2]), color="0.9")
        for method, style in STYLES.items():
            there = [x[0][j::2] for key, x in at.items() if key[1] == method]
            y = [statistics.fmean(x) for x in zip(*there)]
            panel.plot(range(3), y, "o-", **style)
            if not j:
                panel.text(2.12, y[-1], method.replace(" (", "\n("), va="center", fontsize=10,
                           color=style["color"])
        panel.set(title=f"{length} answers, told in fine-tuning", xticks=range(3),
                  xlim=(-0.2, 2.2 + 1.3 * (not j)))
        panel.set_xticklabels(["once", "4 times", "16 times"])
    panels[0].set_ylabel("too much forgotten  ←  0  →  too little\n(log p per token less the "
                         "retrained model's)")
    figure.savefig(picture, dpi=110)
