"""From a data file to checked records. What is refused about data, and why, is told here
(data/README.md describes the formats)."""

import codecs
import json
import re
import textwrap
from pathlib import Path

from .errors import InputError, blame, require

SUFFIXES = (".jsonl", ".json", ".txt")
KINDS = {"question": ("question", "answer"), "text": ("text",), "input_ids": ("input_ids",),
         "prompt": ("prompt", "gt")}
# Fields that may stand beside those above. Any other that holds more than a number may say what to
# learn (choices, context, messages, labels ...), so it is refused.
ABOUT = set("""paraphrased_answer perturbed_answer paraphrased_question id idx index uuid source
    url task type category topic subject domain split author name title""".split())


def find(path):
    """The data file that `path` names: itself, with a suffix added, or the one in that folder."""
    path = Path(path)
    with blame(path):
        for suffix in ("", *SUFFIXES) if path.name else ():
            if path.with_name(path.name + suffix).is_file():
                return path.with_name(path.name + suffix)
        folder = path if path.is_dir() else path.parent
        names = data_files(folder)
        if path.is_dir() and len(names) == 1:
            return path / names[0]
    raise InputError(f"{path}: no such data file; {folder} has {', '.join(names[:20]) or 'none'} "
                     "(real TOFU and MUSE: python data/download.py)")


def data_files(folder):
    inside = folder.iterdir() if folder.is_dir() else ()
    return sorted(p.name for p in inside if p.suffix in SUFFIXES and p.is_file())


def retain_beside(forget):
    """The retain set by TOFU's convention: forget05 -> retain95."""
    percent = re.fullmatch("forget([0-9]{1,2})", forget.stem)
    require(percent and int(percent[1]), f"--retain is needed: {forget.name} has no retain set by "
            "TOFU's naming (forget05 -> retain95); or pass --retain-loss none")
    return find(forget.with_name(f"retain{100 - int(percent[1]):02d}"))


def read_records(path, kind=None):
    """The checked records of a data file: dicts of one kind, a key of KINDS (this one, if given),
    each with its file:line as "where"."""
    path = find(path)
    text = read_text(path)
    values = [(f"{path}:1", text)] if path.suffix == ".txt" else json_values(path, text)
    records = [check_record(where, value) | {"where": where} for where, value in values]
    require(records, f"{path}:1: the file holds no record")
    kind = kind or kind_of(records[0])
    for record in records:
        require(kind in record, f"{record['where']}: a record with {kind_of(record)!r}, "
                f"where {' and '.join(KINDS[kind])} are needed; a file has records of one kind")
    return records


def read_text(path):
    """The file as text: UTF-8, a BOM dropped, CRLF as LF."""
    with blame(path, "cannot be read"):
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    require(not POINTER.match(data), f"{path}:1: {POINTER_SAYS}")
    try:
        text, end = data.decode().replace("\r\n", "\n"), data.find(b"\0")
    except UnicodeDecodeError as e:
        end = e.start
    line = data.count(b"\n", 0, end) + 1
    require(end < 0, f"{path}:{line}: byte {end} is not UTF-8 text, as in parquet, Excel or "
            f"compressed files; {CONVERT}")
    return text


CONVERT = "data/README.md has the formats, and how to convert others"
# What a clone holds in place of large files
POINTER = re.compile(rb"version https://git-lfs|\S*/annex/objects/\S+\s*$")
POINTER_SAYS = "a Git LFS or git-annex pointer, not the file itself; fetch that"


def json_values(path, text):
    """[(file:line, value)] of JSON lines, or of one array, whose records are numbered."""
    def unique(pairs):
        require(len(dict(pairs)) == len(pairs), "a field stands twice in one object")
        return dict(pairs)

    array = text.lstrip().startswith("[")
    values = []
    for n, part in enumerate([text] if array else text.split("\n"), 1):
        if part.strip():
            try:
                values.append((f"{path}:{n}", json.loads(part, object_pairs_hook=unique)))
            except (ValueError, RecursionError) as e:
                n += getattr(e, "lineno", 1) - 1
                raise InputError(f"{path}:{n}: not JSON: {getattr(e, 'msg', e)}; one object a line "
                                 f"is read, or one array; {CONVERT}") from None
    if array:
        return [(f"{path}:1: record {n}", value) for n, value in enumerate(values[0][1], 1)]
    return values


PAIRED = set("id text label question answer prompt completion instruction input output response"
             .split())


