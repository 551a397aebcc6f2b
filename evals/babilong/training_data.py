"""Documents to learn BABILong from: `python -m evals.babilong.training_data --output FILE`."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evals.babilong.stories import Story, check_tasks, closing, load_prompts, read_stories
from evals.command_line import EvaluationError, check_at_least, parse_settings, run_command
from evals.documents import Document, write_documents

_TRIES = 1_000  # documents drawn one after the other of which none fits: none will
_WORDS = (8, 30)  # of a sentence of other words
_SENTENCES = {  # the prompts of the other tasks ask for the answer alone
    "qa1": (r"Where is (\w+)\?", "The most recent location of {0} is {target}."),
    "qa2": (r"Where is the (\w+)\?", "The {0} is in the {target}."),
    "qa3": (r"Where was the (\w+) before the (\w+)\?", "Before the {1} the {0} was in the {target}."),
}


@dataclass(frozen=True)
class TrainingDataSettings:
    """Writes documents of BABILong with their answers: the prompt, facts between sentences of a text, question, answer.

    tokenization.train, tokenization.encode and evals.finetune take the file. Stories are of bAbI's train split.
    """

    output: Path
    """File to write, with the ending .jsonl: one document a line, as {"text": ..., "answers": ...}."""
    babi: Path
    """Folder en-10k of bAbI (tasks_1-20_v1-2); its train split is used."""
    text: Path | None = None
    """Text file, or folder of .txt files such as PG19's train split, that the facts lie in; with `tokens`."""
    other_words: float = 0.0
    """Share of documents between whose facts the text's words stand in any order, one of a sentence being a fact's: as
    nothing can be known of them before, answers alone decide what a memory keeps."""
    tasks: tuple[str, ...] = ("qa1",)
    """qa1 to qa20; every one is as likely."""
    documents: int = 10_000
    """Documents."""
    questions: int = 1
    """Questions of a document. 1: one behind all its facts, as the evaluation asks. More give more to learn from in as
    many tokens: whole stories follow each other, and behind every answer the context goes on with the next facts."""
    repeats: int = 1
    """Most times that the facts before a question are told, all in their order, every number from 1 as likely: what is
    told again is a first thing to recall, and there is more of it. The evaluation tells them once."""
    tokens: int = 0
    """Tokens of every document, start and end token included; the text fills it. A training row of this length then
    holds one document. 0: facts alone."""
    tokenizer: Path | None = None
    """Tokenizer file, by which `tokens` are counted."""
    seed: int = 0
    """Decides the documents."""

    def __post_init__(self) -> None:
        check_tasks(self.tasks)
        check_at_least(1, self, "documents", "questions", "repeats")
        check_at_least(0, self, "tokens", "seed")
        if not bool(self.tokens) == bool(self.tokenizer) == bool(self.text):
            raise EvaluationError(
                f"--tokens is {self.tokens}, --tokenizer {self.tokenizer} and --text {self.text}; documents of one "
                "length need all three, facts alone none"
            )
        if not 0 <= self.other_words <= 1:
            raise EvaluationError(f"--other-words is {self.other_words}; it is a share, from 0 to 1")
        if self.other_words and not self.tokens:
            raise EvaluationError("--other-words are a --text's; give that, --tokens and --tokenizer, or leave it out")
        if self.output.suffix != ".jsonl":
            raise EvaluationError(f"--output {self.output}: the tokenizer reads it as JSON lines; end it with .jsonl")


def documents(settings: TrainingDataSettings) -> Iterator[Document]:
    """The documents, one after the other, a function of the settings and the files they name.

    Raises:
        EvaluationError: A path has not what it should have, or no document has the length asked for.
    """
    generator = random.Random(f"BABILong training data {settings.seed}")
    stories = {task: read_stories(settings.babi, task, "train").stories for task in settings.tasks}
    whole = {task: list(_whole(own)) for task, own in stories.items()}
    background = _Background(settings)
    for _ in range(settings.documents):
        for _ in range(_TRIES):
            task = generator.choice(settings.tasks)
            told = [generator.choice(stories[task])] if settings.questions == 1 else list[Story]()
            while len(told) < settings.questions:
                told += generator.choice(whole[task])
            told = [
                replace(story, facts=story.facts * generator.randint(1, settings.repeats))
                for story in told[: settings.questions]
            ]
            if document := background.document(generator, task, told):
                break
        else:
            raise EvaluationError(
                f"--tokens {settings.tokens}: too short for the prompt and the facts of {' '.join(settings.tasks)} "
                "with this tokenizer; raise it, or ask for fewer --questions"
            )
        yield document


