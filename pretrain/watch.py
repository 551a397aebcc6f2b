"""Shows a run: `python -m pretrain.watch RUN` draws RUN/watch.png and a panel that follows the run in a terminal."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.live import Live

from pretrain.launch.status import EXIT_MISTAKE
from pretrain.report.history import History
from pretrain.report.panel import panel_of
from pretrain.report.plots import write_plot
from pretrain.report.records import METRICS_FILE, Follower, line_of

_PNG_SECONDS = 30.0


@dataclass(frozen=True)
class WatchSettings:
    """Plots a run (RUN/watch.png) and prints a panel in the terminal that follows it until it is finished or Ctrl-C.

    It reads RUN/metrics.jsonl alone, needs no display and no GPU, and may be started and stopped beside a run at any
    time.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    once: bool = False
    """Draw and print once, then end; for scripts."""
    json: bool = False
    """Print the records that hold, every step once, as lines of JSON, and nothing else; what they are:
    pretrain/report/records.py."""
    output: Path | None = None
    """PNG to draw; RUN/watch.png by default."""
    every_seconds: float = 2.0
    """Seconds between two looks at the file."""


def watch(settings: WatchSettings) -> None:
    """Draws and prints, once or until the run is finished.

    Raises:
        ValueError: There is no run to show.
    """
    if settings.every_seconds <= 0:
        raise ValueError(f"--every-seconds is {settings.every_seconds}; it must be above 0")
    if not (settings.run / METRICS_FILE).is_file():
        raise ValueError(f"{settings.run / METRICS_FILE} is not there; name the folder of a run that was started")
    if settings.json:
        follower = Follower(settings.run)
        for record in follower.read():
            print(line_of(record).decode(), end="")
        _tell_left_out(follower, Console(stderr=True))
        return
    picture = settings.output or settings.run / "watch.png"
    name, follower, console = settings.run.resolve().name, Follower(settings.run), Console()
    history = History(follower.read())
    drawn = _draw(history, picture)
    if settings.once:
        console.print(panel_of(name, history))
    else:
        with Live(panel_of(name, history), console=console, auto_refresh=False) as live:
            while not history.finished:
                time.sleep(settings.every_seconds)
                history = History(follower.read())
                live.update(panel_of(name, history), refresh=True)
                if history.finished or time.monotonic() - drawn > _PNG_SECONDS:
                    drawn = _draw(history, picture)
    _tell_left_out(follower, console)
    if picture.is_file():
        console.print(f"plot: {picture}", soft_wrap=True)


def _tell_left_out(follower: Follower, console: Console) -> None:
    if follower.left_out:
        note = f"note: {follower.left_out} lines of {follower.file} were cut off and are left out"
        console.print(note, soft_wrap=True)


def _draw(history: History, picture: Path) -> float:
    """Draws what there is to draw, and says when."""
    if history.last_step is not None:
        write_plot(history, picture)
    return time.monotonic()


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
