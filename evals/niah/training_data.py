"""Documents to learn recall from, in the evaluation's words: `python -m evals.niah.training_data --output FILE`."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evals.command_line import EvaluationError, parse_settings, run_command
from evals.niah import templates


@dataclass(frozen=True)
class TrainingDataSettings:
    """Writes documents of S-NIAH with their answers: opening, noise with needles in it, questions, values.

    tokenization.train and tokenization.encode take the file. Keys and values come from a stream of random numbers that
    the evaluation never draws from, whatever the seeds are.
    """

    output: Path
    """File to write, with the ending .jsonl: one document a line, as {"text": ...}."""
    documents: int = 60_000
    """Documents."""
    fewest_lines: int = 0
    """Lines of noise of the shortest document; a line is some 24 tokens."""
    most_lines: int = 3
    """Lines of noise of the longest document; every number in between is as likely."""
    needles: int = 1
    """Most needles of a document, each at a place of its own; every number from 1 is as likely."""
    questions: int = 1
    """Most times that all needles are asked for, one question after the other; every number from 1 is as likely."""
    seed: int = 0
    """Decides the documents."""

    def __post_init__(self) -> None:
        for name, limit in {"documents": 1, "fewest_lines": 0, "needles": 1, "questions": 1}.items():
            if (value := getattr(self, name)) < limit:
                raise EvaluationError(f"--{name.replace('_', '-')} is {value}; give at least {limit}")
        if self.most_lines < self.fewest_lines:
            raise EvaluationError(
                f"--most-lines {self.most_lines} is less than --fewest-lines {self.fewest_lines}; raise it"
            )
        if self.output.suffix != ".jsonl":
            raise EvaluationError(f"--output {self.output}: the tokenizer reads it as JSON lines; end it with .jsonl")


def documents(settings: TrainingDataSettings) -> Iterator[str]:
    """The texts, one after the other, a function of the settings alone."""
    generator = random.Random(f"recall training data {settings.seed}")
    for _ in range(settings.documents):
        yield _document(generator, settings)


def _document(generator: random.Random, settings: TrainingDataSettings) -> str:
    values: dict[str, str] = {}
    for _ in range(generator.randint(1, settings.needles)):
        key = f"{generator.choice(templates.ADJECTIVES)}-{generator.choice(templates.NOUNS)}"
        values[key] = str(generator.randint(10**6, 10**7 - 1))
    lines = [templates.NOISE] * generator.randint(settings.fewest_lines, settings.most_lines)
    for key, value in values.items():
        lines.insert(generator.randint(0, len(lines)), templates.NEEDLE.format(key=key, value=value))
    for _ in range(generator.randint(1, settings.questions)):
        order = generator.sample(sorted(values), len(values))
        lines += [f"{templates.QUESTION.format(key=key)} {values[key]}." for key in order]
    return "\n".join([templates.OPENING, *lines])


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(TrainingDataSettings, "python -m evals.niah.training_data")
    try:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        with settings.output.open("w", encoding="utf-8") as stream:
            for text in documents(settings):
                stream.write(json.dumps({"text": text}) + "\n")
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise EvaluationError(f"--output {settings.output}: cannot be written ({error.strerror})") from None
    print(f"{settings.output}: {settings.documents:,} documents")


if __name__ == "__main__":
    run_command(main)
