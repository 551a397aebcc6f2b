"""Batches of sequences of different length: padding stands aside, and documents in one row begin anew.

A memory would learn from padding, and chunks and segments would begin elsewhere than in the sequence alone. So the real
tokens of each row are moved to its front, the mixers are told where they end, and what comes out is moved back.
Collators that put several sequences into a row in place of padding say so by position_ids, seq_idx or cu_seq_lens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..memory import PackedRows
from ..memory.layout import take

_NO_LABEL = -100
_PACKING = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_WITHOUT_MEANING = ("cache_position", "num_items_in_batch")  # tensors that transformers hands to every model


def check_arguments(given: Mapping[str, Any]) -> None:
    """Refuses tensors that nothing here would look at; settings of other models are passed over.

    Raises:
        ValueError: There is one.
    """
    for name, value in given.items():
        if isinstance(value, Tensor) and name not in (*_PACKING, *_WITHOUT_MEANING):
            raise ValueError(f"{name} is no argument of Titans models; leave it out")


@dataclass(frozen=True)
class Padding:
    """Where the real tokens of a piece stand, and which of them begin documents.

    Attributes:
        rows: Which tokens are real, and begin documents, once they stand in front.
        order: Place in the piece of each token in that order, (B, T); None where all are real.
        back: Place in that order of each token of the piece, (B, T); None as for `order`.
    """

    rows: PackedRows
    order: Tensor | None
    back: Tensor | None

    def to_front(self, x: Tensor) -> Tensor:
        """(B, T, ...) with the real tokens of every row in front."""
        return x if self.order is None else take(x, self.order)

    def to_places(self, x: Tensor) -> Tensor:
        """Back from `to_front`."""
        return x if self.back is None else take(x, self.back)


def padding_of(mask: Tensor | None, hidden: Tensor, earlier: int, given: Mapping[str, Any]) -> Padding | None:
    """The padding of a piece, and its documents.

    Args:
        mask: 1 for tokens and 0 for padding, (B, T) or with the columns of all earlier pieces in front; None for none.
        hidden: The piece, (B, T, ...).
        earlier: Columns read before.
        given: Arguments of which some may say where documents begin; see starts_of.

    Returns:
        None where all tokens are real and none begins a document.

    Raises:
        ValueError: The mask has another shape, or documents cannot begin as they are said to.
    """
    if mask is None and all(given.get(name) is None for name in _PACKING):
        return None
    return _padding_of(mask, hidden, earlier, given)


@torch.compiler.disable
def _padding_of(mask: Tensor | None, hidden: Tensor, earlier: int, given: Mapping[str, Any]) -> Padding | None:
    """What depends on the values of tensors, and is not traced by torch.compile."""
    real = _real(mask, hidden, earlier)
    if real is None:
        starts = starts_of(given, hidden, None, None)
        return None if starts is None else Padding(PackedRows(starts), None, None)
    order = (~real).to(torch.int8).argsort(dim=1, stable=True)
    real = real.gather(1, order)
    return Padding(PackedRows(starts_of(given, hidden, order, real), real), order, order.argsort(1))


def starts_of(given: Mapping[str, Any], hidden: Tensor, order: Tensor | None, real: Tensor | None) -> Tensor | None:
    """Tokens that begin a document behind the first one of their row, (B, T).

    Args:
        given: position_ids (B or 1, T), which count up in a document and fall where one begins, seq_idx (B or 1, T),
            the number of each token's document, or cu_seq_lens_q, for one row where documents begin and the last ends.
        hidden: The piece, (B, T, ...).
        order: As in Padding, like real.
        real: Which are real in that order.

    Returns:
        None where no document begins.

    Raises:
        ValueError: They have other shapes, leave positions out, or say different things.
    """
    found: dict[str, Tensor] = {}
    batch, tokens = hidden.shape[:2]
    for name in ("position_ids", "seq_idx"):
        if (x := given.get(name)) is None:
            continue
        if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[0] not in (1, batch) or x.shape[1] != tokens:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} is {shape}; it must be (B, T), {(batch, tokens)}")
        x = x.to(hidden.device).expand(batch, tokens)
        step = (x if order is None else x.gather(1, order)).diff(dim=1)
        inside = torch.ones_like(step, dtype=torch.bool) if real is None else real[:, 1:]
        if name == "position_ids" and bool((inside & (step > 1)).any()):
            raise ValueError(
                "position_ids leave numbers out; in a Titans model a token stands behind the one before it, or begins "
                "a document, where they fall"
            )
        found[name] = inside & (step <= 0 if name == "position_ids" else step != 0)
    if (ends := given.get("cu_seq_lens_q")) is not None:
        if batch != 1 or order is not None or ends.dim() != 1 or int(ends[0]) or int(ends[-1]) != tokens:
            raise ValueError(
                f"cu_seq_lens_q must run from 0 to the {tokens} tokens of a single row without padding; "
                "give position_ids for several rows"
            )
        begins = torch.zeros(1, tokens + 1, dtype=torch.bool, device=hidden.device)
        begins[:, ends.to(hidden.device, torch.long)] = True
        found["cu_seq_lens_q"] = begins[:, 1:-1]
    first = next(iter(found.values()), None)
    for name, starts in found.items():
        if first is not None and not torch.equal(starts, first):
            raise ValueError(
                f"{name} and {next(iter(found))} let documents begin at different tokens; give one of them"
            )
    if first is None or not bool(first.any()):
        return None
    return torch.nn.functional.pad(first, (1, 0))


def _real(mask: Tensor | None, hidden: Tensor, earlier: int) -> Tensor | None:
    """Which tokens of a piece are real, (B, T); None if all are."""
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
    return None if bool(real.all()) else real


def predicted(labels: Tensor, mask: Tensor | None, given: Mapping[str, Any]) -> Tensor:
    """Labels (B, T) without those that a row alone does not predict: padding, the first token behind it, and of every
    document the first token."""
    mask = None if mask is None or mask.shape != labels.shape else mask
    padding = padding_of(mask, labels, 0, given)
    if padding is not None and padding.rows.starts is not None:
        labels = labels.masked_fill(padding.to_places(padding.rows.starts), _NO_LABEL)
    if mask is None:
        return labels
    real = mask.to(labels.device, torch.bool)
    # Where the roll comes round, in the first column, nothing is predicted anyway.
    return labels.masked_fill(~(real & real.roll(1, 1)), _NO_LABEL)


def rows_on(device: torch.device, rows: PackedRows | None) -> PackedRows | None:
    """The same on the device of a block, where a model is spread over several."""
    masks = [] if rows is None else [mask for mask in (rows.starts, rows.real) if mask is not None]
    if rows is None or all(mask.device == device for mask in masks):
        return rows
    starts, real = (None if mask is None else mask.to(device) for mask in (rows.starts, rows.real))
    return PackedRows(starts, real)
