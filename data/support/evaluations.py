"""What eval.py keeps in eval.json, and the table it prints.

    {"model": name, "evaluations": {"tofu data/forget05.jsonl": {"settings", "run", "values"}, ...}}

"values" are {split: [record]}, a record a question or text; None where a number has no value. At
the end: others' logs, and whether a reference was asked what the model was.
"""

import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import transformers

from . import distributed
from .errors import Failure, in_short, blame, printable, require
from .models import fingerprint, load_skeleton
from .run_folder import check_writable, owned, write

ROOT = Path(__file__).resolve().parent.parent.parent
DEFINITIONS = 3  # what was measured before a metric was defined otherwise is measured again


class Evaluation(NamedTuple):
    """What is measured, and how."""
    key: str  # mode and data, as in eval.json; only the mode (tofu) where files are read
    settings: dict  # what else determines the values
    measure: Callable  # model folder or name -> values; None where files are read
    read: Callable  # values from a file -> the same, completed; raises where they are damaged


# Evaluations that were made before, or are made now

def collect(arguments, evaluation, options):
    """{model: {"settings", "run", "values"}}: from its eval.json if that still fits, else measured
    now and saved.

    A file, or a folder with an eval.json and no model, is only read. All models are checked before
    one is run.
    """
    # What the first rank's disk holds counts: others, on other machines, may see another.
    saved = distributed.from_first(check(arguments, evaluation, options))
    return {a: entry or run(a, evaluation, options) for a, entry in saved.items()}


def check(arguments, evaluation, options):
    """{model: its saved evaluation if that still fits, else None}. InputError, before hours of
    work, for a missing model or results that could not be saved."""
    with distributed.together():
        saved = {a: saved_entry(a, evaluation, options) for a in arguments}
        for argument in (a for a in arguments if not saved[a]):
            require(evaluation.measure, f"{argument}: no saved results; to evaluate a model, "
                    "--forget or --muse is needed: it says on what, for example "
                    "--forget data/forget05")
            load_skeleton(argument)
            check_writable(home(argument).parent)
    return saved


def home(argument):
    """The eval.json of a model."""
    path = Path(argument)
    return (path if path.is_dir() else Path("runs", argument.replace("/", "--"))) / "eval.json"


def saved_entry(argument, evaluation, options):
    """The model's saved evaluation if it still fits, else None."""
    path = Path(argument)
    if (path / "eval.json").is_file() and not (path / "config.json").is_file():
        path = path / "eval.json"
    if path.is_file():
        return read_entry(path, evaluation)
    path = home(argument)
    entry = read_json(path)["evaluations"].get(evaluation.key) if path.exists() else None
    if options.force or not isinstance(entry, dict):
        return None
    fits = entry.get("settings") == {**evaluation.settings, "weights": fingerprint(argument)}
    return read_entry(path, evaluation) if fits else None


def run(argument, evaluation, options):
    """Evaluate one model and put the result into its eval.json, which others may be writing, too.
    If that fails, "unsaved" says why: `show` prints the table first."""
    began, settings = time.time(), {**evaluation.settings, "weights": fingerprint(argument)}
    distributed.agree(argument, settings)
    values = evaluation.measure(argument)
    about = {"torch": torch.__version__, "transformers": transformers.__version__,
             "python": sys.version.split()[0], "device": options.device,
             "ranks": distributed.world(), "batch_size": options.batch_size,
             "max_tokens": options.max_tokens, "seconds": round(time.time() - began, 1)}
    entry = {"settings": settings, "run": about, "values": values}
    path = home(argument)
    if distributed.first():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with owned(path.parent):
                saved = read_json(path) if path.exists() else {"model": argument, "evaluations": {}}
                saved["evaluations"].pop(evaluation.key, None)  # the newest stands last
                saved["evaluations"][evaluation.key] = entry
                write(path, json.dumps(saved, indent=1, allow_nan=False) + "\n")
        except (OSError, ValueError) as e:  # no room, or what others have put there meanwhile
            entry["unsaved"] = (f"{path}: cannot be written: {in_short(e)}; the results are only "
                                "printed")
    distributed.barrier()
    return entry


