"""Samples from token ids: every sentence is tokenised once and spliced, so two million tokens take milliseconds."""

import hashlib
import random
import uuid
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from evals.command_line import EvaluationError
from evals.niah import templates
from evals.niah.haystacks import NOISE, PROSE, Filling, Haystack, Source, Splicer, needles_source

Fill = Literal["exact", "ruler_2024"]
MAIN = "none"
_RULER_WORDS, _RULER_LINES, _RULER_FEW_LINES, _RULER_SHORT = 500, 25, 5, 4_096


@dataclass(frozen=True)
class SampleKey:
    """Names one sample; everything in it follows from these, the tokenizer and the text."""

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
    control: str = MAIN
    """What is taken away to see what answers rest on; key and value do not depend on it. none takes nothing."""


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer."""

    name: SampleKey
    """Which sample it is."""
    needle_key: str
    """What is asked for, adjective-noun."""
    value: str
    """The answer: seven digits, or a uuid."""
    value_ids: tuple[int, ...]
    """Tokens of the value as it would follow the prompt."""
    parts: tuple[np.ndarray, ...]
    """Token ids, int32, of the prompt's parts: start token and opening, haystack around the needle, question. Parts of
    the haystack are views of what all samples share."""
    shared: int
    """First tokens that are the same for all samples of this task, length, seed and control, or a beginning of theirs:
    what stands before the needle."""
    question_at: int
    """Tokens before the question."""

    @cached_property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return sum(map(len, self.parts))

    @property
    def prompt(self) -> np.ndarray:
        """The whole prompt."""
        return np.concatenate(self.parts)

    @property
    def sha256(self) -> str:
        """Of the prompt's ids as 32-bit little-endian numbers."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(np.ascontiguousarray(part, "<i4").data)
        return digest.hexdigest()

    def piece(self, start: int, stop: int) -> np.ndarray:
        """Token ids `start` to `stop` of the prompt."""
        found, at = [], 0
        for part in self.parts:
            found.append(part[max(start - at, 0) : max(stop - at, 0)])
            at += len(part)
        return np.concatenate(found)


