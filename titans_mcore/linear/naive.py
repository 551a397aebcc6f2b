"""Linear recurrences token by token, as the papers write them: what everything faster is compared with."""

import torch
from torch import Tensor

from ..memory import PackedRows


def linear_scan_naive(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float = 1.0,
    state: Tensor | None = None,
    rows: PackedRows | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + w_t k_t v_t^T, and o_t = scale S_t^T q_t; w is beta, or 1 without it.

    Arguments and results are those of linear_scan, in the dtype that comes.
    """
    heads, length = values.shape[2], values.shape[1]
    each = heads // keys.shape[2]
    queries, keys = queries.repeat_interleave(each, 2), keys.repeat_interleave(each, 2)
    matrix = values.new_zeros(len(values), heads, keys.shape[-1], values.shape[-1]) if state is None else state
    eye, found = torch.eye(keys.shape[-1], dtype=values.dtype), []
    for t in range(length):
        q, k, v = (x[:, t].unsqueeze(-1) for x in (queries, keys, values))  # columns, (B, H, F, 1)
        if rows is not None and rows.starts is not None:
            matrix = torch.where(rows.starts[:, t, None, None, None], 0.0, matrix)
        after, write = matrix, k @ v.mT
        if beta is not None:
            step = beta[:, t, :, None, None]
            after, write = (eye - step * k @ k.mT) @ matrix, step * write
        if log_decay is not None:
            after = log_decay[:, t, :, None, None].exp() * after
        after = after + write
        if rows is not None and rows.real is not None:
            after = torch.where(rows.real[:, t, None, None, None], after, matrix)
        matrix = after
        found.append(scale * (matrix.mT @ q).squeeze(-1))
    return torch.stack(found, 1), matrix


def selective_scan_naive(
    values: Tensor,
    steps: Tensor,
    rates: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    *,
    state: Tensor | None = None,
    rows: PackedRows | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(D_t A) h_{t-1} + D_t B_t u_t, and y_t = C_t h_t.

    Arguments and results are those of selective_scan, in the dtype that comes.
    """
    held, found = values.new_zeros(len(values), *rates.shape) if state is None else state, []
    for t in range(values.shape[1]):
        if rows is not None and rows.starts is not None:
            held = torch.where(rows.starts[:, t, None, None], 0.0, held)
        u, step = (x[:, t].unsqueeze(-1) for x in (values, steps))  # (B, F, 1)
        after = (step * rates).exp() * held + step * inputs[:, t].unsqueeze(1) * u
        if rows is not None and rows.real is not None:
            after = torch.where(rows.real[:, t, None, None], after, held)
        held = after
        found.append((held * outputs[:, t].unsqueeze(1)).sum(-1))
    return torch.stack(found, 1), held
