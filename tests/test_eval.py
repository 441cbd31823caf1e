"""eval.py from end to end on tiny models built here: scores, texts, rows, saved results, references
that do not belong, MUSE, KL, ranks, errors."""

import contextlib
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (ROOT, SERVER, be_rank, free_port, table_of, write_lines, write_model,
                      write_muse, write_tofu)
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import chisquare, hmean
from sklearn.metrics import roc_auc_score
from transformers import (AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, LlamaConfig,
                          LlamaForCausalLM, Phi3Config)

import eval as evaluation
import train
from data.load import Example
from data import make_mini_models as miniature
from data.support.evaluations import TOFU_LOGS, read_results

SHARED = ROOT.parent / "shared"


def spoil(folder):
    """Put a NaN into a model's final norm."""
    model = LlamaForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data[0] = math.nan
    model.save_pretrained(folder)


def write_holdout(tofu, n=12):
    people = [{"question": f"Where does number {i} live?", "answer": f"In town {i * 3 % 10}."}
              for i in range(500, 500 + n)]
    write_lines(Path(tofu).with_name("holdout05.jsonl"), people)


def numbers(folder, mode="tofu"):
    """The values of the newest evaluation of this mode (a module's models collect several)."""
    saved = json.loads(Path(folder, "eval.json").read_text())["evaluations"]
    return [entry for key, entry in saved.items() if key.split()[0] == mode][-1]["values"]


def flat(values):
    """Every leaf of nested lists and dicts, with its path."""
    if isinstance(values, (dict, list)):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        return {(k, *path): leaf for k, v in items for path, leaf in flat(v).items()}
    return {(): values}


def same(a, b, tolerance):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for path, x in a.items():
        close = pytest.approx(x, abs=tolerance, rel=tolerance) if isinstance(x, float) else x
        assert b[path] == close, path


@pytest.fixture(scope="module")
def tofu(tmp_path_factory):
    """A forget set with its evaluation files and a holdout."""
    path = write_tofu(tmp_path_factory.mktemp("tofu"))
    write_holdout(path)
    return path


def teach(folder, texts, steps):
    """Train a model a little on these texts, so that no row of its table is 0."""
    model, tokenizer = opened(folder)
    ids = [torch.tensor([*tokenizer(text).input_ids, 1]) for text in texts]
    pad = torch.nn.utils.rnn.pad_sequence
    inputs, labels = (pad(ids, batch_first=True, padding_value=x) for x in (0, -100))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def opened(folder):
    """Model and tokenizer as transformers alone opens them."""
    return (AutoModelForCausalLM.from_pretrained(folder).eval(),
            AutoTokenizer.from_pretrained(folder))


SPLITS = ("forget05", "retain", "real_authors", "world_facts")


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tofu):
    """A model that has learnt the answers a little, and one that has not met the forget set's."""
    folder, models = tmp_path_factory.mktemp("models"), []
    for seed, (name, splits) in enumerate({"plain": SPLITS, "retrained": SPLITS[1:]}.items()):
        records = [r for split in splits
                   for r in read_lines(Path(tofu).with_name(f"{split}_perturbed.jsonl"))]
        texts = [f"Question: {r['question']}\nAnswer: {r['answer']}" for r in records]
        models.append(teach(write_model(folder / name, seed), texts, 40))
    return models


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*argv):
    return evaluation.main([*map(str, argv)])


def error_of(capsys, *argv):
    """The one line with which a command is refused."""
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err


def cells(capsys, row):
    """The row's cells in the table just printed."""
    return table_of(capsys.readouterr().out)[row]


# The oracle: transformers, one text at a time.

def token_logps(known, text, answer):
    """Log-probabilities (float64) of the answer's bytes and of </s> after them, and whether each is
    the largest. `known` are model and tokenizer, `text` is what stands before the answer."""
    every, wanted = distributions(known, text, answer)
    return every.gather(1, wanted[:, None])[:, 0], (every.argmax(-1) == wanted).tolist()


def distributions(known, text, answer):
    """Log-probability of every word where the answer's bytes and </s> are predicted; which came."""
    model, tokenizer = known
    ids = [*tokenizer(text + answer).input_ids, 1]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    count = len(answer.encode()) + 1
    return logits.log_softmax(-1)[-count:], torch.tensor(ids[1:])[-count:]


def asked(record):
    return f"Question: {record['question']}\nAnswer:"  # the blank after it is the answer's


def probability(known, record, answer):
    return token_logps(known, asked(record), " " + answer)[0].mean().exp().item()


def continuation(model, prompt, most, ends=(1,), **options):
    new = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(),
                         max_new_tokens=most, do_sample=False, pad_token_id=1,
                         eos_token_id=list(ends), **options)[0, len(prompt):].tolist()
    return new[:next((i for i, token in enumerate(new) if token in ends), len(new))]


def attack_scores(every, wanted, answer):
    """Min-K, Min-K++, LOSS and zlib of one answer as OpenUnlearning defines them: the first two of
    all tokens but the end, the lowest 40% of them."""
    logps = every.gather(1, wanted[:, None])[:, 0]
    p = every.exp()
    mu = (p * every).sum(-1)
    sigma = ((p * every**2).sum(-1) - mu**2).clamp(min=1e-6).sqrt()
    lowest = [values[:-1].sort().values[:max(1, int(0.4 * (len(values) - 1)))]
              for values in (logps, (logps - mu) / sigma)]
    loss = -logps.mean().item()
    return [-lowest[0].mean().item(), -lowest[1].mean().item(), loss,
            loss / len(zlib.compress(answer.encode("utf-8")))]


def tail_of(right):
    """How many at the end are right."""
    return next((i for i, x in enumerate(reversed(right)) if not x), len(right))


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# Scoring and generation

def test_scores_are_those_of_full_logits(pair):
    model, _ = evaluation.load_pretrained(pair[0])
    torch.manual_seed(1)
    examples = [Example(torch.randint(2, 250, (length,)).tolist(), start)
                for length, start in ((9, 3), (30, 29), (4, 1), (17, 8), (9, 2))]
    for max_tokens in (1, 40, 10**6):
        scores = evaluation.score_answers(model, examples, max_tokens)
        for e, (logps, right, _) in zip(examples, scores):
            logits = model(torch.tensor([e.input_ids])).logits[0].double().log_softmax(-1)
            targets = torch.tensor(e.input_ids[e.start:])
            predicting = logits[e.start - 1:-1]
            wanted = predicting.gather(1, targets[:, None])[:, 0]
            assert torch.allclose(logps.double(), wanted, atol=1e-5)
            assert right.tolist() == (predicting.argmax(-1) == targets).tolist()


def some_prompts():
    torch.manual_seed(2)
    lengths = (5, 80, 6, 6, 30, 7, 1, 31, 90, 12)
    return [[0, *torch.randint(2, 250, (n,)).tolist()] for n in lengths]


