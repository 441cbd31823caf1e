"""eval.py's metrics against scipy, rouge-score, scikit-learn, NLTK, exact fractions and the
official logs."""

import itertools
import json
import math
import random
import re
from fractions import Fraction

import numpy
import pytest
import torch
from conftest import ROOT, table_of, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean, ks_2samp
from sklearn.metrics import roc_auc_score
from transformers import GPT2Config, GPT2LMHeadModel

import eval as evaluation
from data.support.errors import InputError
from data.support.evaluations import format_table
from eval import Undefined, attempt, field_of
from data.support.porter import stem

SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(
    not (SHARED / "tofu_logs").is_dir(),
    reason="the real TOFU files and logs are not beside this checkout (../shared)")
SCORERS = {stemming: RougeScorer(["rougeL"], use_stemmer=stemming) for stemming in (False, True)}
SUFFIXES = """ational tional enci anci izer bli alli entli eli ousli ization ation ator alism
iveness fulness ousness aliti iviti biliti fulli logi icate ative alize iciti ical ful ness al ance
ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize eed ed ied ies s ss sses ing
y e ll at bl iz""".split()
SOME_WORDS = "the running runs 12 1984 cats cat's, Güterzug\n İ generalization".split(" ")


def same_rouge(prediction, reference):
    for stemming, scorer in SCORERS.items():
        want = scorer.score(reference, prediction)["rougeL"]
        want = want.precision, want.recall, want.fmeasure
        got = evaluation.rouge_l(prediction, reference, stem=stemming)
        assert got == pytest.approx(want, abs=1e-12), (prediction, reference)


# ROUGE-L and the stemmer

@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_rouge_of_any_unicode(prediction, reference):
    same_rouge(prediction, reference)


@settings(max_examples=300, deadline=None)
@given(*[st.lists(st.sampled_from(SOME_WORDS), max_size=90).map(" ".join)] * 2)
def test_rouge_of_texts_with_words_in_common(prediction, reference):
    same_rouge(prediction, reference)


def test_rouge_by_hand():
    assert evaluation.rouge_l("a c d", "a b c d", stem=False) == pytest.approx((1, 3 / 4, 6 / 7))
    for nothing in (("", "a b"), ("a", "?!")):
        assert evaluation.rouge_l(*nothing, stem=True) == (0, 0, 0)


def test_rouge_of_texts_without_a_to_z():
    """Nothing to compare with has no score; a text that says nothing of a known answer has 0."""
    for nothing in (("Beijing", "北京。"), (None, "a")):
        assert evaluation.rouge(*nothing, stem=True) == (None, None, None)
    assert evaluation.rouge("北京。", "Beijing", True) == (0, 0, 0)
    assert evaluation.rouge("в 1984", "1984 год", False) == (1, 1, 1)


@needs_shared
def test_rouge_of_every_pair_in_the_logs():
    pairs = 0
    for path in sorted((SHARED / "tofu_logs").glob("*.json")):
        for part in json.loads(path.read_text()).values():
            texts = part["generated_text"]
            for _, generated, answer in texts.values() if isinstance(texts, dict) else texts:
                same_rouge(generated, answer)
                pairs += 1
    assert pairs == 817 + 817 + 557


def test_stemmer_on_made_up_words():
    rng, reference = random.Random(0), PorterStemmer()
    words = set("sky skies dying news innings howe proceed exceed succeed yyyy y a is flies dies "
                "died".split())
    for _ in range(20000):
        head = "".join(rng.choice("aeiouybclstzwx") for _ in range(rng.randint(0, 6)))
        words.add(head + "".join(rng.choices(SUFFIXES, k=rng.randint(0, 2))))
    assert {w: stem(w) for w in words} == {w: reference.stem(w) for w in words}


@needs_shared
def test_stemmer_on_every_word_of_tofu():
    words, reference = set(), PorterStemmer()
    for path in [*(SHARED / "tofu").iterdir(), *(SHARED / "tofu_logs").iterdir()]:
        words |= set(re.findall("[a-z0-9]+", path.read_text(encoding="utf-8").lower()))
    assert len(words) > 10000
    assert {w: stem(w) for w in words} == {w: reference.stem(w) for w in words}


