"""Shows a run: `python -m pretrain.watch RUN` prints a panel that follows the run in a terminal."""

import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pretrain.launch.status import EXIT_MISTAKE
from pretrain.report.history import History, Series, means, sparkline, thinned
from pretrain.report.records import METRICS_FILE, Follower, Record, line_of
from pretrain.report.step_line import clock

_EVENTS = 5
_OFTEN_HELD = 0.2
_EVEN = 0.8  # of early_late


@dataclass(frozen=True)
class WatchSettings:
    """Prints a panel of a run in the terminal that follows it until it is finished or Ctrl-C.

    It reads RUN/metrics.jsonl alone, needs no GPU, and may be started and stopped beside a run at any time. Curves to
    look at closely are drawn by TensorBoard and Weights & Biases (logging.tensorboard, logging.wandb).
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    once: bool = False
    """Print once, then end; for scripts."""
    json: bool = False
    """Print the records that hold, every step once, as lines of JSON, and nothing else; what they are:
    pretrain/report/records.py."""
    every_seconds: float = 2.0
    """Seconds between two looks at the file."""


def watch(settings: WatchSettings) -> None:
    """Prints, once or until the run is finished.

    Raises:
        ValueError: There is no run to show.
    """
    if settings.every_seconds <= 0:
        raise ValueError(f"--every-seconds is {settings.every_seconds}; it must be above 0")
    if not (settings.run / METRICS_FILE).is_file():
        raise ValueError(f"{settings.run / METRICS_FILE} is not there; name the folder of a run that was started")
    name, follower, console = settings.run.resolve().name, Follower(settings.run), Console(stderr=settings.json)
    history = History(follower.read())
    if settings.json:
        print(*(line_of(record).decode() for record in history.records), sep="", end="")
    elif settings.once:
        console.print(panel_of(name, history))
    else:
        with Live(panel_of(name, history), console=console, auto_refresh=False) as live:
            while not history.finished:
                time.sleep(settings.every_seconds)
                history = History(follower.read())
                live.update(panel_of(name, history), refresh=True)
    if follower.left_out:
        note = f"note: {follower.left_out} lines of {follower.file} were cut off and are left out"
        console.print(note, soft_wrap=True)


def panel_of(name: str, history: History, now: float | None = None) -> RenderableType:
    """Everything worth a glance.

    Args:
        name: Of the run folder.
        history: Of the run.
        now: Seconds since 1970; None is this moment.
    """
    parts: list[RenderableType] = [_state(history, now)]
    if history.last_step is not None:
        parts += [_progress(history), _numbers(history)]
    if history.of("memory"):
        parts.append(_memory(history))
        parts += [Text(sentence, style="yellow") for sentence in memory_warnings(history.of("memory")[-1])]
    parts += [_curve(records[-1], "tokens", "loss", "{:.3f}") for records in history.named("position_loss").values()]
    parts += [_curve(records[-1], "lengths", "accuracy", "{:.0%}") for records in history.named("probe").values()]
    parts += [Text(f"step {event['step']:,}: {event['message']}") for event in history.told()[-_EVENTS:]]
    return Panel(Group(*parts), title=name, expand=False)


def _state(history: History, now: float | None) -> Text:
    attempt, silence = history.attempt, history.silent_seconds(now)
    if history.finished:
        state = Text("finished", style="bold green")
    elif silence:
        state = Text(f"no record for {clock(silence)}", style="bold red")
    else:
        state = Text("running", style="bold cyan")
    where = [
        f"attempt {attempt['attempt']}",
        *(str(attempt[key]) for key in ("variant", "layout", "host") if attempt.get(key)),
    ]
    return Text(", ").join([state, *map(Text, where)])


def _progress(history: History) -> RenderableType:
    last, steps = history.last_step, history.attempt.get("steps")
    assert last is not None
    line = Table.grid(padding=(0, 1))
    said = f"step {last['step']:,}"
    if steps is None:
        return Text(said)
    line.add_row(ProgressBar(total=steps, completed=min(last["step"], steps), width=40), f"{said} of {steps:,}")
    return line


def _numbers(history: History) -> Table:
    """A row a quantity: now, and the way it took."""
    table = Table.grid(padding=(0, 2))
    rows: list[tuple[str, Series, str, float]] = [
        ("loss", history.series("loss"), "{:.4f}", 1),
        ("held-out loss", history.series("loss", "heldout"), "{:.4f}", 1),
        ("gradient norm", history.series("grad_norm"), "{:.3f}", 1),
        ("learning rate", history.series("lr"), "{:.2e}", 1),
        ("tokens a second", history.series("tokens_per_second"), "{:,.0f}", 1),
        ("MFU", history.series("mfu"), "{:.1%}", 1),
        ("memory, GB", history.series("memory_bytes"), "{:.1f}", 1e9),
        ("tokens", history.series("tokens"), "{:,.0f}", 1),
    ]
    for name, series, form, unit in rows:
        if series.steps:
            way = "" if name == "tokens" else sparkline(thinned(series, 400).values)
            table.add_row(name, form.format(series.values[-1] / unit), way)
    if (left := _seconds_left(history)) is not None:
        table.add_row("left", clock(left), "")
    return table


def _seconds_left(history: History) -> float | None:
    """From the median of the last steps, without what stands between them."""
    last, steps = history.last_step, history.attempt.get("steps")
    if last is None or steps is None or history.finished:
        return None
    return statistics.median(history.series("seconds").values[-100:]) * (steps - last["step"])


def _memory(history: History) -> Table:
    """The newest look into the memories: means over the blocks, and the blocks."""
    record = history.of("memory")[-1]
    table = Table(title=f"memories at step {record['step']:,}", title_justify="left", box=None, padding=(0, 2))
    for heading in ("", "mean", "first block", "last block"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_column("by block")
    for name in history.memory_quantities():
        values = record.get(name) or []
        if (mean := means(values)) is not None:
            cells = ["" if value is None else f"{value:.4g}" for value in (mean, values[0], values[-1])]
            table.add_row(name, *cells, sparkline([value for value in values if value is not None]))
    return table


def memory_warnings(record: Record) -> list[str]:
    """What is to be said of a look into the memories: blocks in which the safeguard acts more than seldom, and where.

    Held steps cost little where they are held all along a chunk alike, and much where a chunk's last tokens hardly
    write; `early_late` tells the two apart.
    """
    shares, evenness = record.get("held") or [], record.get("early_late") or []
    blocks = enumerate(itertools.zip_longest(shares, evenness))
    often = [(block, share, late) for block, (share, late) in blocks if share is not None and share > _OFTEN_HELD]
    if not often:
        return []
    held = (
        f"memory: steps are held, or weights scaled back, for more than {_OFTEN_HELD:.0%} of the tokens in block "
        f"{', '.join(f'{block} ({share:.0%})' for block, share, _ in often)}"
    )
    uneven = [f"{block} ({late:.0%})" for block, _, late in often if late is not None and late < _EVEN]
    if not uneven:
        return [f"{held}, all along a chunk alike: theta is the most that a step can be"]
    return [
        f"{held}; a chunk's last quarter writes little beside its first in block {', '.join(uneven)}: "
        "lower model.theta_max or shorten model.chunk_size"
    ]


def _curve(record: Record, places: str, name: str, form: str) -> Text:
    """A quantity over lengths or positions, the newest."""
    pairs = [(place, value) for place, value in zip(record[places], record[name], strict=False) if value is not None]
    cells = "  ".join(f"{place:,}: {form.format(value)}" for place, value in pairs)
    return Text(f"{record.get('name', '')} {name} by {places} at step {record['step']:,}   {cells}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; see `--help`."""
    settings = tyro.cli(
        WatchSettings, args=arguments, prog="python -m pretrain.watch", config=(tyro.conf.FlagCreatePairsOff,)
    )
    try:
        watch(settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_MISTAKE) from None
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
