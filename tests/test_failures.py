"""What goes wrong: bad input is refused in one line, nothing written; a run cut short at any
moment loses nothing."""

import errno
import json
import math
import os
import pkgutil
import random
import re
import resource
import shlex
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import (RECORDS, ROOT, log, run, start, stop_after, weights, write_data, write_model,
                      write_muse, write_tofu)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (AutoTokenizer, BertConfig, BertLMHeadModel, T5Config,
                          T5ForConditionalGeneration)
from transformers.utils import HF_MODULES_CACHE

import eval as evaluation
import train
from data import make_model
from data.load import Example, load_examples
from data.support import miniature, run_folder
from data.support.data_files import read_records
from data.support.errors import InputError

RUN = ("--model {model} --forget {data}/forget25 --retain {data}/retain75 --output out --lr 1e-3 "
       "--batch-size 2")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, data to train on, TOFU and MUSE files, and a run stopped after three
    steps."""
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "model")
    (folder / "data").mkdir()
    write_data(folder / "data")
    write_tofu(folder / "tofu")
    write_muse(folder / "muse")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "update", stop_after(3))
        assert train.main(words(RUN, folder, "--output stopped --epochs 3")) == 128 + signal.SIGTERM
    return folder


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def words(text, world, more=""):
    """A command line with its {names} filled in, as a list; a later option overrides an earlier
    one."""
    names = {name: world / name for name in ("model", "data", "tofu", "muse", "stopped")}
    return [word.format(**names) for word in shlex.split(f"{text} {more}")]


def tree(*folders):
    """Every file and folder below, with its bytes and time of change."""
    return {p: (p.read_bytes() if p.is_file() else None, p.lstat().st_mtime_ns) for f in folders
            for p in f.rglob("*")}


def assert_refused(program, argv, culprit, capfd, *places):
    """Status 2 and one line on stderr that begins with error: and names the culprit; nothing is
    written anywhere."""
    before = tree(*places)
    capfd.readouterr()
    assert program.main(argv) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert "Traceback" not in err
    assert culprit in err, err
    assert tree(*places) == before


# Data files

QA = '{"question": "Who?", "answer": "He."}\n'
BAD_FILES = {  # name: content, what the message names
    "empty.jsonl": (b"", "empty.jsonl:1: "),
    "blank.jsonl": (b" \n\n\t\n", "blank.jsonl:1: "),
    "empty.txt": (b"", "empty.txt:1: text is empty"),
    "one_letter.txt": (b"\n", "one_letter.txt:1: text is empty"),
    "empty_array.json": (b"[]", "empty_array.json:1: "),
    "broken.jsonl": (QA.encode() + b'{"question": "Who?", "answer": \n',
                     "broken.jsonl:2: not JSON"),
    "single_quotes.jsonl": (b"{'question': 'Who?', 'answer': 'He.'}",
                            "single_quotes.jsonl:1: not JSON"),
    "cut_off.json": (b'[\n{"question": "Who?", "answer": "He."},\n{"question": "Wh',
                     "cut_off.json:3: not JSON"),
    "no_comma.json": (b'[{"text": "a b"}\n{"text": "c d"}]', "no_comma.json:2: not JSON"),
    "after_the_end.json": (b'[{"text": "a b"}]\n[]', "after_the_end.json:2: not JSON"),
    "deep.json": (b"[" * 100_000, "deep.json:1: "),
    "deep.jsonl": (b'{"a":' * 100_000, "deep.jsonl:1: "),
    "huge_number.jsonl": (b"1" * 10_000, "huge_number.jsonl:1: "),
    "latin1.jsonl": (QA.encode() + '{"question": "Où?", "answer": "Là."}'.encode("latin-1"),
                     "latin1.jsonl:2: byte"),
    "utf16.jsonl": (QA.encode("utf-16"), "utf16.jsonl:1: byte"),
    "half_pair.jsonl": (b'{"question": "Who?", "answer": "\\ud83d"}', "half_pair.jsonl:1: answer"),
    "number.jsonl": (b"17", "number.jsonl:1: a record must be"),
    "nan.jsonl": (b"NaN", "nan.jsonl:1: a record must be"),
    "list.json": (b"[[1, 2]]", "list.json:1: record 1: a record must be"),
    "no_field.jsonl": (QA.encode() + b"{}", "no_field.jsonl:2: no known field"),
    "wrong_field.jsonl": (b'{"prompt_": "Who?", "\\ud800": 1}',
                          "wrong_field.jsonl:1: no known field"),
    "no_answer.jsonl": (QA.encode() + b'{"question": "Who?"}',
                        "no_answer.jsonl:2: answer is missing"),
    "null_answer.jsonl": (b'{"question": "Who?", "answer": null}',
                          "null_answer.jsonl:1: answer is missing"),
    "number_answer.jsonl": (b'{"question": "Who?", "answer": 7}',
                            "number_answer.jsonl:1: answer is int"),
    "list_answer.jsonl": (b'{"question": "Who?", "answer": ["He."]}',
                          "list_answer.jsonl:1: answer is list"),
    "empty_answer.jsonl": (b'{"question": "Who?", "answer": " \\n"}',
                           "empty_answer.jsonl:1: answer is empty"),
    "empty_question.jsonl": (b'{"question": "", "answer": "He."}',
                             "empty_question.jsonl:1: question is empty"),
    "two_kinds.jsonl": (QA.encode() + b'{"text": "a b"}',
                        "two_kinds.jsonl:2: a record with 'text'"),
    "one_false.jsonl": (b'{"question": "Who?", "answer": "He.", "perturbed_answer": "She."}',
                        "one_false.jsonl:1: per"),
    "no_false.jsonl": (b'{"question": "Who?", "answer": "He.", "perturbed_answer": []}',
                       "no_false.jsonl:1: perturbed"),
    "one_token.jsonl": (b'{"input_ids": [3]}', "one_token.jsonl:1: input_ids"),
    "negative_token.jsonl": (b'{"input_ids": [3, -1]}', "negative_token.jsonl:1: input_ids"),
    "float_token.jsonl": (b'{"input_ids": [3, 1.5]}', "float_token.jsonl:1: input_ids"),
    "true_token.jsonl": (b'{"input_ids": [3, true]}', "true_token.jsonl:1: input_ids"),
    "unknown_token.jsonl": (b'{"input_ids": [3, 4]}\n{"input_ids": [3, 99999]}',
                            "unknown_token.jsonl:2: token 99999"),
    "verbmem.json": (b'[{"prompt": "a b", "gt": "c"}]', "verbmem.json:1: record 1: prompt and gt"),
    "long.jsonl": (QA.encode() + json.dumps({"question": "Who?", "answer": "He. " * 200}).encode(),
                   "long.jsonl:2: 8"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
                      "pointer.jsonl:1: a Git LFS pointer"),
    "in_both.jsonl": ("".join(json.dumps(r) + "\n" for r in RECORDS[:1] + RECORDS[5:6]).encode(),
                      "in_both.jsonl:"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("side", ["forget", "retain"])
def test_bad_data_files(side, name, world, tmp_path, capfd):
    content, culprit = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    assert_refused(train, words(RUN, world, f"--{side} {name}"), culprit, capfd, tmp_path, world)


@pytest.mark.parametrize("name", [n for n in BAD_FILES
                                  if n not in ("in_both.jsonl", "two_kinds.jsonl")])
def test_bad_files_to_measure_kl_on(name, world, tmp_path, capfd):
    content, culprit = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    argv = words(f"{{model}} --reference {{model}} --kl {name}", world)
    assert_refused(evaluation, argv, culprit, capfd, tmp_path, world)


BAD_EVALUATION_FILES = {  # file: content, what the message names
    "tofu/forget05_perturbed.jsonl": (QA, "forget05_perturbed.jsonl:1: no perturbed_answer"),
    "tofu/retain_perturbed.jsonl": (
        '{"text": "a b"}', "retain_perturbed.jsonl:1: a record with 'text', where question"),
    "tofu/real_authors_perturbed.jsonl": ("[1", "real_authors_perturbed.jsonl:1: not JSON"),
    "tofu/world_facts_perturbed.jsonl": (None, "world_facts_perturbed"),
    "muse/verbmem/forget.json": (QA,
                                 "forget.json:1: a record with 'question', where prompt and gt"),
    "muse/knowmem/forget_qa.json": ('[{"text": "a b"}]',
                                    "forget_qa.json:1: record 1: a record with 'text'"),
    "muse/knowmem/retain_qa_icl.json": ('[{"question": "a b"}]',
                                        "retain_qa_icl.json:1: record 1: answer is missing"),
    "muse/knowmem/retain_qa.json": (None, "retain_qa: no such data file"),
    "muse/privleak/holdout.json": ("", "holdout.json:1: the file holds no record"),
    "muse/privleak/forget.json": ('["a b", 3]', "forget.json:1: record 2: a record must be"),
}


@pytest.mark.parametrize("name", BAD_EVALUATION_FILES)
def test_bad_evaluation_files(name, world, tmp_path, capfd, monkeypatch):
    """They are found before the model is loaded."""
    monkeypatch.setattr(evaluation, "load", None)
    content, culprit = BAD_EVALUATION_FILES[name]
    kind = name.split("/")[0]
    shutil.copytree(world / kind, kind)
    Path(name).write_text(content) if content is not None else Path(name).unlink()
    argv = "{model} --forget tofu/forget05" if kind == "tofu" else "{model} --muse muse"
    assert_refused(evaluation, words(argv, world), culprit, capfd, tmp_path, world)


# Arguments

BAD_VALUES = """--max-length 1|--beta 0|--beta -1|--beta nan|--beta inf|--beta x|--gamma nan
--gamma=-inf|--gamma 1e999|--forget-weight -0.1|--forget-weight nan|--retain-weight -1
--retain-weight inf|--epochs 0|--epochs -3|--epochs 1.5|--batch-size 0|--lr 0|--lr -1e-5|--lr nan
--weight-decay -1|--warmup-epochs -1|--clip 0|--seed -1|--seed 99999999999999999999|--max-tokens 0
--loss dpo|--retain-loss l2|--schedule cosine|--dtype fp8|--save-every -1|--save-every 2weeks
--snapshots x|--output|--no-such-flag|--bet 3|surplus|--template nothing|--template chat
--template ''""".replace("\n", "|").split("|")
BAD_TRAINING = [  # options after those of RUN, what the message names
    *((options, re.split("[ =]", options)[0]) for options in BAD_VALUES),
    ("--epochs " + "9" * 400, "--epochs"), ("--epochs " + "9" * 5000, "--epochs"),
    ("--forget nowhere", "nowhere: no such data file (tried .jsonl, .json, .txt)"),
    ("--forget {data}/forget", "beside it: forget25"),
    ("--forget {data}/forget", "python data/download.py"),
    ("--forget {data}",
     "data: a folder, where one data file is meant; data files in it: forget25.jsonl, full.jsonl"),
    ("--forget " + "x" * 300, "xxx"), ("--retain nowhere", "nowhere: no such data file"),
    ("--retain {data}/full", "forget25.jsonl:1: this record is also in the retain set"),
    ("--max-length 5", "forget25.jsonl:1: "), ("--max-length 5", "(4 of 4 are too long)"),
    ("--max-length 10000", "--max-length 10000: the model takes 512"),
    ("--bf16-weights --dtype fp16", "--bf16-weights"),
    ("--init {model}", "--model and --init"), ("--init ''", "--init: an empty name"),
    *((f"{flag} ''", f"{flag}: an empty name")
      for flag in ("--model", "--forget", "--retain", "--output")), ("--output ' '", "--output"),
    ("--model nowhere/at/all", "nowhere/at/all: no such folder"),
    ("--model runs/mine", "runs/mine: no such folder"),
    ("--model some-org/some-model", "some-org/some-model: "),
    ("--model {data}", "data: no weights"),
    ("--model {data}/full.jsonl", "full.jsonl: a file, where a model folder is meant"),
    ("--resume", "out: no run to resume"), ("--output {model}", "model: already holds"),
    ("--output {stopped}", "stopped: already holds"),
    ("--output {model} --resume", "model: no run to resume in this folder (there is no args.json)"),
    ("--output {data}/full.jsonl", "full.jsonl: a file, where --output needs a folder"),
    ("--output {data}/full.jsonl/out", "full.jsonl cannot be written to"),
    ("--output /proc/out", "/proc cannot be written to"),
    ("--output " + "x" * 300, "File name too long"),
    ("--output 'out\udcff'", "--output"), ("--output out\udcff/run", "--output"),
    ("--device tpu", "--device tpu"), ("--device cuda:77", "--device cuda:77"),
]


@pytest.mark.parametrize("options, culprit", BAD_TRAINING)
def test_bad_training_arguments(options, culprit, world, tmp_path, capfd, monkeypatch):
    """They are found before the weights are read."""
    monkeypatch.setattr(train, "load_start", None)
    assert_refused(train, words(RUN, world, options), culprit, capfd, tmp_path, world)


@pytest.mark.parametrize("argv, culprit", [
    ("", "--forget"), ("--beta 2.5", "--forget"), ("--model {model}", "--forget"),
    ("--model {model} --forget {data}/full", "--retain is needed: full.jsonl"),
    ("--model {model} --forget {tofu}", "retain95: no such data file"),
    ("--model {model} --forget {data}/forget25.txt", "forget25.txt: no such data file"),
    ("--forget {data}/forget25", "--model is needed for"),
    ("--retain {data}/full", "--model is needed for"),
])
def test_arguments_that_are_missing(argv, culprit, world, tmp_path, capfd):
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    argv = words(argv, world)
    assert_refused(train, [str(world / "tofu" / "forget05") if a == str(world / "tofu") else a
                           for a in argv], culprit,
                   capfd, tmp_path, world)


@pytest.mark.parametrize("options, culprit", [
    ("--beta 0", "--beta"), ("--retain nowhere", "nowhere"),
    ("--retain {tmp}/bad.jsonl", "bad.jsonl:1: not JSON"),
    ("--template nothing", "--template"), ("--max-length 5", "forget01.jsonl:1"),
    ("--max-length 99999", "--max-length"),
    ("--bf16-weights --dtype fp16", "--bf16-weights"), ("--output {tmp}/bad.jsonl", "bad.jsonl"),
    ("--output runs/target", "runs/target: the built-in model itself"),
    ("--output /proc/out", "/proc"),
    ("--resume", "no run to resume"),
])
def test_mistakes_are_found_before_the_builtin_model_is_made(options, culprit, world, tmp_path,
                                                             capfd, monkeypatch):
    monkeypatch.setattr(miniature, "make", None)
    Path("bad.jsonl").write_text("{")
    argv = ["--forget", str(ROOT / "data" / "forget01"),
            *shlex.split(options.replace("{tmp}", str(tmp_path)))]
    assert_refused(train, argv, culprit, capfd, tmp_path)


BAD_EVALUATION = [
    ("", "MODEL"),
    ("{model}", "model: no saved results; to evaluate a model, --forget, --muse or --kl is needed"),
    ("some-model", "some-model: no saved results"),
    ("runs/eval.json", "runs/eval.json: no saved results"),
    ("{model} --forget nowhere", "nowhere: no such data file"),
    ("{model} --forget {tofu}/no", "tofu/no: no such data file"),
    ("{model} --forget {data}/forget25", "needs this file beside"),
    ("{model} --muse nowhere", "nowhere: no MUSE folder"),
    ("{model} --muse {tofu}", "tofu: no MUSE folder"),
    ("{model} --muse {muse} --forget x", "give one of them"),
    ("{model} --kl {data}/full", "--kl needs --reference"),
    ("{model} --kl --reference {model}", "--kl"),
    ("{model} --kl nowhere --reference {model}", "nowhere: no such data file"),
    ("{model} --kl {data}/full --reference runs/none", "runs/none: no such folder"),
    ("{model} --muse {muse} --reference 0", "--reference 0"),
    ("{model} --muse {muse} --reference nan", "--reference nan"),
    ("{model} --muse {muse} --reference=-1", "--reference -1"),
    ("{model} --muse {muse} --reference runs/none", "runs/none: no such folder"),
    ("{model} --forget {tofu}/forget05 --reference runs/none", "runs/none: no such folder"),
    ("{model} runs/none --forget {tofu}/forget05", "runs/none: no such folder"),
    ("{model} {tofu} --forget {tofu}/forget05", "tofu: no weights"),
    ("{model} {data}/full.jsonl --forget {tofu}/forget05", "full.jsonl: cannot be read as JSON"),
    ("{model} --forget {tofu}/forget05 --template x", "--template 'x'"),
    ("{model} --forget {tofu}/forget05 --limit 0", "--limit"),
    ("{model} --forget {tofu}/forget05 --limit 1.5", "--limit"),
    ("{model} --forget {tofu}/forget05 --max-new-tokens -1", "--max-new-tokens"),
    ("{model} --forget {tofu}/forget05 --max-new-tokens " + "9" * 30, "--max-new-tokens"),
    ("{model} --forget {tofu}/forget05 --batch-size nan", "--batch-size"),
    ("{model} --forget {tofu}/forget05 --max-tokens 0", "--max-tokens"),
    ("''", "MODEL: an empty name"), ("{model} --forget ''", "--forget: an empty name"),
    ("{model} --muse ''", "--muse: an empty name"),
    ("{model} --forget {tofu}/forget05 --reference ''", "--reference: an empty name"),
    ("{model} --forget {tofu}/forget05 --dtype fp8", "--dtype"), ("{model} --unknown", "--unknown"),
    (f"runs/none --forget {ROOT}/data/forget05",
     "runs/none: no such folder"),  # before the built-in models are made
]


@pytest.mark.parametrize("argv, culprit", BAD_EVALUATION)
def test_bad_evaluation_arguments(argv, culprit, world, tmp_path, capfd, monkeypatch):
    """They are found before any model is loaded or made."""
    monkeypatch.setattr(evaluation, "load", None)
    monkeypatch.setattr(miniature, "make", None)
    assert_refused(evaluation, words(argv, world), culprit, capfd, tmp_path, world)


VALUES = {split: [{"truth_ratio": 1.0}] for split in ("forget", "retain", "real_authors",
                                                      "world_facts")}
BAD_RESULTS = {
    "list.json": [], "other.json": {"accuracy": 1},
    "no_evaluations.json": {"evaluations": 5}, "none.json": {"evaluations": {}},
    "muse_only.json": {"evaluations": {"muse x": {"values": {}}}},
    "empty_key.json": {"evaluations": {"": {}, "tofu": 3}},
    "no_values.json": {"evaluations": {"tofu x": {"settings": {}}}},
    "text.json": {"evaluations": {"tofu x": {"values": "abc"}}},
    "list_values.json": {"evaluations": {"tofu x": {"values": [1]}}},
    "text_ratio.json": {"evaluations": {"tofu x": {"values": {
        **VALUES, "forget": [{"truth_ratio": "high"}]}}}},
    "log.json": {"eval_log_forget.json": {"avg_gt_loss": [1.0]}},
    "open.json": {"forget_truth_ratio": {"value_by_index": [1]}},
    "open_text.json": {"forget_truth_ratio": {"value_by_index": {"0": {"score": "x"}}}},
}


@pytest.mark.parametrize("name", BAD_RESULTS)
def test_bad_saved_results(name, world, tmp_path, capfd):
    Path(name).write_text(json.dumps(BAD_RESULTS[name]))
    assert_refused(evaluation, [name], name, capfd, tmp_path)
    argv = words(f"{{model}} --forget {{tofu}}/forget05 --reference {name}", world)
    assert_refused(evaluation, argv, name, capfd, tmp_path, world)


def test_results_that_could_not_be_saved_are_not_measured(world, tmp_path, capfd, monkeypatch):
    def refuse(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(evaluation, "load", None)
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert_refused(evaluation, words("{model} --forget {tofu}/forget05", world),
                   "model cannot be written to", capfd, world)


@pytest.mark.parametrize("argv, culprit", [
    ("nowhere.txt", "nowhere.txt"), ("broken.json", "broken.json"), ("latin1.txt", "latin1.txt"),
    ("{data}", "data"),
    ("{data}/full.jsonl --heads 0", "heads 0"), ("{data}/full.jsonl --layers=-1", "layers -1"),
    ("{data}/full.jsonl --hidden 30", "hidden 30"),
    ("{data}/full.jsonl --vocab 20", "vocab_size 20"),
    ("{data}/full.jsonl --output broken.json", "broken.json"),
])
def test_bad_input_of_make_model(argv, culprit, world, tmp_path, capfd):
    Path("broken.json").write_text('[{"question": ')
    Path("latin1.txt").write_bytes(b"\xe9")
    assert_refused(make_model, words(f"--output out {argv}", world), culprit, capfd, tmp_path,
                   world)


# Model folders

def change_json(path, **changes):
    """Set these keys of a JSON file; None takes a key out."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def config(**changes):
    return lambda folder: change_json(folder / "config.json", **changes)


