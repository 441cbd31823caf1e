"""TOFU's and MUSE's metrics for one model or several side by side, as the official codes define them.

    python eval.py runs/forget05-simnpo --forget data/forget05              TOFU; on the built-in data the target and a
                                                                            retain-only model are made and shown too
    python eval.py MODEL --forget data/tofu/forget05 --reference RETAIN     TOFU; forget quality needs a retain-only model
    python eval.py MODEL --muse data/muse/news                              MUSE: VerbMem, KnowMem, PrivLeak
    python eval.py MODEL --kl FILE [FILE ...] --reference OTHER             KL(OTHER || MODEL) per token of these files
    python eval.py runs/a/eval.json runs/b/eval.json                        print again what was measured before

MODEL is a folder or hub name of a causal model, an eval.json written here, or an official TOFU eval_log_aggregated.json.
Every per-example value, the generated texts included, is kept in an eval.json in the model's folder (for a hub name in
runs/), and a model whose weights, data and settings are those of that file is not run again.

Reading order: metrics, scoring, generation, TOFU, MUSE, KL, saved results, the table.
"""

import argparse
import hashlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
import time
from bisect import bisect_left, bisect_right
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from data.load import (InputError, Parser, Prompt, check_writable, collate, encode_answers, encode_prompts, find,
                       length_batches, load_examples, load_pretrained, load_skeleton, read_records)
from data.porter import stem as porter_stem
from simnpo import answer_hidden, answer_kl, check_head, chunk_rows, head_logits

ROOT = Path(__file__).resolve().parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Undefined(Exception):
    """A metric has no value; the message says why. It becomes a footnote of the table."""


# Metrics: plain functions on lists or 1-d tensors of numbers.

def rouge_l(prediction, reference, stem):
    """ROUGE-L of two texts: (precision, recall, F1) of the longest common subsequence of their words.

    Words are runs of [a-z0-9] in the lower-cased text; with `stem`, those of more than 3 letters are Porter-stemmed.
    (0, 0, 0) if either text has none. Equal to rouge-score 0.1.2, with which TOFU (stem) and MUSE (no stem) measure.
    """
    words, wanted = ([porter_stem(w) if stem and len(w) > 3 else w for w in re.findall("[a-z0-9]+", text.lower())]
                     for text in (prediction, reference))
    if not words or not wanted:
        return 0.0, 0.0, 0.0
    places = {}
    for i, word in enumerate(wanted):
        places[word] = places.get(word, 0) | 1 << i
    row = full = (1 << len(wanted)) - 1  # Hyyro 2004: a row of the table in one integer, a 0 bit where the length grows
    for word in words:
        hits = row & places.get(word, 0)
        row = (row + hits | row - hits) & full
    common = len(wanted) - row.bit_count()
    precision, recall = common / len(words), common / len(wanted)
    return precision, recall, 2 * precision * recall / (precision + recall) if common else 0.0