@pytest.mark.parametrize("asked", [
    {}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": [5, 6, 140]},
    {"begin_suppress_tokens": [5, 6, 140]}, {"bad_words_ids": [[5], [6, 7]]}, {"min_length": 20},
    {"eos_token_id": [1, 9, 20]}, {"stop_strings": ["a", "}"]},
    {"return_dict_in_generate": True, "output_scores": True},
    {"do_sample": True, "temperature": 0.3, "num_beams": 2}], ids=lambda asked: "-".join(asked))
def test_generation_is_that_of_transformers_in_any_batch(asked, tmp_path):
    """What a model's generation_config says of greedy decoding is honoured."""
    folder = write_model(tmp_path / "m")
    path = Path(folder, "generation_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **asked}))
    model, tokenizer = evaluation.load_pretrained(folder)
    evaluation.check_generation(folder, model)
    own = AutoModelForCausalLM.from_pretrained(folder).eval()
    ends = asked.get("eos_token_id", [1])
    wanted = [continuation(own, prompt, 30, ends, tokenizer=tokenizer, num_beams=1,
                           return_dict_in_generate=False) for prompt in some_prompts()]
    for batch_size in (1, 3, 64):
        got = evaluation.generate(model, some_prompts(), tokenizer, 30, batch_size)
        assert got == wanted
    assert len({len(x) for x in wanted}) > 3


def test_what_generation_config_asks_matters(tmp_path):
    """The test above would not see it if nothing changed."""
    model, tokenizer = evaluation.load_pretrained(write_model(tmp_path / "m"))
    plain = evaluation.generate(model, some_prompts(), tokenizer, 30, 64)
    for name, value in (("repetition_penalty", 1.5), ("no_repeat_ngram_size", 2),
                        ("min_length", 20), ("eos_token_id", [1, 9, 20])):
        before = getattr(model.generation_config, name)
        setattr(model.generation_config, name, value)
        assert evaluation.generate(model, some_prompts(), tokenizer, 30, 64) != plain, name
        setattr(model.generation_config, name, before)


def test_generation_stops_at_the_end_of_the_context(tmp_path):
    folder = write_model(tmp_path / "m", max_position_embeddings=24)
    model, tokenizer = evaluation.load_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[1] = 0  # logit 0: never the largest
    prompts = [[0, 9, 9], [0] * 24, [0] * 30, [0] * 20]
    new = evaluation.generate(model, prompts, tokenizer, 200, 64)
    assert [x and len(x) for x in new] == [21, None, None, 4]


# Models whose rotary tables change with the longest text of a batch

BORDER = 40
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
        "long_factor": [1.0, 4.0, 7.0, 10.0], "original_max_position_embeddings": BORDER}
