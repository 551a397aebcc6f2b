#!/usr/bin/env bash
# A small model that learns to recall, from generated documents to S-NIAH far beyond the trained length.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/recall.sh [--variant X] [--seed N] [--lengths N ...] [--samples N] [--SECTION.SETTING VALUE ...]

Generates lists and documents of S-NIAH with their answers, trains a small model on the former, then on all of them in
rows of 1,024 tokens, and looks for needles at up to 64 times that. Run it again and it goes on where it stopped.
evals/results/recall/README.md says what it finds.

  --variant X             token mixer, a name in titans_mcore/mixers (default mag), or several joined by +
  --seed N                decides initial weights and the order of the documents (default 0)
  --lengths N ...         tokens of the samples; default: 1024 4096 16384 65536
  --samples N             samples of each length and depth; default: 4
  --SECTION.SETTING VALUE overrides one setting of training, such as --optimizer.lr 2e-3
  --help                  shows this

Everything is written to runs/recall/: data/ for all, VARIANT-SEED-lists/, and VARIANT-SEED/ with its eval/.
TEXT
}

variant=mag seed=0 lengths=() samples=4 settings=()
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
    --variant | --seed | --samples | --*.*)
        if (($# < 2)); then
            printf 'error: %s needs a value; see --help\n' "$1" >&2
            exit 2
        fi
        case $1 in
        --variant) variant=$2 ;;
        --seed) seed=$2 ;;
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
if [[ ! $seed =~ ^[0-9]+$ ]]; then
    printf "error: --seed is '%s'; it must be a whole number\n" "$seed" >&2
    exit 2
fi
if [[ ! $samples =~ ^[1-9][0-9]*$ ]]; then
    printf "error: --samples is '%s'; it must be a whole number above 0\n" "$samples" >&2
    exit 2
fi
if ((${#lengths[@]} == 0)); then lengths=(1024 4096 16384 65536); fi

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment ""
cd "$root"
PYTHON=.venv/bin/python
memory=$("$PYTHON" - "$variant" <<'PYTHON'
import sys

from titans_mcore.mixers import MIXERS

names = sys.argv[1].split("+")
if not MIXERS.keys() >= {*names}:
    sys.exit(f"error: --variant is '{sys.argv[1]}'; choose among {', '.join(MIXERS)}, or several joined by +")
print(int(any(MIXERS[name].memory for name in names)))
PYTHON
) || exit 2
controls=()
if ((memory)); then controls=(--controls memory_reset); fi
data=runs/recall/data run=runs/recall/$variant-$seed
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

# documents NAME TOKENS DOCUMENTS OPTIONS ...: one file of them, and its shards.
documents() {
    if [[ -f $data/$1/manifest.json ]]; then
        say "Documents of $2 tokens, $1 (done already)"
        return
    fi
    step "Documents of $2 tokens, $1" "$PYTHON" -m evals.niah.training_data --output "$data/$1.jsonl" \
        --tokens "$2" --documents "$3" --tokenizer "$data/tokenizer.model" "${@:4}"
    step "Their shards" "$PYTHON" -m tokenization.encode --input "$data/$1.jsonl" \
        --tokenizer "$data/tokenizer.model" --output "$data/$1" --workers 1
}

cp evals/results/recall/tokenizer.model "$data" # the documents depend on it

documents lists 256 4500 --lists
documents short 256 9000 --repeats 6 --questions 3 --other-words 0.5
documents long 1024 1800 --repeats 2 --questions 2 --other-words 0.25

# train RUN SETTINGS ...: one stage of training.
train() {
    step "Pretrain $variant, seed $seed: $1" bash launch/torchrun.sh --config recall --model.variant "$variant" \
        --run-dir "$1" --train.seed "$seed" --nproc 1 "${@:2}" ${settings[@]+"${settings[@]}"}
}

train "$run-lists" --data.path "$data/lists" --train.sequence-length 256 --train.global-batch 8 --train.micro-batch 8 \
    --train.steps 300
train "$run" --data.blend "$data/lists=0.1" "$data/short=0.45" "$data/long=0.45" --train.weights-from "$run-lists"

step "S-NIAH, noise haystack" \
    "$PYTHON" -m evals.niah --checkpoint "$run" --output "$run/eval" --lengths "${lengths[@]}" --depths 5 \
    --samples "$samples" --max-new-tokens 16 ${controls[@]+"${controls[@]}"}
