"""What is known of a run, in the shapes that reports and plots take."""

import math
import statistics
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.report.records import Record


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
