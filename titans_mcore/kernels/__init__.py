"""Fused Triton kernels of the memory's chunked dual form, forward and backward.

Reading order: fused.py is the entrance and the autograd function, launch.py allocates and launches, forward.py,
backward_reads.py and backward_chain.py are the kernels, network.py, errors.py and shell.py what they share. Triton is
imported when a kernel is first used.
"""

from ..memory.rule import VERSION
from .fused import Borders, fused_fits, fused_scan

__all__ = ["VERSION", "Borders", "fused_fits", "fused_scan"]
