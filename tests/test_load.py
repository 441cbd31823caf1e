"""Tokenization on families of tokenizers built here, files to records, and batches of similar length."""

import functools
import json
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data.load import (Example, InputError, Prompt, check_disjoint, collate, encode_answers, encode_prompts, find,
                       length_batches, load_examples, read_records)

CORPUS = ["Question: Who is the author Jaime Vasquez, born on the 25th of February 1958?\nAnswer: Jaime Vasquez was born in "
          "Santiago, Chile, and writes true crime [INST] user assistant system [/INST].", "What? 0123456789 (abc) xyz."] * 4
HEADERS = "<|begin|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
LLAMA3 = ("{{ bos_token }}{% if date_string is defined %}<|system|>Today: {{ date_string }}<|end|>{% endif %}"
          "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>{% endif %}")
NO_BOS = LLAMA3.removeprefix("{{ bos_token }}")


def byte_level(special):
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return raw


def unigram(special):
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", *special], unk_token="<unk>", show_progress=False))
    return raw


def puts_first(raw, token):
    raw.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, raw.token_to_id(token))])


@functools.cache
def family(name):
    """Llama 3, Llama 2, GPT-2, OPT, Qwen, and a Unigram one whose chat template leaves the BOS out."""
    if name == "llama3":  # BPE; it and its chat template both put a BOS in front
        raw = byte_level(HEADERS)
        puts_first(raw, "<|begin|>")
        return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|begin|>", eos_token="<|end|>", chat_template=LLAMA3)
    if name == "llama2":  # Unigram, BOS, no chat template
        raw = unigram(["<s>", "</s>"])
        puts_first(raw, "<s>")
        return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if name == "gpt2":  # its BOS is its EOS under another name, and it puts none in front
        return PreTrainedTokenizerFast(tokenizer_object=byte_level(["<|end|>"]), bos_token="<|end|>", eos_token="<|end|>")
    if name == "opt":  # BOS and EOS are one token, and it puts it in front
        raw = byte_level(["</s>"])
        puts_first(raw, "</s>")
        return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="</s>", eos_token="</s>")
    if name == "qwen":  # BPE, chat template, no BOS at all
        return PreTrainedTokenizerFast(tokenizer_object=byte_level(HEADERS[1:]), eos_token="<|end|>", chat_template=NO_BOS)
    raw = unigram(["<s>", "</s>", *HEADERS[1:]])
    puts_first(raw, "<s>")
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=NO_BOS)


BOS = {"llama3": "<|begin|>", "llama2": "<s>", "gpt2": None, "opt": "</s>", "qwen": None, "unigram chat": "<s>"}
BYTE_LEVEL = ("llama3", "gpt2", "opt", "qwen")
CHAT = ("llama3", "qwen", "unigram chat")
QUESTION, ANSWER = "Who is the author Jaime Vasquez?", "Jaime Vasquez was born in Chile."


def raw_ids(name, text):
    """The ids of a text by the tokenizers library itself, no special token added."""
    return family(name).backend_tokenizer.encode(text, add_special_tokens=False).ids


def bos_ids(name):
    return [family(name).convert_tokens_to_ids(BOS[name])] if BOS[name] else []


def encode(name, prompt=Prompt(), question=QUESTION, answer=ANSWER):
    return encode_answers(family(name), [question], [answer], prompt)[0]


# Prompts and answers

@pytest.mark.parametrize("name", BOS)
def test_default_template(name):
    """The whole sequence, written out by hand: a chat where there is a template, else Question: / Answer:."""
    text = (f"<|user|>{QUESTION}<|end|><|assistant|>{ANSWER}" if name in CHAT
            else f"Question: {QUESTION}\nAnswer: {ANSWER}")
    found = encode(name)
    assert found.input_ids == bos_ids(name) + raw_ids(name, text) + [family(name).eos_token_id]
    answer = family(name).decode(found.input_ids[found.start:-1])
    assert (answer if name in CHAT else answer.removeprefix(" ")) == ANSWER


@pytest.mark.parametrize("name", BOS)
def test_one_bos_where_there_is_one_and_one_eos_at_the_end(name):
    ids, tokenizer = encode(name, Prompt("plain")).input_ids, family(name)
    ends = 2 if name == "opt" else 1  # OPT's BOS is the same token
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == ends
    if BOS[name]:
        assert ids[0] == tokenizer.bos_token_id and ids[1] != tokenizer.bos_token_id


