"""The mathematics of linear recurrences with a matrix as state: torch only, no ranks, no files, no Megatron-core."""

from .scan import linear_scan

__all__ = ["linear_scan"]
