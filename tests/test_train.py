"""The training loop: a step's gradient however it is split, data order, and whole runs of a
tiny model."""

import argparse
import functools
import json
import math
import random
import shutil
import signal
import sys
from collections import Counter

import pytest
import torch
from conftest import (RECORDS, SERVER, be_rank, free_port, log, stop_after, weights,
                      write_data, write_lines, write_model)
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel,
                          LlamaConfig, PreTrainedTokenizerFast)

import train
from data.load import Example, collate, load_examples
from data.support import distributed
from data.support.optim import stochastic_round
from simnpo import answer_logps

LOSSES = [(loss, retain) for loss in ("simnpo", "npo", "ga") for retain in ("nll", "kl", "none")]


# One step's gradient

def tiny(seed=0, tied=False):
    """A GPT-2, whose arithmetic is float64 throughout (Llama's norms compute in fp32),
    without dropout."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3,
        tie_word_embeddings=tied, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=1)).double()


def sequences(n, seed):
    """n Examples of 4 to 20 tokens, each with its own prompt length."""
    rng = random.Random(seed)
    lengths = [rng.randint(4, 20) for _ in range(n)]
    return [Example([rng.randrange(2, 50) for _ in range(size)], rng.randint(1, size - 1))
            for size in lengths]


FORGET, RETAIN = sequences(7, 1), sequences(9, 2)
REF_LOGPS = torch.linspace(-60, -5, 7, dtype=torch.float64)


def arguments(loss="simnpo", retain_loss="nll", max_tokens=10**9, **more):
    return argparse.Namespace(**{**dict(
        loss=loss, retain_loss=retain_loss, max_tokens=max_tokens, beta=0.8, gamma=0.3,
        forget_weight=0.7, retain_weight=1.3, device=torch.device("cpu")), **more})


def plain_loss(model, reference, forget, retain, loss, retain_loss):
    """Forget and retain term as DESIGN writes them, a sequence at a time, on full logits."""
    def logps(net, example):
        logits = net(input_ids=torch.tensor([example.input_ids])).logits[0, example.start - 1:-1]
        return logits.log_softmax(-1)

    forget_term = retain_term = 0
    for example, ref in zip(forget, REF_LOGPS):
        targets = torch.tensor(example.input_ids[example.start:])
        nll = -logps(model, example).gather(1, targets[:, None]).sum()
        size = len(targets)
        forget_term += {"simnpo": -2 / 0.8 * (0.8 / size * nll - 0.3).sigmoid().log(),
                        "npo": -2 / 0.8 * (-0.8 * (-nll - ref)).sigmoid().log(),
                        "ga": -nll / size}[loss] / len(forget)
    for example in retain:
        p, targets = logps(model, example), torch.tensor(example.input_ids[example.start:])
        if retain_loss == "kl":
            q = logps(reference, example).detach()
            term = (q.exp() * (q - p)).sum()
        else:
            term = -p.gather(1, targets[:, None]).sum()
        retain_term += term / len(targets) / len(retain)
    return forget_term, retain_term


def step(model, reference, forget, retain, args):
    """The gradient of main's two loops over micro-batches: {name: tensor}, and the two losses."""
    model.zero_grad()
    wrapped = train.AnswerModel(model, reference if args.retain_loss == "kl" else None)
    losses = torch.zeros(2)
    for indices, scale in train.micro_batches(forget, range(len(forget)), args.max_tokens):
        ref_logps = REF_LOGPS if args.loss == "npo" else None
        loss = scale * train.forget_losses(wrapped, forget, indices, ref_logps, args).sum()
        (args.forget_weight * loss).backward()
        losses[0] += loss.item()
    for indices, scale in train.micro_batches(retain, range(len(retain)), args.max_tokens):
        loss = scale * train.retain_losses(wrapped, retain, indices, args).sum()
        (args.retain_weight * loss).backward()
        losses[1] += loss.item()
    return {name: p.grad.clone() for name, p in model.named_parameters()}, losses


