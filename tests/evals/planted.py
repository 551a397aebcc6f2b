"""Models whose answers are known: they read the prompt from its tokens and generate what a rule says."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evals.models import EvalModel, load_tokenizer
from evals.niah.templates import listed
from titans_mcore.config import TitansConfig

PROMPT_END = re.compile(r"The special magic \w+ for (.+) mentioned in the provided text (?:is|are)$")
CERTAIN = 30.0  # a logit beside zeros


@dataclass(frozen=True)
class Read:
    """What a planted model keeps of one row: every token read, and what is left of its answer."""

    tokens: tuple[int, ...] = ()
    answer: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Rows:
    """The state of a batch; like a model's it is a value that can be repeated and read from again."""

    rows: tuple[Read, ...]

    def select(self, rows: Tensor) -> "Rows":
        return Rows(tuple(self.rows[row] for row in rows.tolist()))


class PlantedModel:
    """Streams like a model. Behind a prompt its next tokens are those of reply(value), whatever it is fed then.

    The value is looked up in the needles by the key of the question; several are listed in the order of keys and text.

    After its end token it goes on with other tokens, as a real model would.
    """

    def __init__(self, processor: Any, reply: Callable[[str], str]) -> None:
        self.processor, self.reply = processor, reply
        self.pieces: list[tuple[int, int]] = []

    def stream(self, tokens: Tensor, states: Any, last: int | None = None) -> tuple[Tensor, Any]:
        self.pieces.append((tokens.shape[0], tokens.shape[1]))
        rows = (Read(),) * len(tokens) if states is None else states[0].rows
        logits = torch.zeros(len(rows), tokens.shape[1], self.processor.vocab_size())
        after = []
        for row, new, scores in zip(rows, tokens.tolist(), logits, strict=True):
            if row.answer is None:  # a prompt ends where a piece ends
                row = self._read(Read((*row.tokens, *new)))
                scores[:, 5] = CERTAIN
                new = new[-1:]
            for place in range(len(scores) - len(new), len(scores)):
                scores[place] = 0.0
                row, chosen = self._next(row)
                scores[place, chosen] = CERTAIN
            after.append(row)
        return logits[:, -last:] if last else logits, [Rows(tuple(after))]

    def _read(self, row: Read) -> Read:
        """With its answer, where the prompt is whole."""
        text = self.processor.decode(list(row.tokens))
        if not (asked := PROMPT_END.search(text)):
            return row
        keys = re.split(r", (?:and )?", asked[1])
        values = [value for key in keys for value in re.findall(f"for {key} is: ([0-9a-f-]+)\\.", text)]
        reply = self.reply(listed(values) if values else "")
        answer = self.processor.encode("is " + reply)[len(self.processor.encode("is")) :]
        return Read(row.tokens, (*answer, self.processor.eos_id()))

    def _next(self, row: Read) -> tuple[Read, int]:
        """The row after one more token, and the token that follows."""
        if row.answer is None:
            return row, 5
        chosen = row.answer[0] if row.answer else self.processor.encode("7")[-1]
        return Read(row.tokens, row.answer[1:]), chosen


def other(value: str) -> str:
    """A wrong value of the same kind; of several only the first is wrong."""
    if not value:
        return "1111111"
    return str(10_000_000 - int(value)).zfill(7) if value.isdigit() else "00000000" + value[8:]


def plant(tokenizer: Path, reply: Callable[[str], str]) -> EvalModel:
    loaded = load_tokenizer(tokenizer)
    config = TitansConfig(vocab_size=loaded.processor.vocab_size())
    return EvalModel(PlantedModel(loaded.processor, reply), config, loaded, "planted", "0" * 64, trained_length=512)
