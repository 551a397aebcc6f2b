"""Reading long prompts in pieces and answering greedily, with nothing kept but the model's state.

A model is a function here, `stream(tokens_BT, states, last)`, as TitansModel.stream and EvalModel.stream are, and for
answers `decode(tokens_BT, states)`, as EvalModel.decoder is: a training loop may hand in its own.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evals.command_line import EvaluationError

Stream = Callable[[Tensor, Any, int | None], tuple[Tensor, Any]]
"""Logits (B, last or T, V) of the next piece (B, T), and the states after it; states of None begin sequences."""
Decode = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""Logits (B, 1, V) behind one more token of every row (B, 1), and the states after it, which may be these changed."""


@torch.inference_mode()
def read(
    stream: Stream, pieces: Iterable[Tensor], on_piece: Callable[[int], object], states: Any = None
) -> tuple[Tensor, Any]:
    """Streams prompts of one length.

    Args:
        stream: The model.
        pieces: Token ids (B, T), on the CPU, one piece after the other; at least one.
        on_piece: Called with the tokens of a piece (all rows) when it has been read.
        states: What earlier pieces left; None begins.

    Returns:
        Logits (B, V) behind the last token, and the states there.

    Raises:
        EvaluationError: Logits are not finite.
    """
    logits = torch.empty(0)
    for piece in pieces:
        logits, states = stream(piece, states, 1)
        _check(logits)  # looks at the values: the time measured is the time it took
        on_piece(piece.numel())
    return logits[:, -1], states


@torch.inference_mode()
def answer(
    decode: Decode, logits: Tensor, states: Any, max_new_tokens: int, end: int, on_step: Callable[[], object]
) -> list[list[int]]:
    """Decodes greedily, row by row until its end token.

    Args:
        decode: The model that read the prompts.
        logits: Behind the prompts, (B, V), from `read`.
        states: From `read`; they stay as they are.
        max_new_tokens: Tokens of an answer.
        end: Id of the end token.
        on_step: Called after every step of the model.

    Returns:
        For each row its answer's ids, end token left out.

    Raises:
        EvaluationError: Logits are not finite.
    """
    tokens = [logits.argmax(-1)]
    ended = tokens[0] == end
    while len(tokens) < max_new_tokens and not ended.all():
        logits, states = decode(tokens[-1][:, None], states)
        _check(logits)
        tokens.append(logits[:, -1].argmax(-1))
        ended |= tokens[-1] == end
        on_step()
    rows = torch.stack(tokens, 1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


@torch.inference_mode()
def value_losses(stream: Stream, logits: Tensor, states: Any, values: Sequence[Sequence[int]]) -> list[float]:
    """How surprising the right answer is: each value fed as it stands, whatever the model would have said.

    Args:
        stream: The model that read the prompts.
        logits: Behind the prompts, (B, V), from `read`.
        states: From `read`; they stay as they are.
        values: Tokens of each row's value, one or more.

    Returns:
        Cross-entropy of each row's value in nats, summed over its tokens.
    """
    longest = max(map(len, values))
    padded = torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in values])
    logits = logits[:, None]
    if longest > 1:  # the last token of a value predicts nothing more
        logits = torch.cat([logits, stream(padded[:, :-1], states, None)[0]], 1)
    losses = F.cross_entropy(logits.float().flatten(0, 1), padded.to(logits.device).flatten(), reduction="none")
    rows = losses.view(len(values), longest).double().cpu()
    return [float(row[: len(ids)].sum()) for row, ids in zip(rows, values, strict=True)]


def repeat(states: Any, rows: int) -> Any:
    """States of so many sequences that go on from the state of one, which stays as it is.

    Args:
        states: After one row: a list of trees that can `select` rows, one a block.
        rows: How many.
    """
    every = torch.zeros(rows, dtype=torch.int64)
    return [state.select(every) for state in states]


def _check(logits: Tensor) -> None:
    # An argmax over NaN is a token like any other and would be scored as an answer.
    if not bool(torch.isfinite(logits[:, -1]).all()):
        raise EvaluationError(
            "the model gives logits that are not finite; it cannot be evaluated, train it again or take an earlier "
            "checkpoint"
        )
