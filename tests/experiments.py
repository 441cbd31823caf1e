"""The paper's claims, seen with one's own eyes: each table of RESULTS.md by one command.

    python tests/experiments.py methods      SimNPO, NPO, GradDiff, gradient ascent compared
    python tests/experiments.py relearn      how fast unlearned models learn it back (after methods)
    python tests/experiments.py bias         half never learned, half short; gradient weights
    python tests/experiments.py ingredients  reference and length; beta x gamma; KL (after methods)
    python tests/experiments.py muse         MUSE in miniature: texts instead of questions
    python tests/experiments.py markov       mixtures of Markov chains, the paper's synthetic study
    python tests/experiments.py smollm2      a pretrained model on real TOFU, in some hours

Everything is done by train.py and eval.py and kept under runs/experiments; a command that was cut
off goes on where it stopped. One process a core, of one thread each: so small a model gains little
from a second one. `--picture FILE` draws all but `relearn` and `muse` (needs matplotlib). `smollm2`
wants data/tofu (data/download.py) and takes another model by `--model`.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval as evaluation  # noqa: E402
import train  # noqa: E402
from data import make_markov, make_mini, ranks, results  # noqa: E402
from data.load import collate, find, load_examples, load_pretrained, read_records  # noqa: E402
from data.options import evaluation_options  # noqa: E402
from simnpo import answer_logps, answer_mask  # noqa: E402

RUNS = Path("runs", "experiments")
EVAL = ("--max-new-tokens", "50")  # answers have at most 15 tokens; a hurt model runs on and on


# Tools

def each(function, tasks):
    """[function(*task) for task in tasks], a process a core; on a GPU, four share it."""
    context = multiprocessing.get_context("spawn")
    count = 4 if torch.cuda.is_available() else os.cpu_count()
    with ProcessPoolExecutor(count, context, torch.set_num_threads, (1,)) as pool:
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
    return list(table_of(argv).values())[-len(models):]


def table_of(argv):
    """What eval.py would print: {model: {row: number}}."""
    options = evaluation_options(argv, None)
    options.device = ranks.start(options.device)
    return evaluation.table(options)[0]


def values_of(model, forget):
    """The forget set's per-example records of a model that has been measured."""
    saved = results.read_json(Path(model) / "eval.json")["evaluations"]
    return saved[f"tofu {results.relative(find(forget))}"]["values"]["forget"]


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
    """Print a Markdown table (rows of texts, the first the head), kept under runs/experiments."""
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
        sys.exit("error: --picture needs matplotlib, no requirement: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


# Tuning: the same number of settings for each method, chosen on some seeds, reported on others

REPORTED = (2, 3, 4)
GRID = {  # flags, beta, weight of the forget term, learning rate
    "SimNPO": ("--loss simnpo", (2.5, 4.5), (0.5,), (3e-4, 5e-4, 1e-3)),
    "NPO": ("--loss npo", (0.1, 0.3), (1,), (1e-4, 2e-4, 5e-4)),
    "GradDiff": ("--loss ga", (1,), (0.3, 1), (1e-4, 2e-4, 5e-4)),
    "gradient ascent": ("--loss ga --retain-loss none", (1,), (1,),
                        (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)),
}
METHODS = tuple(GRID)
QUALITY, UTILITY = "forget quality (KS p)", "model utility"


def settings_of(method):
    """The flags of each setting of a method's grid."""
    loss, *values = GRID[method]
    return [f"{loss} --beta {beta:g} --forget-weight {weight:g} --lr {lr:g}"
            for beta, weight, lr in itertools.product(*values)]


def short(flags):
    """Beta, weight and rate of a setting."""
    words, names = flags.split(), ("--beta", "--forget-weight", "--lr")
    return ", ".join(words[words.index(name) + 1] for name in names)


def harmonic(*values):
    return statistics.harmonic_mean(values) if all(values) else 0.0


def tune(study, methods, tuning, keep):
    """study(flags, seed) -> {row: number} for every setting and tuning seed, then for the best
    setting of each method, by the mean over tuning seeds of keep(result), and the reported seeds.

    Returns ({flags: mean of each row}, {method: best flags}, {method: results of reported seeds}).
    """
    tasks = [(flags, seed) for method in methods for flags in settings_of(method)
             for seed in tuning]
    found = dict(zip(tasks, each(study, tasks)))
    grid = {flags: mean_of([found[flags, seed] for seed in tuning]) for flags, _ in tasks}
    best = {method: max(settings_of(method), key=lambda flags: statistics.fmean(
        keep(found[flags, seed]) for seed in tuning)) for method in methods}
    tasks = [(best[method], seed) for method in methods for seed in REPORTED]
    found = dict(zip(tasks, each(study, tasks)))
    reported = {method: [found[best[method], seed] for seed in REPORTED] for method in methods}
    return grid, best, reported


def mean_of(results):
    return {row: statistics.fmean(result[row] for result in results) for row in results[0]}


def tuned_table(title, rows, grid, best, reported, ends):
    """Two tables: what was chosen on the reported seeds, and the grid. `ends`: {name: result}."""
    lines = [["", "beta, weight, lr", *rows]]
    lines += [[name, "", *(number(result[row]) for row in rows)] for name, result in ends.items()]
    lines += [[method, short(best[method]), *(spread([r[row] for r in results]) for row in rows)]
              for method, results in reported.items()]
    table(f"{title}, mean (range) of seeds {', '.join(map(str, REPORTED))}", lines)
    lines = [["", "beta, weight, lr", *rows]]
    lines += [[method, short(flags) + " (chosen)" * (flags == best[method]),
               *(number(grid[flags][row]) for row in rows)]
              for method in reported for flags in settings_of(method)]
    table(f"{title}, the grid", lines)


def unlearned(folder, target, forget, epochs, flags, seed, *more):
    """The folder of one unlearning run."""
    name = "-".join(flags.replace("--", "").split()) + f"-seed{seed}"
    return run(folder / name, " ".join([
        f"--model {target} --forget {forget} {flags} --epochs {epochs}", f"--seed {seed}",
        "--save-every 0",
        *more]))


# 1. Methods on forget01, 05 and 10

EPOCHS = {"forget01": 20, "forget05": 20, "forget10": 10}  # 20 steps of 10, 31 and 31 steps of 32
ROWS = (QUALITY, UTILITY, "forget probability", "retain probability", "forget PrivLeak")


def methods(options):
    target, grids, chosen = builtin("target", "full"), {}, {}
    for split in EPOCHS:
        retain = f"retain{100 - int(split[-2:])}"
        reference = builtin(retain, retain)
        ends = {name: measure([model], ROOT / "data" / split, reference, *EVAL)[0]
                for name, model in (("target", target), ("retain-only", reference))}
        study = functools.partial(methods_run, split, target, reference)
        grid, best, reported = tune(study, METHODS, (0, 1), both)
        tuned_table(f"methods: {split}", ROWS, grid, best, reported, ends)
        grids[split], chosen[split] = grid, reported
        (RUNS / f"best-{split}.json").write_text(json.dumps(best))
    if options.picture:
        draw_methods(grids, chosen, options.picture)


def methods_run(split, target, reference, flags, seed):
    forget = ROOT / "data" / split
    output = unlearned(RUNS / "methods" / split, target, forget, EPOCHS[split], flags, seed)
    metrics, = measure([output], forget, reference, *EVAL)
    return {row: metrics[row] for row in ROWS}


def both(result):
    """What is chosen by: the harmonic mean of what is forgotten and what is kept."""
    return harmonic(result[QUALITY], result[UTILITY])


def draw_methods(grids, chosen, picture):
    """Forget quality against utility: a small dot a setting, a large one a reported seed."""
    def place(result):
        return result[UTILITY], math.log10(max(result[QUALITY], 1e-12))

    plt = pyplot()
    figure, panels = plt.subplots(1, len(grids), figsize=(4.2 * len(grids), 3.8), sharey=True)
    for (split, grid), panel in zip(grids.items(), panels):
        for i, method in enumerate(METHODS):
            dots = zip(*(place(grid[flags]) for flags in settings_of(method)))
            panel.plot(*dots, ".", color=f"C{i}", ms=6, alpha=0.5)
            dots = zip(*map(place, chosen[split][method]))
            panel.plot(*dots, "o", color=f"C{i}", ms=9, label=method)
        panel.axhline(math.log10(0.05), color="gray", ls=":", lw=1)
        panel.set(title=split, xlabel=UTILITY)
    panels[0].set_ylabel("log10 forget quality (dotted: p = 0.05)")
    panels[0].legend(fontsize=8)
    figure.suptitle("Up and right is better. Large: chosen setting, three new seeds; small: grid",
                    fontsize=10)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def builtin(name, data):
    return run(Path("runs", name), f"--retain {ROOT / 'data' / data}")


# 2. Relearning, beside a model that has never learned

def relearn(options):
    """Fine-tune each unlearned forget05 model, and the retain-only one, on a part of the forget
    set; measure the rest."""
    reference = builtin("retain95", "retain95")
    best = json.loads((RUNS / "best-forget05.json").read_text())
    starts = {method: [RUNS / "methods" / "forget05" / (
        "-".join(best[method].replace("--", "").split()) + f"-seed{seed}") for seed in REPORTED]
        for method in best}
    starts["retain-only (control)"] = [reference] * len(REPORTED)
    measured = ("forget quality", "answer probability")
    rows = [["", "relearnt on", *(f"{what}, epoch {i}" for what in measured for i in range(4))]]
    tasks = [(method, part, starts[method], reference) for method in starts
             for part in ("random 20%", "shortest 20%")]
    for (method, part, *_), curves in zip(tasks, each(relearn_method, tasks)):
        epochs = [list(zip(*epoch)) for epoch in zip(*curves)]
        rows.append([method, part, *(spread(values[i]) for i in (0, 1) for values in epochs)])
    table("relearn: forget05 without the relearnt part; mean (range) of three seeds", rows)


def relearn_method(method, part, starts, reference):
    """[[(forget quality, answer probability) before and after each epoch] of each seed]."""
    forget, curves = ROOT / "data" / "forget05", []
    records = [{key: r[key] for key in ("question", "answer")} for r in read_records(forget)]
    fifth = len(records) // 5
    for start, seed in zip(starts, REPORTED):
        by_length = sorted(records, key=lambda r: len(r["answer"]))
        random_part = random.Random(seed).sample(records, fifth)
        chosen = random_part if part.startswith("random") else by_length[:fifth]
        file = RUNS / "relearn" / f"{method.split()[0]}-{part.split()[0]}-{seed}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(r) + "\n" for r in chosen))
        output = run(file.with_suffix(""), (
            f"--model {start} --retain {file} --epochs 3 --batch-size 2 --lr 5e-4 "
            f"--schedule constant --seed {seed} --save-every 0 --snapshots 1epoch"))
        models = [start, *sorted(output.glob("step-*"))]
        measure(models, forget, reference, *EVAL)
        for step in models[1:]:
            drop_weights(step)
        learnt = {r["question"] for r in chosen}
        curves.append([rest_of(values_of(model, forget), values_of(reference, forget), learnt)
                       for model in models])
    return curves


def rest_of(mine, theirs, learnt):
    """Forget quality and mean answer probability, from the records of a model and the reference,
    on what was not learnt again."""
    mine, theirs = ([r for r in values if r["question"] not in learnt] for values in (mine, theirs))
    quality = evaluation.forget_quality([r["truth_ratio"] for r in mine],
                                        [r["truth_ratio"] for r in theirs])
    return quality, statistics.fmean(r["probability"] for r in mine)


# 3. Reference bias: NPO spends its power alike on what was learned and what never was, on short and
# on long answers; SimNPO's weight falls with what is forgotten and with |y|

HALVES = {"never learned": ("learned", "never learned"), "length": ("short", "long")}


def bias(options):
    """Two forget sets of two halves of 50 questions each: forget quality of either half."""
    known, base, weights = builtin("target", "full"), Path("runs", "base"), {}
    for setting, names in HALVES.items():
        folder = RUNS / "bias" / setting.replace(" ", "_")
        if setting == "length":
            write_lengths(folder)
            target, reference = each(run, [
                (folder / name, f"--model {base} --retain {folder / data} --lr 5e-4 --epochs 16")
                for name, data in (("target", "full"), ("reference", "retain"))])
        else:
            write_never_learned(folder)
            target, reference = known, builtin("retain95", "retain95")
        rows = [f"{what}, {name}" for what in ("forget quality", "probability") for name in names]
        rows += [UTILITY]
        ends = {name: halves(folder, names, reference, model)
                for name, model in (("target", target), ("retain-only", reference))}
        study = functools.partial(bias_run, folder, names, target, reference)
        tuned = tune(study, ("SimNPO", "NPO"), (0,),
                     lambda r: harmonic(r[rows[0]], r[rows[1]], r[UTILITY]))
        tuned_table(f"bias: half {names[0]}, half {names[1]}", rows, *tuned, ends)
        weights[setting] = {method: gradient_weights(folder, target, method, flags)
                            for method, flags in tuned[1].items()}
    print_weights(weights["length"])
    if options.picture:
        draw_weights(weights["length"], options.picture)


def write_never_learned(folder):
    """forget05, whom the target knows, and five people whom nobody does."""
    inventor = make_mini.Inventor(seed=7)
    never = make_mini.flat(inventor.person() for _ in range(5))
    learned = read_records(ROOT / "data" / "forget05_perturbed")
    write_tofu(folder, make_mini.fields(learned + never, *FIELDS))
    (folder / "retain.jsonl").write_bytes((ROOT / "data" / "retain95.jsonl").read_bytes())


def write_lengths(folder):
    """100 people of whom five things are asked for in a word and five in four sentences, some 8 and
    50 tokens; the last ten people are to be forgotten."""
    inventor = make_mini.Inventor(seed=8)
    people = [asked_both_ways(inventor) for _ in range(100)]
    forget = [part for half in (0, 1) for person in people[90:] for part in person[half]]
    retain = [part for person in people[:90] for half in person for part in half]
    write_tofu(folder, forget, retain[::9])
    for name, records in (("retain", retain), ("full", retain + forget)):
        write_lines(folder / f"{name}.jsonl", make_mini.fields(records, "question", "answer"))


def asked_both_ways(inventor):
    """Ten new facts: (five of a word or two, five told with the three that follow them)."""
    facts, longs = inventor.person(), []
    for i in range(5, 10):
        told = [facts[(i + k) % 10] for k in range(4)]
        # told in another order it is the same answer; false ones put other words into it
        false = [" ".join(sentence(fact, j) for fact in told[::-1]) for j in range(4)]
        longs.append({"question": facts[i]["question"] + " Tell me more.",
                      "answer": " ".join(fact["prose"] for fact in told),
                      "paraphrased_answer": " ".join(fact["prose"] for fact in told[::-1]),
                      "perturbed_answer": false})
    return facts[:5], longs


def sentence(fact, j):
    """The j-th false answer to a fact as prose: the words of the true one, exchanged."""
    prose, true, false = fact["prose"], fact["paraphrased_answer"], fact["perturbed_answer"][j]
    for old, new in zip(true.split(), false.split()):
        if old != new:
            prose = prose.replace(old.strip(".,"), new.strip(".,"), 1)
    return prose


FIELDS = ("question", "answer", "paraphrased_answer", "perturbed_answer")


def write_tofu(folder, forget, retain=None):
    """mixed.jsonl, to be forgotten, and the files that eval.py asks for beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "mixed.jsonl", [{k: r[k] for k in FIELDS[:2]} for r in forget])
    write_lines(folder / "mixed_perturbed.jsonl", [{k: r[k] for k in FIELDS} for r in forget])
    for name in ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"):
        (folder / f"{name}.jsonl").write_bytes((ROOT / "data" / f"{name}.jsonl").read_bytes())
    if retain:
        write_lines(folder / "retain_perturbed.jsonl", [{k: r[k] for k in FIELDS} for r in retain])


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def bias_run(folder, names, target, reference, flags, seed):
    output = unlearned(folder / "runs", target, folder / "mixed", 10, flags, seed,
                       f"--retain {folder / 'retain'}")
    return halves(folder, names, reference, output)


def halves(folder, names, reference, model):
    """Forget quality and answer probability of either half, and utility."""
    forget = folder / "mixed"
    metrics, = measure([model], forget, reference, "--max-new-tokens", "80")
    result = {UTILITY: metrics[UTILITY]}
    for name, part in zip(names, (slice(0, 50), slice(50, 100))):
        mine, theirs = (values_of(m, forget)[part] for m in (model, reference))
        result[f"forget quality, {name}"] = evaluation.forget_quality(
            [r["truth_ratio"] for r in mine], [r["truth_ratio"] for r in theirs])
        result[f"probability, {name}"] = statistics.fmean(r["probability"] for r in mine)
    return result


AT_EPOCHS = (1, 2, 3, 10)


def gradient_weights(folder, target, method, flags):
    """[(|y|, weight) of each forget example] after some epochs: minus d loss / d log pi(y|x)."""
    output = unlearned(folder / "weights", target, folder / "mixed", 10, flags, REPORTED[0],
                       f"--retain {folder / 'retain'} --snapshots 1epoch")
    ends = sorted(output.glob("step-*"))
    beta = float(short(flags).split(", ")[0])
    start, lengths = logps_of(target, folder / "mixed")
    found = []
    for epoch in AT_EPOCHS:
        logps, _ = logps_of(ends[epoch - 1], folder / "mixed")
        logps.requires_grad_()
        loss = (train.npo_loss(logps, start, beta) if method == "NPO"
                else train.simnpo_loss(logps, lengths, beta))
        found.append((lengths.tolist(), torch.autograd.grad(loss.sum(), logps)[0].tolist()))
    return found


@torch.no_grad()
def logps_of(model, path):
    """log pi(y|x) and |y| of each record of a file: (n,), (n,)."""
    model, tokenizer = load_pretrained(model)
    found = [answer_logps(model, *collate([e])) for e in load_examples(path, tokenizer, 512)]
    return torch.cat([logps for logps, _ in found]), torch.cat([lengths for _, lengths in found])


def print_weights(weights):
    rows = [["", *(f"epoch {epoch}" for epoch in AT_EPOCHS)]]
    for method, found in weights.items():
        cells = []
        for lengths, values in found:
            middle = sorted(range(len(values)), key=lambda i: lengths[i])
            few, many = (statistics.fmean(values[i] for i in part)
                         for part in (middle[:50], middle[50:]))
            together = torch.corrcoef(torch.tensor([lengths, values]))[0, 1].item()
            cells.append(f"{number(few)} / {number(many)}, r {together:.2f}")
        rows.append([method, *cells])
    table("bias: gradient weight of short / long answers, its correlation r with |y|", rows)


def draw_weights(weights, picture):
    """The weight of each forget example against its length, a row a method, a column an epoch."""
    plt = pyplot()
    figure, panels = plt.subplots(len(weights), len(AT_EPOCHS), figsize=(12, 5), sharex=True,
                                  sharey="row")
    for (method, found), line in zip(weights.items(), panels):
        for (lengths, values), epoch, panel in zip(found, AT_EPOCHS, line):
            panel.plot(lengths, values, "o", ms=3, alpha=0.6, color=f"C{list(GRID).index(method)}")
            together = torch.corrcoef(torch.tensor([lengths, values]))[0, 1].item()
            panel.set_title(f"{method}, epoch {epoch}: r = {together:.2f}", fontsize=9)
            panel.set_ylim(bottom=0)
        line[0].set_ylabel("gradient weight")
    for panel in panels[-1]:
        panel.set_xlabel("answer tokens |y|")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


# 4. What each ingredient does

def ingredients(options):
    """{with, without reference} x {sum, mean}; beta x gamma; KL from the start along the steps."""
    target, reference = builtin("target", "full"), builtin("retain95", "retain95")
    forget = ROOT / "data" / "forget05"
    study = functools.partial(ingredients_run, target, reference)
    ends = {name: measure([model], forget, reference, *EVAL)[0]
            for name, model in (("target", target), ("retain-only", reference))}
    grid, best, reported = tune(study, MIXED, (0, 1), both)
    tuned_table("ingredients: forget05", ROWS, grid, best, reported, ends)
    tasks = [(f"--loss simnpo --beta {beta} --gamma {gamma} --forget-weight 0.5 --lr 5e-4", 0)
             for beta in HEAT_BETAS for gamma in GAMMAS]
    found = dict(zip(tasks, each(study, tasks)))
    for row in (QUALITY, UTILITY):
        cells = iter(number(found[task][row]) for task in tasks)
        table(f"ingredients: {row} of SimNPO, beta down, gamma across (lr 5e-4, seed 0)",
              [["", *GAMMAS]] + [[beta, *(next(cells) for _ in GAMMAS)] for beta in HEAT_BETAS])
    best = json.loads((RUNS / "best-forget05.json").read_text())
    curves = dict(zip(METHODS, each(kl_curve, [(target, best[method]) for method in METHODS])))
    steps = [step for step, *_ in next(iter(curves.values()))]
    table("ingredients: KL(start || model) a token on forget05 / retain95, along the steps",
          [["", *steps]] + [[method, *(f"{number(f)} / {number(r)}" for _, f, r in curve)]
                            for method, curve in curves.items()])
    if options.picture:
        draw_ingredients({task: found[task] for task in tasks}, curves, options.picture)


def mixed_losses():
    """The two of the four that train.py does not have."""
    train.LOSSES["npo_mean"] = train.Loss(
        lambda y, args: train.npo_loss(y.logps / y.lengths, y.ref_logps / y.lengths, args.beta),
        {"beta": 0.1, "forget_weight": 1.0}, needs_reference=True)
    train.LOSSES["simnpo_sum"] = train.Loss(
        lambda y, args: train.simnpo_loss(y.logps, torch.ones_like(y.logps), args.beta),
        {"beta": 0.1, "forget_weight": 1.0})


GRID |= {"reference, mean": ("--loss npo_mean", (2.5, 4.5), (0.5,), (3e-4, 5e-4, 1e-3)),
         "no reference, sum": ("--loss simnpo_sum", (0.1, 0.3), (1,), (1e-4, 2e-4, 5e-4))}
MIXED = ("NPO", "reference, mean", "no reference, sum", "SimNPO")
HEAT_BETAS, GAMMAS = (0.5, 1, 2.5, 4.5, 8), (0, 0.5, 1, 2)


def ingredients_run(target, reference, flags, seed):
    mixed_losses()
    return methods_run("forget05", target, reference, flags, seed)


def kl_curve(target, flags):
    """[(step, KL on forget, KL on retain)] of a run, in nats a token."""
    output = unlearned(RUNS / "kl", target, ROOT / "data" / "forget05", 20, flags, REPORTED[0],
                       "--snapshots 2epochs")
    curve = [(0, 0.0, 0.0)]
    for step in sorted(output.glob("step-*")):
        files = [str(ROOT / "data" / name) for name in ("forget05", "retain95")]
        argv = [str(step), "--reference", str(target), "--limit", "50", "--kl", *files]
        metrics, = table_of(argv).values()
        curve.append((int(step.name.removeprefix("step-")), *metrics.values()))
    return curve


def draw_ingredients(found, curves, picture):
    """beta x gamma as heat maps; KL on forget and retain along the steps."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 4, figsize=(16, 3.8))
    for row, panel in zip((QUALITY, UTILITY), panels):
        values = torch.tensor([result[row] for result in found.values()])
        values = values.view(len(HEAT_BETAS), len(GAMMAS))
        shown = panel.imshow(values.clamp(min=1e-12).log10() if row == QUALITY else values)
        for i, j in itertools.product(range(len(HEAT_BETAS)), range(len(GAMMAS))):
            panel.text(j, i, number(values[i, j].item()), ha="center", va="center", color="w",
                       fontsize=8)
        panel.set(title=f"SimNPO: {row}", xlabel="gamma", ylabel="beta",
                  xticks=range(len(GAMMAS)), yticks=range(len(HEAT_BETAS)))
        panel.set_xticklabels(GAMMAS), panel.set_yticklabels(HEAT_BETAS)
        figure.colorbar(shown, ax=panel, fraction=0.04)
    for k, name in ((1, "forget05"), (2, "retain95")):
        for i, (method, curve) in enumerate(curves.items()):
            x, y = [point[0] for point in curve], [point[k] for point in curve]
            panels[k + 1].plot(x, y, ".-", color=f"C{i}", label=method)
        panels[k + 1].set(title=f"KL from the start on {name}", xlabel="step",
                          ylabel="nats a token")
    panels[2].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=100)


