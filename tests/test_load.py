"""Tokens: families of tokenizers and chat templates built here. Files to records. Batches."""

import bz2
import functools
import gzip
import io
import itertools
import json
import lzma
import os
import re
import subprocess
import zipfile
from collections import Counter

import pytest
import torch
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.load import (Example, Prompt, collate, encode_answers, encode_prompts, length_batches,
                       load_examples, read_records)
from data.support.data_files import check_disjoint, find, require_fit, tofu_records
from data.support.errors import InputError

CORPUS = ["Question: Who is the author Jaime Vasquez, born on the 25th of February 1958?\nAnswer: "
          "Jaime Vasquez was born in Santiago, Chile, and writes true crime [INST] user assistant "
          "system [/INST].", "What? 0123456789 (abc) xyz. USER: ASSISTANT: think"] * 4


def byte_level(special):
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return raw


def unigram(special):
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", *special], unk_token="<unk>", show_progress=False))
    return raw


def puts(raw, form):
    """Let tokenizer(text) write `form`, for example "<s> $A" for a BOS in front."""
    tokens = [word for word in form.split() if word != "$A"]
    raw.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[(token, raw.token_to_id(token)) for token in tokens])


def wrapped(raw, **options):
    return PreTrainedTokenizerFast(tokenizer_object=raw, **options)


# Plain prompts, on the tokenizers of Llama 3, Llama 2, GPT-2, OPT and Qwen

HEADERS = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
CHAT = ("{% if date_string is defined %}<|system|>Today: {{ date_string }}<|end|>{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")


@functools.cache
def family(name):
    if name == "llama3":  # BPE; it and its chat template both put a BOS in front
        raw = byte_level(["<|begin|>", *HEADERS])
        puts(raw, "<|begin|> $A")
        return wrapped(raw, bos_token="<|begin|>", eos_token="<|end|>",
                       chat_template="{{ bos_token }}" + CHAT)
    if name == "llama2":  # Unigram, BOS, no chat template
        raw = unigram(["<s>", "</s>"])
        puts(raw, "<s> $A")
        return wrapped(raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if name == "gpt2":  # its BOS is its EOS under another name, and it puts none in front
        return wrapped(byte_level(["<|end|>"]), bos_token="<|end|>", eos_token="<|end|>")
    if name == "opt":  # BOS and EOS are one token, and it puts it in front
        raw = byte_level(["</s>"])
        puts(raw, "</s> $A")
        return wrapped(raw, bos_token="</s>", eos_token="</s>")
    if name == "qwen":  # BPE, chat template, no BOS at all
        return wrapped(byte_level(HEADERS), eos_token="<|end|>", chat_template=CHAT)
    if name == "unused":  # has a bos_token and does not use it, as Phi-3.5 and SmolLM2
        return wrapped(byte_level(["<s>", "</s>"]), bos_token="<s>", eos_token="</s>")
    if name == "two":  # puts more than a BOS in front, as ChatGLM
        raw = byte_level(["[gMASK]", "<sop>", "</s>"])
        puts(raw, "[gMASK] <sop> $A")
        return wrapped(raw, eos_token="</s>")
    if name == "both":  # appends an EOS by itself, as T5 and some sentence models
        raw = byte_level(["<s>", "</s>"])
        puts(raw, "<s> $A </s>")
        return wrapped(raw, bos_token="<s>", eos_token="</s>")
    raw = unigram(["<s>", "</s>", *HEADERS])  # its chat template leaves its BOS and EOS out
    puts(raw, "<s> $A")
    return wrapped(raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT)


FRONT = {"llama3": ["<|begin|>"], "llama2": ["<s>"], "gpt2": [], "opt": ["</s>"], "qwen": [],
         "unused": [], "two": ["[gMASK]", "<sop>"], "both": ["<s>"], "unigram chat": ["<s>"]}
CHATS = {"llama3": "<|begin|>", "qwen": "", "unigram chat": ""}  # what stands before a chat
BYTE_LEVEL = [name for name in FRONT if name not in ("llama2", "unigram chat")]
QUESTION, ANSWER = "Who is the author Jaime Vasquez?", "Jaime Vasquez was born in Chile."


def raw_ids(tokenizer, text):
    """The ids of a text by the tokenizers library itself, no special token added."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def front_ids(name):
    return family(name).convert_tokens_to_ids(FRONT[name])


def encode(name, prompt=Prompt(), question=QUESTION, answer=ANSWER):
    return encode_answers(family(name), [question], [answer], prompt)[0]


@pytest.mark.parametrize("name", FRONT)
def test_default_template(name):
    """The whole sequence, written out by hand: a chat if there is a template, else Question:."""
    found, tokenizer = encode(name), family(name)
    if name in CHATS:
        text = f"{CHATS[name]}<|user|>{QUESTION}<|end|><|assistant|>{ANSWER}<|end|>"
        assert found.input_ids == raw_ids(tokenizer, text)
    else:
        text = f"Question: {QUESTION}\nAnswer: {ANSWER}"
        eos = tokenizer.eos_token_id
        assert found.input_ids == front_ids(name) + raw_ids(tokenizer, text) + [eos]
    assert tokenizer.decode(found.input_ids[found.start:-1]).strip() == ANSWER


@pytest.mark.parametrize("name", FRONT)
@pytest.mark.parametrize("template, before, glue", [
    ("plain", f"Question: {QUESTION}\nAnswer:", " "), ("llama2", f"[INST] {QUESTION} [/INST]", ""),
    ("user: {question}\n", f"user: {QUESTION}\n", ""), ("{question}  ", QUESTION, "  "),
    (r"a\n{question}\n", f"a\n{QUESTION}\n", "")])  # the last as a shell hands it over
def test_templates(name, template, before, glue):
    """The prompt is the sequence up to the answer, and the answer is what follows it."""
    found, tokenizer = encode(name, Prompt(template)), family(name)
    prompt, = encode_prompts(tokenizer, [QUESTION], Prompt(template))
    assert prompt == front_ids(name) + raw_ids(tokenizer, before)
    whole = raw_ids(tokenizer, before + glue + ANSWER)
    assert found.input_ids == front_ids(name) + whole + [tokenizer.eos_token_id]
    assert found.start <= len(prompt) and found.input_ids[:found.start] == prompt[:found.start]
    if glue or name in BYTE_LEVEL:  # else a Unigram piece may reach over the boundary
        assert found.start == len(prompt)
        assert tokenizer.decode(found.input_ids[found.start:-1]).strip() == ANSWER


def test_a_text_that_begins_with_the_bos_gets_no_second_one():
    tokenizer = family("llama3")
    prompt = Prompt("<|begin|>{question} ")
    found, asked = encode("llama3", prompt).input_ids, encode_prompts(tokenizer, [QUESTION], prompt)
    text = f"<|begin|>{QUESTION} {ANSWER}<|end|>"
    assert found == raw_ids(tokenizer, text) and asked[0] == found[:len(asked[0])]


def test_a_token_that_reaches_over_the_boundary_is_scored():
    """')(' is one token here, so the prompt's last token is not a prefix of the sequence."""
    raw = byte_level(["<|end|>"])
    raw.add_tokens([")("])
    tokenizer = wrapped(raw, eos_token="<|end|>")
    found, = encode_answers(tokenizer, [QUESTION], ["(b)"], Prompt("({question})"))
    assert tokenizer.decode(found.input_ids[found.start:-1]) == ")(b)"
    assert tokenizer.decode(found.input_ids[:found.start]) == f"({QUESTION}"


@pytest.mark.parametrize("template", ["chat", "{q}", "chatty", ""])
def test_unusable_template(template):
    with pytest.raises(InputError, match="^--template"):
        encode("gpt2", Prompt(template))


@pytest.mark.parametrize("name", ["system", "date"])
def test_plain_prompts_have_no_system_prompt_and_no_date(name):
    with pytest.raises(InputError, match=f"^--{name}: "):
        encode("llama3", Prompt("plain", **{name: "x"}))


def test_many_at_once_keep_their_order():
    questions = [f"Who is {i}?" for i in range(20)]
    answers = ["a" * i + "b" for i in range(20)]
    places = [f"f:{i}" for i in range(20)]
    for template in ("plain", "chat"):
        prompt = Prompt(template)
        alone = [encode("llama3", prompt, *pair) for pair in zip(questions, answers)]
        found = encode_answers(family("llama3"), questions, answers, prompt, places)
        assert found == [Example(e.input_ids, e.start, p) for e, p in zip(alone, places)]


words = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="<"), min_size=1)
words = words.filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BYTE_LEVEL), st.sampled_from(["plain", "llama2", None]), words, words)
@example("gpt2", "llama2", "a", "]")
@example("qwen", None, "a", "\n.")
@example("opt", "plain", " é ", "  é")
@example("qwen", None, "\ufdd0", "\ufdd0")
def test_any_text(name, template, question, answer):
    """No character of the answer is lost, none of the question is scored, whatever they are."""
    tokenizer, found = family(name), encode(name, Prompt(template), question, answer)
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    chat = not template and name in CHATS
    # this template strips what it prints
    assert decode(found.input_ids[found.start:-1]).endswith(answer.strip() if chat else answer)
    default = "<|end|><|assistant|>" if chat else "\nAnswer:"
    end = {"plain": "\nAnswer:", "llama2": " [/INST]"}.get(template, default)
    prompt, = encode_prompts(tokenizer, [question], Prompt(template))
    assert len(raw_ids(tokenizer, end)) >= len(prompt) - found.start
    assert found.input_ids[-1] == tokenizer.eos_token_id
    assert 0 < found.start < len(found.input_ids)