@pytest.mark.parametrize("name", BOS)
@pytest.mark.parametrize("template, before, glue", [
    ("plain", f"Question: {QUESTION}\nAnswer:", " "), ("llama2", f"[INST] {QUESTION} [/INST]", ""),
    ("user: {question}\n", f"user: {QUESTION}\n", ""), ("{question}  ", QUESTION, "  ")])
def test_templates(name, template, before, glue):
    """The prompt for generation is the sequence up to the answer, and the answer is what follows it."""
    found, tokenizer = encode(name, Prompt(template)), family(name)
    prompt, = encode_prompts(tokenizer, [QUESTION], Prompt(template))
    assert prompt == bos_ids(name) + raw_ids(name, before)
    assert found.input_ids == bos_ids(name) + raw_ids(name, before + glue + ANSWER) + [tokenizer.eos_token_id]
    assert found.start <= len(prompt) and found.input_ids[:found.start] == prompt[:found.start]
    if glue or name in BYTE_LEVEL:  # else a Unigram piece may reach over the boundary
        assert found.start == len(prompt)
        assert tokenizer.decode(found.input_ids[found.start:-1]).strip() == ANSWER


def test_a_token_that_reaches_over_the_boundary_is_scored():
    """')(' is one token of this tokenizer, so the prompt's last token is not a prefix of the sequence."""
    raw = byte_level(["<|end|>"])
    raw.add_tokens([")("])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")
    found, = encode_answers(tokenizer, [QUESTION], ["(b)"], Prompt("({question})"))
    assert tokenizer.decode(found.input_ids[found.start:-1]) == ")(b)"
    assert tokenizer.decode(found.input_ids[:found.start]) == f"({QUESTION}"


@pytest.mark.parametrize("name", CHAT)
def test_chat_with_system_prompt_and_date(name):
    system, date = "You are helpful.", "10 Apr 2025"
    found = encode(name, Prompt("chat", system, date))
    text = f"<|system|>Today: {date}<|end|><|system|>{system}<|end|><|user|>{QUESTION}<|end|><|assistant|>{ANSWER}"
    assert found.input_ids == bos_ids(name) + raw_ids(name, text) + [family(name).eos_token_id]


@pytest.mark.parametrize("name", CHAT)
def test_chat_agrees_with_the_template_over_the_whole_conversation(name):
    """What the tokenizer makes of question and answer as one conversation, up to its end-of-turn token."""
    found, tokenizer = encode(name, Prompt("chat")), family(name)
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    whole = whole if whole[:1] == bos_ids(name)[:1] else bos_ids(name) + whole
    assert found.input_ids[:-1] == whole[:-1]


@pytest.mark.parametrize("template", ["chat", "{q}", "chatty"])
def test_unusable_template(template):
    with pytest.raises(InputError, match="--template"):
        encode("gpt2", Prompt(template))


def test_many_at_once_keep_their_order():
    questions, answers = [f"Who is {i}?" for i in range(20)], ["a" * i + "b" for i in range(20)]
    found = encode_answers(family("llama3"), questions, answers, Prompt("plain"), [f"f:{i}" for i in range(20)])
    assert found == [Example(e.input_ids, e.start, f"f:{i}") for i, e in enumerate(
        encode("llama3", Prompt("plain"), q, a) for q, a in zip(questions, answers))]


words = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="<"), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BYTE_LEVEL), st.sampled_from(["plain", "llama2", None]), words, words)
@example("gpt2", "llama2", "a", "]")
@example("qwen", None, "a", "\n")
@example("opt", "plain", " é ", "  é")
def test_any_text(name, template, question, answer):
    """No character of the answer is lost, none of the question is scored, whatever they are."""
    tokenizer, found = family(name), encode(name, Prompt(template), question, answer)
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    assert decode(found.input_ids[found.start:-1]).endswith(answer)
    end = {"plain": "\nAnswer:", "llama2": " [/INST]"}.get(template, "<|end|><|assistant|>" if name in CHAT else "\nAnswer:")
    assert len(raw_ids(name, end)) >= len(encode_prompts(tokenizer, [question], Prompt(template))[0]) - found.start
    assert found.input_ids[-1] == tokenizer.eos_token_id and 0 < found.start < len(found.input_ids)


