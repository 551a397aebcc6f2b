#!/usr/bin/env bash
# Everything that needs a GPU, in one go: tests, kernels against the oracle, benchmarks, a short training run.
set -uo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/gpu_check.sh [--output DIR] [--steps N] [--only STEP ...] [--dry-run]

Runs on a machine with a CUDA device, with whatever Python has the packages. A step that fails does not stop the next.

  --output DIR   reports and logs (default gpu_check)
  --steps N      optimizer steps of the training runs (default 30)
  --only STEP    only these: tests, kernels, memory, train-titans, train-transformer
  --dry-run      print the commands and do nothing
  --help         shows this

DIR/gpu_check.json says for every step its command, status, seconds and log; with commit, device and versions.
PYTHON names another interpreter than .venv/bin/python or python3.
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
output=gpu_check steps=30 dry_run=
only=()
while (($#)); do
    case $1 in
    --output | --steps)
        if (($# < 2)); then
            printf 'error: %s needs a value; see --help\n' "$1" >&2
            exit 2
        fi
        if [[ $1 == --output ]]; then output=$2; else steps=$2; fi
        shift 2
        ;;
    --only)
        shift
        while (($#)) && [[ $1 != --* ]]; do
            only+=("$1")
            shift
        done
        ;;
    --dry-run)
        dry_run=1
        shift
        ;;
    --help | -h)
        usage
        exit 0
        ;;
    *)
        printf 'error: %s is not an option of gpu_check.sh; see --help\n' "$1" >&2
        exit 2
        ;;
    esac
done
if [[ ! $steps =~ ^[1-9][0-9]*$ ]]; then
    printf "error: --steps is '%s'; it must be a whole number above 0\n" "$steps" >&2
    exit 2
fi
known=(tests kernels memory train-titans train-transformer)
for name in ${only[@]+"${only[@]}"}; do
    if [[ " ${known[*]} " != *" $name "* ]]; then
        printf "error: --only %s is not a step; the steps are %s\n" "$name" "${known[*]}" >&2
        exit 2
    fi
done

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -x $root/.venv/bin/python ]]; then PYTHON=$root/.venv/bin/python; fi
fi
if [[ -z $dry_run ]]; then
    if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        printf 'error: %s finds no CUDA device through torch; run this where there is one, or with --dry-run\n' "$PYTHON" >&2
        exit 2
    fi
    mkdir -p "$output" || exit 2
    output=$(cd "$output" && pwd)
    : >"$output/steps.jsonl"
fi
cd "$root" || exit 2
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
failed=0

# step NAME COMMAND ...: runs it, keeps its log, and notes how it ended.
step() {
    local name=$1 began=$SECONDS status=0
    shift
    if ((${#only[@]})) && [[ " ${only[*]} " != *" $name "* ]]; then return; fi
    printf '\n== %s\n   ' "$name"
    printf '%q ' "$@"
    printf '\n'
    if [[ -n $dry_run ]]; then return; fi
    "$@" >"$output/$name.log" 2>&1 || status=$?
    tail -n 3 "$output/$name.log"
    if ((status)); then failed=1; fi
    "$PYTHON" - "$output" "$name" "$status" $((SECONDS - began)) "$(printf '%q ' "$@")" <<'PYTHON'
import json, pathlib, sys

folder, name, status, seconds, command = sys.argv[1:]
record = {"step": name, "status": int(status), "seconds": int(seconds), "command": command.strip(), "log": f"{name}.log"}
with pathlib.Path(folder, "steps.jsonl").open("a", encoding="utf-8") as file:
    file.write(json.dumps(record) + "\n")
PYTHON
}

# A text that is always there: Python's own library, as in the quickstart.
prepare_data() {
    local data=$output/data
    if [[ -n $dry_run || -f $data/shards/manifest.json ]]; then return; fi
    mkdir -p "$data"
    "$PYTHON" -m tokenization.train --input stdlib --vocab-size 2048 --output "$data/tokenizer.model" &&
        "$PYTHON" -m tokenization.encode --input stdlib --tokenizer "$data/tokenizer.model" \
            --output "$data/shards" --workers 8
}

train() {
    local name=$1 config=$2
    shift 2
    step "$name" bash launch/torchrun.sh --config "$config" --run-dir "$output/$name" --nproc 1 \
        --data.path "$output/data/shards" --evaluate.heldout-sequences 0 --train.steps "$steps" \
        --train.global-batch 8 --train.micro-batch 1 --parallel.tensor 1 --schedule.warmup-steps 5 \
        --checkpoint.every-steps 0 "$@"
}

step tests "$PYTHON" -m pytest -q -m gpu tests
step kernels "$PYTHON" -m pytest -q tests/kernels
step memory "$PYTHON" -m evals.efficiency memory --device cuda --output "$output/memory"
prepare_data
# One width and one harness for both, so that their tokens a second can be compared.
train train-titans mag_340m
train train-transformer transformer_340m

if [[ -n $dry_run ]]; then exit 0; fi
"$PYTHON" - "$output" <<'PYTHON'
import json, pathlib, platform, statistics, subprocess, sys

import torch

folder = pathlib.Path(sys.argv[1])
steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
for step in steps:
    metrics = folder / step["step"] / "metrics.jsonl"
    if metrics.is_file():
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row][5:]
        if speeds:
            step["tokens_per_second"] = statistics.median(speeds)
commit = subprocess.run(["git", "describe", "--always", "--abbrev=40", "--dirty"], capture_output=True, text=True)
report = {
    "commit": commit.stdout.strip() or None,
    "device": torch.cuda.get_device_name(),
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "python": platform.python_version(),
    "steps": steps,
}
(folder / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
for step in steps:
    speed = f", {step['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in step else ""
    print(f"{step['step']:20s} {'ok' if step['status'] == 0 else 'failed'}, {step['seconds']} s{speed}")
print(folder / "gpu_check.json")
PYTHON
exit "$failed"
