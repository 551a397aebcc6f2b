"""What needles are hidden in, as token ids: each sentence is tokenised once, and a longer haystack goes on with it.

Prose of our own, plain sentences that a seed writes, has no digits and no end.
"""

import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evals.command_line import EvaluationError
from evals.niah import templates

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
_PROSE_SHA256 = hashlib.sha256(repr((_SHAPES, _WORDS)).encode()).hexdigest()
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


ESSAYS = {
    "1af094ff36d47893ea3c09cc570038053b711a9ba728c9d2dca036dbb231fa41",  # kept by github.com/Rya-Sanovar/RULER
    "d4cd6848b412d74df12b2830fc2855c3c4fdb7d94ce2b460bdd1a5e5a0bec81b",  # by github.com/MiguelMouraRamos/RULER
    "d9e4663b58000c644994bb677b6c47a6c0e026d1bc2386aade8963ae7bd9e039",  # by github.com/Chen3776/baseline_ruler
}
"""sha256 of PaulGrahamEssays.json as RULER's script made it. It fetches web pages, so its result has changed over time;
these are the ones that can be looked up."""
_BLOCK = 4_096  # tokens, the least that is made at a time


@dataclass(frozen=True)
class Source:
    """A text without an end, and what to call it."""

    label: str
    """noise, synthetic, file; essay, for a file that is RULER's; or needles."""
    sha256: str
    """Of the text, or of what it is made from."""
    joiner: str
    """What stands between two sentences: a line feed where they are lines, a space in prose."""
    sentences: Callable[[int], Iterator[str]]
    """Its sentences, by the seed. Noise and a file are the same for every seed; a file begins again where it ends."""
    text: str = ""
    """A file's text, in which no key or value may occur."""
    sentences_of_file: tuple[str, ...] = ()
    """Sentences of a file."""

    @property
    def seeded(self) -> bool:
        """Whether a seed decides it."""
        return self.label in ("synthetic", "needles")


NOISE = Source(
    "noise", hashlib.sha256(templates.NOISE.encode()).hexdigest(), "\n", lambda _: itertools.repeat(templates.NOISE)
)
PROSE = Source("synthetic", _PROSE_SHA256, " ", sentences)


def needles_source(task: templates.Task, words: templates.Words) -> Source:
    """Needles as a task's own, one a line, with keys and values that are never asked for."""

    def lines(seed: int) -> Iterator[str]:
        generator = random.Random(f"needles of {task.name} {seed}")

        def other(draw: Callable[[], str]) -> str:
            while templates.held_out(drawn := draw()):
                pass
            return drawn

        while True:
            key = other(lambda: task.draw_key(generator, words))
            yield task.needle(key, other(lambda: task.draw_value(generator)))

    made_of = f"{task.needle('', '')} {task.key} {task.value} {words.name} {words.adjectives} {words.nouns}"
    return Source("needles", hashlib.sha256(made_of.encode()).hexdigest(), "\n", lines)


