"""The README's snippets, run as they are printed; and what it says of copying half of simnpo.py."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import (ROOT, log, stop_after, table_of, weights, write_data, write_model,
                      write_tofu)
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig,
                          TrainingArguments)

import eval as evaluation
import simnpo
import train
from data.load import load_examples
from data.support.models import load_pretrained

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def batch(seed):
    """Four right-padded sequences of different lengths, the first three tokens being the prompt."""
    ids = torch.randint(3, 40, (4, 10), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :3] = -100
    for row, length in enumerate((6, 7, 9, 10)):
        labels[row, length:] = -100
    return {"input_ids": ids, "labels": labels}


def answer_nll(model, data):
    with torch.no_grad():
        logps, lengths = simnpo.sequence_logps(model(data["input_ids"]).logits, data["labels"])
    return -(logps.sum() / lengths.sum()).item()


@pytest.fixture
def model():
    """A small model that knows the forget and the retain batch by heart."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        loss = sum(model(**data).loss for data in (batch(1), batch(2)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert answer_nll(model, batch(1)) < 0.1
    return model


def forgets(model):
    return answer_nll(model, batch(1)) > 0.3 and answer_nll(model, batch(2)) < 0.2


def test_snippets_are_short():
    assert len(SNIPPETS) == 3
    assert all(len(snippet.strip().splitlines()) < 16 for snippet in SNIPPETS)


def test_bare_loop(model):
    exec(SNIPPETS[0], {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), 2e-3),
                       "batches": [(batch(1), batch(2))] * 40})
    assert forgets(model)


def test_trainer(model, tmp_path):
    names = {}
    exec(SNIPPETS[1], names)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=40, learning_rate=2e-3, report_to=[], use_cpu=True,
        per_device_train_batch_size=1, remove_unused_columns=False, save_strategy="no",
        lr_scheduler_type="constant", disable_tqdm=True)
    pairs = [{"forget": batch(1), "retain": batch(2)}] * 40
    trainer = names["Unlearner"](model=model, args=arguments, train_dataset=pairs,
                                 data_collator=lambda items: items[0])
    trainer.train()
    assert forgets(model)


