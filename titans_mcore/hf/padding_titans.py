"""Batches of sequences of different length: padding stands aside, wherever the tokenizer has put it.

A memory would learn from padding, and chunks and segments would begin elsewhere than in the sequence alone. So the real
tokens of each row are moved to its front, the mixers are told where they end, and what comes out is moved back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory import PackedRows
from ..mixers.kept import take

_NO_LABEL = -100


@dataclass(frozen=True)
class Padding:
    """Where the real tokens of a padded piece stand.

    Attributes:
        rows: Which tokens are real once they stand in front.
        order: Place in the piece of each token in that order, (B, T).
        back: Place in that order of each token of the piece, (B, T).
    """

    rows: PackedRows
    order: Tensor
    back: Tensor

    def to_front(self, x: Tensor) -> Tensor:
        """(B, T, ...) with the real tokens of every row in front."""
        return take(x, self.order)

    def to_places(self, x: Tensor) -> Tensor:
        """Back from `to_front`."""
        return take(x, self.back)


def padding_of(mask: Tensor | None, hidden: Tensor, earlier: int) -> Padding | None:
    """The padding of a piece.

    Args:
        mask: 1 for tokens and 0 for padding, (B, T) or with the columns of all earlier pieces in front; None for none.
        hidden: The piece, (B, T, E).
        earlier: Columns read before.

    Returns:
        None where all tokens are real.

    Raises:
        ValueError: The mask has another shape.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError("attention_mask must be (B, T); Titans models make their own causal masks")
    tokens = hidden.shape[1]
    if mask.shape[1] not in (tokens, earlier + tokens):
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns; give one for each of the {tokens} tokens"
            + (f", or for the {earlier} read before and these" if earlier else "")
        )
    real = mask[:, mask.shape[1] - tokens :].to(hidden.device, torch.bool)
    if bool(real.all()):
        return None
    order = (~real).to(torch.int8).argsort(dim=1, stable=True)
    return Padding(PackedRows(real=real.gather(1, order)), order, order.argsort(1))


def predicted(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Labels (B, T) without those that a row alone does not predict: padding, and the first token behind it."""
    if mask is None or mask.shape != labels.shape:
        return labels
    real = mask.to(labels.device, torch.bool)
    # Where the roll comes round, in the first column, nothing is predicted anyway.
    return labels.masked_fill(~(real & real.roll(1, 1)), _NO_LABEL)


def rows_on(device: torch.device, rows: PackedRows | None) -> PackedRows | None:
    """The same on the device of a block, where a model is spread over several."""
    if rows is None or rows.real is None or rows.real.device == device:
        return rows
    return PackedRows(real=rows.real.to(device))
