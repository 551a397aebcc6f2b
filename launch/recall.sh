#!/usr/bin/env bash
# A small model that learns to recall, from generated documents to S-NIAH far beyond the trained length.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/recall.sh [--variant X] [--lengths N ...] [--samples N] [--SECTION.SETTING VALUE ...]

Generates documents of S-NIAH with their answers, trains a small model on them and looks for needles at 1 to 64 times
the trained length. Run it again and it goes on where it stopped. evals/results/recall/README.md says what it finds.

  --variant X             mag (default), mac or transformer: pretrain/configs/recall_X.toml
  --lengths N ...         tokens of the samples; default: 256 1024 4096 8192 16384
  --samples N             samples of each length and depth; default: 8
  --SECTION.SETTING VALUE overrides one setting of training, such as --train.steps 3000
  --help                  shows this

Everything is written to runs/recall/: data/ for all variants, and a run folder for each.
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

if [[ -f $data/shards/manifest.json ]]; then
    say "2/4 Documents and shards (done already)"
else
    step "2/4 Documents of 256 tokens" \
        "$PYTHON" -m evals.niah.training_data --output "$data/documents.jsonl" --documents 20000 --questions 3 \
        --repeats 6 --tokens 256 --tokenizer "$data/tokenizer.model"
    step "2/4 Shards" \
        "$PYTHON" -m tokenization.encode --input "$data/documents.jsonl" --tokenizer "$data/tokenizer.model" \
        --output "$data/shards" --workers 1
fi

step "3/4 Pretrain: $variant" \
    bash launch/torchrun.sh --config "pretrain/configs/recall_$variant.toml" --run-dir "$run" \
    --data.path "$data/shards" --nproc 1 ${settings[@]+"${settings[@]}"}

step "4/4 S-NIAH, noise haystack" \
    "$PYTHON" -m evals.niah --checkpoint "$run" --output "$run/eval" --lengths "${lengths[@]}" --depths 5 \
    --samples "$samples" --max-new-tokens 16 --seed 0
