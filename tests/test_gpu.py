"""What only a GPU can show: run by tests/gpu.sh, which sets TEST_DEVICE=cuda. Everywhere else they
are skipped; TEST_DEVICE=cpu tries the tests themselves."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, log, stop_after, weights, write_data, write_model, write_tofu

import eval as evaluation
import simnpo
import train
from data.support.models import load_pretrained

DEVICE = os.environ.get("TEST_DEVICE")
pytestmark = pytest.mark.skipif(not DEVICE, reason="for a GPU: tests/gpu.sh")
cards_only = pytest.mark.skipif(DEVICE != "cuda", reason="needs the card's own allocator")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, and a target that knows all records by heart."""
    folder = tmp_path_factory.mktemp("world")
    write_data(folder)
    start = write_model(folder / "start", initializer_range=0.05)
    assert train.main([
        "--model", start, "--retain", str(folder / "full"), "--output", str(folder / "target"),
        "--epochs", "120", "--batch-size", "8", "--lr", "5e-3", "--save-every", "0",
        "--device", "cpu"]) == 0
    assert log(folder / "target")[-1]["retain_prob"] > 0.9
    return folder


def flags(world, output, *more):
    return ["--model", str(world / "target"), "--forget", str(world / "forget25"), "--output",
            str(output), "--epochs", "30", "--batch-size", "4", "--lr", "5e-3", "--forget-weight",
            "1", "--device", DEVICE, *more]


def unlearn(world, output, *more):
    assert train.main(flags(world, output, *more)) == 0
    return log(output)


def test_log_probabilities_and_gradients_are_those_of_float64_on_the_cpu(world):
    """The fast head in fp32 on the card, beside full logits in float64."""
    ids = torch.randint(2, 200, (5, 40), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(40) < torch.tensor([[3], [9], [20], [1], [38]]), -100)
    found = {}
    for device, dtype in (("cpu", torch.float64), (DEVICE, torch.float32)):
        model = load_pretrained(str(world / "target"), dtype)[0].to(device)
        x, y = ids.to(device), labels.to(device)
        if device == "cpu" and dtype == torch.float64:
            logps, lengths = simnpo.sequence_logps(model(x).logits, y)
        else:
            logps, lengths = simnpo.answer_logps(model, x, y)
        simnpo.simnpo_loss(logps, lengths, 2.5).mean().backward()
        found[dtype] = [logps, *(p.grad for p in model.parameters())]
    for exact, got in zip(*found.values(), strict=True):
        error = (got.cpu().double() - exact).norm() / exact.norm()
        assert error < 1e-4


@pytest.mark.parametrize("options", [
    "--dtype fp32", "--dtype bf16", "--dtype fp16", "--bf16-weights", "--dtype bf16 --compile",
    "--dtype bf16 --checkpointing", "--dtype bf16 --loss npo --beta 0.1",
    "--dtype bf16 --retain-loss kl"])
def test_unlearning(options, world, tmp_path):
    lines = unlearn(world, tmp_path / "run", *options.split())
    assert lines[0]["forget_prob"] > 0.9 and lines[0]["retain_prob"] > 0.9
    assert lines[-1]["forget_prob"] < 0.7
    assert lines[-1]["retain_prob"] > lines[-1]["forget_prob"] + 0.2


def test_fp32_steps_are_those_of_the_cpu(world, tmp_path):
    here = unlearn(world, tmp_path / "here", "--dtype", "fp32", "--epochs", "3")
    there = unlearn(world, tmp_path / "there", "--dtype", "fp32", "--epochs", "3", "--device",
                    "cpu")
    for x, y in zip(here, there, strict=True):
        assert x.pop("tokens_per_s", 0) >= 0 and y.pop("tokens_per_s", 0) >= 0
        assert x == pytest.approx(y, rel=1e-3)


def test_a_stopped_run_goes_on(world, tmp_path, monkeypatch):
    whole, again = tmp_path / "whole", tmp_path / "again"
    unlearn(world, whole, "--dtype", "fp32")
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", stop_after(7))
        assert train.main(flags(world, again, "--dtype", "fp32")) == 143
    unlearn(world, again, "--dtype", "fp32", "--resume")
    expected = weights(whole)
    for name, tensor in weights(again).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


def test_torchrun_on_every_card(world, tmp_path):
    """NCCL and FSDP2, on as many cards as there are."""
    alone = unlearn(world, tmp_path / "alone", "--dtype", "fp32", "--epochs", "5")
    count = torch.cuda.device_count() if DEVICE == "cuda" else 1
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(count), str(ROOT / "train.py"),
         *flags(world, tmp_path / "run", "--dtype", "fp32", "--epochs", "5")],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert log(tmp_path / "run")[-1] == pytest.approx(alone[-1], rel=1e-2)


def test_evaluation_gives_what_the_cpu_gives(world, tmp_path):
    forget, tables = write_tofu(tmp_path), []
    for device in ("cpu", DEVICE):
        options = ["--dtype", "fp32", "--device", device, "--force"]
        with contextlib.chdir(tmp_path):
            assert evaluation.main([str(world / "target"), "--forget", forget, *options]) == 0
        saved = json.loads((world / "target" / "eval.json").read_text())["evaluations"]
        tables.append(next(iter(saved.values()))["values"])
    for split, records in tables[0].items():
        for mine, other in zip(records, tables[1][split], strict=True):
            assert mine["generated"] == other["generated"]
            assert mine["truth_ratio"] == pytest.approx(other["truth_ratio"], rel=1e-3)
            assert mine["probability"] == pytest.approx(other["probability"], rel=1e-3)


@cards_only
def test_a_full_card_is_one_line(world, tmp_path, capfd):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-5)
    try:
        assert train.main(flags(world, tmp_path / "run")) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    err = capfd.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "out of memory" in err and "--max-tokens" in err
