"""Who reads what in an evaluation, and how the engine is made to read it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from pretrain.config import RunConfig
from titans_mcore.parallel import DeepSpeedGroups, Place, device


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
