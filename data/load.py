"""From files to token batches: records, prompts, examples. Every message about bad data or a bad model is made here.

A data file is JSON lines, a JSON array or plain text (see data/README.md). Its records are of one kind:
    question, answer [, paraphrased_answer, perturbed_answer]    loss on the answer and one EOS (TOFU)
    text                                                         loss on every token after the first (MUSE)
    input_ids                                                    the same, already tokenized
"""

import argparse
import difflib
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.set_verbosity_error()  # what matters is said once, by InputError
if not sys.stderr.isatty():
    logging.disable_progress_bar()

IGNORE = -100
SUFFIXES = (".jsonl", ".json", ".txt")


class InputError(ValueError):
    """A mistake of the user's. main() prints it as one `error:` line and exits with status 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are InputErrors too."""

    def error(self, message):
        raise InputError(f"{message} (--help lists the options)")


@dataclass(frozen=True)
class Example:
    input_ids: list
    start: int  # tokens from here on carry loss
    where: str = ""  # file:line, for messages


@dataclass(frozen=True)
class Prompt:
    """How a question becomes a prompt. Without a template: the tokenizer's own chat template, else `plain`."""
    template: str | None = None  # chat, llama2, plain, or a string with {question}
    system: str | None = None  # the system message of a chat
    date: str | None = None  # the date_string that Llama 3 chat templates print

    def __post_init__(self):
        if self.template not in (None, "chat", *TEMPLATES) and "{question}" not in self.template:
            raise InputError(f"--template {self.template!r}: not chat, llama2, plain or a text with {{question}} in it")


TEMPLATES = {
    "llama2": "[INST] {question} [/INST]",  # the answer follows at once, as the TOFU Llama-2 checkpoints were trained
    "plain": "Question: {question}\nAnswer: ",
}


# Files to records

def find(path):
    """The data file that `path` names: itself, itself with a suffix added, or the one data file in that folder."""
    path = Path(path)
    if path.is_file():
        return path
    for suffix in SUFFIXES:
        if (named := path.with_name(path.name + suffix) if path.name else path).is_file():
            return named
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
        if len(files) == 1:
            return files[0]
        names = ", ".join(p.name for p in files[:20]) or "none"
        raise InputError(f"{path}: a folder, where one data file is meant; data files in it: {names}")
    beside = sorted(p.stem for p in path.parent.iterdir() if p.suffix in SUFFIXES) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=5, cutoff=0.3) or beside[:5]
    hint = f"beside it: {', '.join(close)}" if close else "its folder holds no data file"
    raise InputError(f"{path}: no such data file (tried {', '.join(SUFFIXES)}); {hint}; "
                     "real TOFU and MUSE: python data/download.py")


