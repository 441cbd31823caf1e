"""How a program ends: if it fails, with one `error:` line. Its status is 2 where the input is wrong
(nothing was written), 1 where what was begun could not be finished, 128 + N after signal N."""

import argparse
import contextlib
import functools
import os
import re
import signal
import sys
import threading

import torch.distributed as dist
from safetensors import SafetensorError


class InputError(ValueError):
    """A mistake of the user's; the message names the place and what to do about it."""


def require(condition, message):
    """Raise InputError with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


@contextlib.contextmanager
def blame(place, what="cannot be used"):
    """Turn any error inside into an InputError that begins with `place`: a file, a file:line, an
    option. An InputError, which names its place already, passes as it is."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # whatever damaged files provoke in libraries, panics in Rust, too
        if out_of_memory(e):
            raise
        said = getattr(e, "strerror", None) or e  # without the file, which `place` names
        raise InputError(f"{place}: {what}: {in_short(said)}") from None


def in_short(error):
    return " ".join(str(error).split())[:400] or type(error).__name__


def out_of_memory(error):
    """Whether the host's or the card's memory did not suffice."""
    said = ("allocate memory", "out of memory", "bad_alloc", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def reason(error):
    """What stopped a program that began well, in a few words. None for a defect of the program."""
    if out_of_memory(error):
        return f"out of memory (lower --max-tokens, eval.py's --batch-size): {in_short(error)}"
    outside = (FloatingPointError, OSError, SafetensorError, dist.DistError)
    return in_short(error) if isinstance(error, outside) or "/gloo/" in str(error) else None


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are InputErrors, too."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise InputError(f"{message} (--help lists the options)")


def number(kind, low=-1e12):
    """An argparse type: an int or float (not NaN), at least `low` and at most 1e12."""
    def convert(text):
        value = kind(text)
        if not low <= value <= 1e12:
            raise argparse.ArgumentTypeError(f"{text}: must be from {low:g} to 1e12")
        return value
    convert.__name__ = kind.__name__  # argparse's messages say "invalid float value"
    return convert


def nonempty(text):
    """An argparse type: what names a file, folder or model; not empty, as an unset variable is."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty name; is a variable unset?")
    text.encode()  # raises for what is not UTF-8: safetensors would not open it
    return text


def interval(text):
    """An argparse type: '2epochs' -> (2, True), '100' -> (100, False); 0 is never."""
    (count, epochs), = re.findall(r"\A([0-9]+)(epochs?)?\Z", text)  # ValueError for other texts
    return int(count), bool(epochs)


def first():
    """Whether this process speaks and writes for all: torchrun's rank 0, or a process by itself."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


def one_line_errors(main):
    """A main(argv) that returns its exit status and, if it fails, has printed one line on stderr.
    Under torchrun rank 0 alone prints what all ranks raise; until they are joined each does."""
    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except (Exception, KeyboardInterrupt) as e:
            status = {InputError: 2, KeyboardInterrupt: 128 + signal.SIGINT}.get(type(e), 1)
            told = reason(e) if status == 1 else str(e) or "interrupted"
            if not told:
                raise
            alike = isinstance(e, (InputError, KeyboardInterrupt, FloatingPointError))
            if first() or not (alike and dist.is_initialized()):
                notes = getattr(e, "__notes__", []) if status == 1 else []
                print("error: " + printable(": ".join([*notes, told])), file=sys.stderr)
            return status
    return wrapped


def printable(text):
    """One line without control characters, which could play tricks on a terminal."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


@contextlib.contextmanager
def caught_signals(*numbers):
    """Gives a list in which these signals are noted. Those that are ignored stay so, as SIGHUP is
    under nohup; outside the main thread none is caught. A second Ctrl-C ends the process."""
    caught, before = [], {}

    def note(number, frame):
        caught.append(number)
        if number == signal.SIGINT and not dist.is_torchelastic_launched():  # which repeats it
            signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        heeded = [n for n in numbers if signal.getsignal(n) not in (signal.SIG_IGN, None)]
        before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
