"""A run as a picture: one panel a quantity, those alone of which something is known. No display is needed."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.report.history import History, Series, means, thinned
from pretrain.report.records import Record
from tokenization.io import PartialFile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_POINTS = 2_000
_SMOOTHED_POINTS = 100
_COLUMNS = 3
_CURVES = 6  # of those over positions or lengths, from the first to the newest

Panel = tuple[str, Callable[["Axes"], None]]


def write_plot(history: History, file: Path) -> None:
    """Writes the picture as PNG: the old one or the new one is there at any moment."""
    with PartialFile(file) as partial:
        plot(history).savefig(partial.file, format="png", dpi=110, bbox_inches="tight")
        partial.commit()


def plot(history: History) -> "Figure":
    """The picture; restarts are dashed lines, events dotted ones."""
    from matplotlib.figure import Figure

    panels = panels_of(history)
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(5.2 * _COLUMNS, 3.1 * rows), layout="constrained")
    all_axes = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axes, (title, draw) in zip(all_axes, panels, strict=False):
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        draw(axes)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    attempt = history.attempt
    named = f"run {attempt.get('run', '')}, {attempt.get('variant', '')}, attempt {attempt['attempt']}"
    figure.suptitle(f"{named}, {attempt.get('layout') or attempt.get('device', '')}", fontsize=11)
    return figure


def panels_of(history: History) -> list[Panel]:
    """Titles and how each is drawn."""
    panels: list[Panel] = [("loss, nats a token", lambda axes: _loss(axes, history))]
    for title, name, scale in (
        ("gradient norm", "grad_norm", "log"),
        ("learning rate", "lr", "linear"),
        ("tokens a second", "tokens_per_second", "linear"),
        ("model FLOP utilisation", "mfu", "linear"),
        ("memory, bytes", "memory_bytes", "linear"),
    ):
        series = history.series(name)
        if series.steps:
            panels.append((title, _over_steps(history, series, scale)))
    panels += [(title, draw) for title, draw in _curves(history)]
    names = history.memory_quantities()
    retentions = [name for name in names if name.startswith("retention_")]
    for name in names:
        if name not in retentions:
            panels.append((f"memory: {name}, by block", _by_layer(history, name)))
    if retentions:
        panels.append(("memory: retention after so many tokens", lambda axes: _retention(axes, history, retentions)))
    return panels


def _loss(axes: "Axes", history: History) -> None:
    loss, heldout = history.series("loss"), history.series("loss", "heldout")
    _curve(axes, loss, label="training")
    if heldout.steps:
        axes.plot(heldout.steps, heldout.values, "o-", color="tab:orange", markersize=3, label="held-out")
    axes.legend(fontsize=8)
    _mark(axes, history)


def _over_steps(history: History, series: Series, scale: str) -> Callable[["Axes"], None]:
    def draw(axes: "Axes") -> None:
        _curve(axes, series)
        positive = min(series.values) > 0
        axes.set_yscale("log" if scale == "log" and positive else "linear")
        _mark(axes, history)

    return draw


def _curve(axes: "Axes", series: Series, **named: Any) -> None:
    """Every step faintly, and the way it takes."""
    every, smooth = thinned(series, _MOST_POINTS), thinned(series, _SMOOTHED_POINTS)
    marker = "." if len(every.steps) == 1 else ""
    axes.plot(every.steps, every.values, color="tab:blue", alpha=0.3, linewidth=0.8, marker=marker)
    axes.plot(smooth.steps, smooth.values, color="tab:blue", linewidth=1.4, **named)


def _mark(axes: "Axes", history: History) -> None:
    for attempt in history.of("attempt")[1:]:
        axes.axvline(attempt["resumed_step"], color="grey", linestyle="--", linewidth=0.7)
    for event in history.told():
        axes.axvline(event["step"], color="tab:red", linestyle=":", linewidth=0.9)


def _curves(history: History) -> list[Panel]:
    """Loss by position and probes, at some steps from light to dark."""
    positions = [
        (f"loss by position, {name.replace('_', ' ')}", _over_places(records, "tokens", "loss"))
        for name, records in history.named("position_loss").items()
    ]
    probes = [
        (f"{name}: accuracy by length", _over_places(records, "lengths", "accuracy", (-0.03, 1.03)))
        for name, records in history.named("probe").items()
    ]
    return [*positions, *probes]


def _over_places(
    records: list[Record], places: str, name: str, limits: tuple[float, float] | None = None
) -> Callable[["Axes"], None]:
    def draw(axes: "Axes") -> None:
        _by_place(axes, records, places, name)
        if limits is not None:
            axes.set_ylim(*limits)

    return draw


def _by_place(axes: "Axes", records: list[Record], places: str, name: str) -> None:
    count = len(records)
    chosen = sorted({round(i * (count - 1) / max(1, _CURVES - 1)) for i in range(_CURVES)} if count > 1 else {0})
    for shade, record in enumerate((records[i] for i in chosen), 1):
        points = [(x, y) for x, y in zip(record[places], record[name], strict=False) if y is not None]
        colour = _shade(shade / len(chosen))
        axes.plot(*zip(*points, strict=True), "o-", markersize=3, color=colour, label=f"step {record['step']:,}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens", fontsize=8)
    axes.legend(fontsize=7)


def _by_layer(history: History, name: str) -> Callable[["Axes"], None]:
    def draw(axes: "Axes") -> None:
        layers = history.by_layer(name)
        for index, series in enumerate(layers):
            label = f"block {index}" if index in (0, len(layers) // 2, len(layers) - 1) else None
            few = thinned(series, _MOST_POINTS)
            axes.plot(few.steps, few.values, ".-", markersize=2, color=_shade((index + 1) / len(layers)), label=label)
        axes.legend(fontsize=7)
        _mark(axes, history)

    return draw


def _retention(axes: "Axes", history: History, names: list[str]) -> None:
    """The mean over the blocks by distance; each block has its own in the records."""
    for shade, name in enumerate(names, 1):
        records = [record for record in history.of("memory") if name in record]
        points = [(record["step"], mean) for record in records if (mean := means(record[name])) is not None]
        distance = int(name.removeprefix("retention_"))
        axes.plot(*zip(*points, strict=True), ".-", color=_shade(shade / len(names)), label=f"{distance:,} tokens")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(fontsize=7)
    _mark(axes, history)


def _shade(share: float) -> tuple[float, float, float, float]:
    """A colour from light, a share of 0, to dark."""
    from matplotlib import colormaps

    return colormaps["viridis_r"](0.1 + 0.85 * share)
