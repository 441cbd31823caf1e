"""The paper's claims, seen with one's own eyes: each study of RESULTS.md by one command.

    python tests/studies/experiments.py methods      SimNPO, NPO, GradDiff, gradient ascent compared
    python tests/studies/experiments.py relearn      how fast unlearned models learn it back (after methods)
    python tests/studies/experiments.py bias         half never learned, half short; gradient weights
    python tests/studies/experiments.py ingredients  reference and length; beta x gamma; KL (after methods)
    python tests/studies/experiments.py muse         MUSE in miniature: texts instead of questions
    python tests/studies/experiments.py markov       mixtures of Markov chains, the paper's synthetic study
    python tests/studies/experiments.py smollm2      a pretrained model on real TOFU, in some hours

Everything is done by train.py and eval.py and kept under runs/experiments; a command that was cut
off goes on where it stopped. (What is complete is not made again: delete it if you change how it is
made.) One process a core, of one thread each: so small a model gains little from a second one.
`--picture FILE` also draws what comes out (needs matplotlib). `smollm2` wants
data/tofu (data/download.py) and takes another model by `--model`.
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

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import eval as evaluation  # noqa: E402
import train  # noqa: E402
from data import make_mini  # noqa: E402
from data.load import collate, find, load_examples, load_pretrained, read_records  # noqa: E402
from data.support import distributed, evaluations  # noqa: E402
from data.support.data_files import tofu_records  # noqa: E402
from data.support.options import evaluation_options  # noqa: E402
from studies import make_markov  # noqa: E402
from simnpo import answer_logps, answer_mask  # noqa: E402

RUNS = Path("runs", "experiments")
EVAL = ("--max-new-tokens", "50")  # answers have at most 15 tokens; a hurt model runs on and on


# Tools

@functools.cache
def pool():
    """A process a core; on a GPU, four share it. They stay, as each takes seconds to start."""
    count = 4 if torch.cuda.is_available() else os.cpu_count()
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"),
                               torch.set_num_threads, (1,))


def each(function, tasks):
    """[function(*task) for task in tasks], several at a time."""
    return [future.result() for future in [pool().submit(function, *task) for task in tasks]]


def run(output, flags, **paths):
    """train.py with these flags and --NAME PATH, unless its output is complete. Without its probe
    after each epoch, which would be up to half of so small a run and is not looked at here."""
    if not (output / "config.json").exists() and not (output / "eval.json").exists():
        argv = [*flags.split(), *(f"--{name}={path}" for name, path in paths.items()),
                f"--output={output}", *["--resume"] * output.exists()]
        no_probe = mock.patch.object(train, "probe", lambda *_: {})
        with no_probe, contextlib.redirect_stdout(io.StringIO()):
            status = train.main(argv)
        if status:
            sys.exit(status)
    return output


def builtin(name, data):
    return run(Path("runs", name), "", retain=ROOT / "data" / data)


def measure(models, forget, reference, *flags):
    """eval.py's metrics of each model, in order."""
    argv = [*map(str, models), "--forget", str(forget), "--reference", str(reference), *flags]
    return list(table_of(argv).values())[-len(models):]


def table_of(argv):
    """What eval.py would print: {model: {row: number}}."""
    options = evaluation_options(argv, None)
    options.device = distributed.start(options.device)
    return evaluation.table(options)[0]


def values_of(model, forget):
    """The forget set's per-example records of a model that has been measured."""
    saved = evaluations.read_json(Path(model) / "eval.json")["evaluations"]
    return saved[f"tofu {evaluations.relative(find(forget))}"]["values"]["forget"]


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
    """Print a Markdown table (rows of texts, the first the head)."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    print(f"\n{title}\n", *lines, sep="\n", flush=True)


def pyplot():
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: --picture needs matplotlib, no requirement: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


# Tuning: the same number of settings for each method, chosen on some seeds, reported on others

EPOCHS = 20  # on 10, 50 and 100 examples: 20 steps of 10, 31 and 62 steps of 32
REPORTED = (2, 3, 4)
RATES = (1e-4, 2e-4, 5e-4, 1e-3)
QUALITY, UTILITY = "forget quality (KS p)", "model utility"


def settings(flags, values):
    """The flags of each setting of a method: each value, the last flag's, at each rate."""
    return [f"{flags} {value:g} --lr {lr:g}" for value in values for lr in RATES]


GRID = {
    "SimNPO": settings("--loss simnpo --forget-weight 0.5 --beta", (1.5, 2.5, 4.5)),
    "NPO": settings("--loss npo --forget-weight 1 --beta", (0.1, 0.3, 1)),
    "GradDiff": settings("--loss ga --forget-weight", (0.1, 0.3, 1)),
    "gradient ascent": settings("--loss ga --retain-loss none --epochs", (5, 10, 20)),
}


