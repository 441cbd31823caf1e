"""The paper's claims, seen with one's own eyes: each table of the README by one command.

    python tests/experiments.py methods      SimNPO, NPO, GradDiff, gradient ascent on forget01, 05 and 10, epoch by epoch
    python tests/experiments.py relearn      how fast the unlearned models learn the forget set back (after methods)
    python tests/experiments.py markov       mixtures of Markov chains, the paper's synthetic study
    python tests/experiments.py tofu         `methods` on real TOFU with a small Llama trained from scratch

Everything is done by train.py and eval.py and kept under runs/experiments; a command that was cut off goes on where it
stopped. `--picture FILE` draws `methods` or `tofu` (needs matplotlib).
"""

import argparse
import contextlib
import io
import json
import math
import random
import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval as evaluation  # noqa: E402
import train  # noqa: E402
from data import make_markov, make_model  # noqa: E402
from data.load import read_records  # noqa: E402

RUNS = Path("runs", "experiments")
SEEDS = (0, 1, 2)
METHODS = {
    "SimNPO": "--loss simnpo --beta 2.5 --forget-weight 0.1375",
    "NPO": "--loss npo --beta 0.1 --forget-weight 1",
    "GradDiff": "--loss ga --forget-weight 1",
    "gradient ascent": "--loss ga --forget-weight 1 --retain-loss none",
}
LEARNING_RATES = {"SimNPO": (5e-4, 1e-3, 2e-3), "NPO": (5e-4, 1e-3, 2e-3), "GradDiff": (1e-4, 2e-4, 5e-4),
                  "gradient ascent": (5e-5, 1e-4, 2e-4)}


# Tools

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


def values_of(model):
    """The forget set's per-example records of a model that has been measured."""
    entries = json.loads((Path(model) / "eval.json").read_text())["evaluations"]
    return next(entry["values"]["forget"] for key, entry in entries.items() if key.startswith("tofu"))


def drop_weights(folder):
    """Keep of a measured snapshot only its eval.json."""
    for path in folder.iterdir():
        if path.name != "eval.json":
            path.unlink()


def spread(values, digits=2):
    """Mean and range over the seeds, as text."""
    form = "{:.1e}" if max(values) < 1e-3 else f"{{:.{digits}f}}"
    return f"{form.format(statistics.fmean(values))} ({form.format(min(values))} - {form.format(max(values))})"


def table(title, rows):
    """Print a Markdown table (rows of texts, the first the head) and keep it under runs/experiments."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    text = "\n".join(lines) + "\n"
    print(f"\n{title}\n\n{text}", flush=True)
    with (RUNS / "tables.md").open("a") as file:
        file.write(f"{title}\n\n{text}\n")


# 1. Methods, and 2. the same on real TOFU

def score_of(metrics):
    """What `best` means: the harmonic mean of forget quality and model utility at the last epoch."""
    quality, utility = metrics["forget quality (KS p)"], metrics["model utility"]
    return 2 * quality * utility / (quality + utility) if quality and utility else 0.0


def compare(name, folder, splits, target, references, common, learning_rates, eval_flags=()):
    """For each split and method: the best learning rate by the first seed, then every seed, epoch by epoch.

    Returns {(split, method): {"lr", "curves": [[metrics of epoch 0, 1, ...] of each seed]}}.
    """
    results = {}
    for split in splits:
        forget, reference = folder / split, references[split]
        start, = measure([target], forget, reference, *eval_flags)
        retrained, = measure([reference], forget, reference, *eval_flags)
        rows = [["", "best lr", "forget quality", "model utility", "forget probability", "retain probability"]]
        rows += [[label, ""] + [f"{m[key]:.2g}" for key in COLUMNS] for label, m in (("target", start), ("retain-only", retrained))]
        for method, flags in METHODS.items():
            if split == "forget10" and method == "SimNPO":
                flags = flags.replace("2.5", "4.5").replace("0.1375", "0.125")  # the paper's setting

            def unlearn(lr, seed, snapshots=""):
                output = RUNS / name / f"{split}-{method.replace(' ', '_')}-lr{lr:g}-seed{seed}"
                return run(output, f"--model {target} --forget {forget} {flags} {common} --lr {lr} --seed {seed} "
                           f"--save-every 0 --snapshots 1epoch")

            grid = {lr: measure([unlearn(lr, SEEDS[0])], forget, reference, *eval_flags)[0] for lr in learning_rates[method]}
            best = max(grid, key=lambda lr: score_of(grid[lr]))
            curves = []
            for seed in SEEDS:
                steps = sorted(unlearn(best, seed).glob("step-*"))
                curves.append([start] + measure(steps, forget, reference, *eval_flags))
                for step in steps:
                    drop_weights(step)
            results[split, method] = {"lr": best, "curves": curves}
            last = [curve[-1] for curve in curves]
            rows.append([method, f"{best:g}"] + [spread([m[key] for m in last]) for key in COLUMNS])
            print(f"{split} {method}: " + ", ".join(f"lr {lr:g}: {m['forget quality (KS p)']:.2g} / {m['model utility']:.2f}"
                                                   for lr, m in grid.items()), flush=True)
        table(f"{name}: {split}, after the last epoch; mean (range) of {len(SEEDS)} seeds", rows)
        head = ["forget quality / model utility", *(f"epoch {i}" for i in range(len(curves[0])))]
        table(f"{name}: {split}, epoch by epoch, mean of {len(SEEDS)} seeds", [head] + [
            [method, *(" / ".join(f"{statistics.fmean(m[key] for m in epoch):.2g}" for key in COLUMNS[:2])
                       for epoch in zip(*results[split, method]["curves"]))] for method in METHODS])
    return results


COLUMNS = ("forget quality (KS p)", "model utility", "forget probability", "retain probability")


def draw(results, picture, title):
    """Forget quality against model utility along unlearning, one line a method, one panel a split."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        sys.exit("error: --picture needs matplotlib, which is no requirement: pip install matplotlib")
    splits = list(dict.fromkeys(split for split, _ in results))
    figure, panels = plt.subplots(1, len(splits), figsize=(4.2 * len(splits), 3.8), squeeze=False)
    for split, panel in zip(splits, panels[0]):
        for method in METHODS:
            for i, curve in enumerate(results[split, method]["curves"]):
                x = [m["model utility"] for m in curve]
                y = [math.log10(max(m["forget quality (KS p)"], 1e-12)) for m in curve]
                line, = panel.plot(x, y, ".-", color=f"C{list(METHODS).index(method)}", alpha=0.8, lw=1, ms=4,
                                   label=None if i else method)
                panel.plot(x[-1], y[-1], "o", color=line.get_color())
        panel.axhline(math.log10(0.05), color="gray", ls=":", lw=1)
        panel.set(title=split, xlabel="model utility", ylabel="log10 forget quality")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def methods(options):
    data = ROOT / "data"
    target, references = builtin("target", "full"), {}
    splits = ("forget01", "forget05", "forget10")
    for split in splits:
        retain = f"retain{100 - int(split[-2:])}"
        references[split] = builtin(retain, retain)
    common = f"--epochs {train.MINI_UNLEARN['epochs']} --batch-size {train.MINI_UNLEARN['batch_size']}"
    results = compare("methods", data, splits, target, references, common, LEARNING_RATES)
    if options.picture:
        draw(results, options.picture, "Miniature benchmark: from the target, epoch by epoch, 3 seeds; large dot: last epoch")


