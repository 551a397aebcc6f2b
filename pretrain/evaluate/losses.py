"""The losses that are measured between steps: of held-out rows read as in training, and by position on long rows."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from pretrain.config.run_config import RunConfig
from pretrain.data.batches import MicroBatch, NumberedSamples, Samples
from pretrain.data.folders import Blend, RunData
from titans_mcore.parallel import DeepSpeedGroups, Place, context_place, device, sample_place
from titans_mcore.parallel.sequence import tokens_unshared
from tokenization.manifest import HELDOUT
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


def reading_place() -> Place:
    """This rank's among those that read whole rows in pieces: every one that has the whole model, with its tensor-
    parallel ranks. Context ranks do, and read rows of their own."""
    groups = DeepSpeedGroups()
    return Place(groups.get_data_parallel_rank(), groups.get_data_parallel_world_size())


def piece_of(config: RunConfig) -> int:
    """Tokens read at a time: as many as a rank has of a row in training, which its memory has room for."""
    return config.train.sequence_length // config.parallel.context


@contextmanager
def evaluating(engine: DeepSpeedEngine) -> Iterator[None]:
    """The engine computes without gradients, and then trains on."""
    engine.eval()
    with torch.no_grad():
        yield
    engine.train()


def _progress(rows: int, length: int) -> Progress:
    """Of an evaluation, shown by rank 0, whose pace is everybody's."""
    return Progress("of the held-out text evaluated", rows * length, shown=dist.get_rank() == 0)


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
    with evaluating(engine), _progress(count, config.train.sequence_length) as progress:
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


def open_long_rows(config: RunConfig, data: RunData, run_dir: Path) -> NumberedSamples:
    """Held-out rows of evaluate.position_length, in the shares of the folders; collective.

    Raises:
        ValueError: A folder has too little held-out text for one row.
    """
    length = config.evaluate.position_length
    for folder in data.folders:
        if (tokens := folder.manifest.splits[HELDOUT].tokens) <= length:
            raise ValueError(
                f"evaluate.position_length {length} needs {length + 1} held-out tokens, but {folder.path} has "
                f"{tokens}; shorten it or encode more text"
            )
    parts = [
        Samples(
            [folder.manifest.heldout_prefix(folder.path)],
            run_dir / "index",
            vocab_size=config.model.vocab_size,
            sequence_length=length,
            seed=config.train.seed,
        )
        for folder in data.folders
    ]
    return Blend(parts, [folder.share for folder in data.folders]) if len(parts) > 1 else parts[0]


def position_losses(engine: DeepSpeedEngine, rows: NumberedSamples, config: RunConfig) -> LossByTokensRead:
    """Cross-entropy by position; a row is one sequence, whatever documents it is made of.

    Memory is that of a training step's forward pass whatever the length: pieces are as long as its rows, and what is
    carried from piece to piece is of constant size.

    Args:
        engine: Its model is evaluated.
        rows: From `open_long_rows`.
        config: Of the run.
    """
    length, piece = config.evaluate.position_length, piece_of(config)
    found = LossByTokensRead(length)
    read_T = torch.arange(1, length + 1, device=device())
    count = min(config.evaluate.position_rows, rows.per_epoch)
    place = reading_place()
    with evaluating(engine), tokens_unshared(engine.module), _progress(count, length) as progress:
        for numbers, counted_B in turns(count, config.train.micro_batch, place):
            row = rows.micro_batch(numbers)
            states: list[object] = []
            pieces = (x.to(device()).split(piece, -1) for x in (row.tokens, row.labels))
            for tokens, labels, read in zip(*pieces, read_T.split(piece), strict=True):
                losses_BT, states = engine(tokens=tokens, labels=labels, states=states)
                found.add(losses_BT, read, counted_B)
                done = min(place.ranks * len(numbers), count) * tokens.shape[1]
                progress.advance(done, done)
    found.gather()
    return found
