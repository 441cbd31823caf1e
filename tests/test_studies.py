"""studies/: equal pull, where a watched run crosses, the rule that chooses, the weights' view."""

import json
import math
import re
import sys

import pytest
import torch
from conftest import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.load import collate, load_examples
from simnpo import sequence_logps
from studies import bench_eval, common, methods, weights


def test_at_equal_pull_both_gradients_are_as_long(tmp_path):
    """By full logits and autograd, for a loss of means and one of sums with a reference."""
    write_model(tmp_path / "model")
    for name, count in (("forget", 3), ("retain", 7)):
        common.write_lines(tmp_path / f"{name}.jsonl", [
            {"question": f"{name} {i}?", "answer": "ab" * (i + 1)} for i in range(count)])
    losses = [("simnpo", "--beta 2.5"), ("npo", "--beta 0.3")]
    found = common.forget_weights(tmp_path / "model", tmp_path / "forget.jsonl",
                                  tmp_path / "retain.jsonl", losses)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").double()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")

    def norm(name, take, loss):
        examples = load_examples(tmp_path / f"{name}.jsonl", tokenizer, 512)
        ids, labels = collate([examples[i] for i in take])
        value = loss(*sequence_logps(model(input_ids=ids).logits, labels)).mean()
        return math.sqrt(sum(g.square().sum().item()
                             for g in torch.autograd.grad(value, [*model.parameters()])))

    retain = norm("retain", (0, 2, 4), lambda logps, lengths: -logps / lengths)
    simnpo = norm("forget", (0, 1, 2), lambda logps, n: -0.8 * (1 / (
        1 + (2.5 * logps / n).exp())).log())
    npo = norm("forget", (0, 1, 2), lambda logps, n: 2 / 0.3 * (1 + (
        0.3 * (logps - logps.detach())).exp()).log())
    assert found[losses[0]] == pytest.approx(retain / simnpo, rel=1e-4)
    assert found[losses[1]] == pytest.approx(retain / npo, rel=1e-4)


def test_crossing_is_interpolated_and_only_the_part_counts():
    points = [(0, [-1.0, 0.0], 0.9), (2, [-1.0, -2.0], 0.8), (4, [-3.0, -4.0], 0.6)]
    known, retain, step = common.crossing(points, -2.0)
    assert known == pytest.approx([-1.5, -2.5])
    assert (retain, step) == pytest.approx((0.75, 2.5))
    assert common.crossing(points, -2.0, slice(0, 1))[2] == pytest.approx(3)
    assert common.crossing(points, -9.0) is None


def test_the_rule_takes_what_keeps_most_within_the_window():
    points = [(1, 0.9, 0.99), (2, 0.33, 0.7), (3, 0.21, 0.8), (4, 0.19, 0.95)]
    assert methods.best(points, 0.26) == (3, 0.21, 0.8)
    assert methods.best(points, 0.6) is None


def test_stored_is_made_once_and_whole(tmp_path):
    def broken():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        common.stored(tmp_path / "a" / "x.json", broken)
    assert common.stored(tmp_path / "a" / "x.json", lambda: [1]) == [1]
    assert common.stored(tmp_path / "a" / "x.json", broken) == [1]
    assert json.loads((tmp_path / "a" / "x.json").read_text()) == [1]


def test_weights_by_formula():
    p = torch.tensor([0.1, 0.5, 0.9])
    simnpo = weights.weight("simnpo", {"beta": 2.5}, p, None)
    assert simnpo.tolist() == pytest.approx((2 * p**2.5 / (1 + p**2.5)).tolist(), rel=1e-5)
    npo = weights.weight("npo", {"beta": 0.1}, p, 0.2)
    ratio = (p / 0.2) ** (0.1 * weights.TOKENS)
    by_hand = weights.TOKENS * 2 * ratio / (1 + ratio)
    assert npo.tolist() == pytest.approx(by_hand.tolist(), rel=1e-5)


def test_the_benchmark_of_evaluation(tmp_path, monkeypatch, capsys):
    """It compares eval.py with one question at a time, and both agree."""
    model = str(write_model(tmp_path / "model"))
    monkeypatch.setattr(sys, "argv", ["bench_eval.py", "--model", model, "--questions", "6"])
    bench_eval.main()
    printed = capsys.readouterr().out
    assert "the same text for 6 of 6" in printed
    assert float(re.search("difference of a mean nll (.*?),", printed)[1]) < 1e-4