@functools.cache
def expected_step(loss, retain_loss):
    model, reference = tiny(), tiny(seed=1)
    retain = RETAIN if retain_loss != "none" else []
    terms = plain_loss(model, reference, FORGET, retain, loss, retain_loss)
    (0.7 * terms[0] + 1.3 * terms[1]).backward()
    losses = [float(torch.as_tensor(t).detach()) for t in terms]
    return {name: p.grad for name, p in model.named_parameters()}, losses


def assert_close(got, want, tolerance):
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=tolerance, atol=tolerance,
                                   msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("max_tokens", [1, 23, 60, 10**9])
@pytest.mark.parametrize("loss, retain_loss", LOSSES)
def test_gradient_is_that_of_the_formula_however_it_is_split(loss, retain_loss, max_tokens):
    retain = RETAIN if retain_loss != "none" else []
    args = arguments(loss, retain_loss, max_tokens)
    got, losses = step(tiny(), tiny(seed=1), FORGET, retain, args)
    want, terms = expected_step(loss, retain_loss)
    assert max(g.abs().max() for g in want.values()) > 0.01
    assert_close(got, want, 1e-9)
    assert losses.tolist() == pytest.approx(terms, rel=1e-5)


def test_fine_tuning_gradient():
    """Without a forget set: the mean over sequences of the token mean of the nll."""
    model = tiny()
    got, losses = step(tiny(), None, [], RETAIN, arguments(max_tokens=33))
    nll = plain_loss(model, None, [], RETAIN, "simnpo", "nll")[1]
    (1.3 * nll).backward()
    assert_close(got, {name: p.grad for name, p in model.named_parameters()}, 1e-9)
    assert losses.tolist() == pytest.approx([0, nll.item()])


def test_retain_term_is_transformers_own_loss_one_sequence_a_device():
    """The official setting: the Trainer's loss of each sequence alone, averaged over devices."""
    model = tiny()
    losses = [model(input_ids=ids, labels=labels).loss
              for ids, labels in (collate([e]) for e in RETAIN)]
    torch.stack(losses).mean().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    got, _ = step(tiny(), None, [], RETAIN, arguments(retain_weight=1.0))
    assert_close(got, want, 1e-7)  # its log-softmax is taken in fp32


def test_splits_agree_in_fp32():
    """To 1e-6 of the largest gradient."""
    grads = [step(tiny(tied=True).float(), None, FORGET, RETAIN, arguments(max_tokens=tokens))[0]
             for tokens in (1, 40, 10**9)]
    largest = max(g.abs().max() for g in grads[0].values())
    for other in grads[1:]:
        assert max((other[name] - grads[0][name]).abs().max() for name in other) <= 1e-6 * largest


lengths_ = st.lists(st.integers(2, 40), min_size=1, max_size=30)


@given(lengths_, st.integers(1, 5), st.integers(1, 100), st.lists(st.integers(1, 45), max_size=2),
       st.randoms())
def test_micro_batches_of_all_ranks_are_the_step(lengths, world, max_tokens, borders, rng):
    """Each index once, a mean's share each; all ranks get equally many, fillers without weight.
    No batch has texts of both sides of a border."""
    data = [Example([2] * n, 1) for n in lengths]
    at = [rng.randrange(len(data)) for _ in range(rng.randint(1, 20))]  # a stream may repeat
    plans = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world", lambda: world)
        for rank in range(world):
            patch.setattr(distributed, "rank", lambda: rank)
            plans.append(train.micro_batches(data, at, max_tokens, borders))
    assert len({len(plan) for plan in plans}) == 1
    counted = [(i, share) for plan in plans for batch, share in plan for i in batch if share]
    assert Counter(i for i, _ in counted) == Counter(at)
    assert {share for _, share in counted} == {world / len(at)}  # FSDP takes the mean over ranks
    for batch, _ in (b for plan in plans for b in plan):
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens
        assert all(len({lengths[i] > border for i in batch}) == 1 for border in borders)


def test_checkpointing_gives_the_same_gradient():
    """And really computes every layer twice."""
    results, passes = [], []
    for checkpointing in (False, True):
        model, calls = tiny(), []
        model.train()
        train.adapt(model, arguments(checkpointing=checkpointing, compile=False))
        for layer in model.transformer.h:
            layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        results.append(step(model, None, FORGET, RETAIN, arguments())[0])
        passes.append(len(calls))
    assert_close(results[1], results[0], 1e-12)
    assert passes[1] > passes[0]


