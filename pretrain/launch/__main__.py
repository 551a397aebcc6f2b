"""Starts the workers of one host for launch/torchrun.sh; what can be known to be wrong is said before any of them runs.

    python -m pretrain.launch [--nnodes N] ... -- [--nproc N] --config FILE --run-dir DIR [SETTING ...]

The agent that watches the workers is torchrun's. Each attempt has one of its own, which meets those of the other hosts
under a name of its own: workers find nothing there that those before them left. It ends with the status of the worker
that failed first, and after a signal with 0 when all workers of this host ended well.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pretrain.config.command_line import parse
from pretrain.config.run_config import RunConfig
from pretrain.launch.status import EXIT_FAILED, EXIT_MISTAKE, FINAL, LAUNCHER, REQUEUE_FILE, STATUS_DIR, ended_well
from titans_mcore.command_line import CommandError, remedy_of, try_output
from titans_mcore.division import check_divisible, check_world

if TYPE_CHECKING:
    from pretrain.launch.preflight import Meeting

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""After these the workers save and end."""


def main() -> None:
    """Checks the settings and the host, starts the workers and waits for them."""
    at = sys.argv.index("--")
    own, words = options(sys.argv[1:at]), sys.argv[at + 1 :]
    # Until the agent takes over: the first process of a container does not get a signal that it has no handler for.
    for number in _SIGNALS:
        signal.signal(number, _leave)
    # c10d warns of every connection whose other end has no name in the network's directory.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        asked, words = _take_nproc(words)
        command = parse(words)
        try_output(command.run_dir, "--run-dir", folder=True)
        config, parallel = command.config, command.config.parallel
        own.processes = asked or _gpus() or parallel.tensor * parallel.context
        check_sizes(config, own.processes, own.least, own.most)
        _start(own, config, words)
    except (ValueError, OSError, CommandError) as error:
        sentence = remedy_of(error) if isinstance(error, OSError) else None
        _end(str(sentence or error), EXIT_MISTAKE)
    if own.requeue_status and (command.run_dir / REQUEUE_FILE).exists():
        raise SystemExit(own.requeue_status)


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


def _start(own: argparse.Namespace, config: RunConfig, words: list[str]) -> None:
    # These import torch, which takes seconds.
    from pretrain.launch.preflight import Meeting, facts_of_this_host

    with tempfile.TemporaryDirectory(prefix="titans-") as folder:
        os.environ[STATUS_DIR], os.environ[LAUNCHER] = folder, str(os.getpid())
        meeting = Meeting(own)
        if own.most > 1:
            meeting.join(facts_of_this_host(own, config))
        try:
            _run_workers(own, ["-u", "-m", "pretrain.train", *words], meeting)
        finally:
            meeting.leave()


def _run_workers(own: argparse.Namespace, command: list[str], meeting: "Meeting") -> None:
    """Starts them, again when one is lost, until all on all hosts ended well, or this host's did after a signal."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import api
    from torch.distributed.launcher.api import elastic_launch

    def stop(number: int, frame: object) -> None:  # what torch's agent has a handler do as soon as it has workers
        raise SignalException("stopped", signal.Signals(number))

    # torch tells of a worker's end in process tables; one line below says what matters.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    for number in _SIGNALS:
        signal.signal(number, stop)
    me, again, attempt = f"host {own.node_rank}", "the same command on all hosts goes on from the last checkpoint", 0
    try:
        for attempt in range(own.max_restarts + 1):
            lost = ""
            try:
                elastic_launch(_launch_config(own, meeting, attempt), sys.executable)(*command)
                return
            except api.RendezvousClosedError:
                pass  # the attempt was over before this host came
            except ChildFailedError as error:
                status, lost = _what_happened(error.failures)
                if status in FINAL or attempt == own.max_restarts:
                    meeting.end()
                    # The final ones come with a sentence.
                    _end("" if status in FINAL else f"{lost}; the others were stopped", status)
            if meeting.has_ended():
                break
            if lost:
                count = f"restart {attempt + 1} of {own.max_restarts}"
                print(f"{lost}; all go on from the last checkpoint ({count})", file=sys.stderr, flush=True)
        _end(f"another host has ended the run, and says why; {me} ends, too", EXIT_FAILED)
    except SignalException as error:
        if ended_well() < own.processes:
            _end(f"stopped by {error.sigval.name} before every process had saved", 128 + error.sigval)
    except api.RendezvousConnectionError:
        _end(f"{me} has lost host 0 at {own.address}; {again}", EXIT_FAILED)
    except api.RendezvousTimeoutError:
        if not attempt and (missing := meeting.who_is_missing()):
            _end(missing, EXIT_MISTAKE)
        _end(f"{me} waited {own.join_timeout} s for {own.least} hosts to start together; {again}", EXIT_FAILED)
    finally:
        for number in _SIGNALS:
            signal.signal(number, _leave)


def _launch_config(own: argparse.Namespace, meeting: "Meeting", attempt: int) -> Any:
    """torchrun's settings of an attempt. It starts nothing again itself."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    folder, patience = Path(os.environ[STATUS_DIR]), own.join_timeout
    # Where torch is given and older, workers have the 30 s that it gives everybody.
    newer = {"shutdown_timeout": own.shutdown_timeout} if hasattr(LaunchConfig, "shutdown_timeout") else {}
    for ended in folder.glob("ended-*"):
        ended.unlink()
    return LaunchConfig(
        min_nodes=own.least,
        max_nodes=own.most,
        nproc_per_node=own.processes,
        run_id=f"attempt-{attempt}",
        rdzv_backend="c10d",
        rdzv_endpoint=meeting.endpoint,
        rdzv_configs={"is_host": False, "join_timeout": patience, "read_timeout": patience},
        max_restarts=0,
        local_addr=meeting.address,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
        signals_to_handle=",".join(number.name for number in _SIGNALS),
        **newer,
    )


def _what_happened(failures: Mapping[int, Any]) -> tuple[int, str]:
    """Status and story of the failure that the others follow from: a process that was killed, else the first."""
    rank, failure = min(failures.items(), key=lambda item: (item[1].exitcode > 0, item[1].timestamp))
    code = failure.exitcode
    if code < 0:
        return 128 - code, f"process {rank} was killed by signal {-code}"
    return code, f"process {rank} ended with status {code}"


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _end(sentence: str, status: int) -> NoReturn:
    if sentence:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def options(arguments: list[str]) -> argparse.Namespace:
    """What launch/torchrun.sh asks for, under torchrun's names where it has one."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.launch", allow_abbrev=False)
    parser.add_argument("--nnodes", default="1", help="hosts, or FEWEST:MOST")
    parser.add_argument("--node-rank", type=int, default=0, help="number of this host")
    parser.add_argument("--rdzv-endpoint", default="127.0.0.1:0", help="ADDRESS:PORT of host 0; port 0 is a free one")
    parser.add_argument("--rdzv-id", default="titans", help="name of the run, the same on all hosts")
    parser.add_argument("--join-timeout", type=int, default=600, help="seconds that hosts wait for one another")
    parser.add_argument("--max-restarts", type=int, default=0, help="how often lost workers are started again")
    parser.add_argument("--shutdown-timeout", type=int, default=600, help="seconds that a save may take after a signal")
    parser.add_argument("--requeue-status", type=int, default=0, help="status of a run that was stopped before its end")
    own = parser.parse_args(arguments)
    least, _, most = own.nnodes.partition(":")
    own.least, own.most = int(least), int(most or least)
    address, _, port = own.rdzv_endpoint.rpartition(":")
    own.address, own.port = address.strip("[]"), int(port)
    return own


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
