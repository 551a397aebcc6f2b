"""The mathematics of linear recurrences: torch only, no ranks, no files, no Megatron-core."""

from .scan import linear_scan
from .selective import selective_scan

__all__ = ["linear_scan", "selective_scan"]
