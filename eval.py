"""TOFU's and MUSE's metrics for models side by side, by the definitions of the official codes.

    python eval.py MODEL --forget data/tofu/forget05 --reference RETRAINED TOFU
    python eval.py MODEL --muse data/muse/news                             MUSE
    python eval.py runs/a/eval.json runs/b/eval.json                       TOFU, measured before

MODEL is a folder or hub name of a causal model, an eval.json written here, TOFU's
eval_log_aggregated.json or OpenUnlearning's TOFU_EVAL.json. Every per-example value, the generated
texts included, is kept in an eval.json in the model's folder (for a hub name in runs/) and not
measured again. On the built-in data the target and the retrained model are shown unasked.

Reading order: metrics, scoring, generation, TOFU and the rows of its table, MUSE, does it come back
(--quantize, --samples), the flags, from arguments to the table.
"""

import data.support  # first: it sets what OpenMP reads while torch loads

import math
import os
import re
import sys
import zlib
from bisect import bisect_left, bisect_right
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import pad

from data.load import (Example, Prompt, collate, encode, encode_answers, encode_prompts, find,
                       front_of, length_batches, to_examples)
from data.support import distributed, evaluations, miniature
from data.support.data_files import muse_records, require_fit, tofu_files, tofu_records
from data.support.distributed import progress, spread
from data.support.errors import Parser, blame, nonempty, number, one_line_errors, require
from data.support.evaluations import Evaluation, check_reference
from data.support.models import (Finite, check_generation, context_length, decode,
                                 generation_batches, load_pretrained, rope_borders, vocabulary)
from data.support.porter import stem as porter_stem
from simnpo import answer_hidden, check_head, chunk_rows, head_logits


# Metrics: plain functions on lists or 1-d tensors of numbers.

def rouge_l(prediction, reference, stem):
    """ROUGE-L of two texts: (precision, recall, F1) of the longest common subsequence of words.

    Words are runs of [a-z0-9] in the lower-cased text; with `stem`, those of more than 3 letters
    are Porter-stemmed. (0, 0, 0) if either text has none. Equal to rouge-score 0.1.2, with which
    TOFU (stem) and MUSE (no stem) measure.
    """
    predicted, wanted = ([porter_stem(w) if stem and len(w) > 3 else w for w in words_of(text)]
                         for text in (prediction, reference))
    if not predicted or not wanted:
        return 0.0, 0.0, 0.0
    row = [0] * (len(wanted) + 1)  # row[j]: longest common subsequence with the first j wanted
    for word in predicted:
        before, row = row, [0]
        for j, other in enumerate(wanted):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
    common = row[-1]
    precision, recall = common / len(predicted), common / len(wanted)
    return precision, recall, 2 * precision * recall / (precision + recall) if common else 0.0


def words_of(text):
    return re.findall("[a-z0-9]+", text.lower())


def ks_two_sample(a, b):
    """Two-sided two-sample Kolmogorov-Smirnov test: (statistic D, exact p-value). Sizes may differ.

    p = P(D' >= D) when both samples come from one continuous distribution: the share of lattice
    paths from (0, 0) to (len(a), len(b)) that leave the band |i/len(a) - j/len(b)| < D (Hodges
    1958). Counted in whole numbers, so p is right to the last digit however small. Equals
    scipy.stats.ks_2samp(a, b, method="exact"). ValueError on NaN.
    """
    a, b = sorted(map(float, a)), sorted(map(float, b))
    m, n = len(a), len(b)
    if not m or not n or any(map(math.isnan, a + b)):
        raise ValueError("the KS test needs two samples without NaN")
    # D in units of 1/(m n)
    gap = max(abs(bisect_right(a, x) * n - bisect_right(b, x) * m) for x in a + b)
    inside = [1] + [0] * n  # inside[j]: how many paths lead to (i, j) within the band
    for i in range(m + 1):
        for j in range(n + 1):
            ways = inside[j] + (inside[j - 1] if j else 0)
            inside[j] = ways if abs(i * n - j * m) < gap else 0
    paths = math.comb(m + n, n)
    return gap / (m * n), (paths - inside[n]) / paths if gap else 1.0


def auroc(positives, negatives):
    """Area under the ROC curve: P(a positive's score > a negative's), ties counting half."""
    negatives = sorted(map(float, negatives))
    positives = [float(x) for x in positives]
    below = sum(bisect_left(negatives, x) + bisect_right(negatives, x) for x in positives)
    return below / (2 * len(positives) * len(negatives))


