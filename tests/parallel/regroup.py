"""Megatron's groups at one division after the other, in processes that torchrun has started once."""

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

_MADE: dict[tuple[int, int], ProcessGroupCollection] = {}


def groups_of(tensor: int, context: int) -> ProcessGroupCollection:
    """The groups of a division, which Megatron's parallel_state has from now on.

    Divisions should come in blocks: gloo keeps threads for every group that was ever made.
    """
    sizes = tensor, context
    if next(reversed(_MADE), None) != sizes:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor, context_parallel_size=context, create_gloo_process_groups=False
        )
        _MADE.pop(sizes, None)
        _MADE[sizes] = ProcessGroupCollection.use_mpu_process_groups()
    return _MADE[sizes]