class SampleBuilder:
    """Builds samples for one tokenizer."""

    def __init__(
        self,
        processor: Any,
        max_new_tokens: int,
        *,
        fill: Fill = "exact",
        text: Source = PROSE,
        window: int = 0,
        words: templates.Words = templates.OWN_WORDS,
    ) -> None:
        """Tokenises what all samples share.

        Args:
            processor: The `sentencepiece.SentencePieceProcessor`, or what encodes like it.
            max_new_tokens: Room kept for the answer.
            fill: exact fills the length to the token, the last sentence cut short; ruler_2024 takes RULER's steps of
                that year: 500 words of prose, 25 lines of noise (5 below 4,096 tokens), as many as fit.
            text: Haystack of the tasks that hide their needle in prose.
            window: Tokens that the control window_only leaves.
            words: What needles' keys are made of.

        Raises:
            EvaluationError: The tokenizer joins the end of one line with the start of the next.
        """
        self._processor, self._splicer = processor, Splicer(processor)
        self._answer_room, self._fill, self._window, self.words = max_new_tokens, fill, window, words
        self._sources = {
            task.name: needles_source(task, words)
            if task.haystack == "needles"
            else {"noise": NOISE, "prose": text}[task.haystack]
            for task in templates.TASKS.values()
        }
        self._haystacks: dict[tuple[str, int], Haystack] = {}

    def source(self, task: str) -> Source:
        """The text in which a task hides its needle."""
        return self._sources[task]

    def check(self, name: SampleKey) -> None:
        """Looks whether the sample fits, without building it.

        Raises:
            EvaluationError: The length is too short for the words, a sentence or step of the haystack, and the answer.
        """
        least = self._least(name)
        if name.length < least:
            raise EvaluationError(
                f"--lengths {name.length}: too short for the prompt of {name.task} with this tokenizer and "
                f"--max-new-tokens {self._answer_room}; give at least {least}"
            )

    def build(self, name: SampleKey) -> Sample:
        """The sample; with fill exact its prompt has name.length - max_new_tokens tokens.

        Raises:
            EvaluationError: The length is too short.
        """
        self.check(name)
        task, hay = templates.BY_NAME[name.task], self._haystack(name)
        key, value = self._draw(name)
        opening, question = self._opening(task), self._line(task.question(key))
        value_ids = tuple(self._splicer.after(task.question(key), value))
        room = name.length - self._answer_room - len(opening) - len(question)
        middle, shared = self._haystack_with_needle(name, hay, task.needle(key, value), room, len(value_ids))
        shared += len(opening)
        if name.control == "window_only":
            whole = np.concatenate(middle)
            kept = min(max(self._window - len(opening) - len(question), 0), len(whole))
            middle, shared = [whole[len(whole) - kept :]], len(opening)
        parts = (opening, *middle, question)
        return Sample(name, key, value, value_ids, parts, shared, sum(map(len, parts)) - len(question))

    def _haystack_with_needle(
        self, name: SampleKey, hay: Haystack, needle: str, room: int, value_tokens: int
    ) -> tuple[list[np.ndarray], int]:
        """What stands between opening and question, and how many tokens of it other samples have too."""
        needle_ids = np.empty(0, np.int32)
        if name.control != "needle_absent":
            needle_ids = self._line(needle)
            filling = self._filling(name, hay, room - len(needle_ids), value_tokens)
            if filling.sentences_before(name.depth) == 0:
                return [needle_ids, filling.ids], 0
            needle_ids = np.array(self._splicer.behind(hay.source.joiner, needle), np.int32)
        # The haystack begins behind a line feed now, where its first sentence may have other tokens.
        head = int(hay.ends[0])
        more = len(hay.first) - head
        filling = self._filling(name, hay, room - len(needle_ids) - more, value_tokens)
        sentences = max(filling.sentences_before(name.depth), 1) if len(needle_ids) else len(filling.ends)
        place = int(filling.ends[sentences - 1])
        # A sentence that is cut short here may have other tokens where it is whole.
        shared = int(filling.ends[min(sentences, filling.whole) - 1]) + more if filling.whole else 0
        return [hay.first, filling.ids[head:place], needle_ids, filling.ids[place:]], shared

    def _filling(self, name: SampleKey, hay: Haystack, tokens: int, value_tokens: int) -> Filling:
        if self._fill == "exact":
            return hay.exactly(tokens)
        # When RULER looks for the number of steps, it counts the answer as well as the room for it.
        return hay.in_steps(tokens - value_tokens, _step(name, hay))

    def _haystack(self, name: SampleKey) -> Haystack:
        source = self.source(name.task)
        place = (source.sha256, name.seed if source.seeded else 0)
        if place not in self._haystacks:
            self._haystacks[place] = Haystack(source, self._splicer, name.seed)
        return self._haystacks[place]

    def _least(self, name: SampleKey) -> int:
        """The shortest length: the words, one sentence or step of the haystack, and the answer."""
        task, hay = templates.BY_NAME[name.task], self._haystack(name)
        key, value = self._draw(name)
        needle = max(len(self._splicer.behind(joiner, task.needle(key, value))) for joiner in ("\n", hay.source.joiner))
        words = len(self._opening(task)) + needle + len(self._line(task.question(key)))
        more = abs(len(hay.first) - int(hay.ends[0]))
        if self._fill == "exact":
            return words + int(hay.ends[0]) + more + self._answer_room
        value_tokens = len(self._splicer.after(task.question(key), value))
        return words + hay.step_tokens(_step(name, hay)) + more + value_tokens + self._answer_room

    def _opening(self, task: templates.Task) -> np.ndarray:
        return np.array([self._processor.bos_id(), *self._processor.encode(task.opening)], np.int32)

    def _line(self, text: str) -> np.ndarray:
        return np.array(self._splicer.behind("\n", text), np.int32)

    def _draw(self, name: SampleKey) -> tuple[str, str]:
        """Needle key and value of a sample, neither of which stands in the haystack."""
        place = f"{name.task} {name.length} {name.depth:.2f} {name.sample} {name.seed}"
        generator, text = random.Random(place), self.source(name.task).text
        while True:
            key = self.words.key(generator)
            value = str(generator.randint(10**6, 10**7 - 1))
            if templates.BY_NAME[name.task].value == "uuid":
                value = str(uuid.UUID(int=generator.getrandbits(128), version=4))
            if key not in text and value not in text:
                return key, value


def _step(name: SampleKey, hay: Haystack) -> int:
    """RULER's step of 2024: words of prose, or lines."""
    if not hay.of_lines:
        return _RULER_WORDS
    return _RULER_FEW_LINES if name.length < _RULER_SHORT else _RULER_LINES