def truth_ratio(true_nll, false_nlls):
    """TOFU's R = exp(mean of the false answers' nll - nll of the true one, paraphrased where there
    is a paraphrase), nll per token, in nats.

    Above 1 where the model prefers the truth. The paper has the arithmetic mean of the false
    answers' probabilities and the inverse ratio; the official aggregate_eval_stat and
    OpenUnlearning use this one. At most exp(709): a float does not hold exp(710).
    """
    false_nlls = [float(x) for x in false_nlls]
    return math.exp(min(sum(false_nlls) / len(false_nlls) - float(true_nll), 709.0))


def forget_quality(r_model, r_reference):
    """TOFU's forget quality: KS p-value between the truth ratios R of a model and of the retrained
    model on the forget set. Near 1: they cannot be told apart; near 0: they can."""
    return ks_two_sample(r_model, r_reference)[1]


def harmonic_mean(parts):
    """n / sum of 1/x over n numbers; 0 where one of them is."""
    parts = [float(x) for x in parts]
    return 0.0 if 0 in parts else len(parts) / sum(1 / x for x in parts)


def model_utility(parts):
    """TOFU's model utility: the harmonic mean of {probability, ROUGE-L, truth ratio} x {retain,
    real authors, world facts}."""
    return harmonic_mean(parts)


def exact_memorization(right):
    """Share of an answer's tokens that the argmax gets right, given all before: a bool a token."""
    return sum(map(bool, right)) / len(right)


def extraction_strength(right):
    """1 - k/|y| for the smallest k such that all tokens from index k on are right; 0 if even the
    last is wrong (Carlini et al. 2021).

    OpenUnlearning's loop ends one early and gives 1/|y| there; a TOFU_EVAL.json's value is shown in
    a row of its own, extraction_strength.
    """
    wrong = [i for i, x in enumerate(right) if not x]
    return 1 - (wrong[-1] + 1) / len(right) if wrong else 1.0


def min_k(scores, share=0.4, least=0):
    """Minus the mean of the lowest 40% of a text's token scores, of `least` tokens at least: Min-K%
    (Shi et al. 2023) of log-probabilities, Min-K%++ (Zhang et al. 2024) of standardized ones."""
    lowest = sorted(map(float, scores))[:max(least, int(len(scores) * share))]
    return -sum(lowest) / len(lowest) if lowest else math.nan


def privleak(auc, auc_retrain):
    """MUSE's PrivLeak in percent: 0 where forget and holdout differ as for a retrained model."""
    if not auc_retrain:
        raise Undefined("the reference's AUC is 0")
    return 100 * (auc - auc_retrain) / auc_retrain


def leak_at_k(scores, k):
    """Expected best score of k draws without replacement from a question's sampled answers: the
    j-th lowest of n is the best of C(j-1, k-1) of the C(n, k) choices."""
    ordered = sorted(scores)
    ways = sum(math.comb(j - 1, k - 1) * s for j, s in enumerate(ordered, 1))
    return ways / math.comb(len(ordered), k)


# From a model's records to numbers, or to the reason why there is none

class Undefined(Exception):
    """A metric has no value; the message says why. It becomes a footnote of the table."""


def attempt(function, *args):
    """The function's value, or the reason why there is none."""
    try:
        return function(*args)
    except Undefined as reason:
        return str(reason)


def field_of(values, split, field):
    """A field of every record of a split; raises Undefined unless each has a value."""
    records = values.get(split, [])
    if split == "holdout" and not records:
        raise Undefined("needs a holdout beside the forget set (forget05: holdout05)")
    if not records or any(field not in record for record in records):
        raise Undefined("its file does not hold this")
    lost = [record for record in records if record[field] is None]
    if lost:
        why = "not finite (NaN), or no room in the model's context,"
        if field.startswith("rouge") and lost[0].get("generated") is not None:
            why = "ROUGE knows a-z and 0-9 only, and there is none in the answer"
        raise Undefined(f"{why} for {len(lost)} of {len(records)} {split} examples")
    return [record[field] for record in records]


def mean(values, split, field, transform=float):
    kept = field_of(values, split, field)
    return math.fsum(map(transform, kept)) / len(kept)


def needed(reference):
    if reference is None:
        raise Undefined("needs a retrained model: --reference MODEL, eval.json or official log")
    return reference


def finite(x):
    """None in place of what JSON cannot hold."""
    return x if x is not None and math.isfinite(x) else None


# Scoring: answers of all questions together, by length, padded right, logits at answer positions.

