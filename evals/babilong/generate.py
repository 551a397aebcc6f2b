"""Reading prompts that are handed over in pieces, and answering greedily; nothing is kept but the model's state."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from evals.command_line import EvaluationError
from evals.models import EvalModel


@torch.inference_mode()
def read(model: EvalModel, pieces: Iterable[Tensor], on_piece: Callable[[int], object]) -> tuple[Tensor, Any]:
    """Streams prompts of one length.

    Args:
        model: The model; its states start fresh.
        pieces: Token ids (B, T), one piece after another.
        on_piece: Called with the tokens of a piece (all rows) when it has been read.

    Returns:
        The first answer token of each row (B,), on the CPU, and the states after the prompts.
    """
    states: Any = None
    first = torch.empty(0)
    for piece in pieces:
        logits, states = model.stream(piece, states, last=1)
        first = _most_likely(model, logits)  # moves to the CPU: the time measured is the time it took
        on_piece(piece.numel())
    return first, states


@torch.inference_mode()
def answer(
    model: EvalModel, first: Tensor, states: Any, max_new_tokens: int, on_step: Callable[[], object]
) -> list[list[int]]:
    """Decodes greedily, row by row until its end token, which is left out.

    Args:
        model: The model that read the prompts.
        first: First answer token of each row, from `read`.
        states: From `read`.
        max_new_tokens: Tokens of an answer.
        on_step: Called after every step of the model.
    """
    end = model.tokenizer.processor.eos_id()
    tokens = [first]
    ended = first == end
    while len(tokens) < max_new_tokens and not ended.all():
        logits, states = model.stream(tokens[-1][:, None], states, last=1)
        tokens.append(_most_likely(model, logits))
        ended |= tokens[-1] == end
        on_step()
    rows = torch.stack(tokens, 1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def _most_likely(model: EvalModel, logits: Tensor) -> Tensor:
    last = logits[:, -1]
    # An argmax over NaN is a token like any other and would be scored as an answer.
    if not bool(torch.isfinite(last).all()):
        raise EvaluationError(
            f"the model of {model.checkpoint} gives logits that are not finite; it cannot be evaluated, "
            "train it again or take an earlier checkpoint"
        )
    return last.argmax(-1).cpu()
