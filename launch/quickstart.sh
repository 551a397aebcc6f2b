#!/usr/bin/env bash
# From text to a trained, evaluated and exported Titans; evals/quickstart/__main__.py has the stages.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/quickstart.sh [--variant X] [--steps N] [--input PATH ...] [--tokenizer FILE] [--lengths N ...]
                                 [--verbose]

Shows what a Titans is for: trains a small one, and a Transformer++ with the same window beside it, on text and on
documents of recall; looks for needles in up to 65,536 tokens; exports it to Hugging Face; and puts all of it on one
page, report.html. Run it again and it goes on where it stopped; finished stages are skipped.

  --variant X       token mixer, a name in titans_mcore/mixers (default mag), or several joined by +
  --steps N         training steps; default: those of pretrain/config/presets/quickstart.toml
  --input PATH ...  .txt, .md, .jsonl(.gz|.zst) or .parquet files, or folders of them; default: the sources and
                    documentation of this machine's Python standard library, for which the word stdlib stands
  --tokenizer FILE  an existing sentencepiece tokenizer.model (Llama-2's, for example); default: one is trained
  --lengths N ...   tokens of the needle-in-a-haystack samples; default: 1024 4096 16384 65536
  --verbose         the commands and their own lines in place of one bar for each
  --help            shows this

Everything is written to runs/quickstart/ (runs/quickstart-VARIANT/ for the other variants).
TEXT
}

# A path of the caller's folder, whatever folder the steps run in; the word stdlib is none.
absolute() { case $1 in /* | stdlib) printf %s "$1" ;; *) printf %s "$PWD/$1" ;; esac; }

variant=mag steps='' verbose='' tokenizer='' inputs=() lengths=()
while (($#)); do
    case $1 in
    --help | -h)
        usage
        exit 0
        ;;
    --verbose)
        verbose=1
        shift
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
if [[ $variant != mag ]]; then run=runs/quickstart-$variant; fi
mkdir -p "$run"

# A run folder belongs to one text and one tokenizer: going on with others would mix two runs.
asked=$(printf '%s\n' "${inputs[@]}" "tokenizer: ${tokenizer:-trained}")
if [[ -f $run/asked.txt && $(<"$run/asked.txt") != "$asked" ]]; then
    fail "$run was begun with another --input or --tokenizer (see $run/asked.txt); remove the folder or ask for the same"
fi
printf '%s\n' "$asked" >"$run/asked.txt"

processes=2
if has_cuda && (($(nvidia-smi -L | wc -l) < 2)); then processes=1; fi
exec "$PYTHON" -m evals.quickstart --run "$run" --input "${inputs[@]}" ${tokenizer:+--tokenizer "$tokenizer"} \
    --variant "$variant" ${steps:+--steps "$steps"} --lengths "${lengths[@]}" --processes "$processes" \
    ${verbose:+--verbose}
