"""The paper's claims, seen with one's own eyes: each table of the README by one command.

    python tests/experiments.py methods      SimNPO, NPO, GradDiff, gradient ascent on forget01, 05 and 10, epoch by epoch
    python tests/experiments.py relearn      how fast the unlearned models learn the forget set back (after methods)
    python tests/experiments.py markov       mixtures of Markov chains, the paper's synthetic study
    python tests/experiments.py tofu         `methods` on real TOFU with a small Llama trained from scratch

Everything is done by train.py and eval.py and kept under runs/experiments; a command that was cut off goes on where it
stopped. One process a core, of one thread each: so small a model gains little from a second one. `--picture FILE` draws
`methods`, `tofu` or `markov` (needs matplotlib).
"""

import argparse
import contextlib
import functools
import io
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval as evaluation  # noqa: E402
import train  # noqa: E402
from data import make_markov, make_model  # noqa: E402
from data.load import find, read_records  # noqa: E402

RUNS = Path("runs", "experiments")
SEEDS = (0, 1, 2)
METHODS = {
    "SimNPO": "--loss simnpo --beta 2.5 --forget-weight {weight}",
    "NPO": "--loss npo --beta 0.1 --forget-weight 1",
    "GradDiff": "--loss ga --forget-weight 1",
    "gradient ascent": "--loss ga --forget-weight 1 --retain-loss none",
}
LEARNING_RATES = {"SimNPO": (3e-4, 5e-4, 1e-3), "NPO": (5e-5, 1e-4, 3e-4), "GradDiff": (1e-4, 2e-4, 5e-4),
                  "gradient ascent": (5e-5, 1e-4, 2e-4)}
EVAL = ("--max-new-tokens", "50")  # the answers have at most 15; a model that was hurt runs on and on


# Tools

def each(function, tasks):
    """[function(*task) for task in tasks], a process a core."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return [future.result() for future in [pool.submit(function, *task) for task in tasks]]


def run(output, flags):
    """train.py with these flags, unless its output is complete."""
    if not (output / "config.json").exists() and not (output / "eval.json").exists():
        argv = [*flags.split(), "--output", str(output), *["--resume"] * output.exists()]
        with contextlib.redirect_stdout(io.StringIO()):
            status = train.main(argv)
        if status:
            sys.exit(status)
    return output


def measure(models, forget, reference, *flags):
    """eval.py's metrics of each model, in order."""
    argv = [*map(str, models), "--forget", str(forget), "--reference", str(reference), *flags]
    columns = evaluation.tofu_columns(evaluation.parse_args(argv))
    return list(columns.values())[-len(models):]


def values_of(model, forget):
    """The forget set's per-example records of a model that has been measured."""
    return evaluation.read_entry(Path(model) / "eval.json", f"tofu {evaluation.relative(find(forget))}")["values"]["forget"]


def drop_weights(folder):
    """Keep of a measured snapshot only its eval.json."""
    for path in folder.iterdir():
        if path.name != "eval.json":
            path.unlink()


def number(x):
    return f"{x:.1e}" if 0 < x < 1e-2 else f"{x:.2f}"


def spread(values):
    """Mean and range over the seeds, as text."""
    return f"{number(statistics.fmean(values))} ({number(min(values))} - {number(max(values))})"


