# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: makes .venv when it is missing or out of date, and names its interpreter.
# Sets root and PYTHON.

set -o pipefail  # pip fails where its lines are shown

# Two processes share the cores with whatever else runs: threads that spin while they wait slow all of them down.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '\n== %s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# The first of the supported interpreters that is there; nothing where there is none.
find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

make_venv() {
    local python
    python=$(find_python)
    if [[ $python ]]; then
        say "Making .venv with $("$python" --version)"
        "$python" -m venv "$root/.venv" ||
            fail "python -m venv failed; on Debian and Ubuntu the package python3-venv is needed"
    elif command -v uv >/dev/null; then
        say "Making .venv with uv, which brings a Python that fits"
        uv venv --seed --python '>=3.11,<3.14' "$root/.venv" || fail "uv venv failed; the lines above say why"
    else
        fail "no Python 3.11, 3.12 or 3.13 was found as python3 or under its own name; install one, or uv, which brings" \
            "one (curl -LsSf https://astral.sh/uv/install.sh | sh), and run this again"
    fi
}

# Of pip's lines, hundreds, the newest on a terminal, otherwise one in twenty; and how long it has been silent.
show_progress() {
    local line status shown='' count=0 began=$SECONDS
    while true; do
        status=0
        IFS= read -r -t 15 line || status=$?
        if ((status > 128)); then
            line="$shown ... $((SECONDS - began)) s"
            count=0
        elif ((status)); then
            break
        elif [[ $line =~ ^\ *(Collecting|Downloading|Building|Installing)\  ]]; then
            line=${line#"${line%%[! ]*}"} && line=${line:0:70} && shown=$line
        else
            continue
        fi
        if [[ -t 1 ]]; then
            printf '\r\033[K%s' "$line"
        elif ((count++ % 20 == 0)); then
            printf '  %s\n' "$line"
        fi
    done
    if [[ -t 1 ]]; then printf '\r\033[K'; fi
}

has_cuda() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

# torch comes first and alone: deepspeed looks for it when it is built. Sets constraints, for the packages after it.
install_torch() {
    local pip=("$root/.venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off)
    constraints=()
    if ! has_cuda; then
        constraints=(-c "$root/launch/constraints-cpu.txt")
        if "${pip[@]}" "${constraints[@]}" torch 2>/dev/null | show_progress ||
            "${pip[@]}" "${constraints[@]}" torch --extra-index-url https://download.pytorch.org/whl/cpu | show_progress
        then return; fi
        say "No CPU build of torch can be had here; taking the usual one, with gigabytes of CUDA packages"
        constraints=()
    fi
    "${pip[@]}" 'torch>=2.12' | show_progress
}

# ensure_environment [EXTRA]: the packages of pyproject.toml, with an extra such as dev. Fast when nothing is to be done.
ensure_environment() {
    local extra=${1:-} wanted marker earlier constraints
    marker=$root/.venv/installed${extra:+-$extra}
    wanted=$(cat "$root/pyproject.toml" "$root/launch/constraints-cpu.txt" | cksum)
    PYTHON=$root/.venv/bin/python
    # The extras hold all that the plain installation does.
    for earlier in "$marker" "$root/.venv/installed-dev"; do
        if [[ -f $earlier && $(<"$earlier") == "$wanted" ]]; then return; fi
    done
    if [[ ! -x $PYTHON ]]; then make_venv; fi
    say "Installing packages into .venv (some minutes the first time)"
    install_torch || fail "torch could not be installed; the lines above say why"
    # deepspeed would compile its operators at install; those that a run needs are compiled when they are first used.
    DS_BUILD_OPS=0 "$PYTHON" -m pip install --disable-pip-version-check --progress-bar off \
        ${constraints[@]+"${constraints[@]}"} -e "$root${extra:+[$extra]}" | show_progress ||
        fail "the packages could not be installed; the lines above say why"
    "$PYTHON" -c '
import platform
from importlib.metadata import version
names = ("torch", "megatron-core", "deepspeed", "transformers")
print("Installed: Python " + ", ".join([platform.python_version(), *(f"{name} {version(name)}" for name in names)]))
'
    # Its one line says what it has made, or why nothing; the memory computes without it, too, but slower.
    (cd "$root" && "$PYTHON" -m titans_mcore.native) || true
    echo "$wanted" >"$marker"
}