# Chats, in the manner of known models: the special tokens (the EOS first), the template, and by
# hand what stands before an answer, around it, and how the turn ends

IM = ["<|im_end|>", "<|im_start|>", "<|endoftext|>"]
CHATML = ("{%% if messages[0].role != 'system' %%}<|im_start|>system\n%s<|im_end|>\n{%% endif %%}"
          "{%% for m in messages %%}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
          "{%% endfor %%}{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}")
QWEN25 = "You are Qwen, created by Alibaba Cloud."
SMOL = "You are a helpful AI assistant named SmolLM."
ASKED_IM = ("<|im_start|>system\n%s<|im_end|>\n<|im_start|>user\n{q}<|im_end|>\n"
            "<|im_start|>assistant\n")
QWEN3 = ("{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}"
         "{%- if m.role == 'assistant' and loop.last -%}"
         "{{ '<think>\n\n</think>\n\n' + m.content.split('</think>')[-1].lstrip('\n') }}"
         "{%- else -%}{{ m.content }}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
         "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
         "{%- if enable_thinking is defined and enable_thinking is false -%}"
         "{{ '<think>\n\n</think>\n\n' }}{%- endif -%}{%- endif -%}")


CHAT_FAMILIES = {
    "llama 3": (
        ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>"
        "{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
        "{% endif %}",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "{a}", "<|eot_id|>"),
    "qwen 2.5": (IM, CHATML % QWEN25, ASKED_IM % QWEN25, "{a}", "<|im_end|>"),
    "qwen 3": (
        [*IM, "<think>", "</think>"], QWEN3, "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>"
        "assistant\n<think>\n\n</think>\n\n", "{a}", "<|im_end|>"),
    "a think block without enable_thinking": (
        [*IM, "<think>", "</think>"], QWEN3.replace("enable_thinking is false", "false"),
        "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "{a}",
        "<|im_end|>"),
    "gemma": (
        ["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n"
        "{% endif %}",
        "<bos><start_of_turn>user\n{q}<end_of_turn>\n<start_of_turn>model\n", "{a}",
        "<end_of_turn>"),
    "phi 3.5": (
        ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"],
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|user|>\n{q}<|end|>\n<|assistant|>\n", "{a}", "<|end|>"),
    "llama 2": (
        ["</s>", "<s>"],
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + "
        "m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}"
        "{% endif %}{% endfor %}", "<s>[INST] {q} [/INST]", " {a} ", "</s>"),
    "mistral": (
        ["</s>", "<s>", "[INST]", "[/INST]"],
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        "<s>[INST] {q} [/INST]", " {a}", "</s>"),
    "zephyr": (
        ["</s>", "<s>"],
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|user|>\n{q}</s>\n<|assistant|>\n", "{a}", "</s>"),
    "deepseek r1": (
        ["<EOS>", "<BOS>", "<User>", "<Assistant>", "<think>"],
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}"
        "{% else %}<Assistant>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<Assistant><think>\n{% endif %}",
        "<BOS><User>{q}<Assistant>", "{a}", "<EOS>"),
    "smollm 2": (IM, CHATML % SMOL, ASKED_IM % SMOL, "{a}", "<|im_end|>"),
    "gpt-oss": (
        ["<|return|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>"],
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final"
        "{% endif %}<|message|>{{ m.content }}{% if m.role == 'assistant' and loop.last %}"
        "<|return|>{% else %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "<|start|>assistant{% endif %}",
        "<|start|>user<|message|>{q}<|end|><|start|>assistant<|channel|>final<|message|>", "{a}",
        "<|return|>"),
    "no end": (
        ["</s>"],
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }}\n{% else %}"
        "ASSISTANT: {{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:"
        "{% endif %}",
        "USER: {q}\nASSISTANT:", " {a}", "</s>"),
    "no generation prompt": (
        ["<|end|>", "<|user|>", "<|assistant|>"],
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}",
        "<|user|>{q}<|end|><|assistant|>", "{a}", "<|end|>"),
    "the EOS after all, no generation prompt": (
        ["<EOS>", "<User>", "<Bot>"],
        "{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}{% else %}<Bot>\n"
        "{{ m.content }}{% endif %}{% endfor %}{{ eos_token }}",
        "<User>{q}<Bot>\n", "{a}", "<EOS>"),
    "glm 4.6": (  # nothing closes a turn
        ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"],
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "[gMASK]<sop><|user|>\n{q}<|assistant|>\n", "{a}", "<|endoftext|>"),
    "kimi k2": (
        ["[EOS]", "<|im_user|>", "<|im_middle|>", "<|im_assistant|>", "<|im_end|>"],
        "{% for m in messages %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{{ m.content }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>"
        "{% endif %}",
        "<|im_user|>user<|im_middle|>{q}<|im_end|><|im_assistant|>assistant<|im_middle|>", "{a}",
        "<|im_end|>"),
    "a channel is closed before the turn": (
        ["[EOS]", "<|user|>", "<|assistant|>", "<|open|>", "<|close|>", "<|end|>"],
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "<|open|>{{ m.content }}<|close|>{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "<|user|>{q}<|end|><|assistant|><|open|>", "{a}", "<|close|><|end|>"),
    "command-r": (
        ["<EOS>", "<BOS>", "<|START|>", "<|USER|>", "<|CHATBOT|>", "<|END|>"],
        "{{ bos_token }}{% for m in messages %}<|START|><|"
        "{{ 'USER' if m.role == 'user' else 'CHATBOT' }}|>{{ m.content }}<|END|>{% endfor %}"
        "{% if add_generation_prompt %}<|START|><|CHATBOT|>{% endif %}",
        "<BOS><|START|><|USER|>{q}<|END|><|START|><|CHATBOT|>", "{a}", "<|END|>"),
    "command-r7b": (
        ["<EOS>", "<BOS>", "<|START|>", "<|USER|>", "<|CHATBOT|>", "<|END|>", "<|START_RESPONSE|>",
         "<|END_RESPONSE|>"],
        "{{ bos_token }}{% for m in messages %}<|START|>{% if m.role == 'user' %}<|USER|>"
        "{{ m.content }}{% else %}<|CHATBOT|><|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>"
        "{% endif %}<|END|>{% endfor %}"
        "{% if add_generation_prompt %}<|START|><|CHATBOT|>{% endif %}",
        "<BOS><|START|><|USER|>{q}<|END|><|START|><|CHATBOT|><|START_RESPONSE|>", "{a}",
        "<|END_RESPONSE|><|END|>"),
    "falcon 3": (
        ["<|endoftext|>"],
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|user|>\n{q}\n<|assistant|>\n", "{a}", "<|endoftext|>"),
    "olmo 2": (  # begins with its EOS
        ["<|endoftext|>"],
        "{{ eos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}\n"
        "{% else %}<|assistant|>\n{{ m.content + eos_token }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|endoftext|><|user|>\n{q}\n<|assistant|>\n", "{a}", "<|endoftext|>"),
    "granite 3": (
        ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"],
        "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}"
        "<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant"
        "<|end_of_role|>{% endif %}",
        "<|start_of_role|>user<|end_of_role|>{q}<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>", "{a}", "<|end_of_text|>"),
    "phi 4": (
        [*IM, "<|im_sep|>"],
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        "<|im_start|>user<|im_sep|>{q}<|im_end|><|im_start|>assistant<|im_sep|>", "{a}",
        "<|im_end|>"),
    "internlm 2": (
        ["</s>", "<s>", *IM],
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
        "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<s><|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n", "{a}", "<|im_end|>"),
    "deepseek v3": (
        ["<EOS>", "<BOS>", "<User>", "<Assistant>"],
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}"
        "{% else %}<Assistant>{{ m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<Assistant>{% endif %}",
        "<BOS><User>{q}<Assistant>", "{a}", "<EOS>"),
    "vicuna": (
        ["</s>", "<s>"],
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
        "{% else %}ASSISTANT: {{ m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        "<s>USER: {q} ASSISTANT:", " {a}", "</s>"),
}
STRIPS = ("llama 3", "gemma", "llama 2")  # these strip what they print
THINKS = {"qwen 3": {"enable_thinking": False}}
CONVERSATIONS = [
    (QUESTION, ANSWER), (QUESTION, QUESTION), (QUESTION, "t"), ("assistant", "a"), (ANSWER, "1958"),
    ("Who?", "user"), ("a\nb", "He\n\n wrote.\n"), ("Who?", "  He  wrote. "),
    ("<s>?", "x<|im_end|>y"), ("Who\ufdd0?", "He\ufdd0."), ("Who?", "é 東京 🙂"),
    ("{question}", "{{ bos_token }}\\n")]


@functools.cache
def chat_family(name):
    special, template, *_ = CHAT_FAMILIES[name]
    raw = unigram(special) if name in ("llama 2", "mistral") else byte_level(special)
    options = {"unk_token": "<unk>"} if name in ("llama 2", "mistral") else {}
    if name == "phi 3.5":  # its tokens swallow the newline after them
        raw.add_special_tokens([AddedToken(t, rstrip=True) for t in special])
    bos = next((t for t in special if t.lower() in ("<bos>", "<s>", "<|begin_of_text|>")), None)
    if bos:
        puts(raw, f"{bos} $A")  # a second one, if anybody asks for it
    return wrapped(raw, bos_token=bos, eos_token=special[0], chat_template=template, **options)


def transformers_loss(model, tokenizer, question, answer, asked, end, **variables):
    """Mean nll of the answer by transformers, on the template's rendering up to the turn's end."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False, **variables)
    whole = raw_ids(tokenizer, render(messages))
    asked = raw_ids(tokenizer, asked.replace("{q}", question))
    end = raw_ids(tokenizer, end)[-1]
    if end in whole:
        whole = whole[:len(whole) - whole[::-1].index(end)]
    else:
        whole = whole + [end]
    same = next(i for i, pair in enumerate(zip(whole, [*asked, None])) if pair[0] != pair[1])
    ids, labels = torch.tensor([whole]), torch.tensor([[-100] * same + whole[same:]])
    return model(input_ids=ids, labels=labels).loss.item()


@pytest.mark.parametrize("name", CHAT_FAMILIES)
def test_chats_have_the_loss_that_transformers_gives_their_own_rendering(name):
    tokenizer, (*_, asked, _, end) = chat_family(name), CHAT_FAMILIES[name]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.2)).double()
    questions, answers = zip(*CONVERSATIONS)
    ids, labels = collate(encode_answers(tokenizer, questions, answers, Prompt()))
    with torch.no_grad():  # in fp32 from the logits on, as transformers does for every dtype
        nll = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[:, :-1].float().transpose(1, 2), labels[:, 1:],
            reduction="none")
        means = nll.double().sum(1) / (labels[:, 1:] != -100).sum(1)
        expected = [transformers_loss(model, tokenizer, *pair, asked, end, **THINKS.get(name, {}))
                    for pair in CONVERSATIONS]
    assert means.tolist() == pytest.approx(expected, rel=0, abs=1e-6)
    assert min(abs(a - b) for a, b in itertools.combinations(expected, 2)) > 1e-5


@pytest.mark.parametrize("name", CHAT_FAMILIES)
def test_chats_by_hand(name):
    """Prompt, answer and end are the tokens of texts written out by hand, and nothing follows."""
    tokenizer = chat_family(name)
    *_, asked, answered, end = CHAT_FAMILIES[name]
    for question, answer in CONVERSATIONS:
        before = asked.replace("{q}", question)
        printed = answered.replace("{a}", answer.strip() if name in STRIPS else answer)
        found, = encode_answers(tokenizer, [question], [answer], Prompt())
        prompt, = encode_prompts(tokenizer, [question], Prompt())
        assert prompt == raw_ids(tokenizer, before)
        assert found.input_ids == raw_ids(tokenizer, before + printed + end)
        assert found.start == len(prompt) and found.input_ids[:found.start] == prompt


def test_the_prompt_has_the_tokens_of_training():
    r"""GPT-2's rule makes "\n\n" one token where a text ends, and two where words follow."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.train_from_iterator(["a\n\n"] * 9, trainers.BpeTrainer(
        special_tokens=["<|end|>", "<|a|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = wrapped(raw, eos_token="<|end|>", chat_template=(
        "{% for m in messages %}{{ m.content }}<|a|>\n\n{% endfor %}"))
    for prompt in (Prompt(), Prompt("{question}<|a|>\n\n")):
        found, = encode_answers(tokenizer, ["b"], ["c"], prompt)
        asked, = encode_prompts(tokenizer, ["b"], prompt)
        assert asked == raw_ids(tokenizer, "b<|a|>") == found.input_ids[:found.start]


