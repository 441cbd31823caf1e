"""Seven losses at equal pull: how near to a retrained model do they come, and at what price?

Each has eight settings: two rates x four of its own. With a beta: two betas x the pulls 1/4 and 1
(SimNPO's are forget05's and twice that, NPO's the same over 8, the tokens of an answer); without
one: four pulls. Gradient ascent has no retain term, so AdamW takes any weight alike: it has four
lengths of the schedule instead. CE-U's larger pulls were added when it did not get there with 1.
Pull is the norm of the weighted forget gradient over the retain gradient's at the target
(common.forget_weights). Chosen, without p-values, on seed 0: of the snapshots (one an
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
from pathlib import Path
from typing import Callable, NamedTuple

from studies.common import (PULLS, ROOT, RUNS, builtin, curve, each, exp_mean, fine_tuned,
                            forget_weights, keep_only, number, pyplot, quantile, run, save_csv,
                            table, token_means, values_of)
from studies.null import (COLUMNS, FORGET, PAIRED, apart, measured, null_row, retrained_models)

RETAIN = ROOT / "data" / "retain95"
RATES, TOLD_OF, WINDOW = (2e-4, 6e-4), (1, 2, 3), 1.25
LOWEST = 0.82  # of the picture


def settings(loss, *flags, pulls=PULLS, rates=RATES):
    """[(loss, flags, pull, lr)] of a method."""
    return [(loss, f, pull, lr) for f in flags or [""] for pull in pulls for lr in rates]


METHODS = {
    "SimNPO": settings("simnpo", "--beta 2.5", "--beta 5"),
    "NPO": settings("npo", "--beta 0.3", "--beta 0.6"),
    "GradDiff": settings("ga", pulls=(0.125, 0.25, 0.5, 1)),
    "gradient ascent": settings("ga", *(f"--epochs {n} --retain-weight 0" for n in (3, 5, 10, 20)),
                                pulls=(1,)),
    "WGA": settings("wga", "--beta 1", "--beta 2"),
    "SatImp": settings("satimp", "--beta 5 --beta2 1", "--beta 2.5 --beta2 1"),
    "CE-U": settings("ceu", pulls=(0.25, 1, 16, 64)),
}


class Benchmark(NamedTuple):
    """What is forgotten and kept, how, and how it is measured."""
    folder: Path
    flags: str  # of every run
    forget: Path
    retain: Path
    goal: float  # forget probability of the retrained model
    measure: Callable  # model -> values


def unlearned(bench, kind, weights, setting, seed, target, more=""):
    """A run's folder."""
    loss, flags, pull, lr = setting
    name = "".join(f"{loss} {flags} pull {pull:g} lr {lr:g} seed {seed}".split()).replace("--", "-")
    weight = pull * weights[loss, loss_flags(flags)]
    return run(bench.folder / kind / name, f"--loss {loss} {bench.flags} {flags} --lr {lr} "
               f"--forget-weight {weight:.4g} --seed {seed} --save-every 0 {more}",
               model=target, forget=bench.forget, retain=bench.retain)


def loss_flags(flags):
    """Those that change the loss, so its gradient at the start."""
    return "" if "epochs" in flags else flags


def best(points, goal):
    """The (step, forget, retain) to stop at, or None where forget probability never fits."""
    fitting = [p for p in points if goal / WINDOW <= p[1] <= goal * WINDOW]
    return max(fitting, key=lambda p: p[2], default=None)


def tuning_run(bench, weights, setting, target):
    output = unlearned(bench, "tuning", weights, setting, 0, target)
    keep_only(output)
    return best(curve(output), bench.goal)


