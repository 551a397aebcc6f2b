"""Stages of commands one behind the other, several such lanes side by side, each stage a bar on a terminal."""

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskProgressColumn, TextColumn, TimeElapsedColumn

from evals.command_line import EvaluationError
from evals.report import seconds_text

Progressed = Callable[[], tuple[float, str]]
"""Share of a stage that is done, and words on how it goes."""
SECONDS_FILE = "seconds.txt"
_LOOKS_A_SECOND = 4
_ENVIRONMENT = dict(os.environ)  # as it was given: a model that is loaded here writes its threads into it


@dataclass
class Stage:
    """One or more commands, and how far they are."""

    name: str
    """Of its output in RUN/log and its row in RUN/seconds.txt."""
    title: str
    """In front of its bar."""
    commands: Sequence[Sequence[str]]
    """Words of each, one behind the other."""
    done_already: Callable[[], bool] = lambda: False
    """Whether an earlier run made what it makes."""
    progress: Progressed | None = None
    """None where only the end of each command can be seen."""
    ended: int = field(default=0, init=False)
    """Commands that have."""
    began: float | None = field(default=None, init=False)
    seconds: float | None = field(default=None, init=False)
    """None until it has ended."""


@dataclass(frozen=True)
class Show:
    """How stages are shown, and where what they say is kept."""

    run: Path
    """Run folder."""
    verbose: bool
    """Whether the commands' own lines go to the screen, in place of bars and RUN/log."""
    console: Console = field(default_factory=Console)

    @property
    def bars(self) -> bool:
        """Whether there is a terminal to draw on."""
        return self.console.is_terminal and not self.verbose

    def say(self, text: str = "", style: str = "") -> None:
        """A line, or several."""
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


class Lanes:
    """Runs lanes of stages, each in a thread of its own, one stage of it at a time.

    Args:
        lanes: Stages one behind the other.
        show: Says where to write.
    """

    def __init__(self, lanes: Sequence[Sequence[Stage]], show: Show) -> None:
        self._show, self._stages = show, [stage for lane in lanes for stage in lane]
        self._fault: EvaluationError | None = None
        threads = max(len(os.sched_getaffinity(0)) // len(lanes), 1)
        # Lanes share the cores; a training divides them itself.
        self._environment = {"OMP_NUM_THREADS": str(threads), **_ENVIRONMENT} if len(lanes) > 1 else _ENVIRONMENT
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(lane,), daemon=True) for lane in lanes]
        (show.run / "log").mkdir(parents=True, exist_ok=True)
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Shows them until all have ended.

        Raises:
            EvaluationError: A command failed; those behind it in its lane were not run.
        """
        try:
            if self._show.bars:
                self._draw()
            for thread in self._threads:
                thread.join()
        except KeyboardInterrupt:  # the commands had the signal, too: a training saves before it ends
            self._fault = EvaluationError("interrupted")
            for thread in self._threads:
                thread.join()
            raise
        if self._fault:
            raise self._fault

    def _draw(self) -> None:
        last = (TimeElapsedColumn(), TextColumn("{task.fields[words]}"))
        columns = (TextColumn("{task.description}"), BarColumn(24), TaskProgressColumn(), *last)
        with Progress(*columns, console=self._show.console, refresh_per_second=_LOOKS_A_SECOND) as bars:
            drawn = {
                stage.name: bars.add_task(f"{stage.title:28}", total=None, start=False, words="")
                for stage in self._stages
            }
            going = True
            while going:
                going = any(thread.is_alive() for thread in self._threads)
                for stage in self._stages:
                    _move(bars, bars.tasks[drawn[stage.name]], stage)
                time.sleep(1 / _LOOKS_A_SECOND)

    def _run(self, lane: Sequence[Stage]) -> None:
        for stage in lane:
            if self._fault:
                return
            stage.began = time.monotonic()
            if stage.done_already():
                stage.seconds = 0.0
                self._tell(f"{stage.title}: done already")
                continue
            self._tell("\n   ".join([stage.title, *map(shlex.join, stage.commands)]))
            try:
                self._call(stage)
            except EvaluationError as fault:
                self._fault = self._fault or fault
                return
            with self._lock, (self._show.run / SECONDS_FILE).open("a") as file:
                file.write(f"{stage.name} {stage.seconds:.0f}\n")
            words = stage.progress()[1] if stage.progress else ""
            done = f"{stage.title}: done in {seconds_text(stage.seconds or 0)}"
            self._tell(f"{done}, {words}" if words else done)

    def _tell(self, text: str) -> None:
        if not self._show.bars:
            self._show.say(text)
            sys.stdout.flush()

    def _call(self, stage: Stage) -> None:
        began, log = time.monotonic(), self._show.run / "log" / f"{stage.name}.txt"
        with log.open("wb") as file:
            output = None if self._show.verbose else file
            for command in stage.commands:
                status = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self._environment
                ).returncode
                if status:
                    raise EvaluationError(f"{stage.title} ended with status {status}{self._reason(log)}")
                stage.ended += 1
        stage.seconds = time.monotonic() - began

    def _reason(self, log: Path) -> str:
        if self._show.verbose:
            return "; it says why above"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        # The first error is the cause: what follows may be a launcher that stopped the other processes.
        cause = [line for line in lines if line.startswith("error: ")][:1] or lines[-1:]
        return "".join(f": {line.removeprefix('error: ')}" for line in cause) + f"; all it said is in {log}"


def _move(bars: Progress, task: Task, stage: Stage) -> None:
    if stage.began is None or task.finished:
        return
    if not task.started:
        bars.start_task(task.id)
    share, words = stage.progress() if stage.progress else (stage.ended / len(stage.commands) or None, "")
    if stage.seconds is not None:
        share = 1.0
    bars.update(task.id, completed=share or 0, total=None if share is None else 1, words=words)


def training_progress(run: Path, unigrams: Callable[[], float]) -> Progressed:
    """How far a training is: its loss beside what counting words reaches.

    Args:
        run: Its run folder, which need not be there yet.
        unigrams: Nats a token that counting words reaches.
    """
    from pretrain.report.history import History, thinned
    from pretrain.report.records import METRICS_FILE, Follower

    follower = Follower(run)

    def progress() -> tuple[float, str]:
        if not (run / METRICS_FILE).is_file():
            return 0.0, ""
        history = History(follower.read())
        if (last := history.last_step) is None:
            return 0.0, ""
        losses = thinned(history.series("loss"), 24).values
        words = f"loss {losses[-1]:.2f} (counting words: {unigrams():.2f})"
        speed = f"{last['tokens_per_second']:,.0f} tokens/s"
        return last["step"] / history.attempt.get("steps", last["step"]), f"{words} {speed}"

    return progress


def niah_progress(file: Path, tokens: int) -> Progressed:
    """How far S-NIAH is: tokens of the samples that are in the file, and needles found.

    Args:
        file: niah.jsonl.
        tokens: Of all samples.
    """

    def progress() -> tuple[float, str]:
        lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
        records = [json.loads(line) for line in lines]
        main = [record["substring"] for record in records if record["control"] == "none"]
        words = f"{sum(main)} of {len(main)} needles found" if main else ""
        return min(sum(record["length"] for record in records) / tokens, 1.0), words

    return progress
