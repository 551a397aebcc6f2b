"""Stories in bAbI's format: they ask what qa1 to qa5 ask, with bAbI's people, places and things, but are not bAbI."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

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


TELLERS: dict[str, tuple[Sequence[str], int, Callable[[_World], None]]] = {
    "qa1": (_PEOPLE, QUESTIONS_PER_STORY, _where_is_somebody),
    "qa2": (_PEOPLE, QUESTIONS_PER_STORY, _where_is_something),
    "qa3": (_PEOPLE, QUESTIONS_PER_STORY, _where_was_something),
    "qa4": (_PEOPLE, 1, _which_place),
    "qa5": (_GIVERS, QUESTIONS_PER_STORY, _who_gave_what),
}
TASKS = tuple(TELLERS)


def simulate(task: str, questions: int, seed: int = 0) -> str:
    """A file of stories in bAbI's format.

    Args:
        task: One of TASKS.
        questions: At least so many; the last story is whole.
        seed: Decides them.
    """
    people, per_story, tell = TELLERS[task]
    generator = random.Random(f"{task} {seed}")
    lines: list[str] = []
    for _ in range(-(-questions // per_story)):
        world = _World(generator, people)
        for _ in range(per_story):
            tell(world)
        lines += world.lines
    return "\n".join(lines) + "\n"


def write_babi(folder: Path, questions: int = 100, train: int = 500) -> Path:
    """Both splits of all tasks, as bAbI's en-10k has them; the test split is that of seed 0, the train split of 1."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        (folder / f"{task}_made-up_test.txt").write_text(simulate(task, questions))
        (folder / f"{task}_made-up_train.txt").write_text(simulate(task, train, 1))
    return folder


def write_books(folder: Path) -> Path:
    """Both splits of a text, as PG19 has them."""
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / "1.txt").write_text("\n".join(prose()))
    return folder


def prose() -> Iterator[str]:
    """Prose for the facts to lie in."""
    generator = random.Random(0)
    who = ("The old captain", "A young clerk", "The miller's wife", "Our neighbour", "The tall stranger", "My uncle")
    did = ("remembered", "described", "had forgotten", "asked about", "spoke of", "wrote down", "laughed at")
    what = ("the long road", "a quiet evening", "the broken clock", "an early train", "the price of wheat", "a letter")
    when = ("before the rain began", "while the others slept", "as the bells rang", "long after the harvest was in")
    end = ("and nobody answered", "which surprised them all", "without a word more", "as if it had been yesterday")
    for _ in range(300):
        words = (generator.choice(part) for part in (who, did, what, when, end))
        yield "{} {} {} {}, {}.".format(*words)
