"""The dual form over a whole sequence, with a backward pass of its own that keeps only every g-th state.

The forward pass stores its arguments and the states with which groups of g chunks begin. The backward pass takes the
groups from the last to the first, goes through a group's chunks once more and back through them by hand
(chunk_backward.py). With g near the root of the number of chunks, the states stored and those of the group at work are
about equally many, and nothing grows with length times the size of a state.

`keeping_scans` is the other kind of checkpoint: a scan that is kept while the block around it is computed again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from .chunk import Borders, Gates, TokenGroup, gates_of, leaves_shell, norm_of_reads, pass_keys, read
from .chunk_backward import group_gradient
from .inputs import Matrices, MemoryState, Tokens
from .layout import Chunks, group_size
from .network import Network, WholeMatrices, answer
from .rule import Memory, Rule


def chunk_scan(
    memory: Memory, tokens: Tokens, start: Matrices, chunks: Chunks, fresh: Matrices | None = None
) -> tuple[Tensor, Matrices]:
    """Run chunks. The result can be differentiated once.

    Args:
        memory: The memory; its rule not an exact one, and alpha not by channel: see general.py for those. With shards,
            start, M_0 and fresh are the process's parts, and so are the gradients at them; all else is equal on all
            processes.
        tokens: In the slots of the chunks, (B, C b, ...); zeros where a slot is empty.
        start: Weights and momentum before the first token.
        chunks: Where the slots are empty and where documents begin.
        fresh: Weights and momentum in which a document begins; None if none begins.

    Returns:
        What each token reads, (B, C b, H, D), and the weights and momentum after the last one.
    """
    network, rule, initial = memory.network, memory.rule, memory.initial
    batch, _, heads = tokens.keys.shape[:3]
    rows = network.for_memories(batch)
    layout = _Layout(network.residual_norm, network.shard, rule, chunks, batch, heads)
    anchors = initial if rule.anchored else []
    states = [_joined(start), [] if fresh is None else _joined(fresh)]
    tensors = (*tokens.tensors(), rows.norm_weight, rows.norm_bias, *anchors, *states[0], *states[1])
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        reads, *end = _Scan.apply(layout, len(initial), *tensors)
    else:
        reads, end, _ = _scan(layout, rows, _Given(tokens.tensors(), anchors, *states), keep=False)
    both = [state.unflatten(0, (batch, heads)).chunk(2, -2) for state in end]
    return reads, Matrices([w.contiguous() for w, _ in both], [s.contiguous() for _, s in both])


class _Given(NamedTuple):
    """Arguments of a scan, or their gradients.

    Attributes:
        tokens: The six of the sequence.
        anchors: L of (H, d_in, d_out), or empty.
        start: L states (N, 2 d_in, d_out).
        fresh: Like start, or empty.
    """

    tokens: list[Tensor]
    anchors: list[Tensor]
    start: list[Tensor]
    fresh: list[Tensor]


def _joined(matrices: Matrices) -> list[Tensor]:
    """States (N, 2 d_in, d_out), weights above momentum."""
    both = zip(matrices.weights, matrices.momentum, strict=True)
    return [torch.cat([w, s], -2).flatten(0, 1) for w, s in both]


@dataclass(frozen=True)
class _Layout:
    """How a sequence falls into groups of chunks, for B rows and H heads."""

    residual_norm: bool
    shard: WholeMatrices
    rule: Rule
    chunks: Chunks
    batch: int
    heads: int

    def network(self, norm_weight: Tensor | None, norm_bias: Tensor | None) -> Network:
        """The memory network, with scale and shift for N memories."""
        return Network(self.residual_norm, norm_weight, norm_bias, self.shard)

    def groups(self, length: int) -> list[slice]:
        """The tokens of each group."""
        step = group_size(length // self.chunks.size) * self.chunks.size
        return [slice(start, start + step) for start in range(0, length, step)]

    def borders(self, span: slice, given: _Given) -> tuple[Borders, Tensor | None]:
        """What happens between the chunks of a group, and which of its slots are real."""
        size, device = self.chunks.size, given.tokens[0].device
        chunks = self.chunks.group(slice(span.start // size, span.stop // size))
        full, restarted = chunks.full(self.heads, device), chunks.restarted(self.heads, device)
        return Borders(chunks.closed, full, restarted, given.fresh, given.anchors), chunks.real(self.heads, device)


class _Stored(NamedTuple):
    """What the forward pass keeps of a group: its first state, whether the shell acted, sums over the shards."""

    start: list[Tensor]
    shell: bool
    sums: list[Tensor]


def _scan(
    layout: _Layout, network: Network, given: _Given, *, keep: bool
) -> tuple[Tensor, list[Tensor], list[_Stored]]:
    """Reads, the last state, and what is kept of each group; the sums only if they are wanted."""
    outputs, groups, state = [], [], given.start
    shell = False
    for span in layout.groups(given.tokens[0].shape[1]):
        part = [x[:, span] for x in given.tokens]
        tokens = TokenGroup(*map(layout.chunks.split, part[:3]))
        borders, real = layout.borders(span, given)
        theta, eta, alpha = map(layout.chunks.split_gate, part[3:])
        gates = gates_of(theta, eta, alpha, real)
        sums: list[Tensor] = []
        recording = replace(network, shard=network.shard.recorded(sums)) if keep else network
        passed = pass_keys(recording, layout.rule, tokens, gates, state, borders, shell)
        if not shell and borders.closed and leaves_shell(network, layout.rule, passed):
            shell = True  # for the groups that follow, too: where it has acted it will act again
            sums.clear()
            passed = pass_keys(recording, layout.rule, tokens, gates, state, borders, shell)
        outputs.append(read(recording, tokens, gates, passed, borders).output)
        groups.append(_Stored(state, shell, sums))
        state = [path.states[-1] for path in passed.paths]
    queries = layout.chunks.split(given.tokens[0])
    normed = norm_of_reads(network, len(state), torch.cat(outputs) if len(outputs) > 1 else outputs[0])
    if keep and network.shard.parts > 1:
        for group, output in zip(groups, normed.raw.split([len(x) for x in outputs]), strict=True):
            group.sums.append(output)
    answers = answer(network, queries, normed.value.view_as(queries))
    return layout.chunks.join(answers, layout.batch), state, groups


class _Scan(torch.autograd.Function):
    """Arguments: layout, L, the six of the sequence, scale and shift for N memories, then the rest of _Given."""

    @staticmethod
    def forward(ctx: Any, layout: _Layout, depth: int, *tensors: Any) -> tuple[Tensor, ...]:
        given = _given(layout, depth, tensors)
        reads, end, groups = _scan(layout, layout.network(*tensors[6:8]), given, keep=True)
        ctx.layout, ctx.depth, ctx.shells, ctx.count = layout, depth, [group.shell for group in groups], len(tensors)
        ctx.sums = [len(group.sums) for group in groups]
        ctx.save_for_backward(*tensors, *(x for group in groups for x in (*group.start, *group.sums)))
        return reads, *end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_reads: Tensor, *of_end: Tensor) -> tuple[Tensor | None, ...]:
        layout, depth = ctx.layout, ctx.depth
        saved = ctx.saved_tensors  # taken once: a checkpoint around recomputes them when asked
        tensors, kept = saved[: ctx.count], iter(saved[ctx.count :])
        groups = [
            _Stored(list(islice(kept, depth)), shell, list(islice(kept, sums)))
            for shell, sums in zip(ctx.shells, ctx.sums, strict=True)
        ]
        given, norm = _given(layout, depth, tensors), tensors[6:8]
        back = _Back(layout, layout.network(*norm), given)
        of_tokens = [torch.empty_like(x) for x in given.tokens]
        of_state = [x.clone(memory_format=torch.contiguous_format) for x in of_end]  # it is changed in place
        for span, stored in reversed(list(zip(layout.groups(of_reads.shape[1]), groups, strict=True))):
            part, of_state = back.through(span, stored, of_reads[:, span], of_state)
            for whole, piece in zip(of_tokens, part, strict=True):
                whole[:, span] = piece
        of_norm = [None if x is None else total for x, total in zip(norm, back.of_norm, strict=True)]
        there = [x for x in of_norm if x is not None]
        whole = iter(layout.shard.sum_all([*of_tokens, *there]))
        of_tokens = list(islice(whole, len(of_tokens)))
        of_norm = [None if x is None else next(whole) for x in of_norm]
        return None, None, *of_tokens, *of_norm, *back.of_anchors, *of_state, *back.of_fresh


def _given(layout: _Layout, depth: int, tensors: Any) -> _Given:
    rest = list(tensors[8:])
    anchors = depth if layout.rule.anchored else 0
    return _Given(list(tensors[:6]), rest[:anchors], rest[anchors : anchors + depth], rest[anchors + depth :])


class _Back:
    """Goes back through the groups of a scan, and sums the gradients at what they share.

    Attributes:
        of_norm: At scale and shift; None until a group has given one, like the next two.
        of_anchors: At M_0 as that to which forgetting leads.
        of_fresh: At the states in which documents begin.
    """

    def __init__(self, layout: _Layout, network: Network, given: _Given) -> None:
        self.layout, self.network, self.given = layout, network, given
        self.of_norm: list[Tensor | None] = [None, None]
        self.of_anchors: list[Tensor | None] = [None] * len(given.anchors)
        self.of_fresh: list[Tensor | None] = [None] * len(given.fresh)

    def through(
        self, span: slice, stored: _Stored, of_reads: Tensor, of_end: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients at a group's tokens and at its first state; goes through the group again."""
        arguments = [x[:, span] for x in self.given.tokens]
        chunks, batch, rule = self.layout.chunks, self.layout.batch, self.layout.rule
        tokens = TokenGroup(*map(chunks.split, arguments[:3]))
        borders, real = self.layout.borders(span, self.given)
        with torch.enable_grad():
            leaves = [chunks.split_gate(x.detach()).requires_grad_() for x in arguments[3:]]
            made = gates_of(leaves[0], leaves[1], leaves[2], real)
        gates = Gates(*(x.detach() for x in made))
        again = replace(self.network, shard=self.network.shard.replayed(stored.sums))
        passed = pass_keys(again, rule, tokens, gates, stored.start, borders, stored.shell)
        reads = read(again, tokens, gates, passed, borders)
        normed = norm_of_reads(again, len(passed.paths), reads.output)
        of_answers = chunks.split(of_reads)
        found = group_gradient(self.network, rule, tokens, gates, passed, borders, reads, normed, of_answers, of_end)
        _add(self.of_norm, found.norm)
        _add(self.of_anchors, found.anchors)
        _add(self.of_fresh, found.fresh)
        of_gates = torch.autograd.grad(list(made), leaves, list(found.gates))
        parts = [chunks.join(x, batch) for x in found.tokens] + [chunks.join_gate(x, batch) for x in of_gates]
        return parts, found.start


