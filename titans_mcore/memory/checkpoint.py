"""Activation checkpointing: scans keep their arguments alone, and a block computed again what its scans gave."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from .inputs import MemoryState


class Recomputed(torch.autograd.Function):
    """apply(function, *tensors) is function(*tensors), which returns tensors and is done again for its gradients.

    Unlike torch's checkpoint it lets one around it drop the arguments: they are saved, not held in a closure.
    """

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
            # What is handed on as it came may have no gradient: the weights of a carried state, say.
            given = [pair for pair in zip(ctx.function(*tensors), gradients, strict=True) if pair[0].requires_grad]
            outputs, gradients = zip(*given, strict=True)
            found = iter(torch.autograd.grad(outputs, inputs, gradients, allow_unused=True))
        return None, *(next(found) if of else None for of in wanted)


Scanned = tuple[Tensor, MemoryState]
_CURRENT: ContextVar["_Scans | None"] = ContextVar("kept scans", default=None)


def keeping_scans() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a block's first pass and of its recomputation: the `context_fn` of torch.utils.checkpoint."""
    scans = _Scans()
    return scans.during("first"), scans.during("again")


def kept(scan: Callable[..., Scanned], *arguments: Any, **named: Any) -> Scanned:
    """scan(...), or what it gave in the first pass where a block is recomputed around it."""
    scans = _CURRENT.get()
    return scan(*arguments, **named) if scans is None else scans.run(scan, *arguments, **named)


class _Scans:
    """The scans of one block, in their order."""

    def __init__(self) -> None:
        self.results: list[Scanned] = []
        self.passing, self.next = "first", 0

    @contextmanager
    def during(self, passing: str) -> Iterator[None]:
        before = _CURRENT.set(self)
        self.passing, self.next = passing, 0
        try:
            yield
        finally:
            _CURRENT.reset(before)

    def run(self, scan: Callable[..., Scanned], *arguments: Any, **named: Any) -> Scanned:
        if self.passing == "first":
            # What the scan saves for its backward pass is not the surrounding checkpoint's to drop.
            with saved_tensors_hooks(_same, _same):
                result = scan(*arguments, **named)
            self.results.append((result[0].detach(), result[1].detach()))
            return result
        reads, state = self.results[self.next]
        self.next += 1
        # Values alone, as leaves: what follows must save the same tensors as in the first pass, no more is looked at.
        return _leaf(reads), state.map(_leaf)


def _same(x: Any) -> Any:
    return x


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(torch.is_grad_enabled() and x.is_floating_point())
