"""The loss of a streamed model by position, with memory that does not grow with the rows."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from evals.command_line import EvaluationError, say
from evals.models import EvalModel
from evals.report import mean_interval
from tokenization.progress import Progress

Rows = Sequence[Any]
"""Rows of L + 1 token ids; whatever can be sliced and read by `np.asarray`, such as DiskTokens."""
_LOGITS = 64  # positions whose losses are computed at a time: copies of logits are what takes memory


@torch.inference_mode()
def row_losses(model: EvalModel, rows: Rows, batch: int, piece: int, ends: Sequence[int]) -> np.ndarray:
    """Sums of the loss over stretches of positions, row by row, in nats.

    Args:
        model: Streams each row from a fresh state.
        rows: All of one length.
        batch: Rows read side by side.
        piece: Tokens read at a time; logits of one piece exist at a time.
        ends: Where stretches end, ascending, the last one at L. Position t predicts a token from t tokens read; the
            first stretch begins at position 1, each other one behind the end before.

    Returns:
        (len(rows), len(ends)) float64.

    Raises:
        EvaluationError: A loss is not finite.
    """
    length = len(rows[0]) - 1
    assert ends[-1] == length
    total, borders = np.zeros((len(rows), len(ends))), np.array(ends)
    say(f"{len(rows)} rows of {length:,} tokens")
    with Progress("of the rows read", len(rows) * length) as progress:
        for first in range(0, len(rows), batch):
            part = rows[first : first + batch]
            states: Any = None
            for start in range(0, length, piece):
                stop = min(start + piece, length)
                ids = np.stack([np.asarray(row[start : stop + 1]) for row in part]).astype(np.int64)
                tokens = torch.from_numpy(ids)
                logits, states = model.stream(tokens[:, :-1], states)
                parts = [
                    F.cross_entropy(part.float().mT, target.to(part.device), reduction="none").double()
                    for part, target in zip(logits.split(_LOGITS, 1), tokens[:, 1:].split(_LOGITS, 1), strict=True)
                ]
                losses = torch.cat(parts, 1).cpu().numpy()
                stretches = np.searchsorted(borders, np.arange(start + 1, stop + 1))
                np.add.at(total, (np.arange(first, first + len(part))[:, None], stretches), losses)
                progress.advance(losses.size, losses.size)
    if not np.isfinite(total).all():
        raise EvaluationError(
            f"the model of {model.checkpoint} gives a loss that is not finite; take another checkpoint"
        )
    return total


def stretch_ends(length: int, trained_length: int | None) -> list[int]:
    """Ends of the stretches that a report is made from: powers of two, the trained length, and the row's end."""
    ends = {2**power for power in range(length.bit_length())} | {length, trained_length or length}
    return sorted(end for end in ends if end <= length)


def summarise(sums: np.ndarray, ends: Sequence[int], rows: int, trained_length: int | None) -> dict[str, Any]:
    """Mean loss and perplexity over all positions and by bucket; a bucket ends at a power of two, or with the row.

    Args:
        sums: From `row_losses`, over all rows.
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


def bucket_intervals(sums: np.ndarray, ends: Sequence[int], last: Sequence[int]) -> list[tuple[float, float] | None]:
    """95 % intervals of the mean loss in each bucket, from how it differs between rows.

    Args:
        sums: (rows, len(ends)), from `row_losses`.
        ends: Where its stretches end.
        last: Where the buckets end, some of the ends.

    Returns:
        Lowest and highest of each bucket; None where there is one row.
    """
    before = np.pad(sums.cumsum(1), ((0, 0), (1, 0)))[:, [0, *(list(ends).index(end) + 1 for end in last)]]
    means = np.diff(before, axis=1) / np.diff([0, *last])
    found = [mean_interval(column.tolist()) for column in means.T]
    return [None if half is None else (mean - half, mean + half) for mean, half in found]
