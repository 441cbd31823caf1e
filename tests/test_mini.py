"""The built-in miniature benchmark: what make_mini.py writes, and that it is what the repository holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from data.make_mini import POOLS

DATA = Path(__file__).resolve().parent.parent / "data"
GENERATED = sorted(p.relative_to(DATA) for pattern in ("*.jsonl", "mini_model/*", "muse_mini/**/*")
                   for p in DATA.glob(pattern) if p.is_file())


def lines(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def muse(name):
    return json.loads((DATA / "muse_mini" / f"{name}.json").read_text(encoding="utf-8"))


def paragraphs(name):
    return (DATA / "muse_mini" / "raw" / f"{name}.txt").read_text(encoding="utf-8").strip().split("\n\n")


def questions(name):
    return [record["question"] for record in lines(name)]


def surnames(texts):
    """Every invented surname is one capitalized word after a first name: the words that follow one."""
    firsts, found = set(POOLS["first"]), set()
    for text in texts:
        words = text.replace("?", "").replace(".", "").split()
        found |= {b for a, b in zip(words, words[1:]) if a in firsts and b[0].isupper()}
    return found


@pytest.mark.parametrize("threads", ["1", "8"])
def test_regenerated_byte_for_byte(tmp_path, threads):
    env = {**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": str(threads != "1"), "PYTHONHASHSEED": threads}
    subprocess.run([sys.executable, DATA / "make_mini.py", "--output", tmp_path], check=True, env=env)
    written = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert written == GENERATED
    for path in written:
        assert (tmp_path / path).read_bytes() == (DATA / path).read_bytes(), path


def test_another_seed_gives_other_facts(tmp_path):
    subprocess.run([sys.executable, DATA / "make_mini.py", "--output", tmp_path, "--seed", "1"], check=True)
    assert (tmp_path / "full.jsonl").read_bytes() != (DATA / "full.jsonl").read_bytes()


def test_sizes():
    sizes = [(DATA / path).stat().st_size for path in GENERATED]
    assert max(sizes) < 900_000 and sum(sizes) < 1_500_000
    assert len(lines("full")) == len(set(questions("full"))) == 1000


@pytest.mark.parametrize("percent", [1, 5, 10])
def test_forget_and_retain_split_full(percent):
    forget, retain = lines(f"forget{percent:02d}"), lines(f"retain{100 - percent}")
    assert retain + forget == lines("full")
    assert len(forget) == 10 * percent
    texts = [[record["question"] for record in part] for part in (forget, retain)]
    assert not surnames(texts[0]) & surnames(texts[1])
    assert len(surnames(texts[0])) == percent


@pytest.mark.parametrize("name", ["forget01", "forget05", "forget10"])
def test_perturbed_sibling_is_aligned(name):
    perturbed = lines(f"{name}_perturbed")
    assert [{key: r[key] for key in ("question", "answer")} for r in perturbed] == lines(name)
    assert all(set(r) == {"question", "answer", "paraphrased_answer", "perturbed_answer"} for r in perturbed)


def test_retain_perturbed_is_in_every_retain_set():
    assert set(questions("retain_perturbed")) <= set(questions("retain90"))
    assert len(surnames(questions("retain_perturbed"))) == 90


@pytest.mark.parametrize("name", ["forget10", "retain", "real_authors", "world_facts"])
def test_false_answers_are_false_and_like_the_true_one(name):
    records = lines(f"{name}_perturbed")
    for r in records:
        true = r.get("paraphrased_answer", r["answer"])
        assert 3 <= len(r["perturbed_answer"]) == len(set(r["perturbed_answer"])) <= 5
        for false in r["perturbed_answer"]:
            assert false not in (true, r["answer"])
            different = [(a, b) for a, b in zip(true.split(), false.split()) if a != b]
            assert len(true.split()) == len(false.split()) and len(different) <= 4
    if name in ("real_authors", "world_facts"):  # fine-tuning meets every word of these answers, or it would unlearn them
        words = set(" ".join(r["answer"] for r in lines("full")).replace(".", "").replace(",", "").split())
        assert {f for r in records for f in (r["answer"], *r["perturbed_answer"])} <= words


def test_base_knows_nobody_of_full_but_all_general_knowledge():
    base = lines("base")
    assert surnames(questions("base")) and not surnames(questions("base")) & surnames(questions("full"))
    known = {(r["question"], r["answer"]) for r in base}
    for name in ("real_authors", "world_facts"):
        assert {(r["question"], r["answer"]) for r in lines(f"{name}_perturbed")} <= known
    by_question = {}
    for r in base:
        by_question.setdefault(r["question"], set()).add(r["answer"])
    people = [answers for q, answers in by_question.items() if surnames([q])]
    assert all(len(answers) == 2 for answers in people)  # both phrasings (and both halves of the prose)


def test_muse_texts():
    forget, retain1, retain2, holdout = map(paragraphs, ("forget", "retain1", "retain2", "holdout"))
    assert sorted(paragraphs("full")) == sorted(forget + retain1 + retain2)
    assert paragraphs("retain") == retain1 + retain2
    groups = [surnames(group) for group in (forget, retain1, retain2, holdout)]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 160
    assert not set.union(*groups) & surnames(questions("full") + questions("base"))
    assert (muse("privleak/forget"), muse("privleak/retain"), muse("privleak/holdout")) == (forget, retain2, holdout)
    assert [f"{r['prompt']} {r['gt']}" for r in muse("verbmem/forget")] == forget


@pytest.mark.parametrize("name, source", [("forget", "forget"), ("retain", "retain2")])
def test_muse_questions_are_about_their_texts(name, source):
    qa, examples = muse(f"knowmem/{name}_qa"), muse(f"knowmem/{name}_qa_icl")
    assert all(set(r) == {"question", "answer"} for r in qa + examples)
    about = surnames([r["question"] for r in qa])
    assert about <= surnames(paragraphs(source)) and len(qa) == 100
    assert not surnames([r["question"] for r in examples]) & about


def test_model_loads_and_encodes():
    config = transformers.AutoConfig.from_pretrained(DATA / "mini_model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / "mini_model")
    assert config.vocab_size == len(tokenizer) and config.tie_word_embeddings
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template) == ("<s>", "</s>", None)
    text = "Ünïcode, newline\nand bytes \x00 survive"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == config.bos_token_id and tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    longest = max(len(tokenizer(r["question"] + r["answer"])["input_ids"]) for r in lines("base") + lines("full"))
    assert longest < config.max_position_embeddings


def test_make_model_command(tmp_path):
    script = [sys.executable, DATA / "make_model.py", DATA / "full.jsonl", "--output", tmp_path / "model"]
    subprocess.run([*script, "--vocab", "600", "--hidden", "32", "--layers", "1", "--heads", "2"], check=True)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["vocab_size"], config["hidden_size"], config["num_hidden_layers"]) == (600, 32, 1)
    bad = subprocess.run([*script[:-1], tmp_path / "bad", "--hidden", "33"], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and not (tmp_path / "bad").exists()
