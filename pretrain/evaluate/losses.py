"""The losses that are measured between steps: of held-out rows read as in training, also by position."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from pretrain.config.run_config import RunConfig
from pretrain.data.batches import MicroBatch
from pretrain.data.folders import NumberedSamples
from titans_mcore.parallel import DeepSpeedGroups, Place, context_place, device, sample_place
from tokenization.progress import Progress


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


def turns(rows: int, most: int, place: Place) -> Iterator[tuple[list[int], Tensor]]:
    """A rank's share of some rows, pass by pass.

    Every rank makes the same number of passes, which ZeRO 3 needs: whoever has no row left repeats the last one, which
    does not count then.

    Args:
        rows: How many there are.
        most: Rows that are read side by side at most.
        place: The rank's among those that share the rows out.

    Yields:
        Numbers of the rows of a pass, and which of them count, bool.
    """
    side_by_side = min(most, math.ceil(rows / place.ranks))
    stride = side_by_side * place.ranks
    for start in range(place.rank * side_by_side, math.ceil(rows / stride) * stride, stride):
        wanted = range(start, start + side_by_side)
        yield [min(row, rows - 1) for row in wanted], torch.tensor([row < rows for row in wanted], device=device())


@contextmanager
def evaluating(engine: DeepSpeedEngine) -> Iterator[None]:
    """The engine computes without gradients, and then trains on."""
    engine.eval()
    with torch.no_grad():
        yield
    engine.train()


def heldout_losses(engine: DeepSpeedEngine, samples: NumberedSamples, config: RunConfig) -> LossByTokensRead:
    """Cross-entropy over the first held-out sequences; the same at every layout.

    Args:
        engine: Its model is evaluated.
        samples: Held-out samples.
        config: Says how many, and the micro-batch.
    """
    found = LossByTokensRead(config.train.sequence_length)
    count = min(config.evaluate.heldout_sequences, samples.per_epoch)
    place, places = context_place()
    total, first = count * config.train.sequence_length, dist.get_rank() == 0  # its pace is everybody's
    with evaluating(engine), Progress("of the held-out text evaluated", total, shown=first) as progress:
        for numbers, counted_B in turns(count, config.train.micro_batch, sample_place()):
            rows = samples.micro_batch(numbers)
            losses_BT = engine(**rows.part(place, places).arguments(device()))
            found.add(losses_BT, tokens_read(rows).chunk(places, 1)[place].to(device()), counted_B)
            done = min(sample_place().ranks * len(numbers), count) * config.train.sequence_length
            progress.advance(done, done)
    found.gather()
    return found


def tokens_read(rows: MicroBatch) -> Tensor:
    """Tokens since the model began anew, at the row's first token or a document's, (B, T); the token itself counts."""
    place_BT = torch.arange(rows.tokens.shape[1]).expand(rows.tokens.shape)
    if rows.starts is None:
        return place_BT + 1
    return place_BT + 1 - torch.where(rows.starts, place_BT, 0).cummax(1).values
