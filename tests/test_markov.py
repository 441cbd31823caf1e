"""studies/make_markov.py: its sequences against the chains' stated probabilities, and that the
rest of the code reads them."""

import json
import math
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ROOT
from scipy.stats import chisquare
from transformers import AutoConfig, AutoModelForCausalLM

import train
from data.load import collate, load_examples
from data.support.data_files import check_disjoint
from data.support.models import load_tokenizer
from studies import common, make_markov, markov
from studies.markov import divergence, state_logps

FILES = {"retain": 8000, "forget1": 4000, "forget2": 4000,
         "retain_test": 2000, "forget1_test": 1000, "forget2_test": 1000, "forget": 8000}
OWN = {"retain": {0, 1, 2}, "forget1": {3, 4, 5}, "forget2": {6, 7, 8}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("markov")
    make_markov.write_all(folder)
    return folder


def sequences(folder, setting, name):
    text = (folder / setting / f"{name}.jsonl").read_text()
    return [json.loads(line)["input_ids"] for line in text.splitlines()]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("setting, target, forget2_length",
                         [("never_learned", 12000, 20), ("short", 16000, 5)])
def test_sizes_lengths_and_parts(folder, setting, target, forget2_length):
    files = {name: sequences(folder, setting, name) for name in [*FILES, "target"]}
    assert {name: len(rows) for name, rows in files.items()} == {**FILES, "target": target}
    assert len(list((folder / setting).iterdir())) == len(files)
    for name in ("retain", "forget1", "forget2"):
        states = forget2_length if name == "forget2" else 20
        for ids in files[name] + files[f"{name}_test"]:
            assert len(ids) == states + 1 and ids[0] == 0 and all(2 <= i < 12 for i in ids[1:])
    learned = files["retain"] + files["forget1"] + files["forget2"] * (setting == "short")
    assert Counter(map(tuple, files["target"])) == Counter(map(tuple, learned))
    both = files["forget1"] + files["forget2"]
    assert Counter(map(tuple, files["forget"])) == Counter(map(tuple, both))
    train, test = ({tuple(ids) for ids in files[name]} for name in ("retain", "retain_test"))
    assert not train & test


@pytest.mark.parametrize("setting", ["never_learned", "short"])
@pytest.mark.parametrize("chain", list(OWN))
def test_frequencies(folder, setting, chain):
    """The first state, and the next after each of the ten states, follow 0.8 / 3 and 0.2 / 7."""
    expected = [0.8 / 3 if state in OWN[chain] else 0.2 / 7 for state in range(10)]
    assert make_markov.probabilities(chain) == pytest.approx(expected)
    after = Counter()
    for ids in sequences(folder, setting, chain) + sequences(folder, setting, f"{chain}_test"):
        states = [None] + [i - 2 for i in ids[1:]]
        after.update(zip(states, states[1:]))
    for last in [None, *range(10)]:
        counts = [after[last, state] for state in range(10)]
        assert chisquare(counts, [p * sum(counts) for p in expected]).pvalue > 1e-4, (last, counts)


def test_command_writes_the_same_bytes(folder, tmp_path):
    script = [sys.executable, ROOT / "tests" / "studies" / "make_markov.py", "--output"]
    subprocess.run([*script, tmp_path / "again"], check=True)
    assert contents(tmp_path / "again") == contents(folder)
    make_markov.write_all(tmp_path / "other", seed=1)
    assert sequences(tmp_path / "other", "short", "retain") != sequences(folder, "short", "retain")


def test_model_and_tokenizer(folder):
    tokenizer = load_tokenizer(folder / "model")
    config = AutoConfig.from_pretrained(folder / "model")
    assert len(tokenizer) == config.vocab_size == 12
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert (config.bos_token_id, config.eos_token_id) == (0, 1)
    assert tokenizer("0 9 4 4").input_ids == [0, 2, 11, 6, 6]
    assert tokenizer.decode([0, 2, 11, 6, 6], skip_special_tokens=True) == "0 9 4 4"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == (4, 4, 128, 32)
    ids = torch.tensor(sequences(folder, "short", "retain")[:2])
    assert torch.equal(model(ids).logits, model(ids).logits)  # no dropout


@pytest.mark.parametrize("setting", ["never_learned", "short"])
def test_training_reads_the_files(folder, setting):
    tokenizer = load_tokenizer(folder / "model")
    examples = {name: load_examples(folder / setting / name, tokenizer, 32)
                for name in [*FILES, "target"]}
    sizes = {name: len(rows) for name, rows in examples.items()}
    assert sizes == {**FILES, "target": sizes["target"]}
    assert all(e.start == 1 for rows in examples.values() for e in rows)  # every state carries loss
    check_disjoint(examples["forget"], examples["retain"])


@pytest.mark.parametrize("chain", list(OWN))
def test_divergence_of_the_true_probabilities_is_zero(folder, chain):
    """A model that knows the chain loses nothing on it, and log-ratios of 28 / 3 on another."""
    ids = torch.tensor(sequences(folder, "short", f"{chain}_test")[:20])
    for known, own in OWN.items():
        truth = [0.5, 0.1, *(0.8 / 3 if state in own else 0.2 / 7 for state in range(10))]
        logits = torch.tensor(truth, dtype=torch.float64).log() + 3  # a softmax forgets the 3
        model = lambda input_ids: SimpleNamespace(logits=logits.expand(*input_ids.shape, 12))
        others = 3 * (0.8 / 3 - 0.2 / 7) * math.log(28 / 3)
        expected = others if known != chain else 0
        assert divergence(model, chain, ids) == pytest.approx(expected, abs=1e-12)


@pytest.fixture
def far_from_uniform(folder):
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    return model


def state_probabilities(model, ids):
    """By hand: what the model expects after ids, of the ten states alone."""
    with torch.no_grad():
        exps = [math.exp(x) for x in model(torch.tensor([ids])).logits[0, -1].tolist()[2:]]
    return [x / sum(exps) for x in exps]


def test_divergence_of_a_random_model_by_hand(folder, far_from_uniform):
    """All positions count alike, the first state among them."""
    for chain, own in OWN.items():
        model = far_from_uniform.double()
        truth = [0.8 / 3 if state in own else 0.2 / 7 for state in range(10)]
        rows = sequences(folder, "short", f"{chain}_test")[:3]
        kls = [sum(p * math.log(p / q) for p, q in zip(truth, state_probabilities(model, row[:t])))
               for row in rows for t in range(1, len(row))]
        by_hand = sum(kls) / len(kls)
        assert by_hand > 0.1
        assert divergence(model, chain, torch.tensor(rows)) == pytest.approx(by_hand, rel=1e-9)
        got = divergence(model.float(), chain, torch.tensor(rows))
        assert got == pytest.approx(by_hand, rel=1e-4)


def test_log_probabilities_of_states_by_hand(folder, far_from_uniform):
    """What unlearning sees: long and short sequences in one padded batch, state after state."""
    rows = load_examples(folder / "short" / "forget", load_tokenizer(folder / "model"), 32)
    rows = [rows[0], rows[-1], rows[1]]
    by_hand = [math.log(state_probabilities(far_from_uniform, row.input_ids[:t])[state - 2])
               for row in rows for t, state in enumerate(row.input_ids) if t > 0]
    with mock.patch.object(train, "answer_token_logps", state_logps):  # as the study does
        got = train.AnswerModel(far_from_uniform)(*collate(rows))
    assert got.tolist() == pytest.approx(by_hand, rel=1e-9)


def test_a_run_of_the_study(folder, tmp_path, monkeypatch):
    """From a model that knows nothing: unlearning moves the forget chains away from the truth."""
    monkeypatch.setattr(markov, "DATA", folder)
    monkeypatch.setattr(markov, "HOME", tmp_path)
    retain = tmp_path / "retain.jsonl"
    lines = (folder / "never_learned" / "retain.jsonl").read_text().splitlines(keepends=True)
    retain.write_text("".join(lines[:64]))
    target = common.run(tmp_path / "never_learned" / "target", "--epochs 1 --batch-size 32 --lr "
                        "5e-4 --save-every 0", init=folder / "model", retain=retain)
    before = markov.divergences(target, folder / "never_learned")
    after = markov.unlearned("never_learned", "SimNPO", 3)
    assert all(after[chain] > before[chain] + 0.1 for chain in ("forget1", "forget2"))
