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
# Spins of a waiting thread: OpenMP's 300,000 are slow on a busy machine (tests/BENCH.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Shapes for which oneDNN (bf16 on a CPU) keeps its code: its default, 1,024, fills the memory.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
