"""How much comes back? The strata's forget set: the shortest fifth by tokens, and a random fifth, is
learned again; the other facts are measured.

Each of the four losses starts at the snapshot whose mean log p is nearest to the retrained model's:
all are equally far forgotten. Of its two rates that with the highest retain probability there
is taken, in each world. Control: a retrained model, which never knew the other facts. Three epochs,
batch 4, lr 5e-4, constant.

Prediction, written before it was run. The paper: SimNPO is the more robust to relearning, and the
shortest fifth is what tells it from NPO. Agreement: the others' log p per token rises less for
SimNPO than for NPO (both beside the control's change), on the shortest fifth in both worlds.
Disagreement: it rises more in both. Else undecided. What stays above the control had been hidden,
not forgotten; we expect that of all four.
"""

import random
import statistics

from data.load import load_examples, read_records
from data import make_mini
from studies import strata
from studies.common import (FOUR, AutoTokenizer, each, keep_only, number, pyplot, run, save_csv,
                            stored, table, token_means, write_lines)

PARTS = ("shortest fifth", "random fifth")
EPOCHS = 3


def chosen_part(folder, start, part):
    """Indices of the facts that are learned again."""
    examples = load_examples(folder / "forget.jsonl", AutoTokenizer.from_pretrained(start), 512)
    lengths = [len(e.input_ids) - e.start for e in examples]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    fifth = len(order) // 5
    return order[:fifth] if part == PARTS[0] else random.Random(0).sample(order, fifth)


def relearned(folder, start, part, name):
    """Mean log p per token of the other facts, before and after each epoch."""
    output = folder / "relearn" / f"{name}-{part.split()[0]}"

    def measure():
        again = chosen_part(folder, start, part)
        records = read_records(folder / "forget.jsonl")
        file = output.with_suffix(".jsonl")
        write_lines(file, make_mini.fields([records[i] for i in again], *make_mini.QA))
        run(output, f"--epochs {EPOCHS} --batch-size 4 --lr 5e-4 --schedule constant "
            "--save-every 0 --snapshots 1epoch", model=start, retain=file)
        found = []
        for model in (start, *sorted(output.glob("step-*"))):
            known = token_means(model, folder / "forget.jsonl")
            found.append(statistics.fmean(x for i, x in enumerate(known) if i not in again))
        keep_only(output)
        return found

    return stored(output.with_suffix(".json"), measure)


def study(options):
    points, reference, _ = strata.runs()
    at = {key: strata.crossing(found, reference[key[0]]) for key, found in points.items()}
    tasks = []
    for w in strata.WORLDS:
        folder = strata.RUNS / "strata" / f"world{w}"
        starts = {}
        for method, loss in FOUR.items():
            there = [key for key, x in at.items() if key[:2] == (w, method) and x]
            _, _, pull, lr = max(there, key=lambda key: at[key][1])
            model, = (folder / strata.run_name(loss, pull, lr)).glob("step-*")
            starts[method] = model, f"{loss}-pull{pull:g}-lr{lr:g}"
        starts["retrained (control)"] = folder / "retrained-seed0", "control"
        tasks += [(method, part, (folder, model, part, name))
                  for method, (model, name) in starts.items() for part in PARTS]
    found = {}
    for (method, part, _), line in zip(tasks, each(relearned, [task for *_, task in tasks])):
        found.setdefault((part, method), []).append(line)
    rows = [["learned again", "", "log p per token before", "after", "change less the control's, "
             "each world"]]
    for (part, method), lines in found.items():
        control = found[part, "retrained (control)"]
        rows.append([part, method, *(number(statistics.fmean(line[i] for line in lines))
                                     for i in (0, -1)),
                     ", ".join(f"{a[-1] - a[0] - b[-1] + b[0]:+.2f}"
                               for a, b in zip(lines, control))])
    table("relearn: the facts that were not learned again; mean of two worlds", rows)
    save_csv("relearn", [{"learned again": part, "method": method, "world": w, "epoch": epoch,
                          "log p per token": x} for (part, method), lines in found.items()
                         for w, line in enumerate(lines) for epoch, x in enumerate(line)])
    if options.picture:
        draw(found, options.picture)


def draw(found, picture):
    figure, panels = pyplot().subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="tight")
    for i, ((part, method), lines) in enumerate(found.items()):
        panel = panels[PARTS.index(part)]
        color = "k" if "control" in method else f"C{[*FOUR].index(method)}"
        panel.plot([statistics.fmean(x) for x in zip(*lines)], ".-" if color != "k" else ".--",
                   color=color, lw=3 if method.startswith("SimNPO") else 1.5, label=method)
        panel.set(title=f"learned again: {part}", xlabel="epochs", xticks=range(EPOCHS + 1))
    panels[0].set_ylabel("log p per token of the other facts")
    panels[0].legend(fontsize=9, frameon=False)
    figure.savefig(picture, dpi=110)
