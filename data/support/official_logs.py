"""Others' logs as evaluations of ours; whether a reference was asked what the model was."""

import math

from .errors import naming, require

TOFU_LOGS = {"forget": "eval_log_forget.json", "retain": "eval_log.json",
             "real_authors": "eval_real_author_wo_options.json",
             "world_facts": "eval_real_world_wo_options.json"}
OPEN_UNLEARNING = {
    "forget_quality": "forget quality (KS p)", "model_utility": "model utility",
    "retain_Q_A_Prob": "retain probability", "retain_Q_A_ROUGE": "retain ROUGE-L recall",
    "retain_Truth_Ratio": "retain truth ratio",
    "ra_Q_A_Prob_normalised": "real authors probability",
    "ra_Q_A_ROUGE": "real authors ROUGE-L recall", "ra_Truth_Ratio": "real authors truth ratio",
    "wf_Q_A_Prob_normalised": "world facts probability",
    "wf_Q_A_ROUGE": "world facts ROUGE-L recall", "wf_Truth_Ratio": "world facts truth ratio",
    "forget_Q_A_Prob": "forget probability",
    "forget_Q_A_PARA_Prob": "forget paraphrase probability",
    "forget_Q_A_ROUGE": "forget ROUGE-L recall", "forget_truth_ratio": "forget truth ratio",
    "exact_memorization": "forget exact memorization", "privleak": "forget PrivLeak"}


def official_entry(path, log):
    """An entry from TOFU's eval_log_aggregated.json or OpenUnlearning's TOFU_EVAL.json."""
    with naming(path, "not an eval.json, an eval_log_aggregated.json of TOFU or a TOFU_EVAL.json "
                "of OpenUnlearning"):
        parts = {name: part for name, part in log.items() if isinstance(part, dict)}
        if any("agg_value" in part for part in parts.values()):
            return open_unlearning_entry(parts)
        values = {split: tofu_split(name, log[name]) for split, name in TOFU_LOGS.items()}
        return {"settings": None, "values": values}


def tofu_split(name, log):
    """The records of one split of an eval_log_aggregated.json."""
    columns = {"nll": log["avg_gt_loss"], "paraphrased_nll": log["avg_paraphrased_loss"],
               "perturbed_nll": log["average_perturb_loss"], "rouge_l_recall": log["rougeL_recall"]}
    if "generated_text" in log:
        columns["texts"] = log["generated_text"]  # prompt, continuation, answer
    if isinstance(log["avg_gt_loss"], dict):  # by index, from several GPUs; lists from one
        if len({frozenset(column) for column in columns.values()}) > 1:
            raise ValueError(f"the columns of {name} have other keys")
        columns = {field: by_index(column) for field, column in columns.items()}
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError(f"the columns of {name} are of other lengths")
    records = [dict(zip(columns, row)) for row in zip(*columns.values())]
    for record in records:
        if "texts" in record:
            _, record["generated"], record["answer"] = record.pop("texts")
    return records


def open_unlearning_entry(log):
    """As values what eval.py can compute with, 1/R and Min-40% scores; as rows all that it says."""
    def scores(part):
        return part.get("value_by_index") or {}

    attack = log.get("mia_min_k", {})
    members = scores(attack.get("forget", {}))
    texts = scores(log.get("forget_Q_A_ROUGE", {}))
    forget = []
    for index, kept in sorted(scores(log.get("forget_truth_ratio", {})).items(), key=by_number):
        inverse = score_of(kept)
        ratio = 1 / inverse if inverse else math.inf
        record = {"truth_ratio": None if inverse is None else ratio}
        if index in members:
            record["min_k"] = score_of(members[index])
        if "ground_truth" in texts.get(index, {}):
            record["answer"] = texts[index]["ground_truth"]
        forget.append(record)
    values = {"forget": forget}
    if members:
        holdout = by_index(scores(attack["holdout"]))
        values["holdout"] = [{"min_k": score_of(kept)} for kept in holdout]
    rows = {OPEN_UNLEARNING.get(name, name): float(part["agg_value"]) for name, part in log.items()
            if isinstance(part.get("agg_value"), (int, float))}
    return {"settings": None, "values": values, "rows": rows}


def score_of(part):
    """A question's score; None where the log has NaN, which results.read_json gives as None."""
    return None if part["score"] is None else float(part["score"])


def by_number(item):
    return int(item[0])


def by_index(column):
    return [value for _, value in sorted(column.items(), key=by_number)]


def check_reference(entry, reference, name):
    """InputError unless a reference was asked the same questions, in the same words."""
    for split in ("forget", "holdout"):
        mine, other = (e["values"].get(split, []) for e in (entry, reference))
        if split == "holdout" and not (mine and other):
            continue  # a footnote says so
        require(len(mine) == len(other), f"{name}: has answered {len(other)} {split} questions, "
                f"the model {len(mine)}; they must be the same ones (--limit says how many)")
        for i, (a, b) in enumerate(zip(mine, other), 1):
            for field in ("question", "answer"):
                require(alike(a, b, field), f"{name}: its {split} question {i} is another than the "
                        "model's; it was measured on another forget set")
            require(alike(a, b, "prompt"), f"{name}: was asked {b.get('prompt')!r}, the model "
                    f"{a.get('prompt')!r}; measure both with one --template, --system and --date")


def alike(a, b, field):
    """Whether two records agree in a text, as far as both hold it."""
    return field not in a or field not in b or str(a[field]).split() == str(b[field]).split()
