#!/usr/bin/env bash
# Trains a model with one process for each GPU, or on the CPU with as many as the model is divided over.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/torchrun.sh --config NAME --run-dir DIR [--nproc N] [--SECTION.SETTING VALUE ...]

Starts `python -m pretrain.train` under torchrun. A run folder that holds checkpoints is continued. SIGTERM, SIGINT
(Ctrl-C) and SIGUSR1 finish the step, save, and end with status 0.

  --config NAME     settings: a preset such as quickstart or mac_760m, or a TOML file
  --run-dir DIR     takes everything that the run writes
  --nproc N         processes on this host; default: its GPUs, or tensor x context without CUDA
  --variant X       token mixer, a name in titans_mcore/mixers, or several joined by +
  --train.steps N   overrides one setting; `python -m pretrain.train --help` lists all of them
  --help            shows this

On several hosts, start the same command on each with
  NNODES            hosts; FEWEST:MOST for a run that goes on while hosts leave and come, for which torch gives the
                    workers 30 s to save (pytorch #192815)
  NODE_RANK         0, 1, ... of this host
  MASTER_ADDR       host 0, reachable from all
  MASTER_PORT       a free port there (default 29400)
  RUN_ID            a name, the same on all hosts (default titans)
  JOIN_SECONDS      how long the hosts wait for one another (default 600)
The hosts look for room for checkpoints before any worker starts, and the workers compare code, packages, settings and
data of all hosts before anything else. The run folder must lie on a file system that they share.

On one host or many,
  MAX_RESTARTS      how often all workers go on from the last checkpoint when one is lost (default 0)
  SHUTDOWN_SECONDS  how long a save may take after a signal before the processes are killed (default 600)
  REQUEUE_STATUS    exit status when the run was stopped before its end and left RUN/requeue.json (default 0)
  PYTHON            another interpreter than .venv/bin/python or python3
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

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

NNODES=${NNODES:-1} MASTER_PORT=${MASTER_PORT:-29400} JOIN_SECONDS=${JOIN_SECONDS:-600}
MAX_RESTARTS=${MAX_RESTARTS:-0} SHUTDOWN_SECONDS=${SHUTDOWN_SECONDS:-600} REQUEUE_STATUS=${REQUEUE_STATUS:-0}
if [[ ! $NNODES =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]]; then
    fail "NNODES is '$NNODES'; write a number of hosts, or FEWEST:MOST"
fi
hosts=()
if [[ $NNODES != 1 ]]; then
    : "${MASTER_ADDR:?error: NNODES is $NNODES, so MASTER_ADDR must name host 0}"
    : "${NODE_RANK:?error: NNODES is $NNODES, so NODE_RANK must number this host, from 0}"
    hosts=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --rdzv-id "${RUN_ID:-titans}"
        --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --join-timeout "$JOIN_SECONDS")
fi
for name in ${NODE_RANK:+NODE_RANK} MASTER_PORT JOIN_SECONDS MAX_RESTARTS SHUTDOWN_SECONDS REQUEUE_STATUS; do
    if [[ ! ${!name} =~ ^[0-9]+$ ]]; then fail "$name is '${!name}'; it must be a whole number"; fi
done

# What the user has set wins. Otherwise a warning of torch's at length; each process takes its share of the cores later.
if [[ -n ${OMP_NUM_THREADS:-} ]]; then export TITANS_THREADS=$OMP_NUM_THREADS; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m pretrain.launch ${hosts[@]+"${hosts[@]}"} --max-restarts "$MAX_RESTARTS" \
    --shutdown-timeout "$SHUTDOWN_SECONDS" --requeue-status "$REQUEUE_STATUS" -- "$@"
