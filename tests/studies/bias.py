"""The paper's objection to a reference model: half of the forget set was never learned. forget05,
all of whose facts the target knows by heart, and 50 facts about five people whom no model has met.

{with, without a reference} x {sum, mean over tokens}, as in strata; beta 2.5 of a mean, 0.3 of a
sum (answers of 8 tokens). Pull 1, rates 2e-4 and 6e-4, and, added when with pull 1 neither loss
with a reference got there, pull 16 at 6e-4; three targets (the seeds of methods). Outcome: the
never-learned half at the first moment where the learned half's mean log p is that of retrained
models (between snapshots by interpolation), and both halves at the end of each run.

Prediction, written before it was run. The paper: a reference makes NPO spend its power on what was
never learned. Agreement: when the learned half is as improbable as for retrained models, the
never-learned half's probability is lower with a reference than without, for sums and for means, at
each setting, in each of the three seeds. Disagreement: higher in each. Else undecided. The best
that can be had is its probability before.
"""

import statistics
from itertools import product
from types import SimpleNamespace

from data import make_mini
from data.load import read_records
from studies.common import (FOUR, ROOT, RUNS, STYLES, builtin, crossing, each, exp_mean, fine_tuned,
                            forget_weights, gradient_norm, load, number, pyplot, quantile, save_csv,
                            spread, table, token_means, train, watched, write_lines)
from studies.methods import RETAIN, TOLD_OF
from studies.null import FORGET, SEEDS, retrained_models

FOLDER = RUNS / "bias"
MIXED, LEARNED, NEVER = FOLDER / "mixed.jsonl", slice(0, 50), slice(50, 100)
BETAS = {"npo": 0.3, "simnpo_sum": 0.3, "npo_mean": 2.5, "simnpo": 2.5}
SETTINGS = ((1, 2e-4), (1, 6e-4), (16, 6e-4))  # pull, rate


def study(options):
    inventor = make_mini.Inventor(seed=7)
    never = make_mini.flat(inventor.person() for _ in range(5))
    write_lines(MIXED, make_mini.fields(read_records(FORGET) + never, *make_mini.QA))
    losses = [(loss, f"--beta {beta}") for loss, beta in BETAS.items()]
    target = builtin("target", "full")
    weights = forget_weights(target, MIXED, RETAIN, losses)
    rows = [["gradient norm at the target", "learned half", "never-learned half"]]
    rows += [[method, *halves_pull(target, loss)] for method, loss in FOUR.items()]
    table("bias: where the gradient is", rows)
    retrained = retrained_models()
    targets = each(fine_tuned, [(RUNS / f"target-seed{s}", ROOT / "data" / "full", s)
                                for s in TOLD_OF])
    ends = each(token_means, [(model, MIXED) for model in (*retrained, *targets)])
    null, before = ends[:len(SEEDS)], ends[len(SEEDS):]
    goal = statistics.fmean(x for known in null for x in known[LEARNED])

    def task(method, setting, seed, target):
        (pull, lr), loss = setting, FOUR[method]
        weight = pull * weights[loss, f"--beta {BETAS[loss]}"]
        return (FOLDER / f"{loss}-pull{pull}-lr{lr:.0e}-seed{seed}", f"--loss {loss} --beta "
                f"{BETAS[loss]} --lr {lr} --seed {seed} --epochs 8 --snapshots 2 --forget-weight "
                f"{weight:.4g}", target, MIXED, RETAIN, goal, LEARNED)

    keys = [*product(FOUR, SETTINGS, zip(TOLD_OF, targets))]
    runs = each(watched, [task(method, setting, *which) for method, setting, which in keys])
    found = {(method, setting, seed): (crossing(points, goal, LEARNED), points[-1])
             for (method, setting, (seed, _)), points in zip(keys, runs)}

    def halves(models):
        return [spread([exp_mean(known[half]) for known in models]) for half in (LEARNED, NEVER)]

    rows = [["", "learned half", "never-learned half", "retain", "never-learned half where the "
             "learned one is as for retrained models", "retain there"],
            ["targets", *halves(before), "", "", ""],
            ["retrained, other seeds: 5% - 95%", *(" - ".join(
                f"{quantile([exp_mean(known[half]) for known in null], q):.3f}"
                for q in (0.05, 0.95)) for half in (LEARNED, NEVER)), "", "", ""]]
    for setting, method in product(SETTINGS, FOUR):
        of = [found[method, setting, seed] for seed in TOLD_OF]
        there = [at for at, _ in of if at]
        rows.append([f"{method}, pull {setting[0]}, lr {setting[1]:g}",
                     *halves([end[1] for _, end in of]), spread([end[2] for _, end in of]),
                     *((halves([at[0] for at in there])[1] + f", {len(there)} of {len(of)} seeds",
                        spread([at[1] for at in there])) if there else ("never", ""))])
    table("bias: probability per token at the end of the run; mean (range) of three seeds", rows)
    told = [{"method": method, "pull": pull, "lr": lr, "seed": seed,
             "end: learned": exp_mean(end[1][LEARNED]),
             "end: never learned": exp_mean(end[1][NEVER]),
             "end: retain": end[2], "crossing: never learned": exp_mean(at[0][NEVER]) if at else "",
             "crossing: retain": at[1] if at else "", "step": at[2] if at else "never"}
            for (method, (pull, lr), seed), (at, end) in found.items()]
    save_csv("bias", told)
    save_csv("bias_null", [{"": label, "learned": exp_mean(known[LEARNED]),
                            "never learned": exp_mean(known[NEVER])}
                           for label, models in (("target", before), ("retrained", null))
                           for known in models])
    if options.picture:
        draw(told, {"learned": (statistics.fmean(exp_mean(known[LEARNED]) for known in null),
                                "should fall to this"),
                    "never learned": (statistics.fmean(exp_mean(known[NEVER]) for known in before),
                                      "should stay here")}, options.picture)


def halves_pull(target, loss):
    model, examples = load(target, MIXED)
    args = SimpleNamespace(beta=BETAS[loss], gamma=0.0)
    return [number(gradient_norm(model, examples[half], train.LOSSES[loss], args))
            for half in (LEARNED, NEVER)]


def draw(told, dashed, picture):
    """Bars of either half's probability at the end of the runs at the last of the settings."""
    figure, panels = pyplot().subplots(1, 2, figsize=(10, 3.2), sharey=True, layout="tight")
    for panel, (half, (line, goal)) in zip(panels, dashed.items()):
        for i, method in enumerate(FOUR):
            values = [float(x[f"end: {half}"]) for x in told
                      if x["method"] == method and int(x["pull"]) == SETTINGS[-1][0]]
            panel.barh(i, statistics.fmean(values), color=STYLES[method]["color"], alpha=0.8)
            panel.plot(values, [i] * len(values), "k.", ms=5)
        panel.axvline(line, color="k", ls="--")
        panel.text(line, -0.65, goal, ha="center", fontsize=10)
        panel.set(xlabel=f"probability of the half that was {half}", xlim=(0, None))
    panels[0].set_yticks(range(len(FOUR)), [*FOUR])
    panels[0].invert_yaxis()
    figure.savefig(picture, dpi=110)
