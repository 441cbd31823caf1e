"""The default command, and whether what was unlearned comes back: with weights rounded to 8 and 4
bits, and in the best of 16 sampled answers.

The default command has seeds 0 - 2; SimNPO and NPO are the settings that `methods` chose, seed 0,
at the end of the run. No prediction was written before. Zhang et al. (ICLR 2025): on 7B models
rounding to 4 bits brings much of it back.
"""

import contextlib
import io
import json

from studies import methods
from studies.common import RUNS, builtin, each, evaluation, number, run, save_csv, table
from studies.null import FORGET

FOLDER, BITS = RUNS / "comeback", (8, 4)
ATTACKS = ("forget/holdout AUC", "forget/holdout AUC, Min-K++", "forget/holdout AUC, LOSS",
           "forget/holdout AUC, zlib")
ROWS = ("forget quality (KS p)", "model utility", "forget probability", "retain probability",
        "forget PrivLeak", "memorization score", *ATTACKS, "forget leak@1", "forget leak@4",
        "forget leak@16")
ROUNDED = ("forget probability", "retain probability")


def by_default(seed):
    return run(FOLDER / f"default-seed{seed}", f"--beta 2.5 --gamma 0 --seed {seed}", forget=FORGET)


def measured(model, retrained):
    """{row: value} of a model, and of its rounded copies the probabilities."""
    argv = [model, "--forget", FORGET, "--reference", retrained, "--max-new-tokens", 50,
            "--samples", 16, "--quantize", *BITS]
    with contextlib.redirect_stdout(io.StringIO()):
        status = evaluation.main([*map(str, argv)])
    assert status == 0, f"eval.py {model}: status {status}"
    values, reference = kept(model), kept(retrained)
    rows = evaluation.tofu_metrics(values["tofu-16samples"], reference["tofu-16samples"])
    found = {row: rows[row] for row in ROWS}
    for bits in BITS:
        rows = evaluation.tofu_metrics(values[f"tofu-{bits}bit-16samples"], None)
        found |= {f"{row}, {bits} bits": rows[row] for row in ROUNDED}
    return found


def kept(model):
    """{mode: values} of a model's eval.json."""
    evaluations = json.loads((model / "eval.json").read_text())["evaluations"]
    return {key.split()[0]: entry["values"] for key, entry in evaluations.items()}


def study(options):
    target, retrained = builtin("target", "full"), builtin("retain95", "retain95")
    models = {"target": target, "retrained": retrained}
    bench, weights, grid = methods.tuned()
    for method in ("SimNPO", "NPO"):
        setting = methods.choose(grid[method])
        models[f"{method}, {methods.setting_text(setting)}"] = methods.unlearned(
            bench, "comeback", weights, setting, 0, target)
    models |= {f"default, seed {s}": model for s, model in enumerate(each(by_default, [
        (seed,) for seed in range(3)]))}
    measured(retrained, retrained)  # once, before several processes need it
    found = dict(zip(models, each(measured, [(m, retrained) for m in models.values()])))

    def cells(rows):
        return [[name, *(", ".join(number(of[row]) if "prob" not in row else f"{of[row]:.3f}"
                                   for row in part) for part in rows)]
                for name, of in found.items()]

    rounded = [[row, *(f"{row}, {bits} bits" for bits in BITS)] for row in ROUNDED]
    table("comeback: as it is, 8 bits, 4 bits", [
        ["", *ROUNDED, "leak@1, 4, 16", "memorization score", "AUC: Min-K, Min-K++, LOSS, zlib"],
        *cells([*rounded, ROWS[-3:], ROWS[5:6], ATTACKS])])
    table("comeback: the models", [["", *ROWS[:5]], *cells([[row] for row in ROWS[:5]])])
    save_csv("comeback", [{"model": name, **of} for name, of in found.items()])
