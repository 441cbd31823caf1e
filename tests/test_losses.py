"""The table of losses in train.py: each is gradient ascent with its own weight of a token."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F

import train

ARGS = argparse.Namespace(beta=1.7, gamma=0.4, beta2=1.3)

# d loss / d log p of one token of an answer: p its probability, n = |y|, logp and ref of the answer
WEIGHTS = {
    "ga": lambda p, n, logp, ref: 1 / n,
    "npo": lambda p, n, logp, ref: 2 / (1 + math.exp(-1.7 * (logp - ref))),
    "simnpo": lambda p, n, logp, ref: 2 / n / (1 + math.exp(-0.4 - 1.7 / n * logp)),
    "wga": lambda p, n, logp, ref: p**1.7 / n,
    "satimp": lambda p, n, logp, ref: p**1.7 * (1 - p)**1.3 / n,
    "ceu": lambda p, n, logp, ref: p / (1 - p) / n,
}
ANSWERS = [[-0.3, -1e-4, -5.0], [-0.7], [-2.0, -0.01, -0.4, -9.0, -0.05]]


@pytest.mark.parametrize("name", train.LOSSES)
def test_each_loss_is_gradient_ascent_with_a_weight(name):
    loss = train.LOSSES[name]
    logps = torch.tensor(sum(ANSWERS, []), dtype=torch.float64, requires_grad=True)
    logits = torch.stack([logps, torch.log1p(-logps.exp())], 1)  # of a vocabulary of two words
    tokens = loss.per_token(logits, torch.zeros(len(logps), dtype=torch.long))
    lengths = torch.tensor([len(answer) for answer in ANSWERS])
    sums = torch.stack([part.sum() for part in tokens.split(lengths.tolist())])
    ref = torch.tensor([-4.0, -0.1, -12.0], dtype=torch.float64)
    losses = loss.function(train.Answers(sums, lengths, tokens, ref), ARGS)
    got, = torch.autograd.grad(losses.sum(), logps)
    expected = [WEIGHTS[name](math.exp(x), len(answer), sum(answer), r)
                for answer, r in zip(ANSWERS, ref.tolist()) for x in answer]
    assert losses.shape == (3,)
    assert got.tolist() == pytest.approx(expected, rel=1e-9)


def random_answers():
    """Logits and labels of two sequences with answers of 3 and 5 tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 20, dtype=torch.float64, generator=generator) * 3
    labels = torch.randint(0, 20, (2, 9), generator=generator)
    labels[0, :6] = labels[1, :4] = -100
    return logits.requires_grad_(), labels


def ours(name, logits, labels, **arguments):
    loss, mask = train.LOSSES[name], labels[:, 1:] != -100
    tokens = loss.per_token(logits[:, :-1][mask], labels[:, 1:][mask])
    lengths = mask.sum(1)
    sums = torch.stack([part.sum() for part in tokens.split(lengths.tolist())])
    answers = train.Answers(sums, lengths, tokens, None)
    return loss.function(answers, argparse.Namespace(**arguments)).mean()


def open_unlearning_weighted(logits, labels, weight):
    """Its wga and satimp of one sequence, where its mean over tokens is ours over sequences."""
    nll = F.cross_entropy(logits[:-1], labels[1:], reduction="none", ignore_index=-100)
    kept = labels[1:] != -100
    return -(weight((-nll).exp().detach()) * nll)[kept].mean()


@pytest.mark.parametrize("name, arguments, weight", [
    ("wga", {"beta": 1.0}, lambda p: p),
    ("wga", {"beta": 3.0}, lambda p: p**3),
    ("satimp", {"beta": 5.0, "beta2": 1.0}, lambda p: p**5 * (1 - p))])
def test_weighted_gradient_ascent_is_open_unlearnings(name, arguments, weight):
    logits, labels = random_answers()
    loss = ours(name, logits, labels, **arguments)
    theirs = sum(open_unlearning_weighted(*one, weight) for one in zip(logits, labels)) / 2
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-12)
    for mine, other in zip(*(torch.autograd.grad(x, logits) for x in (loss, theirs))):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-14)


def open_unlearning_ceu(logits, labels):
    """Its CE-U of one sequence: cross-entropy against the model's own distribution without the
    label, as a constant. It leaves out the first answer token; here that counts, too."""
    kept = labels[1:] != -100
    logits, targets = logits[:-1][kept], labels[1:][kept]
    wanted = logits.detach().scatter(1, targets[:, None], -math.inf).softmax(-1)
    return F.cross_entropy(logits, wanted)


def test_ceu_has_the_gradient_of_open_unlearnings():
    """Not its value, which holds the entropy of the constant distribution."""
    logits, labels = random_answers()
    theirs = sum(open_unlearning_ceu(*one) for one in zip(logits, labels)) / 2
    mine, other = (torch.autograd.grad(x, logits)[0] for x in (ours("ceu", logits, labels), theirs))
    torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("margin", [0, 5, 15, 16, 20, 30, 100])
def test_ceu_of_a_token_known_for_certain_in_fp32(margin):
    """p rounds to 1 in fp32 from a margin of 16 on; the gradient is OpenUnlearning's there, too."""
    logits = torch.zeros(1, 2, 4)
    logits[0, 0, 1] = margin
    labels = torch.tensor([[-100, 1]])
    exact = logits.double().requires_grad_()
    logits.requires_grad_()
    loss = ours("ceu", logits, labels)
    mine, = torch.autograd.grad(loss, logits)
    theirs, = torch.autograd.grad(open_unlearning_ceu(exact[0], labels[0]), exact)
    assert loss.item() == pytest.approx(math.log1p(math.exp(margin) / 3), rel=1e-5)
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-7)