def _add(totals: list[Tensor | None], parts: Sequence[Tensor | None]) -> None:
    """Adds what a group has given; documents may begin in none, and then there is nothing to add to."""
    for i, part in enumerate(parts[: len(totals)]):
        if part is not None:
            total = totals[i]
            totals[i] = part if total is None else total + part


Scanned = tuple[Tensor, MemoryState]
_CURRENT: ContextVar["_Scans | None"] = ContextVar("kept scans", default=None)


def keeping_scans() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a block's first pass and of its recomputation: the `context_fn` of torch.utils.checkpoint."""
    scans = _Scans()
    return scans.during("first"), scans.during("again")


def kept(scan: Callable[..., Scanned], *arguments: Any, **named: Any) -> Scanned:
    """scan(...), or what it gave in the first pass where a block is recomputed around it."""
    scans = _CURRENT.get()
    return scan(*arguments, **named) if scans is None else scans.run(scan, *arguments, **named)


class _Scans:
    """The scans of one block, in their order."""

    def __init__(self) -> None:
        self.results: list[Scanned] = []
        self.passing, self.next = "first", 0

    @contextmanager
    def during(self, passing: str) -> Iterator[None]:
        before = _CURRENT.set(self)
        self.passing, self.next = passing, 0
        try:
            yield
        finally:
            _CURRENT.reset(before)

    def run(self, scan: Callable[..., Scanned], *arguments: Any, **named: Any) -> Scanned:
        if self.passing == "first":
            # What the scan saves for its backward pass is not the surrounding checkpoint's to drop.
            with saved_tensors_hooks(_same, _same):
                result = scan(*arguments, **named)
            self.results.append((result[0].detach(), result[1].detach()))
            return result
        reads, state = self.results[self.next]
        self.next += 1
        # Values alone, as leaves: what follows must save the same tensors as in the first pass, no more is looked at.
        return _leaf(reads), state.map(_leaf)


def _same(x: Any) -> Any:
    return x


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(torch.is_grad_enabled() and x.is_floating_point())
