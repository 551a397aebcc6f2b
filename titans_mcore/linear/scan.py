"""The linear recurrence of RetNet, Mamba2, DeltaNet and Gated DeltaNet, in chunks of matrix products.

    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + w_t k_t v_t^T        o_t = scale S_t^T q_t

w is beta where there is one (the delta rule of DeltaNet, arXiv 2406.06484, with the decay of Gated DeltaNet,
arXiv 2412.06464) and 1 where there is none (RetNet, arXiv 2307.08621; Mamba2, arXiv 2405.21060). With L the sum of
log a from the chunk's first token on, G_tj = exp(L_t - L_j) for j <= t and 0 behind, and S the state before the chunk:

    delta rule  [U | W] solves (I + tril(beta K K^T * G, -1)) [U | W] = [beta V | beta e^L K]
    writes      V' = U - W S, or V without beta
    reads       O  = scale ((Q K^T * G) V' + e^L Q S)
    state       S' = e^L_C S + (e^(L_C - L) K)^T V'

Only S goes from chunk to chunk, and the size of chunks changes nothing but rounding. What is above the diagonal is
masked before exp: there it would overflow, and infinity times 0 is not a number in the backward pass.

Documents and padding are masks. G is 0 between documents; e^L is 0 for tokens of a document that did not begin before
the chunk, e^(L_C - L) for those of one that ends inside it, e^L_C where another one begins. Padding has log a = 0 and
writes nothing.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..memory import PackedRows
from ..memory.checkpoint import Recomputed
from .fla import by_sequences, fla_kernel, why_not_fla
from .handover import Handover, Opened, handed_over

CHUNK = 64  # tokens
SPAN = 2048  # tokens between two states that are kept for the backward pass, which works out what is inside again


def linear_scan(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float = 1.0,
    state: Tensor | Handover | None = None,
    rows: PackedRows | None = None,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Writes and reads every token.

    Args:
        queries: (B, T, G, K), in groups of heads that share them: G divides H.
        keys: (B, T, G, K).
        values: (B, T, H, V).
        log_decay: log a, (B, T, H), 0 or less; None where nothing decays.
        beta: How much of what a key stands for is replaced, (B, T, H), for the delta rule, which wants G = H; None for
            a state that is added to.
        scale: Of what is read.
        state: S before the first token, (B, H, K, V); None is 0. Or where it comes from, when the tokens have been read
            without it: handover.py.
        rows: Documents and padding. Padding may stand anywhere, and what is read there means nothing.
        backend: "torch", or "fla" for flash-linear-attention's kernels, where the state before is at hand: what other
            ranks hand over is read in torch.

    Returns:
        (B, T, H, V) in the dtype of the values, and S after the last token, float32 (float64 where values are).

    Raises:
        ValueError: Shapes do not fit together, or the kernels cannot take them.
    """
    held = state if state is None or isinstance(state, Tensor) else state.given
    _check(queries, keys, values, log_decay, beta, held)
    scan = _Scan(queries, keys, values, log_decay, beta, scale, rows)
    if state is None or isinstance(state, Tensor):
        if backend == "fla":
            before = scan.nothing() if state is None else state.to(scan.wide)
            if reason := why_not_fla(values.dtype, values.device):
                raise ValueError(reason)
            kernel = fla_kernel(log_decay, beta)
            return by_sequences(kernel, queries, keys, values, log_decay, beta, scale, before, rows)
        return scan.whole(state)
    return handed_over(state, scan.whole, scan.fading if beta is None else scan.replacing)


