"""A run that is cut short at any moment (killed, interrupted, out of disk or memory, not finite)
loses nothing: resumed, it ends like a run that nothing happened to, bit for bit."""

import errno
import json
import math
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import log, run, start, stop_after, weights
from safetensors import safe_open
from test_failures import RUN, TOFU, assert_refused, in_tmp, words, world  # noqa: F401
from transformers import PreTrainedModel

import eval as evaluation
import train

LONG = f"{RUN} --epochs 8 --save-every 1 --snapshots 5 --output run"  # 16 steps


@pytest.fixture(scope="module")
def undisturbed(world):
    """The folder of a run that nothing happens to, and how long its training took."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        child, connection = start(words(LONG, world, "--output undisturbed"))
        assert connection.recv() == "training"
        began = time.monotonic()
        assert connection.recv()[0] == 0
        seconds = time.monotonic() - began
    return world / "undisturbed", seconds


def assert_same_run(output, undisturbed):
    """Bitwise the same weights, in snapshots too, the same log but for speeds, and no file more or
    less."""
    files = sorted(p.relative_to(undisturbed) for p in undisturbed.rglob("*"))
    assert sorted(p.relative_to(output) for p in output.rglob("*")) == files
    for path in files:
        if path.suffix == ".safetensors":
            assert (output / path).read_bytes() == (undisturbed / path).read_bytes(), path
    logs = [[{**line, "tokens_per_s": 0} for line in log(folder)]
            for folder in (output, undisturbed)]
    assert logs[0] == logs[1]


def checkpoints(output):
    return sorted(output.glob("checkpoint-*.safetensors"))


def again(argv, output):
    """The same command, which goes on with a run if it got as far as having a folder."""
    return [*argv, *["--resume"] * output.exists()]


def test_killed_at_twenty_random_moments(world, undisturbed, tmp_path):
    """SIGKILL at any time of training, saving and finishing; a run that ends before it is killed
    makes place for another."""
    rng, kills, number = random.Random(0), 0, 0
    expected, seconds = undisturbed
    while kills < 20 or (tmp_path / f"run{number}").exists():
        output = tmp_path / f"run{number}"
        child, connection = start(again(words(LONG, world, f"--output {output}"), output))
        if kills < 20 and connection.recv() == "training":
            child.join(rng.uniform(0, seconds / 3))
            child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        kills += child.exitcode != 0
        if child.exitcode == 0:
            assert_same_run(output, expected)
            number += 1


def replace_call(name, condition, new):
    """Put new(original, *args) in the place of all calls of a function, named as in os.fsync, from
    the first for which condition(its number, its arguments) holds."""
    place, attribute = pkgutil.resolve_name(name.rpartition(".")[0]), name.rpartition(".")[2]
    original, calls, begun = getattr(place, attribute), [], []

    def replaced(*args, **options):
        calls.append(args)
        if begun or condition(len(calls), args):
            begun.append(1)
            return new(original, *args, **options)
        return original(*args, **options)
    setattr(place, attribute, replaced)


WRITE_TENSORS = "safetensors.torch.serialize_file"


def kill_at(name, path, after):
    """Kill this process at the first call of a function on this path, before or after it; a file
    of tensors is left half written."""
    def deadly(original, *args, **options):
        if after or name == WRITE_TENSORS:
            original(*args, **options)
        if not after and name == WRITE_TENSORS:
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    replace_call(name, lambda _, args: any(str(x).endswith(path) for x in args[:2]), deadly)


def test_killed_in_the_middle_of_writing(world, undisturbed, tmp_path):
    """Before and after each kind of call that changes the disk: at the start, in saving, and in
    finishing."""
    output, argv = tmp_path / "run", words(LONG, world)
    for name, path in [
            ("pathlib.Path.mkdir", "run"), ("os.replace", "args.json"),
            (WRITE_TENSORS, "checkpoint-00000002.safetensors"),
            ("pathlib.Path.write_text", "metrics.jsonl"),
            ("os.replace", "checkpoint-00000003.safetensors"), ("shutil.rmtree", "run/.half-done"),
            ("pathlib.Path.unlink", "checkpoint-00000003.safetensors"),
            (WRITE_TENSORS, "run/.half-done/model.safetensors"),
            ("os.replace", "run/model.safetensors"), ("os.replace", "run/config.json"),
            ("pathlib.Path.unlink", "checkpoint-00000015.safetensors")]:
        for after in (False, True):
            assert run(again(argv, output), kill_at, name, path, after) is None, (name, path)
    assert run([*argv, "--resume"])[0] == 0
    assert_same_run(output, undisturbed[0])


@pytest.mark.parametrize("number, step", [
    (signal.SIGTERM, 1), (signal.SIGINT, 5), (signal.SIGTERM, 16)])
def test_stopped_by_a_signal(number, step, world, undisturbed, tmp_path):
    """The step is finished and saved; going on ends in the same weights."""
    argv = words(LONG, world, "--save-every 0")
    assert run(argv, stop_in, step, number) == (128 + number, "")
    assert [x["step"] for x in log(tmp_path / "run") if "lr" in x] == list(range(1, step + 1))
    assert run([*argv, "--resume"]) == (0, "")
    assert_same_run(tmp_path / "run", undisturbed[0])


def stop_in(step, number):
    """Send this process a signal during a step (SIGINT is ignored in a shell's background job)."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    train.update = stop_after(step, number)


@pytest.mark.parametrize("program, argv", [("train", RUN), ("eval", TOFU)])
def test_a_signal_before_training(program, argv, world):
    assert run(words(argv, world), interrupted_reading, program=program) == (
        130, "error: interrupted\n")
    assert not Path("out").exists()


def interrupted_reading():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    PreTrainedModel.from_pretrained = lambda *args, **options: signal.raise_signal(signal.SIGINT)


def fail_at(name, count):
    """The disk is full from the count-th call of a function on."""
    def failing(original, *args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")
    replace_call(name, lambda number, args: number == count, failing)


def limit_files(size):
    """The kernel itself refuses to let a file grow beyond this size."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("save_every, interfere", [
    (1, (fail_at, "os.replace", 1)),  # args.json
    (1, (fail_at, WRITE_TENSORS, 1)), (1, (fail_at, WRITE_TENSORS, 4)),
    (1, (fail_at, "os.fsync", 8)), (1, (fail_at, "os.replace", 6)),
    (0, (limit_files, 3000)), (1, (limit_files, 200_000))])
def test_a_full_disk(save_every, interfere, world, undisturbed, tmp_path):
    """One line says so, the last checkpoint is whole, and once there is room the run goes on from
    it."""
    argv = words(LONG, world, f"--save-every {save_every}")
    assert_out_of_disk(run(argv, *interfere), tmp_path / "run")
    assert run(again(argv, tmp_path / "run"))[0] == 0
    assert_same_run(tmp_path / "run", undisturbed[0])


def assert_out_of_disk(result, output):
    status, err = result
    assert status == 1 and err.startswith(f"error: {output.name}: ") and err.count("\n") == 1
    for path in checkpoints(output):
        assert path == checkpoints(output)[-1] and path.name in err
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["about"])["step"] > 0 and file.keys()


def not_finite(what, step):
    """From this step on the loss is NaN, or the weights overflow in it."""
    forget_losses, update, steps = train.forget_losses, train.update, []

    def nan_loss(*args):
        return forget_losses(*args) * (math.nan if len(steps) >= step - 1 else 1)

    def counted(state, *args):
        record = update(state, *args)
        steps.append(1)
        if what == "weights" and len(steps) >= step:
            with torch.no_grad():
                next(state.model.parameters())[0, 0] = math.inf
        return record
    train.update = counted
    if what == "loss":
        train.forget_losses = nan_loss


@pytest.mark.parametrize("what, step, named", [("loss", 1, 0), ("loss", 6, 5), ("weights", 5, 5)])
def test_a_loss_that_is_not_finite(what, step, named, world, undisturbed, tmp_path):
    """It stops the run and is never saved: the checkpoint before it is whole, and the run can go
    on from there."""
    status, err = run(words(LONG, world), not_finite, what, step)
    assert status == 1 and re.match(f"error: run: stopped after step {named} .*not finite", err)
    saved = [f"checkpoint-{step - 1:08d}.safetensors"] * (step > 1)
    assert [p.name for p in checkpoints(tmp_path / "run")] == saved
    assert err.count("\n") == 1 and (not saved or saved[0] in err)
    assert run(words(LONG, world, "--resume")) == (0, "")
    assert_same_run(tmp_path / "run", undisturbed[0])


# Memory, and the small numbers of fp16

def too_much(*args, **options):
    return torch.empty(2**55, dtype=torch.uint8)  # more than any machine has


def too_much_for_the_card(*args, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


@pytest.mark.parametrize("fail", [too_much, too_much_for_the_card])
def test_out_of_memory(fail, world, tmp_path, capfd, monkeypatch):
    """One line names what to lower and where to go on from."""
    shutil.copytree(world / "stopped", "out")
    argv = words(RUN, world, "--epochs 3 --resume")
    with monkeypatch.context() as patch:
        patch.setattr(train, "retain_losses", fail)
        assert_refused(train, argv, "out: stopped after step 3 *checkpoint-00000003*: out of "
                       "memory *--max-tokens", capfd, status=1)
    assert train.main(argv) == 0
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", fail)
    for program, argv in ((train, words(RUN, world, "--output new")),
                          (evaluation, words(TOFU, world))):
        assert_refused(program, argv, "out of memory", capfd, world, status=1)


def overflowing(loss, factor, steps):
    """In these many first steps the loss, and so the gradient, is so many times as large."""
    calls = []

    def larger(*args):
        calls.append(1)
        return loss(*args) * (factor if len(calls) <= steps else 1)
    return larger


def test_fp16_steps_that_overflow(world, tmp_path, capfd, monkeypatch):
    """They are skipped, which the log says and the last line counts; the weights stay."""
    monkeypatch.setattr(train, "forget_losses", overflowing(train.forget_losses, 1e38, 2))
    argv = words(RUN, world, "--dtype fp16 --epochs 3 --save-every 1")
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", stop_after(2))
        assert train.main(argv) == 128 + signal.SIGTERM
    with safe_open("out/checkpoint-00000002.safetensors", "pt") as file:
        assert json.loads(file.metadata()["about"])["scaler"]["scale"] == 2**14
        kept = {name.removeprefix("weight."): file.get_tensor(name) for name in file.keys()}
    assert all(tensor.equal(kept[name]) for name, tensor in weights(world / "model").items())
    assert {t.item() for name, t in kept.items() if name.startswith("step.")} == {0}
    assert train.main([*argv, "--resume"]) == 0
    steps = [line for line in log(tmp_path / "out") if "lr" in line]
    assert [line.get("skipped", False) for line in steps] == [True, True, *[False] * 4]
    assert [line["grad_norm"] for line in steps[:2]] == [None, None]
    assert "skipped 2 steps" in capfd.readouterr().out
    assert any(not t.equal(kept[name]) for name, t in weights(tmp_path / "out").items())


@pytest.mark.parametrize("epochs, last", [(1, 2), (100, 16)])
def test_fp16_that_always_overflows(epochs, last, world, tmp_path, capfd, monkeypatch):
    """The run ends at the latest when the scale has collapsed; the start model is not the result,
    whether the run is resumed or not."""
    monkeypatch.setattr(train, "forget_losses", overflowing(train.forget_losses, 1e38, 10**9))
    argv = words(RUN, world, f"--dtype fp16 --epochs {epochs}")
    for options in ([], ["--resume"]):
        assert_refused(train, [*argv, *options], f"out: stopped after step {last} *: fp16", capfd,
                       status=1)
        assert len([x for x in log(tmp_path / "out") if "lr" in x]) == last
        assert not Path("out/config.json").exists()


def test_a_table_that_cannot_be_saved_is_printed(world, capfd, monkeypatch):
    """What took hours is not lost."""
    shutil.copytree(world / "model", "model")
    argv = words(TOFU.replace("{model}", "model"), world)

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert evaluation.main(argv) == 1
    out, err = capfd.readouterr()
    assert "model utility" in out and err.count("\n") == 1
    assert err.startswith("error: model/eval.json: ") and "No space left" in err


def test_another_process_has_trained_meanwhile(world, capfd, monkeypatch):
    """While this one loaded its model: what the other left is not written over."""
    build = train.build
    monkeypatch.setattr(train, "build", lambda args: (
        shutil.copytree(world / "stopped", "out"), build(args))[1])
    assert_refused(train, words(RUN, world), "out: already holds", capfd)
    for path in (world / "stopped").iterdir():
        assert Path("out", path.name).read_bytes() == path.read_bytes()


def test_a_folder_that_cannot_be_written_to(world, tmp_path, monkeypatch):
    """Its results are kept in runs/, and found there."""
    shutil.copytree(world / "model", tmp_path / "theirs")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "theirs")
    argv = words(TOFU.replace("{model}", "theirs"), world)
    assert evaluation.main(argv) == 0
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    assert evaluation.main(argv) == 0
    assert not Path("theirs/eval.json").exists() and Path("runs/theirs/eval.json").exists()
    shutil.move("runs/theirs/eval.json", "theirs")  # by its owner
    assert evaluation.main(argv) == 0
