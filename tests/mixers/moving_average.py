"""An exponential moving average over time: the mathematics of a mixer that test_added_mixer.py adds."""

import torch
from torch import Tensor

from titans_mcore.memory import PackedRows


def moving_average(
    values: Tensor, keep: Tensor, average: Tensor, rows: PackedRows | None = None
) -> tuple[Tensor, Tensor]:
    """m_t = a_t m_{t-1} + (1 - a_t) v_t, from zero where a document begins.

    Args:
        values: v (B, T, H, D).
        keep: a, of the same shape.
        average: m before the first token, (B, H, D).
        rows: Documents and padding; padding changes nothing.

    Returns:
        m of every token (B, T, H, D), and the last one.
    """
    found = []
    for token in range(values.shape[1]):
        if rows is not None and rows.starts is not None:
            average = average.masked_fill(rows.starts[:, token, None, None], 0.0)
        after = keep[:, token] * average + (1.0 - keep[:, token]) * values[:, token]
        if rows is not None and rows.real is not None:
            after = torch.where(rows.real[:, token, None, None], after, average)
        average = after
        found.append(average)
    return torch.stack(found, 1), average
