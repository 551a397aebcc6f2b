"""bAbI's files as single questions, each with the facts told before it."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evals.command_line import EvaluationError


@dataclass(frozen=True)
class Story:
    """One question."""

    facts: tuple[str, ...]
    """Sentences told before it, in their order."""
    question: str
    """What is asked."""
    target: str
    """The right answer."""


@dataclass(frozen=True)
class StorySet:
    """The questions of one task."""

    stories: tuple[Story, ...]
    """In the order of the file."""
    sha256: str
    """Of the file."""


def read_stories(folder: Path, task: str) -> StorySet:
    """The test split of a task.

    Args:
        folder: bAbI's en-10k, or another folder with its files TASK_NAME_test.txt or TASK_test.txt.
        task: "qa1" to "qa20".

    Raises:
        EvaluationError: No such file, several of them, or not bAbI's format.
    """
    files = [file for name in (f"{task}_test.txt", f"{task}_*_test.txt") for file in sorted(folder.glob(name))]
    if len(files) != 1:
        raise EvaluationError(
            f"--babi {folder}: {len(files)} files {task}_*_test.txt; give the folder en-10k of bAbI (tasks_1-20_v1-2), "
            "whose test split alone is used"
        )
    data = files[0].read_bytes()
    try:
        stories = tuple(parse_stories(data.decode()))
    except ValueError as error:
        raise EvaluationError(f"{files[0]}: not in bAbI's format ({error}); download bAbI again") from None
    return StorySet(stories, hashlib.sha256(data).hexdigest())


def parse_stories(text: str) -> Iterator[Story]:
    """The questions of a file.

    A line is a number, a blank and a sentence; a question has its answer and the numbers of the facts that support it
    after tabs. Number 1 begins a new story.

    Raises:
        ValueError: A line has no number, or a question no answer; the message names the line.
    """
    facts: list[str] = []
    for count, line in enumerate(text.splitlines(), 1):
        number, _, rest = line.partition(" ")
        if not number.isdigit() or not rest:
            raise ValueError(f"line {count} does not begin with a number")
        if number == "1":
            facts = []
        sentence, tab, answer = rest.partition("\t")
        if not tab:
            facts.append(sentence.strip())
            continue
        target = answer.partition("\t")[0].strip()
        if not target:
            raise ValueError(f"line {count} is a question without an answer")
        yield Story(tuple(facts), sentence.strip(), target)
