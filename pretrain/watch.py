"""How a run stands: `python -m pretrain.watch RUN`. Curves are drawn by TensorBoard and Weights & Biases."""

import itertools
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pretrain.report.history import History, clock, step_line
from pretrain.report.records import METRICS_FILE, Follower, Record, line_of
from titans_mcore.command_line import CommandError, parse_settings, run_command

_EVENTS = 5
_OFTEN_HELD = 0.2
_EVEN = 0.8  # of early_late
_SILENT_AFTER_STEPS = 10  # steps' time without a record; evaluations and checkpoints take a few
_SILENT_AFTER_SECONDS = 60.0


@dataclass(frozen=True)
class WatchSettings:
    """Says how a run stands, from RUN/metrics.jsonl alone; it may be called beside the run, and needs no GPU."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    json: bool = False
    """Print the records that hold, every step once, as lines of JSON, and nothing else; what they are:
    pretrain/report/records.py."""


def watch(settings: WatchSettings) -> None:
    """Prints it.

    Raises:
        CommandError: There is no run to show.
    """
    if not (settings.run / METRICS_FILE).is_file():
        raise CommandError(f"{settings.run / METRICS_FILE} is not there; name the folder of a run that was started")
    follower = Follower(settings.run)
    history = History(follower.read())
    if settings.json:
        print(*(line_of(record).decode() for record in history.records), sep="", end="")
    else:
        print("\n".join(lines_of(history)))
    if follower.left_out:
        note = f"note: {follower.left_out} lines of {follower.file} were cut off and are left out"
        print(note, file=sys.stderr if settings.json else sys.stdout)


def lines_of(history: History, now: float | None = None) -> Iterator[str]:
    """Everything worth a glance.

    Args:
        history: Of the run.
        now: Seconds since 1970; None is this moment.
    """
    attempt, last, seconds = history.attempt, history.last_step, history.series("seconds").values[-100:]
    where = [str(attempt[key]) for key in ("variant", "layout", "host") if attempt.get(key)]
    yield ", ".join([_state(history, seconds, now), f"attempt {attempt['attempt']}", *where])
    if last is not None:
        steps: int = attempt.get("steps") or last["step"]
        numbers = {name: math.nan if value is None else value for name, value in last.items()}
        # From the median of the last steps, without what stands between them.
        yield step_line(last["step"], steps, numbers, statistics.median(seconds) * (steps - last["step"]))
    for record in history.of("heldout")[-1:]:
        yield f"held-out loss {record['loss']:.4f} at step {record['step']:,}"
    curves = ("position_loss", "tokens", "loss", "{:.3f}"), ("probe", "lengths", "accuracy", "{:.0%}")
    for kind, places, name, form in curves:
        for record in {record.get("name", kind): record for record in history.of(kind)}.values():
            pairs = zip(record[places], record[name], strict=False)
            found = "  ".join(f"{place:,}: {form.format(value)}" for place, value in pairs if value is not None)
            yield f"{record.get('name', '')} {name} by {places} at step {record['step']:,}   {found}"
    for record in history.of("memory")[-1:]:
        yield from memory_warnings(record)
    told = [event for event in history.of("event") if "message" in event]  # what is as ever, like a save, has none
    yield from (f"step {event['step']:,}: {event['message']}" for event in told[-_EVENTS:])


def _state(history: History, seconds: Sequence[float], now: float | None) -> str:
    if history.finished:
        return "finished"
    silence = (time.time() if now is None else now) - max(
        (record["time"] for record in history.records), default=math.inf
    )
    usual = max(_SILENT_AFTER_SECONDS, _SILENT_AFTER_STEPS * statistics.median(seconds) if seconds else 0.0)
    return f"no record for {clock(silence)}" if silence > usual else "running"


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; see `--help`."""
    watch(parse_settings(WatchSettings, "python -m pretrain.watch", arguments))


if __name__ == "__main__":
    run_command(main)
