"""One unit of work: documents in, tokens and a table of documents out, and a marker when all of it is on the disk.

OUTPUT/work/units/00000012.tokens          the documents' tokens one behind the other, in the plan's token type
OUTPUT/work/units/00000012.documents       a row of DOCUMENT for each
OUTPUT/work/units/00000012.rejected.jsonl  [span of the unit, line of rejected.jsonl] for each piece of bad data
OUTPUT/work/units/00000012.json            the marker, written last: the unit is done when it is there
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy

from titans_mcore.io import PartialFile, read_marker, sha256_of, write_file_atomically
from tokenization.command_line import TokenizationError
from tokenization.cutting import CUT_ABOVE_CHARACTERS, Cutter, TextWithoutCut
from tokenization.documents import Reader, SourceDocument
from tokenization.plan import Plan, PlannedSpan
from tokenization.records import Rejected, Skipped
from tokenization.remote import is_remote
from tokenization.selection import hash_position
from tokenization.sources import SourceFile
from tokenization.tokenizer import TOKENIZER_NAME, load_tokenizer
from tokenization.workers import Report

DOCUMENT = numpy.dtype(
    [
        ("digest_high", "<u8"),  # BLAKE2b of the text, 128 bits: equal texts, and in practice no others, are equal
        ("digest_low", "<u8"),
        ("position", "<f8"),  # decides between train and held-out
        ("tokens", "<i4"),
        ("source", "<u4"),  # place in the plan's sources
        ("row", "<i8"),  # in the source; in a .jsonl from the start of the span
    ]
)
PARTS = ("tokens", "documents", "rejected.jsonl")
_BATCH_CHARACTERS = 1 << 18
_BATCH_DOCUMENTS = 1_024


@dataclass(frozen=True)
class UnitResult:
    """The content of a marker."""

    documents: int
    """Encoded."""
    tokens: int
    """Start and end tokens included."""
    seen: int
    """Documents read, used or not."""
    rows: tuple[int, ...]
    """Rows or lines of each span."""
    skipped: dict[str, int]
    """What was left out, by kind."""
    sha256: dict[str, str]
    """Hash of each local source that begins in this unit, by its place in the plan."""
    bytes: dict[str, int]
    """Sizes of the unit's files."""


def units_folder(output: Path) -> Path:
    """Returns where the units lie."""
    return output / "work" / "units"


def part_path(output: Path, number: int, part: str) -> Path:
    """Returns the path of one of a unit's files."""
    return units_folder(output) / f"{number:08d}.{part}"


def load_result(output: Path, number: int) -> UnitResult | None:
    """Returns the marker of a unit, None while it is not done."""
    return read_marker(part_path(output, number, "json"), UnitResult)


class UnitEncoder:
    """Encodes units of a plan; each worker has one."""

    def __init__(self, output: Path) -> None:
        """Loads plan and tokenizer from the output folder."""
        plan = Plan.load(output)
        assert plan is not None
        self._plan, self._output = plan, output
        self._processor = load_tokenizer(output / TOKENIZER_NAME)
        self._cutter = Cutter(self._processor, (output / TOKENIZER_NAME).read_bytes())

    def __call__(self, number: int, report: Report) -> None:
        """Encodes a unit and marks it done.

        Args:
            number: Place in the plan.
            report: Receives progress.

        Raises:
            TokenizationError: A source is no longer what was planned, or cannot be reached.
        """
        unit = self._plan.units[number]
        with _UnitWriter(self._output, number, self._plan.dtype) as writer:
            for place, span in enumerate(unit.spans):
                self._encode_span(place, span, writer, report)
            writer.finish()

    def _encode_span(self, place: int, span: PlannedSpan, writer: "_UnitWriter", report: Report) -> None:
        source, settings = self._plan.sources[span.source], self._plan.settings
        _check_unchanged(source)
        skipped = Skipped(writer.skipped, lambda rejected: writer.reject(place, rejected))
        limit = settings.max_document_bytes
        reader = Reader(source, span.span, skipped=skipped, filters=settings.filters, max_bytes=limit)
        reported = 0
        for documents in batches(reader):
            try:
                lengths = self._write_tokens(documents, writer)
            except TextWithoutCut as fault:
                skipped.add("text_without_cut", source.path, documents[0].row, detail=str(fault))
                continue
            writer.add(_table(documents, lengths, span.source, settings.seed))
            reached = int(span.weight * min(documents[-1].share, 1.0))
            report(reached - reported, sum(lengths))
            reported = reached
        report(span.weight - reported, 0)
        sha256 = sha256_of(source.path) if span.start == 0 and not is_remote(source.path) else None
        writer.end_span(span.source, reader, sha256)

    def _write_tokens(self, documents: Sequence[SourceDocument], writer: "_UnitWriter") -> tuple[int, ...]:
        """Returns how many tokens each document has."""
        texts = [document.text for document in documents]
        if len(texts[0]) <= CUT_ABOVE_CHARACTERS:
            tokens, lengths = encode_batch(self._processor, texts)
            writer.add_tokens(tokens)
            return lengths
        return (sum(map(writer.add_tokens, encode_long(self._processor, self._cutter, texts[0]))),)


