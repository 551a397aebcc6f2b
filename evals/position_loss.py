"""The loss of a streamed model by position, with memory that does not grow with the rows."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evals.command_line import EvaluationError
from evals.models import EvalModel
from evals.progress import Pace, StatusLine

Rows = Sequence[Any]
"""Rows of L + 1 token ids; whatever can be sliced and read by `np.asarray`, such as DiskTokens."""
_LOGITS = 64  # positions whose losses are computed at a time: copies of logits are what takes memory


@torch.inference_mode()
def loss_sums(model: EvalModel, rows: Rows, batch: int, piece: int, ends: Sequence[int]) -> np.ndarray:
    """Sums of the loss over stretches of positions and over rows, in nats.

    Args:
        model: Streams each row from a fresh state.
        rows: All of one length.
        batch: Rows read side by side.
        piece: Tokens read at a time; logits of one piece exist at a time.
        ends: Where stretches end, ascending, the last one at L. Position t predicts a token from t tokens read; the
            first stretch begins at position 1, each other one behind the end before.

    Returns:
        (len(ends),) float64.

    Raises:
        EvaluationError: A loss is not finite.
    """
    length = len(rows[0]) - 1
    assert ends[-1] == length
    total, borders = np.zeros(len(ends)), np.array(ends)
    pace, line = Pace(), StatusLine()
    pace.plan(len(rows) * length, 0)
    _tell(f"{len(rows)} rows of {length:,} tokens")
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        states: Any = None
        for start in range(0, length, piece):
            stop = min(start + piece, length)
            tokens = torch.from_numpy(np.stack([np.asarray(row[start : stop + 1]) for row in part]).astype(np.int64))
            logits, states = model.stream(tokens[:, :-1], states)
            losses = _losses(logits, tokens[:, 1:])
            stretches = np.searchsorted(borders, np.arange(start + 1, stop + 1))
            total += np.bincount(stretches, losses, len(ends))
            pace.done("read", tokens[:, 1:].numel())
            line.show(f"rows {first + len(part)} of {len(rows)}, {stop:,} tokens read: {pace.text()}")
            if first == start == 0 and length > piece:
                _tell(pace.text())
    line.clear()
    if not np.isfinite(total).all():
        raise EvaluationError(
            f"the model of {model.checkpoint} gives a loss that is not finite; take another checkpoint"
        )
    return total


def _losses(logits: Tensor, targets: Tensor) -> np.ndarray:
    """(T,) cross-entropy in nats, summed over rows."""
    parts = [
        F.cross_entropy(part.float().transpose(1, 2), target.to(part.device), reduction="none").double().sum(0)
        for part, target in zip(logits.split(_LOGITS, 1), targets.split(_LOGITS, 1), strict=True)
    ]
    return torch.cat(parts).cpu().numpy()


def stretch_ends(length: int, trained_length: int | None) -> list[int]:
    """Ends of the stretches that a report is made from: powers of two, the trained length, and the row's end."""
    ends = {2**power for power in range(length.bit_length())} | {length, trained_length or length}
    return sorted(end for end in ends if end <= length)


def summarise(sums: np.ndarray, ends: Sequence[int], rows: int, trained_length: int | None) -> dict[str, Any]:
    """Mean loss and perplexity over all positions and by bucket; a bucket ends at a power of two, or with the row.

    Args:
        sums: From `loss_sums`.
        ends: From `stretch_ends`.
        rows: Rows they sum over.
        trained_length: Also gives the loss within it and beyond, where there are such positions.
    """
    before = dict(zip([0, *ends], np.cumsum([0.0, *sums]).tolist(), strict=True))  # the sum up to each end
    length = ends[-1]

    def mean(first: int, last: int) -> dict[str, Any]:
        loss = (before[last] - before[first]) / (rows * (last - first))
        # exp overflows past 709 nats; a loss that large is reported, its perplexity is not a number JSON has.
        perplexity = math.exp(loss) if loss < 700 else None
        return {"tokens": rows * (last - first), "loss": loss, "perplexity": perplexity}

    buckets = [end for end in ends if end == length or not end & (end - 1)]
    pairs = zip([0, *buckets], buckets, strict=False)
    report = {**mean(0, length), "buckets": [{"first": a + 1, "last": b, **mean(a, b)} for a, b in pairs]}
    if trained_length is not None:
        report["within_trained_length"] = mean(0, min(trained_length, length))
        if trained_length < length:
            report["beyond_trained_length"] = mean(trained_length, length)
    return report


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
