#!/usr/bin/env bash
# From text to a trained, evaluated and exported Titans, each step one command that is printed as it runs.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/quickstart.sh [--variant X] [--steps N] [--input PATH ...] [--tokenizer FILE] [--lengths N ...]

Trains a tiny Titans on two processes, evaluates it and exports it to Hugging Face, in about ten minutes on two CPU
cores after installation. Run it again and it goes on where it stopped; finished steps are skipped.

  --variant X       token mixer, a name in titans_mcore/mixers (default mac), or several joined by +
  --steps N         training steps; default: those of pretrain/config/presets/quickstart.toml
  --input PATH ...  .txt, .md, .jsonl(.gz|.zst) or .parquet files, or folders of them; default: the sources and
                    documentation of this machine's Python standard library
  --tokenizer FILE  an existing sentencepiece tokenizer.model (Llama-2's, for example); default: one is trained
  --lengths N ...   tokens of the needle-in-a-haystack samples; default: 1024 4096 16384 65536
  --help            shows this

Everything is written to runs/quickstart/ (runs/quickstart-VARIANT/ for the other variants).
TEXT
}

# A path of the caller's folder, whatever folder the steps run in.
absolute() { case $1 in /*) printf %s "$1" ;; *) printf %s "$PWD/$1" ;; esac; }

variant=mac steps='' tokenizer='' inputs=() lengths=()
while (($#)); do
    case $1 in
    --help | -h)
        usage
        exit 0
        ;;
    --variant | --steps | --tokenizer)
        if (($# < 2)); then
            printf 'error: %s needs a value; see --help\n' "$1" >&2
            exit 2
        fi
        printf -v "${1#--}" %s "$2"
        shift 2
        ;;
    --input)
        shift
        while (($#)) && [[ $1 != --* ]]; do
            inputs+=("$(absolute "$1")")
            shift
        done
        if ((${#inputs[@]} == 0)); then
            echo 'error: --input needs at least one path; see --help' >&2
            exit 2
        fi
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
    *)
        printf 'error: %s is not an option of quickstart.sh; see --help\n' "$1" >&2
        exit 2
        ;;
    esac
done
if [[ -n $steps && ! $steps =~ ^[1-9][0-9]*$ ]]; then
    printf "error: --steps is '%s'; it must be a whole number above 0\n" "$steps" >&2
    exit 2
fi
if [[ -n $tokenizer ]]; then tokenizer=$(absolute "$tokenizer"); fi
if ((${#inputs[@]} == 0)); then inputs=(stdlib); fi
if ((${#lengths[@]} == 0)); then lengths=(1024 4096 16384 65536); fi

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
for path in "${inputs[@]}" ${tokenizer:+"$tokenizer"}; do
    if [[ $path != stdlib && ! -e $path ]]; then fail "$path does not exist; check --input and --tokenizer"; fi
done
ensure_environment ""
cd "$root"
PYTHON=.venv/bin/python
if ! wrong=$("$PYTHON" -c 'import sys; from titans_mcore.config import TitansConfig; TitansConfig(variant=sys.argv[1])' \
    "$variant" 2>&1); then
    fail "--${wrong##*Error: }"
fi

run=runs/quickstart
if [[ $variant != mac ]]; then run=runs/quickstart-$variant; fi
mkdir -p "$run/tokenizer" "$run/eval"

# A run folder belongs to one text and one tokenizer: going on with others would mix two runs.
asked=$(printf '%s\n' "${inputs[@]}" "tokenizer: ${tokenizer:-trained}")
if [[ -f $run/asked.txt && $(<"$run/asked.txt") != "$asked" ]]; then
    fail "$run was begun with another --input or --tokenizer (see $run/asked.txt); remove the folder or ask for the same"
fi
printf '%s\n' "$asked" >"$run/asked.txt"

# step NAME TITLE COMMAND ...: prints the command, runs it, and notes how long it took.
step() {
    local name=$1 title=$2 began=$SECONDS
    shift 2
    say "$title"
    printf '   '
    printf '%q ' "$@"
    printf '\n\n'
    "$@"
    printf '%s %s\n' "$name" $((SECONDS - began)) >>"$run/seconds.txt"
}
skip() { say "$1 (done already)"; }

newest_checkpoint() { find "$run/checkpoints" -path '*/step-*/checkpoint.json' 2>/dev/null | sort | tail -n 1; }
# Whether FILE was made from the newest checkpoint.
is_current() { [[ -f $1 && ! $(newest_checkpoint) -nt $1 ]]; }

if [[ -f $run/tokenizer/tokenizer.model ]]; then
    skip "1/6 Tokenizer"
elif [[ -n $tokenizer ]]; then
    step tokenizer "1/6 Tokenizer: the one given" cp "$tokenizer" "$run/tokenizer/tokenizer.model"
else
    step tokenizer "1/6 Tokenizer: sentencepiece BPE, 2,048 pieces" \
        "$PYTHON" -m tokenization.train --input "${inputs[@]}" --vocab-size 2048 \
        --output "$run/tokenizer/tokenizer.model"
fi

step shards "2/6 Shards: text to token files, train and held-out" \
    "$PYTHON" -m tokenization.encode --input "${inputs[@]}" --tokenizer "$run/tokenizer/tokenizer.model" \
    --output "$run/shards" --workers 2

layout=()
if has_cuda && (($(nvidia-smi -L | wc -l) < 2)); then layout=(--nproc 1 --parallel.tensor 1); elif has_cuda; then layout=(--nproc 2); fi
step pretrain "3/6 Pretrain: Titans $variant, tensor parallel, DeepSpeed ZeRO 1" \
    bash launch/torchrun.sh --config quickstart --run-dir "$run" --data.path "$run/shards" \
    --variant "$variant" ${steps:+--train.steps "$steps"} ${layout[@]+"${layout[@]}"}

if is_current "$run/eval/position_perplexity.json"; then
    skip "4/6 Held-out loss by position"
else
    step position_perplexity "4/6 Held-out loss by position" \
        "$PYTHON" -m evals.position_perplexity --checkpoint "$run" --data "$run/shards" --output "$run/eval"
fi

if is_current "$run/eval/niah.json"; then
    skip "5/6 Needle in a haystack"
else
    step niah "5/6 Needle in a haystack: S-NIAH, noise haystack, in constant memory" \
        "$PYTHON" -m evals.niah --checkpoint "$run" --output "$run/eval" \
        --lengths "${lengths[@]}" --depths 5 --samples 1 --max-new-tokens 16
fi

if is_current "$run/hf/proof.json"; then
    skip "6/6 Hugging Face export"
else
    step export "6/6 Hugging Face export, compared with the trained model" \
        "$PYTHON" -m titans_mcore.hf.convert --checkpoint "$run" --output "$run/hf"
fi

say "Summary"
"$PYTHON" -m evals.summary --run "$run"
