"""Tokens to Megatron indexed datasets, with what the manifest says about them counted on the way."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenization.manifest import HELDOUT, TRAIN, FileInfo, Split
from tokenization.sources import sha256_of
from tokenization.workers import Batch, TokenBatch

if TYPE_CHECKING:
    import numpy

# Megatron-core's own limit for two-byte tokens, in DType.optimal_dtype.
UINT16_BELOW = 65_500


def import_indexed_dataset() -> Any:
    """Imports Megatron-core's indexed_dataset module, which takes seconds, without its remarks on missing extensions.

    Apex and Transformer Engine are not used for files of tokens; errors still come through.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


class ShardWriter:
    """Writes the train and the held-out dataset of a folder."""

    def __init__(self, folder: Path, vocab_size: int, dtype: str) -> None:
        """Opens both.

        Args:
            folder: Receives train.bin, train.idx, heldout.bin and heldout.idx.
            vocab_size: Pieces of the tokenizer.
            dtype: uint16 or int32.
        """
        import numpy

        self._folder = folder
        self._dataset = import_indexed_dataset()
        dtype_class = getattr(numpy, dtype)
        self._builders = {
            name: self._dataset.IndexedDatasetBuilder(self._dataset.get_bin_path(str(folder / name)), dtype_class)
            for name in (TRAIN, HELDOUT)
        }
        self.documents = {TRAIN: 0, HELDOUT: 0}
        self.tokens = {TRAIN: 0, HELDOUT: 0}
        self._train_counts = numpy.zeros(vocab_size, dtype=numpy.int64)

    def add(self, batch: Batch, encoded: TokenBatch) -> None:
        """Appends each document of a batch to the split it belongs to."""
        start = 0
        for heldout, length in zip(batch.heldout, encoded.lengths, strict=True):
            name = HELDOUT if heldout else TRAIN
            document = encoded.tokens[start : start + length]
            self._builders[name].add_document(document, [length])
            self.documents[name] += 1
            self.tokens[name] += length
            start += length
        self._count_train_tokens(batch, encoded)

    def finish(self) -> dict[str, Split]:
        """Writes the index files and returns what lies in the folder now."""
        splits = {}
        for name, builder in self._builders.items():
            index = Path(self._dataset.get_idx_path(str(self._folder / name)))
            builder.finalize(str(index))
            paths = (index.with_suffix(".bin"), index)
            files = {path.name: FileInfo(path.stat().st_size, sha256_of(path)) for path in paths}
            splits[name] = Split(name, self.documents[name], self.tokens[name], files)
        return splits

    def unigram_entropy(self) -> float:
        """Returns the entropy of the train tokens' frequencies in nats a token."""
        return entropy_of(self._train_counts)

    def _count_train_tokens(self, batch: Batch, encoded: TokenBatch) -> None:
        import numpy

        is_train = numpy.repeat(~numpy.array(batch.heldout, dtype=bool), encoded.lengths)
        self._train_counts += numpy.bincount(encoded.tokens[is_train], minlength=len(self._train_counts))


def entropy_of(counts: "numpy.ndarray") -> float:
    """Returns -sum p ln p, in nats, of the distribution with these counts (any shape, at least one above 0)."""
    import numpy

    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * numpy.log(probabilities)).sum())