def ks_two_sample(a, b):
    """Two-sided two-sample Kolmogorov-Smirnov test: (statistic D, exact p-value). Sizes may differ.

    p = P(D' >= D) when both samples come from one continuous distribution: the share of lattice paths from (0, 0) to
    (len(a), len(b)) that leave the band |i/len(a) - j/len(b)| < D (Hodges 1958). Counted in whole numbers, so p is
    right to the last digit however small. Equals scipy.stats.ks_2samp(a, b, method="exact"). ValueError on NaN.
    """
    a, b = sorted(map(float, a)), sorted(map(float, b))
    m, n = len(a), len(b)
    if not m or not n or any(map(math.isnan, a + b)):
        raise ValueError("the KS test needs two samples without NaN")
    gap = max(abs(bisect_right(a, x) * n - bisect_right(b, x) * m) for x in a + b)  # D in units of 1/(m n)
    inside = [1] + [0] * n  # inside[j]: paths to (i, j) within the band
    for i in range(m + 1):
        low, high = max(0, (i * n - gap) // m + 1), min(n, -((-i * n - gap) // m) - 1)  # |i n - j m| < gap
        inside = ([0] * low + inside[low:high + 1] + [0] * n)[:n + 1]
        for j in range(max(low, 1), high + 1):
            inside[j] += inside[j - 1]
    paths = math.comb(m + n, n)
    return gap / (m * n), (paths - inside[n]) / paths if gap else 1.0


def auroc(positives, negatives):
    """Area under the ROC curve: P(a positive's score > a negative's), ties counting half (Mann-Whitney U)."""
    negatives = sorted(map(float, negatives))
    below = sum(bisect_left(negatives, float(x)) + bisect_right(negatives, float(x)) for x in positives)
    return below / (2 * len(positives) * len(negatives))


def truth_ratio(true_nll, false_nlls):
    """TOFU's R = exp(mean of the false answers' nll - nll of the true one), each nll a mean per token, in nats.

    Above 1 where the model prefers the truth. The paper's formula has the arithmetic mean of the false answers'
    probabilities and the inverse ratio; this is what its code, and everyone's numbers, use.
    """
    false_nlls = [float(x) for x in false_nlls]
    exponent = sum(false_nlls) / len(false_nlls) - float(true_nll)
    return math.exp(exponent) if exponent < 709 else math.inf


def forget_quality(r_model, r_reference):
    """TOFU's forget quality: KS p-value between truth ratios R on the forget set, of a model and of one retrained
    without that set. Near 1: they cannot be told apart; near 0: they can."""
    return ks_two_sample(r_model, r_reference)[1]


def model_utility(parts):
    """TOFU's model utility: the harmonic mean of {probability, ROUGE-L, truth ratio} x {retain, authors, facts}."""
    parts = [float(x) for x in parts]
    return 0.0 if 0 in parts else len(parts) / sum(1 / x for x in parts)


def exact_memorization(right):
    """Share of answer tokens that the argmax, given all tokens before, gets right; `right` is a bool a token."""
    return sum(map(bool, right)) / len(right)


def extraction_strength(right):
    """1 - k/|y| for the smallest k such that all tokens from place k on are right; 0 if even the last is wrong.

    Carlini et al. 2021, as in OpenUnlearning but for that last case, where its loop ends one early and gives 1/|y|.
    """
    wrong = [i for i, x in enumerate(right) if not x]
    return 1 - (wrong[-1] + 1) / len(right) if wrong else 1.0


def min_k(logps, share=0.4):
    """Min-K% score (Shi et al. 2023): minus the mean of the lowest 40% of the token log-probabilities."""
    lowest = sorted(map(float, logps))[:int(len(logps) * share)]
    return -sum(lowest) / len(lowest) if lowest else math.nan


# Scoring: answers of all questions together, sorted by length and padded right, logits at answer positions only.

@torch.inference_mode()
def score_answers(model, examples, max_tokens):
    """(logps, right) of each Example, in order: the log-probability of each answer token, and if it is the argmax."""
    scores = [None] * len(examples)
    rows = chunk_rows(model)
    for batch in progress(length_batches([len(e.input_ids) for e in examples], max_tokens), "scoring"):
        ids, labels = (x.to(model.device) for x in collate([examples[i] for i in batch]))
        hidden, targets = answer_hidden(model, ids, labels)
        parts = [_score_tokens(head_logits(model, h).float(), t) for h, t in zip(hidden.split(rows), targets.split(rows))]
        logps, right = (torch.cat(x).cpu() for x in zip(*parts))
        counts = [len(examples[i].input_ids) - examples[i].start for i in batch]
        for i, score in zip(batch, zip(logps.split(counts), right.split(counts))):
            scores[i] = score
    return scores


def _score_tokens(logits, targets):
    logps = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return logps, logits.argmax(-1) == targets


# Generation: greedy, in batches of prompts of like length.

@torch.inference_mode()
def generate(model, prompts, tokenizer, max_new_tokens, batch_size):
    """Greedy continuations of tokenized prompts, in order: lists of new token ids without the EOS.

    None where the model's logits are not finite or the prompt leaves no room in its context.
    """
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    batches = []  # at most 32 tokens between a batch's shortest and longest prompt: all wait while the longest is read
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        if not batches or len(batches[-1]) == batch_size or len(prompts[i]) - len(prompts[batches[-1][0]]) > 32:
            batches.append([])
        if len(prompts[i]) < context_length(model):
            batches[-1].append(i)
    results = [None] * len(prompts)
    for batch in progress([batch for batch in batches[::-1] if batch], "generating"):
        new = _generate_batch(model, [prompts[i] for i in batch], torch.tensor(sorted(ends)), max_new_tokens)
        for i, tokens in zip(batch, new):
            results[i] = tokens
    return results


def _generate_batch(model, prompts, ends, max_new_tokens):
    """All rows read their t-th token in the t-th step, a prompt's own while it lasts and then the model's choice.

    So there is no padding before or between tokens, hence no mask and no shifted position, and a row's result does not
    depend on its company. Rows that are done leave the batch and its cache once they are half of it.
    """
    device, lengths = model.device, torch.tensor([len(p) for p in prompts])
    stops = (lengths + max_new_tokens).clamp(max=context_length(model))  # a row's tokens end before this place
    ids = torch.zeros(len(prompts), int(stops.max()), dtype=torch.long)
    for row, prompt in zip(ids, prompts):
        row[:len(prompt)] = torch.tensor(prompt)
    ids, lengths, stops, ends = (x.to(device) for x in (ids, lengths, stops, ends))
    rows, broken = torch.arange(len(prompts), device=device), torch.zeros_like(lengths, dtype=torch.bool)
    accepted = inspect.signature(model.forward).parameters
    cache, name = transformers.DynamicCache(config=model.config), "cache" if "cache" in accepted else "past_key_values"
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    fed = 0
    for t in range(int(lengths.min()), ids.shape[1]):
        logits = model(input_ids=ids[rows, fed:t], use_cache=True, **{name: cache}, **only_last).logits[:, -1]
        fed, choice, free = t, logits.argmax(-1), t >= lengths[rows]
        ids[rows, t] = torch.where(free, choice, ids[rows, t])
        bad = ~logits.amax(-1).isfinite()
        broken[rows] |= bad
        over = (bad | free & torch.isin(choice, ends)) & (t < stops[rows])
        stops[rows] = torch.where(over, t, stops[rows])
        alive = t + 1 < stops[rows]
        left = int(alive.sum())
        if not left:
            break
        if left <= len(rows) // 2:
            cache.reorder_cache(alive.nonzero()[:, 0])
            rows = rows[alive]
    return [None if bad else row[length:stop].tolist()
            for row, length, stop, bad in zip(ids, lengths.tolist(), stops.tolist(), broken.tolist())]


def context_length(model):
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


# TOFU

SIBLINGS = {"forget": None, "retain": "retain_perturbed", "real_authors": "real_authors_perturbed",
            "world_facts": "world_facts_perturbed"}


def tofu_files(forget):
    """The four evaluation files that belong to a forget file: its own perturbed version and those beside it."""
    forget = find(forget)
    name = forget.stem if forget.stem.endswith("_perturbed") else forget.stem + "_perturbed"
    files = {}
    for split, sibling in SIBLINGS.items():
        try:
            files[split] = find(forget.with_name(sibling or name))
        except InputError as e:
            raise InputError(f"{e}; TOFU's evaluation needs this file beside {forget}") from None
    return files


def tofu_records(path, limit):
    """The first records of an evaluation file, checked."""
    records = read_records(path, "question")[:limit]
    for record in records:
        if "perturbed_answer" not in record:
            raise InputError(f"{path}:{record['line']}: no perturbed_answer, which the truth ratio needs")
    return records


def evaluate_tofu(model, tokenizer, files, options):
    """Per-example values of the four splits: {split: [record]}. Files as from tofu_files, options as from parse_args."""
    prompt = Prompt(options.template, options.system, options.date)
    questions, examples, counts = [], [], []
    for split, path in files.items():
        for record in tofu_records(path, options.limit):
            answers = [record["answer"], record.get("paraphrased_answer"), *record["perturbed_answer"]]
            answers = [answer for answer in answers if answer is not None]
            questions.append((split, record))
            counts.append(len(answers))
            examples += encode_answers(tokenizer, [record["question"]] * len(answers), answers, prompt,
                                       [f"{path}:{record['line']}"] * len(answers))
    check_lengths(model, examples)
    scores = iter(spread(score_answers, model, examples, options.max_tokens))
    prompts = encode_prompts(tokenizer, [record["question"] for _, record in questions], prompt)
    texts = decode(tokenizer, spread(generate, model, prompts, tokenizer, options.max_new_tokens, options.batch_size))
    values = {split: [] for split in files}
    for (split, record), count, text in zip(questions, counts, texts):
        values[split].append(_tofu_record(split, record, [next(scores) for _ in range(count)], text))
    return values


def _tofu_record(split, record, scores, text):
    """What is kept of one question. nll are means per token, in nats, EOS included; memorization leaves it out."""
    nll, *others = (-logps.double().mean().item() for logps, _ in scores)
    paraphrased = others.pop(0) if "paraphrased_answer" in record else nll
    right = scores[0][1][:-1].tolist() if math.isfinite(nll) else []
    return {"question": record["question"], "answer": record["answer"], "generated": text, "tokens": len(scores[0][0]),
            **tofu_values(split, nll, paraphrased, others),
            "rouge_l_recall": None if text is None else rouge_l(text, record["answer"], stem=True)[1],
            "exact_memorization": exact_memorization(right) if right else None,
            "extraction_strength": extraction_strength(right) if right else None}


def tofu_values(split, nll, paraphrased_nll, perturbed_nlls):
    """Probability and R of one question from its mean nlls; on real authors and world facts p is among the options."""
    nlls = {"nll": finite(nll), "paraphrased_nll": finite(paraphrased_nll), "perturbed_nll": list(map(finite, perturbed_nlls))}
    if None in (nlls["nll"], nlls["paraphrased_nll"], *nlls["perturbed_nll"]):
        return {**nlls, "probability": None, "truth_ratio": None}
    probability = math.exp(-nll)
    if split in ("real_authors", "world_facts"):  # a softmax, which does not divide 0 by 0 where every p underflows
        probability = torch.tensor([nll, *perturbed_nlls], dtype=torch.float64).neg().softmax(0)[0].item()
    return {**nlls, "probability": probability, "truth_ratio": truth_ratio(paraphrased_nll, perturbed_nlls)}


def mean(values, split, field, transform=float):
    """Mean over a split; raises Undefined unless every record has the value."""
    records = values.get(split, [])
    if not records or any(field not in record for record in records):
        raise Undefined("its file does not hold this")
    lost = sum(record[field] is None for record in records)
    if lost:
        raise Undefined(f"not finite (NaN), or no room in the model's context, for {lost} of {len(records)} "
                        f"{split.replace('_', ' ')} examples")
    return math.fsum(transform(record[field]) for record in records) / len(records)


def closeness(r):
    """min(R, 1/R): 1 where the truth ratio on the forget set says nothing."""
    return min(r, 1 / r) if r else 0.0


def preference(r):
    """max(0, 1 - 1/R): 1 where the truth is much preferred."""
    return max(0.0, 1 - 1 / r) if r else 0.0


def ratios(values):
    """All R of the forget set; raises Undefined unless each has a value."""
    mean(values, "forget", "truth_ratio")
    return [record["truth_ratio"] for record in values["forget"]]


def tofu_metrics(values, reference):
    """The column of one model: {row: number, or the reason why there is none}. Both arguments as from evaluate_tofu."""
    def compare(function):
        if reference is None:
            raise Undefined("needs a retain-only model: --reference MODEL, eval.json or official log")
        return function(ratios(values), ratios(reference))

    def utility():
        if any(isinstance(part, str) for part in parts.values()):
            raise Undefined("one of its nine parts has no value")
        return model_utility(parts.values())

    kinds = {"probability": ("probability", float), "ROUGE-L recall": ("rouge_l_recall", float)}
    parts = {f"{split.replace('_', ' ')} {name}": attempt(mean, values, split, *kind)
             for split in ("retain", "real_authors", "world_facts")
             for name, kind in (kinds | {"truth ratio": ("truth_ratio", preference)}).items()}
    forget = {f"forget {name}": attempt(mean, values, "forget", *kind)
              for name, kind in (kinds | {"truth ratio": ("truth_ratio", closeness)}).items()}
    memory = {f"{split} {field.replace('_', ' ')}": attempt(mean, values, split, field)
              for split in ("forget", "retain") for field in ("extraction_strength", "exact_memorization")}
    return {"forget quality (KS p)": attempt(compare, forget_quality),
            "forget quality (KS D)": attempt(compare, lambda a, b: ks_two_sample(a, b)[0]),
            "model utility": attempt(utility), **parts, **forget, **memory}


def attempt(function, *args):
    """The function's value, or the reason why there is none."""
    try:
        return function(*args)
    except Undefined as reason:
        return str(reason)


# MUSE

MUSE_FILES = {"verbmem/forget": "prompt", "knowmem/forget_qa": "question", "knowmem/forget_qa_icl": "question",
              "knowmem/retain_qa": "question", "knowmem/retain_qa_icl": "question",  # each with the field its records have
              "privleak/forget": None, "privleak/holdout": None}
AUC_RETRAIN = {"news": 0.4772, "books": 0.5393}  # published with the benchmark: forget against holdout, Min-40%


def evaluate_muse(model, tokenizer, folder, options):
    """Per-example values: {"verbmem", "knowmem_forget", "knowmem_retain", "privleak_forget", "privleak_holdout"}."""
    def continuations(prompts, max_new_tokens):
        encoded = encode_texts(tokenizer, prompts)
        new = spread(generate, model, encoded, tokenizer, max_new_tokens, options.batch_size)
        return decode(tokenizer, new, clean_up_tokenization_spaces=True)

    values = {}
    records = read_records(folder / "verbmem" / "forget")
    wanted = [ids[:128] for ids in encode_texts(tokenizer, [r["gt"] for r in records])]  # the official cut counts the BOS
    wanted = decode(tokenizer, wanted, clean_up_tokenization_spaces=True)
    texts = continuations([r["prompt"] for r in records], 128)
    values["verbmem"] = [_muse_record(r["prompt"], *pair) for r, *pair in zip(records, wanted, texts)]
    for split in ("forget", "retain"):
        shots = read_records(folder / "knowmem" / f"{split}_qa_icl")
        shots = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in shots)
        records = read_records(folder / "knowmem" / f"{split}_qa")
        texts = continuations([f"{shots}Question: {r['question']}\nAnswer: " for r in records], 32)
        texts = [text and re.split("\n\n|\nQuestion|Question:", text)[0] for text in texts]
        values[f"knowmem_{split}"] = [_muse_record(r["question"], r["answer"], text) for r, text in zip(records, texts)]
    for split in ("forget", "holdout"):
        examples = load_examples(folder / "privleak" / split, tokenizer, context_length(model))
        scores = spread(score_answers, model, examples, options.max_tokens)
        values[f"privleak_{split}"] = [{"min_40": finite(min_k(logps.tolist()))} for logps, _ in scores]
    return values