def varied(flags):
    """(What is varied beside the rate, its value)."""
    name, value, _, _ = flags.split()[-4:]
    return name.removeprefix("--"), float(value)


def short(flags):
    name, value = varied(flags)
    return f"{name} {value:g}, lr {flags.split()[-1]}"


def tune(study, grid, tuning, keep):
    """study(flags, seed) -> {row: number} for every setting and tuning seed, then for the best
    setting of each method, by the mean over tuning seeds of keep(result), and the reported seeds.

    `grid`: {method: [flags]}. Returns ({flags: mean of each row}, {method: best flags}, {method:
    results of reported seeds}).
    """
    tasks = [(flags, seed) for method in grid for flags in grid[method] for seed in tuning]
    found = dict(zip(tasks, each(study, tasks)))
    means = {flags: mean_of([found[flags, seed] for seed in tuning]) for flags, _ in tasks}
    best = {method: max(grid[method], key=lambda flags: statistics.fmean(
        keep(found[flags, seed]) for seed in tuning)) for method in grid}
    tasks = [(best[method], seed) for method in grid for seed in REPORTED]
    found = dict(zip(tasks, each(study, tasks)))
    reported = {method: [found[best[method], seed] for seed in REPORTED] for method in grid}
    return means, best, reported


def mean_of(found):
    return {row: statistics.fmean(result[row] for result in found) for row in found[0]}


def tuned_tables(title, ends, grid, means, best, reported, shown):
    """Two tables: what was chosen on the reported seeds, and `shown` of each setting of the grid.
    `ends`: {name: result} of the models that are not unlearned."""
    rows = list(next(iter(means.values())))
    lines = [["", "setting", *rows]]
    lines += [[name, "", *(number(result[row]) for row in rows)] for name, result in ends.items()]
    lines += [[method, short(best[method]), *(spread([r[row] for r in reported[method]])
                                              for row in rows)] for method in grid]
    table(f"{title}: mean (range) of seeds {', '.join(map(str, REPORTED))}", lines)
    lines = [["", "", *(f"lr {lr:g}" for lr in RATES)]]
    for method in grid:
        cells = [" / ".join(number(means[flags][row]) for row in shown) for flags in grid[method]]
        cells[grid[method].index(best[method])] += " (chosen)"
        for i in range(0, len(cells), len(RATES)):
            name, value = varied(grid[method][i])
            lines.append([method, f"{name} {value:g}", *cells[i:i + len(RATES)]])
    table(f"{title}, the grid: {' / '.join(shown)}", lines)


def name_of(flags, seed):
    """The folder of a run."""
    return "-".join(flags.replace("--", "").split()) + f"-seed{seed}"


def unlearned(folder, target, forget, flags, seed, more="", **paths):
    """The output of one unlearning run. `flags` may have epochs of their own."""
    return run(folder / name_of(flags, seed),
               f"--epochs {EPOCHS} {flags} --seed {seed} --save-every 0 {more}",
               model=target, forget=forget, **paths)


# 1. Methods on forget01, 05 and 10

ROWS = (QUALITY, UTILITY, "forget probability", "retain probability", "forget PrivLeak")
BEST = RUNS / "best.json"  # what `methods` chose, for those that start from it


def best_of(split):
    if not BEST.exists():
        sys.exit("error: it starts from what `methods` chose; run that first")
    return json.loads(BEST.read_text())[split]


def methods(options):
    target, stories, best = builtin("target", "full"), {}, {}
    for split in ("forget01", "forget05", "forget10"):
        retain = f"retain{100 - int(split[-2:])}"
        ends = {"target": target, "retain-only": builtin(retain, retain)}
        study = functools.partial(methods_run, split, *ends.values())
        ends = {name: measured(model, split, ends["retain-only"]) for name, model in ends.items()}
        tuned = tune(study, GRID, (0, 1), both)
        tuned_tables(f"methods: {split}", ends, GRID, *tuned, (QUALITY, UTILITY))
        stories[split] = ends, *tuned
        best[split] = tuned[1]
    BEST.write_text(json.dumps(best))
    if options.picture:
        draw_methods(stories, options.picture)


def methods_run(split, target, reference, flags, seed):
    output = unlearned(RUNS / "methods" / split, target, ROOT / "data" / split, flags, seed)
    return measured(output, split, reference)


def measured(model, split, reference):
    metrics, = measure([model], ROOT / "data" / split, reference, *EVAL)
    return {row: metrics[row] for row in ROWS}


def both(result):
    """What is chosen by: the harmonic mean of what is forgotten and what is kept."""
    return statistics.harmonic_mean((result[QUALITY], result[UTILITY]))


