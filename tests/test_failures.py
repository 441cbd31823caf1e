"""Bad input is refused in one line that begins with its place, and nothing is written."""

import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import (RECORDS, ROOT, log, stop_after, weights, write_data, write_model, write_muse,
                      write_tofu)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertLMHeadModel, PreTrainedModel
from transformers.utils import HF_MODULES_CACHE

import eval as evaluation
import train
from data.load import load_examples
from data.support.errors import InputError

RUN = ("--model {model} --forget {data}/forget25 --retain {data}/retain75 --output out --lr 1e-3 "
       "--batch-size 2")
TOFU = "{model} --forget {tofu}/forget05 --max-new-tokens 2 --limit 2"


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


@pytest.fixture
def no_weights(monkeypatch):
    """What is wrong is found before any weights are read."""
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)


def words(text, world, more=""):
    """A command line with its {names} filled in, as a list; a later option overrides an earlier
    one."""
    names = {name: world / name for name in ("model", "data", "tofu", "muse", "stopped")}
    return [word.format(**names) for word in shlex.split(f"{text} {more}")]


def contents(*folders):
    """Every file and folder below, with its bytes."""
    return {p: p.read_bytes() if p.is_file() else None for f in folders for p in f.rglob("*")}


def assert_refused(program, argv, place, capfd, *folders, status=2):
    """One line on stderr: error:, then the place (its folder may stand before it; * is any words);
    nothing is written anywhere."""
    before = contents(*folders)
    capfd.readouterr()
    assert program.main(argv) == status
    err = capfd.readouterr().err
    pattern = re.escape(place).replace(r"\*", ".*")
    assert re.match(rf"error: (argument |\S*/)?{pattern}", err) and err.count("\n") == 1, err
    assert contents(*folders) == before


# Data files

