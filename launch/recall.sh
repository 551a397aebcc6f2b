#!/usr/bin/env bash
# A small model that learns to recall, from generated documents to S-NIAH far beyond the trained length.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/recall.sh [--variant X] [--seed N] [--text FILE --haystack FILE] [OPTION ...]

Trains a small model on lists that are said again and again, fine-tunes it on the answers of documents of S-NIAH, in
rows of 256 tokens, and looks for needles at up to 65,536; with prose on numbers and uuids, one of up to six of them, in
rows of 512. Run it again and it goes on where it stopped. evals/results/recall/README.md says what it finds.

  --variant X             token mixer, a name in titans_mcore/mixers (default mag), or several joined by +
  --seed N                decides initial weights and the order of the documents (default 0)
  --text FILE             UTF-8 text that needles are hidden in, too
  --haystack FILE         other text, that they are looked for in
  --lengths N ...         tokens of the samples; default: 256 1024 4096 16384 65536, with --text 512 8192 32768
  --samples N             samples of each length and depth; default: 4
  --steps N               updates on answers; default: 600, with --text 1400
  --SECTION.SETTING VALUE overrides one setting of training, such as --optimizer.lr 2e-3
  --help                  shows this

Everything is written to runs/recall/ (with --text runs/recall-prose/): data/ for all, the run VARIANT-SEED-lists/, the
Hugging Face folder VARIANT-SEED/ and VARIANT-SEED-eval/.
TEXT
}

variant=mag seed=0 text='' haystack='' lengths=() samples=4 steps='' settings=()
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
    --variant | --seed | --text | --haystack | --samples | --steps | --*.*)
        if (($# < 2)); then
            printf 'error: %s needs a value; see --help\n' "$1" >&2
            exit 2
        fi
        case $1 in
        --variant) variant=$2 ;;
        --seed) seed=$2 ;;
        --text) text=$2 ;;
        --haystack) haystack=$2 ;;
        --samples) samples=$2 ;;
        --steps) steps=$2 ;;
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
if [[ ${text:+x} != "${haystack:+x}" ]]; then
    echo 'error: --text is learned from and --haystack looked in; give both, two files, or none' >&2
    exit 2
fi
for name in text haystack; do
    if [[ -n ${!name} && ! -f ${!name} ]]; then
        printf "error: --%s is '%s'; there is no such file\n" "$name" "${!name}" >&2
        exit 2
    fi
done
top=runs/recall list=256 tokens=256 made=4800 updates=600 look=(256 1024 4096 16384 65536)
answers=(--repeats 2 --questions 3 --other-words 0.25)
tune=(--write-cost 25 --text-weight 1) asked=(pk --max-new-tokens 16)
if [[ -n $text ]]; then
    text=$(realpath "$text") haystack=$(realpath "$haystack")
    top=runs/recall-prose list=384 tokens=512 made=11300 updates=1400 look=(512 8192 32768)
    answers=(--needles 3 --questions 2 --other-words 0.5 --near-misses 0.75 --text "$text"
        --tasks pk mk1 mk1 mk1 n w w)
    # Prose is predicted by what was written of it: the weight of its loss keeps gates open.
    tune=(--write-cost 5 --text-weight 0.02) asked=(pk n w mk1 --text "$haystack" --max-new-tokens 48)
    settings=(--model.conv-kernel 20 ${settings[@]+"${settings[@]}"}) # the key, and all digits that came, are in sight
fi
steps=${steps:-$updates}
for name in samples steps; do
    if [[ ! ${!name} =~ ^[1-9][0-9]*$ ]]; then
        printf "error: --%s is '%s'; it must be a whole number above 0\n" "$name" "${!name}" >&2
        exit 2
    fi
done
if ((${#lengths[@]} == 0)); then lengths=("${look[@]}"); fi

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment evals
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
data=$top/data run=$top/$variant-$seed
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

# documents NAME TOKENS DOCUMENTS OPTIONS ...: a file of them.
documents() {
    if [[ -f $data/$1.jsonl ]]; then
        say "Documents of $2 tokens, $1 (done already)"
        return
    fi
    step "Documents of $2 tokens, $1" "$PYTHON" -m evals.niah.training_data --output "$data/$1.jsonl" \
        --tokens "$2" --documents "$3" --tokenizer "$data/tokenizer.model" "${@:4}"
}

if [[ -z $text ]]; then
    cp evals/results/recall/tokenizer.model "$data" # the documents depend on it
elif [[ ! -f $data/tokenizer.model ]]; then
    step 'Words of the documents' "$PYTHON" -m evals.niah.training_data --output "$data/words.jsonl" --documents 2000
    step 'Tokenizer' "$PYTHON" -m tokenization.train --input "$text" "$data/words.jsonl" \
        --output "$data/tokenizer.model" --vocab-size 2048
fi
documents lists "$list" 4500 --lists
documents answers "$tokens" "$made" "${answers[@]}"

if [[ -f $data/lists/manifest.json ]]; then
    say 'Shards of lists (done already)'
else
    step 'Shards of lists' "$PYTHON" -m tokenization.encode --input "$data/lists.jsonl" \
        --tokenizer "$data/tokenizer.model" --output "$data/lists" --workers 1
fi
step "Pretrain $variant, seed $seed, on lists" bash launch/torchrun.sh --config recall --model.variant "$variant" \
    --run-dir "$run-lists" --train.seed "$seed" --nproc 1 --data.path "$data/lists" \
    --train.sequence-length "$list" ${settings[@]+"${settings[@]}"}
if [[ -f $run/config.json ]]; then
    say "Fine-tuned on answers, $run (done already)"
else
    step "Fine-tune on answers" "$PYTHON" -m evals.finetune --checkpoint "$run-lists" --documents "$data/answers.jsonl" \
        --output "$run" --seed "$seed" --batch 8 --steps "$steps" "${tune[@]}"
fi

step "S-NIAH" "$PYTHON" -m evals.niah --checkpoint "$run" --output "$run-eval" --lengths "${lengths[@]}" --depths 5 \
    --samples "$samples" ${controls[@]+"${controls[@]}"} --tasks "${asked[@]}"
