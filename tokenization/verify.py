"""Checks a folder of shards: `python -m tokenization.verify DIR`."""

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from tyro.conf import Positional

from titans_mcore.io import sha256_of
from tokenization.assemble import entropy_of
from tokenization.command_line import MOST_WORKERS, TokenizationError, check_range, parse_settings, run_command
from tokenization.manifest import HELDOUT, ORIGIN, TRAIN, FileInfo, Manifest, ManifestError, Shard, size_damage
from tokenization.progress import Progress
from tokenization.shards import import_indexed_dataset
from tokenization.tokenizer import describe_any_tokenizer
from tokenization.workers import Report, run_tasks, worthwhile_workers

_BLOCK_TOKENS = 1 << 24


def verify(folder: Path, workers: int = 1) -> Manifest:
    """Checks every file of a folder of shards against its manifest, and the tokens themselves.

    Args:
        folder: Written by `tokenization.encode`.
        workers: Processes.

    Returns:
        The manifest.

    Raises:
        ManifestError: Naming every file that is missing, truncated, changed or inconsistent, one a line.
    """
    manifest = Manifest.load(folder)
    shards = [shard for split in manifest.splits.values() for shard in split.datasets]
    damages = _check_tokenizer(folder, manifest)
    for name, info in manifest.records.items():
        if not name.endswith(".rows"):  # those are read with their shard
            damages += _check_file(folder / name, info)
    counts = numpy.zeros(manifest.tokenizer.vocab_size, dtype=numpy.int64)
    train = {shard.prefix for shard in manifest.splits[TRAIN].datasets}
    total = sum(info.bytes for info in manifest.token_files().values())
    workers = worthwhile_workers(workers, total)
    with Progress("verified", total) as progress:
        for shard, (found, shard_counts) in run_tasks(_ShardCheck, (folder,), shards, workers, progress.advance):
            damages += found
            if shard.prefix in train:
                counts += shard_counts
    if not damages and abs(entropy_of(counts) - manifest.unigram_entropy) > 1e-9:
        damages.append(f"{folder}: unigram_entropy in the manifest is not that of the tokens; encode again")
    if damages:
        raise ManifestError("\n".join(sorted(damages)))
    return manifest


def _check_tokenizer(folder: Path, manifest: Manifest) -> list[str]:
    if damage := manifest.tokenizer_damage(folder):
        return [damage]
    path = folder / manifest.tokenizer.file
    try:
        fits = describe_any_tokenizer(path) == manifest.tokenizer
    except TokenizationError as fault:
        return [str(fault)]
    return [] if fits else [f"{path}: its vocabulary is not the one in the manifest; encode again"]


def _check_file(path: Path, info: FileInfo) -> list[str]:
    if damage := size_damage(path, info):
        return [damage]
    if sha256_of(path) != info.sha256:
        return [f"{path}: damaged, its SHA-256 is not the manifest's; encode again"]
    return []


