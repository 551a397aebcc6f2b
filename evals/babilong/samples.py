"""Samples as token ids: a story's facts between the sentences of the background, handed out piece by piece."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evals.babilong.background import Background
from evals.babilong.stories import Story
from evals.babilong.tasks import Prompt, closing
from evals.command_line import EvaluationError
from evals.tokens import DiskTokens, encoder

PROMPT_ROOM = 300
"""Tokens that BABILong takes off a length for the prompt around the context."""
TOKENS_PER_FACT = 8
"""BABILong's measure of what fits: at most one fact for so many tokens of the context."""

Ids = np.ndarray | DiskTokens


@dataclass(frozen=True)
class SampleKey:
    """Names one sample; everything in it follows from these four and the texts."""

    task: str
    """qa1 to qa20."""
    length: int
    """Tokens of context and prompt, about; 0 has the facts alone."""
    sample: int
    """Number among the samples of this task and length."""
    seed: int
    """Of the evaluation."""


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer."""

    name: SampleKey
    """Which sample it is."""
    story: Story
    """Facts, question and answer."""
    parts: tuple[Ids, ...]
    """The prompt's token ids, start token first, in parts to be joined; those of the background lie on disk."""

    @property
    def tokens(self) -> int:
        """Length of the prompt."""
        return sum(map(len, self.parts))

    def pieces(self, size: int) -> Iterator[np.ndarray]:
        """The prompt in pieces of `size` tokens, the last one shorter; one piece is held at a time."""
        piece = np.empty(size, np.int64)
        filled = 0
        for part in self.parts:
            for start in range(0, len(part), size):
                rest = np.asarray(part[start : start + size])
                while len(rest):
                    taken = min(len(rest), size - filled)
                    piece[filled : filled + taken] = rest[:taken]
                    filled, rest = filled + taken, rest[taken:]
                    if filled == size:
                        yield piece.copy()
                        filled = 0
        if filled:
            yield piece[:filled].copy()


class SampleBuilder:
    """Builds the samples of one task.

    Args:
        processor: The `sentencepiece.SentencePieceProcessor`.
        prompt: The task's words.
        stories: The task's questions.
        background: What the facts lie in.
    """

    def __init__(self, processor: Any, prompt: Prompt, stories: Sequence[Story], background: Background) -> None:
        self._processor, self._stories, self._background = processor, stories, background
        self._opening = np.array([processor.bos_id(), *processor.encode(prompt.opening)], np.int32)
        self._inside = encoder(processor, ". ")
        self._first = encoder(processor, "<context>\n")

    def build(self, name: SampleKey) -> Sample:
        """The sample.

        Raises:
            EvaluationError: Too few questions, or none, fit the length.
        """
        generator = random.Random(f"{name.task} {name.length} {name.sample} {name.seed}")
        story = self._choose(name)
        facts = self._inside(story.facts)
        count = self._background.count
        told = sum(map(len, facts)) if count is None else sum(count(story.facts))
        context = self._scatter(facts, name.length - PROMPT_ROOM - told, generator)
        ending = self._processor.encode("." + closing(story.question))[len(self._processor.encode(".")) :]
        return Sample(name, story, (self._opening, *self._at_start(context), np.array(ending, np.int32)))

    def _choose(self, name: SampleKey) -> Story:
        """No question twice among the samples of a length."""
        room = name.length - PROMPT_ROOM
        fitting = [
            story for story in self._stories if not name.length or len(story.facts) <= max(room, 0) // TOKENS_PER_FACT
        ]
        if name.sample >= len(fitting):
            raise EvaluationError(
                f"--samples {name.sample + 1}: {name.task} has {len(fitting):,} questions that fit --lengths "
                f"{name.length}; give fewer samples or another length"
            )
        order = list(range(len(fitting)))
        random.Random(f"{name.task} {name.length} {name.seed}").shuffle(order)
        return fitting[order[name.sample]]

    def _scatter(self, facts: list[list[int]], noise: int, generator: random.Random) -> Iterator[Ids]:
        """Facts in their order at random places between sentences of the background, `noise` tokens of them."""
        arrays = [np.array(fact, np.int32) for fact in facts]
        if noise < 1:
            yield from arrays
            return
        first = generator.randrange(self._background.sentences)
        sentences, beyond = self._background.until(first, noise)
        places = sorted(generator.randint(0, sentences) for _ in arrays)
        for place, last, fact in zip([0, *places], [*places, sentences], [*arrays, None], strict=True):
            parts: list[Ids] = [*self._background.slices(first + place, first + last)]
            if last == sentences and place < last and beyond:  # the last sentence is cut at the length
                parts[-1], beyond = parts[-1][:-beyond], 0
            yield from parts
            if fact is not None:
                yield fact

    def _at_start(self, context: Iterable[Ids]) -> Iterator[Ids]:
        """The context as it stands behind a line feed: its first word has no blank before it."""
        parts = [part for part in context if len(part)]
        beginning = np.asarray(parts[0][:64]).tolist()
        word = self._processor.decode(beginning).split(" ", 1)[0]
        with_blank, without = self._inside([word])[0], self._first([word])[0]
        if beginning[: len(with_blank)] == with_blank:
            yield np.array(without, np.int32)
            parts[0] = parts[0][len(with_blank) :]
        yield from parts
