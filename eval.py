"""TOFU's and MUSE's metrics for models side by side, by the definitions of the official codes.

    python eval.py MODEL --forget data/tofu/forget05 --reference RETRAINED TOFU
    python eval.py MODEL --muse data/muse/news                             MUSE
    python eval.py runs/a/eval.json runs/b/eval.json                       TOFU, measured before

MODEL is a folder or hub name of a causal model, an eval.json written here, TOFU's
eval_log_aggregated.json or OpenUnlearning's TOFU_EVAL.json. Every per-example value, the generated
texts included, is kept in an eval.json in the model's folder, or in runs/ (hub names, read-only
folders), and not measured again. Built-in data shows target and retrained model, too.
"""

import data.support  # first: it sets what OpenMP reads while torch loads

import contextlib
import math
import re
import statistics
import sys
import zlib
from bisect import bisect_left, bisect_right
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from data.load import (Example, Prompt, collate, encode, encode_answers, encode_prompts, front_of,
                       length_batches, to_examples)
from data import make_mini_models as miniature
from data.support import distributed, evaluations
from data.support.data_files import find, muse_records, require_fit, tofu_records
from data.support.distributed import progress, spread
from data.support.errors import Parser, blame, nonempty, number, one_line_errors, require
from data.support.models import (Finite, check_generation, context_length, decode,
                                 generation_batches, load_pretrained, load_skeleton, rope_borders,
                                 vocabulary)
from data.support.porter import stem as porter_stem
from simnpo import answer_hidden, check_head, chunk_rows, head_logits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORD = re.compile("[a-z0-9]+")  # ROUGE's, of lower-cased text
AUC_RETRAIN = {"news": 0.4772, "books": 0.5393}  # published for MUSE: forget against holdout
# Samples are of all words at temperature 1, also where the generation_config would cut some off.
UNCUT = dict(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, typical_p=1.0, epsilon_cutoff=0.0,
             eta_cutoff=0.0)


# Metrics: plain functions on lists or 1-d tensors of numbers.


def rouge_l(prediction, reference, stem):
    """ROUGE-L of two texts: (precision, recall, F1) of the longest common subsequence of words.

    Words are runs of [a-z0-9] in the lower-cased text; with `stem`, those of more than 3 letters
    are Porter-stemmed. (0, 0, 0) if either text has none. Equal to rouge-score 0.1.2, with which
    TOFU (stem) and MUSE (no stem) measure.
    """
    predicted, wanted = ([porter_stem(w) if stem and len(w) > 3 else w
                          for w in WORD.findall(text.lower())] for text in (prediction, reference))
    row = [0] * (len(wanted) + 1)  # row[j]: longest common subsequence with the first j wanted
    for word in predicted:
        before, row = row, [0]
        for j, other in enumerate(wanted):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
    if not row[-1]:
        return 0.0, 0.0, 0.0
    precision, recall = row[-1] / len(predicted), row[-1] / len(wanted)
    return precision, recall, 2 * precision * recall / (precision + recall)


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
    """TOFU's R = exp(mean nll of the false answers - nll of the true answer's paraphrase, or of the
    true answer where there is none), nll per token, in nats.

    Above 1 where the model prefers the truth. The paper has the arithmetic mean of the false
    answers' probabilities and the inverse ratio; the official aggregate_eval_stat and
    OpenUnlearning use this one. Between exp(-709) and exp(709), as a float holds no exp(710).
    """
    false_nlls = [float(x) for x in false_nlls]
    return math.exp(max(-709.0, min(sum(false_nlls) / len(false_nlls) - float(true_nll), 709.0)))


def forget_quality(r_model, r_retrained):
    """TOFU's forget quality: KS p-value between the truth ratios R of a model and of the retrained
    model on the forget set. Near 1: they cannot be told apart; near 0: they can."""
    return ks_two_sample(r_model, r_retrained)[1]


def model_utility(parts):
    """TOFU's model utility: the harmonic mean of {probability, ROUGE-L, truth ratio} x {retain,
    real authors, world facts}; 0 where one of them is."""
    return statistics.harmonic_mean(map(float, parts))


def extraction_strength(right):
    """1 - k/|y| for the smallest k such that the argmax gets every token from index k on; 0 if not
    even the last (Carlini et al. 2021), where OpenUnlearning's loop gives 1/|y|."""
    wrong = [i for i, x in enumerate(right) if not x]
    return 1 - (wrong[-1] + 1) / len(right) if wrong else 1.0


