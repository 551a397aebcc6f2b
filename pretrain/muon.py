"""Muon for the matrices of the blocks, AdamW for the rest: the optimizer of optimizer.name muon.

A matrix w (A, B) moves along the orthogonal matrix that is nearest to its momentum (Jordan et al. 2024), at the root
mean square of AdamW's updates (Liu et al., arXiv 2502.16982), so that both share a learning rate and weight decay:

    m <- mu m + (1 - mu) g,   u = orthogonal(mu m + (1 - mu) g),   w <- (1 - lr decay) w - 0.2 sqrt(max(A, B)) lr u

as torch.optim.Muon does with adjust_lr_fn "match_rms_adamw". Beyond it, matrices that lie in one are taken each for its
own: what every head has of query, key, value and the memory's maps, and gate and value of a feed-forward layer.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS, _ITERATIONS, _SMALLEST_NORM = (3.4445, -4.775, 2.0315), 5, 1e-7
_RMS_OF_ADAMW = 0.2


class Muon(torch.optim.AdamW):
    """Groups with `matrices` are stepped by Muon, others by AdamW, all or none of them: see UpdateGate.

    The state of a matrix is AdamW's, so that checkpoints have one form; its exp_avg_sq stays 0.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["matrices"]]
        try:
            result = super().step(closure)
        finally:
            self.param_groups = groups
        left_out = getattr(self, "found_inf", torch.zeros(())).bool()
        for group in groups:
            for parameter in group["params"] if group["matrices"] else ():
                if parameter.grad is not None:
                    self._step_matrix(parameter, group, left_out)
        return result

    def _step_matrix(self, w: nn.Parameter, group: dict[str, Any], left_out: Tensor) -> None:
        state, momentum = self.state[w], group["momentum"]
        if not state:
            state["step"] = torch.zeros((), device=w.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(w), torch.zeros_like(w)
        assert w.grad is not None
        mean = state["exp_avg"].lerp(w.grad, 1 - momentum)
        along = w.grad.lerp(mean, momentum)
        moved = w * (1 - group["lr"] * group["weight_decay"])
        for part, direction in zip(matrices_in(w, moved), matrices_in(w, along), strict=True):
            rate = _RMS_OF_ADAMW * max(part.shape[-2:]) ** 0.5 * group["lr"]
            part.add_(orthogonal(direction.bfloat16()), alpha=-rate)
        # Selected and not multiplied: 0 x NaN is NaN.
        state["exp_avg"].copy_(torch.where(left_out, state["exp_avg"], mean))
        state["step"] += (~left_out).to(state["step"])
        w.copy_(torch.where(left_out, w, moved))


def matrices_in(parameter: Tensor, x: Tensor) -> Iterator[Tensor]:
    """Views of x, which is laid out like the parameter, of the matrices that lie in it: (A, B), or (H, A, B) by head.

    What has one row a head (gates, Mamba's channels) is one matrix of all heads.
    """
    if widths := getattr(parameter, "rows_per_head", None):
        for part in x.unflatten(0, (-1, sum(widths))).split(widths, 1):
            yield part[:, 0] if part.shape[1] == 1 else part
    else:
        yield from x.chunk(getattr(parameter, "partition_stride", 1))


def orthogonal(x: Tensor) -> Tensor:
    """About the orthogonal matrix that is nearest to each of (..., A, B): singular values come near 1.

    Five Newton-Schulz iterations in x's type, see torch.optim.Muon.
    """
    a, b, c = _COEFFICIENTS
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    wide = wide.reshape(-1, *wide.shape[-2:])  # by head, or one
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(_ITERATIONS):
        gram = wide @ wide.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        wide = torch.baddbmm(wide, gram, wide, beta=a)
    wide = wide.view(*x.shape[:-2], *wide.shape[-2:])
    return wide if x.shape[-2] <= x.shape[-1] else wide.mT
