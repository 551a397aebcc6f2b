"""What is taken away from a model or a prompt, to see what its answers rest on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from evals.command_line import EvaluationError
from evals.models import EvalModel, random_weights
from titans_mcore.config import TitansConfig
from titans_mcore.mixers.neural_memory import gate_widths

_OF_MEMORIES = ("memory_reset", "memory_off")


def check_controls(controls: tuple[str, ...], config: TitansConfig) -> None:
    """Whether a model has what the controls take away.

    Raises:
        EvaluationError: It has not.
    """
    for control in controls:
        if control in _OF_MEMORIES and not any(mixer.memory for mixer in config.mixers):
            raise EvaluationError(f"--controls {control}: variant {config.variant} has no memory; leave this one out")
        if control == "window_only" and window_of(config) is None:
            raise EvaluationError("--controls window_only: this model's window is the whole text; leave this one out")


def window_of(config: TitansConfig) -> int | None:
    """Tokens that attention sees, 0 without attention, None for all: what is left without a memory."""
    reaches = [mixer.reach(config) for mixer in config.mixers]
    return None if None in reaches else max(filter(None, reaches), default=0)


@contextmanager
def controlled(model: EvalModel, control: str) -> Iterator[EvalModel]:
    """The model as a control wants it, for the time of a `with` block."""
    if control == "random_init":
        yield replace(model, network=random_weights(model))
    elif control == "memory_off":
        with _unwritten(model.network):
            yield model
    else:
        yield model


@contextmanager
def _unwritten(network: Any) -> Iterator[None]:
    """Memories that are never written: steps and forgetting are exactly 0, what is read is the learned beginning."""
    memories = [module for module in network.modules() if hasattr(module, "gate_bias")]
    before = [memory.gate_bias.detach().clone() for memory in memories]
    try:
        for memory in memories:
            _close_gates(memory)
        yield
    finally:
        with torch.no_grad():
            for memory, bias in zip(memories, before, strict=True):
                memory.gate_bias.copy_(bias)


@torch.no_grad()
def _close_gates(memory: nn.Module) -> None:
    theta, _, alpha = memory.gate_bias.split(gate_widths(memory.config), -1)  # type: ignore[arg-type, operator]
    theta.fill_(-torch.inf)  # views: a sigmoid of this is 0
    alpha.fill_(-torch.inf)


def without_memory(states: list[Any], config: TitansConfig) -> list[Any]:
    """States whose memories are as they were before the first token; what attention keeps stays."""
    return [mixer.without_memory(state) for mixer, state in zip(config.blocks, states, strict=True)]
