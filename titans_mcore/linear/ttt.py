"""The scan of TTT (Sun et al., arXiv 2407.04620): weights W that learn, token by token, to make a value from its key.

    f(k; W) = k W_1 + b_1, or GELU(k W_1 + b_1) W_2 + b_2          LN(z) = gamma (z - mean) / sqrt(var + eps) + nu
    l_j(W)  = 1/2 |LN(f(k_j; W)) - (v_j - k_j)|^2
    W_t     = W - i_t sum_(j <= t) r_j dl_j/dW (W)                  o_t = q_t + LN(f(q_t; W_t))

W is that of the mini-batch's start, and t and j count its 16 tokens; behind the last of them W_16 takes its place.
Each row and head has a W of its own. r_j is the token's rate, i_t that of the reading token's place, about 1 / t.
Queries and keys carry rotary positions of their place in the mini-batch.

A matrix with inputs X of the keys, errors G = dl/d(its outputs) and inputs Y of the queries' pass is read, for all of a
mini-batch at once, as

    Y_t W_t + b_t = Y_t W + b - i_t sum_(j <= t) (Y_t X_j^T + 1) r_j G_j

so that no W_t is made but the last. What a mini-batch that is not over has written is kept as the sums of r_j dl_j/dW
over its tokens: with them, and the number of those tokens, it goes on as if it had come in one piece, at the same size
however many there were. A document begins with the first W and a mini-batch of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attention.attend import rotate_to
from ..memory import PackedRows, TensorTree
from ..memory.checkpoint import Recomputed
from ..memory.layout import Part

MINI_BATCH = 16  # tokens; a part of the model
TTT_SPAN = 16  # mini-batches between two states that are kept for the backward pass
TTT_EPS = 1e-6


@dataclass
class OpenMiniBatch(TensorTree):
    """A mini-batch that is not over.

    Attributes:
        sums: Of r_j dl_j/dW over its tokens, shaped as the weights.
        filled: How many tokens it has, (B,), 0 to 15.
    """

    sums: list[Tensor]
    filled: Tensor


@dataclass
class FastWeights(TensorTree):
    """What the scan carries through time.

    Attributes:
        weights: W of the last mini-batch's start: W_1 (B, H, K, F), b_1 (B, H, 1, F), and so on, float32 at least.
        opened: The last mini-batch, unless it is over in every row.
    """

    weights: list[Tensor]
    opened: OpenMiniBatch | None = None


def ttt_scan(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rates: Tensor,
    places: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights: Sequence[Tensor],
    *,
    rope_base: float,
    state: FastWeights | None = None,
    rows: PackedRows | None = None,
) -> tuple[Tensor, FastWeights]:
    """Every token writes, and then reads.

    Args:
        queries: (B, T, H, K), like keys and values, without positions.
        keys: What the network reads while it learns.
        values: What it is to make of them, beside the key itself.
        rates: r, (B, T, H).
        places: i, (16,).
        norm_weight: gamma, (H, K).
        norm_bias: nu, (H, K).
        weights: The W that documents begin with, W_1 (H, K, F), b_1 (H, 1, F) and so on, of one or two matrices.
        rope_base: Of the rotary positions.
        state: What an earlier piece returned; None begins the sequences.
        rows: Documents and padding. Padding may stand anywhere, and what is read there means nothing.

    Returns:
        (B, T, H, K) in the dtype of the values, and the state after the last token.

    Raises:
        ValueError: Shapes do not fit together.
    """
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    _check_ttt(values, weights, {"queries": queries, "keys": keys, "rates": rates, "places": places, **norm})
    wide = torch.promote_types(values.dtype, torch.float32)
    batch, length = values.shape[:2]
    shared = [x.to(wide) for x in (places, norm_weight, norm_bias, *weights)]
    filled = [0] * batch
    if state is None:
        state = FastWeights([w.expand(batch, *w.shape) for w in shared[3:]])
    elif state.opened is not None:
        filled = state.opened.filled.tolist()
    carry = _Carry(state.weights, None if state.opened is None else state.opened.sums)
    tokens = [queries, keys, values, rates]
    run = partial(_in_spans, shared, rope_base)
    if rows is None and len(set(filled)) == 1:
        read, carry = run(tokens, _mini_batches(length, filled[0]), carry)
        ends = [(filled[0] + length) % MINI_BATCH] * batch
    else:
        read, carry, ends = _packed(run, tokens, carry, filled, rows)
    if not any(ends):
        return read, FastWeights(carry.weights)
    assert carry.sums is not None
    return read, FastWeights(carry.weights, OpenMiniBatch(carry.sums, torch.tensor(ends, device=values.device)))


class _Carry(NamedTuple):
    """Weights, and the sums of the open mini-batch; None for zeros."""

    weights: list[Tensor]
    sums: list[Tensor] | None


class _MiniBatch(NamedTuple):
    """Tokens of one mini-batch, or some of them.

    Attributes:
        tokens: Where they stand.
        first: Place in the mini-batch of the first of them.
        over: Whether they end it; or in which rows, (B,).
        goes_on: Whether earlier tokens may be in it.
        begins: Rows that begin a document with it, (B,); None where none does.
    """

    tokens: slice
    first: int
    over: bool | Tensor
    goes_on: bool
    begins: Tensor | None = None


def _mini_batches(length: int, filled: int) -> list[_MiniBatch]:
    """Those of whole rows, whose first mini-batch has so many tokens already."""
    found, begin = [], 0
    while begin < length:
        end = min(length, begin + MINI_BATCH - filled)
        found.append(_MiniBatch(slice(begin, end), filled, filled + end - begin == MINI_BATCH, filled > 0))
        begin, filled = end, 0
    return found


def _packed(
    run: "partial[tuple[Tensor, _Carry]]",
    tokens: list[Tensor],
    carry: _Carry,
    filled: list[int],
    rows: PackedRows | None,
) -> tuple[Tensor, _Carry, list[int]]:
    """A piece of packed or padded rows: what is read, the carry, and how full each row's last mini-batch is."""
    (batch, length), device, earlier = tokens[0].shape[:2], tokens[0].device, max(filled)
    if rows is None:
        rows = PackedRows(real=torch.ones(batch, length, dtype=torch.bool, device=device))
    if earlier:
        # What the open mini-batch holds is in its sums. Tokens without a rate take the places that it has filled.
        there = torch.arange(earlier, device=device) < torch.tensor(filled, device=device).unsqueeze(1)
        rows = rows.after(there)
        tokens = [torch.cat([x.new_zeros(batch, earlier, *x.shape[2:]), x], 1) for x in tokens]
    packing = rows.packing(MINI_BATCH, device)
    reads, ends = [], [0] * batch
    if packing.closed is not None:
        read, carry = run(_laid(packing.closed, tokens), _closed_mini_batches(packing.closed, carry), carry)
        reads.append(read)
    if packing.open is not None:
        counts, longest = packing.open.chunks.counts, packing.open.chunks.size
        begins = packing.restarts if packing.begins_open else None
        part = [_MiniBatch(slice(0, longest), 0, False, earlier > 0, begins)]
        read, carry = run(_laid(packing.open, tokens), part, carry)
        reads.append(read)
        ends = [longest] * batch if counts is None else counts[0].tolist()
    if not reads:  # nothing but padding
        return torch.zeros_like(tokens[2]), carry, filled
    return packing.collect(torch.cat(reads, 1))[:, earlier:], carry, ends


