"""What is aimed at, as data, and what a run says about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evals.efficiency.cases import BOTH, OURS, TITANS_PYTORCH

Row = dict[str, Any]
_FIXED: Row = {"direction": BOTH, "width": 64, "depth": 2}
_CPU: Row = {**_FIXED, "device": "cpu", "batch": 1, "heads": 4, "expansion": 2}
_GPU: Row = {**_FIXED, "device": "cuda", "heads": 24, "expansion": 4, "dtype": "bfloat16"}
_OUR_LAYER: Row = {"implementation": OURS, "part": "layer", "setting": "auto", "chunk": 16}


@dataclass(frozen=True)
class Target:
    """A ratio between two rows and how large it has to be.

    Attributes:
        title: What is compared.
        quantity: "time" and "peak memory" are the other row's over ours; "speed" and "memory a token" are ours at the
            greater length over ours at the smaller, and the other way round, so that more is better in all four.
        at_least: The ratio aimed at.
        ours: Values that identify our row.
        other: Values that identify the row it is compared with.
    """

    title: str
    quantity: Literal["time", "peak memory", "speed", "memory a token"]
    at_least: float
    ours: Row
    other: Row


def _against(length: int, gates: int, recurrent: float, default: float, memory: float) -> list[Target]:
    """Targets against titans-pytorch: both with the chunk recurrence that our memory has and without, its default."""
    found = []
    for chunk, time in ((16, recurrent), (0, default)):
        setting = f"chunk_size={gates} batch_size={chunk or None}"
        title = f"T = {length:,}, {TITANS_PYTORCH} {setting}"
        where = {**_CPU, "section": "side-by-side", "length": length}
        other = {**where, "implementation": TITANS_PYTORCH, "setting": setting}
        found.append(Target(title, "time", time, {**where, **_OUR_LAYER}, other))
        found.append(Target(title, "peak memory", memory, {**where, **_OUR_LAYER}, other))
    return found


def _growth() -> list[Target]:
    ours = {**_CPU, **_OUR_LAYER, "section": "growth"}
    rows = {**ours, "length": 65_536}, {**ours, "length": 4_096}
    title = "growth from T = 4,096 to 65,536"
    return [Target(title, "speed", 0.9, *rows), Target(title, "memory a token", 0.9, *rows)]


def _gpu() -> list[Target]:
    found = []
    for length, gates in ((256, 1), (4_096, 16)):
        setting = f"chunk_size={gates} batch_size=16"
        where = {**_GPU, "section": "side-by-side", "length": length}
        other = {**where, "implementation": TITANS_PYTORCH, "setting": setting}
        title = f"GPU, T = {length:,}, {TITANS_PYTORCH} {setting}"
        found.append(Target(title, "time", 20.0, {**where, **_OUR_LAYER}, other))
    where = {"direction": BOTH, "section": "gpu", "length": 4_096, "width": 64, "heads": 24}
    ours = {**_GPU, **where, "implementation": OURS, "part": "scan", "setting": "auto"}
    title = "GPU, T = 4,096, fla's chunk_ttt_linear (one matrix; it has no chunked MLP)"
    return [*found, Target(title, "time", 1.0, ours, {**where, "part": "chunk_ttt_linear"})]


CPU_TARGETS = (*_against(256, 1, 100.0, 100.0, 30.0), *_against(4_096, 16, 30.0, 8.0, 4.0), *_growth())
GPU_TARGETS = tuple(_gpu())


@dataclass(frozen=True)
class Verdict:
    """What a run says about a target: the ratio and whether it suffices, or why there is none."""

    target: Target
    ratio: float | None
    reason: str | None = None

    @property
    def text(self) -> str:
        """In words."""
        if self.ratio is None:
            return f"not measured: {self.reason}"
        return "reached" if self.ratio >= self.target.at_least else "missed"

    def to_dict(self) -> Row:
        """As plain values."""
        target = self.target
        facts = {"target": target.title, "quantity": target.quantity, "at_least": target.at_least}
        return {**facts, "ratio": self.ratio, "result": self.text}


def judge(rows: Sequence[Row], device: str) -> list[Verdict]:
    """A verdict for each of a device's targets."""
    return [_judge(rows, target) for target in (CPU_TARGETS if device == "cpu" else GPU_TARGETS)]


def _judge(rows: Sequence[Row], target: Target) -> Verdict:
    pair = []
    for wanted in (target.ours, target.other):
        found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
        if not found:
            return Verdict(target, None, "this run has no such case")
        if found[0]["status"] != "measured":
            return Verdict(target, None, f"{found[0]['implementation']}: {found[0]['status']}, {found[0]['reason']}")
        pair.append(found[0])
    ours, other = pair
    if target.quantity == "time":
        return Verdict(target, other["seconds"] / ours["seconds"])
    if target.quantity == "speed":
        return Verdict(target, ours["tokens_per_second"] / other["tokens_per_second"])
    ratio = other["peak_bytes"] / max(ours["peak_bytes"], 1)
    if target.quantity == "memory a token":
        ratio *= ours["length"] / other["length"]
    return Verdict(target, ratio)
