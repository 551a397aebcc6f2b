"""Loss by position on rows of any length, read in pieces: does a longer past help, and beyond what was trained?"""

from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine

from pretrain.blend import Blend
from pretrain.config import RunConfig
from pretrain.data import NumberedSamples, Samples
from pretrain.folders import RunData
from pretrain.inloop.losses import LossByTokensRead
from pretrain.inloop.passes import evaluating, piece_of, reading_place, turns
from titans_mcore.parallel import device
from titans_mcore.parallel.alone import tokens_unshared
from tokenization.manifest import HELDOUT


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
    with evaluating(engine), tokens_unshared(engine.module):
        for numbers, counted_B in turns(count, config.train.micro_batch, reading_place()):
            row = rows.micro_batch(numbers)
            states: list[object] = []
            pieces = (x.to(device()).split(piece, -1) for x in (row.tokens, row.labels))
            for tokens, labels, read in zip(*pieces, read_T.split(piece), strict=True):
                losses_BT, states = engine(tokens=tokens, labels=labels, states=states)
                found.add(losses_BT, read, counted_B)
    found.gather()
    return found