def tokenizer_config(**changes):
    return lambda folder: change_json(folder / "tokenizer_config.json", **changes)


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


def pickled(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


def sharded(name):
    """An index that sends every weight to the file `name`."""
    def spoil(folder):
        keys = load_file(folder / "model.safetensors")
        torch.save(keys, folder / "weights.bin")
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return spoil


def weights_without(name):
    def spoil(folder):
        state = load_file(folder / "model.safetensors")
        del state[name]
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    return spoil


def encoder(**changes):
    """BERT, with weights; its config need not say what it is."""
    def spoil(folder):
        BertLMHeadModel(BertConfig(vocab_size=258, hidden_size=16, num_hidden_layers=1,
                                   num_attention_heads=2,
                                   intermediate_size=16,
                                   max_position_embeddings=128)).save_pretrained(folder)
        config(**changes)(folder)
    return spoil


def encoder_decoder(folder):
    config = T5Config(vocab_size=258, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)


def eos_added(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<extra>"})
    tokenizer.save_pretrained(folder)


def tokens_added(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["near"])  # which occurs in the data
    tokenizer.save_pretrained(folder)


def remote_code(model_type="evil", tokenizer_class="TokenizersBackend"):
    """Maps to a module that leaves a file beside the folder when it is imported."""
    def spoil(folder):
        trace = str(folder.absolute().with_name("executed"))
        (folder / "evil.py").write_text(f"open({trace!r}, 'w')")
        config(model_type=model_type, auto_map={"AutoConfig": "evil.Config",
                                                "AutoModelForCausalLM": "evil.Model"})(folder)
        tokenizer_config(tokenizer_class=tokenizer_class,
                         auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})(folder)
    return spoil


TEMPLATES = [{"name": "default", "template": "{{ x }}"},
             {"name": "../../evil", "template": "{{ x }}"}]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
BAD_MODELS = {  # what is done to a sound folder, what the message names
    "weights that are a pointer": (written("model.safetensors", POINTER),
                                   "model.safetensors: a Git LFS pointer"),
    "tokenizer that is a pointer": (written("tokenizer.json", POINTER),
                                    "tokenizer.json: a Git LFS pointer"),
    "more layers than config.json": (config(num_hidden_layers=1),
                                     "config.json has no place for 9 of the checkpoint's weights"),
    "an adapter on top": (written("adapter_config.json", b"{}"), "a model and an adapter"),
    "no weights": (without("model.safetensors"), "no weights (*.safetensors)"),
    "a pickle": (pickled, "pytorch_model.bin is a pickle"),
    "truncated weights": (cut("model.safetensors", 5000), "the model cannot be loaded"),
    "empty weights": (cut("model.safetensors", 0), "the model cannot be loaded"),
    "header longer than the file": (written("model.safetensors", b"\xff" * 100),
                                    "the model cannot be loaded"),
    "a weight is missing": (weights_without("model.norm.weight"),
                            "1 weights are missing from the checkpoint"),
    "weights of another shape": (config(hidden_size=64), "lm_head.weight first"),
    "shard outside": (sharded("../model/model.safetensors"),
                      "index.json: '../model/model.safetensors'"),
    "shard that is a pickle": (sharded("weights.bin"), "index.json: 'weights.bin'"),
    "shard that is missing": (sharded("model-00009-of-00001.safetensors"),
                              "index.json: 'model-00009"),
    "broken index": (sharded([]), "index.json: cannot be read"),
    "no config": (without("config.json"), "config.json"),
    "broken config": (written("config.json", b"{"), "config.json"),
    "empty config": (written("config.json", b"{}"), "config.json"),
    "unknown kind": (config(model_type="perceptron"), "config.json"),
    "no heads": (config(num_attention_heads=0), "config.json"),
    "absurd size": (config(hidden_size=-8), "config.json"),
    "text for a number": (config(num_hidden_layers="two"), "config.json"),
    "a list for architectures": (config(architectures=[3]), "config.json"),
    "encoder": (encoder(), "not a causal"),
    "encoder that says so": (encoder(architectures=["BertForMaskedLM"]),
                             "config.json: BertForMaskedLM is not a causal"),
    "encoder that does not": (encoder(architectures=None), "not a causal"),
    "encoder and decoder": (encoder_decoder,
                            "config.json: T5ForConditionalGeneration is not a causal"),
    "remote code": (remote_code(), "config.json"),
    "remote tokenizer": (remote_code("llama", "EvilTokenizer"), "the tokenizer cannot be loaded"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"),
                     "no tokenizer in this folder"),
    "no vocabulary": (without("tokenizer.json"), "tokenizer"),
    "broken tokenizer": (written("tokenizer.json", b"{}"), "the tokenizer cannot be loaded"),
    "broken tokenizer config": (written("tokenizer_config.json", b"["),
                                "the tokenizer cannot be loaded"),
    "no EOS": (tokenizer_config(eos_token=None), "the tokenizer has no EOS"),
    "an EOS without embedding": (eos_added,
                                 "the EOS is token 258, the model's embedding has only 258"),
    "several chat templates": (tokenizer_config(chat_template=TEMPLATES), "several chat templates"),
    "chat template with an error": (tokenizer_config(chat_template="{{ 1 / 0 }}"),
                                    "--template chat"),
    "chat template that is not one": (tokenizer_config(chat_template="{% for %}"),
                                      "--template chat"),
    "chat template that looks around": (
        tokenizer_config(chat_template="{{ ''.__class__.__mro__ }}"), "--template chat"),
}


@pytest.mark.parametrize("program", [train, evaluation])
@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models(name, program, world, tmp_path, capfd):
    spoil, culprit = BAD_MODELS[name]
    shutil.copytree(world / "model", "spoilt", ignore=shutil.ignore_patterns("eval.json"))
    spoil(tmp_path / "spoilt")
    argv = words(RUN, world,
                 "--model spoilt") if program is train else words("spoilt --forget {tofu}/forget05",
                                                                  world)
    assert_refused(program, argv, culprit, capfd, tmp_path, world, Path(HF_MODULES_CACHE))


@pytest.mark.parametrize("name", ["no config", "broken config", "unknown kind", "no heads",
                                  "remote code", "no tokenizer",
                                  "no EOS", "an EOS without embedding", "encoder that does not",
                                  "encoder and decoder"])
def test_bad_folders_for_random_weights(name, world, tmp_path, capfd):
    shutil.copytree(world / "model", "spoilt", ignore=shutil.ignore_patterns("eval.json"))
    BAD_MODELS[name][0](tmp_path / "spoilt")
    argv = [a if a != str(world / "model") else "spoilt"
            for a in words(RUN.replace("--model", "--init"), world)]
    assert_refused(train, argv, BAD_MODELS[name][1], capfd, tmp_path, world)


def test_more_tokens_than_embeddings(world, tmp_path, capfd):
    """A token that the model does not know is an error where it occurs, and only there."""
    shutil.copytree(world / "model", "spoilt")
    tokens_added(tmp_path / "spoilt")
    culprit = "forget25.jsonl:1: token 258 is not in this model's vocabulary of 258 tokens"
    assert_refused(train, words(RUN, world, "--model spoilt"), culprit, capfd, tmp_path, world)
    Path("other.jsonl").write_text(QA)
    argv = words(RUN, world, "--model spoilt --forget other.jsonl --retain-loss none --epochs 1")
    assert train.main(argv) == 0


def test_remote_code_of_a_known_model_is_left_alone(world, tmp_path):
    """transformers knows Llama; what auto_map offers instead is neither imported nor copied."""
    shutil.copytree(world / "model", "mapped")
    remote_code("llama")(tmp_path / "mapped")
    before = tree(Path(HF_MODULES_CACHE))
    assert train.main(words(RUN, world, "--model mapped --epochs 1")) == 0
    assert evaluation.main(words("mapped --forget {tofu}/forget05 --max-new-tokens 1 --limit 2",
                                 world)) == 0
    assert not Path("executed").exists() and tree(Path(HF_MODULES_CACHE)) == before


def test_names_in_a_model_folder_lead_nowhere_else(world, tmp_path):
    """Whatever names its files hold, only the output folder is written to."""
    shutil.copytree(world / "model", "named")
    config(_name_or_path="../../elsewhere")(tmp_path / "named")
    tokenizer_config(name_or_path="../../elsewhere", vocab_file="../vocab.json",
                     tokenizer_file="../tokenizer.json",
                     chat_template="{{ messages[0].content }}",
                     chat_template_file="../evil.jinja")(tmp_path / "named")
    before = tree(world, tmp_path / "named")
    options = "--model named --output some/where/out --epochs 1 --template plain"
    assert train.main(words(RUN, world, options)) == 0
    assert tree(world, tmp_path / "named") == before
    assert {p.suffix for p in Path("some/where/out").rglob("*")} == {".json", ".jsonl",
                                                                     ".safetensors"}
    shutil.rmtree("some/where/out")
    assert set(map(str, Path().rglob("*"))) == {"some", "some/where",
                                                *map(str, Path().glob("named/**/*")), "named"}


# Resuming

def spoiled(change):
    return lambda run: change(next(run.glob("checkpoint-*")))


def rewritten(change=lambda tensors: tensors, **about):
    """A checkpoint with other tensors, or that says other things of itself; None leaves it out."""
    def spoil(path):
        with safe_open(path, "pt") as file:
            said = {**file.metadata(), **about}
        said = {key: value for key, value in said.items() if value is not None}
        save_file(change(load_file(path)), path, said)
    return spoiled(spoil)


def first_rows(tensors):
    return {name: tensor[:1] for name, tensor in tensors.items()}


def only(beginning):
    return lambda tensors: {n: t for n, t in tensors.items() if n.startswith(beginning)}


BAD_RUNS = {  # what happened to a stopped run's folder, what the message names
    **{name: (change, "checkpoint-00000003.safetensors: not a whole checkpoint")
       for name, change in {
           "cut off": spoiled(lambda p: os.truncate(p, 3000)),
           "empty": spoiled(lambda p: os.truncate(p, 0)),
           "a folder": spoiled(lambda p: (p.unlink(), p.mkdir())),
           "no tensors": rewritten(lambda tensors: {}),
           "of another model": rewritten(first_rows),
           "without moments": rewritten(only("weight.")),
           "without second moments": rewritten(only(("weight.", "exp_avg."))),
           "without weights": rewritten(only("exp")),
           "without some weights' moments": rewritten(lambda tensors: {
               name: t for name, t in tensors.items() if not re.match("exp.*norm.weight", name)}),
           "of whole numbers": rewritten(lambda tensors: {
               name: t.int() for name, t in tensors.items()}),
           "one of whole numbers": rewritten(lambda tensors: {
               name: t.int() if name == min(tensors) else t for name, t in tensors.items()}),
           "of half precision": rewritten(lambda tensors: {
               name: t.half() for name, t in tensors.items()}),
           "with a tensor more": rewritten(lambda tensors: {**tensors, "x": torch.ones(1)}),
           "no step": rewritten(step=None), "step no JSON": rewritten(step="{"),
           "step a list": rewritten(step="[]"), "step a word": rewritten(step='"three"'),
           "another step": rewritten(step="2"), "no count": rewritten(adam_step=None),
           "count too high": rewritten(adam_step="4"), "count NaN": rewritten(adam_step="NaN"),
           "count negative": rewritten(adam_step="-1"),
           "no scaler": rewritten(scaler="{")}.items()},
    "a step beyond the last": (
        spoiled(lambda p: p.rename(p.with_name("checkpoint-00000007.safetensors"))),
        "checkpoint-00000007.safetensors: not a checkpoint of this run, which has 6 steps"),
    "the newest of two": (
        spoiled(lambda p: p.with_name("checkpoint-00000005.safetensors").write_bytes(b"?")),
        "(delete it to go on from checkpoint-00000003.safetensors)"),
    "arguments no text": (written("args.json", b"\xff"), "args.json: cannot be read"),
    "arguments no JSON": (written("args.json", b"{"), "args.json: cannot be read"),
    "arguments a list": (written("args.json", b"[]"), "args.json: cannot be read"),
    "arguments missing": (without("args.json"), "no run to resume"),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_damaged_runs(name, world, tmp_path, capfd):
    shutil.copytree(world / "stopped", "out")
    spoil, culprit = BAD_RUNS[name]
    spoil(tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert_refused(train, words(RUN, world, "--epochs 3 --resume"), culprit, capfd, world)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("copied", [
    ["config.json"], ["config.json", "tokenizer.json", "tokenizer_config.json"],
    ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]])
def test_a_start_models_files_in_a_stopped_run(copied, world, undisturbed, tmp_path, capfd):
    """As copied there to look at its checkpoint: they do not make it complete, nor without it."""
    shutil.copytree(world / "stopped", "out")
    for name in copied:
        shutil.copy(world / "model" / name, f"out/{name}")
    assert train.main(words(RUN, world, "--epochs 3 --resume")) == 0
    assert "complete" not in capfd.readouterr().out
    assert [x["step"] for x in log(tmp_path / "out") if "lr" in x] == [1, 2, 3, 4, 5, 6]
    started, ended = weights(world / "model"), weights(tmp_path / "out")
    assert not any(ended[name].equal(started[name]) for name in started)


def test_a_pipe_where_a_file_is_meant(world, tmp_path, capfd):
    """Nothing waits for it."""
    for name in ("args.json", "metrics.jsonl", "config.json", ".lock"):
        shutil.rmtree("out", ignore_errors=True)
        shutil.copytree(world / "stopped", "out")
        Path("out", name).unlink(missing_ok=True)
        os.mkfifo(f"out/{name}")
        assert_refused(train, words(RUN, world, "--epochs 3 --resume"),
                       f"out: {name}: neither a file nor a folder", capfd, world)
    shutil.copytree(world / "model", "model")
    os.mkfifo("model/eval.json")
    argv = words("model --forget {tofu}/forget05", world)
    assert_refused(evaluation, argv, "model/eval.json: not a file", capfd, world)
    os.mkfifo("pipe")
    assert_refused(train, words(RUN, world, "--output pipe"), "pipe: a file, where", capfd, world)


def test_a_damaged_log_does_not_stop_a_run(world, tmp_path):
    """Lines that power loss has left as zeros or halves are dropped."""
    shutil.copytree(world / "stopped", "out")
    lines = Path("out/metrics.jsonl").read_text().splitlines(keepends=True)
    damage = b"\0" * 20 + b"\n\xff{}\n[]\n" + lines[-1][:9].encode()
    Path("out/metrics.jsonl").write_bytes("".join(lines[:-1]).encode() + damage)
    assert train.main(words(RUN, world, "--epochs 3 --resume")) == 0
    assert [x["step"] for x in log(tmp_path / "out") if "lr" in x] == [1, 2, 4, 5, 6]


def test_resuming_with_other_arguments(world, tmp_path, capfd, monkeypatch):
    """Each changed argument is named, before the weights are read."""
    monkeypatch.setattr(train, "load_start", None)
    shutil.copytree(world / "stopped", "out")
    write_model(tmp_path / "other", seed=1)
    text = (world / "data" / "forget25.jsonl").read_text()
    Path("forget25.jsonl").write_text(text.replace("Oslo", "Roma"))
    for options, changed in {
            "--lr 2e-3": ["lr was 0.001, is 0.002"],
            "--beta 1 --gamma 2": ["beta was 2.5, is 1.0", "gamma was 0.0, is 2.0"],
            "--epochs 4 --batch-size 1 --seed 7": ["epochs was 3, is 4", "batch-size was 2, is 1",
                                                   "seed was 0, is 7"],
            "--loss ga --retain-loss none": ["loss was simnpo, is ga",
                                             "retain-loss was nll, is none"],
            "--model other": ["start was"], "--template llama2": ["template was None",
                                                                  "forget data was",
                                                                  "retain data was"],
            "--dtype bf16 --bf16-weights": ["dtype was fp32, is bf16",
                                            "bf16-weights was False, is True"],
            "--schedule constant": ["schedule was linear, is constant"],
            "--forget forget25": ["forget data was"]}.items():
        for change in changed:
            assert_refused(train, words(RUN, world, f"--epochs 3 --resume {options}"), change,
                           capfd, tmp_path, world)


def test_what_may_change_when_a_run_goes_on(world, tmp_path):
    """How often it saves, how its steps are split, and where the same model and data lie."""
    shutil.copytree(world / "stopped", "out")
    options = "--epochs 3 --resume --max-tokens 64 --save-every 2 --checkpointing"
    assert train.main(words(RUN, world, options)) == 0
    shutil.copytree(world / "stopped", "moved")
    shutil.copytree(world / "model", "twin")
    shutil.copytree(world / "data", "copies")
    options = "--epochs 3 --resume --model ./twin/ --forget copies/../copies/forget25.jsonl"
    assert train.main(words(RUN, world, f"{options} --output moved/../moved")) == 0
    assert_close(weights(Path("out")), weights(Path("moved")))


def assert_close(got, want):
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)


# Runs cut short: killed, interrupted, out of disk, not finite. Resumed, they end like a run that
# nothing happened to.

LONG = f"{RUN} --epochs 8 --save-every 1 --snapshots 5"  # 16 steps
@pytest.fixture(scope="module")
def undisturbed(world):
    """The folder of a run that nothing happens to, and how long its training took."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        child, connection = start(words(LONG, world, "--output undisturbed"))
        assert connection.recv() == "training"
        began = time.monotonic()
        assert connection.recv()[0] == 0
        seconds = time.monotonic() - began
    return world / "undisturbed", seconds


def assert_same_run(output, undisturbed):
    """Bitwise the same weights, in snapshots too, the same log but for speeds, and no file more or
    less."""
    files = sorted(p.relative_to(undisturbed) for p in undisturbed.rglob("*"))
    assert sorted(p.relative_to(output) for p in output.rglob("*")) == files
    for path in files:
        if path.suffix == ".safetensors":
            assert (output / path).read_bytes() == (undisturbed / path).read_bytes(), path
    logs = [[{**line, "tokens_per_s": 0} for line in log(folder)]
            for folder in (output, undisturbed)]
    assert logs[0] == logs[1]


def resume(output):
    """The option that goes on with a run, if it got as far as having a folder."""
    return "--resume" if output.exists() else ""


def test_killed_at_twenty_random_moments(world, undisturbed, tmp_path):
    """SIGKILL at any time of training, saving and finishing; a run that ends before it is killed
    makes place for another."""
    rng, kills, number = random.Random(0), 0, 0
    expected, seconds = undisturbed
    while kills < 20 or not (tmp_path / f"run{number}" / "config.json").exists():
        output = tmp_path / f"run{number}"
        if (output / "config.json").exists():
            assert run(words(LONG, world, f"--output {output} --resume"))[0] == 0
            assert_same_run(output, expected)
            number += 1
            continue
        child, connection = start(words(LONG, world, f"--output {output} {resume(output)}"))
        assert connection.recv() == "training"
        if kills < 20:
            child.join(rng.uniform(0, seconds / 3))
            child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        kills += child.exitcode != 0
    assert run(words(LONG, world, f"--output {output} --resume"))[0] == 0
    assert_same_run(output, expected)


def replace_call(name, count, new):
    """Put new(original, *args) in the place of the count-th and all later calls of a function,
    named as in os.fsync."""
    place, attribute = pkgutil.resolve_name(name.rpartition(".")[0]), name.rpartition(".")[2]
    original, calls = getattr(place, attribute), []

    def counted(*args, **options):
        calls.append(args)
        return original(*args, **options) if len(calls) < count else new(original, *args, **options)
    setattr(place, attribute, counted)


def kill_at(name, count, after):
    """Kill this process at the count-th call of a function, before or after it; a file being saved
    is left half done."""
    def deadly(original, *args, **options):
        if after or name == "data.support.run_folder.save_file":
            original(*args, **options)
        if not after and name == "data.support.run_folder.save_file":
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    replace_call(name, count, deadly)


def test_killed_in_the_middle_of_writing(world, undisturbed, tmp_path):
    """Before and after each kind of call that changes the disk: at the start, in saving, and in
    finishing."""
    starting = [("pathlib.Path.mkdir", 1), ("os.replace", 1), ("os.replace", 2)]
    saving = [("data.support.run_folder.save_file", 2), ("os.fsync", 5), ("os.fsync", 7),
              ("os.replace", 4), ("shutil.rmtree", 6), ("pathlib.Path.unlink", 1)]
    finishing = [("os.replace", 6), ("os.replace", 7), ("data.support.run_folder.tidy", 1)]
    output = tmp_path / "run"
    for name, count in starting + saving + finishing:
        for after in (False, True):
            assert run(words(LONG, world, f"--output {output} {resume(output)}"), kill_at, name,
                       count, after) is None
    assert run(words(LONG, world, f"--output {output} --resume"))[0] == 0
    assert_same_run(output, undisturbed[0])


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("step", [1, 5, 16])
def test_stopped_by_a_signal(number, status, step, world, undisturbed, tmp_path):
    """The step is finished and saved; going on ends in the same weights."""
    assert run(words(LONG, world, "--save-every 0 --output run"), stop_in, step, number) == (status,
                                                                                             "")
    assert [x["step"] for x in log(tmp_path / "run") if "lr" in x] == list(range(1, step + 1))
    assert run(words(LONG, world, "--save-every 0 --output run --resume")) == (0, "")
    assert_same_run(tmp_path / "run", undisturbed[0])


def stop_in(step, number):
    """Send this process a signal during a step (SIGINT is ignored in a shell's background job)."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    train.update = stop_after(step, number)


@pytest.fixture
def ctrl_c():
    """SIGINT as in a terminal: a shell's background job starts with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_before_training(world, tmp_path, capfd, monkeypatch, ctrl_c):
    monkeypatch.setattr(train, "load_start", lambda *args: signal.raise_signal(signal.SIGINT))
    assert train.main(words(RUN, world)) == 130
    assert capfd.readouterr().err == "error: interrupted\n" and not Path("out").exists()
    monkeypatch.setattr(evaluation, "load", lambda *args: signal.raise_signal(signal.SIGINT))
    assert evaluation.main(words("{model} --forget {tofu}/forget05", world)) == 130
    assert capfd.readouterr().err == "error: interrupted\n"


def fail_at(name, count):
    """The disk is full from the count-th call of a function on."""
    def failing(original, *args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")
    replace_call(name, count, failing)


def limit_files(size):
    """The kernel itself refuses to let a file grow beyond this size."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("save_every, interfere", [
    *((1, (fail_at, *call)) for call in [
        ("data.support.run_folder.save_file", 1), ("data.support.run_folder.save_file", 4),
        ("os.fsync", 9), ("os.replace", 8), ("os.replace", 1), ("os.replace", 2), ("os.replace", 6), ("pathlib.Path.write_text", 1),
        ("pathlib.Path.mkdir", 9)]),
    *((0, (limit_files, size)) for size in (1000, 3000, 8000, 50_000)),
    (1, (limit_files, 200_000))],
    ids=lambda x: " ".join(map(str, x[1:])) if isinstance(x, tuple) else "")
