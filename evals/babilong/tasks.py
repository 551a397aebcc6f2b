"""A task: its prompt around the context, in BABILong's own words (prompts.toml), and BABILong's own metric."""

import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

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
