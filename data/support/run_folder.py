"""A training run's folder: who owns it, what is in it, and how a run goes on from it.

    args.json                        arguments at its start, hashes of data and start model
    metrics.jsonl                    a line a step, and a line an epoch; locked while a run writes
    checkpoint-NNNNNNNN.safetensors  weights and optimizer state after that step, until the end
    config.json, *.safetensors ...   the finished model; config.json comes last

Under torchrun rank 0 alone reads and writes it: other machines need not see the same disk.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from . import distributed
from .errors import blame, caught_signals, require

# What may change on --resume. Files are compared by content, not by name.
FREE = {"output", "resume", "device", "forget", "retain", "model", "init", "save_every",
        "snapshots", "max_tokens", "checkpointing", "compile"}
LOG, HALF_DONE = "metrics.jsonl", ".half-done"


@contextlib.contextmanager
def filling(folder):
    """A scratch folder within `folder`. What is put there takes its place when all is there,
    config.json last, and whole: after a power loss, too, a file is the old one or the new one."""
    scratch = folder / HALF_DONE
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    scratch.mkdir(parents=True)
    try:
        yield scratch
        files = sorted(scratch.iterdir(), key=lambda path: path.name == "config.json")
        for path in files:
            with contextlib.suppress(OSError):  # safetensors lets nobody else read its files
                path.chmod(scratch.stat().st_mode & 0o666)
            fsync(path)
        for path in files:
            os.replace(path, folder / path.name)
        with contextlib.suppress(OSError):  # some file systems know no fsync of folders
            fsync(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def fsync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def owned(path, busy=None):
    """Hold the lock of a folder, or of a file (made if missing). If it is taken: wait, or raise
    InputError(busy). Where the file system has no locks: go on without."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except OSError as e:
            require(not isinstance(e, BlockingIOError), busy)
        yield


