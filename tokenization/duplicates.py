"""Exact duplicates: of equal texts, the first in the order of the plan stays.

Memory holds the hashes of one part at a time, chosen by the hash itself, so equal texts always meet in the same part.
"""

from collections.abc import Callable

import numpy

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
