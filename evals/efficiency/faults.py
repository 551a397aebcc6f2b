"""What lost processes cost: the same run whole, with kill -9 under MAX_RESTARTS, and started again by hand.

Of each run: how much of its time went into steps that hold, how many steps were done twice, and how long it took from a
kill to the next step. All of it stands in the runs' own metrics.jsonl, beside the moments of the kills.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from evals.command_line import EvaluationError, check_at_least, say
from evals.report import table
from pretrain.report.records import Follower, Record, read_records, written_records

_TORCHRUN = Path(__file__).parents[2] / "launch" / "torchrun.sh"
_LOOK_SECONDS = 0.05
WHOLE, RESTARTED, BY_HAND = "never killed", "MAX_RESTARTS", "started again by hand"


@dataclass(frozen=True)
class FaultSettings:
    """Measures what lost processes cost a run on this host.

    A run is done three times: whole; with a worker killed (kill -9, each rank in turn) every few steps under
    MAX_RESTARTS; and with the same kills, the whole command being started again as soon as it has ended, which nobody
    does faster. Writes OUTPUT/faults.json, the runs and what they said.
    """

    data: Path
    """Folder of shards."""
    output: Path
    """Folder for faults.json and the runs; one that has none yet."""
    config: str = "quickstart"
    """A preset, or a TOML file."""
    steps: int = 100
    """Steps of the run."""
    kill_every: int = 30
    """Steps from one kill to the next."""
    checkpoint_every: int = 20
    """Steps from one checkpoint to the next."""
    processes: int = 2
    """Workers."""
    threads: int = 1
    """Threads of a worker."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "steps", "kill_every", "checkpoint_every", "processes", "threads")
        if self.kill_every >= self.steps:
            raise EvaluationError(
                f"--kill-every is {self.kill_every}; give less than the {self.steps} steps of the run"
            )
        for name in (WHOLE, RESTARTED, BY_HAND):
            if (folder := self.folder(name)).exists():
                raise EvaluationError(f"--output {self.output}: {folder.name} is there already; give another folder")

    @property
    def kills(self) -> list[int]:
        """Steps after which a worker is killed."""
        return list(range(self.kill_every, self.steps, self.kill_every))

    def folder(self, name: str) -> Path:
        """That of a run."""
        return self.output / name.replace(" ", "-").lower()


@dataclass(frozen=True)
class Kill:
    """A worker that was killed.

    Attributes:
        time: Seconds since 1970.
        rank: Of the worker.
        attempt: The run's, in which it was killed.
        step: The last one that the attempt is known to have done.
    """

    time: float
    rank: int
    attempt: int
    step: int


