"""Floating-point operations of the memory, counted in one place.

What the chunked dual form needs, a multiplication and an addition each counting one. For one token, one head and one
weight matrix (m inputs, n outputs), with b tokens in a chunk:

    keys forward              2 m n
    error back-propagation    2 m n      not for the first matrix: nothing needs the error at the keys
    read from W, S and M_0    6 m n      (a_t x, f_t x, (1 - a_t) x) times the three
    update of W and of S      4 m n      each token's rank-one step, with two weights
    inside the chunk          2 b m + 2 b n      b x b similarities of inputs, then those times the errors

Left out, as bookkeeping that a faster implementation may do otherwise: the b x b decays, the scaling of the states once
a chunk (10 m n / b), the state shell's check, LayerNorm, GELU. The backward pass counts twice the forward pass, as
usual for matrix products; what is computed a second time to save memory does not count.
"""

import itertools


def forward_flops_per_token(heads: int, width: int, depth: int, expansion: int, chunk: int) -> int:
    """Operations of the memory's forward pass for one token, all heads.

    Args:
        heads: H.
        width: D.
        depth: L weight matrices; between them the width is expansion * D.
        expansion: Hidden width over D.
        chunk: b, tokens of a chunk.
    """
    widths = [width, *[expansion * width] * (depth - 1), width]
    total = 0
    for layer, (m, n) in enumerate(itertools.pairwise(widths)):
        products = 2 + (2 if layer else 0) + 6 + 4
        total += products * m * n + 2 * chunk * (m + n)
    return heads * total


def projection_flops_per_token(heads: int, width: int, depth: int) -> int:
    """Operations of a layer's projections for one token: q, k, v, output gate, gates, output; dim = H D."""
    dim = heads * width
    return 2 * dim * (5 * dim + 3 * depth * heads)


def training_flops(forward: int) -> int:
    """Forward and backward from the forward pass."""
    return 3 * forward