def test_the_upper_part_of_simnpo_stands_alone(model):
    """Down to the marked line: the losses and the plain log-probabilities, which make it forget."""
    names = {}
    exec((ROOT / "simnpo.py").read_text().split("# ---- Copy down to here")[0], names)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(40):
        forget, retain = (names["sequence_logps"](model(data["input_ids"]).logits, data["labels"])
                          for data in (batch(1), batch(2)))
        loss = 0.1375 * names["simnpo_loss"](*forget, beta=2.5, gamma=0.0).mean()
        (loss + names["retain_nll"](*retain)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert forgets(model)


def test_adding_a_loss(tmp_path, monkeypatch):
    """SimNPO of sums: the first loss against the formula on full logits."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    write_model(tmp_path / "model")
    flags = ["--model", "model", "--forget", "forget25", "--epochs", "2", "--lr", "1e-3",
             "--output", "out"]
    monkeypatch.setattr(train, "LOSSES", dict(train.LOSSES))
    main = train.main
    monkeypatch.setattr(train, "main", lambda argv: main([*argv, *flags]))
    exec(SNIPPETS[2].partition("evaluation.TOFU_ROWS")[0], {})
    model, tokenizer = load_pretrained("model")
    expected = []
    for e in load_examples("forget25", tokenizer, 128):
        targets = torch.tensor(e.input_ids[e.start:])
        logits = model(torch.tensor([e.input_ids])).logits[0, e.start - 1:-1]
        logps = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        expected.append(2 / 0.3 * math.log1p(math.exp(0.3 * logps.sum().item())))
    steps = [line for line in log(tmp_path / "out") if "lr" in line]
    assert steps[0]["forget_loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert len(steps) == 2


def test_adding_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    write_tofu(tmp_path / "tofu")
    monkeypatch.setattr(evaluation, "TOFU_ROWS", dict(evaluation.TOFU_ROWS))
    flags = ["model", "--forget", "tofu/forget05", "--max-new-tokens", "5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "eval", evaluation)
        patch.setattr(train, "main", lambda argv: None)
        patch.setattr(train, "LOSSES", dict(train.LOSSES))
        main = evaluation.main
        patch.setattr(evaluation, "main", lambda argv: main(flags))
        exec(SNIPPETS[2], {})
    records = json.loads(Path("model/eval.json").read_text())["evaluations"].popitem()[1]["values"]
    mean = sum(len(r["answer"]) + 2 for r in records["forget"]) / len(records["forget"])
    cell, = table_of(capsys.readouterr().out)["forget answer length"]
    assert float(cell) == pytest.approx(mean, rel=1e-5)


def lora(model, rank=4):
    """The model with LoRA on its attention and head, all adapters started away from zero."""
    adapted = ["q_proj", "v_proj", "lm_head"]
    config = LoraConfig(r=rank, target_modules=adapted, init_lora_weights=False)
    return get_peft_model(model, config)


def test_answer_logps_of_a_peft_model(model):
    """Values and gradients are those of its logits, and only the adapters get gradients."""
    adapted, data = lora(model), batch(1)
    plain, _ = simnpo.sequence_logps(adapted(data["input_ids"]).logits, data["labels"])
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    want = torch.autograd.grad(plain.sum(), trained.values())
    logps, _ = simnpo.answer_logps(adapted, data["input_ids"], data["labels"])
    torch.testing.assert_close(logps, plain, rtol=1e-5, atol=1e-5)
    logps.sum().backward()
    for (name, p), expected in zip(trained.items(), want):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-5, msg=name)
    assert all(p.grad is None for p in adapted.parameters() if not p.requires_grad)


EMBEDDING = {"target_modules": ["q_proj", "embed_tokens"]}
HEAD = {"target_modules": ["q_proj", "lm_head"]}
WHOLE = {"modules_to_save": ["lm_head", "norm"]}
TOKENS = {"trainable_token_indices": [5, 6]}


@pytest.mark.parametrize("kind, tied", [
    *((kind, False) for kind in ({}, {"use_dora": True}, {"use_rslora": True}, {"bias": "all"},
                                 EMBEDDING, HEAD, WHOLE, TOKENS, "ia3", None, "frozen")),
    *((kind, True) for kind in ({}, EMBEDDING, HEAD, WHOLE, TOKENS, None))], ids=str)
def test_what_is_saved_is_what_was_trained(kind, tied, tmp_path, monkeypatch):
    """The folder, opened by transformers alone, has the logits of the trained model, and so has
    every snapshot; a run without snapshots that was stopped and resumed gives the same to the last
    bit. None: all weights are trained."""
    tied_target = tied and kind  # refused
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    write_model(tmp_path / "model", tie_word_embeddings=tied)
    ids, models, logits, save = torch.arange(2, 30)[None], [], [], train.models.save_model

    def adapt(model, args):
        torch.manual_seed(0)  # of the adapters
        if kind == "frozen":
            model.get_input_embeddings().requires_grad_(False)
        elif kind:
            config = (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=[
                "down_proj"]) if kind == "ia3" else LoraConfig(**{"target_modules": ["q_proj",
                                                                 "up_proj"], **kind}))
            model = get_peft_model(model, config)
        models.append(model)
        return model

    def watch(model, empty, files, folder):
        with torch.no_grad():
            logits.append((folder, model.eval()(ids).logits))
        save(model, empty, files, folder)

    monkeypatch.setattr(train, "adapt", adapt)
    monkeypatch.setattr(train.models, "save_model", watch)
    flags = ["--model", "model", "--forget", "forget25", "--epochs", "6", "--lr", "1e-2"]
    if tied_target:
        assert train.main([*flags, "--output", "out"]) == 2
        return
    assert train.main([*flags, "--output", "out", "--snapshots", "3"]) == 0
    start = AutoModelForCausalLM.from_pretrained("model")(ids).logits
    assert len(logits) > 2
    for folder, expected in logits:
        got = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert (got - start).abs().max() > 0.05
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "update", stop_after(3))
        assert train.main([*flags, "--output", "resumed"]) == 143
    assert train.main([*flags, "--output", "resumed", "--resume"]) == 0
    whole, resumed = (weights(Path(folder)) for folder in ("out", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_adapters_on_both_weights_of_the_experts(tmp_path, monkeypatch):
    """PEFT wraps their module once for each weight; the folder is the trained model."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    write_model(tmp_path / "model", family=MixtralConfig, num_local_experts=4)
    models, ids = [], torch.arange(2, 30)[None]

    def adapt(model, args):
        models.append(get_peft_model(model, LoraConfig(target_modules="all-linear")))
        return models[0]

    monkeypatch.setattr(train, "adapt", adapt)
    assert train.main(["--model", "model", "--forget", "forget25", "--epochs", "3", "--lr", "1e-2",
                       "--output", "out"]) == 0
    start, got = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in ("model", "out"))
    torch.testing.assert_close(got, models[0].eval()(ids).logits, rtol=1e-4, atol=1e-4)
    experts = "model.layers.0.block_sparse_moe.experts.0"
    for name in (f"{experts}.w1.weight", f"{experts}.w2.weight"):
        assert not torch.equal(*(weights(Path(f))[name] for f in ("model", "out")))
    assert (got - start).abs().max() > 0.05


@pytest.mark.parametrize("config", [
    LoraConfig(target_modules=["q_proj"], lora_bias=True),
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)], ids=["bias", "prompt"])
def test_what_does_not_merge_is_refused(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    write_model(tmp_path / "model")
    monkeypatch.setattr(train, "adapt", lambda model, args: get_peft_model(model, config))
    assert train.main(["--model", "model", "--forget", "forget25", "--output", "out"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: train.adapt: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_training_adapters(tmp_path, monkeypatch):
    """train.adapt as the README says: the folder opens without peft, its head and attention moved
    by the adapters, all else as it was."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    write_model(tmp_path / "model")
    monkeypatch.setattr(train, "adapt", lambda model, args: lora(model))
    assert train.main(["--model", "model", "--forget", "forget25", "--epochs", "3", "--lr", "1e-2",
                       "--output", "out"]) == 0
    start, end = (load_pretrained(folder)[0].state_dict() for folder in ("model", "out"))
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == {"lm_head.weight", *(f"model.layers.{i}.self_attn.{x}_proj.weight"
                                         for i in range(2) for x in "qv")}
