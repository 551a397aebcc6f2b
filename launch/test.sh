#!/usr/bin/env bash
# Runs the checks: ruff, mypy and the tests.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/test.sh [--all] [PYTEST ARGUMENTS ...]

Makes .venv when it is missing, then runs ruff, mypy and pytest. Works from any folder.

  --all     the tests marked slow as well: long ones, and every combination of large equality matrices
  --help    shows this

With pytest arguments (for example tests/memory -k dual) only pytest runs.
TEXT
}

for argument in "$@"; do
    if [[ $argument == --help || $argument == -h ]]; then
        usage
        exit 0
    fi
done

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment dev
cd "$root"

everything=''
if [[ ${1:-} == --all ]]; then
    everything=1
    shift
fi
chosen=()
if (($# == 0)); then
    say "ruff"
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    say "mypy"
    "$PYTHON" -m mypy
    # Most tests are one thread: several files at a time, those that take longest first (tests/conftest.py). A file's tests
    # stay together, which share what they trained. More than one on a core makes processes that wait for one another slow.
    chosen=(-n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder)
    if [[ -z $everything ]]; then chosen+=(-m 'not slow and not gpu'); fi
fi
say "pytest"
exec "$PYTHON" -m pytest ${chosen[@]+"${chosen[@]}"} "$@"