def check_prose(where, text):
    """Raise InputError for a text that is records: JSON, however often encoded, a table whose first
    line names its columns, or what begins with names of fields and their values."""
    encoded = re.match(r"""\s*\[[\s\[]*"|[\s\[\\"]*\{[\s\\]*(n\s*)?\\*["']""", text)
    head, start = text.strip().split("\n", 1)[0], text.strip()[:1000]
    names = {name.strip(' "').lower() for name in re.split(r"[,;|\t]", head)}
    names |= {*re.findall(r"""(?m)(?:^|[{,])[- {]*['"]?(\w+)['"]? *[:=]\s""", start)}
    require(not encoded and len(names & PAIRED) < 2, f"{where}: records, not a text; write them as "
            "JSON objects, one a line, into a file that ends in .jsonl")


def kind_of(record):
    return next((kind for kind in KINDS if kind in record), None)


def check_record(where, record):
    """The record without its null fields, once it is known to be sound."""
    if isinstance(record, str):
        check_prose(where, record)
        record = {"text": record}
    require(isinstance(record, dict),
            f"{where}: a record must be a JSON object, not {type(record).__name__}")
    names = ", ".join(map(ascii, list(record)[:8])) or "no field"
    record = {name: value for name, value in record.items() if value is not None}
    kind = kind_of(record)
    require(kind, f"{where}: a record has question and answer, or text, or input_ids; this one has "
            f"{names}; {CONVERT}")
    fields = {name: record.get(name) for name in KINDS[kind]}
    unread = sorted(name for name in record.keys() - fields.keys() if name in KINDS or
                    name not in ABOUT and isinstance(record[name], (str, list, dict)))
    require(not unread, f"{where}: {', '.join(unread)} beside {kind}: may say what to "
            "learn, too, and is not read; take it out of the records, or write it into them")
    if kind == "input_ids":
        ids = record["input_ids"]
        numbers = isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids)
        require(numbers and len(ids) > 1,
                f"{where}: input_ids must be a list of two or more token numbers")
        return record
    answers = record.get("perturbed_answer", ["none"])
    require(isinstance(answers, list) and answers, f"{where}: perturbed_answer must list texts")
    fields |= {f"perturbed_answer[{i}]": answer for i, answer in enumerate(answers)}
    fields["paraphrased_answer"] = record.get("paraphrased_answer", "none")
    for name, value in fields.items():
        text = isinstance(value, str) and value.strip() and not re.search("[\ud800-\udfff]", value)
        require(text, f"{where}: {name} is {textwrap.shorten(ascii(value), 60)}; it must be a text")
    return record


def require_fit(examples, limit, max_length, vocab_size):
    """Raise InputError, with file:line, for an Example that is too long or has unknown tokens."""
    long = [e for e in examples if len(e.input_ids) > max_length]
    for e in long[:1]:
        raise InputError(f"{e.where}: {len(e.input_ids)} tokens do not fit {limit} {max_length} "
                         f"({len(long)} of {len(examples)} are too long); nothing is cut silently")
    for e in examples:
        highest = max(e.input_ids)
        require(highest < vocab_size, f"{e.where}: token {highest} is not in this model's "
                f"vocabulary of {vocab_size} tokens")


def check_disjoint(forget, retain):
    """Raise InputError when an example is in both sets: it cannot be forgotten and kept."""
    seen = {tuple(e.input_ids): e.where for e in retain}
    for e in forget:
        other = seen.get(tuple(e.input_ids))
        require(other is None, f"{e.where}: this record is also in the retain set ({other}); take "
                "it out of one of them")


def tofu_records(forget, limit):
    """{split: its first records} of TOFU's evaluation files for a forget file. All have false
    answers but the holdout (forget05: holdout05), which no model has seen."""
    stem = forget.stem.removesuffix("_perturbed")
    names = {"forget": stem, "retain": "retain", "real_authors": "real_authors",
             "world_facts": "world_facts"}
    data = {split: read_records(forget.with_name(f"{name}_perturbed"), "question")[:limit]
            for split, name in names.items()}
    for record in (record for records in data.values() for record in records):
        require("perturbed_answer" in record,
                f"{record['where']}: no perturbed_answer, which the truth ratio needs")
    holdout = stem.replace("forget", "holdout")
    if holdout != stem and {holdout + s for s in SUFFIXES} & {*data_files(forget.parent)}:
        data["holdout"] = read_records(forget.with_name(holdout), "question")[:limit]
    return data


MUSE_FILES = {  # with the field that their records have
    "verbmem/forget": "prompt", "privleak/forget": None, "privleak/holdout": None,
    "knowmem/forget_qa": "question", "knowmem/forget_qa_icl": "question",
    "knowmem/retain_qa": "question", "knowmem/retain_qa_icl": "question"}


def muse_records(folder):
    """The records of a MUSE corpus's evaluation files: {name: [record]}."""
    return {name: read_records(folder / name, kind) for name, kind in MUSE_FILES.items()}
