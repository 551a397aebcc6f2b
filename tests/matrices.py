"""What the suite tries of equality matrices; `bash launch/test.sh --all` tries all of them."""

import itertools
from collections.abc import Collection
from typing import Any

import pytest

from titans_mcore.mixers import MIXERS

LIKE = {
    "mal": "mag",
    "deltanet": "gated_deltanet",
    "retnet": "gated_deltanet",
    "mamba2": "gated_deltanet",
    "ttt_linear": "ttt_mlp",
}
"""Mixers whose state is of the kind of another's. What is proven of every mixer by itself is in tests/mixers."""
ONE_OF_A_KIND = [pytest.param(name, marks=pytest.mark.slow) if name in LIKE else name for name in MIXERS]
"""All mixers, for parametrize: those that are like another are slow."""


def by_kind(values: Collection[Any], mixers: Collection[str] = tuple(MIXERS)) -> list[Any]:
    """Pairs of a mixer and a value, for parametrize: of mixers like another all values but the first are slow."""
    return [
        pytest.param(name, value, marks=[pytest.mark.slow] if name in LIKE and place else [])
        for name in mixers
        for place, value in enumerate(values)
    ]


def every_pair(**axes: Collection[Any]) -> pytest.MarkDecorator:
    """Parametrises a test with all combinations of values: as many as have every pair of values, the others are slow.

    Args:
        axes: Values by argument; by several arguments whose names "__" joins, tuples of values.
    """
    columns = [list(values) for values in axes.values()]
    product = list(itertools.product(*(range(len(values)) for values in columns)))
    pairs = {case: set(itertools.combinations(enumerate(case), 2)) for case in product}
    missing, chosen = set().union(*pairs.values()), set()
    while missing:
        chosen.add(max(product, key=lambda case: len(pairs[case] & missing)))
        missing = set().union(*pairs.values()).difference(*(pairs[case] for case in chosen))
    cases = []
    for case in product:
        values = [column[place] for column, place in zip(columns, case, strict=True)]
        flat = [x for name, value in zip(axes, values, strict=True) for x in (value if "__" in name else [value])]
        cases.append(pytest.param(*flat, marks=[] if case in chosen else [pytest.mark.slow]))
    return pytest.mark.parametrize(",".join(axes).replace("__", ","), cases)
