#!/usr/bin/env bash
# Installs the project on another Python, aside, and runs the quickstart and tests there.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/python_check.sh VERSION [--folder DIR] [--bind PATH ...] [PYTEST ARGUMENTS ...]

Copies the project, finds a Python of that version (3.11, 3.12 or 3.13), installs with environment.sh, runs the
quickstart with 4 steps and the fast tests of memory, mixers, export and training, and says what ran on what.

The Python is pythonVERSION where one runs, else uv's, else that of the Debian release which has it (3.11, 3.13), made
in the folder with debootstrap, for which one must be root.

  --folder DIR     takes the copy and its packages, and is used again the next time; default: a new one, removed
  --bind PATH ...  files and folders of this machine that are to be seen in Debian, such as pip's settings
  --help           shows this

Pytest arguments (tests/hf -k padding) take the place of the tests above.
TEXT
}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

version='' folder='' bind=() tests=()
while (($#)); do
    case $1 in
    --help | -h)
        usage
        exit 0
        ;;
    --folder)
        folder=${2:?error: --folder needs a path; see --help}
        shift 2
        ;;
    --bind)
        shift
        while (($#)) && [[ $1 == /* ]]; do
            bind+=("$1")
            shift
        done
        ;;
    *)
        if [[ $version ]]; then tests+=("$1"); else version=$1; fi
        shift
        ;;
    esac
done
case $version in
3.11) release=bookworm ;;
3.12) release='' ;;
3.13) release=trixie ;;
*) fail "VERSION is '$version'; give 3.11, 3.12 or 3.13" ;;
esac
if ((${#tests[@]} == 0)); then
    tests=(tests/memory tests/mixers tests/linear tests/attention tests/hf tests/parallel/test_layouts.py
        tests/pretrain/test_equivalence.py tests/pretrain/test_resume.py tests/pretrain/test_metrics.py -m 'not slow and not gpu')
fi
if [[ -z $folder ]]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# What is run there: $1 is the Python, the rest pytest's.
# shellcheck disable=SC2016
check='
set -euo pipefail
python=$1
shift
source launch/environment.sh
if [[ ! -x .venv/bin/python ]]; then "$python" -m venv .venv; fi
ensure_environment dev
began=$SECONDS
rm -rf runs
bash launch/quickstart.sh --steps 4 --lengths 512
say "The quickstart ran in $((SECONDS - began)) s"
"$PYTHON" -m pytest -q -p no:cacheprovider "$@"
say "The quickstart and these tests ran:"
printf "%q " "$@"
"$PYTHON" -c "
import platform
from importlib.metadata import version
print(\"\non Python\", platform.python_version(), *(f\"{n} {version(n)}\" for n in (\"torch\", \"megatron-core\", \"deepspeed\")))
"
'

inside=() project=$folder/project
if "python$version" -c '' 2>/dev/null; then
    python=python$version
elif command -v uv >/dev/null; then
    python=$(uv python find "$version" 2>/dev/null) || { uv python install "$version" && python=$(uv python find "$version"); }
elif [[ $release && $EUID == 0 ]] && command -v debootstrap >/dev/null; then
    debian=$folder/$release project=$folder/$release/project python=python3
    if [[ ! -e $debian/complete ]]; then
        debootstrap --variant=minbase --include=ca-certificates,git,g++,python3-dev,python3-venv "$release" "$debian"
        touch "$debian/complete"
    fi
    # shellcheck disable=SC2016
    inside=(unshare --mount bash -c '
        debian=$1 count=$2
        shift 2
        for path in /proc /dev /etc/hosts /etc/resolv.conf "${@:1:count}"; do
            if [[ -d $path ]]; then mkdir -p "$debian$path"; else mkdir -p "$debian${path%/*}" && touch "$debian$path"; fi
            mount --rbind "$path" "$debian$path"
        done
        shift "$count"
        exec chroot "$debian" env HOME=/root PATH=/usr/local/bin:/usr/bin:/bin bash -c "cd /project && \"\$@\"" - "$@"
        ' - "$debian" "${#bind[@]}" ${bind[@]+"${bind[@]}"})
else
    fail "no Python $version runs as python$version, and neither uv nor, for root and 3.11 or 3.13, debootstrap is there"
fi
mkdir -p "$project"
find "$project" -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} + # what is no longer in the project, too
(cd "$root" && git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -T - -cf -) |
    tar -C "$project" -xf -
cd "$project"
${inside[@]+"${inside[@]}"} bash -c "$check" - "$python" "${tests[@]}"
