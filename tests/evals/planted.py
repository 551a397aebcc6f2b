"""Models whose answers are known: they read the prompt from its tokens and generate what a rule says."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evals.models import EvalModel, load_tokenizer
from titans_mcore.config import TitansConfig

PROMPT_END = "mentioned in the provided text is"


class PlantedModel:
    """Streams like a model. Its state is every token read; its next token is the next one of reply(value).

    After its end token it goes on with other tokens, as a real model would.
    """

    def __init__(self, processor: Any, reply: Callable[[str], str]) -> None:
        self.processor, self.reply = processor, reply
        self.pieces: list[int] = []

    def stream(self, tokens: Tensor, states: Any, last: int | None = None) -> tuple[Tensor, Any]:
        self.pieces.append(tokens.shape[1])
        rows = [{"read": [], "answer": None} for _ in tokens] if states is None else states
        logits = torch.zeros(len(rows), 1, self.processor.vocab_size())
        for row, new, scores in zip(rows, tokens.tolist(), logits[:, 0], strict=True):
            row["read"] += new
            scores[self._next(row)] = 1.0
        return logits, rows

    def _next(self, row: dict[str, Any]) -> int:
        if row["answer"] is None:
            text = self.processor.decode(row["read"])
            if not text.endswith(PROMPT_END):
                return 5
            value = re.search(r"is: (\d+)\.", text)
            reply = self.reply(value[1] if value else "")
            answer = self.processor.encode("is " + reply)[len(self.processor.encode("is")) :]
            row["answer"] = [*answer, self.processor.eos_id()]
        return row["answer"].pop(0) if row["answer"] else self.processor.encode("7")[-1]


def other(value: str) -> str:
    return str(10_000_000 - int(value)).zfill(7)


def plant(tokenizer: Path, reply: Callable[[str], str]) -> EvalModel:
    loaded = load_tokenizer(tokenizer)
    config = TitansConfig(vocab_size=loaded.processor.vocab_size())
    return EvalModel(PlantedModel(loaded.processor, reply), config, loaded, "planted", "0" * 64, trained_length=512)