def _muse_record(prompt, answer, text):
    return {"prompt": prompt, "answer": answer, "generated": text,
            "rouge_l_f1": None if text is None else rouge_l(text, answer, stem=False)[2]}


def encode_texts(tokenizer, texts):
    """Token ids of plain texts, begun as in training and with their trailing blanks (KnowMem's prompts have one)."""
    examples = encode_answers(tokenizer, texts, [""] * len(texts), Prompt("{question}"))
    return [e.input_ids[:-1] for e in examples]  # without the EOS of the empty answer


def privleak_auc(values):
    """P(a holdout text's Min-40% score < a forget text's): above 1/2 where the forget set looks the less familiar."""
    for split in ("forget", "holdout"):
        mean(values, f"privleak_{split}", "min_40")
    return auroc(*([r["min_40"] for r in values[f"privleak_{split}"]] for split in ("forget", "holdout")))


def muse_metrics(values, auc_retrain):
    """The column of one model, in the official percent. auc_retrain: a number, None, or the reason why there is none."""
    def privleak():
        if isinstance(auc_retrain, str) or not auc_retrain:
            raise Undefined(auc_retrain or "needs the AUC of a model trained without the forget set: --reference MODEL, "
                            "eval.json or a number above 0")
        return 100 * (privleak_auc(values) - auc_retrain) / auc_retrain

    rows = {"VerbMem forget": "verbmem", "KnowMem forget": "knowmem_forget", "KnowMem retain": "knowmem_retain"}
    return {**{row: attempt(mean, values, split, "rouge_l_f1", lambda x: 100 * x) for row, split in rows.items()},
            "PrivLeak": attempt(privleak), "AUC forget/holdout": attempt(privleak_auc, values)}