def relative(path):
    """A data path as a key that is the same wherever the project lies."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def settings(options, names, data):
    """What determines the values: these options, and the records {name: [record]}."""
    def digest(records):
        content = [{**record, "where": None} for record in records]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    return {**{name: getattr(options, name) for name in names.split()},
            "data": {name: digest(records) for name, records in data.items()},
            "definitions": DEFINITIONS}


# Reading files

def read_json(path):
    """What a file of results holds. NaN and Infinity, which are not JSON, are no value: None."""
    with blame(path, "cannot be read as JSON"):
        require(path.is_file(), f"{path}: not a file; move it away")  # a pipe would be waited for
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    ours = path.name == "eval.json" or isinstance(value, dict) and "evaluations" in value
    sound = isinstance(value, dict) and (not ours or isinstance(value.get("evaluations"), dict))
    require(sound, f"{path}: not an evaluation written by eval.py; move it away")
    return value


def read_entry(path, evaluation):
    """One evaluation from a file of any known kind; by its mode, if the key is only that."""
    saved, mode = read_json(path), evaluation.key.split()[0]
    if "evaluations" in saved:
        held = saved["evaluations"]
        found = [key for key in held if evaluation.key in (key, key.split(" ")[0])]
        choose = "; choose one with --forget" if len(found) > 1 else ""
        require(len(found) == 1,
                f"{path}: holds {', '.join(held) or 'nothing'}; asked for {evaluation.key}{choose}")
        entry = held[found[0]]
    else:
        require(mode == "tofu", f"{path}: an official TOFU log has no {mode} results")
        entry = official_entry(path, saved)
    with blame(path, f"its {mode} values are not those that eval.py writes"):
        return {**entry, "values": evaluation.read(entry["values"])}


# The table

def show(columns, entries, markdown):
    """Print the table and how many records it is of; then, if results could not be saved, fail."""
    distributed.say(format_table(columns, markdown) + "\n")
    models = {}  # counts -> the models that have these
    for title, entry in zip(columns, entries.values()):
        counts = ", ".join(f"{split} {len(kept)}" for split, kept in entry["values"].items())
        models.setdefault(counts, []).append(title)
    for counts, titles in models.items():
        of = f" of {', '.join(titles)}" if len(models) > 1 else ""
        distributed.say(printable(f"Records{of}: {counts}"))
    for entry in entries.values():
        if "unsaved" in entry:
            raise Failure(entry["unsaved"])


def format_table(columns, markdown):
    """{model: {row: number or reason}} -> text: a row a metric, a column a model, a footnote for
    each reason."""
    notes = {}  # reason -> its number

    def cell(row, value):
        if isinstance(value, str):
            return f"- [{notes.setdefault(value, len(notes) + 1)}]"
        return format_number(row, value)

    lines = [["", *columns]]
    for row in dict.fromkeys(row for metrics in columns.values() for row in metrics):
        lines.append([row, *(cell(row, metrics.get(row, "not measured"))
                             for metrics in columns.values())])
    lines = [[printable(text) for text in line] for line in lines]
    if markdown:
        lines = [[text.replace("|", r"\|") for text in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    texts = []
    for first, *cells in lines:
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:]))]
        texts.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells))
    if markdown:
        texts.insert(1, "| --- |" + " ---: |" * len(columns))
    if notes:
        texts.append("")
    for note, number in notes.items():
        texts.append(f"[{number}] {printable(note)}" + ("  " if markdown else ""))  # a line break
    return "\n".join(texts)


def format_number(row, value):
    if row.startswith(("VerbMem", "KnowMem")) or "PrivLeak" in row:
        return f"{value:.2f}"
    return f"{value:.6e}" if value < 1e-3 and row.endswith("p)") else f"{value:.6f}"


def titles(arguments):
    """Short column titles, unless two would be the same."""
    paths = [path.parent if path.name == "eval.json" else path for path in map(Path, arguments)]
    names = [path.stem if path.is_file() else path.name or str(path) for path in paths]
    return names if len(set(names)) == len(names) else list(arguments)


# Others' logs as evaluations of ours

TOFU_LOGS = {"forget": "eval_log_forget.json", "retain": "eval_log.json",
             "real_authors": "eval_real_author_wo_options.json",
             "world_facts": "eval_real_world_wo_options.json"}
TOFU_COLUMNS = {"nll": "avg_gt_loss", "paraphrased_nll": "avg_paraphrased_loss",
                "perturbed_nll": "average_perturb_loss", "rouge_l_recall": "rougeL_recall"}
OPEN_UNLEARNING = {
    "forget_quality": "forget quality (KS p)", "model_utility": "model utility",
    "retain_Q_A_Prob": "retain probability", "retain_Q_A_ROUGE": "retain ROUGE-L recall",
    "retain_Truth_Ratio": "retain truth ratio",
    "ra_Q_A_Prob_normalised": "real authors probability",
    "ra_Q_A_ROUGE": "real authors ROUGE-L recall", "ra_Truth_Ratio": "real authors truth ratio",
    "wf_Q_A_Prob_normalised": "world facts probability",
    "wf_Q_A_ROUGE": "world facts ROUGE-L recall", "wf_Truth_Ratio": "world facts truth ratio",
    "forget_Q_A_Prob": "forget probability",
    "forget_Q_A_PARA_Prob": "forget paraphrase probability",
    "forget_Q_A_ROUGE": "forget ROUGE-L recall", "forget_truth_ratio": "forget truth ratio",
    "exact_memorization": "forget exact memorization", "privleak": "forget PrivLeak"}


def official_entry(path, log):
    """An entry from TOFU's eval_log_aggregated.json or OpenUnlearning's TOFU_EVAL.json."""
    with blame(path, "not an eval.json, an eval_log_aggregated.json of TOFU or a TOFU_EVAL.json "
                "of OpenUnlearning"):
        parts = {name: part for name, part in log.items() if isinstance(part, dict)}
        if any("agg_value" in part for part in parts.values()):
            return open_unlearning_entry(parts)
        values = {split: tofu_split(name, log[name]) for split, name in TOFU_LOGS.items()}
        return {"settings": None, "values": values}


def tofu_split(name, log):
    """The records of one split of an eval_log_aggregated.json."""
    columns = {field: by_index(log[column]) for field, column in TOFU_COLUMNS.items()}
    if "generated_text" in log:
        texts = by_index(log["generated_text"])  # [prompt, continuation, answer]
        columns["generated"] = {index: text for index, (_, text, _) in texts.items()}
        columns["answer"] = {index: answer for index, (_, _, answer) in texts.items()}
    if len({tuple(column) for column in columns.values()}) > 1:
        raise ValueError(f"the columns of {name} are of different questions")
    return records_of(columns)


def open_unlearning_entry(log):
    """As values what eval.py can compute with, 1/R and Min-40% scores; as rows all that it says."""
    def questions(part):
        return by_index(part.get("value_by_index") or {})

    attack = log.get("mia_min_k", {})
    ratios = questions(log.get("forget_truth_ratio", {}))
    members = questions(attack.get("forget", {}))
    texts = questions(log.get("forget_Q_A_ROUGE", {}))
    values = {"forget": records_of({
        "truth_ratio": {index: inverse(kept["score"]) for index, kept in ratios.items()},
        "min_k": {index: kept["score"] for index, kept in members.items()},
        "answer": {index: kept["ground_truth"] for index, kept in texts.items()
                   if "ground_truth" in kept}})}
    if members:
        holdout = questions(attack["holdout"]).values()
        values["holdout"] = [{"min_k": kept["score"]} for kept in holdout]
    rows = {OPEN_UNLEARNING.get(name, name): float(part["agg_value"]) for name, part in log.items()
            if isinstance(part.get("agg_value"), (int, float))}
    return {"settings": None, "values": values, "rows": rows}


def by_index(column):
    """{index: value}, in order, of a list or of a dict whose keys are numbers."""
    if isinstance(column, list):
        return dict(enumerate(column))
    return {int(index): column[index] for index in sorted(column, key=int)}


def records_of(columns):
    """{field: {index: value}} -> [{field: value}], a record for each index of the first field."""
    indices = next(iter(columns.values()))
    return [{field: column[index] for field, column in columns.items() if index in column}
            for index in indices]


def inverse(x):
    """1/x; None stays None, as read_json gives NaN."""
    if x is None:
        return None
    return 1 / x if x else math.inf


def check_reference(entry, reference, name):
    """InputError unless a reference was asked the same questions, in the same words."""
    for split in ("forget", "holdout"):
        mine, other = (e["values"].get(split, []) for e in (entry, reference))
        if split == "holdout" and not (mine and other):
            continue  # a footnote says so
        require(len(mine) == len(other), f"{name}: has answered {len(other)} {split} questions, "
                f"the model {len(mine)}; they must be the same ones (--limit says how many)")
        for i, (a, b) in enumerate(zip(mine, other), 1):
            differ = [field for field in ("question", "answer", "prompt") if field in a
                      and field in b and str(a[field]).split() != str(b[field]).split()]
            require(not {"question", "answer"} & {*differ}, f"{name}: its {split} question {i} is "
                    "another than the model's; it was measured on another forget set")
            require(not differ, f"{name}: was asked {b.get('prompt')!r}, the model "
                    f"{a.get('prompt')!r}; measure both with one --template, --system and --date")
