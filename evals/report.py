"""What every evaluation hands out: intervals, tables, plots, and files that appear whole or not at all."""

import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.command_line import EvaluationError
from titans_mcore.io import bytes_text as bytes_text
from titans_mcore.io import seconds_text as seconds_text
from titans_mcore.io import write_file_atomically as write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_ROOT = Path(__file__).parents[1]
_Z_95 = 1.959963984540054  # two-sided 95 % point of the normal distribution
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # of Student's, 1 to 10 degrees


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion; (0, 1) without trials.

    Of shares from 0 to 1, as `successes` their sum, the interval is too wide rather than too narrow: none varies more
    than a yes or no with the same mean.
    """
    if not trials:
        return 0.0, 1.0
    share, z2 = successes / trials, _Z_95**2
    centre = share + z2 / (2 * trials)
    half = _Z_95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    low, high = ((centre + sign * half) / (1 + z2 / trials) for sign in (-1, 1))
    # The ends are exact at 0 and 1; rounding would leave 1e-17 there.
    return (0.0 if successes == 0 else low, 1.0 if successes == trials else high)


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of independent runs, and half of its 95 % interval by Student's t; None with one run.

    Beyond eleven runs the interval is that of eleven, which is a little wide.
    """
    if len(values) == 1:
        return values[0], None
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), _T_95[min(len(values) - 1, len(_T_95)) - 1] * error


def plus_minus(value: float | None, error: float | None, digits: int = 2) -> str:
    """A number and its error as a cell of a table; empty for None."""
    shown = (f"{number:,.{digits}f}" for number in (value, error) if number is not None)
    return "" if value is None else " ± ".join(shown)


