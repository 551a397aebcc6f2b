"""Samples from token ids: every sentence is tokenised once and spliced, so two million tokens take milliseconds."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from evals.command_line import EvaluationError
from evals.niah import templates


@dataclass(frozen=True)
class SampleKey:
    """Names one sample; everything in it follows from these five."""

    task: str
    """RULER's name of the task."""
    length: int
    """Tokens of prompt and answer together."""
    depth: float
    """Place of the needle, percent of the haystack."""
    sample: int
    """Number among the samples of this length and depth."""
    seed: int
    """Of the evaluation."""


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer."""

    name: SampleKey
    """Which sample it is."""
    needle_key: str
    """What is asked for, adjective-noun."""
    value: str
    """The answer, seven digits."""
    prompt: np.ndarray
    """Token ids, int32: start token, haystack with the needle, question, answer prefix."""


class SampleBuilder:
    """Builds samples for one tokenizer.

    A prompt fills its length exactly: whole lines of noise, the first one cut short where a rest is left.
    """

    def __init__(self, processor: Any, max_new_tokens: int) -> None:
        """Tokenises what all samples share.

        Args:
            processor: The `sentencepiece.SentencePieceProcessor`.
            max_new_tokens: Room kept for the answer.

        Raises:
            EvaluationError: The tokenizer joins the end of one line with the start of the next.
        """
        self._processor = processor
        self._answer_room = max_new_tokens
        self._opening = [processor.bos_id(), *processor.encode(templates.OPENING)]
        self._noise = self._line(templates.NOISE)

    def check(self, name: SampleKey) -> None:
        """Looks whether the sample fits, without building it.

        Raises:
            EvaluationError: The length is too short for the words, one line of noise and the answer.
        """
        least = self._fixed(name) + len(self._noise)
        if name.length < least:
            raise EvaluationError(
                f"--lengths {name.length}: too short for the prompt with this tokenizer and --max-new-tokens "
                f"{self._answer_room}; give at least {least}"
            )

    def build(self, name: SampleKey) -> Sample:
        """The sample; its prompt has name.length - max_new_tokens tokens.

        Raises:
            EvaluationError: The length is too short.
        """
        self.check(name)
        key, value = _draw(name)
        needle, question = self._needle_and_question(key, value)
        whole, rest = divmod(name.length - self._fixed(name), len(self._noise))
        before = round(name.depth / 100 * (whole + bool(rest)))  # lines of noise
        hay = np.array(self._noise[:rest] + self._noise * whole, np.int32)
        cut = (rest or len(self._noise)) + (before - 1) * len(self._noise) if before else 0
        prompt = np.concatenate([self._opening, hay[:cut], needle, hay[cut:], question]).astype(np.int32)
        assert len(prompt) == name.length - self._answer_room
        return Sample(name, key, value, prompt)

    def _fixed(self, name: SampleKey) -> int:
        """Tokens of everything but the noise."""
        needle, question = self._needle_and_question(*_draw(name))
        return len(self._opening) + len(needle) + len(question) + self._answer_room

    def _needle_and_question(self, key: str, value: str) -> tuple[list[int], list[int]]:
        needle = self._line(templates.NEEDLE.format(key=key, value=value))
        return needle, self._line(templates.QUESTION.format(key=key))

    def _line(self, text: str) -> list[int]:
        """Ids of a line with the line feed before it, as they stand in the encoding of a whole text.

        Encoded alone it would begin with sentencepiece's dummy prefix; every line here follows a full stop.
        """
        before, both = self._processor.encode("."), self._processor.encode(".\n" + text)
        if both[: len(before)] != before:
            raise EvaluationError("the tokenizer joins the end of a line with the next one; samples cannot be spliced")
        return both[len(before) :]


def _draw(name: SampleKey) -> tuple[str, str]:
    """Needle key and value of a sample, from its five names alone."""
    generator = random.Random(f"{name.task} {name.length} {name.depth:.2f} {name.sample} {name.seed}")
    key = f"{generator.choice(templates.ADJECTIVES)}-{generator.choice(templates.NOUNS)}"
    return key, str(generator.randint(10**6, 10**7 - 1))