@torch.inference_mode()
def score_answers(model, examples, max_tokens):
    """(logps, right, standard) of each Example, in order, a number an answer token: its
    log-probability; whether it is the argmax; its log-probability standardized over the vocabulary,
    (log p - mu)/sigma with sigma^2 >= 1e-6 (Min-K%++)."""
    scores = [None] * len(examples)
    rows = chunk_rows(model)
    lengths = [len(e.input_ids) for e in examples]
    batches = length_batches(lengths, max_tokens, rope_borders(model))
    for batch in progress(batches, "scoring"):
        ids, labels = (x.to(model.device) for x in collate([examples[i] for i in batch]))
        hidden, targets = answer_hidden(model, ids, labels)
        parts = []
        for h, wanted in zip(hidden.split(rows), targets.split(rows)):
            every = head_logits(model, h).float().log_softmax(-1)  # each word's log-probability
            p = every.exp()
            # A suppressed word has p = 0 and log p = -inf; it adds nothing.
            mu, square = (p * every).nansum(-1), (p * every.square()).nansum(-1)
            logps = every.gather(1, wanted[:, None])[:, 0]
            standard = (logps - mu) / (square - mu.square()).clamp(min=1e-6).sqrt()
            parts.append((logps, every.argmax(-1) == wanted, standard))
        counts = [lengths[i] - examples[i].start for i in batch]
        columns = (torch.cat(part).cpu().split(counts) for part in zip(*parts))
        for i, score in zip(batch, zip(*columns)):
            scores[i] = score
    return scores


# Generation by transformers, in batches of prompts of like length.

@torch.inference_mode()
def generate(model, prompts, tokenizer, max_new_tokens, batch_size, ends=(), sample=False):
    """Greedy continuations of tokenized prompts (or sampled ones, at temperature 1 and uncut), in
    order: lists of new token ids without the end.

    `ends` are token ids that end a continuation beside the model's own and the EOS. What else the
    model's generation_config asks (a repetition penalty, suppressed tokens) holds. None where
    logits are not finite or the prompt leaves no room in the model's context.
    """
    how = dict(do_sample=False)
    if sample:  # from all words, also where the generation_config would cut some off (min_p)
        how = dict(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, typical_p=1.0,
                   epsilon_cutoff=0.0, eta_cutoff=0.0)
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    ends = {tokenizer.eos_token_id, *ends, *own} - {None}
    ends = sorted(end for end in ends if 0 <= end < vocabulary(model))
    room = [min(max_new_tokens, context_length(model) - len(prompt)) for prompt in prompts]
    results = [None] * len(prompts)
    for batch in progress(generation_batches(model, prompts, room, batch_size), "generating"):
        width = max(len(prompts[i]) for i in batch)
        rows = [[ends[0]] * (width - len(prompts[i])) + prompts[i] for i in batch]
        mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch]
        ids, mask = (torch.tensor(x, device=model.device) for x in (rows, mask))
        watch = Finite()
        # Prompts of a batch have equal room.
        new = model.generate(ids, attention_mask=mask, max_new_tokens=room[batch[0]], num_beams=1,
                             eos_token_id=ends, pad_token_id=ends[0], logits_processor=[watch],
                             tokenizer=tokenizer, return_dict_in_generate=False,
                             **how)[:, width:].tolist()
        for i, tokens, sound in zip(batch, new, torch.stack(watch, 1).tolist()):
            end = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
            results[i] = tokens[:end] if all(sound[:end + 1]) else None
    return results


# TOFU

def evaluate_tofu(model, tokenizer, data, options):
    """Per-example values of the splits: {split: [record]}. `data` as from tofu_records."""
    prompt = Prompt(options.template, options.system, options.date)
    asked = [(split, record, answers_of(split, record))
             for split, records in data.items() for record in records]
    every = [(record["question"], answer, record["where"])
             for _, record, answers in asked for answer in answers]
    questions, answers, where = zip(*every)
    examples = encode_answers(tokenizer, questions, answers, prompt, where)
    require_fit(examples, "the model's context of", context_length(model), vocabulary(model))
    scores = iter(spread(score_answers, model, examples, options.max_tokens))
    texts = [record["question"] for split, record, _ in asked if split != "holdout"]
    prompts = encode_prompts(tokenizer, texts, prompt)
    ends = {e.input_ids[-1] for e in examples}  # the EOS, or what ends a chat's turn
    new = spread(generate, model, prompts, tokenizer, options.max_new_tokens, options.batch_size,
                 ends)
    said = iter(zip(decode(tokenizer, new), map(tokenizer.decode, prompts)))
    values = {split: [] for split in data}
    for split, record, answers in asked:
        scored = [next(scores) for _ in answers]
        kept = {"question": record["question"], "answer": record["answer"]}
        if split in ("forget", "holdout"):
            kept |= attacks(record["answer"], *scored[0])
        if split != "holdout":
            kept |= tofu_record(split, record, scored, *next(said))
        values[split].append(kept)
    return values


