"""TOFU's and MUSE's metrics for models side by side, as the official codes define them.

    python eval.py MODEL --forget data/tofu/forget05 --reference RETAIN    TOFU
    python eval.py MODEL --muse data/muse/news                             MUSE
    python eval.py MODEL --kl FILE ... --reference OTHER                   KL(OTHER || MODEL)
    python eval.py runs/a/eval.json runs/b/eval.json                       what was measured before

MODEL is a folder or hub name of a causal model, an eval.json written here, TOFU's
eval_log_aggregated.json or OpenUnlearning's TOFU_EVAL.json. Every per-example value, the generated
texts included, is kept in an eval.json in the model's folder (for a hub name in runs/) and not
measured again. On the built-in data the target and a retain-only model are shown unasked.

Reading order: metrics, scoring, generation, TOFU, MUSE, KL, from arguments to the table.
"""

if __name__ == "__main__":
    from data.support import startup
    startup.prepare()

import math
import re
import sys
from bisect import bisect_left, bisect_right
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from data.load import (Example, Prompt, collate, encode, encode_answers, encode_prompts, find,
                       front_of, length_batches, read_records, to_examples)
from data.support import distributed, evaluations, miniature
from data.support.data_files import muse_records, require_fit, tofu_files, tofu_records
from data.support.distributed import progress, spread
from data.support.errors import naming, one_line_errors, require
from data.support.evaluations import Undefined, attempt, column, finite, given, mean
from data.support.generation import Finite, decode, generation_batches
from data.support.models import (check_generation, context_length, load_pretrained,
                                 load_skeleton, rope_borders, vocabulary)
from data.support.official_logs import check_reference
from data.support.options import DTYPES, evaluation_options
from data.support.porter import stem as porter_stem
from simnpo import answer_hidden, answer_kl, check_head, chunk_rows, head_logits


# Metrics: plain functions on lists or 1-d tensors of numbers.

