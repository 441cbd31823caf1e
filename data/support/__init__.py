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
# How often a waiting thread looks again: OpenMP's 300,000 is slow beside other work (BENCH.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# For how many shapes oneDNN (bf16 on a CPU) keeps what it made: its 1,024 fill the memory.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