# Files

def write(folder, name, text, encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


QA = [{"question": f"Who is {i}?", "answer": f"He is number {i}, é."} for i in range(3)]
LINES = "".join(json.dumps(r) + "\n" for r in QA)
FORMATS = {
    "lines.jsonl": LINES, "lines.json": LINES, "array.json": json.dumps(QA), "indented.json": json.dumps(QA, indent=2),
    "no_newline.jsonl": LINES.rstrip(), "blank_lines.jsonl": LINES.replace("\n", "\n\n"), "bom.jsonl": "\ufeff" + LINES,
    "bom_array.json": "\ufeff" + json.dumps(QA), "crlf.jsonl": LINES.replace("\n", "\r\n"),
    "crlf_array.json": json.dumps(QA, indent=2).replace("\n", "\r\n"),
    "unescaped.jsonl": "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in QA)}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_questions(name, tmp_path):
    records = read_records(write(tmp_path, name, FORMATS[name]))
    assert [{k: r[k] for k in ("question", "answer")} for r in records] == QA
    if name in ("lines.jsonl", "crlf.jsonl"):
        assert [r["line"] for r in records] == [1, 2, 3]
    if name in ("indented.json", "crlf_array.json"):
        assert [r["line"] for r in records] == [2, 6, 10]


def test_texts_and_strings(tmp_path):
    assert [r["text"] for r in read_records(write(tmp_path, "a.json", '["one", "two"]'))] == ["one", "two"]
    assert [r["text"] for r in read_records(write(tmp_path, "a.jsonl", '{"text": "one"}\n{"text": "two"}'))] == ["one", "two"]
    assert [r["text"] for r in read_records(write(tmp_path, "a.txt", "\ufeffone\r\n\r\ntwo\n"))] == ["one\n\ntwo\n"]


def test_line_separators_inside_a_string_do_not_end_the_line(tmp_path):
    text = json.dumps({"text": "a\u2028b\x0bc\x85d"}, ensure_ascii=False).replace("\\u000b", "\x0b")
    path = write(tmp_path, "a.jsonl", text.replace("\x0b", "\\u000b") + "\n" + json.dumps({"text": "e"}))
    assert [r["text"] for r in read_records(path)] == ["a\u2028b\x0bc\x85d", "e"]


@pytest.mark.parametrize("text, line, what", [
    (LINES + "{", 4, "JSON"), (LINES + '{"question": "a"}', 4, "answer is missing"), (LINES + '{"text": "a"}', 4, "text"),
    (LINES + '{"question": "a", "answer": " "}', 4, "empty"), (LINES + '{"question": "a", "answer": 7}', 4, "int"),
    (json.dumps(QA, indent=2)[:-2], 10, "cut off"), ("", 1, "no record")])
def test_errors_name_file_and_line(text, line, what, tmp_path):
    with pytest.raises(InputError, match=rf"a\.json:{line}: .*{what}"):
        read_records(write(tmp_path, "a.json", text))


def test_find(tmp_path):
    for name in ("x.jsonl", "x.json", "y.json", "y.txt", "z.txt", "v1.2.json", "one/only.json", "two/a.json", "two/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path, name, LINES)
    for asked, got in {"x": "x.jsonl", "x.json": "x.json", "y": "y.json", "z": "z.txt", "z.txt": "z.txt", "v1.2": "v1.2.json",
                       "one": "one/only.json", "one/only": "one/only.json"}.items():
        assert find(tmp_path / asked) == find(str(tmp_path / asked)) == tmp_path / got
    with pytest.raises(InputError, match="folder.*a.json, b.txt"):
        find(tmp_path / "two")
    with pytest.raises(InputError, match="no such data file.*beside it.*x.*download"):
        find(tmp_path / "xx")
    with pytest.raises(InputError, match="no such data file"):
        find(tmp_path / "no" / "such" / "folder")


# Examples

def test_questions_become_examples(tmp_path):
    path = write(tmp_path, "qa.jsonl", LINES)
    found = load_examples(path, family("qwen"), 100, Prompt("plain"))
    expected = encode_answers(family("qwen"), [r["question"] for r in QA], [r["answer"] for r in QA], Prompt("plain"))
    assert [(e.input_ids, e.start) for e in found] == [(e.input_ids, e.start) for e in expected]
    assert [e.where for e in found] == [f"{path}:{n}" for n in (1, 2, 3)]


def test_an_answer_is_never_cut(tmp_path):
    path = write(tmp_path, "qa.jsonl", LINES)
    longest = max(len(e.input_ids) for e in load_examples(path, family("qwen"), 1000, Prompt("plain")))
    assert len(load_examples(path, family("qwen"), longest, Prompt("plain"))) == 3
    with pytest.raises(InputError, match=rf"qa\.jsonl:1: {longest} tokens.*--max-length {longest - 1} \(3 of 3"):
        load_examples(path, family("qwen"), longest - 1, Prompt("plain"))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(BOS)), st.integers(2, 40), st.text("abc XYZ\n", min_size=2, max_size=300).filter(str.strip))
def test_chunks_of_a_text(tmp_path_factory, name, max_length, text):
    """BOS + a part each; the parts together are the text, but for a lone last token, which nothing would predict."""
    path = write(tmp_path_factory.mktemp("text"), "a.txt", text)
    bos, ids = bos_ids(name), raw_ids(name, text)
    if len(bos + ids) < 2:
        return
    found = load_examples(path, family(name), max_length)
    assert all(e.start == 1 and 2 <= len(e.input_ids) <= max_length for e in found)
    assert all(e.input_ids[:len(bos)] == bos for e in found)
    assert all(len(e.input_ids) == max_length for e in found[:-1])
    together = sum((e.input_ids[len(bos):] for e in found), [])
    assert together == ids or (not bos and together == ids[:-1] and len(ids) % max_length == 1)


def test_token_records(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"input_ids": [3, 4, 5]}\n{"input_ids": [6, 7]}')
    assert [(e.input_ids, e.start) for e in load_examples(path, family("qwen"), 10)] == [([3, 4, 5], 1), ([6, 7], 1)]
    with pytest.raises(InputError, match=r"a\.jsonl:1: token 999"):
        load_examples(write(tmp_path, "a.jsonl", '{"input_ids": [3, 999]}'), family("qwen"), 10)


def test_a_record_in_both_sets():
    forget = [Example([1, 2, 3], 1, "f:1"), Example([4, 5], 1, "f:2")]
    check_disjoint(forget, [Example([1, 2], 1, "r:1"), Example([3, 2, 1], 1, "r:2")])
    with pytest.raises(InputError, match=r"f:2.*r:7"):
        check_disjoint(forget, [Example([1, 2], 1, "r:6"), Example([4, 5], 1, "r:7")])


# Batches

@given(st.lists(st.integers(1, 60)), st.integers(1, 200))
def test_length_batches(lengths, max_tokens):
    batches = length_batches(lengths, max_tokens)
    assert Counter(i for batch in batches for i in batch) == Counter(range(len(lengths)))
    for batch in batches:
        assert batch and (len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens)
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(flat, reverse=True)  # similar lengths stand together, the longest batch first


@given(st.lists(st.integers(1, 60), min_size=1), st.integers(1, 200))
def test_no_batch_could_take_the_next_sequence(lengths, max_tokens):
    batches = length_batches(lengths, max_tokens)
    for batch, after in zip(batches, batches[1:]):
        assert (len(batch) + 1) * lengths[batch[0]] > max_tokens and after


examples_ = st.lists(st.integers(1, 99), min_size=2, max_size=30).flatmap(
    lambda ids: st.builds(Example, st.just(ids), st.integers(0, len(ids) - 1)))


@given(st.lists(examples_, min_size=1, max_size=6), st.integers(0, 9))
def test_collate(examples, pad_id):
    ids, labels = collate(examples, pad_id)
    width = max(len(e.input_ids) for e in examples)
    assert ids.shape == labels.shape == (len(examples), width) and ids.dtype == labels.dtype == torch.long
    for e, row, label in zip(examples, ids.tolist(), labels.tolist()):
        assert row == e.input_ids + [pad_id] * (width - len(e.input_ids))
        assert label == [t if e.start <= i < len(e.input_ids) else -100 for i, t in enumerate(row)]