def min_k(scores, least=0):
    """Minus the mean of the lowest 40% of a text's token scores, of `least` tokens at least: Min-K%
    (Shi et al. 2023) of log-probabilities, Min-K%++ (Zhang et al. 2024) of standardized ones."""
    lowest = sorted(map(float, scores))[:max(least, int(len(scores) * 0.4))]
    return -sum(lowest) / len(lowest) if lowest else math.nan


def privleak(auc, auc_retrain):
    """MUSE's PrivLeak in percent: 0 where forget and holdout differ as for a retrained model."""
    if not auc_retrain:
        raise Undefined("the reference's AUC is 0")
    return 100 * (auc - auc_retrain) / auc_retrain


def leak_at_k(scores, k):
    """Expected best score of k draws without replacement from a question's sampled answers: the
    j-th lowest of n is the best of C(j-1, k-1) of the C(n, k) choices."""
    choices = math.comb(len(scores), k)
    return sum(math.comb(j - 1, k - 1) / choices * s for j, s in enumerate(sorted(scores), 1))


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
    if values is None:
        raise Undefined("needs a retrained model: --reference")
    records = values.get(split)
    if not records or any(field not in record for record in records):
        raise Undefined("not in its file, or no holdout beside the forget set (as holdout05)")
    kept = [record[field] for record in records]
    if None in kept:
        raise Undefined("not finite (NaN), no room in the model's context, or for ROUGE no a-z and "
                        f"0-9 in {kept.count(None)} of {len(kept)} {split} examples")
    return kept


def mean(values, split, field, transform=float):
    """Mean of a field over the records of a split, each transformed; Undefined as field_of."""
    kept = field_of(values, split, field)
    return math.fsum(map(transform, kept)) / len(kept)


def finite(x):
    """None in place of what JSON cannot hold."""
    return x if x is not None and math.isfinite(x) else None


# Scoring: answers of all questions together, by length, padded right, logits at answer positions.