def table(title, rows):
    """Print a Markdown table (rows of texts, the first the head) and keep it under runs/experiments."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    text = "\n".join(lines) + "\n"
    print(f"\n{title}\n\n{text}", flush=True)
    with (RUNS / "tables.md").open("a") as file:
        file.write(f"{title}\n\n{text}\n")


def pyplot():
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: --picture needs matplotlib, which is no requirement: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


# 1. Methods, and 2. the same on real TOFU

COLUMNS = ("forget quality (KS p)", "model utility", "forget probability", "retain probability")
QUALITY, PROBABILITIES = COLUMNS[:2], COLUMNS[2:]


def harmonic(*values):
    return statistics.harmonic_mean(values) if all(values) else 0.0


def balance(metrics, axes):
    """What `best` means: the harmonic mean of what is forgotten and what is kept at the last epoch."""
    forgotten, kept = (metrics[key] for key in axes)
    return harmonic(1 - forgotten if axes == PROBABILITIES else forgotten, kept)


class Study(NamedTuple):
    """What the methods are compared on."""
    name: str
    forget: Path
    target: Path
    reference: Path  # the retain-only model
    recipe: dict  # epochs, and SimNPO's forget weight
    axes: tuple  # the two metrics to choose by and to show along the way
    eval_flags: tuple

    def measure(self, models):
        return measure(models, self.forget, self.reference, *self.eval_flags)

    def unlearn(self, method, lr, seed):
        """The folder of one method's run, with a copy of the model after each epoch."""
        flags = METHODS[method].format(weight=self.recipe["forget_weight"])
        if self.forget.name == "forget10":
            flags = flags.replace("--beta 2.5", "--beta 4.5")  # the paper's setting of SimNPO
        return run(RUNS / self.name / f"{self.forget.name}-{method.replace(' ', '_')}-lr{lr:g}-seed{seed}", (
            f"--model {self.target} --forget {self.forget} {flags} --epochs {self.recipe['epochs']} --lr {lr} --seed {seed} "
            "--save-every 0 --snapshots 1epoch"))

    def best_rate(self, method):
        """The learning rate that leaves the first seed best."""
        outputs = {lr: self.unlearn(method, lr, SEEDS[0]) for lr in LEARNING_RATES[method]}
        grid = dict(zip(outputs, self.measure(outputs.values())))
        print(f"{self.forget.name} {method}: " + ", ".join(
            f"lr {lr:g}: {' / '.join(number(m[key]) for key in self.axes)}" for lr, m in grid.items()), flush=True)
        best = max(grid, key=lambda lr: balance(grid[lr], self.axes))
        for lr in outputs.keys() - {best}:
            for step in outputs[lr].glob("step-*"):
                drop_weights(step)
        return best

    def curve(self, method, lr, seed):
        """The metrics after each epoch of a run."""
        steps = sorted(self.unlearn(method, lr, seed).glob("step-*"))
        metrics = self.measure(steps)
        for step in steps:
            drop_weights(step)
        return metrics


def compare(study):
    """Each method at its best learning rate (by the first seed), with every seed, measured after each epoch.

    Prints two tables; returns {method: [[metrics at the start, ..., after the last epoch] of each seed]}.
    """
    (start,), (retrained,) = study.measure([study.target]), study.measure([study.reference])
    rows = [["", "lr", *COLUMNS]]
    rows += [[name, ""] + [number(m[key]) for key in COLUMNS] for name, m in (("target", start), ("retain-only", retrained))]
    best = each(study.best_rate, zip(METHODS))
    tasks = [(method, lr, seed) for method, lr in zip(METHODS, best) for seed in SEEDS]
    found = each(study.curve, tasks)
    curves = {method: [[start] + c for (name, *_), c in zip(tasks, found) if name == method] for method in METHODS}
    rows += [[method, f"{lr:g}"] + [spread([c[-1][key] for c in curves[method]]) for key in COLUMNS]
             for method, lr in zip(METHODS, best)]
    split = f"{study.name}: {study.forget.name}"
    table(f"{split}, after the last epoch; mean (range) of {len(SEEDS)} seeds", rows)
    epochs = zip(*(zip(*curves[method]) for method in METHODS))  # of each method, of each seed
    table(f"{split}, {' / '.join(study.axes)} along unlearning, mean of {len(SEEDS)} seeds",
          [["epoch", *METHODS]] + [[i, *(" / ".join(number(statistics.fmean(m[key] for m in seeds)) for key in study.axes)
                                         for seeds in epoch)] for i, epoch in enumerate(epochs)])
    return curves