def read_records(path, kind=None):
    """The checked records of a data file, a list of dicts of one kind, each with its line number under "line".

    `kind` is the field that they must have, if only one will do: question, text, input_ids or prompt.
    """
    path = find(path)
    text = _read_text(path)
    if path.suffix == ".txt":
        values = [(1, {"text": text})]
    elif text.lstrip().startswith("["):
        values = _json_array(path, text)
    else:
        values = [(n, _parse(path, line, n)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    records = [_check(path, line, {"text": value} if isinstance(value, str) else value) for line, value in values]
    if not records:
        raise InputError(f"{path}:1: the file holds no record")
    first = _kind(records[0])
    if kind not in (None, first):
        raise InputError(f"{path}:{records[0]['line']}: a record with {first!r}, where "
                         f"{' and '.join(FIELDS[kind])} are needed")
    for record in records:
        if _kind(record) != first:
            raise InputError(f"{path}:{record['line']}: a record with {_kind(record)!r} in a file whose first has {first!r}")
    return records


def _read_text(path):
    try:
        data = path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from None
    try:
        text = data.decode("utf-8-sig")  # a BOM is dropped
    except UnicodeDecodeError as e:
        line = data[:e.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: byte {e.start} is not UTF-8; save the file as UTF-8") from None
    return text.replace("\r\n", "\n")


def _parse(path, text, line):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}:{line}: not JSON: {getattr(e, 'msg', e)}; one JSON object a line, or one array") from None


def _json_array(path, text):
    """[(line, value)] of a JSON array, read value by value so that messages can name a line."""
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    at = space.match(text, text.index("[") + 1).end()
    values, line, counted = [], 1, 0
    while text[at:at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise InputError(f"{path}:{getattr(e, 'lineno', line)}: not JSON: {getattr(e, 'msg', e)}; "
                             "is the file cut off?") from None
        values.append((line, value))
        at = space.match(text, end).end()
        if text[at:at + 1] == ",":
            at = space.match(text, at + 1).end()
        elif text[at:at + 1] != "]":
            raise InputError(f"{path}:{line}: not JSON: no ',' or ']' after this value; is the file cut off?")
    if text[at + 1:].strip():
        raise InputError(f"{path}:{line}: not JSON: there is text after the end of the array")
    return values


FIELDS = {"question": ("question", "answer"), "text": ("text",), "input_ids": ("input_ids",), "prompt": ("prompt", "gt")}


def _kind(record):
    return next((kind for kind in FIELDS if kind in record), None)


def _check(path, line, record):
    """The record with its line number, once its fields are known to be sound."""
    where = f"{path}:{line}"
    if not isinstance(record, dict):
        raise InputError(f"{where}: a record must be a JSON object, not {type(record).__name__}")
    if (kind := _kind(record)) is None:
        raise InputError(f"{where}: no known field; a record has question and answer, or text, or input_ids; "
                         f"this one has {', '.join(map(ascii, list(record)[:8])) or 'no field'}")
    if kind == "input_ids":
        ids = record["input_ids"]
        if not isinstance(ids, list) or len(ids) < 2 or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise InputError(f"{where}: input_ids must be a list of two or more token numbers")
        return {**record, "line": line}
    strings = {name: record.get(name) for name in FIELDS[kind]}
    if "paraphrased_answer" in record:
        strings["paraphrased_answer"] = record["paraphrased_answer"]
    if "perturbed_answer" in record:
        answers = record["perturbed_answer"]
        if not isinstance(answers, list) or not answers:
            raise InputError(f"{where}: perturbed_answer must be a list of strings, with one at least")
        strings |= {f"perturbed_answer[{i}]": answer for i, answer in enumerate(answers)}
    for name, value in strings.items():
        if not isinstance(value, str):
            state = "missing" if value is None else f"{type(value).__name__}, not a string"
            raise InputError(f"{where}: {name} is {state}")
        if not value.strip():
            raise InputError(f"{where}: {name} is empty")
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise InputError(f"{where}: {name} holds half of a UTF-16 surrogate pair, which is no character")
    return {**record, "line": line}


def check_writable(path):
    """The folder at `path` or the nearest one above it that exists; raises InputError unless a file can be made there."""
    folder = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise InputError(f"{path}: {folder} cannot be written to: {e.strerror}") from None
    return folder


# Records to examples

def encode_prompts(tokenizer, questions, prompt):
    """Token ids of the prompts that ask these questions, ready for generation. A trailing blank is left to the answer."""
    return _encode(tokenizer, [p.rstrip(" ") for p in _prompt_texts(tokenizer, questions, prompt)])


def encode_answers(tokenizer, questions, answers, prompt, where=None):
    """Prompt, answer and one EOS as Examples. Answer tokens are those after the longest common prefix with the prompt."""
    texts = [p + a for p, a in zip(_prompt_texts(tokenizer, questions, prompt), answers)]
    prompts = encode_prompts(tokenizer, questions, prompt)
    return [Example(ids + [tokenizer.eos_token_id], max(1, len(os.path.commonprefix([ids, asked]))), place)
            for ids, asked, place in zip(_encode(tokenizer, texts), prompts, where or [""] * len(texts))]


def _prompt_texts(tokenizer, questions, prompt):
    template = prompt.template or ("chat" if tokenizer.chat_template else "plain")
    if template == "chat":
        return [_chat(tokenizer, question, prompt) for question in questions]
    template = TEMPLATES.get(template, template)
    return [template.replace("{question}", question) for question in questions]


def _chat(tokenizer, question, prompt):
    messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
    messages.append({"role": "user", "content": question})
    extra = {"date_string": prompt.date} if prompt.date else {}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **extra)
    except Exception as e:  # no template, or an error raised by the template's own code
        raise InputError(f"--template chat: the tokenizer's chat template fails: {e}; try --template plain") from None


def _encode(tokenizer, texts):
    """Token ids, with exactly one BOS in front where the tokenizer has one and no EOS.

    A tokenizer has a BOS when it puts one there itself, or has one that is not its EOS under another name (GPT-2).
    """
    bos = tokenizer.bos_token_id
    if bos == tokenizer.eos_token_id and tokenizer("a").input_ids[:1] != [bos]:
        bos = None
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    return [ids if bos is None or ids[:1] == [bos] else [bos] + ids for ids in encoded]


def load_examples(path, tokenizer, max_length, prompt=Prompt()):
    """The Examples of a data file. Texts are cut into chunks of max_length tokens; an answer is never cut."""
    path = find(path)
    records = read_records(path)
    kind, where = _kind(records[0]), [f"{path}:{r['line']}" for r in records]
    if kind == "question":
        questions, answers = [r["question"] for r in records], [r["answer"] for r in records]
        examples = encode_answers(tokenizer, questions, answers, prompt, where)
    elif kind == "input_ids":
        examples = [Example(r["input_ids"], 1, place) for r, place in zip(records, where)]
    elif kind == "text":
        texts = _encode(tokenizer, [r["text"] for r in records])
        examples = [Example(chunk, 1, place) for ids, place in zip(texts, where) for chunk in _cut(ids, max_length, tokenizer)]
    else:
        raise InputError(f"{where[0]}: prompt and gt are for evaluation, not for training")
    if not examples:
        raise InputError(f"{path}:1: the text is shorter than two tokens")
    _check_ids(examples, tokenizer, max_length)
    return examples


def _cut(ids, max_length, tokenizer):
    """Chunks of at most max_length tokens, each with its own BOS if the text has one (the MUSE recipe)."""
    head = ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []
    size, body = max_length - len(head), ids[len(head):]
    chunks = [head + body[i:i + size] for i in range(0, len(body), size)]
    return [chunk for chunk in chunks if len(chunk) > 1]


def _check_ids(examples, tokenizer, max_length):
    long = [e for e in examples if len(e.input_ids) > max_length]
    if long:
        raise InputError(f"{long[0].where}: {len(long[0].input_ids)} tokens do not fit --max-length {max_length} "
                         f"({len(long)} of {len(examples)} records are too long); nothing is cut off silently, raise it")
    for e in examples:
        if max(e.input_ids) >= len(tokenizer):
            raise InputError(f"{e.where}: token {max(e.input_ids)} is not in this tokenizer of {len(tokenizer)} tokens")


def check_disjoint(forget, retain):
    """Raise InputError when an example stands in both sets: it cannot be forgotten and kept."""
    seen = {tuple(e.input_ids): e.where for e in retain}
    for e in forget:
        if other := seen.get(tuple(e.input_ids)):
            raise InputError(f"{e.where}: this record is also in the retain set ({other}); take it out of one of them")


# Examples to batches

def length_batches(lengths, max_tokens):
    """Cut range(len(lengths)) into index lists of similar length whose padded size is at most max_tokens.

    A sequence longer than max_tokens gets a list of its own.
    """
    batches, width = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        if not batches or width * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
            width = lengths[i]
        batches[-1].append(i)
    return batches


def collate(examples, pad_id=0):
    """Right-padded input_ids (B,T) and labels (B,T), the labels IGNORE on prompt and padding."""
    ids = [torch.tensor(e.input_ids) for e in examples]
    labels = [torch.tensor([IGNORE] * e.start + e.input_ids[e.start:]) for e in examples]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True, padding_value=pad_id), pad(labels, batch_first=True, padding_value=IGNORE)


# Models

def load_pretrained(path, dtype=torch.float32):
    """The causal language model and tokenizer at a folder or hub name. Only safetensors are read; no remote code runs.

    Raises InputError for anything but a complete causal model with a tokenizer that has an EOS.
    """
    skeleton, tokenizer = load_skeleton(path)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, config=skeleton.config, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            ignore_mismatched_sizes=True, output_loading_info=True)
    except Exception as e:  # whatever damaged files provoke
        raise InputError(f"{path}: the model cannot be loaded: {_first_line(e)}") from None
    if wrong := sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}):
        raise InputError(f"{path}: {len(wrong)} weights are missing from the checkpoint, or of another shape than config.json "
                         f"says, {wrong[0]} first")
    check_causal(path, model)
    return model, tokenizer