QA = '{"question": "Who?", "answer": "He."}\n'
BAD_FILES = {  # name: content, the line
    "empty.jsonl": ("", 1),
    "blank.txt": (" \n\n", 1),
    "empty_array.json": ("[]", 1),
    "broken.jsonl": (QA + '{"question": "Who?", "answer": \n', 2),
    "cut_off.json": ('[\n{"question": "Who?", "answer": "He."},\n{"question": "Wh', 3),
    "deep.jsonl": ('{"a":' * 100_000, 1),
    "latin1.jsonl": (QA.encode() + '{"question": "Où?", "answer": "Là."}'.encode("latin-1"), 2),
    "no_known_field.jsonl": (QA + '{"prompt_": "Who?"}', 2),
    "no_answer.jsonl": (QA + '{"question": "Who?"}', "2: answer"),
    "number_answer.jsonl": ('{"question": "Who?", "answer": 7}', "1: answer"),
    "blank_answer.jsonl": ('{"question": "Who?", "answer": " \\n"}', "1: answer"),
    "two_kinds.jsonl": (QA + '{"text": "a b"}', 2),
    "one_false.jsonl": ('{"question": "Who?", "answer": "A.", "perturbed_answer": "B."}', 1),
    "float_token.jsonl": ('{"input_ids": [3, 1.5]}', "1: input_ids"),
    "unknown_token.jsonl": ('{"input_ids": [3, 4]}\n{"input_ids": [3, 99999]}', "2: token 99999"),
    "verbmem.json": ('[{"prompt": "a b", "gt": "c"}]', 1),  # of MUSE: to evaluate on, not to train
    "too_long.jsonl": (QA + QA.replace("He.", "He. " * 200), 2),
    "pointer.jsonl": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", 1),
    "annexed.txt": ("../.git/annex/objects/k3/Xq/MD5E-s9--a.txt/MD5E-s9--a.txt", "1: *pointer"),
    "in_both.jsonl": (json.dumps(RECORDS[5]), 1),  # in the retain set, too
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_data_files(name, world, tmp_path, capfd):
    content, line = BAD_FILES[name]
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(train, words(RUN, world, f"--forget {name}"), f"{name}:{line}", capfd, tmp_path)


@pytest.mark.parametrize("name, content, place", [  # None: the file is gone
    ("tofu/forget05_perturbed.jsonl", QA, "forget05_perturbed.jsonl:1: *perturbed_answer"),
    ("tofu/retain_perturbed.jsonl", '{"text": "a b"}', "retain_perturbed.jsonl:1: "),
    ("tofu/real_authors_perturbed.jsonl", "[1", "real_authors_perturbed.jsonl:1: "),
    ("tofu/world_facts_perturbed.jsonl", None, "*world_facts_perturbed"),
    ("muse/verbmem/forget.json", QA, "forget.json:1: "),
    ("muse/knowmem/retain_qa_icl.json", '[{"question": "a b"}]', "retain_qa_icl.json:1: *answer"),
    ("muse/knowmem/retain_qa.json", None, "retain_qa: "),
    ("muse/privleak/forget.json", '["a b", 3]', "forget.json:1: record 2: "),
])
def test_bad_evaluation_files(name, content, place, world, tmp_path, capfd, no_weights):
    kind = name.split("/")[0]
    shutil.copytree(world / kind, kind)
    Path(name).write_text(content) if content is not None else Path(name).unlink()
    argv = "{model} --forget tofu/forget05" if kind == "tofu" else "{model} --muse muse"
    assert_refused(evaluation, words(argv, world), place, capfd, tmp_path)


# Arguments

@pytest.mark.parametrize("options, place", [  # after the options of RUN
    *((options, re.split("[ =]", options)[0]) for options in (  # the flag itself
        "--beta 0|--beta nan|--beta x|--gamma=-inf|--forget-weight -0.1|--retain-weight inf|"
        "--epochs 0|--epochs 1.5|--batch-size 0|--lr 1e999|--weight-decay -1|--warmup-epochs -1|"
        "--clip 0|--seed 99999999999999999999|--max-tokens 0|--max-length 1|--loss dpo|"
        "--retain-loss l2|--schedule cosine|--dtype fp8|--save-every -1|--snapshots x|--output|"
        "--template nothing|--template ''|--device tpu").split("|")),
    ("--epochs " + "9" * 5000, "--epochs"),
    ("--bet 3", "*--bet"), ("surplus", "*surplus"),
    *((f"{flag} ''", flag) for flag in ("--init", "--model", "--forget", "--retain", "--output")),
    # data
    ("--forget {data}/forget", "forget: *forget25"),  # what is beside it
    ("--forget {data}", "data: *full.jsonl"),  # a folder: what is in it
    ("--forget " + "x" * 300, "xxx"),
    ("--retain nowhere", "nowhere: "),
    ("--retain {data}/full", "forget25.jsonl:1: "),  # it holds the forget set
    ("--max-length 5", "forget25.jsonl:1: *4 of 4"),  # how many do not fit
    ("--max-length 10000", "--max-length 10000: *512"),  # what the model takes
    # model
    ("--init {model}", "--model and --init"),
    ("--bf16-weights --dtype fp16", "--bf16-weights"),
    ("--model nowhere/at/all", "nowhere/at/all: "),
    ("--model some-org/some-model", "some-org/some-model: "),
    ("--model {data}", "data: "),
    ("--model {data}/full.jsonl", "full.jsonl: "),
    # output
    ("--output {model} --resume", "model: "),  # there is nothing to resume
    ("--output {model}", "model: "), ("--output {stopped}", "stopped: "),  # not empty
    ("--output {data}/full.jsonl", "full.jsonl: "), ("--output " + "x" * 300, "xxx"),
])
def test_bad_training_arguments(options, place, world, tmp_path, capfd, no_weights):
    assert_refused(train, words(RUN, world, options), place, capfd, tmp_path, world)


@pytest.mark.parametrize("output", ["{data}/full.jsonl/out", "/proc/out"])
def test_a_folder_that_cannot_be_made(output, world, tmp_path, capfd):
    argv = words(RUN, world, f"--output {output}")
    assert_refused(train, argv, "*out: not a folder", capfd, tmp_path, world)


@pytest.mark.parametrize("argv, place", [
    ("", "*--forget"), ("--model {model} --forget {data}/full", "--retain"),
    ("--model {model} --forget {tofu}/forget05", "retain95: "),  # the retain set by its name
    ("--forget {data}/forget25", "--model"),
    # With the built-in model, which would have to be made first:
    (f"--forget {ROOT}/data/forget01 --retain nowhere", "nowhere: "),
    (f"--forget {ROOT}/data/forget01 --template nothing", "--template"),
    (f"--forget {ROOT}/data/forget01 --max-length 5", "forget01.jsonl:1"),
])
def test_arguments_that_are_missing(argv, place, world, tmp_path, capfd):
    assert_refused(train, words(argv, world), place, capfd, tmp_path, world)


@pytest.mark.parametrize("argv, place", [
    ("", "*MODEL"), ("''", "MODEL"), ("{model} --unknown", "*--unknown"),
    ("{model}", "model: "), ("runs/eval.json", "runs/eval.json: "),  # there are no results to show
    ("{model} --forget ''", "--forget"), ("{model} --forget nowhere", "nowhere: "),
    ("{model} --forget {data}/forget25", "forget25*perturbed"),
    ("{model} --muse nowhere", "nowhere/verbmem/forget: "),
    ("{model} --muse {tofu}", "*tofu/verbmem/forget: "),
    ("{model} --muse {muse} --forget x", "*--muse"),
    ("{model} --muse {muse} --reference nan", "--reference"),
    (f"{TOFU} --reference ''", "--reference"), (f"{TOFU} --reference runs/none", "runs/none: "),
    ("{model} runs/none --forget {tofu}/forget05", "runs/none: "),
    ("{model} {tofu} --forget {tofu}/forget05", "tofu: "),
    ("{model} {data}/full.jsonl --forget {tofu}/forget05", "full.jsonl: "),
    *((f"{TOFU} {options}", options.split()[0]) for options in (
        "--template x|--limit 0|--limit 1.5|--max-new-tokens -1|--batch-size nan|--max-tokens 0|"
        "--dtype fp8").split("|")),
    (f"runs/none --forget {ROOT}/data/forget05", "runs/none: "),  # no built-in model is made
])
def test_bad_evaluation_arguments(argv, place, world, tmp_path, capfd, no_weights):
    assert_refused(evaluation, words(argv, world), place, capfd, tmp_path, world)


RATIOS = {split: [{"truth_ratio": 1.0}] for split in ("retain", "real_authors", "world_facts")}


@pytest.mark.parametrize("content", [
    [], {"accuracy": 1}, {"evaluations": {}}, {"evaluations": {"": {}, "tofu": 3}},
    {"evaluations": {"muse x": {"values": {}}}}, {"evaluations": {"tofu x": {"settings": {}}}},
    {"evaluations": {"tofu x": {"values": [1]}}},
    {"evaluations": {"tofu x": {"values": {**RATIOS, "forget": [{"truth_ratio": "high"}]}}}},
    {"eval_log_forget.json": {"avg_gt_loss": [1.0]}},  # the official form
    {"forget_truth_ratio": {"value_by_index": {"0": {"score": "x"}}}},  # OpenUnlearning's
], ids=str)
def test_bad_saved_results(content, world, tmp_path, capfd):
    Path("x.json").write_text(json.dumps(content))
    assert_refused(evaluation, ["x.json"], "x.json: ", capfd, tmp_path)
    argv = words(f"{TOFU} --reference x.json", world)
    assert_refused(evaluation, argv, "x.json: ", capfd, tmp_path, world)


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
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded(name):
    """An index that sends every weight to the file `name`."""
    def spoil(folder):
        keys = load_file(folder / "model.safetensors")
        torch.save(keys, folder / "weights.bin")
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return spoil


def sharded_and_single(folder):
    weights = (folder / "model.safetensors").read_bytes()
    sharded("model-00001-of-00001.safetensors")(folder)
    (folder / "model.safetensors").write_bytes(weights)


def without_a_norm(folder):
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def encoder(folder):
    """BERT, with weights, whose config does not say what it is."""
    BertLMHeadModel(BertConfig(
        vocab_size=258, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=128)).save_pretrained(folder)
    config(architectures=None)(folder)


def eos_added(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<extra>"})
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


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
BAD_MODELS = {  # what is done to a sound folder, words after its name
    # weights
    "none": (without("model.safetensors"), "*safetensors"),
    "a pointer": (written("model.safetensors", POINTER), "*Git LFS"),
    "a pickle": (pickled, "*pytorch_model.bin"),
    "cut off": (cut("model.safetensors", 5000), "*cannot be loaded"),
    "one is missing": (without_a_norm, "*1 weights *model.norm.weight"),
    "too many": (config(num_hidden_layers=1), "*9 weights*layers.1"),
    "of another shape": (config(hidden_size=64), "*weights are missing, of another shape"),
    "a shard outside": (sharded("../model/model.safetensors"), "*'../model/model.safetensors'"),
    "a shard that is a pickle": (sharded("weights.bin"), "*'weights.bin'"),
    "shards beside a single file": (sharded_and_single, "*its shards *'model.safetensors'"),
    "an adapter on top": (written("adapter_config.json", b"{}"), "*adapter"),
    # config
    "no config": (without("config.json"), "*config.json"),
    "unknown kind": (config(model_type="perceptron"), "*config.json"),
    "encoder": (encoder, "*not a causal"),
    "remote code": (remote_code(), "*config.json"),
    # tokenizer
    "remote tokenizer": (remote_code("llama", "EvilTokenizer"), "*tokenizer"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "*tokenizer"),
    "no EOS": (tokenizer_config(eos_token=None), "*EOS"),
    "an EOS without embedding": (eos_added, "*258"),
    "a template that looks around": (
        tokenizer_config(chat_template="{{ ''.__class__.__mro__ }}"), "--template chat"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models(name, world, tmp_path, capfd):
    """Nothing that is in them is executed either (this would leave a file)."""
    spoil, culprit = BAD_MODELS[name]
    shutil.copytree(world / "model", "spoilt")
    spoil(tmp_path / "spoilt")
    place = culprit if culprit.startswith("--") else f"spoilt{culprit}"
    folders = tmp_path, world, Path(HF_MODULES_CACHE)
    assert_refused(train, words(RUN, world, "--model spoilt"), place, capfd, *folders)
    assert_refused(evaluation, words(TOFU.replace("{model}", "spoilt"), world), place, capfd,
                   *folders)
    if name in ("no config", "remote code", "no EOS", "encoder"):
        argv = words(RUN.replace("--model {model}", "--init spoilt"), world)
        assert_refused(train, argv, place, capfd, *folders)


def test_more_tokens_than_embeddings(world, tmp_path, capfd):
    """A token that the model does not know is an error where it occurs, and only there."""
    shutil.copytree(world / "model", "spoilt")
    tokenizer = AutoTokenizer.from_pretrained("spoilt")
    tokenizer.add_tokens(["near"])  # which occurs in the data
    tokenizer.save_pretrained("spoilt")
    argv = words(RUN, world, "--model spoilt --epochs 1")
    assert_refused(train, argv, "forget25.jsonl:1: token 258", capfd, tmp_path, world)
    Path("other.jsonl").write_text(QA)
    assert train.main([*argv, "--forget", "other.jsonl", "--retain-loss", "none"]) == 0


def test_what_cannot_be_trained_is_refused_before_the_run(world, tmp_path, capfd, monkeypatch):
    """A dropout above 1, which no evaluation meets; --compile without a compiler, which fails when
    the compiled decoder is first called."""
    shutil.copytree(world / "model", "wet")
    config(attention_dropout=2.0)(tmp_path / "wet")
    assert_refused(train, words(RUN, world, "--model wet"), "wet", capfd, tmp_path, world)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: setattr(
        self, "_compiled_call_impl", raiser("no compiler")))
    assert_refused(train, words(RUN, world, "--compile"), f"{world}/model", capfd, tmp_path, world)


def raiser(message):
    def fail(*args, **kwargs):
        raise RuntimeError(message)
    return fail


def test_what_a_model_folder_names_is_left_alone(world, tmp_path):
    """transformers knows Llama: what auto_map offers instead is neither imported nor copied. And
    whatever paths a folder's files hold, only the output is written to."""
    shutil.copytree(world / "model", "named")
    remote_code("llama")(tmp_path / "named")
    config(_name_or_path="../../elsewhere")(tmp_path / "named")
    tokenizer_config(name_or_path="../../elsewhere", vocab_file="../vocab.json",
                     tokenizer_file="../tokenizer.json", chat_template="{{ messages[0].content }}",
                     chat_template_file="../evil.jinja")(tmp_path / "named")
    before = contents(world, tmp_path, Path(HF_MODULES_CACHE))
    options = "--model named --output some/where/out --epochs 1 --template plain"
    assert train.main(words(RUN, world, options)) == 0
    argv = words(TOFU.replace("{model}", "some/where/out"), world, "--template plain")
    assert evaluation.main(argv) == 0
    suffixes = {p.suffix for p in Path("some/where/out").rglob("*")}
    assert suffixes == {".json", ".jsonl", ".safetensors"}
    shutil.rmtree("some")
    assert contents(world, tmp_path, Path(HF_MODULES_CACHE)) == before


@pytest.mark.parametrize("spoil", [
    config(output_hidden_states=True), config(do_sample=True, temperature=0.3, num_beams=3),
    written("generation_config.json", b"{"),
    written("generation_config.json", b'{"eos_token_id": [1, 99999, -1]}')])
def test_odd_models(spoil, world, tmp_path):
    """Whatever its configs ask for, a model is trained, carried over as it is, and evaluated."""
    shutil.copytree(world / "model", "odd")
    spoil(tmp_path / "odd")
    assert train.main(words(RUN, world, "--model odd --epochs 1")) == 0
    for path in Path("odd").glob("*.json"):
        assert Path("out", path.name).read_bytes() == path.read_bytes()
    assert evaluation.main(words(TOFU.replace("{model}", "out"), world)) == 0


# Resuming

def spoiled(change):
    return lambda run: change(next(run.glob("checkpoint-*")))


def rewritten(change=lambda tensors: tensors, **about):
    """A checkpoint with other tensors, or that says other things of itself."""
    def spoil(path):
        with safe_open(path, "pt") as file:
            said = json.loads(file.metadata()["about"]) | about
        save_file(change(load_file(path)), path, {"about": json.dumps(said)})
    return spoiled(spoil)


BAD_RUNS = {  # what happened to a stopped run's folder, the place
    **{name: (change, "checkpoint-00000003.safetensors: ") for name, change in {
        "cut off": spoiled(lambda p: os.truncate(p, 3000)),
        "a folder": spoiled(lambda p: (p.unlink(), p.mkdir())),
        "of another model": rewritten(lambda tensors: {n: t.flatten() for n, t in tensors.items()}),
        "without moments": rewritten(lambda tensors: {
            n: t for n, t in tensors.items() if n.startswith("weight.")}),
        "without some weights' moments": rewritten(lambda tensors: {
            n: t for n, t in tensors.items() if not re.match("exp.*norm.weight", n)}),
        "of half precision": rewritten(lambda tensors: {n: t.half() for n, t in tensors.items()}),
        "with a tensor more": rewritten(lambda tensors: {**tensors, "x": torch.ones(1)}),
        "of another step": rewritten(step=2)}.items()},
    "a step beyond the last": (
        spoiled(lambda p: p.rename(p.with_name("checkpoint-00000007.safetensors"))),
        "checkpoint-00000007.safetensors: "),
    "the newest of two": (
        spoiled(lambda p: p.with_name("checkpoint-00000005.safetensors").write_bytes(b"?")),
        "checkpoint-00000005.safetensors: "),
    "arguments missing": (without("args.json"), "out: "),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_damaged_runs(name, world, tmp_path, capfd):
    """The damaged checkpoint stays, too."""
    shutil.copytree(world / "stopped", "out")
    spoil, place = BAD_RUNS[name]
    spoil(tmp_path / "out")
    before = contents(tmp_path)
    assert_refused(train, words(RUN, world, "--epochs 3 --resume"), place, capfd, world)
    assert contents(tmp_path) == before


def test_a_start_models_files_in_a_stopped_run(world, tmp_path, capfd):
    """As copied there to look at its checkpoint: they do not make it complete."""
    shutil.copytree(world / "stopped", "out")
    shutil.copytree(world / "model", "out", dirs_exist_ok=True)
    assert train.main(words(RUN, world, "--epochs 3 --resume")) == 0
    assert [x["step"] for x in log(tmp_path / "out") if "lr" in x] == [1, 2, 3, 4, 5, 6]
    started, ended = weights(world / "model"), weights(tmp_path / "out")
    assert not any(ended[name].equal(started[name]) for name in started)


def test_a_damaged_log_does_not_stop_a_run(world, tmp_path):
    """As power loss leaves it: the checkpoint has a copy."""
    shutil.copytree(world / "stopped", "out")
    lines = Path("out/metrics.jsonl").read_text().splitlines(keepends=True)
    Path("out/metrics.jsonl").write_bytes(b"\0" * 20 + b"\n\xff{}\n[]\n" + lines[-1][:9].encode())
    assert train.main(words(RUN, world, "--epochs 3 --resume")) == 0
    assert [x["step"] for x in log(tmp_path / "out") if "lr" in x] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("options, changed", [
    ("--beta 1 --gamma 2", "beta was 2.5, is 1.0*gamma was 0.0, is 2.0"),
    ("--epochs 4", "epochs was 3, is 4"), ("--retain-loss none", "retain-loss was nll, is none"),
    ("--model other", "start"), ("--forget forget25", "forget data"), ("--template llama2", "tem")])
def test_resuming_with_other_arguments(options, changed, world, tmp_path, capfd, no_weights):
    shutil.copytree(world / "stopped", "out")
    write_model(tmp_path / "other", seed=1)
    text = (world / "data" / "forget25.jsonl").read_text()
    Path("forget25.jsonl").write_text(text.replace("Oslo", "Roma"))
    argv = words(RUN, world, f"--epochs 3 --resume {options}")
    assert_refused(train, argv, f"out/args.json: *{changed}", capfd, tmp_path, world)


def test_what_may_change_when_a_run_goes_on(world):
    """How often it saves, how its steps are split, and where the same model and data lie."""
    shutil.copytree(world / "stopped", "out")
    options = "--epochs 3 --resume --max-tokens 64 --save-every 2 --checkpointing"
    assert train.main(words(RUN, world, options)) == 0
    for name, copy in (("stopped", "moved"), ("model", "twin"), ("data", "copies")):
        shutil.copytree(world / name, copy)
    options = "--epochs 3 --resume --model ./twin/ --forget copies/../copies/forget25.jsonl"
    assert train.main(words(RUN, world, f"{options} --output moved/../moved")) == 0
    for name, weight in weights(Path("moved")).items():
        torch.testing.assert_close(weights(Path("out"))[name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("damage", [cut("model.safetensors", 5000), without("model.safetensors"),
                                    written("config.json", b"{}")])
def test_a_finished_run_that_is_damaged(damage, world, tmp_path, capfd):
    """It is not called complete; without the config.json it is made again."""
    argv = words(RUN, world, "--epochs 1")
    assert train.main(argv) == 0
    assert train.main([*argv, "--resume"]) == 0 and "is complete" in capfd.readouterr().out
    expected = {name: t.clone() for name, t in weights(tmp_path / "out").items()}  # no mapped file
    damage(tmp_path / "out")
    assert_refused(train, [*argv, "--resume"], "out: ", capfd, tmp_path, world)
    Path("out/config.json").unlink()
    assert train.main([*argv, "--resume"]) == 0
    assert all(t.equal(expected[name]) for name, t in weights(tmp_path / "out").items())


def test_only_own_files_are_removed(world, tmp_path):
    """Names like a checkpoint's, and anything of others', stay."""
    shutil.copytree(world / "stopped", "out")
    others = ["checkpoint-3.safetensors", "checkpoint-000000003.safetensors", "checkpoint-best",
              "checkpoint-00000001.safetensors.bak", "notes.tmp", "step-1", "wandb.txt"]
    for name in others:
        Path("out", name).write_text("mine")
    assert train.main(words(RUN, world, "--epochs 3 --resume --save-every 1")) == 0
    left = {p.name for p in Path("out").iterdir()}
    assert {*others} <= left
    assert not left & {".half-done", ".lock", "checkpoint-00000003.safetensors"}
    assert all(Path("out", name).read_text() == "mine" for name in others)


# Any bytes whatever: Examples come of them, or an InputError that names the line.

FUZZ = settings(max_examples=100, deadline=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture])
NAME = st.sampled_from(["a.jsonl", "a.json", "a.txt"])


def assert_examples_or_input_error(content, name, folder, tokenizer):
    path = folder / name
    path.write_bytes(content)
    try:
        for example in load_examples(path, tokenizer, 40):
            assert 0 < example.start < len(example.input_ids) <= 40
            assert all(type(i) is int and 0 <= i < len(tokenizer) for i in example.input_ids)
    except InputError as e:
        assert str(e).startswith(f"{path}:")


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "model")


VALID = ["".join(json.dumps(r) + "\n" for r in RECORDS[:3]), json.dumps(RECORDS[:3], indent=1),
         '{"text": "a b"}\n"c d"\n', '{"input_ids": [3, 4, 5]}\n{"input_ids": [6, 7]}\n',
         "One text.\r\nTwo lines."]
EDIT = st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=3) | st.sampled_from(
    [b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\n", b"\xef\xbb\xbf", b"\xff", b"null",
     b"-1", b"1e9"]))


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
