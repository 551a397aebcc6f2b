"""Context parallelism: ranks hold parts of a row in order, and every layer's state goes from each to the next.

A rank waits for its left neighbour's state of a layer, reads its own tokens, and sends the state on. While it works on
layer l, the next rank works on layer l - 1: layers flow as a wavefront, and nothing is gathered. In the backward pass
the gradients of the states go the other way. What is sent does not depend on the length of the rows.

Layers whose states compose (linear/handover.py) are no wavefront: a rank reads its tokens before it asks for the state
in front of them, and sends the one behind them on as soon as that has come. From rank to rank goes the same message,
which waits for nothing but two small products on each, and ranks work on the same layer at the same time.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titans_mcore.memory import TensorTree

_HEADER_BYTES = 8192
Tree = TypeVar("Tree", bound=TensorTree)
# What is on its way, of the pass before and of this one. A message that is freed before it has arrived is lost, also
# with the model that sent it.
_EARLIER: list[tuple[dist.Work, Tensor]] = []
_SENT: list[tuple[dist.Work, Tensor]] = []


class ContextRelay:
    """This rank's place in the chain of ranks that share a row.

    Args:
        group: Megatron's context-parallel group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.ranks = group, group.rank(), group.size()

    def begin(self) -> None:
        """Called at the start of a pass: waits until what this process sent before the last one has arrived.

        Not what the last one sent, which a neighbour takes while it reads the rows that this process is done with.
        """
        while _EARLIER:
            work, _ = _EARLIER.pop()
            work.wait()
        _EARLIER.extend(_SENT)
        _SENT.clear()

    def receive(self, kind: type[Tree], hidden: Tensor) -> Tree | None:
        """The state that the rank before has left in this layer; None on the first rank.

        Args:
            kind: What the state is.
            hidden: Input of the layer, from which the backward pass gets here.
        """
        if self.rank == 0:
            return None
        header = torch.empty(_HEADER_BYTES, dtype=torch.uint8)
        # On the host, which need not wait for a device to know what will come; the world's group takes host tensors.
        dist.recv(header, dist.get_global_rank(self.group, self.rank - 1))
        layout = _Layout.read(header)
        parts = _Receive.apply(self, layout, self._take_state(layout, hidden), hidden)
        return kind.from_state_dict(dict(zip(layout.names, parts, strict=True)))

    def pass_on(self, state: TensorTree, hidden: Tensor) -> Tensor:
        """Sends the state after this rank's tokens to the next rank.

        Args:
            state: The layer's, after its last token.
            hidden: Output of the layer.

        Returns:
            hidden, behind which the backward pass waits for the state's gradients.
        """
        if self.rank == self.ranks - 1:
            return hidden
        tensors = state.state_dict()
        layout = _Layout.of(tensors)
        self._send(layout.header(), self.rank + 1, dist.group.WORLD)
        self._send(layout.pack(list(tensors.values())), self.rank + 1)
        return _PassOn.apply(self, layout, hidden, *tensors.values())

    def _take_state(self, layout: "_Layout", like: Tensor) -> Tensor:
        return self._take(torch.empty(layout.bytes(), dtype=torch.uint8, device=like.device), self.rank - 1)

    def _send(self, message: Tensor, to: int, group: dist.ProcessGroup | None = None) -> None:
        work = dist.isend(message, dist.get_global_rank(self.group, to), group=group or self.group)
        assert work is not None
        _SENT.append((work, message))

    def _take(self, message: Tensor, source: int) -> Tensor:
        dist.recv(message, dist.get_global_rank(self.group, source), group=self.group)
        return message


class SharedState:
    """The state before this rank's tokens in one layer whose states compose; ranks are at work on it in one pass.

    A block that is computed again finds what has come, and sends nothing.

    Args:
        relay: This rank's place in the chain.
        given: What the first rank's tokens go on with; None begins a sequence.
    """

    def __init__(self, relay: ContextRelay, given: TensorTree | None = None) -> None:
        self.relay, self.given = relay, given
        self.came: dict[str, Tensor] = {}
        self.sent: set[str] = set()

    def part(self, name: str, sent: Callable[[Tensor], Tensor] | None = None) -> "SharedPart":
        """See mixers.linear.Earlier."""
        return SharedPart(self, name, sent)


class SharedPart:
    """One tensor of a SharedState: a linear.handover.Handover.

    Args:
        state: The state.
        name: Its name there.
        sent: What is done to it before it goes on.
    """

    def __init__(self, state: SharedState, name: str, sent: Callable[[Tensor], Tensor] | None) -> None:
        self.state, self.name, self.sent, self.relay = state, name, sent, state.relay

    @property
    def first(self) -> bool:
        """See Handover."""
        return self.relay.rank == 0

    @property
    def given(self) -> Tensor | None:
        """See Handover."""
        return None if self.state.given is None else getattr(self.state.given, self.name)

    def receive(self, like: Tensor) -> Tensor:
        """See Handover. No header says what comes: it is what this rank sends on."""
        layout = _Layout.of({self.name: like})
        if self.name not in self.state.came:
            self.state.came[self.name] = self.relay._take_state(layout, like)
        found: Tensor = _Receive.apply(self.relay, layout, self.state.came[self.name], like)[0]
        return found

    def pass_on(self, state: Tensor, ahead: Tensor) -> Tensor:
        """See Handover."""
        relay = self.relay
        if relay.rank == relay.ranks - 1:
            return ahead
        state = state if self.sent is None else self.sent(state)
        layout = _Layout.of({self.name: state})
        if self.name not in self.state.sent:
            self.state.sent.add(self.name)
            relay._send(layout.pack([state]), relay.rank + 1)
        return _PassOn.apply(relay, layout, ahead, state)