@torch.inference_mode()
def score_answers(model, examples, max_tokens):
    """(logps, right, standard) of each Example, in order, a number an answer token: its
    log-probability; whether it is the argmax; its log-probability standardized over the vocabulary,
    (log p - mu)/sigma with sigma^2 >= 1e-6 (Min-K%++). NaN where the context has no room."""
    nan, room, rows = torch.tensor([math.nan]), context_length(model), chunk_rows(model)
    scores = [(nan, torch.tensor([False]), nan)] * len(examples)
    lengths = [len(e.input_ids) for e in examples]
    batches = length_batches(lengths, max_tokens, [*rope_borders(model), room])
    for batch in progress([b for b in batches if lengths[b[0]] <= room], "scoring"):
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
    """Greedy continuations of tokenized prompts, or sampled ones, in order: lists of new token ids
    without the end.

    `ends` are token ids that end a continuation beside the model's own and the EOS. What else the
    model's generation_config asks (a repetition penalty, suppressed tokens) holds. None where
    logits are not finite or the prompt leaves no room in the model's context.
    """
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *ends, *(own if isinstance(own, list) else [own])} - {None}
    ends = sorted(end for end in ends if 0 <= end < vocabulary(model))
    room = [min(max_new_tokens, context_length(model) - len(prompt)) for prompt in prompts]
    results = [None] * len(prompts)
    for batch in progress(generation_batches(model, prompts, room, batch_size), "generating"):
        rows = [torch.tensor(prompts[i], device=model.device) for i in batch]
        ids = pad_sequence(rows, True, ends[0], "left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
        watch = Finite()
        # Prompts of a batch have equal room.
        new = model.generate(ids, attention_mask=mask, max_new_tokens=room[batch[0]], num_beams=1,
                             eos_token_id=ends, pad_token_id=ends[0], logits_processor=[watch],
                             tokenizer=tokenizer, return_dict_in_generate=False, do_sample=sample,
                             **UNCUT)[:, ids.shape[1]:].tolist()
        for i, tokens, sound in zip(batch, new, torch.stack(watch, 1).tolist()):
            end = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
            results[i] = tokens[:end] if all(sound[:end + 1]) else None
    return results


# TOFU

def evaluate_tofu(model, tokenizer, data, options):
    """Per-example values of the splits: {split: [record]}. `data` as from tofu_records."""
    prompt = Prompt(options.template, options.system, options.date)
    asked = [(split, r, answers_of(split, r)) for split, records in data.items() for r in records]
    questions, answers, where = zip(*((r["question"], answer, r["where"])
                                      for _, r, its_answers in asked for answer in its_answers))
    examples = encode_answers(tokenizer, questions, answers, prompt, where)
    require_fit(examples, "the model's context of", context_length(model), vocabulary(model))
    scores = iter(spread(score_answers, model, examples, options.max_tokens))
    ends = {e.input_ids[-1] for e in examples}  # the EOS, or what ends a chat's turn

    def continuations(splits, count=1, sample=False):
        """(prompt, continuation), `count` times for each question of these splits, in order."""
        prompts = [r["question"] for split in splits for r in data[split]]
        prompts = [ids for ids in encode_prompts(tokenizer, prompts, prompt) for _ in range(count)]
        new = spread(generate, model, prompts, tokenizer, options.max_new_tokens,
                     options.batch_size, ends, sample)
        return zip(map(tokenizer.decode, prompts), decode(tokenizer, new))

    greedy = continuations([split for split in data if split != "holdout"])
    torch.manual_seed(distributed.rank())  # repeatable only with the same batches and ranks
    drawn = continuations(["forget"], options.samples, sample=True)
    values = {split: [] for split in data}
    for split, record, answers in asked:
        kept = scored(split, record, [next(scores) for _ in answers])
        if split != "holdout":
            kept["prompt"], kept["generated"] = next(greedy)
            kept["rouge_l_recall"] = rouge(kept["generated"], record["answer"], stem=True)[1]
        if split == "forget" and options.samples:
            kept["sampled"] = [next(drawn)[1] for _ in range(options.samples)]
            recalls = [rouge(text, record["answer"], stem=True)[1] for text in kept["sampled"]]
            kept["recalls"] = None if None in recalls else recalls
        values[split].append(kept)
    return values


def answers_of(split, record):
    """The answers whose probabilities are needed: the true one, its paraphrase, the false ones."""
    paraphrased = [record["paraphrased_answer"]] if "paraphrased_answer" in record else []
    false = record["perturbed_answer"] if split != "holdout" else []
    return [record["answer"], *paraphrased, *false]


def scored(split, record, scores):
    """What is kept of the scores of a question's answers: the true one, its paraphrase, false ones.

    nll are means per token, in nats, the end included, also in the attacks LOSS and zlib. The
    attacks Min-K% and Min-K%++ and memorization leave the end out, as OpenUnlearning does.
    """
    nll, *others = (-logps.double().mean().item() for logps, _, _ in scores)
    logps, right, standard = (part[:-1].tolist() for part in scores[0])
    known = right and math.isfinite(nll)
    size = len(zlib.compress(record["answer"].encode()))
    kept = {"question": record["question"], "answer": record["answer"], "tokens": len(right) + 1,
            "loss": finite(nll), "zlib": finite(nll / size),
            "min_k": finite(min_k(logps, least=1)), "min_k_plus": finite(min_k(standard, least=1)),
            "exact_memorization": sum(right) / len(right) if known else None,
            "extraction_strength": extraction_strength(right) if known else None}
    if split == "holdout":
        return kept
    paraphrased = others.pop(0) if "paraphrased_answer" in record else nll
    return kept | tofu_values(split, nll, paraphrased, others)


def rouge(text, answer, stem):
    """rouge_l, or Nones where there is no text, or no [a-z0-9] in the answer to compare with."""
    known = text is not None and WORD.search(answer.lower())
    return rouge_l(text, answer, stem) if known else (None,) * 3


def tofu_values(split, nll, paraphrased_nll, perturbed_nlls):
    """Probabilities and R of one question from its mean nlls."""
    nlls = {"nll": finite(nll), "paraphrased_nll": finite(paraphrased_nll),
            "perturbed_nll": list(map(finite, perturbed_nlls))}
    if None in (nlls["nll"], nlls["paraphrased_nll"], *nlls["perturbed_nll"]):
        return nlls | dict.fromkeys(["probability", "paraphrased_probability", "truth_ratio"])
    probability = math.exp(-nll)
    if split in ("real_authors", "world_facts"):  # p / (p + sum of the false answers' p)
        choices = torch.tensor([nll, *perturbed_nlls], dtype=torch.float64)
        probability = choices.neg().softmax(0)[0].item()  # exact even if every p underflows
    return {**nlls, "probability": probability,
            "paraphrased_probability": math.exp(-paraphrased_nll),
            "truth_ratio": truth_ratio(paraphrased_nll, perturbed_nlls)}


# The rows of TOFU's table: functions of a model's values and the retrained model's (or None).

def mean_of(split, field, transform=float):
    """The row with the mean of a field over a split."""
    return lambda mine, other: mean(mine, split, field, transform)


def preference(r):
    """max(0, 1 - 1/R): 1 where the truth is much preferred."""
    return max(0.0, 1 - 1 / r)


def knowledge(r):
    """R/(1+R) = p/(p + geometric mean of the false answers' p): OpenUnlearning's prob_mean."""
    return r / (1 + r)


def forget_auc(values, field="min_k", splits=("forget", "holdout")):
    """P(a holdout question's score < a forget question's): 0 where every forget question is
    recognized as trained on, 0.5 where none is. The retrained model's may be given: a number."""
    if isinstance(values, float):
        return values
    return auroc(*(field_of(values, split, field) for split in splits))


def memorization(mine, other):
    """OpenUnlearning's memorization score, which is 1 where nothing is memorized."""
    names = ("forget extraction strength", "forget exact memorization",
             "forget paraphrase probability", "forget knowledge score")
    return statistics.harmonic_mean(1 - TOFU_ROWS[name](mine, other) for name in names)


ratios = partial(field_of, split="forget", field="truth_ratio")  # of a model's values
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
    "forget quality (KS p)": lambda mine, other: forget_quality(ratios(mine), ratios(other)),
    "forget quality (KS D)": lambda mine, other: ks_two_sample(ratios(mine), ratios(other))[0],
    "model utility": lambda mine, other: model_utility(f(mine, other) for f in UTILITY.values()),
    **UTILITY,
    "forget probability": mean_of("forget", "probability"),
    "forget paraphrase probability": mean_of("forget", "paraphrased_probability"),
    "forget ROUGE-L recall": mean_of("forget", "rouge_l_recall"),
    "forget truth ratio": mean_of("forget", "truth_ratio", lambda r: min(r, 1 / r)),
    "forget knowledge score": mean_of("forget", "truth_ratio", knowledge),
    "retain knowledge score": mean_of("retain", "truth_ratio", knowledge),
    "forget extraction strength": mean_of("forget", "extraction_strength"),
    "forget exact memorization": mean_of("forget", "exact_memorization"),
    "retain extraction strength": mean_of("retain", "extraction_strength"),
    "retain exact memorization": mean_of("retain", "exact_memorization"),
    "memorization score": memorization,
    "forget PrivLeak": lambda mine, other: privleak(forget_auc(mine), forget_auc(other)),
    "forget/holdout AUC": lambda mine, other: forget_auc(mine),
    "forget/holdout AUC, Min-K++": lambda mine, other: forget_auc(mine, "min_k_plus"),
    "forget/holdout AUC, LOSS": lambda mine, other: forget_auc(mine, "loss"),
    "forget/holdout AUC, zlib": lambda mine, other: forget_auc(mine, "zlib"),
}