# Kolmogorov-Smirnov

def ks_by_enumeration(a, b):
    """p-value as a fraction, from all ways to divide the pooled ranks among the two samples."""
    m, n = len(a), len(b)

    def distance(chosen):
        at_a = at_b = worst = 0
        for i in range(m + n):
            at_a, at_b = (at_a + 1, at_b) if i in chosen else (at_a, at_b + 1)
            worst = max(worst, abs(Fraction(at_a, m) - Fraction(at_b, n)))
        return worst

    pooled = sorted([*a, *b])
    observed = distance({pooled.index(x) for x in a})
    every = [distance(set(c)) for c in itertools.combinations(range(m + n), m)]
    return observed, Fraction(sum(d >= observed for d in every), len(every))


@pytest.mark.parametrize("m,n", [(1, 1), (1, 5), (3, 3), (4, 6), (5, 4), (6, 7), (2, 9)])
def test_ks_against_enumeration(m, n):
    rng = random.Random(m * 100 + n)
    for _ in range(8):
        a = [rng.random() for _ in range(m)]
        b = [rng.random() + rng.random() for _ in range(n)]
        d, p = ks_by_enumeration(a, b)
        assert evaluation.ks_two_sample(a, b) == (float(d), float(p))


@pytest.mark.parametrize("m,n", [(10, 10), (300, 300), (40, 300), (299, 301), (200, 400),
                                 (7, 1000)])
@pytest.mark.parametrize("shift", [0.0, 0.1, 0.5, 1.0])
def test_ks_against_scipy(m, n, shift):
    rng = random.Random(f"{m} {n} {shift}")
    a, b = [rng.gauss(0, 1) for _ in range(m)], [rng.gauss(shift, 1) for _ in range(n)]
    want = ks_2samp(a, b, method="exact")
    d, p = evaluation.ks_two_sample(a, b)
    assert d == pytest.approx(want.statistic, rel=1e-9)
    assert p == pytest.approx(want.pvalue, rel=1e-9)


def test_ks_with_ties_against_scipy():
    rng = random.Random(5)
    for _ in range(20):
        a = [rng.randint(0, 9) for _ in range(60)]
        b = [rng.randint(2, 11) for _ in range(45)]
        want = ks_2samp(a, b, method="exact")
        want = want.statistic, want.pvalue
        assert evaluation.ks_two_sample(a, b) == pytest.approx(want, rel=1e-9)


def test_ks_far_in_the_tail():
    """Disjoint samples: two paths of all. And one crossing: the outer paths counted by the
    reflection principle."""
    for m, n in ((300, 300), (250, 400), (400, 173)):
        want = Fraction(2, math.comb(m + n, n))
        d, p = evaluation.ks_two_sample(range(m), range(1000, 1000 + n))
        assert d == 1 and p == pytest.approx(float(want), rel=1e-15)
    n, gap = 300, 280  # equal sizes: paths that reach +-gap, by repeated reflection
    outside = 2 * sum((-1) ** (k - 1) * math.comb(2 * n, n + k * gap)
                      for k in range(1, n // gap + 1))
    want = Fraction(outside, math.comb(2 * n, n))
    d, p = evaluation.ks_two_sample(range(n), range(gap, gap + n))
    assert want < Fraction(1, 10**120) and d == gap / n
    assert p == pytest.approx(float(want), rel=1e-15)


def test_ks_of_equal_samples_and_of_nothing():
    assert evaluation.ks_two_sample(torch.tensor([1.0, 2.0]), [2, 1]) == (0, 1)
    assert evaluation.forget_quality([1, 2, 3], [1, 2, 3]) == 1
    for bad in ([], [math.nan]):
        with pytest.raises(ValueError):
            evaluation.ks_two_sample(bad, [1.0])


# The others

@settings(max_examples=200, deadline=None)
@given(*[st.lists(st.integers(-5, 5), min_size=1, max_size=40)] * 2)
def test_auroc_with_ties_against_sklearn(positives, negatives):
    want = roc_auc_score([1] * len(positives) + [0] * len(negatives), positives + negatives)
    assert evaluation.auroc(positives, negatives) == pytest.approx(want, abs=1e-12)


def test_truth_ratio():
    # the true p over the geometric mean of the false
    want = math.exp(-2.0) / math.sqrt(math.exp(-1.0) * math.exp(-4.0))
    assert evaluation.truth_ratio(2.0, torch.tensor([1.0, 4.0])) == pytest.approx(want)
    assert 1e307 < evaluation.truth_ratio(0.0, [5000.0]) < math.inf  # JSON has no infinity
    assert 0 < evaluation.truth_ratio(5000.0, [0.0]) < 1e-307  # and 1/R is a number, too
    assert evaluation.preference(4.0) == 0.75 and evaluation.preference(0.25) == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-6, 1), min_size=9, max_size=9))
