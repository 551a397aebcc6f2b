"""Activation checkpointing: scans keep their arguments alone, and a block computed again what its scans gave."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from .inputs import MemoryState, map_tensors


class Recomputed(torch.autograd.Function):
    """apply(function, *tensors) is function(*tensors), which returns tensors and is done again for its gradients.

    Unlike torch's checkpoint it lets one around it drop the arguments: they are saved, not held in a closure. Both
    passes are in fixed_precision().
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        with fixed_precision(*tensors):
            return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        saved = ctx.saved_tensors  # once: a checkpoint around gives them out a single time
        with torch.enable_grad(), fixed_precision(*saved):
            tensors = [
                None if x is None else x.detach().requires_grad_(of) for x, of in zip(saved, wanted, strict=True)
            ]
            inputs = [x for x in tensors if x is not None and x.requires_grad]
            # What is handed on as it came may have no gradient: the weights of a carried state, say.
            given = [pair for pair in zip(ctx.function(*tensors), gradients, strict=True) if pair[0].requires_grad]
            outputs, gradients = zip(*given, strict=True)
            found = iter(torch.autograd.grad(outputs, inputs, gradients, allow_unused=True))
        return None, *(next(found) if of else None for of in wanted)


def autocast_is_on(tensor: Tensor) -> bool:
    """Whether the caller has operators on the tensor's device choose their own precision."""
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def fixed_precision(*tensors: Tensor | None) -> AbstractContextManager[None]:
    """Operators compute in the dtype of their arguments, whatever autocast is on around.

    A recurrence says itself what it computes in; rounded to bf16 on its way it would be another one, and operators
    that autocast does not know would meet two dtypes. Gradients are computed under what is on when they are: autograd
    goes through what was done here outside of it, unless it is Recomputed.
    """
    there = next(x for x in tensors if x is not None)
    return torch.autocast(there.device.type, enabled=False) if autocast_is_on(there) else nullcontext()


def in_fixed_precision(there: Tensor, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) in fixed_precision(), its gradients too; what goes in and comes out is as for map_tensors.

    Where no autocast is on for the device of `there`, it is the function and nothing else. Where it is and gradients
    are wanted, it costs going through the function once more.
    """
    if not autocast_is_on(there):
        return function(*arguments)
    if not torch.is_grad_enabled():
        with fixed_precision(there):
            return function(*arguments)
    # The forms alone, so that nothing holds the arguments but what is saved of them.
    given, result = map_tensors(list(arguments), _nothing), None

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        nonlocal result
        left = iter(tensors)
        found = function(*map_tensors(given, lambda _: next(left)))
        result = map_tensors(found, _nothing)
        return tuple(_all_tensors(found))

    found = iter(Recomputed.apply(run, *_all_tensors(list(arguments))))
    return map_tensors(result, lambda _: next(found))


def _all_tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(values, lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
    return found


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0)


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
