"""Fused Triton kernels of the memory's chunked dual form, forward and backward.

Reading order: fused.py is the entrance and the autograd function, launch.py allocates and launches, forward.py,
backward_reads.py, backward_chain.py and backward_rest.py are the kernels, network.py, errors.py and shell.py what they
share. Triton is imported when a kernel is first used.

A group of chunks is gone through twice, forward (walk, reads) and backward (walk, reads, chain, rest, anchors). In the
walk and in the chain a chunk waits for the one before, however few memories there are: what the next chunk does not
wait for is in the other kernels, which take all chunks at once.

What was weighed against that, for heads of 64, a hidden width of 256 and chunks of 16, by barriers in machine code:
- Two levels, W and S written once in four chunks, which meet what those before have written as low-rank products. A
  chunk of the walk waits at 271 barriers: 90 for its errors, token upon token, 84 while it writes the state, and 97 for
  all else. A quarter of the 84 would be left, and the products with earlier chunks, in z, in raw and in what arrives of
  the last delta, would cost some 35 of their own at the 4 that a product waits at: about a tenth less. The chain, where
  these products have derivatives, would gain nothing. The second matrix would still be read in each chunk, since its
  input depends on the chunk before: 9.25 matrices a chunk come and go instead of 15. That pays where the matrices stay
  on the chip, which Triton has no means for; and the state shell, which needs the norms of W and S after every chunk,
  would have to be worked out from products of tokens.
- What the forward pass knows, kept in bfloat16 for the backward pass: W - M_0 rounded so moves the gradient of the
  forget rate by 1.3 % (median), and copies beside the float32 states add half to the scratch.
"""

from ..memory.rule import VERSION
from .fused import Borders, fused_fits, fused_scan

__all__ = ["VERSION", "Borders", "fused_fits", "fused_scan"]
