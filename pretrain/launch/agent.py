"""torchrun's agent on one host: it starts the workers, watches them, and starts them again when one is lost."""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, ProcessFailure, SignalException
from torch.distributed.elastic.rendezvous import RendezvousHandler
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)

from pretrain.launch.rendezvous import Hosts
from pretrain.launch.status import EXIT_FAILED, FINAL

_HANDLED_SIGNALS = "SIGTERM,SIGINT,SIGUSR1"
_LEFT_BEHIND_SECONDS = 30
_OTHERS_END_SECONDS = 60


@dataclass(frozen=True)
class Workers:
    """The processes of one host."""

    command: Sequence[str]
    """Arguments of the interpreter."""
    processes: int
    """How many."""
    restarts: int
    """How often they are started again after a failure."""
    save_seconds: int
    """How long they may go on after a signal, to save."""
    status_dir: Path
    """Takes a file of each one that ended well."""


class Agent(LocalElasticAgent):
    """torch's agent with three differences.

    What would end the same way is not tried again. Workers that are well when a host joins or leaves have time to save,
    as after a signal. What ended well is forgotten when the group starts again.
    """

    def __init__(self, workers: Workers, rendezvous: RendezvousHandler) -> None:
        """For the workers of this host."""
        spec = WorkerSpec(
            role="default",
            local_world_size=workers.processes,
            entrypoint=sys.executable,
            args=("-u", *workers.command),
            rdzv_handler=rendezvous,
            max_restarts=workers.restarts,
        )
        super().__init__(spec, DefaultLogsSpecs(), exit_barrier_timeout=_OTHERS_END_SECONDS)
        self._workers = workers
        self._shutdown_timeout = workers.save_seconds

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            if any(failure.exitcode in FINAL for failure in result.failures.values()):
                self._remaining_restarts = 0
            elif self._remaining_restarts:
                again = self._workers.restarts - self._remaining_restarts + 1
                print(
                    f"{_what_happened(result.failures)}; all go on from the last checkpoint "
                    f"(restart {again} of {self._workers.restarts})",
                    file=sys.stderr,
                    flush=True,
                )
        return result

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        for ended in self._workers.status_dir.iterdir():
            ended.unlink()
        return super()._start_workers(worker_group)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        # After a failure the others wait for one that is gone: they have nothing to finish.
        well = worker_group.state == WorkerState.HEALTHY
        self._shutdown(timeout=self._workers.save_seconds if well else _LEFT_BEHIND_SECONDS)


def run_agent(workers: Workers, rendezvous: RendezvousHandler, hosts: Hosts) -> None:
    """Starts the workers and returns when all of them, on all hosts, ended well, or this host's did after a signal.

    Raises:
        SystemExit: With the status of the worker that failed first, 128 + the number of a signal after which not every
            worker had saved, or 1 when the other hosts were lost; a sentence is on stderr.
    """
    # The agent reports a worker's end as errors with process tables; one line below says what matters.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = _HANDLED_SIGNALS
    closes = True
    try:
        result = Agent(workers, rendezvous).run()
        if result is not None and result.is_failed():
            status = _status(result.failures)
            if status not in FINAL:  # those come with a sentence
                print(f"error: {_what_happened(result.failures)}; the others were stopped", file=sys.stderr)
            raise SystemExit(status)
    except SignalException as error:
        closes = False  # the other hosts may go on without this one
        if len(list(workers.status_dir.iterdir())) < workers.processes:
            print(f"error: stopped by {error.sigval.name} before every process had saved", file=sys.stderr)
            raise SystemExit(128 + error.sigval) from None
    except (RendezvousConnectionError, RendezvousTimeoutError, RendezvousClosedError) as error:
        print(f"error: {_lost(error, hosts)}", file=sys.stderr)
        raise SystemExit(EXIT_FAILED) from None
    finally:
        if closes:
            rendezvous.shutdown()


def _lost(error: Exception, hosts: Hosts) -> str:
    me = f"host {hosts.rank}"
    if isinstance(error, RendezvousTimeoutError):
        return (
            f"{me} waited {hosts.join_seconds} s for {hosts.least} hosts to start again together, and not all came; "
            "the same command goes on from the last checkpoint"
        )
    if isinstance(error, RendezvousClosedError):
        return f"another host has ended the run, and says why; {me} ends, too"
    return f"{me} has lost host 0 at {hosts.address}; the same command on all hosts goes on from the last checkpoint"


def _first(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The failure that the others follow from: a process that was killed, else the one that ended first."""
    return min(failures.items(), key=lambda item: (item[1].exitcode > 0, item[1].timestamp))


def _status(failures: dict[int, ProcessFailure]) -> int:
    code = _first(failures)[1].exitcode
    return code if code > 0 else 128 - code


def _what_happened(failures: dict[int, ProcessFailure]) -> str:
    rank, failure = _first(failures)
    code = failure.exitcode
    return f"process {rank} " + (f"was killed by signal {-code}" if code < 0 else f"ended with status {code}")
