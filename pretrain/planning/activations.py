"""Bytes of what the forward pass keeps for the backward pass, and of the largest working set behind it.

An estimate: it counts the tensors that autograd and the memory's own backward pass keep, as the modules' code makes
them. For one token of the T / CP that a rank has of a row, E the width, e = E / TP and f = F / TP what it owns of width
and feed-forward, M the channels of all memory heads, m those of the heads whose memory it computes (M / TP, or M where
ranks share matrices), w bytes of an activation, 4 of what is computed in float32, t the ranks of sequence parallelism:

    two norms        (3 w + 8) E / t + w E             input in float32, normalised, scaled; what all read is whole
    feed-forward     4 w f                             gate and value, SiLU of the gate, product
    attention        7 w e, with a prefix 11 w e       q, k, v as they are attended to, output twice, new q and v; a
                                                       prefix doubles q and k (rotated and plain)
      its mask       (1 + w) keys                      SDPA; flash-attn has none
    memory           10 w m + 43 m                     projections, convolved q, k, v, their SiLU; float32: norms'
                                                       inputs, the scan's q, k, v, the reads
      documents      (3 K - 1) w m + 12 m              rows that hold several: a gather for each of K taps, slots
    states           S (groups + 2)                    float32 weights and momentum, S bytes, of the first chunk in
                                                       every group of ceil(sqrt(chunks)); first state and anchors
                                                       (MAC: groups + 1 for every segment)
      a first state  S, persistent tokens 1.5 S
    mac, besides     recall: 10 w m + 12 m + 8 M / TP x expansion (L - 1); two keys a token: 11 w e in place of the
                     attention's; y and h: 2 w E; y (x) m: (4 w + 8) E; documents: (K + 3) w m, S for every segment
    mag, besides     y (x) m: (2 w + 4) (e + m)
    mal, besides     y: w E
    head             (2 w + 4) E / t and 4 V / TP + w V / TP   final norm; float32 probabilities, logits

The group at work, in one layer at a time: its states and their gradients, 2 S g, and what its tokens leave in the
memory network going forth and back, 12 float32 numbers for each of the network's widths. Rows are taken to hold two
documents where documents are kept apart; MAC's segments are those of rows of one document.

With train.recompute every block keeps its input, w E / t, and one block at a time has all of the above; states are that
one block's, and S for every block that has received one. except_memory keeps every block's scan: its states and S, and
(16 + w) m, queries, keys, values and reads in float32 and what the block reads of them.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from pretrain.config import RunConfig
from pretrain.planning.layout import Layout
from titans_mcore.config import TitansConfig
from titans_mcore.parallel import padded_vocab_size

_FLOAT32 = 4
_QUERY_BLOCK = 512  # of attention by SDPA: keys of a block's first query to its last one are masked together


class _Sizes(NamedTuple):
    """What the formulas need of a model on a rank; letters as above."""

    model: TitansConfig
    length: int
    rows: int
    ranks: int
    w: int
    documents: bool
    token_ranks: int
    hidden: bool
    received: bool
    recompute: str

    @property
    def e(self) -> float:
        return self.model.dim / self.ranks

    @property
    def m(self) -> float:
        return self.model.memory_shape.channels / (1 if self.hidden else self.ranks)

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.length * self.rows

    @property
    def scans(self) -> list[int]:
        """Chunks of each piece that the memory is run over."""
        if self.model.variant != "mac":
            return [math.ceil(self.length / self.model.chunk_size)]
        whole, rest = divmod(self.length, self.model.segment_length)
        lengths = [self.model.segment_length] * whole + ([rest] if rest else [])
        return [math.ceil(length / self.model.chunk_size) for length in lengths]

    @property
    def state(self) -> float:
        """S: weights and momentum of a rank's heads, all rows."""
        widths = self.model.memory_widths
        numbers = sum(2 * m * n for m, n in itertools.pairwise(widths))
        return _FLOAT32 * numbers * self.model.memory_shape.heads / self.ranks * self.rows


