"""Bytes of one checkpoint, all ranks' files together.

With N numbers on a tensor-parallel rank and t such ranks, whatever the data ranks, the ZeRO stage and the precision:

    weights/       4 t N       float32
    optimizer/     8 t N       two moments in float32

Names, shapes and random states come on top, a few hundred bytes for each parameter in a file and some 15 KB for each
rank: nothing at the sizes of the paper.
"""

from pretrain.plan.layout import Layout
from pretrain.plan.parameters import Parameter
from pretrain.plan.rank_bytes import numbers_on_rank

_FLOAT32 = 4
_MOMENTS = 2


def checkpoint_bytes(layout: Layout, parameters: list[Parameter]) -> dict[str, int]:
    """Bytes of the files of one checkpoint: `total` and by kind."""
    numbers = layout.tensor * numbers_on_rank(parameters, layout)
    parts = {"weights": _FLOAT32 * numbers, "optimizer": _MOMENTS * _FLOAT32 * numbers}
    return {"total": sum(parts.values()), **parts}
