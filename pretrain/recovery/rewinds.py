"""Batches that a run passes over because it went back to before them: RUN/rewinds.jsonl.

A step and its batch have one number, so that the data is a function of the step alone. A run that goes back to a
checkpoint comes by the same steps again; those whose batches did the harm are left out, as if they had been learned
from. The file is written before the run goes back, and read by every attempt.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from titans_mcore.io import write_file_atomically

REWINDS_FILE = "rewinds.jsonl"


class Rewind(NamedTuple):
    """Once that a run went back.

    Attributes:
        to_step: Step of the checkpoint that it went back to.
        first: First step that is passed over from then on.
        last: Last one.
        reason: What was bad.
    """

    to_step: int
    first: int
    last: int
    reason: str


class Rewinds:
    """All of a run."""

    def __init__(self, entries: Sequence[Rewind] = ()) -> None:
        self.entries = list(entries)

    @classmethod
    def read(cls, run_dir: Path) -> "Rewinds":
        """Those of a run folder; none when it has no file.

        Raises:
            ValueError: The file cannot be read.
        """
        file = run_dir / REWINDS_FILE
        try:
            lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            return cls([Rewind(**json.loads(line)) for line in lines])
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"cannot read {file}: {error}; it says which batches the run passes over") from error

    def with_another(self, rewind: Rewind) -> "Rewinds":
        """These and one more."""
        return Rewinds([*self.entries, rewind])

    def write(self, run_dir: Path) -> None:
        """Puts them into the run folder."""
        text = "".join(json.dumps(entry._asdict()) + "\n" for entry in self.entries)
        write_file_atomically(run_dir / REWINDS_FILE, text.encode())

    def step_after(self, step: int) -> int:
        """The next step that is not passed over."""
        step += 1
        while past := [entry.last for entry in self.entries if entry.first <= step <= entry.last]:
            step = max(past) + 1
        return step

    def to(self, step: int) -> int:
        """How often the run went back to this step."""
        return sum(entry.to_step == step for entry in self.entries)