def answers_of(split, record):
    """The answers whose probabilities are needed: the true one, its paraphrase, the false ones."""
    paraphrased = [record["paraphrased_answer"]] if "paraphrased_answer" in record else []
    false = record["perturbed_answer"] if split != "holdout" else []
    return [record["answer"], *paraphrased, *false]


def attacks(answer, logps, right, standard):
    """Membership scores of a true answer by OpenUnlearning's definitions, low where it was trained
    on: LOSS and zlib of all tokens, Min-K% and Min-K%++ without the end."""
    loss = -logps.double().mean().item()
    return {"loss": finite(loss), "zlib": finite(loss / len(zlib.compress(answer.encode()))),
            "min_k": finite(min_k(logps.tolist()[:-1], least=1)),
            "min_k_plus": finite(min_k(standard.tolist()[:-1], least=1))}


def tofu_record(split, record, scores, text, prompt):
    """What is kept of one question. nll are means per token, in nats, the end included;
    memorization leaves it out."""
    nll, *others = (-logps.double().mean().item() for logps, _, _ in scores)
    paraphrased = others.pop(0) if "paraphrased_answer" in record else nll
    right = scores[0][1][:-1].tolist() if math.isfinite(nll) else []
    return {"prompt": prompt, "generated": text, "tokens": len(scores[0][0]),
            **tofu_values(split, nll, paraphrased, others),
            "rouge_l_recall": rouge(text, record["answer"], stem=True)[1],
            "exact_memorization": exact_memorization(right) if right else None,
            "extraction_strength": extraction_strength(right) if right else None}


def rouge(text, answer, stem):
    """rouge_l, or Nones where there is no text, or no [a-z0-9] in the answer to compare with."""
    return rouge_l(text, answer, stem) if text is not None and words_of(answer) else (None,) * 3


def tofu_values(split, nll, paraphrased_nll, perturbed_nlls):
    """Probabilities and R of one question from its mean nlls."""
    nlls = {"nll": finite(nll), "paraphrased_nll": finite(paraphrased_nll),
            "perturbed_nll": list(map(finite, perturbed_nlls))}
    if None in (nlls["nll"], nlls["paraphrased_nll"], *nlls["perturbed_nll"]):
        return nlls | dict.fromkeys(["probability", "paraphrased_probability", "truth_ratio"])
    probability = math.exp(-nll)
    if split in ("real_authors", "world_facts"):  # p / (p + sum of the false answers' p)
        options = torch.tensor([nll, *perturbed_nlls], dtype=torch.float64)
        probability = options.neg().softmax(0)[0].item()  # exact even if every p underflows
    return {**nlls, "probability": probability,
            "paraphrased_probability": math.exp(-paraphrased_nll),
            "truth_ratio": truth_ratio(paraphrased_nll, perturbed_nlls)}


# The rows of TOFU's table: a function of the model's values and the reference's (None without one).

def mean_of(split, field, transform=float):
    """The row with the mean of a field over a split."""
    return lambda values, reference: mean(values, split, field, transform)


def closeness(r):
    """min(R, 1/R): 1 where the true and the false answers are equally likely."""
    return min(r, 1 / r) if r else 0.0


def preference(r):
    """max(0, 1 - 1/R): 1 where the truth is much preferred."""
    return max(0.0, 1 - 1 / r) if r else 0.0


def knowledge(r):
    """R/(1+R) = p/(p + geometric mean of the false answers' p): OpenUnlearning's prob_mean."""
    return r / (1 + r)


def of_truth_ratios(function):
    """The row of function(the model's R, the retrained model's R) on the forget set."""
    return lambda values, reference: function(field_of(values, "forget", "truth_ratio"),
                                              field_of(needed(reference), "forget", "truth_ratio"))


def utility(values, reference):
    return model_utility(row(values, reference) for row in UTILITY.values())


def memorization(values, reference):
    """OpenUnlearning's memorization score, which is 1 where nothing is memorized."""
    names = ("forget extraction strength", "forget exact memorization",
             "forget paraphrase probability", "forget knowledge score")
    return harmonic_mean(1 - TOFU_ROWS[name](values, reference) for name in names)


def forget_auc(field):
    """The row of P(a holdout question's score < a forget question's): 0 where every forget question
    is recognized as trained on, 0.5 where none is."""
    return lambda values, reference: auroc(field_of(values, "forget", field),
                                           field_of(values, "holdout", field))


