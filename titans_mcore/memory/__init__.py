"""The mathematics of the memory: torch only, no ranks, no files, no Megatron-core."""

from .packing import PackedRows
from .scan import memory_read, memory_scan
from .state import MemoryState, TensorTree

__all__ = ["MemoryState", "PackedRows", "TensorTree", "memory_read", "memory_scan"]
