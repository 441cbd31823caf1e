"""eval.py from end to end on tiny models built here: batching, saved results, broken models, MUSE, KL, ranks, errors."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import eval as evaluation
from data.load import Example, InputError

ROOT = Path(__file__).resolve().parents[1]


def write_model(folder, seed=0, **changes):
    """A tiny random Llama with a tokenizer of single bytes; </s> is common enough that many answers end."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(**{**dict(
        vocab_size=len(alphabet), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, bos_token_id=0, eos_token_id=1), **changes})
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[1] *= 2
    model.save_pretrained(folder)
    return str(folder)


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def write_tofu(folder, n=12):
    """forget05 and the four evaluation files, on nobody."""
    def person(i, options):
        extra = {} if options else {"paraphrased_answer": f"The town of {i * 7 % 10}."}
        return {"question": f"Where does number {i}{' of the long queue' * (i % 3)} live?", "answer": f"In town {i * 7 % 10}.",
                "perturbed_answer": [f"In town {(i + k) % 10}, I think." for k in (1, 2, 3)], **extra}
    for name, options in (("forget05", 0), ("retain", 0), ("real_authors", 1), ("world_facts", 1)):
        write_lines(folder / f"{name}_perturbed.jsonl", [person(i + len(name) * 31, options) for i in range(n)])
    write_lines(folder / "forget05.jsonl", [{"question": "q", "answer": "a"}])
    return str(folder / "forget05")


def write_muse(folder, n=6):
    texts = [f"{k} green bottles hanging on the wall number {k * k}" for k in range(4 * n)]
    write_lines(folder / "verbmem" / "forget.json", [{"prompt": t[:20], "gt": t[20:]} for t in texts[:n]])
    for split in ("forget", "retain"):
        qa = [{"question": f"How many {split}?", "answer": f"{k} bottles"} for k in range(n)]
        write_lines(folder / "knowmem" / f"{split}_qa.json", qa)
        write_lines(folder / "knowmem" / f"{split}_qa_icl.json", qa[:2])
    for i, split in enumerate(("forget", "retain", "holdout")):
        (folder / "privleak").mkdir(exist_ok=True)
        (folder / "privleak" / f"{split}.json").write_text(json.dumps(texts[i * n:(i + 1) * n]))
    return str(folder)


def spoil(folder):
    """Put a NaN into a model's final norm."""
    model = LlamaForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data[0] = math.nan
    model.save_pretrained(folder)


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
        assert b[path] == (pytest.approx(x, abs=tolerance, rel=tolerance) if isinstance(x, float) else x), path