def test_the_reference_has_no_dropout():
    """The frozen copy of the KL term stays in evaluation mode when the model trains."""
    model = train.AnswerModel(tiny(), tiny(seed=1).eval())
    train.score(model, FORGET, arguments())
    model.train()
    assert model.lm.training and not model.reference.training


# Data order and learning rate

@pytest.mark.parametrize("n, batch", [(10, 4), (10, 10), (7, 2), (3, 8), (200, 32)])
def test_passes_follow_each_other_without_a_gap(n, batch):
    """Every n indices of the stream are each example once, in a new order; every batch is full."""
    steps = [train.draw(n, step * batch, batch, seed=3) for step in range(6 * n)]
    assert all(len(at) == batch for at in steps)
    stream = [i for at in steps for i in at]
    passes = [tuple(stream[i:i + n]) for i in range(0, 6 * n, n)]
    assert all(sorted(one) == list(range(n)) for one in passes) and len(set(passes)) > 1


def test_order_is_a_function_of_seed_and_step():
    """Whatever was asked before, and whatever state torch's and random's generators are in."""
    def order(seed, steps):
        return {step: train.draw(50, 8 * step, 8, seed) for step in steps}

    first = order(1, range(30))
    torch.manual_seed(99), random.seed(99)
    assert order(1, reversed(range(30))) == first == {**first, **order(1, [29])}
    assert order(2, range(30)) != first


@pytest.mark.parametrize("epochs, n, batch, warmup", [
    (10, 200, 32, 1.0), (10, 7, 7, 1.0), (3, 40, 4, 0.0), (2, 36, 4, 0.5), (1, 20, 4, 1.0)])
def test_linear_schedule(epochs, n, batch, warmup):
    """Up to the peak in the warm-up's whole steps, down to what would be 0 after the last."""
    args = argparse.Namespace(schedule="linear", lr=2.0, warmup_epochs=warmup)
    total, warm = epochs * n // batch, int(warmup * n // batch)
    rates = [train.learning_rate(args, step, total, n / batch) for step in range(total)]
    expected = [2.0 * (s + 1) / (warm + 1) if s < warm else 2.0 * (total - s) / (total - warm)
                for s in range(total)]
    assert rates == pytest.approx(expected) and min(rates) > 0
    assert total == warm or max(rates) == rates[warm] == 2.0


def test_constant_schedule():
    args = argparse.Namespace(schedule="constant", lr=3e-5, warmup_epochs=1.0)
    assert {train.learning_rate(args, step, 20, 5.0) for step in range(20)} == {3e-5}


# bf16 weights

@pytest.mark.parametrize("value", [1.0 + 2**-10, -3.3, 1e-30, 123456.789, 1 + 2**-8, 2.0, 0.0])
def test_stochastic_rounding_is_unbiased(value):
    """Only the two bf16 neighbours come up, in the proportion that makes the mean right
    (5 standard errors)."""
    torch.manual_seed(0)
    x = torch.full((40_000,), value)
    rounded = stochastic_round(x)
    assert torch.equal(rounded, rounded.bfloat16().float()) and len(rounded.unique()) <= 2
    exact, gap = float(x[0]), max(rounded.max() - rounded.min(), torch.tensor(0.0)).item()
    assert rounded.min() <= exact <= rounded.max() and gap <= 2**-7 * abs(exact)
    assert abs(rounded.double().mean().item() - exact) <= 5 * gap / 2 / math.sqrt(40_000)


