"""The documents inside a source, one after the other: memory holds one document or one block, never a file.

Damage never stops a reader. What cannot be used is reported to `Skipped` under its kind (see there) and left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tokenization.lines import LINE_SUFFIXES, read_lines
from tokenization.parquet import read_rows
from tokenization.records import BrokenFile, Kind, Skipped, SourceRow, Span
from tokenization.remote import open_source
from tokenization.settings import Filters
from tokenization.sources import SourceFile

DEFAULT_MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class SourceDocument:
    """A text and where it came from."""

    text: str
    """At least one character that is not whitespace."""
    row: int
    """Line or row, from 0, so that a document can be found again; from the start of the span in a .jsonl."""
    share: float
    """Of the span read so far, up to 1; measures progress only."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Other fields or columns that were asked for."""


class Reader:
    """Reads the documents of a span. After iteration `rows` and `seen` say how many there were."""

    def __init__(
        self,
        source: SourceFile,
        span: Span | None = None,
        *,
        skipped: Skipped,
        filters: Filters | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        """Nothing is opened before iteration.

        Args:
            source: The file.
            span: Part of it; None for all.
            skipped: Receives everything that is left out.
            filters: What the user wants.
            max_bytes: Largest document; bounds the memory.
        """
        self._source = source
        self._span = span
        self._skipped = skipped
        self._filters = filters or Filters()
        self._max_bytes = max_bytes
        self.rows = 0
        """Rows or lines passed."""
        self.seen = 0
        """Documents among them, used or not."""

    def __iter__(self) -> Iterator[SourceDocument]:
        """Yields the documents in the order of the file."""
        first_row = self._span.start if self._span is not None and self._source.suffix == ".parquet" else 0
        try:
            for record in self._records():
                self.rows = record.row + 1 - first_row
                if record.is_document:
                    yield from self._document(record)
        except BrokenFile as fault:
            self._add(Kind("broken_file", detail=str(fault)), first_row + self.rows)
        except OSError as fault:
            self._add(Kind("unreadable_file", detail=fault.strerror or str(fault)), None)

    def _document(self, record: SourceRow) -> Iterator[SourceDocument]:
        text = text_or_kind(record.value, self._max_bytes)
        self.seen += text.rows if isinstance(text, Kind) else 1
        if isinstance(text, Kind):
            self._add(text, record.row - text.rows + 1)
        elif (verdict := self._filters.verdict(text, record.fields)) is not None:
            self._add(Kind(verdict), record.row)
        else:
            yield SourceDocument(text, record.row, record.share, record.fields)

    def _add(self, kind: Kind, row: int | None) -> None:
        self._skipped.add(kind.name, self._source.path, row, kind.rows, kind.detail)

    def _records(self) -> Iterator[SourceRow]:
        columns = self._filters.columns
        if self._source.suffix in LINE_SUFFIXES:
            return read_lines(self._source, self._span, columns, self._max_bytes)
        if self._source.suffix == ".parquet":
            return read_rows(self._source, self._span, columns)
        return _whole_file(self._source, self._max_bytes)


def text_or_kind(value: Any, max_bytes: int) -> str | Kind:
    """Returns the text in a field, or why there is none that can be used."""
    if isinstance(value, Kind):
        return value
    if value is None:
        return Kind("missing_text")
    if not isinstance(value, bytes | str):
        return Kind("text_not_string", detail=f"a {type(value).__name__}")
    if len(value) > max_bytes:
        return Kind("document_too_large", detail=f"{len(value):,} bytes, --max-document-mb allows {max_bytes:,}")
    try:
        text = value.decode() if isinstance(value, bytes) else value
        size = len(value) if isinstance(value, bytes) or value.isascii() else len(value.encode())
    except (UnicodeDecodeError, UnicodeEncodeError) as fault:  # whose repr would hold text of the document
        return Kind("invalid_utf8", detail=f"{fault.reason} at {fault.start:,}")
    if size > max_bytes:
        return Kind("document_too_large", detail=f"{size:,} bytes, --max-document-mb allows {max_bytes:,}")
    if not text or text.isspace():
        return Kind("empty_text")
    if "\0" in text:
        return Kind("null_character", detail=f"character {text.index(chr(0)):,} is U+0000")
    return text


def _whole_file(source: SourceFile, max_bytes: int) -> Iterator[SourceRow]:
    with open_source(source.path) as file:
        data = file.read(max_bytes + 4)
    if len(data) > max_bytes:
        detail = f"{source.bytes:,} bytes, --max-document-mb allows {max_bytes:,}"
        yield SourceRow(0, Kind("document_too_large", detail=detail), 1.0)
    else:
        yield SourceRow(0, data.removeprefix(b"\xef\xbb\xbf"), 1.0)