# KL: how far from a reference on sequences that neither has seen (the study of mixed Markov chains).

@torch.inference_mode()
def evaluate_kl(model, tokenizer, files, options):
    """{file: [record]} with KL(reference || model) summed over each sequence's tokens, and their number."""
    reference, _ = load(options.reference, options)
    sizes = [len(m.get_output_embeddings().weight) for m in (model, reference)]
    if sizes[0] != sizes[1]:
        raise InputError(f"{options.reference}: {sizes[1]} logits a token, the model has {sizes[0]}; KL needs one vocabulary")
    values = {}
    for path in files:
        examples = load_examples(path, tokenizer, context_length(model))[:options.limit]
        values[relative(path)] = spread(_score_kl, model, examples, reference, options.max_tokens)
    return values


def _score_kl(model, examples, reference, max_tokens):
    records = [None] * len(examples)
    for batch in progress(length_batches([len(e.input_ids) for e in examples], max_tokens), "scoring"):
        ids, labels = (x.to(model.device) for x in collate([examples[i] for i in batch]))
        for i, kl, tokens in zip(batch, *(x.tolist() for x in answer_kl(model, reference, ids, labels))):
            records[i] = {"kl": finite(kl), "tokens": tokens}
    return records


def kl_metrics(values):
    """The column of one model: mean KL per token, in nats, a row a file."""
    def per_token(path):
        tokens = sum(record["tokens"] for record in values[path])
        return mean(values, path, "kl") * len(values[path]) / tokens
    return {f"KL per token, {path}": attempt(per_token, path) for path in values}


