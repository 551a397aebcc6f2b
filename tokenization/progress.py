"""Progress of a long command: a bar on a terminal, otherwise a plain line a minute."""

import sys
import time
from typing import Any

from titans_mcore.io import bytes_text, seconds_text

_PLAIN_SECONDS = 60.0


class Progress:
    """Shows tokens a second, or bytes where none are counted, and the time left.

    Use it in a `with` block and call `advance`.
    """

    def __init__(self, verb: str, total: float, done: float = 0, *, shown: bool = True) -> None:
        """Starts the clock.

        Args:
            verb: What happens to the text, such as "encoded".
            total: The measure of the whole work, in bytes or any other unit of which `advance` tells.
            done: What an earlier run did of it.
            shown: Not on ranks whose work another one shows.
        """
        self._shown = shown
        self._verb = verb
        self._total = max(total, 1e-9)
        self._before = self._done = done
        self._tokens = 0
        self._started = self._last_line = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if self._shown and sys.stderr.isatty():
            self._bar = _terminal_bar()
            self._bar.start()
            self._bar.add_task(self._verb, total=self._total, completed=self._done, rate="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return max(time.monotonic() - self._started, 1e-9)

    @property
    def left(self) -> str:
        """The time that remains, in words."""
        fresh = self._done - self._before
        if fresh <= 0:
            return "time left unknown"
        return f"about {seconds_text(self.seconds * max(self._total - self._done, 0) / fresh)} left"

    def advance(self, done: float, tokens: int) -> None:
        """Shows that work was done.

        Args:
            done: Since the last call.
            tokens: Likewise.
        """
        self._done += done
        self._tokens += tokens
        per_second = (self._done - self._before) / self.seconds
        rate = f"{self._tokens / self.seconds:,.0f} tokens/s" if self._tokens else f"{bytes_text(per_second)}/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, rate=rate)
        elif self._shown and time.monotonic() - self._last_line >= _PLAIN_SECONDS:
            self._last_line = time.monotonic()
            share = min(self._done / self._total, 1.0)
            counted = f" {self._tokens:,} tokens," if self._tokens else ""
            print(f"{share:.0%} {self._verb},{counted} {rate}, {self.left}", file=sys.stderr, flush=True)


def _terminal_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    # Drawn seldom: what is measured meanwhile shares the process.
    return RichProgress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4)
