#!/usr/bin/env bash
# Trains a model with one process for each GPU, or on the CPU with as many as the model is divided over.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/torchrun.sh --config FILE --run-dir DIR [--nproc N] [--SECTION.SETTING VALUE ...]

Starts `python -m pretrain.train` under torchrun. A run folder that holds checkpoints is continued. SIGTERM, SIGINT
(Ctrl-C) and SIGUSR1 finish the step, save, and end with status 0.

  --config FILE     settings, for example pretrain/configs/quickstart.toml
  --run-dir DIR     takes everything that the run writes
  --nproc N         processes on this host; default: its GPUs, or tensor x context without CUDA
  --variant X       mac, mag, mal, lmm or transformer
  --train.steps N   overrides one setting; `python -m pretrain.train --help` lists all of them
  --help            shows this

On several hosts, start the same command on each with
  NNODES            hosts
  NODE_RANK         0, 1, ... of this host
  MASTER_ADDR       host 0, reachable from all
  MASTER_PORT       a free port there (default 29400)
  RUN_ID            a name, the same on all hosts (default titans)
PYTHON names another interpreter than .venv/bin/python or python3; SHUTDOWN_SECONDS (600) is how long a save may take
after a signal before the processes are killed.
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -x $root/.venv/bin/python ]]; then PYTHON=$root/.venv/bin/python; fi
fi

for argument in "$@"; do
    if [[ $argument == --help || $argument == -h ]]; then
        usage
        exit 0
    fi
done

# The package is found from any folder, and relative paths stay relative to the caller's.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

if ((${NNODES:-1} > 1)); then
    : "${MASTER_ADDR:?error: NNODES is $NNODES, so MASTER_ADDR must name host 0}"
    : "${NODE_RANK:?error: NNODES is $NNODES, so NODE_RANK must number this host, from 0}"
    is_host=$((NODE_RANK == 0))
    rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-id "${RUN_ID:-titans}"
        --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29400}" --rdzv-conf "is_host=$is_host")
else
    # Port 0: the system picks a free one, so that two runs can share a host.
    rendezvous=(--nnodes 1 --rdzv-backend c10d --rdzv-endpoint localhost:0)
fi

# torchrun warns at length when it sets this itself; each process takes its share of the cores later.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m pretrain.launcher "${rendezvous[@]}" \
    --shutdown-timeout "${SHUTDOWN_SECONDS:-600}" --signals-to-handle SIGTERM,SIGINT,SIGUSR1 -- "$@"
