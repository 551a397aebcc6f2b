"""How long an evaluation will take: two short trials before it, corrected by what it has cost so far."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from evals.niah.generate import Stream, answer, read, repeat
from evals.niah.samples import Sample
from evals.report import seconds_text

_TRIAL_TOKENS, _TRIAL_STEPS = 512, 3


@dataclass
class Forecast:
    """Seconds of reading and answering, linear in the rows read side by side, and what is left of a plan."""

    one: float
    """Seconds a token of one row alone."""
    more: float
    """Seconds a token that every further row adds."""
    step: float
    """Seconds of a decoding step."""
    left: float = 0.0
    """Seconds that the trials promise for what is left."""
    _promised: float = field(default=0.0, init=False)
    _taken: float = field(default=0.0, init=False)

    def reading(self, rows: int, tokens: int) -> float:
        """Seconds of reading so many tokens of each of so many rows."""
        return tokens * (self.one + (rows - 1) * self.more)

    def done(self, promised: float, taken: float) -> None:
        """Counts work that is done: the seconds that the trials promised and those it took."""
        self._promised += promised
        self._taken += taken
        self.left = max(self.left - promised, 0.0)

    def text(self) -> str:
        """The time that remains, in words."""
        pace = self._taken / self._promised if self._promised else 1.0
        return f"about {seconds_text(self.left * pace)} left"


def measure(stream: Stream, samples: Sequence[Sample], piece: int, end: int) -> Forecast:
    """Times a short stretch of one row and one of several.

    Args:
        stream: The model.
        samples: As many as are read side by side.
        piece: Tokens read at a time.
        end: Id of the end token.
    """
    tokens = min(_TRIAL_TOKENS, *(sample.tokens for sample in samples))
    prompts = torch.from_numpy(np.stack([sample.piece(0, tokens) for sample in samples]))
    logits, states = read(stream, [prompts[:1, :1]], lambda _: None)  # the first call ever is slower

    def trial(rows: int) -> float:
        return _seconds(lambda: read(stream, prompts[:rows].split(piece, 1), lambda _: None)) / tokens

    one = trial(1)
    many = trial(len(samples)) if len(samples) > 1 else one
    more = max(many - one, 0.0) / max(len(samples) - 1, 1)
    rows, wide = repeat(states, len(samples)), logits.expand(len(samples), -1)
    step = _seconds(lambda: answer(stream, wide, rows, 1 + _TRIAL_STEPS, end, lambda: None)) / _TRIAL_STEPS
    return Forecast(one, more, step)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