def load_skeleton(path, weights=True):
    """The model at a folder or hub name without its weights (on the meta device), and its tokenizer.

    Raises InputError for all that can be known before the weights, which may be large, are read. `weights`: whether
    the folder must hold some.
    """
    check_model_folder(path, weights)
    config, tokenizer = load_config(path), load_tokenizer(path)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as e:
        raise InputError(f"{path}: config.json describes no model that can be built: {_first_line(e)}") from None
    if len(tokenizer) > (size := model.get_input_embeddings().num_embeddings):
        raise InputError(f"{path}: the tokenizer has {len(tokenizer)} tokens, the model's embedding only {size}; "
                         "they do not belong together")
    return model, tokenizer


def check_model_folder(path, weights):
    """Raise InputError when a local folder is missing, or should hold safetensors and does not."""
    folder = Path(path)
    if not folder.exists():
        if folder.is_absolute() or len(folder.parts) > 2 or folder.parts[0] in (".", "..", "runs", "data"):
            raise InputError(f"{path}: no such folder, and not a hub name such as meta-llama/Llama-3.2-1B")
        return
    if not folder.is_dir():
        raise InputError(f"{path}: a file, where a model folder is meant")
    names = sorted(p.name for p in folder.iterdir())
    if weights and not any(name.endswith(".safetensors") for name in names):
        pickled = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        raise InputError(f"{path}: {pickled[0]} is a pickle, which could run any code; only safetensors are read"
                         if pickled else f"{path}: no weights (*.safetensors) in this folder")
    if weights and "model.safetensors" not in names and (index := folder / "model.safetensors.index.json").is_file():
        check_shards(index, names)