ONE_TURN = "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + CHAT


def test_a_template_that_knows_one_turn_only():
    found, = encode_answers(chat_with(ONE_TURN), ["Who?"], ["He."], Prompt())
    assert found.input_ids == raw_ids(family("qwen"), "<|user|>Who?<|end|><|assistant|>He.<|end|>")


@pytest.mark.parametrize("name", CHAT_FAMILIES)
def test_who_recites_an_example_has_said_the_answer(name):
    """Generation that begins with the prompt and stops where eval.py does gives the answer."""
    tokenizer, answers = chat_family(name), [ANSWER, "1958"]
    examples = encode_answers(tokenizer, [QUESTION] * 2, answers, Prompt())
    ends = {tokenizer.eos_token_id, *(e.input_ids[-1] for e in examples)}
    prompt, = encode_prompts(tokenizer, [QUESTION], Prompt())
    for example, answer in zip(examples, answers):
        assert example.input_ids[:len(prompt)] == prompt
        said = list(itertools.takewhile(lambda i: i not in ends, example.input_ids[len(prompt):]))
        assert tokenizer.decode(said, skip_special_tokens=True).strip() == answer


def chat_with(template, name="qwen"):
    tokenizer = family(name)
    return wrapped(tokenizer.backend_tokenizer, eos_token="<|end|>", chat_template=template)