def builtin(name, data):
    return run(Path("runs", name), f"--retain {ROOT / 'data' / data}")


# 3. Relearning

def relearn(options):
    """Fine-tune each unlearned forget05 model of `methods` on a part of the forget set; measure the rest."""
    forget, reference = ROOT / "data" / "forget05", builtin("retain95", "retain95")
    records = [{key: r[key] for key in ("question", "answer")} for r in read_records(forget)]
    fifth = len(records) // 5
    rows = [["", "relearnt on", *(f"forget quality, epoch {i}" for i in range(4)), *(f"answer probability, epoch {i}" for i in range(4))]]
    for method in METHODS:
        for part in ("random 20%", "shortest 20%"):
            curves = []
            for seed in SEEDS:
                found = sorted((RUNS / "methods").glob(f"forget05-{method.replace(' ', '_')}-lr*-seed{SEEDS[-1]}/config.json"))
                if not found:
                    sys.exit("error: run `python tests/experiments.py methods` first")
                start = Path(str(found[0].parent).replace(f"seed{SEEDS[-1]}", f"seed{seed}"))
                chosen = random.Random(seed).sample(records, fifth) if part[0] == "r" else sorted(
                    records, key=lambda r: len(r["answer"]))[:fifth]
                file = RUNS / "relearn" / f"{part.split()[0]}-{seed}.jsonl"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("".join(json.dumps(r) + "\n" for r in chosen))
                output = run(RUNS / "relearn" / f"{start.name}-{part.split()[0]}", f"--model {start} --retain {file} --epochs 3 "
                             f"--batch-size 2 --lr 5e-4 --schedule constant --seed {seed} --save-every 0 --snapshots 1epoch")
                models = [start, *sorted(output.glob("step-*"))]
                measure(models, forget, reference)
                for step in models[1:]:
                    drop_weights(step)
                curves.append([rest_of(model, reference, {r["question"] for r in chosen}) for model in models])
            epochs = [list(zip(*epoch)) for epoch in zip(*curves)]
            rows.append([method, part, *(spread(q) for q, _ in epochs), *(spread(p) for _, p in epochs)])
    table(f"relearn: forget05 without the relearnt part; mean (range) of {len(SEEDS)} seeds", rows)


def rest_of(model, reference, learnt):
    """Forget quality and mean answer probability on the forget records that were not learnt again."""
    mine, theirs = ([r for r in values_of(m) if r["question"] not in learnt] for m in (model, reference))
    quality = evaluation.forget_quality([r["truth_ratio"] for r in mine], [r["truth_ratio"] for r in theirs])
    return quality, statistics.fmean(r["probability"] for r in mine)