def measure(settings: FaultSettings) -> str:
    """Runs all three and writes OUTPUT/faults.json.

    Returns:
        The table.

    Raises:
        EvaluationError: A run ended of itself.
    """
    from evals.measure import circumstances

    settings.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in (WHOLE, RESTARTED, BY_HAND):
        folder, began = settings.folder(name), time.monotonic()
        kills = _run(settings, name)
        seconds = time.monotonic() - began
        rows.append({"run": name, **account(written_records(folder), read_records(folder), kills, seconds)})
    report = {**circumstances(settings, "cpu"), "rows": rows}
    (settings.output / "faults.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return _table(rows)


def account(written: Sequence[Record], held: Sequence[Record], kills: Sequence[Kill], seconds: float) -> dict[str, Any]:
    """What a run's time went into.

    Args:
        written: All its records.
        held: Those that hold.
        kills: In order.
        seconds: From the first command to the end of the last one.
    """
    steps = [record for record in written if record["kind"] == "step"]
    heads = [record for record in written if record["kind"] == "attempt"]
    productive = sum(record["seconds"] for record in held if record["kind"] == "step")
    return {
        "seconds": seconds,
        "productive_seconds": productive,
        "productive_share": productive / seconds,
        "repeated_seconds": sum(record["seconds"] for record in steps) - productive,
        "steps": sum(record["kind"] == "step" for record in held),
        "attempts": len(heads),
        "kills": [asdict(kill) | _after(kill, steps, heads) for kill in kills],
        "heldout_loss": next((record["loss"] for record in reversed(held) if record["kind"] == "heldout"), None),
    }


def _after(kill: Kill, steps: Sequence[Record], heads: Sequence[Record]) -> dict[str, Any]:
    """How the run went on: with how many steps to do again, and how soon; None for what it did not come to."""
    head = next((head for head in heads if head["attempt"] > kill.attempt), None)
    if head is None:
        return dict.fromkeys(("lost_steps", "resume_seconds", "caught_up_seconds"))
    done = max([kill.step, *(step["step"] for step in steps if step["attempt"] == kill.attempt)])
    following = [step for step in steps if step["attempt"] == head["attempt"]]
    caught_up = [step for step in following if step["step"] >= done]
    return {
        "lost_steps": done - head["resumed_step"],
        "resume_seconds": following[0]["time"] - kill.time if following else None,
        "caught_up_seconds": caught_up[0]["time"] - kill.time if caught_up else None,
    }


def _run(settings: FaultSettings, name: str) -> list[Kill]:
    """One run to its end, with its kills."""
    folder, wanted, kills = settings.folder(name), settings.kills if name != WHOLE else [], list[Kill]()
    follower = Follower(folder)
    say(f"{name}: {settings.steps} steps, {len(wanted)} kills")
    with (settings.output / f"{folder.name}.log").open("ab") as log, _started(settings, name, log) as launchers:
        while True:
            ended = launchers[-1].poll()
            if ended == 0:
                return kills
            if ended is not None:
                if len(kills) < len(launchers) or name != BY_HAND:
                    raise EvaluationError(f"{folder} ended with status {ended}; what it said is in {log.name}")
                launchers.append(_start(settings, name, log))
            if follower.file.exists() and (records := follower.read()):
                step = max((record["step"] for record in records if record["kind"] == "step"), default=0)
                if wanted[len(kills) :] and step >= wanted[len(kills)]:
                    rank = len(kills) % settings.processes
                    if _kill(launchers[-1].pid, rank):
                        kills.append(Kill(time.time(), rank, records[-1]["attempt"], step))
                        say(f"{name}: killed rank {rank} after step {step}")
            time.sleep(_LOOK_SECONDS)


@contextlib.contextmanager
def _started(settings: FaultSettings, name: str, log: IO[bytes]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The launchers of a run, the first of them started; what is still there at the end is killed."""
    launchers = [_start(settings, name, log)]
    try:
        yield launchers
    finally:
        if launchers[-1].poll() is None:
            _kill(launchers[-1].pid)
            launchers[-1].kill()
            launchers[-1].wait()


def _start(settings: FaultSettings, name: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
    asked = {
        "--config": settings.config,
        "--run-dir": settings.folder(name),
        "--nproc": settings.processes,
        "--data.path": settings.data,
        "--train.steps": settings.steps,
        "--checkpoint.every-steps": settings.checkpoint_every,
    }
    restarts = len(settings.kills) if name == RESTARTED else 0
    environment = {"PYTHON": sys.executable, "MAX_RESTARTS": restarts, "OMP_NUM_THREADS": settings.threads}
    words = ["bash", str(_TORCHRUN), *(str(word) for pair in asked.items() for word in pair)]
    given = os.environ | {key: str(value) for key, value in environment.items()}
    return subprocess.Popen(words, env=given, stdout=log, stderr=log, start_new_session=True)


def _kill(launcher: int, rank: int | None = None) -> bool:
    """kill -9 of the worker of a rank, or of everything that a launcher has started; whether something was there."""
    found = False
    for child in psutil.Process(launcher).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if rank is None or ("pretrain.train" in child.cmdline() and child.environ().get("RANK") == str(rank)):
                child.kill()
                found = True
    return found


def _table(rows: Sequence[dict[str, Any]]) -> str:
    header = ("run", "seconds", "productive", "kills", "steps lost", "s to the next step", "s until caught up")
    lines = []
    for row in rows:
        lost = [kill["lost_steps"] for kill in row["kills"] if kill["lost_steps"] is not None]
        medians = [
            statistics.median(found)
            if (found := [kill[name] for kill in row["kills"] if kill[name] is not None])
            else None
            for name in ("resume_seconds", "caught_up_seconds")
        ]
        cells = [f"{row['seconds']:.1f}", f"{row['productive_share']:.1%}", str(len(row["kills"])), str(sum(lost))]
        lines.append([row["run"], *cells, *("" if median is None else f"{median:.1f}" for median in medians)])
    return table(header, lines)