def rouge_l(prediction, reference, stem):
    """ROUGE-L of two texts: (precision, recall, F1) of the longest common subsequence of words.

    Words are runs of [a-z0-9] in the lower-cased text; with `stem`, those of more than 3 letters
    are Porter-stemmed. (0, 0, 0) if either text has none. Equal to rouge-score 0.1.2, with which
    TOFU (stem) and MUSE (no stem) measure.
    """
    words, wanted = ([porter_stem(w) if stem and len(w) > 3 else w for w in words_of(text)]
                     for text in (prediction, reference))
    if not words or not wanted:
        return 0.0, 0.0, 0.0
    places = {}
    for i, word in enumerate(wanted):
        places[word] = places.get(word, 0) | 1 << i
    # Hyyro 2004: a row of the table in one integer, with a 0 bit where the length grows
    row = full = (1 << len(wanted)) - 1
    for word in words:
        hits = row & places.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
    common = len(wanted) - row.bit_count()
    precision, recall = common / len(words), common / len(wanted)
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
    inside = [1] + [0] * n  # inside[j]: paths to (i, j) within the band
    for i in range(m + 1):
        # the j with |i n - j m| < gap
        low, high = max(0, (i * n - gap) // m + 1), min(n, -((-i * n - gap) // m) - 1)
        inside = ([0] * low + inside[low:high + 1] + [0] * n)[:n + 1]
        for j in range(max(low, 1), high + 1):
            inside[j] += inside[j - 1]
    paths = math.comb(m + n, n)
    return gap / (m * n), (paths - inside[n]) / paths if gap else 1.0


def auroc(positives, negatives):
    """Area under the ROC curve: P(a positive's score > a negative's), ties counting half.

    Mann-Whitney's U over the number of pairs.
    """
    negatives = sorted(map(float, negatives))
    positives = [float(x) for x in positives]
    below = sum(bisect_left(negatives, x) + bisect_right(negatives, x) for x in positives)
    return below / (2 * len(positives) * len(negatives))


def truth_ratio(true_nll, false_nlls):
    """TOFU's R = exp(mean of the false answers' nll - nll of the true one), nll per token, in nats.

    Above 1 where the model prefers the truth. The paper's formula has the arithmetic mean of the
    false answers' probabilities and the inverse ratio; this is what its code, and everyone's
    numbers, use. At most exp(709), the largest that a float holds.
    """
    false_nlls = [float(x) for x in false_nlls]
    return math.exp(min(sum(false_nlls) / len(false_nlls) - float(true_nll), 709.0))


def forget_quality(r_model, r_reference):
    """TOFU's forget quality: KS p-value between truth ratios R on the forget set, of a model and of
    one retrained without that set. Near 1: they cannot be told apart; near 0: they can."""
    return ks_two_sample(r_model, r_reference)[1]


def model_utility(parts):
    """TOFU's model utility: the harmonic mean of {probability, ROUGE-L, truth ratio} x {retain,
    real authors, world facts}."""
    parts = [float(x) for x in parts]
    return 0.0 if 0 in parts else len(parts) / sum(1 / x for x in parts)


def exact_memorization(right):
    """Share of answer tokens that the argmax, given all before, gets right: a bool a token."""
    return sum(map(bool, right)) / len(right)


def extraction_strength(right):
    """1 - k/|y| for the smallest k such that all tokens from place k on are right; 0 if even the
    last is wrong (Carlini et al. 2021).

    OpenUnlearning's loop ends one early and gives 1/|y| there, so its value has a row of its own.
    """
    wrong = [i for i, x in enumerate(right) if not x]
    return 1 - (wrong[-1] + 1) / len(right) if wrong else 1.0


def min_k(logps, share=0.4, least=0):
    """Min-K% score (Shi et al. 2023): minus the mean of the lowest 40% of the token
    log-probabilities, of `least` tokens at least."""
    lowest = sorted(map(float, logps))[:max(least, int(len(logps) * share))]
    return -sum(lowest) / len(lowest) if lowest else math.nan


# Scoring: answers of all questions together, by length, padded right, logits at answer positions.

@torch.inference_mode()
def score_answers(model, examples, max_tokens):
    """(logps, right) of each Example, in order: the log-probability of each answer token, and
    whether it is the argmax."""
    scores = [None] * len(examples)
    rows = chunk_rows(model)
    lengths = [len(e.input_ids) for e in examples]
    batches = length_batches(lengths, max_tokens, rope_borders(model))
    for batch in progress(batches, "scoring"):
        ids, labels = (x.to(model.device) for x in collate([examples[i] for i in batch]))
        hidden, targets = answer_hidden(model, ids, labels)
        parts = []
        for h, wanted in zip(hidden.split(rows), targets.split(rows)):
            logits = head_logits(model, h).float()
            logps = -cross_entropy(logits, wanted, reduction="none")
            parts.append((logps, logits.argmax(-1) == wanted))
        logps, right = (torch.cat(x).cpu() for x in zip(*parts))
        counts = [lengths[i] - examples[i].start for i in batch]
        for i, score in zip(batch, zip(logps.split(counts), right.split(counts))):
            scores[i] = score
    return scores


# Generation: greedy, by transformers, in batches of prompts of like length.

@torch.inference_mode()
def generate(model, prompts, tokenizer, max_new_tokens, batch_size, ends=()):
    """Greedy continuations of tokenized prompts, in order: lists of new token ids without the end.

    `ends` are token ids that end a continuation beside the model's own and the EOS. What the
    model's generation_config asks of greedy decoding (a repetition penalty, suppressed tokens)
    holds. None where logits are not finite or the prompt leaves no room in the model's context.
    """
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    ends = sorted({tokenizer.eos_token_id, *ends, *own} & {*range(vocabulary(model))})
    room = [min(max_new_tokens, context_length(model) - len(prompt)) for prompt in prompts]
    results = [None] * len(prompts)
    for batch in progress(generation_batches(model, prompts, room, batch_size), "generating"):
        width = max(len(prompts[i]) for i in batch)
        rows = [[ends[0]] * (width - len(prompts[i])) + prompts[i] for i in batch]
        mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch]
        ids, mask = (torch.tensor(x, device=model.device) for x in (rows, mask))
        watch = Finite()
        new = model.generate(ids, attention_mask=mask, max_new_tokens=room[batch[0]],
                             do_sample=False, num_beams=1, eos_token_id=ends, pad_token_id=ends[0],
                             logits_processor=[watch], tokenizer=tokenizer,
                             return_dict_in_generate=False)[:, width:].tolist()
        for i, tokens, sound in zip(batch, new, torch.stack(watch.finite, 1).tolist()):
            end = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
            results[i] = tokens[:end] if all(sound[:end + 1]) else None
    return results


# TOFU

