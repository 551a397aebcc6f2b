"""Which documents stay and on which side: duplicates are left out, some texts are kept apart for evaluation.

Of equal texts the first in the order of the plan stays. The side is a function of the text and the seed, not of order
or place: equal texts always fall on the same one, so a repeated document never leaks from training into evaluation.
"""

import hashlib
from collections.abc import Callable, Iterable

import numpy

from tokenization.command_line import TokenizationError

DIGESTS_AT_ONCE = 1 << 23


def find_duplicates(
    lengths: list[int], load: Callable[[int], "numpy.ndarray"], digests_at_once: int = DIGESTS_AT_ONCE
) -> "numpy.ndarray":
    """Marks every document whose text came before.

    Args:
        lengths: Documents of each table.
        load: Gives a table, with fields digest_high and digest_low.
        digests_at_once: Bounds the memory, about 60 bytes each.

    Returns:
        True for duplicates, one a document, tables in order.
    """
    total = sum(lengths)
    duplicate = numpy.zeros(total, dtype=bool)
    parts = 1 + total // digests_at_once
    for part in range(parts):
        places, high, low = _part(lengths, load, parts, part)
        order = numpy.lexsort((places, low, high))
        high, low = high[order], low[order]
        repeats = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        duplicate[places[order[1:][repeats]]] = True
    return duplicate


def _part(
    lengths: list[int], load: Callable[[int], "numpy.ndarray"], parts: int, part: int
) -> tuple["numpy.ndarray", "numpy.ndarray", "numpy.ndarray"]:
    places, high, low = [], [], []
    first = 0
    for number, length in enumerate(lengths):
        table = load(number)
        chosen = numpy.flatnonzero(table["digest_high"] % numpy.uint64(parts) == part)
        places.append(chosen + first)
        high.append(table["digest_high"][chosen])
        low.append(table["digest_low"][chosen])
        first += length
    return numpy.concatenate(places), numpy.concatenate(high), numpy.concatenate(low)


def hash_position(text: str, seed: int) -> float:
    """Returns a number in [0, 1) that is uniform over texts: the first 53 bits of a keyed BLAKE2b.

    A document is kept apart when its number is below the threshold.
    """
    return bytes_position(text.encode(), seed)


def bytes_position(content: bytes | memoryview, seed: int) -> float:
    """The same of a document that is no text."""
    digest = hashlib.blake2b(content, digest_size=8, key=str(seed).encode()).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def choose_threshold(positions: Iterable["numpy.ndarray"], heldout_fraction: float, option: str = "--input") -> float:
    """Sets the threshold at the wanted fraction, moved just far enough that both splits get a text.

    Args:
        positions: Of all documents, in arrays of any length and order.
        heldout_fraction: Wanted share, in (0, 1).
        option: How the documents were given, for the message.

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
        raise TokenizationError(f"{option}: no document in it that can be used; give files with text")
    if len(ends) == 1:
        raise TokenizationError(
            f"{option}: all text is one document, and train and held-out split need one each; give more documents"
        )
    lowest, second, highest = ends[0], ends[1], ends[-1]
    if lowest < heldout_fraction <= highest:
        return heldout_fraction
    return float(highest if highest < heldout_fraction else second)