def draw_methods(stories, picture):
    """Forget quality against utility: a small dot a setting, a large one a reported seed."""
    def place(*found):
        """What is worse than the panel's edge lies on the edge."""
        return ([max(result[UTILITY], 0.6) for result in found],
                [math.log10(max(result[QUALITY], 1e-5)) for result in found])

    figure, panels = pyplot().subplots(1, len(stories), figsize=(4.2 * len(stories), 4),
                                       sharey=True, layout="tight")
    for (split, (ends, means, _, reported)), panel in zip(stories.items(), panels):
        for i, method in enumerate(GRID):
            panel.plot(*place(*(means[flags] for flags in GRID[method])), ".", color=f"C{i}",
                       alpha=0.5, clip_on=False)
            panel.plot(*place(*reported[method]), "o", color=f"C{i}", ms=9, mec="w",
                       label=method, clip_on=False)
        for (name, end), marker in zip(ends.items(), ("ks", "k*")):
            panel.plot(*place(end), marker, ms=12, label=name, clip_on=False)
        panel.axhline(math.log10(0.05), color="gray", ls=":", lw=1)
        panel.set(title=split, xlabel="model utility", xlim=(0.6, 1), ylim=(-5, 0.2))
    panels[0].set_ylabel("log10 forget quality (dotted: p = 0.05)")
    panels[0].legend(fontsize=8, loc="center left")
    figure.suptitle("Up and right is better. Large: the chosen setting, three new seeds; small: "
                    "the grid. What lies further out is drawn on the edge", fontsize=10)
    figure.savefig(picture, dpi=110)


# 2. Relearning, beside a model that has never learned

PARTS = ("random 20%", "shortest 20%")


def relearn(options):
    """Fine-tune each unlearned forget05 model, and the retain-only one, on a part of the forget
    set; measure the rest."""
    reference = builtin("retain95", "retain95")
    starts = {method: [RUNS / "methods" / "forget05" / name_of(flags, seed) for seed in REPORTED]
              for method, flags in best_of("forget05").items()}
    starts["retain-only (control)"] = [reference] * len(REPORTED)
    names = list(itertools.product(starts, PARTS))
    tasks = [(starts[method], part, reference) for method, part in names]
    found = dict(zip(names, each(relearn_method, tasks)))
    rows = [["", "relearnt on", *(f"{what}, {when}" for what in (
        "forget quality", "answer probability") for when in ("before", "after"))]]
    rows += [[*start, *(spread([curve[at][i] for curve in curves]) for i in (0, 1)
                        for at in (0, -1))] for start, curves in found.items()]
    table("relearn: forget05 without the relearnt part; mean (range) of three seeds", rows)
    if options.picture:
        draw_relearn(found, options.picture)