def test_model_utility_is_the_harmonic_mean(parts):
    assert evaluation.model_utility(parts) == pytest.approx(hmean(parts), rel=1e-12)
    assert evaluation.model_utility([0.0, *parts[1:]]) == 0


@pytest.mark.parametrize("right,strength,share", [
    ("111", 1, 1), ("000", 0, 0), ("001", 1 / 3, 1 / 3), ("110", 0, 2 / 3), ("1011", 1 / 2, 3 / 4),
    ("1", 1, 1)])
def test_memorization_by_hand(right, strength, share):
    """Of all tokens but the end, which may be wrong."""
    right = [c == "1" for c in right]
    assert evaluation.extraction_strength(right) == pytest.approx(strength)
    scores = -torch.ones(len(right) + 1), torch.tensor([*right, False]), torch.zeros(len(right) + 1)
    kept = evaluation.scored("holdout", {"question": "q", "answer": "a"}, [scores])
    assert kept["extraction_strength"] == pytest.approx(strength)
    assert kept["exact_memorization"] == pytest.approx(share)


def test_min_k():
    assert evaluation.min_k([-5, -1, -2, -4, -3]) == 4.5  # the two lowest of five
    assert math.isnan(evaluation.min_k([-1, -2]))  # 40% of two tokens is none
    assert evaluation.min_k([-1, -2], least=1) == 2


def test_privleak():
    assert evaluation.privleak(0.3, 0.6) == pytest.approx(-50)
    assert "is 0" in attempt(evaluation.privleak, 0.3, 0.0)


def test_values_of_one_question():
    true, first, second, said = (math.exp(-x) for x in (1.0, 2.0, 3.0, 1.5))
    values = evaluation.tofu_values("world_facts", 1.0, 1.0, [2.0, 3.0])
    assert values["probability"] == pytest.approx(true / (true + first + second))
    values = evaluation.tofu_values("forget", 1.0, 1.5, [2.0, 3.0])
    assert values["probability"] == pytest.approx(true)
    assert values["paraphrased_probability"] == pytest.approx(said)
    assert values["truth_ratio"] == pytest.approx(said / math.sqrt(first * second))
    assert evaluation.knowledge(values["truth_ratio"]) == pytest.approx(
        said / (said + math.sqrt(first * second)))
    tiny = evaluation.tofu_values("world_facts", 2000.0, 2000.0, [2000.0])
    assert tiny["probability"] == pytest.approx(0.5)
    for nlls in ((math.nan, 1.0, [2.0]), (1.0, math.inf, [2.0]), (1.0, 1.0, [2.0, math.nan])):
        values = evaluation.tofu_values("forget", *nlls)
        assert {values[name] for name in ("probability", "paraphrased_probability",
                                          "truth_ratio")} == {None}


def test_values_kept_from_before_are_computed_anew():
    """From their nlls. A number without value stays without one."""
    kept = {"nll": 1.0, "paraphrased_nll": 1.5, "perturbed_nll": [2.0, 3.0], "truth_ratio": 0.7}
    lost = {**kept, "nll": None}
    values = evaluation.complete(evaluation.tofu_metrics, {"forget": [kept, lost]})["forget"]
    assert values[0]["truth_ratio"] == pytest.approx(math.exp(2.5 - 1.5))
    assert values[1]["truth_ratio"] is None


# The table

