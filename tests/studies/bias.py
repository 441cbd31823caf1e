"""The paper's objection to a reference model: half of the forget set was never learned. forget05, all
of whose facts the target knows by heart, and 50 facts about five people whom no model has met.

{with, without a reference} x {sum, mean over tokens}, as in strata; beta 2.5 of a mean, 0.3 of a
sum (answers of 8 tokens). Pulls 1/4 and 1, rates 2e-4 and 6e-4. Chosen on seed 0 by the rule of
methods, where only the learned half counts as forgotten; told of seeds 1 - 3, each with a target of
its own, at the snapshot which the same rule chooses.

Prediction, written before it was run. The paper: a reference makes NPO spend its power on what was
never learned. Agreement: when the learned half is as improbable as for retrained models, the
never-learned half's probability is lower with a reference than without, for sums and for means, in
each of the three seeds. Disagreement: higher in each. Else undecided. The best that can be had is
its probability before.
"""

import statistics

from data import make_mini
from data.load import read_records
from studies.common import (FOUR, PULLS, ROOT, RUNS, builtin, each, exp_mean, fine_tuned,
                            forget_weights, keep_only, pyplot, quantile, run, save_csv,
                            spread, stored, table, token_means, write_lines)
from studies.methods import RATES, RETAIN, TOLD_OF, best
from studies.null import FORGET, SEEDS

FOLDER = RUNS / "bias"
BETAS = {"npo": 0.3, "simnpo_sum": 0.3, "npo_mean": 2.5, "simnpo": 2.5}


def halves(model):
    """Mean probability per token of the learned half, of retain, and of the never-learned half."""
    known = token_means(model, FOLDER / "mixed.jsonl")
    return exp_mean(known[:50]), exp_mean(token_means(model, RETAIN, every=10)), exp_mean(known[50:])


def unlearn(target, weight, loss, pull, lr, seed):
    """[(step, learned half, retain, never-learned half)] after each epoch."""
    output = FOLDER / f"{loss}-pull{pull:g}-lr{lr:g}-seed{seed}"

    def measure():
        run(output, f"--loss {loss} --beta {BETAS[loss]} --forget-weight {pull * weight:.4g} "
            f"--lr {lr} --seed {seed} --epochs 10 --save-every 0 --snapshots 1epoch",
            model=target, forget=FOLDER / "mixed.jsonl", retain=RETAIN)
        found = [(int(path.name[5:]), *halves(path)) for path in sorted(output.glob("step-*"))]
        keep_only(output)
        return found

    return stored(output.with_suffix(".json"), measure)


def study(options):
    inventor = make_mini.Inventor(seed=7)
    never = make_mini.flat(inventor.person() for _ in range(5))
    write_lines(FOLDER / "mixed.jsonl",
                make_mini.fields(read_records(FORGET) + never, *make_mini.QA))
    target = builtin("target", "full")
    retrained = each(fine_tuned, [(RUNS / f"retain95-seed{s}", RETAIN, s) for s in SEEDS])
    targets = each(fine_tuned, [(RUNS / f"target-seed{s}", ROOT / "data" / "full", s)
                                for s in TOLD_OF])
    ends = each(halves, [(m,) for m in (*retrained, *targets)])
    null, before = ends[:len(SEEDS)], ends[len(SEEDS):]
    goal = statistics.median(learned for learned, _, _ in null)
    losses = [(loss, f"--beta {beta}") for loss, beta in BETAS.items()]
    weights = forget_weights(target, FOLDER / "mixed.jsonl", RETAIN, losses)
    weights = {loss: w for (loss, _), w in weights.items()}

    keys = [(loss, pull, lr) for loss in FOUR.values() for pull in PULLS for lr in RATES]
    found = each(unlearn, [(target, weights[loss], loss, pull, lr, 0) for loss, pull, lr in keys])
    grid = {key: best(points, goal) for key, points in zip(keys, found)}
    save_csv("bias_grid", [{"loss": loss, "pull": pull, "lr": lr, **dict(zip(
        ("step", "learned", "retain", "never learned"), at or ("never reached", "", "", "")))}
        for (loss, pull, lr), at in grid.items()])
    chosen = {loss: max((k for k in keys if k[0] == loss and grid[k]), key=lambda k: grid[k][2])
              for loss in FOUR.values()}
    found = iter(each(unlearn, [(t, weights[loss], *chosen[loss], s) for loss in FOUR.values()
                                for t, s in zip(targets, TOLD_OF)]))
    told = {method: [best(next(found), goal) for _ in TOLD_OF] for method in FOUR}

    rows = [["", "setting", "learned half", "never-learned half", "retain"],
            ["target", "", *(spread([e[i] for e in before]) for i in (0, 2, 1))],
            ["retrained, other seeds: 5% - 95%", "", *(
                f"{quantile([e[i] for e in null], 0.05):.2f} - "
                f"{quantile([e[i] for e in null], 0.95):.2f}" for i in (0, 2, 1))]]
    for method, points in told.items():
        _, pull, lr = chosen[FOUR[method]]
        there = [p for p in points if p]
        cells = [spread([p[i] for p in there]) for i in (1, 3, 2)] if there else ["never"] * 3
        rows.append([method, f"pull {pull:g}, lr {lr:g}; {len(there)} of {len(points)}", *cells])
    table("bias: probability per token; mean (range) of three seeds", rows)
    save_csv("bias", [{"method": m, "seed": s, **dict(zip(
        ("step", "learned", "retain", "never learned"), p or ("never reached", "", "", "")))}
        for m, points in told.items() for s, p in zip(TOLD_OF, points)])
    if options.picture:
        draw(told, before, null, options.picture)


def draw(told, before, null, picture):
    figure, panel = pyplot().subplots(figsize=(8, 3.4), layout="tight")
    for i, (method, points) in enumerate(told.items()):
        values = [p[3] for p in points if p]
        if values:
            panel.barh(i, statistics.fmean(values), color=f"C{i}", alpha=0.8)
            panel.plot(values, [i] * len(values), "k.", ms=5)
    level = statistics.fmean(e[2] for e in before)
    panel.axvline(level, color="k", ls="--")
    panel.text(level, -0.75, "before unlearning", ha="center", fontsize=10)
    panel.set_yticks(range(len(told)), [*told])
    panel.invert_yaxis()
    panel.set(xlabel="probability of answers that nobody had learned (should stay)")
    figure.savefig(picture, dpi=110)
