"""Gates to the coefficients of the dual form, for all chunks at once (shared/titans.md's E, A, a, m, f).

Products of decays between two tokens are sums of logs taken over a masked matrix, never a ratio of cumulative products
(they underflow) and never a difference of cumulative logs (it cancels after a token that clears the memory).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Coefficients:
    """For one weight matrix; leading axes (..., b) are the chunk's tokens, t the reader and j the writer.

    Attributes:
        keep: a_t, what is left of the chunk's first weights, (..., b).
        carried: f_t, how much of the chunk's first momentum has reached the weights, (..., b).
        momentum: m_t, what is left of the chunk's first momentum, (..., b).
        writes: A E, how much of token j's step has reached the weights at t, (..., b, b), lower triangular.
        decay: E, how much of token j's step is in the momentum at t, (..., b, b), lower triangular.
    """

    keep: Tensor
    carried: Tensor
    momentum: Tensor
    writes: Tensor
    decay: Tensor


def coefficients(eta: Tensor, alpha: Tensor, real: Tensor | None = None) -> Coefficients:
    """Coefficients of chunks whose gates are eta and alpha, both (..., b) in [0, 1].

    Where real (..., b) is False there is no token: weights and momentum stay as they are.
    """
    if real is not None:
        eta, alpha = eta.masked_fill(~real, 1.0), alpha.masked_fill(~real, 0.0)
    log_eta, log_keep = _log(eta), _log(1.0 - alpha)
    decay, keep_between = _products_between(log_eta), _products_between(log_keep)
    momentum = log_eta.cumsum(-1).exp()
    # Where there is no token the momentum does not step into the weights once more.
    delivered = keep_between if real is None else keep_between * real.unsqueeze(-2)
    return Coefficients(
        keep=log_keep.cumsum(-1).exp(),
        carried=(delivered @ momentum.unsqueeze(-1)).squeeze(-1),
        momentum=momentum,
        writes=delivered @ decay,
        decay=decay,
    )


def _log(factor: Tensor) -> Tensor:
    return factor.clamp_min(torch.finfo(factor.dtype).tiny).log()


def _products_between(log_factor: Tensor) -> Tensor:
    """exp(sum of the logs of tokens j+1..t) at [..., t, j] for j <= t, else 0."""
    length = log_factor.shape[-1]
    ones = torch.ones(length, length, dtype=torch.bool, device=log_factor.device)
    terms = log_factor.unsqueeze(-1).expand(*log_factor.shape, length).masked_fill(~ones.tril(-1), 0.0)
    return terms.cumsum(-2).exp().masked_fill(~ones.tril(), 0.0)


def by_channel(tokens: list[Tensor], depth: int) -> bool:
    """Whether a sequence's tensors (queries, keys, values, theta, eta, alpha ...) forget by channel.

    By head alpha is one tensor (B, T, H, L), by channel L tensors (B, T, H, d_in).
    """
    alpha = tokens[5:]
    return len(alpha) > 1 or alpha[0].shape[-1] != depth
