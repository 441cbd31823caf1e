"""The losses against their formulas in plain Python floats, and the fast log-probabilities against
naive logits."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM,
                          GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM,
                          LlamaConfig, LlamaForCausalLM)

import simnpo
from train import answer_token_kl

VOCAB = 61
SIZE = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            bos_token_id=0, eos_token_id=1, pad_token_id=None)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=False)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True)),
    "gemma2 soft-capped": lambda: Gemma2ForCausalLM(Gemma2Config(
        **SIZE, final_logit_softcapping=0.4)),
    "cohere scaled": lambda: CohereForCausalLM(CohereConfig(
        **{k: v for k, v in SIZE.items() if k != "head_dim"}, logit_scale=0.25)),
    "granite scaled": lambda: GraniteForCausalLM(GraniteConfig(
        **{k: v for k, v in SIZE.items() if k != "head_dim"}, logits_scaling=3.0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32,
        bos_token_id=0, eos_token_id=1)),
}


def make(kind, seed=0, dtype=torch.float64):
    """A model whose logits are large enough for scaling and capping to matter, without dropout."""
    torch.manual_seed(seed)
    model = MODELS[kind]().to(dtype).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
        model.get_output_embeddings().weight.mul_(1 if model.config.tie_word_embeddings else 20)
    return model


def batch():
    """Prompts and padding of different lengths, a hole in one answer, and a label at position 0,
    which no token predicts."""
    ids = torch.randint(2, VOCAB, (4, 12), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, :3] = labels[1, :5] = labels[2, :11] = -100
    labels[1, 9:] = labels[3, 7:] = labels[0, 6] = -100
    return ids, labels


def naive_token_logps(logits, labels):
    """[(row, log-probability)] in float64, one token at a time."""
    logits = logits.double()
    return [(b, logits[b, t - 1, labels[b, t]] - torch.logsumexp(logits[b, t - 1], 0))
            for b in range(labels.shape[0]) for t in range(1, labels.shape[1])
            if labels[b, t] != -100]


def chunks_of(elements, monkeypatch, vocab=VOCAB):
    """As many logits go through the head at once."""
    monkeypatch.setattr(simnpo, "chunk_rows", lambda model: max(1, elements // vocab))


def answer_kl(model, reference, ids, labels):
    """KL(reference || model) of each answer, as train.py sums it up."""
    return simnpo.sum_answers(answer_token_kl(model, reference, ids, labels), labels)


def row_sums(pairs, rows):
    return torch.stack([sum(value for b, value in pairs if b == row) for row in range(rows)])


def gradients(model, loss):
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), grads))


def assert_same_gradients(model, loss, expected):
    got, want = gradients(model, loss), gradients(model, expected)
    assert max(g.abs().max() for g in want.values()) > 1e-3
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-11, msg=name)


# The losses

def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x):
    return min(x, 0) - math.log1p(math.exp(-abs(x)))


def value_and_slope(loss, logp):
    """A loss of one sequence and its derivative by the log-probability, both floats."""
    x = torch.tensor([logp], dtype=torch.float64, requires_grad=True)
    value = loss(x)
    assert value.shape == (1,)
    return value.item(), torch.autograd.grad(value.sum(), x)[0].item()


lengths_ = st.integers(1, 400)
token_nll = st.floats(0, 40)
betas = st.floats(0.01, 10)


@given(lengths_, token_nll, betas, st.floats(-5, 5))
def test_simnpo_value_and_gradient(length, nll, beta, gamma):
    size = torch.tensor([length])
    value, slope = value_and_slope(lambda x: simnpo.simnpo_loss(x, size, beta, gamma),
                                   -nll * length)
    assert value == pytest.approx(-2 / beta * log_sigmoid(beta * nll - gamma), rel=1e-9, abs=1e-12)
    assert slope == pytest.approx(2 / length * sigmoid(gamma - beta * nll), rel=1e-9, abs=1e-300)


@given(lengths_, st.floats(0, 3), betas)
def test_simnpo_gradient_is_the_papers_weight(length, nll, beta):
    size = torch.tensor([length])
    _, slope = value_and_slope(lambda x: simnpo.simnpo_loss(x, size, beta), -nll * length)
    pi = math.exp(-nll * beta)  # pi(y|x)^(beta/|y|)
    assert slope == pytest.approx(2 * pi / (1 + pi) / length, rel=1e-9)


@given(st.lists(st.tuples(lengths_, token_nll), min_size=1, max_size=8))
def test_simnpo_as_beta_vanishes_is_gradient_ascent_over_length(pairs):
    lengths = torch.tensor([length for length, _ in pairs])
    logps = torch.tensor([-nll * length for length, nll in pairs], dtype=torch.float64,
                         requires_grad=True)
    small, = torch.autograd.grad(simnpo.simnpo_loss(logps, lengths, 1e-9).sum(), logps)
    ascent, = torch.autograd.grad(simnpo.grad_ascent_loss(logps, lengths).sum(), logps)
    assert small.tolist() == pytest.approx([1 / length for length, _ in pairs], rel=1e-6)
    assert ascent.tolist() == pytest.approx([1 / length for length, _ in pairs], rel=1e-12)


def test_gamma_shifts_the_margin():
    """A margin of gamma makes an answer of token nll n look like one of n - gamma/beta."""
    logps, lengths = torch.tensor([-6.0, -20.0], dtype=torch.float64), torch.tensor([4, 5])
    shifted = simnpo.simnpo_loss(logps + 0.7 / 2.5 * lengths, lengths, 2.5)
    torch.testing.assert_close(simnpo.simnpo_loss(logps, lengths, 2.5, 0.7), shifted)
    plain = simnpo.simnpo_loss(logps, lengths, 2.5)
    assert (simnpo.simnpo_loss(logps, lengths, 2.5, 0.7) > plain).all()


@given(st.floats(-200, 0), st.floats(-200, 0), st.floats(0.01, 2))
def test_npo_value_and_gradient(logp, ref, beta):
    ref_logps = torch.tensor([ref], dtype=torch.float64)
    value, slope = value_and_slope(lambda x: simnpo.npo_loss(x, ref_logps, beta), logp)
    expected = -2 / beta * log_sigmoid(-beta * (logp - ref))
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert slope == pytest.approx(2 * sigmoid(beta * (logp - ref)), rel=1e-9)


@given(lengths_, token_nll)
def test_gradient_ascent_value_and_gradient(length, nll):
    size = torch.tensor([length])
    value, slope = value_and_slope(lambda x: simnpo.grad_ascent_loss(x, size), -nll * length)
    assert value == pytest.approx(-nll, rel=1e-12)
    assert slope == pytest.approx(1 / length, rel=1e-12)


def test_retain_nll_is_a_mean_over_sequences_of_token_means():
    logps = torch.tensor([-6.0, -1.0], dtype=torch.float64, requires_grad=True)
    loss = simnpo.retain_nll(logps, torch.tensor([3, 5]))
    assert loss.item() == pytest.approx((6 / 3 + 1 / 5) / 2)
    assert torch.autograd.grad(loss, logps)[0].tolist() == pytest.approx([-1 / 6, -1 / 10])


@pytest.mark.parametrize("nll", [1e-8, 30.0, 1e4])
def test_losses_stay_finite_in_fp32(nll):
    """A sequence known by heart and one that is impossible give neither inf nor nan."""
    logps = torch.tensor([-nll * 100], requires_grad=True)
    for loss in (simnpo.simnpo_loss(logps, torch.tensor([100]), 4.5, 3.0),
                 simnpo.npo_loss(logps, torch.tensor([-50.0]), 0.1)):
        slope, = torch.autograd.grad(loss.sum(), logps, retain_graph=True)
        assert loss.isfinite().all() and slope.isfinite().all()


# Log-probabilities

def test_sequence_logps():
    ids, labels = batch()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*ids.shape, VOCAB, dtype=torch.float64, generator=generator) * 4
    pairs = naive_token_logps(logits, labels)
    logps, lengths = simnpo.sequence_logps(logits, labels)
    torch.testing.assert_close(logps, row_sums(pairs, 4), rtol=1e-12, atol=1e-12)
    assert lengths.tolist() == [sum(b == row for b, _ in pairs) for row in range(4)] == [8, 4, 1, 6]


def test_half_precision_logits_are_upcast():
    """Against float64 on the same bf16 numbers: a log-softmax in bf16 would be off by 1e-2."""
    ids, labels = batch()
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(*ids.shape, VOCAB, generator=generator) * 4).bfloat16()
    logps, _ = simnpo.sequence_logps(logits, labels)
    assert logps.dtype == torch.float32
    expected = row_sums(naive_token_logps(logits, labels), 4)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("elements", [1, 3 * VOCAB, 2**24])
@pytest.mark.parametrize("kind", MODELS)
def test_answer_logps_are_those_of_the_models_logits(kind, elements, monkeypatch):
    chunks_of(elements, monkeypatch)
    model, (ids, labels) = make(kind), batch()
    simnpo.check_head(model)
    pairs = naive_token_logps(model(input_ids=ids).logits, labels)
    expected = row_sums(pairs, 4)
    logps, lengths = simnpo.answer_logps(model, ids, labels)
    torch.testing.assert_close(logps, expected, rtol=1e-10, atol=1e-10)
    assert lengths.tolist() == [8, 4, 1, 6]
    weights = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)
    assert_same_gradients(model, (weights * logps).sum(), (weights * expected).sum())
    tokens = simnpo.answer_token_logps(model, ids, labels)
    wanted = torch.stack([value for _, value in pairs])
    torch.testing.assert_close(tokens, wanted, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        logps, _ = simnpo.answer_logps(model, ids, labels)
    torch.testing.assert_close(logps, expected, rtol=1e-10, atol=1e-10)


def naive_kl(model, reference, ids, labels):
    """Sum over the vocabulary of p_ref * (log p_ref - log p), a token at a time."""
    p, q = (m(input_ids=ids).logits.log_softmax(-1) for m in (model, reference))
    q = q.detach()
    pairs = [(b, sum(q[b, t - 1, v].exp() * (q[b, t - 1, v] - p[b, t - 1, v])
                     for v in range(VOCAB)))
             for b in range(labels.shape[0]) for t in range(1, labels.shape[1])
             if labels[b, t] != -100]
    return row_sums(pairs, labels.shape[0])


@pytest.mark.parametrize("elements", [1, 5 * VOCAB])
@pytest.mark.parametrize("kind", ["llama", "gemma2 soft-capped", "gpt2"])
def test_answer_kl(kind, elements, monkeypatch):
    chunks_of(elements, monkeypatch)
    model, reference, (ids, labels) = make(kind), make(kind, seed=1), batch()
    expected = naive_kl(model, reference, ids, labels)
    kl, lengths = answer_kl(model, reference, ids, labels)
    torch.testing.assert_close(kl, expected, rtol=1e-9, atol=1e-10)
    assert lengths.tolist() == [8, 4, 1, 6] and (kl > 0).all()
    weights = torch.tensor([1.0, 0.5, 2.0, 0.3], dtype=torch.float64)
    assert_same_gradients(model, (weights * kl).sum(), (weights * expected).sum())
    answer_kl(model, reference, ids, labels)[0].sum().backward()
    assert all(p.grad is None for p in reference.parameters())


def test_kl_to_itself_is_zero_with_zero_gradient():
    model, (ids, labels) = make("llama"), batch()
    kl, _ = answer_kl(model, model, ids, labels)
    assert kl.abs().max() < 1e-12
    assert all(g.abs().max() < 1e-10 for g in gradients(model, kl.sum()).values())


@pytest.mark.parametrize("kind", MODELS)
def test_right_padding_changes_nothing(kind):
    """No attention mask is given, so whatever stands in the padding must not be looked at. (Some
    norms compute in fp32.)"""
    model, (ids, labels) = make(kind), batch()
    expected, _ = simnpo.answer_logps(model, ids, labels)
    for filler in (0, 17):
        longer = torch.nn.functional.pad(ids, (0, 5), value=filler)
        masked = torch.nn.functional.pad(labels, (0, 5), value=-100)
        logps, _ = simnpo.answer_logps(model, longer, masked)
        torch.testing.assert_close(logps, expected, rtol=1e-6, atol=1e-6)


def test_no_answer_token_is_an_error():
    model, (ids, labels) = make("llama"), batch()
    labels[2] = -100
    labels[2, 0] = 5  # the first token is predicted by nothing
    for call in (lambda: simnpo.sequence_logps(torch.zeros(4, 12, VOCAB), labels),
                 lambda: simnpo.answer_logps(model, ids, labels),
                 lambda: simnpo.answer_hidden(model, ids, labels),
                 lambda: answer_kl(model, model, ids, labels)):
        with pytest.raises(ValueError, match="answer token"):
            call()


# Kinds of models

class Unknown(LlamaForCausalLM):
    """A model that does to its logits what no configuration field says."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output


