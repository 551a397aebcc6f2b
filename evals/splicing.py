"""Token ids of text as it stands inside a longer one, so that long texts can be put together from ids."""

from collections.abc import Callable, Sequence
from typing import Any

from evals.command_line import EvaluationError

Encode = Callable[[Sequence[str]], list[list[int]]]


def encoder(processor: Any, before: str) -> Encode:
    """Encodes texts as they stand behind `before`, whose ids are left out but for a blank at its end.

    Alone a text would begin with sentencepiece's dummy prefix, whatever stands before it.

    Args:
        processor: The `sentencepiece.SentencePieceProcessor`.
        before: Such as ". ", between sentences.

    Raises:
        EvaluationError: When it is called, if the tokenizer joins a text with what stands before it.
    """
    head = before.rstrip(" ")
    ids = processor.encode(head)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        both = [processor.encode(before + text) for text in texts]
        if any(whole[: len(ids)] != ids for whole in both):
            raise EvaluationError("the tokenizer joins the end of a text with the next one; they cannot be spliced")
        return [whole[len(ids) :] for whole in both]

    return encode
