"""What mixers keep of earlier tokens, row by row: the taps of a convolution, the keys that are still seen."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attention.attend import Documents
from ..memory import PackedRows, TensorTree


def causal_conv(
    x: Tensor, tail: Tensor, kernel: Tensor, rows: PackedRows | None = None, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over time.

    Args:
        x: (B, T, H, F).
        tail: The K - 1 tokens before x, (B, K - 1, H, F), zeros at the start of a sequence.
        kernel: (H, F, K), the last tap is the token's own.
        rows: Documents and padding of x; padding stands behind the real tokens.
        start: What stands before a document, (1, K - 1, H, F); zeros if None.

    Returns:
        (B, T, H, F), and the tail for the next piece.
    """
    taps, length = kernel.shape[-1], x.shape[1]
    joined = torch.cat([tail, x], 1)
    if rows is None and length == 1:
        return (joined * kernel.movedim(-1, 0)).sum(1, keepdim=True), joined[:, 1:]
    if rows is None:
        # As a sum over taps: torch's depthwise convolution copies x twice, and takes longer for one token than for ten.
        out = joined[:, :length] * kernel[..., 0]
        for tap in range(1, taps):
            out = torch.addcmul(out, joined[:, tap : tap + length], kernel[..., tap])
        return out, joined[:, length:]
    before = torch.zeros_like(tail) if start is None else start.expand_as(tail)
    pool = torch.cat([joined, before], 1)

    def earlier(token: Tensor, document: Tensor, position: Tensor, back: int) -> Tensor:
        """Place in the pool of what stands `back` tokens before these, (B, I)."""
        inside = (document <= 0) | (position >= back)
        return torch.where(inside, taps - 1 + token - back, length + 2 * (taps - 1) + position - back)

    token = torch.arange(length, device=x.device).expand(x.shape[:2])
    out = torch.zeros_like(x)
    for back in range(taps):
        places = earlier(token, rows.documents, rows.positions, back)
        out = out + take(pool, places) * kernel[..., taps - 1 - back]
    last = rows.ends.unsqueeze(1) - 1
    position = rows.positions.gather(1, last.clamp_min(0))
    ended = [earlier(last, rows.last_documents.unsqueeze(1), position, back) for back in range(taps - 2, -1, -1)]
    return out, take(pool, torch.cat(ended, 1)) if ended else tail


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


def take(x: Tensor, places: Tensor) -> Tensor:
    """x[b, places[b, i]], (B, I, ...) from (B, T, ...)."""
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    return x.flatten(0, 1).index_select(0, (rows + places).flatten()).unflatten(0, places.shape)
