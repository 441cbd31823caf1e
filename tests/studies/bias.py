"""The paper's objection to a reference model: half of the forget set was never learned. forget05,
all of whose facts the target knows by heart, and 50 facts about five people whom no model has met.

{with, without a reference} x {sum, mean over tokens}, as in strata; beta 2.5 of a mean, 0.3 of a
sum (answers of 8 tokens). Pull 1, rates 2e-4 and 6e-4, three targets (the seeds of methods).
Outcome: the never-learned half at the first moment where the learned half's mean log p is that of
retrained models (between snapshots by interpolation).

Prediction, written before it was run. The paper: a reference makes NPO spend its power on what was
never learned. Agreement: when the learned half is as improbable as for retrained models, the
never-learned half's probability is lower with a reference than without, for sums and for means, at
both rates, in each of the three seeds. Disagreement: higher in each. Else undecided. The best that
can be had is its probability before.
"""

import statistics
from itertools import product

from data import make_mini
from data.load import read_records
from studies.common import (FOUR, ROOT, RUNS, STYLES, builtin, crossing, each, exp_mean, fine_tuned,
                            forget_weights, pyplot, quantile, save_csv, spread, table, token_means,
                            watched, write_lines)
from studies.methods import RATES, RETAIN, TOLD_OF
from studies.null import FORGET, SEEDS

FOLDER = RUNS / "bias"
MIXED, LEARNED, NEVER = FOLDER / "mixed.jsonl", slice(0, 50), slice(50, 100)
BETAS = {"npo": 0.3, "simnpo_sum": 0.3, "npo_mean": 2.5, "simnpo": 2.5}


def study(options):
    inventor = make_mini.Inventor(seed=7)
    never = make_mini.flat(inventor.person() for _ in range(5))
    write_lines(MIXED, make_mini.fields(read_records(FORGET) + never, *make_mini.QA))
    weights = forget_weights(builtin("target", "full"), MIXED, RETAIN,
                             [(loss, f"--beta {beta}") for loss, beta in BETAS.items()])
    retrained = each(fine_tuned, [(RUNS / f"retain95-seed{s}", RETAIN, s) for s in SEEDS])
    targets = each(fine_tuned, [(RUNS / f"target-seed{s}", ROOT / "data" / "full", s)
                                for s in TOLD_OF])
    ends = each(token_means, [(model, MIXED) for model in (*retrained, *targets)])
    null, before = ends[:len(SEEDS)], ends[len(SEEDS):]
    goal = statistics.fmean(x for known in null for x in known[LEARNED])
    keys = [*product(FOUR, RATES, zip(TOLD_OF, targets))]
    found = each(watched, [
        (FOLDER / f"{FOUR[method]}-lr{lr:.0e}-seed{seed}", f"--loss {FOUR[method]} --beta "
         f"{BETAS[FOUR[method]]} --lr {lr} --seed {seed} --epochs 8 --snapshots 2 --forget-weight "
         f"{weights[FOUR[method], f'--beta {BETAS[FOUR[method]]}']:.4g}", target, MIXED, RETAIN,
         goal, LEARNED) for method, lr, (seed, target) in keys])
    at = {(method, lr, seed): crossing(points, goal, LEARNED)
          for (method, lr, (seed, _)), points in zip(keys, found)}

    def line(name, models):
        halves = [[exp_mean(known[half]) for known in models] for half in (LEARNED, NEVER)]
        return [name, *map(spread, halves)]

    rows = [["", "learned half", "never-learned half", "retain there"],
            [*line("targets", before), ""],
            ["retrained, other seeds: 5% - 95%", *(" - ".join(
                f"{quantile([exp_mean(known[half]) for known in null], q):.3f}"
                for q in (0.05, 0.95)) for half in (LEARNED, NEVER)), ""]]
    for method, lr in product(FOUR, RATES):
        there = [at[method, lr, s] for s in TOLD_OF if at[method, lr, s]]
        label = f"{method}, lr {lr:g}: {len(there)} of {len(TOLD_OF)}"
        rows.append([*line(label, [x[0] for x in there]), spread([x[1] for x in there])]
                    if there else [label, "never", "", ""])
    table("bias: probability per token; mean (range) of the seeds that get there", rows)
    told = [{"method": method, "lr": lr, "seed": seed, "learned": exp_mean(x[0][LEARNED]),
             "never learned": exp_mean(x[0][NEVER]), "retain": x[1], "step": x[2]}
            for (method, lr, seed), x in at.items() if x]
    save_csv("bias", told)
    if options.picture:
        draw(told, statistics.fmean(exp_mean(known[NEVER]) for known in before), options.picture)


def draw(told, before, picture):
    figure, panel = pyplot().subplots(figsize=(8, 3.4), layout="tight")
    for i, method in enumerate(FOUR):
        values = [x["never learned"] for x in told if x["method"] == method]
        panel.barh(i, statistics.fmean(values), color=STYLES[method]["color"], alpha=0.8)
        panel.plot(values, [i] * len(values), "k.", ms=5)
    panel.axvline(before, color="k", ls="--")
    panel.text(before, -0.75, "before unlearning", ha="center", fontsize=10)
    panel.set_yticks(range(len(FOUR)), [*FOUR])
    panel.invert_yaxis()
    panel.set(xlabel="probability of answers that nobody had learned (should stay)")
    figure.savefig(picture, dpi=110)
