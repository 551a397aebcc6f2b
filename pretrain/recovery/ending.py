"""The ways in which a run ends before its last step: a signal, a mistake in what was asked, a failure."""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist

from pretrain.checkpoint.format import checkpoint_folder
from pretrain.launch.status import EXIT_FAILED, EXIT_GIVEN_UP, EXIT_MISTAKE, REQUEUE_FILE
from titans_mcore.command_line import CommandError, remedy_of
from titans_mcore.io import write_file_atomically
from titans_mcore.parallel import stop

_WAIT_FOR_RANK_0_SECONDS = 20
_STOP_AFTER = 1_000  # no signal has this number


class TrainingFailed(Exception):
    """The run cannot go on; the message says where it stopped and what is saved."""

    status = EXIT_FAILED


class TrainingGivenUp(TrainingFailed):
    """The same, and it would stop there again."""

    status = EXIT_GIVEN_UP


class Heard(NamedTuple):
    """What the ranks told each other after a step.

    Attributes:
        stopping: Why the run is to end now: a signal's name, or stop_after; empty when it goes on.
        writing: Whether a rank is still writing a checkpoint.
    """

    stopping: str
    writing: bool


class StopRequest:
    """A signal, or the time that has passed, that asks the run to end after the current step."""

    def __init__(self, began: float, stop_after_minutes: float) -> None:
        """Takes over SIGTERM, SIGINT and SIGUSR1.

        Args:
            began: time.monotonic() when the process began.
            stop_after_minutes: Minutes from then on; 0: no limit.
        """
        self._signal = 0
        self._deadline = began + 60 * stop_after_minutes if stop_after_minutes else math.inf
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    def exchange(self, writing: bool) -> Heard:
        """What any rank knows; the same answer on every rank, so that all of them stop after one step."""
        number = self._signal or (_STOP_AFTER if time.monotonic() > self._deadline else 0)
        known = torch.tensor([number, writing])
        dist.all_reduce(known, op=dist.ReduceOp.MAX)
        number = int(known[0])
        reason = "stop_after" if number == _STOP_AFTER else signal.Signals(number).name if number else ""
        return Heard(reason, bool(known[1]))

    def _note(self, number: int, frame: object) -> None:
        self._signal = number


def ask_for_requeue(run_dir: Path, reason: str, step: int, steps: int, attempt: int) -> None:
    """Leaves RUN/requeue.json: the run ended early and in order, and the same command goes on. torchrun's exit status
    does not say so."""
    facts = {
        "reason": reason,
        "step": step,
        "steps": steps,
        "finished": False,
        "checkpoint": f"checkpoints/{checkpoint_folder(run_dir, step).name}",
        "attempt": attempt,
    }
    write_file_atomically(run_dir / REQUEUE_FILE, (json.dumps(facts, indent=2) + "\n").encode())


def withdraw_requeue(run_dir: Path) -> None:
    """Removes RUN/requeue.json: the run has begun again."""
    (run_dir / REQUEUE_FILE).unlink(missing_ok=True)


@contextmanager
def mistakes_as_sentences() -> Iterator[None]:
    """Ends the process with one sentence for what a user can mend; every other exception keeps its traceback."""
    try:
        yield
    except (ValueError, OSError, CommandError) as error:
        end_with(error, EXIT_MISTAKE)


def end_with(error: Exception, status: int) -> NoReturn:
    """Prints an error, once for each host, and ends the process."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # Most mistakes are every rank's. The first process that ends has the others killed: let it be the one that
        # says why. Where rank 0 is fine, nobody kills this one, and it speaks for itself.
        time.sleep(_WAIT_FOR_RANK_0_SECONDS)
    sentence = remedy_of(error) if isinstance(error, OSError) else None
    print(f"error: {sentence or error}", file=sys.stderr, flush=True)
    stop()
    raise SystemExit(status) from error
