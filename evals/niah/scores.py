"""How an answer is judged."""

import re
from dataclasses import dataclass

_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Score:
    """Three verdicts on one answer."""

    substring: bool
    """RULER's score: the value stands somewhere in the answer, letter case aside. A list of many numbers can pass."""
    first_value: bool
    """The first number of the answer, all its digits, is the value."""
    wrong_value: bool
    """The first number of the answer is another one. An answer without a number is neither right nor wrong."""


def score(answer: str, value: str) -> Score:
    """Judges the text a model went on with, prompt left out."""
    first = _DIGITS.search(answer)
    return Score(
        substring=value.lower() in answer.lower(),
        first_value=first is not None and first[0] == value,
        wrong_value=first is not None and first[0] != value,
    )
