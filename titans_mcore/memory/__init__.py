"""The mathematics of the memory: torch only, no ranks, no files, no Megatron-core."""

from .scan import memory_read, memory_scan
from .state import MemoryState, TensorTree

__all__ = ["MemoryState", "TensorTree", "memory_read", "memory_scan"]