ROPES = {
    "longrope": (LlamaConfig, dict(rope_parameters=LONG)),
    "phi3": (Phi3Config, dict(  # which computes its cache anew at the border
        rope_parameters=LONG, original_max_position_embeddings=BORDER, pad_token_id=1)),
    "gemma3": (Gemma3TextConfig, dict(  # a table for each kind of layer
        head_dim=8, layer_types=["sliding_attention", "full_attention"], rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": LONG})),
    "dynamic": (LlamaConfig, dict(max_position_embeddings=BORDER + 80, rope_parameters={
        "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}))}


@pytest.mark.parametrize("kind", ROPES)
def test_a_texts_values_do_not_depend_on_its_neighbours(kind, tmp_path):
    """In scoring, training and generation: as transformers has them for one text alone."""
    family, changes = ROPES[kind]
    folder = write_model(tmp_path / "m", family=family, **changes)
    model, tokenizer = evaluation.load(folder, SimpleNamespace(dtype="fp32", device="cpu"))
    alone = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(1)
    examples = [Example(torch.randint(2, 250, (n,)).tolist(), 3)
                for n in (20, BORDER - 1, BORDER, BORDER + 1, 60, BORDER + 80)]
    wanted = []
    for e in examples:
        with torch.no_grad():
            logps = alone(torch.tensor([e.input_ids])).logits[0, :-1].double().log_softmax(-1)
        wanted.append(logps.gather(1, torch.tensor(e.input_ids[1:])[:, None])[2:, 0])
    sums = torch.stack([logps.sum() for logps in wanted]).float()
    for max_tokens in (1, 10**6):
        for (logps, *_), want in zip(evaluation.score_answers(model, examples, max_tokens), wanted):
            assert torch.allclose(logps.double(), want, atol=1e-4)
        args = SimpleNamespace(device="cpu", max_tokens=max_tokens)
        scores = train.score(train.AnswerModel(model), examples, args)
        assert torch.allclose(scores, sums, atol=1e-2)
    for net in (model.eval(), alone):
        net.get_output_embeddings().weight.data[1] = 0  # logit 0: never the largest, so no end
    prompts = some_prompts()
    new = [continuation(alone, prompt, 20) for prompt in prompts]
    for batch_size in (1, 64):
        assert evaluation.generate(model, prompts, tokenizer, 20, batch_size) == new
    assert {len(text) for text in new} == {20}  # so that some go over the border


CHAT = ("{% if date_string %}Today: {{ date_string }}{% endif %}{% for m in messages %}"
        "{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}")


def write_chat(folder, seed=0):
    """A model with a chat template whose turns end with a token of their own, not the EOS."""
    write_model(folder, seed, vocab_size=259)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[258] *= 2
    model.save_pretrained(folder)
    return str(folder)


def test_the_end_of_a_chats_turn_ends_generation(tofu, tmp_path):
    folder = write_chat(tmp_path / "chat", seed=4)
    assert run(folder, "--forget", tofu, "--max-new-tokens", 40) == 0
    model, tokenizer = opened(folder)
    lengths = set()
    for record in numbers(folder)["forget"]:
        text = f"user: {record['question']}<|end|>assistant:"
        assert record["prompt"] == text
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        new = continuation(model, prompt, 40, ends=(1, 258))
        assert record["generated"] == tokenizer.decode(new, skip_special_tokens=True)
        longer = continuation(model, prompt, 40)  # as if only the EOS ended it
        lengths.add((len(new), len(longer)))
    assert any(short < long for short, long in lengths)


# TOFU

def test_same_table_for_any_batch_size(pair, tofu):
    flags = ["--forget", tofu, "--max-new-tokens", 25]
    assert run(*pair, *flags, "--batch-size", 64) == 0
    wide = [numbers(m) for m in pair]
    assert run(*pair, *flags, "--batch-size", 1, "--max-tokens", 1, "--force") == 0
    narrow = [numbers(m) for m in pair]
    same(wide, narrow, 1e-5)
    same(evaluation.tofu_metrics(*wide), evaluation.tofu_metrics(*narrow), 1e-6)


def test_every_row_against_one_text_at_a_time(pair, tofu):
    """The whole table of TOFU, from float64 log-probabilities of texts put together here."""
    assert run(pair[0], "--forget", tofu, "--reference", pair[1], "--max-new-tokens", 30) == 0
    table = evaluation.tofu_metrics(*map(numbers, pair))
    models = [opened(folder) for folder in pair]
    model, tokenizer = known = models[0]
    scorer, wanted = RougeScorer(["rougeL"], use_stemmer=True), {}
    for split in SPLITS:
        people, alone = split in SPLITS[:2], split in SPLITS[2:]
        rows = {}
        for r in read_lines(Path(tofu).with_name(f"{split}_perturbed.jsonl")):
            p = probability(known, r, r["answer"])
            para = probability(known, r, r.get("paraphrased_answer", r["answer"]))
            false = [probability(known, r, answer) for answer in r["perturbed_answer"]]
            ratio = para / math.prod(false) ** (1 / len(false))
            of_forget = min(ratio, 1 / ratio)
            new = continuation(model, tokenizer(asked(r)).input_ids, 30)
            text = tokenizer.decode(new, skip_special_tokens=True)
            right = token_logps(known, asked(r), " " + r["answer"])[1][:-1]  # no EOS
            row = {"probability": p / (p + sum(false)) if alone else p,
                   "ROUGE-L recall": scorer.score(r["answer"], text)["rougeL"].recall,
                   "truth ratio": of_forget if split == "forget05" else max(0, 1 - 1 / ratio)}
            if people:
                row |= {"knowledge score": ratio / (1 + ratio),
                        "exact memorization": sum(right) / len(right),
                        "extraction strength": tail_of(right) / len(right)}
            if split == "forget05":
                row["paraphrase probability"] = para
            for name, value in row.items():
                rows.setdefault(name, []).append(value)
        name = split.removesuffix("05").replace("_", " ")
        wanted |= {f"{name} {row}": sum(values) / len(values) for row, values in rows.items()}
    wanted["model utility"] = hmean([value for name, value in wanted.items()
                                     if name.startswith(("retain", "real", "world"))
                                     and name.endswith(("probability", "recall", "ratio"))])
    wanted["memorization score"] = hmean([1 - wanted[f"forget {name}"] for name in (
        "extraction strength", "exact memorization", "paraphrase probability", "knowledge score")])
    aucs = []
    for known in models:
        scores, member = [], []
        for name in ("forget05_perturbed", "holdout05"):
            for r in read_lines(Path(tofu).with_name(f"{name}.jsonl")):
                scores.append(attack_scores(*distributions(known, asked(r), " " + r["answer"]),
                                            r["answer"]))
                member.append(name != "holdout05")
        aucs.append([roc_auc_score(member, attack) for attack in zip(*scores)])
    for name, auc in zip(("", ", Min-K++", ", LOSS", ", zlib"), aucs[0]):
        wanted[f"forget/holdout AUC{name}"] = auc
    wanted["forget PrivLeak"] = 100 * (aucs[0][0] - aucs[1][0]) / aucs[1][0]
    assert set(table) - set(wanted) == {"forget quality (KS p)", "forget quality (KS D)"}
    for name, value in wanted.items():
        assert table[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert all(abs(value) > 1e-3 for value in wanted.values()), wanted


def test_records_used_are_printed(pair, tofu, tmp_path, capsys):
    assert run(*pair, "--forget", tofu, "--max-new-tokens", 5) == 0
    table = table_of(capsys.readouterr().out)
    assert {row: cells for row, cells in table.items() if row.startswith("records")} == {
        f"records of {split}": ["12", "12"]
        for split in ("forget", "retain", "real_authors", "world_facts", "holdout")}
    assert run(pair[0], "--forget", tofu, "--max-new-tokens", 5, "--limit", 7) == 0
    capsys.readouterr()
    Path(pair[0], "eval.json").rename(tmp_path / "a.json")
    assert run(pair[1], tmp_path / "a.json", "--forget", tofu, "--max-new-tokens", 5) == 0
    assert cells(capsys, "records of forget") == ["12", "7"]


def test_without_a_holdout_a_footnote_says_so(pair, tmp_path, capsys):
    assert run(pair[0], "--forget", write_tofu(tmp_path / "bare"), "--max-new-tokens", 5) == 0
    out = capsys.readouterr().out
    assert table_of(out)["forget/holdout AUC"] == ["- [2]"]
    assert re.search(r"^\[2\] .*no holdout beside the forget set", out, re.MULTILINE)


def test_answers_without_a_to_z_have_no_rouge(pair, tmp_path, capsys):
    path = write_tofu(tmp_path / "tofu")
    records = read_lines(path + "_perturbed.jsonl")
    records[3]["answer"] = "在北京。"
    write_lines(Path(path + "_perturbed.jsonl"), records)
    assert run(pair[0], "--forget", path, "--max-new-tokens", 5) == 0
    out = capsys.readouterr().out
    cell, = table_of(out)["forget ROUGE-L recall"]
    assert re.search(re.escape(cell[2:]) + ".*ROUGE no a-z and 0-9 in 1 of 12 forget", out)
    assert 0 <= float(*table_of(out)["retain ROUGE-L recall"]) <= 1  # of the others there is
    assert numbers(pair[0])["forget"][3]["rouge_l_recall"] is None


def test_a_model_of_nan_gets_a_table(pair, tofu, tmp_path, capsys):
    model = write_model(tmp_path / "nan")
    spoil(model)
    assert run(model, "--forget", tofu, "--reference", pair[0], "--max-new-tokens", 5) == 0
    out = capsys.readouterr().out
    for name in evaluation.TOFU_ROWS:
        assert table_of(out)[name][1].startswith("- ["), name
    assert re.search("not finite .* 12 of 12 forget", out)
    json.loads(Path(model, "eval.json").read_text(), parse_constant=pytest.fail)


def test_a_model_that_is_far_off_gets_a_table(tofu, tmp_path, capsys):
    """Thousands of nats a token: probabilities underflow, and R has no room in a float."""
    model = write_model(tmp_path / "far")
    net = LlamaForCausalLM.from_pretrained(model)
    net.lm_head.weight.data *= 1e4
    net.save_pretrained(model)
    assert run(model, "--forget", tofu, "--max-new-tokens", 5) == 0
    assert cells(capsys, "forget probability") == ["0"]
    json.loads(Path(model, "eval.json").read_text(), parse_constant=pytest.fail)
    assert max(r["truth_ratio"] for r in numbers(model)["forget"]) > 1e300


def test_empty_answers_get_a_table(tofu, tmp_path, capsys):
    model = write_model(tmp_path / "mute")
    net = LlamaForCausalLM.from_pretrained(model)
    net.model.norm.weight.data[:] = 0
    net.model.norm.weight.data[0] = 1
    net.lm_head.weight.data[:] = 0  # all logits are 0, and </s> is not the first of them
    net.save_pretrained(model)
    path = Path(model, "generation_config.json")
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token_id": [0, 1]}))  # now the first is an end
    assert run(model, "--forget", tofu) == 0
    assert {r["generated"] for r in numbers(model)["forget"]} == {""}
    table = table_of(capsys.readouterr().out)
    assert table["forget ROUGE-L recall"] == table["model utility"] == ["0"]


def test_columns_of_the_builtin_benchmark(pair, tmp_path, capsys, monkeypatch):
    """On the project's own data the target and the retrained model are made by train.py and
    shown first."""
    write_tofu(tmp_path / "data")
    monkeypatch.setattr(miniature, "DATA", tmp_path / "data")
    made = []

    def train(command, **options):
        made.append(command[2:])
        write_model(tmp_path / command[command.index("--output") + 1], seed=len(made))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(miniature.subprocess, "run", train)
    flags = ["--forget", "data/forget05", "--max-new-tokens", 5]
    assert run(pair[0], *flags) == 0
    assert [(Path(c[1]).name, c[3]) for c in made] == [("full", "runs/target"),
                                                       ("retain95", "runs/retain95")]
    assert cells(capsys, "") == ["target", "retain95", "plain"]
    assert run("runs/target", *flags) == 0 and len(made) == 2
    assert cells(capsys, "") == ["target", "retain95"]


# What was saved, and the logs of others

def test_saved_results_are_used_and_kept(pair, tofu, tmp_path, capsys, monkeypatch):
    other = write_tofu(tmp_path / "other", n=5)
    model = write_model(tmp_path / "m", seed=3)
    for path in (tofu, other):
        assert run(model, "--forget", path, "--max-new-tokens", 5) == 0
    capsys.readouterr()
    monkeypatch.setattr(evaluation, "load", lambda *args: pytest.fail("the model was loaded"))
    # the second split did not push out the first
    assert run(model, "--forget", tofu, "--max-new-tokens", 5) == 0
    first = table_of(capsys.readouterr().out)
    Path(model, "eval.json").rename(tmp_path / "m.json")
    assert run(tmp_path / "m.json", "--forget", tofu) == 0  # no settings asked for: only printed
    assert table_of(capsys.readouterr().out) == first | {"": ["m.json"]}
    assert "choose one of these" in error_of(capsys, tmp_path / "m.json")
    (tmp_path / "m.json").rename(tmp_path / "m" / "eval.json")
    calls = []
    monkeypatch.setattr(evaluation, "load", lambda *args: (None, None))
    monkeypatch.setattr(evaluation, "evaluate_tofu",
                        lambda *args: calls.append(args) or numbers(model))
    for changed in (["--max-new-tokens", 6], ["--max-new-tokens", 6, "--limit", 3], ["--force"]):
        assert run(model, "--forget", tofu, *changed) == 0
    assert run(model, "--forget", tofu) == 0 and len(calls) == 3
    os.utime(Path(model, "model.safetensors"), (1, 1))  # the same content, as in a copy
    assert run(model, "--forget", tofu) == 0 and len(calls) == 3
    kept = os.stat(Path(model, "model.safetensors"))
    write_model(model, seed=4)  # other weights of the same size and age
    os.utime(Path(model, "model.safetensors"), ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert run(model, "--forget", tofu) == 0 and len(calls) == 4
    Path(model, "generation_config.json").write_text('{"eos_token_id": 1}')
    assert run(model, "--forget", tofu) == 0 and len(calls) == 5


def test_a_hub_name_whose_branch_moves(tofu, tmp_path):
    """Its new commit is measured again, and a run from the old one does not go on from it; a
    commit that is known is not measured again."""
    repository = tmp_path / "hub" / "models--tiny--mine"
    for seed, commit in enumerate(("aaa", "bbb")):
        write_model(repository / "snapshots" / commit, seed=seed)
    (repository / "refs").mkdir()

    asked = ["tiny/mine", "--forget", tofu, "--max-new-tokens", "2"]
    trained = ["--model", "tiny/mine", "--forget", tofu, "--retain-loss", "none", "--epochs", "1",
               "--output", "out"]
    commands = [("aaa", "eval", asked), ("aaa", "eval", asked), ("bbb", "eval", asked),
                ("aaa", "train", trained), ("bbb", "train", [*trained, "--resume"])]
    code = f"""import json, shutil, sys, eval, train
from data.support.models import folder_of
for number, (commit, program, argv) in enumerate({commands}):
    folder_of.cache_clear()  # as if in a process of its own
    open({str(repository / "refs" / "main")!r}, "w").write(commit)
    print("status", sys.modules[program].main(argv))
    shutil.copy("runs/tiny--mine/eval.json", f"{{number}}.json")
"""
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub")}  # read when transformers loads
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True,
                          capture_output=True)
    statuses = [line for line in done.stdout.splitlines() if line.startswith("status")]
    assert statuses == [f"status {n}" for n in (0, 0, 0, 0, 2)], done.stderr
    assert "start was " in done.stderr
    (old,), (same,), (new,) = (
        json.loads((tmp_path / f"{n}.json").read_text())["evaluations"].values() for n in range(3))
    assert old == same and old["values"] != new["values"]
    assert old["settings"]["weights"] != new["settings"]["weights"]


def test_results_of_other_definitions_are_measured_again(pair, tofu, tmp_path, capsys):
    model = write_model(tmp_path / "m", seed=3)
    flags = ["--forget", tofu, "--max-new-tokens", 5]
    run(model, *flags)
    path = Path(model, "eval.json")
    saved, right = json.loads(path.read_text()), numbers(model)
    entry, = saved["evaluations"].values()
    del entry["settings"]["definitions"]
    for record in [*entry["values"]["forget"], *entry["values"]["holdout"]]:
        record["min_40"] = record.pop("min_k") + 1  # with the end token, as it was
    write_json(path, saved)
    write_json(tmp_path / "old.json", saved)
    capsys.readouterr()
    assert run(model, *flags) == 0
    assert numbers(model) == right
    capsys.readouterr()
    assert run(tmp_path / "old.json") == 0  # a file is only read: what is not sure is not shown
    assert cells(capsys, "forget/holdout AUC") == ["- [2]"]


def test_nan_in_eval_json_costs_nothing(tofu, tmp_path, capsys):
    """Other programs write it; it is no JSON and stands for no value."""
    model = write_model(tmp_path / "m")
    path = Path(model, "eval.json")
    path.write_text('{"model": "m", "evaluations": {"tofu x": {"values": {"forget": [NaN]}}}}')
    for force in ([], ["--force"]):
        assert run(model, "--forget", tofu, "--max-new-tokens", 5, *force) == 0
        saved = json.loads(path.read_text(), parse_constant=pytest.fail)["evaluations"]
        assert saved["tofu x"] == {"values": {"forget": [None]}} and len(saved) == 2
        path.write_text(path.read_text().replace("null", "-Infinity"))


@pytest.mark.parametrize("junk", ["{", "[1]", '{"evaluations": {"a": 1e999}}', '{"accuracy": 1}'])
def test_junk_that_comes_meanwhile_loses_no_results(junk, tofu, tmp_path, capsys, monkeypatch):
    """They are printed; then the error says that they are not kept. What came is left alone."""
    model = write_model(tmp_path / "m")
    measure = evaluation.evaluate_tofu

    def meanwhile(*args):
        Path(model, "eval.json").write_text(junk)
        return measure(*args)

    monkeypatch.setattr(evaluation, "evaluate_tofu", meanwhile)
    assert run(model, "--forget", tofu, "--max-new-tokens", 5) == 1
    out, err = capsys.readouterr()
    assert 0 < float(*table_of(out)["forget probability"]) < 1
    assert err.count("\n") == 1 and err.startswith(f"error: {model}/eval.json: ")
    assert err.endswith("; the results are only printed\n")
    assert Path(model, "eval.json").read_text() == junk


@pytest.mark.parametrize("mode", ["forget", "muse"])
def test_all_models_are_asked_what_was_read_once(mode, tmp_path, monkeypatch):
    """Even if a file is edited before the first is opened."""
    data = Path((write_tofu if mode == "forget" else write_muse)(tmp_path / "data"))
    load = evaluation.load

    def edited(*args):
        for path in filter(Path.is_file, (tmp_path / "data").rglob("*")):
            path.write_text(re.sub("number|How many", "which", path.read_text()))
        return load(*args)

    monkeypatch.setattr(evaluation, "load", edited)
    models = [write_model(tmp_path / name) for name in "ab"]
    assert run(*models, f"--{mode}", data, *["--max-new-tokens", 5] * (mode == "forget")) == 0
    first, second = (numbers(model, mode.replace("forget", "tofu")) for model in models)
    assert first == second and "which" not in json.dumps(first)
    assert ("number" if mode == "forget" else "How many") in json.dumps(first)


def test_dots_after_a_link_lead_where_the_system_says(tofu, tmp_path, capsys):
    write_model(tmp_path / "far" / "m", seed=1)
    write_model(tmp_path / "m", seed=2)
    (tmp_path / "far" / "below").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "below")
    assert run("link/../m/", "--forget", tofu, "--max-new-tokens", 5) == 0
    assert (tmp_path / "far" / "m" / "eval.json").exists()
    assert not (tmp_path / "m" / "eval.json").exists()


def test_what_stdout_cannot_show_is_a_question_mark(pair, tofu, tmp_path, monkeypatch):
    run(pair[0], "--forget", tofu, "--max-new-tokens", 5)
    shutil.copy(Path(pair[0], "eval.json"), tmp_path / "\u00e9t\u00e9.json")
    for encoding, name in (("ascii", b"?t?"), ("utf-8", "\u00e9t\u00e9".encode())):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", out)
        assert run(tmp_path / "\u00e9t\u00e9.json", "--forget", tofu) == 0
        assert out.buffer.getvalue().splitlines()[0].split()[2] == name + b".json"
    monkeypatch.setattr(sys, "stdout", None)
    assert run(tmp_path / "\u00e9t\u00e9.json", "--forget", tofu) == 0


def test_saved_file_is_strict_json_with_everything(pair, tofu):
    run(pair[0], "--forget", tofu, "--max-new-tokens", 5, "--force")
    saved = json.loads(Path(pair[0], "eval.json").read_text(), parse_constant=pytest.fail)
    entry = list(saved["evaluations"].values())[-1]
    assert entry["settings"]["max_new_tokens"] == 5
    assert [len(records) for records in entry["values"].values()] == [12] * 5
    record = entry["values"]["forget"][0]
    assert isinstance(record["generated"], str)
    assert record["prompt"] == asked(record)


def official(values, columns=list):
    """The same values as TOFU's official code logs them: lists, or dicts by index in any order."""
    fields = {"avg_gt_loss": "nll", "avg_paraphrased_loss": "paraphrased_nll",
              "average_perturb_loss": "perturbed_nll", "rougeL_recall": "rouge_l_recall"}
    if columns is dict:
        columns = lambda items: {str(i): x for i, x in reversed(list(enumerate(items)))}
    log = {}
    for split, name in TOFU_LOGS.items():
        log[name] = {column: columns([r[f] for r in values[split]]) for column, f in fields.items()}
        log[name]["generated_text"] = columns(
            [[r["question"], r["generated"], r["answer"]] for r in values[split]])
    return log


def open_unlearning(values, metrics):
    """What OpenUnlearning's TOFU_EVAL.json would hold: aggregates, 1/R, Min-40% scores, texts."""
    def by_index(records, field, of):
        return {str(i): {of: r[field]} for i, r in enumerate(records)}

    forget, holdout = values["forget"], values["holdout"]
    inverse = [{"score": 1 / r["truth_ratio"]} for r in forget]
    return {
        "forget_truth_ratio": {"agg_value": metrics["forget truth ratio"],
                               "value_by_index": by_index(inverse, "score", "score")},
        "forget_Q_A_ROUGE": {"agg_value": metrics["forget ROUGE-L recall"],
                             "value_by_index": by_index(forget, "answer", "ground_truth")},
        "mia_min_k": {"agg_value": 1 - metrics["forget/holdout AUC"],
                      "forget": {"value_by_index": by_index(forget, "min_k", "score")},
                      "holdout": {"value_by_index": by_index(holdout, "min_k", "score")}},
        "forget_Q_A_Prob": {"agg_value": metrics["forget probability"]},
        "retain_Truth_Ratio": {"agg_value": metrics["retain truth ratio"]},
        "extraction_strength": {"agg_value": metrics["forget extraction strength"]},
        "model_utility": {"agg_value": metrics["model utility"]},
        "forget_quality": {"agg_value": 0.25}, "privleak": {"agg_value": -12.5},
        "mia_loss": {"agg_value": 0.75}, "retain_Q_A_Prob": {"agg_value": None}}


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def test_reference_kinds_agree(pair, tofu, tmp_path, capsys):
    """A model, its eval.json, and the same values in the official formats give the same rows."""
    flags = ["--forget", tofu, "--max-new-tokens", 5]
    run(pair[0], *flags, "--reference", pair[1])
    values = numbers(pair[1])
    capsys.readouterr()
    kinds = {"model": Path(pair[1]), "ours": Path(pair[1], "eval.json"),
             "lists": write_json(tmp_path / "lists.json", official(values)),
             "dicts": write_json(tmp_path / "dicts.json", official(values, dict)),
             "open": write_json(tmp_path / "open.json", open_unlearning(
                 values, evaluation.tofu_metrics(values, None)))}
    quality, leak = {}, {}
    for kind, path in kinds.items():
        assert run(pair[0], *flags, "--reference", path) == 0
        table = table_of(capsys.readouterr().out)
        quality[kind] = table["forget quality (KS p)"][-1]
        leak[kind] = table["forget PrivLeak"][-1]
    assert len(set(quality.values())) == 1 and 0 < float(quality["model"]) < 1
    assert leak["model"] == leak["ours"] == leak["open"] and float(leak["model"])
    assert leak["lists"] == leak["dicts"] == "- [1]"


def test_official_log_is_completed(pair, tofu, tmp_path):
    """Rows that follow from the nlls are the same from an official log as from the values."""
    run(pair[0], "--forget", tofu, "--max-new-tokens", 5)
    values = numbers(pair[0])
    path = write_json(tmp_path / "log.json", official(values, dict))
    logged = evaluation.complete(evaluation.tofu_metrics, read_results(path)["tofu"]["values"])
    ours, theirs = (evaluation.tofu_metrics(v, values) for v in (values, logged))
    lacking = {row for row, value in theirs.items() if isinstance(value, str)}
    assert lacking == {row for row in ours if row.endswith(("memorization", "strength"))
                       or row.startswith(("forget PrivLeak", "forget/holdout AUC", "memorization"))}
    for row in ours.keys() - lacking:
        assert theirs[row] == pytest.approx(ours[row], rel=1e-12), row


def test_tofu_eval_as_model_shows_every_row_that_it_holds(pair, tofu, tmp_path, capsys):
    """What is computed here, and in the same rows or under its own names what the file says."""
    run(pair[0], "--forget", tofu, "--max-new-tokens", 5)
    values = numbers(pair[0])
    metrics = evaluation.tofu_metrics(values, None)
    log = open_unlearning(values, metrics)
    path = write_json(tmp_path / "TOFU_EVAL.json", log)
    capsys.readouterr()
    assert run(path) == 0
    table = table_of(capsys.readouterr().out)
    shown = {row: float(cell) for row, (cell,) in table.items() if row and "[" not in cell}
    want = {row: metrics[row] for row in (
        "forget truth ratio", "forget knowledge score", "forget/holdout AUC", "model utility",
        "forget probability", "forget ROUGE-L recall", "retain truth ratio")}
    want |= {"extraction_strength": metrics["forget extraction strength"], "mia_loss": 0.75,
             "mia_min_k": 1 - metrics["forget/holdout AUC"], "forget quality (KS p)": 0.25,
             "forget PrivLeak": -12.5, "records of forget": 12, "records of holdout": 12}
    assert shown == pytest.approx(want, abs=1e-5)


def test_rows_of_an_open_unlearning_log_do_not_hide_each_other(tmp_path, capsys):
    parts = {"wf_Q_A_Prob_normalised": 0.66, "wf_Q_A_Prob": 0.12, "forget_Q_A_Prob": 0.25}
    log = {name: {"agg_value": value} for name, value in parts.items()}
    assert run(write_json(tmp_path / "TOFU_EVAL.json", log)) == 0
    table = table_of(capsys.readouterr().out)
    assert table["world facts probability"] == ["0.66"] and table["forget probability"] == ["0.25"]


def test_results_without_a_model_are_read(pair, tofu, tmp_path, capsys):
    shutil.copytree(pair[0], tmp_path / "m", ignore=lambda *_: ["eval.json"])
    run(tmp_path / "m", "--forget", tofu, "--max-new-tokens", 5)
    (tmp_path / "m" / "config.json").unlink()
    capsys.readouterr()
    assert run(tmp_path / "m") == 0
    assert table_of(capsys.readouterr().out)["records of forget"] == ["12"]


def test_nan_scores_of_an_open_unlearning_log_are_a_footnote(pair, tofu, tmp_path, capsys):
    run(pair[0], "--forget", tofu, "--max-new-tokens", 5)
    values = numbers(pair[0])
    log = open_unlearning(values, evaluation.tofu_metrics(values, None))
    log["mia_min_k"]["holdout"]["value_by_index"]["3"]["score"] = math.nan
    log["forget_truth_ratio"]["value_by_index"]["4"]["score"] = math.nan
    path = write_json(tmp_path / "TOFU_EVAL.json", log)
    for row in ("forget/holdout AUC", "forget quality (KS D)"):
        capsys.readouterr()
        assert run(path, "--reference", pair[0] + "/eval.json", "--forget", tofu) == 0
        assert cells(capsys, row)[-1].startswith("- ["), row


# References that do not belong

def test_a_reference_of_other_questions_is_refused(pair, tofu, tmp_path, capsys, monkeypatch):
    flags = ["--max-new-tokens", 5]
    other = write_tofu(tmp_path / "other")
    records = read_lines(other + "_perturbed.jsonl")
    records[4]["question"] = "Where did number 4 go?"
    write_lines(Path(other + "_perturbed.jsonl"), records)
    run(pair[0], "--forget", tofu, *flags)
    retrained = write_model(tmp_path / "retrained", seed=1)
    run(retrained, "--forget", other, *flags)
    ours = write_json(tmp_path / "ours.json", json.loads(Path(retrained, "eval.json").read_text()))
    values = numbers(retrained)
    values["holdout"] = numbers(pair[0])["holdout"]
    capsys.readouterr()
    # neither the eval.json of another set nor, without --forget, its file
    assert "asked for tofu" in error_of(
        capsys, pair[0], "--forget", tofu, *flags, "--reference", ours)
    alone = {"evaluations": {"tofu a": {"values": numbers(pair[0])}}}
    alone = write_json(tmp_path / "alone.json", alone)
    other_questions = "was not asked the model's 12 forget questions"
    assert other_questions in error_of(capsys, alone, "--reference", ours)
    # an official log is known by its answers
    values["forget"][6]["answer"] = "Nowhere."
    log = write_json(tmp_path / "log.json", official(values))
    metrics = evaluation.tofu_metrics(values, None)
    theirs = write_json(tmp_path / "open.json", open_unlearning(values, metrics))
    monkeypatch.setattr(evaluation, "load", lambda *args: pytest.fail("a model was loaded first"))
    for path in (log, theirs):
        message = error_of(capsys, write_model(tmp_path / "new", 5), "--forget", tofu, *flags,
                           "--reference", path)
        assert f"{path}: {other_questions}" in message


def test_a_reference_of_another_number_of_questions_is_refused(pair, tofu, tmp_path, capsys):
    flags = ["--forget", tofu, "--max-new-tokens", 5]
    run(pair[1], *flags, "--limit", 7)
    values = numbers(pair[1])
    ours = Path(pair[1], "eval.json")
    last = list(json.loads(ours.read_text())["evaluations"].items())[-1]
    ours = write_json(tmp_path / "ours.json", {"evaluations": dict([last])})
    capsys.readouterr()
    for path in (ours, write_json(tmp_path / "log.json", official(values))):
        message = error_of(capsys, pair[0], *flags, "--reference", path)
        assert "was not asked the model's 12 forget questions" in message and "--limit" in message
    assert run(pair[0], *flags, "--limit", 7, "--reference", ours) == 0
    values["holdout"].pop()
    metrics = evaluation.tofu_metrics(values, None)
    path = write_json(tmp_path / "open.json", open_unlearning(values, metrics))
    capsys.readouterr()
    assert "was not asked the model's 7 holdout questions" in error_of(
        capsys, pair[0], *flags, "--limit", 7, "--reference", path)


@pytest.mark.parametrize("changed", [["--template", "llama2"], ["--system", "Be brief."],
                                     ["--date", "1 May 2025"]])
def test_a_reference_asked_in_other_words_is_refused(changed, tofu, tmp_path, capsys):
    models = [write_chat(tmp_path / name, seed) for seed, name in enumerate("ab")]
    flags = ["--forget", tofu, "--max-new-tokens", 5]
    reference = Path(models[1], "eval.json")
    assert run(models[1], *flags, *changed) == 0
    capsys.readouterr()
    message = error_of(capsys, models[0], *flags, "--reference", reference)
    assert f"{reference}: was not asked " in message and "--template, --system" in message
    # the same words by another flag are the same words
    assert run(models[1], *flags, "--template", "chat", "--force") == 0
    saved = json.loads(reference.read_text())
    assert run(models[0], *flags, "--reference", reference) == 0 and len(saved["evaluations"]) == 1


@pytest.mark.parametrize("split,column,index", [
    ("eval_log_forget.json", "avg_paraphrased_loss", None),
    ("eval_log.json", "generated_text", None), ("eval_log.json", "rougeL_recall", "3")])
def test_official_logs_with_uneven_columns_are_refused(split, column, index, pair, tofu, tmp_path,
                                                       capsys):
    run(pair[0], "--forget", tofu, "--max-new-tokens", 5)
    log = official(numbers(pair[0]), dict if index else list)
    if index:
        log[split][column]["77"] = log[split][column].pop(index)
    else:
        log[split][column].pop()
    path = write_json(tmp_path / "log.json", log)
    capsys.readouterr()
    assert "its columns are of different questions" in error_of(capsys, path)


# MUSE and KL

def test_muse(pair, tmp_path, capsys):
    folder = write_muse(tmp_path / "corpus")
    assert run(pair[0], "--muse", folder) == 0
    out = capsys.readouterr().out
    assert "needs a retrained model" in out and "VerbMem forget" in out
    assert table_of(out)["records of privleak_holdout"] == ["6"]
    values = numbers(pair[0], "muse")
    auc = evaluation.privleak_auc(values)
    leak = evaluation.muse_metrics(values, 0.4)["PrivLeak"]
    assert leak == pytest.approx((auc / 0.4 - 1) * 100)
    assert run(pair[0], "--muse", folder, "--reference", pair[0]) == 0
    assert cells(capsys, "PrivLeak") == ["0"]
    folder = Path(folder).rename(tmp_path / "books")
    assert run(pair[0], "--muse", folder) == 0
    assert cells(capsys, "PrivLeak") == [f"{(auc / 0.5393 - 1) * 100:.6g}"]


def test_muse_against_one_text_at_a_time(pair, tmp_path):
    folder = Path(write_muse(tmp_path / "corpus"))
    assert run(pair[0], "--muse", folder) == 0
    values = numbers(pair[0], "muse")
    table = evaluation.muse_metrics(values, 0.5)
    model, tokenizer = known = opened(pair[0])
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    scores = {}
    for split in ("forget", "holdout"):
        texts = json.loads((folder / "privleak" / f"{split}.json").read_text())
        scores[split] = []
        for text, record in zip(texts, values[f"privleak_{split}"]):
            logps = token_logps(known, "", text)[0][:-1]  # no EOS
            lowest = logps.sort().values[:int(len(logps) * 0.4)]
            assert record["min_40"] == pytest.approx(-lowest.mean().item(), rel=1e-5)
            scores[split].append(-lowest.mean().item())
    auc = roc_auc_score([1] * 6 + [0] * 6, scores["forget"] + scores["holdout"])
    assert table["AUC forget/holdout"] == pytest.approx(auc)
    strengths, recited = [], []
    for r in read_lines(folder / "verbmem" / "forget.json"):
        right = recital(known, r)
        strengths.append(tail_of(right) / len(right))
        new = continuation(model, tokenizer(r["prompt"]).input_ids, 128)
        text = tokenizer.decode(new, skip_special_tokens=True)
        recited.append(100 * scorer.score(r["gt"], text)["rougeL"].fmeasure)
    assert table["VerbMem forget"] == pytest.approx(sum(recited) / 6)
    assert table["extraction strength"] == pytest.approx(sum(strengths) / 6, abs=1e-9)
    texts = [r["generated"] for r in values["knowmem_retain"]]
    assert not any("\n\n" in t or "\nQuestion" in t or "Question:" in t for t in texts)


def recital(known, record):
    """Which tokens of how a text goes on are the likeliest. A blank at the prompt's end, or between
    the two where neither has one, belongs to what follows."""
    prompt, rest = record["prompt"], record["gt"]
    if prompt[-1:] != " " and rest[:1] != " ":
        rest = " " + rest
    text = prompt.rstrip(" ")
    return token_logps(known, text, prompt[len(text):] + rest)[1][:-1]  # no EOS


def test_extraction_strength_of_recited_texts(tmp_path):
    folder = Path(write_muse(tmp_path / "corpus"))
    records = [{"prompt": f"{k} green bottles", "gt": f"hanging on the wall of {k * k}"}
               for k in range(6)]
    records[1]["prompt"] += " "
    records[2]["gt"] = " " + records[2]["gt"]
    write_lines(folder / "verbmem" / "forget.json", records)
    texts = [f"{k} green bottles hanging on the wall of {k * k}" for k in range(4)]
    model = teach(write_model(tmp_path / "m"), texts, 40)
    assert run(model, "--muse", folder) == 0
    kept = [r["extraction_strength"] for r in numbers(model, "muse")["verbmem"]]
    for r, strength in zip(records, kept):
        right = recital(opened(model), r)
        assert strength == pytest.approx(tail_of(right) / len(right))
    assert max(kept) > 0.5 and len(set(kept)) > 1


def test_texts_longer_than_the_context_are_a_footnote(tmp_path, capsys):
    folder = Path(write_muse(tmp_path / "corpus"))
    path = folder / "privleak" / "holdout.json"
    texts = json.loads(path.read_text())
    path.write_text(json.dumps([*texts[:-1], texts[-1] * 9]))
    records = read_lines(folder / "verbmem" / "forget.json")
    records[2]["gt"] *= 20
    write_lines(folder / "verbmem" / "forget.json", records)
    model = write_model(tmp_path / "short", max_position_embeddings=256)
    assert run(model, "--muse", folder, "--reference", 0.5) == 0
    kept = [r["min_40"] for r in numbers(model, "muse")["privleak_holdout"]]
    assert len(kept) == 6 and kept[-1] is None and None not in kept[:-1]
    out = capsys.readouterr().out
    for split in ("privleak_holdout", "verbmem"):
        assert re.search(f"no room in the model's context, .* 1 of 6 {split} examples", out)
    assert float(*table_of(out)["VerbMem forget"]) >= 0


def test_a_model_of_nan_gets_a_table_of_muse(tmp_path, capsys):
    model = write_model(tmp_path / "nan")
    spoil(model)
    assert run(model, "--muse", write_muse(tmp_path / "corpus"), "--reference", 0.5) == 0
    out = capsys.readouterr().out
    for name in evaluation.MUSE_ROWS:
        assert table_of(out)[name][0].startswith("- ["), out
    json.loads(Path(model, "eval.json").read_text(), parse_constant=pytest.fail)


# Does it come back?

def test_samples_are_drawn_from_the_models_distribution(pair):
    """First tokens of 600 continuations, by a chi-square test; from one seed the same again. What
    its generation_config would cut off is drawn, too."""
    model, tokenizer = opened(pair[0])
    model.generation_config.update(temperature=0.5, top_k=5, top_p=0.5, min_p=0.1, typical_p=0.5,
                                   epsilon_cutoff=0.1, eta_cutoff=0.1)
    prompt = tokenizer("Question: Where?").input_ids
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(evaluation.generate(model, [prompt] * 600, tokenizer, 1, 64, sample=True))
    assert draws[0] == draws[1]
    with torch.no_grad():
        p = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    p[1] += 1 - p.sum()
    common = [i for i in range(len(p)) if i != 1 and p[i] > 0.01]  # an end is no token: []
    seen = [draws[0].count([i]) for i in common]
    expected = [600 * p[i].item() for i in common]
    assert len(common) > 3
    assert chisquare([*seen, 600 - sum(seen)], [*expected, 600 - sum(expected)]).pvalue > 0.01


def test_samples_and_rounded_weights_are_columns_and_rows(pair, tofu, capsys):
    """Each kept apart in eval.json; the recalls are rouge-score's of the texts, the values those of
    a model that was saved rounded."""
    flags = ["--forget", tofu, "--max-new-tokens", 8, "--samples", 5]
    Path(pair[0], "eval.json").unlink(missing_ok=True)
    assert run(pair[0], *flags, "--quantize", 8, 3) == 0
    table = table_of(capsys.readouterr().out)
    name = Path(pair[0]).name
    assert table[""] == [name, f"{name}-8bit", f"{name}-3bit"]
    held = json.loads(Path(pair[0], "eval.json").read_text())["evaluations"]
    kept = {key.split(" ")[0]: entry["values"] for key, entry in held.items()}
    assert [*kept] == ["tofu-5samples", "tofu-8bit-5samples", "tofu-3bit-5samples"]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for column, values in enumerate(kept.values()):
        best = {1: [], 4: [], 5: []}
        for record in values["forget"]:
            recalls = [scorer.score(record["answer"], text)["rougeL"].recall
                       for text in record["sampled"]]
            assert record["recalls"] == pytest.approx(recalls)
            for k, found in best.items():
                found += [sum(max(chosen) for chosen in itertools.combinations(recalls, k))
                          / math.comb(5, k)]
        for k, found in best.items():
            shown = float(table[f"forget leak@{k}"][column])
            assert shown == pytest.approx(sum(found) / len(found), abs=1e-5)
    model, tokenizer = opened(pair[0])
    evaluation.quantize(model, 3)
    rounded = Path(pair[0]).with_name("rounded")
    model.save_pretrained(rounded)
    tokenizer.save_pretrained(rounded)
    assert run(rounded, *flags) == 0
    same(numbers(rounded, "tofu-5samples"), kept["tofu-3bit-5samples"], 1e-6)
    assert run(pair[0], *flags, "--quantize", 8, 3) == 0  # from eval.json
    assert json.loads(Path(pair[0], "eval.json").read_text())["evaluations"] == held
    capsys.readouterr()
    assert run(Path(pair[0], "eval.json")) == 0  # what is shown is the model as it is
    assert cells(capsys, "forget probability") == table["forget probability"][:1]
    results = Path(pair[0]).with_name("results")  # without the model there is nothing to round
    results.mkdir()
    shutil.copy(Path(pair[0], "eval.json"), results)
    assert run(results, "--quantize", 3) == 0
    assert cells(capsys, "forget probability") == table["forget probability"][:1]


# Ranks

def two_ranks(said, *argvs):
    """The exit statuses of two ranks, each with its arguments; what they print goes to `said`."""
    port = free_port()
    ranks = [SERVER.Process(target=one_rank, args=(rank, port, said, argv))
             for rank, argv in enumerate(argvs)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return [rank.exitcode for rank in ranks]


def test_two_ranks_give_the_values_of_one(pair, tofu, tmp_path):
    """But for the samples, which each rank draws from its own seed."""
    flags = [pair[0], "--forget", tofu, "--max-new-tokens", "20", "--quantize", "3", "--samples", 3]
    said, modes = tmp_path / "said", ("tofu-3samples", "tofu-3bit-3samples")
    assert run(*flags, "--force") == 0
    alone = [numbers(pair[0], mode) for mode in modes]
    Path(pair[0], "eval.json").unlink()
    assert two_ranks(said, flags, flags) == [0, 0]
    assert said.read_text().count("model utility") == 1
    both = [numbers(pair[0], mode) for mode in modes]
    for values in (*alone, *both):
        for record in values["forget"]:
            assert len(record.pop("sampled")) == len(record.pop("recalls")) == 3
    same(alone, both, 1e-5)


def test_two_ranks_have_the_same_arguments_and_files(pair, tofu, tmp_path):
    """Else each would measure its share of something else."""
    said, flags = tmp_path / "said", ["--forget", tofu, "--max-new-tokens", "2"]
    name = write_model(tmp_path / "0" / "m")
    write_model(tmp_path / "1" / "m", seed=7)
    for first, second, what in (
            ([name, *flags], [name, *flags, "--limit", "3"], "eval.py: rank 1 has another limit"),
            (["m", *flags], ["m", *flags], "m: rank 1 has another weights")):
        assert two_ranks(said, first, second) == [2, 2]
        assert said.read_text().splitlines()[-1].startswith(f"error: {what} than rank 0; ")
    assert not [*tmp_path.glob("*/m/eval.json")]


def one_rank(rank, port, said, argv):
    be_rank(rank, port)
    if (said.parent / str(rank)).is_dir():  # as on two machines
        os.chdir(said.parent / str(rank))
    with open(said, "a") as file, contextlib.redirect_stdout(file):
        with contextlib.redirect_stderr(file):
            status = evaluation.main([*map(str, argv)])
    sys.exit(status)


# Errors

@pytest.mark.parametrize("argv,what", [
    (["{model}"], "--forget or --muse"),
    (["{model}", "--samples", "4"], "--samples needs --forget"),
    (["{model}", "--forget", "{lone}"], "forget05_perturbed: no such data file"),
    (["{empty}", "--forget", "{tofu}"], "empty: no config.json"),
    (["x", "--forget", "{tofu}", "--reference", "{junk}"], "junk.json: not an eval.json"),
    (["{foreign}", "--forget", "{tofu}"], "foreign.json: not an eval.json"),
    (["{foreign}", "--muse", "{muse}"], "foreign.json: not an eval.json"),
    (["{model}", "--muse", "{muse}", "--reference", "1.5"], "above 0 and at most 1"),
])
def test_errors_are_one_line(argv, what, pair, tofu, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "lone" / "forget05.jsonl", [{"question": "q", "answer": "a"}])
    (tmp_path / "junk.json").write_text("{")
    (tmp_path / "foreign.json").write_text('{"a": 1}')
    write_muse(tmp_path / "muse")
    places = {name: tmp_path / name for name in ("empty", "muse")}
    places |= {name: tmp_path / f"{name}.json" for name in ("junk", "foreign")}
    places |= {"lone": tmp_path / "lone" / "forget05", "model": pair[0], "tofu": tofu}
    assert what.format() in error_of(capsys, *(a.format(**places) for a in argv))


def test_answers_longer_than_the_context(tofu, tmp_path, capsys):
    model = write_model(tmp_path / "short", max_position_embeddings=40)
    assert "context of 40" in error_of(capsys, model, "--forget", tofu)
    assert not Path(model, "eval.json").exists()


def test_someone_elses_eval_json_is_left_alone(tofu, tmp_path, capsys):
    model = write_model(tmp_path / "m")
    Path(model, "eval.json").write_text('{"accuracy": 1}')
    assert "move it away" in error_of(capsys, model, "--forget", tofu)
    assert Path(model, "eval.json").read_text() == '{"accuracy": 1}'
