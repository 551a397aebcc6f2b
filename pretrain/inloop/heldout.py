"""Held-out loss on rows that are read as in training."""

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from pretrain.config import RunConfig
from pretrain.data import MicroBatch, NumberedSamples
from pretrain.inloop.losses import LossByTokensRead
from pretrain.inloop.passes import evaluating, turns
from titans_mcore.parallel import context_place, device, sample_place


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
    with evaluating(engine):
        for numbers, counted_B in turns(count, config.train.micro_batch, sample_place()):
            rows = samples.micro_batch(numbers)
            losses_BT = engine(**rows.part(place, places).arguments(device()))
            found.add(losses_BT, tokens_read(rows).chunk(places, 1)[place].to(device()), counted_B)
    found.gather()
    return found


def tokens_read(rows: MicroBatch) -> Tensor:
    """Tokens since the model began anew, at the row's first token or a document's, (B, T); the token itself counts."""
    place_BT = torch.arange(rows.tokens.shape[1]).expand(rows.tokens.shape)
    if rows.starts is None:
        return place_BT + 1
    return place_BT + 1 - torch.where(rows.starts, place_BT, 0).cummax(1).values