def _whole(stories: Sequence[Story]) -> Iterator[list[Story]]:
    """The questions of each story one behind another, every one with the facts alone that are new."""
    facts: tuple[str, ...] = ()
    whole: list[Story] = []
    for story in stories:
        if whole and story.facts[: len(facts)] == facts:
            whole.append(replace(story, facts=story.facts[len(facts) :]))
        else:
            if whole:
                yield whole
            whole = [story]
        facts = story.facts
    yield whole


class _Background:
    """Sentences between the facts, as many as bring a document to its length."""

    def __init__(self, settings: TrainingDataSettings) -> None:
        self._tokens, self._prompts, self._other_words = settings.tokens, load_prompts(), settings.other_words
        if settings.tokenizer is not None and settings.text is not None:
            from evals.babilong.samples import LEAST_SENTENCE, book_sentences
            from evals.tokens import encoder
            from tokenization.tokenizer import load_tokenizer

            self._least = LEAST_SENTENCE
            self._sentences = list(book_sentences(settings.text, "train"))
            self._processor: Any = load_tokenizer(settings.tokenizer)
            self._encode = encoder(self._processor, ". ")
            if all(len(self._encode([sentence])[0]) < LEAST_SENTENCE for sentence in self._sentences):
                raise EvaluationError(
                    f"--text {settings.text} has no sentence of {LEAST_SENTENCE} tokens or more; give a longer text"
                )

    def document(self, generator: random.Random, task: str, stories: Sequence[Story]) -> Document | None:
        """Prompt and answers; None where no sentences give the length."""
        new = [story.facts for story in stories]
        bare = self._told(task, stories, new)
        if not self._tokens:
            return bare
        rest, seed = self._tokens - self._count(bare.text), generator.random()
        for _ in range(3):  # pieces at the edges depend on what stands there: what is missing is added
            if rest < 0:
                return None
            draw = random.Random(seed)
            other = [fact for facts in new for fact in facts] if draw.random() < self._other_words else None
            sentences = self._fill(draw, rest, other)
            ends = sorted(draw.randint(0, len(sentences)) for _ in new[1:])
            parts = [sentences[first:last] for first, last in zip([0, *ends], [*ends, None], strict=True)]
            document = self._told(task, stories, [_scatter(draw, *both) for both in zip(new, parts, strict=True)])
            if not (missing := self._tokens - self._count(document.text)):
                return document
            rest += missing
        return None

    def _told(self, task: str, stories: Sequence[Story], contexts: Sequence[Sequence[str]]) -> Document:
        text, answers = self._prompts[task].opening, list[tuple[int, int]]()
        for story, context in zip(stories, contexts, strict=True):
            text += "\n\n<context>\n" if answers else ""
            text += " ".join(context) + closing(story.question)
            answered = text + _answer(task, story)
            answers.append((len(text), len(answered)))
            text = answered
        return Document(text, answers)

    def _count(self, text: str) -> int:
        return len(self._processor.encode(text)) + 2

    def _fill(self, generator: random.Random, rest: int, facts: Sequence[str] | None) -> list[str]:
        """Sentences of so many tokens, the last one cut short: the text's, or its words and one of facts'."""
        found: list[str] = []
        at = generator.randrange(len(self._sentences))
        while rest:
            sentence = self._sentences[at % len(self._sentences)] if facts is None else self._words(generator, facts)
            ids = self._encode([sentence])[0]
            at += 1
            if len(ids) >= self._least:
                found.append(self._processor.decode(ids[:rest]).strip())
                rest -= min(rest, len(ids))
        return found

    def _words(self, generator: random.Random, facts: Sequence[str]) -> str:
        """A sentence of the text's words in any order, and one of a fact's."""
        count = generator.randint(*_WORDS)
        words = [generator.choice(generator.choice(self._sentences).split() or [""]).rstrip(".") for _ in range(count)]
        words[generator.randrange(len(words))] = generator.choice(generator.choice(facts).rstrip(".").split())
        return " ".join(words).capitalize() + "."


def _answer(task: str, story: Story) -> str:
    """As the prompt asks for it and its examples show it."""
    pattern, sentence = _SENTENCES.get(task, ("", "{target}"))
    words = re.fullmatch(pattern, story.question)
    return "\nAnswer: " + (sentence.format(*words.groups(), target=story.target) if words else story.target)


def _scatter(generator: random.Random, facts: Sequence[str], sentences: Sequence[str]) -> list[str]:
    """Facts in their order at random places between sentences."""
    found = list(sentences)
    places = sorted(generator.randint(0, len(sentences)) for _ in facts)
    for place, fact in reversed(list(zip(places, facts, strict=True))):
        found.insert(place, fact)
    return found


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(TrainingDataSettings, "python -m evals.babilong.training_data", folder=False)
    write_documents(settings.output, documents(settings))


if __name__ == "__main__":
    run_command(main)