class _Layout:
    """Names, shapes and types of the tensors in a message."""

    def __init__(self, names: list[str], shapes: list[list[int]], dtypes: list[str]) -> None:
        self.names, self.shapes = names, shapes
        self.dtypes = [getattr(torch, name) for name in dtypes]

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "_Layout":
        """That of a state's tensors."""
        dtypes = [str(x.dtype).removeprefix("torch.") for x in tensors.values()]
        return cls(list(tensors), [list(x.shape) for x in tensors.values()], dtypes)

    @classmethod
    def read(cls, header: Tensor) -> "_Layout":
        """From what header() made."""
        return cls(*json.loads(header.numpy().tobytes().rstrip(b"\0")))

    def header(self) -> Tensor:
        """A message of a fixed size that says what the next one holds."""
        dtypes = [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        text = json.dumps([self.names, self.shapes, dtypes], separators=(",", ":")).encode()
        if len(text) > _HEADER_BYTES:
            raise ValueError(
                f"describing {len(self.names)} tensors takes {len(text)} bytes; a message's header has {_HEADER_BYTES}"
            )
        return torch.frombuffer(bytearray(text.ljust(_HEADER_BYTES, b"\0")), dtype=torch.uint8)

    def differentiable(self) -> "_Layout":
        """Those tensors that have gradients."""
        kept = [i for i, dtype in enumerate(self.dtypes) if dtype.is_floating_point]
        found = _Layout([self.names[i] for i in kept], [self.shapes[i] for i in kept], [])
        found.dtypes = [self.dtypes[i] for i in kept]
        return found

    def bytes(self) -> int:
        """Size of the message."""
        return sum(self._sizes())

    def pack(self, tensors: list[Tensor]) -> Tensor:
        """The tensors as one message."""
        return torch.cat([x.detach().contiguous().flatten().view(torch.uint8) for x in tensors])

    def unpack(self, message: Tensor) -> list[Tensor]:
        """The tensors of a message; each is a copy, which is aligned."""
        pieces = message.split(self._sizes())
        return [
            piece.clone().view(dtype).view(shape)
            for piece, dtype, shape in zip(pieces, self.dtypes, self.shapes, strict=True)
        ]

    def _sizes(self) -> list[int]:
        counts = [torch.Size(shape).numel() for shape in self.shapes]
        return [count * dtype.itemsize for count, dtype in zip(counts, self.dtypes, strict=True)]


class _Receive(torch.autograd.Function):
    """A state that has come from the rank before; its gradients go back there."""

    @staticmethod
    def forward(ctx: Any, relay: ContextRelay, layout: _Layout, message: Tensor, hidden: Tensor) -> Any:
        ctx.relay, ctx.layout = relay, layout
        parts = layout.unpack(message)
        ctx.mark_non_differentiable(*(x for x in parts if not x.is_floating_point()))
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        kept = [of for of, dtype in zip(gradients, ctx.layout.dtypes, strict=True) if dtype.is_floating_point]
        ctx.relay._send(ctx.layout.differentiable().pack(kept), ctx.relay.rank - 1)
        return None, None, None, None


class _PassOn(torch.autograd.Function):
    """A state that has gone to the next rank; its gradients come from there."""

    @staticmethod
    def forward(ctx: Any, relay: ContextRelay, layout: _Layout, hidden: Tensor, *parts: Tensor) -> Tensor:
        ctx.relay, ctx.layout = relay, layout
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        layout = ctx.layout.differentiable()
        message = torch.empty(layout.bytes(), dtype=torch.uint8, device=gradient.device)
        found = iter(layout.unpack(ctx.relay._take(message, ctx.relay.rank + 1)))
        of_parts = [next(found) if dtype.is_floating_point else None for dtype in ctx.layout.dtypes]
        return None, None, gradient, *of_parts


def with_gradients(hidden: Tensor, layer: nn.Module, of_beginnings: tuple[str, ...]) -> Tensor:
    """hidden as it is, in front of a layer whose parameters all get gradients, at its end and in the same order.

    What a sequence begins with (persistent tokens, initial memories) is read where a first token is: on the first rank
    of a row, or, where rows go on from step to step, on a rank in whose rows a document begins. There the memory's maps
    read the persistent tokens, too, which delays their gradients. Ranks that reduce gradients together must all have
    one for every parameter, zeros if need be, and in the same order.

    Args:
        hidden: Input of the layer.
        layer: The layer. Where ZeRO 3 has divided its parameters, DeepSpeed sees to both.
        of_beginnings: Parts of the names of parameters that only a sequence's beginning reads.
    """
    if not torch.is_grad_enabled():
        return hidden
    whole = {name: p for name, p in layer.named_parameters() if not hasattr(p, "ds_tensor")}
    beginnings = [p for name, p in whole.items() if any(part in name for part in of_beginnings)]
    others = [p for p in whole.values() if all(p is not beginning for beginning in beginnings)]
    return _WithGradients.apply(hidden, beginnings, *beginnings, *others) if beginnings else hidden


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, zeros_for: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.zeros_for, ctx.others = zeros_for, len(parameters) - len(zeros_for)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None, *(torch.zeros_like(p) for p in ctx.zeros_for), *[None] * ctx.others
