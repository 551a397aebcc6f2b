"""Reading Parquet by row groups and small batches, local or on the hub; one damaged row group costs itself alone."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tokenization.records import BrokenFile, Kind, SourceRow, Span
from tokenization.remote import is_remote, open_source
from tokenization.sources import SourceFile

_PAGE_BUFFER_BYTES = 1 << 20
_SMALL_GROUP_BYTES = 64 << 20


@dataclass(frozen=True)
class RowGroup:
    """A row group as the footer describes it."""

    first_row: int
    """In the file, from 0."""
    rows: int
    """How many."""
    text_bytes: int
    """Of the text column, decompressed."""


def row_groups(source: SourceFile) -> list[RowGroup]:
    """Reads the footer of a file.

    Raises:
        BrokenFile: It is no Parquet file.
        OSError: It cannot be opened.
    """
    found, first_row = [], 0
    with _opened(source) as file:
        for index in range(file.num_row_groups):
            group = file.metadata.row_group(index)
            found.append(RowGroup(first_row, group.num_rows, _text_bytes(group)))
            first_row += group.num_rows
    return found


def read_rows(source: SourceFile, span: Span | None, columns: tuple[str, ...]) -> Iterator[SourceRow]:
    """Yields the rows of the row groups that start inside a span.

    Args:
        source: The file.
        span: Rows; None for all.
        columns: Wanted beside `text`; those the file lacks are None in every row.

    Yields:
        Records; a Kind stands for rows that cannot be decoded, or that have no text column.

    Raises:
        BrokenFile: It is no Parquet file.
        OSError: It cannot be opened.
    """
    with _opened(source) as file:
        row, part = 0, span or Span(0, file.metadata.num_rows)
        for index in range(file.num_row_groups):
            group = file.metadata.row_group(index)
            if part.start <= row < part.stop:
                share = (row - part.start) / (part.stop - part.start)
                yield from _group_rows(file, index, row, columns, share)
            row += group.num_rows


def _group_rows(file: Any, index: int, row: int, columns: tuple[str, ...], share: float) -> Iterator[SourceRow]:
    import pyarrow

    group = file.metadata.row_group(index)
    counted = Counter(file.schema_arrow.names)
    # Of two columns of one name neither can be asked for.
    last, names = row + group.num_rows, {name for name, count in counted.items() if count == 1}
    if counted["text"] > 1:
        raise BrokenFile("two of its columns are called text; rename one")
    if "text" not in names:
        detail = f"the columns are {', '.join(sorted(names))}"[:200]
        yield SourceRow(last - 1, Kind("missing_text", group.num_rows, detail), share)
        return
    wanted = ["text", *(names - {"text"} if columns == ("*",) else (name for name in columns if name in names))]
    # Few rows at once where single ones may be large: Arrow's memory grows with the batch.
    large = 1 if _text_bytes(group) > group.num_rows << 20 else 8
    rows = 256 if _text_bytes(group) <= _SMALL_GROUP_BYTES else large
    try:
        for batch in file.iter_batches(rows, row_groups=[index], columns=wanted):
            values = _column_values(batch.column("text"))
            fields = [_plain_values(batch.column(name)) for name in wanted[1:]]
            del batch  # its documents are held by `values` alone, and by that no longer than needed
            for number in range(len(values)):
                one = {n: f[number] for n, f in zip(wanted[1:], fields, strict=True)}
                yield SourceRow(row, values[number], share, one)
                values[number] = None
                row += 1
    except (pyarrow.ArrowException, OSError) as fault:
        detail = f"rows {row:,} to {last - 1:,}: {str(fault).splitlines()[0][:200]}"
        yield SourceRow(last - 1, Kind("broken_rows", last - row, detail), share)


def _text_bytes(group: Any) -> int:
    columns = (group.column(index) for index in range(group.num_columns))
    text = next((column for column in columns if column.path_in_schema == "text"), None)
    return int(group.total_byte_size if text is None else text.total_uncompressed_size)


@contextmanager
def _opened(source: SourceFile) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    with open_source(source.path) as stream:
        try:
            file = pyarrow.parquet.ParquetFile(
                stream if is_remote(source.path) else source.path,
                pre_buffer=False,
                buffer_size=_PAGE_BUFFER_BYTES,
                page_checksum_verification=True,
            )
        except (pyarrow.ArrowException, OSError) as fault:
            raise BrokenFile(str(fault).splitlines()[0][:200]) from fault
        with file:
            yield file


def _column_values(column: Any) -> list[Any]:
    """Strings come as bytes: Arrow would refuse a whole batch for one value that is not UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kinds = pyarrow.types
    if kinds.is_string(column.type) or kinds.is_large_string(column.type) or kinds.is_string_view(column.type):
        column = column.cast(pyarrow.large_binary())
    return [value.as_py() for value in column]


def _plain_values(column: Any) -> list[Any]:
    """A field beside the text that is not UTF-8 is as good as none."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [None] * len(column)
