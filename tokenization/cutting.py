"""Tokens of a text of any length in bounded memory: sentencepiece needs about 45 times the size of what it is given.

A text is cut only where the pieces of the parts are the pieces of the whole. Why that can be known for BPE: it starts
from single characters and joins neighbours while the joined string is a piece. Where two neighbouring characters stand
side by side in no piece, nothing is ever joined across them, and joins on the left do not see those on the right. The
parts must also start alike: sentencepiece puts a dummy space in front of what it is given, so every later part is given
a line feed first, which stands in no longer piece, and the tokens of both are taken off again.
"""

from collections.abc import Iterator
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

CUT_ABOVE_CHARACTERS = 1 << 20
"""Longer texts are cut."""
LONGEST_PART_CHARACTERS = 1 << 22
"""A text with no place to cut for so long is refused: 200 MB for sentencepiece."""
_ANCHOR = "\n"
_SPACE = "\u2581"


class TextWithoutCut(Exception):
    """A text is too long for one call and has no place where its tokens allow a cut."""


class Cutter:
    """Encodes long texts part by part."""

    def __init__(self, processor: Any, model: bytes) -> None:
        """Finds out where this tokenizer allows cuts.

        Args:
            processor: Loaded tokenizer.
            model: The content of its file.
        """
        self._processor = processor
        self._joined = neighbours_in_pieces(processor) if _is_local(model) else None
        if self._joined is not None and any(_ANCHOR in pair for pair in self._joined):
            self._joined = None
        self._anchor = processor.encode(_ANCHOR)

    def encode(self, text: str) -> "Iterator[numpy.ndarray]":
        """Returns the tokens that sentencepiece gives the whole text, int32, without start and end token, part by part.

        Raises:
            TextWithoutCut: There is no place to cut for too long; before the first part.
        """
        return self._encode_parts(text, self.cuts(text))

    def cuts(self, text: str) -> list[int]:
        """Returns where the parts of a text end, about CUT_ABOVE_CHARACTERS apart."""
        ends = [0]
        while len(text) - ends[-1] > CUT_ABOVE_CHARACTERS:
            ends.append(self._cut(text, ends[-1]))
        if ends[-1] < len(text) or not text:
            ends.append(len(text))
        return ends[1:]

    def _encode_parts(self, text: str, ends: list[int]) -> "Iterator[numpy.ndarray]":
        import numpy

        for start, end in pairwise([0, *ends]):
            part = text[start:end]
            tokens = numpy.array(self._processor.encode(_ANCHOR + part if start else part), dtype=numpy.int32)
            yield tokens[len(self._anchor) :] if start else tokens

    def _cut(self, text: str, start: int) -> int:
        wanted = start + CUT_ABOVE_CHARACTERS
        last = min(start + LONGEST_PART_CHARACTERS, len(text))
        if self._joined is not None:
            backwards = range(wanted, start + CUT_ABOVE_CHARACTERS // 2, -1)
            for end in chain(backwards, range(wanted + 1, last)):
                if text[end - 1 : end + 1].replace(" ", _SPACE) not in self._joined:
                    return end
        if last < len(text):
            raise TextWithoutCut(f"no place to cut in {last - start:,} characters from {start:,} on")
        return last


def neighbours_in_pieces(processor: Any) -> frozenset[str]:
    """Returns all pairs of characters that stand side by side in a piece."""
    pieces = (
        processor.id_to_piece(token)
        for token in range(processor.vocab_size())
        if not (processor.is_control(token) or processor.is_unknown(token) or processor.is_byte(token))
    )
    return frozenset(piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1))


def _is_local(model: bytes) -> bool:
    """Whether pieces depend on neighbouring characters alone: BPE, bytes for the unknown, text taken as it is."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    return bool(
        trainer.model_type == trainer.BPE
        and trainer.byte_fallback
        and not trainer.treat_whitespace_as_suffix
        and not normalizer.precompiled_charsmap
        and not normalizer.remove_extra_whitespaces
        and normalizer.escape_whitespaces
    )
