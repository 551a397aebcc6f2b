#!/usr/bin/env bash
# Fetches what a GPU machine without a package registry lacks: the wheels to carry there.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/gpu_wheels.sh DIR [PYTHON_VERSION]

Fills DIR with wheels for a machine that has torch for CUDA, triton, transformers, pytest and the like, but not this
project's other packages; through pip, from wherever pip is configured to look. PYTHON_VERSION is that machine's (default
3.12). There, `pip install --no-index --no-deps DIR/*.whl` installs them. 64 MiB can be carried, the project included.

PYTHON names another interpreter than .venv/bin/python or python3.
TEXT
}

# The project needs these ...
needed=(
    megatron-core==0.16.1 hjson==3.1.0 pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0
    typing-inspection==0.4.5 tyro==1.0.17 docstring-parser==0.18.0 typeguard==4.6.1 tomli-w==1.2.0
)
# ... there is no wheel of this one, and with its operators it would want CUDA's compiler ...
built=deepspeed==0.19.8
# ... and these stand beside it: titans-pytorch, flash-linear-attention, and what they import.
beside=(
    titans-pytorch==0.5.5 assoc-scan==0.0.6 axial-positional-embedding==0.3.12 einx==0.4.3 frozendict==2.5.1
    hyper-connections==0.4.11 torch-einops-utils==0.2.0 rotary-embedding-torch==0.9.1 tensordict==0.15.3 pyvers==0.2.3
    x-transformers==2.31.10 loguru==0.7.3 fla-core==0.6.0 flash-linear-attention==0.6.0
)
most_mib=64

case ${1:-} in
--help | -h)
    usage
    exit 0
    ;;
'' | -*)
    printf "error: the first argument is '%s'; give a folder for the wheels, see --help\n" "${1:-}" >&2
    exit 2
    ;;
esac
version=${2:-3.12}
if [[ ! $version =~ ^3\.[0-9]+$ ]]; then
    printf "error: the Python version is '%s'; write it as 3.12\n" "$version" >&2
    exit 2
fi
folder=$1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -x $root/.venv/bin/python ]]; then PYTHON=$root/.venv/bin/python; fi
fi
mkdir -p "$folder" || exit 2

pip=("$PYTHON" -m pip --disable-pip-version-check)
target=(--only-binary :all: --implementation cp --python-version "$version" --abi "cp${version/./}" --abi abi3 --abi none)
for tag in manylinux2014 manylinux_2_17 manylinux_2_24 manylinux_2_27 manylinux_2_28 manylinux_2_34; do
    target+=(--platform "${tag}_x86_64")
done
missing=()
for package in "${needed[@]}" "${beside[@]}"; do
    if ! "${pip[@]}" download --quiet --no-deps --dest "$folder" "${target[@]}" "$package"; then
        missing+=("$package")
    fi
done
if ! DS_BUILD_OPS=0 "${pip[@]}" wheel --quiet --no-deps --wheel-dir "$folder" "$built"; then missing+=("$built"); fi

bytes=$(find "$folder" -name '*.whl' -printf '%s\n' | awk '{ sum += $1 } END { print sum + 0 }')
count=$(find "$folder" -name '*.whl' | wc -l)
awk -v bytes="$bytes" -v count="$count" -v most="$most_mib" -v folder="$folder" 'BEGIN {
    printf "%d wheels in %s, %.1f of %d MiB\n", count, folder, bytes / 1048576, most
}'
status=0
if ((${#missing[@]})); then
    printf 'error: pip found no wheel of %s for Python %s; the lines above say why\n' "${missing[*]}" "$version" >&2
    status=1
fi
if ((bytes > most_mib * 1048576)); then
    printf 'error: that is more than the %d MiB that can be carried; leave some out\n' "$most_mib" >&2
    status=1
fi
exit "$status"
