"""Bytes of the state that a context-parallel rank hands on after a layer: flat in the length of the rows.

For B rows of one document, H the memory's heads on a rank, D their width, e the width of the attention's, w bytes of an
activation, 4 of the memory's numbers, K the taps of the convolution, N persistent tokens, P = min(window - 1, tokens so
far):

    memory       2 x 4 B H sum(d_in d_out)      weights and momentum; no open chunk, as parts are whole chunks
      tails      3 w B (K - 1) H D              of queries, keys and values
    attention    2 w B P e                      keys and values in the window
      prefix     2 w B N e                      those of the persistent tokens
    mac          memory and tails once, and for the recall 4 B H sum(d_in d_out) and w B (K - 1) H D

A rank that shares the memory's matrices by "hidden" has the tails of all heads and its part of every matrix. The
gradients that come back have the same sizes. Documents inside rows add masks and the chunk that a document has opened.
"""

import itertools

from pretrain.config import RunConfig
from pretrain.planning.layout import Layout

HEADER_BYTES = 8192
_FLOAT32 = 4


def state_bytes(config: RunConfig, layout: Layout) -> int:
    """Bytes of one layer's state between two ranks; the most, where the window is wider than a rank's tokens."""
    model, rows, w = config.model, config.train.micro_batch, layout.bytes_per_weight
    width, memories = model.dim // layout.tensor, model.memory_shape
    matrices = memories.heads * sum(m * n for m, n in itertools.pairwise(model.memory_widths)) // layout.tensor
    taps = (model.conv_kernel - 1) * memories.channels // (1 if layout.hidden else layout.tensor)
    memory = 2 * _FLOAT32 * matrices + 3 * w * taps
    if model.variant == "mac":
        return rows * (memory + _FLOAT32 * matrices + w * taps)
    if model.variant == "lmm":
        return rows * memory
    before_last = config.train.sequence_length // layout.context * (layout.context - 1)
    prefix = 0 if model.variant == "transformer" else model.persistent_tokens
    attention = 2 * w * (min(model.window - 1, before_last) + prefix) * width
    return rows * (attention if model.variant == "transformer" else memory + attention)