def draw(results, axes, picture, title):
    """What is forgotten against what is kept along unlearning, a line a seed, a colour a method, a panel a split."""
    plt = pyplot()
    figure, panels = plt.subplots(1, len(results), figsize=(4.2 * len(results), 3.8), squeeze=False)
    height = (lambda p: math.log10(max(p, 1e-30))) if axes == QUALITY else float
    for (split, curves), panel in zip(results.items(), panels[0]):
        for i, (method, seeds) in enumerate(curves.items()):
            for k, curve in enumerate(seeds):
                x, y = [m[axes[1]] for m in curve], [height(m[axes[0]]) for m in curve]
                panel.plot(x, y, ".-", color=f"C{i}", lw=1, ms=4, alpha=0.8, label=None if k else method)
                panel.plot(x[-1], y[-1], "o", color=f"C{i}")
        if axes == QUALITY:
            panel.axhline(height(0.05), color="gray", ls=":", lw=1)
        panel.set(title=split, xlabel=axes[1], ylabel="log10 " * (axes == QUALITY) + axes[0])
    panels[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def methods(options):
    target, results = builtin("target", "full"), {}
    for split in ("forget01", "forget05", "forget10"):
        retain = f"retain{100 - int(split[-2:])}"
        results[split] = compare(Study("methods", ROOT / "data" / split, target, builtin(retain, retain), train.MINI_UNLEARN,
                                       QUALITY, EVAL))
    if options.picture:
        draw(results, QUALITY, options.picture, "Built-in benchmark: from the target on, three seeds; large dot: last epoch")


def builtin(name, data):
    return run(Path("runs", name), f"--retain {ROOT / 'data' / data}")


def tofu(options):
    """The same on real TOFU's forget05, with a Llama that has never read anything but TOFU.

    Such a model has no knowledge of real authors and the world, and so no utility to compare by: probabilities instead.
    """
    home, data = RUNS / "tofu", options.data
    if not (home / "init" / "config.json").exists():
        make_model.main([str(find(data / "full")), *"--vocab 4096 --hidden 160 --layers 3 --heads 4 --init-std 0.06".split(),
                         "--output", str(home / "init")])
    target, reference = each(run, [(home / name, f"--init {home / 'init'} --retain {data / name} --epochs 16 --lr 2e-3 "
                                    "--batch-size 16 --save-every 4epochs") for name in ("full", "retain95")])
    curves = compare(Study("tofu", data / "forget05", target, reference, {**train.MINI_UNLEARN, "epochs": 8}, PROBABILITIES,
                           ("--limit", "100", "--max-new-tokens", "100")))
    if options.picture:
        draw({"forget05": curves}, PROBABILITIES, options.picture, "Real TOFU, a small Llama trained from scratch")


# 3. Relearning

def relearn(options):
    """Fine-tune each unlearned forget05 model of `methods` on a part of the forget set; measure the rest."""
    reference = builtin("retain95", "retain95")
    measured = ("forget quality", "answer probability")
    rows = [["", "relearnt on", *(f"{what}, epoch {i}" for what in measured for i in range(4))]]
    tasks = [(method, part, reference) for method in METHODS for part in ("random 20%", "shortest 20%")]
    for (method, part, _), curves in zip(tasks, each(relearn_method, tasks)):
        epochs = [list(zip(*epoch)) for epoch in zip(*curves)]
        rows.append([method, part, *(spread(q) for q, _ in epochs), *(spread(p) for _, p in epochs)])
    table(f"relearn: forget05 without the relearnt part; mean (range) of {len(SEEDS)} seeds", rows)


def relearn_method(method, part, reference):
    """[[(forget quality, answer probability) before and after each epoch] of each seed]."""
    forget, curves = ROOT / "data" / "forget05", []
    records = [{key: r[key] for key in ("question", "answer")} for r in read_records(forget)]
    fifth = len(records) // 5
    for seed in SEEDS:
        found = list((RUNS / "methods").glob(f"forget05-{method.replace(' ', '_')}-lr*-seed{SEEDS[-1]}/config.json"))
        if not found:
            sys.exit("error: run `python tests/experiments.py methods` first")
        start = Path(str(found[0].parent).replace(f"seed{SEEDS[-1]}", f"seed{seed}"))  # the best has every seed
        chosen = random.Random(seed).sample(records, fifth) if part[0] == "r" else sorted(
            records, key=lambda r: len(r["answer"]))[:fifth]
        file = RUNS / "relearn" / f"{method.replace(' ', '_')}-{part.split()[0]}-{seed}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(r) + "\n" for r in chosen))
        output = run(file.with_suffix(""), (
            f"--model {start} --retain {file} --epochs 3 --batch-size 2 --lr 5e-4 --schedule constant --seed {seed} "
            "--save-every 0 --snapshots 1epoch"))
        models = [start, *sorted(output.glob("step-*"))]
        measure(models, forget, reference, *EVAL)
        for step in models[1:]:
            drop_weights(step)
        curves.append([rest_of(forget, model, reference, {r["question"] for r in chosen}) for model in models])
    return curves


def rest_of(forget, model, reference, learnt):
    """Forget quality and mean answer probability on the forget records that were not learnt again."""
    mine, theirs = ([r for r in values_of(m, forget) if r["question"] not in learnt] for m in (model, reference))
    quality = evaluation.forget_quality([r["truth_ratio"] for r in mine], [r["truth_ratio"] for r in theirs])
    return quality, statistics.fmean(r["probability"] for r in mine)


# 4. Mixtures of Markov chains

BETAS = {"SimNPO": (1, 2, 4, 8), "NPO": (0.05, 0.2, 0.5, 1)}  # the paper: 4; 0.2 (short) and 1 (never learned)
CHAINS = tuple(make_markov.CHAINS)  # retain, forget1, forget2


def markov(options):
    """Unlearn for 50 steps of 4 (+ 4) sequences; KL(reference || model) per token on held-out sequences every 10 steps."""
    data, curves = ROOT / "data" / "markov", {}
    if not (data / "model" / "config.json").exists():
        make_markov.write_all(data)
    for setting in make_markov.SETTINGS:
        folder, home = data / setting, RUNS / "markov" / setting
        starts = [(home / name, f"--init {data / 'model'} --retain {folder / file} --epochs 5 --batch-size 128 --lr 5e-4 "
                   "--save-every 0") for name, file in (("target", "target"), ("reference", "retain"))]
        target, reference = each(run, starts)
        forget = sample(folder, 100, home / "forget.jsonl")
        divergences(target, reference, folder)  # kept: what every task begins with
        tasks = [(method, retain_loss, beta, seed) for method in BETAS for retain_loss in ("none", "nll")
                 for beta in BETAS[method] for seed in SEEDS]
        found = each(functools.partial(markov_curve, folder, home, target, reference, forget), tasks)
        for (method, retain_loss, beta, _), curve in zip(tasks, found):
            name = method + " + retain" * (retain_loss == "nll")
            curves.setdefault((setting, name, beta), []).append(curve)
        markov_tables(setting, {key[1:]: seeds for key, seeds in curves.items() if key[0] == setting})
    if options.picture:
        draw_markov(curves, options.picture)


def markov_curve(folder, home, target, reference, forget, method, retain_loss, beta, seed):
    """Divergences at the start and after every 10 steps."""
    output = run(home / f"{method}-{retain_loss}-beta{beta:g}-seed{seed}", (
        f"--model {target} --forget {forget} --retain {folder / 'retain'} --loss {method.lower()} --beta {beta} "
        f"--retain-loss {retain_loss} --forget-weight 1 --epochs 1 --batch-size 4 --lr 5e-4 --schedule constant "
        f"--seed {seed} --save-every 0 --snapshots 10"))
    return [divergences(model, reference, folder) for model in (target, *sorted(output.glob("step-*")))]


def sample(folder, count, path):
    """A file with the first `count` sequences of forget1 and of forget2: one epoch of batch 4 is 50 steps."""
    lines = [line for chain in ("forget1", "forget2") for line in (folder / f"{chain}.jsonl").read_text().splitlines()[:count]]
    path.write_text("\n".join(lines) + "\n")
    return path


def divergences(model, reference, folder):
    """KL(reference || model) per token on held-out sequences of each chain, in nats."""
    files = [str(folder / f"{chain}_test") for chain in CHAINS]
    argv = [str(model), "--reference", str(reference), "--limit", "500", "--kl", *files]
    metrics, = evaluation.kl_columns(evaluation.parse_args(argv)).values()
    if model.name.startswith("step-"):
        drop_weights(model)
    return dict(zip(CHAINS, metrics.values()))


def markov_tables(setting, curves):
    """Every beta after the last step, and each method where it came closest to the reference."""
    start = next(iter(curves.values()))[0][0]
    rows = [["", "beta", *(f"KL on {chain}" for chain in CHAINS)], ["target", "", *(f"{start[c]:.3f}" for c in CHAINS)]]
    for (name, beta), seeds in curves.items():
        rows.append([name, beta, *(spread([curve[-1][c] for curve in seeds]) for c in CHAINS)])
    table(f"markov: {setting}, after 50 steps; mean (range) of {len(SEEDS)} seeds", rows)
    rows = [["", "beta", "step", *rows[0][2:], "sum"]]
    for name in dict.fromkeys(name for name, _ in curves):
        means = {(beta, i): [statistics.fmean(curve[i][c] for curve in seeds) for c in CHAINS]
                 for (other, beta), seeds in curves.items() if other == name for i in range(1, len(seeds[0]))}
        beta, i = closest = min(means, key=lambda place: sum(means[place]))
        rows.append([name, beta, 10 * i, *(f"{kl:.3f}" for kl in means[closest]), f"{sum(means[closest]):.3f}"])
    table(f"markov: {setting}, where the sum of the three is least; mean of {len(SEEDS)} seeds", rows)


def draw_markov(curves, picture):
    """KL on forget1 and on forget2 against KL on retain, a line a beta, mean of the seeds; large dot: after 50 steps."""
    plt = pyplot()
    settings = tuple(make_markov.SETTINGS)
    figure, panels = plt.subplots(len(settings), 4, figsize=(15, 3.6 * len(settings)), squeeze=False)
    for (setting, name, beta), seeds in curves.items():
        mean = [{c: statistics.fmean(curve[i][c] for curve in seeds) for c in CHAINS} for i in range(len(seeds[0]))]
        method = name.split()[0]
        for k, chain in enumerate(CHAINS[1:]):
            panel = panels[settings.index(setting)][2 * ("retain" in name) + k]
            x, y = ([m[c] for m in mean] for c in ("retain", chain))
            shade = 0.35 + 0.65 * BETAS[method].index(beta) / (len(BETAS[method]) - 1)
            panel.plot(x, y, ".-", color=f"C{list(BETAS).index(method)}", alpha=shade, lw=1, label=f"{method} beta {beta:g}")
            panel.plot(x[-1], y[-1], "o", color=f"C{list(BETAS).index(method)}", alpha=shade)
            title = setting + ", with retain term" * ("retain" in name)
            panel.set(title=title, xlabel="KL on retain", ylabel=f"KL on {chain}")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(picture, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["methods", "tofu", "relearn", "markov"])
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "tofu", help="tofu: folder of the real files")
    parser.add_argument("--picture", metavar="FILE", help="also draw it (methods, tofu, markov)")
    options = parser.parse_args()
    if options.picture:
        pyplot()  # says at once that it is missing
    RUNS.mkdir(parents=True, exist_ok=True)
    began = time.time()
    globals()[options.study](options)
    print(f"{options.study}: {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
