"""What attention and the memory cost: operations, bytes kept for the backward pass, messages to the next rank.

Plain formulas for the planner and the meter of utilisation, counted as the modules' code does it; a mixer's spec puts
them together (spec.py). Letters as in config.py, and for one rank: e its part of the width E, m the channels of the
memory heads whose memory it computes (its heads', or all where ranks share matrices), K the taps of the convolution,
w bytes of an activation, 4 of what is computed in float32.

Operations count a multiplication and an addition each as one:

    attention   4 E for every key that a query sees: the product with the key and the weighted sum of the values. Keys
                are counted as the mask lets them be seen, in rows of one document
    memory      for one token, head and weight matrix (m inputs, n outputs), b tokens in a chunk: keys forward 2 m n,
                error back 2 m n (not at the first matrix), read from weights and momentum 4 m n, update of both 4 m n,
                inside the chunk 2 b (m + n)

Bytes kept of one token:

    attention        7 w e, with a prefix 11 w e       q, k, v as they are attended to, output twice, new q and v; a
                                                       prefix doubles q and k (rotated and plain)
      its mask       (1 + w) keys                      SDPA; flash-attn has none
    memory           10 w m + 29 m                     projections, convolved q, k, v, SiLU of v; float32:
                                                       the scan's q, k, v, the reads
      documents      3 (K - 1) w m + 4 m               rows that hold several: a gather for each of K taps, slots

and of a row, with S bytes of weights and momentum in float32:

    states           S groups                          of the first chunk in every group of ceil(sqrt(chunks)), but
                                                       the first one's weights are M_0 where no tokens came before
    group at work    2 S g, and 12 float32 numbers for each width of the network that its tokens go through

The state that a context-parallel rank hands on, flat in the length of the rows, for B rows of one document:

    memory       2 x 4 B H sum(d_in d_out)      weights and momentum; no open chunk, as parts are whole chunks
      tails      3 w B (K - 1) H D              of queries, keys and values
    attention    2 w B P e                      keys and values in the window, P = min(W - 1, tokens so far)
      prefix     2 w B N e                      those of the persistent tokens
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..config import TitansConfig
from ..memory.layout import group_size
from .neural_memory import gate_widths

FLOAT32 = 4
_QUERY_BLOCK = 512  # of attention by SDPA: keys of a block's first query to its last one are masked together


@dataclass(frozen=True)
class Workload:
    """A micro-batch as one rank computes it.

    Attributes:
        config: The model.
        rows: B.
        length: Tokens of a row on this rank.
        before: Tokens of a row on the ranks in front of the last one.
        ranks: Tensor-parallel ranks.
        hidden: Whether these share the memory's matrices, and each computes all heads.
        w: Bytes of an activation.
        documents: Whether rows are taken to hold two documents that are kept apart.
    """

    config: TitansConfig
    rows: int
    length: int
    before: int = 0
    ranks: int = 1
    hidden: bool = False
    w: int = FLOAT32
    documents: bool = False

    @property
    def tokens(self) -> int:
        """Of the rows."""
        return self.length * self.rows

    @property
    def e(self) -> float:
        """Width that a rank owns."""
        return self.config.dim / self.ranks

    @property
    def m(self) -> float:
        """Channels of the memory heads that a rank computes."""
        return self.config.memory_shape.channels / (1 if self.hidden else self.ranks)


def window_keys(config: TitansConfig, length: int) -> float:
    """Keys of earlier tokens and its own that a query sees through the window, on average over a row."""
    window = min(config.window or length, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def attention_flops(config: TitansConfig, keys: float, tokens: int) -> int:
    """Operations of attention over so many keys a token, forward."""
    return int(4 * config.dim * keys * tokens)


def attention_kept(work: Workload, prefix: int) -> float:
    """Bytes kept of a token by window attention behind so many persistent tokens."""
    keys = min(work.length, (work.config.window or work.length) + _QUERY_BLOCK) + prefix
    return (11 if prefix else 7) * work.w * work.e + (1 + work.w) * keys


def attention_message(work: Workload, prefix: int) -> int:
    """Bytes of the keys and values that a rank hands on."""
    seen = min(work.config.window - 1, work.before) + prefix
    return work.rows * 2 * work.w * seen * (work.config.dim // work.ranks)


def memory_flops(config: TitansConfig) -> int:
    """Operations of one layer's memory that writes and reads a token, forward, all heads."""
    stable = config.memory_rule == "stable"
    anchor = 2 if stable and config.memory_forgetting else 0  # what a query meets of M_0
    total, last = 0, config.memory_depth - 1
    for layer, (m, n) in enumerate(itertools.pairwise(config.memory_widths)):
        total += ((12 if layer else 10) + anchor) * m * n + 2 * config.chunk_size * (m + n)
        if stable and layer == last:
            # Each key meets weights, momentum and M_0 instead of the chunk's first weights, and the errors before it.
            total += (2 + anchor) * m * n + 2 * config.chunk_size * (m + n)
    return config.memory_shape.heads * total


def memory_numbers(config: TitansConfig) -> int:
    """Numbers in the weights of all heads' networks."""
    return config.memory_shape.heads * sum(m * n for m, n in itertools.pairwise(config.memory_widths))


def memory_state(work: Workload) -> float:
    """S: bytes of weights and momentum on a rank."""
    return FLOAT32 * 2 * memory_numbers(work.config) / work.ranks * work.rows


def memory_kept(work: Workload) -> float:
    """Bytes kept of a token by a memory."""
    documents = (3 * (work.config.conv_kernel - 1) * work.w + 4) * work.m if work.documents else 0.0
    return (10 * work.w + 29) * work.m + documents


def memory_scan_kept(work: Workload) -> float:
    """Bytes kept of a token where all but the memory's scan is computed again: q, k, v, reads, and what reads them."""
    return (4 * FLOAT32 + work.w) * work.m


def memory_states(work: Workload, pieces: Iterable[int], each: float) -> float:
    """Bytes of the states kept by scans over pieces of a row, `each` S for a piece beside those of its groups."""
    chunks = [math.ceil(piece / work.config.chunk_size) for piece in pieces]
    return memory_state(work) * sum(math.ceil(count / group_size(count)) + each for count in chunks)


def memory_at_work(work: Workload, pieces: Iterable[int]) -> float:
    """Bytes of the group of chunks at work, going forth and back."""
    group = group_size(max(math.ceil(piece / work.config.chunk_size) for piece in pieces))
    between = sum(work.config.memory_widths[1:-1]) * work.config.memory_shape.heads / work.ranks
    tokens = group * work.config.chunk_size * work.rows
    return 2 * group * memory_state(work) + tokens * (between + 2 * work.m) * 12 * FLOAT32


def memory_message(work: Workload) -> int:
    """Bytes of a memory's state that a rank hands on."""
    gates = work.config.gate_convolution * sum(gate_widths(work.config)) * work.config.memory_shape.heads
    return 2 * weights_message(work) + tail_message(work, 3 * work.config.memory_shape.channels + gates)


def weights_message(work: Workload) -> int:
    """Bytes of a rank's memory weights, for every row."""
    return work.rows * FLOAT32 * (memory_numbers(work.config) // work.ranks)


def tail_message(work: Workload, channels: int) -> int:
    """Bytes of the tokens that a convolution of so many channels, all heads together, keeps for every row."""
    return work.rows * work.w * ((work.config.conv_kernel - 1) * channels // (1 if work.hidden else work.ranks))