@dataclass(frozen=True)
class _Scan:
    """linear_scan of its arguments."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    scale: float
    rows: PackedRows | None

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.values.dtype, torch.float32)

    @property
    def document(self) -> Tensor | None:
        """Number of each token's, 0 for the one that goes on from before."""
        starts = None if self.rows is None else self.rows.starts
        return None if starts is None else starts.to(self.values.device).cumsum(1)

    @property
    def real(self) -> Tensor | None:
        real = None if self.rows is None else self.rows.real
        return None if real is None else real.to(self.values.device)

    def nothing(self) -> Tensor:
        """The state before a sequence."""
        batch, _, heads, width = self.values.shape
        return self.values.new_zeros(batch, heads, self.keys.shape[-1], width, dtype=self.wide)

    def whole(self, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Span by span from a state."""
        state = self.nothing() if state is None else state
        tokens = [self.queries, self.keys, self.values, self.log_decay, self.beta]
        document, real, reads = self.document, self.real, []
        for begin in range(0, self.values.shape[1], SPAN):
            span = slice(begin, begin + SPAN)
            part = [None if x is None else x[:, span] for x in tokens]
            before = None if document is None else document[:, begin - 1] if begin else document[:, 0] * 0
            here, there = (None if x is None else x[:, span] for x in (document, real))
            layout = ScanLayout(self.scale, here, there, before)
            read, state = Recomputed.apply(partial(in_chunks, layout), state.to(self.wide), *part)
            reads.append(read)
        return reads[0] if len(reads) == 1 else torch.cat(reads, 1), state

    def cut(self, begin: int, end: int) -> "_Scan":
        """Some of the tokens."""
        if (begin, end) == (0, self.values.shape[1]):
            return self

        def part(x: Any) -> Any:
            return None if x is None else x[:, begin:end]

        names = ("queries", "keys", "values", "log_decay", "beta")
        rows = None if self.rows is None else PackedRows(part(self.rows.starts), part(self.rows.real))
        return replace(self, **{name: part(getattr(self, name)) for name in names}, rows=rows)

    @property
    def goes_on(self) -> int:
        """Tokens that have to do with a state before."""
        return self.values.shape[1] if self.rows is None else self.rows.goes_on

    def fading(self) -> Opened:
        """Without a state before, of which tokens do nothing but let it fade: P_t is e^L_t."""
        reads, state = self.whole(None)
        length, rates = self.values.shape[1], self.log_decay
        rates = self.values.new_zeros(self.values.shape[:3]) if rates is None else rates
        queries, rates = (x[:, : self.goes_on] for x in (self.queries, rates.to(self.wide)))
        if (real := self.real) is not None:
            rates = rates.masked_fill(~real[:, : self.goes_on, None], 0.0)
        total = rates.cumsum(1)
        if (document := self.document) is not None:
            total = total.masked_fill(document[:, : self.goes_on, None] > 0, -torch.inf)

        def added(before: Tensor) -> Tensor:
            spans = zip(queries.split(SPAN, 1), total.split(SPAN, 1), strict=True)
            found = [Recomputed.apply(partial(_read_faded, self.scale), before, q, sums)[0] for q, sums in spans]
            return F.pad(torch.cat(found, 1), (0, 0, 0, 0, 0, length - self.goes_on))

        return Opened(reads, state, lambda before: total[:, -1, :, None, None].exp() * before, added)

    def replacing(self) -> Opened:
        """Without a state before, of which the delta rule replaces parts: what it makes of K columns of I, is P.

        They are scanned beside those of V, in which tokens write.
        """
        (length, _, width), like = self.values.shape[1:], self.nothing()
        eye = torch.eye(like.shape[-2], dtype=like.dtype, device=like.device)
        front = self.cut(0, self.goes_on)
        both, state = front.whole(torch.cat([like, eye.expand(*like.shape[:2], -1, -1)], -1))
        (reads, seen), (state, through) = (x.split([width, len(eye)], -1) for x in (both, state))
        if self.goes_on < length:
            behind, state = self.cut(self.goes_on, length).whole(state)
            reads = torch.cat([reads, behind], 1)

        def added(before: Tensor) -> Tensor:
            found = Recomputed.apply(_read_replaced, before, seen)[0]
            return F.pad(found, (0, 0, 0, 0, 0, length - self.goes_on))

        return Opened(reads, state, lambda before: through @ before, added)


class ScanLayout(NamedTuple):
    """What goes with tokens and has no gradient.

    Attributes:
        scale: Of what is read.
        document: Number of each token's document, (B, T); None where no document begins.
        real: Which tokens are not padding, (B, T); None if all are.
        before: Number of the document that the state before is of, (B,); None as for `document`.
    """

    scale: float
    document: Tensor | None
    real: Tensor | None
    before: Tensor | None


def in_chunks(
    layout: ScanLayout,
    state: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """linear_scan of one span: everything but the loop over states at once for all n chunks of C tokens.

    Shapes inside are (B, n, G, C, K) for queries and keys, (B, n, G, R, C, V) for the values of the R heads of a group,
    (B, n, G, R, C) for a number a token, and (B, G, R, K, V) for states. With the delta rule states may have more
    columns than values: nothing is written in these.
    """
    (batch, length, heads, width), groups, wide = values.shape, keys.shape[2], state.dtype
    size = min(CHUNK, length)
    padding = -length % size
    chunked = partial(in_chunks_of, size)

    def by_head(x: Tensor) -> Tensor:
        """(B, T, H) to (B, n, G, R, C)."""
        x = x.to(wide)
        if layout.real is not None:
            x = x.masked_fill(~layout.real.unsqueeze(-1), 0.0)
        return chunked(x).unflatten(-1, (groups, -1)).permute(0, 1, 3, 4, 2)

    q, k = (chunked(x.to(wide)).transpose(2, 3) for x in (queries * layout.scale, keys))
    if layout.real is not None:
        values = values.masked_fill(~layout.real[..., None, None], 0.0)
    v = chunked(values.to(wide)).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)
    total = by_head(values.new_zeros(batch, length, heads) if log_decay is None else log_decay).cumsum(-1)  # L
    masks = _masks(layout, size, padding, values)
    between = total.unsqueeze(-1) - total.unsqueeze(-2)
    decay = between.masked_fill(~masks.seen, -torch.inf).exp()  # G
    from_before = total.masked_fill(~masks.goes_on, -torch.inf).exp().unsqueeze(-1)
    to_end = (total[..., -1:] - total).masked_fill(~masks.lasts, -torch.inf).exp().unsqueeze(-1)
    stays = total[..., -1].masked_fill(~masks.stays, -torch.inf).exp()[..., None, None]

    matrix = state.unflatten(1, (groups, -1))
    states, writes = [], []
    if beta is None:
        # What a chunk writes does not depend on the state: only a sum of K x V numbers is left to the loop.
        added = torch.einsum("bngsk,bngrsv->bngrkv", k, v * to_end)
        for stay, add in zip(stays.unbind(1), added.unbind(1), strict=True):
            states.append(matrix)
            matrix = stay * matrix + add
        written = v
    else:
        rate = by_head(beta).unsqueeze(-1)
        own_keys = k.unsqueeze(3)  # R is 1
        system = (rate * (own_keys @ own_keys.mT) * decay).tril(-1)
        sides = torch.cat([rate * v, rate * from_before * own_keys], -1)
        solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
        alone, through = solved.split([width, k.shape[-1]], -1)
        alone = F.pad(alone, (0, state.shape[-1] - width))
        by_chunk = (x.unbind(1) for x in (alone, through, own_keys, to_end, stays))
        for own, asked, key, end, stay in zip(*by_chunk, strict=True):
            states.append(matrix)
            writes.append(own - asked @ matrix)
            matrix = stay * matrix + key.mT @ (end * writes[-1])
        written = torch.stack(writes, 1)
    read = (q @ k.mT).unsqueeze(3) * decay @ written
    read = read + from_before * torch.einsum("bngtk,bngrkv->bngrtv", q, torch.stack(states, 1))
    read = read.permute(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, state.shape[-1])[:, :length]
    return read.to(values.dtype), matrix.flatten(1, 2)


def _read_faded(scale: float, state: Tensor, queries: Tensor, total: Tensor) -> tuple[Tensor]:
    """scale e^L Q S, (B, T, H, V), of S (B, H, K, V), Q (B, T, G, K) and L (B, T, H)."""
    groups = queries.shape[2]
    asked = queries.to(state.dtype) * scale
    read = torch.einsum("btgk,bgrkv->btgrv", asked, state.unflatten(1, (groups, -1))).flatten(2, 3)
    return (read * total.exp().unsqueeze(-1),)


def _read_replaced(state: Tensor, seen: Tensor) -> tuple[Tensor]:
    """What is read of S (B, H, K, V) by what is read of I, (B, T, H, K)."""
    return (torch.einsum("bthk,bhkv->bthv", seen.to(state.dtype), state),)


def in_chunks_of(size: int, x: Tensor) -> Tensor:
    """(B, T, ...) to (B, n, C, ...) of that size C, with zeros behind the last token."""
    if padding := -x.shape[1] % size:
        x = torch.cat([x, x.new_zeros(len(x), padding, *x.shape[2:])], 1)
    return x.unflatten(1, (-1, size))


class _Masks(NamedTuple):
    """Who has to do with whom, to be broadcast over (B, n, G, R, C).

    Attributes:
        seen: Tokens that a token reads, (..., C, C).
        goes_on: Tokens of the document that the state before the chunk is of.
        lasts: Tokens of the document that the chunk ends in.
        stays: Chunks in which no document begins, (B, n, G, R).
    """

    seen: Tensor
    goes_on: Tensor
    lasts: Tensor
    stays: Tensor


def _masks(layout: ScanLayout, size: int, padding: int, like: Tensor) -> _Masks:
    causal = torch.ones(size, size, dtype=torch.bool, device=like.device).tril()
    if layout.document is None or layout.before is None:
        every = torch.ones(1, dtype=torch.bool, device=like.device)
        return _Masks(causal, every, every, every)
    document = torch.cat([layout.document, layout.document[:, -1:].expand(-1, padding)], 1).unflatten(1, (-1, size))
    last = document[..., -1:]
    first = torch.cat([layout.before[:, None, None], last[:, :-1]], 1)
    here = document[:, :, None, None]  # (B, n, 1, 1, C)
    return _Masks(
        causal & (here.unsqueeze(-1) == here.unsqueeze(-2)),
        here == first[:, :, None, None],
        here == last[:, :, None, None],
        (first == last).unsqueeze(-1),
    )


def _check(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor | None
) -> None:
    if queries.shape != keys.shape:
        raise ValueError(f"queries have shape {tuple(queries.shape)}, keys {tuple(keys.shape)}; make them equal")
    batch, length, heads, width = values.shape
    groups = keys.shape[2]
    if keys.shape[:2] != values.shape[:2] or heads % groups:
        raise ValueError(
            f"keys have shape {tuple(keys.shape)}, values {tuple(values.shape)}; make rows and tokens equal, "
            "and the values' heads a multiple of the keys'"
        )
    if beta is not None and groups != heads:
        raise ValueError(f"the delta rule got {groups} heads of keys for {heads} of values; give each head its own")
    for name, x in (("log_decay", log_decay), ("beta", beta)):
        if x is not None and x.shape != (batch, length, heads):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {(batch, length, heads)}")
    if state is not None and state.shape != (batch, heads, keys.shape[-1], width):
        raise ValueError(f"state has shape {tuple(state.shape)}; it must be {(batch, heads, keys.shape[-1], width)}")
