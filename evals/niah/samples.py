"""Samples from token ids: every sentence is tokenised once and spliced, so two million tokens take milliseconds."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from evals.command_line import EvaluationError
from evals.niah import templates
from evals.niah.haystacks import NOISE, PROSE, Filling, Haystack, Source, Splicer, needles_source

MAIN = "none"


@dataclass(frozen=True)
class SampleKey:
    """Names one sample; everything in it follows from these, the tokenizer and the text."""

    task: str
    """RULER's name of the task."""
    length: int
    """Tokens of prompt and answer together."""
    depth: float
    """Place of the needle, percent of the haystack; where there are several, of the one asked for, or of one of them.
    The others stand anywhere."""
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
    """What is asked for, adjective-noun or a uuid; several as the question names them."""
    values: tuple[str, ...]
    """What the answer has to have: seven digits or a uuid each. Of one key in the order of the text."""
    value_ids: tuple[int, ...]
    """Tokens of the answer as it would follow the prompt."""
    parts: tuple[np.ndarray, ...]
    """Token ids, int32, of the prompt's parts: start token and opening, haystack around the needles, question. Parts of
    the haystack are views of what all samples share."""
    shared: int
    """First tokens that are the same for all samples of this task, length, seed and control, or a beginning of theirs:
    what stands before the first needle."""
    question_at: int
    """Tokens before the question."""

    @property
    def value(self) -> str:
        """The answer."""
        return templates.listed(self.values)

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
        return piece_of(self.parts, start, stop)


def piece_of(parts: Sequence[Any], start: int, stop: int) -> np.ndarray:
    """Token ids `start` to `stop` of arrays, or what can be sliced and read as one, that follow each other."""
    found, at = [], 0
    for part in parts:
        if at < stop and at + len(part) > start:
            found.append(np.asarray(part[max(start - at, 0) : stop - at]))
        at += len(part)
    return np.concatenate(found)


class Needle(NamedTuple):
    """A sentence to be remembered."""

    depth: float
    """Its place, percent of the haystack."""
    key: str
    """What it is asked for by."""
    value: str
    """What is asked for."""
    text: str
    """The sentence."""


