"""A training run's folder: who owns it, what is in it, and how a run goes on from it.

    args.json                        arguments, and hashes of data and start model; what determines
                                     the result must be the same when a run is resumed
    metrics.jsonl                    a line a step, and a line an epoch
    checkpoint-NNNNNNNN.safetensors  weights and optimizer state after that step, until the end
    config.json, *.safetensors ...   the finished model; config.json comes last

Under torchrun rank 0 alone reads and writes it: other machines need not see the same disk. The
first part, files that are there whole or not at all, is used for eval.json, too.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import tempfile
import time

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from . import distributed
from .data_files import find
from .errors import Failure, blame, caught_signals, cause, in_short, require
from .optim import MOMENTS, StochasticAdamW, steps_taken

UNKEPT = {"output", "resume", "device"}  # arguments that args.json does not hold
NAMES = {"forget", "retain", "model", "init"}  # may differ: their content is compared, by its hash
# A resumed run may change these, which leave the result as it is; the ranks of a run may not.
FREE = {"save_every", "snapshots", "max_tokens", "checkpointing", "compile"}
LOCK, HALF_DONE = ".lock", ".half-done"


# Files that are there whole or not at all, and that have one owner at a time

def check_writable(path):
    """Raise InputError unless a file can be made in the folder at `path`, or in the nearest one
    above it that exists."""
    with blame(path, "not a folder that can be written to"):
        path = path.absolute()
        folder = next(p for p in (path, *path.parents) if p.exists())
        tempfile.TemporaryFile(dir=folder).close()


def fsync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:  # some file systems know no fsync of folders
        if not path.is_dir() or e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


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
        fsync(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write(path, text):
    """Put a text file in place whole."""
    with filling(path.parent) as scratch:
        (scratch / path.name).write_text(text)


@contextlib.contextmanager
def owned(path, busy=None):
    """Hold the lock of a folder, or of a lock file, which goes at the end. If another process has
    it: wait, or raise InputError(busy). File systems without locks have no owners."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except OSError as e:
            require(not isinstance(e, BlockingIOError), busy)
        if not path.is_dir():
            stack.callback(path.unlink, missing_ok=True)
        yield


# Before a run

def settings_of(args, forget, retain):
    """What args.json says of a run before its start model is known: flags and hashes of data."""
    settings = {key: value for key, value in vars(args).items() if key not in UNKEPT}
    return settings | {"forget data": digest(forget), "retain data": digest(retain)}


def digest(examples):
    """A hash of what a model sees of these Examples."""
    content = repr([(e.input_ids, e.start) for e in examples])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def check_run(output, settings, resume):
    """Whether the run in the folder `output` is complete, on rank 0. Raises InputError unless the
    folder is new, or holds this very run."""
    if not distributed.first():
        return False
    check_writable(output)
    names = {p.name for p in output.iterdir()} - {LOCK, HALF_DONE} if output.exists() else set()
    if resume:
        require(output.exists() and (not names or "args.json" in names), f"{output}: no run to "
                "resume in this folder (there is no args.json); leave out --resume, or pass "
                "another --output")
    else:
        require(not names, f"{output}: already holds a run or other files; pass another --output, "
                "--resume, or delete it")
    compare(output, settings)
    return is_finished(output)


def compare(output, settings):
    """Raise InputError if the run that was begun here had other arguments, data or weights."""
    path = output / "args.json"
    with blame(path, "cannot be read, so the run cannot be resumed"):
        before = json.loads(path.read_text()) if path.exists() else {}
        changed = [f"{key.replace('_', '-')} was {before[key]}, is {value}"
                   for key, value in settings.items()
                   if key not in NAMES | FREE and before.get(key, value) != value]
    require(not changed, f"{path}: cannot resume with other settings: {'; '.join(changed)}")


def is_complete(output, settings, complete):
    """Whether the run is complete, as rank 0 has found; if so, say it and tidy the folder. Raises
    InputError on every rank unless all have the same settings, and the folder's run has them."""
    complete = distributed.from_first(complete)
    distributed.agree(output, {key: settings[key] for key in settings.keys() - NAMES})
    with distributed.together():
        if distributed.first():
            compare(output, settings)
    if complete:
        tidy(output)
        distributed.say(f"{output}: this run is complete")
    return complete


# During a run

