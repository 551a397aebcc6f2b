"""What is asked: bAbI's questions with the facts told before them, BABILong's own prompts and metric.

Where bAbI is not at hand, stories of our own in its format: they ask what qa1 to qa5 ask, with bAbI's people, places
and things, but are not bAbI; results with them say so. BABILong's words for each task are in prompts.toml.
"""

import hashlib
import random
import tomllib
from collections.abc import Callable, Collection, Iterator, Sequence
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


_PEOPLE = ("Mary", "John", "Daniel", "Sandra")
_GIVERS = ("Mary", "Bill", "Fred", "Jeff")
_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_THINGS = ("apple", "football", "milk")
_GO = ("moved to", "went to", "journeyed to", "travelled to", "went back to")
_TAKE = ("got", "took", "picked up", "grabbed")
_DROP = ("dropped", "left", "put down", "discarded")
_GIVE = ("gave", "passed", "handed")
_WAYS = ("north", "south", "east", "west")

QUESTIONS_PER_STORY = 5


class _World:
    """People who walk about and carry things, and the lines that tell of it."""

    def __init__(self, generator: random.Random, people: Sequence[str]) -> None:
        self.generator, self.people = generator, people
        self.lines: list[str] = []
        self.place: dict[str, str] = {}
        self.carrier: dict[str, str] = {}
        self.been: dict[str, list[str]] = {thing: [] for thing in _THINGS}
        """Places of each thing, one after another, from the moment it was first taken."""

    def tell(self, sentence: str) -> None:
        self.lines.append(f"{len(self.lines) + 1} {sentence}")

    def ask(self, question: str, target: str) -> None:
        self.tell(f"{question} \t{target}\t{len(self.lines)}")

    def choose(self, *verbs: str) -> str:
        return self.generator.choice(verbs)

    def walk(self) -> str:
        """Somebody goes somewhere else, with all they carry."""
        person = self.choose(*self.people)
        place = self.choose(*(place for place in _PLACES if place != self.place.get(person)))
        self.place[person] = place
        for thing, carrier in self.carrier.items():
            if carrier == person:
                self.been[thing].append(place)
        self.tell(f"{person} {self.choose(*_GO)} the {place}.")
        return person

    def handle(self) -> None:
        """A carried thing is dropped, or one that lies about is taken."""
        thing = self.choose(*_THINGS)
        if thing in self.carrier:
            self.tell(f"{self.carrier.pop(thing)} {self.choose(*_DROP)} the {thing}.")
            return
        lies = self.been[thing][-1] if self.been[thing] else None
        near = [person for person, place in self.place.items() if lies in (None, place)]
        if near:
            person = self.choose(*near)
            self.carrier[thing] = person
            if lies is None:
                self.been[thing].append(self.place[person])
            self.tell(f"{person} {self.choose(*_TAKE)} the {thing} there.")

    def give(self) -> tuple[str, str, str]:
        """A thing changes hands: who gave it, what it is, who has it now."""
        thing = self.choose(*_THINGS)
        if thing not in self.carrier:
            self.carrier[thing] = self.choose(*self.people)
            self.tell(f"{self.carrier[thing]} {self.choose(*_TAKE)} the {thing} there.")
        giver = self.carrier[thing]
        taker = self.choose(*(person for person in self.people if person != giver))
        self.carrier[thing] = taker
        self.tell(f"{giver} {self.choose(*_GIVE)} the {thing} to {taker}.")
        return giver, thing, taker


def _where_is_somebody(world: _World) -> None:
    world.walk()
    person = world.walk()
    world.ask(f"Where is {person}?", world.place[person])


def _where_is_something(world: _World) -> None:
    known: list[str] = []
    while not known:
        for _ in range(3):
            world.walk()
            world.handle()
        known = [thing for thing in _THINGS if world.been[thing]]
    thing = world.choose(*known)
    world.ask(f"Where is the {thing}?", world.been[thing][-1])


def _where_was_something(world: _World) -> None:
    known: list[str] = []
    while not known:
        for _ in range(4):
            world.walk()
            world.handle()
        known = [thing for thing in _THINGS if len(world.been[thing]) > 1]
    thing = world.choose(*known)
    before, place = world.been[thing][-2:]
    world.ask(f"Where was the {thing} before the {place}?", before)


def _which_place(world: _World) -> None:
    first, middle, last = world.generator.sample(_PLACES, 3)
    way = world.choose(*_WAYS)
    facts = [f"The {first} is {way} of the {middle}.", f"The {middle} is {way} of the {last}."]
    for fact in world.generator.sample(facts, 2):
        world.tell(fact)
    questions = [
        (f"What is {way} of the {middle}?", first),
        (f"What is {way} of the {last}?", middle),
        (f"What is the {first} {way} of?", middle),
        (f"What is the {middle} {way} of?", last),
    ]
    world.ask(*world.generator.choice(questions))


def _who_gave_what(world: _World) -> None:
    world.walk()
    giver, thing, taker = world.give()
    questions = [
        (f"Who did {giver} give the {thing} to?", taker),
        (f"What did {giver} give to {taker}?", thing),
        (f"Who gave the {thing} to {taker}?", giver),
        (f"Who received the {thing}?", taker),
        (f"Who gave the {thing}?", giver),
    ]
    world.ask(*world.generator.choice(questions))


_TASKS: dict[str, tuple[Sequence[str], int, Callable[[_World], None]]] = {
    "qa1": (_PEOPLE, QUESTIONS_PER_STORY, _where_is_somebody),
    "qa2": (_PEOPLE, QUESTIONS_PER_STORY, _where_is_something),
    "qa3": (_PEOPLE, QUESTIONS_PER_STORY, _where_was_something),
    "qa4": (_PEOPLE, 1, _which_place),
    "qa5": (_GIVERS, QUESTIONS_PER_STORY, _who_gave_what),
}
SIMULATED_TASKS = tuple(_TASKS)


def simulate(task: str, questions: int, seed: int = 0) -> str:
    """A file of stories in bAbI's format.

    Args:
        task: One of SIMULATED_TASKS.
        questions: At least so many; the last story is whole.
        seed: Decides them.
    """
    people, per_story, tell = _TASKS[task]
    generator = random.Random(f"{task} {seed}")
    lines: list[str] = []
    for _ in range(-(-questions // per_story)):
        world = _World(generator, people)
        for _ in range(per_story):
            tell(world)
        lines += world.lines
    return "\n".join(lines) + "\n"


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


def check_tasks(tasks: Sequence[str], babi: Path | None) -> None:
    """Refuses tasks of which there are no stories.

    Args:
        tasks: Their names.
        babi: bAbI's folder, or None for simulated stories.

    Raises:
        EvaluationError: Names those.
    """
    known = load_prompts() if babi else SIMULATED_TASKS
    unknown = [task for task in tasks if task not in known]
    if unknown or not tasks:
        which = "bAbI's qa1 to qa20" if babi else "qa1 to qa5, or --babi with bAbI's folder for the others"
        raise EvaluationError(f"--tasks {' '.join(unknown) or 'is empty'}; give {which}")


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
