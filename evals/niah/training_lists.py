"""Lists said again and again: documents in which nearly every token can be recalled, to begin with."""

import random
from pathlib import Path
from typing import Any


class Lists:
    """Makes documents of one length, each a random list of the vocabulary's pieces and its repetitions.

    Args:
        tokenizer: Tokenizer file.
        tokens: Tokens of a document, start and end token included. A list takes a sixth to a third of them.
    """

    def __init__(self, tokenizer: Path, tokens: int) -> None:
        from evals.models import load_tokenizer

        self._processor: Any = load_tokenizer(tokenizer).processor
        self._tokens = tokens - 2
        without_text = (self._processor.is_control, self._processor.is_unknown, self._processor.is_byte)
        self._pieces = [
            piece for piece in range(self._processor.vocab_size()) if not any(kind(piece) for kind in without_text)
        ]

    def document(self, generator: random.Random) -> str | None:
        """The next one; None where its text cannot be cut behind the last token, which another draw may allow."""
        count = generator.randint(max(self._tokens // 6, 1), max(self._tokens // 3, 1))
        said = self._processor.decode(generator.choices(self._pieces, k=count)).strip()
        ids = self._processor.encode(" ".join([said] * (self._tokens // count + 2)))[: self._tokens]
        text = self._processor.decode(ids)
        return text if self._processor.encode(text) == ids and len(ids) == self._tokens else None