def tofu_metrics(values, retrained):
    """The column of one model: {row: number, or the reason why there is none}."""
    rows = dict(TOFU_ROWS)
    count = len((values.get("forget") or [{}])[0].get("sampled", ()))
    for k in sorted({1, 4, 16, 64, 256, count} - {0}):
        if k <= count:
            rows[f"forget leak@{k}"] = mean_of("forget", "recalls", partial(leak_at_k, k=k))
    return {name: attempt(row, values, retrained) for name, row in rows.items()}


# MUSE

def evaluate_muse(model, tokenizer, data, options):
    """Per-example values: {"verbmem", "knowmem_forget", "knowmem_retain", "privleak_forget",
    "privleak_holdout"}. `data` as from muse_records."""
    front = front_of(tokenizer)  # as in training; trailing blanks of prompts are kept

    def continuations(prompts, max_new_tokens):
        new = spread(generate, model, encode(tokenizer, prompts, front), tokenizer, max_new_tokens,
                     options.batch_size)
        return decode(tokenizer, new, clean_up_tokenization_spaces=True)

    def scores(examples):
        return spread(score_answers, model, examples, options.max_tokens)

    values, records = {}, data["verbmem/forget"]
    # The official cut counts the BOS.
    wanted = [ids[:128] for ids in encode(tokenizer, [r["gt"] for r in records], front)]
    wanted = decode(tokenizer, wanted, clean_up_tokenization_spaces=True)
    texts = continuations([r["prompt"] for r in records], 128)
    values["verbmem"] = [muse_record(r["prompt"], answer, text) for r, answer, text in zip(
        records, wanted, texts)]
    for record, (logps, right, _) in zip(values["verbmem"], scores(recitals(tokenizer, records))):
        known = logps.isfinite().all()
        record["extraction_strength"] = extraction_strength(right.tolist()) if known else None
    for split in ("forget", "retain"):
        shots = data[f"knowmem/{split}_qa_icl"]
        shots = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in shots)
        records = data[f"knowmem/{split}_qa"]
        texts = continuations([f"{shots}Question: {r['question']}\nAnswer: " for r in records], 32)
        texts = [text and re.split("\n\n|\nQuestion|Question:", text)[0] for text in texts]
        values[f"knowmem_{split}"] = [muse_record(r["question"], r["answer"], text)
                                      for r, text in zip(records, texts)]
    for split in ("forget", "holdout"):
        examples = to_examples(data[f"privleak/{split}"], tokenizer, max_length=2**31,  # never cut
                               vocab_size=vocabulary(model))
        values[f"privleak_{split}"] = [{"min_40": finite(min_k(logps.tolist()))}
                                       for logps, _, _ in scores(examples)]
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


