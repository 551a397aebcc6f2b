"""Reading .jsonl, .jsonl.gz, .jsonl.zst, .json.gz and .json.zst: a line at a time, whatever its length."""

import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from tokenization.progress import Progress
from tokenization.records import BrokenFile, Kind, SourceRow, Span
from tokenization.remote import open_source
from tokenization.sources import SourceFile

_BLOCK_BYTES = 1 << 20
# Compressed bytes at once, so that even what is mostly repetition (1,000 times smaller as gzip, 30,000 times as
# Zstandard) comes in blocks below 64 MB.
_GZIP_BLOCK_BYTES, _ZSTD_BLOCK_BYTES = 1 << 14, 1 << 11
# What zstd --long=31 looks back, and a worker then holds: the most that the format's own tool writes.
_ZSTD_WINDOW_BYTES = 1 << 31
_NO_LIMIT = 1 << 62
_MOST_DIGITS = 300
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_lines(
    source: SourceFile, span: Span | None, columns: tuple[str, ...], max_line_bytes: int
) -> Iterator[SourceRow]:
    """Yields the lines that start inside a span; a compressed file has one span only.

    Args:
        source: The file.
        span: Bytes of a .jsonl; None for all.
        columns: Fields wanted beside `text`.
        max_line_bytes: Longer lines are passed over without being held.

    Yields:
        A record a line, blank ones included; rows count from the start of the span.

    Raises:
        BrokenFile: The compressed stream is damaged or ends early.
    """
    decompress = _DECOMPRESSORS[source.suffix]
    start, stop = (span.start, span.stop) if span is not None and source.suffix == ".jsonl" else (0, None)
    with open_source(source.path) as file:
        position = _next_line_start(file, start)
        began = position
        for row, (line, length) in enumerate(split_lines(decompress(file), max_line_bytes, at_start=start == 0)):
            if stop is not None and position >= stop:
                return
            position += length
            share = file.tell() / source.bytes if stop is None else (position - began) / max(stop - start, 1)
            if line is None:
                detail = f"a line of {length:,} bytes, --max-document-mb allows {max_line_bytes:,}"
                yield SourceRow(row, Kind("document_too_large", detail=detail), share)
            elif line.strip():
                value, fields = _text_field(line, columns)
                yield SourceRow(row, value, share, fields)
            else:
                yield SourceRow(row, None, share, is_document=False)


def read_line(source: SourceFile, row: int) -> SourceRow | None:
    """Returns one line with all its fields, None when the file has fewer.

    Raises:
        BrokenFile: The compressed stream is damaged before it.
    """
    with open_source(source.path) as file, Progress("of what stands before it read", source.bytes) as progress:
        place = 0
        for number, (line, _) in enumerate(split_lines(_DECOMPRESSORS[source.suffix](file), _NO_LIMIT)):
            if number == row:
                assert line is not None
                value, fields = _text_field(line, ("*",))
                return SourceRow(row, value, 1.0, fields)
            if (now := file.tell()) != place:
                progress.advance(now - place, 0)
                place = now
    return None


def split_lines(
    blocks: Iterator[bytes], max_line_bytes: int, *, at_start: bool = True
) -> Iterator[tuple[bytes | None, int]]:
    """Splits at line feeds; a line over many blocks is joined once, so its cost stays linear.

    Args:
        blocks: The bytes in order.
        max_line_bytes: Longest line that is held.
        at_start: Whether the first block begins the file, where a byte order mark may stand.

    Yields:
        Each line without its line feed (None when it is too long) and how many bytes it took with it.
    """
    pending: list[bytes] = []
    length = 0  # of the line so far; what is beyond the limit is counted and dropped
    for block in blocks:
        start = 0
        while start < len(block):
            end = block.find(b"\n", start)
            part = block[start : len(block) if end < 0 else end]
            length += len(part)
            if length <= max_line_bytes:
                pending.append(part)
            else:
                pending.clear()
            if end < 0:
                break
            yield _joined(pending, length, max_line_bytes, at_start), length + 1
            pending, length, at_start, start = [], 0, False, end + 1
    if length:
        yield _joined(pending, length, max_line_bytes, at_start), length


def _joined(parts: list[bytes], length: int, max_line_bytes: int, at_start: bool) -> bytes | None:
    if length > max_line_bytes:
        return None
    line = b"".join(parts)
    return line.removeprefix(_BYTE_ORDER_MARK) if at_start else line


def _next_line_start(file: BinaryIO, start: int) -> int:
    """Goes to the first line that starts at or after a byte, and returns where that is."""
    if start == 0:
        return 0
    file.seek(start - 1)
    position = start - 1
    while block := file.readline(_BLOCK_BYTES):
        position += len(block)
        if block.endswith(b"\n"):
            break
    return position


def _text_field(line: bytes, columns: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    try:
        record = _parsed(line.decode("utf-8"))
    except UnicodeDecodeError as fault:
        return Kind("invalid_utf8", detail=f"{fault.reason} at byte {fault.start:,}"), {}
    except (ValueError, RecursionError) as fault:
        return Kind("bad_json", detail=str(fault)[:200]), {}
    if not isinstance(record, dict):
        return Kind("bad_json", detail=f"a {type(record).__name__}, not an object"), {}
    fields = record if columns == ("*",) else {name: record.get(name) for name in columns}
    if "text" not in record:
        return Kind("missing_text", detail=f"the fields are {', '.join(sorted(record))}"[:200]), fields
    return record["text"], fields


def _parsed(text: str) -> Any:
    """The value of a line; a whole number of more digits than Python reads at once becomes a float."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(text, parse_int=lambda digits: float(digits) if len(digits) > _MOST_DIGITS else int(digits))


def _plain(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        yield block


def _gunzipped(file: BinaryIO) -> Iterator[bytes]:
    """Of a damaged file, gzip's own reader would also lose the megabyte before the damage."""
    try:
        yield from _frames(file, lambda: zlib.decompressobj(wbits=31), _GZIP_BLOCK_BYTES, padding=b"\0")
    except zlib.error as fault:
        raise BrokenFile(str(fault)) from fault


def _unzstd(file: BinaryIO) -> Iterator[bytes]:
    """The decompressor object knows whether the frame ended; zstandard's stream reader takes a cut file for whole."""
    import zstandard

    begin = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj
    try:
        yield from _frames(file, begin, _ZSTD_BLOCK_BYTES)
    except zstandard.ZstdError as fault:
        raise BrokenFile(str(fault)) from fault


def _frames(file: BinaryIO, begin: Callable[[], Any], block_bytes: int, padding: bytes = b"") -> Iterator[bytes]:
    """Decompresses frame after frame; `padding` may stand between them and at the end."""
    frame = None
    while block := file.read(block_bytes):
        while block := block if frame else block.lstrip(padding):
            frame = frame or begin()
            yield frame.decompress(block)
            block = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise BrokenFile("the file ends early")


_DECOMPRESSORS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {
    ".jsonl": _plain,
    ".jsonl.gz": _gunzipped,
    ".jsonl.zst": _unzstd,
    ".json.gz": _gunzipped,
    ".json.zst": _unzstd,
}
LINE_SUFFIXES = frozenset(_DECOMPRESSORS)
