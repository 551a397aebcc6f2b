"""Prose of our own to hide needles in: plain sentences that a seed writes, without digits and without an end."""

import hashlib
import random
from collections.abc import Iterator

_PEOPLE = """
the baker; a young doctor; my neighbour; the old teacher; our captain; the carpenter; a quiet student; the gardener;
her brother; the librarian; a tired driver; the painter; his aunt; the mayor; a visitor; the farmer; our cook;
the engineer; a stranger; the musician; the tailor; a clerk; the postman; two sisters; the shepherd; a sailor;
the judge; my grandfather; the miller; a poet; the nurse; the merchant; a boy from the hills; the watchmaker
"""
_DEEDS = """
walked slowly to; wrote a letter about; forgot the way to; kept thinking about; told everyone about; had never seen;
waited a long time near; asked a question about; drew a careful map of; came back late from; had doubts about;
spent the morning at; looked out over; once lived not far from; turned away from; read an old book about; heard of;
wanted to know more about; carried a basket to; said nothing at all about; left early for; dreamt again of;
argued for an hour about; found a short path to; paid very little for a picture of; worried about; was proud of
"""
_PLACES = """
the harbour; a narrow street; the market; the northern valley; a house with green shutters; the school; the mill by the
stream; an empty theatre; the railway station; the orchard; a small island; the bridge; the court; the library;
a village without a name; the lower field; the workshop; an inn at the crossroads; the lighthouse; the town hall;
the garden behind the church; a path through the woods; the quarry; the museum; the bakery on the corner; the bay
"""
_TIMES = """
in the morning; after the rain; before dinner; late in the autumn; on the first day of the fair; that winter; at noon;
for most of the year; in those days; while the others slept; when the wind turned; toward evening; on a cold night;
during the holidays; at the end of the week; without any haste; as soon as the snow melted; in the middle of the summer
"""
_REASONS = """
nobody had asked for it; it seemed the right thing to do; there was plenty of time; the work was almost done;
the weather would not change; a promise is a promise; the light was better there; the road had been closed;
it had always been done so; the children were curious; money was short; the answer mattered to them all;
rumours travel quickly; the first attempt had failed; silence can be kind; patience costs nothing
"""
_VIEWS = """
what people remember is rarely what happened; good tools make slow work pleasant; a plan is only the start of a talk;
most of what is called luck is preparation; the best ideas look foolish at first; habits are stronger than reasons;
it is easier to begin than to end well; one learns more from a mistake than from praise; small towns keep long
memories; a question can be worth more than its answer; those who listen are seldom surprised; distance makes every
hill look blue; every trade has words of its own; nothing is repaired by being hidden
"""
_THINGS = """
letter; lamp; boat; window; coat; ladder; song; table; clock; rope; picture; kettle; fence; wheel; key; bell; blanket;
mirror; cart; chair; stove; jar; notebook; stone; barrel; loaf of bread; pair of gloves; wooden box; piece of cloth
"""
_QUALITIES = """
plain; heavy; useful; worn; bright; strange; broken; beautiful; simple; fragile; familiar; precious; ordinary; dusty;
warm; cold; crooked; new; almost forgotten; well made; too large; rather small; hard to describe; easy to lose
"""
_SHAPES = (
    "{Person} {deed} {place} {time}.",
    "{Time}, {person} {deed} {place}.",
    "{Person} {deed} {place}, because {reason}.",
    "{Person} {deed} {place}, and {person} {deed} {place}.",
    "It is often said that {view}.",
    "{View}, and {person} knew it well.",
    "The {thing} was {quality}, but {person} kept it.",
    "There was a {quality} {thing} in {place}, although {reason}.",
    "When {person} {deed} {place}, the {thing} looked {quality}.",
    "Perhaps {view}, or perhaps {reason}.",
    "{Person} gave the {thing} to {person} {time}, since {reason}.",
    "Between {place} and {place} there is a {thing}, {quality} and {quality}.",
    "Nobody in {place} could say why {person} {deed} {place}.",
    "{Time} the {thing} stood in {place}, and {reason}.",
)
_WORDS = {
    name: [" ".join(phrase.split()) for phrase in phrases.split(";")]
    for name, phrases in {
        "person": _PEOPLE,
        "deed": _DEEDS,
        "place": _PLACES,
        "time": _TIMES,
        "reason": _REASONS,
        "view": _VIEWS,
        "thing": _THINGS,
        "quality": _QUALITIES,
    }.items()
}
SHA256 = hashlib.sha256(repr((_SHAPES, _WORDS)).encode()).hexdigest()
"""Of all that sentences are made of: texts of one seed are equal where it is."""


def sentences(seed: object) -> Iterator[str]:
    """Sentences that a seed decides, as many as are asked for."""
    generator = random.Random(f"prose {seed}")
    while True:
        words = _Draw(generator)
        yield generator.choice(_SHAPES).format_map(words)


class _Draw(dict[str, str]):
    """A phrase for each name asked for, with a capital where the name has one."""

    def __init__(self, generator: random.Random) -> None:
        super().__init__()
        self._generator = generator

    def __missing__(self, name: str) -> str:
        phrase = self._generator.choice(_WORDS[name.lower()])
        return phrase if name.islower() else phrase[0].upper() + phrase[1:]
