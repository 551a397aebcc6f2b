"""Naming whoever holds up a run: slow ranks, a loader that stalls, ranks that do not answer any more."""

import os
import socket
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

SLOWER = 1.15
"""A straggler's own work takes so many times the median's."""
_LEAST_SECONDS = 0.05
_ROLL_CALL_SECONDS = 10.0
_DUMP = "_dump_fr_trace_json"
_COMMUNICATION = ("timed out", "connection closed", "connection reset", "connection refused", "gloo", "nccl", "broken")


class Straggler(NamedTuple):
    """The slowest rank.

    Attributes:
        rank: Which one.
        seconds: Of its own work in a step.
        median: Of all ranks.
    """

    rank: int
    seconds: float
    median: float


def straggler(own_seconds: Sequence[float]) -> Straggler | None:
    """The rank whose own work takes longest, if that is worth a word.

    Args:
        own_seconds: By rank, seconds of a step that it did not wait for others.
    """
    slowest = max(range(len(own_seconds)), key=own_seconds.__getitem__)
    median, seconds = statistics.median(own_seconds), own_seconds[slowest]
    if seconds > SLOWER * median and seconds > median + _LEAST_SECONDS:
        return Straggler(slowest, seconds, median)
    return None


class Waiting:
    """Time spent in waiting for communication: of the process on gloo, of its current stream on a GPU.

    Ranks that work together all take the time of the slowest; only what each does not wait tells them apart.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        seconds = self._seconds
        if self._events:
            torch.cuda.synchronize()
            seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1_000
        self._seconds, self._events = 0.0, []
        return seconds

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Counts inside the `with`."""
        work: Any = dist.Work
        original = work.wait

        def wait(one: Any, *arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            marks = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) if torch.cuda.is_available() else ()
            if marks:
                marks[0].record()
            try:
                return original(one, *arguments, **named)
            finally:
                if marks:
                    marks[1].record()
                    self._events.append((marks[0], marks[1]))
                else:
                    self._seconds += time.perf_counter() - began

        work.wait = wait
        try:
            yield
        finally:
            work.wait = original


class RankComparison:
    """Compares every so many steps what the ranks work, each by itself. All ranks call the same methods."""

    def __init__(self, every_steps: int) -> None:
        """Starts the clock; 0 steps never compare."""
        self.waiting = Waiting()
        """Its `measured` stands around what a step computes."""
        self._every, self._seconds, self._steps = every_steps, 0.0, 0

    def after(self, step: int, seconds: float) -> Straggler | None:
        """Adds a step that took so long; the slowest rank, when it is time and one is slow."""
        self._seconds += seconds - self.waiting.take()
        self._steps += 1
        if not self._every or step % self._every or dist.get_world_size() == 1:
            return None
        own = torch.tensor([self._seconds / self._steps], dtype=torch.float64)
        self._seconds, self._steps = 0.0, 0
        all_ranks = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(all_ranks, own)
        return straggler([float(one) for one in all_ranks])


def say_stalled(step: int, seconds: float) -> None:
    """Says that this rank waits for its batch. Every rank says it for itself: the others wait in a collective."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    print(
        f"note: rank {rank} on {socket.gethostname()} has waited {seconds:.0f} s for the batch of step {step}, and all "
        "others for it; is the storage of data.path slow?",
        file=sys.stderr,
        flush=True,
    )


class RollCall:
    """Knows the hosts of all ranks, and asks who is still there when communication fails. Made on all ranks at once."""

    def __init__(self) -> None:
        self._store = dist.distributed_c10d._get_default_store()
        self.hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(self.hosts, socket.gethostname())

    def place(self, rank: int) -> str:
        """A rank with its host."""
        return f"rank {rank} on {self.hosts[rank]}"

    def report(self, error: Exception, step: int) -> str:
        """What there is to say when a collective has failed: which ranks do not answer.

        Args:
            error: What it raised.
            step: That was being done.
        """
        what = f"communication failed in step {step} on {self.place(dist.get_rank())} ({_first_line(error)})"
        try:
            silent = self._silent()
        except (RuntimeError, dist.DistError):
            return f"{what}; the rendezvous host cannot be reached either"
        if silent:
            return f"{what}; no answer from {', '.join(map(self.place, silent))}"
        return f"{what}; all ranks answer: the network between them may have been cut for a while"

    def _silent(self) -> list[int]:
        """The ranks that do not come to the same end within some seconds: dead, stopped, or hanging in their own."""
        self._store.set(_key(dist.get_rank()), "here")
        ranks = range(dist.get_world_size())
        deadline = time.monotonic() + _ROLL_CALL_SECONDS
        while (silent := [rank for rank in ranks if not self._store.check([_key(rank)])]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.2)
        return silent


def is_communication(error: Exception) -> bool:
    """Whether an exception of torch's comes from a collective."""
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _COMMUNICATION)


def unreached(error: Exception) -> str:
    """What there is to say when this rank cannot join the others: who, whom, and what to do."""
    rank, ranks, first = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return (
        f"rank {rank} on {socket.gethostname()} does not reach the other {int(ranks) - 1} ranks, the first of them at "
        f"{first} ({_first_line(error)}); let the hosts reach each other on every port"
    )


def record_flights(run_dir: Path) -> None:
    """Has PyTorch keep the last collectives of every rank, and NCCL's watchdog write them when one times out. Before
    torch.distributed starts."""
    new_names = hasattr(torch._C._distributed_c10d, _DUMP)  # newer versions warn at the older names
    size, file = ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE")
    if not new_names:
        size, file = ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    os.environ.setdefault(size, "2000")
    os.environ.setdefault(file, str(run_dir / "flight_recorder" / "rank_"))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def write_flights(run_dir: Path) -> Path | None:
    """Writes this rank's last collectives, as JSON; None where torch has no recorder for them."""
    dump = getattr(torch._C._distributed_c10d, _DUMP, None)
    if dump is None:
        return None
    file = run_dir / "flight_recorder" / f"rank_{dist.get_rank()}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(dump())
    return file


def _key(rank: int) -> str:
    return f"roll-call/{rank}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rpartition("] ")[2]
