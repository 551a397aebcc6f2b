"""When the ranks that share a row work and when they wait: titans_mcore/parallel/context.py as arithmetic.

Ranks r = 0 ... C - 1 hold the parts of a row in order, and every rank computes all layers l = 0 ... L - 1:

    forward    start(r, l) = max(end(r, l - 1), arrival of the state that rank r - 1 sent after layer l)
    backward   start(r, l) = max(end(r, l + 1), arrival of the gradients that rank r + 1 sent before its layer l)
    arrival    max(end of the sender's task, its last message gone) + bytes / bandwidth, + latency

The embedding comes before a rank's first layer. The head (norm, logits and loss, forth and back) comes between its
last layer forward and its last layer backward: all ranks but the last do that while they would wait. A micro-batch
begins when a rank's backward pass of the one before has ended, as the training loop has it, so that micro-batches fill
no gaps. With equal times f and b of a layer, messages that take none, and no embedding and head, a step takes
(L + C - 1) (f + b) for each micro-batch, and

    efficiency = work of all ranks / (C x time of the step) = L / (L + C - 1)

so that the time approaches 1 / L of one rank's, and more ranks than layers bring little but memory.

Where a layer's states compose, a rank waits at the layer's end and not before it, and its state goes on when the one in
front of it has come:

    forward    start(r, l) = end(r, l - 1), end(r, l) = max(start + seconds, arrival of the state from rank r - 1)

and in the backward pass likewise. Equal layers that are all so take L (f + b), and the messages of C - 1 ranks once
each way. Among layers that are not, they do not shorten a wavefront of equal layers: every rank is behind its neighbour
by the longest layer that it cannot begin before, whatever the others do.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

FORWARD, BACKWARD = "forward", "backward"


class Work(NamedTuple):
    """Seconds that one rank computes in one micro-batch.

    Attributes:
        forward: Of each layer.
        backward: Of each layer, in the order of the layers; with what is recomputed.
        before: Embedding.
        head: Norm, logits and loss, forth and back.
        after: Embedding, back.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    before: float = 0.0
    head: float = 0.0
    after: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.forward) + sum(self.backward) + self.before + self.head + self.after


class Link(NamedTuple):
    """The way from a rank to the next one, and what goes over it after a layer.

    Attributes:
        forward_bytes: Bytes of a state.
        backward_bytes: Bytes of its gradients.
        bytes_per_second: What one direction carries.
        latency_seconds: From the last byte's departure to its arrival.
        at_once: Layers whose states compose.
    """

    forward_bytes: int = 0
    backward_bytes: int = 0
    bytes_per_second: float = math.inf
    latency_seconds: float = 0.0
    at_once: Collection[int] = ()


class Computation(NamedTuple):
    """One layer's computation.

    Attributes:
        micro_batch: From 0.
        rank: In the order of the tokens.
        direction: FORWARD or BACKWARD.
        layer: From 0.
        start: Seconds after the step's beginning.
        end: Likewise; of a layer whose states compose, with what it waits.
    """

    micro_batch: int
    rank: int
    direction: str
    layer: int
    start: float
    end: float


@dataclass(frozen=True)
class Wavefront:
    """A step of all ranks.

    Attributes:
        computations: Every layer's, in the order of micro-batches.
        busy: Seconds that each rank computes.
        seconds: From the first rank's beginning to the last one's end.
    """

    computations: list[Computation]
    busy: list[float]
    seconds: float

    @property
    def idle_shares(self) -> list[float]:
        """Share of the step that each rank waits, in [0, 1)."""
        return [1 - busy / self.seconds for busy in self.busy]

    @property
    def efficiency(self) -> float:
        """Time of the work divided perfectly over the ranks over the time of the step, in (0, 1]."""
        return sum(self.busy) / len(self.busy) / self.seconds


def equal_efficiency(layers: int, ranks: int) -> float:
    """L / (L + C - 1), what simulate() finds for equal layers and nothing else."""
    return layers / (layers + ranks - 1)


def simulate(work: Sequence[Sequence[Work]], link: Link | None = None, in_flight: int = 1) -> Wavefront:
    """A step from the times of its parts.

    Args:
        work: For each micro-batch, for each rank in the order of the tokens.
        link: Messages between neighbours; None for messages that take no time.
        in_flight: Forward passes before the first backward pass.
    """
    link = link or Link()
    computations: list[Computation] = []
    free = [0.0] * len(work[0])
    for begin in range(0, len(work), in_flight):
        for direction in (FORWARD, BACKWARD):
            for micro_batch, ranks in enumerate(work[begin : begin + in_flight], begin):
                free = _pass(micro_batch, direction, ranks, free, link, computations)
    busy = [sum(ranks[rank].seconds for ranks in work) for rank in range(len(free))]
    return Wavefront(computations, busy, max(free))


def _pass(
    micro_batch: int,
    direction: str,
    ranks: Sequence[Work],
    free: list[float],
    link: Link,
    computations: list[Computation],
) -> list[float]:
    """One way through all layers; when each rank is free again. What is done is added to the computations."""
    forth, after = direction == FORWARD, list(free)
    arrivals = [0.0] * len(ranks[0].forward)
    for rank in range(len(ranks)) if forth else reversed(range(len(ranks))):
        own = ranks[rank]
        seconds, size = (own.forward, link.forward_bytes) if forth else (own.backward, link.backward_bytes)
        now, sent = free[rank] + (own.before if forth else own.head), 0.0
        for layer in range(len(seconds)) if forth else reversed(range(len(seconds))):
            start = now if layer in link.at_once else max(now, arrivals[layer])
            now = max(start + seconds[layer], arrivals[layer])
            computations.append(Computation(micro_batch, rank, direction, layer, start, now))
            sent = max(now, sent) + size / link.bytes_per_second
            arrivals[layer] = sent + link.latency_seconds
        after[rank] = now if forth else now + own.after
    return after
