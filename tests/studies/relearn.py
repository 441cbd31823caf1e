"""How much comes back? The strata's forget set: the shortest fifth by tokens, and a random fifth,
is learned again; the other facts are measured.

Each of the four losses starts at the snapshot whose mean log p is nearest to the retrained model's:
all are equally far forgotten. Of its rates that with the highest retain probability there
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
from itertools import product

from data.load import load_examples, read_records
from data import make_mini
from studies import strata
from studies.common import (FOUR, STYLES, AutoTokenizer, each, keep_only, number, pyplot, run,
                            save_csv, stored, table, token_means, write_lines)

PARTS = ("shortest fifth", "random fifth")
CONTROL, EPOCHS = "retrained (control)", 3


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
    runs, _ = strata.runs()
    starts, retain = {}, {}  # (method, world): (model, its name); its retain probability
    for method, w in product(FOUR, strata.WORLDS):
        there = [run for key, run in runs.items() if key[:2] == (w, method) and run.crossing]
        start = max(there, key=lambda run: run.kept[2])
        starts[method, w] = next(start.folder.glob("step-*")), start.folder.name
        retain[method, w] = start.kept[2]
    for w in strata.WORLDS:
        folder = strata.RUNS / "strata" / f"world{w}"
        starts[CONTROL, w] = folder / "retrained-seed0", "control"
    keys = [*product(PARTS, starts)]
    lines = each(relearned, [(strata.RUNS / "strata" / f"world{start[1]}", starts[start][0], part,
                              starts[start][1]) for part, start in keys])
    found = {}
    for (part, (method, _)), line in zip(keys, lines):
        found.setdefault((part, method), []).append(line)
    rows = [["learned again", "", "retain prob. before, each world",
             "log p per token before, each world", "after", "change less the control's"]]
    for (part, method), lines in found.items():
        beside = [a[-1] - a[0] - b[-1] + b[0] for a, b in zip(lines, found[part, CONTROL])]
        columns = [[number(retain.get((method, w))) for w in strata.WORLDS],
                   *([f"{line[i]:.2f}" for line in lines] for i in (0, -1)),
                   [f"{x:+.2f}" for x in beside]]
        rows.append([part, method, *map(", ".join, columns)])
    table("relearn: the facts that were not learned again", rows)
    save_csv("relearn", [{"learned again": part, "method": method, "world": w, "epoch": epoch,
                          "log p per token": x, "retain at the start": retain.get((method, w), "")}
                         for (part, method), lines in found.items()
                         for w, line in enumerate(lines) for epoch, x in enumerate(line)])
    if options.picture:
        draw(found, options.picture)


def draw(found, picture):
    figure, panels = pyplot().subplots(1, 2, figsize=(10.5, 4.2), sharey=True, layout="tight")
    ends = []
    for (part, method), lines in found.items():
        y = [statistics.fmean(x) for x in zip(*lines)]
        style = STYLES.get(method, {"color": "k", "ls": "--"})
        panel = panels[PARTS.index(part)]
        panel.plot(y, marker=".", **style)
        panel.set(title=f"learned again: {part}", xlabel="epochs", xticks=range(EPOCHS + 1))
        ends += [(y[-1], method, style["color"])] * (panel is panels[1])
    at = 0
    for y, method, color in sorted(ends, reverse=True):
        at = min(at - 0.045, y)
        panels[1].text(EPOCHS + 0.1, at, method, color=color, va="center", fontsize=10)
    panels[0].set_ylabel("log p per token of the other facts")
    figure.savefig(picture, dpi=110)
