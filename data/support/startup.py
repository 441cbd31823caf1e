"""What train.py and eval.py do before torch loads, when they are run as programs."""

import os
import signal
import sys


def prepare():
    try:
        import fcntl  # noqa: F401
    except ImportError:
        print("error: this system cannot lock files (no fcntl); use Linux, macOS, or Windows by "
              "WSL", file=sys.stderr)
        sys.exit(2)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback
    # How long a thread spins that waits for another. Beside other work OpenMP's default (300,000)
    # halves the miniature's speed; 10,000 cost nothing on a quiet machine (tests/BENCH.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # oneDNN, which computes bf16 on a CPU, keeps what it made for each shape. With its default of
    # 1,024 memory grows for hundreds of steps, as batches have shapes of their own (BENCH.md).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
