"""The work, cut into units before it starts: OUTPUT/plan.json.

The plan is a function of sources and settings alone. Every host and every restart works from the same file, so the
output does not depend on who did what when; with other settings or changed sources it is refused by name.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from titans_mcore.io import from_json, write_file_once
from tokenization.command_line import TokenizationError
from tokenization.parquet import row_groups
from tokenization.records import BrokenFile, Rejected, Skipped, Span
from tokenization.settings import EncodingSettings
from tokenization.sources import SourceFile
from tokenization.tokenizer import TokenizerInfo

PLAN_NAME = "plan.json"
PLAN_VERSION = 1
_FOOTERS_AT_ONCE = 16
# A compressed .jsonl holds about so many bytes of text a byte; only weighs units against each other.
_EXPANSION = {".jsonl.gz": 3, ".jsonl.zst": 3, ".json.gz": 3, ".json.zst": 3}


@dataclass(frozen=True)
class PlannedSpan:
    """A part of a source."""

    source: int
    """Place in the plan's list of sources."""
    start: int
    """First row of a .parquet or byte of a .jsonl; 0 otherwise."""
    stop: int
    """Row or byte behind the last."""
    weight: int
    """About how many bytes of text it holds."""

    @property
    def span(self) -> Span:
        """What a reader takes."""
        return Span(self.start, self.stop)


@dataclass(frozen=True)
class Unit:
    """What one worker does at a time: done or not done, never half."""

    spans: tuple[PlannedSpan, ...]
    """Consecutive parts of consecutive sources."""

    @property
    def weight(self) -> int:
        """About how many bytes of text it holds."""
        return sum(span.weight for span in self.spans)


@dataclass(frozen=True)
class Plan:
    """The content of `plan.json`."""

    version: int
    """PLAN_VERSION."""
    settings: EncodingSettings
    """What was asked for."""
    tokenizer: TokenizerInfo
    """The tokenizer of the units."""
    dtype: str
    """NumPy name of the token type."""
    sources: tuple[SourceFile, ...]
    """In reading order."""
    units: tuple[Unit, ...]
    """In reading order."""
    skipped: dict[str, int]
    """What was left out while planning, by kind."""
    rejected: tuple[Rejected, ...]
    """The bad data among it."""

    @classmethod
    def load(cls, folder: Path) -> "Plan | None":
        """Reads the plan of a folder, None when there is none.

        Raises:
            TokenizationError: The file is damaged or of another version.
        """
        path = folder / PLAN_NAME
        try:
            text = path.read_bytes()
            record = json.loads(text)
            if record["version"] != PLAN_VERSION:
                raise TypeError(f"version {record['version']}, this code reads {PLAN_VERSION}")
            plan = from_json(cls, text, "plan")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, KeyError) as fault:
            raise TokenizationError(f"{path}: damaged ({fault}); start anew with --overwrite") from fault
        return plan

    def save_once(self, folder: Path) -> "Plan":
        """Writes the plan unless there is one, and returns the one that is there."""
        write_file_once(folder / PLAN_NAME, (json.dumps(asdict(self), ensure_ascii=False) + "\n").encode())
        saved = Plan.load(folder)
        assert saved is not None
        return saved

    def difference(self, settings: EncodingSettings, tokenizer: TokenizerInfo, dtype: str) -> str | None:
        """Says what is asked for now that the plan was not made for; None when nothing is."""
        if self.tokenizer != tokenizer:
            return "made with another tokenizer"
        if self.dtype != dtype:
            return f"made as {self.dtype}, not {dtype}"
        return self.settings.difference(settings)

    def source_difference(self, sources: Sequence[SourceFile]) -> str | None:
        """Says which source is not what it was; None when all are."""
        if len(self.sources) != len(sources):
            return f"made from {len(self.sources):,} files, not {len(sources):,}"
        for old, new in zip(self.sources, sources, strict=True):
            if old.path != new.path:
                return f"made from {old.path}, where now {new.path} stands"
            if old != new:
                return f"made before {new.path} was changed"
        return None


def plan_units(sources: Sequence[SourceFile], unit_bytes: int, skipped: Skipped) -> tuple[Unit, ...]:
    """Cuts sources into units of about `unit_bytes` of text.

    Parquet is cut between row groups and .jsonl anywhere (a line belongs to where it starts); a compressed .jsonl and
    a text file are one piece, and small files share a unit.

    Args:
        sources: In reading order.
        unit_bytes: Wanted size.
        skipped: Receives Parquet files without a readable footer.

    Returns:
        Units in reading order.
    """
    units: list[Unit] = []
    spans: list[PlannedSpan] = []
    weight = 0
    for span in _all_spans(sources, unit_bytes, skipped):
        spans.append(span)
        weight += span.weight
        if weight >= unit_bytes * 2 / 3:  # equal parts of a .jsonl are no smaller, and each makes a unit
            units.append(Unit(tuple(spans)))
            spans, weight = [], 0
    if spans:
        units.append(Unit(tuple(spans)))
    return tuple(units)


def _all_spans(sources: Sequence[SourceFile], unit_bytes: int, skipped: Skipped) -> Iterator[PlannedSpan]:
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        for number, (source, footer) in enumerate(zip(sources, pool.map(_footer, sources), strict=True)):
            if isinstance(footer, str):
                kind, _, detail = footer.partition(": ")
                skipped.add(kind, source.path, detail=detail)
            elif source.suffix == ".parquet":
                yield from _row_spans(number, footer, unit_bytes)
            elif source.suffix == ".jsonl":
                count = max(1, round(source.bytes / unit_bytes))
                ends = [source.bytes * part // count for part in range(count + 1)]
                for start, stop in pairwise(ends):
                    yield PlannedSpan(number, start, stop, stop - start)
            else:
                yield PlannedSpan(number, 0, source.bytes, source.bytes * _EXPANSION.get(source.suffix, 1))


def _footer(source: SourceFile) -> Any:
    """Row groups of a Parquet file, or the kind and the detail of what is wrong with it."""
    if source.suffix != ".parquet":
        return ()
    try:
        return row_groups(source)
    except BrokenFile as fault:
        return f"broken_file: {fault}"
    except OSError as fault:
        return f"unreadable_file: {fault.strerror or fault}"


def _row_spans(number: int, groups: Sequence[Any], unit_bytes: int) -> Iterator[PlannedSpan]:
    start = weight = 0
    for group in groups:
        weight += group.text_bytes
        if weight >= unit_bytes or group is groups[-1]:
            yield PlannedSpan(number, start, group.first_row + group.rows, weight)
            start, weight = group.first_row + group.rows, 0
