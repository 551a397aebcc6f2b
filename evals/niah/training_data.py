"""Documents to learn recall from, in the evaluation's words: `python -m evals.niah.training_data --output FILE`."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from evals.command_line import EvaluationError, check_at_least, parse_settings, run_command
from evals.niah import templates

Noise = Callable[[list[str]], list[str] | None]
"""From the other lines of a document to its noise; None where none fits."""
_TRIES = 1_000  # documents drawn one after the other of which none fits: none will


@dataclass(frozen=True)
class TrainingDataSettings:
    """Writes documents of S-NIAH with their answers: opening, noise with needles in it, questions, values. Or lists.

    tokenization.train and tokenization.encode take the file. Keys and values come from a stream of random numbers that
    the evaluation never draws from, whatever the seeds are.
    """

    output: Path
    """File to write, with the ending .jsonl: one document a line, as {"text": ...}."""
    documents: int = 20_000
    """Documents."""
    needles: int = 1
    """Most needles of a document, each at a place of its own; every number from 1 is as likely."""
    questions: int = 1
    """Most times that all needles are asked for, one question after the other; every number from 1 is as likely."""
    repeats: int = 1
    """Most times that the needles stand in a document, every number from 1 as likely: repeated numbers are a first
    thing to recall, and there are more of them. The evaluation states a needle once."""
    most_lines: int = 3
    """Most lines of noise in a document; every number from 0 is as likely. Not used with `tokens`."""
    tokens: int = 0
    """Tokens of every document, start and end token included; noise fills it, the first line cut short where a rest is
    left. A training row of this length then holds one document. 0: lines of noise as `most_lines` says."""
    tokenizer: Path | None = None
    """Tokenizer file, by which `tokens` are counted."""
    other_words: float = 0.0
    """Share of documents whose noise is sentences of ever other words: what is written of them wears a memory more than
    lines that repeat, and teaches it to write less of them. Used with `tokens`."""
    lists: bool = False
    """Lists of words that are said again and again, `tokens` long, in place of needles: nearly every token of them can
    be recalled, and recall begins in a fraction of the steps."""
    words: Path | None = None
    """Folder of RULER's adjectivelist.txt and nounlist.txt, of which keys are made; by default lists of our own."""
    seed: int = 0
    """Decides the documents."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "documents", "needles", "questions", "repeats")
        check_at_least(0, self, "most_lines", "tokens")
        if bool(self.tokens) != (self.tokenizer is not None):
            raise EvaluationError(
                f"--tokens is {self.tokens} and --tokenizer {self.tokenizer}; documents of one length need both, "
                "others neither"
            )
        if not 0 <= self.other_words <= 1:
            raise EvaluationError(f"--other-words is {self.other_words}; it is a share, from 0 to 1")
        if (self.lists or self.other_words) and not self.tokens:
            raise EvaluationError(
                "--lists and --other-words make documents of one length; give --tokens and --tokenizer"
            )
        if self.lists and (self.needles, self.questions, self.repeats, self.other_words) != (1, 1, 1, 0):
            raise EvaluationError(
                "--lists has no needles: leave out --needles, --questions, --repeats and --other-words with it"
            )
        if self.output.suffix != ".jsonl":
            raise EvaluationError(f"--output {self.output}: the tokenizer reads it as JSON lines; end it with .jsonl")


def documents(settings: TrainingDataSettings) -> Iterator[str]:
    """The texts, one after the other, a function of the settings alone.

    Raises:
        EvaluationError: The tokenizer is none, or no document has the length asked for.
    """
    generator = random.Random(f"recall training data {settings.seed}")
    draw = _lists_or_needles(generator, settings)
    for _ in range(settings.documents):
        yield _first_that_fits(draw, settings)


def _lists_or_needles(generator: random.Random, settings: TrainingDataSettings) -> Callable[[], str | None]:
    """What draws a document, or None where one does not have the length."""
    words = templates.read_words(settings.words)
    if settings.tokenizer is None:
        noise = [templates.NOISE]
        return partial(
            _needles, generator, settings, words, lambda _: noise * generator.randint(0, settings.most_lines)
        )
    if settings.lists:
        return partial(Lists(settings.tokenizer, settings.tokens).document, generator)
    return partial(_needles, generator, settings, words, _Filler(generator, settings, words).noise)


def _needles(
    generator: random.Random, settings: TrainingDataSettings, words: templates.Words, noise: Noise
) -> str | None:
    needles, questions = _needles_and_questions(generator, settings, words)
    lines = noise([*needles, *questions])
    if lines is None:
        return None
    for needle in needles:
        lines.insert(generator.randint(0, len(lines)), needle)
    return "\n".join([templates.OPENING, *lines, *questions])


def _first_that_fits(draw: Callable[[], str | None], settings: TrainingDataSettings) -> str:
    for _ in range(_TRIES):
        if (text := draw()) is not None:
            return text
    raise EvaluationError(
        f"--tokens {settings.tokens}: too short for the words of a document with this tokenizer; raise it, or ask for "
        "fewer --needles and --questions"
    )


def _needles_and_questions(
    generator: random.Random, settings: TrainingDataSettings, words: templates.Words
) -> tuple[list[str], list[str]]:
    values: dict[str, str] = {}
    for _ in range(generator.randint(1, settings.needles)):
        key = words.key(generator)
        values[key] = str(generator.randint(10**6, 10**7 - 1))
    questions: list[str] = []
    for _ in range(generator.randint(1, settings.questions)):
        order = generator.sample(sorted(values), len(values))
        questions += [f"{templates.QUESTION.format(key=key)} {values[key]}." for key in order]
    needles = [templates.NEEDLE.format(key=key, value=value) for key, value in values.items()]
    return needles * generator.randint(1, settings.repeats), questions


class _Filler:
    """Noise that brings a document to a number of tokens."""

    def __init__(self, generator: random.Random, settings: TrainingDataSettings, words: templates.Words) -> None:
        from tokenization.tokenizer import load_tokenizer

        assert settings.tokenizer is not None
        self._processor: Any = load_tokenizer(settings.tokenizer)
        self._generator, self._settings, self._words = generator, settings, words
        self._before = len(self._processor.encode("."))
        self._noise = self._ids(templates.NOISE)

    def noise(self, words: list[str]) -> list[str] | None:
        """Lines of noise beside these other ones; None where no noise gives the length."""
        rest, lines = self._settings.tokens - self._count(words), list[str]()
        if rest < 0:
            return None
        others = self._generator.random() < self._settings.other_words
        while rest:
            line = _other_words(self._generator, self._words) if others else templates.NOISE
            ids = self._ids(line) if others else self._noise
            if len(ids) > rest:
                ids = ids[:rest]
                line = self._processor.decode(ids).strip()
            lines.insert(0, line)
            rest -= len(ids)
        return lines if self._count([*lines, *words]) == self._settings.tokens else None

    def _ids(self, line: str) -> list[int]:
        """As it stands behind another one."""
        return self._processor.encode(".\n" + line)[self._before :]

    def _count(self, lines: list[str]) -> int:
        """Tokens of a document of these lines and the opening, in any order, with its start and end token."""
        return len(self._processor.encode("\n".join([templates.OPENING, *lines]))) + 2


def _other_words(generator: random.Random, words: templates.Words) -> str:
    """A line like the noise's, of words that keys are made of."""
    nouns, adjectives = generator.sample(words.nouns, 4), generator.sample(words.adjectives, 4)
    return " ".join(f"The {noun} is {adjective}." for noun, adjective in zip(nouns, adjectives, strict=True))


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(TrainingDataSettings, "python -m evals.niah.training_data", folder=False)
    try:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        with settings.output.open("w", encoding="utf-8") as stream:
            for text in documents(settings):
                stream.write(json.dumps({"text": text}) + "\n")
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise EvaluationError(f"--output {settings.output}: cannot be written ({error.strerror})") from None
    print(f"{settings.output}: {settings.documents:,} documents")


class Lists:
    """Makes documents of one length, each a random list of the vocabulary's pieces and its repetitions.

    Args:
        tokenizer: Tokenizer file.
        tokens: Tokens of a document, start and end token included. A list takes a sixth to a third of them.
    """

    def __init__(self, tokenizer: Path, tokens: int) -> None:
        from tokenization.tokenizer import load_tokenizer

        self._processor: Any = load_tokenizer(tokenizer)
        self._tokens = tokens - 2
        without_text = (self._processor.is_control, self._processor.is_unknown, self._processor.is_byte)
        self._pieces = [
            piece for piece in range(self._processor.vocab_size()) if not any(kind(piece) for kind in without_text)
        ]

    def document(self, generator: random.Random) -> str | None:
        """The next one; None where its text cannot be cut behind the last token, which another draw may allow."""
        count = generator.randint(max(self._tokens // 6, 1), max(self._tokens // 3, 1))
        said = self._processor.decode(generator.choices(self._pieces, k=count)).strip()
        ids = self._processor.encode(" ".join([said] * (self._tokens // count + 2)))[: self._tokens]
        text = self._processor.decode(ids)
        return text if self._processor.encode(text) == ids and len(ids) == self._tokens else None


if __name__ == "__main__":
    run_command(main)