def evaluate_tofu(model, tokenizer, data, options):
    """Per-example values of the splits: {split: [record]}. `data` as from tofu_records."""
    prompt = Prompt(options.template, options.system, options.date)
    questions, examples = [], []  # (split, record, which Examples are its answers); all Examples
    for split, records in data.items():
        for record in records:
            answers = [record["answer"]]
            if "paraphrased_answer" in record:
                answers.append(record["paraphrased_answer"])
            if split != "holdout":
                answers += record["perturbed_answer"]
            where = [record["where"]] * len(answers)
            questions.append((split, record, slice(len(examples), len(examples) + len(answers))))
            examples += encode_answers(tokenizer, [record["question"]] * len(answers), answers,
                                       prompt, where)
    require_fit(examples, "the model's context of", context_length(model), vocabulary(model))
    scores = spread(score_answers, model, examples, options.max_tokens)
    asked = [record["question"] for split, record, _ in questions if split != "holdout"]
    prompts = encode_prompts(tokenizer, asked, prompt)
    ends = {e.input_ids[-1] for e in examples}  # the EOS, or what ends a chat's turn
    new = spread(generate, model, prompts, tokenizer, options.max_new_tokens, options.batch_size,
                 ends)
    said = iter(zip(decode(tokenizer, new), map(tokenizer.decode, prompts)))
    values = {split: [] for split in data}
    for split, record, place in questions:
        logps = scores[place][0][0].tolist()  # of the true answer
        kept = {"question": record["question"], "answer": record["answer"],
                "min_k": finite(min_k(logps[:-1], least=1))}  # without the end: OpenUnlearning
        if split != "holdout":
            kept |= tofu_record(split, record, scores[place], *next(said))
        values[split].append(kept)
    return values


def tofu_record(split, record, scores, text, prompt):
    """What is kept of one question. nll are means per token, in nats, the end included;
    memorization leaves it out."""
    nll, *others = (-logps.double().mean().item() for logps, _ in scores)
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
        names = ("probability", "paraphrased_probability", "truth_ratio", "knowledge")
        return nlls | dict.fromkeys(names)
    false_nll = math.fsum(perturbed_nlls) / len(perturbed_nlls)  # of their geometric mean
    among_options = split in ("real_authors", "world_facts")
    probability = share_of_truth(nll, perturbed_nlls) if among_options else math.exp(-nll)
    return {**nlls, "probability": probability,
            "paraphrased_probability": math.exp(-paraphrased_nll),
            "truth_ratio": truth_ratio(paraphrased_nll, perturbed_nlls),
            "knowledge": share_of_truth(paraphrased_nll, [false_nll])}


def share_of_truth(nll, false_nlls):
    """p / (p + sum of the false answers' p), each exp(-nll); right where all of them underflow."""
    return torch.tensor([nll, *false_nlls], dtype=torch.float64).neg().softmax(0)[0].item()


# The rows of TOFU's table: a function of the model's values and the reference's (None without one).

def per(split, field, transform=float, scale=1):
    """The row with the mean of a field over a split."""
    return lambda values, reference: scale * mean(values, split, field, transform)


def closeness(r):
    """min(R, 1/R): 1 where the truth ratio on the forget set says nothing."""
    return min(r, 1 / r) if r else 0.0


def preference(r):
    """max(0, 1 - 1/R): 1 where the truth is much preferred."""
    return max(0.0, 1 - 1 / r) if r else 0.0


def comparing(function):
    """The row of a function of the truth ratios R on forget, the model's and the reference's."""
    return lambda values, reference: function(column(values, "forget", "truth_ratio"),
                                              column(given(reference), "forget", "truth_ratio"))


def utility(values, reference):
    return model_utility(row(values, reference) for row in UTILITY.values())


def forget_auc(values, reference):
    """P(a holdout question's Min-40% score < a forget question's)."""
    return auroc(column(values, "forget", "min_k"), column(values, "holdout", "min_k"))


def forget_privleak(values, reference):
    return privleak(forget_auc(values, None), forget_auc(given(reference), None))


def privleak(auc, auc_retrain):
    """MUSE's PrivLeak in percent: 0 where forget and holdout differ as for a retrained model."""
    if not auc_retrain:
        raise Undefined("the reference's AUC is 0")
    return 100 * (auc - auc_retrain) / auc_retrain


PARTS = {"probability": ("probability",), "ROUGE-L recall": ("rouge_l_recall",),
         "truth ratio": ("truth_ratio", preference)}
UTILITY = {f"{split.replace('_', ' ')} {name}": per(split, *what)
           for split in ("retain", "real_authors", "world_facts") for name, what in PARTS.items()}