def interval_text(values: Sequence[float]) -> str:
    """mean_interval as a cell of a table."""
    return plus_minus(*mean_interval(values), digits=3)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the right, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, *rows]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def settings_of(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as JSON takes it; a path of the project's as it is there, wherever the project lies."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(part) for part in value]
        if not isinstance(value, Path):
            return value
        return str(value.relative_to(_ROOT) if value.is_relative_to(_ROOT) else value)

    return {name: plain(value) for name, value in asdict(settings).items()}


def read_json(path: Path) -> dict[str, Any]:
    """What an earlier command has written.

    Raises:
        EvaluationError: It is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvaluationError(f"{path} is missing; run the same command again, which writes it") from None
    except json.JSONDecodeError as fault:
        raise EvaluationError(f"{path} is not JSON ({fault}); delete it and run the same command again") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a report; a number that is not finite is an error, JSON has none."""
    write_bytes(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def write_figure(path: Path, figure: "Figure") -> None:
    """Writes a plot as PNG."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150, bbox_inches="tight")
    write_bytes(path, image.getvalue())


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_MOST_IN_PLOT = 9  # lines whose names have room among them


Cells = Mapping[tuple[int, float], tuple[float, int]]


def heat_maps(
    maps: Mapping[str, Cells], lengths: Sequence[int], depths: Sequence[float], trained_length: int | None
) -> "Figure":
    """Heat maps one below the other, by their titles; see `draw_heat_map`."""
    from matplotlib.figure import Figure

    size = (2.5 + 0.9 * len(lengths), (1.8 + 0.5 * len(depths)) * len(maps))
    figure = Figure(figsize=size, layout="constrained")
    for axes, (title, cells) in zip(figure.subplots(len(maps), squeeze=False)[:, 0], maps.items(), strict=True):
        image = draw_heat_map(axes, title, lengths, depths, cells, trained_length)
        figure.colorbar(image, ax=axes, label="accuracy")
    return figure


def draw_heat_map(
    axes: "Axes", title: str, lengths: Sequence[int], depths: Sequence[float], cells: Cells, trained_length: int | None
) -> "AxesImage":
    """Accuracy over length and depth, with n in each cell and a line behind the trained length.

    Args:
        axes: To draw on.
        title: Above the plot.
        lengths: Columns, ascending, tokens.
        depths: Rows, percent.
        cells: (length, depth) to accuracy and n; a cell that was not run is left empty.
        trained_length: Tokens of a training sequence; None draws no line.
    """
    accuracy = [[cells.get((length, depth), (math.nan, 0))[0] for length in lengths] for depth in depths]
    image = axes.imshow(accuracy, cmap="YlGn", vmin=0, vmax=1, aspect="auto")
    for (length, depth), (value, trials) in cells.items():
        place = (lengths.index(length), depths.index(depth))
        colour = "white" if value > 0.6 else "black"
        axes.text(*place, f"{value:.2f}\nn={trials}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set(xlabel="length (tokens)", ylabel="depth of the needle (%)", title=title)
    if trained_length is not None:
        trained = sum(length <= trained_length for length in lengths) - 0.5
        axes.axvline(trained, color="black", linestyle="--", clip_on=False)
        axes.annotate(
            f"trained length {trained_length:,}",
            (trained, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, 2),
            textcoords="offset points",
            fontsize=8,
        )
        axes.set_title(title, pad=18)
    return image


def accuracy_plot(
    title: str, lines: Mapping[str, Sequence[tuple[int, float, tuple[float, float]]]], trained_length: int | None
) -> "Figure":
    """Accuracy against length, log axis, with intervals and the trained length.

    Args:
        title: Above the plot.
        lines: By their names, (length, accuracy, interval) each. What stands behind a comma is a control, which has the
            colour of what it belongs to, broken.
        trained_length: Tokens of a training sequence; None draws no line.
    """
    from matplotlib.figure import Figure

    many = len(lines) > _MOST_IN_PLOT
    figure = Figure(figsize=(10, max(4.0, 0.2 * len(lines))) if many else (7, 4), layout="constrained")
    axes = figure.subplots()
    colours, styles = dict[str, str](), {"": "-"}
    for name, points in lines.items():
        whole, _, control = name.partition(", ")
        look: dict[str, Any] = {"color": colours.setdefault(whole, f"C{len(colours)}")}
        look["linestyle"] = styles.setdefault(control, ("--", ":", "-.")[(len(styles) - 1) % 3])
        lengths, values, intervals = zip(*points, strict=True)
        reach = [[v - low for v, (low, _) in zip(values, intervals, strict=True)]]
        reach.append([high - v for v, (_, high) in zip(values, intervals, strict=True)])
        axes.errorbar(lengths, values, yerr=reach, marker="o", markersize=4, capsize=3, label=name, **look)
    axes.set_xscale("log", base=2)
    ticks = sorted({length for points in lines.values() for length, *_ in points})
    axes.set_xticks(ticks, [f"{length:,}" for length in ticks], rotation=30 if len(ticks) > 6 else 0)
    axes.minorticks_off()
    axes.set(xlabel="length (tokens)", ylabel="accuracy, 95 % interval", title=title, ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    if trained_length is not None:
        axes.axvline(trained_length, color="black", linestyle=":", label=f"trained length {trained_length:,}")
    if many:
        figure.legend(fontsize=8, loc="outside right upper")
    else:
        axes.legend(fontsize=8)
    return figure


Buckets = Sequence[Mapping[str, Any]]
_FEWEST_TOKENS = 256  # of a bucket that is drawn: the mean of fewer predictions is noise


def loss_plot(title: str, lines: Mapping[str, Buckets], trained_length: int | None) -> "Figure":
    """Loss by position of models, see `draw_losses`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6))
    draw_losses(figure.subplots(), title, lines, trained_length)
    return figure


def draw_losses(axes: "Axes", title: str, lines: Mapping[str, Buckets], trained_length: int | None) -> None:
    """Loss in nats a token against the tokens read, log axis, with 95 % intervals and the trained length.

    Args:
        axes: To draw on.
        title: Above the plot.
        lines: By their names, buckets of positions as position_perplexity.json has them. Those of fewer than some
            hundred predictions are left out, unless there are no others.
        trained_length: Tokens of a training sequence; None draws no line.
    """
    for name, buckets in lines.items():
        drawn = [bucket for bucket in buckets if bucket["tokens"] >= _FEWEST_TOKENS] or buckets
        places = [bucket["last"] for bucket in drawn]
        (line,) = axes.plot(places, [bucket["loss"] for bucket in drawn], marker="o", markersize=4, label=name or None)
        if all(bucket["interval"] for bucket in drawn):
            low, high = zip(*(bucket["interval"] for bucket in drawn), strict=True)
            axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens read before the prediction", ylabel="held-out loss (nats/token)", title=title)
    axes.grid(alpha=0.3)
    if trained_length is not None:
        axes.axvline(trained_length, color="black", linestyle="--", label=f"trained length {trained_length:,}")
    if trained_length is not None or any(lines):
        axes.legend(fontsize=8)
