"""From results to comparison.md, .json and .png: means over seeds with their 95 % intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.niah.templates import BY_NAME
from evals.report import bytes_text, markdown_table, mean_interval, write_bytes, write_figure, write_json

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
Point = tuple[float, float | None]
"""A mean and half of its interval."""


def quantities(result: Result) -> dict[str, float]:
    """The numbers of a result that the table shows, by the title of their column."""
    found = result.measures
    if result.part == "needles":
        tasks = found["accuracy"].items()
        shown = {_needle(task, int(length)): value for task, lengths in tasks for length, value in lengths.items()}
    elif result.part == "lists":
        shown = {"lists": found["loss"]}
    else:
        shown = {"held-out": found["loss"], "streamed": found["within"], "beyond": found["beyond"]}
        shown |= {"tokens/s": found["tokens_per_second"]}
        shown |= {f"state at {int(length):,}": size for length, size in found["state_bytes"].items()}
    return {title: value for title, value in shown.items() if value is not None}


def means(results: Results) -> dict[str, dict[str, Point]]:
    """Means over seeds by system and column; systems and columns in the order in which they were first found."""
    values: dict[str, dict[str, list[float]]] = {}
    for result in results:
        columns = values.setdefault(result.system, {})
        for title, value in quantities(result).items():
            columns.setdefault(title, []).append(value)
    return {system: {title: mean_interval(own) for title, own in columns.items()} for system, columns in values.items()}


def markdown(results: Results) -> str:
    """The table and what its columns are."""
    found = means(results)
    titles = [title for part in _NOTES for r in results if r.part == part for title in quantities(r)]
    titles = list(dict.fromkeys(titles))
    sizes = {result.system: result.measures for result in results}
    rows = []
    for system, columns in found.items():
        seeds = len({result.seed for result in results if result.system == system})
        facts = [system, f"{sizes[system]['parameters']:,}", str(sizes[system]["ffn_dim"]), str(seeds)]
        rows.append([*facts, *(_cell(title, columns.get(title)) for title in titles)])
    notes = [note for part, note in _NOTES.items() if any(result.part == part for result in results)]
    table = markdown_table(("system", "parameters", "ffn_dim", "seeds", *titles), rows)
    return "\n\n".join([table, "Means over seeds ± half of the 95 % interval by Student's t.", *notes])


_NOTES = {
    "text": "held-out: nats a token of held-out rows as in training; streamed and beyond: of held-out text in one long "
    "row, to the trained length and from there to four times it; tokens/s: in training, the median step; state: bytes "
    "that one sequence leaves behind so many tokens.",
    "lists": "lists: held-out nats a token on lists that are said again and again, windows too short to copy from.",
    "needles": "PK, N, W: share of S-NIAH's needles found, by tokens of the haystack, RULER's substring score; trained "
    "on rows as long as the shortest.",
}


def _cell(title: str, point: Point | None) -> str:
    if point is None:
        return ""
    mean, half = point
    if title.startswith("state"):
        return bytes_text(mean)
    digits = 0 if title == "tokens/s" else 3
    return f"{mean:,.{digits}f}" + ("" if half is None else f" ± {half:,.{digits}f}")


def _needle(task: str, length: int) -> str:
    return f"{BY_NAME[task].column} {length:,}"


def write_report(output: Path, results: Results) -> str:
    """Writes comparison.md, .json and .png, and returns the table.

    Args:
        output: Folder.
        results: At least one.
    """
    if not results:
        return ""
    table = markdown(results)
    shown = {
        system: {title: {"mean": mean, "half_interval": half} for title, (mean, half) in columns.items()}
        for system, columns in means(results).items()
    }
    write_json(output / "comparison.json", {"means": shown, "results": [asdict(result) for result in results]})
    write_bytes(output / "comparison.md", (table + "\n").encode())
    write_figure(output / "comparison.png", plot(results))
    return table


def plot(results: Results) -> "Figure":
    """A panel for each thing that was measured; bars are 95 % intervals over seeds."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    found = means(results)
    colours = {system: colormaps["tab20"](index % 20) for index, system in enumerate(found)}
    panels: list[Callable[[Axes], None]] = []

    def points(title: str, label: str) -> None:
        own = {system: columns[title] for system, columns in found.items() if title in columns}
        if own:
            panels.append(lambda axes: _points(axes, own, label, colours))

    def lines(curves: Mapping[str, Mapping[int, Point]], label: str, x: str) -> None:
        if any(curves.values()):
            panels.append(lambda axes: _lines(axes, curves, label, x, colours))

    points("held-out", "text: held-out nats a token")
    lines(_by_position(results), "text: nats a token", "tokens read")
    points("lists", "lists: held-out nats a token")
    for task in BY_NAME:
        lines(_by_length(results, task), f"S-NIAH {BY_NAME[task].column}: share found", "tokens of the haystack")
    figure = Figure(figsize=(5.5 * len(panels), 1.5 + 0.3 * len(found) + 2), layout="constrained")
    for draw, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        draw(axes)
    return figure


def _over_seeds(results: Results, part: str, curve: Callable[[Result], Mapping[int, float]]) -> dict[str, Any]:
    """Means of a part's curve by system and place on it."""
    values: dict[str, dict[int, list[float]]] = {}
    for result in results:
        if result.part == part:
            own = values.setdefault(result.system, {})
            for place, value in curve(result).items():
                own.setdefault(place, []).append(value)
    return {
        system: {place: mean_interval(found) for place, found in sorted(own.items())} for system, own in values.items()
    }


def _by_position(results: Results) -> dict[str, Any]:
    return _over_seeds(results, "text", lambda result: {b["last"]: b["loss"] for b in result.measures["buckets"]})


def _by_length(results: Results, task: str) -> dict[str, Any]:
    def accuracy(result: Result) -> dict[int, float]:
        return {int(length): value for length, value in result.measures["accuracy"].get(task, {}).items()}

    return _over_seeds(results, "needles", accuracy)


def _points(axes: "Axes", points: Mapping[str, Point], label: str, colours: Mapping[str, Any]) -> None:
    for row, (system, (mean, half)) in enumerate(points.items()):
        axes.errorbar(mean, row, xerr=half, fmt="o", capsize=3, color=colours[system])
    axes.set_yticks(range(len(points)), list(points))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


def _lines(
    axes: "Axes", curves: Mapping[str, Mapping[int, Point]], label: str, x: str, colours: Mapping[str, Any]
) -> None:
    for system, curve in curves.items():
        means, halves = zip(*curve.values(), strict=True)
        errors = [half or 0.0 for half in halves]
        axes.errorbar(
            list(curve), means, errors, fmt="o-", markersize=3, capsize=2, color=colours[system], label=system
        )
    axes.set_xscale("log", base=2)
    axes.set(xlabel=x, ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