class _ShardCheck:
    """Checks shards; each worker has one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._manifest = Manifest.load(folder)
        self._dataset = import_indexed_dataset()

    def __call__(self, shard: Shard, report: Report) -> tuple[list[str], "numpy.ndarray"]:
        """Returns the damages of a shard and how often each of its tokens occurs."""
        manifest, damages = self._manifest, []
        counts = numpy.zeros(manifest.tokenizer.vocab_size, dtype=numpy.int64)
        files = manifest.token_files() | manifest.records
        for end in ("bin", "idx", "rows"):
            name = f"{shard.prefix}.{end}"
            if name in files:
                damages += _check_file(self._folder / name, files[name])
        if not damages:
            try:
                counts = self._check_content(shard, report)
            except ManifestError as fault:
                damages.append(str(fault))
        return damages, counts

    def _check_content(self, shard: Shard, report: Report) -> "numpy.ndarray":
        manifest, prefix = self._manifest, str(self._folder / shard.prefix)
        starts, lengths, documents, dtype = self._read_index(prefix)
        if dtype != manifest.dtype:
            raise ManifestError(f"{prefix}.idx: holds {dtype} tokens, the manifest says {manifest.dtype}; encode again")
        if documents != shard.documents or len(lengths) != documents:
            raise ManifestError(
                f"{prefix}.idx: lists {documents:,} documents, the manifest says {shard.documents:,}; encode again"
            )
        tokens = numpy.memmap(f"{prefix}.bin", dtype=dtype, mode="r")
        passed_over = manifest.adopted and shard.prefix != HELDOUT
        ends = starts + lengths
        inside = (starts[1:] >= ends[:-1]).all() and ends[-1] <= len(tokens) if passed_over else len(tokens) == ends[-1]
        if not inside or lengths.sum() != shard.tokens:
            raise ManifestError(
                f"{prefix}.bin: {len(tokens):,} tokens, its index says {lengths.sum():,} and the manifest "
                f"{shard.tokens:,}; encode again"
            )
        if not manifest.adopted:
            self._check_ends(f"{prefix}.bin", tokens, lengths)
        self._check_rows(f"{prefix}.rows", documents)
        counts = numpy.zeros(manifest.tokenizer.vocab_size, dtype=numpy.int64)
        breaks = numpy.flatnonzero(starts[1:] != ends[:-1])  # held-out documents that lie in the same file
        for start, end in zip(starts[[0, *(breaks + 1)]], ends[[*breaks, -1]], strict=True):
            counts += self._count_tokens(f"{prefix}.bin", tokens[start:end], report)
        return counts

    def _read_index(self, prefix: str) -> tuple["numpy.ndarray", "numpy.ndarray", int, str]:
        """Reads with Megatron-core's own reader: first token and length of sequences, documents, name of the type."""
        try:
            index = self._dataset.IndexedDataset(prefix)
        except (AssertionError, KeyError, ValueError, struct.error) as fault:
            raise ManifestError(f"{prefix}.idx: Megatron-core cannot read it ({fault}); encode again") from fault
        starts = index.index.sequence_pointers // index.index.dtype_size
        return (
            starts,
            index.sequence_lengths.astype("int64"),
            len(index.document_indices) - 1,
            index.index.dtype.__name__,
        )

    def _check_ends(self, path: str, tokens: Any, lengths: "numpy.ndarray") -> None:
        ends = lengths.cumsum()
        bos_id, eos_id = self._manifest.tokenizer.bos_id, self._manifest.tokenizer.eos_id
        if (tokens[ends - lengths] != bos_id).any() or (tokens[ends - 1] != eos_id).any():
            raise ManifestError(f"{path}: a document does not start with {bos_id} and end with {eos_id}; encode again")

    def _check_rows(self, path: str, documents: int) -> None:
        if Path(path).name not in self._manifest.records:
            return
        origins = numpy.fromfile(path, ORIGIN)
        if len(origins) != documents:
            raise ManifestError(f"{path}: {len(origins):,} documents, its shard has {documents:,}; encode again")
        if (origins["source"] >= len(self._manifest.sources)).any() or (origins["row"] < 0).any():
            raise ManifestError(f"{path}: names a source or a row that cannot be; encode again")

    def _count_tokens(self, path: str, tokens: Any, report: Report) -> "numpy.ndarray":
        vocab_size = self._manifest.tokenizer.vocab_size
        counts = numpy.zeros(vocab_size, dtype=numpy.int64)
        for start in range(0, len(tokens), _BLOCK_TOKENS):
            block = numpy.array(tokens[start : start + _BLOCK_TOKENS])
            if block.min() < 0 or block.max() >= vocab_size:
                raise ManifestError(
                    f"{path}: token {block.max()} where the tokenizer has {vocab_size:,} pieces; encode again"
                )
            counts += numpy.bincount(block, minlength=vocab_size)
            report(block.nbytes, len(block))
        return counts


@dataclass(frozen=True)
class VerifySettings:
    """Checks a folder of shards: every file's hash, the tokenizer, the indices, and that all tokens are pieces."""

    folder: Positional[Path]
    """Folder written by `python -m tokenization.encode` or `tokenization.adopt`."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that check; one shard each at a time."""

    def __post_init__(self) -> None:
        check_range("--workers", self.workers, 1, MOST_WORKERS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(VerifySettings, "python -m tokenization.verify", arguments)
    manifest = verify(settings.folder, settings.workers)
    counted = ", ".join(f"{manifest.splits[name].tokens:,} {name} tokens" for name in (TRAIN, HELDOUT))
    print(f"{settings.folder}: ok, {counted}, fingerprint {manifest.fingerprint[:12]}")


if __name__ == "__main__":
    run_command(main)
