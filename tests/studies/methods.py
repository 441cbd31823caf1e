"""Seven losses at equal pull: how near to a retrained model do they come, and at what price?

Each has eight settings: four of its own x two rates. With a beta: two betas, x the pulls 1/4 and
1; without one: the pulls 1/8, 1/4, 1/2, 1. Gradient ascent has no retain term, so AdamW takes any
weight alike: it has four lengths of the schedule instead. Pull is the norm of the weighted forget
gradient over the retain gradient's at the target (common.forget_weights). NPO's betas are SimNPO's
over 8, the tokens of an answer. Chosen, without p-values, on seed 0: of the snapshots (one an
epoch) with a forget probability within a factor of 1.25 of the retrained models' that with the
highest retain probability. Told of seeds 1 - 3, each with a target of its own; there the same rule
chooses the snapshot, so that models of equal forget probability are compared.

Prediction, written before it was run. The paper says that at equal forgetting SimNPO keeps more
than NPO, and either more than GradDiff and gradient ascent. Agreement: SimNPO's retain probability
is the higher in each of the three seeds, and its distance to the retrained models the smaller, with
a 95% interval (bootstrap over people) of the difference that leaves out 0. Disagreement: the
opposite. Else undecided. As all answers here have about 8 tokens and are known by heart, where NPO
is SimNPO with sums, we expect *no* difference between these two. For WGA, SatImp and CE-U the paper
says nothing; their gradient, of p^beta, p^5 (1-p) and p/(1-p), changes by more than SimNPO's
between p = 0.99 and 0.3, so that equal pull at the start may leave them short later.
"""

import random
import statistics

from studies.common import (PULLS, ROOT, RUNS, builtin, curve, each, fine_tuned, forget_weights,
                            keep_only, number, pyplot, run, save_csv, snapshot, table,
                            values_of)
from studies.null import COLUMNS, FORGET, PAIRED, apart, measured, null_row

RETAIN = ROOT / "data" / "retain95"
RATES, TOLD_OF, WINDOW = (2e-4, 6e-4), (1, 2, 3), 1.25
FOUR_PULLS = (0.125, 0.25, 0.5, 1)


def with_beta(loss, *flags):
    return [(loss, f, pull) for f in flags for pull in PULLS]


METHODS = {  # method: [(loss, flags, pull)]
    "SimNPO": with_beta("simnpo", "--beta 2.5", "--beta 5"),
    "NPO": with_beta("npo", "--beta 0.3", "--beta 0.6"),
    "GradDiff": [("ga", "", pull) for pull in FOUR_PULLS],
    "gradient ascent": [("ga", f"--epochs {n} --retain-weight 0", 1) for n in (3, 5, 10, 20)],
    "WGA": with_beta("wga", "--beta 1", "--beta 2"),
    "SatImp": with_beta("satimp", "--beta 5 --beta2 1", "--beta 2.5 --beta2 1"),
    "CE-U": [("ceu", "", pull) for pull in FOUR_PULLS],
}


def unlearned(kind, target, weights, setting, lr, seed, more=""):
    """A run's folder."""
    loss, flags, pull = setting
    name = "".join(f"{loss} {flags} pull {pull:g} lr {lr:g} seed {seed}".split()).replace("--", "-")
    weight = pull * weights[loss, "" if "epochs" in flags else flags]
    return run(RUNS / "methods" / kind / name, f"--loss {loss} --epochs 20 {flags} --lr {lr} "
               f"--forget-weight {weight:.4g} --seed {seed} --save-every 0 {more}",
               model=target, forget=FORGET, retain=RETAIN)


def tuning_run(target, weights, setting, lr):
    output = unlearned("tuning", target, weights, setting, lr, 0)
    keep_only(output)
    return curve(output)


def best(points, goal):
    """The (step, forget, retain) to stop at, or None where forget probability never fits."""
    fitting = [p for p in points if goal / WINDOW <= p[1] <= goal * WINDOW]
    return max(fitting, key=lambda p: p[2], default=None)


def reported_run(target, weights, setting, lr, seed, goal):
    """(curve, the snapshot's values, whether its forget probability fits); if none does, of the
    snapshot that comes nearest."""
    output = unlearned("reported", target, weights, setting, lr, seed, "--snapshots 1epoch")
    points = curve(output)
    chosen = best(points, goal) or min(points, key=lambda p: max(p[1] / goal, goal / p[1]))
    values = values_of(snapshot(output, chosen[0]), FORGET)
    keep_only(output, snapshot(output, chosen[0]))
    return points, values, best(points, goal) is not None