TOFU_ROWS = {
    "forget quality (KS p)": comparing(forget_quality),
    "forget quality (KS D)": comparing(lambda a, b: ks_two_sample(a, b)[0]),
    "model utility": utility,
    **UTILITY,
    "forget probability": per("forget", "probability"),
    "forget paraphrase probability": per("forget", "paraphrased_probability"),
    "forget ROUGE-L recall": per("forget", "rouge_l_recall"),
    "forget truth ratio": per("forget", "truth_ratio", closeness),
    "forget knowledge score": per("forget", "knowledge"),
    "retain knowledge score": per("retain", "knowledge"),
    "forget extraction strength": per("forget", "extraction_strength"),
    "forget exact memorization": per("forget", "exact_memorization"),
    "retain extraction strength": per("retain", "extraction_strength"),
    "retain exact memorization": per("retain", "exact_memorization"),
    "forget PrivLeak": forget_privleak,
    "forget/holdout AUC": forget_auc,
}


def tofu_metrics(values, reference):
    """The column of one model: {row: number, or the reason why there is none}."""
    return {name: attempt(row, values, reference) for name, row in TOFU_ROWS.items()}


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
        room, lost = context_length(model), (torch.tensor([math.nan]), torch.tensor([False]))
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
                 for logps, right in score(recitals(tokenizer, records))]
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
        examples = to_examples(data[f"privleak/{split}"], tokenizer, 2**31, Prompt(),
                               vocabulary(model))
        values[f"privleak_{split}"] = [{"min_40": finite(min_k(logps.tolist()))}
                                       for logps, _ in score(examples)]
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
    """Token ids of plain texts, begun as in training, trailing blanks kept (KnowMem's prompts)."""
    return encode(tokenizer, texts, front_of(tokenizer))


def privleak_auc(values):
    """P(a holdout text's Min-40% score < a forget text's)."""
    return auroc(column(values, "privleak_forget", "min_40"),
                 column(values, "privleak_holdout", "min_40"))


def muse_privleak(values, auc_retrain):
    if not isinstance(auc_retrain, float):
        raise Undefined(auc_retrain or "needs the AUC of a model trained without the forget set: "
                        "--reference MODEL, eval.json or a number above 0")
    return privleak(privleak_auc(values), auc_retrain)


# A row is a function of the model's values and the retrained model's AUC, or why there is none.
MUSE_ROWS = {
    "VerbMem forget": per("verbmem", "rouge_l_f1", scale=100),
    "KnowMem forget": per("knowmem_forget", "rouge_l_f1", scale=100),
    "KnowMem retain": per("knowmem_retain", "rouge_l_f1", scale=100),
    "PrivLeak": muse_privleak,
    "AUC forget/holdout": lambda values, auc_retrain: privleak_auc(values),
    "extraction strength": per("verbmem", "extraction_strength"),
}


def muse_metrics(values, auc_retrain):
    """The column of one model, VerbMem, KnowMem and PrivLeak in the official percent."""
    return {name: attempt(row, values, auc_retrain) for name, row in MUSE_ROWS.items()}


# KL: how far from a reference on sequences that neither has seen (the study of Markov chains).

@torch.inference_mode()
def evaluate_kl(model, tokenizer, data, options):
    """{file: [record]} with KL(reference || model) summed over each sequence's tokens."""
    reference, _ = load(options.reference, options)
    sizes = [len(m.get_output_embeddings().weight) for m in (model, reference)]
    require(sizes[0] == sizes[1], f"{options.reference}: {sizes[1]} logits a token, the model has "
            f"{sizes[0]}; KL needs one vocabulary")
    values, room = {}, context_length(model)
    for name, records in data.items():
        examples = to_examples(records, tokenizer, room, Prompt(), vocabulary(model))
        values[name] = spread(
            score_kl, model, examples[:options.limit], reference, options.max_tokens)
    return values


def score_kl(model, examples, reference, max_tokens):
    records, lengths = [None] * len(examples), [len(e.input_ids) for e in examples]
    borders = rope_borders(model) + rope_borders(reference)
    for batch in progress(length_batches(lengths, max_tokens, borders), "scoring"):
        ids, labels = (x.to(model.device) for x in collate([examples[i] for i in batch]))
        kl, tokens = answer_kl(model, reference, ids, labels)
        for i, value, count in zip(batch, kl.tolist(), tokens.tolist()):
            records[i] = {"kl": finite(value), "tokens": count}
    return records


def kl_metrics(values):
    """The column of one model: mean KL per token, in nats, a row a file."""
    def per_token(path):
        return math.fsum(column(values, path, "kl")) / sum(column(values, path, "tokens"))
    return {f"KL per token, {path}": attempt(per_token, path) for path in values}


