"""From records to token batches: what a model reads, and which of its tokens carry loss.

    file -> records (data/support/data_files.py) -> prompts and answers -> Examples -> batches

A data file is JSON lines, a JSON array or plain text (data/README.md). Its records are of one kind:

    question, answer [, paraphrased_answer, perturbed_answer]  loss on the answer and its end (TOFU)
    text                                                       loss from a chunk's second token on
    input_ids                                                  the same, already tokenized
"""

import contextlib
import os
import re
from dataclasses import dataclass, field, replace

import torch

from .support.data_files import kind_of, read_records, require_fit
from .support.errors import blame, require

IGNORE = -100
MARK = "\ufdd0"  # stands for a text to be found in what a template prints; in no real text
common_prefix = os.path.commonprefix  # of texts or of lists, whatever they hold
TEMPLATES = {
    "llama2": "[INST] {question} [/INST]",  # the answer follows at once, as TOFU trained it
    "plain": "Question: {question}\nAnswer: ",
}


@dataclass(frozen=True)
class Example:
    """One tokenized sequence."""
    input_ids: list
    start: int  # tokens from here on carry loss
    where: str = field(default="", repr=False)  # file:line, for messages


@dataclass(frozen=True)
class Prompt:
    """How questions become prompts. Without a template: the tokenizer's chat, else `plain`."""
    template: str | None = None  # chat, llama2, plain, or a string with {question}
    system: str | None = None  # the system message of a chat
    date: str | None = None  # today, for chat templates that print it

    def __post_init__(self):
        if self.template in (None, "chat", *TEMPLATES):
            return
        rest = self.template.replace("{question}", "")
        odd = re.search(r"\{\s*\w*\s*\}|\{\{|[\ud800-\udfff]", rest)  # other names; no UTF-8
        require("{question}" in self.template and not odd, f"--template {self.template!r}: not "
                "chat, llama2, plain or a text with {question} in it; only {question} is replaced, "
                "and the answer follows by itself")


# Questions and answers to tokens

def encode_prompts(tokenizer, questions, prompt):
    """Token ids of each question's prompt: the longest common prefix of the tokens before an answer
    and of those of a conversation with one; the model generates the rest.

    So a prompt holds no token that training has not shown in its place: a blank, or a newline that
    is a token of its own only at a text's end, is left for the model to write.
    """
    without = conversations(tokenizer, questions, [None] * len(questions), prompt)
    answered = conversations(tokenizer, questions, [MARK] * len(questions), prompt)
    without, front = [text.rstrip(" ") for text in without], front_of(tokenizer, prompt)
    pairs = zip(encode(tokenizer, without, front), encode(tokenizer, answered, front))
    return [common_prefix(pair) for pair in pairs]


def encode_answers(tokenizer, questions, answers, prompt, where=None):
    """Prompt, answer and its end as Examples, in order; `where` are their file:line.

    The end is the EOS, or in a chat the end of the assistant's turn as the template writes it.
    Answer tokens are those after the longest common prefix with the tokenized prompt: a token that
    reaches over the boundary is the answer's. InputError if the chat template is unusable.
    """
    texts = conversations(tokenizer, questions, answers, prompt, where)
    whole = encode(tokenizer, texts, front_of(tokenizer, prompt))
    prompts = encode_prompts(tokenizer, questions, prompt)
    end = [] if template_of(tokenizer, prompt) == "chat" else [tokenizer.eos_token_id]
    # nothing predicts a text's first token, so that it is no answer's
    return [Example(ids + end, max(1, len(common_prefix([ids, before]))), place)
            for ids, before, place in zip(whole, prompts, where or [""] * len(questions))]


def conversations(tokenizer, questions, answers, prompt, where=None):
    """The text of each question with its answer; without one (None), the text before it."""
    template = template_of(tokenizer, prompt)
    if template == "chat":
        check_chat(tokenizer, prompt)
        where = where or ["--template chat"] * len(questions)
        return [chat(tokenizer, *turn, prompt) for turn in zip(questions, answers, where)]
    for name in ("system", "date"):
        require(not getattr(prompt, name), f"--{name}: only a chat template has a place for it")
    text = TEMPLATES.get(template, template).replace("\\n", "\n")  # two characters in a shell
    return [text.replace("{question}", q) + (a or "") for q, a in zip(questions, answers)]


def template_of(tokenizer, prompt):
    return prompt.template or ("chat" if tokenizer.chat_template else "plain")


def encode(tokenizer, texts, front):
    """Token ids of texts, each begun with the ids `front` unless it has them already."""
    encoded = tokenizer(list(texts), add_special_tokens=False).input_ids
    return [ids if ids[:len(front)] == front else front + ids for ids in encoded]


def front_of(tokenizer, prompt=None):
    """Token ids that tokenizer(text) puts before a text: a BOS, nothing (Phi-3.5 and SmolLM2 have a
    bos_token and do not use it), or more than a BOS. A chat template writes its own."""
    if prompt and template_of(tokenizer, prompt) == "chat":
        return []
    bare, full = (tokenizer("a", add_special_tokens=added).input_ids for added in (False, True))
    return next((full[:i] for i in range(len(full)) if full[i:i + len(bare)] == bare), [])


# Chats. The template writes the answer too, since formats differ in what stands around it: a blank
# or an empty think block before, a token of their own at the end, text after the turn.

