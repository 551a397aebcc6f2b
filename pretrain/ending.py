"""The ways in which a run ends before its last step: a signal, a mistake in what was asked, a failure."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.distributed as dist

from titans_mcore.parallel import stop

EXIT_MISTAKE = 2
EXIT_FAILED = 1
_WAIT_FOR_RANK_0_SECONDS = 20


class TrainingFailed(Exception):
    """The run cannot go on; the message says where it stopped and what is saved."""


class StopRequest:
    """A signal that asks the run to end after the current step."""

    def __init__(self) -> None:
        """Takes over SIGTERM, SIGINT and SIGUSR1."""
        self._signal = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    def seen_by_any_rank(self) -> str:
        """Name of the signal, or an empty text; the same answer on every rank, so that all stop after one step."""
        number = torch.tensor(self._signal)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return signal.Signals(int(number)).name if int(number) else ""

    def _note(self, number: int, frame: object) -> None:
        self._signal = number


@contextmanager
def mistakes_as_sentences() -> Iterator[None]:
    """Ends the process with one sentence for what a user can mend; every other exception keeps its traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        end_with(error, EXIT_MISTAKE)


def end_with(error: Exception, status: int) -> NoReturn:
    """Prints an error, once for each host, and ends the process."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # Most mistakes are every rank's. The first process that ends has the others killed: let it be the one that
        # says why. Where rank 0 is fine, nobody kills this one, and it speaks for itself.
        time.sleep(_WAIT_FOR_RANK_0_SECONDS)
    print(f"error: {error}", file=sys.stderr, flush=True)
    stop()
    raise SystemExit(status) from error
