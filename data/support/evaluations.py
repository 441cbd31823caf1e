"""What eval.py keeps in eval.json, the table that it prints, and official logs.

    {"model": name, "evaluations": {"tofu data/forget05.jsonl": {"settings", "values"}, ...}}

A key is the mode, with -4bit and -16samples where these were asked, and the data; "values" are
{split: [record]}, a record a question or text. None stands where a number has no value.
"""

import json
import os
import re
from pathlib import Path

from . import distributed
from .errors import InputError, blame, printable, require
from .models import fingerprint, load_skeleton
from .run_folder import digest, filling, owned

ROOT = Path(__file__).resolve().parent.parent.parent
DEFINITIONS = 3  # raised when a metric is defined otherwise: older results are measured again
TOFU_LOGS = {"forget": "eval_log_forget.json", "retain": "eval_log.json",
             "real_authors": "eval_real_author_wo_options.json",
             "world_facts": "eval_real_world_wo_options.json"}
TOFU_COLUMNS = {"nll": "avg_gt_loss", "paraphrased_nll": "avg_paraphrased_loss",
                "perturbed_nll": "average_perturb_loss", "rouge_l_recall": "rougeL_recall"}
OPEN_UNLEARNING = {  # what its rows, and parts of their names, are called in eval.py
    "forget_quality": "forget quality (KS p)", "model_utility": "model utility",
    "privleak": "forget PrivLeak", "exact_memorization": "forget exact memorization",
    "forget_Q_A_Prob": "forget probability", "retain_Q_A_Prob": "retain probability",
    "forget_": "forget ", "retain_": "retain ", "ra_": "real authors ", "wf_": "world facts ",
    "Q_A_Prob_normalised": "probability", "Q_A_PARA_Prob": "paraphrase probability",
    "Q_A_ROUGE": "ROUGE-L recall", "Truth_Ratio": "truth ratio", "truth_ratio": "truth ratio"}


def collect(models, reference, data, measure, read, options):
    """{column: {"settings", "values"}} of each model, then of each with its weights rounded: from
    its eval.json if that still fits, else measured now and saved. `measure`: (model, bits) ->
    values; `read`: values of a file -> the same, completed. InputError, before hours of work, for
    what is missing, damaged or was asked otherwise."""
    mode, place = ("muse", options.muse) if options.muse else ("tofu", options.forget)
    place = os.path.relpath(os.path.realpath(place), ROOT) if place else ""
    sampled = f"-{options.samples}samples" if options.samples else ""
    columns = {model + rounded: (f"{mode}{rounded}{sampled} {place}", model, bits)
               for bits, rounded in [(None, ""), *((b, f"-{b}bit") for b in options.quantize)]
               for model in models
               if not bits or not Path(model).exists() or Path(model, "config.json").is_file()}
    with distributed.together():
        saved = {name: saved_entry(*column, data, read, options)
                 for name, column in columns.items()}
    # What the first rank's disk holds counts: others, on other machines, may see another.
    entries = distributed.from_first(saved)
    if entries.get(reference):  # the data's records stand in for a model's
        check_reference(data, entries[reference]["values"], reference)
    for name, column in columns.items():
        entries[name] = entries[name] or run(*column, data, measure, options)
    for entry in entries.values() if reference in entries else ():
        check_reference(entry["values"], entries[reference]["values"], reference)
    return entries


def home(model):
    """The file of results: the one given, or the model's, in its folder or, for a hub name or a
    read-only folder without one, in runs/."""
    path = Path(model)
    if not path.is_file() and not (path / "eval.json").exists() and not os.access(path, os.W_OK):
        path = Path("runs", model.strip("/").replace("/", "--"))
    return path if path.is_file() else path / "eval.json"


def settings_of(model, bits, data, options):
    """What determines the values of a model."""
    names = "dtype" if options.muse else "template system date limit max_new_tokens dtype"
    content = {name: digest([{**record, "where": None} for record in records])
               for name, records in data.items()}
    return {**{name: getattr(options, name) for name in names.split()}, "bits": bits,
            "data": content, "definitions": DEFINITIONS, "weights": fingerprint(model)}


def saved_entry(key, model, bits, data, read, options):
    """What a file holds of this data, or a model's saved evaluation if it still fits, else None."""
    path, given = home(model), Path(model)
    held = read_results(path) if path.exists() else {}
    entry = held.get(key)
    if path.exists() and given.exists() and not (given / "config.json").is_file():  # no model
        kind, _, place = key.partition(" ")
        asked = f"{kind.split('-')[0]}(-[0-9]+samples)?( {re.escape(place) or '.*'})?"
        found = [name for name in held if re.fullmatch(asked, name)]
        require(len({name.partition(" ")[2] for name in found}) == 1, f"{path}: holds "
                f"{', '.join(held) or 'nothing'}; asked for {key}; choose one of these")
        entry = held[found[-1]]  # the newest
    elif options.force or not isinstance(entry, dict) or (
            entry.get("settings") != settings_of(model, bits, data, options)):
        require(data, f"{model}: --forget or --muse must say on what to evaluate it")
        load_skeleton(model)
        return None
    with blame(path, f"its {key} is not as eval.py writes it"):
        return {**entry, "values": read(entry["values"])}