def forget_privleak(values, reference):
    auc = forget_auc("min_k")
    return privleak(auc(values, None), auc(needed(reference), None))


UTILITY = {
    "retain probability": mean_of("retain", "probability"),
    "retain ROUGE-L recall": mean_of("retain", "rouge_l_recall"),
    "retain truth ratio": mean_of("retain", "truth_ratio", preference),
    "real authors probability": mean_of("real_authors", "probability"),
    "real authors ROUGE-L recall": mean_of("real_authors", "rouge_l_recall"),
    "real authors truth ratio": mean_of("real_authors", "truth_ratio", preference),
    "world facts probability": mean_of("world_facts", "probability"),
    "world facts ROUGE-L recall": mean_of("world_facts", "rouge_l_recall"),
    "world facts truth ratio": mean_of("world_facts", "truth_ratio", preference),
}
TOFU_ROWS = {
    "forget quality (KS p)": of_truth_ratios(forget_quality),
    "forget quality (KS D)": of_truth_ratios(lambda a, b: ks_two_sample(a, b)[0]),
    "model utility": utility,
    **UTILITY,
    "forget probability": mean_of("forget", "probability"),
    "forget paraphrase probability": mean_of("forget", "paraphrased_probability"),
    "forget ROUGE-L recall": mean_of("forget", "rouge_l_recall"),
    "forget truth ratio": mean_of("forget", "truth_ratio", closeness),
    "forget knowledge score": mean_of("forget", "truth_ratio", knowledge),
    "retain knowledge score": mean_of("retain", "truth_ratio", knowledge),
    "forget extraction strength": mean_of("forget", "extraction_strength"),
    "forget exact memorization": mean_of("forget", "exact_memorization"),
    "retain extraction strength": mean_of("retain", "extraction_strength"),
    "retain exact memorization": mean_of("retain", "exact_memorization"),
    "memorization score": memorization,
    "forget PrivLeak": forget_privleak,
    "forget/holdout AUC": forget_auc("min_k"),
    "forget/holdout AUC, Min-K++": forget_auc("min_k_plus"),
    "forget/holdout AUC, LOSS": forget_auc("loss"),
    "forget/holdout AUC, zlib": forget_auc("zlib"),
}


def tofu_metrics(values, reference):
    """The column of one model: {row: number, or the reason why there is none}."""
    rows = dict(TOFU_ROWS)
    if values.get("sampled"):
        drawn = len(values["sampled"][0]["texts"])
        for k in [*(k for k in (1, 4, 16, 64, 256) if k < drawn), drawn]:
            rows[f"forget leak@{k}"] = mean_of("sampled", "recalls", partial(leak_at_k, k=k))
    return {name: attempt(row, values, reference) for name, row in rows.items()}


# MUSE

AUC_RETRAIN = {"news": 0.4772, "books": 0.5393}  # published: forget against holdout, Min-40%


def evaluate_muse(model, tokenizer, data, options):
    """Per-example values: {"verbmem", "knowmem_forget", "knowmem_retain", "privleak_forget",
    "privleak_holdout"}. `data` as from muse_records."""
    def continuations(prompts, max_new_tokens):
        new = spread(generate, model, encode_texts(tokenizer, prompts), tokenizer, max_new_tokens,
                     options.batch_size)
        return decode(tokenizer, new, clean_up_tokenization_spaces=True)

    def score(examples):
        """As score_answers; where a text is longer than the context, NaN."""
        room, nan = context_length(model), torch.tensor([math.nan])
        lost = nan, torch.tensor([False]), nan
        fitting = [e for e in examples if len(e.input_ids) <= room]
        scores = iter(spread(score_answers, model, fitting, options.max_tokens))
        return [next(scores) if len(e.input_ids) <= room else lost for e in examples]

    values = {}
    records = data["verbmem/forget"]
    wanted = encode_texts(tokenizer, [r["gt"] for r in records])
    wanted = decode(tokenizer, [ids[:128] for ids in wanted],  # the official cut counts the BOS
                    clean_up_tokenization_spaces=True)
    texts = continuations([r["prompt"] for r in records], 128)
    strengths = [extraction_strength(right.tolist()) if logps.isfinite().all() else None
                 for logps, right, _ in score(recitals(tokenizer, records))]
    values["verbmem"] = [
        muse_record(r["prompt"], answer, text) | {"extraction_strength": strength}
        for r, answer, text, strength in zip(records, wanted, texts, strengths)]
    for split in ("forget", "retain"):
        shots = data[f"knowmem/{split}_qa_icl"]
        shots = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in shots)
        records = data[f"knowmem/{split}_qa"]
        texts = continuations([f"{shots}Question: {r['question']}\nAnswer: " for r in records], 32)
        texts = [text and re.split("\n\n|\nQuestion|Question:", text)[0] for text in texts]
        values[f"knowmem_{split}"] = [muse_record(r["question"], r["answer"], text)
                                      for r, text in zip(records, texts)]
    for split in ("forget", "holdout"):
        never_cut = 2**31
        examples = to_examples(data[f"privleak/{split}"], tokenizer, never_cut, Prompt(),
                               vocabulary(model))
        values[f"privleak_{split}"] = [{"min_40": finite(min_k(logps.tolist()))}
                                       for logps, _, _ in score(examples)]
    return values


