"""Units to Megatron indexed datasets: one shard at a time, whole or not at all."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

from titans_mcore.io import commit_file, read_marker, sha256_of, write_file_atomically
from tokenization.manifest import HELDOUT, ORIGIN, FileInfo, Shard
from tokenization.plan import Plan
from tokenization.units import DOCUMENT, part_path
from tokenization.workers import Report

# Megatron-core's own limit for two-byte tokens, in DType.optimal_dtype.
UINT16_BELOW = 65_500
_TOKENS_AT_ONCE = 1 << 22


def import_indexed_dataset() -> Any:
    """Imports Megatron-core's indexed_dataset module, which takes seconds, without its remarks on missing extensions.

    Apex and Transformer Engine are not used for files of tokens; errors still come through.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@dataclass(frozen=True)
class ShardPart:
    """Consecutive documents of a unit."""

    unit: int
    """Place in the plan."""
    first: int
    """First document."""
    stop: int
    """Document behind the last."""


@dataclass(frozen=True)
class ShardSpec:
    """What goes into a shard; of the documents in its parts, those of its split that are no duplicates."""

    prefix: str
    """Name without suffix."""
    split: str
    """TRAIN or HELDOUT."""
    parts: tuple[ShardPart, ...]
    """In order."""


@dataclass(frozen=True)
class ShardResult:
    """The content of a shard's marker."""

    shard: Shard
    """For the manifest."""
    files: dict[str, FileInfo]
    """Its .bin and .idx."""
    rows: FileInfo
    """Its .rows."""


@dataclass(frozen=True)
class Selection:
    """Which documents of which unit go where, as files that every worker maps."""

    output: Path
    """The output folder."""
    threshold: float
    """Of the held-out split."""
    first_documents: tuple[int, ...]
    """For each unit, how many documents the units before hold."""
    first_rows: tuple[dict[int, int], ...]
    """For each unit, what is added to the rows of a source."""

    @property
    def duplicates_path(self) -> Path:
        """NumPy array of bool, one a document."""
        return self.output / "work" / "duplicates.npy"

    def table(self, unit: int) -> "numpy.ndarray":
        """Returns the table of a unit's documents."""
        return numpy.fromfile(part_path(self.output, unit, "documents"), DOCUMENT)

    def kept(self, unit: int, table: "numpy.ndarray", split: str) -> "numpy.ndarray":
        """Returns which documents of a unit belong to a split."""
        first = self.first_documents[unit]
        duplicate = numpy.load(self.duplicates_path, mmap_mode="r")[first : first + len(table)]
        heldout = table["position"] < self.threshold
        return ~duplicate & (heldout if split == HELDOUT else ~heldout)


def marker_path(output: Path, prefix: str) -> Path:
    """Returns the path of a shard's marker."""
    return output / "work" / "shards" / f"{prefix}.json"


def load_shard(output: Path, prefix: str) -> ShardResult | None:
    """Returns the marker of a shard, None while it is not done."""
    return read_marker(marker_path(output, prefix), ShardResult)


def load_counts(output: Path, prefix: str) -> "numpy.ndarray":
    """Returns how often each token occurs in a shard that is done."""
    return numpy.fromfile(marker_path(output, prefix).with_suffix(".counts"), numpy.int64)


