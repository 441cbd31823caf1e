"""The null: what no difference looks like. Six models that never saw forget05, all trained on
retain95 from the same base, in six orders of the data.

Prediction, written before it was run: the two samples of a KS test are the same 50 questions, so
p lies nearer to 1 than the uniform distribution of independent samples: median above 0.5, none of
15 pairs below 0.05. Probabilities vary by a few percent of their value. PrivLeak, a ratio of AUCs
over 50 + 50 questions, varies by ten points.
"""

import itertools
import statistics

from studies.common import (ROOT, RUNS, builtin, each, evaluation, fine_tuned, number, quantile,
                            save_csv, table, values_of)

SEEDS = range(6)
FORGET = ROOT / "data" / "forget05"
# What a table of this project's studies shows of a model: columns, and eval.py's rows of the same.
COLUMNS = {"forget prob.": "forget probability",
           "paraphrase prob.": "forget paraphrase probability",
           "truth ratio": "forget truth ratio", "extraction": "forget extraction strength",
           "PrivLeak": "forget PrivLeak", "utility": "model utility",
           "retain prob.": "retain probability"}
PAIRED = {"KS D": "forget quality (KS D)", "KS p": "forget quality (KS p)"}


def retrained_models():
    """The folders of the six retrained models."""
    builtin("target", "full")  # with it comes runs/base
    return each(fine_tuned, [(RUNS / f"retain95-seed{seed}", ROOT / "data" / "retain95", seed)
                             for seed in SEEDS])


def nlls(values):
    """Per-token nll of every answer about the forget set, true, paraphrased and false ones."""
    return [nll for r in values["forget"]
            for nll in (r["nll"], r["paraphrased_nll"], *r["perturbed_nll"])]


def apart(a, b):
    """Root mean square, over all answers to all forget questions, of the difference of nlls."""
    return statistics.fmean((x - y) ** 2 for x, y in zip(nlls(a), nlls(b))) ** 0.5


def measured(values, references, unit):
    """One model against the retrained ones: medians over them where a quantity needs a pair.
    `distance` is in units of the median distance between two retrained models."""
    rows = [evaluation.tofu_metrics(values, reference) for reference in references]
    found = {name: statistics.median(row[key] for row in rows)
             for name, key in (COLUMNS | PAIRED).items()}
    return found | {"distance": statistics.median(apart(values, r) for r in references) / unit}


def null_row():
    """({quantity: (5%, median, 95%)}, unit of distance, the retrained models' values)."""
    models = each(values_of, [(model, FORGET) for model in retrained_models()])
    pairs = list(itertools.combinations(models, 2))
    unit = statistics.median(apart(*pair) for pair in pairs)
    alone = [evaluation.tofu_metrics(model, models[0]) for model in models]
    both = [evaluation.tofu_metrics(*pair) for pair in pairs]
    ordered = [evaluation.tofu_metrics(*pair) for pair in itertools.permutations(models, 2)]
    found = {name: [row[key] for row in alone] for name, key in COLUMNS.items()}
    found |= {name: [row[key] for row in both] for name, key in PAIRED.items()}
    found["PrivLeak"] = [row[COLUMNS["PrivLeak"]] for row in ordered]
    found["distance"] = [apart(*pair) / unit for pair in pairs]
    quantiles = {name: tuple(quantile(x, q) for q in (0.05, 0.5, 0.95))
                 for name, x in found.items()}
    return quantiles, unit, models, found


def study(options):
    quantiles, unit, _, found = null_row()
    table(f"null: six retrained models, 15 pairs (distance 1 = {unit:.3f} nats a token)",
          [["", *quantiles], *([name, *(number(q[i]) for q in quantiles.values())]
                               for i, name in enumerate(("5%", "median", "95%")))])
    save_csv("null", [{"quantity": name, "value": x} for name, xs in found.items() for x in xs])