def recitals(tokenizer, records):
    """VerbMem's texts as Examples whose answer is how they go on, without an end."""
    prompts = [r["prompt"] for r in records]
    texts = [r["gt"] if r["prompt"][-1:].isspace() or r["gt"][:1].isspace() else f" {r['gt']}"
             for r in records]
    examples = encode_answers(tokenizer, prompts, texts, Prompt("{question}"))
    return [Example(e.input_ids[:-1], e.start, e.where) for e in examples]


def muse_record(prompt, answer, text):
    return {"prompt": prompt, "answer": answer, "generated": text,
            "rouge_l_f1": rouge(text, answer, stem=False)[2]}


def encode_texts(tokenizer, texts):
    """Token ids of plain texts with training's BOS, trailing blanks kept (KnowMem's prompts)."""
    return encode(tokenizer, texts, front_of(tokenizer))


def privleak_auc(values):
    """P(a holdout text's Min-40% score < a forget text's)."""
    return auroc(field_of(values, "privleak_forget", "min_40"),
                 field_of(values, "privleak_holdout", "min_40"))


def muse_privleak(values, auc_retrain):
    if not isinstance(auc_retrain, float):
        raise Undefined(auc_retrain or "needs the AUC of a model trained without the forget set: "
                        "--reference MODEL, eval.json or a number above 0")
    return privleak(privleak_auc(values), auc_retrain)


# A row is a function of the model's values and the retrained model's AUC, or why there is none.
MUSE_ROWS = {
    "VerbMem forget": mean_of("verbmem", "rouge_l_f1", lambda x: 100 * x),
    "KnowMem forget": mean_of("knowmem_forget", "rouge_l_f1", lambda x: 100 * x),
    "KnowMem retain": mean_of("knowmem_retain", "rouge_l_f1", lambda x: 100 * x),
    "PrivLeak": muse_privleak,
    "AUC forget/holdout": lambda values, auc_retrain: privleak_auc(values),
    "extraction strength": mean_of("verbmem", "extraction_strength"),
}


def muse_metrics(values, auc_retrain):
    """The column of one model, VerbMem, KnowMem and PrivLeak in the official percent."""
    return {name: attempt(row, values, auc_retrain) for name, row in MUSE_ROWS.items()}


# Does it come back? A model that forgot by small changes may remember once its weights are rounded
# (Zhang et al., "Catastrophic failure of LLM unlearning via quantization", ICLR 2025), and what is
# not the greedy answer may still be drawn.

@torch.no_grad()
def quantize(model, bits):
    """Round every matrix but embeddings and head to the nearest of 2^bits - 1 levels, which are
    evenly spaced up to the largest absolute value of each block of 64 weights. Not the format of
    any particular library."""
    top = 2 ** (bits - 1) - 1  # levels from -top to top
    for module in model.modules():
        kept = isinstance(module, nn.Embedding) or module is model.get_output_embeddings()
        for p in module.parameters(recurse=False):
            if p.ndim >= 2 and not kept:
                blocks = pad(p.float().flatten(), (0, -p.numel() % 64)).view(-1, 64)
                spacing = (blocks.abs().amax(1, keepdim=True) / top).clamp(min=1e-30)
                rounded = (blocks / spacing).round() * spacing
                p.copy_(rounded.flatten()[:p.numel()].view_as(p))