@pytest.mark.parametrize("name", CHATS)
def test_chat_with_system_prompt_and_date(name):
    system, date = "You are helpful.", "10 Apr 2025"
    found = encode(name, Prompt("chat", system, date))
    text = (f"{CHATS[name]}<|system|>Today: {date}<|end|><|system|>{system}<|end|>"
            f"<|user|>{QUESTION}<|end|><|assistant|>{ANSWER}<|end|>")
    assert found.input_ids == raw_ids(family(name), text)


UNDATED = CHAT.partition("{% endif %}")[2]
TODAY = "<|system|>Today: {{ strftime_now('%d %b %Y') }}<|end|>"
DATED = {  # each prints the date in another way
    "at the head": TODAY + UNDATED,
    "a default": "{% if not date_string is defined %}{% if strftime_now is defined %}"
                 "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
                 "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}" + CHAT,
    "in a macro": "{% macro head() %}" + TODAY + "{% endmacro %}{{ head() }}"
                  + UNDATED,
    "after a newline": "\n  {% if true %}" + TODAY + "{% endif %}" + UNDATED}


@pytest.mark.parametrize("name", DATED)
def test_today_is_asked_for(name):
    """Otherwise tomorrow's prompts would be others than those that were trained on."""
    tokenizer = chat_with(DATED[name])
    for call in (functools.partial(encode_prompts, tokenizer, ["Who?"]),
                 functools.partial(encode_answers, tokenizer, ["Who?"], ["He."])):
        with pytest.raises(InputError, match=r"^--date is needed: .*--date '26 Jul 2024'"):
            call(Prompt())
    found, = encode_answers(tokenizer, ["Who?"], ["He."], Prompt(date="1 May 2020"))
    before = "\n" if name == "after a newline" else ""  # as the template prints it without us
    assert found.input_ids == raw_ids(tokenizer, before + (
        "<|system|>Today: 1 May 2020<|end|><|user|>Who?<|end|><|assistant|>He.<|end|>"))