# Of texts, by their Min-40% scores.
privleak_auc = partial(forget_auc, field="min_40", splits=("privleak_forget", "privleak_holdout"))
MUSE_ROWS = {
    "VerbMem forget": mean_of("verbmem", "rouge_l_f1", lambda x: 100 * x),
    "KnowMem forget": mean_of("knowmem_forget", "rouge_l_f1", lambda x: 100 * x),
    "KnowMem retain": mean_of("knowmem_retain", "rouge_l_f1", lambda x: 100 * x),
    "PrivLeak": lambda mine, other: privleak(privleak_auc(mine), privleak_auc(other)),
    "AUC forget/holdout": lambda mine, other: privleak_auc(mine),
    "extraction strength": mean_of("verbmem", "extraction_strength"),
}


def muse_metrics(values, retrained):
    """The column of one model, VerbMem, KnowMem and PrivLeak in the official percent."""
    return {name: attempt(row, values, retrained) for name, row in MUSE_ROWS.items()}


# Does it come back? A model that forgot by small changes may remember once its weights are rounded
# (Zhang et al., "Catastrophic failure of LLM unlearning via quantization", ICLR 2025).

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


# The flags

def arguments(argv):
    """Parse and check the flags; return them with every default filled in."""
    parser, count = Parser(__doc__), number(int, low=1)
    a = parser.add_argument
    a("models", nargs="+", type=nonempty, metavar="MODEL", help="folder, hub name, file of results")
    a("--forget", type=nonempty, help="TOFU: the forget set; its evaluation files lie beside it")
    a("--muse", type=nonempty, metavar="FOLDER", help="MUSE: it has verbmem, knowmem and privleak")
    a("--reference", type=nonempty, help="the retrained model (made without the forget set), as "
      "MODEL; for --muse also its AUC (default: the published one in a folder named news or books)")
    a("--template", help="TOFU: chat, llama2, plain or a text with {question}, as in training")
    a("--system", help="TOFU: system message of the chat, as in training")
    a("--date", help="TOFU: date of the chat template, as in training")
    a("--limit", type=count, default=300, help="TOFU: records of a split; default 300 (official)")
    a("--max-new-tokens", type=count, default=200, help="longest TOFU continuation; default 200")
    a("--quantize", type=int, nargs="+", default=[], choices=range(2, 9), metavar="BITS",
      help="evaluate each model with its weights rounded, too: for example 8 4")
    a("--samples", type=count, default=0, metavar="N", help="sample N answers a forget question")
    a("--dtype", choices=list(DTYPES), help="of the weights; default fp32, on a GPU bf16 "
      "(official); only fp32 results are independent of the batch size")
    a("--batch-size", type=count, default=64, help="prompts continued at once; default 64")
    a("--max-tokens", type=count, help="tokens scored at once; default 4096, on a GPU 16384")
    a("--device", default=distributed.DEVICE, help="default: a GPU if there is one, else cpu")
    a("--force", action="store_true", help="evaluate again even if eval.json has the results")
    options = parser.parse_args(argv)
    require(not (options.forget and options.muse), "--forget and --muse: give one of them")
    require(options.forget or not options.samples, "--samples needs --forget")
    Prompt(options.template, options.system, options.date)  # refuses a bad one before any work
    options.models = [str(Path(model)) for model in options.models]
    options.reference = options.reference and str(Path(options.reference))
    options.forget = options.forget and find(options.forget)
    cuda = options.device.startswith("cuda")
    options.dtype = options.dtype or ("bf16" if cuda else "fp32")
    options.max_tokens = options.max_tokens or (16384 if cuda else 4096)
    return options


