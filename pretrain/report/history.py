"""What is known of a run, in the shapes that a panel and plots take."""

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pretrain.report.records import Record

_SILENT_AFTER_STEPS = 10  # steps' time without a record; evaluations and checkpoints take a few
_SILENT_AFTER_SECONDS = 60.0


class Series(NamedTuple):
    """A quantity over steps, where it is a number."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class History:
    """A run's records that hold."""

    records: list[Record]

    def of(self, kind: str) -> list[Record]:
        """Those of one kind."""
        return [record for record in self.records if record["kind"] == kind]

    def series(self, name: str, kind: str = "step") -> Series:
        """One quantity of a kind."""
        found = [(record["step"], record[name]) for record in self.of(kind) if record.get(name) is not None]
        return Series([step for step, _ in found], [value for _, value in found])

    def told(self) -> list[Record]:
        """Events that people were told of; a checkpoint that was saved as ever is none."""
        return [event for event in self.of("event") if "message" in event]

    def named(self, kind: str) -> dict[str, list[Record]]:
        """Those of one kind by their names."""
        found: dict[str, list[Record]] = {}
        for record in self.of(kind):
            found.setdefault(record.get("name", kind), []).append(record)
        return found

    def memory_quantities(self) -> list[str]:
        """Names of what is known of the memories, in the order of their records."""
        envelope = {"kind", "run", "attempt", "time", "step"}
        return list(dict.fromkeys(name for record in self.of("memory") for name in record if name not in envelope))

    @property
    def attempt(self) -> Record:
        """The newest attempt; what a run says first."""
        return (self.of("attempt") or [{"attempt": 0, "resumed_step": 0}])[-1]

    @property
    def last_step(self) -> Record | None:
        """The newest step."""
        steps = self.of("step")
        return steps[-1] if steps else None

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return self.last_step is not None and self.last_step["step"] >= self.attempt.get("steps", math.inf)

    def silent_seconds(self, now: float | None = None) -> float:
        """Seconds since the last record where they are too many for a run that goes on, else 0."""
        if self.finished or not self.records:
            return 0.0
        silence = (time.time() if now is None else now) - max(record["time"] for record in self.records)
        seconds = self.series("seconds").values[-100:]
        usual = max(_SILENT_AFTER_SECONDS, _SILENT_AFTER_STEPS * statistics.median(seconds) if seconds else 0.0)
        return silence if silence > usual else 0.0


def thinned(series: Series, most: int) -> Series:
    """At most so many points: means over equally many neighbours."""
    size = -(-len(series.steps) // most)
    if size <= 1:
        return series
    pieces = range(0, len(series.steps), size)
    return Series(
        [series.steps[min(start + size, len(series.steps)) - 1] for start in pieces],
        [statistics.fmean(series.values[start : start + size]) for start in pieces],
    )


def means(values: Iterable[Any]) -> float | None:
    """The mean of what is a number; None without any."""
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if numbers else None


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A line of blocks, as high as the values."""
    shown = thinned(Series(list(range(len(values))), list(values)), width).values
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    blocks = "▁▂▃▄▅▆▇█"
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((value - low) * scale)] for value in shown)
