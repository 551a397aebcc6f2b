"""The loss of tokens, by how many others the model had read before."""

import torch
import torch.distributed as dist
from torch import Tensor

from titans_mcore.parallel import DeepSpeedGroups, device


class LossByTokensRead:
    """Sums of losses in buckets that end at powers of two.

    Args:
        longest: Most tokens that are read; the last bucket ends there.
    """

    def __init__(self, longest: int) -> None:
        self._ends = [2**power for power in range((longest - 1).bit_length())] + [longest]
        self._limits = torch.tensor(self._ends, device=device())
        # float64, so that the order in which ranks add is not seen.
        self._sums = torch.zeros(2, len(self._ends), dtype=torch.float64, device=device())

    def add(self, losses_BT: Tensor, read: Tensor, counted_B: Tensor) -> None:
        """Takes the losses of some predictions.

        Args:
            losses_BT: Cross-entropy, nats.
            read: Tokens that each was predicted from, at least 1; (B, T) or (T,).
            counted_B: Rows that count, bool.
        """
        buckets = torch.bucketize(read, self._limits).expand(losses_BT.shape)[counted_B].flatten()
        losses = losses_BT[counted_B].double().flatten()
        self._sums.index_add_(1, buckets, torch.stack([losses, torch.ones_like(losses)]))

    def gather(self) -> None:
        """Adds up what ranks that read different tokens have taken; collective."""
        dist.all_reduce(self._sums, group=DeepSpeedGroups().get_data_parallel_group())

    @property
    def mean(self) -> float:
        """Loss of all predictions, nats a token."""
        losses, tokens = self._sums.sum(1).tolist()
        return losses / tokens

    def curve(self) -> dict[str, list[float]]:
        """`tokens`, where buckets end, and `loss`, their means; a bucket begins behind the one before. The last ones
        are left out where no document is as long."""
        buckets = zip(self._ends, *self._sums.tolist(), strict=True)
        taken = [(end, loss / predicted) for end, loss, predicted in buckets if predicted]
        return {"tokens": [end for end, _ in taken], "loss": [loss for _, loss in taken]}
