"""How long a process waits for others: what is left of a step's time is its own work.

Ranks that work together all take the time of the slowest one; only what each of them does not wait tells them apart.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


class Waiting:
    """Time spent in waiting for communication: of the process on gloo, of its current stream on a GPU."""

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
