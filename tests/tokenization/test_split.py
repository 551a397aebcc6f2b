"""Train and held-out: by text and seed alone, and never empty."""

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenization.command_line import TokenizationError
from tokenization.selection import choose_threshold, hash_position

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=2, max_size=30, unique=True)
FRACTIONS = st.floats(1e-6, 1 - 1e-6)


def positions(texts, seed=0):
    return [numpy.array([hash_position(text, seed)]) for text in texts]


@given(texts=TEXTS, fraction=FRACTIONS, seed=st.integers(0, 3))
def test_both_splits_get_a_document_from_any_two(texts, fraction, seed):
    threshold = choose_threshold(positions(texts, seed), fraction)
    assert {hash_position(text, seed) < threshold for text in texts} == {True, False}


@given(texts=TEXTS, fraction=FRACTIONS, order=st.randoms())
def test_the_split_does_not_depend_on_the_order(texts, fraction, order):
    shuffled = list(texts)
    order.shuffle(shuffled)
    together = [numpy.concatenate(positions(texts))]
    assert choose_threshold(together, fraction) == choose_threshold(positions(shuffled), fraction)


def test_the_share_is_the_fraction_and_changes_with_the_seed():
    texts = [str(number) for number in range(20_000)]
    thresholds = [choose_threshold(positions(texts, seed), 0.1) for seed in (0, 1)]
    kept = [{text for text in texts if hash_position(text, seed) < thresholds[seed]} for seed in (0, 1)]
    assert all(abs(len(apart) / len(texts) - 0.1) < 0.01 for apart in kept)
    assert len(kept[0] & kept[1]) < 0.02 * len(texts)


def test_positions_do_not_change_between_versions():
    """Shards of other days must agree: a new hash would move training text into evaluation."""
    assert hash_position("a text", 0) == pytest.approx(0.6113852578148353, abs=1e-12)


@pytest.mark.parametrize("texts", [[], ["one"], ["one", "one", "one"]])
def test_fewer_than_two_different_texts_are_refused(texts):
    with pytest.raises(TokenizationError, match="document"):
        choose_threshold(positions(texts), 0.01)