def read_source(path: Path) -> Source:
    """A user's text: UTF-8, or a JSON object whose "text" it is, as RULER's essays are.

    Raises:
        EvaluationError: No such file, not text, or no sentence in it.
    """
    try:
        data = path.read_bytes()
        text = data.decode()
        if path.suffix == ".json":
            text = json.loads(text)["text"]
        sentences = _split(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise EvaluationError(
            f'--text {path}: cannot be read ({reason}); give a UTF-8 text, or JSON with a "text"'
        ) from None
    if not sentences:
        raise EvaluationError(f"--text {path}: there is no text in it; give another file")
    sha256 = hashlib.sha256(data).hexdigest()
    label = "essay" if sha256 in ESSAYS else "file"
    return Source(label, sha256, " ", lambda _: itertools.cycle(sentences), " ".join(sentences), tuple(sentences))


def _split(text: str) -> list[str]:
    """Sentences: white space collapsed, as RULER does it, and cut behind . ! ? and closing quotes.

    RULER cuts with nltk's trained splitter; where the two differ a needle stands a sentence earlier or later.
    """
    parts = re.split(r"(?<=[.!?])([\"'’”)\]]*) +", re.sub(r"\s+", " ", text).strip())
    return [sentence + closing for sentence, closing in zip(parts[::2], [*parts[1::2], ""], strict=True) if sentence]


class Splicer:
    """Ids of sentences as they stand behind others, so that joined ids are those of the joined text."""

    def __init__(self, processor: Any) -> None:
        """Takes the `sentencepiece.SentencePieceProcessor`, or what encodes like it."""
        self._processor = processor
        self._stop = processor.encode(".")
        self.behind = lru_cache(256)(self._behind)  # lines of noise and templates come again, prose does not

    def _behind(self, joiner: str, text: str) -> tuple[int, ...]:
        """Ids of a joiner and a sentence behind a full stop.

        Encoded alone they would begin with sentencepiece's dummy prefix.

        Raises:
            EvaluationError: The tokenizer joins the end of a sentence with the start of the next.
        """
        both = self._processor.encode(f".{joiner}{text}")
        if both[: len(self._stop)] != self._stop:
            raise EvaluationError("the tokenizer joins the end of a line with the next one; samples cannot be spliced")
        return tuple(both[len(self._stop) :])

    def after(self, before: str, text: str) -> list[int]:
        """Ids of a text that goes on with another one, a space between them."""
        head, both = self._processor.encode(before), self._processor.encode(f"{before} {text}")
        return both[len(head) :] if both[: len(head)] == head else self._processor.encode(text)


class Haystack:
    """The token ids of a source. They are made as far as they are asked for, and never change."""

    def __init__(self, source: Source, splicer: Splicer, seed: int) -> None:
        """Begins a haystack.

        Args:
            source: The text.
            splicer: For the tokenizer.
            seed: Decides synthetic prose.
        """
        self.source, self._splicer = source, splicer
        sentences = source.sentences(seed)
        first = next(sentences)
        self._sentences = itertools.chain([first], sentences)
        self.ids = np.empty(0, np.int32)
        self.ends = np.empty(0, np.int64)
        self.reach(1)
        self.first = np.array(splicer.behind("\n", first), np.int32)
        """Ids of the first sentence behind a line feed; in `ids` it stands behind the joiner."""

    def reach(self, tokens: int) -> np.ndarray:
        """Ids, at least so many, joiners before the sentences; `ends` then says where each sentence ends."""
        if len(self.ids) < tokens:
            goal = max(tokens, 2 * len(self.ids), _BLOCK)
            pieces, total = [], len(self.ids)
            while total < goal:
                pieces.append(self._splicer.behind(self.source.joiner, next(self._sentences)))
                total += len(pieces[-1])
            ends = len(self.ids) + np.cumsum([len(piece) for piece in pieces])
            self.ids = np.concatenate([self.ids, np.fromiter(itertools.chain(*pieces), np.int32)])
            self.ends = np.concatenate([self.ends, ends])
        return self.ids

    def exactly(self, tokens: int) -> "Filling":
        """The first so many tokens; the last sentence may be cut short."""
        ids = self.reach(tokens)[:tokens]
        whole = int(np.searchsorted(self.ends, tokens, "right"))
        ends = self.ends[:whole]
        return Filling(ids, ends if whole and ends[-1] == tokens else np.append(ends, tokens), whole)


class Filling(NamedTuple):
    """A beginning of a haystack."""

    ids: np.ndarray
    """Its tokens, the first sentence as it stands behind the joiner."""
    ends: np.ndarray
    """Where each sentence ends, the last one whole or not."""
    whole: int
    """Sentences that are whole."""

    def sentences_before(self, depth: float) -> int:
        """Sentences before a needle that stands so many percent into it."""
        return int(len(self.ends) * depth / 100)
