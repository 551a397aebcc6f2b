"""Decoding on a GPU: the thousands of small operations of a token are captured once and launched as one CUDA graph."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .memory import TensorTree
from .memory.checkpoint import autocast_is_on

_BEFORE = 8  # tokens that come one by one before a graph is captured, which takes about as long as they do


class Decoder:
    """step(tokens, states) for sequences that go on token by token.

    On a GPU, without gradients, it becomes a graph after a few tokens; what speaks against that is said in a warning.
    The states that are given back are then the graph's own, and the next call brings them forward in place. Sequences
    that begin later, as many and with states of the same shapes, go on by the graph that there is.

    Args:
        step: Reads tokens (B, T, ...) and gives an output and the states behind them, one a block.
        model: What the step computes with; each block's mixer is its `mixer`.
        capture: Makes of a function one that repeats it on the same tensors; None captures CUDA graphs on GPUs alone.
    """

    def __init__(
        self,
        step: Callable[[Tensor, list[Any]], tuple[Tensor, list[Any]]],
        model: nn.Module,
        capture: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] | None = None,
    ) -> None:
        self.step, self.model, self.capture = step, model, capture
        self._one_by_one, self._refused = 0, False
        self._modules, self._addresses = list[nn.Module](), list[int]()
        self._tokens, self._states = torch.empty(0), list[TensorTree]()
        self._repeat: Callable[[], Tensor] | None = None

    def __call__(self, tokens: Tensor, states: list[Any]) -> tuple[Tensor, list[Any]]:
        """What the step gives."""
        goes_on = tokens.shape[1] == 1 and None not in states and not torch.is_grad_enabled()
        self._one_by_one = self._one_by_one + 1 if goes_on else 0
        captures = (tokens.is_cuda or self.capture) and not self._refused and not autocast_is_on(tokens)
        if not captures or self._one_by_one <= _BEFORE:
            return self.step(tokens, states)
        # Tensors of inference mode could not be changed outside of it.
        with torch.inference_mode(mode=False), torch.no_grad():
            if _addresses(self._modules) != self._addresses:
                self._repeat = None  # the weights were moved or replaced; it would read where they were
            if self._repeat is None or any(a is not b for a, b in zip(states, self._states, strict=True)):
                self._begin(tokens, states)
            if self._repeat is None:
                return self.step(tokens, states)
            self._tokens.copy_(tokens)
            return self._repeat().clone(), self._states

    def _begin(self, tokens: Tensor, states: list[Any]) -> None:
        """Makes these the states, and captures the step unless it is captured for such ones."""
        mixers: list[Any] = [x for name, x in self.model.named_modules() if name.rpartition(".")[2] == "mixer"]
        states = [mixer.with_room(state) for mixer, state in zip(mixers, states, strict=True)]
        if self._repeat is not None and _shapes(tokens, states) == _shapes(self._tokens, self._states):
            _copy(states, self._states)
            return
        own = partial(torch.clone, memory_format=torch.contiguous_format)
        self._tokens, self._states = own(tokens), [state.map(own) for state in states]
        self._modules = list(self.model.modules())
        self._repeat, self._addresses = None, _addresses(self._modules)
        try:
            _, after = self.step(self._tokens, self._states)  # what is made at first use is not to be captured
            if _shapes(tokens, after) != _shapes(tokens, self._states):
                raise ValueError("the states grow with every token; attention has no window")
            self._repeat = (self.capture or _graph)(self._advance)
        except (ValueError, RuntimeError) as reason:
            self._refused = True
            warnings.warn(f"decoding without a CUDA graph, and slower for it: {reason}", stacklevel=2)

    def _advance(self) -> Tensor:
        output, after = self.step(self._tokens, self._states)
        _copy(after, self._states)
        return output


def _graph(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What repeats a function's operations on the GPU; capturing alone does none of them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def _addresses(modules: list[nn.Module]) -> list[int]:
    tensors = (x for module in modules for x in (*module._parameters.values(), *module._buffers.values()))
    return [x.data_ptr() for x in tensors if x is not None]


def _shapes(tokens: Tensor, states: list[TensorTree]) -> list[torch.Size]:
    return [x.shape for x in (tokens, *(x for state in states for x in state.tensors()))]


def _copy(source: list[TensorTree], target: list[TensorTree]) -> None:
    for given, own in zip(source, target, strict=True):
        for a, b in zip(given.tensors(), own.tensors(), strict=True):
            if a is not b:
                b.copy_(a)