@contextlib.contextmanager
def session(args, settings, total):
    """What is around the loop: gives the step to start from, log(**record), and the list of signals
    caught.

    The output has one owner; SIGINT, SIGTERM and SIGHUP are only noted; an error names the
    checkpoint to go on from.
    """
    output, start = args.output, 0
    with contextlib.ExitStack() as stack:
        with distributed.together():
            if distributed.first():
                stack.enter_context(owned(
                    output / LOCK, f"{output}: another process is training into this folder; "
                    "wait for it, or pass another --output"))
                # Again, since another process may have trained here before the lock was held.
                done = check_run(output, settings, args.resume)
                require(not done, f"{output}: finished by another process meanwhile")
                start = newest_step(output, total)
        start = distributed.from_first(start)
        caught = stack.enter_context(caught_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        bar = stack.enter_context(tqdm(total=total, initial=start, desc=str(output), unit="step",
                                       disable=not distributed.first() or None))
        try:
            with opened_log(args, settings, start, bar) as log:
                yield start, log, caught
        except Exception as e:
            if not cause(e):
                raise
            newest = next(iter(checkpoints(output)), None)
            kept = (f"{newest.name} is whole, go on from it with --resume" if newest
                    else "there is no checkpoint yet")
            # All ranks find a loss that is not finite, so that only one prints it.
            kind = FloatingPointError if cause(e) == "not finite" else Failure
            raise kind(f"{output}: {cause(e)} after step {bar.n}: {in_short(e)}; {kept}") from None


@contextlib.contextmanager
def opened_log(args, settings, start, bar):
    """log(**record) writes a line of metrics.jsonl, cut back to the step that the run starts from.

    One's own tracker (wandb, TensorBoard ...) goes into `log`.
    """
    path, began = args.output / "metrics.jsonl", time.time()
    if distributed.first():
        write(args.output / "args.json", json.dumps(settings, indent=1) + "\n")
        before = path.read_text(errors="replace").splitlines() if start and path.exists() else []
        write(path, "".join(line + "\n" for line in before if stays(line, start)))
    with open(path if distributed.first() else os.devnull, "a", buffering=1) as file:
        def log(**record):
            record = {key: value if not isinstance(value, float) or math.isfinite(value) else None
                      for key, value in record.items()}  # JSON has no NaN
            file.write(json.dumps(record) + "\n")
            if "lr" in record:
                losses = ("forget_loss", "retain_loss")
                bar.set_postfix({k: f"{record[k]:.3g}" for k in losses if k in record})
                bar.n = record["step"]
                bar.update(0)
        yield log
    if distributed.first() and is_finished(args.output):
        report(args, time.time() - began)


def stays(line, start):
    """Whether a line of metrics.jsonl is whole, and not written again by a run from step `start`
    on, which begins with that step's probe."""
    with contextlib.suppress(ValueError, TypeError, KeyError):  # halves, after a power loss
        record = json.loads(line)
        return record["step"] < start or record["step"] == start and "epoch" not in record
    return False


def stopped(caught, step, total):
    """Print that the run has stopped after a signal; the exit status."""
    distributed.say(f"Stopped after step {step} of {total}; "
                    "go on with the same command and --resume")
    return 128 + (caught or [signal.SIGTERM])[0]


def is_due(interval, step, epochs):
    """Whether something done every so many steps, or epochs, is done after this step."""
    count, in_epochs = interval
    done = epochs.get(step) if in_epochs else step
    return bool(count and done) and done % count == 0


# Checkpoints

def checkpoints(folder):
    """The checkpoints in a folder, newest first."""
    return sorted(folder.glob(f"checkpoint-{'[0-9]' * 8}.safetensors"), reverse=True)


def newest_step(output, total):
    """The step of the newest checkpoint, 0 without one."""
    newest = next(iter(checkpoints(output)), None)
    step = int(newest.stem[-8:]) if newest else 0
    require(step <= total, f"{newest}: not a checkpoint of this run, which has {total} steps")
    return step


def save_checkpoint(state, output, step):
    """Write OUTPUT/checkpoint-STEP.safetensors with weights and optimizer state, whole, from rank
    0; then remove the ones before."""
    def stored():
        for name, p in state.model.lm.named_parameters():
            moments = state.optimizer.state.get(p, {})
            yield f"weight.{name}", p
            if moments.get("step"):  # 0 while fp16 has skipped all
                yield from ((f"{key}.{name}", moments[key]) for key in MOMENTS)

    tensors = distributed.gathered(stored())
    about = {"step": step, "tensors": len(tensors), "adam_step": steps_taken(state.optimizer),
             "scaler": state.scaler.state_dict()}
    if distributed.first():
        path = output / f"checkpoint-{step:08d}.safetensors"
        with filling(output) as scratch:
            about = {key: json.dumps(value) for key, value in about.items()}
            save_file(tensors, scratch / path.name, about)
        for old in checkpoints(output):
            if old != path:
                old.unlink()
    distributed.barrier()


def load_checkpoint(state, output, step):
    """Put back weights and optimizer state as they were after `step` steps, if any."""
    if not step:
        return
    named = [*state.model.lm.named_parameters()]
    with distributed.together():  # rank 0 reads and checks, the others get their parts from it
        saved, about = {}, None
        if distributed.first():
            shapes = {f"weight.{name}": (p.shape, p.dtype) for name, p in named}
            saved, about = read_checkpoint(output, step, shapes)
    about, names = distributed.from_first((about, {*saved}))
    for name, p in named:
        with torch.no_grad():
            weight = distributed.placed(saved.pop(f"weight.{name}", None), p)
            distributed.local(p).copy_(distributed.local(weight))
        if f"exp_avg.{name}" in names:
            moments = {key: distributed.placed(saved.pop(f"{key}.{name}", None), p)
                       for key in MOMENTS}
            # The fused AdamW counts on the device.
            counted_on = "cpu" if isinstance(state.optimizer, StochasticAdamW) else p.device
            count = torch.tensor(float(about["adam_step"]), device=counted_on)
            state.optimizer.state[p] = {"step": count, **moments}
    with blame(output, "the scaler of its checkpoint cannot be used"):
        state.scaler.load_state_dict(about["scaler"])


def read_checkpoint(output, step, shapes):
    """({name: tensor}, what it says about scaler and optimizer) of a checkpoint that holds
    weights of these {name: (shape, dtype)}, and the moments of those that were trained."""
    path, *older = checkpoints(output)
    hint = f" (delete it to go on from {older[0].name})" if older else ""
    with blame(path, f"not a whole checkpoint of this run{hint}"), safe_open(path, "pt") as file:
        about = {key: json.loads(value) for key, value in file.metadata().items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        trained = {name.partition(".")[2] for name in tensors.keys() - shapes.keys()}
        expected = shapes | {f"{moment}.{name}": shapes[f"weight.{name}"]
                             for name in trained for moment in MOMENTS}
        held = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        counts = range(1, step + 1) if trained else [0]  # without steps that fp16 skipped
        if (held, about["step"], about["tensors"]) != (expected, step, len(held)) or (
                about["adam_step"] not in counts):
            raise ValueError("its steps, or its tensors' names, shapes or dtypes, are others")
    return tensors, about


# The end

def is_finished(folder):
    """Whether a run ended here: there is a config.json, which `filling` puts last, and no
    checkpoint. Raises InputError where the weights that belong to it are not whole."""
    config, index = folder / "config.json", folder / "model.safetensors.index.json"
    if not config.is_file() or checkpoints(folder):
        return False
    with blame(folder, "it has a config.json as if finished, but no whole model; delete the "
               "config.json to train again"):
        json.loads(config.read_bytes())["model_type"]
        shards = json.loads(index.read_bytes())["weight_map"].values() if index.exists() else ()
        for name in {*shards} or {"model.safetensors"}:
            with safe_open(folder / name, "pt"):  # raises where it is cut off
                pass
    return True


def tidy(output):
    """Remove what only an unfinished run needs, and what one that was killed has left half done."""
    if distributed.first():
        shutil.rmtree(output / HALF_DONE, ignore_errors=True)
        for path in (output / LOCK, *checkpoints(output)):
            path.unlink(missing_ok=True)


def report(args, seconds):
    """Print what came of it, and what to do next."""
    records = [json.loads(line) for line in (args.output / "metrics.jsonl").open()]
    probes = [r for r in records if "epoch" in r]
    changes = [f"{name.removesuffix('_prob')} {probes[0][name]:.3f} -> {probes[-1][name]:.3f}"
               for name in ("forget_prob", "retain_prob") if name in probes[0]]
    skipped = sum("skipped" in r for r in records)
    distributed.say(f"{args.output}: answer probability {', '.join(changes)} in {seconds:.0f} s"
                    + f"; {skipped} steps skipped, whose fp16 gradients overflowed" * bool(skipped))
    flags = evaluation_flags(args, find(args.forget)) if args.forget else []
    if flags:
        distributed.say("Next: " + shlex.join(["python", "eval.py", str(args.output), *flags]))


def evaluation_flags(args, forget):
    """How eval.py is told of this data; none for data that has no evaluation files beside it."""
    if forget.parent.name == "raw":  # MUSE
        return ["--muse", str(forget.parent.parent)]
    if not forget.with_name(f"{forget.stem}_perturbed{forget.suffix}").exists():
        return []
    flags = ["--forget", args.forget]
    for name in ("template", "system", "date"):
        if getattr(args, name):
            flags += [f"--{name}", getattr(args, name)]
    return flags
