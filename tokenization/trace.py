"""From a token back to the text it came from: `python -m tokenization.trace --shard SHARDS/train --token N`."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from tokenization.command_line import TokenizationError, parse_settings, run_command
from tokenization.cutting import Cutter
from tokenization.documents import text_or_kind
from tokenization.lines import LINE_SUFFIXES, read_line
from tokenization.manifest import ORIGIN, Manifest
from tokenization.parquet import read_rows, row_groups
from tokenization.records import BrokenFile, SourceRow, Span
from tokenization.remote import open_source
from tokenization.shards import import_indexed_dataset
from tokenization.sources import STDLIB_SUFFIXES, SUFFIXES, SourceFile, suffix_of
from tokenization.tokenizer import TOKENIZER_JSON, TOKENIZER_NAME, load_tokenizer
from tokenization.units import encode_long

_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Trace:
    """Where a token comes from."""

    source: str
    """File."""
    row: int
    """Row of a .parquet, line of a .jsonl or document of an adopted dataset, from 0."""
    document: int
    """Place in the shard, from 0."""
    token_in_document: int
    """From 0, which is the start token."""
    tokens: int
    """Of the document."""
    fields: dict[str, Any]
    """What else the source says of the document: id, url, dump, ..."""
    text: str
    """The document's."""


def trace(shard: Path, token: int) -> Trace:
    """Finds the document of a token and reads it again.

    Args:
        shard: A dataset in its folder, with or without suffix: shards/train, shards/train-00003.bin.
        token: Place in the dataset, from 0.

    Returns:
        The document; its text gives exactly the shard's tokens. Of an adopted dataset, whose text is
        not at hand: its place there, and what its tokens say, or they themselves where that is not known here.

    Raises:
        TokenizationError: No such shard or token, or the source is not what it was.
    """
    folder, prefix = shard.parent, shard.name.removesuffix(".bin").removesuffix(".idx")
    manifest = Manifest.load(folder)
    known = [one.prefix for split in manifest.splits.values() for one in split.datasets]
    if prefix not in known:
        raise TokenizationError(f"--shard {shard}: the manifest lists {', '.join(known[:9])}; give one of them")
    index = import_indexed_dataset().IndexedDataset(str(folder / prefix))
    ends = numpy.cumsum(index.sequence_lengths, dtype=numpy.int64)
    if not 0 <= token < ends[-1]:
        raise TokenizationError(f"--token {token}: the shard has the tokens 0 to {ends[-1] - 1:,}; give one of them")
    document = int(numpy.searchsorted(ends, token, side="right"))
    expected = index[document]
    source, row = origin_of(manifest, folder / prefix, document)
    in_document = token - int(ends[document] - len(expected))
    if manifest.tokenizer.file == TOKENIZER_JSON:
        return Trace(source, row, document, in_document, len(expected), {}, f"tokens {expected.tolist()}")
    processor = load_tokenizer(folder / TOKENIZER_NAME)
    if manifest.adopted:
        text = processor.decode([one for one in expected.tolist() if not processor.is_control(one)])
        return Trace(source, row, document, in_document, len(expected), {}, text)
    text, fields = _read(source, row)
    tokens = encode_long(processor, Cutter(processor, (folder / TOKENIZER_NAME).read_bytes()), text)
    if not numpy.array_equal(numpy.concatenate(list(tokens)), expected):
        raise TokenizationError(f"{source}: row {row:,} no longer gives these tokens; it was changed")
    return Trace(source, row, document, in_document, len(expected), fields, text)


def origin_of(manifest: Manifest, prefix: Path, document: int) -> tuple[str, int]:
    """Source file and row of a dataset's document, counted from 0.

    Raises:
        TokenizationError: The list of origins beside the dataset is missing.
    """
    origins = prefix.with_name(f"{prefix.name}.rows")
    if not origins.is_file():
        raise TokenizationError(f"{origins}: missing; without it nothing is traced, encode again")
    origin = numpy.fromfile(origins, ORIGIN, count=1, offset=document * numpy.dtype(ORIGIN).itemsize)[0]
    return manifest.sources[int(origin["source"])].path, int(origin["row"])


def _read(path: str, row: int) -> tuple[str, dict[str, Any]]:
    suffix = suffix_of(path, (*SUFFIXES, *STDLIB_SUFFIXES))
    assert suffix is not None
    source = SourceFile(path, suffix, os.path.getsize(path) if os.path.exists(path) else 1)
    try:
        record = _record(source, row)
    except (OSError, BrokenFile) as fault:
        raise TokenizationError(f"{path}: cannot be read ({fault}); put the file back") from fault
    text = text_or_kind(record.value, _NO_LIMIT) if record is not None else None
    if not isinstance(text, str):
        raise TokenizationError(f"{path}: row {row:,} holds no text now; it was changed")
    assert record is not None
    return text, {name: value for name, value in record.fields.items() if name != "text"}


def _record(source: SourceFile, row: int) -> SourceRow | None:
    if source.suffix in LINE_SUFFIXES:
        return read_line(source, row)
    if source.suffix == ".parquet":
        first = max((group.first_row for group in row_groups(source) if group.first_row <= row), default=0)
        return next((one for one in read_rows(source, Span(first, first + 1), ("*",)) if one.row == row), None)
    with open_source(source.path) as file:
        return SourceRow(0, file.read().removeprefix(b"\xef\xbb\xbf"), 1.0)


@dataclass(frozen=True)
class TraceSettings:
    """Prints the source, the row and the text of the document that a token of a shard belongs to."""

    shard: Path
    """A dataset in a folder of shards: shards/train, shards/train-00003, shards/heldout."""
    token: int
    """Place of the token in it, from 0."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(TraceSettings, "python -m tokenization.trace", arguments)
    found = trace(settings.shard, settings.token)
    print(f"source: {found.source}")
    print(f"row: {found.row}")
    print(f"document: {found.document} of the shard, token {found.token_in_document} of its {found.tokens}")
    for name, value in found.fields.items():
        print(f"{name}: {json.dumps(value, ensure_ascii=False, default=str)}")
    print(f"text:\n{found.text}")


if __name__ == "__main__":
    run_command(main)
