"""The words of the tasks, and how an answer is judged. They define the tasks: scores compare with published ones.

The sentences NOISE, NEEDLE, OPENING, QUESTION and those OF_SEVERAL are those of RULER's tasks niah_*, from
https://github.com/NVIDIA/RULER, Copyright (c) 2024, NVIDIA CORPORATION, licensed under the Apache License, Version 2.0
(the LICENSE of this project has its text). Changed: those of one value put into the singular that RULER makes at run
time, question and answer prefix joined. Keys are drawn from word lists of this project's own, or from RULER's where the
user has them.
"""

import hashlib
import random
import re
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evals.command_line import EvaluationError

OPENING = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards."
)
OPENING_OF_SEVERAL = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards."
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic numbers for {key} is: {value}."
QUESTION = (
    "What is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)
QUESTION_OF_SEVERAL = (
    "What are all the special magic numbers for {key} mentioned in the provided text? "
    "The special magic numbers for {key} mentioned in the provided text are"
)


@dataclass(frozen=True)
class Task:
    """One of RULER's tasks with needles."""

    name: str
    """RULER's name."""
    column: str
    """The column of the paper's table, or what RULER's paper calls it."""
    haystack: str
    """noise, one line again and again; prose, which is RULER's essays, a file of the user's or written by a seed; or
    needles, lines like the one asked for with other keys and values."""
    value: str
    """number, seven digits; or uuid, random, version 4."""
    key: str = "words"
    """words, adjective-noun; or uuid."""
    keys: int = 1
    """Keys that are hidden in the haystack."""
    values: int = 1
    """Needles of each key, every one with a value of its own."""
    asked: int = 1
    """Keys that are asked for, all in one question."""

    @property
    def opening(self) -> str:
        """What stands before the haystack."""
        return self._worded(OPENING_OF_SEVERAL if self._of_several else OPENING)

    def needle(self, key: str, value: str) -> str:
        """The sentence that is to be remembered."""
        return self._worded(NEEDLE).format(key=key, value=value)

    def question(self, *keys: str) -> str:
        """What stands behind the haystack, the beginning of the answer included."""
        return self._worded(QUESTION_OF_SEVERAL if self._of_several else QUESTION).format(key=listed(keys))

    def draw_key(self, generator: random.Random, words: "Words") -> str:
        """A needle's key."""
        return _uuid(generator) if self.key == "uuid" else words.key(generator)

    def draw_value(self, generator: random.Random) -> str:
        """A needle's value."""
        number = str(generator.randint(10**6, 10**7 - 1))
        return _uuid(generator) if self.value == "uuid" else number

    @property
    def _of_several(self) -> bool:
        return self.asked * self.values > 1

    def _worded(self, text: str) -> str:
        return text.replace("number", self.value)


def listed(words: Sequence[str]) -> str:
    """Keys as RULER names several, and values as an answer does: "a, b, and c"."""
    return f"{', '.join(words[:-1])}, and {words[-1]}" if len(words) > 1 else words[0]


def held_out(text: str) -> bool:
    """Whether a key or value is of the half that is asked for where a sample has several needles.

    A haystack of needles has none of them, so that what is asked for stands there once however long it is; training
    data have no value of this half.
    """
    return zlib.crc32(text.encode()) % 2 == 1


def _uuid(generator: random.Random) -> str:
    return str(uuid.UUID(int=generator.getrandbits(128), version=4))


TASKS = {
    "pk": Task("niah_single_1", "S-NIAH-PK", "noise", "number"),
    "n": Task("niah_single_2", "S-NIAH-N", "prose", "number"),
    "w": Task("niah_single_3", "S-NIAH-W", "prose", "uuid"),
    "mk1": Task("niah_multikey_1", "MK-NIAH-1", "prose", "number", keys=4),
    "mk2": Task("niah_multikey_2", "MK-NIAH-2", "needles", "number"),
    "mk3": Task("niah_multikey_3", "MK-NIAH-3", "needles", "uuid", key="uuid"),
    "mv": Task("niah_multivalue", "MV-NIAH", "prose", "number", values=4),
    "mq": Task("niah_multiquery", "MQ-NIAH", "prose", "number", keys=4, asked=4),
}
"""By the letters of the paper's columns, and RULER's further tasks with needles as its synthetic.yaml has them."""
TASK = TASKS["pk"].name
BY_NAME = {task.name: task for task in TASKS.values()}


def with_keys(task: Task, keys: int) -> Task:
    """A task with another number of keys in the haystack, with a name of its own."""
    if keys == task.keys:
        return task
    return replace(task, name=f"{task.name}_keys_{keys}", column=f"{task.column} of {keys} keys", keys=keys)


def by_name(name: str) -> Task:
    """The task of this name, with_keys included.

    Raises:
        KeyError: There is none.
    """
    known, _, keys = name.partition("_keys_")
    return with_keys(BY_NAME[known], int(keys)) if keys.isdecimal() else BY_NAME[name]


_FEWEST_WORDS = 4  # of a line of other words in training data
_ADJECTIVES = """
amber ancient bitter bold brave brief bright brisk broad calm careful cheerful clever cloudy cold copper curious
damp daring deep dusty eager early faint fancy fearless fierce frozen gentle giant glossy golden grand happy heavy
hollow honest humble icy idle jolly keen lively lonely lucky mellow merry mighty misty modest narrow nimble noble
odd pale patient plain polite proud quick quiet rapid restless rough royal rusty salty secret shallow sharp shiny
silent silver simple sleepy slow smooth solid spicy steady stormy strange sturdy sunny swift tall tender thirsty
tidy tiny vast velvet warm wild windy wise wooden young
"""
_NOUNS = """
anchor apple arrow badger banjo barrel basket beacon blanket bottle bridge bucket button cabin camel candle canyon
carpet castle cherry circle clover comet compass cottage cradle crystal desert dolphin drawer eagle engine falcon
feather ferry fiddle forest fountain garden glacier hammer harbor helmet hill island jacket kettle kitten ladder
lantern lemon lizard magnet maple marble meadow mirror mountain needle oak ocean orchard otter paddle parrot pebble
pencil pepper piano pillow planet pocket pumpkin rabbit raven ribbon river rocket saddle sailor shadow shell sparrow
spoon spring squirrel stable statue sweater table teapot thunder ticket tiger tower trumpet tulip tunnel turtle
valley violin wagon walnut whistle willow window
"""


@dataclass(frozen=True)
class Words:
    """What keys are made of."""

    adjectives: tuple[str, ...]
    """Of which a key has one, in front of a hyphen."""
    nouns: tuple[str, ...]
    """Of which it has one behind it."""
    name: str
    """own, or SHA-256 over the files that they came from."""

    @property
    def keys(self) -> int:
        """How many keys there are."""
        return len(self.adjectives) * len(self.nouns)

    def key(self, generator: random.Random) -> str:
        """A needle's key, such as amber-anchor."""
        return f"{generator.choice(self.adjectives)}-{generator.choice(self.nouns)}"


OWN_WORDS = Words(tuple(_ADJECTIVES.split()), tuple(_NOUNS.split()), "own")
_WORD_FILES = ("adjectivelist.txt", "nounlist.txt")


def read_words(folder: Path | None) -> Words:
    """RULER's words, as the package wonderwords has them in its folder `assets`: a word a line; None gives ours.

    Raises:
        EvaluationError: A list is missing, no text, or has fewer than four words.
    """
    if folder is None:
        return OWN_WORDS
    lists, digest = [], hashlib.sha256()
    for path in (folder / name for name in _WORD_FILES):
        try:
            data = path.read_bytes()
            words = tuple(dict.fromkeys(data.decode().split("\n")))
        except (OSError, UnicodeDecodeError) as fault:
            reason = fault.strerror if isinstance(fault, OSError) else "no UTF-8"
            raise EvaluationError(
                f"--words {path}: cannot be read ({reason}); give a folder with {' and '.join(_WORD_FILES)}, such as "
                "the folder assets of the package wonderwords"
            ) from fault
        lists.append(tuple(word.strip() for word in words if word.strip()))
        if len(lists[-1]) < _FEWEST_WORDS:
            raise EvaluationError(f"--words {path}: has {len(lists[-1])} words, at least {_FEWEST_WORDS} are needed")
        digest.update(data)
    return Words(lists[0], lists[1], digest.hexdigest())


_NUMBER = re.compile(r"\d+")
# A uuid with a group lost is a wrong value, not none: any hexadecimal groups joined by hyphens count.
_UUID = re.compile(r"\b[0-9a-f]{4,}(?:-[0-9a-f]{2,})+\b", re.IGNORECASE)


@dataclass(frozen=True)
class Score:
    """Three verdicts on one answer."""

    substring: float
    """RULER's score, string_match_all: the share of the values that stand somewhere in the answer, letter case aside;
    of one value 0 or 1. A list of many values can pass."""
    first_value: bool
    """The first number of the answer, all its digits (or its first uuid, where values are uuids), is a value."""
    wrong_value: bool
    """The first number (or uuid) of the answer is another one. An answer without one is neither right nor wrong."""


def score(answer: str, *values: str) -> Score:
    """Judges the text a model went on with, prompt left out, by the values that it has to have."""
    first = (_NUMBER if values[0].isdigit() else _UUID).search(answer)
    wanted = [value.lower() for value in values]
    return Score(
        substring=sum(value in answer.lower() for value in wanted) / len(wanted),
        first_value=first is not None and first[0].lower() in wanted,
        wrong_value=first is not None and first[0].lower() not in wanted,
    )
