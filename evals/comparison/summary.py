"""From results to comparison.md, .json and .png: means over seeds with their 95 % intervals."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evals.niah.templates import BY_NAME
from evals.report import (
    bytes_text,
    markdown_table,
    mean_interval,
    plus_minus,
    wilson_interval,
    write_bytes,
    write_figure,
    write_json,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Result:
    """A part of one system with one seed."""

    system: str
    """As in the presets."""
    seed: int
    """Of the training."""
    part: str
    """text, lists or needles."""
    measures: dict[str, Any]
    """Numbers by name."""


Results = Sequence[Result]


class Point(NamedTuple):
    """A mean over seeds and its 95 % interval: Student's t over seeds; of shares found, Wilson's over all samples."""

    mean: float
    interval: tuple[float, float] | None
    """None of one seed."""


Points = dict[Any, Point]

_NOTES = {
    "text": "held-out: nats a token of held-out rows as in training; streamed and beyond: of held-out text in one long "
    "row, to the trained length and from there to four times it; tokens/s: in training, the median step; state: bytes "
    "that one sequence leaves behind so many tokens.",
    "lists": "lists: held-out nats a token on lists that are said again and again, windows too short to copy from.",
    "needles": "S-NIAH: share of needles found, by tokens of the haystack, RULER's substring score; trained "
    "on rows as long as the shortest.",
}


_FIRST_SHOWN = 16  # before so many tokens the loss is as high for every system, and hides their differences


def columns(result: Result) -> dict[str, float]:
    """The numbers of a result that the table shows, by the title of their column."""
    found = result.measures
    if result.part == "lists":
        return {"lists": found["loss"]}
    if result.part == "needles":
        return {f"{task} {length:,}": share for (task, length), share in curves(result).items()}
    shown = {"held-out": found["loss"], "streamed": found["within"], "beyond": found["beyond"]}
    shown |= {"tokens/s": found["tokens_per_second"]}
    shown |= {f"state at {int(length):,}": size for length, size in found["state_bytes"].items()}
    return {title: value for title, value in shown.items() if value is not None}


def curves(result: Result) -> dict[tuple[str, int], float]:
    """The numbers of a result that the plot shows as curves, by curve and place on it."""
    found = result.measures
    buckets = [bucket for bucket in found.get("buckets", ()) if bucket["last"] >= _FIRST_SHOWN]
    by_position = {("text", bucket["last"]): bucket["loss"] for bucket in buckets}
    tasks = found.get("accuracy", {}).items()
    by_length = {(BY_NAME[t].column, int(length)): share for t, own in tasks for length, share in own.items()}
    return by_position | by_length


def means(results: Results, numbers: Callable[[Result], Mapping[Any, float]]) -> dict[str, Points]:
    """Means of such numbers over seeds, by system and key, in the order in which they were first found."""
    values: dict[str, dict[Any, list[tuple[float, int]]]] = {}
    for result in results:
        own = values.setdefault(result.system, {})
        for key, value in numbers(result).items():
            own.setdefault(key, []).append((value, result.measures.get("samples", 0)))
    return {system: {key: _point(found) for key, found in own.items()} for system, own in values.items()}


def _point(found: Sequence[tuple[float, int]]) -> Point:
    """Of a number of each seed and, where it is a share, of how many samples."""
    mean, half = mean_interval([value for value, _ in found])
    if all(samples for _, samples in found):
        return Point(mean, wilson_interval(sum(share * n for share, n in found), sum(n for _, n in found)))
    return Point(mean, None if half is None else (mean - half, mean + half))


def markdown(results: Results) -> str:
    """The table and what its columns are."""
    by_part = [result for part in _NOTES for result in results if result.part == part]
    titles = list(dict.fromkeys(title for result in by_part for title in columns(result)))
    rows = []
    for system, points in means(results, columns).items():
        own = [result for result in results if result.system == system]
        facts = [f"{own[0].measures['parameters']:,}", str(own[0].measures["ffn_dim"])]
        seeds = str(len({result.seed for result in own}))
        rows.append([system, *facts, seeds, *(_cell(title, points.get(title)) for title in titles)])
    about = "Parameters: beside the embedding. Means over seeds ± half of the 95 % interval by Student's t; of needles "
    about += "the mean and Wilson's interval over the samples of all seeds."
    notes = [note for part, note in _NOTES.items() if any(result.part == part for result in results)]
    table = markdown_table(("system", "parameters", "ffn_dim", "seeds", *titles), rows)
    return "\n\n".join([table, about, *notes])


def _cell(title: str, point: Point | None) -> str:
    if point is None:
        return ""
    mean, interval = point
    if title.startswith("state"):
        return bytes_text(mean)
    if interval and title.startswith("S-NIAH"):
        return f"{mean:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"
    return plus_minus(mean, (interval[1] - mean) if interval else None, 0 if title == "tokens/s" else 3)


def write_report(output: Path, results: Results) -> str:
    """Writes comparison.md, .json and .png, and returns the table; nothing without results."""
    if not results:
        return ""
    table = markdown(results)
    shown = {
        system: {title: point._asdict() for title, point in points.items()}
        for system, points in means(results, columns).items()
    }
    write_json(output / "comparison.json", {"means": shown, "results": [asdict(result) for result in results]})
    write_bytes(output / "comparison.md", (table + "\n").encode())
    write_figure(output / "comparison.png", plot(results))
    return table


def plot(results: Results) -> "Figure":
    """A panel for each thing that was measured; bars are 95 % intervals."""
    from matplotlib.figure import Figure

    points, lines = means(results, columns), means(results, curves)
    single = [title for title in ("held-out", "lists") if any(title in own for own in points.values())]
    curved = list(dict.fromkeys(name for own in lines.values() for name, _ in own))
    panels = len(single) + len(curved)
    figure = Figure(figsize=(5 * panels, 3 + 0.25 * len(points)), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for title, one in zip(single, axes, strict=False):
        _draw(one, ((system, own[title], index) for index, (system, own) in enumerate(points.items()) if title in own))
        one.set(title=title, xlabel="nats a token")
    for name, one in zip(curved, axes[len(single) :], strict=True):
        _draw_curves(one, {s: {at: p for (n, at), p in own.items() if n == name} for s, own in lines.items()})
        one.set(title=name, xlabel="tokens read", ylabel="nats a token")
        if name != "text":
            one.set(ylabel="share of needles found", ylim=(-0.03, 1.03))
    if curved:
        figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def _draw(axes: "Axes", points: Iterable[tuple[str, Point, int]]) -> None:
    named = list(points)
    for row, (_, point, index) in enumerate(named):
        axes.errorbar(point.mean, row, xerr=_bars([point]), fmt="o", capsize=3, color=_colour(index))
    axes.set_yticks(range(len(named)), [system for system, *_ in named])
    axes.invert_yaxis()
    axes.grid(alpha=0.3)


def _draw_curves(axes: "Axes", curves: Mapping[str, Points]) -> None:
    for index, (system, curve) in enumerate(curves.items()):
        if curve:
            points = list(curve.values())
            shape: Any = {"fmt": "o-", "ms": 3, "capsize": 2, "color": _colour(index), "label": system}
            axes.errorbar(list(curve), [point.mean for point in points], _bars(points), **shape)
    ticks = sorted({place for curve in curves.values() for place in curve})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{place:,}" for place in ticks], rotation=30)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _bars(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """How far the intervals reach below the means and above them; not a number, which is not drawn, without one."""
    ends = [point.interval or (math.nan, math.nan) for point in points]
    below = [point.mean - low for point, (low, _) in zip(points, ends, strict=True)]
    return below, [high - point.mean for point, (_, high) in zip(points, ends, strict=True)]


def _colour(index: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20"](index % 20)