def evaluate_samples(model, tokenizer, records, options):
    """{"sampled": [record]}: `options.samples` continuations of each question with their ROUGE-L
    recalls. The random seed is fixed, but texts depend on batch size and number of processes."""
    prompt = Prompt(options.template, options.system, options.date)
    questions, answers = ([r[name] for r in records] for name in ("question", "answer"))
    ends = {e.input_ids[-1] for e in encode_answers(tokenizer, questions, answers, prompt)}
    prompts = [ids for ids in encode_prompts(tokenizer, questions, prompt)
               for _ in range(options.samples)]
    torch.manual_seed(distributed.rank())
    new = spread(generate, model, prompts, tokenizer, options.max_new_tokens, options.batch_size,
                 ends, True)
    texts, sampled = decode(tokenizer, new), []
    for i, (question, answer) in enumerate(zip(questions, answers)):
        drawn = texts[i * options.samples:(i + 1) * options.samples]
        recalls = [rouge(text, answer, stem=True)[1] for text in drawn]
        sampled.append({"question": question, "answer": answer, "texts": drawn,
                        "recalls": None if None in recalls else recalls})
    return {"sampled": sampled}


# The flags

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def arguments(argv):
    """Parse and check the flags; return them with every default filled in."""
    parser, positive = Parser(__doc__), number(int, low=1)
    a = parser.add_argument
    a("models", nargs="+", type=nonempty, metavar="MODEL", help="folder, hub name, eval.json or "
      "official log")
    a("--forget", type=nonempty, help="TOFU: the forget set; its _perturbed version, "
      "retain_perturbed, real_authors_perturbed and world_facts_perturbed lie beside it")
    a("--muse", type=nonempty, metavar="FOLDER", help="MUSE: a folder with verbmem, knowmem and "
      "privleak")
    a("--reference", type=nonempty, help="the model trained without the forget set: a model, an "
      "eval.json or an official log; for --muse also its AUC as a number (default: the published "
      "one for a folder named news or books)")
    a("--template", help="chat, llama2, plain, or a text with {question}; as in training")
    a("--system", help="system message of the chat; as in training")
    a("--date", help="date of the chat template; as in training")
    a("--limit", type=positive, default=300, help="first records of each TOFU split; default 300, "
      "as in official runs (OpenUnlearning: all)")
    a("--max-new-tokens", type=positive, default=200, help="longest TOFU continuation; default 200")
    a("--quantize", type=int, nargs="+", default=[], choices=range(2, 9), metavar="BITS",
      help="evaluate each model with its weights rounded, too: for example 8 4")
    a("--samples", type=positive, metavar="N", help="also sample N answers to each forget question "
      "(TOFU)")
    a("--dtype", choices=list(DTYPES), help="of the weights. Default: fp32 on a CPU, bf16 "
      "(official) on a GPU; only fp32 results are independent of the batch size")
    a("--batch-size", type=positive, default=64, help="prompts continued at once; default 64")
    a("--max-tokens", type=positive, help="padded tokens scored at once. Default: 16384 on a GPU, "
      "4096 on a CPU")
    a("--device", default=distributed.DEVICE, help="default: a GPU if there is one, else cpu")
    a("--markdown", action="store_true", help="print the table in Markdown")
    a("--force", action="store_true", help="evaluate again even if eval.json has the results")
    options = parser.parse_args(argv)
    require(not (options.forget and options.muse), "--forget and --muse: give one of them")
    require(options.forget or not options.samples, "--samples needs --forget")
    again = options.samples or options.quantize
    require(not (again and all(map(os.path.isfile, options.models))),
            "--samples and --quantize need a model to run; these are files of results")
    Prompt(options.template, options.system, options.date)  # refuses a bad one before any work
    options.models = list(dict.fromkeys(map(one_spelling, options.models)))
    options.reference = options.reference and one_spelling(options.reference)
    cuda = options.device.startswith("cuda")
    options.dtype = options.dtype or ("bf16" if cuda else "fp32")
    options.max_tokens = options.max_tokens or (16384 if cuda else 4096)
    return options


def one_spelling(path):
    """A path that exists without ./ and a trailing /; other names (of the hub) as they are."""
    return str(Path(path)) if os.path.exists(path) else path


# From arguments to the table

@one_line_errors
def main(argv=None):
    """Evaluate the models that have no results yet; print the table. Returns the exit status."""
    options = arguments(argv)
    distributed.start(options.device)
    distributed.agree("eval.py", vars(options) | {"device": None})  # each may have its own
    study = muse if options.muse else tofu if options.forget else saved
    entries, column = study(options)
    columns = [column(entry) for entry in entries.values()]
    evaluations.show(dict(zip(evaluations.titles(entries), columns)), entries, options.markdown)
    return 0


def load(argument, options, bits=None):
    """Model and tokenizer on this rank's device, in eval mode, once they are known to be sound; its
    weights rounded to `bits`."""
    with distributed.together():
        model, tokenizer = load_pretrained(argument, DTYPES[options.dtype])
        model.to(options.device).eval()
        with blame(argument):
            check_head(model)
        check_generation(argument, model)
    if bits:
        quantize(model, bits)
    return model, tokenizer