@pytest.mark.parametrize("scale", [20, 1, 1e-2])
def test_check_head_refuses_unknown_scaling(scale):
    torch.manual_seed(0)
    model = Unknown(LlamaConfig(**SIZE))
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    with pytest.raises(ValueError, match="Unknown"):
        simnpo.check_head(model)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_head_accepts_what_is_known(kind, dtype):
    model = make(kind, dtype=dtype)
    simnpo.check_head(model)
    assert all(p.grad is None for p in model.parameters())


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives, backward included."""
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = (t for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        self.elements = max([self.elements] + [t.numel() for t in tensors])
        return result


@pytest.mark.parametrize("kl", [False, True])
def test_logits_of_all_positions_are_never_held(kl, monkeypatch):
    """B T V is 3.1 million numbers here, the answers' logits 0.6 million, a chunk of them and the
    weights 50,000."""
    vocab, chunk = 3001, 50_000
    chunks_of(chunk, monkeypatch, vocab)
    config = LlamaConfig(**{**SIZE, "vocab_size": vocab})
    model, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
    ids = torch.randint(2, vocab, (8, 130))
    labels = torch.where(torch.arange(130) > 104, ids, -100)
    with Largest() as naive:
        simnpo.sequence_logps(model(input_ids=ids).logits, labels)[0].sum().backward()
    assert naive.elements >= 8 * 130 * vocab  # the instrument sees what is there
    with Largest() as ours:
        values, _ = (answer_kl(model, reference, ids, labels) if kl
                     else simnpo.answer_logps(model, ids, labels))
        values.sum().backward()
    assert ours.elements <= max(chunk, model.lm_head.weight.numel())


class Wrapped(torch.nn.Module):
    """A head with a weight that is no plain nn.Linear, as adapters make them."""

    def __init__(self, head):
        super().__init__()
        self.head, self.extra = head, torch.nn.Linear(16, VOCAB, bias=False, dtype=torch.float64)

    weight = property(lambda self: self.head.weight)

    def forward(self, hidden):
        return self.head(hidden) + self.extra(hidden)


def with_head(kind):
    """A model whose head is tied, has a bias, is frozen, or is no plain nn.Linear."""
    model = make("llama tied" if kind == "tied" else "llama")
    if kind == "bias":
        model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB, dtype=torch.float64))
    elif kind == "frozen":
        model.lm_head.requires_grad_(False)
    elif kind == "wrapped":
        model.lm_head = Wrapped(model.lm_head)
    elif kind == "frozen body":
        model.get_decoder().requires_grad_(False)
    return model


@pytest.mark.parametrize("kind", ["tied", "bias", "frozen", "wrapped", "frozen body"])
def test_any_head_gets_its_gradient(kind, monkeypatch):
    """Twice through one graph, as who weighs two losses by their gradients does, and added to what
    is there."""
    chunks_of(3 * VOCAB, monkeypatch)
    model, (ids, labels) = with_head(kind), batch()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain, _ = simnpo.sequence_logps(model(input_ids=ids).logits, labels)
    first, both = (torch.autograd.grad(loss, trained.values(), retain_graph=True)
                   for loss in (plain[0], plain.sum()))
    assert max(g.abs().max() for g in both) > 1e-3
    logps, _ = simnpo.answer_logps(model, ids, labels)
    for got, want in zip(torch.autograd.grad(logps[0], trained.values(), retain_graph=True), first):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    logps.sum().backward(retain_graph=True)
    logps[0].backward()
    for (name, p), *expected in zip(trained.items(), first, both):
        torch.testing.assert_close(p.grad, sum(expected), rtol=1e-9, atol=1e-11, msg=name)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("reduce", [torch.sum, lambda values: values.square().sum()])
@pytest.mark.parametrize("which", ["answer_logps", "answer_kl"])
def test_differentiating_twice_is_an_error(which, reduce):
    """And no silently wrong number, whether the first derivative depends on the values or not."""
    model, (ids, labels) = make("llama"), batch()
    values, _ = {
        "answer_logps": lambda: simnpo.answer_logps(model, ids, labels),
        "answer_kl": lambda: answer_kl(model, make("llama", seed=1), ids, labels)}[which]()
    with pytest.raises(RuntimeError, match="only once"):
        slopes = torch.autograd.grad(reduce(values), list(model.parameters()), create_graph=True)
        sum(slope.square().sum() for slope in slopes).backward()


def test_under_bf16_autocast():
    """Values and gradients of the head near those of float64 on the same hidden states."""
    model, (ids, labels) = make("llama", dtype=torch.float32), batch()
    hidden, targets = simnpo.answer_hidden(model, ids, labels)
    exact = make("llama").lm_head.requires_grad_()
    want = exact(hidden.detach().double()).log_softmax(-1)[range(len(targets)), targets]
    with torch.autocast("cpu", torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        patch.setattr(simnpo, "answer_hidden", lambda *_: (hidden.detach(), targets))
        chunks_of(3 * VOCAB, patch)
        got = simnpo.answer_token_logps(model, ids, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.02)
    got.sum().backward()
    want.sum().backward()
    difference = (model.lm_head.weight.grad - exact.weight.grad).norm() / exact.weight.grad.norm()
    assert 0 < difference < 0.02


class Made(TorchDispatchMode):
    """Keeps the data of every tensor of as many numbers, by address: its data only, since autograd
    copies what is held."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.storages = numel, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        same = (t for t in tree_leaves(result)
                if isinstance(t, torch.Tensor) and t.numel() == self.numel)
        self.storages |= {t.data_ptr(): t.untyped_storage() for t in same}
        return result