def tune(bench, methods, target):
    """({(loss, flags): weight of pull 1}, {method: [(setting, where to stop or None)]}); the latter
    also as CSV."""
    losses = {(s[0], loss_flags(s[1])) for grid in methods.values() for s in grid}
    weights = forget_weights(target, bench.forget, bench.retain, sorted(losses))
    found = iter(each(tuning_run, [(bench, weights, setting, target)
                                   for grid in methods.values() for setting in grid]))
    grid = {method: [(s, next(found)) for s in settings] for method, settings in methods.items()}
    save_csv(f"{bench.folder.name}_grid", [
        {"method": method, "flags": flags, "pull": pull, "lr": lr,
         "forget weight": pull * weights[loss, loss_flags(flags)],
         **dict(zip(("step", "forget", "retain"), at or ("never fits", "", "")))}
        for method, found in grid.items() for (loss, flags, pull, lr), at in found])
    return weights, grid


def choose(found):
    """The setting that keeps most of retain; where none fits, the strongest."""
    return max(found, key=lambda x: x[1][2] if x[1] else x[0][2] * x[0][3] - 1)[0]


def reported_run(bench, weights, setting, seed, target):
    """(curve, values of the snapshot, whether its forget probability fits); if none does, of the
    one that comes nearest."""
    output = unlearned(bench, "reported", weights, setting, seed, target, "--snapshots 1epoch")
    points, goal = curve(output), bench.goal
    at = best(points, goal) or min(points[1:], key=lambda p: max(p[1] / goal, goal / p[1]))
    model = output / f"step-{at[0]:06d}"
    values = bench.measure(model)
    keep_only(output, model)
    return points, values, best(points, goal) is not None


def tell(bench, weights, chosen, seeds, targets):
    """{method: [what reported_run returns, for each seed]}."""
    found = iter(each(reported_run, [(bench, weights, setting, seed, target)
                                     for setting in chosen.values()
                                     for seed, target in zip(seeds, targets)]))
    return {method: [next(found) for _ in seeds] for method in chosen}


def setting_text(setting):
    _, flags, pull, lr = setting
    named = flags.replace("--", "").replace(" retain-weight 0", "").split(" beta2")[0]
    return ", ".join([*filter(None, [named]), f"pull {pull:g}", f"lr {lr:g}"])


def measure(model):
    return values_of(model, FORGET)


def tuned():
    """The benchmark on forget05; what tune() returns."""
    null, *_ = null_row()
    bench = Benchmark(RUNS / "methods", "--epochs 20", FORGET, RETAIN, null["forget prob."][1],
                      measure)
    return bench, *tune(bench, METHODS, builtin("target", "full"))


def study(options):
    null, unit, references, _ = null_row()
    bench, weights, grid = tuned()
    targets = each(fine_tuned, [(RUNS / f"target-seed{s}", ROOT / "data" / "full", s)
                                for s in TOLD_OF])
    chosen = {method: choose(found) for method, found in grid.items()}
    told = tell(bench, weights, chosen, TOLD_OF, targets)
    models = {"target": each(measure, [(t,) for t in targets])}
    models |= {method: [values for _, values, _ in runs] for method, runs in told.items()}
    report(null, unit, references, models, chosen, grid, told)
    if options.picture:  # whose curves are train.py's probes, of every 10th example of retain95
        probed = each(token_means, [(m, RETAIN, 10) for m in retrained_models()])
        draw(told, null["forget prob."][1], statistics.fmean(map(exp_mean, probed)),
             options.picture)


