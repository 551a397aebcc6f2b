"""Raw results: one JSON line a sample, appended as batches finish, read back when a run goes on."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from evals.command_line import EvaluationError
from titans_mcore.io import try_lock


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What must be equal for results to be counted together; an evaluation adds what else decides its own."""

    checkpoint_sha256: str
    """Of the weights."""
    tokenizer_sha256: str
    """Of the tokenizer file."""
    max_new_tokens: int
    """Tokens of the answer."""


@dataclass(frozen=True, kw_only=True)
class SampleResult(Identity):
    """What a model made of one sample. Times and memory are those of the batch it ran in."""

    task: str
    length: int
    sample: int
    seed: int
    prompt_tokens: int
    answer: str
    """Its text."""
    batch: int
    """Samples read side by side."""
    prefill_seconds: float
    decode_ms_per_token: float
    peak_bytes: int
    state_bytes_per_sample: int

    @property
    def name(self) -> Any:
        """Which sample it is."""
        raise NotImplementedError

    def belongs_to(self, identity: Identity | None) -> bool:
        """Whether it may be counted with results of this identity; None has none of the task."""
        return identity is not None and all(getattr(self, name) == value for name, value in vars(identity).items())


Answered = TypeVar("Answered", bound=SampleResult)
Record = TypeVar("Record")


def counted(records: Iterable[Answered], identities: Mapping[str, Identity]) -> list[Answered]:
    """The records that may be counted together: those of their task's identity, each sample once."""
    return list({record.name: record for record in records if record.belongs_to(identities.get(record.task))}.values())


class RecordFile(Generic[Record]):
    """A JSONL file of records, held by one process at a time. Use it in a `with` block.

    Args:
        path: The file; it and its folder are made when missing. A last line that a killed process left torn is dropped.
        kind: Dataclass of a record.

    Raises:
        EvaluationError: Another process holds the file, or a line in it is not a record.
    """

    def __init__(self, path: Path, kind: type[Record]) -> None:
        self.path, self._kind = path, kind
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except (FileExistsError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise EvaluationError(
                f"--output {path.parent}: cannot write {path.name} there ({error.strerror}); give another folder"
            ) from None
        if not try_lock(self._file.fileno()):
            self._file.close()
            raise EvaluationError(f"{path}: another evaluation is writing it; wait for it or give another --output")
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)  # a torn line is dropped
        self._file.seek(0)
        self.records = [self._parse(line, number) for number, line in enumerate(self._file, 1)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def fileno(self) -> int:
        """The descriptor that has the lock. A child that it is passed to holds the file too, until both have ended."""
        return self._file.fileno()

    def absorb(self, path: Path) -> None:
        """Takes over the records of another process's file and removes it; a crash in between leaves both."""
        with RecordFile(path, self._kind) as other:
            self.append(other.records)
            path.unlink()

    def append(self, records: Iterable[Record]) -> None:
        """Adds records; they are on the disk when this returns."""
        new = list(records)
        lines: list[Any] = new
        self._file.write("".join(json.dumps(asdict(record)) + "\n" for record in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records += new

    def _parse(self, line: bytes, number: int) -> Record:
        kind: Any = self._kind
        try:
            values = json.loads(line)
            needed = {field.name for field in fields(kind) if field.default is MISSING}
            if not needed <= set(values) <= {field.name for field in fields(kind)}:
                raise ValueError("its fields are not those of this version")
            return kind(**values)
        except (ValueError, TypeError) as error:
            raise EvaluationError(
                f"{self.path}, line {number}: not a result of this evaluation ({error}); "
                "move the file away or give another --output"
            ) from None
