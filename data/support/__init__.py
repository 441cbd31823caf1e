"""What train.py and eval.py need beside the story: refusing input, opening models, keeping results,
talking to other processes. Imported before torch, since OpenMP reads its settings as it loads."""

import os
import sys

try:
    import fcntl  # noqa: F401
except ImportError:
    print("error: this system cannot lock files (no fcntl); use Linux, macOS, or Windows by WSL",
          file=sys.stderr)
    sys.exit(2)
# How long a thread spins that waits for another. Beside other work OpenMP's default (300,000)
# halves the miniature's speed; 10,000 cost nothing on a quiet machine (tests/BENCH.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# oneDNN, which computes bf16 on a CPU, keeps what it made for each shape. With its default of 1,024
# memory grows for hundreds of steps, as batches have shapes of their own (tests/BENCH.md).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
