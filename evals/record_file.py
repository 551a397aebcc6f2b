"""Raw results: one JSON line a sample, appended as batches finish, read back when a run goes on."""

import json
import os
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from evals.command_line import EvaluationError
from titans_mcore.io import try_lock

SampleResult = TypeVar("SampleResult")


class RecordFile(Generic[SampleResult]):
    """A JSONL file of records, held by one process at a time. Use it in a `with` block.

    Args:
        path: The file; it and its folder are made when missing. A last line that a killed process left torn is dropped.
        kind: Dataclass of a record.

    Raises:
        EvaluationError: Another process holds the file, or a line in it is not a record.
    """

    def __init__(self, path: Path, kind: type[SampleResult]) -> None:
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

    def append(self, records: Iterable[SampleResult]) -> None:
        """Adds records; they are on the disk when this returns."""
        new = list(records)
        lines: list[Any] = new
        self._file.write("".join(json.dumps(asdict(record)) + "\n" for record in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records += new

    def _parse(self, line: bytes, number: int) -> SampleResult:
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
