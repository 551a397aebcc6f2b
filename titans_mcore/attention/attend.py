"""One attention for every variant: causal, over a window, with a prefix that every query sees.

The prefix (persistent tokens) has no position: queries meet it unrotated, so that its weight does not depend on how
far into a sequence the query stands.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..memory import PackedRows, TensorTree
from ..memory.layout import take
from .flash import flash_attend, why_not_flash

BACKENDS = ("auto", "sdpa", "flash", "dense")
_QUERY_BLOCK = 512  # tokens; bounds the mask and the scores of a long piece


@dataclass
class Prefix:
    """Keys that every query sees.

    Attributes:
        queries: The queries without rotation, (B, T, H, D).
        keys: (B, N, H, D), without rotation.
        values: (B, N, H, D).
    """

    queries: Tensor
    keys: Tensor
    values: Tensor


@dataclass
class Documents:
    """Which document a token belongs to, by number; padding has a number of its own.

    Attributes:
        queries: (B, T).
        keys: (B, P + T).
    """

    queries: Tensor
    keys: Tensor


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    window: int = 0,
    keys_per_token: int = 1,
    prefix: Prefix | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of the last T tokens over themselves and what came before.

    Args:
        queries: (B, T, H, D), positions applied.
        keys: (B, (P + T) * keys_per_token, H, D), positions applied: those of P earlier tokens, then those of the
            queries' own tokens.
        values: Like keys.
        window: Tokens that a query sees, its own included; 0 means all earlier ones.
        keys_per_token: Keys that stand beside each token, all visible from that token on (2 in a MAC segment: the
            token's and its recalled memory's).
        prefix: Keys that every query sees, none if None.
        documents: Where given, a query sees keys of its own document only.
        backend: "dense" is the written-out softmax over a mask (the oracle), "sdpa" torch's attention in blocks of
            queries, "flash" FlashAttention (CUDA), "auto" flash where it can be used and sdpa elsewhere.

    Returns:
        (B, T, H, D).

    Raises:
        ValueError: The backend is unknown or cannot be used here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "sdpa" if why_not_flash(queries, keys, keys_per_token, documents) else "flash"
    if backend == "flash":
        return flash_attend(queries, keys, values, window, keys_per_token, prefix, documents)
    attention = _dense if backend == "dense" else _sdpa
    return attention(queries, keys, values, window, keys_per_token, prefix, documents)


def visible(
    first: int, queries: int, first_key: int, keys: int, window: int, keys_per_token: int, device: torch.device
) -> Tensor:
    """Mask (queries, keys), True where token first + i sees key first_key + j."""
    token = torch.arange(first, first + queries, device=device)[:, None]
    key_token = torch.arange(first_key, first_key + keys, device=device)[None] // keys_per_token
    mask = key_token <= token
    return mask & (key_token > token - window) if window else mask


def _in_document(mask: Tensor, documents: Documents | None, queries: slice, keys: slice, keys_per_token: int) -> Tensor:
    """A mask (queries, keys) narrowed to documents, (B, 1, queries, keys); as it is without any."""
    if documents is None:
        return mask
    key_documents = documents.keys.repeat_interleave(keys_per_token, 1)[:, keys]
    return mask & (documents.queries[:, queries, None] == key_documents[:, None]).unsqueeze(1)


def _dense(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int,
    keys_per_token: int,
    prefix: Prefix | None,
    documents: Documents | None,
) -> Tensor:
    length, past = queries.shape[1], keys.shape[1] // keys_per_token - queries.shape[1]
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys)
    mask = visible(past, length, 0, keys.shape[1], window, keys_per_token, queries.device)
    mask = _in_document(mask, documents, slice(None), slice(None), keys_per_token)
    scores = scores.masked_fill(~mask, -math.inf)
    if prefix is not None:
        scores = torch.cat([torch.einsum("bqhd,bkhd->bhqk", prefix.queries, prefix.keys), scores], -1)
        values = torch.cat([prefix.values, values], 1)
    weights = (scores.float() if scores.dtype != torch.float64 else scores) / math.sqrt(queries.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1).to(values.dtype), values)


def _sdpa(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int,
    keys_per_token: int,
    prefix: Prefix | None,
    documents: Documents | None,
) -> Tensor:
    length, past = queries.shape[1], keys.shape[1] // keys_per_token - queries.shape[1]
    scale = 1.0 / math.sqrt(queries.shape[-1])
    if prefix is not None:
        # One softmax over two kinds of scores: the rotated halves meet the keys, the plain ones meet the prefix.
        queries = torch.cat([queries, prefix.queries], -1)
        keys = torch.cat([keys, torch.zeros_like(keys)], -1)
        prefix_keys = torch.cat([torch.zeros_like(prefix.keys), prefix.keys], -1)
    outputs = []
    for start in range(0, length, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, length)
        first_key = max(0, past + start - window + 1) * keys_per_token if window else 0
        last_key = (past + stop) * keys_per_token
        k, v = keys[:, first_key:last_key], values[:, first_key:last_key]
        mask = visible(
            past + start, stop - start, first_key, last_key - first_key, window, keys_per_token, queries.device
        )
        mask = _in_document(mask, documents, slice(start, stop), slice(first_key, last_key), keys_per_token)
        if prefix is not None:
            k, v = torch.cat([prefix_keys, k], 1), torch.cat([prefix.values, v], 1)
            mask = F.pad(mask, (prefix.keys.shape[1], 0), value=True)
        q = queries[:, start:stop].transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, 1)


def rotate(x: Tensor, first_position: int | Tensor, base: float) -> Tensor:
    """Rotate x (B, T, H, D), whose token t stands at position first_position + t, of all rows or of each, (B,)."""
    first = first_position.unsqueeze(-1) if isinstance(first_position, Tensor) else first_position
    return rotate_to(x, first + torch.arange(x.shape[1], dtype=torch.float64, device=x.device), base)


def rotate_to(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotate x (B, T, H, D), whose tokens stand at these positions, of all rows (T,) or of each, (B, T).

    Angles are built in float64: in float32 they are off by 0.1 rad two million tokens into a sequence.
    """
    width = x.shape[-1]
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=x.device) / width)
    angles = (positions.unsqueeze(-1) * frequencies).unsqueeze(-2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


@dataclass
class KVCache(TensorTree):
    """Keys and values that later tokens still see, without positions.

    Rows that have kept different numbers hold them at the end; only differences of places count.

    Attributes:
        keys: (B, P, ...).
        values: (B, P, ...).
        real: Which of them are there, (B, P) bool; None if all are.
    """

    keys: Tensor
    values: Tensor
    real: Tensor | None = None

    def documents(self, rows: PackedRows | None, tokens: int) -> Documents | None:
        """Who sees whom of what is kept and so many new tokens; None if all rows are whole."""
        if rows is None and self.real is None:
            return None
        batch, past = self.keys.shape[:2]
        new = rows.documents if rows is not None else self.keys.new_zeros(batch, tokens, dtype=torch.long)
        real = new.new_ones(batch, past, dtype=torch.bool) if self.real is None else self.real
        return Documents(new, torch.cat([real.long() - 1, new], 1))

    def with_room(self, count: int) -> "KVCache":
        """The same with that many places, at least as many as there are; those in front are empty."""
        real = self.keys.new_ones(self.keys.shape[:2], dtype=torch.bool) if self.real is None else self.real
        more = count - self.keys.shape[1]
        keys, values = (F.pad(x, (0, 0) * (x.dim() - 2) + (more, 0)) for x in (self.keys, self.values))
        return KVCache(keys, values, F.pad(real, (more, 0)))

    def extended(self, keys: Tensor, values: Tensor) -> "KVCache":
        """With those of a piece's tokens behind."""
        real = None if self.real is None else F.pad(self.real, (0, keys.shape[1]), value=True)
        return KVCache(torch.cat([self.keys, keys], 1), torch.cat([self.values, values], 1), real)

    def last(self, count: int, rows: PackedRows | None, fill: Tensor | None = None) -> "KVCache":
        """The last `count` of a tree that `extended` made with the tokens of `rows`.

        Args:
            count: How many are kept at most.
            rows: Documents and padding of the piece; of what is kept, only the row's last document counts.
            fill: How many are kept of each row, (B,); None for all that are there.
        """
        total = self.keys.shape[1]
        count = min(count, total)
        if rows is None and fill is None:
            real = None if self.real is None else self.real[:, total - count :]
            return KVCache(self.keys[:, total - count :], self.values[:, total - count :], real)
        batch, device = self.keys.shape[0], self.keys.device
        past = total - (rows.shape[1] if rows is not None else 0)
        there = torch.ones(batch, total, dtype=torch.bool, device=device) if self.real is None else self.real
        ends = torch.full((batch, 1), total, device=device)
        if rows is not None:
            last = rows.last_documents.unsqueeze(1)
            there = torch.cat([there[:, :past] & (last == 0), rows.documents == last], 1)
            ends = past + rows.ends.unsqueeze(1)
        places = ends - count + torch.arange(count, device=device)
        real = there.gather(1, places.clamp_min(0)) & (places >= 0)
        if fill is not None:
            real &= torch.arange(count, device=device) >= count - fill.to(device).unsqueeze(1)
        places = places.clamp_min(0)
        return KVCache(take(self.keys, places), take(self.values, places), real)
