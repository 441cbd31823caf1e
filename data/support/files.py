"""Files that are there whole or not at all, and that have one owner at a time."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from safetensors import safe_open

from .errors import InputError, naming


def check_writable(path):
    """Raise InputError unless a file can be made in the folder at `path`, or in the nearest one
    above it that exists."""
    with naming(path, "not a name that a file can have"):
        path = path.absolute()
        folder = next(p for p in (path, *path.parents) if p.exists())
    with naming(path, f"{folder} cannot be written to"):
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


HALF_DONE = ".half-done"


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


@contextlib.contextmanager
def owned(path, busy=None):
    """Hold the lock file at `path`, which goes when it is let go. If another process has it: wait,
    or raise InputError(busy). Gives the open file: a child process that has it holds the lock too.

    File systems without locks have no owners: there the caller is on its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = False
    while not held:
        file = path.open("a")
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
            except BlockingIOError:
                raise InputError(busy) from None
        with contextlib.suppress(FileNotFoundError):  # the one before took the file away
            held = os.fstat(file.fileno()).st_ino == os.stat(path).st_ino
    try:
        yield file
    finally:
        path.unlink(missing_ok=True)
        file.close()


CHECKPOINT = re.compile(r"checkpoint-(\d{8})\.safetensors")


def checkpoints(folder):
    """The checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(p.name))


def is_finished(folder):
    """Whether a run ended here: there is a config.json, which `filling` puts last, and no
    checkpoint. Raises InputError where the weights that belong to it are not whole."""
    config, weights = folder / "config.json", ["model.safetensors"]
    if not config.is_file() or any(path.is_file() for path in checkpoints(folder)):
        return False
    with naming(folder, "it has a config.json as if finished, but no whole model; delete the "
                "config.json to train again"):
        json.loads(config.read_bytes())["model_type"]
        if not (folder / weights[0]).is_file():
            index = json.loads((folder / "model.safetensors.index.json").read_bytes())
            weights = sorted(set(index["weight_map"].values()))
        for name in weights:
            with safe_open(folder / name, "pt"):  # raises where it is cut off
                pass
    return True


def digest(examples):
    """A hash of what a model sees of these Examples."""
    content = repr([(e.input_ids, e.start) for e in examples])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def own_files(folder):
    """What a model folder holds besides weights: configs, tokenizer, chat template."""
    return [p for p in sorted(Path(folder).iterdir()) if p.is_file()
            and p.suffix in (".json", ".jinja", ".txt", ".model") and not p.name.startswith(".")
            and p.name not in ("args.json", "eval.json", "adapter_config.json")
            and not p.name.endswith(".index.json")]
