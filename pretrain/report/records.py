"""RUN/metrics.jsonl: a record a line, only ever appended to.

Every record has `kind`, `run` (the id in RUN/run_id), `attempt` (how often the run was started, from 1), `step` (done
when it was written) and `time` (seconds since 1970). A number that is not finite is null. What else it has, by kind:

attempt         the head of an attempt: resumed_step, steps (of the run), variant, host, pid, processes, layout, device,
                commit
step            loss, grad_norm, lr, tokens, tokens_per_second, seconds, data_wait_seconds; mfu on a GPU, memory_bytes
heldout         loss, mean over the held-out sequences, nats a token
position_loss   name (what was read), tokens, loss: the loss of the tokens up to each place, from the one before
probe           name, lengths, accuracy, samples: accuracy by length, of so many samples each
memory          a list over the blocks for every quantity of titans_mcore.telemetry
event           name ("rewind", "save_failed", "healthy", ...) and what belongs to it; message where people were told

A record that has `resumed_step` (an attempt, a rewind) voids what was recorded of later steps before it, but for
attempts and events, which have happened nevertheless. So a run that was killed and started again has every step once,
and nothing is ever rewritten: `read_records` resolves it.
"""

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
KINDS = ("attempt", "step", "heldout", "position_loss", "probe", "memory", "event")
_HISTORY = ("attempt", "event")
_ENVELOPE = ("kind", "run", "attempt", "time")

Record = dict[str, Any]


def make_record(kind: str, run: str, attempt: int, step: int, values: dict[str, Any]) -> Record:
    """A record of this moment.

    Raises:
        ValueError: The kind is unknown, or a value has a name that every record uses.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if taken := {*_ENVELOPE, "step"} & set(values):
        raise ValueError(f"a record's own {', '.join(sorted(taken))} cannot be values of a {kind}; name them otherwise")
    head = {"kind": kind, "run": run, "attempt": attempt, "time": round(time.time(), 3), "step": step}
    return head | {name: _as_json(value) for name, value in values.items()}


def line_of(record: Record) -> bytes:
    """A record as a line."""
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def read_records(run_dir: Path) -> list[Record]:
    """What holds of a run's records, in order; lines that were cut off in the middle of writing are left out."""
    return resolve(_parsed(run_dir / METRICS_FILE))


def resolve(records: Iterable[Record]) -> list[Record]:
    """Of records as they were written, those that hold."""
    kept: list[Record] = []
    # An attempt that was thought dead may have written behind the head of the next one.
    for record in sorted(records, key=lambda record: record["attempt"]):
        if "resumed_step" in record:
            kept = [old for old in kept if old["kind"] in _HISTORY or old["step"] <= record["resumed_step"]]
        kept.append(record)
    newest = {(record["kind"], record["step"]): record["attempt"] for record in kept}
    return [
        record
        for record in kept
        if record["kind"] in _HISTORY or record["attempt"] == newest[record["kind"], record["step"]]
    ]


class Follower:
    """A run's records while they are being written: every line is read once.

    Attributes:
        file: Where they stand.
        left_out: Lines so far that are no record: cut off by a kill, or by a disk that was full.
    """

    def __init__(self, run_dir: Path) -> None:
        self.left_out = 0
        self.file = run_dir / METRICS_FILE
        self._place, self._written = 0, list[Record]()

    def read(self) -> list[Record]:
        """What holds of the records so far."""
        with self.file.open("rb") as stream:
            stream.seek(self._place)
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]  # the last line may be half written
        self._place += len(whole)
        found = [_parse(line) for line in whole.splitlines()]
        self._written += [record for record in found if record is not None]
        self.left_out += found.count(None)
        return resolve(self._written)


def count_attempts(run_dir: Path) -> int:
    """Attempts that a run has had."""
    return max((record["attempt"] for record in _parsed(run_dir / METRICS_FILE, b'{"kind": "attempt"')), default=0)


def _parsed(file: Path, beginning: bytes = b"{") -> Iterable[Record]:
    if not file.is_file():
        return
    with file.open("rb") as stream:
        for line in stream:
            if line.startswith(beginning) and (record := _parse(line)) is not None:
                yield record


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = all(isinstance(record.get(name), int) for name in ("attempt", "step")) and record.get("kind") in KINDS
    return record if whole else None


def _as_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value
