"""What the studies share: runs of train.py and eval.py, equal pulls, what a model knows, tables."""

import contextlib
import csv
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import eval as evaluation  # noqa: E402
import train  # noqa: E402
from data.load import collate, load_examples  # noqa: E402
from simnpo import answer_logps, answer_token_logps, sum_answers  # noqa: E402

RUNS, FIGURES = Path("runs", "studies"), ROOT / "tests" / "figures"
PULLS = (0.25, 1)  # forget gradient's share of the retain gradient's norm, at the start

# {with, without reference} x {sum, mean over tokens}: two of the four are not in train.py.
train.LOSSES |= {
    "npo_mean": train.Loss(lambda y, args: train.npo_loss(
        y.logps / y.lengths, y.ref_logps / y.lengths, args.beta),
        {"beta": 2.5, "forget_weight": 1.0}, needs_reference=True),
    "simnpo_sum": train.Loss(lambda y, args: train.simnpo_loss(
        y.logps, torch.ones_like(y.logps), args.beta), {"beta": 0.3, "forget_weight": 1.0}),
}
FOUR = {"NPO (reference, sum)": "npo", "reference, mean": "npo_mean",
        "no reference, sum": "simnpo_sum", "SimNPO (no reference, mean)": "simnpo"}
STYLES = {method: {"color": color, "lw": width} for method, color, width in zip(
    FOUR, ("C1", "C6", "C2", "C0"), (2, 1.5, 1.5, 4))}  # NPO and SimNPO as in other pictures


# Runs

@functools.cache
def pool():
    count = int(os.environ.get("PROCESSES", os.cpu_count()))
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"),
                               torch.set_num_threads, (1,))


def each(function, tasks):
    """[function(*task) for task in tasks], a process a core, of one thread each."""
    return [future.result() for future in [pool().submit(function, *task) for task in tasks]]


def run(output, flags, probe=True, **paths):
    """The folder of train.py with these flags and --NAME PATH; made unless it is complete. Without
    `probe`, the probabilities after each epoch are left out: a fifth of so small a run."""
    if not (output / "config.json").exists():
        argv = [*flags.split(), *(f"--{name}={path}" for name, path in paths.items()),
                f"--output={output}", *["--resume"] * output.exists()]
        left_out = mock.patch.object(train, "probe", train.probe if probe else lambda *_: {})
        with left_out, contextlib.redirect_stdout(io.StringIO()):
            status = train.main(argv)
        if status:
            sys.exit(f"error: train.py {' '.join(argv)}: status {status}")
    return output


def builtin(name, data):
    """runs/base, runs/target or runs/retainNN, as train.py makes them."""
    return run(Path("runs", name), "", retain=ROOT / "data" / data)


def fine_tuned(output, data, seed, flags="--epochs 16", base=Path("runs", "base")):
    return run(output, f"--lr 5e-4 --save-every 0 --seed {seed} {flags}", probe=False, model=base,
               retain=data)


def curve(output):
    """[(step, forget probability, retain probability)] of a run: at the start, after each epoch."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["forget_prob"], line["retain_prob"]) for line in lines
            if "epoch" in line]


def keep_only(output, kept=None):
    """Remove a run's models, but for the snapshot `kept`; its metrics and results stay."""
    for path in output.glob("step-*"):
        if path != kept:
            shutil.rmtree(path)
    (output / "model.safetensors").unlink(missing_ok=True)


def stored(path, make):
    """What make() returned, kept as JSON at `path`; written whole or not at all."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(make()))
        path.with_suffix(".part").rename(path)
    return json.loads(path.read_text())


# What a model knows

def values_of(model, forget):
    """eval.py's values of every question: {split: [record]}."""
    return evaluated(model, f"{Path(forget).name}.jsonl", "--forget", str(forget), "--reference",
                     str(model), "--max-new-tokens", "50")


def evaluated(model, data, *flags):
    """The values that eval.py puts into the model's eval.json, if they are not there, under a key
    that ends in `data`."""
    file = model / "eval.json"
    entries = json.loads(file.read_text())["evaluations"] if file.exists() else {}
    if not any(key.endswith(data) for key in entries):
        with contextlib.redirect_stdout(io.StringIO()):
            status = evaluation.main([str(model), *flags])
        if status:
            sys.exit(f"error: eval.py {model} {' '.join(flags)}: status {status}")
        entries = json.loads(file.read_text())["evaluations"]
    return next(entry["values"] for key, entry in entries.items() if key.endswith(data))