def activation_bytes(config: RunConfig, layout: Layout) -> dict[str, int]:
    """Bytes on a rank, by part."""
    sizes = _Sizes(
        config.model,
        config.train.sequence_length // layout.context,
        config.train.micro_batch,
        layout.tensor,
        layout.bytes_per_weight,
        config.data.reset_documents,
        layout.token_ranks,
        layout.hidden,
        layout.context > 1,
        layout.recompute,
    )
    return {name: int(formula(sizes)) for name, formula in PARTS.items()}


def _activations(s: _Sizes) -> float:
    by_token = _common(s) + _attention(s) + _memory(s) + _combined(s)
    final_norm = (2 * s.w + _FLOAT32) * s.model.dim / s.token_ranks
    blocks = s.model.num_layers * by_token
    if s.recompute != "none":
        scan = 4 * _FLOAT32 * s.m + s.w * s.m if s.recompute == "except_memory" else 0.0
        if s.model.variant == "transformer":
            scan = 0.0
        blocks = by_token + s.model.num_layers * (s.w * s.model.dim / s.token_ranks + scan)
    return s.tokens * (blocks + final_norm)


def _logits(s: _Sizes) -> float:
    return s.tokens * padded_vocab_size(s.model.vocab_size) / s.ranks * (_FLOAT32 + s.w)


def _common(s: _Sizes) -> float:
    norms = ((3 * s.w + 2 * _FLOAT32) / s.token_ranks + s.w) * s.model.dim
    return norms + 4 * s.w * s.model.ffn_dim / s.ranks


def _attention(s: _Sizes) -> float:
    if s.model.variant == "lmm":
        return 0.0
    prefix = s.model.persistent_tokens if s.model.variant != "transformer" else 0
    if s.model.variant == "mac":
        keys = 2 * min(s.model.segment_length, s.length) + prefix
        return 11 * s.w * s.e + (1 + s.w) * keys
    window = s.model.window or s.length
    keys = min(s.length, window + _QUERY_BLOCK) + prefix
    return (11 if prefix else 7) * s.w * s.e + (1 + s.w) * keys


def _memory(s: _Sizes) -> float:
    if s.model.variant == "transformer":
        return 0.0
    documents = ((3 * s.model.conv_kernel - 1) * s.w + 12) * s.m if s.documents else 0.0
    return (10 * s.w + 43) * s.m + documents


def _combined(s: _Sizes) -> float:
    """What a variant has beside attention and memory."""
    if s.model.variant == "mag":
        return (2 * s.w + 4) * (s.e + s.m)
    if s.model.variant == "mal":
        return s.w * s.model.dim
    if s.model.variant == "mac":
        hidden = 8 * s.model.memory_expansion * (s.model.memory_depth - 1) * s.model.memory_shape.channels / s.ranks
        documents = (s.model.conv_kernel + 3) * s.w if s.documents else 0
        return (10 * s.w + 12 + documents) * s.m + hidden + (6 * s.w + 8) * s.model.dim
    return 0.0


def _states(s: _Sizes) -> float:
    if s.model.variant == "transformer":
        return 0.0
    groups = [math.ceil(chunks / _group(chunks)) for chunks in s.scans]
    begun = (1.0 if s.documents else 0.0) + (1.0 if s.model.persistent_tokens else 0.0)
    each = 1 + s.documents if s.model.variant == "mac" else 1.5
    block = s.state * (sum(count + each for count in groups) + begun)
    if s.recompute == "block":
        return block + s.model.num_layers * s.state * s.received
    after = s.state if s.recompute == "except_memory" else 0.0
    return s.model.num_layers * (block + after)


def _group_at_work(s: _Sizes) -> float:
    if s.model.variant == "transformer":
        return 0.0
    chunks = max(s.scans)
    group = _group(chunks)
    tokens = group * s.model.chunk_size * s.rows
    heads, between = s.model.memory_shape.heads, s.model.memory_widths[1:-1]
    widths = sum(between) * heads / s.ranks + 2 * s.m
    return 2 * group * s.state + tokens * widths * 12 * _FLOAT32


def _group(chunks: int) -> int:
    """Chunks between two states that are kept, as memory/layout.py chooses them."""
    return math.isqrt(max(chunks, 1) - 1) + 1


PARTS: dict[str, Callable[[_Sizes], float]] = {
    "activations": _activations,
    "memory_states": _states,
    "memory_group_at_work": _group_at_work,
    "logits": _logits,
}
