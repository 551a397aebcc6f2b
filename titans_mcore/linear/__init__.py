"""The mathematics of linear recurrences, and of TTT: torch only, no ranks, no files, no Megatron-core."""

from .scan import linear_scan
from .selective import selective_scan
from .ttt import ttt_scan

__all__ = ["linear_scan", "selective_scan", "ttt_scan"]
