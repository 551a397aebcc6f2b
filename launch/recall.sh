#!/usr/bin/env bash
# A small model that learns to recall, from generated documents to S-NIAH far beyond the trained length.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/recall.sh [--variant X] [--lengths N ...] [--samples N] [--SECTION.SETTING VALUE ...]

Generates documents of S-NIAH with their answers, trains a small model on them in two stages (within a row, then over
many rows with carried states), and looks for needles at 1 to 64 times
the length of a training row. Run it again and it goes on where it stopped. evals/results/recall/README.md says what it finds.

  --variant X             mag (default), mac or transformer: pretrain/configs/recall_X.toml
  --lengths N ...         tokens of the samples; default: 256 1024 4096 8192 16384
  --samples N             samples of each length and depth; default: 8
  --SECTION.SETTING VALUE overrides one setting of both stages of training, such as --optimizer.lr 3e-3
  --help                  shows this

Everything is written to runs/recall/: data/ for all variants, and VARIANT/row, VARIANT/long and VARIANT/eval.
TEXT
}

variant=mag lengths=() samples=8 settings=()
while (($#)); do
    case $1 in
    --help | -h)
        usage
        exit 0
        ;;
    --lengths)
        shift
        while (($#)) && [[ $1 =~ ^[1-9][0-9]*$ ]]; do
            lengths+=("$1")
            shift
        done
        if ((${#lengths[@]} == 0)); then
            echo 'error: --lengths needs at least one number of tokens; see --help' >&2
            exit 2
        fi
        ;;
    --variant | --samples | --*.*)
        if (($# < 2)); then
            printf 'error: %s needs a value; see --help\n' "$1" >&2
            exit 2
        fi
        case $1 in
        --variant) variant=$2 ;;
        --samples) samples=$2 ;;
        *) settings+=("$1" "$2") ;;
        esac
        shift 2
        ;;
    *)
        printf 'error: %s is not an option of recall.sh; see --help\n' "$1" >&2
        exit 2
        ;;
    esac
done
case $variant in
mag | mac | transformer) ;;
*)
    printf "error: --variant is '%s'; it must be mag, mac or transformer\n" "$variant" >&2
    exit 2
    ;;
esac
if [[ ! $samples =~ ^[1-9][0-9]*$ ]]; then
    printf "error: --samples is '%s'; it must be a whole number above 0\n" "$samples" >&2
    exit 2
fi
if ((${#lengths[@]} == 0)); then lengths=(256 1024 4096 8192 16384); fi

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment ""
cd "$root"
PYTHON=.venv/bin/python
data=runs/recall/data run=runs/recall/$variant
mkdir -p "$data"

# step TITLE COMMAND ...: prints the command and runs it.
step() {
    say "$1"
    shift
    printf '   '
    printf '%q ' "$@"
    printf '\n\n'
    "$@"
}

if [[ -f $data/tokenizer.model ]]; then
    say "1/4 Tokenizer (done already)"
else
    step "1/4 Tokenizer: 768 pieces, trained on such documents" cp evals/results/recall/tokenizer.model "$data"
fi

# documents NAME TITLE ARGUMENTS ...: one file of them.
documents() {
    step "$2" "$PYTHON" -m evals.niah.training_data --output "$data/$1.jsonl" --questions 3 \
        --tokenizer "$data/tokenizer.model" "${@:3}"
}
# shards NAME TITLE: of all documents in a file or folder.
shards() {
    step "$2" "$PYTHON" -m tokenization.encode --input "$data/$1" --tokenizer "$data/tokenizer.model" \
        --output "$data/shards-${1%.jsonl}" --workers 1
}
if [[ -f $data/shards-row/manifest.json && -f $data/shards-long/manifest.json ]]; then
    say "2/4 Documents and shards (done already)"
else
    documents row "2/4 Documents of one row" --documents 20000 --tokens 256 --repeats 6
    shards row.jsonl "2/4 Shards of one row"
    documents long/1 "2/4 Documents of one row, each needle once" --documents 2000 --tokens 256 --seed 11
    documents long/4 "2/4 Documents of four rows" --documents 500 --tokens 1024 --seed 12
    documents long/16 "2/4 Documents of sixteen rows" --documents 250 --tokens 4096 --seed 13
    shards long "2/4 Shards of many rows"
fi

step "3/4 Pretrain $variant: recall within a row" \
    bash launch/torchrun.sh --config "pretrain/configs/recall_$variant.toml" --run-dir "$run/row" \
    --data.path "$data/shards-row" --nproc 1 ${settings[@]+"${settings[@]}"}

step "3/4 Pretrain $variant: recall over many rows, with carried states" \
    bash launch/torchrun.sh --config "pretrain/configs/recall_${variant}_long.toml" --run-dir "$run/long" \
    --data.path "$data/shards-long" --train.weights-from "$run/row" --nproc 1 ${settings[@]+"${settings[@]}"}

controls=()
if [[ $variant != transformer ]]; then controls=(--controls memory_reset); fi
step "4/4 S-NIAH, noise haystack" \
    "$PYTHON" -m evals.niah --checkpoint "$run/long" --output "$run/eval" --lengths "${lengths[@]}" --depths 5 \
    --samples "$samples" --max-new-tokens 16 ${controls[@]+"${controls[@]}"}