class SampleBuilder:
    """Builds samples for one tokenizer."""

    def __init__(
        self,
        processor: Any,
        max_new_tokens: int,
        *,
        text: Source = PROSE,
        window: int = 0,
        words: templates.Words = templates.OWN_WORDS,
    ) -> None:
        """Tokenises what all samples share.

        Args:
            processor: The `sentencepiece.SentencePieceProcessor`, or what encodes like it.
            max_new_tokens: Room kept for the answer.
            text: Haystack of the tasks that hide needles in prose.
            window: Tokens that the control window_only leaves.
            words: What needles' keys are made of.

        Raises:
            EvaluationError: The tokenizer joins the end of one line with the start of the next.
        """
        self._processor, self._splicer = processor, Splicer(processor)
        self._answer_room, self._window, self.words = max_new_tokens, window, words
        self._sources = {"noise": NOISE, "prose": text} | {
            task.name: needles_source(task, words) for task in templates.TASKS.values() if task.haystack == "needles"
        }
        self._haystacks: dict[tuple[str, int], Haystack] = {}

    def source(self, task: str) -> Source:
        """The text in which a task hides its needles."""
        return self._sources.get(task) or self._sources[templates.by_name(task).haystack]

    def check(self, name: SampleKey) -> None:
        """Looks whether the sample fits, without building it.

        Raises:
            EvaluationError: The length is too short for the words, a sentence of the haystack, and the answer; or the
                words make too few keys.
        """
        keys, most = templates.by_name(name.task).keys, self.words.keys // 2
        if keys > most:
            raise EvaluationError(f"--keys {keys}: too many for these words; give at most {most}, or more --words")
        least = self._least(name)
        if name.length < least:
            raise EvaluationError(
                f"--lengths {name.length}: too short for the prompt of {name.task} with this tokenizer and "
                f"--max-new-tokens {self._answer_room}; give at least {least}"
            )

    def build(self, name: SampleKey) -> Sample:
        """The sample: its prompt has name.length - max_new_tokens tokens, the haystack's last sentence cut short.

        Raises:
            EvaluationError: The length is too short.
        """
        self.check(name)
        task, hay = templates.by_name(name.task), self._haystack(name)
        needles = self._draw(name)
        asked = list(dict.fromkeys(needle.key for needle in needles))[: task.asked]
        in_text = sorted(needles, key=lambda needle: needle.depth)
        values = tuple(needle.value for key in asked for needle in in_text if needle.key == key)
        opening, question = self._opening(task), self._line(task.question(*asked))
        value_ids = tuple(self._splicer.after(task.question(*asked), templates.listed(values)))
        if name.control == "needle_absent":
            in_text = [needle for needle in in_text if needle.key not in asked]
        room = name.length - self._answer_room - len(opening) - len(question)
        middle, shared = self._haystack_with_needles(hay, in_text, room)
        shared += len(opening)
        if name.control == "window_only":
            whole = np.concatenate(middle)
            kept = min(max(self._window - len(opening) - len(question), 0), len(whole))
            middle, shared = [whole[len(whole) - kept :]], len(opening)
        parts = (opening, *middle, question)
        question_at = sum(map(len, parts)) - len(question)
        return Sample(name, templates.listed(asked), values, value_ids, parts, shared, question_at)

    def _haystack_with_needles(self, hay: Haystack, needles: list[Needle], room: int) -> tuple[list[np.ndarray], int]:
        """What stands between opening and question, and how many tokens of it other samples have too."""
        ids = [np.array(self._splicer.behind(hay.source.joiner, needle.text), np.int32) for needle in needles]
        if needles:
            first = self._line(needles[0].text)
            filling = hay.exactly(room - len(first) - sum(map(len, ids[1:])))
            if filling.sentences_before(needles[0].depth) == 0:
                return [first, *_between(filling, 0, needles[1:], ids[1:], 0)], 0
        # The haystack begins behind a line feed now, where its first sentence may have other tokens.
        head = int(hay.ends[0])
        more = len(hay.first) - head
        filling = hay.exactly(room - sum(map(len, ids)) - more)
        sentences = max(filling.sentences_before(needles[0].depth), 1) if needles else len(filling.ends)
        # A sentence that is cut short here may have other tokens where it is whole.
        shared = int(filling.ends[min(sentences, filling.whole) - 1]) + more if filling.whole else 0
        return [hay.first, *_between(filling, head, needles, ids, 1)], shared

    def _haystack(self, name: SampleKey) -> Haystack:
        source = self.source(name.task)
        place = (source.sha256, name.seed if source.seeded else 0)
        if place not in self._haystacks:
            self._haystacks[place] = Haystack(source, self._splicer, name.seed)
        return self._haystacks[place]

    def _least(self, name: SampleKey) -> int:
        """The shortest length: the words, one sentence of the haystack, and the answer."""
        task, hay = templates.by_name(name.task), self._haystack(name)
        drawn = self._draw(name)
        question = task.question(*dict.fromkeys(needle.key for needle in drawn[: task.asked * task.values]))
        needles = sum(max(len(self._splicer.behind(j, n.text)) for j in ("\n", hay.source.joiner)) for n in drawn)
        words = len(self._opening(task)) + needles + len(self._line(question))
        more = abs(len(hay.first) - int(hay.ends[0]))
        return words + int(hay.ends[0]) + more + self._answer_room

    def _opening(self, task: templates.Task) -> np.ndarray:
        return np.array([self._processor.bos_id(), *self._processor.encode(task.opening)], np.int32)

    def _line(self, text: str) -> np.ndarray:
        return np.array(self._splicer.behind("\n", text), np.int32)

    def _draw(self, name: SampleKey) -> list[Needle]:
        """The needles of a sample, those asked for first; no key or value stands in the haystack."""
        place = f"{name.task} {name.length} {name.depth:.2f} {name.sample} {name.seed}"
        generator, text, task = random.Random(place), self.source(name.task).text, templates.by_name(name.task)
        needles, taken = list[Needle](), set[str]()
        while len(needles) < task.keys * task.values:
            same_key = len(needles) % task.values > 0
            key = needles[-1].key if same_key else task.draw_key(generator, self.words)
            value = task.draw_value(generator)
            again = value in taken or (key in taken and not same_key)
            if again or key in text or value in text or not _apart(task, key, value):
                continue
            # The grid of depths places the first, the others have places of their own, as RULER's have.
            depth = 100 * generator.random() if needles else name.depth
            needles.append(Needle(depth, key, value, task.needle(key, value)))
            taken |= {key, value}
        return needles


def _apart(task: templates.Task, key: str, value: str) -> bool:
    """Whether a needle is none of a haystack's or of training data's, see templates.held_out."""
    if task.haystack == "needles":
        return templates.held_out(key) and templates.held_out(value)
    # S-NIAH's are drawn as ever: results of such samples are on record.
    return task.name.startswith("niah_single") or templates.held_out(value)


def _between(
    filling: Filling, start: int, needles: Sequence[Needle], ids: Sequence[np.ndarray], least: int
) -> Iterator[np.ndarray]:
    """A haystack and the needles in it, in their order.

    Args:
        filling: The haystack.
        start: Its first token to be taken.
        needles: By depth.
        ids: Their tokens.
        least: Sentences before the first one.
    """
    for needle, own in zip(needles, ids, strict=True):
        sentences = max(filling.sentences_before(needle.depth), least)
        stop = int(filling.ends[sentences - 1]) if sentences else 0
        yield filling.ids[start:stop]
        yield own
        start = stop
    yield filling.ids[start:]
