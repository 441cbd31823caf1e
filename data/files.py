"""Files that are there whole or not at all, and that have one owner at a time."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from .errors import InputError, naming


def check_writable(path):
    """The folder at `path` or the nearest one above it that exists. InputError unless a file can
    be made there, and `path` is a name that a file can have."""
    with naming(path, "not a name that a file can have"):
        path = path.absolute()
        str(path).encode()  # half a surrogate pair: a name that was not UTF-8, unfit for args.json
        above = [path, *path.parents]
        for p in above:
            if p.is_symlink() and not p.exists():
                raise ValueError(f"{p} is a link that leads nowhere")
        folder = next(p for p in above if p.exists())
    with naming(path, f"{folder} cannot be written to"):
        tempfile.TemporaryFile(dir=folder).close()
    return folder


def fsync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
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


def own_files(folder):
    """What a model folder holds besides weights: configs, tokenizer, chat template."""
    return [p for p in sorted(Path(folder).iterdir()) if p.is_file()
            and p.suffix in (".json", ".jinja", ".txt", ".model") and not p.name.startswith(".")
            and p.name not in ("args.json", "eval.json", "adapter_config.json")
            and not p.name.endswith(".index.json")]
