"""Which samples are read side by side, by which process.

Work is counted in tokens that one row reads.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evals.niah.samples import MAIN, SampleBuilder, SampleKey

STEP = 10
"""A token of the answers takes about as long as so many that are read."""


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

    def work(self, max_new_tokens: int) -> int:
        """What it takes behind its beginning."""
        return len(self.names) * (self.tokens - self.shared) + STEP * max_new_tokens


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

    def work(self, batches: Sequence[Batch]) -> int:
        """What batches take in one process."""
        longest: dict[Stretch, int] = defaultdict(int)
        for batch in batches:
            longest[batch.stretch] = max(longest[batch.stretch], batch.shared)
        return sum(longest.values()) + sum(batch.work(self._steps) for batch in batches)

    def divide(self, batches: Sequence[Batch], ranks: int) -> list[list[Batch]]:
        """Batches for each process so that all end at about the same time, the longest given out first.

        A process reads the beginning of a stretch for its own batches. Ranks that share one long sample's tokens would
        read it as a chain, layer behind layer (see parallel/context.py), at an efficiency of L / (L + ranks - 1), and
        keep their whole parts of it; samples and depths are independent, and as many processes as depths read the
        longest haystack in the time of one.
        """
        shares: list[list[Batch]] = [[] for _ in range(ranks)]
        for batch in sorted(batches, key=lambda batch: -batch.work(self._steps)):
            min(shares, key=lambda share: self.work([*share, batch])).append(batch)
        order = {id(batch): place for place, batch in enumerate(batches)}
        return [sorted(share, key=lambda batch: order[id(batch)]) for share in shares]

    def _shape(self, name: SampleKey) -> tuple[int, int, int]:
        """Tokens of the prompt, those that are shared, and those before the question."""
        if name not in self._shapes:
            sample = self._builder.build(name)
            self._shapes[name] = sample.tokens, sample.shared, sample.question_at
        return self._shapes[name]
