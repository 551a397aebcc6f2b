"""Recurrences token by token, as the papers write them: what everything faster is compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_mcore.attention import rotate
from titans_mcore.linear.ttt import MINI_BATCH, TTT_EPS, FastWeights, OpenMiniBatch
from titans_mcore.memory import PackedRows


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


def ttt_scan_naive(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rates: Tensor,
    places: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights: Sequence[Tensor],
    *,
    rope_base: float,
    state: FastWeights | None = None,
    rows: PackedRows | None = None,
) -> tuple[Tensor, FastWeights]:
    """W_t = W - i_t sum_(j <= t) r_j dl_j/dW (W), with dl_j/dW by autograd, and o_t = q_t + LN(f(q_t; W_t)).

    Arguments and results are those of ttt_scan, in the dtype that comes.
    """
    (batch, length), width = values.shape[:2], values.shape[-1:]
    first = [w.expand(batch, *w.shape) for w in weights]
    held = first if state is None else state.weights
    sums, filled = [torch.zeros_like(w) for w in held], torch.zeros(batch, dtype=torch.long)
    if state is not None and state.opened is not None:
        sums, filled = state.opened.sums, state.opened.filled

    def predicted(net: Sequence[Tensor], x: Tensor) -> Tensor:
        """LN(f(x; W)), (B, H, 1, K)."""
        x = x @ net[0] + net[1]
        for matrix, bias in zip(net[2::2], net[3::2], strict=True):
            x = F.gelu(x, approximate="tanh") @ matrix + bias
        return F.layer_norm(x, width, eps=TTT_EPS) * norm_weight.unsqueeze(1) + norm_bias.unsqueeze(1)

    def loss(net: Sequence[Tensor], k: Tensor, v: Tensor) -> Tensor:
        return 0.5 * (predicted(net, k) - (v - k)).square().sum()

    def chosen(which: Tensor, those: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
        return [torch.where(which[:, None, None, None], a, b) for a, b in zip(those, others, strict=True)]

    found = []
    for t in range(length):
        if rows is not None and rows.starts is not None:
            begins = rows.starts[:, t]
            held, filled = chosen(begins, first, held), torch.where(begins, 0, filled)
            sums = chosen(begins, [torch.zeros_like(w) for w in sums], sums)
        q, k = (rotate(x[:, t : t + 1], filled, rope_base).transpose(1, 2) for x in (queries, keys))
        gradients = torch.func.grad(loss)(held, k, values[:, t].unsqueeze(2))
        rate = rates[:, t, :, None, None]
        added = [s + rate * gradient for s, gradient in zip(sums, gradients, strict=True)]
        now = [w - places[filled, None, None, None] * s for w, s in zip(held, added, strict=True)]
        found.append((q + predicted(now, q)).squeeze(2))
        real = torch.ones(batch, dtype=torch.bool) if rows is None or rows.real is None else rows.real[:, t]
        over = real & (filled == MINI_BATCH - 1)
        held = chosen(over, now, held)
        sums = chosen(over, [torch.zeros_like(w) for w in sums], chosen(real, added, sums))
        filled = torch.where(real, (filled + 1) % MINI_BATCH, filled)
    opened = OpenMiniBatch(sums, filled) if bool(filled.any()) else None
    return torch.stack(found, 1), FastWeights(held, opened)
