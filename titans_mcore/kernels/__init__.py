"""Fused Triton kernels of the memory's chunked dual form, forward and backward.

Reading order: fused.py is the entrance and the autograd function, launch.py allocates and launches, forward.py,
backward_reads.py, backward_chain.py and backward_rest.py are the kernels, network.py, errors.py and shell.py what they
share. Triton is imported when a kernel is first used.

A group of chunks is gone through twice, forward (walk, reads) and backward (walk, reads, chain, rest, anchors). In the
walk and in the chain a chunk waits for the one before, however few memories there are: what the next chunk does not
wait for is in the other kernels, which take all chunks at once.
"""

from ..memory.rule import VERSION
from .fused import Borders, fused_fits, fused_scan

__all__ = ["VERSION", "Borders", "fused_fits", "fused_scan"]