def check_shards(index, names):
    """Raise InputError unless all shards that an index names are safetensors in its own folder, which has these names."""
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        wrong = [shard for shard in shards if shard not in names or not shard.endswith(".safetensors")]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{index}: cannot be read: {type(e).__name__} {e}") from None
    if wrong:
        raise InputError(f"{index}: {wrong[0]!r} is no *.safetensors file in this folder")


@torch.no_grad()
def check_causal(path, model):
    """Raise InputError when a token changes what is predicted before it, as in an encoder such as BERT."""
    ids = torch.tensor([[2, 3, 4, 5], [2, 3, 4, 6]], device=model.device) % model.get_input_embeddings().num_embeddings
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    except Exception as e:
        raise InputError(f"{path}: {type(model).__name__} does not turn tokens into logits: {_first_line(e)}") from None
    change = (logits[0] - logits[1]).abs().float().amax(-1)
    if change[:-1].max() > torch.finfo(logits.dtype).eps ** 0.5 * change[-1]:
        raise InputError(f"{path}: {type(model).__name__} looks at later tokens; not a causal (left-to-right) language model")


def load_config(path):
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as e:  # whatever a hand-written config.json provokes
        raise InputError(f"{path}: config.json cannot be used: {_first_line(e)}") from None
    name = str((config.architectures or ["ForCausalLM"])[0])
    if config.is_encoder_decoder or not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise InputError(f"{path}: config.json: {name} is not a causal (left-to-right) language model")
    return config


def load_tokenizer(path):
    if Path(path).is_dir() and not any((Path(path) / n).is_file() for n in TOKENIZER_FILES):
        raise InputError(f"{path}: no tokenizer in this folder ({', '.join(TOKENIZER_FILES)})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as e:  # as above
        raise InputError(f"{path}: the tokenizer cannot be loaded: {_first_line(e)}") from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: the tokenizer has no EOS token, so an answer has no end; set eos_token")
    if isinstance(tokenizer.chat_template, dict):  # saving would use these names as file names
        raise InputError(f"{path}: the tokenizer has several chat templates; keep one, as a string")
    return tokenizer


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def _first_line(error):
    return next((line.strip() for line in str(error).split("\n") if line.strip()), type(error).__name__)