def encode_batch(processor: Any, texts: list[str]) -> tuple["numpy.ndarray", tuple[int, ...]]:
    """Returns the tokens of texts, int32, start and end tokens included, and how many each has."""
    encoded = processor.encode(texts, add_bos=True, add_eos=True, num_threads=1)
    lengths = tuple(map(len, encoded))
    return numpy.fromiter(chain.from_iterable(encoded), dtype=numpy.int32, count=sum(lengths)), lengths


def encode_long(processor: Any, cutter: Cutter, text: str) -> "Iterator[numpy.ndarray]":
    """Returns the tokens of a text of any length in parts, int32, start and end token included.

    Raises:
        TextWithoutCut: The tokenizer allows no cut for too long; before the first part.
    """
    ends = (numpy.array([end], dtype=numpy.int32) for end in (processor.bos_id(), processor.eos_id()))
    return chain(islice(ends, 1), cutter.encode(text), ends)


def batches(documents: Reader) -> Iterator[list[SourceDocument]]:
    """Gathers documents for one call of sentencepiece; one that has to be cut comes alone."""
    batch: list[SourceDocument] = []
    characters = 0
    for document in documents:
        if batch and len(document.text) > CUT_ABOVE_CHARACTERS:
            yield batch
            batch, characters = [], 0
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _table(documents: Sequence[SourceDocument], lengths: Sequence[int], source: int, seed: int) -> "numpy.ndarray":
    table = numpy.empty(len(documents), DOCUMENT)
    digests = b"".join(blake2b(document.text.encode(), digest_size=16).digest() for document in documents)
    table["digest_high"], table["digest_low"] = numpy.frombuffer(digests, "<u8").reshape(-1, 2).T
    table["position"] = [hash_position(document.text, seed) for document in documents]
    table["tokens"] = lengths
    table["source"] = source
    table["row"] = [document.row for document in documents]
    return table


def _check_unchanged(source: SourceFile) -> None:
    if is_remote(source.path):
        return
    try:
        status = os.stat(source.path)
    except OSError as fault:
        raise TokenizationError(
            f"{source.path}: {fault.strerror}, though it was there when the work was planned; put it back and run the "
            "same command again"
        ) from fault
    if (status.st_size, status.st_mtime_ns) != (source.bytes, source.modified_ns):
        raise TokenizationError(
            f"{source.path}: changed since the work was planned; put the old file back, or start anew with --overwrite"
        )


class _UnitWriter:
    """The files of a unit under temporary names; they get their own in `finish`, the marker last."""

    def __init__(self, output: Path, number: int, dtype: str) -> None:
        self._marker = part_path(output, number, "json")
        self._parts = {part: PartialFile(part_path(output, number, part)) for part in PARTS}
        self._dtype = numpy.dtype(dtype)
        self._documents = self._tokens = self._seen = 0
        self._rows: list[int] = []
        self._sha256: dict[str, str] = {}
        self.skipped = Skipped().counts

    def __enter__(self) -> "_UnitWriter":
        return self

    def __exit__(self, *fault: object) -> None:
        for part in self._parts.values():
            part.__exit__(*fault)

    def add_tokens(self, tokens: "numpy.ndarray") -> int:
        self._parts["tokens"].file.write(tokens.astype(self._dtype).data)
        self._tokens += len(tokens)
        return len(tokens)

    def add(self, table: "numpy.ndarray") -> None:
        self._parts["documents"].file.write(table.tobytes())
        self._documents += len(table)

    def reject(self, place: int, rejected: Rejected) -> None:
        line = json.dumps([place, asdict(rejected)], ensure_ascii=False)
        self._parts["rejected.jsonl"].file.write(line.encode("utf-8", "backslashreplace") + b"\n")

    def end_span(self, source: int, reader: Reader, sha256: str | None) -> None:
        self._seen += reader.seen
        self._rows.append(reader.rows)
        if sha256 is not None:
            self._sha256[str(source)] = sha256

    def finish(self) -> None:
        sizes = {name: part.commit() for name, part in self._parts.items()}
        skipped = dict(sorted(self.skipped.items()))
        rows = tuple(self._rows)
        result = UnitResult(self._documents, self._tokens, self._seen, rows, skipped, self._sha256, sizes)
        write_file_atomically(self._marker, json.dumps(asdict(result)).encode())
