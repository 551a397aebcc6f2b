"""Where the segments of MAC lie in packed rows: each document begins a segment of its own."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..memory import PackedRows


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