class ShardWriter:
    """Writes shards; each worker has one."""

    def __init__(self, selection: Selection) -> None:
        """Loads the plan and Megatron-core.

        Args:
            selection: Which documents go where.
        """
        plan = Plan.load(selection.output)
        assert plan is not None
        self._selection, self._vocab_size = selection, plan.tokenizer.vocab_size
        self._dtype = getattr(numpy, plan.dtype)
        self._dataset = import_indexed_dataset()

    def __call__(self, spec: ShardSpec, report: Report) -> None:
        """Writes a shard and marks it done.

        Args:
            spec: What goes into it.
            report: Receives progress, in bytes of tokens.
        """
        output = self._selection.output
        partial = {end: output / f".{spec.prefix}.{end}.partial" for end in ("bin", "idx", "rows")}
        documents, tokens, counts = self._write(spec, partial, report)
        infos = {}
        for end, path in partial.items():
            infos[f"{spec.prefix}.{end}"] = FileInfo(path.stat().st_size, sha256_of(path))
            commit_file(path, output / f"{spec.prefix}.{end}")
        rows = infos.pop(f"{spec.prefix}.rows")
        shard = Shard(spec.prefix, documents, tokens)
        marker = marker_path(output, spec.prefix)
        write_file_atomically(marker.with_suffix(".counts"), counts.tobytes())
        write_file_atomically(marker, json.dumps(asdict(ShardResult(shard, infos, rows))).encode())

    def _write(self, spec: ShardSpec, partial: dict[str, Path], report: Report) -> tuple[int, int, "numpy.ndarray"]:
        builder = self._dataset.IndexedDatasetBuilder(str(partial["bin"]), self._dtype)
        counts = numpy.zeros(self._vocab_size, dtype=numpy.int64)
        documents = 0
        with partial["rows"].open("wb") as rows:
            for part in spec.parts:
                for table, texts in self._documents(part, spec.split):
                    for tokens in texts:
                        builder.add_document(tokens, [len(tokens)])
                    rows.write(self._origins(part.unit, table).tobytes())
                    together = numpy.concatenate(texts)
                    for start in range(0, len(together), _TOKENS_AT_ONCE):  # bincount makes eight bytes of each
                        some = together[start : start + _TOKENS_AT_ONCE]
                        counts += numpy.bincount(some, minlength=self._vocab_size)
                    documents += len(table)
                    report(together.nbytes, len(together))
        builder.finalize(str(partial["idx"]))
        return documents, int(counts.sum()), counts

    def _documents(self, part: ShardPart, split: str) -> Iterator[tuple["numpy.ndarray", list["numpy.ndarray"]]]:
        """Yields the kept documents of a part, some at a time: their table and the tokens of each."""
        table = self._selection.table(part.unit)
        starts = numpy.cumsum(table["tokens"], dtype=numpy.int64) - table["tokens"]
        kept = self._selection.kept(part.unit, table, split)
        kept[: part.first] = kept[part.stop :] = False
        places = numpy.flatnonzero(kept)
        path = part_path(self._selection.output, part.unit, "tokens")
        for some in numpy.split(places, numpy.flatnonzero(numpy.diff(starts[places] // _TOKENS_AT_ONCE)) + 1):
            if not len(some):
                continue
            first, stop = starts[some[0]], starts[some[-1]] + table["tokens"][some[-1]]
            size = numpy.dtype(self._dtype).itemsize
            tokens = numpy.fromfile(path, self._dtype, count=stop - first, offset=first * size)
            begins = (starts[some] - first).tolist()
            lengths = table["tokens"][some].tolist()
            yield table[some], [tokens[b : b + n] for b, n in zip(begins, lengths, strict=True)]

    def _origins(self, unit: int, table: "numpy.ndarray") -> "numpy.ndarray":
        origins = numpy.empty(len(table), ORIGIN)
        origins["source"], origins["row"] = table["source"], table["row"]
        for source, first_row in self._selection.first_rows[unit].items():
            origins["row"][table["source"] == source] += first_row
        return origins


def plan_shards(plan: Plan, selection: Selection, split: str, max_tokens: int, max_documents: int) -> list[ShardSpec]:
    """Cuts the kept documents of a split into as few shards as the limits allow, all about equal, between documents.

    Args:
        plan: The units.
        selection: Which documents go where.
        split: TRAIN or HELDOUT.
        max_tokens: Of a shard, give or take a document.
        max_documents: Of a shard, likewise; Megatron's builder holds about 100 bytes for each.

    Returns:
        Shards in order; one is called as its split, several are numbered.
    """
    tokens = documents = 0
    for _, _, lengths in _kept_documents(plan, selection, split):
        tokens += int(lengths.sum())
        documents += len(lengths)
    count = max(1, -(-tokens // max_tokens), -(-documents // max_documents))
    parts: list[list[ShardPart]] = [[] for _ in range(count)]
    before = 0
    for unit, places, lengths in _kept_documents(plan, selection, split):
        ends = before + numpy.cumsum(lengths, dtype=numpy.int64)
        shards = (ends - lengths) * count // tokens  # by where a document starts
        for shard in numpy.unique(shards):
            first, last = places[shards == shard][[0, -1]].tolist()
            parts[shard].append(ShardPart(unit, first, last + 1))
        before += int(lengths.sum())
    filled = [tuple(one) for one in parts if one]  # a document longer than a shard leaves the next one empty
    names = [split] if len(filled) == 1 else [f"{split}-{number:05d}" for number in range(len(filled))]
    return [ShardSpec(name, split, one) for name, one in zip(names, filled, strict=True)]


def _kept_documents(
    plan: Plan, selection: Selection, split: str
) -> Iterator[tuple[int, "numpy.ndarray", "numpy.ndarray"]]:
    """Yields each unit with the places of its documents that stay and their tokens."""
    for unit in range(len(plan.units)):
        table = selection.table(unit)
        places = numpy.flatnonzero(selection.kept(unit, table, split))
        if len(places):
            yield unit, places, table["tokens"][places]
