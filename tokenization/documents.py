"""The documents inside a source, one after the other: memory holds one document or one block, never a file.

Damage never stops a reader. What cannot be used is counted under its kind and left out:

    invalid_utf8        bytes that are not UTF-8, or text that cannot be written as UTF-8 (a lone surrogate)
    empty_text          nothing but whitespace
    bad_json            a line that is not a JSON object
    missing_text        no `text` field or column, or null in it
    text_not_string     a `text` that is a number, a list, ...
    broken_file         a file that ends early or is no gzip, Zstandard or Parquet; what came before is kept
    unreadable_file     a file that the system refuses to read
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from tokenization.sources import Skipped, Source

_BLOCK_BYTES = 1 << 20
_PARQUET_ROWS = 256


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it came from."""

    text: str
    """At least one character that is not whitespace."""
    row: int
    """Line of a .jsonl or row of a .parquet, from 0, so that a document can be found again."""
    offset: int
    """Bytes of the source file read so far; of a Parquet file its share by rows. Measures progress only."""


class _BrokenFile(Exception):
    """The file ends early or is not of its type."""


def read_documents(source: Source, skipped: Skipped) -> Iterator[Document]:
    """Yields the usable documents of a source in order.

    Args:
        source: The file.
        skipped: Receives every document and file that is left out, by kind.

    Yields:
        Documents with text in them.
    """
    values = _READERS.get(source.suffix, _whole_file)
    row = -1
    try:
        for row, (value, offset) in enumerate(values(source)):
            text = _text_or_kind(value)
            if isinstance(text, _Kind):
                skipped.add(text.name)
            else:
                yield Document(text, row, offset)
    except _BrokenFile:
        skipped.add("broken_file")
    except OSError:
        skipped.add("unreadable_file")


@dataclass(frozen=True)
class _Kind:
    """Stands in a reader's stream where there is no text, and says why."""

    name: str


def _text_or_kind(value: Any) -> str | _Kind:
    if isinstance(value, _Kind):
        return value
    if value is None:
        return _Kind("missing_text")
    try:
        if isinstance(value, bytes):
            value = value.decode("utf-8")
        elif isinstance(value, str):
            value.encode("utf-8")
        else:
            return _Kind("text_not_string")
    except UnicodeError:
        return _Kind("invalid_utf8")
    return value if value and not value.isspace() else _Kind("empty_text")


def _whole_file(source: Source) -> Iterator[tuple[Any, int]]:
    data = source.path.read_bytes()
    yield data.removeprefix(b"\xef\xbb\xbf"), len(data)


def _json_lines(decompressed: Callable[[BinaryIO], Iterator[bytes]]) -> Callable[[Source], Iterator[tuple[Any, int]]]:
    def read(source: Source) -> Iterator[tuple[Any, int]]:
        with source.path.open("rb") as file:
            for line in _lines(decompressed(file)):
                if line.strip():
                    yield _text_field(line), file.tell()

    return read


def _text_field(line: bytes) -> Any:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return _Kind("invalid_utf8")
    except (ValueError, RecursionError):
        return _Kind("bad_json")
    return record.get("text") if isinstance(record, dict) else _Kind("bad_json")


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Splits at line feeds; a line over many blocks is joined once, so its cost stays linear."""
    pending: list[bytes] = []
    first = True
    for block in blocks:
        if first:
            block, first = block.removeprefix(b"\xef\xbb\xbf"), False
        *complete, rest = block.split(b"\n")
        for line in complete:
            yield b"".join([*pending, line])
            pending = []
        pending.append(rest)
    yield b"".join(pending)


def _plain(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        yield block


def _gunzipped(file: BinaryIO) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            while block := stream.read(_BLOCK_BYTES):
                yield block
    except (EOFError, gzip.BadGzipFile, zlib.error) as fault:
        raise _BrokenFile from fault


def _unzstd(file: BinaryIO) -> Iterator[bytes]:
    """The decompressor object knows whether the frame ended; zstandard's stream reader takes a cut file for whole."""
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    inside = False
    try:
        while block := file.read(_BLOCK_BYTES // 8):
            while block:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                inside = True
                yield frame.decompress(block)
                block, inside = frame.unused_data, not frame.eof
    except zstandard.ZstdError as fault:
        raise _BrokenFile from fault
    if inside:
        raise _BrokenFile


def _parquet_rows(source: Source) -> Iterator[tuple[Any, int]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source.path, pre_buffer=False) as file:
            if "text" not in file.schema_arrow.names:
                yield from ((None, 0) for _ in range(file.metadata.num_rows))
                return
            rows_total, rows = file.metadata.num_rows, 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=["text"]):
                for value in _column_values(batch.column(batch.schema.names.index("text"))):
                    rows += 1
                    yield value, source.bytes * rows // rows_total
    except (pyarrow.ArrowException, OSError) as fault:
        raise _BrokenFile from fault


def _column_values(column: Any) -> Iterator[Any]:
    """Strings come as bytes: Arrow would refuse a whole batch for one value that is not UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kinds = pyarrow.types
    if kinds.is_string(column.type) or kinds.is_large_string(column.type) or kinds.is_string_view(column.type):
        column = column.cast(pyarrow.large_binary())
    return (value.as_py() for value in column)


_READERS: dict[str, Callable[[Source], Iterator[tuple[Any, int]]]] = {
    ".jsonl": _json_lines(_plain),
    ".jsonl.gz": _json_lines(_gunzipped),
    ".jsonl.zst": _json_lines(_unzstd),
    ".parquet": _parquet_rows,
}
