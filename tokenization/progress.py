"""Progress of a long command: a bar on a terminal, otherwise a plain line every ten seconds."""

import sys
import time
from types import TracebackType
from typing import Any

_PLAIN_SECONDS = 10.0


class Progress:
    """Shows tokens a second and the time left. Use it in a `with` block and call `update`."""

    def __init__(self, total_bytes: int) -> None:
        """Starts the clock.

        Args:
            total_bytes: Size of all sources; the measure of how far the work is.
        """
        self.total_bytes = max(total_bytes, 1)
        self._started = time.monotonic()
        self._last_line = self._started
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            self._bar = _terminal_bar()
            self._bar.start()
            self._bar.add_task("encode", total=self.total_bytes, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return max(time.monotonic() - self._started, 1e-9)

    def update(self, done_bytes: int, tokens: int) -> None:
        """Shows where the work is.

        Args:
            done_bytes: Of `total_bytes`.
            tokens: Written so far.
        """
        rate = f"{tokens / self.seconds:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done_bytes, rate=rate)
        elif time.monotonic() - self._last_line >= _PLAIN_SECONDS:
            self._last_line = time.monotonic()
            share = min(done_bytes / self.total_bytes, 1.0)
            left = f"{self.seconds * (1 - share) / share:.0f} s left" if share else "time left unknown"
            print(f"{share:.0%} encoded, {tokens:,} tokens, {rate}, {left}", file=sys.stderr, flush=True)


def _terminal_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    return RichProgress(*columns, console=Console(stderr=True), transient=True)
