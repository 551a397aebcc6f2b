"""Tiny shards for tests: random tokens in Megatron's format under a real manifest, without a tokenizer to train."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from tokenization.manifest import FileInfo, Manifest, Shard, Split, fingerprint_of
from tokenization.settings import EncodingSettings
from tokenization.tokenizer import TokenizerInfo

BOS, EOS = 1, 2


def write_shards(
    folder: Path,
    *,
    vocab_size: int = 96,
    documents: int = 15,
    seed: int = 0,
    train_shards: int = 1,
    tokenizer: bytes = b"stands for a tokenizer",
) -> Path:
    """A folder that `pretrain.data` takes; the text is learnable: each token mostly follows from the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    follower = random.permutation(np.arange(3, vocab_size))
    splits = {
        "train": _write_split(folder, "train", documents, follower, random, train_shards),
        "heldout": _write_split(folder, "heldout", max(4, documents // 4), follower, random),
    }
    (folder / "tokenizer.model").write_bytes(tokenizer)
    info = TokenizerInfo(_sha256(folder / "tokenizer.model"), vocab_size, BOS, EOS)
    manifest = Manifest(
        format_version=1,
        tokenizer=info,
        dtype="uint16",
        splits=splits,
        sources=(),
        skipped={},
        settings=EncodingSettings(seed=seed, heldout_fraction=0.1),
        unigram_entropy=float(np.log(vocab_size)),
        fingerprint=fingerprint_of(info, splits),
    )
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return folder


def _write_split(
    folder: Path, name: str, documents: int, follower: np.ndarray, random: np.random.Generator, shards: int = 1
) -> Split:
    prefixes = [name] if shards == 1 else [f"{name}-{number:05d}" for number in range(shards)]
    tokens = [_write_shard(folder, prefix, documents, follower, random) for prefix in prefixes]
    files = {
        path.name: FileInfo(path.stat().st_size, _sha256(path))
        for prefix in prefixes
        for path in (folder / f"{prefix}.bin", folder / f"{prefix}.idx")
    }
    listed = tuple(Shard(prefix, documents, count) for prefix, count in zip(prefixes, tokens, strict=True))
    return Split(name, documents * shards, sum(tokens), files, listed if shards > 1 else ())


def _write_shard(folder: Path, prefix: str, documents: int, follower: np.ndarray, random: np.random.Generator) -> int:
    """Writes one dataset; returns its tokens."""
    builder = IndexedDatasetBuilder(str(folder / f"{prefix}.bin"), dtype=np.uint16)
    tokens = 0
    for _ in range(documents):
        text = [int(random.integers(3, 3 + len(follower)))]
        for noise in random.random(int(random.integers(40, 200))):
            known = int(follower[text[-1] - 3])
            text.append(known if noise < 0.8 else int(random.integers(3, 3 + len(follower))))
        document = [BOS, *text, EOS]
        builder.add_document(torch.tensor(document), [len(document)])
        tokens += len(document)
    builder.finalize(str(folder / f"{prefix}.idx"))
    return tokens


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
