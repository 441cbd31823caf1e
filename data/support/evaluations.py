"""What eval.py keeps in eval.json, and the table it prints.

    {"model": name, "evaluations": {"tofu data/forget05.jsonl": {"settings", "run", "values"}, ...}}

"values" are {split: [record]}, a record a question or text; None where a number has no value.
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
from .errors import Failure, in_short, naming, printable, require
from .files import check_writable, filling, owned
from .models import fingerprint, load_skeleton
from .official_logs import official_entry

ROOT = Path(__file__).resolve().parent.parent.parent
DEFINITIONS = 2  # what was measured before a metric was defined otherwise is measured again


class Evaluation(NamedTuple):
    """What is measured, and how."""
    key: str  # mode and data, as in eval.json; only the mode (tofu) where files are read
    settings: dict  # what else determines the values
    measure: Callable  # model folder or name -> values
    read: Callable  # values from a file -> the same, completed; raises where they are damaged


# Evaluations that were made before, or are made now

def collect(arguments, asked, options):
    """{model: {"settings", "run", "values"}}: from its eval.json if that still fits, else measured
    now and saved.

    A file, or a folder with an eval.json and no model, is only read. All models are checked before
    one is run.
    """
    # What the first rank's disk holds counts: others, on other machines, may see another.
    saved = distributed.from_first(check(arguments, asked, options))
    return {a: saved[a] or run(a, asked, options) for a in dict.fromkeys(arguments)}


def check(arguments, asked, options):
    """{model: its evaluation that need not be made, or None}. InputError, before hours of work, for
    a missing model or results that could not be saved."""
    with distributed.together():
        saved = {a: saved_entry(a, asked, options) for a in arguments}
        for argument in (a for a in arguments if not saved[a]):
            load_skeleton(argument)
            check_writable(home(argument).parent)
    return saved


def home(argument):
    """The eval.json of a model."""
    path = Path(argument)
    return (path if path.is_dir() else Path("runs", argument.replace("/", "--"))) / "eval.json"


def saved_entry(argument, asked, options):
    """The evaluation that need not be made, or None."""
    path = Path(argument)
    if (path / "eval.json").is_file() and not (path / "config.json").is_file():
        path = path / "eval.json"
    if path.is_file():
        return read_entry(path, asked)
    path = home(argument)
    entry = read_json(path)["evaluations"].get(asked.key) if path.exists() else None
    held = entry.get("settings") if isinstance(entry, dict) else None
    weights = held.get("weights") if isinstance(held, dict) and not options.force else None
    fits = (weights and held == {**asked.settings, "weights": weights}
            and weights == fingerprint(argument))  # last: it reads the whole model
    return read_entry(path, asked) if fits else None


def run(argument, asked, options):
    """Evaluate one model and save the result; if that fails, `show` says so after the table."""
    began, settings = time.time(), {**asked.settings, "weights": fingerprint(argument)}
    values = asked.measure(argument)
    about = {"torch": torch.__version__, "transformers": transformers.__version__,
             "python": sys.version.split()[0], "device": str(options.device),
             "ranks": distributed.world(), "batch_size": options.batch_size,
             "max_tokens": options.max_tokens, "seconds": round(time.time() - began, 1)}
    entry = {"settings": settings, "run": about, "values": values}
    if distributed.first():
        path = home(argument)
        try:
            save(path, argument, asked.key, entry)
        except (OSError, ValueError) as e:  # no room, or what others have put there meanwhile
            options.unsaved = (f"{path}: cannot be written: {in_short(e)}; the results are only "
                               "printed")
    distributed.barrier()
    return entry


def save(path, argument, key, entry):
    """Put one evaluation into an eval.json, which others may be writing, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with owned(path.with_name(".eval.lock")):
        saved = read_json(path) if path.exists() else {"model": argument, "evaluations": {}}
        saved["evaluations"].pop(key, None)  # the newest stands last
        saved["evaluations"][key] = entry
        with filling(path.parent) as scratch:
            text = json.dumps(saved, indent=1, allow_nan=False) + "\n"
            (scratch / path.name).write_text(text)


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


def require_files(arguments):
    """InputError for a model where only files of results can be shown."""
    for argument in arguments:
        require(Path(argument).is_file(), f"{argument}: no saved results; to evaluate a model, "
                "--forget, --muse or --kl is needed: it says on what, for example "
                "--forget data/forget05")


# Reading files

def read_json(path):
    """What a file of results holds. NaN and Infinity, which are not JSON, are no value: None."""
    with naming(path, "cannot be read as JSON"):
        require(path.is_file(), f"{path}: not a file; move it away")  # a pipe would be waited for
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    ours = path.name == "eval.json" or isinstance(value, dict) and "evaluations" in value
    sound = isinstance(value, dict) and (not ours or isinstance(value.get("evaluations"), dict))
    require(sound, f"{path}: not an evaluation written by eval.py; move it away")
    return value


