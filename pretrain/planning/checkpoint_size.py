"""Bytes of one checkpoint, all ranks' files together.

With N numbers on a tensor-parallel rank, t such ranks and w bytes of a weight:

    weights/                  4 t N       safetensors in float32, readable alone
    deepspeed/ model          w t N       what the engine computes with; at ZeRO 3 the optimizer's files hold it
    deepspeed/ optimizer     12 t N       fp32 masters and two moments, over the data ranks' files
                              8 t N       at ZeRO 0, in the model's file

Names, shapes and random states come on top, a few kilobytes for each parameter: nothing at the sizes of the paper.
"""

from pretrain.planning.layout import Layout
from pretrain.planning.parameters import Parameter
from pretrain.planning.rank_bytes import group_numbers, numbers_on_rank

_FLOAT32 = 4


def checkpoint_bytes(layout: Layout, parameters: list[Parameter]) -> dict[str, int]:
    """Bytes of the files of one checkpoint: `total` and by kind."""
    numbers = layout.tensor * numbers_on_rank(parameters, layout)
    padded = layout.tensor * sum(group_numbers(parameters, layout))
    parts = {
        "weights": _FLOAT32 * numbers,
        "model": 0 if layout.zero_stage == 3 else layout.bytes_per_weight * numbers,
        "optimizer": 2 * _FLOAT32 * numbers if layout.zero_stage == 0 else 3 * _FLOAT32 * padded,
    }
    return {"total": sum(parts.values()), **parts}