# From arguments to the table

@one_line_errors
def main(argv=None):
    """Evaluate the models that have no results yet; print the table. Returns the exit status."""
    options = arguments(argv)
    distributed.start(options.device)
    distributed.agree("eval.py", vars(options) | {"device": None})  # each may have its own
    with distributed.together():
        data, models, reference, evaluate, metrics = (muse if options.muse else tofu)(options)
    if isinstance(reference, str) and reference not in models:
        models = [reference, *models]

    def measure(model, bits):
        return evaluate(*load(model, options, bits), data, options)

    entries = evaluations.collect(models, reference, data, measure, partial(complete, metrics),
                                  options)
    retrained = entries[reference]["values"] if reference in entries else reference
    columns = {}
    for name, entry in entries.items():
        counts = {f"records of {split}": len(kept) for split, kept in entry["values"].items()}
        column = metrics(entry["values"], retrained) | counts
        said = {row: value for row, value in entry.get("rows", {}).items()  # an official log's own
                if isinstance(column.get(row, "none"), str)}
        columns[name] = column | said
    distributed.say(evaluations.format_table(columns))
    for entry in entries.values():
        if "unsaved" in entry:
            raise OSError(entry["unsaved"])
    return 0


def tofu(options):
    """For --forget: the data, the models, the retrained one, what is measured and what follows from
    it. Without it there is no data, and only files of results are shown."""
    forget, models, reference = options.forget, options.models, options.reference
    data = tofu_records(forget, options.limit) if forget else {}
    if forget and not reference and miniature.is_builtin(forget):  # make what to compare with
        target, reference = miniature.target_and_retrained(forget)
        for model in models:
            if model not in (target, reference) and not Path(model).is_file():
                load_skeleton(model)  # refuses a bad one before minutes of work
        for folder in (target, reference):
            miniature.make(Path(folder))
        models = [target, reference, *models]
    return data, models, reference, evaluate_tofu, tofu_metrics


def muse(options):
    """The same for --muse, where the AUC of the retrained model is enough."""
    folder = Path(options.muse)
    data, reference = muse_records(folder), options.reference
    with contextlib.suppress(ValueError):
        reference = float(reference or AUC_RETRAIN.get(folder.resolve().name, ""))
    require(not isinstance(reference, float) or 0 < reference <= 1,
            f"--reference {reference}: an AUC is above 0 and at most 1")
    return data, options.models, reference, evaluate_muse, muse_metrics


def complete(metrics, values):
    """Values from a file, with what follows from nlls, all that an official log has, computed anew.
    Raises where they are damaged."""
    for split, records in values.items():
        for r in (r for r in records if "nll" in r):
            r |= tofu_values(split, r["nll"], r["paraphrased_nll"], r["perturbed_nll"])
    metrics(values, values)  # a KeyError or TypeError, if a record is damaged
    return values


def load(argument, options, bits=None):
    """Model, its weights rounded to `bits`, and tokenizer, once they are known to be sound."""
    with distributed.together():
        model, tokenizer = load_pretrained(argument, DTYPES[options.dtype])
        model.to(options.device).eval()
        with blame(argument):
            check_head(model)
        check_generation(argument, model)
    if bits:
        quantize(model, bits)
    return model, tokenizer


if __name__ == "__main__":
    sys.exit(main())
