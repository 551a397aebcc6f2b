"""Which documents are kept apart for evaluation: a function of the text and the seed, not of order or place.

Equal texts always fall on the same side, so a repeated document never leaks from training into evaluation.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from tokenization.errors import TokenizationError


@dataclass(frozen=True)
class SplitRule:
    """Keeps apart the texts whose hash, read as a number in [0, 1), is below a threshold."""

    seed: int
    """Changes every hash."""
    threshold: float
    """About the share of the documents kept apart."""

    def is_heldout(self, text: str) -> bool:
        """Says whether a document with this text is kept apart."""
        return hash_position(text, self.seed) < self.threshold


def hash_position(text: str, seed: int) -> float:
    """Returns a number in [0, 1) that is uniform over texts: the first 53 bits of a keyed BLAKE2b."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def choose_rule(texts: Iterable[str], seed: int, heldout_fraction: float) -> SplitRule:
    """Sets the threshold at the wanted fraction, moved just far enough that both splits get a text.

    Stops reading as soon as each split has one, for a fraction f after about 1 / f texts.

    Args:
        texts: All documents, in any order.
        seed: Of the hash.
        heldout_fraction: Wanted share, in (0, 1).

    Returns:
        A rule that puts at least one of the texts on each side.

    Raises:
        TokenizationError: Fewer than two different texts.
    """
    ends: set[float] = set()  # the two lowest positions and the highest
    for text in texts:
        ends.add(hash_position(text, seed))
        ends = {*sorted(ends)[:2], max(ends)}
        if min(ends) < heldout_fraction <= max(ends):
            return SplitRule(seed, heldout_fraction)
    if not ends:
        raise TokenizationError("--input: no document in it; give files with text")
    if len(ends) == 1:
        raise TokenizationError(
            "--input: all text is one document, and the train and the held-out split need one each; give more documents"
        )
    second, highest = sorted(ends)[1], max(ends)
    return SplitRule(seed, highest if highest < heldout_fraction else second)