# Models, ranks, small change

def load(argument, options):
    """Model and tokenizer on this rank's device, in eval mode."""
    model, tokenizer = load_pretrained(argument, DTYPES[options.dtype])
    try:
        check_head(model)
    except ValueError as e:
        raise InputError(f"{argument}: {e}") from None
    return model.to(options.device).eval(), tokenizer


def check_lengths(model, examples):
    longest = max(examples, key=lambda e: len(e.input_ids))
    if len(longest.input_ids) > context_length(model):
        raise InputError(f"{longest.where}: {len(longest.input_ids)} tokens, but the model's context has only "
                         f"{context_length(model)}; take it out of the file or use another model")


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def spread(function, model, items, *args):
    """function(model, items, *args), each rank doing its share; every rank gets all results, in the order of items."""
    rank, world = rank_and_world()
    results = [None] * world
    results[rank] = function(model, items[rank::world], *args)
    if world > 1:
        dist.all_gather_object(results, results[rank])
    return [results[i % world][i // world] for i in range(len(items))]


def progress(batches, what):
    """A bar for what takes over a second; none when stderr is no terminal."""
    return tqdm(batches, desc=what, delay=1, leave=False, disable=rank_and_world()[0] > 0 or None)


def decode(tokenizer, sequences, **options):
    return [None if ids is None else tokenizer.decode(ids, skip_special_tokens=True, **options) for ids in sequences]


def finite(x):
    return x if math.isfinite(x) else None


# Saved results: {"model": name, "evaluations": {"tofu data/forget05.jsonl": {"settings", "run", "values"}, ...}}

LOG_FILES = {"forget": "eval_log_forget.json", "retain": "eval_log.json",
             "real_authors": "eval_real_author_wo_options.json", "world_facts": "eval_real_world_wo_options.json"}


def entries_of(arguments, key, settings, compute, options):
    """{model: evaluation `key`}: what its eval.json holds if that still fits, else measured now and saved.

    A file, or a folder that holds an eval.json and no model, is only read. compute(model, tokenizer) gives the values.
    """
    check_models(arguments, key, settings, options)  # all of them before the first is measured
    return {argument: saved_entry(argument, key, settings, options) or measure(argument, key, settings, compute, options)
            for argument in dict.fromkeys(arguments)}


def check_models(arguments, key, settings, options):
    """Find out before hours of work that a model to measure is not there, or that its results could not be saved."""
    for argument in arguments:
        if not saved_entry(argument, key, settings, options):
            load_skeleton(argument)
            check_writable(results_path(argument).parent)


def saved_entry(argument, key, settings, options):
    """The evaluation that need not be made, or None."""
    path = Path(argument)
    if path.is_file():
        return read_entry(path, key)
    if (path / "eval.json").is_file() and not (path / "config.json").is_file():
        return read_entry(path / "eval.json", key)
    path = results_path(argument)
    entry = read_json(path)["evaluations"].get(key) if path.exists() else None
    fits = isinstance(entry, dict) and entry.get("settings") == {**settings, "weights": fingerprint(Path(argument))}
    return read_entry(path, key) if fits and not options.force else None


def results_path(argument):
    """The eval.json of a model."""
    path = Path(argument)
    return (path if path.is_dir() else Path("runs", argument.replace("/", "--"))) / "eval.json"


def measure(argument, key, settings, compute, options):
    """Evaluate one model and save the result."""
    started, settings = time.time(), {**settings, "weights": fingerprint(Path(argument))}
    values = compute(*load(argument, options))
    run = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0],
           "device": options.device.type, "ranks": rank_and_world()[1], "batch_size": options.batch_size,
           "max_tokens": options.max_tokens, "seconds": round(time.time() - started, 1)}
    entry = {"settings": settings, "run": run, "values": values}
    if rank_and_world()[0] == 0:
        save_entry(results_path(argument), argument, key, entry)
    if dist.is_initialized():
        dist.barrier()
    return entry


