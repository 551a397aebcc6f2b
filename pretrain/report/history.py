"""What is known of a run, in the shapes that reports and plots take; a step in one line, and the time that is left."""

import math
import statistics
from dataclasses import dataclass
from typing import Any, NamedTuple

from pretrain.config.settings import TrainConfig
from pretrain.report.records import Record
from pretrain.schedule import tokens_after


class Curve(NamedTuple):
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

    def series(self, name: str, kind: str = "step") -> Curve:
        """One quantity of a kind."""
        found = [(record["step"], record[name]) for record in self.of(kind) if record.get(name) is not None]
        return Curve([step for step, _ in found], [value for _, value in found])

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


def thinned(series: Curve, most: int) -> Curve:
    """At most so many points: means over equally many neighbours."""
    size = -(-len(series.steps) // most)
    if size <= 1:
        return series
    starts = range(0, len(series.steps), size)
    return Curve(
        [series.steps[min(start + size, len(series.steps)) - 1] for start in starts],
        [statistics.fmean(series.values[start : start + size]) for start in starts],
    )


def seconds_left(step: int, seconds: float, train: TrainConfig) -> float:
    """Seconds to the end of a run if every token takes what those of a step took, which took so many seconds.

    Counted in tokens, steps that grow in a warm-up count as what they will be; evaluations and saves come on top.
    """
    before, done, every = (tokens_after(number, train) for number in (step - 1, step, train.steps))
    return seconds * (every - done) / (done - before)


def step_line(step: int, steps: int, values: dict[str, Any], eta_seconds: float) -> str:
    """A step for people; what was not measured is left out.

    Args:
        step: Counted from 1.
        steps: Of the run.
        values: Of a step's record.
        eta_seconds: To the end.
    """
    parts = [
        f"step {step:>{len(str(steps))}}/{steps}",
        f"loss {values['loss']:.4f}",
        f"{values['tokens_per_second']:,.0f} tokens/s",
        f"lr {values['lr']:.2e}",
        f"grad norm {values['grad_norm']:.3f}",
    ]
    if values.get("mfu") is not None:
        parts.append(f"MFU {values['mfu']:.1%}")
    if values.get("memory_bytes") is not None:
        parts.append(f"memory {values['memory_bytes'] / 1e9:.1f} GB")
    if values.get("seconds"):
        parts.append(f"data wait {values.get('data_wait_seconds', 0.0) / values['seconds']:.1%}")
    return " | ".join([*parts, f"ETA {clock(eta_seconds)}"])


def clock(seconds: float) -> str:
    """A duration as h:mm:ss."""
    whole = math.ceil(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
