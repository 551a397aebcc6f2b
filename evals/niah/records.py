"""The raw results: one JSON line a sample, appended as batches finish, read back when a run goes on."""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
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
    fill: str
    """How prompts fill their length."""
    haystack: str
    """noise, synthetic, file or essay."""
    haystack_sha256: str
    """Of the text."""


@dataclass(frozen=True)
class Record:
    """One sample's result. Times and memory are those of the batch it ran in."""

    task: str
    length: int
    depth: float
    sample: int
    seed: int
    control: str
    needle_key: str
    value: str
    prompt_tokens: int
    prompt_sha256: str
    """Of the prompt's ids as 32-bit little-endian numbers: equal for equal samples, whatever read them."""
    answer: str
    """Its text."""
    answer_ids: list[int]
    """Its tokens, end token left out."""
    substring: bool
    first_value: bool
    wrong_value: bool
    value_loss: float
    """Cross-entropy of the value in nats, summed over its tokens, each fed as it stands."""
    value_tokens: int
    batch: int
    """Samples read side by side."""
    prefill_tokens: int
    """Tokens that the batch read, all rows together, and its part of the beginning that several batches share."""
    prefill_seconds: float
    """Of those tokens."""
    decode_ms_per_token: float
    seconds: float
    """All that the batch took."""
    peak_bytes: int
    state_bytes_per_sample: int
    checkpoint_sha256: str
    tokenizer_sha256: str
    max_new_tokens: int
    fill: str
    haystack: str
    haystack_sha256: str

    @property
    def name(self) -> SampleKey:
        """Which sample it is."""
        return SampleKey(self.task, self.length, self.depth, self.sample, self.seed, self.control)

    @property
    def identity(self) -> Identity:
        """What it belongs to."""
        return Identity(**{field.name: getattr(self, field.name) for field in fields(Identity)})


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

    def of(self, identities: Mapping[str, Identity]) -> list[Record]:
        """The records that may be counted together: those of each task's identity, each sample once."""
        found = {record.name: record for record in self.records if record.identity == identities.get(record.task)}
        return list(found.values())

    def absorb(self, path: Path) -> None:
        """Takes over the records of another process's file and removes it; a crash in between leaves both."""
        with RecordFile(path) as other:
            self.append(other.records)
            path.unlink()

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