def test_stochastic_adamw_follows_adamw_where_plain_rounding_stands_still():
    """300 updates of 1/10 of a bf16 step each, with weight decay."""
    torch.manual_seed(0)
    start = torch.rand(4000).bfloat16() + 1
    exact, ours = torch.nn.Parameter(start.double()), torch.nn.Parameter(start.clone())
    nearest = start.clone()
    settings = dict(lr=2**-7 / 10, betas=(0.9, 0.999), eps=1e-8)
    reference = torch.optim.AdamW([exact], weight_decay=0.05, **settings)
    optimizer = train.StochasticAdamW([{"params": [ours], "weight_decay": 0.05}], **settings)
    for _ in range(300):
        gradient = (torch.randn(4000) * 0.5 + 1).bfloat16()
        exact.grad, ours.grad = gradient.double(), gradient
        before = exact.detach().clone()
        reference.step()
        optimizer.step()
        change = (exact.detach() - before).float() * (nearest / before).float()
        nearest = (nearest.float() + change).bfloat16()
    moved = (exact - start).mean().item()
    assert moved < -0.15
    assert abs((ours.double() - exact).mean().item()) < 0.01 * abs(moved)
    assert abs((nearest.double() - start).mean().item()) < 0.5 * abs(moved)
    state = optimizer.state[ours]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == ours.dtype == torch.bfloat16
    expected = reference.state[exact]["exp_avg_sq"].mean().item()
    assert state["exp_avg_sq"].double().mean().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("bf16_weights, bytes_a_parameter", [(False, 16), (True, 8)])
def test_bytes_a_parameter(bf16_weights, bytes_a_parameter):
    """Weights, gradients and both moments after a step: the README's estimate."""
    model = tiny().to(torch.bfloat16 if bf16_weights else torch.float32)
    args = arguments(bf16_weights=bf16_weights, weight_decay=0.0, lr=1e-3)
    optimizer = train.make_optimizer(model, args)
    step(model, None, FORGET, RETAIN, arguments())
    optimizer.step()
    parameters = list(model.parameters())
    tensors = [t for p in parameters for t in (p, p.grad, *optimizer.state[p].values()) if t.ndim]
    size = sum(t.numel() * t.element_size() for t in tensors)
    assert size == bytes_a_parameter * sum(p.numel() for p in parameters)


# Whole runs of a tiny model

def write_init(folder, tied=False, bias=0):
    """A folder for --init: a tiny Llama and a byte-level BPE tokenizer."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator((r["question"] + r["answer"] for r in RECORDS), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=128, tie_word_embeddings=tied, bos_token_id=0,
                eos_token_id=1, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the data, two --init folders, and a target that knows all records by heart."""
    folder = tmp_path_factory.mktemp("world")
    write_data(folder)
    write_init(folder / "init")
    write_init(folder / "tied", tied=True)
    assert train.main(["--init", str(folder / "init"), "--retain", str(folder / "full"),
                       "--output", str(folder / "target"), "--epochs", "120", "--batch-size", "8",
                       "--lr", "5e-3", "--save-every", "0"]) == 0
    assert log(folder / "target")[-1]["retain_prob"] > 0.9
    return folder


def unlearn(world, output, *more):
    """Run train.main on the target; a later option overrides an earlier one.
    Returns the lines of metrics.jsonl."""
    start = [] if "--init" in more else ["--model", str(world / "target")]
    assert train.main([*start, "--forget", str(world / "forget25"),
                       "--output", str(output), "--epochs", "20", "--batch-size", "4",
                       "--lr", "5e-3", "--forget-weight", "0.3", "--save-every", "0", *more]) == 0
    return log(output)


