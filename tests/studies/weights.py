"""What weight each loss gives a token of probability p: d loss / d log p, by autograd from
train.LOSSES, for an answer of 8 tokens that all have this p; times 8, so that gradient ascent is 1.

No run and no prediction: this is arithmetic. It says where the methods can differ at all.
"""

import math
from types import SimpleNamespace

import torch

from studies.common import pyplot, save_csv, table, train

TOKENS = 8
LINES = {  # label: (loss, its options, p before unlearning, colour, where the label stands)
    "SimNPO": ("simnpo", {"beta": 2.5}, None, "C0", (0.52, 0.2)),
    "NPO, fact known by heart": ("npo", {"beta": 0.1}, 0.99, "C1", (0.42, 3.2)),
    "NPO, fact hardly known": ("npo", {"beta": 0.1}, 0.2, "C1", (0.22, 8.4)),
    "gradient ascent": ("ga", {}, None, "0.3", (0.72, 1.1)),
    "WGA": ("wga", {"beta": 1.0}, None, "C4", (0.31, 0.2)),
    "SatImp": ("satimp", {"beta": 5.0, "beta2": 1.0}, None, "C5", (0.72, 0.033)),
    "CE-U": ("ceu", {}, None, "C3", (0.925, 14)),
}


def weight(loss, options, p, reference, tokens=TOKENS):
    """-> |y| * d loss / d log p of one token, for probabilities p (P,)."""
    loss = train.LOSSES[loss]
    logps = p.double().log()[:, None].expand(-1, tokens).clone().requires_grad_()
    logits = torch.stack([logps, torch.log1p(-logps.exp())], -1).flatten(0, 1)  # of two words
    values = loss.per_token(logits, torch.zeros(len(logits), dtype=torch.long)).view_as(logps)
    lengths = torch.full((len(p),), tokens)
    ref = None if reference is None else torch.full((len(p),), tokens * math.log(reference))
    answers = train.Answers(values.sum(1), lengths, values.flatten(), ref)
    args = SimpleNamespace(**{"gamma": 0.0, **options})
    return torch.autograd.grad(loss.function(answers, args).sum(), logps)[0][:, 0] * tokens


def study(options):
    shown = torch.tensor([0.05, 0.2, 0.5, 0.8, 0.95, 0.99])
    rows = [["p of the token", *(f"{p:g}" for p in shown.tolist())]]
    for label, (loss, given, reference, *_) in LINES.items():
        rows.append([label, *(f"{w:.3g}" for w in weight(loss, given, shown, reference).tolist())])
    table(f"weights: |y| d loss / d log p, |y| = {TOKENS}", rows)
    save_csv("weights", [dict(zip(rows[0], row)) for row in rows[1:]])
    if options.picture:
        draw(options.picture)


def draw(picture):
    figure, panel = pyplot().subplots(figsize=(8, 4.8), layout="tight")
    for label, (loss, given, reference, color, at) in LINES.items():
        # Unlearning only goes down from the reference.
        p = torch.linspace(0.002, reference if label.endswith("hardly known") else 0.998, 500)
        style = {"lw": 4, "zorder": 3} if label == "SimNPO" else {"lw": 1.6}
        panel.plot(p, weight(loss, given, p, reference), color=color, **style)
        panel.text(*at, label, color=color, fontsize=12, ha="right" if label == "CE-U" else "left",
                   weight="bold" if label == "SimNPO" else "normal")
    start = torch.tensor([0.2])
    for label in ("NPO, fact hardly known", "SimNPO"):
        loss, given, reference, color, _ = LINES[label]
        panel.plot(0.2, weight(loss, given, start, reference), "o", color=color, ms=10, zorder=4)
    panel.annotate("", (0.2, 0.045), (0.2, 6), arrowprops={"arrowstyle": "<->", "color": "0.5"})
    panel.set(yscale="log", xlim=(0, 1), ylim=(0.01, 30),
              xlabel="probability of the token   (forgotten  ←  →  known by heart)",
              ylabel="pull on the token (gradient ascent: 1)")
    panel.set_yticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    panel.set_title("At one forget weight, a fact that was hardly known (dots) meets NPO's full\n"
                    "force, and little of SimNPO's", fontsize=13, loc="left")
    figure.savefig(picture, dpi=110)
