"""States that are not known yet: several processes read the parts of a row at the same time.

A linear state composes. With R what a part's tokens make of no state at all, and P what they make of any,

    S_out = P S_in + R        o_t = (what is read without S_in) + scale (P_t S_in)^T q_t

so that everything but two products can be worked out before S_in comes, and S_out goes on before a token is read again.
P is a number a head where the state only fades, a number for each of its own where these fade by themselves, and K x K
with the delta rule. Where a document begins in the part, P is 0.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor


class Handover(Protocol):
    """Where a part's state comes from and goes to.

    Attributes:
        first: Whether nothing stands before the part but `given`.
        given: The state that the first part goes on with; None begins a sequence.
    """

    @property
    def first(self) -> bool: ...

    @property
    def given(self) -> Tensor | None: ...

    def receive(self, like: Tensor) -> Tensor:
        """The state before the part, of the shape and type of `like`, from which the backward pass gets here."""

    def pass_on(self, state: Tensor, ahead: Tensor) -> Tensor:
        """Hands on the state behind the part.

        Returns:
            ahead, behind which the backward pass waits for the state's gradient.
        """


class Opened(NamedTuple):
    """A part read without a state before it.

    Attributes:
        reads: What its tokens read.
        state: R.
        through: P S of a state S before it.
        added: What S adds to the reads.
    """

    reads: Tensor
    state: Tensor
    through: Callable[[Tensor], Tensor]
    added: Callable[[Tensor], Tensor]


def handed_over(
    handover: Handover, whole: Callable[[Tensor | None], tuple[Tensor, Tensor]], opened: Callable[[], Opened]
) -> tuple[Tensor, Tensor]:
    """Reads a part and hands its state on.

    Args:
        handover: To whom.
        whole: Reads the part from a state that is known; None is 0.
        opened: Reads it without one.

    Returns:
        What is read, and the state behind the part.
    """
    if handover.first:
        reads, state = whole(handover.given)
        return handover.pass_on(state, reads), state
    part = opened()
    before = handover.receive(part.state)
    state = part.through(before) + part.state
    reads = handover.pass_on(state, part.reads)
    return reads + part.added(before).to(reads.dtype), state