def collect(arguments, evaluation, options):
    """{column: evaluation}: of each model, then of each with its weights rounded."""
    entries = evaluations.collect(arguments, evaluation(None), options)
    for bits in options.quantize:
        models = [a for a in arguments if not Path(a).is_file()]
        found = evaluations.collect(models, evaluation(bits), options)
        entries |= {a + suffix(bits): entry for a, entry in found.items()}
    return entries


def suffix(bits):
    return f"-{bits}bit" if bits else ""


def saved(options):
    """{column: evaluation} of files of results, and the function that makes a column of one."""
    arguments = [*filter(None, [options.reference]), *options.models]
    evaluation = Evaluation("tofu", {}, None, complete_tofu)
    entries = evaluations.collect(arguments, evaluation, options)
    return entries, columns_beside(entries.get(options.reference), options.reference)


def tofu(options):
    """{column: evaluation} for --forget, and the function that makes a column of one."""
    forget, reference = find(options.forget), options.reference
    data = {split: tofu_records(split, path, options.limit)
            for split, path in tofu_files(forget).items()}
    names = "template system date limit max_new_tokens dtype"
    settings, place = evaluations.settings(options, names, data), evaluations.relative(forget)

    def evaluation(bits):
        return Evaluation(
            f"tofu{suffix(bits)} {place}", settings | {"bits": bits},
            lambda model: evaluate_tofu(*load(model, options, bits), data, options), complete_tofu)

    shown = [*filter(None, [reference]), *options.models]
    if not reference and miniature.is_builtin(forget):  # make what to compare with
        made = target, reference = miniature.target_and_retrained(forget)
        evaluations.check([m for m in shown if m not in made], evaluation(None), options)
        with distributed.together():
            for folder in made:
                miniature.make(Path(folder))
        shown = [target, reference, *options.models]
    if known := reference and evaluations.saved_entry(reference, evaluation(None), options):
        # Before anything is run: the data's records stand in for a model's.
        check_reference({"values": data}, known, reference)
    entries = collect(shown, evaluation, options)
    if options.samples:
        drawn = Evaluation(
            f"samples {place}", settings | {"samples": options.samples},
            lambda model: evaluate_samples(*load(model, options), data["forget"], options),
            complete_tofu)
        models = [m for m in shown if not Path(m).is_file()]
        for model, entry in evaluations.collect(models, drawn, options).items():
            values = entries[model]["values"] | entry["values"]
            entries[model] = {**entries[model], "values": values}
    return entries, columns_beside(entries.get(reference), reference)


def columns_beside(reference, name):
    """The function that makes a column of an evaluation: its metrics, compared with a reference."""
    def column(entry):
        if reference:
            check_reference(entry, reference, name)
        found = tofu_metrics(entry["values"], reference and reference["values"])
        held = entry.get("rows", {})  # what an official file says, where its values say nothing
        return found | {row: x for row, x in held.items() if not isinstance(found.get(row), float)}
    return column


def complete_tofu(values):
    """Values with probabilities and truth ratios computed anew from their nlls (an official log has
    nothing else). Raises where they are damaged."""
    for split, records in values.items():
        for r in (r for r in records if "nll" in r):
            r |= tofu_values(split, r["nll"], r["paraphrased_nll"], r["perturbed_nll"])
    tofu_metrics(values, values)  # a KeyError or TypeError, if a record is damaged
    return values


def muse(options):
    """{column: evaluation} for --muse, and the function that makes a column of one."""
    folder, models = Path(options.muse), list(options.models)
    data = muse_records(folder)
    auc = AUC_RETRAIN.get(folder.resolve().name)
    try:
        auc = float(options.reference or "")
    except ValueError:
        models += filter(None, [options.reference])
    require(auc is None or 0 < auc <= 1,
            f"--reference {options.reference}: an AUC is above 0 and at most 1")
    settings = evaluations.settings(options, "dtype", data)

    def evaluation(bits):
        return Evaluation(
            f"muse{suffix(bits)} {evaluations.relative(folder)}", settings | {"bits": bits},
            lambda model: evaluate_muse(*load(model, options, bits), data, options),
            lambda values: muse_metrics(values, None) and values)

    entries = collect(models, evaluation, options)
    if options.reference in entries:
        auc = attempt(privleak_auc, entries[options.reference]["values"])
    return entries, lambda entry: muse_metrics(entry["values"], auc)


if __name__ == "__main__":
    sys.exit(main())
