"""Shards of random tokens, of any size in a minute a billion, that pass for encoded text: written by tokenization."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tokenization.assemble import assemble
from tokenization.files import write_file_atomically
from tokenization.manifest import (
    FORMAT_VERSION,
    HELDOUT,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    TRAIN,
    EncodingSettings,
    FileInfo,
    Manifest,
    Shard,
    Split,
    fingerprint_of,
)
from tokenization.plan import PLAN_VERSION, Plan, PlannedSpan, Unit
from tokenization.shards import import_indexed_dataset
from tokenization.sources import Source, sha256_of
from tokenization.tokenizer import BOS_ID, EOS_ID, TokenizerInfo
from tokenization.units import DOCUMENT, UnitResult, part_path, units_folder

VOCABULARY = 32_000
MEAN_TOKENS = 1_000
"""Of a document, as in FineWeb-Edu; lengths are log-normal with a median of 600."""
HELDOUT_FRACTION = 0.001
_UNIT_TOKENS = 20_000_000
_SPARSE_SHARD_TOKENS = 1_000_000_000  # what tokenization.encode takes unless it is told otherwise


def write_synthetic_shards(folder: Path, tokens: int, shard_tokens: int, workers: int) -> Manifest:
    """Writes units as an encoder would, and assembles them.

    Args:
        folder: Empty or absent.
        tokens: About how many, held-out ones included.
        shard_tokens: Tokens after which the next train shard begins.
        workers: Processes that write shards.

    Returns:
        The manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_file_atomically(folder / TOKENIZER_NAME, b"no tokenizer: the tokens are random")
    count = max(1, round(tokens / _UNIT_TOKENS))
    plan = Plan(
        version=PLAN_VERSION,
        settings=EncodingSettings(seed=0, heldout_fraction=HELDOUT_FRACTION, shard_tokens=shard_tokens),
        tokenizer=TokenizerInfo(sha256_of(folder / TOKENIZER_NAME), VOCABULARY, BOS_ID, EOS_ID),
        dtype="uint16",
        sources=(Source("synthetic", ".txt", tokens),),
        units=tuple(Unit((PlannedSpan(0, 0, tokens, tokens),)) for _ in range(count)),
        skipped={},
        rejected=(),
    ).save_once(folder)
    units_folder(folder).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        _write_unit(folder, number, tokens // count)
    return assemble(plan, folder, workers, max_rejected=0.0)


def write_sparse_shards(folder: Path, tokens: int) -> Manifest:
    """Writes shards with real indices and token files that are holes: what opening them takes, without the disk.

    All shards are links to one, of a billion tokens or half of the set.

    Args:
        folder: Empty or absent.
        tokens: About how many.

    Returns:
        The manifest; its hashes are not those of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_file_atomically(folder / TOKENIZER_NAME, b"no tokenizer: there are no tokens")
    size = min(_SPARSE_SHARD_TOKENS, tokens // 2)
    lengths = list(_lengths(np.random.default_rng(0), size))
    shards = [Shard(f"{TRAIN}-{number:05d}", len(lengths), sum(lengths)) for number in range(round(tokens / size))]
    _write_holes(folder / shards[0].prefix, lengths)
    for shard in shards[1:]:
        for end in ("bin", "idx"):
            os.link(folder / f"{shards[0].prefix}.{end}", folder / f"{shard.prefix}.{end}")
    files = {file.name: FileInfo(file.stat().st_size, "") for file in folder.glob(f"{TRAIN}-*")}
    documents, total = len(lengths) * len(shards), sum(lengths) * len(shards)
    splits = {TRAIN: Split(TRAIN, documents, total, files, tuple(shards)), HELDOUT: Split(HELDOUT, 0, 0, {})}
    tokenizer = TokenizerInfo(sha256_of(folder / TOKENIZER_NAME), VOCABULARY, BOS_ID, EOS_ID)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tokenizer=tokenizer,
        dtype="uint16",
        splits=splits,
        sources=(),
        skipped={},
        settings=EncodingSettings(seed=0, heldout_fraction=0.0, shard_tokens=size),
        unigram_entropy=0.0,
        fingerprint=fingerprint_of(tokenizer, splits),
    )
    write_file_atomically(folder / MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def _write_holes(prefix: Path, lengths: list[int]) -> None:
    builder = import_indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    builder.sequence_lengths.extend(lengths)
    builder.document_indices.extend(range(1, len(lengths) + 1))
    builder.finalize(f"{prefix}.idx")
    os.truncate(f"{prefix}.bin", sum(lengths) * np.dtype(np.uint16).itemsize)


def _write_unit(folder: Path, number: int, tokens: int) -> None:
    random = np.random.default_rng([0, number])
    lengths = np.fromiter(_lengths(random, tokens), np.int64)
    ends = np.cumsum(lengths)
    text = random.integers(EOS_ID + 1, VOCABULARY, ends[-1], np.uint16)
    text[ends - lengths], text[ends - 1] = BOS_ID, EOS_ID
    table = np.zeros(len(lengths), DOCUMENT)
    table["position"], table["tokens"], table["row"] = random.random(len(lengths)), lengths, np.arange(len(lengths))
    contents = {"tokens": text.tobytes(), "documents": table.tobytes(), "rejected.jsonl": b""}
    for part, content in contents.items():
        part_path(folder, number, part).write_bytes(content)
    sizes = {part: len(content) for part, content in contents.items()}
    result = UnitResult(len(lengths), int(ends[-1]), len(lengths), (len(lengths),), {}, {}, sizes)
    write_file_atomically(part_path(folder, number, "json"), json.dumps(asdict(result)).encode())


def _lengths(random: np.random.Generator, tokens: int) -> Iterator[int]:
    spread = 1.0
    while tokens > 0:
        for length in random.lognormal(math.log(MEAN_TOKENS) - spread**2 / 2, spread, 1_000).clip(3, 1e6).astype(int):
            yield int(length)
            tokens -= length
            if tokens <= 0:
                return
