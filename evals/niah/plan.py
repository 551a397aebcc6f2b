"""Which samples are read side by side, by which process, what of a grid fits into a time, and how long it will take."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from evals.niah.generate import Stream, answer, read, repeat
from evals.niah.samples import MAIN, Sample, SampleBuilder, SampleKey

_TRIAL_TOKENS, _TRIAL_STEPS = 512, 3
_FEW_DEPTHS = (5, 3, 1)


@dataclass(frozen=True)
class Forecast:
    """Seconds of reading and answering, linear in the rows read side by side."""

    one: float
    """Seconds a token of one row alone."""
    more: float
    """Seconds a token that every further row adds."""
    step: float
    """Seconds of a decoding step."""

    def reading(self, rows: int, tokens: int) -> float:
        """Seconds of reading so many tokens of each of so many rows."""
        return tokens * (self.one + (rows - 1) * self.more)


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


class Stretch(NamedTuple):
    """What one reading of a haystack serves, its state saved before each needle: every depth, and every sample there.

    With D depths of n samples the haystack is read once to the deepest needle, and from each needle on by its samples:
    about half of reading every prompt from its start.
    """

    control: str
    length: int
    task: str
    seed: int


@dataclass(frozen=True)
class Batch:
    """Samples that are read side by side behind a beginning that they share."""

    names: tuple[SampleKey, ...]
    """The samples; of one depth."""
    tokens: int
    """Tokens of each prompt."""
    shared: int
    """First tokens, the same in all of them and in the stretch."""

    @property
    def stretch(self) -> Stretch:
        """The reading it is part of."""
        name = self.names[0]
        return Stretch(name.control, name.length, name.task, name.seed)

    def seconds(self, forecast: Forecast, max_new_tokens: int) -> float:
        """What it takes behind its beginning."""
        return forecast.reading(len(self.names), self.tokens - self.shared) + max_new_tokens * forecast.step


class Planner:
    """Cuts samples into batches and counts their cost."""

    def __init__(self, builder: SampleBuilder, batch: int, max_new_tokens: int) -> None:
        """Nothing is planned yet.

        Args:
            builder: Knows how long a prompt is and what it shares.
            batch: Most samples side by side.
            max_new_tokens: Steps of an answer.
        """
        self._builder, self._batch, self._steps = builder, batch, max_new_tokens
        self._shapes: dict[SampleKey, tuple[int, int, int]] = {}

    def batches(self, names: Iterable[SampleKey]) -> list[Batch]:
        """Batches of equal prompts' lengths: those of a stretch together, in the order of their needles."""
        groups: dict[tuple[object, ...], list[SampleKey]] = defaultdict(list)
        for name in names:
            tokens, _, question_at = self._shape(name)
            # Where the state is changed before the question, all rows have to be there.
            at = question_at if name.control == "memory_reset" else 0
            groups[name.control, name.length, name.task, name.seed, name.depth, tokens, at].append(name)
        found = []
        for group in groups.values():
            for start in range(0, len(group), self._batch):
                own = tuple(group[start : start + self._batch])
                shared = min(self._shape(name)[1] for name in own)
                found.append(Batch(own, self._shape(own[0])[0], shared))
        return sorted(found, key=lambda batch: (batch.stretch[0] != MAIN, batch.stretch, batch.shared))

    def seconds(self, batches: Sequence[Batch], forecast: Forecast) -> float:
        """What batches take in one process."""
        longest: dict[Stretch, int] = defaultdict(int)
        for batch in batches:
            longest[batch.stretch] = max(longest[batch.stretch], batch.shared)
        beginnings = sum(forecast.reading(1, tokens) for tokens in longest.values())
        return beginnings + sum(batch.seconds(forecast, self._steps) for batch in batches)

    def divide(self, batches: Sequence[Batch], ranks: int, forecast: Forecast) -> list[list[Batch]]:
        """Batches for each process so that all end at about the same time, the longest given out first.

        A process reads the beginning of a stretch for its own batches. Ranks that share one long sample's tokens would
        read it as a chain, layer behind layer (see parallel/context.py), at an efficiency of L / (L + ranks - 1), and
        keep their whole parts of it; samples and depths are independent, and as many processes as depths read the
        longest haystack in the time of one.
        """
        shares: list[list[Batch]] = [[] for _ in range(ranks)]
        loads = [0.0] * ranks
        read: list[dict[Stretch, int]] = [defaultdict(int) for _ in range(ranks)]
        for batch in sorted(batches, key=lambda batch: -batch.seconds(forecast, self._steps)):
            own = batch.seconds(forecast, self._steps)
            ends = [
                load + own + forecast.reading(1, max(batch.shared - beginnings[batch.stretch], 0))
                for load, beginnings in zip(loads, read, strict=True)
            ]
            rank = ends.index(min(ends))
            loads[rank] = ends[rank]
            read[rank][batch.stretch] = max(read[rank][batch.stretch], batch.shared)
            shares[rank].append(batch)
        order = {id(batch): place for place, batch in enumerate(batches)}
        return [sorted(share, key=lambda batch: order[id(batch)]) for share in shares]

    def fit(
        self, names: Sequence[SampleKey], missing: Callable[[SampleKey], bool], forecast: Forecast, seconds: float
    ) -> tuple[list[SampleKey], dict[int, tuple[int, int]]]:
        """The part of a grid that should fit into a time.

        Every length may use an equal share of what shorter ones have left. Its samples are halved until they fit, then
        its depths are thinned out; where one sample at one depth is too long, the length is left out.

        Args:
            names: The whole grid.
            missing: Whether a sample has still to be run; others cost nothing.
            forecast: From trials.
            seconds: Of all processes together.

        Returns:
            The names, and for each length its depths and samples; 0 and 0 where it is left out.
        """
        lengths = sorted({name.length for name in names})
        chosen, grid, left = [], {}, seconds
        for place, length in enumerate(lengths):
            own, cost, grid[length] = [], 0.0, (0, 0)
            for depths, samples, candidate in _candidates([name for name in names if name.length == length]):
                needed = self.seconds(self.batches(filter(missing, candidate)), forecast)
                if needed <= left / (len(lengths) - place):
                    own, cost, grid[length] = candidate, needed, (depths, samples)
                    break
            chosen += own
            left -= cost
        return chosen, grid

    def _shape(self, name: SampleKey) -> tuple[int, int, int]:
        """Tokens of the prompt, those that are shared, and those before the question."""
        if name not in self._shapes:
            sample = self._builder.build(name)
            self._shapes[name] = sample.tokens, sample.shared, sample.question_at
        return self._shapes[name]


def _candidates(names: Sequence[SampleKey]) -> Iterable[tuple[int, int, list[SampleKey]]]:
    """Depths, samples and names of ever smaller grids of one length."""
    depths, samples = sorted({name.depth for name in names}), 1 + max(name.sample for name in names)
    while samples > 1:
        yield len(depths), samples, [name for name in names if name.sample < samples]
        samples //= 2
    for count in (len(depths), *(few for few in _FEW_DEPTHS if few < len(depths))):
        places = np.linspace(0, len(depths) - 1, count) if count > 1 else [len(depths) // 2]
        kept = {depths[round(place)] for place in places}
        yield count, 1, [name for name in names if name.sample == 0 and name.depth in kept]
