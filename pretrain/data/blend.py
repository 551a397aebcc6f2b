"""Samples of several folders in fixed shares.

Megatron's BlendedDataset draws from datasets that were built for the length of the run: their shuffle changes with it,
and so does sample i. Here only its rule for who comes next is taken, and each folder goes through its own epochs:
sample i is sample k of folder f, where f and k are a function of the shares and i alone.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from megatron.core.datasets import helpers

from pretrain.data.batches import MicroBatch, NumberedSamples, Piece

_BLOCK = 1 << 20
"""After so many samples the pattern of folders repeats: shares are met to about a millionth, in bounded memory."""


class Blend:
    """The numbered samples of several folders, in the proportion of their shares at any point."""

    def __init__(self, parts: Sequence[NumberedSamples], shares: Sequence[float]) -> None:
        """Nothing is read.

        Args:
            parts: Samples of each folder.
            shares: Share of the samples that come from each; at least config.SMALLEST_SHARE, in sum 1.
        """
        self._parts = parts
        self._part = np.empty(_BLOCK, np.int16)
        self._place = np.empty(_BLOCK, np.int64)
        helpers.build_blending_indices(self._part, self._place, np.array(shares), len(parts), _BLOCK, False)
        self._in_block = np.bincount(self._part, minlength=len(parts))
        self.per_epoch = min(self._first_number_of(part, samples.per_epoch) for part, samples in enumerate(parts))
        """Samples before a folder begins again."""

    def prepare(self, first: int, last: int) -> None:
        """Opens what the samples `first` to `last` need; collective, see Samples.prepare."""
        found = [self._locate(index) for index in range(first, last + 1)]
        for part, samples in enumerate(self._parts):
            if places := [place for of, place in found if of == part]:
                samples.prepare(places[0], places[-1])

    def micro_batch(self, indices: Iterable[int]) -> MicroBatch:
        """The samples of these numbers, which `prepare` has opened."""
        rows = [self._parts[part].micro_batch([place]) for part, place in map(self._locate, indices)]
        tokens, labels = torch.cat([row.tokens for row in rows]), torch.cat([row.labels for row in rows])
        if all(row.starts is None for row in rows):
            return MicroBatch(tokens, labels, None)
        none = torch.zeros_like(tokens[:1], dtype=torch.bool)
        return MicroBatch(tokens, labels, torch.cat([none if row.starts is None else row.starts for row in rows]))

    def pieces(self, index: int) -> list[Piece]:
        """The parts of documents that a sample is made of, in order; `prepare` has opened it."""
        part, place = self._locate(index)
        return self._parts[part].pieces(place)

    def _locate(self, index: int) -> tuple[int, int]:
        """The folder of a sample, and its number there."""
        block, inside = divmod(index, _BLOCK)
        part = int(self._part[inside])
        return part, block * int(self._in_block[part]) + int(self._place[inside])

    def _first_number_of(self, part: int, place: int) -> int:
        """The inverse of `_locate`."""
        block, rest = divmod(place, int(self._in_block[part]))
        return block * _BLOCK + int(np.flatnonzero(self._part == part)[rest])
