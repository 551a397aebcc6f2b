"""Starts the workers of one host for launch/torchrun.sh; what can be known to be wrong is said before any of them runs.

    python -m pretrain.launch [--nnodes N] ... -- [--nproc N] --config FILE --run-dir DIR [SETTING ...]

The agent that watches the workers is torchrun's (agent.py). It ends with the status of the worker that failed first,
and after a signal with 0 when all workers of this host ended well.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.config.command_line import parse
from pretrain.config.run_config import RunConfig
from pretrain.launch.status import EXIT_MISTAKE, LAUNCHER, REQUEUE_FILE, STATUS_DIR
from titans_mcore.division import check_divisible, check_world
from tokenization.command_line import CommandError, remedy_of, try_output

if TYPE_CHECKING:
    from pretrain.launch.rendezvous import Hosts


def main() -> None:
    """Checks the settings and the hosts, starts the workers and waits for them."""
    at = sys.argv.index("--")
    own, words = _options(sys.argv[1:at]), sys.argv[at + 1 :]
    # Until the agent takes over: the first process of a container does not get a signal that it has no handler for.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, _leave)
    try:
        asked, words = _take_nproc(words)
        command = parse(words)
        try_output(command.run_dir, "--run-dir", folder=True)
        config, parallel = command.config, command.config.parallel
        processes = asked or _gpus() or parallel.tensor * parallel.context
        check_sizes(config, processes, *_range(own.nnodes))
        _start(own, config, command.run_dir, processes, words)
    except (ValueError, OSError, CommandError) as error:
        sentence = remedy_of(error) if isinstance(error, OSError) else None
        print(f"error: {sentence or error}", file=sys.stderr)
        raise SystemExit(EXIT_MISTAKE) from None
    if own.requeue_status and (command.run_dir / REQUEUE_FILE).exists():
        raise SystemExit(own.requeue_status)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def check_sizes(config: RunConfig, processes: int, least: int, most: int) -> None:
    """Whether the model and the batch can be divided, with every number of hosts that the run may have.

    Raises:
        ValueError: They cannot; the message says what and how.
    """
    parallel = config.parallel
    if most > least and config.data.carry_state:
        raise ValueError(
            f"NNODES {least}:{most} lets the number of data ranks change, and data.carry_state keeps it; "
            f"set NNODES to {most}, or leave data.carry_state out"
        )
    for hosts in range(least, most + 1):
        try:
            config.accumulation(check_world(processes * hosts, parallel.tensor, parallel.context))
        except ValueError as error:
            raise ValueError(f"with {hosts} of {least} to {most} hosts: {error}" if most > least else error) from None
    check_divisible(config.model, parallel.tensor, parallel.memory_parallel)


def _start(own: argparse.Namespace, config: RunConfig, run_dir: Path, processes: int, words: list[str]) -> None:
    # c10d warns of every connection whose other end has no name in the network's directory.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # torch takes seconds to import, which a mistake in the settings need not wait for.
    from pretrain.launch.agent import Workers, run_agent
    from pretrain.launch.preflight import check_hosts, check_room, facts_of_this_host
    from pretrain.launch.rendezvous import Rendezvous, open_store

    hosts = _hosts(own)
    if hosts.alone:
        check_room(config, run_dir, words)
    store = open_store(hosts)
    if not hosts.alone:
        check_hosts(store, hosts, facts_of_this_host(config, run_dir, processes, words), run_dir)
    with tempfile.TemporaryDirectory(prefix="titans-") as folder:
        os.environ[STATUS_DIR], os.environ[LAUNCHER] = folder, str(os.getpid())
        worker = ["-m", "pretrain.train", *words]
        workers = Workers(worker, processes, own.max_restarts, own.shutdown_timeout, Path(folder))
        run_agent(workers, Rendezvous.over(store, hosts), hosts)


def _options(arguments: list[str]) -> argparse.Namespace:
    """What launch/torchrun.sh asks for, under torchrun's names where it has one."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.launch", allow_abbrev=False)
    parser.add_argument("--nnodes", default="1", help="hosts, or FEWEST:MOST")
    parser.add_argument("--node-rank", type=int, default=0, help="number of this host")
    parser.add_argument("--rdzv-endpoint", default="127.0.0.1:0", help="ADDRESS:PORT of host 0")
    parser.add_argument("--rdzv-id", default="titans", help="name of the run, the same on all hosts")
    parser.add_argument("--join-timeout", type=int, default=600, help="seconds that hosts wait for one another")
    parser.add_argument("--max-restarts", type=int, default=0, help="how often lost workers are started again")
    parser.add_argument("--shutdown-timeout", type=int, default=600, help="seconds that a save may take after a signal")
    parser.add_argument("--requeue-status", type=int, default=0, help="status of a run that was stopped before its end")
    return parser.parse_args(arguments)


def _hosts(own: argparse.Namespace) -> "Hosts":
    from pretrain.launch.rendezvous import Hosts

    least, most = _range(own.nnodes)
    address, _, port = own.rdzv_endpoint.rpartition(":")
    return Hosts(least, most, own.node_rank, address.strip("[]"), int(port), own.rdzv_id, own.join_timeout)


def _range(nnodes: str) -> tuple[int, int]:
    least, _, most = nnodes.partition(":")
    return int(least), int(most or least)


def _take_nproc(words: list[str]) -> tuple[int | None, list[str]]:
    if "--nproc" not in words:
        return None, words
    at = words.index("--nproc")
    value = words[at + 1] if at + 1 < len(words) else ""
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"--nproc is {value!r}; it must be a number of processes")
    return int(value), words[:at] + words[at + 2 :]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    main()