BROKEN = {  # template, Prompt, message
    "no date": (UNDATED, Prompt(date="1 May 2020"), "^--date: .* prints no"),
    "no system": ("{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}<|end|>"
                  "{% endif %}{% endfor %}", Prompt(system="user"), "^--system: .* no place"),
    "system refused": (CHAT_FAMILIES["gemma"][1], Prompt(system="Be kind."),
                       "^--system: .*System role not supported"),
    "system only where no answer follows": (  # Mistral Nemo
        "{% if messages[0].role == 'system' %}{% set head = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' "
        "and loop.last %}{{ head }}{% endif %}{{ m.content }}<|end|>{% endfor %}",
        Prompt(system="Be kind."), "^--system: .* no place"),
    "an error": ("{{ 1 / 0 }}", Prompt(), "^--template chat: .*division"),
    "no Jinja": ("{% for %}", Prompt(), "^--template chat: "),
    "no answer": ("{{ messages[0].content }}<|end|>", Prompt(), "^f:3: .*--template plain"),
    "no question": ("<|user|>{{ messages[-1].content }}<|end|>", Prompt(), "^f:3: .*this question"),
    "half the question": ("{% for m in messages %}{{ m.content[:4] if m.role == 'user' else "
                          "m.content }}<|end|>{% endfor %}", Prompt(), "^f:3: .*this question"),
    "the question last": ("{% for m in messages | reverse %}{{ m.content }}<|end|>{% endfor %}",
                          Prompt(), "^f:3: .*this question"),
    "half the answer": ("{% for m in messages %}{{ m.content.split()[-1] }}{% endfor %}", Prompt(),
                        "^f:3: .*--template plain"),
    "this answer": ("{% for m in messages %}{{ 1 / (m.content | length - 2) }}{{ m.content }}"
                    "{% endfor %}", Prompt(), "^f:3: .*division"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_chat_templates_that_cannot_be_used(name):
    template, prompt, message = BROKEN[name]
    answer = "He" if name == "this answer" else "He did."
    with pytest.raises(InputError, match=message):
        encode_answers(chat_with(template), ["Who is he?"], [answer], prompt, ["f:3"])
    with pytest.raises(InputError, match=message.replace("f:3", "--template chat")):
        encode_answers(chat_with(template), ["Who is he?"], [answer], prompt)


# Files

def write(folder, name, text, encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


QA = [{"question": f"Who is {i}?", "answer": f"He is number {i}, é."} for i in range(3)]
LINES = "".join(json.dumps(r) + "\n" for r in QA)
NUMBERED = [f"1: record {n}" for n in (1, 2, 3)]  # of an array
FORMATS = {  # name: text, lines of its records
    "lines.jsonl": (LINES, [1, 2, 3]), "lines.json": (LINES, [1, 2, 3]),
    "array.json": (json.dumps(QA), NUMBERED),
    "indented.json": (json.dumps(QA, indent=2), NUMBERED),
    "no_newline.jsonl": (LINES.rstrip(), [1, 2, 3]),
    "blank.jsonl": ("\n" + LINES + " \n", [2, 3, 4]),
    "blank_lines.jsonl": (LINES.replace("\n", "\n\n"), [1, 3, 5]),
    "bom.jsonl": ("\ufeff" + LINES, [1, 2, 3]),
    "bom_array.json": ("\ufeff" + json.dumps(QA), NUMBERED),
    "crlf.jsonl": (LINES.replace("\n", "\r\n"), [1, 2, 3]),
    "crlf_array.json": (json.dumps(QA, indent=2).replace("\n", "\r\n"), NUMBERED),
    "unescaped.jsonl": ("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in QA), [1, 2, 3])}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_questions(name, tmp_path):
    text, lines = FORMATS[name]
    records = read_records(write(tmp_path, name, text))
    where = [f"{tmp_path / name}:{line}" for line in lines]
    assert records == [{**r, "where": place} for r, place in zip(QA, where)]


def test_texts_and_strings(tmp_path):
    def texts(name, text):
        return [r["text"] for r in read_records(write(tmp_path, name, text))]
    assert texts("a.json", '["one", "two"]') == ["one", "two"]
    assert texts("a.jsonl", '{"text": "one"}\n"two"') == ["one", "two"]
    assert texts("a.txt", "\ufeffone\r\n\r\ntwo\n") == ["one\n\ntwo\n"]


def test_line_separators_inside_a_string_do_not_end_the_line(tmp_path):
    text = '{"text": "a\u2028b\\u000bc\x85d"}\n{"text": "e"}'
    path = write(tmp_path, "a.jsonl", text)
    assert read_records(path) == [{"text": "a\u2028b\x0bc\x85d", "where": f"{path}:1"},
                                  {"text": "e", "where": f"{path}:2"}]


def test_null_is_absent(tmp_path):
    """pandas writes null where a column has no value."""
    record = {"question": "Who?", "answer": "He.", "text": None, "labels": None, "messages": None,
              "paraphrased_answer": None, "perturbed_answer": None}
    path = write(tmp_path, "a.jsonl", json.dumps(record))
    assert read_records(path) == [{"question": "Who?", "answer": "He.", "where": f"{path}:1"}]
    with pytest.raises(InputError, match=r"a\.jsonl:1: answer is None"):
        read_records(write(tmp_path, "a.jsonl", '{"question": "Who?", "answer": null}'))


def qa(**more):
    return json.dumps({"question": "Who?", "answer": "He.", **more})


BAD = [  # what follows three good lines, or a file of its own; line, message
    (LINES + "{", 4, "JSON"), (LINES + '{"question": "a"}', 4, "answer is None"),
    (LINES + '{"text": "a"}', 4, "text"), (LINES + qa(answer=" \n"), 4, "answer is '"),
    (LINES + qa(answer=7), 4, "answer is 7"), (LINES + qa(answer=["He."]), 4, r"answer is \["),
    (LINES + qa(question="\ud800"), 4, "question is"), (LINES + "{}", 4, "no field"),
    (LINES + qa(perturbed_answer=[]), 4, "perturbed_answer must list texts"),
    (LINES + qa(perturbed_answer="She."), 4, "perturbed_answer must list texts"),
    (LINES + qa(perturbed_answer=["She.", None]), 4, r"perturbed_answer\[1\] is None"),
    (LINES + qa(perturbed_answer=["She.", ""]), 4, r"perturbed_answer\[1\] is ''"),
    (LINES + qa(paraphrased_answer=" "), 4, "paraphrased_answer is ' '"),
    (LINES + '{"question": "a\n"', 4, "JSON"), (LINES + '{"question": "a"', 4, "JSON"),
    (LINES.replace("}\n", "\n", 1), 1, "JSON"), (LINES.replace("\n", ",\n"), 1, "JSON"),
    (LINES + "9" * 5000, 4, "JSON"), (LINES + "9" * 4000, 4, "record must be"),
    (LINES + '{"a":' * 99999, 4, "JSON"), ("[" * 99999, 1, "JSON"), ("[", 1, "JSON"),
    (json.dumps(QA, indent=2)[:-2], 13, "JSON"), (json.dumps(QA)[:-1] + ",", 1, "JSON"),
    (f"[{qa()}\n{qa()}]", 2, "',' delimiter"), (f"[\n{qa()}]\n{qa()}", 3, "Extra data"),
    (json.dumps(QA[0], indent=2), 1, "one object a line"), (f"[{qa()}, {qa(answer='')}]", 1,
                                                            "record 2: answer is"),
    (LINES + qa()[:-1] + ', "answer": "She."}', 4, "twice in one object"),
    ("", 1, "no record"), ("[]", 1, "no record"), ("\ufeff \n", 1, "no record"),
    ("NaN", 1, "float"),
    (LINES + '"\x00"', 4, "byte"), ('{"input_ids": [1, 1e9]}', 1, "token numbers"),
    ('{"input_ids": [1, 99999999999]}', 1, "token numbers"),
    ('{"input_ids": [1]}', 1, "two or more"),
    ('{"input_ids": "1 2"}', 1, "token numbers"), ('{"input_ids": []}', 1, "two or more")]


@pytest.mark.parametrize("text, line, what", BAD, ids=range(len(BAD)))
def test_errors_name_file_and_line(text, line, what, tmp_path):
    path = write(tmp_path, "a.json", text)
    for read in (read_records, lambda path: load_examples(path, family("qwen"), 99)):
        with pytest.raises(InputError, match=rf"^{path}:{line}: [^\n]*{what}[^\n]*$"):
            read(path)


def test_utf_16_without_a_mark_is_no_text(tmp_path):
    with pytest.raises(InputError, match=r"a\.txt:1: byte 1 is not UTF-8 text"):
        read_records(write(tmp_path, "a.txt", "One.\nTwo.", "utf-16-le"))
    with pytest.raises(InputError, match=r"a\.txt:2: byte 5 is not UTF-8 text"):
        read_records(write(tmp_path, "a.txt", "One.\n\xe9", "latin-1"))


OTHER_FIELDS = {
    "labels": [1, 2], "attention_mask": [1, 0], "loss_mask": [0, 1], "output": "x", "target": "3",
    "completion": "x", "messages": [{"role": "user", "content": "x"}], "conversations": [],
    "response": "x", "instruction": "x", "input": "", "context": "x", "system": "x", "chosen": "x",
    "choices": ["x", "y"], "history": "x", "passage": "x", "anything": {"x": 1}}


@pytest.mark.parametrize("field", OTHER_FIELDS)
@pytest.mark.parametrize("record", [QA[0], {"text": "a b"}, {"input_ids": [1, 2]},
                                    {"prompt": "a", "gt": "b"}], ids=lambda record: list(record)[0])
def test_fields_that_say_what_to_learn_are_not_read_past(record, field, tmp_path):
    lines = f"{json.dumps(record)}\n{json.dumps(record | {field: OTHER_FIELDS[field]})}"
    path = write(tmp_path, "a.jsonl", lines)
    kind = list(record)[0]
    with pytest.raises(InputError, match=rf"^{path}:2: {field} beside {kind}: "):
        read_records(path)


def test_fields_about_a_record_may_stand_beside_it(tmp_path):
    more = {"id": "a1", "source": "x", "paraphrased_question": "y", "difficulty": 3, "done": True}
    record, = read_records(write(tmp_path, "a.jsonl", json.dumps(QA[0] | more)))
    assert QA[0].items() <= record.items()


@pytest.mark.parametrize("name, text", [
    ("a.jsonl", json.dumps(json.dumps(QA[0]))), ("a.json", json.dumps([json.dumps(QA[0])])),
    ("a.txt", json.dumps(QA[0]) + "\n" + json.dumps(QA[1])), ("a.txt", "question,answer\nWho?,I."),
    ("a.txt", "id\tanswer\tquestion\n1\tI.\tWho?"), ("a.txt", "prompt,completion\na,b"),
    ("a.txt", json.dumps(QA, indent=2)), ("a.txt", json.dumps(QA, indent=1)[:50]),
    ("a.jsonl", json.dumps(json.dumps(json.dumps(QA[0])))),
    ("a.jsonl", json.dumps(json.dumps(QA, indent=2))), ("a.txt", str(QA)),
    ("a.txt", "id,text\n1,He."), ("a.txt", "question: Who?\nanswer: He.\n"),
    ("a.txt", '[[qa]]\nquestion = "Who?"\nanswer = "I."'),
    ("a.txt", "- {question: Who?, answer: He.}\n"), ("a.txt", f"# of May\n{json.dumps(QA[0])}"),
    ("a.txt", json.dumps(["One text.", "Another."], indent=1)), ("a.txt", '[["Who?", "I."]]')])
def test_records_that_come_as_text_are_refused(name, text, tmp_path):
    with pytest.raises(InputError, match=rf"{name}:1: (record 1: )?records, not a text"):
        read_records(write(tmp_path, name, text))


@pytest.mark.parametrize("text", [
    "42", "null", "Who?, I asked; he gave no answer.", "[1] A note.", '"Hello."\n"Who?"',
    "{{Infobox}} A town.", "[[Ulm]] is a town.", "{a} b", "Question, he said",
    "Question: Who?\nAnswer: He.", "<Enter Hamlet>\nTo be.", "<think>\nSo.\n</think>\nHe.",
    "<!-- 1990 -->\nA day.", "# Head\n\n- one\n- two", "- Ann: You?\n- Bo: I.\n  And you?",
    "---\ntitle: A day\nauthor: He\n---\nIt was.", "> Who: he.", "text: a word.\nIt is.",
    "/annex/objects/ was full.", "%PDQ Bach", "https://x.org/a?b=c <b>said</b>"])
def test_prose_is_read(text, tmp_path):
    assert read_records(write(tmp_path, "a.txt", text))[0]["text"] == text


@pytest.mark.parametrize("template", [
    "{question} {answer}", "{system} {question}", "Q: {{question}}", "{question} {}",
    "{question} { answer }", "{question} {{ messages[0].content }}"])
def test_only_the_question_is_replaced(template):
    with pytest.raises(InputError, match="only {question} is replaced"):
        Prompt(template)
    Prompt("{question} {a b}")


def test_a_template_is_text():
    with pytest.raises(InputError, match="^--template .*udcff"):
        Prompt("{question}\udcff")  # as Python hands over a byte that is not UTF-8


def test_a_record_is_of_one_kind(tmp_path):
    for record, named in ((QA[0] | {"text": "x"}, "text beside question"),
                          ({"text": "x", "input_ids": [1, 2]}, "input_ids beside text"),
                          ({"text": "x", "answer": "y"}, "answer beside text"),
                          (QA[0] | {"prompt": "x", "gt": "y"}, "gt, prompt beside question")):
        with pytest.raises(InputError, match=rf"a\.jsonl:1: {named}: "):
            read_records(write(tmp_path, "a.jsonl", json.dumps(record)))
    path = write(tmp_path, "a.jsonl", qa(id=7, category="x"))  # harmless
    assert len(read_records(path)) == 1


# Files of other formats

TABLE = {"question": {"0": "Who?", "1": "1958?"}, "answer": {"0": "He.", "1": "1958"}}
PAIRS = [{"prompt": r["question"], "completion": r["answer"] + ' \\"prompt\\":'} for r in QA]
ZIPPED = io.BytesIO()
with zipfile.ZipFile(ZIPPED, "w") as packed:
    packed.writestr("inside.jsonl", LINES)
CSV = b'question,answer\nWho?,He.\n1958?,1958\nNone?,"NA, ""b""\nc"\n'
YAML = b"---\n- question: |\n    Who?\n\n  answer: He.\n- question: 1958?\n  answer: '1958'\n"
FOREIGN = {  # file: its bytes, what it is called
    "a.parquet": (b"PAR1\x15\0....PAR1", "byte"),
    "a.arrow": (b"\xff\xff\xff\xff\x10\0\0\0", "byte"),
    "a.feather": (b"ARROW1\0\0", "byte"), "a.zst": (b"\x28\xb5\x2f\xfd\0", "byte"),
    "gz.jsonl": (gzip.compress(LINES.encode()), "byte"),
    "a.jsonl.bz2": (bz2.compress(b"x"), "byte"),
    "a.xz": (lzma.compress(b"x"), "byte"), "a.zip": (ZIPPED.getvalue(), "byte"),
    "a.xls": (b"\xd0\xcf\x11\xe0\xa1", "byte"), "A.CSV": (CSV, "not JSON"),
    "a.tsv": (b"question\tanswer\nWho?\tHe.\n", "not JSON"),
    "a.pdf": (b"%PDF-1.4\n%\xe2\xe3\xcf\n", "byte")}
COLUMNS = {  # JSON, refused for what is in it
    "a.json": (json.dumps(TABLE).encode(), "question is {"),
    "lists.json": (b'{"question": ["1?"], "answer": ["1958"]}', r"question is \["),
    "ids.json": (b'{"input_ids": {"0": [1, 2], "1": [3, 4]}}', "input_ids must be a list"),
    "pairs.jsonl": ("\n".join(map(json.dumps, PAIRS)).encode(), "completion beside prompt")}


@pytest.mark.parametrize("name", [*FOREIGN, *COLUMNS])
def test_files_of_other_formats_are_named_for_what_they_are(name, tmp_path):
    content, called = (FOREIGN | COLUMNS)[name]
    (tmp_path / name).write_bytes(content)
    page = "; data/README.md" if name in FOREIGN else ""
    with pytest.raises(InputError, match=f"{name}:[12]: {called}.*{page}") as e:
        read_records(tmp_path / name)
    assert "\n" not in str(e.value)


README = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
LINES_FOR_THE_SHELL = dict(re.findall(r"^\| (.+?) \| `(.+new\.jsonl.*)` \|$", README, re.M))
ROWS = [("Who?", "He."), ("1958?", "1958"), ("None?", 'NA, "b"\nc')]
OLD = {  # format: file, its bytes, the questions and answers in it
    "CSV": ("old.csv", CSV, ROWS), "TSV": ("old.tsv", CSV.replace(b"?,", b"?\t")
                                          .replace(b"question,", b"question\t"), ROWS),
    "columns, as pandas writes them": ("old.json", json.dumps(TABLE).encode(), ROWS[:2]),
    "YAML": ("old.yaml", YAML, [("Who?\n", "He."), ("1958?", "1958")]),
    "prompt and completion": ("old.jsonl", COLUMNS["pairs.jsonl"][0],
                              [(r["prompt"], r["completion"]) for r in PAIRS]),
    "objects over several lines": ("old.json", json.dumps(QA[0], indent=1).encode(),
                                   [(QA[0]["question"], QA[0]["answer"])]),
    "zip of one file": ("old.zip", ZIPPED.getvalue(), [(r["question"], r["answer"]) for r in QA])}
OLD |= {name: (file, pack(LINES.encode()), OLD["zip of one file"][2]) for name, file, pack in (
    ("gzip", "old.jsonl.gz", gzip.compress), ("bzip2", "old.jsonl.bz2", bz2.compress),
    ("xz", "old.jsonl.xz", lzma.compress))}


@pytest.mark.parametrize("name", OLD)
def test_the_lines_for_the_shell_do_what_they_say(name, tmp_path):
    file, content, expected = OLD[name]
    (tmp_path / file).write_bytes(content)
    if subprocess.run(LINES_FOR_THE_SHELL[name], shell=True, cwd=tmp_path).returncode == 127:
        pytest.skip(f"{LINES_FOR_THE_SHELL[name].split()[0]} is not installed")
    found = read_records(tmp_path / "new.jsonl")
    assert [(r["question"], r["answer"]) for r in found] == expected


@pytest.mark.parametrize("name, file, write", [
    ("parquet", "old.parquet", "to_parquet"), ("Arrow (feather)", "old.arrow", "to_feather"),
    ("Excel", "old.xlsx", "to_excel")])
def test_the_lines_for_pandas_do_what_they_say(name, file, write, tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = [(*row, "1958") for row in ROWS]
    table = pandas.DataFrame(rows, columns=["question", "answer", "paraphrased_answer"])
    getattr(table, write)(tmp_path / file, **{"index": False} if name == "Excel" else {})
    assert subprocess.run(LINES_FOR_THE_SHELL[name], shell=True, cwd=tmp_path).returncode == 0
    found = read_records(tmp_path / "new.jsonl")
    assert [(r["question"], r["answer"], r["paraphrased_answer"]) for r in found] == rows


# Which file is meant

def test_find(tmp_path):
    for name in ("x.jsonl", "x.json", "y.json", "y.txt", "z.txt", "v1.2.json", "one/only.json",
                 "two/a.json", "two/b.txt", "none/a.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path, name, LINES)
    for asked, got in {"x": "x.jsonl", "x.json": "x.json", "y": "y.json", "z": "z.txt",
                       "z.txt": "z.txt", "v1.2": "v1.2.json", "one": "one/only.json",
                       "one/only": "one/only.json", "one/../one": "one/../one/only.json"}.items():
        assert find(tmp_path / asked) == find(str(tmp_path / asked)) == tmp_path / got
    for asked, message in {
            "two": "two: no such data file.*has a.json, b.txt", "none": "none has none",
            "xx": "xx: no such data file.*has v1.2.json, x.json, x.jsonl.*download",
            "one/..": "no such data file", "one/x": "one has only.json",
            "no/such/folder": "folder: no such data file", "x.json/y": "no such data",
            "n" * 300: "File name too long", "\0": "no such"}.items():
        with pytest.raises(InputError, match=message):
            find(tmp_path / asked)


def test_find_does_not_wait_for_a_pipe(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "lost.jsonl").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    for name in ("pipe.jsonl", "pipe", "folder", "lost", "lost.jsonl"):
        with pytest.raises(InputError, match=f"^{name}: no such data file"):
            find(name)
    for name in (".", ""):
        with pytest.raises(InputError, match="no such data file.*none"):
            find(name)


def test_a_holdout_belongs_to_the_forget_set_that_names_it(tmp_path):
    perturbed = qa(perturbed_answer=["She."])
    for name in ("forget05", "other", "retain", "real_authors", "world_facts"):
        write(tmp_path, f"{name}_perturbed.json", perturbed)
    forget, other = tmp_path / "forget05.json", tmp_path / "other.json"
    assert "holdout" not in tofu_records(forget, 300)
    write(tmp_path, "holdout05.json", LINES)
    assert [r["where"] for r in tofu_records(forget, 2)["holdout"]] == [
        f"{tmp_path / 'holdout05.json'}:{line}" for line in (1, 2)]
    assert "holdout" not in tofu_records(other, 300)
    write(tmp_path, "retain_perturbed.json", LINES)
    with pytest.raises(InputError, match=r"retain_perturbed\.json:1: no perturbed_answer"):
        tofu_records(forget, 300)


# Examples

def test_questions_become_examples(tmp_path):
    path = write(tmp_path, "qa.jsonl", LINES)
    found = load_examples(path, family("qwen"), 100, Prompt("plain"))
    questions, answers = ([r[name] for r in QA] for name in ("question", "answer"))
    places = [f"{path}:{n}" for n in (1, 2, 3)]
    assert found == encode_answers(family("qwen"), questions, answers, Prompt("plain"), places)


def test_an_answer_is_never_cut(tmp_path):
    path = write(tmp_path, "qa.jsonl", LINES)
    found = load_examples(path, family("qwen"), 1000, Prompt("plain"))
    longest = max(len(e.input_ids) for e in found)
    assert len(load_examples(path, family("qwen"), longest, Prompt("plain"))) == 3
    with pytest.raises(InputError, match=rf"qa\.jsonl:1: {longest} tokens.*--max-length "
                       rf"{longest - 1} \(3 of 3"):
        load_examples(path, family("qwen"), longest - 1, Prompt("plain"))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(FRONT)), st.integers(3, 40),
       st.text("abc XYZ\n", min_size=2, max_size=300).filter(str.strip))
def test_chunks_of_a_text(tmp_path_factory, name, max_length, text):
    """What goes in front + a part each; the parts together are the text, but for a lone last
    token, which nothing would predict. An EOS that the tokenizer appends is no part of it."""
    path = write(tmp_path_factory.mktemp("text"), "a.txt", text)
    front, ids = front_ids(name), raw_ids(family(name), text)
    if len(front + ids) < 2:
        return
    found = load_examples(path, family(name), max_length)
    assert all(e.start == 1 and 2 <= len(e.input_ids) <= max_length for e in found)
    assert all(e.input_ids[:len(front)] == front for e in found)
    assert all(len(e.input_ids) == max_length for e in found[:-1])
    together = sum((e.input_ids[len(front):] for e in found), [])
    assert together == ids or (not front and together == ids[:-1] and len(ids) % max_length == 1)


def test_no_room_for_a_text(tmp_path):
    path = write(tmp_path, "a.txt", "a b c")
    with pytest.raises(InputError, match="^--max-length 2: "):
        load_examples(path, family("two"), 2)


def test_token_records(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"input_ids": [3, 4, 5]}\n{"input_ids": [6, 7]}')
    found = load_examples(path, family("qwen"), 10)
    assert found == [Example([3, 4, 5], 1, f"{path}:1"), Example([6, 7], 1, f"{path}:2")]


def test_ids_are_compared_with_the_embedding(tmp_path):
    """Not with len(tokenizer): a tokenizer may have a token that the model has not (Gemma 3 1B's),
    which matters only where it occurs; a model may have more than the tokenizer."""
    tokenizer = family("qwen")
    tokens = write(tmp_path, "a.jsonl", '{"input_ids": [3, 4]}\n{"input_ids": [3, 999]}')
    for size in (None, 999):
        with pytest.raises(InputError, match=r"a\.jsonl:2: token 999 .* of \d+ tokens"):
            load_examples(tokens, tokenizer, 10, vocab_size=size)
    assert len(load_examples(tokens, tokenizer, 10, vocab_size=1000)) == 2
    lines = write(tmp_path, "qa.jsonl", LINES)
    highest = max(max(e.input_ids) for e in load_examples(lines, tokenizer, 99))
    assert len(load_examples(lines, tokenizer, 99, vocab_size=highest + 1)) == 3 < len(tokenizer)
    with pytest.raises(InputError, match=rf"qa\.jsonl:\d: token {highest}"):
        load_examples(lines, tokenizer, 99, vocab_size=highest)


def test_the_eos_counts_among_the_ids(tmp_path):
    raw = byte_level([])
    raw.add_special_tokens(["<end>"])  # the last id
    tokenizer = wrapped(raw, eos_token="<end>")
    path = write(tmp_path, "qa.jsonl", LINES)
    eos = tokenizer.eos_token_id
    assert eos == len(tokenizer) - 1 and load_examples(path, tokenizer, 99, vocab_size=eos + 1)
    with pytest.raises(InputError, match=rf"qa\.jsonl:1: token {eos} "):
        load_examples(path, tokenizer, 99, vocab_size=eos)


def test_require_fit():
    examples = [Example([1, 2], 1, "f:1"), Example([1, 2, 3], 1, "f:2"), Example([1] * 9, 1, "f:3")]
    require_fit(examples, "the limit of", 9, 4)
    with pytest.raises(InputError, match=r"^f:2: 3 tokens do not fit the limit of 2 \(2 of 3 "):
        require_fit(examples, "the limit of", 2, 4)
    with pytest.raises(InputError, match="^f:2: token 3 "):
        require_fit(examples, "the limit of", 9, 3)


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
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= max_tokens
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(flat, reverse=True)  # similar lengths together, the longest first


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
    assert ids.shape == labels.shape == (len(examples), width)
    assert ids.dtype == labels.dtype == torch.long
    for e, row, label in zip(examples, ids.tolist(), labels.tolist()):
        assert row == e.input_ids + [pad_id] * (width - len(e.input_ids))
        assert label == [t if e.start <= i < len(e.input_ids) else -100 for i, t in enumerate(row)]
