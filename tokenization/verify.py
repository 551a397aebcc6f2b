"""Checks a folder of shards: `python -m tokenization.verify DIR`."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenization.errors import run_command
from tokenization.manifest import TOKENIZER_NAME, TRAIN, Manifest, ManifestError, Split
from tokenization.shards import entropy_of, import_indexed_dataset
from tokenization.tokenizer import describe_tokenizer

if TYPE_CHECKING:
    import numpy

_BLOCK_TOKENS = 1 << 24


def verify(folder: Path) -> Manifest:
    """Checks every file of a folder of shards against its manifest, and the tokens themselves.

    Args:
        folder: Written by `tokenization.encode`.

    Returns:
        The manifest.

    Raises:
        ManifestError: Naming the first file that is missing, truncated, changed or inconsistent.
    """
    manifest = Manifest.load(folder)
    manifest.check_full(folder)
    if describe_tokenizer(folder / TOKENIZER_NAME) != manifest.tokenizer:
        raise ManifestError(f"{folder / TOKENIZER_NAME}: its vocabulary is not the one in the manifest; encode again")
    for name, split in manifest.splits.items():
        counts = _check_split(folder, split, manifest)
        if name == TRAIN and abs(entropy_of(counts) - manifest.unigram_entropy) > 1e-9:
            raise ManifestError(f"{folder}: unigram_entropy in the manifest is not that of the tokens; encode again")
    return manifest


def _check_split(folder: Path, split: Split, manifest: Manifest) -> "numpy.ndarray":
    """Returns how often each token occurs."""
    import numpy

    prefix = str(folder / split.prefix)
    lengths, documents, dtype = _read_index(prefix)
    if dtype != manifest.dtype:
        raise ManifestError(f"{prefix}.idx: holds {dtype} tokens, the manifest says {manifest.dtype}; encode again")
    if documents != split.documents or len(lengths) != documents:
        raise ManifestError(
            f"{prefix}.idx: lists {documents:,} documents, the manifest says {split.documents:,}; encode again"
        )
    tokens = numpy.memmap(f"{prefix}.bin", dtype=dtype, mode="r")
    if not len(tokens) == lengths.sum() == split.tokens:
        raise ManifestError(
            f"{prefix}.bin: {len(tokens):,} tokens, its index says {lengths.sum():,} and the manifest "
            f"{split.tokens:,}; encode again"
        )
    _check_ends(f"{prefix}.bin", tokens, lengths, manifest)
    return _count_tokens(f"{prefix}.bin", tokens, manifest.tokenizer.vocab_size)


def _read_index(prefix: str) -> tuple["numpy.ndarray", int, str]:
    """Reads an index with Megatron-core's own reader: (tokens of each sequence, documents, NumPy name of the type)."""
    try:
        index = import_indexed_dataset().IndexedDataset(prefix)
    except (AssertionError, KeyError, ValueError, struct.error) as fault:
        raise ManifestError(f"{prefix}.idx: Megatron-core cannot read it ({fault}); encode again") from fault
    return index.sequence_lengths.astype("int64"), len(index.document_indices) - 1, index.index.dtype.__name__


def _check_ends(path: str, tokens: Any, lengths: "numpy.ndarray", manifest: Manifest) -> None:
    ends = lengths.cumsum()
    bos_id, eos_id = manifest.tokenizer.bos_id, manifest.tokenizer.eos_id
    if (tokens[ends - lengths] != bos_id).any() or (tokens[ends - 1] != eos_id).any():
        raise ManifestError(f"{path}: a document does not start with {bos_id} and end with {eos_id}; encode again")


def _count_tokens(path: str, tokens: Any, vocab_size: int) -> "numpy.ndarray":
    import numpy

    counts = numpy.zeros(vocab_size, dtype=numpy.int64)
    for block in _blocks(tokens):
        if block.min() < 0 or block.max() >= vocab_size:
            raise ManifestError(
                f"{path}: token {block.max()} where the tokenizer has {vocab_size:,} pieces; encode again"
            )
        counts += numpy.bincount(block, minlength=vocab_size)
    return counts


def _blocks(tokens: Any) -> Iterator[Any]:
    for start in range(0, len(tokens), _BLOCK_TOKENS):
        yield tokens[start : start + _BLOCK_TOKENS]


@dataclass(frozen=True)
class VerifySettings:
    """Checks a folder of shards: every file's hash, the tokenizer, the indices, and that all tokens are pieces."""

    folder: Path
    """Folder written by `python -m tokenization.encode`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; see `--help`."""
    import tyro

    settings = tyro.cli(tyro.conf.Positional[VerifySettings], args=arguments, prog="python -m tokenization.verify")
    manifest = verify(settings.folder)
    counted = ", ".join(f"{split.tokens:,} {name} tokens" for name, split in manifest.splits.items())
    print(f"{settings.folder}: ok, {counted}, fingerprint {manifest.fingerprint[:12]}")


if __name__ == "__main__":
    run_command(main)
