"""The mathematics of the memory: torch only, no ranks, no files, no Megatron-core."""

from .looks import Looked, Looks
from .packing import PackedRows
from .scan import memory_read, memory_scan
from .sharing import Share, split_axis
from .state import MemoryState, TensorTree

__all__ = [
    "Looked",
    "Looks",
    "MemoryState",
    "PackedRows",
    "Share",
    "TensorTree",
    "memory_read",
    "memory_scan",
    "split_axis",
]
