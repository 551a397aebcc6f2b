"""How an answer is judged."""

import re
from dataclasses import dataclass

_NUMBER = re.compile(r"\d+")
# A uuid with a group lost is a wrong value, not none: any hexadecimal groups joined by hyphens count.
_UUID = re.compile(r"\b[0-9a-f]{4,}(?:-[0-9a-f]{2,})+\b", re.IGNORECASE)


@dataclass(frozen=True)
class Score:
    """Three verdicts on one answer."""

    substring: bool
    """RULER's score: the value stands somewhere in the answer, letter case aside. A list of many values can pass."""
    first_value: bool
    """The first number of the answer, all its digits (or its first uuid, where the value is one), is the value."""
    wrong_value: bool
    """The first number (or uuid) of the answer is another one. An answer without one is neither right nor wrong."""


def score(answer: str, value: str) -> Score:
    """Judges the text a model went on with, prompt left out."""
    first = (_NUMBER if value.isdigit() else _UUID).search(answer)
    return Score(
        substring=value.lower() in answer.lower(),
        first_value=first is not None and first[0].lower() == value.lower(),
        wrong_value=first is not None and first[0].lower() != value.lower(),
    )
