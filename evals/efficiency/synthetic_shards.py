"""Shards of random tokens, of any size in a minute a billion, that pass for encoded text: written by tokenization."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tokenization.assemble import assemble
from tokenization.files import write_file_atomically
from tokenization.manifest import TOKENIZER_NAME, EncodingSettings, Manifest
from tokenization.plan import PLAN_VERSION, Plan, PlannedSpan, Unit
from tokenization.sources import Source, sha256_of
from tokenization.tokenizer import BOS_ID, EOS_ID, TokenizerInfo
from tokenization.units import DOCUMENT, UnitResult, part_path, units_folder

VOCABULARY = 32_000
MEAN_TOKENS = 1_000
"""Of a document, as in FineWeb-Edu; lengths are log-normal with a median of 600."""
HELDOUT_FRACTION = 0.001
_UNIT_TOKENS = 20_000_000


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
            yield length
            tokens -= length
            if tokens <= 0:
                return