def digest(content):
    """A hash of data: Examples (without where they come from), lists, dicts, texts, numbers."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def start_step(output, settings, resume):
    """The step that a run starts from in the folder `output`: 0 in a new one, None if the run is
    complete. Raises InputError if anything but this very run is there; rank 0 alone looks."""
    if not distributed.first():
        return None
    with blame(output):
        held = [*output.iterdir()] if output.exists() else []
    names = {p.name for p in held if p.name != HALF_DONE and (p.name != LOG or p.stat().st_size)}
    path = output / "args.json"
    require(not names or resume and path.name in names, f"{output}: already holds a run or other "
            "files; pass another --output, or --resume to go on with this run")
    with blame(path, "cannot be read, so the run cannot be resumed"):
        before = {**json.loads(path.read_text())} if names else settings
    changed = [f"{key.replace('_', '-')} was {before.get(key)}, is {settings[key]}"
               for key in settings if key not in FREE and before.get(key) != settings[key]]
    require(not changed, f"{path}: cannot resume with other settings: {'; '.join(changed)}")
    if is_finished(output):
        return None
    return max((int(path.stem[-8:]) for path in checkpoints(output)), default=0)


def is_finished(folder):
    """Whether a run has ended here. Raises InputError where its model is no longer whole."""
    config = folder / "config.json"
    if checkpoints(folder) or not config.is_file():
        return False
    with blame(folder, "its model is damaged; delete its config.json to train again"):
        json.loads(config.read_bytes())["model_type"]
        for path in [*folder.glob("*.safetensors")] or [folder / "model.safetensors"]:
            safe_open(path, "pt")  # raises where it is cut off
    return True


@contextlib.contextmanager
def session(args, settings, start, total):
    """What is around the loop: gives log(**record), the place for one's own tracker (wandb ...),
    and the list of signals caught. An error gets a note with the checkpoint to go on from."""
    output, path = args.output, args.output / LOG if distributed.first() else os.devnull
    with contextlib.ExitStack() as stack:
        with distributed.together(), blame(output, "not a folder that can be written to"):
            if distributed.first():
                output.mkdir(parents=True, exist_ok=True)
                stack.enter_context(owned(path, f"{output}: another process is training into this "
                                          "folder; wait for it, or pass another --output"))
                require(start_step(output, settings, args.resume) == start,
                        f"{output}: another process has trained into this folder meanwhile")
        caught = stack.enter_context(caught_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        bar = stack.enter_context(tqdm(total=total, initial=start, desc=str(output), unit="step",
                                       disable=not distributed.first() or None))

        def log(**record):
            file.write(json.dumps(record) + "\n")
            bar.n = record["step"]
            bar.set_postfix({k: v for k, v in record.items() if k.endswith(("_loss", "_prob"))})

        try:
            if distributed.first():
                with filling(output) as scratch:  # tried on --resume, too
                    if not start:
                        content = json.dumps(settings, indent=1, default=str) + "\n"
                        (scratch / "args.json").write_text(content)
            with open(path, "a" if start else "w", buffering=1) as file:
                yield log, caught
        except Exception as e:
            newest = next((p.name for p in checkpoints(output)), "the start")
            e.add_note(f"{output}: stopped after step {bar.n} (--resume goes on from {newest})")
            raise


def finish(output, forget):
    """Remove the checkpoints of a finished run; print what came of it, and what is next."""
    if distributed.first():
        for path in checkpoints(output):
            path.unlink()
        records = [json.loads(line) for line in (output / LOG).open()]
        before, *_, after = [record for record in records if "epoch" in record]
        changes = [f"{name.removesuffix('_prob')} {before[name]:.3f} -> {after[name]:.3f}"
                   for name in before if name.endswith("_prob")]
        skipped = sum("skipped" in record for record in records)
        note = f"; fp16 skipped {skipped} steps" if skipped else ""
        distributed.say(f"{output}: answer probability {', '.join(changes)}{note}")
        if forget:
            distributed.say(f"Next: python eval.py {output} --forget {forget} (MUSE: --muse FOLDER"
                            "; --template, --system and --date as here)")


def checkpoints(folder):
    """The checkpoints in a folder, newest first."""
    return sorted(folder.glob(f"checkpoint-{'[0-9]' * 8}.safetensors"), reverse=True)


def save_checkpoint(state, output, step):
    """Write OUTPUT/checkpoint-STEP.safetensors, whole, from rank 0; then remove the one before."""
    tensors = distributed.gathered(
        (f"{key}.{name}", tensor) for name, p in state.model.lm.named_parameters()
        for key, tensor in {"weight": p, **state.optimizer.state.get(p, {})}.items())
    if distributed.first():
        about = json.dumps({"log": (output / LOG).read_text(), "scaler": state.scaler.state_dict(),
                            "step": step, "tensors": len(tensors)})
        with filling(output) as scratch:
            save_file(tensors, scratch / f"checkpoint-{step:08d}.safetensors", {"about": about})
        for old in checkpoints(output)[1:]:
            old.unlink()
    distributed.on_all_ranks("saved")  # wait for rank 0: when one ends, torchrun ends all


@torch.no_grad()
def load_checkpoint(state, output, step):
    """Put back weights, optimizer state and log as they were after `step` steps, if any."""
    parameters = dict(state.model.lm.named_parameters())
    saved, scaler = {}, state.scaler.state_dict()
    with distributed.together():  # rank 0 reads and checks, the others get their parts from it
        if step and distributed.first():
            path = output / f"checkpoint-{step:08d}.safetensors"
            saved, about = read_checkpoint(path, step, parameters)
            (output / LOG).write_text(about["log"])
            scaler = about["scaler"]
    for name in distributed.from_first([*saved]):
        key, _, parameter = name.partition(".")
        p = parameters[parameter]
        if key == "weight":
            p.copy_(distributed.placed(saved.pop(name, None), p))
        elif key == "step":
            state.optimizer.state[p][key] = distributed.from_first(saved.get(name)).to(p.device)
        else:
            state.optimizer.state[p][key] = distributed.placed(saved.pop(name, None), p)
    state.scaler.load_state_dict(distributed.from_first(scaler))


def read_checkpoint(path, step, parameters):
    """({name: tensor}, what else is in it) of a checkpoint that must be whole and fit them."""
    with blame(path, "not a whole checkpoint of this run"), safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        if (about["step"], about["tensors"]) != (step, len(tensors)):
            raise ValueError("it is of another step, or lacks tensors")
        for name, tensor in tensors.items():
            key, _, parameter = name.partition(".")
            p = parameters[parameter]
            kind = ((), torch.float32) if key == "step" else (p.shape, p.dtype)
            if (tensor.shape, tensor.dtype) != kind:
                raise ValueError(f"{name} has another shape or dtype")
    return tensors, about