def study(options):
    null, unit, references, _ = null_row()
    goal = null["forget prob."][1]
    target = builtin("target", "full")
    losses = {(loss, "" if "epochs" in flags else flags)
              for settings in METHODS.values() for loss, flags, _ in settings}
    weights = forget_weights(target, FORGET, RETAIN, sorted(losses))
    tasks = [(target, weights, s, lr) for ss in METHODS.values() for s in ss for lr in RATES]
    curves = iter(each(tuning_run, tasks))
    grid, chosen = [], {}
    for method, settings in METHODS.items():
        at = {(s, lr): best(next(curves), goal) for s in settings for lr in RATES}
        grid += [{"method": method, "flags": flags, "pull": pull, "lr": lr,
                  "forget weight": pull * weights[loss, "" if "epochs" in flags else flags],
                  **dict(zip(("step", "forget", "retain"), point or ("never", "", "")))}
                 for ((loss, flags, pull), lr), point in at.items()]
        # of a method that never gets there: full pull at the highest rate
        chosen[method] = max(at, key=lambda s: at[s][2] if at[s] else s[0][2] * s[1] - 1)
    save_csv("methods_grid", grid)
    targets = each(fine_tuned, [(RUNS / f"target-seed{s}", ROOT / "data" / "full", s)
                                for s in TOLD_OF])
    tasks = [(t, weights, *chosen[m], s, goal) for m in METHODS for s, t in zip(TOLD_OF, targets)]
    found = iter(each(reported_run, tasks))
    told = {method: [next(found) for _ in TOLD_OF] for method in METHODS}
    report(null, unit, references, targets, grid, chosen, told)
    if options.picture:
        draw(told, null, options.picture)


def report(null, unit, references, targets, grid, chosen, told):
    names = [*PAIRED, "distance", *COLUMNS]
    rows = [["", "setting", *names]]
    rows.append(["retrained, other seeds: 5% - 95%", "", *(
        f"{number(null[n][0])} - {number(null[n][2])}" for n in names)])
    everything = {"target": [values_of(t, FORGET) for t in targets]}
    everything |= {method: [values for _, values, _ in runs] for method, runs in told.items()}
    details = []
    for method, models in everything.items():
        results = [measured(values, references, unit) for values in models]
        details += [{"method": method, "seed": s, **r} for s, r in zip(TOLD_OF, results)]
        cells = []
        for n in names:
            mean = statistics.fmean(r[n] for r in results) if n != "KS p" else statistics.median(
                r[n] for r in results)
            inside = all(null[n][0] <= r[n] <= null[n][2] for r in results)
            cells.append(f"**{number(mean)}**" if inside else number(mean))
        rows.append([method, setting_text(chosen, method), *cells])
    table("methods: mean of three seeds (KS p: median); bold: all three within the null", rows)
    save_csv("methods", details)
    rows = [["", "settings that get there", "seeds that do", "retain probability, each seed",
             "SimNPO's distance less this one's: 95% interval over people"]]
    for method, runs in told.items():
        fits = sum(g["method"] == method and g["step"] != "never" for g in grid)
        interval = bootstrap(everything["SimNPO"], everything[method], references, unit)
        retain = [d["retain prob."] for d in details if d["method"] == method]
        rows.append([method, f"{fits} of 8", f"{sum(fit for *_, fit in runs)} of 3",
                     ", ".join(f"{x:.3f}" for x in retain),
                     " to ".join(f"{x:.2f}" for x in interval)])
    table("methods: who gets there, and SimNPO against each", rows)


def setting_text(chosen, method):
    if method not in chosen:
        return ""
    (_, flags, pull), lr = chosen[method]
    return ", ".join([*flags.replace("--", "").replace(" retain-weight 0", "").split(" beta2")[:1],
                      *([f"pull {pull:g}"] if "ascent" not in method else []), f"lr {lr:g}"])


def bootstrap(ours, theirs, references, unit, draws=400):
    """95% interval of the mean difference of distances, resampling people (of ten questions)."""
    rng, differences = random.Random(0), []
    for _ in range(draws):
        people = [rng.randrange(5) for _ in range(5)]
        pick = [lambda v: {"forget": [r for i in people for r in v["forget"][10*i:10*i + 10]]}][0]
        refs = [*map(pick, references)]
        a, b = (statistics.fmean(statistics.median(apart(pick(m), r) for r in refs) for m in models)
                for models in (ours, theirs))
        differences.append((a - b) / unit)
    differences.sort()
    return differences[int(0.025 * draws)], differences[int(0.975 * draws)]


def draw(told, null, picture):
    """Retain against forget probability, along the epochs: mean of the seeds, a line a method."""
    figure, panel = pyplot().subplots(figsize=(8, 5), layout="tight")
    low, goal, high = null["forget prob."]
    panel.axvspan(goal / WINDOW, goal * WINDOW, color="0.9", zorder=0)
    panel.text(goal, 0.515, "as improbable as\nfor retrained models", ha="center", va="bottom",
               fontsize=9, color="0.4")
    panel.plot(goal, null["retain prob."][1], "k*", ms=16, zorder=5)
    ends = []
    for i, (method, runs) in enumerate(told.items()):
        points = [[statistics.fmean(c) for c in zip(*at)] for at in zip(*(r[0] for r in runs))]
        points = [[0, 0.99, 0.99], *points]
        panel.plot([p[1] for p in points], [p[2] for p in points], ".-", color=f"C{i}",
                   lw=3 if method == "SimNPO" else 1.5)
        ends.append((points[-1][1], points[-1][2], method, f"C{i}"))
    for x, y, method, color in ends:
        panel.annotate(method, (x, max(y, 0.5)), xytext=(6, 0), textcoords="offset points",
                       color=color, va="center", fontsize=11)
    panel.set(xscale="log", xlim=(1.05, 0.02), ylim=(0.5, 1.005),
              xlabel="probability of forget answers (log; forgotten: right)",
              ylabel="probability of retain answers (kept: up)")
    ticks = [1, 0.5, 0.27, 0.1, 0.05]
    panel.set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
    panel.minorticks_off()
    figure.savefig(picture, dpi=110)
