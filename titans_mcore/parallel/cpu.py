"""What Megatron-core's unconditional CUDA calls mean on a machine without CUDA.

Megatron-core's tensor-parallel layers run on gloo as they are, except that they ask `torch.cuda` for three things: the
device of a buffer they allocate, a synchronisation, and the state of the device's random generator. Without CUDA the
device is the CPU, nothing needs synchronising, and the device's generator is torch's default one. Nothing is changed
on a machine that has CUDA.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random

_MODEL_PARALLEL = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME


class CpuRngTracker(megatron_random.CudaRNGStatesTracker):
    """Megatron's tracker of named random streams, over torch's default CPU generator.

    As on a GPU: inside `fork(name)` random numbers come from the stream `name`, which goes on where its last fork
    stopped; outside, the default stream is as if the fork had not happened.
    """

    _current_state_name: str

    def add(self, name: str, seed: int) -> None:
        """Starts the stream `name` at `seed`.

        Raises:
            ValueError: The name or the seed is taken.
        """
        if seed in self.seeds_:
            raise ValueError(f"random seed {seed} is taken by another stream")
        if name in self.states_:
            raise ValueError(f"random stream {name} exists already")
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def fork(self, name: str = _MODEL_PARALLEL) -> Iterator[None]:
        """Draws from the stream `name` inside the `with`.

        Raises:
            ValueError: No stream has this name.
        """
        if name not in self.states_:
            raise ValueError(f"random stream {name} was not added")
        outer_name, outer_state = self._current_state_name, torch.get_rng_state()
        if outer_name != "default-rng":
            self.states_[outer_name] = outer_state
        self._current_state_name = name
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            self._current_state_name = outer_name
            # A fork of the same name inside itself continues the stream; any other fork leaves the outer one alone.
            torch.set_rng_state(self.states_.get(outer_name, outer_state))


def enable_cpu() -> bool:
    """Lets Megatron-core's layers run without CUDA; call it before a model is built.

    Calling it again changes nothing, and neither does calling it where CUDA is available.

    Returns:
        Whether the process computes on the CPU.
    """
    if torch.cuda.is_available():
        return False
    if isinstance(megatron_random._CUDA_RNG_STATE_TRACKER, CpuRngTracker):
        return True
    cuda: Any = torch.cuda  # the device takes the place of its number: both are good for torch.empty(device=...)
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_: None
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    megatron_random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    return True
