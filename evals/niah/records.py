"""The raw results: one JSON line a sample, appended as batches finish, read back when a run goes on."""

import fcntl
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType

from evals.command_line import EvaluationError
from evals.niah.samples import SampleKey


@dataclass(frozen=True)
class Identity:
    """What must be equal for results to be counted together."""

    checkpoint_sha256: str
    """Of the weights."""
    tokenizer_sha256: str
    """Of the tokenizer file."""
    max_new_tokens: int
    """Tokens of the answer."""


@dataclass(frozen=True)
class Record:
    """One sample's result. Times and memory are those of the batch it ran in."""

    task: str
    length: int
    depth: float
    sample: int
    seed: int
    needle_key: str
    value: str
    prompt_tokens: int
    answer: str
    answer_tokens: int
    substring: bool
    first_value: bool
    wrong_value: bool
    batch: int
    prefill_seconds: float
    decode_ms_per_token: float
    peak_bytes: int
    state_bytes_per_sample: int
    checkpoint_sha256: str
    tokenizer_sha256: str
    max_new_tokens: int

    @property
    def name(self) -> SampleKey:
        """Which sample it is."""
        return SampleKey(self.task, self.length, self.depth, self.sample, self.seed)

    @property
    def identity(self) -> Identity:
        """What it belongs to."""
        return Identity(self.checkpoint_sha256, self.tokenizer_sha256, self.max_new_tokens)


class RecordFile:
    """A JSONL file of records, held by one process at a time. Use it in a `with` block."""

    def __init__(self, path: Path) -> None:
        """Opens the file, drops a last line that a killed process left torn, and reads the others.

        Args:
            path: The file; it and its folder are made when missing.

        Raises:
            EvaluationError: Another process holds the file, or a line in it is not a record.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise EvaluationError(
                f"--output {path.parent}: cannot write {path.name} there ({error.strerror})"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise EvaluationError(
                f"{path}: another evaluation is writing it; wait for it or give another --output"
            ) from None
        self._drop_torn_line()
        self._file.seek(0)
        self.records = [_parse(line, number, path) for number, line in enumerate(self._file, 1)]

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def of(self, identity: Identity) -> list[Record]:
        """The records that may be counted together with this identity."""
        return [record for record in self.records if record.identity == identity]

    def append(self, records: Iterable[Record]) -> None:
        """Adds records; they are on the disk when this returns."""
        new = list(records)
        self._file.write("".join(json.dumps(asdict(record)) + "\n" for record in new).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records += new

    def _drop_torn_line(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)


def _parse(line: bytes, number: int, path: Path) -> Record:
    try:
        values = json.loads(line)
        if set(values) != {field.name for field in fields(Record)}:
            raise ValueError("its fields are not those of this version")
        return Record(**values)
    except (ValueError, TypeError) as error:
        raise EvaluationError(
            f"{path}, line {number}: not a result of this evaluation ({error}); "
            "move the file away or give another --output"
        ) from None
