"""What is asked: bAbI's questions with the facts told before them, BABILong's own prompts and metric.

BABILong's words for each task are in prompts.toml.
"""

import hashlib
import tomllib
from collections.abc import Collection, Iterator, Sequence
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


def read_stories(folder: Path, task: str, split: str = "test") -> StorySet:
    """A split of a task.

    Args:
        folder: bAbI's en-10k, or another folder with its files TASK_NAME_test.txt or TASK_test.txt.
        task: "qa1" to "qa20".
        split: "test", or "train".

    Raises:
        EvaluationError: No such file, several of them, or not bAbI's format.
    """
    files = [file for name in (f"{task}_{split}.txt", f"{task}_*_{split}.txt") for file in sorted(folder.glob(name))]
    if len(files) != 1:
        raise EvaluationError(
            f"--babi {folder}: {len(files)} files {task}_*_{split}.txt; give the folder en-10k of bAbI "
            f"(tasks_1-20_v1-2), whose {split} split alone is used"
        )
    data = files[0].read_bytes()
    try:
        stories = tuple(parse_stories(data.decode()))
        if not stories:
            raise ValueError("it asks nothing")
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


OPENING = "{instruction}\n\n{examples}\n\n{post_prompt}\n\n<context>\n"
CLOSING = "\n</context>\n\nQuestion: {question}"


@dataclass(frozen=True)
class Prompt:
    """The words of a task."""

    labels: tuple[str, ...]
    """Words that count as answers."""
    instruction: str
    """What to do."""
    examples: str
    """Solved ones."""
    post_prompt: str
    """How to answer."""

    @property
    def opening(self) -> str:
        """Everything before the context."""
        return OPENING.format(
            instruction=self.instruction, examples=self.examples, post_prompt=self.post_prompt
        ).lstrip()


def closing(question: str) -> str:
    """Everything after the context."""
    return CLOSING.format(question=question).rstrip()


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuses what is no task of bAbI's.

    Raises:
        EvaluationError: Names it.
    """
    known = load_prompts()
    unknown = [task for task in tasks if task not in known]
    if unknown or not tasks:
        raise EvaluationError(f"--tasks {' '.join(unknown) or 'is empty'}; give some of bAbI's qa1 to qa20")


def load_prompts() -> dict[str, Prompt]:
    """The twenty tasks, qa1 to qa20."""
    content = tomllib.loads(Path(__file__).with_name("prompts.toml").read_text(encoding="utf-8"))
    return {task: Prompt(**{**words, "labels": tuple(words["labels"])}) for task, words in content.items()}


def correct(answer: str, target: str, question: str, labels: Collection[str]) -> bool:
    """Whether the labels that the answer's first sentence names, those of the question left out, are the target's.

    Args:
        answer: What the model wrote, prompt left out.
        target: The right label, or several joined by commas (qa8).
        question: Labels that it names are never targets.
        labels: Of the task; one counts as named where it stands, inside a longer word too.
    """
    first = answer.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    known = {label.lower() for label in labels}
    named = {label for label in known if label in first} - {label for label in known if label in question.lower()}
    target = target.lower()
    # qa19's labels are pairs of directions such as "e,s", which are one label.
    wanted = set(target.split(",")) if "," in target and len(target) > 3 else {target}
    return named == wanted