def save_entry(home, argument, key, entry):
    """Put one evaluation into an eval.json; the old file stays until the new one is whole."""
    home.parent.mkdir(parents=True, exist_ok=True)
    saved = read_json(home) if home.exists() else {"model": argument, "evaluations": {}}
    saved["evaluations"].pop(key, None)  # the newest stands last
    saved["evaluations"][key] = entry
    beside = home.with_name(f".eval.json.{os.getpid()}")
    beside.write_text(json.dumps(saved, indent=1, allow_nan=False) + "\n")
    os.replace(beside, home)


def read_entry(path, key):
    """One evaluation from a file of any known kind. `key` may be only a mode (tofu), if the file has one of that mode."""
    saved, mode = read_json(path), key.split()[0]
    if "evaluations" in saved:
        found = [k for k in saved["evaluations"] if k == key or key == mode and k.split(" ")[0] == mode]
        if len(found) != 1:
            raise InputError(f"{path}: holds {', '.join(saved['evaluations']) or 'nothing'}; asked for {key}"
                             + "; choose one with --forget" * (len(found) > 1))
        entry = saved["evaluations"][found[0]]
    elif mode == "tofu":
        entry = {"settings": None, "values": official_values(path, saved)}
    else:
        raise InputError(f"{path}: an official TOFU log has no {mode} results")
    try:
        read = {"tofu": lambda v: tofu_metrics(v, v), "muse": lambda v: muse_metrics(v, None), "kl": kl_metrics}
        read[mode](entry["values"])
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise InputError(f"{path}: its {mode} values are not those that eval.py writes ({type(e).__name__}: {e})") from None
    return entry


def official_values(path, log):
    """Our per-example values from TOFU's eval_log_aggregated.json or OpenUnlearning's TOFU_EVAL.json."""
    try:
        if "forget_truth_ratio" in log:  # OpenUnlearning keeps 1/R
            scores = log["forget_truth_ratio"]["value_by_index"]
            scores = [score["score"] for score in scores.values()]
            return {"forget": [{"truth_ratio": None if math.isnan(x) else 1 / x if x else math.inf} for x in scores]}
        values = {}
        for split, name in LOG_FILES.items():
            fields = ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall")
            # merged from several GPUs they are keyed by index, from one GPU they are lists
            columns = [[x[k] for k in sorted(x, key=int)] if isinstance(x, dict) else x for x in map(log[name].get, fields)]
            values[split] = [{**tofu_values(split, *nlls), "rouge_l_recall": recall} for *nlls, recall in zip(*columns)]
        return values
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(f"{path}: not an eval.json, an eval_log_aggregated.json of TOFU or a TOFU_EVAL.json of "
                         f"OpenUnlearning ({type(e).__name__}: {e})") from None