def test_names_of_files_cannot_break_the_table():
    columns = {"a|b\x1b[31m\n": {"x|y": 1.0, "z": "no | here\x07"}}
    head, line, *rows, _, note = format_table(columns).splitlines()
    assert (head.split(), line) == (["|", "|", r"a\|b?[31m", "|"], "| ---- | --------- |")
    assert rows[0].startswith(r"| x\|y |") and note == r"[1] no | here?  "


@pytest.mark.parametrize("names, titles", [
    (["runs/a/eval.json", "../b.json", "c/d-4bit"], ["a", "b.json", "d-4bit"]),
    (["x/a", "y/a"], ["x/a", "y/a"])])
def test_titles_are_short_unless_two_would_be_the_same(names, titles):
    head = format_table({name: {"row": 1.0} for name in names}).split("\n")[0]
    assert head.replace("|", "").split() == titles


def test_reasons_become_footnotes():
    values = {"forget": [{"x": 1.0}, {"x": None}], "holdout": []}
    assert attempt(field_of, values, "forget", "x").endswith("in 1 of 2 forget examples")
    for split, field in (("forget", "y"), ("holdout", "x")):
        assert attempt(field_of, values, split, field).startswith("not in its file")
    with pytest.raises(Undefined):
        field_of(values, "retain", "x")
    columns = {"a": {"KS (p)": 1e-9, "x": "no x", "PrivLeak": -1.0},
               "b": {"KS (p)": 0.5, "x": 2.0, "PrivLeak": "no y", "z": 3}}
    lines = [[cell.strip() for cell in line.strip("| ").split("|")]
             for line in format_table(columns).splitlines()]
    assert lines == [["a", "b"], ["--------", "-----", "-----"], ["KS (p)", "1e-09", "0.5"],
                     ["x", "- [1]", "2"], ["PrivLeak", "-1", "- [2]"], ["z", "- [3]", "3"], [""],
                     ["[1] no x"], ["[2] no y"], ["[3] not measured"]]


# The official logs

# In the repository: losses and ROUGE of ten questions a split; in ../shared: the whole logs.
EXCERPT, WHOLE = ROOT / "tests" / "official_logs", SHARED / "tofu_logs"
folders = pytest.mark.parametrize(
    "folder", [EXCERPT, pytest.param(WHOLE, marks=needs_shared)], ids=["excerpt", "whole"])


def official_rows(log):
    """TOFU's numbers from a log's losses, as its paper and official code define them; R of each
    forget question."""
    rows, ratios = {}, {}
    for name, split in (("eval_log.json", "retain"), ("eval_log_forget.json", "forget"),
                        ("eval_real_author_wo_options.json", "real authors"),
                        ("eval_real_world_wo_options.json", "world facts")):
        true, said, false, recall = (
            numpy.array(list(column.values()) if isinstance(column, dict) else column)
            for column in (log[name][field] for field in (
                "avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall")))
        p = numpy.exp(-true)
        if "wo_options" in name:  # among the answers offered
            p = p / (p + numpy.exp(-false).sum(1))
        # p of the paraphrase over the geometric mean of p of the false answers
        ratios[split] = r = numpy.exp(-said) / numpy.exp(-false).prod(1) ** (1 / false.shape[1])
        share = numpy.minimum(r, 1 / r) if split == "forget" else numpy.maximum(0, 1 - 1 / r)
        rows |= {f"{split} probability": p.mean(), f"{split} ROUGE-L recall": recall.mean(),
                 f"{split} truth ratio": share.mean()}
        if split == "forget":
            rows["forget paraphrase probability"] = numpy.exp(-said).mean()
            rows["forget knowledge score"] = (r / (1 + r)).mean()
    rows["model utility"] = hmean([value for row, value in rows.items() if "forget" not in row])
    return rows, ratios["forget"]


@folders
def test_table_of_official_logs(folder, capsys):
    """eval.py on two logs prints what numpy and scipy find in them."""
    full, retain = paths = [folder / f"llama2-7b_{name}.json" for name in ("full", "retain90")]
    assert evaluation.main([str(full), "--reference", str(retain)]) == 0
    printed = table_of(capsys.readouterr().out)
    (want, r), (retrained, r_retrained) = (official_rows(json.loads(path.read_text()))
                                           for path in paths)
    assert len(want) == 15
    for row, value in want.items():
        assert printed[row] == [f"{retrained[row]:.6g}", f"{value:.6g}"]
    test = ks_2samp(r, r_retrained, method="exact")
    assert printed["forget quality (KS p)"] == ["1", f"{test.pvalue:.6g}"]
    assert printed["forget quality (KS D)"] == ["0", f"{test.statistic:.6g}"]


