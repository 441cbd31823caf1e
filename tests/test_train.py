"""The training loop: a step's gradient however it is split, data order, and whole runs of a tiny model."""

import argparse
import contextlib
import functools
import json
import math
import os
import random
import shutil
import signal
import socket
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import multiprocessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedTokenizerFast

import simnpo
import train
from data.load import Example

LOSSES = [(loss, retain) for loss in ("simnpo", "npo", "ga") for retain in ("nll", "kl", "none")]


# One step's gradient

def tiny(seed=0, tied=False):
    """A GPT-2, whose arithmetic is float64 throughout (Llama's norms compute in fp32), without dropout."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3, tie_word_embeddings=tied,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=1)).double()


def sequences(n, seed):
    """n Examples of 4 to 20 tokens, each with its own prompt length."""
    rng = random.Random(seed)
    lengths = [rng.randint(4, 20) for _ in range(n)]
    return [Example([rng.randrange(2, 50) for _ in range(size)], rng.randint(1, size - 1)) for size in lengths]


FORGET, RETAIN = sequences(7, 1), sequences(9, 2)
REF_LOGPS = torch.linspace(-60, -5, 7, dtype=torch.float64)


def arguments(loss="simnpo", retain_loss="nll", max_tokens=10**9, **more):
    return argparse.Namespace(loss=loss, retain_loss=retain_loss, max_tokens=max_tokens, beta=0.8, gamma=0.3,
                              forget_weight=0.7, retain_weight=1.3, device=torch.device("cpu"), **more)


def plain_loss(model, reference, forget, retain, loss, retain_loss):
    """The step's loss as DESIGN writes it, a sequence at a time, on full logits: forget and retain term."""
    def logps(net, example):
        logits = net(input_ids=torch.tensor([example.input_ids])).logits[0, example.start - 1:-1]
        return logits.log_softmax(-1)

    forget_term = retain_term = tokens = 0
    for example, ref in zip(forget, REF_LOGPS):
        targets = torch.tensor(example.input_ids[example.start:])
        nll = -logps(model, example).gather(1, targets[:, None]).sum()
        size = len(targets)
        forget_term += {"simnpo": -2 / 0.8 * (0.8 / size * nll - 0.3).sigmoid().log(),
                        "npo": -2 / 0.8 * (-0.8 * (-nll - ref)).sigmoid().log(), "ga": -nll / size}[loss] / len(forget)
    for example in retain:
        p, targets = logps(model, example), torch.tensor(example.input_ids[example.start:])
        tokens += len(targets)
        if retain_loss == "kl":
            q = logps(reference, example).detach()
            retain_term += (q.exp() * (q - p)).sum()
        else:
            retain_term -= p.gather(1, targets[:, None]).sum()
    return forget_term, retain_term / max(1, tokens)


def step(model, reference, forget, retain, args):
    """Our gradient: {name: tensor}, and the two losses."""
    model.zero_grad()
    objective = train.Objective(model, reference if args.retain_loss == "kl" else None)
    ref_logps = REF_LOGPS[:len(forget)] if args.loss == "npo" else None
    losses = train.step_gradient(objective, forget, retain, ref_logps, args, contextlib.nullcontext)
    return {name: p.grad.clone() for name, p in model.named_parameters()}, losses


@functools.cache
def expected_step(loss, retain_loss):
    model, reference = tiny(), tiny(seed=1)
    retain = RETAIN if retain_loss != "none" else []
    terms = plain_loss(model, reference, FORGET, retain, loss, retain_loss)
    (0.7 * terms[0] + 1.3 * terms[1]).backward()
    return {name: p.grad for name, p in model.named_parameters()}, [float(torch.as_tensor(t).detach()) for t in terms]


def assert_close(got, want, tolerance):
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("max_tokens", [1, 23, 60, 10**9])
@pytest.mark.parametrize("loss, retain_loss", LOSSES)
def test_gradient_is_that_of_the_formula_however_it_is_split(loss, retain_loss, max_tokens):
    retain = RETAIN if retain_loss != "none" else []
    got, losses = step(tiny(), tiny(seed=1), FORGET, retain, arguments(loss, retain_loss, max_tokens))
    want, terms = expected_step(loss, retain_loss)
    assert max(g.abs().max() for g in want.values()) > 0.01
    assert_close(got, want, 1e-9)
    assert losses.tolist() == pytest.approx(terms, rel=1e-5)


@pytest.mark.parametrize("world", [2, 3, 20])
@pytest.mark.parametrize("loss, retain_loss", [("simnpo", "nll"), ("npo", "kl"), ("ga", "none")])
def test_gradient_does_not_depend_on_the_number_of_ranks(loss, retain_loss, world, monkeypatch):
    """The mean over ranks, which is what FSDP takes; every rank makes equally many forward passes, or it would hang."""
    retain = RETAIN if retain_loss != "none" else []
    want, terms = expected_step(loss, retain_loss)
    total, losses, passes = Counter(), torch.zeros(2), []
    for rank in range(world):
        monkeypatch.setattr(train, "ranks", lambda: (rank, world))
        model = tiny()
        calls = []
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        model.get_decoder().register_forward_pre_hook(lambda *_: calls.append(1))
        grads, part = step(model, tiny(seed=1), FORGET, retain, arguments(loss, retain_loss, 45))
        total = {name: total[name] + grads[name] / world for name in grads}
        losses, passes = losses + part, passes + [len(calls)]
    assert_close(total, want, 1e-9)
    assert losses.tolist() == pytest.approx(terms, rel=1e-5)
    assert len(set(passes)) == 1 and passes[0] > 0


def test_fine_tuning_gradient():
    """Without a forget set: the token mean of the nll."""
    model = tiny()
    got, losses = step(tiny(), None, [], RETAIN, arguments("simnpo", "nll", 33))
    nll = plain_loss(model, None, [], RETAIN, "simnpo", "nll")[1]
    (1.3 * nll).backward()
    assert_close(got, {name: p.grad for name, p in model.named_parameters()}, 1e-9)
    assert losses.tolist() == pytest.approx([0, float(nll)])


def test_splits_agree_in_fp32():
    """To 1e-6 of the largest gradient, forget and retain in the same micro-batches."""
    grads = [step(tiny(tied=True).float(), None, FORGET, RETAIN, arguments(max_tokens=tokens))[0] for tokens in (1, 40, 10**9)]
    largest = max(g.abs().max() for g in grads[0].values())
    for other in grads[1:]:
        assert max((other[name] - grads[0][name]).abs().max() for name in other) <= 1e-6 * largest


def test_checkpointing_gives_the_same_gradient():
    """And really computes every layer twice."""
    results, passes = [], []
    for checkpointing in (False, True):
        model, calls = tiny(), []
        args = arguments(checkpointing=checkpointing, compile=False, forget="f", dtype="fp32", bf16_weights=False)
        objective, precision = train.prepare(model, args)
        for layer in model.transformer.h:
            layer.register_forward_pre_hook(lambda *_: calls.append(1))
            layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        train.step_gradient(objective, FORGET, RETAIN, None, args, precision)
        results.append({name: p.grad for name, p in model.named_parameters()})
        passes.append(len(calls))
    assert_close(results[1], results[0], 1e-12)
    assert passes[1] > passes[0]


def test_the_reference_has_no_dropout():
    """The frozen copy of the KL term stays in evaluation mode when the model trains."""
    objective = train.Objective(tiny(), tiny(seed=1).eval())
    train.score(objective, FORGET, arguments(), contextlib.nullcontext)
    objective.train()
    assert objective.model.training and not objective.reference.training
