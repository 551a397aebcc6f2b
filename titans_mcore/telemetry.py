"""What the memories of a model do while it trains, by block: gates, surprise, held steps and drift.

`MemoryTelemetry.watching()` stands around one forward pass. It hangs hooks on the memories, which look at the first row
of what they are given: the row's keys, values and gates are made once more, and its scan is gone through once more, on
the side and without gradients. So the pass computes what it computes without, with every backend, also where the
kernels are fused; outside of `watching` nothing is there. Gates are those of every token of the row, the rest is
that of one chunk in about every 256 tokens.

By block, means over tokens, heads and matrices; None for a block without a memory:

surprise      norm of the inner gradient over a memory's matrices, before theta
theta, eta, alpha   inner learning rate, momentum decay, forget rate, before the rule holds any step
held          share of the tokens whose step the rule makes smaller, or whose chunk's weights it scales back
early_late    what the last quarter of a chunk writes over what its first quarter does; 1 is even
drift         root mean square of the weights less the initial ones; beside 1 for initial weights, or 1 / sqrt(their
              input's width) in plain networks, and a limit of 3, or 16 (memory/STABILITY.md)
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titans_mcore.memory import PackedRows, Probe, Probed
from titans_mcore.mixers import MIXERS
from titans_mcore.mixers.neural_memory import NeuralMemory

QUANTITIES = ("surprise", "theta", "eta", "alpha", "held", "early_late", "drift")
_EVERY_TOKENS = 256


class MemoryTelemetry:
    """Collects over the passes that it watches. Every rank has one and makes the same calls.

    Args:
        model: Its memories are watched; a model without any gives nothing.
        every_tokens: About so many tokens lie between two chunks that are looked at.
    """

    def __init__(self, model: nn.Module, every_tokens: int = _EVERY_TOKENS) -> None:
        kinds = tuple(mixer.module for mixer in MIXERS.values())
        mixers = [module for module in model.modules() if isinstance(module, kinds)]
        self._blocks = len(mixers)
        of_blocks = [(block, getattr(mixer, "memory", None)) for block, mixer in enumerate(mixers)]
        self._memories = {block: memory for block, memory in of_blocks if isinstance(memory, NeuralMemory)}
        self._every_tokens = every_tokens
        self._totals: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a forward pass; its backward pass stands behind, so that nothing is seen twice where it recomputes."""
        with ExitStack() as stack:
            for block, memory in self._memories.items():
                watcher = _Watcher(self._every_tokens, partial(self._add, block))
                stack.enter_context(memory.register_forward_pre_hook(watcher, with_kwargs=True))
            yield

    def collect(self) -> dict[str, list[float | None]]:
        """Means over all ranks since the last call: by quantity a list over the blocks.

        What no block has seen is left out.
        """
        if not self._memories:
            return {}
        totals = torch.zeros(self._blocks, len(QUANTITIES), 2, dtype=torch.float64)
        if self._totals is not None:
            totals += self._totals.cpu()
        self._totals = None
        if dist.is_initialized():
            dist.all_reduce(totals)
        found = {}
        for quantity, of_blocks in zip(QUANTITIES, totals.unbind(1), strict=True):
            if bool(of_blocks[:, 1].any()):
                found[quantity] = [total / count if count else None for total, count in of_blocks.tolist()]
        return found

    def _add(self, block: int, quantity: str, values: Tensor, where: Tensor | None = None) -> None:
        """Adds values to a mean, those of them that count, or as much as they do."""
        weight = torch.ones_like(values, dtype=torch.float64)
        if where is not None:
            weight = weight * where
        # What does not count is chosen away: what an empty slot holds need not be a number, and NaN x 0 is NaN.
        total = (values.double() * weight).masked_fill(weight == 0, 0.0).sum()
        if self._totals is None:
            shape = self._blocks, len(QUANTITIES), 2
            self._totals = torch.zeros(shape, dtype=torch.float64, device=values.device)
        self._totals[block, QUANTITIES.index(quantity)] += torch.stack([total, weight.sum()])


class _Watcher:
    """Sees one memory during one pass; called before its forward()."""

    def __init__(self, every_tokens: int, add: Callable[..., None]) -> None:
        self._probe, self._add = Probe(every_tokens, self._take), add

    @torch.no_grad()
    def __call__(self, memory: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Looks at the first row of what the memory is about to write."""
        # Without `rows` it is called for its persistent tokens, which are no part of any row.
        if "rows" not in kwargs or kwargs.get("recall") is not None:
            return
        assert isinstance(memory, NeuralMemory)
        x, state = (*args, None)[:2]
        rows = _first_row(kwargs["rows"])
        state = None if state is None else state.map(lambda part: part[:1])
        theta, eta, alpha = memory.probe(x[:1], state, self._probe, start=kwargs.get("start"), rows=rows)
        mask = None if rows is None else rows.real
        real = torch.ones(x.shape[1], dtype=torch.bool, device=x.device) if mask is None else mask[0]
        rates = [alpha] if isinstance(alpha, Tensor) else alpha
        for name, gates in (("theta", [theta]), ("eta", [eta]), ("alpha", rates)):
            by_token = torch.stack([gate[0].flatten(1).mean(1) for gate in gates]).mean(0)
            self._add(name, by_token[real])

    def _take(self, probed: Probed) -> None:
        self._add("surprise", probed.surprise, probed.real)
        self._add("held", probed.held, probed.real)
        self._add("drift", probed.drift, probed.real.any(-1))
        size = probed.written.shape[-1]
        if quarter := size // 4:
            written = probed.written.masked_fill(~probed.real, 0.0)
            first, last = written[:, :quarter].sum(-1), written[:, size - quarter :].sum(-1)
            # Of chunks that are full, weighed by what is written: a quotient of means, not a mean of quotients.
            self._add("early_late", last / first.clamp_min(1e-30), first * probed.real.all(-1))


def _first_row(rows: PackedRows | None) -> PackedRows | None:
    """The first row's, as PackedRows wants it; None for a row of one document that is all there."""
    if rows is None:
        return None
    starts, real = (None if mask is None else mask[:1] for mask in (rows.starts, rows.real))
    starts = None if starts is None or not bool(starts.any()) else starts
    return None if starts is None and real is None else PackedRows(starts, real)
