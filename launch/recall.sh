#!/usr/bin/env bash
# A small model that learns to recall, from generated documents to S-NIAH far beyond the trained length.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/recall.sh [--variant X] [--lengths N ...] [--samples N] [--SECTION.SETTING VALUE ...]

Generates documents of S-NIAH with their answers, trains a small model on them in four stages that grow from lists to
long documents, and looks for needles far beyond the longest of them. Run it again and it goes on where it stopped.
evals/results/recall/README.md says what it finds.

  --variant X             mag (default), mac or transformer: pretrain/config/presets/recall_X.toml
  --lengths N ...         tokens of the samples; default: 256 4096 16384 65536
  --samples N             samples of each length and depth; default: 8
  --SECTION.SETTING VALUE overrides one setting of all stages of training, such as --optimizer.lr 2e-3
  --help                  shows this

Everything is written to runs/recall/: data/ for all variants, and VARIANT/STAGE and VARIANT/eval.
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
if [[ ! $samples =~ ^[1-9][0-9]*$ ]]; then
    printf "error: --samples is '%s'; it must be a whole number above 0\n" "$samples" >&2
    exit 2
fi
if ((${#lengths[@]} == 0)); then lengths=(256 4096 16384 65536); fi

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment ""
cd "$root"
PYTHON=.venv/bin/python
if [[ ! -f pretrain/config/presets/recall_$variant.toml ]]; then
    fail "--variant is '$variant'; there is no pretrain/config/presets/recall_$variant.toml"
fi
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

# documents STAGE TOKENS DOCUMENTS OPTIONS ...: one file of them, and its shards.
documents() {
    if [[ -f $data/$1/manifest.json ]]; then
        say "Documents of $2 tokens for stage $1 (done already)"
        return
    fi
    step "Documents of $2 tokens for stage $1" "$PYTHON" -m evals.niah.training_data --output "$data/$1.jsonl" \
        --tokens "$2" --documents "$3" --tokenizer "$data/tokenizer.model" "${@:4}"
    step "Shards for stage $1" "$PYTHON" -m tokenization.encode --input "$data/$1.jsonl" \
        --tokenizer "$data/tokenizer.model" --output "$data/$1" --workers 1
}

before=''
# train STAGE TOKENS ROWS STEPS RATE: a stage, from the weights of the one before.
train() {
    local from=()
    if [[ -n $before ]]; then from=(--train.weights-from "$run/$before"); fi
    step "Pretrain $variant, stage $1: $4 steps of $3 rows of $2 tokens" \
        bash launch/torchrun.sh --config "recall_$variant" --run-dir "$run/$1" \
        --data.path "$data/$1" --train.sequence-length "$2" --train.global-batch "$3" --train.micro-batch "$3" \
        --train.steps "$4" --optimizer.lr "$5" ${from[@]+"${from[@]}"} --nproc 1 ${settings[@]+"${settings[@]}"}
    before=$1
}

cp evals/results/recall/tokenizer.model "$data" # the documents depend on it

documents 1-lists 256 4500 --lists
documents 2-short 256 4500 --repeats 6 --questions 3 --other-words 0.5
documents 3-long 1024 1400 --repeats 2 --questions 2 --other-words 0.5
documents 4-longer 4096 700 --other-words 0.25

train 1-lists 256 8 500 3e-3
train 2-short 256 8 500 3e-3
train 3-long 1024 4 300 2e-3
train 4-longer 4096 2 300 1.5e-3

controls=()
if "$PYTHON" -c 'import sys; from titans_mcore.mixers import MIXERS; sys.exit(not MIXERS[sys.argv[1]].memory)' "$variant"; then
    controls=(--controls memory_reset)
fi
step "S-NIAH, noise haystack" \
    "$PYTHON" -m evals.niah --checkpoint "$run/$before" --output "$run/eval" --lengths "${lengths[@]}" --depths 5 \
    --samples "$samples" --max-new-tokens 16 ${controls[@]+"${controls[@]}"}
