"""How input is refused and how a program ends: one `error:` line, and a status that says why.

Status 2: the input is wrong, nothing was written. 1: what was begun could not be finished. A
signal: 128 + its number.
"""

import contextlib
import functools
import os
import re
import signal
import sys
import textwrap
import threading

import torch
import torch.distributed as dist
from safetensors import SafetensorError

JOIN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # they make a process one of several


class InputError(ValueError):
    """A mistake of the user's; the message names the place and what to do about it."""


class Failure(RuntimeError):
    """What stops a program that began well: a full disk, no memory left."""


def require(condition, message):
    """Raise InputError with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


@contextlib.contextmanager
def naming(place, what="cannot be used"):
    """Whatever goes wrong inside becomes an InputError that begins with `place`: a file, a
    file:line, an option. An InputError, which names its place already, passes as it is."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # whatever damaged files provoke in libraries, panics in Rust, too
        if cause(e) == "out of memory":
            raise
        raise InputError(f"{place}: {what}: {in_short(e)}") from None


def in_short(error):
    said = isinstance(error, OSError) and error.strerror or str(error) or type(error).__name__
    said = re.sub(r"^\[.*?\] ", "", said)  # where in C++
    return textwrap.shorten(said, 240, placeholder=" ...")


# What the allocators of host and card say, and gloo or NCCL when a process is gone.
NO_MEMORY = ("allocate memory", "out of memory", "bad_alloc", "ALLOC_FAILED")
NO_RANK = ("by peer", "Broken pipe", "pair closure")
HELP = {"not finite": "; a lower --lr may help",
        "out of memory": "; lower --max-tokens (eval.py: or --batch-size); train.py has "
                         "--checkpointing and --bf16-weights, too"}


def cause(error):
    """What stopped a program that began well, in a few words. None for a defect of the program."""
    if isinstance(error, FloatingPointError):
        return "not finite"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "out of memory"
    if isinstance(error, (RuntimeError, OSError, SafetensorError)):
        if any(said in str(error) for said in NO_MEMORY):
            return "out of memory"
        if not isinstance(error, RuntimeError):
            return "stopped"  # the operating system's own message says why
        if isinstance(error, dist.DistError) or any(said in str(error) for said in NO_RANK):
            return "another rank has ended"
    return None


def under_torchrun():
    """Whether torchrun started this process, passes signals on to it and waits for its end."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def speaks_for_all():
    """Whether this process prints what all ranks find alike: a process by itself, and rank 0."""
    rank, world, *where = (os.environ.get(name, "") for name in JOIN)
    joined = rank.isdecimal() and world.isdecimal() and all(where)
    return not (joined and 0 < int(rank) < int(world))


def one_line_errors(main):
    """A main(argv) that returns its exit status and, if it fails, has printed one line on stderr.

    Under torchrun, what all ranks find alike is printed by the first, other things by each.
    """
    @functools.wraps(main)
    def wrapped(argv=None):
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL and in_main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)  # other while libraries load
        first = speaks_for_all()
        try:
            return main(argv)
        except InputError as e:
            status, message = 2, first and e
        except KeyboardInterrupt:
            status, message = 128 + signal.SIGINT, first and "interrupted"
        except FloatingPointError as e:
            status, message = 1, first and e
        except Failure as e:
            status, message = 1, e
        except Exception as e:
            kind = cause(e)
            if not kind:
                raise
            status, message = 1, f"{kind}: {in_short(e)}{HELP.get(kind, '')}"
            if kind == "stopped":
                message = e  # it names the file
        if message:
            print("error: " + printable(message), file=sys.stderr)
        return status
    return wrapped


def printable(text):
    """One line without control characters, which could play tricks on a terminal."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def in_main_thread():
    """Whether this thread may catch signals."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def caught_signals(*numbers):
    """Gives a list in which these signals are noted. Those that are ignored stay so, as SIGHUP is
    under nohup; outside the main thread none is caught.

    A second Ctrl-C ends the process at once. Other signals come twice of themselves: when a
    terminal closes, from its shell and the kernel; and torchrun repeats those that its ranks had.
    """
    caught = []

    def note(number, frame):
        caught.append(number)
        if number == signal.SIGINT and not under_torchrun():
            signal.signal(number, signal.SIG_DFL)

    ignored = (signal.SIG_IGN, None)
    before = {n: signal.getsignal(n) for n in numbers
              if in_main_thread() and signal.getsignal(n) not in ignored}
    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