@pytest.mark.parametrize("loss, retain_loss", LOSSES)
def test_unlearning(loss, retain_loss, world, tmp_path):
    """The forget set is forgotten, the retain set is kept where a retain term is there, and the
    output opens."""
    beta, weight = {"simnpo": ("2.5", "1"), "npo": ("0.1", "0.3"), "ga": ("2.5", "0.5")}[loss]
    lines = unlearn(world, tmp_path / "run", "--loss", loss, "--retain-loss", retain_loss,
                    "--beta", beta, "--forget-weight", weight, "--lr", "2e-3", "--epochs", "30")
    steps, probes = [x for x in lines if "lr" in x], [x for x in lines if "epoch" in x]
    assert [x["step"] for x in steps] == list(range(1, 31))
    assert [x["epoch"] for x in probes] == list(range(31))
    assert all(math.isfinite(x["forget_loss"]) and x["grad_norm"] > 0 for x in steps)
    assert probes[0]["forget_prob"] > 0.9 and probes[-1]["forget_prob"] < 0.7
    if retain_loss != "none":
        assert probes[0]["retain_prob"] > 0.9
        assert probes[-1]["retain_prob"] > probes[-1]["forget_prob"] + 0.2
    assert json.loads((tmp_path / "run" / "args.json").read_text())["loss"] == loss
    assert {p.suffix for p in (tmp_path / "run").iterdir()} <= {".json", ".jsonl", ".safetensors"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    probability = own_probability(model, tokenizer, RECORDS[:4])
    assert probability == pytest.approx(probes[-1]["forget_prob"], abs=1e-4)


@pytest.mark.parametrize("loss, retain_loss", LOSSES)
@pytest.mark.parametrize("max_tokens", ["40", "1000"])
def test_mains_first_step_has_the_gradient_of_the_formula(loss, retain_loss, max_tokens, world,
                                                          tmp_path, monkeypatch):
    """From command line to optimizer, against float64 arithmetic a sequence at a time."""
    update, seen = train.update, {}

    def spy(state, *args):
        named = state.model.lm.named_parameters()
        seen.update({name: p.grad.clone() for name, p in named})
        return update(state, *args)

    monkeypatch.setattr(train, "update", spy)
    unlearn(world, tmp_path / "run", "--loss", loss, "--retain-loss", retain_loss, "--beta", "0.8",
            "--gamma", "0.3", "--forget-weight", "0.7", "--retain-weight", "1.3", "--epochs", "1",
            "--max-tokens", max_tokens)
    model, reference = (AutoModelForCausalLM.from_pretrained(world / "target").double()
                        for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(world / "target")
    forget, retain = (load_examples(world / name, tokenizer, 128)
                      for name in ("forget25", "retain75"))
    kept = [retain[i] for i in train.draw(len(retain), 0, 4, 1)] if retain_loss != "none" else []
    with torch.no_grad():
        ref_logps = answer_logps(reference, *collate(forget))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "REF_LOGPS", ref_logps)
        terms = plain_loss(model, reference, forget, kept, loss, retain_loss)
    (0.7 * terms[0] + 1.3 * terms[1]).backward()
    largest = max(p.grad.abs().max() for p in model.parameters())
    for name, p in model.named_parameters():
        assert (seen[name] - p.grad).abs().max() <= 6e-5 * largest, name  # fp32, by kernel


def test_the_official_number_of_steps(world, tmp_path):
    """TOFU forget05 at batch 32 and 10 epochs: 62 steps, the warm-up's 6 among them."""
    for name, count, last in (("forget", 200, 9), ("retain", 211, 10)):
        records = [{"input_ids": [2 + i % 7, 3 + i // 7, last]} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert train.main(["--init", str(world / "init"), "--forget", str(tmp_path / "forget"),
                       "--retain", str(tmp_path / "retain"),
                       "--output", str(tmp_path / "run")]) == 0
    steps = [x for x in log(tmp_path / "run") if "lr" in x]
    probes = [x for x in log(tmp_path / "run") if "epoch" in x]
    assert len(steps) == 62 and [x["lr"] for x in steps].index(1e-5) == 6
    assert [x["step"] for x in probes] == [200 * epoch // 32 for epoch in range(11)]


def own_probability(model, tokenizer, records):
    """Mean of p(answer)^(1/|answer|), a record at a time on full logits."""
    values = []
    for r in records:
        prompt = tokenizer(f"Question: {r['question']}\nAnswer:").input_ids
        ids = prompt + tokenizer(" " + r["answer"]).input_ids + [1]
        with torch.no_grad():
            p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        answer = range(len(prompt), len(ids))
        values.append(math.exp(sum(p[t - 1, ids[t]].item() for t in answer) / len(answer)))
    return sum(values) / len(values)


@pytest.mark.parametrize("options", [["--dtype", "bf16"], ["--dtype", "fp16"], ["--bf16-weights"]])
def test_other_precisions_unlearn_too(options, world, tmp_path):
    exact, lines = unlearn(world, tmp_path / "fp32"), unlearn(world, tmp_path / "run", *options)
    for name in ("forget_prob", "retain_prob"):
        assert lines[-1][name] == pytest.approx(exact[-1][name], abs=0.15)
    assert lines[1]["forget_loss"] == pytest.approx(exact[1]["forget_loss"], rel=0.03)
    assert {t.dtype for t in weights(tmp_path / "run").values()} == {
        torch.bfloat16 if options == ["--bf16-weights"] else torch.float32}


def test_micro_batches_and_checkpointing_change_nothing(world, tmp_path):
    plain = unlearn(world, tmp_path / "plain", "--epochs", "3")
    split = unlearn(world, tmp_path / "split", "--epochs", "3", "--max-tokens", "20",
                    "--checkpointing")
    for x, y in zip(plain, split, strict=True):
        assert {k: v for k, v in x.items() if k != "tokens_per_s"} == pytest.approx(
            {k: v for k, v in y.items() if k != "tokens_per_s"}, rel=1e-4)
    same = weights(tmp_path / "plain")
    assert_close(weights(tmp_path / "split"), same, 3e-5)


def test_micro_batches_change_nothing_for_long_rope_either(tmp_path):
    """Its rotary table depends on the longest text of a batch."""
    model = write_model(tmp_path / "m", rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
        "long_factor": [1.0, 3.0, 5.0, 7.0], "original_max_position_embeddings": 12})
    for seed, name in enumerate(("forget", "retain")):
        torch.manual_seed(seed)
        write_lines(tmp_path / f"{name}.jsonl", [
            {"input_ids": torch.randint(2, 250, (n,)).tolist()} for n in range(6, 18)])
    for output, size in (("plain", "1000"), ("split", "1")):
        assert train.main([
            "--model", model, "--forget", str(tmp_path / "forget"), "--retain",
            str(tmp_path / "retain"), "--loss", "npo", "--epochs", "3", "--max-tokens", size,
            "--output", str(tmp_path / output), "--lr", "1e-3", "--batch-size", "6"]) == 0
    plain, split = ([{k: v for k, v in x.items() if k != "tokens_per_s"} for x in log(folder)]
                    for folder in (tmp_path / "plain", tmp_path / "split"))
    for x, y in zip(plain, split, strict=True):
        assert x == pytest.approx(y, rel=1e-3)


def test_compile(world, tmp_path, monkeypatch):
    """Traced as a whole, but without code generation, which takes a minute."""
    compile_module, seen = torch.nn.Module.compile, []

    def traced(module, **options):
        seen.append(module)
        return compile_module(module, backend="eager", fullgraph=True, **options)

    options = ["--model", write_model(tmp_path / "model", num_hidden_layers=1), "--epochs", "1"]
    plain = unlearn(world, tmp_path / "plain", *options)
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    compiled = unlearn(world, tmp_path / "compiled", *options, "--compile")
    assert len(seen) == 1
    assert [x["forget_loss"] for x in compiled if "lr" in x] == pytest.approx(
        [x["forget_loss"] for x in plain if "lr" in x], rel=1e-4)
    assert_close(weights(tmp_path / "compiled"), weights(tmp_path / "plain"), 1e-4)
    AutoModelForCausalLM.from_pretrained(tmp_path / "compiled")


def test_the_start_models_own_files_are_carried_over(world, tmp_path):
    """Byte for byte: config, generation config (if any) and tokenizer; the rest is the run's."""
    copied = tmp_path / "start"
    shutil.copytree(world / "target", copied)
    (copied / "generation_config.json").write_text('{"eos_token_id": [1, 7], "top_p": 0.5}')
    for start, model in ((copied, ["--model", copied]),
                         (world / "init", ["--init", world / "init"])):
        output = tmp_path / f"from-{start.name}"
        unlearn(world, output, *map(str, model), "--epochs", "1")
        own = {p.name: p.read_bytes() for p in start.iterdir()
               if p.suffix == ".json" and p.name not in ("args.json", "metrics.jsonl")}
        written = {p.name: p.read_bytes() for p in output.iterdir()}
        assert set(written) == {*own, "args.json", "metrics.jsonl", "model.safetensors"}
        assert all(written[name] == content for name, content in own.items())
        assert AutoModelForCausalLM.from_pretrained(output).generation_config.eos_token_id == (
            [1, 7] if start.name == "start" else 1)


def test_snapshots(world, tmp_path):
    """Copies that open, of the weights along the way; the last one is the final model."""
    unlearn(world, tmp_path / "run", "--epochs", "4", "--snapshots", "2epochs")
    folders = sorted(p.name for p in (tmp_path / "run").glob("step-*"))
    assert folders == ["step-000002", "step-000004"]
    early, late = (weights(tmp_path / "run" / name) for name in ("step-000002", "step-000004"))
    final = weights(tmp_path / "run")
    assert all(torch.equal(late[name], final[name]) for name in final)
    assert any(not torch.equal(early[name], final[name]) for name in final)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "step-000002")
    AutoTokenizer.from_pretrained(tmp_path / "run" / "step-000002")


def test_same_seed_same_weights(world, tmp_path):
    for name, seed in (("one", "5"), ("two", "5"), ("three", "6")):
        unlearn(world, tmp_path / name, "--epochs", "2", "--seed", seed, "--batch-size", "3")
    one, two, three = (weights(tmp_path / name) for name in ("one", "two", "three"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)


# Two processes (FSDP2 over gloo) against one

RUNS = {
    "untied": ["--init", "init"], "tied": ["--init", "tied"],
    "split": ["--init", "tied", "--max-tokens", "30", "--checkpointing"],
    "kl": ["--model", "target", "--retain-loss", "kl"],
    "npo": ["--model", "target", "--loss", "npo", "--beta", "0.1", "--retain-loss", "none"],
    "lora": ["--model", "target"],  # adapted by lora, saved merged
}


def lora(model, args):
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False,
                        modules_to_save=["lm_head"])
    return get_peft_model(model, config)


def five_steps(folder, options, output, *more):
    """Five steps on the toy data; names in options are folders of it."""
    options = [str(folder / x) if x in ("init", "tied", "target") else x for x in options]
    with pytest.MonkeyPatch.context() as patch:
        if output.startswith("lora"):
            patch.setattr(train, "adapt", lora)
        return train.main([*options, "--forget", str(folder / "forget25"),
                           "--retain", str(folder / "retain75"), "--epochs", "5", "--batch-size",
                           "4", "--lr", "1e-3", "--output", str(folder / output), *more])


def two_ranks(rank, folder, port):
    """What each of the two processes does."""
    be_rank(rank, port)
    for name, options in RUNS.items():
        assert five_steps(folder, options, f"{name}-2") == 0
    assert five_steps(folder, RUNS["tied"], "stopped-by-1", "--resume") == 0
    original, train.update = train.update, stop_after(3)
    assert five_steps(folder, RUNS["tied"], "stopped-by-2") == 128 + signal.SIGTERM
    train.update = original
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_rank_runs(world):
    """The folder in which two processes, and one, have made RUNS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "update", stop_after(3))
        assert five_steps(world, RUNS["tied"], "stopped-by-1") == 128 + signal.SIGTERM
    port = free_port()
    ranks = [SERVER.Process(target=two_ranks, args=(rank, world, port)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    for name, options in RUNS.items():
        assert five_steps(world, options, f"{name}-1") == 0
    return world


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_what_one_does(name, two_rank_runs):
    ones, twos = (log(two_rank_runs / f"{name}-{n}") for n in (1, 2))
    assert len(ones) == 11  # five steps, six probes
    for x, y in zip(ones, twos, strict=True):
        assert {k: v for k, v in y.items() if k != "tokens_per_s"} == pytest.approx(
            {k: v for k, v in x.items() if k != "tokens_per_s"}, rel=1e-4, abs=1e-5)
    one, two = (weights(two_rank_runs / f"{name}-{n}") for n in (1, 2))
    start = weights(two_rank_runs / "target") if name in ("kl", "npo", "lora") else None
    assert one.keys() == two.keys()
    assert_close(two, one, 3e-5)
    assert not start or max((one[k] - start[k]).abs().max() for k in one) > 1e-3


def test_resuming_with_another_number_of_processes(two_rank_runs):
    assert five_steps(two_rank_runs, RUNS["tied"], "stopped-by-2", "--resume") == 0
    expected = weights(two_rank_runs / "tied-1")
    for name in ("stopped-by-1", "stopped-by-2"):
        assert_close(weights(two_rank_runs / name), expected, 1e-5)
        assert [x["step"] for x in log(two_rank_runs / name) if "lr" in x] == [1, 2, 3, 4, 5]