@needs_shared
def test_known_numbers_of_official_logs(capsys):
    """Of the whole logs, one of which has lists where the others have numbered questions."""
    full, retain, lists = (str(WHOLE / f"llama2-7b_{name}.json")
                           for name in ("full", "retain90", "retain99_lists"))
    assert evaluation.main([full, "--reference", retain]) == 0
    out = capsys.readouterr().out
    assert "0.622677" in out and "1.83407e-21" in out and "0.396667" in out
    assert table_of(out)["forget exact memorization"] == ["- [1]", "- [1]"]
    assert "[1] not in its file" in out
    assert table_of(out)["records of forget"] == ["300", "300"]
    assert table_of(out)["records of world_facts"] == ["117", "117"]
    assert evaluation.main([retain]) == 0 and "0.613745" in capsys.readouterr().out
    assert evaluation.main([lists]) == 0
    out = capsys.readouterr().out
    assert "0.622015" in out and "needs a retrained model" in out


@needs_shared
@pytest.mark.parametrize("log, forget, limit, questions", [
    ("retain90", "forget10", 300, None), ("retain90", "forget10", 400, 400),
    ("retain90", "forget05", 300, 200), ("retain90", "forget01", 300, 40),
    ("retain99_lists", "forget05", 40, 40)])  # of forget01, which has as many questions
def test_official_logs_belong_to_their_forget_set(log, forget, limit, questions, tmp_path, capsys,
                                                  monkeypatch):
    """Known before any model is loaded."""
    def load(*args):
        raise InputError("loaded")

    monkeypatch.setattr(evaluation, "load", load)
    reference = SHARED / "tofu_logs" / f"llama2-7b_{log}.json"
    flags = ["--forget", SHARED / "tofu" / forget, "--limit", limit, "--reference", reference]
    assert evaluation.main([write_model(tmp_path / "model"), *map(str, flags)]) == 2
    told = f"{reference}: was not asked the model's {questions} forget questions"
    assert (told if questions else "loaded") in capsys.readouterr().err


# What comes back

@pytest.mark.parametrize("scores", [[0.2, 0.9, 0.4, 0.9, 0.0], [1, 0, 0, 1, 1, 0], [0.3]])
def test_leak_at_k_is_the_mean_best_of_all_choices(scores):
    for k in range(1, len(scores) + 1):
        best = [max(chosen) for chosen in itertools.combinations(scores, k)]
        assert evaluation.leak_at_k(scores, k) == pytest.approx(sum(best) / len(best), abs=1e-12)


@pytest.mark.parametrize("n, right", [(6, 2), (16, 1), (5, 0), (4, 4)])
def test_leak_at_k_of_right_and_wrong_is_pass_at_k(n, right):
    for k in range(1, n + 1):
        expected = 1 - math.comb(n - right, k) / math.comb(n, k)
        leak = evaluation.leak_at_k([1] * right + [0] * (n - right), k)
        assert leak == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_rounded_to_the_nearest_level_of_their_block(bits):
    """Against numpy, a block of 64 at a time; embeddings, head, norms and biases stay."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=20, n_layer=1, n_head=2, n_positions=8,
                                       tie_word_embeddings=False))
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    evaluation.quantize(model, bits)
    changed = set()
    for name, p in model.named_parameters():
        got, flat = p.detach().numpy().ravel(), before[name].ravel()
        if (got != flat).any():
            changed.add(name)
        for i in range(0, len(flat) if name in changed else 0, 64):
            block = flat[i:i + 64]
            levels = numpy.linspace(-1, 1, 2**bits - 1) * numpy.abs(block).max()
            nearest = levels[numpy.abs(block[:, None] - levels).argmin(1)]
            numpy.testing.assert_allclose(got[i:i + 64], nearest, rtol=1e-5, atol=1e-7)
    assert changed == {name for name in before if name.endswith("weight")
                       and ("attn" in name or "mlp" in name)}
