"""Samples as token ids: a story's facts between the sentences of the background, handed out piece by piece.

The background's sentences are tokenised once and lie on disk.
"""

import hashlib
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from evals.babilong.stories import Prompt, Story, closing
from evals.command_line import EvaluationError
from evals.niah.samples import piece_of
from evals.tokens import DiskTokens, Encode, encoder

LEAST_SENTENCE = 10
"""Tokens; BABILong leaves out what is shorter."""

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+(?=[\"'“‘(]?[A-Z])")
_BATCH = 2_000  # sentences tokenised at a time
Count = Callable[[Sequence[str]], list[int]]


class Background:
    """Sentences one behind another, the first behind the last.

    Args:
        sentences: The text.
        encode: Sentences to token ids, as they stand inside a text.
        count: Lengths of sentences in the tokens that lengths are given in; None counts the ids.

    Raises:
        EvaluationError: No sentence is long enough.
    """

    def __init__(self, sentences: Iterable[str], encode: Encode, count: Count | None) -> None:
        self.count = count
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as samples are read from it
        digest, ends, counts = hashlib.sha256(), [0], [0]
        stream = iter(sentences)
        while batch := list(islice(stream, _BATCH)):
            encoded = encode(batch)
            lengths = [len(ids) for ids in encoded] if count is None else count(batch)
            for ids, length in zip(encoded, lengths, strict=True):
                if length >= LEAST_SENTENCE:
                    data = np.asarray(ids, np.int32).tobytes()
                    digest.update(data)
                    self._file.write(data)
                    ends.append(ends[-1] + len(ids))
                    counts.append(counts[-1] + length)
        if len(ends) == 1:
            raise EvaluationError(
                f"the background has no sentence of {LEAST_SENTENCE} tokens or more; give a longer text with --pg19"
            )
        self._file.flush()
        self._ends, self._counts = np.array(ends), np.array(counts)
        self.sha256 = digest.hexdigest()

    @property
    def sentences(self) -> int:
        """How many there are."""
        return len(self._ends) - 1

    @property
    def tokens(self) -> int:
        """How long all of them are, in the tokens that lengths are given in."""
        return int(self._counts[-1])

    def until(self, first: int, tokens: int) -> tuple[int, int]:
        """How many sentences from `first` on hold so many tokens, and how many ids of the last one go beyond.

        Args:
            first: Number of a sentence.
            tokens: Counted as lengths are; at least 1.
        """
        rounds, rest = divmod(self._counts[first] + tokens - 1, self.tokens)
        last = int(np.searchsorted(self._counts, rest, side="right"))
        beyond = int(self._counts[last] - rest - 1)
        whole = int(self._counts[last] - self._counts[last - 1])
        ids = int(self._ends[last] - self._ends[last - 1])
        return int(rounds) * self.sentences + last - first, round(beyond * ids / whole)

    def slices(self, first: int, last: int) -> Iterator[DiskTokens]:
        """Ids of sentences `first` to `last`, the latter left out; numbers go on behind the last sentence."""
        while first < last:
            start = first % self.sentences
            stop = min(start + last - first, self.sentences)
            yield DiskTokens(self._file, int(self._ends[start]), int(self._ends[stop]))
            first += stop - start


def book_sentences(path: Path, split: str = "test") -> Iterator[str]:
    """Sentences of one text file or of all *.txt below a folder; of PG19's own folder one split alone.

    Raises:
        EvaluationError: There is no such text.
    """
    folder = path / split if (path / split).is_dir() else path
    files = [path] if path.is_file() else sorted(folder.rglob("*.txt"))
    if not files:
        raise EvaluationError(f"{path}: no .txt file there; give a text file or a folder of books")
    for file in files:
        yield from _SENTENCE_END.split(file.read_text(encoding="utf-8", errors="replace"))


PROMPT_ROOM = 300
"""Tokens that BABILong takes off a length for the prompt around the context."""
TOKENS_PER_FACT = 8
"""BABILong's measure of what fits: at most one fact for so many tokens of the context."""

Ids = np.ndarray | DiskTokens


@dataclass(frozen=True)
class StoryKey:
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
class StorySample:
    """A prompt and its answer."""

    name: StoryKey
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
        for start in range(0, self.tokens, size):
            yield piece_of(self.parts, start, min(start + size, self.tokens))


class StoryBuilder:
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

    def build(self, name: StoryKey) -> StorySample:
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
        return StorySample(name, story, (self._opening, *self._at_start(context), np.array(ending, np.int32)))

    def _choose(self, name: StoryKey) -> Story:
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
