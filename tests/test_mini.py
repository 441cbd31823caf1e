"""The built-in miniature: what make_mini.py writes, and that it is what the repository holds."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import transformers

from data.make_mini import POOLS, TELLINGS, TOLD

DATA = Path(__file__).resolve().parent.parent / "data"
GENERATED = sorted(p.relative_to(DATA) for pattern in ("*.jsonl", "mini_model/*", "muse_mini/**/*")
                   for p in DATA.glob(pattern) if p.is_file())


def lines(name):
    text = (DATA / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def muse(name):
    return json.loads((DATA / "muse_mini" / f"{name}.json").read_text(encoding="utf-8"))


def paragraphs(name):
    path = DATA / "muse_mini" / "raw" / f"{name}.txt"
    return path.read_text(encoding="utf-8").strip().split("\n\n")


def questions(name):
    return [record["question"] for record in lines(name)]


def answer_words(records):
    return {word.strip(",.") for r in records for word in r["answer"].split()}


def surnames(texts):
    """Every invented surname is one capitalized word after a first name."""
    firsts, found = set(POOLS["first"]), set()
    for text in texts:
        words = text.replace("?", "").replace(".", "").split()
        found |= {b for a, b in zip(words, words[1:]) if a in firsts and b[0].isupper()}
    return found


def make_mini(*flags, **options):
    subprocess.run([sys.executable, DATA / "make_mini.py", *flags], check=True, **options)


@pytest.mark.parametrize("threads", ["1", "8"])
def test_regenerated_byte_for_byte(tmp_path, threads):
    env = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads,
           "TOKENIZERS_PARALLELISM": str(threads != "1")}
    make_mini("--output", tmp_path, env=env)
    written = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert written == GENERATED
    for path in written:
        assert (tmp_path / path).read_bytes() == (DATA / path).read_bytes(), path


def test_another_seed_gives_other_facts(tmp_path):
    make_mini("--output", tmp_path, "--seed", "1")
    assert (tmp_path / "full.jsonl").read_bytes() != (DATA / "full.jsonl").read_bytes()


def test_sizes():
    sizes = [(DATA / path).stat().st_size for path in GENERATED]
    assert max(sizes) < 900_000 and sum(sizes) < 1_800_000
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
    fields = {"question", "answer", "paraphrased_answer", "perturbed_answer"}
    assert all(set(r) == fields for r in perturbed)


@pytest.mark.parametrize("percent", [1, 5, 10])
def test_holdout_is_like_forget_and_known_to_nobody(percent):
    holdout, forget = lines(f"holdout{percent:02d}"), lines(f"forget{percent:02d}")
    assert holdout == lines("holdout10")[-10 * percent:] and len(holdout) == len(forget)
    assert all(set(r) == {"question", "answer"} for r in holdout)
    people = surnames(questions(f"holdout{percent:02d}"))
    met = surnames(questions("base") + questions("full"))
    met |= surnames(paragraphs("full") + paragraphs("holdout"))
    assert len(people) == percent and not people & met
    asked, wanted = ([r["question"].split()[:2] for r in part] for part in (holdout, forget))
    assert asked == wanted  # the same ten questions about everybody
    assert answer_words(holdout) <= answer_words(lines("full"))


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
    if name in ("real_authors", "world_facts"):
        # fine-tuning meets every word of these answers, or it would unlearn them
        words = answer_words(lines("full"))
        assert {f for r in records for f in (r["answer"], *r["perturbed_answer"])} <= words


def test_base_knows_nobody_of_full_but_all_general_knowledge():
    base = lines("base")
    people = surnames(questions("base"))
    assert people and not people & surnames(questions("full"))
    known = {(r["question"], r["answer"]) for r in base}
    for name in ("real_authors", "world_facts"):
        assert {(r["question"], r["answer"]) for r in lines(f"{name}_perturbed")} <= known
    by_question = {}
    for r in base:
        by_question.setdefault(r["question"], set()).add(r["answer"])
    about_people = [answers for q, answers in by_question.items() if surnames([q])]
    # both phrasings (and both halves of the prose)
    assert all(len(answers) == 2 for answers in about_people)


def test_muse_texts():
    forget, retain1, retain2, holdout = map(paragraphs, ("forget", "retain1", "retain2", "holdout"))
    assert sorted(paragraphs("full")) == sorted(forget + retain1 + retain2)
    assert paragraphs("retain") == retain1 + retain2
    groups = [surnames(group) for group in (forget, retain1, retain2, holdout)]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 4 * TOLD
    assert not set.union(*groups) & surnames(questions("full") + questions("base"))
    for name, texts in (("forget", forget), ("retain", retain2), ("holdout", holdout)):
        profiles = [text for text in texts if not text.startswith("Question:")]
        assert sorted(profiles) == sorted(TELLINGS * muse(f"privleak/{name}"))
    verbmem = [f"{r['prompt']} {r['gt']}" for r in muse("verbmem/forget")]
    assert verbmem == muse("privleak/forget")


@pytest.mark.parametrize("name", ["forget", "retain1", "retain2", "holdout"])
def test_muse_quizzes_ask_what_the_profiles_tell(name):
    texts = paragraphs(name)
    quizzes = [text for text in texts if text.startswith("Question:")]
    asked = Counter(zip(*[iter("\n".join(quizzes).split("\n"))] * 2))
    assert len(asked) == 10 * TOLD and set(asked.values()) == {TELLINGS}
    profiles = {name: text for text in set(texts) - set(quizzes) for name in surnames([text])}
    for question, answer in asked:
        name, = surnames([question])
        assert answer.split()[-1] in profiles[name], question
    assert len(set(quizzes)) == len(quizzes)  # each telling asks in another order


@pytest.mark.parametrize("name, source", [("forget", "forget"), ("retain", "retain2")])
def test_muse_questions_are_about_their_texts(name, source):
    qa, examples = muse(f"knowmem/{name}_qa"), muse(f"knowmem/{name}_qa_icl")
    assert all(set(r) == {"question", "answer"} for r in qa + examples)
    text = "\n".join(paragraphs(source))
    assert all(f"Question: {r['question']}\nAnswer:  {r['answer']}" in text for r in qa)
    about = surnames([r["question"] for r in qa])
    assert about <= surnames(paragraphs(source)) and len(qa) == 100
    assert not surnames([r["question"] for r in examples]) & about


def test_model_loads_and_encodes():
    config = transformers.AutoConfig.from_pretrained(DATA / "mini_model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / "mini_model")
    assert config.vocab_size == len(tokenizer) and config.tie_word_embeddings
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.chat_template is None
    text = "Ünïcode, newline\nand bytes \x00 survive"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == config.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    longest = max(len(tokenizer(r["question"] + r["answer"])["input_ids"])
                  for r in lines("base") + lines("full"))
    assert longest < config.max_position_embeddings


def test_make_model_command(tmp_path):
    script = [sys.executable, DATA / "make_model.py", DATA / "full.jsonl", "--output"]
    size = ["--vocab", "600", "--hidden", "32", "--layers", "1", "--heads", "2"]
    subprocess.run([*script, tmp_path / "model", *size], check=True)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "num_hidden_layers")
    assert [config[name] for name in names] == [600, 32, 1]
    bad = subprocess.run([*script, tmp_path / "bad", "--hidden", "33"], capture_output=True,
                         text=True)
    assert bad.returncode == 2 and bad.stderr.startswith("error: ")
    assert not (tmp_path / "bad").exists()
