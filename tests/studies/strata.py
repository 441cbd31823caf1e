"""The paper's mechanism where it can act: facts that were told 1, 4 or 16 times in fine-tuning, with
answers of about 8 or about 56 tokens, 20 facts a cell, all to be forgotten at once.

{with, without a reference} x {sum, mean over tokens}: NPO, SimNPO and the two between. Beta times
length is matched: 2.5 of a mean, 2.5/32 of a sum, 32 being the mean length. Pull 1, rates 3e-4 and
1e-3, two worlds (other people each) with a target and three retrained models of their own.
Each fact is about a person of its own; the retain set has 400 more facts, all told 16 times.

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
and world: 8 in all. Agreement: at least 7 of 8 (or seven eighths of those that reach the crossing),
and a mean difference beyond the null's largest. Disagreement: at most 1. Else: undecided.
"""

import statistics
from itertools import combinations, product

from data import make_mini
from studies.common import (FOUR, RUNS, builtin, each, exp_mean, fine_tuned, forget_weights,
                            keep_only, number, pyplot, quantile, run, save_csv, snapshot, stored,
                            table, token_means, write_lines)

WORLDS, RETRAINED, PULLS, RATES = (0, 1), (0, 1, 2), (1,), (3e-4, 1e-3)
TOLD, LENGTHS, FACTS, KEPT = (1, 4, 16), ("short", "long"), 20, 200
CELLS = [*product(TOLD, LENGTHS)]
BETA, MEAN_LENGTH = 2.5, 32


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
    retain = [fact(inventor, i, length) for i in range(KEPT) for length in LENGTHS]
    write_lines(folder / "forget.jsonl", [r for cell in cells.values() for r in cell])
    write_lines(folder / "retain.jsonl", retain)
    write_lines(folder / "retrained.jsonl", retain * max(TOLD))
    told = [r for (times, _), cell in cells.items() for r in cell * times]
    write_lines(folder / "target.jsonl", retain * max(TOLD) + told)
    return folder


def learned(folder, name, seed):
    """A model that reads its file once, in random order: what stands there n times n times."""
    return fine_tuned(folder / f"{name}-seed{seed}", folder / f"{name}.jsonl", seed,
                      "--epochs 1 --warmup-epochs 0.06")


def knowledge(model, folder):
    """log p per token of each fact to be forgotten, and of 50 to be kept."""
    return {"forget": token_means(model, folder / "forget.jsonl"),
            "retain": token_means(model, folder / "retain.jsonl", every=8)}


def cell_means(values):
    return [statistics.fmean(values[i:i + FACTS]) for i in range(0, len(values), FACTS)]


def run_name(loss, pull, lr):
    return f"{loss}-pull{pull:g}-lr{lr:g}"


def unlearn(folder, weight, loss, pull, lr, goal):
    """[(step, {forget, retain})] of a run, the target at step 0. Only the snapshot that is nearest
    to the retrained model's mean of the cells keeps its weights."""
    output, target = folder / run_name(loss, pull, lr), folder / "target-seed0"

    def measure():
        beta = BETA if "mean" in loss or loss == "simnpo" else BETA / MEAN_LENGTH
        run(output, f"--loss {loss} --beta {beta} --forget-weight {pull * weight:.4g} --lr {lr} "
            "--epochs 10 --save-every 0 --snapshots 2", model=target,
            forget=folder / "forget.jsonl", retain=folder / "retain.jsonl")
        found = [(0, knowledge(target, folder))]
        for path in sorted(output.glob("step-*")):
            found.append((int(path.name.removeprefix("step-")), knowledge(path, folder)))
        nearest = min(found[1:], key=lambda at: abs(statistics.fmean(at[1]["forget"]) - goal))
        keep_only(output, snapshot(output, nearest[0]))
        return found

    return stored(folder / f"{output.name}.json", measure)


def crossing(points, reference):
    """(cells less the reference's, retain probability, step) where the mean of the cells is first 0;
    None where it never is."""
    last = None
    for step, known in points:
        cells = [a - b for a, b in zip(cell_means(known["forget"]), cell_means(reference))]
        retain = exp_mean(known["retain"])
        now = statistics.fmean(cells), [*cells, retain, step]
        if last and now[0] <= 0:
            share = last[0] / (last[0] - now[0])
            *cells, retain, step = (a + share * (b - a) for a, b in zip(last[1], now[1]))
            return cells, retain, step
        last = now
    return None


def models():
    """{world: (folder, log p of the forget set for each retrained model)}; targets are made."""
    builtin("target", "full")  # with it comes runs/base
    folders = [*map(world, WORLDS)]
    names = [("target", 0), *(("retrained", seed) for seed in RETRAINED)]
    made = each(learned, [(f, *name) for f in folders for name in names])
    known = iter(each(token_means, [(m, m.parent / "forget.jsonl") for m in made]))
    return {w: (f, [next(known) for _ in names]) for w, f in zip(WORLDS, folders)}


def weights_of(folder):
    losses = [(loss, f"--beta {BETA if loss in ('npo_mean', 'simnpo') else BETA / MEAN_LENGTH}")
              for loss in FOUR.values()]
    found = forget_weights(folder / "target-seed0", folder / "forget.jsonl",
                           folder / "retain.jsonl", losses)
    return {loss: weight for (loss, _), weight in found.items()}


