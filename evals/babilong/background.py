"""The long text that the facts lie in: sentences tokenised once, kept on disk, handed out as slices."""

import hashlib
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from evals.command_line import EvaluationError
from evals.tokens import DiskTokens, Encode

LEAST_SENTENCE = 10
"""Tokens; BABILong leaves out what is shorter."""
SIMULATED_SENTENCES = 20_000

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


def book_sentences(path: Path) -> Iterator[str]:
    """Sentences of one text file or of all *.txt below a folder; of PG19's own folder the test split alone.

    Raises:
        EvaluationError: There is no such text.
    """
    folder = path / "test" if (path / "test").is_dir() else path
    files = [path] if path.is_file() else sorted(folder.rglob("*.txt"))
    if not files:
        raise EvaluationError(f"--pg19 {path}: no .txt file there; give a text file or a folder of books")
    for file in files:
        yield from _SENTENCE_END.split(file.read_text(encoding="utf-8", errors="replace"))


def simulated_sentences() -> Iterator[str]:
    """Prose of our own for trials where no book is at hand."""
    generator = random.Random(0)
    who = ("The old captain", "A young clerk", "The miller's wife", "Our neighbour", "The tall stranger", "My uncle")
    did = ("remembered", "described", "had forgotten", "asked about", "spoke of", "wrote down", "laughed at")
    what = ("the long road", "a quiet evening", "the broken clock", "an early train", "the price of wheat", "a letter")
    when = ("before the rain began", "while the others slept", "as the bells rang", "long after the harvest was in")
    end = ("and nobody answered", "which surprised them all", "without a word more", "as if it had been yesterday")
    for _ in range(SIMULATED_SENTENCES):
        words = (generator.choice(part) for part in (who, did, what, when, end))
        yield "{} {} {} {}, {}.".format(*words)
