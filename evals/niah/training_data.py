"""Documents to learn recall from, in the evaluation's words: `python -m evals.niah.training_data --output FILE`."""

import itertools
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from evals.command_line import EvaluationError, check_at_least, parse_settings, run_command
from evals.documents import Document, write_documents
from evals.niah import TaskLetters, haystacks, templates

_TRIES = 1_000  # documents drawn one after the other of which none fits: none will
_CUTS = 3  # of a document's last line: its pieces may be others where it is cut
_MARKS = (": ", r"\?", r"\w-\w")  # before a value, behind a question, within a key


@dataclass(frozen=True)
class TrainingDataSettings:
    """Writes documents of needle tasks with their answers: opening, haystack with needles, questions, values. Or lists.

    tokenization.train, tokenization.encode and evals.finetune take the file. Keys and values come from a stream of
    random numbers that the evaluation never draws from, whatever the seeds are, and no value is of the half that it
    keeps for samples of several needles.
    """

    output: Path
    """File to write, with the ending .jsonl: one document a line, as {"text": ..., "answers": ...}."""
    documents: int = 20_000
    """Documents."""
    tasks: tuple[TaskLetters, ...] = ("pk",)
    """Tasks of evals.niah; each document is of one of them, every mention as likely: `pk pk n` is a third of prose.
    Their words, keys, values and haystacks are the evaluation's."""
    text: Path | None = None
    """UTF-8 text from which tasks that hide needles in prose (n w mk1 mv mq) take theirs, from a sentence anywhere in
    it on. Not one that models are evaluated on."""
    needles: int = 1
    """Most needles of a document that are asked for, each at a place of its own (mv: most keys, mq: most sets of four);
    every number from 1 is as likely. mk1 has three more, which are not."""
    questions: int = 1
    """Most times that all of them are asked for, one question after the other; every number from 1 is as likely."""
    repeats: int = 1
    """Most times that the needles stand in a document, every number from 1 as likely: repeated numbers are a first
    thing to recall, and there are more of them. The evaluation states a needle once."""
    most_lines: int = 3
    """Most lines of a haystack; every number from 0 is as likely. Not used with `tokens`."""
    tokens: int = 0
    """Tokens of every document, start and end token included; its haystack fills it, the last line cut short where a
    rest is left. A training row of this length then holds one document. 0: lines as `most_lines` says."""
    tokenizer: Path | None = None
    """Tokenizer file, by which `tokens` are counted."""
    other_words: float = 0.0
    """Share of documents whose noise or prose is sentences of ever other words instead: what is written of them wears a
    memory more than lines that repeat, and teaches it to write less of them."""
    near_misses: float = 0.0
    """Share of the documents with prose whose sentences are drawn from those of `text` that have a colon, a question
    mark or a hyphen, as needles, questions and keys have: else a memory that these alone are to write meets few."""
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
        for name in ("other_words", "near_misses"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise EvaluationError(f"--{name.replace('_', '-')} is {share}; it is a share, from 0 to 1")
        if self.lists and not self.tokens:
            raise EvaluationError("--lists makes documents of one length; give --tokens and --tokenizer")
        needles = (self.tasks, self.text, self.needles, self.questions, self.repeats, self.other_words)
        if self.lists and needles != (("pk",), None, 1, 1, 1, 0):
            raise EvaluationError(
                "--lists has no needles: leave out --tasks, --text, --needles, --questions, --repeats, --other-words"
            )
        if not self.tasks:
            raise EvaluationError("--tasks is empty; give at least one")
        prose = [task for task in self.tasks if templates.TASKS[task].haystack == "prose"]
        if prose and self.text is None and self.other_words < 1:
            raise EvaluationError(f"--tasks {prose[0]}: hides its needles in prose; give a file of it as --text")
        if self.text is not None and (not prose or self.other_words == 1):
            raise EvaluationError(f"--text {self.text}: no document has prose; leave it out, or add n to --tasks")
        if self.near_misses and self.text is None:
            raise EvaluationError("--near-misses are sentences of a --text; give one, or leave it out")
        if self.output.suffix != ".jsonl":
            raise EvaluationError(f"--output {self.output}: the tokenizer reads it as JSON lines; end it with .jsonl")


def documents(settings: TrainingDataSettings) -> Iterator[Document]:
    """The documents, one after the other, a function of the settings alone.

    Raises:
        EvaluationError: The tokenizer is none, the text cannot be read, or no document has the length asked for.
    """
    generator = random.Random(f"recall training data {settings.seed}")
    if settings.lists:
        assert settings.tokenizer is not None
        draw = partial(Lists(settings.tokenizer, settings.tokens).document, generator)
    else:
        draw = partial(Needles(settings).document, generator)
    for _ in range(settings.documents):
        yield _first_that_fits(draw, settings)


def _first_that_fits(draw: Callable[[], Document | None], settings: TrainingDataSettings) -> Document:
    for _ in range(_TRIES):
        if (document := draw()) is not None:
            return document
    raise EvaluationError(
        f"--tokens {settings.tokens}: too short for the words of a document with this tokenizer; raise it, or ask for "
        "fewer --needles and --questions"
    )


@dataclass
class Draft:
    """A document but for its haystack."""

    task: templates.Task
    values: dict[str, list[str]]
    """By key, those that are not asked for included."""
    needles: list[tuple[float, str]]
    """Where each stands, a share of the haystack, and its sentence."""
    rounds: list[tuple[str, ...]]
    """Keys of each question."""

    def text(self, lines: Sequence[str], joiner: str) -> str:
        """The document with these lines as its haystack."""
        places = sorted((int(share * (len(lines) + 1)), share, needle) for share, needle in self.needles)
        body, at = list[str](), 0
        for place, _, needle in places:
            body += [*lines[at:place], needle]
            at = place
        haystack = joiner.join([*body, *lines[at:]])
        return "\n".join([self.task.opening, haystack, *(self._answered(keys, haystack) for keys in self.rounds)])

    def document(self, text: str) -> Document:
        """text() with its answers, each from behind the words that the evaluation ends with to the end of the line."""
        answers, end = list[tuple[int, int]](), len(text)
        for keys in reversed(self.rounds):
            line = text.rindex("\n", 0, end) + 1
            answers.append((line + len(self.task.question(*keys)), end))
            end = line - 1
        return Document(text, answers[::-1])

    def _answered(self, keys: tuple[str, ...], haystack: str) -> str:
        """A question with its answer: values of one key in the order in which they stand in the text."""
        values = [value for key in keys for value in sorted(self.values[key], key=haystack.index)]
        return f"{self.task.question(*keys)} {templates.listed(values)}."


class Needles:
    """Makes documents with needles.

    Args:
        settings: Of the documents.
    """

    def __init__(self, settings: TrainingDataSettings) -> None:
        self._settings, self._words = settings, templates.read_words(settings.words)
        self._sentences = () if settings.text is None else haystacks.read_source(settings.text).sentences_of_file
        marks = _MARKS if settings.near_misses else ()
        near = [[said for said in self._sentences if re.search(mark, said)] for mark in marks]
        self._near_misses = [sentences for sentences in near if sentences]
        if settings.near_misses and not self._near_misses:
            raise EvaluationError(
                f"--near-misses: --text {settings.text} has no colon, question mark or hyphen; give another text"
            )
        tasks = [templates.TASKS[letters] for letters in settings.tasks]
        most = max(settings.needles * task.asked + task.keys for task in tasks)
        if most > self._words.keys:
            raise EvaluationError(
                f"--needles {settings.needles}: these words make {self._words.keys} keys, and up to {most} are needed; "
                "give --words with more, or fewer needles"
            )
        if settings.tokenizer is not None:
            from tokenization.tokenizer import load_tokenizer

            self._processor: Any = load_tokenizer(settings.tokenizer)
            self._splicer = haystacks.Splicer(self._processor)

    def document(self, generator: random.Random) -> Document | None:
        """The next one; None where it does not have the length, or one of its keys or values stands in the prose."""
        draft = self._draft(generator, templates.TASKS[generator.choice(self._settings.tasks)])
        kind = draft.task.haystack
        if kind != "needles" and generator.random() < self._settings.other_words:
            kind = "words"
        lines, joiner = self._lines(generator, draft, kind), " " if kind == "prose" else "\n"
        if not self._settings.tokens:
            most = generator.randint(0, self._settings.most_lines)
            return draft.document(draft.text(list(itertools.islice(lines, most)), joiner))
        text = self._filled(draft, lines, joiner)
        return None if text is None else draft.document(text)

    def _draft(self, generator: random.Random, task: templates.Task) -> Draft:
        asked = task.asked * generator.randint(1, self._settings.needles)
        values: dict[str, list[str]] = {}
        while len(values) < asked + task.keys - task.asked:
            values[task.draw_key(generator, self._words)] = [self._value(generator, task) for _ in range(task.values)]
        keys = tuple(values)
        sets = [keys[start : start + task.asked] for start in range(0, asked, task.asked)]
        rounds: list[tuple[str, ...]] = []
        for _ in range(generator.randint(1, self._settings.questions)):
            rounds += generator.sample(sets, len(sets))
        stated = [task.needle(key, value) for key, own in values.items() for value in own]
        stated *= generator.randint(1, self._settings.repeats)
        return Draft(task, values, [(generator.random(), needle) for needle in stated], rounds)

    def _value(self, generator: random.Random, task: templates.Task) -> str:
        while templates.held_out(value := task.draw_value(generator)):
            pass
        return value

    def _lines(self, generator: random.Random, draft: Draft, kind: str) -> Iterator[str]:
        """A haystack without an end."""
        if kind == "prose":
            if self._near_misses and generator.random() < self._settings.near_misses:
                return (generator.choice(generator.choice(self._near_misses)) for _ in itertools.count())
            start = generator.randrange(len(self._sentences))
            return (self._sentences[place % len(self._sentences)] for place in itertools.count(start))
        if kind == "noise":
            return itertools.repeat(templates.NOISE)
        line = self._other_words if kind == "words" else partial(self._other_needle, draft=draft)
        return (line(generator) for _ in itertools.count())

    def _other_words(self, generator: random.Random) -> str:
        """A line like the noise's, of words that keys are made of."""
        nouns, adjectives = generator.sample(self._words.nouns, 4), generator.sample(self._words.adjectives, 4)
        return " ".join(f"The {noun} is {adjective}." for noun, adjective in zip(nouns, adjectives, strict=True))

    def _other_needle(self, generator: random.Random, draft: Draft) -> str:
        """A needle with a key that the document does not ask for."""
        while (key := draft.task.draw_key(generator, self._words)) in draft.values:
            pass
        return draft.task.needle(key, self._value(generator, draft.task))

    def _filled(self, draft: Draft, lines: Iterator[str], joiner: str) -> str | None:
        """The document with as much of a haystack as gives it its length; None where none is found."""
        rest, taken, ends = self._settings.tokens - self._count(draft.text([], joiner)), list[str](), [0]
        for _ in range(_CUTS):
            if rest < 0:
                return None
            while ends[-1] < rest:
                taken.append(next(lines))
                ends.append(ends[-1] + len(self._splicer.behind(joiner, taken[-1])))
            whole = bisect_right(ends, rest) - 1
            own = taken[:whole]
            if ends[whole] < rest:
                ids = self._splicer.behind(joiner, taken[whole])[: rest - ends[whole]]
                own.append(self._processor.decode(list(ids)).lstrip())
            text = draft.text(own, joiner)
            if not (short := self._settings.tokens - self._count(text)):
                haystack = joiner.join(own)
                words = itertools.chain(draft.values, *draft.values.values())
                return None if any(word in haystack for word in words) else text
            rest += short
        return None

    def _count(self, text: str) -> int:
        """Tokens of a document, its start and end token included."""
        return len(self._processor.encode(text)) + 2


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(TrainingDataSettings, "python -m evals.niah.training_data", folder=False)
    write_documents(settings.output, documents(settings))


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

    def document(self, generator: random.Random) -> Document | None:
        """The next one; None where its text cannot be cut behind the last token, which another draw may allow."""
        count = generator.randint(max(self._tokens // 6, 1), max(self._tokens // 3, 1))
        said = self._processor.decode(generator.choices(self._pieces, k=count)).strip()
        ids = self._processor.encode(" ".join([said] * (self._tokens // count + 2)))[: self._tokens]
        text = self._processor.decode(ids)
        return Document(text) if self._processor.encode(text) == ids and len(ids) == self._tokens else None


if __name__ == "__main__":
    run_command(main)
