"""The mathematics of the memory: torch only, no ranks, no files, no Megatron-core."""

from .inputs import MemoryState, TensorTree
from .layout import PackedRows
from .probe import Probe, Probed
from .rule import WHOLE, WholeMatrices
from .scan import memory_read, memory_scan, memory_with_room

__all__ = [
    "WHOLE",
    "MemoryState",
    "PackedRows",
    "Probe",
    "Probed",
    "TensorTree",
    "WholeMatrices",
    "memory_read",
    "memory_scan",
    "memory_with_room",
]
