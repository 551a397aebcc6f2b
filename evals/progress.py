"""How long an evaluation will take, from what it has cost so far."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from evals.report import seconds_text


class Pace:
    """Cost of reading and of answering, and the time that remains.

    Reading is paid by the token of all rows, answering by the step: on a CPU or a GPU alike a step of many rows costs
    little more than one of few.
    """

    def __init__(self) -> None:
        """Nothing has been measured yet."""
        self._seconds = {"read": 0.0, "step": 0.0}
        self._units = {"read": 0, "step": 0}
        self._mark = time.perf_counter()
        self.left = {"read": 0, "step": 0}

    def plan(self, tokens: int, steps: int) -> None:
        """Sets the work that is left: tokens to read over all rows, and decoding steps."""
        self.left = {"read": tokens, "step": steps}

    def start(self) -> None:
        """What happens from here on is work."""
        self._mark = time.perf_counter()

    def done(self, kind: str, units: int) -> float:
        """Counts units of "read" or "step" that ended now, and returns the seconds since the work before."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        self._seconds[kind] += seconds
        self._units[kind] += units
        self.left[kind] = max(self.left[kind] - units, 0)
        return seconds

    def skip(self, kind: str, units: int) -> None:
        """Takes away units that turned out not to be needed."""
        self.left[kind] = max(self.left[kind] - units, 0)

    def seconds_left(self) -> float:
        """The time that remains; both kinds must have been measured."""
        return sum(self.left[kind] * self._seconds[kind] / max(self._units[kind], 1) for kind in self.left)

    def text(self) -> str:
        """The time that remains, in words."""
        return f"about {seconds_text(self.seconds_left())} left"


class StatusLine:
    """A line on a terminal that is written over; nothing elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._last = 0.0

    def show(self, text: str) -> None:
        """Replaces the line, at most five times a second."""
        if self._live and time.monotonic() - self._last > 0.2:
            self._last = time.monotonic()
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Removes the line."""
        if self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, for the time of a `with` block; nothing elsewhere.

    Args:
        title: What is done.
        total: Tokens, or what else it is counted in.

    Returns:
        What moves it on by so many.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} of {task.total:,.0f}"))
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda units: progress.advance(task, units)
