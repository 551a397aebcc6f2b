"""Memory as context (paper, section 4.1): attention within segments, over what the memory recalls of earlier ones."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import attend, rotate
from ..attention.attend import KVCache, Prefix
from ..config import TitansConfig
from ..memory import PackedRows, TensorTree
from ..memory.layout import take
from .costs import (
    Workload,
    memory_kept,
    memory_message,
    memory_numbers,
    memory_states,
    tail_message,
    weights_message,
)
from .neural_memory import BEGINNINGS, NeuralMemory, NeuralMemoryState, PersistentTokens, Recall, combine
from .parts import FromParts, Parts, copy_rows, heads_of, linear, rms_norm
from .spec import MixerSpec, register


class Segment(NamedTuple):
    """One segment of every row, or what a piece holds of it.

    Attributes:
        places: Its tokens in the piece, (B, S); any where the row has fewer.
        real: Which of the S the row has, (B, S).
        restarts: Rows whose segment begins a document, (B,).
        full: Rows whose segment ends here, (B,).
        fill: Tokens of each row's segment so far, 0 where it is full, (B,).
    """

    places: Tensor
    real: Tensor
    restarts: Tensor
    full: Tensor
    fill: Tensor

    @property
    def rows(self) -> PackedRows:
        """What its tokens are."""
        begins = torch.zeros_like(self.real)
        begins[:, 0] = self.restarts
        return PackedRows(begins, self.real)


def segments_of(rows: PackedRows, filled: list[int], size: int) -> list[Segment]:
    """The segments of a piece of packed rows, in the order in which they follow one upon the other.

    Args:
        rows: Documents and padding of the piece; padding stands behind the real tokens.
        filled: Tokens that each row's open segment holds already.
        size: Tokens C of a segment.
    """
    device = rows.documents.device
    starts = torch.zeros(rows.shape, dtype=torch.bool) if rows.starts is None else rows.starts.cpu()
    ends = rows.ends.tolist()
    by_row = [
        _row_segments([i for i in begun.nonzero()[:, 0].tolist() if i < end], end, fill, size)
        for begun, end, fill in zip(starts, ends, filled, strict=True)
    ]
    found, fill = [], list(filled)
    for k in range(max(map(len, by_row))):
        spans = [(row[k] if k < len(row) else _Span(0, 0, False)) for row in by_row]
        longest = max(span.stop - span.start for span in spans)
        fill = [
            (span.stop - span.start + (0 if span.restarts else earlier)) % size
            for span, earlier in zip(spans, fill, strict=True)
        ]
        counts = torch.tensor([span.stop - span.start for span in spans], device=device).unsqueeze(1)
        first = torch.tensor([span.start for span in spans], device=device).unsqueeze(1)
        restarts = torch.tensor([span.restarts for span in spans], device=device)
        now = torch.tensor(fill, device=device)
        offsets = torch.arange(longest, device=device)
        places = (first + offsets).clamp_max(rows.shape[1] - 1)
        found.append(Segment(places, offsets < counts, restarts, (now == 0) & (counts[:, 0] > 0), now))
    return found


class _Span(NamedTuple):
    start: int
    stop: int
    restarts: bool


def _row_segments(starts: list[int], end: int, filled: int, size: int) -> list[_Span]:
    spans, place, room = [], 0, size - filled
    for stop in [*starts, end]:
        while place < stop:
            upto = min(stop, place + room)
            spans.append(_Span(place, upto, place in starts))
            room = size if upto - place == room else room - (upto - place)
            place = upto
        room = size  # the next document, if any, begins a segment
    return spans


@dataclass
class MacState(TensorTree):
    """What MAC carries through time; constant size.

    Attributes:
        written: The memory after the last token; None before the first.
        recall: The memory after the last whole segment, which this segment's tokens recall.
        kept: Keys and values of the open segment, for each token its recalled memory's and its own,
            (B, t, 2, heads, D).
    """

    written: NeuralMemoryState | None
    recall: Recall
    kept: KVCache


class MacMixer(FromParts):
    """For each segment S of C tokens, with M the memory after the segment before:

    h = M(q), a read; y = Attn([p || h || S]), causal; M is updated with y, token by token; o = y (x) M(y).

    Two readings of the equations would leak the future and are not taken: h_j, a function of token j, is visible from
    j on only, and the last read uses each token's own memory, not the memory after the whole segment.

    Args:
        config: The model's settings.
        parts: Makes the parameters.
    """

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        self.config, self.parts, self.heads = config, parts, parts.heads
        width = config.head_dim
        self.persistent = PersistentTokens(config, parts)
        self.memory = NeuralMemory(config, parts)
        self.memory_output = parts.row(config.memory_shape.channels, config.dim)
        self.q_proj = parts.column(config.dim, width)
        self.kv_proj = parts.column(config.dim, width, width)
        self.attention_output = parts.row(config.dim, config.dim)
        self.begin_recalling()
        self.attention_norm = parts.replicated(torch.full((config.dim,), initial_norm(config)))
        self.memory_norm = parts.replicated(torch.full((config.dim,), initial_norm(config)))
        self.rotate, self.norm, self.combine = rotate, rms_norm, combine

    @torch.no_grad()
    def begin_recalling(self) -> None:
        """Brings initial weights to where config.memory_init wants them.

        Keys get the map of queries, and all maps around the attention pass on what they are given at its size: each
        token attends to itself first, and the memory is written with what tokens are.
        """
        config = self.config
        if config.memory_init != "next_token":
            return
        copy_rows(self.q_proj, self.kv_proj, self.heads, config.head_dim)
        residual = math.sqrt(2.0 * config.num_layers)
        for module, d_in, factor in (
            (self.q_proj, config.dim, 1.0),
            (self.kv_proj, config.dim, 1.0),
            (self.attention_output, config.dim, residual),
            (self.memory_output, config.memory_shape.channels, residual),
        ):
            module.get_parameter("weight").mul_(factor / (config.init_std * math.sqrt(d_in)))

    def with_room(self, state: MacState) -> MacState:
        """See FromParts."""
        recall, written = state.recall, state.written
        assert written is not None
        if recall.weights is None:
            first = [w.expand(len(state.kept.keys), *w.shape) for w in self.memory.initial_weights]
            recall = Recall(first, recall.query_tail)
        kept = state.kept.with_room(self.config.segment_length - 1)
        return MacState(self.memory.with_room(written), recall, kept)

    def forward(self, x: Tensor, state: MacState | None, rows: PackedRows | None = None) -> tuple[Tensor, MacState]:
        """Mix x as the block holds it; the state of None begins a sequence."""
        batch = len(x)
        tokens = self.persistent(x)  # the same for every row and every segment
        prefix = None
        if tokens is not None:
            prefix = heads_of(linear(self.kv_proj, self.parts.copy_to_tp_region(tokens)), self.heads).expand(
                batch, -1, -1, -1
            )
        x = self.parts.gather_from_sp_region(x)
        maps = [x, *(heads_of(linear(part, x), self.heads) for part in (self.q_proj, self.kv_proj))]
        if state is None:
            nothing = x.new_zeros(batch, 0, 2, self.heads, self.config.head_dim)
            state = MacState(None, Recall(), KVCache(nothing, nothing))
        # Behind a state with room one token leaves one, whatever its row holds.
        has_room = state.kept.keys.shape[1] == self.config.segment_length - 1 and x.shape[1] == 1
        if rows is None and (state.kept.real is None or has_room):
            output, state = self._whole_rows(maps, prefix, state)
        else:
            output, state = self._packed_rows(maps, prefix, state, rows)
        return self.parts.scatter_to_sp_region(output), state

    def _whole_rows(self, maps: list[Tensor], prefix: Tensor | None, state: MacState) -> tuple[Tensor, MacState]:
        """The segments of rows that hold one sequence each."""
        outputs, start, length = [], 0, maps[0].shape[1]
        while start < length:
            stop = min(length, start + self.config.segment_length - state.kept.keys.shape[1])
            output, state = self._within_segment([part[:, start:stop] for part in maps], prefix, state, None)
            outputs.append(output)
            start = stop
        return torch.cat(outputs, 1), state

    def _packed_rows(
        self, maps: list[Tensor], prefix: Tensor | None, state: MacState, rows: PackedRows | None
    ) -> tuple[Tensor, MacState]:
        """The segments of packed or padded rows, which begin and end at different tokens."""
        kept = state.kept
        if rows is None:
            rows = PackedRows(real=torch.ones(maps[0].shape[:2], dtype=torch.bool, device=kept.keys.device))
        filled = [kept.keys.shape[1]] * len(kept.keys) if kept.real is None else kept.real.sum(1).tolist()
        output = torch.zeros_like(maps[0])
        for segment in segments_of(rows, filled, self.config.segment_length):
            parts = [take(part, segment.places) for part in maps]
            piece, state = self._within_segment(parts, prefix, state, segment)
            row, token = segment.real.nonzero(as_tuple=True)
            output = output.index_put((row, segment.places[row, token]), piece[row, token])
        return output, state

    def _within_segment(
        self, maps: list[Tensor], prefix: Tensor | None, state: MacState, segment: Segment | None
    ) -> tuple[Tensor, MacState]:
        """A piece that ends before or with the open segment."""
        x, queries, keys_values = maps
        rows, real, before, recall = None, None, state.kept, state.recall
        if segment is not None:
            # What came before a document is out of sight; its own segment is then one.
            rows, real, before = segment.rows, PackedRows(real=segment.real), _without(before, segment.restarts)
            recall = Recall(recall.weights, recall.query_tail, segment.restarts)
        recalled, recall = self.memory(x, recall=recall, rows=rows)
        recalled = self.parts.copy_to_tp_region(linear(self.memory_output, self.parts.memory.merge_heads(recalled)))
        recalled_kv = heads_of(linear(self.kv_proj, recalled), self.heads)
        keys, values = torch.stack([recalled_kv, keys_values], 2).chunk(2, -1)
        kept = before.extended(keys, values)
        past, base = before.keys.shape[1], self.config.rope_base
        attention = attend(
            self.rotate(queries, past, base),
            self.rotate(kept.keys.flatten(2, 3), 0, base).unflatten(2, (2, -1)).flatten(1, 2),
            kept.values.flatten(1, 2),
            keys_per_token=2,
            prefix=None if prefix is None else Prefix(queries, *prefix.chunk(2, -1)),
            documents=before.documents(real, x.shape[1]),
            backend=self.config.attention_backend,
        )
        y = linear(self.attention_output, attention.flatten(2))
        memory, written = self.memory(self.parts.copy_to_tp_region(y), state.written, rows=rows)
        m, eps = linear(self.memory_output, self.parts.memory.merge_heads(memory)), self.config.norm_eps
        output = self.combine(self.norm(y, self.attention_norm, eps), self.norm(m, self.memory_norm, eps))
        return output, self._after(written, recall, kept, segment, rows)

    def _after(
        self,
        written: NeuralMemoryState,
        recall: Recall,
        kept: KVCache,
        segment: Segment | None,
        rows: PackedRows | None,
    ) -> MacState:
        """The state behind a piece; where it fills a segment, the next one recalls the memory as it is now."""
        if segment is None and kept.real is not None:
            full = kept.real.all(1)
            after = kept.last(self.config.segment_length - 1, None)
            after.real = kept.real[:, 1:] & ~full.unsqueeze(1)
            return MacState(written, _next_recall(recall, written, full), after)
        if segment is None:
            if kept.keys.shape[1] < self.config.segment_length:
                return MacState(written, recall, kept)
            return MacState(written, Recall(written.memory.weights, recall.query_tail), kept.last(0, None))
        after = kept.last(int(segment.fill.max()), rows, segment.fill)
        return MacState(written, _next_recall(recall, written, segment.full), after)


def _next_recall(recall: Recall, written: NeuralMemoryState, full: Tensor) -> Recall:
    """What the next token recalls, where these rows (B,) have filled their segments."""
    assert recall.weights is not None
    both = zip(written.memory.weights, recall.weights, strict=True)
    return Recall([torch.where(full[:, None, None, None], new, old) for new, old in both], recall.query_tail)


def initial_norm(config: TitansConfig) -> float:
    """Where the scales of y and m begin.

    y (x) m goes to the residual stream without a matrix behind it, so the norms in front have to do what small initial
    weights do elsewhere; unscaled noise cost the quickstart 0.1 nats. A memory that recalls from the first step is
    heard at full size.
    """
    if config.memory_init == "next_token":
        return 1.0
    return config.init_std * math.sqrt(config.dim / (2.0 * config.num_layers))


def _without(kept: KVCache, restarts: Tensor) -> KVCache:
    """Without the keys of rows that begin a document."""
    real = kept.keys.new_ones(kept.keys.shape[:2], dtype=torch.bool) if kept.real is None else kept.real
    return KVCache(kept.keys, kept.values, real & ~restarts.unsqueeze(1))


# The memory reads before the attention and once more behind it.
_USES = {"memory.qg_proj": (2, 0), "memory_output": (2, 0), "kv_proj": (2, 1)}


@register
class Mac(MixerSpec):
    """Attention within segments, over what a memory recalls."""

    name = "mac"
    title = "Titans, memory as context (MAC)"
    paper = "Titans MAC"
    module = MacMixer
    state = MacState
    attention = ("q_proj.", "kv_proj.", "attention_output.")
    memory = persistent = True
    beginnings = BEGINNINGS
    uses = _USES

    def check(self, config: TitansConfig) -> None:
        """A segment is whole chunks."""
        super().check(config)
        if config.segment_length < 1 or config.segment_length % config.chunk_size:
            raise ValueError(
                f"segment_length {config.segment_length} is not a multiple of chunk_size {config.chunk_size}; "
                "memory chunks may not cross a segment"
            )

    def unit(self, config: TitansConfig) -> tuple[int, str]:
        """Segments."""
        return config.segment_length, "segments of model.segment_length"

    def reach(self, config: TitansConfig) -> int:
        """The segment."""
        return config.segment_length

    def without_memory(self, state: Any) -> Any:
        """The open segment stays, with what its tokens have recalled."""
        return type(state)(None, type(state.recall)(), state.kept)

    def pieces(self, config: TitansConfig, length: int) -> list[int]:
        """The segments of a row of one document."""
        whole, rest = divmod(length, config.segment_length)
        return [config.segment_length] * whole + ([rest] if rest else [])

    def keys(self, config: TitansConfig, length: int) -> float:
        """Two at each token of a segment: its own and its recalled memory's."""
        seen = sum(size * (size + 1) for size in self.pieces(config, length))
        return seen / length + config.persistent_tokens

    def flops(self, config: TitansConfig, length: int, tokens: int, persistent: int) -> dict[str, int]:
        """The recall reads once more; the memory does not read persistent tokens."""
        flops = super().flops(config, length, tokens, 0)
        return flops | {"memory": flops["memory"] + tokens * 2 * memory_numbers(config)}

    def kept(self, work: Workload) -> float:
        """Two keys a token, memory and recall with its network, y and h, y (x) m."""
        config, w = work.config, work.w
        keys = 2 * min(config.segment_length, work.length) + config.persistent_tokens
        network = 8 * config.memory_expansion * (config.memory_depth - 1) * config.memory_shape.channels / work.ranks
        documents = (config.conv_kernel + 3) * w if work.documents else 0
        recall = (10 * w + 4 + documents) * work.m + network
        return 11 * w * work.e + (1 + w) * keys + memory_kept(work) + recall + 6 * w * config.dim

    def states_kept(self, work: Workload) -> float:
        """With documents half a state more for every segment: the weights that are recalled there."""
        return memory_states(work, self.pieces(work.config, work.length), work.documents / 2)

    def message(self, work: Workload) -> int:
        """Memory and tails, and those of the recall; segments are whole, so no keys."""
        return memory_message(work) + weights_message(work) + tail_message(work, work.config.memory_shape.channels)
