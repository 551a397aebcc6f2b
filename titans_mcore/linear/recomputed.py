"""A function of which nothing but its arguments is kept for the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Recomputed(torch.autograd.Function):
    """apply(function, *tensors) is function(*tensors), which returns tensors and is done again for its gradients."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            tensors = [
                None if x is None else x.detach().requires_grad_(of)
                for x, of in zip(ctx.saved_tensors, wanted, strict=True)
            ]
            inputs = [x for x in tensors if x is not None and x.requires_grad]
            found = iter(torch.autograd.grad(ctx.function(*tensors), inputs, gradients, allow_unused=True))
        return None, *(next(found) if of else None for of in wanted)