def report(null, unit, references, models, chosen, grid, told):
    names = [*PAIRED, "distance", *COLUMNS]
    rows = [["", "setting", *names], ["retrained, other seeds: 5% - 95%", "", *(
        f"{number(null[n][0])} - {number(null[n][2])}" for n in names)]]
    results = {method: [measured(values, references, unit) for values in of]
               for method, of in models.items()}
    for method, found in results.items():
        cells = []
        for n in names:
            middle = statistics.median if n == "KS p" else statistics.fmean
            inside = all(null[n][0] <= r[n] <= null[n][2] for r in found)
            text = number(middle([r[n] for r in found]))
            cells.append(f"**{text}**" if inside else text)
        setting = setting_text(chosen[method]) if method in chosen else ""
        rows.append([method, setting, *cells])
    table("methods: mean of three seeds (KS p: median); bold: all three within the null", rows)
    save_csv("methods", [{"method": method, "seed": seed, **r}
                         for method, found in results.items() for seed, r in zip(TOLD_OF, found)])
    rows, intervals = [["", "settings that fit", "seeds that do", "retain probability, each seed",
                        "SimNPO's distance less this one's: 95% interval over people",
                        "NPO's less this one's"]], []
    for method, runs in told.items():
        beside = {ours: bootstrap(models[ours], models[method], references, unit)
                  for ours in ("SimNPO", "NPO")}
        rows.append([method, f"{sum(at is not None for _, at in grid[method])} of 8",
                     f"{sum(fits for *_, fits in runs)} of 3",
                     ", ".join(f"{r['retain prob.']:.3f}" for r in results[method]),
                     *(" to ".join(f"{x:+.2f}" for x in interval)
                       for interval in beside.values())])
        intervals += [{"distance of": ours, "less that of": method, "2.5%": low, "97.5%": high}
                      for ours, (low, high) in beside.items() if ours != method]
    table("methods: who gets there, and SimNPO and NPO against each", rows)
    save_csv("methods_intervals", intervals)


def bootstrap(ours, theirs, references, unit, draws=400):
    """95% interval of the mean difference of distances, resampling people (of ten questions)."""
    rng, differences = random.Random(0), []
    for _ in range(draws):
        people = [rng.randrange(5) for _ in range(5)]
        refs = [asked_of(people, r) for r in references]
        ours_then, theirs_then = (statistics.fmean(
            statistics.median(apart(asked_of(people, m), r) for r in refs) for m in models)
            for models in (ours, theirs))
        differences.append((ours_then - theirs_then) / unit)
    return quantile(differences, 0.025), quantile(differences, 0.975)


def asked_of(people, values):
    """The forget set's records of these people, of ten questions each."""
    return {"forget": [r for i in people for r in values["forget"][10 * i:10 * i + 10]]}


def draw(told, goal, kept, picture):
    """Retain against forget probability, along the epochs: mean of the seeds, a line a method; the
    retrained models at (goal, kept)."""
    figure, panel = pyplot().subplots(figsize=(8, 5), layout="tight")
    panel.axvspan(goal / WINDOW, goal * WINDOW, color="0.9", zorder=0)
    panel.text(goal, LOWEST + 0.003, "as improbable as\nfor retrained models", ha="center",
               va="bottom", fontsize=9, color="0.4")
    panel.plot(goal, kept, "k*", ms=16, zorder=5)
    panel.annotate("retrained", (goal, kept), (0, 9), ha="center", textcoords="offset points")
    ends = []
    for i, (method, runs) in enumerate(told.items()):
        points = [[statistics.fmean(c) for c in zip(*at)] for at in zip(*(r[0] for r in runs))]
        panel.plot([p[1] for p in points], [p[2] for p in points], ".-", color=f"C{i}",
                   lw=3.5 if method == "SimNPO" else 1.5)
        last = next((p for p in points if p[2] < LOWEST), points[-1])  # or where it leaves
        ends.append((max(last[2], LOWEST), last[1], method, f"C{i}"))
    at = 1.01
    for y, x, method, color in sorted(ends, reverse=True):
        at = max(min(at - 0.013, y), LOWEST)
        panel.annotate(method, (x, y), (0.168, at), color=color, va="center", fontsize=12,
                       arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5}, zorder=6)
    panel.set(xscale="log", xlim=(1.05, 0.17), ylim=(LOWEST, 1.005),
              xlabel="probability of forget answers (log; forgotten: right)",
              ylabel="probability of retain answers (kept: up)")
    ticks = [1, 0.7, 0.5, 0.35, 0.27, 0.2]
    panel.set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
    panel.minorticks_off()
    figure.savefig(picture, dpi=110)