def runs():
    """({(world, method, pull, lr): points}, {world: mean log p of retrained}, nulls, targets)."""
    worlds = models()
    reference = {w: [statistics.fmean(x) for x in zip(*known[1:])]
                 for w, (_, known) in worlds.items()}
    weights = {w: stored(f / "weights.json", lambda: weights_of(f))
               for w, (f, _) in worlds.items()}
    keys = [*product(WORLDS, FOUR, PULLS, RATES)]
    found = each(unlearn, [(worlds[w][0], weights[w][FOUR[m]], FOUR[m], pull, lr,
                            statistics.fmean(reference[w])) for w, m, pull, lr in keys])
    return dict(zip(keys, found)), reference, {w: known for w, (_, known) in worlds.items()}


def centred(cells):
    return [x - statistics.fmean(cells) for x in cells]


def study(options):
    points, reference, known = runs()
    null = [centred([a - b for a, b in zip(cell_means(one), cell_means(other))])
            for w in WORLDS for one, other in combinations(known[w][1:], 2)]
    at = {key: crossing(found, reference[key[0]]) for key, found in points.items()}
    names = [f"told {times}, {length}" for times, length in CELLS]
    rows = [["log p per token", *names]]
    for label, pick in (("target", lambda w: known[w][0]), ("retrained", lambda w: reference[w])):
        rows.append([label, *map(number, map(statistics.fmean, zip(
            *(cell_means(pick(w)) for w in WORLDS))))])
    table("strata: what is known before", rows)
    rows = [["", "crossings", "spread: mean (range)", *names, "retain prob. there"]]
    spreads = [statistics.pstdev(cells) for cells in null]
    sides = [(quantile(x, 0.05), quantile(x, 0.95)) for x in zip(*null)]
    rows.append(["retrained, other seeds: 5% - 95%", "",
                 f"{quantile(spreads, 0.05):.2f} - {quantile(spreads, 0.95):.2f}",
                 *(f"{a:+.2f} - {b:+.2f}" for a, b in sides), ""])
    for method in FOUR:
        there = [x for key, x in at.items() if key[1] == method and x]
        spreads = [statistics.pstdev(cells) for cells, *_ in there]
        rows.append([method, f"{len(there)} of {len(at) // 4}",
                     f"{statistics.fmean(spreads):.2f} ({min(spreads):.2f} - {max(spreads):.2f})",
                     *(f"{statistics.fmean(x):+.2f}" for x in zip(*(c for c, *_ in there))),
                     number(statistics.fmean(r for _, r, _ in there))])
    table("strata: log p per token less the retrained model's, where its mean is 0", rows)
    judge(at, null)
    save_csv("strata", [{"world": w, "method": m, "pull": p, "lr": lr,
                         **dict(zip(names, x[0] if x else [""] * 6)),
                         "spread": statistics.pstdev(x[0]) if x else "never",
                         "retain": x[1] if x else "", "step": x[2] if x else ""}
                        for (w, m, p, lr), x in at.items()])
    if options.picture:
        draw(at, sides, options.picture)


def judge(at, null):
    """Count the comparisons of the prediction."""
    def once(cells):  # of the cells told once
        return statistics.fmean(cells[:2])

    def by_length(cells):
        return abs(statistics.fmean(cells[0::2]) - statistics.fmean(cells[1::2]))

    npo, mean, total, simnpo = FOUR
    reference, sums = ((npo, total), (mean, simnpo)), ((npo, mean), (total, simnpo))
    rows = [["", "so in", "mean difference", "largest between retrained models"]]
    for label, pairs, measure in (("A: spread, with less without reference", reference,
                                   statistics.pstdev),
                                  ("B: told once, without less with reference", reference,
                                   lambda cells: -once(cells)),
                                  ("C: |short - long|, sum less mean", sums, by_length)):
        differences = []
        for key, x in at.items():
            for one, other in pairs:
                y = at[key[0], other, *key[2:]]
                if key[1] == one and x and y:
                    differences.append(measure(x[0]) - measure(y[0]))
        limit = max(abs(measure(cells)) for cells in null)
        rows.append([label, f"{sum(d > 0 for d in differences)} of {len(differences)}",
                     f"{statistics.fmean(differences):+.3f}", number(limit)])
    below = [once(x[0]) < 0 for key, x in at.items() if key[1] in (npo, mean) and x]
    rows.append(["B: told once below 0, with reference", f"{sum(below)} of {len(below)}", "", ""])
    table("strata: the prediction", rows)


def draw(at, sides, picture):
    """Cells by how often told, a panel a length, a line a method: mean over all runs."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="tight")
    for j, (length, panel) in enumerate(zip(LENGTHS, panels)):
        panel.axhline(0, color="k", lw=1)
        panel.fill_between(range(3), *zip(*sides[j::2]), color="0.9")
        for i, method in enumerate(FOUR):
            there = [x[0][j::2] for key, x in at.items() if key[1] == method and x]
            y = [statistics.fmean(x) for x in zip(*there)]
            panel.plot(range(3), y, "o-", color=f"C{i}", lw=3 if method.startswith("SimNPO") else 1.5,
                       label=method)
        panel.set(title=f"{length} answers", xticks=range(3), xlabel="told in fine-tuning")
        panel.set_xticklabels(["once", "4 times", "16 times"])
    panels[0].set_ylabel("log p per token less the\nretrained model's (0: as it should be)")
    panels[1].legend(fontsize=9, frameon=False)
    figure.savefig(picture, dpi=110)