def load(model, data, length=512):
    """A model and the Examples of a file, texts in chunks of `length` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return AutoModelForCausalLM.from_pretrained(model), load_examples(data, tokenizer, length)


@torch.no_grad()
def token_means(model, data, every=1, length=512):
    """log p(answer)/|answer| of every so many records of a file."""
    model, examples = load(model, data, length)
    means = []
    for i in range(0, len(examples[::every]), 25):
        logps, lengths = answer_logps(model, *collate(examples[::every][i:i + 25]))
        means += (logps / lengths).tolist()
    return means


def exp_mean(logps):
    """Mean probability from log-probabilities."""
    return statistics.fmean(map(math.exp, logps))


# Equal pull

def forget_weights(target, forget, retain, losses, length=512):
    """{(loss, flags): the --forget-weight that makes the forget gradient as long as the retain
    gradient at the target}.

    Either gradient is that of a mean over equally many sequences: all of `forget`, and as many of
    `retain`, evenly spread. So both are as noisy, and a target at rest (the mean gradient over all
    that it was trained on is near 0) is no special case.
    """
    model, forget = load(target, forget, length)
    _, retain = load(target, retain, length)
    retain = retain[::len(retain) // len(forget)][:len(forget)]
    wanted = gradient_norm(model, retain, train.Loss(lambda y, _: -y.logps / y.lengths, {}))
    weights = {}
    for loss, flags in losses:
        given = dict(zip(flags.split()[::2], map(float, flags.split()[1::2])))
        args = SimpleNamespace(gamma=0.0, beta=given.get("--beta"), beta2=given.get("--beta2", 1.0))
        weights[loss, flags] = wanted / gradient_norm(model, forget, train.LOSSES[loss], args)
    return weights


def gradient_norm(model, examples, loss, args=None):
    """Norm of the gradient of the mean of a train.Loss; the model is its own reference."""
    model.zero_grad()
    for i in range(0, len(examples), 25):
        ids, labels = collate(examples[i:i + 25])
        tokens = answer_token_logps(model, ids, labels, loss.per_token)
        logps, lengths = sum_answers(tokens, labels)
        answers = train.Answers(logps, lengths, tokens, logps.detach())
        (loss.function(answers, args).sum() / len(examples)).backward()
    return math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))


# Runs that are watched, and where they pass the retrained model

def watched(output, flags, target, forget, retain, goal, part=slice(None), length=512):
    """[(step, log p per token of each forget record, retain probability)] of an unlearning run,
    from the target on. Of its snapshots only the one is kept that is nearest to `goal`, the mean
    of the records in `part`; texts are in chunks of `length` tokens."""
    def measure():
        def known(model):
            return (token_means(model, forget, length=length),
                    exp_mean(token_means(model, retain, 8, length)))

        run(output, f"{flags} --save-every 0", False, model=target, forget=forget, retain=retain)
        found = [(0, *known(target))]
        found += [(int(path.name[5:]), *known(path)) for path in sorted(output.glob("step-*"))]
        keep_only(output, output / f"step-{nearest(found, goal, part)[0]:06d}")
        return found

    return stored(output.with_name(f"{output.name}.json"), measure)


def nearest(points, goal, part=slice(None)):
    """(step, mean log p of `part` less the goal, retain probability) of the snapshot that a watched
    run keeps."""
    after = [(step, statistics.fmean(knows[part]) - goal, kept) for step, knows, kept in points[1:]]
    return min(after, key=lambda at: abs(at[1]))


def crossing(points, goal, part=slice(None)):
    """(log p per token of each record, retain probability, step) where a watched run's mean over
    `part` is first `goal`, between snapshots by interpolation; None where it never is."""
    for (step, knew, kept), (after, knows, keeps) in itertools.pairwise(points):
        before, now = (statistics.fmean(known[part]) - goal for known in (knew, knows))
        if now <= 0:
            share = before / (before - now)
            return ([a + share * (b - a) for a, b in zip(knew, knows)],
                    kept + share * (keeps - kept), step + share * (after - step))
    return None


# Tables

def quantile(values, share):
    """Linear between the order statistics."""
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def number(x):
    if x is None:
        return "-"
    return f"{x:.1e}" if 0 < abs(x) < 5e-3 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def spread(values):
    """Mean and range, as text."""
    return f"{number(statistics.fmean(values))} ({number(min(values))} - {number(max(values))})"


def table(title, rows):
    """Print a Markdown table (rows of texts, the first the head)."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    print(f"\n{title}\n", *lines, sep="\n", flush=True)


def save_csv(name, rows):
    """tests/figures/NAME.csv of dictionaries with the same keys."""
    with open(FIGURES / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def pyplot():
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: --picture needs matplotlib, no requirement: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    return plt