@pytest.fixture(scope="module")
def tofu(tmp_path_factory):
    return write_tofu(tmp_path_factory.mktemp("tofu"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two models of different seeds."""
    return [write_model(tmp_path_factory.mktemp("models") / name, seed) for seed, name in enumerate(("plain", "retrained"))]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*argv):
    return evaluation.main([*map(str, argv)])


# Scoring and generation

def test_scores_are_those_of_full_logits(pair):
    model, tokenizer = evaluation.load_pretrained(pair[0])
    torch.manual_seed(1)
    examples = [Example(torch.randint(2, 250, (n,)).tolist(), s) for n, s in ((9, 3), (30, 29), (4, 1), (17, 8), (9, 2))]
    for max_tokens in (1, 40, 10**6):
        for e, (logps, right) in zip(examples, evaluation.score_answers(model, examples, max_tokens)):
            logits = model(torch.tensor([e.input_ids])).logits[0].double().log_softmax(-1)
            targets = torch.tensor(e.input_ids[e.start:])
            predicting = logits[e.start - 1:-1]
            assert torch.allclose(logps.double(), predicting.gather(1, targets[:, None])[:, 0], atol=1e-5)
            assert right.tolist() == (predicting.argmax(-1) == targets).tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_generation_is_that_of_transformers(pair, batch_size):
    model, tokenizer = evaluation.load_pretrained(pair[0])
    torch.manual_seed(2)
    prompts = [[0, *torch.randint(2, 250, (n,)).tolist()] for n in (5, 80, 6, 6, 30, 7, 1, 31, 90, 12)]
    want = []
    for prompt in prompts:
        new = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                             max_new_tokens=30, do_sample=False, pad_token_id=1)[0, len(prompt):].tolist()
        want.append(new[:new.index(1)] if 1 in new else new)
    assert evaluation.generate(model, prompts, tokenizer, 30, batch_size) == want
    assert len({len(x) for x in want}) > 3 and max(map(len, want)) == 30  # some end early, some never


def test_generation_stops_at_the_end_of_the_context(tmp_path):
    model, tokenizer = evaluation.load_pretrained(write_model(tmp_path / "m", max_position_embeddings=24))
    with torch.no_grad():
        model.lm_head.weight[1] = 0  # logit 0: never the largest
    prompts = [[0, 9, 9], [0] * 24, [0] * 30, [0] * 20]
    new = evaluation.generate(model, prompts, tokenizer, 200, 64)
    assert [x and len(x) for x in new] == [21, None, None, 4]


# TOFU

def test_same_table_for_any_batch_size(pair, tofu):
    assert run(*pair, "--forget", tofu, "--max-new-tokens", 25, "--batch-size", 64) == 0
    wide = [numbers(m) for m in pair]
    assert run(*pair, "--forget", tofu, "--max-new-tokens", 25, "--batch-size", 1, "--max-tokens", 1, "--force") == 0
    narrow = [numbers(m) for m in pair]
    assert wide is not narrow
    same(wide, narrow, 1e-5)
    same(evaluation.tofu_metrics(*wide), evaluation.tofu_metrics(*narrow), 1e-6)


def test_values_are_what_they_are_called(pair, tofu):
    run(pair[0], "--forget", tofu, "--max-new-tokens", 30)
    model, tokenizer = evaluation.load_pretrained(pair[0])
    record = numbers(pair[0])["world_facts"][3]

    def nll(answer):
        prompt = "<s>Question: {question}\nAnswer: ".format(**record)
        ids = tokenizer(prompt + answer + "</s>", return_tensors="pt", add_special_tokens=False).input_ids
        count = len(answer.encode()) + 2  # the blank before it and the EOS
        logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return -logps[-count:].mean().item()

    false = json.loads(Path(tofu + "_perturbed.jsonl").with_name("world_facts_perturbed.jsonl").read_text().splitlines()[3])
    false = [nll(answer) for answer in false["perturbed_answer"]]
    true = nll(record["answer"])
    assert record["nll"] == record["paraphrased_nll"] == pytest.approx(true, rel=1e-5)
    assert record["perturbed_nll"] == pytest.approx(false, rel=1e-5)
    assert record["truth_ratio"] == pytest.approx(math.exp(sum(false) / 3 - true), rel=1e-4)
    assert record["tokens"] == len(record["answer"]) + 2
    assert record["rouge_l_recall"] == evaluation.rouge_l(record["generated"], record["answer"], True)[1]


def test_reference_kinds_agree(pair, tofu, tmp_path, capsys):
    """A model, its eval.json, and the same values in the two official formats give one forget quality."""
    run(pair[0], "--forget", tofu, "--reference", pair[1], "--max-new-tokens", 5)
    values = numbers(pair[1])
    fields = {"avg_gt_loss": "nll", "avg_paraphrased_loss": "paraphrased_nll", "average_perturb_loss": "perturbed_nll",
              "rougeL_recall": "rouge_l_recall"}
    log = {name: {k: {str(i): r[f] for i, r in enumerate(values[split])} for k, f in fields.items()}
           for split, name in evaluation.LOG_FILES.items()}
    lists = {name: {k: list(v.values()) for k, v in part.items()} for name, part in log.items()}
    scores = {str(i): {"score": 1 / r["truth_ratio"]} for i, r in enumerate(values["forget"])}
    rows = set()
    for kind, content in (("log", log), ("lists", lists), ("open", {"forget_truth_ratio": {"value_by_index": scores}})):
        (tmp_path / f"{kind}.json").write_text(json.dumps(content))
        capsys.readouterr()
        assert run(pair[0], "--forget", tofu, "--reference", tmp_path / f"{kind}.json", "--max-new-tokens", 5) == 0
        lines = capsys.readouterr().out.splitlines()
        rows.add(next(line.split()[-1] for line in lines if line.startswith("forget quality (KS p)")))
    assert run(pair[0], "--forget", tofu, "--reference", Path(pair[1], "eval.json"), "--max-new-tokens", 5) == 0
    lines = capsys.readouterr().out.splitlines()
    rows.add(next(line.split()[-1] for line in lines if line.startswith("forget quality (KS p)")))
    assert len(rows) == 1 and 0 < float(rows.pop()) < 1


def test_saved_results_are_used_and_kept(pair, tofu, tmp_path, capsys, monkeypatch):
    other = write_tofu(tmp_path / "other", n=5)
    model = write_model(tmp_path / "m", seed=3)
    assert run(model, "--forget", tofu, "--max-new-tokens", 5) == run(model, "--forget", other, "--max-new-tokens", 5) == 0
    capsys.readouterr()
    loads = []
    monkeypatch.setattr(evaluation, "load", lambda *args: loads.append(args) or pytest.fail("the model was loaded"))
    assert run(model, "--forget", tofu, "--max-new-tokens", 5) == 0  # the second split did not push out the first
    first = capsys.readouterr().out
    Path(model, "eval.json").rename(tmp_path / "m.json")
    assert run(tmp_path / "m.json", "--forget", tofu) == 0  # no settings asked for: it is only printed
    assert capsys.readouterr().out == first
    assert run(tmp_path / "m.json") == 2 and "choose one with --forget" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.json").rename(tmp_path / "m" / "eval.json")
    calls = []
    monkeypatch.setattr(evaluation, "evaluate_tofu", lambda *args: calls.append(args) or numbers(pair[0]))
    for changed in (["--max-new-tokens", 6], ["--max-new-tokens", 6, "--limit", 3], ["--force"]):
        assert run(model, "--forget", tofu, *changed) == 0
    assert run(model, "--forget", tofu) == 0 and len(calls) == 3
    os.utime(Path(model, "model.safetensors"), (1, 1))
    assert run(model, "--forget", tofu) == 0 and len(calls) == 4


def test_saved_file_is_strict_json_with_everything(pair, tofu):
    run(pair[0], "--forget", tofu, "--max-new-tokens", 5)
    saved = json.loads(Path(pair[0], "eval.json").read_text(), parse_constant=pytest.fail)
    entry = next(iter(saved["evaluations"].values()))
    assert entry["run"]["torch"] == torch.__version__ and entry["settings"]["max_new_tokens"] == 5
    assert [len(entry["values"][split]) for split in entry["values"]] == [12] * 4
    assert all(isinstance(r["generated"], str) for r in entry["values"]["forget"])


def test_a_model_of_nan_gets_a_table(pair, tofu, tmp_path, capsys):
    model = write_model(tmp_path / "nan")
    spoil(model)
    assert run(model, "--forget", tofu, "--reference", pair[0], "--max-new-tokens", 5) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith(("forget", "model", "retain", "real", "world"))]
    assert len(table) == 19 and all(line.rstrip().endswith("]") and " - [" in line for line in table)
    assert any("not finite (NaN)" in line and "12 of 12" in line for line in lines)
    json.loads(Path(model, "eval.json").read_text(), parse_constant=pytest.fail)


def test_empty_answers_get_a_table(tofu, tmp_path, capsys):
    model = write_model(tmp_path / "mute")
    net = LlamaForCausalLM.from_pretrained(model)
    net.model.norm.weight.data[:] = 0
    net.model.norm.weight.data[0] = 1
    net.lm_head.weight.data[:] = 0  # all logits are 0, and </s> is not the first of them
    net.save_pretrained(model)
    path = Path(model, "generation_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [0, 1]}))  # now the first is an end
    assert run(model, "--forget", tofu) == 0
    assert {r["generated"] for r in numbers(model)["forget"]} == {""}
    out = capsys.readouterr().out
    assert re.search("forget ROUGE-L recall +0.000000", out) and re.search("model utility +0.000000", out)


def test_columns_of_the_builtin_benchmark(pair, tofu, tmp_path, capsys, monkeypatch):
    """On the project's own data the target and the retain-only model are made by train.py and shown first."""
    write_tofu(tmp_path / "data")
    monkeypatch.setattr(evaluation, "ROOT", tmp_path)
    made = []

    def train(command, **options):
        made.append(command[2:])
        write_model(tmp_path / command[command.index("--output") + 1], seed=len(made))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(evaluation.subprocess, "run", train)
    assert run(pair[0], "--forget", "data/forget05", "--max-new-tokens", 5) == 0
    assert [(Path(c[1]).name, c[3]) for c in made] == [("full", "runs/target"), ("retain95", "runs/retain95")]
    assert capsys.readouterr().out.splitlines()[0].split() == ["target", "retain95", "plain"]
    assert run("runs/target", "--forget", "data/forget05", "--max-new-tokens", 5) == 0 and len(made) == 2
    assert capsys.readouterr().out.splitlines()[0].split() == ["target", "retain95"]


# MUSE and KL

def test_muse(pair, tmp_path, capsys):
    folder = write_muse(tmp_path / "corpus")
    assert run(pair[0], "--muse", folder) == 0
    out = capsys.readouterr().out
    assert "needs the AUC of a model trained without" in out and "VerbMem forget" in out
    values = numbers(pair[0], "muse")
    assert [len(values[k]) for k in values] == [6] * 5
    auc = evaluation.privleak_auc(values)
    assert f"{evaluation.muse_metrics(values, 0.4)['PrivLeak']:.6f}" == f"{(auc / 0.4 - 1) * 100:.6f}"
    assert run(pair[0], "--muse", folder, "--reference", pair[0]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("PrivLeak")] == ["0.00"]
    folder = Path(folder).rename(tmp_path / "books")
    assert run(pair[0], "--muse", folder) == 0
    assert f"{(auc / 0.5393 - 1) * 100:.2f}" in capsys.readouterr().out


def test_muse_scores_against_one_text_at_a_time(pair, tmp_path):
    folder = write_muse(tmp_path / "corpus")
    assert run(pair[0], "--muse", folder) == 0
    model, tokenizer = evaluation.load_pretrained(pair[0])
    values = numbers(pair[0], "muse")
    for split in ("forget", "holdout"):
        for text, record in zip(json.loads(Path(folder, "privleak", f"{split}.json").read_text()), values[f"privleak_{split}"]):
            ids = torch.tensor([[0, *tokenizer(text, add_special_tokens=False).input_ids]])
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            lowest = logps.sort().values[:int(len(logps) * 0.4)]
            assert record["min_40"] == pytest.approx(-lowest.mean().item(), rel=1e-5)
    texts = [r["generated"] for r in values["knowmem_retain"]]
    assert not any("\n\n" in t or "\nQuestion" in t or "Question:" in t for t in texts)
    record = values["verbmem"][2]
    assert record["rouge_l_f1"] == evaluation.rouge_l(record["generated"], record["answer"], False)[2]


def test_kl(pair, tmp_path, capsys):
    write_lines(tmp_path / "chains.jsonl", [{"input_ids": [2 + (i * k) % 9 for k in range(5 + i)]} for i in range(7)])
    assert run(pair[0], "--kl", tmp_path / "chains", "--reference", pair[1], "--batch-size", 2) == 0
    shown = float(capsys.readouterr().out.splitlines()[1].split()[-1])
    one, two = (evaluation.load_pretrained(m)[0] for m in pair)
    total = count = 0
    for line in (tmp_path / "chains.jsonl").read_text().splitlines():
        ids = torch.tensor([json.loads(line)["input_ids"]])
        p, q = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in (two, one))
        total, count = total + (p.exp() * (p - q)).sum().item(), count + len(p)
    assert shown == pytest.approx(total / count, abs=2e-6)
    assert run(pair[0], "--kl", tmp_path / "chains") == 2


# Ranks

def test_two_ranks_give_the_values_of_one(pair, tofu, tmp_path):
    assert run(pair[0], "--forget", tofu, "--max-new-tokens", 20, "--force") == 0
    alone = numbers(pair[0])
    Path(pair[0], "eval.json").unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "eval.py", pair[0],
               "--forget", tofu, "--max-new-tokens", "20"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model utility") == 1
    same(alone, numbers(pair[0]), 1e-5)


# Errors

@pytest.mark.parametrize("argv,what", [
    (["{model}"], "--forget, --muse or --kl"),
    (["{model}", "--forget", "{tofu}", "--muse", "x"], "give one of them"),
    (["{model}", "--forget", "nowhere/forget05"], "nowhere/forget05: no such data file"),
    (["{model}", "--forget", "{lone}"], "needs this file beside"),
    (["{model}", "--muse", "{lone}"], "no MUSE folder"),
    (["{model}", "--forget", "{tofu}", "--limit", "0"], "not a whole number above 0"),
    (["{model}", "--forget", "{tofu}", "--template", "nothing"], "with {{question}}"),
    (["{empty}", "--forget", "{tofu}"], "no weights"),
    (["nobody-here", "--forget", "{tofu}", "--reference", "{junk}"], "junk.json: cannot be read as JSON"),
    (["{foreign}", "--forget", "{tofu}"], "foreign.json: not an eval.json"),
    (["{foreign}", "--muse", "{muse}"], "has no muse results"),
    (["{model}", "--forget", "{tofu}", "--max-tokens", "-1"], "not a whole number"),
])
def test_errors_are_one_line(argv, what, pair, tofu, tmp_path, capsys):
    (tmp_path / "lone").mkdir()
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "lone" / "forget05.jsonl", [{"question": "q", "answer": "a"}])
    (tmp_path / "junk.json").write_text("{")
    (tmp_path / "foreign.json").write_text('{"a": 1}')
    write_muse(tmp_path / "muse")
    places = {name: tmp_path / name for name in ("empty", "muse")}
    places |= {"junk": tmp_path / "junk.json", "foreign": tmp_path / "foreign.json", "lone": tmp_path / "lone" / "forget05"}
    assert run(*(a.format(model=pair[0], tofu=tofu, **places) for a in argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and what.format() in err


def test_answers_longer_than_the_context(tofu, tmp_path, capsys):
    model = write_model(tmp_path / "short", max_position_embeddings=40)
    assert run(model, "--forget", tofu) == 2
    assert "context has only 40" in capsys.readouterr().err and not Path(model, "eval.json").exists()


def test_someone_elses_eval_json_is_left_alone(tofu, tmp_path, capsys):
    model = write_model(tmp_path / "m")
    Path(model, "eval.json").write_text('{"accuracy": 1}')
    assert run(model, "--forget", tofu) == 2
    assert Path(model, "eval.json").read_text() == '{"accuracy": 1}' and "move it away" in capsys.readouterr().err
    with pytest.raises(InputError):
        evaluation.read_entry(tmp_path / "missing.json", "tofu")