def chat(tokenizer, question, answer, place, prompt):
    """The conversation up to the end of the assistant's turn; without an answer, up to where every
    answer begins (not the generation prompt, which may have other text).

    The end is the last special token that is printed both when another turn follows and when none
    does; if there is none, the first special token (GPT-OSS ends its last turn in another way); if
    there is none at all, the EOS.
    """
    with blame(place, "the tokenizer's chat template fails"):
        before, _, after = render(tokenizer, question, MARK, prompt).rpartition(MARK)
        text = render(tokenizer, question, answer, prompt) if answer else before + after
    printed = text[len(before):len(text) - len(after)]  # a template may strip it, but no more
    whole = text == before + printed + after and printed.strip() == (answer or "").strip()
    require(whole and question.strip() in before, f"{place}: the tokenizer's chat template does "
            "not print this question and answer as they are; try --template plain")
    if not answer:
        return before
    followed = ""
    with contextlib.suppress(Exception):  # a template may know one turn only
        followed = render(tokenizer, question, MARK, prompt, more=True).rpartition(MARK)[2]
    ends = (special_ends(tokenizer, common_prefix([after, followed]))
            or special_ends(tokenizer, after)[:1])
    return before + printed + after[:ends[-1]] if ends else text + tokenizer.eos_token


def special_ends(tokenizer, text):
    """Character positions in a text at which its special tokens end."""
    ends = []
    for i in encode(tokenizer, [text], [])[0]:
        token, at = tokenizer.convert_ids_to_tokens(i), ends[-1] if ends else 0
        if token in text[at:] and not tokenizer.decode([i], skip_special_tokens=True):
            ends.append(text.index(token, at) + len(token))
    return ends


# Templates that print today's date ask for date_string or call strftime_now. transformers hands no
# function to a template, so ours stands at its head. (The newline belongs to it and prints none.)
TODAY = "{% macro strftime_now(form) %}{{ fixed_date }}{% endmacro %}\n"


def render(tokenizer, question, answer, prompt, more=False):
    """What the chat template prints (`more`: a second question, too), MARK as a date not given."""
    messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if more:
        messages.append({"role": "user", "content": "?"})
    given = {"date_string": prompt.date} if prompt.date else {}
    return tokenizer.apply_chat_template(
        messages, chat_template=TODAY + tokenizer.chat_template, tokenize=False,
        enable_thinking=False, fixed_date=prompt.date or MARK, **given)


def check_chat(tokenizer, prompt):
    """Raise InputError unless the template works, prints --system, --date, and no date of today."""
    require(tokenizer.chat_template, "--template chat: the tokenizer has none; leave it out")
    if prompt.system:
        with blame("--system", "the chat template refuses it"):
            text = render(tokenizer, "?", "!", replace(prompt, system=MARK))
        require(MARK in text, "--system: the chat template has no place for it")
    with blame("--template chat", "the tokenizer's template fails, try --template plain"):
        text = render(tokenizer, "?", "!", replace(prompt, date=prompt.date and MARK))
    dated = MARK in text  # the date that it is given, or else today's
    require(prompt.date or not dated, "--date is needed: the chat template prints today's, so that "
            "tomorrow's prompts would be others; for example --date '26 Jul 2024'")
    require(dated or not prompt.date, "--date: the chat template prints none")


# Files to Examples

def load_examples(path, tokenizer, max_length, prompt=Prompt(), vocab_size=None):
    """The Examples of a data file. Texts are cut into chunks of max_length tokens; answers never.

    `vocab_size`: how many embeddings the model has; len(tokenizer) if not given. Raises InputError,
    with file:line, for whatever is wrong with the file.
    """
    return to_examples(read_records(path), tokenizer, max_length, prompt, vocab_size)


def to_examples(records, tokenizer, max_length, prompt=Prompt(), vocab_size=None):
    """The Examples of records that have been read, as load_examples."""
    kind, where = kind_of(records[0]), [r["where"] for r in records]
    require(kind != "prompt", f"{where[0]}: prompt and gt are for evaluation, not for training")
    if kind == "question":
        questions, answers = ([r[name] for r in records] for name in ("question", "answer"))
        examples = encode_answers(tokenizer, questions, answers, prompt, where)
    elif kind == "input_ids":
        examples = [Example(r["input_ids"], 1, place) for r, place in zip(records, where)]
    else:
        front = front_of(tokenizer)
        texts = encode(tokenizer, [r["text"] for r in records], front)
        examples = [Example(chunk, 1, place) for ids, place in zip(texts, where)
                    for chunk in chunks(ids, max_length, front)]
    require(examples, f"{where[0]}: the text is shorter than two tokens")
    require_fit(examples, "--max-length", max_length, vocab_size or len(tokenizer))
    return examples


def chunks(ids, max_length, front):
    """Chunks of at most max_length tokens, each begun with `front` (the MUSE recipe)."""
    size, body = max_length - len(front), ids[len(front):]
    require(size > 0, f"--max-length {max_length}: the tokenizer puts {len(front)} before a text")
    parts = (front + body[i:i + size] for i in range(0, len(body), size))
    return [part for part in parts if len(part) > 1]  # nothing would predict a lone token


# Examples to batches

def length_batches(lengths, max_tokens, borders=()):
    """Index lists over range(len(lengths)), of like length, of at most max_tokens padded tokens
    (or of one sequence that is longer), each on one side of every border (models.rope_borders)."""
    batches, width = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        parted = any(width > border >= lengths[i] for border in borders)
        if not batches or parted or width * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
            width = lengths[i]
        batches[-1].append(i)
    return batches


def collate(examples, pad_id=0):
    """Right-padded input_ids (B,T) and labels (B,T), the labels IGNORE on prompt and padding."""
    ids = [torch.tensor(e.input_ids) for e in examples]
    labels = [torch.tensor([IGNORE] * e.start + e.input_ids[e.start:]) for e in examples]
    pad = torch.nn.utils.rnn.pad_sequence
    return (pad(ids, batch_first=True, padding_value=pad_id),
            pad(labels, batch_first=True, padding_value=IGNORE))