@pytest.mark.parametrize("kl", [False, True])
def test_the_heads_gradient_is_added_up_in_place(kl, monkeypatch):
    """One tensor of its size, where autograd makes several: 19 answer tokens, 3 of them a chunk."""
    chunks_of(3 * VOCAB, monkeypatch)
    (ids, labels), made = batch(), {}
    for kind in ("llama", "wrapped"):
        model, reference = with_head(kind), make("llama", seed=1)
        model.get_input_embeddings().requires_grad_(False)
        with Made(VOCAB * 16) as mode:
            values, _ = (answer_kl(model, reference, ids, labels) if kl
                         else simnpo.answer_logps(model, ids, labels))
            values.sum().backward()
        own = {p.data_ptr() for m in (model, reference) for p in m.parameters()}
        made[kind] = mode.storages.keys() - own
    assert len(made["llama"]) == 1
    assert len(made["wrapped"]) > 3


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(2, 10), st.integers(0, 2**31), st.integers(1, 400))
def test_any_labels_any_chunk(rows, width, seed, elements):
    """Whatever the answers' places and the chunk, the fast way equals the plain way."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (rows, width), generator=generator)
    labels = torch.where(torch.rand(rows, width, generator=generator) < 0.5, ids, -100)
    labels[:, -1] = ids[:, -1]
    model = shared_model()
    with pytest.MonkeyPatch.context() as patch:
        chunks_of(elements, patch)
        logps, lengths = simnpo.answer_logps(model, ids, labels)
    expected, counts = simnpo.sequence_logps(model(input_ids=ids).logits, labels)
    torch.testing.assert_close(logps, expected, rtol=1e-10, atol=1e-10)
    assert lengths.tolist() == counts.tolist() == (labels[:, 1:] != -100).sum(1).tolist()


@functools.cache
def shared_model():
    return make("llama")