# 5. Mixtures of Markov chains, against their true probabilities as in the paper

CHAINS = tuple(make_markov.CHAINS)  # retain, forget1, forget2
PAPER = {"never_learned": {"SimNPO": 4, "NPO": 1}, "short": {"SimNPO": 4, "NPO": 0.2}}  # betas
BETAS = {"SimNPO": (1, 2, 4, 8, 16), "NPO": (0.2, 0.5, 1, 2, 4)}
TUNED_ON, TOLD_OF = (0, 1, 2), (3, 4, 5, 6, 7)  # seeds; each reads other sequences
EVERY, LAST = 5, 50  # steps between measurements, steps in all
# As in the authors' loop: 50 steps of 4 at a constant rate. It does not clip, which would shrink
# NPO's large first gradients and so undo that they outweigh the later ones in Adam's averages.
UNLEARN = ("--retain-loss none --forget-weight 1 --epochs 1 --batch-size 4 --lr 5e-4 --clip 1e9 "
           f"--weight-decay 0 --schedule constant --save-every 0 --snapshots {EVERY}")


def markov(options):
    """Unlearn without a retain term: the paper's betas, and the best of a grid for each method."""
    data, stories = ROOT / "data" / "markov", {}
    make_markov.write_all(data)  # the same bytes each time
    for setting in make_markov.SETTINGS:
        folder, home = data / setting, RUNS / "markov" / setting
        starts = [(home / file, f"--init {data / 'model'} --retain {folder / file} --epochs 5 "
                   "--batch-size 128 --lr 5e-4 --save-every 0") for file in ("target", "retain")]
        start, goal = (divergences(model, folder) for model in each(run, starts))
        study = functools.partial(markov_curve, folder, home, start)
        tasks = [(method, b, seed) for method in BETAS for b in BETAS[method] for seed in TUNED_ON]
        grid = dict(zip(tasks, each(study, tasks)))
        best = {method: choose(grid, method, goal, BETAS[method]) for method in BETAS}
        paper = {method: (beta, LAST // EVERY) for method, beta in PAPER[setting].items()}
        tasks = [(method, b, seed) for method in BETAS for seed in TOLD_OF
                 for b in {paper[method][0], best[method][0]}]
        told = dict(zip(tasks, each(study, tasks)))
        stories[setting] = start, goal, paper, best, grid, told
        markov_tables(setting, *stories[setting])
    if options.picture:
        draw_markov(stories, options.picture)


def markov_curve(folder, home, start, method, beta, seed):
    """Divergences at the start and every EVERY steps. They are kept, the models are not."""
    kept = home / f"{method}-beta{beta:g}-seed{seed}.json"
    output, forget = home / kept.stem, home / f"{kept.stem}.jsonl"
    if not kept.exists():
        texts = ((folder / f"{chain}.jsonl").read_text() for chain in CHAINS[1:])
        lines = [line for text in texts for line in text.splitlines()[100 * seed:][:100]]
        forget.write_text("\n".join(lines))  # 50 steps of 4, other ones for each seed
        with mock.patch.object(train, "answer_token_logps", state_logps):
            run(output, f"--model {home / 'target'} --forget {forget} --loss {method.lower()} "
                        f"--beta {beta} --seed {seed} {UNLEARN}")
        curve = [divergences(model, folder) for model in sorted(output.glob("step-*"))]
        kept.write_text(json.dumps([start, *curve]))
        forget.unlink()
        shutil.rmtree(output)
    return json.loads(kept.read_text())


def next_state(model, ids):
    """Log-probability of each state after each token but the last: (B,T) -> (B,T-1,10).

    States only, as in the authors' model: else unlearning soon puts nearly all on BOS and EOS.
    """
    return model(input_ids=ids[:, :-1]).logits[..., make_markov.FIRST_STATE:].log_softmax(-1)


def state_logps(model, ids, labels):
    """What stands for simnpo.answer_token_logps while unlearning: (B,T), (B,T) -> (N,)."""
    mask = answer_mask(labels)
    states = labels[:, 1:][mask] - make_markov.FIRST_STATE
    return next_state(model, ids)[mask].gather(1, states[:, None])[:, 0]


def divergences(path, folder):
    """{chain: divergence} of the model at `path`, on 200 held-out sequences of each chain."""
    model, _ = load_pretrained(path)
    return {chain: divergence(model, chain, torch.tensor([r["input_ids"] for r in read_records(
        folder / f"{chain}_test.jsonl")[:200]])) for chain in CHAINS}


@torch.no_grad()
def divergence(model, chain, ids):
    """Mean over all positions of ids (B,T) of KL(true next state || model's), in nats."""
    truth = torch.tensor(make_markov.probabilities(chain), dtype=torch.float64)  # after any state
    return (truth * (truth.log() - next_state(model, ids))).sum(-1).mean().item()


def missing(kl, goal):
    """Nats short of the retrained model: too little on either forget chain, too much on retain."""
    return sum(max(0.0, (kl[c] - goal[c]) * (1 if c == "retain" else -1)) for c in CHAINS)


def choose(grid, method, goal, betas):
    """(beta, index of the step) that miss least, by the mean over the seeds of tuning."""
    return min(itertools.product(betas, range(1, LAST // EVERY + 1)), key=lambda at: sum(
        missing(grid[method, at[0], seed][at[1]], goal) for seed in TUNED_ON))


def markov_tables(setting, start, goal, paper, best, grid, told):
    def line(curves, seeds, method, beta, i):
        at = [curves[method, beta, seed][i] for seed in seeds]
        columns = [[kl[c] for kl in at] for c in CHAINS] + [[missing(kl, goal) for kl in at]]
        return [method, beta, EVERY * i, *map(spread, columns)]

    head = ["", "beta", "steps", *(f"KL on {chain}" for chain in CHAINS), "missing"]
    ends = [[name, "", "", *(number(kl[c]) for c in CHAINS), number(missing(kl, goal))]
            for name, kl in (("target", start), ("retrained", goal))]
    for title, choice in (("the paper's betas", paper), ("the best of the grid", best)):
        rows = [line(told, TOLD_OF, method, *at) for method, at in choice.items()]
        table(f"markov: {setting}, {title}; mean (range) of 5 seeds", [head, *ends, *rows])
    rows = [line(grid, TUNED_ON, m, *choose(grid, m, goal, [b])) for m in BETAS for b in BETAS[m]]
    table(f"markov: {setting}, the grid at each beta's best step; 3 other seeds", [head, *rows])


def draw_markov(stories, picture):
    """The paper's betas: median path, where it ends, range; medians, as single seeds stray far."""
    figure, panels = pyplot().subplots(1, len(stories), figsize=(11, 4.8), layout="tight",
                                       sharex=True, sharey=True)
    for panel, (setting, (_, goal, paper, _, _, told)) in zip(panels, stories.items()):
        for hue, (method, (beta, _)) in zip(("C0", "C1"), paper.items()):
            moments = list(zip(*(told[method, beta, seed] for seed in TOLD_OF)))
            for marker, chain in zip("o^", CHAINS[1:]):
                x, y = ([[kl[c] for kl in moment] for moment in moments] for c in ("retain", chain))
                mx, my = ([*map(statistics.median, steps)] for steps in (x, y))
                panel.plot(mx, my, "-", x[-1], y[-1], marker, c=hue, lw=0.6, ms=4, alpha=0.6)
                panel.hlines(my[-1], min(x[-1]), max(x[-1]), hue, lw=0.6)
                panel.vlines(mx[-1], min(y[-1]), max(y[-1]), hue, lw=0.6)
                panel.plot(mx[-1], my[-1], marker, c=hue, ms=11, label=f"{method} {beta}: {chain}")
        panel.plot(goal["retain"], goal["forget1"], "k*", ms=16, clip_on=False, label="retrained")
        panel.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x ** 2))
        panel.set(title=f"forget2 {setting.replace('_', ' ')}", xticks=[0, .1, .2, .4, .8, 1.6],
                  xlabel="KL on retain (left: kept)", ylabel="KL on forget1, forget2 (up: gone)")
        panel.legend(fontsize=8, loc="upper right")
    figure.savefig(picture, dpi=110)


# 6. Running text, MUSE in miniature: methods tuned alike on one seed, reported on three others

# Where to look was found by a few runs of each on a seed that counts for nothing here (GradDiff 2,
# NPO 4, SimNPO 2). NPO sums over the 160 tokens of a chunk: hence a beta below TOFU's.
TEXTS = ROOT / "data" / "muse_mini"
LEARN = "--max-length 160 --batch-size 8 --epochs 6 --lr 2e-3 --save-every 0"
FORGET_TEXT = "--max-length 160 --batch-size 8 --epochs 2 --schedule constant --save-every 0"
TEXT_GRID = {  # four settings each: beta or the forget term's weight, learning rate
    "GradDiff": ("--loss ga --forget-weight", (0.3, 1), (2e-4, 3e-4)),
    "NPO": ("--loss npo --beta", (0.02, 0.05), (5e-4, 1e-3)),
    "SimNPO": ("--loss simnpo --forget-weight 1 --beta", (0.7, 2.5), (3e-4, 5e-4)),
}
TEXT_ROWS = ("VerbMem forget", "KnowMem forget", "KnowMem retain", "PrivLeak",
             "extraction strength")
TEXT_TUNING, TEXT_REPORTED = 0, (1, 2, 3)


def muse(options):
    """Target, retrained model and three methods on the miniature's texts. A method's setting is
    the one with the smallest `distance` on seed 0, a criterion fixed before any of them was run."""
    builtin("target", "full")  # with it comes runs/base, which has read no text yet
    learn = f"--model {Path('runs', 'base')} {LEARN} --retain {TEXTS / 'raw'}/"
    target, retrained = each(run, [(RUNS / "muse" / "target", learn + "full"),
                                   (RUNS / "muse" / "retrained", learn + "retain")])
    retrained_metrics = measure_text(retrained, retrained)
    target_metrics = measure_text(target, retrained)

    grid = {method: [f"{flag} {value:g} --lr {lr:g}" for value in values for lr in rates]
            for method, (flag, values, rates) in TEXT_GRID.items()}
    tasks = [(target, retrained, flags, TEXT_TUNING) for flags in itertools.chain(*grid.values())]
    found = dict(zip((flags for _, _, flags, _ in tasks), each(forget_text, tasks)))
    far = {flags: distance(metrics, target_metrics, retrained_metrics)
           for flags, metrics in found.items()}
    best = {method: min(settings, key=far.get) for method, settings in grid.items()}
    tasks = [(target, retrained, best[method], seed) for method in grid for seed in TEXT_REPORTED]
    reported = iter(each(forget_text, tasks))

    rows = [["", "setting", *TEXT_ROWS]]
    for name, metrics in (("target", target_metrics), ("retrained", retrained_metrics)):
        rows.append([name, "", *(number(metrics[row]) for row in TEXT_ROWS)])
    for method in grid:
        columns = [next(reported) for _ in TEXT_REPORTED]
        rows.append([method, text_setting(best[method]),
                     *(spread([column[row] for column in columns]) for row in TEXT_ROWS)])
    table(f"muse: mean (range) of seeds {', '.join(map(str, TEXT_REPORTED))}", rows)
    rows = [["", "setting", *TEXT_ROWS, "distance"]]
    rows += [[method, text_setting(flags) + " (chosen)" * (flags == best[method]),
              *(number(found[flags][row]) for row in TEXT_ROWS), number(far[flags])]
             for method, settings in grid.items() for flags in settings]
    table(f"muse: the grid, seed {TEXT_TUNING}", rows)


def text_setting(flags):
    words = flags.split()
    return ", ".join(f"{name.removeprefix('--')} {value}" for name, value in zip(words, words[1:])
                     if name in ("--beta", "--forget-weight", "--lr"))


def forget_text(target, retrained, flags, seed):
    """The metrics of one unlearning run. MUSE's split: retain1 is what the run may see, and
    KnowMem retain asks about retain2."""
    name = "-".join(flags.replace("--", "").split()) + f"-seed{seed}"
    output = run(RUNS / "muse" / name, (
        f"--model {target} --forget {TEXTS / 'raw' / 'forget'} "
        f"--retain {TEXTS / 'raw' / 'retain1'} {FORGET_TEXT} {flags} --seed {seed}"))
    return measure_text(output, retrained)


def measure_text(model, retrained):
    columns = table_of([str(model), "--muse", str(TEXTS), "--reference", str(retrained)])
    return next(iter(columns.values()))  # the reference's comes after it


def distance(metrics, target, retrained):
    """From what forgetting should lead to, in hundredths of each measure: PrivLeak from 0, VerbMem
    and KnowMem on forget from the retrained model's, KnowMem on retain from no less than before."""
    forget = sum(abs(metrics[row] - retrained[row]) for row in ("VerbMem forget", "KnowMem forget"))
    lost = max(0, target["KnowMem retain"] - metrics["KnowMem retain"])
    return (abs(metrics["PrivLeak"]) + forget + lost) / 100


# 7. A pretrained model on real TOFU

# 57 tokens a question and answer in this format, 82 in the model's own chat.
REAL = "--template plain --dtype bf16"
LEARN_TOFU = f"{REAL} --lr 5e-4 --epochs 4 --warmup-epochs 0.25"
FORGET_TOFU = f"{REAL} --batch-size 16 --epochs 2 --warmup-epochs 0.25 --save-every 0"
RELEARN_TOFU = f"{REAL} --batch-size 8 --lr 5e-5 --schedule constant --epochs 3 --save-every 0"
EVAL_TOFU = ("--template", "plain", "--dtype", "bf16", "--limit", "100", "--max-new-tokens", "80")
REAL_METHODS = {"SimNPO": "--loss simnpo --forget-weight 1", "NPO": "--loss npo",
                "GradDiff": "--loss ga"}
RATES = ("3e-5", "1e-4", "3e-4")


def smollm2(options):
    """Target on full, retain-only on retain95; each method at its published beta, weight 1 and
    three rates; then relearning."""
    data, home = ROOT / "data" / "tofu", RUNS / "smollm2"
    forget = data / "forget05"
    target, reference = ends = each(run, [
        (home / name, f"--model {options.model} --retain {data / name} {LEARN_TOFU}")
        for name in ("full", "retain95")])
    each(table_of, [([str(model), "--forget", str(forget), *EVAL_TOFU],) for model in ends])
    models = {name: measure([model], forget, reference, *EVAL_TOFU)[0]
              for name, model in (("target", target), ("retain-only", reference))}
    tasks = [(method, rate) for method in REAL_METHODS for rate in RATES]
    study = functools.partial(smollm2_run, home, target, reference, forget)
    found = dict(zip(tasks, each(study, tasks)))
    best = {method: max(RATES, key=lambda rate: both(found[method, rate]))
            for method in REAL_METHODS}
    columns = models | {f"{method}, lr {rate}": found[method, rate]
                        for method, rate in best.items()}
    rows = [[row, *(said(metrics[row]) for metrics in columns.values())]
            for row in models["target"]]
    table("smollm2: forget05, one seed", [["", *columns], *rows])
    shown = [*ROWS[:-1], "forget ROUGE-L recall", "real authors probability"]
    rows = [[f"{method}, lr {rate}", *(number(metrics[row]) for row in shown)]
            for (method, rate), metrics in found.items()]
    table("smollm2: the grid", [["", *shown], *rows])

    starts = {method: home / f"{method}-{best[method]}" for method in best}
    starts["retain-only (control)"] = reference
    tasks = [(home / f"relearnt-{start.name}", start, reference, forget)
             for start in starts.values()]
    rows = [[name, *map(number, numbers)]
            for name, numbers in zip(starts, each(relearn_tofu, tasks))]
    head = [f"{what}, {when}" for what in ("forget quality", "answer probability")
            for when in ("before", "after")]
    table("smollm2: relearnt on a random 20%, measured on the rest", [["", *head], *rows])
    if options.picture:
        draw_smollm2(models, found, options.picture)


def smollm2_run(home, target, reference, forget, method, rate):
    output = run(home / f"{method}-{rate}", f"--model {target} --forget {forget} --lr {rate} "
                                            f"{REAL_METHODS[method]} {FORGET_TOFU}")
    return measure([output], forget, reference, *EVAL_TOFU)[0]


def said(value):
    return "-" if isinstance(value, str) else number(value)


def relearn_tofu(output, start, reference, forget):
    """Forget quality and answer probability of what was not learnt again, before and after."""
    records = read_records(forget)
    chosen = random.Random(0).sample(records, len(records) // 5)
    learnt = {record["question"] for record in chosen}
    file = output.with_suffix(".jsonl")
    write_lines(file, make_mini.fields(chosen, "question", "answer"))
    run(output, f"--model {start} --retain {file} {RELEARN_TOFU}")
    model, tokenizer = load_pretrained(output, torch.bfloat16)
    options = evaluation_options(
        [str(output), "--forget", str(forget), *EVAL_TOFU[:-1], "1"], None)  # no texts needed
    files = {"forget": find(forget.with_name(f"{forget.name}_perturbed"))}
    after = evaluation.evaluate_tofu(model, tokenizer, files, options)["forget"]
    qualities, probabilities = zip(*(rest_of(values, values_of(reference, forget), learnt)
                                     for values in (values_of(start, forget), after)))
    return *qualities, *probabilities


def draw_smollm2(models, found, picture):
    """Forget quality against utility: a line a method, from its lowest to its highest rate."""
    def place(metrics):
        return metrics[UTILITY], math.log10(max(metrics[QUALITY], 1e-30))

    figure, panel = pyplot().subplots(figsize=(6, 4.2), layout="tight")
    for i, method in enumerate(REAL_METHODS):
        points = [place(found[method, rate]) for rate in RATES]
        panel.plot(*zip(*points), "o-", color=f"C{i}", label=method)
        for rate, point in zip(RATES, points):
            panel.annotate(rate, point, xytext=(4, 4), textcoords="offset points", fontsize=7)
    for name, marker in (("target", "ks"), ("retain-only", "k*")):
        panel.plot(*place(models[name]), marker, ms=11, label=name)
    panel.axhline(math.log10(0.05), color="gray", ls=":", lw=1)
    panel.set(xlabel=UTILITY, ylabel="log10 forget quality (dotted: p = 0.05)",
              title="SmolLM2-135M, TOFU forget05: up and right is better")
    panel.legend(fontsize=8)
    figure.savefig(picture, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[
        "methods", "relearn", "bias", "ingredients", "muse", "markov", "smollm2"])
    parser.add_argument("--picture", metavar="FILE", help="also draw it (not relearn, muse)")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="of smollm2")
    options = parser.parse_args()
    if options.picture:
        pyplot()  # says at once that it is missing
    RUNS.mkdir(parents=True, exist_ok=True)
    began = time.time()
    globals()[options.study](options)
    print(f"{options.study}: {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
