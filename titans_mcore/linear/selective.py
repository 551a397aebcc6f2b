"""The selective scan of Mamba (Gu, Dao, arXiv 2312.00752), whose state is N numbers for each channel c of the values.

    h_t = exp(D_t A) h_{t-1} + D_t B_t u_t        y_t = C_t h_t

D is a time step of the channel, A belongs to channel and number, B and C to the number alone. There is no form of
matrix products; what is sequential is gone through for all n chunks of a span at once, position by position: first for
what each chunk makes of nothing and keeps of what came before, then, when the chunks' first states have been handed
through, for the reads. That is 2 C + n steps instead of C n. Decays are never divided by.

Where a document begins, nothing is kept. Padding has a time step of 0.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..memory import PackedRows
from ..memory.checkpoint import Recomputed
from .handover import Handover, Opened, handed_over
from .scan import in_chunks_of

SELECTIVE_CHUNK = 16  # tokens
SELECTIVE_SPAN = 512  # tokens whose states, N numbers a channel each, are in memory at a time


class Marks(NamedTuple):
    """What goes with tokens and has no gradient, (B, T) each, or None for none.

    Attributes:
        starts: Tokens that begin a document.
        real: Which are not padding.
    """

    starts: Tensor | None
    real: Tensor | None


def selective_scan(
    values: Tensor,
    steps: Tensor,
    rates: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    *,
    state: Tensor | Handover | None = None,
    rows: PackedRows | None = None,
) -> tuple[Tensor, Tensor]:
    """Writes and reads every token.

    Args:
        values: u (B, T, F) of F channels.
        steps: D (B, T, F), 0 or more.
        rates: A (F, N), 0 or less.
        inputs: B (B, T, N).
        outputs: C (B, T, N).
        state: h before the first token, (B, F, N); None is 0. Or where it comes from, when the tokens have been read
            without it: handover.py.
        rows: Documents and padding. Padding may stand anywhere, and what is read there means nothing.

    Returns:
        y (B, T, F) in the dtype of the values, and h after the last token, float32 (float64 where values are).
    """
    masks = (None, None) if rows is None else (rows.starts, rows.real)
    marks = Marks(*(None if x is None else x.to(values.device) for x in masks))
    tokens = [values, steps, inputs, outputs]
    whole = partial(_whole, marks, rates, tokens)
    if state is None or isinstance(state, Tensor):
        return whole(state)
    goes_on = values.shape[1] if rows is None else rows.goes_on
    return handed_over(state, whole, partial(_opened, marks, rates, tokens, goes_on))


def _whole(marks: Marks, rates: Tensor, tokens: list[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Span by span from a state."""
    values, wide, reads = tokens[0], torch.promote_types(tokens[0].dtype, torch.float32), []
    if state is None:
        state = values.new_zeros(len(values), *rates.shape, dtype=wide)
    for begin in range(0, values.shape[1], SELECTIVE_SPAN):
        span = slice(begin, begin + SELECTIVE_SPAN)
        here = Marks(*(None if x is None else x[:, span] for x in marks))
        read, state = Recomputed.apply(partial(_span, here), state.to(wide), rates, *(x[:, span] for x in tokens))
        reads.append(read)
    return reads[0] if len(reads) == 1 else torch.cat(reads, 1), state


def _opened(marks: Marks, rates: Tensor, tokens: list[Tensor], goes_on: int) -> Opened:
    """Without a state before: what P leaves of it after t tokens is exp(A sum D), each number by itself."""
    reads, state = _whole(marks, rates, tokens, None)
    starts, real = (None if x is None else x[:, :goes_on] for x in marks)
    steps, outputs = tokens[1][:, :goes_on].to(state.dtype), tokens[3][:, :goes_on]
    total = (steps if real is None else steps.masked_fill(~real.unsqueeze(-1), 0.0)).cumsum(1)
    over = None if starts is None else starts.cumsum(1) > 0

    def through(before: Tensor) -> Tensor:
        kept = (total[:, -1].unsqueeze(-1) * rates.to(total.dtype)).exp()
        return before * (kept if over is None else kept.masked_fill(over[:, -1, None, None], 0.0))

    def added(before: Tensor) -> Tensor:
        spans = zip(total.split(SELECTIVE_SPAN, 1), outputs.split(SELECTIVE_SPAN, 1), strict=True)
        found = torch.cat([Recomputed.apply(_read_channels, before, rates, *span)[0] for span in spans], 1)
        found = found if over is None else found.masked_fill(over.unsqueeze(-1), 0.0)
        return F.pad(found, (0, 0, 0, reads.shape[1] - goes_on))

    return Opened(reads, state, through, added)


def _read_channels(state: Tensor, rates: Tensor, total: Tensor, outputs: Tensor) -> tuple[Tensor]:
    """What is read of h (B, F, N) after time steps that come to total (B, T, F)."""
    held = (total.unsqueeze(-1) * rates.to(total.dtype)).exp() * state.unsqueeze(1)
    return ((held @ outputs.to(total.dtype).unsqueeze(-1)).squeeze(-1),)


def _span(
    marks: Marks, state: Tensor, rates: Tensor, values: Tensor, steps: Tensor, inputs: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """selective_scan of one span; shapes inside are (B, n, C, F, N)."""
    length, wide = values.shape[1], state.dtype
    size = min(SELECTIVE_CHUNK, length)
    chunked = partial(in_chunks_of, size)

    if marks.real is not None:
        steps = steps.masked_fill(~marks.real.unsqueeze(-1), 0.0)
    step = chunked(steps.to(wide))
    keep = (step.unsqueeze(-1) * rates.to(wide)).exp()
    if marks.starts is not None:
        keep = keep.masked_fill(chunked(marks.starts)[..., None, None], 0.0)
    write = (step * chunked(values.to(wide))).unsqueeze(-1) * chunked(inputs.to(wide)).unsqueeze(-2)
    # A slice at a time, backward would fill a tensor of the whole span for each of them.
    keeps, writes, to_read = keep.unbind(2), write.unbind(2), chunked(outputs.to(wide)).unbind(2)
    alone, through = writes[0], keeps[0]
    for kept, written in zip(keeps[1:], writes[1:], strict=True):
        alone = kept * alone + written
        through = kept * through
    begins = []
    for kept, written in zip(through.unbind(1), alone.unbind(1), strict=True):
        begins.append(state)
        state = kept * state + written
    held, reads = torch.stack(begins, 1), []
    for kept, written, query in zip(keeps, writes, to_read, strict=True):
        held = kept * held + written
        reads.append((held @ query.unsqueeze(-1)).squeeze(-1))
    read = torch.stack(reads, 2).flatten(1, 2)[:, :length]
    return read.to(values.dtype), state
