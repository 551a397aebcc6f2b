"""Which documents are kept apart for evaluation: a function of the text and the seed, not of order or place.

Equal texts always fall on the same side, so a repeated document never leaks from training into evaluation.
"""

import hashlib
from collections.abc import Iterable

import numpy

from tokenization.command_line import TokenizationError


def hash_position(text: str, seed: int) -> float:
    """Returns a number in [0, 1) that is uniform over texts: the first 53 bits of a keyed BLAKE2b.

    A document is kept apart when its number is below the threshold.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def choose_threshold(positions: Iterable["numpy.ndarray"], heldout_fraction: float) -> float:
    """Sets the threshold at the wanted fraction, moved just far enough that both splits get a text.

    Args:
        positions: Of all documents, in arrays of any length and order.
        heldout_fraction: Wanted share, in (0, 1).

    Returns:
        About the share of the documents that lie below it; at least one does, and at least one does not.

    Raises:
        TokenizationError: Fewer than two different texts.
    """
    ends = numpy.empty(0)  # the two lowest positions and the highest
    for block in positions:
        ordered = numpy.unique(numpy.concatenate((ends, block)))
        ends = numpy.unique(numpy.concatenate((ordered[:2], ordered[-1:])))
    if not len(ends):
        raise TokenizationError("--input: no document in it that can be used; give files with text")
    if len(ends) == 1:
        raise TokenizationError(
            "--input: all text is one document, and the train and the held-out split need one each; give more documents"
        )
    lowest, second, highest = ends[0], ends[1], ends[-1]
    if lowest < heldout_fraction <= highest:
        return heldout_fraction
    return float(highest if highest < heldout_fraction else second)
