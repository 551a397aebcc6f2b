"""A task's prompt around its context, in BABILong's own words (prompts.toml)."""

import tomllib
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