def _laid(part: Part, tokens: list[Tensor]) -> list[Tensor]:
    return [part.lay(x) for x in tokens]


def _closed_mini_batches(part: Part, carry: _Carry) -> list[_MiniBatch]:
    """Those that are over, or cut short by the end of a document: then the next one of the row begins another."""
    chunks, device, found = part.chunks, part.tokens.device, []
    over = None if chunks.counts is None else (chunks.counts == MINI_BATCH).to(device)
    begin = None if chunks.restarts is None else chunks.restarts.to(device)
    for index in range(part.tokens.shape[1] // MINI_BATCH):
        place = slice(index * MINI_BATCH, (index + 1) * MINI_BATCH)
        ends, begins = True if over is None else over[index], None if begin is None else begin[index]
        found.append(_MiniBatch(place, 0, ends, carry.sums is not None and index == 0, begins))
    return found


def _in_spans(
    shared: list[Tensor], rope_base: float, tokens: list[Tensor], batches: list[_MiniBatch], carry: _Carry
) -> tuple[Tensor, _Carry]:
    """Mini-batches that follow one another, in spans of which the backward pass does each again."""
    reads, count = [], len(carry.weights)
    for first in range(0, len(batches), TTT_SPAN):
        part = batches[first : first + TTT_SPAN]
        begin, end = part[0].tokens.start, part[-1].tokens.stop
        part = [each._replace(tokens=slice(each.tokens.start - begin, each.tokens.stop - begin)) for each in part]
        sums = [None] * count if carry.sums is None else carry.sums
        inside = [x[:, begin:end] for x in tokens]
        read, *after = Recomputed.apply(
            partial(_span_of_mini_batches, part, rope_base, count), *inside, *shared, *carry.weights, *sums
        )
        carry = _Carry(after[:count], after[count:] or None)
        reads.append(read)
    return reads[0] if len(reads) == 1 else torch.cat(reads, 1), carry


def _span_of_mini_batches(
    batches: list[_MiniBatch],
    rope_base: float,
    count: int,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rates: Tensor,
    places: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *networks: Tensor,
) -> tuple[Tensor, ...]:
    """What is read (B, T, H, K), the weights, and the open mini-batch's sums where there are any."""
    wide, norm = places.dtype, _Norm(norm_weight.unsqueeze(-2), norm_bias.unsqueeze(-2))
    start, weights, sums = (list(networks[i * count : (i + 1) * count]) for i in range(3))
    own_sums: list[Tensor] | None = None if sums[0] is None else sums
    stand = torch.cat([torch.arange(x.first, x.first + x.tokens.stop - x.tokens.start) for x in batches])
    stand = stand.to(queries.device)
    q, k = (rotate_to(x.to(wide), stand, rope_base) for x in (queries, keys))
    q, k, v, r = (x.transpose(1, 2) for x in (q, k, values.to(wide), rates.to(wide).unsqueeze(-1)))
    reads = []
    for batch in batches:
        if batch.begins is not None:
            weights = _where(batch.begins, start, weights)
            own_sums = None if own_sums is None else _where(batch.begins, [0.0] * count, own_sums)
        inside = [x[:, :, batch.tokens] for x in (q, k, v, r)]
        rate = places[batch.first : batch.first + inside[0].shape[2]].unsqueeze(-1)
        read, added = _mini_batch(norm, weights, own_sums if batch.goes_on else None, rate, *inside)
        reads.append(read)
        total = added if own_sums is None else [a + b for a, b in zip(own_sums, added, strict=True)]
        if batch.over is False:
            own_sums = total
            continue
        after = [w - places[-1] * x for w, x in zip(weights, total, strict=True)]
        if batch.over is True:
            weights, own_sums = after, None
            continue
        # A mini-batch that is not over ends a document, unless the row has no tokens left: then its sums stay.
        weights = _where(batch.over, after, weights)
        own_sums = None if own_sums is None else _where(batch.over, [0.0] * count, total)
    read = torch.cat(reads, 2).transpose(1, 2)
    return read.to(values.dtype), *weights, *(own_sums or ())


class _Norm(NamedTuple):
    """LayerNorm of each head, (H, 1, K)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """LN(z)."""
        return _standard(z)[0] * self.weight + self.bias

    def error(self, z: Tensor, target: Tensor) -> Tensor:
        """d/dz 1/2 |LN(z) - target|^2."""
        x, scale = _standard(z)
        slope = (x * self.weight + self.bias - target) * self.weight
        return (slope - slope.mean(-1, keepdim=True) - x * (slope * x).mean(-1, keepdim=True)) * scale


def _standard(z: Tensor) -> tuple[Tensor, Tensor]:
    """z with mean 0 and variance 1 over its last axis, and 1 / sqrt(var + eps)."""
    centred = z - z.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + TTT_EPS)
    return centred * scale, scale


def _mini_batch(
    norm: _Norm,
    weights: list[Tensor],
    sums: list[Tensor] | None,
    rate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """What its tokens (B, H, t, K) read, and the sums of r_j dl_j/dW over them.

    Args:
        norm: LN.
        weights: W.
        sums: Those of its earlier tokens; None for none.
        rate: i of each token, (t, 1).
        q: Like k and v with positions.
        k: (B, H, t, K).
        v: (B, H, t, K).
        r: (B, H, t, 1).
    """
    matrices, biases = weights[::2], weights[1::2]
    inputs, before = [k], []
    for matrix, bias in zip(matrices[:-1], biases[:-1], strict=True):
        before.append(inputs[-1] @ matrix + bias)
        inputs.append(F.gelu(before[-1], approximate="tanh"))
    errors = [norm.error(inputs[-1] @ matrices[-1] + biases[-1], v - k)]
    for matrix, z in zip(matrices[:0:-1], before[::-1], strict=True):
        errors.insert(0, torch.ops.aten.gelu_backward(errors[0] @ matrix.mT, z, approximate="tanh"))

    x, added = q, []
    for layer, (matrix, bias, given, error) in enumerate(zip(matrices, biases, inputs, errors, strict=True)):
        if layer:
            x = F.gelu(x, approximate="tanh")
        written = r * error
        change = (x @ given.mT + 1.0).tril() @ written
        if sums is not None:
            change = change + x @ sums[2 * layer] + sums[2 * layer + 1]
        x = x @ matrix + bias - rate * change
        added += [given.mT @ written, written.sum(-2, keepdim=True)]
    return q + norm(x), added


def _where(rows: Tensor, those: Sequence[Tensor | float], others: list[Tensor]) -> list[Tensor]:
    """For each of the rows (B,) the ones, for the rest the others, (B, H, K, F)."""
    picked = rows[:, None, None, None]
    return [torch.where(picked, a, b) for a, b in zip(those, others, strict=True)]


def _check_ttt(values: Tensor, weights: Sequence[Tensor], others: dict[str, Tensor]) -> None:
    heads, width = values.shape[2:]
    if width % 2:
        raise ValueError(f"heads are {width} wide; rotary positions need an even width")
    if len(weights) not in (2, 4):
        raise ValueError(
            f"weights holds {len(weights)} tensors; give one or two matrices, each with its bias behind it"
        )
    hidden = weights[0].shape[-1]
    shapes = [(heads, width, hidden), (heads, 1, hidden), (heads, hidden, width), (heads, 1, width)]
    if len(weights) == 2:
        shapes = [(heads, width, width), (heads, 1, width)]
    wanted: dict[str, tuple[int, ...]] = {
        "queries": values.shape,
        "keys": values.shape,
        "rates": values.shape[:3],
        "places": (MINI_BATCH,),
        "norm_weight": (heads, width),
        "norm_bias": (heads, width),
        **{f"weights[{i}]": shape for i, shape in enumerate(shapes)},
    }
    others = {**others, **{f"weights[{i}]": weight for i, weight in enumerate(weights)}}
    for name, shape in wanted.items():
        if others[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(others[name].shape)}; it must be {tuple(shape)}")
