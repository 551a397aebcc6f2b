"""What every reader yields, and what was left out, by kind. Every reader reports it, so that nothing vanishes.

Bad data is counted, listed one by one in rejected.jsonl, and weighed against --max-rejected:

    invalid_utf8         bytes that are not UTF-8, or text that cannot be written as UTF-8 (a lone surrogate)
    empty_text           nothing but whitespace
    null_character       text with U+0000 in it: binary data
    bad_json             a line that is not a JSON object
    missing_text         no `text` field or column, or null in it
    text_not_string      a `text` that is a number, a list, ...
    missing_score        a filter on the score, and no number in `score`
    missing_language     a filter on the language, and no string in `language`
    document_too_large   more bytes than --max-document-mb
    text_without_cut     too long for one call of sentencepiece, with no place to cut that leaves its tokens the same
    broken_rows          rows of a Parquet file that cannot be decoded
    broken_file          a file that ends early or is no gzip, Zstandard or Parquet; what came before is kept
    unreadable_file      a file that the system refuses to read

What the user asked to leave out is counted alone: filtered_score, filtered_language, filtered_short, filtered_long,
duplicate (a text that came before), repeated_file (a file named twice). So is what is not read in a folder that was
named: shard_folder (what encode wrote is no text), other_type.pdf and so on (files that are no text here).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


class BrokenFile(Exception):
    """The file ends early or is not of its type."""


@dataclass(frozen=True)
class Span:
    """A part of a source: rows of a .parquet, bytes of a .jsonl (the lines that start there), or all of a file."""

    start: int
    """First row or byte."""
    stop: int
    """Row or byte behind the last."""


@dataclass(frozen=True)
class Kind:
    """Stands in a reader's stream where there is no text, and says why."""

    name: str
    rows: int = 1
    """Documents it stands for."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row or line, whatever is in it."""

    row: int
    """From 0; the last one where a Kind stands for several."""
    value: Any
    """The content of `text`, or a Kind."""
    share: float
    """Of the span read so far, up to 1; measures progress only."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Other fields that were asked for."""
    is_document: bool = True
    """False for a blank line, which counts as a row alone."""


_FILTERED = {f"filtered_{by}" for by in ("score", "language", "short", "long")}
_ASKED_FOR = _FILTERED | {"duplicate", "repeated_file", "shard_folder"}


@dataclass(frozen=True)
class Rejected:
    """A line of rejected.jsonl."""

    reason: str
    """The kind."""
    source: str
    """File."""
    row: int | None
    """Row of a .parquet or line of a .jsonl, from 0; null where the whole file is meant."""
    rows: int
    """How many documents it stands for, from that row on; 1 for a file of unknown content."""
    detail: str
    """What the reader said."""


@dataclass
class Skipped:
    """Counts what is left out and hands bad data on."""

    counts: Counter[str] = field(default_factory=Counter)
    """Kind to number of documents (or of files, for kinds that end in `_file`)."""
    list_rejected: Callable[[Rejected], None] | None = None
    """Receives each piece of bad data; None counts only."""

    def add(self, kind: str, source: str = "", row: int | None = None, rows: int = 1, detail: str = "") -> None:
        """Counts one thing left out (or `rows` documents at once)."""
        self.counts[kind] += rows
        if self.list_rejected is not None and is_bad(kind):
            self.list_rejected(Rejected(kind, source, row, rows, detail))

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.counts.items())) or "nothing"


def is_bad(kind: str) -> bool:
    """Says whether a kind is bad data rather than something the user asked to leave out."""
    return kind not in _ASKED_FOR and not kind.startswith("other_type")


def rejected_documents(counts: Mapping[str, int]) -> int:
    """Returns how many documents are bad data."""
    return sum(count for kind, count in counts.items() if is_bad(kind) and not kind.endswith("_file"))


def broken_files(counts: Mapping[str, int]) -> int:
    """Returns how many files are bad data; each may have held any number of documents."""
    return sum(count for kind, count in counts.items() if is_bad(kind) and kind.endswith("_file"))