def read_entry(path, asked):
    """One evaluation from a file of any known kind; by its mode, if the key is only that."""
    saved, mode = read_json(path), asked.key.split()[0]
    if "evaluations" in saved:
        held = saved["evaluations"]
        found = [key for key in held if asked.key in (key, key.split(" ")[0])]
        choose = "; choose one with --forget" if len(found) > 1 else ""
        require(len(found) == 1,
                f"{path}: holds {', '.join(held) or 'nothing'}; asked for {asked.key}{choose}")
        entry = held[found[0]]
    else:
        require(mode == "tofu", f"{path}: an official TOFU log has no {mode} results")
        entry = official_entry(path, saved)
    with naming(path, f"its {mode} values are not those that eval.py writes"):
        return {**entry, "values": asked.read(entry["values"])}


# From records to numbers, or to the reason why there is none

class Undefined(Exception):
    """A metric has no value; the message says why. It becomes a footnote of the table."""


def column(values, split, field):
    """A field of every record of a split; raises Undefined unless each has a value."""
    records = values.get(split, [])
    if split == "holdout" and not records:
        raise Undefined("needs a holdout beside the forget set (forget05: holdout05)")
    if not records or any(field not in record for record in records):
        raise Undefined("its file does not hold this")
    lost = [record for record in records if record[field] is None]
    if lost:
        why = "not finite (NaN), or no room in the model's context,"
        if field.startswith("rouge") and lost[0].get("generated") is not None:
            why = "ROUGE knows a-z and 0-9 only, and there is none in the answer"
        raise Undefined(f"{why} for {len(lost)} of {len(records)} {split} examples")
    return [record[field] for record in records]


def given(reference):
    if reference is None:
        raise Undefined("needs a retain-only model: --reference MODEL, eval.json or official log")
    return reference


def mean(values, split, field, transform=float):
    kept = column(values, split, field)
    return math.fsum(map(transform, kept)) / len(kept)


def attempt(function, *args):
    """The function's value, or the reason why there is none."""
    try:
        return function(*args)
    except Undefined as reason:
        return str(reason)


def finite(x):
    return x if x is not None and math.isfinite(x) else None


# The table

def show(columns, entries, options):
    """Print the table and how many records it is of; then, if results could not be saved, fail."""
    table = format_table(columns, options.markdown)
    distributed.say(table + "\n\n" + count_records(columns, entries))
    if getattr(options, "unsaved", None):
        raise Failure(options.unsaved)


def format_table(columns, markdown):
    """{model: {row: number or reason}} -> text: a row a metric, a column a model, a footnote for
    each reason."""
    notes, lines = [], [["", *map(printable, columns)]]
    for row in dict.fromkeys(row for metrics in columns.values() for row in metrics):
        line = [printable(row)]
        for metrics in columns.values():
            value = metrics.get(row, "not measured")
            if isinstance(value, str) and value not in notes:
                notes.append(value)
            line.append(f"- [{notes.index(value) + 1}]" if isinstance(value, str)
                        else format_number(row, value))
        lines.append(line)
    if markdown:
        lines = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    texts = []
    for first, *cells in lines:
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:]))]
        texts.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells))
    if markdown:
        texts.insert(1, "| --- |" + " ---: |" * len(columns))
    if notes:
        texts.append("")
    for number, note in enumerate(notes, 1):
        texts.append(f"[{number}] {printable(note)}" + ("  " if markdown else ""))  # a line break
    return "\n".join(texts)


def format_number(row, value):
    if row.startswith(("VerbMem", "KnowMem")) or "PrivLeak" in row:
        return f"{value:.2f}"
    return f"{value:.6e}" if value < 1e-3 and row.endswith("p)") else f"{value:.6f}"


def count_records(columns, entries):
    """How many records each column is of: one line if all agree."""
    models = {}
    for title, entry in zip(columns, entries.values()):
        counts = (f"{split} {len(records)}" for split, records in entry["values"].items())
        models.setdefault(printable(", ".join(counts)), []).append(printable(title))
    return "\n".join(f"Records{' of ' + ', '.join(titles) if len(models) > 1 else ''}: {counts}"
                     for counts, titles in models.items())


def titles(arguments):
    """Short column titles, unless two would be the same."""
    names = []
    for path in map(Path, arguments):
        path = path.parent if path.name == "eval.json" else path
        names.append((path.stem if path.is_file() else path.name) or str(path))
    return names if len(set(names)) == len(names) else list(arguments)
