#!/usr/bin/env bash
# What only a GPU can show, in parts that end within ten minutes on one of 80 GB:
#
#     tests/gpu.sh tests      tests/test_gpu.py
#     tests/gpu.sh 1b         a step at Llama 3.2 1B's shape, beside other ways to do the same
#     tests/gpu.sh 7b         a step at Llama 2 7B's shape, all parameters trained
#
# No network is needed. DEVICE=cpu with SIZE=1M tries the script itself on a CPU, where its figures
# mean nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
bench() { python tests/studies/bench.py --device "$device" --steps "${STEPS:-5}" --batch 32 "$@"; }

case "${1:?usage: tests/gpu.sh tests|1b|7b}" in
tests) TEST_DEVICE=$device python -m pytest -q tests/test_gpu.py ;;
1b) bench --size "${SIZE:-1B}" --dtype bf16 --micro 8 \
        --variants a,b,c,d,c+checkpointing,c+compile ;;
7b) bench --size "${SIZE:-7B}" --bf16-weights --variants c+checkpointing ;;
*) echo "unknown part: $1" >&2; exit 2 ;;
esac