def read_json(path):
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read as JSON: {e}") from None
    ours = path.name == "eval.json" or isinstance(value, dict) and "evaluations" in value
    if not isinstance(value, dict) or ours and not isinstance(value.get("evaluations"), dict):
        raise InputError(f"{path}: not an evaluation written by eval.py; move it away")
    return value


def fingerprint(folder):
    """Name, size and time of change of what decides a model's answers; empty for a hub name."""
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".json", ".jinja", ".model")
             and p.name not in ("eval.json", "args.json")] if folder.is_dir() else []
    return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in files}


def relative(path):
    """A data path as a key that is the same wherever the project lies."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


# The table

def format_table(columns, markdown):
    """{model: {row: number or reason}} -> text: a row a metric, a column a model, a footnote for each reason."""
    notes = []
    lines = [["", *columns]]
    for row in next(iter(columns.values())):
        cells = []
        for metrics in columns.values():
            value = metrics.get(row, "not measured")
            if isinstance(value, str) and value not in notes:
                notes.append(value)
            cells.append(f"- [{notes.index(value) + 1}]" if isinstance(value, str) else format_number(row, value))
        lines.append([row, *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    edge = "|" if markdown else ""
    texts = [f"{edge} " * markdown + f" {edge} ".join(
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]) + f" {edge}" * markdown
        for line in lines]
    if markdown:
        texts.insert(1, "|" + "|".join(["---", *["---:"] * len(columns)]) + "|")
    return "\n".join([*texts, *[""] * bool(notes), *(f"[{i}] {note}" + "  " * markdown for i, note in enumerate(notes, 1))])


def format_number(row, value):
    if row.startswith(("VerbMem", "KnowMem", "PrivLeak")):
        return f"{value:.2f}"
    return f"{value:.6e}" if value < 1e-3 and row.endswith("p)") else f"{value:.6f}"


def labels(arguments):
    """Short column titles, unless two would be the same."""
    names = [(p.parent.name or str(p)) if p.name == "eval.json" else p.stem if p.is_file() else p.name
             for p in map(Path, arguments)]
    return names if len(set(names)) == len(names) else list(arguments)


# The three modes: from arguments to columns

def tofu_columns(options):
    """{model: metrics} for --forget; without it, of files only."""
    key, settings, compute = "tofu", {}, None
    arguments = [*[options.reference] * bool(options.reference), *options.models]
    if options.forget:
        files = tofu_files(options.forget)
        for path in files.values():
            tofu_records(path, options.limit)
        key = f"tofu {relative(find(options.forget))}"
        settings = {**vars_of(options, "template system date limit max_new_tokens dtype"), "data": digests(files.values())}
        compute = lambda model, tokenizer: evaluate_tofu(model, tokenizer, files, options)
        if not options.reference and find(options.forget).resolve().parent == ROOT / "data":
            builtin = target, options.reference = builtin_models(find(options.forget))
            check_models([m for m in options.models if m not in builtin], key, settings, options)
            make_builtin(*builtin)
            arguments = [*builtin, *arguments]
    elif other := [argument for argument in arguments if not Path(argument).is_file()]:
        raise InputError(f"{other[0]}: no saved results; to evaluate a model, --forget, --muse or --kl is needed: it says on "
                         "what, for example --forget data/forget05")
    entries = entries_of(arguments, key, settings, compute, options)
    reference = entries[options.reference]["values"] if options.reference else None
    return {name: tofu_metrics(entry["values"], reference) for name, entry in zip(labels(entries), entries.values())}


def muse_columns(options):
    folder = Path(options.muse)
    if not (folder / "verbmem").is_dir():
        raise InputError(f"{folder}: no MUSE folder: verbmem, knowmem and privleak are expected in it; "
                         "the real ones: python data/download.py")
    auc, arguments = AUC_RETRAIN.get(folder.resolve().name), list(options.models)
    try:
        auc = float(options.reference or "")
    except ValueError:
        arguments = [*arguments, *[options.reference] * bool(options.reference)]
    if auc is not None and not 0 < auc <= 1:
        raise InputError(f"--reference {options.reference}: an AUC is above 0 and at most 1")
    files = [find(folder / name) for name in MUSE_FILES]
    for path, kind in zip(files, MUSE_FILES.values()):
        read_records(path, kind)
    settings = {**vars_of(options, "dtype"), "data": digests(files)}
    compute = lambda model, tokenizer: evaluate_muse(model, tokenizer, folder, options)
    entries = entries_of(arguments, f"muse {relative(folder)}", settings, compute, options)
    if options.reference in entries:
        auc = attempt(privleak_auc, entries[options.reference]["values"])
    return {name: muse_metrics(entry["values"], auc) for name, entry in zip(labels(entries), entries.values())}


def kl_columns(options):
    if not options.reference:
        raise InputError("--kl needs --reference: the model to compare with")
    files = [find(path) for path in options.kl]
    for path in files:
        read_records(path)
    load_skeleton(options.reference)
    settings = {**vars_of(options, "limit dtype"), "data": digests(files), "reference": fingerprint(Path(options.reference))}
    key = " ".join(["kl", options.reference, *map(relative, files)])
    compute = lambda model, tokenizer: evaluate_kl(model, tokenizer, files, options)
    entries = entries_of(options.models, key, settings, compute, options)
    return {name: kl_metrics(entry["values"]) for name, entry in zip(labels(entries), entries.values())}


def builtin_models(forget):
    """runs/target and the retain-only model that belongs to a built-in forget set."""
    percent = forget.stem.removeprefix("forget").removesuffix("_perturbed")
    if not percent.isdigit():
        raise InputError(f"{forget}: not one of the built-in forget sets; pass --reference")
    return str(Path("runs", "target")), str(Path("runs", f"retain{100 - int(percent)}"))


def make_builtin(target, reference):
    """Have train.py make the two, if they are missing."""
    for folder, data in ((target, "full"), (reference, Path(reference).name)):
        if not Path(folder, "config.json").exists() and not Path(folder, "eval.json").exists():
            if dist.is_initialized():
                raise InputError(f"{folder}: not made yet; run this once without torchrun, or python train.py --retain "
                                 f"data/{data} --output {folder}")
            print(f"Making {folder} first, once", file=sys.stderr)
            command = [sys.executable, ROOT / "train.py", "--retain", ROOT / "data" / data, "--output", folder]
            done = subprocess.run([*map(str, command), *["--resume"] * Path(folder).exists()], stdout=sys.stderr)
            if done.returncode:
                sys.exit(done.returncode)


def vars_of(options, names):
    return {name: getattr(options, name) for name in names.split()}


def digests(paths):
    return {relative(path): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths}


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    a = parser.add_argument
    a("models", nargs="+", metavar="MODEL", help="folder, hub name, eval.json or official log")
    a("--forget", help="TOFU: the forget set; its _perturbed version, retain_perturbed, real_authors_perturbed and "
      "world_facts_perturbed lie beside it")
    a("--muse", metavar="FOLDER", help="MUSE: a folder with verbmem, knowmem and privleak")
    a("--kl", nargs="+", metavar="FILE", help="files of sequences on which to measure KL(reference || model)")
    a("--reference", help="the model trained without the forget set: a model, an eval.json, TOFU's "
      "eval_log_aggregated.json, OpenUnlearning's TOFU_EVAL.json; for --muse also its AUC as a number (default: the "
      "published 0.4772 for a folder named news, 0.5393 for books)")
    a("--template", help="chat, llama2, plain, or a text with {question}; as in training")
    a("--system", help="system message of the chat; as in training")
    a("--date", help="date_string of the chat template; as in training")
    a("--limit", type=positive, default=300, help="first records of each TOFU split or --kl file; default 300 (official)")
    a("--max-new-tokens", type=positive, default=200, help="longest TOFU continuation; default 200, the official one")
    a("--dtype", choices=list(DTYPES), help="of the weights. Default: fp32 on a CPU, bf16 (the official one) on a GPU; only "
      "fp32 results are independent of the batch size")
    a("--batch-size", type=positive, default=64, help="prompts that are continued at once; default 64")
    a("--max-tokens", type=positive, help="padded tokens that are scored at once. Default: 16384 on a GPU, 4096 on a CPU")
    a("--markdown", action="store_true", help="print the table in Markdown")
    a("--force", action="store_true", help="evaluate again even if eval.json has the results")
    options = parser.parse_args(argv)
    if sum(map(bool, (options.forget, options.muse, options.kl))) > 1:
        raise InputError("--forget, --muse and --kl: give one of them")
    Prompt(options.template)  # refuses a bad one before any work
    options.models = list(dict.fromkeys(map(os.path.normpath, options.models)))
    options.reference = options.reference and os.path.normpath(options.reference)
    cuda = torch.cuda.is_available()
    options.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    options.dtype = options.dtype or ("bf16" if cuda else "fp32")
    options.max_tokens = options.max_tokens or (16384 if cuda else 4096)
    return options


def positive(text):
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 10**12):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0 (and at most 10^12)")
    return int(text)


def main(argv=None):
    transformers.logging.set_verbosity_error()
    try:
        options = parse_args(argv)
        if "RANK" in os.environ and not dist.is_initialized():
            if options.device.type == "cuda":
                torch.cuda.set_device(options.device)
            dist.init_process_group("nccl" if options.device.type == "cuda" else "gloo")
        columns = muse_columns(options) if options.muse else kl_columns(options) if options.kl else tofu_columns(options)
    except (InputError, OSError) as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    if rank_and_world()[0] == 0:
        print(format_table(columns, options.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
