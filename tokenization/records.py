"""What every reader of a file format yields."""

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
    """Stands in a reader's stream where there is no text, and says why; the names are in `tokenization.skipped`."""

    name: str
    rows: int = 1
    """Documents it stands for."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Record:
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