def run(key, model, bits, data, measure, options):
    """Evaluate one model and put the result into its eval.json, which others may be writing, too.
    If that fails, "unsaved" says why: the table is printed first."""
    path, settings = home(model), settings_of(model, bits, data, options)
    distributed.agree(model, settings)
    entry = {"settings": settings, "values": measure(model, bits)}
    if distributed.first():
        try:
            with blame(path, "cannot be written"):
                path.parent.mkdir(parents=True, exist_ok=True)
                with owned(path.parent), filling(path.parent) as scratch:
                    held = read_results(path) if path.exists() else {}
                    held.pop(key, None)  # the newest stands last
                    content = {"model": model, "evaluations": {**held, key: entry}}
                    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
                    (scratch / path.name).write_text(text)
        except InputError as e:  # no room, or what others have put there meanwhile
            entry["unsaved"] = f"{e}; the results are only printed"
    return entry


def check_reference(mine, other, name):
    """InputError unless two models' values are of the same questions, asked in the same words."""
    for split in ("forget", "holdout"):
        a, b = mine.get(split), other.get(split)
        if a and b:  # else a footnote says so
            fields = [f for f in ("question", "answer", "prompt") if f in a[0] and f in b[0]]
            asked = [[[str(r.get(f)).split() for f in fields] for r in each] for each in (a, b)]
            require(asked[0] == asked[1], f"{name}: was not asked the model's {len(a)} {split} "
                    "questions alike; --forget, --limit, --template, --system or --date differ")


def format_table(columns):
    """{model: {row: number or reason}} -> a Markdown table with a footnote for each reason."""
    names = [Path(name.removesuffix("/eval.json")).name for name in columns]
    names = names if len({*names}) == len(names) else columns
    lines, reasons = [["", *names]], {}
    for row in dict.fromkeys(row for column in columns.values() for row in column):
        found = [column.get(row, "not measured") for column in columns.values()]
        lines.append([row, *(f"- [{reasons.setdefault(x, len(reasons) + 1)}]"
                             if isinstance(x, str) else f"{x:.6g}" for x in found)])
    lines = [[printable(x).replace("|", r"\|") for x in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join([*(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines), "",
                      *(f"[{number}] {printable(x)}  " for x, number in reasons.items())])


def read_results(path):
    """{key: evaluation} of an eval.json; of an official log {"tofu": evaluation}. NaN and Infinity,
    which are not JSON, are no value: None."""
    require(path.is_file(), f"{path}: not a file; move it away")  # a pipe would be waited for
    with blame(path, "not an eval.json, eval_log_aggregated.json or TOFU_EVAL.json; move it away"):
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
        if path.name == "eval.json" or "evaluations" in content:
            return {**content["evaluations"]}
        if "eval_log.json" in content:
            values = {split: tofu_log(content[name]) for split, name in TOFU_LOGS.items()}
            return {"tofu": {"values": values}}
        return {"tofu": open_unlearning_log(content)}


def tofu_log(log):
    """The records of a split of TOFU's eval_log_aggregated.json."""
    columns = {field: numbered(log[name]) for field, name in TOFU_COLUMNS.items()}
    texts = numbered(log.get("generated_text", {}))  # [prompt, continuation, answer]
    return records_of({**columns, "answer": {i: text[2] for i, text in texts.items()}})


def open_unlearning_log(log):
    """OpenUnlearning's TOFU_EVAL.json. Its values are what eval.py can compute with: R (1/R there),
    Min-40% scores, answers. Its rows: all its own aggregates."""
    def column(part, field):
        values = numbered(part.get("value_by_index") or {})
        return {i: value[field] for i, value in values.items() if field in value}

    attack, inverse = log.get("mia_min_k", {}), column(log.get("forget_truth_ratio", {}), "score")
    ratios = {i: None if x is None else 1 / max(x, 1e-307) for i, x in inverse.items()}
    forget = {"truth_ratio": ratios, "min_k": column(attack.get("forget", {}), "score"),
              "answer": column(log.get("forget_Q_A_ROUGE", {}), "ground_truth")}
    holdout = {"min_k": column(attack.get("holdout", {}), "score")}
    rows = {}
    for name, part in log.items():
        if isinstance(part, dict) and isinstance(part.get("agg_value"), (int, float)):
            for theirs, ours in OPEN_UNLEARNING.items():
                name = name.replace(theirs, ours)
            rows[name] = part["agg_value"]
    if not rows:
        raise ValueError("it has no aggregates")
    return {"values": {"forget": records_of(forget), "holdout": records_of(holdout)},
            "rows": rows}


def numbered(column):
    """{question number: value} of a list, or of a dict with such keys."""
    pairs = enumerate(column) if isinstance(column, list) else column.items()
    return {int(i): value for i, value in pairs}


def records_of(columns):
    """{field: {question number: value}} -> [{field: value}], in the order of the numbers."""
    numbers = sorted({i for column in columns.values() for i in column})
    if any(len(column) not in (0, len(numbers)) for column in columns.values()):
        raise ValueError("its columns are of different questions")
    return [{field: column[i] for field, column in columns.items() if column} for i in numbers]
