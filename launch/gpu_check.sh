#!/usr/bin/env bash
# Everything that needs a GPU, in three parts of a few minutes each: evals/efficiency/gpu.py, which says what they do.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/gpu_check.sh --part right|fast|endurance [--output DIR] [--rehearse] [--dry-run]

Runs on a machine with a CUDA device, with whatever Python has the packages; launch/gpu_wheels.sh fetches those that a
machine without a package registry lacks. Each result is shown and written to DIR/PART.jsonl as it comes.

  --part right      240 s: kernels in bfloat16 against float32, with and without wgmma; their times, memcheck, tests
  --part fast       270 s: tokens/s of 340M and 760M models, and of other implementations
  --part endurance  200 s: 2,097,152 tokens through a memory; a run with a checkpoint that goes on from it
  --output DIR      results and logs (default gpu_check)
  --rehearse        every command at a tiny size on the CPU; the numbers mean nothing
  --dry-run         print the commands and do nothing
  --help            shows this

Ends with 1 where a command failed or a result is wrong. Where `right` finds wgmma right, give the other parts
DISABLE_MMA_V3=0, which leaves it on. TRITON_CACHE_DIR names a folder of kernels compiled beforehand, by `python -m
evals.efficiency.gpu_cache DIR` on any machine with the same Python and Triton. PYTHON names another interpreter than
.venv/bin/python or python3.
TEXT
}

for argument in "$@"; do
    if [[ $argument == --help || $argument == -h ]]; then
        usage
        exit 0
    fi
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -x $root/.venv/bin/python ]]; then PYTHON=$root/.venv/bin/python; fi
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" -m evals.efficiency gpu "$@"