def relearn_method(starts, part, reference):
    """[[(forget quality, answer probability) before and after each epoch] of each seed]."""
    forget, curves = ROOT / "data" / "forget05", []
    records = read_records(forget)
    fifth = len(records) // 5
    for start, seed in zip(starts, REPORTED):
        by_length = sorted(records, key=lambda r: len(r["answer"]))
        random_part = random.Random(seed).sample(records, fifth)
        chosen = random_part if part.startswith("random") else by_length[:fifth]
        output = RUNS / "relearn" / part.split()[0] / f"{start.name}-relearnt{seed}"
        file = output.with_name(f"{output.name}.jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_lines(file, make_mini.fields(chosen, "question", "answer"))
        run(output, f"--epochs 3 --batch-size 2 --lr 5e-4 --schedule constant --seed {seed} "
            "--save-every 0 --snapshots 1epoch", model=start, retain=file)
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


def draw_relearn(found, picture):
    """Answer probability along the epochs, a panel a part: mean and range of the seeds."""
    figure, panels = pyplot().subplots(1, len(PARTS), figsize=(10, 4), sharey=True, layout="tight")
    for i, ((method, part), curves) in enumerate(found.items()):
        panel, color = panels[PARTS.index(part)], f"C{i // 2}"
        style = {"color": "k", "ls": "--"} if "control" in method else {"color": color}
        epochs = [[probability for _, probability in epoch] for epoch in zip(*curves)]
        panel.plot([*map(statistics.fmean, epochs)], **style, label=method)
        panel.fill_between(range(len(epochs)), [*map(min, epochs)], [*map(max, epochs)],
                           color=style["color"], alpha=0.15)
        panel.set(title=f"relearnt on: {part}", xlabel="epochs of relearning", xticks=range(4))
    panels[0].set(ylabel="probability of the other forget answers", ylim=(0, None))
    panels[0].legend(fontsize=8)
    figure.suptitle("The dashed one never learned them: what rises above it had only been hidden",
                    fontsize=10)
    figure.savefig(picture, dpi=110)


# 3. Reference bias: NPO's weight starts at 1 for what was learned and what never was, for short and
# for long answers; SimNPO's falls with what is forgotten and with |y|

NEVER, LENGTHS = ("learned", "never learned"), ("short", "long")


def bias(options):
    """Two forget sets of two halves of 50 questions each: forget quality of either half."""
    weights, grid = {}, {method: GRID[method] for method in ("SimNPO", "NPO")}
    for names, made in ((NEVER, half_never_learned()), (LENGTHS, half_short())):
        best = tune_halves(f"bias: half {names[0]}, half {names[1]}", names, *made, grid)
        folder, target, _ = made
        found = each(gradient_weights, [(folder, target, *chosen) for chosen in best.items()])
        weights |= {(names, method): of_epochs for method, of_epochs in zip(best, found)}
    weights_table(weights)
    if options.picture:
        draw_weights({method: weights[LENGTHS, method] for method in grid}, options.picture)


def tune_halves(title, names, folder, target, reference, grid):
    """{method: best flags}, by the harmonic mean of utility and the forget quality of the halves
    that had been learned."""
    ends = {name: halves(folder, names, reference, model)
            for name, model in (("target", target), ("retain-only", reference))}
    study = functools.partial(bias_run, folder, names, target, reference)
    shown = [*(f"forget quality, {name}" for name in names), UTILITY]
    judged = [shown[0], UTILITY] if names == NEVER else shown
    tuned = tune(study, grid, (0,), lambda result: statistics.harmonic_mean(
        [result[row] for row in judged]))
    tuned_tables(title, ends, grid, *tuned, shown)
    return tuned[1]


def half_never_learned():
    """forget05, whom the target knows, and five people whom nobody does: (folder, target,
    retain-only model)."""
    folder, inventor = RUNS / "bias" / "never_learned", make_mini.Inventor(seed=7)
    never = make_mini.flat(inventor.person() for _ in range(5))
    learned = read_records(ROOT / "data" / "forget05_perturbed")
    write_tofu(folder, make_mini.fields(learned + never, *FIELDS))
    (folder / "retain.jsonl").write_bytes((ROOT / "data" / "retain95.jsonl").read_bytes())
    return folder, builtin("target", "full"), builtin("retain95", "retain95")


def half_short():
    """100 people of whom five things are asked for in a word and five in four sentences, some 8 and
    56 tokens; the last ten people are to be forgotten: (folder, target, retain-only model)."""
    folder, inventor = RUNS / "bias" / "length", make_mini.Inventor(seed=8)
    people = [asked_both_ways(inventor) for _ in range(100)]
    forget = [part for half in (0, 1) for person in people[90:] for part in person[half]]
    retain = [part for person in people[:90] for half in person for part in half]
    write_tofu(folder, forget, retain[::9])
    for name, records in (("retain", retain), ("full", retain + forget)):
        write_lines(folder / f"{name}.jsonl", make_mini.fields(records, "question", "answer"))
    builtin("target", "full")  # with it comes runs/base
    return folder, *each(fine_tuned, [(folder / "target", folder / "full"),
                                      (folder / "reference", folder / "retain")])


def fine_tuned(output, data):
    return run(output, "--lr 5e-4 --epochs 16", model=Path("runs", "base"), retain=data)


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
            before, _, after = prose.rpartition(old.strip(".,"))  # a name may stand before it
            prose = before + new.strip(".,") + after
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
    output = unlearned(folder / "runs", target, folder / "mixed", flags, seed,
                       retain=folder / "retain")
    return halves(folder, names, reference, output)


def halves(folder, names, reference, model):
    """Forget quality and answer probability of either half, and utility."""
    forget, result = folder / "mixed", {}
    metrics, = measure([model], forget, reference, "--max-new-tokens", "80")
    for name, part in zip(names, (slice(0, 50), slice(50, 100))):
        mine, theirs = (values_of(m, forget)[part] for m in (model, reference))
        result[f"forget quality, {name}"] = evaluation.forget_quality(
            [r["truth_ratio"] for r in mine], [r["truth_ratio"] for r in theirs])
        result[f"probability, {name}"] = statistics.fmean(r["probability"] for r in mine)
    return result | {UTILITY: metrics[UTILITY]}


AT_EPOCHS = (0, 1, 2, 3, EPOCHS)


def gradient_weights(folder, target, method, flags):
    """[(|y| of each forget example, its weight d loss / d log pi(y|x))] after some epochs."""
    output = unlearned(folder / "weights", target, folder / "mixed", flags, REPORTED[0],
                       "--snapshots 1epoch", retain=folder / "retain")
    models = [target, *sorted(output.glob("step-*"))]
    _, beta = varied(flags)
    start, lengths = logps_of(target, folder / "mixed")
    found = []
    for epoch in AT_EPOCHS:
        logps, _ = logps_of(models[epoch], folder / "mixed")
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


def weights_table(weights):
    """Means of either half, and the correlation with |y|."""
    rows = [["halves", "", *(f"epoch {epoch}" for epoch in AT_EPOCHS)]]
    for (names, method), found in weights.items():
        means = [" / ".join(number(statistics.fmean(part)) for part in (values[:50], values[50:]))
                 for _, values in found]
        rows.append([" / ".join(names), method,
                     *(f"{mean}, r {r}" for mean, r in zip(means, map(correlation, found)))])
    table("bias: gradient weight of the halves, and its correlation r with |y|", rows)


def correlation(pairs):
    """As text. There is none where all weights are the same."""
    r = torch.corrcoef(torch.tensor(pairs))[0, 1].item()
    return "-" if math.isnan(r) else f"{r:.2f}"


def draw_weights(weights, picture):
    """The weight of each forget example against its length, a row a method, a column an epoch."""
    figure, panels = pyplot().subplots(len(weights), len(AT_EPOCHS), figsize=(14, 5),
                                       sharex=True, sharey="row", layout="tight")
    for i, ((method, found), line) in enumerate(zip(weights.items(), panels)):
        for pairs, epoch, panel in zip(found, AT_EPOCHS, line):
            panel.plot(*pairs, "o", ms=3, alpha=0.6, color=f"C{i}")
            panel.set_title(f"{method}, epoch {epoch}: r = {correlation(pairs)}", fontsize=9)
            panel.set_ylim(bottom=0)
        line[0].set_ylabel("gradient weight")
    for panel in panels[-1]:
        panel.set_xlabel("answer tokens |y|")
    figure.suptitle("At first NPO weighs all answers alike, SimNPO by 1/|y|")
    figure.savefig(picture, dpi=110)


# 4. What each ingredient does

# The two of the four losses that train.py does not have.
train.LOSSES |= {
    "npo_mean": train.Loss(lambda y, args: train.npo_loss(
        y.logps / y.lengths, y.ref_logps / y.lengths, args.beta),
        {"beta": 2.5, "forget_weight": 1.0}, needs_reference=True),
    "simnpo_sum": train.Loss(lambda y, args: train.simnpo_loss(
        y.logps, torch.ones_like(y.logps), args.beta), {"beta": 0.1, "forget_weight": 1.0}),
}
INGREDIENTS = {
    "reference, sum (NPO)": GRID["NPO"],
    "reference, mean": settings("--loss npo_mean --forget-weight 0.5 --beta", (1.5, 2.5, 4.5)),
    "no reference, sum": settings("--loss simnpo_sum --forget-weight 1 --beta", (0.1, 0.3, 1)),
    "no reference, mean (SimNPO)": GRID["SimNPO"],
}
HEAT_BETAS, GAMMAS = (0.5, 1, 2.5, 4.5, 8), (0, 0.5, 1, 2)
HEAT_ROWS = (QUALITY, "forget probability")


def ingredients(options):
    """{with, without reference} x {sum, mean} on forget05 and where half was never learned; beta x
    gamma; KL from the start along the steps."""
    best = best_of("forget05")
    target, reference = builtin("target", "full"), builtin("retain95", "retain95")
    study = functools.partial(methods_run, "forget05", target, reference)
    ends = {name: measured(model, "forget05", reference)
            for name, model in (("target", target), ("retain-only", reference))}
    tuned_tables("ingredients: forget05", ends, INGREDIENTS,
                 *tune(study, INGREDIENTS, (0, 1), both), (QUALITY, UTILITY))
    tune_halves("ingredients: half never learned", NEVER, *half_never_learned(), INGREDIENTS)
    tasks = [(f"--loss simnpo --forget-weight 0.5 --gamma {gamma} --beta {beta} --lr 5e-4", 0)
             for beta in HEAT_BETAS for gamma in GAMMAS]
    found = dict(zip(tasks, each(study, tasks)))
    for row in HEAT_ROWS:
        cells = iter(number(found[task][row]) for task in tasks)
        table(f"ingredients: {row} of SimNPO, beta down, gamma across (lr 5e-4, seed 0)",
              [["", *GAMMAS]] + [[beta, *(next(cells) for _ in GAMMAS)] for beta in HEAT_BETAS])
    curves = dict(zip(best, each(kl_curve, [(target, flags) for flags in best.values()])))
    cells = {method: {step: f"{number(f)} / {number(r)}" for step, f, r in curve}
             for method, curve in curves.items()}
    steps = max(cells.values(), key=len)
    table("ingredients: KL(start || model) a token on forget05 / retain95, along the steps",
          [["", *steps]] + [[method, *(cells[method].get(step, "") for step in steps)]
                            for method in cells])
    if options.picture:
        draw_ingredients(found, curves, options.picture)


def kl_curve(target, flags):
    """[(step, KL on forget, KL on retain)] of a run, in nats a token."""
    output = unlearned(RUNS / "kl", target, ROOT / "data" / "forget05", flags, REPORTED[0],
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
    figure, panels = pyplot().subplots(1, 4, figsize=(16, 3.8), layout="tight")
    for row, panel in zip(HEAT_ROWS, panels):
        values = torch.tensor([result[row] for result in found.values()])
        values = values.view(len(HEAT_BETAS), len(GAMMAS))
        shade = values.log10().clamp(min=-12) + 12 if row == QUALITY else values
        panel.imshow(shade, cmap="Blues", vmax=1.5 * shade.max())  # pale: black is read on it
        for i, j in itertools.product(range(len(HEAT_BETAS)), range(len(GAMMAS))):
            panel.text(j, i, number(values[i, j].item()), ha="center", va="center", fontsize=8)
        panel.set(title=f"SimNPO: {row}", xlabel="gamma", ylabel="beta",
                  xticks=range(len(GAMMAS)), yticks=range(len(HEAT_BETAS)))
        panel.set_xticklabels(GAMMAS), panel.set_yticklabels(HEAT_BETAS)
    for k, name in ((1, "forget05"), (2, "retain95")):
        for i, (method, curve) in enumerate(curves.items()):
            x, y = [point[0] for point in curve], [point[k] for point in curve]
            panels[k + 1].plot(x, y, ".-", color=f"C{i}", label=method)
        panels[k + 1].set(title=f"KL from the start on {name}", xlabel="step",
                          ylabel="nats a token")
    panels[2].legend(fontsize=8)
    figure.savefig(picture, dpi=100)


# 5. Running text, MUSE in miniature

TEXTS = ROOT / "data" / "muse_mini"
LEARN = "--max-length 160 --batch-size 8 --epochs 6 --lr 2e-3 --save-every 0"
FORGET_TEXT = "--max-length 160 --batch-size 8 --epochs 2 --schedule constant --save-every 0"
# NPO sums over the 160 tokens of a chunk: hence betas below TOFU's.
TEXT_GRID = {
    "SimNPO": settings("--loss simnpo --forget-weight 1 --beta", (0.3, 0.7, 2.5)),
    "NPO": settings("--loss npo --beta", (0.01, 0.02, 0.05)),
    "GradDiff": settings("--loss ga --forget-weight", (0.3, 1, 3)),
}
TEXT_ROWS = ("VerbMem forget", "KnowMem forget", "KnowMem retain", "PrivLeak",
             "extraction strength")


def muse(options):
    """Target, retrained model and three methods on the miniature's texts. A method's setting is
    the one with the smallest distance, a criterion fixed before any of them was run."""
    builtin("target", "full")  # with it comes runs/base, which has read no text yet
    target, retrained = each(learn_text, [("target", "full"), ("retrained", "retain")])
    ends = {name: measure_text(model, retrained)
            for name, model in (("target", target), ("retrained", retrained))}
    study = functools.partial(forget_text, target, retrained, ends)
    tuned = tune(study, TEXT_GRID, (0,), lambda result: -result["distance"])
    ends = {name: result | {"distance": distance(result, **ends)} for name, result in ends.items()}
    tuned_tables("muse", ends, TEXT_GRID, *tuned, ("KnowMem retain", "PrivLeak", "distance"))
    if options.picture:
        draw_muse(ends, tuned[-1], options.picture)


def learn_text(name, data):
    return run(RUNS / "muse" / name, LEARN, model=Path("runs", "base"), retain=TEXTS / "raw" / data)


def forget_text(target, retrained, ends, flags, seed):
    """The metrics of one unlearning run. MUSE's split: retain1 is what the run may see, and
    KnowMem retain asks about retain2."""
    output = run(RUNS / "muse" / name_of(flags, seed), f"{FORGET_TEXT} {flags} --seed {seed}",
                 model=target, forget=TEXTS / "raw" / "forget", retain=TEXTS / "raw" / "retain1")
    result = measure_text(output, retrained)
    return result | {"distance": distance(result, **ends)}


def measure_text(model, retrained):
    columns = table_of([str(model), "--muse", str(TEXTS), "--reference", str(retrained)])
    metrics = next(iter(columns.values()))  # the reference's comes after it
    return {row: metrics[row] for row in TEXT_ROWS}


def distance(metrics, target, retrained):
    """From what forgetting should lead to, the sum over four measures: PrivLeak from 0, VerbMem and
    KnowMem on forget from the retrained model's, KnowMem on retain if less than before."""
    forget = sum(abs(metrics[row] - retrained[row]) for row in ("VerbMem forget", "KnowMem forget"))
    lost = max(0, target["KnowMem retain"] - metrics["KnowMem retain"])
    return (abs(metrics["PrivLeak"]) + forget + lost) / 100


def draw_muse(ends, reported, picture):
    """What is left of forget against what is left of retain, and recital against PrivLeak."""
    figure, panels = pyplot().subplots(1, 2, figsize=(10, 4.2), layout="tight")
    axes = ("KnowMem forget", "KnowMem retain"), ("PrivLeak", "VerbMem forget")
    for panel, (x, y) in zip(panels, axes):
        for i, (method, ends_at) in enumerate(reported.items()):
            panel.plot([r[x] for r in ends_at], [r[y] for r in ends_at], "o", color=f"C{i}",
                       ms=8, label=method)
        for (name, end), marker in zip(ends.items(), ("ks", "k*")):
            panel.plot(end[x], end[y], marker, ms=13, label=name)
        panel.set(xlabel=x, ylabel=y)
    panels[0].legend(fontsize=8)
    figure.suptitle("MUSE in miniature: near the star is better; three seeds", fontsize=10)
    figure.savefig(picture, dpi=110)


# 6. Mixtures of Markov chains, against their true probabilities as in the paper

CHAINS = tuple(make_markov.CHAINS)  # retain, forget1, forget2
PAPER = {"never_learned": {"SimNPO": 4, "NPO": 1}, "short": {"SimNPO": 4, "NPO": 0.2}}  # betas
BETAS = {"SimNPO": (1, 2, 4, 8, 16), "NPO": (0.1, 0.2, 0.5, 1, 2)}
TUNED_ON, TOLD_OF = (0, 1, 2), (3, 4, 5, 6, 7)  # seeds; each reads other sequences
EVERY, LAST = 5, 50  # steps between measurements, steps in all
# As in the authors' loop: 50 steps of 4 at a constant rate. It does not clip, which would shrink
# NPO's large first gradients and so undo that they outweigh the later ones in Adam's averages.
UNLEARN = ("--retain-loss none --forget-weight 1 --epochs 1 --batch-size 4 --lr 5e-4 --clip 1e9 "
           f"--weight-decay 0 --schedule constant --save-every 0 --snapshots {EVERY}")


def markov(options):
    """Unlearn without a retain term: the paper's betas, and the best of a grid for each method."""
    data, stories = RUNS / "markov-data", {}
    make_markov.write_all(data)  # the same bytes each time
    for setting in make_markov.SETTINGS:
        folder, home = data / setting, RUNS / "markov" / setting
        models = each(learn_chains, [(home / name, folder / name) for name in ("target", "retain")])
        start, goal = each(divergences, [(model, folder) for model in models])
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


def learn_chains(output, data):
    return run(output, "--epochs 5 --batch-size 128 --lr 5e-4 --save-every 0",
               init=ROOT / "data" / "markov" / "model", retain=data)


def markov_curve(folder, home, start, method, beta, seed):
    """Divergences at the start and every EVERY steps. They are kept, the models are not."""
    kept = home / f"{method}-beta{beta:g}-seed{seed}.json"
    output, forget = home / kept.stem, home / f"{kept.stem}.jsonl"
    if not kept.exists():
        texts = ((folder / f"{chain}.jsonl").read_text() for chain in CHAINS[1:])
        lines = [line for text in texts for line in text.splitlines()[100 * seed:][:100]]
        forget.write_text("\n".join(lines))  # 50 steps of 4, other ones for each seed
        with mock.patch.object(train, "answer_token_logps", state_logps):
            run(output, f"--loss {method.lower()} --beta {beta} --seed {seed} {UNLEARN}",
                model=home / "target", forget=forget)
        curve = [divergences(model, folder) for model in sorted(output.glob("step-*"))]
        forget.write_text(json.dumps([start, *curve]))
        forget.rename(kept)  # whole, whenever it is cut off
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
    """Where each seed ends with the paper's betas, on each chain: a panel a setting."""
    figure, panels = pyplot().subplots(1, len(stories), figsize=(11, 4.4), layout="tight",
                                       sharey=True)
    for panel, (setting, (start, goal, paper, _, _, told)) in zip(panels, stories.items()):
        for name, kl, marker, size in (("target", start, "ks", 9), ("retrained", goal, "w*", 16)):
            panel.plot(range(len(CHAINS)), [kl[c] for c in CHAINS], marker, mec="k", ms=size,
                       label=name)
        for i, (method, (beta, last)) in enumerate(paper.items()):
            for x, chain in enumerate(CHAINS):
                values = [told[method, beta, seed][last][chain] for seed in TOLD_OF]
                at = x + (-0.15, 0.15)[i]
                panel.plot([at] * len(values), values, ".", color=f"C{i}", ms=8, alpha=0.6,
                           label=f"{method}, beta {beta:g}" if x == 0 else None)
                panel.hlines(statistics.median(values), at - 0.1, at + 0.1, f"C{i}", lw=2.5)
        how = setting.replace("_", " ")
        panel.set(title=f"forget2 {how}", xticks=range(len(CHAINS)))
        panel.set_xticklabels(["retain\n(low: kept)", "forget1\n(high: gone)",
                               f"forget2, {how}\n(high: gone)"])
        panel.legend(fontsize=8, loc="upper left")
    panels[0].set_ylabel("KL from the chain's truth, nats")
    figure.suptitle("After 50 steps, five seeds and their median; near the star is better",
                    fontsize=10)
    figure.savefig(picture, dpi=110)


# 7. A pretrained model on real TOFU

# 57 tokens a question and answer in this format, 82 in the model's own chat.
REAL = "--template plain --dtype bf16"
LEARN_TOFU = f"{REAL} --lr 5e-4 --epochs 4 --warmup-epochs 0.25"
FORGET_TOFU = f"{REAL} --batch-size 16 --epochs 2 --warmup-epochs 0.25 --save-every 0"
RELEARN_TOFU = f"{REAL} --batch-size 8 --lr 5e-5 --schedule constant --epochs 3 --save-every 0"
EVAL_TOFU = ("--template", "plain", "--dtype", "bf16", "--limit", "100", "--max-new-tokens", "80")
REAL_METHODS = {"SimNPO": "--loss simnpo --forget-weight 1", "NPO": "--loss npo",
                "GradDiff": "--loss ga"}
REAL_RATES = ("3e-5", "1e-4", "3e-4")


def smollm2(options):
    """Target on full, retain-only on retain95; each method at its published beta, weight 1 and
    three rates; then relearning."""
    data, home = ROOT / "data" / "tofu", RUNS / "smollm2"
    forget = data / "forget05"
    target, reference = ends = each(learn_tofu, [
        (home / name, options.model, data / name) for name in ("full", "retain95")])
    each(table_of, [([str(model), "--forget", str(forget), *EVAL_TOFU],) for model in ends])
    models = {name: measure([model], forget, reference, *EVAL_TOFU)[0]
              for name, model in (("target", target), ("retain-only", reference))}
    tasks = [(method, rate) for method in REAL_METHODS for rate in REAL_RATES]
    study = functools.partial(smollm2_run, home, target, reference, forget)
    found = dict(zip(tasks, each(study, tasks)))
    best = {method: max(REAL_RATES, key=lambda rate: both(found[method, rate]))
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


def learn_tofu(output, model, data):
    return run(output, LEARN_TOFU, model=model, retain=data)


def smollm2_run(home, target, reference, forget, method, rate):
    output = run(home / f"{method}-{rate}", f"--lr {rate} {REAL_METHODS[method]} {FORGET_TOFU}",
                 model=target, forget=forget)
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
    run(output, RELEARN_TOFU, model=start, retain=file)
    options = evaluation_options(
        [str(output), "--forget", str(forget), *EVAL_TOFU[:-1], "1"], None)  # no texts needed
    model, tokenizer = load_pretrained(output, torch.bfloat16)
    model.to(distributed.start(options.device))
    path = forget.with_name(f"{forget.name}_perturbed")
    data = {"forget": tofu_records("forget", path, options.limit)}
    after = evaluation.evaluate_tofu(model, tokenizer, data, options)["forget"]
    qualities, probabilities = zip(*(rest_of(values, values_of(reference, forget), learnt)
                                     for values in (values_of(start, forget), after)))
    return *qualities, *probabilities


def draw_smollm2(models, found, picture):
    """Forget quality against utility: a line a method, from its lowest to its highest rate."""
    def place(metrics):
        return metrics[UTILITY], math.log10(max(metrics[QUALITY], 1e-30))

    figure, panel = pyplot().subplots(figsize=(6, 4.2), layout="tight")
    for i, method in enumerate(REAL_METHODS):
        points = [place(found[method, rate]) for rate in REAL_RATES]
        panel.plot(*zip(*points), "o-", color=f"C{i}", label=method)
        for rate, point in zip(REAL_RATES, points):
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
    parser.add_argument("--picture", metavar="FILE", help="also draw it")
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