# From arguments to the table

@one_line_errors
def main(argv=None):
    options = evaluation_options(argv, __doc__)
    options.device = distributed.start(options.device)
    evaluations.show(*table(options), options)
    return 0


def table(options):
    """{column title: {row: number, or the reason why there is none}}, and the evaluations."""
    mode = muse if options.muse else kl if options.kl else tofu
    entries, column = mode(options)
    columns = [column(entry) for entry in entries.values()]
    return dict(zip(evaluations.titles(entries), columns)), entries


def load(argument, options):
    """Model and tokenizer on this rank's device, in eval mode, once they are known to be sound."""
    with distributed.together():
        model, tokenizer = load_pretrained(argument, DTYPES[options.dtype])
        model.to(options.device).eval()
        with naming(argument):
            check_head(model)
        check_generation(argument, model)
    return model, tokenizer


def tofu(options):
    """{model: evaluation} for --forget (without it: of files), and what makes a column of one."""
    arguments = [*filter(None, [options.reference]), *options.models]
    if not options.forget:
        evaluations.require_files(arguments)
        asked = evaluations.Evaluation("tofu", {}, None, complete_tofu)
    else:
        forget = find(options.forget)
        data = {split: tofu_records(split, path, options.limit)
                for split, path in tofu_files(forget).items()}
        names = "template system date limit max_new_tokens dtype"
        asked = evaluations.Evaluation(
            f"tofu {evaluations.relative(forget)}", evaluations.settings(options, names, data),
            lambda model: evaluate_tofu(*load(model, options), data, options), complete_tofu)
        if not options.reference and miniature.is_builtin(forget):  # make what to compare with
            made = miniature.target_and_retrained(forget)
            evaluations.check([m for m in options.models if m not in made], asked, options)
            with distributed.together():
                for folder in made:
                    miniature.make(Path(folder))
            arguments, options.reference = [*made, *options.models], made[1]
        known = options.reference and evaluations.saved_entry(options.reference, asked, options)
        if known:  # refuse a reference that was asked other questions before anything is run
            check_reference({"values": data}, known, options.reference)
    entries = evaluations.collect(arguments, asked, options)
    reference = entries.get(options.reference)

    def column(entry):
        if reference:
            check_reference(entry, reference, options.reference)
        found = tofu_metrics(entry["values"], reference and reference["values"])
        held = entry.get("rows", {})  # what an official file says, where its values say nothing
        return found | {row: x for row, x in held.items() if not isinstance(found.get(row), float)}
    return entries, column


def complete_tofu(values):
    """Values as evaluate_tofu gives them: what follows from nlls, of an official log or kept from
    before, is computed anew."""
    for split, records in values.items():
        for r in (r for r in records if "nll" in r):
            r |= tofu_values(split, r["nll"], r["paraphrased_nll"], r["perturbed_nll"])
    tofu_metrics(values, values)  # raises where they are damaged
    return values


def muse(options):
    folder, models = Path(options.muse), list(options.models)
    data = muse_records(folder)
    auc = AUC_RETRAIN.get(folder.resolve().name)
    try:
        auc = float(options.reference or "")
    except ValueError:
        models += filter(None, [options.reference])
    require(auc is None or 0 < auc <= 1,
            f"--reference {options.reference}: an AUC is above 0 and at most 1")
    asked = evaluations.Evaluation(
        f"muse {evaluations.relative(folder)}", evaluations.settings(options, "dtype", data),
        lambda model: evaluate_muse(*load(model, options), data, options),
        lambda values: muse_metrics(values, None) and values)
    entries = evaluations.collect(models, asked, options)
    if options.reference in entries:
        auc = attempt(privleak_auc, entries[options.reference]["values"])
    return entries, lambda entry: muse_metrics(entry["values"], auc)


def kl(options):
    require(options.reference, "--kl needs --reference: the model to compare with")
    data = {evaluations.relative(path): read_records(path) for path in map(find, options.kl)}
    load_skeleton(options.reference)
    settings = evaluations.settings(options, "limit dtype", data)
    asked = evaluations.Evaluation(
        " ".join(["kl", options.reference, *data]),
        settings | {"reference": evaluations.fingerprint(options.reference)},
        lambda model: evaluate_kl(*load(model, options), data, options),
        lambda values: kl_metrics(values) and values)
    entries = evaluations.collect(options.models, asked, options)
    return entries, lambda entry: kl_metrics(entry["values"])


if __name__ == "__main__":
    sys.exit(main())
