"""The README's two snippets, run as they are printed, make a small model forget."""

import re

import pytest
import torch
from conftest import ROOT
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import simnpo

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
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
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
    assert len(SNIPPETS) == 2 and all(len(snippet.strip().splitlines()) < 11 for snippet in SNIPPETS)


def test_bare_loop(model):
    exec(SNIPPETS[0], {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), 2e-3),
                       "batches": [(batch(1), batch(2))] * 40})
    assert forgets(model)


def test_trainer(model, tmp_path):
    names = {"Trainer": Trainer}
    exec(SNIPPETS[1], names)
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=40, learning_rate=2e-3, report_to=[],
                                  per_device_train_batch_size=1, remove_unused_columns=False, save_strategy="no",
                                  lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True)
    pairs = [{"forget": batch(1), "retain": batch(2)}] * 40
    names["Unlearner"](model=model, args=arguments, train_dataset=pairs, data_collator=lambda items: items[0]).train()
    assert forgets(model)
