"""MUSE in miniature: running text instead of questions. SimNPO, NPO and GradDiff at equal pull.

Chunks of 160 tokens, batches of 8, four epochs at a constant rate; SimNPO with MUSE's beta 0.7, NPO
with 0.7/160. Pulls 1/4 and 1, rates 2e-4 and 5e-4. Chosen on seed 0 by the rule of methods (forget
text as probable as for the retrained model, within a factor of 1.25; highest probability of
retain), told of seeds 2 - 4. PrivLeak compares 20 + 20 texts, and there is one target and one
retrained model: a method is called better here only if the ranges over three seeds do not overlap.

Prediction, written before it was run. The paper has SimNPO before NPO in keeping knowledge of retain
(KnowMem) and in PrivLeak. Earlier grids of this miniature did not rank the methods; we expect the
same again.
"""

import contextlib
import io
import json
import math
import statistics
import sys
from pathlib import Path

from studies.common import (PULLS, ROOT, RUNS, builtin, curve, each, evaluation, exp_mean,
                            forget_weights, keep_only, number, pyplot, run, save_csv, snapshot,
                            spread, stored, table, token_means)
from studies.methods import best

TEXTS, FOLDER = ROOT / "data" / "muse_mini", RUNS / "muse"
LEARN = "--max-length 160 --batch-size 8 --epochs 6 --lr 2e-3 --save-every 0"
FORGET = "--max-length 160 --batch-size 8 --epochs 4 --schedule constant --save-every 0"
METHODS = {"SimNPO": ("simnpo", "--beta 0.7"), "NPO": ("npo", f"--beta {0.7 / 160}"),
           "GradDiff": ("ga", "")}
RATES, TOLD_OF = (2e-4, 5e-4), (2, 3, 4)
ROWS = ("VerbMem forget", "KnowMem forget", "KnowMem retain", "PrivLeak", "extraction strength")


def learned(name, data):
    return run(FOLDER / name, LEARN, model=Path("runs", "base"), retain=TEXTS / "raw" / data)


def values_of(model):
    """eval.py's values on MUSE's questions and texts."""
    if not (model / "eval.json").exists():
        with contextlib.redirect_stdout(io.StringIO()):
            if status := evaluation.main([str(model), "--muse", str(TEXTS), "--reference", "0.5"]):
                sys.exit(f"error: eval.py {model}: status {status}")
    return next(iter(json.loads((model / "eval.json").read_text())["evaluations"].values()))["values"]


def unlearn(target, weights, method, pull, lr, seed, goal, measured=False):
    """(curve, values of the chosen snapshot). The run may see retain1; KnowMem asks of retain2."""
    loss, flags = METHODS[method]
    output = FOLDER / f"{loss}-pull{pull:g}-lr{lr:g}-seed{seed}{'-measured' * measured}"
    run(output, f"{FORGET} --loss {loss} {flags} --lr {lr} --seed {seed} --snapshots 1epoch "
        f"--forget-weight {pull * weights[method]:.4g}", model=target,
        forget=TEXTS / "raw" / "forget", retain=TEXTS / "raw" / "retain1")
    points = curve(output)
    if not measured:
        keep_only(output)
        return points
    at = best(points, goal) or min(points, key=lambda p: abs(math.log(p[1] / goal)))
    values = values_of(snapshot(output, at[0]))
    keep_only(output, snapshot(output, at[0]))
    return best(points, goal) is not None, values


def study(options):
    builtin("target", "full")  # with it comes runs/base, which has read no text yet
    target, retrained = each(learned, [("target", "full"), ("retrained", "retain")])
    goal = stored(FOLDER / "goal.json", lambda: exp_mean(
        token_means(retrained, TEXTS / "raw" / "forget", length=160)))
    found = forget_weights(target, TEXTS / "raw" / "forget", TEXTS / "raw" / "retain1",
                           [*METHODS.values()], length=160)
    weights = {method: found[spec] for method, spec in METHODS.items()}
    keys = [(m, pull, lr) for m in METHODS for pull in PULLS for lr in RATES]
    grid = {key: best(points, goal) for key, points in zip(keys, each(
        unlearn, [(target, weights, *key, 0, goal) for key in keys]))}
    save_csv("muse_grid", [{"method": m, "pull": pull, "lr": lr, **dict(zip(
        ("step", "forget", "retain"), at or ("never", "", "")))}
        for (m, pull, lr), at in grid.items()])
    chosen = {m: max((k for k in keys if k[0] == m), key=lambda k: grid[k][2] if grid[k] else
                     k[1] * k[2] - 1) for m in METHODS}
    found = iter(each(unlearn, [(target, weights, *chosen[m], s, goal, True) for m in METHODS
                                for s in TOLD_OF]))
    told = {m: [next(found) for _ in TOLD_OF] for m in METHODS}
    ends = {name: values for name, values in zip(("target", "retrained"), each(
        values_of, [(target,), (retrained,)]))}
    auc = evaluation.privleak_auc(ends["retrained"])
    rows = [["", "setting", *ROWS]]
    metrics = {name: evaluation.muse_metrics(values, auc) for name, values in ends.items()}
    rows += [[name, "", *(number(found[row]) for row in ROWS)] for name, found in metrics.items()]
    results = {m: [evaluation.muse_metrics(values, auc) for _, values in runs]
               for m, runs in told.items()}
    for m, runs in told.items():
        _, pull, lr = chosen[m]
        rows.append([m, f"pull {pull:g}, lr {lr:g}; {sum(fits for fits, _ in runs)} of 3 fit",
                     *(spread([r[row] for r in results[m]]) for row in ROWS)])
    table("muse: mean (range) of three seeds", rows)
    save_csv("muse", [{"method": m, "seed": s, **{row: r[row] for row in ROWS}}
                      for m, rs in results.items() for s, r in zip(TOLD_OF, rs)])
    if options.picture:
        draw(metrics, results, options.picture)


def draw(ends, results, picture):
    figure, panel = pyplot().subplots(figsize=(7, 4.2), layout="tight")
    x, y = "KnowMem forget", "KnowMem retain"
    for i, (method, rs) in enumerate(results.items()):
        panel.plot([r[x] for r in rs], [r[y] for r in rs], "o", color=f"C{i}", ms=8)
        panel.annotate(method, (statistics.fmean(r[x] for r in rs), max(r[y] for r in rs)),
                       xytext=(0, 8), textcoords="offset points", color=f"C{i}", ha="center")
    for name, marker in (("target", "ks"), ("retrained", "k*")):
        panel.plot(ends[name][x], ends[name][y], marker, ms=13)
        panel.annotate(name, (ends[name][x], ends[name][y]), xytext=(0, -16), ha="center",
                       textcoords="offset points")
    panel.set(xlabel="knowledge of the forget texts (KnowMem)",
              ylabel="knowledge of retain texts (KnowMem)", xlim=(0, 100), ylim=(0, 100))
    figure.savefig(picture, dpi=110)