def test_a_full_disk(save_every, interfere, world, undisturbed, tmp_path):
    """One line says so, the last checkpoint is whole, and once there is room the run goes on from
    it."""
    argv = words(LONG, world, f"--save-every {save_every} --output run")
    assert_out_of_disk(run(argv, *interfere), tmp_path / "run")
    assert run([*argv, *["--resume"] * (tmp_path / "run").exists()])[0] == 0
    assert_same_run(tmp_path / "run", undisturbed[0])


def assert_out_of_disk(result, output):
    status, err = result
    assert status == 1 and err.startswith(f"error: {output.name}: stopped after step ")
    assert err.count("\n") == 1
    saved = run_folder.checkpoints(output)
    assert (saved[-1].name if saved else "no checkpoint yet") in err
    for path in saved:
        with safe_open(path, "pt") as file:
            assert int(file.metadata()["step"]) > 0 and file.keys()


@pytest.mark.parametrize("size", [400, 800])
def test_a_small_disk(size, world, undisturbed, tmp_path, monkeypatch):
    """The same on a real file system of so many KiB; where none may be mounted, with files that
    may not grow so large."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(tmp_path / "disk")]
    mounted = not subprocess.run(mount, capture_output=True).returncode
    try:
        monkeypatch.chdir(tmp_path / "disk")
        argv = words(LONG, world, "--output run")
        assert_out_of_disk(run(argv, *[] if mounted else [limit_files, size * 250]), Path("run"))
        if mounted:
            subprocess.run([*mount[:3], "-o", "remount,size=64m", *mount[-2:]], check=True)
        assert run([*argv, "--resume"])[0] == 0
        assert_same_run(Path("run"), undisturbed[0])
    finally:
        monkeypatch.chdir(tmp_path)
        if mounted:
            subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def not_finite(what, step):
    """From this step on the loss is NaN, or the weights overflow, or the probe does."""
    forget_losses, update, steps = train.forget_losses, train.update, []

    def nan_loss(*args):
        return forget_losses(*args) * (math.nan if len(steps) >= step - 1 else 1)

    def counted(state, *args):
        record = update(state, *args)
        steps.append(1)
        if what == "weights" and len(steps) >= step:
            with torch.no_grad():
                next(state.objective.parameters())[0, 0] = math.inf
        return record
    train.update = counted
    if what == "loss":
        train.forget_losses = nan_loss


@pytest.mark.parametrize("what, step, named", [
    ("loss", 1, 0), ("loss", 6, 5), ("weights", 5, 5), ("weights", 6, 6)])
def test_a_loss_that_is_not_finite(what, step, named, world, undisturbed, tmp_path):
    """It stops the run and is never saved: the checkpoint before it is whole, and the run can go
    on from there."""
    status, err = run(words(LONG, world, "--output run"), not_finite, what, step)
    assert status == 1 and err.startswith(f"error: run: not finite after step {named}: ")
    assert err.count("\n") == 1
    saved = run_folder.checkpoints(tmp_path / "run")
    assert [p.name for p in saved] == [f"checkpoint-{step - 1:08d}.safetensors"] * (step > 1)
    assert (saved[0].name if saved else "no checkpoint yet") in err
    assert run(words(LONG, world, "--output run --resume")) == (0, "")
    assert_same_run(tmp_path / "run", undisturbed[0])


def no_folders(number):
    """fsync of a folder fails with this error."""
    fsync = os.fsync

    def failing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)
    os.fsync = failing


def test_a_file_system_without_fsync_of_folders(world, undisturbed, tmp_path):
    assert run(words(LONG, world, "--output run"), no_folders, errno.EINVAL) == (0, "")
    assert_same_run(tmp_path / "run", undisturbed[0])
    assert_out_of_disk(run(words(LONG, world, "--output bad"), no_folders, errno.EIO),
                       tmp_path / "bad")


def test_a_learning_rate_that_is_too_high(world, tmp_path, capfd):
    assert train.main(words(RUN, world,
                            "--lr 1e12 --clip 1e12 --weight-decay 1e12 --epochs 6")) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: out: not finite after step ") and err.count("\n") == 1
    assert not Path("out", "config.json").exists()


# Memory, and the small numbers of fp16

def raising(error):
    def fail(*args, **options):
        raise error
    return fail


def too_much(*args):
    return torch.empty(2**55, dtype=torch.uint8)  # more than any machine has


NO_MEMORY = {"host": too_much, "card": raising(torch.OutOfMemoryError("CUDA out of memory. Tried")),
             "Python": raising(MemoryError()), "kernel": raising(OSError(12,
                                                                         "Cannot allocate memory")),
             "cuBLAS": raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))}


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_out_of_memory(kind, world, tmp_path, capfd, monkeypatch):
    """One line names what to lower and where to go on from."""
    shutil.copytree(world / "stopped", "out")
    with monkeypatch.context() as patch:
        patch.setattr(train, "forget_losses", NO_MEMORY[kind])
        patch.setattr(train, "score", lambda objective, data, args: torch.zeros(len(data)))
        assert train.main(words(RUN, world, "--epochs 3 --resume")) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: out: out of memory after step 3: ") and err.count("\n") == 1
    assert "checkpoint-00000003.safetensors is whole" in err and "lower --max-tokens" in err
    assert train.main(words(RUN, world, "--epochs 3 --resume")) == 0
    for name, program, argv in (
            ("load_start", train, words(RUN, world, "--output new")),
            ("load", evaluation, words("{model} --forget {tofu}/forget05", world))):
        with monkeypatch.context() as patch:
            patch.setattr(program, name, NO_MEMORY[kind])
            assert program.main(argv) == 1
        err = capfd.readouterr().err
        assert err.startswith("error: out of memory: ") and err.count("\n") == 1 and "lower" in err


def overflowing(loss, factor, steps):
    """In these many first steps the loss, and so the gradient, is so many times as large."""
    calls = []

    def larger(*args):
        calls.append(1)
        return loss(*args) * (factor if len(calls) <= steps else 1)
    return larger


def test_fp16_steps_that_overflow(world, tmp_path, capfd, monkeypatch):
    """They are skipped, which the log says and the last line counts; the weights stay."""
    monkeypatch.setattr(train, "forget_losses", overflowing(train.forget_losses, 1e38, 2))
    argv = words(RUN, world, "--dtype fp16 --epochs 3 --save-every 1")
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", stop_after(2))
        assert train.main(argv) == 128 + signal.SIGTERM
    with safe_open("out/checkpoint-00000002.safetensors", "pt") as file:
        assert json.loads(file.metadata()["adam_step"]) == 0
        assert json.loads(file.metadata()["scaler"])["scale"] == 2**14
        kept = {name.removeprefix("weight."): file.get_tensor(name) for name in file.keys()}
    assert all(tensor.equal(kept[name]) for name, tensor in weights(world / "model").items())
    assert train.main([*argv, "--resume"]) == 0
    steps = [line for line in log(tmp_path / "out") if "lr" in line]
    assert [line.get("skipped", False) for line in steps] == [True, True, *[False] * 4]
    assert [line["grad_norm"] for line in steps[:2]] == [None, None]
    assert "; 2 steps skipped, whose fp16 gradients overflowed\n" in capfd.readouterr().out
    assert any(not t.equal(kept[name]) for name, t in weights(tmp_path / "out").items())


def test_fp16_that_always_overflows(world, tmp_path, capfd, monkeypatch):
    """The run ends when the scale has collapsed, after 17 steps or so."""
    monkeypatch.setattr(train, "forget_losses", overflowing(train.forget_losses, 1e38, 10**9))
    assert train.main(words(RUN, world, "--dtype fp16 --epochs 100")) == 1
    err = capfd.readouterr().err
    assert "not finite after step 17: fp16 gradients overflow at every scale; --dtype bf16" in err
    assert err.count("\n") == 1 and len([x for x in log(tmp_path / "out") if "lr" in x]) == 17


@pytest.mark.parametrize("epochs", [1, 3])
def test_fp16_that_overflows_in_every_step_of_a_short_run(epochs, world, tmp_path, capfd,
                                                          monkeypatch):
    """The start model is not the result, whether the run is resumed or not."""
    monkeypatch.setattr(train, "forget_losses", overflowing(train.forget_losses, 1e38, 10**9))
    argv = words(RUN, world, f"--dtype fp16 --epochs {epochs}")
    for options in ([], ["--resume"]):
        assert train.main([*argv, *options]) == 1
        assert "fp16 gradients overflowed in every step" in capfd.readouterr().err
        assert not Path("out/config.json").exists()


# What is in a folder

def test_only_own_files_are_removed(world, tmp_path):
    """Names like a checkpoint's, and anything of others', stay; as does a folder of that name."""
    shutil.copytree(world / "stopped", "out")
    others = ["checkpoint-3.safetensors", "checkpoint-000000003.safetensors", "checkpoint-best",
              "checkpoint-00000001.safetensors.bak", "notes.tmp", "step-1", "wandb.txt"]
    for name in others:
        Path("out", name).write_text("mine")
    Path("out/checkpoint-00000001.safetensors").mkdir()
    Path("out/.half-done").mkdir()
    Path("out/.half-done/of a run that was killed").touch()
    assert train.main(words(RUN, world, "--epochs 3 --resume --save-every 1")) == 0
    left = {p.name for p in Path("out").iterdir()}
    assert {*others, "checkpoint-00000001.safetensors"} <= left
    assert not left & {".half-done", ".lock", "checkpoint-00000003.safetensors"}
    assert all(Path("out", name).read_text() == "mine" for name in others)


@pytest.mark.parametrize("damage", [cut("model.safetensors", 5000), cut("model.safetensors", 0),
                                    cut("config.json", 0), written("config.json", b"{}")])
def test_a_finished_run_that_is_damaged(damage, world, tmp_path, capfd):
    """It is not called complete; without the config.json it is made again."""
    argv = words(RUN, world, "--epochs 1")
    assert train.main(argv) == 0
    expected = {name: t.clone() for name, t in weights(tmp_path / "out").items()}  # no mapped file
    damage(tmp_path / "out")
    assert_refused(train, [*argv, "--resume"], "no whole model; delete the config.json", capfd,
                   tmp_path, world)
    Path("out/config.json").unlink()
    assert train.main([*argv, "--resume"]) == 0
    assert all(t.equal(expected[name]) for name, t in weights(tmp_path / "out").items())


@pytest.mark.parametrize("gone", ["model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_finished_run_whose_files_are_gone(gone, world, tmp_path, capfd):
    argv = words(RUN, world, "--epochs 1")
    assert train.main(argv) == 0
    assert train.main([*argv, "--resume"]) == 0 and "is complete" in capfd.readouterr().out
    write_model(tmp_path / "other", seed=1)
    assert_refused(train, [*argv, "--resume", "--model", "other"], "start was", capfd, tmp_path)
    Path("out", gone).unlink()
    culprit = "no whole model" if gone == "model.safetensors" else f"{gone} is gone"
    assert_refused(train, [*argv, "--resume"], culprit, capfd, tmp_path, world)


ODD = {  # what loads but makes trouble when saved or generated with
    "output_attentions": (config(output_attentions=True), "output_attentions"),
    "hidden states": (config(output_hidden_states=True), None),
    "generation settings": (config(do_sample=True, temperature=0.3, num_beams=3), None),
    "refused generation config": (written("generation_config.json", json.dumps(
        {"do_sample": False, "temperature": 0.5, "top_p": 0.5, "eos_token_id": 1}).encode()), None),
    "broken generation config": (written("generation_config.json", b"{"), None),
    "several ends": (written("generation_config.json", b'{"eos_token_id": [1, 99999, -1]}'), None),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_configs(name, world, tmp_path, capfd):
    """They are refused before training, or trained and carried over as they are."""
    shutil.copytree(world / "model", "odd", ignore=shutil.ignore_patterns("eval.json"))
    ODD[name][0](tmp_path / "odd")
    argv = words(RUN, world, "--model odd --epochs 1")
    before = tree(world, tmp_path / "odd")
    status = train.main(argv)
    if ODD[name][1] and status:  # not all versions of transformers refuse it
        err = capfd.readouterr().err
        assert status == 2 and ODD[name][1] in err and err.count("\n") == 1
        assert tree(world, tmp_path / "odd") == before and not Path("out").exists()
        return
    assert status == 0
    for path in Path("odd").glob("*.json"):
        assert Path("out", path.name).read_bytes() == path.read_bytes()
    argv = words("out --forget {tofu}/forget05 --max-new-tokens 2 --limit 2", world)
    assert evaluation.main(argv) == 0


@pytest.mark.parametrize("name", ["mkdir", "replace"])
def test_a_table_that_cannot_be_saved_is_printed(name, world, tmp_path, capfd, monkeypatch):
    shutil.copytree(world / "model", "model", ignore=shutil.ignore_patterns("eval.json"))
    before = tree(tmp_path)
    target = Path if name == "mkdir" else os
    full = raising(OSError(errno.ENOSPC, "No space left on device"))
    argv = words("model --forget {tofu}/forget05 --max-new-tokens 2 --limit 2", world)
    with monkeypatch.context() as patch:
        patch.setattr(target, name, full)
        assert evaluation.main(argv) == 1
    out, err = capfd.readouterr()
    assert "model utility" in out and err.count("\n") == 1
    assert err.startswith("error: model/eval.json: cannot be written: No space left on device")
    assert {p: c for p, (c, _) in tree(tmp_path).items()} == {p: c for p, (c, _) in before.items()}


# Any bytes whatever

FUZZ = settings(max_examples=150, deadline=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture])
NAME = st.sampled_from(["a.jsonl", "a.json", "a.txt"])


def assert_examples_or_input_error(content, name, folder, tokenizer):
    path = folder / name
    path.write_bytes(content)
    for read in (read_records, lambda path: load_examples(path, tokenizer, 40)):
        try:
            for item in read(path):
                assert isinstance(item, dict) or isinstance(item, Example)
                if isinstance(item, Example):
                    assert 0 < item.start < len(item.input_ids) <= 40
                    assert all(type(i) is int and 0 <= i < len(tokenizer) for i in item.input_ids)
        except InputError as e:
            assert str(e).startswith(f"{path}:")


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "model")


@FUZZ
@given(st.binary(max_size=200), NAME)
def test_random_bytes(tokenizer, tmp_path, content, name):
    assert_examples_or_input_error(content, name, tmp_path, tokenizer)


FIELD = st.sampled_from(["question", "answer", "text", "input_ids", "prompt", "gt",
                         "paraphrased_answer",
                         "perturbed_answer"])
LEAF = (st.none() | st.booleans() | st.floats() | st.integers() | st.text()
        | st.text(st.characters(categories=["Cs", "Cc"])))
VALUE = st.recursive(LEAF, lambda inner: st.lists(inner,
                                                  max_size=4) | st.dictionaries(FIELD | st.text(),
                                                                                inner, max_size=4),
                     max_leaves=12)
RECORD = st.dictionaries(FIELD, st.text(min_size=1) | st.lists(st.integers(0, 300),
                                                               max_size=5) | VALUE, max_size=4)


@FUZZ
@given(st.lists(RECORD | VALUE, max_size=4).flatmap(lambda values: st.sampled_from(
    [json.dumps(values), "\n".join(map(json.dumps, values))])).map(str.encode), NAME)
def test_random_json(tokenizer, tmp_path, content, name):
    assert_examples_or_input_error(content, name, tmp_path, tokenizer)


VALID = ["".join(json.dumps(r) + "\n" for r in RECORDS[:3]), json.dumps(RECORDS[:3], indent=1),
         '{"text": "a b"}\n"c d"\n',
         '{"input_ids": [3, 4, 5]}\n{"input_ids": [6, 7]}\n', "One text.\r\nTwo lines."]
EDIT = st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=3) | st.sampled_from(
    [b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\n", b"\xef\xbb\xbf", b"\xff", b"\\ud800",
     b"null", b"-1", b"1e9"]))


def edited(text, edits):
    """Replace, at each place, so many bytes by others."""
    content = text.encode()
    for place, size, new in edits:
        at = int(place * len(content))
        content = content[:at] + new + content[at + size:]
    return content


@FUZZ
@given(st.builds(edited, st.sampled_from(VALID), st.lists(EDIT, min_size=1, max_size=3)), NAME)
def test_edited_files(tokenizer, tmp_path, content, name):
    assert_examples_or_input_error(content, name, tmp_path, tokenizer)
