"""S-NIAH from inside another program, a training loop for one: a model as a function, and numbers back.

Nothing is written and nothing is resumed. Where tensor-parallel ranks share the model, all of them call it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from evals.niah.generate import Stream, answer, read, value_losses
from evals.niah.samples import SampleBuilder, SampleKey
from evals.niah.scores import score
from evals.niah.templates import TASKS


@dataclass(frozen=True)
class ProbeResult:
    """What came out of one task at one length."""

    task: str
    """pk, n or w."""
    length: int
    """Tokens of prompt and answer together."""
    n: int
    """Samples."""
    accuracy: float
    """RULER's substring score."""
    first_value_accuracy: float
    """Answers whose first value is the right one."""
    value_loss_per_token: float
    """Cross-entropy of the value fed as it stands, nats a token: moves long before the accuracy does."""


def probe(
    stream: Stream,
    processor: Any,
    *,
    tasks: Sequence[str] = ("pk",),
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 25.0, 50.0, 75.0, 100.0),
    samples: int = 1,
    seed: int = 0,
    max_new_tokens: int = 16,
    piece: int = 2_048,
) -> list[ProbeResult]:
    """Answers S-NIAH samples, all depths of a length side by side.

    Args:
        stream: The model, in evaluation mode: `TitansModel.stream`, tokens on the CPU going to its device.
        processor: The `sentencepiece.SentencePieceProcessor` of the model.
        tasks: Of pk, n and w.
        lengths: Tokens of prompt and answer together.
        depths: Places of the needle, percent of the haystack.
        samples: At each depth.
        seed: Decides keys, values and prose.
        max_new_tokens: Tokens of the answer; a uuid needs about 40.
        piece: Tokens read at a time.

    Returns:
        A result for each task and length.

    Raises:
        EvaluationError: A length is too short, or logits are not finite.
    """
    builder = SampleBuilder(processor, max_new_tokens)
    found = []
    for task in tasks:
        for length in lengths:
            places = [(depth, sample) for depth in depths for sample in range(samples)]
            own = [builder.build(SampleKey(TASKS[task].name, length, *place, seed)) for place in places]
            prompts = torch.from_numpy(np.stack([sample.prompt for sample in own]))
            logits, states = read(stream, prompts.split(piece, 1), lambda _: None)
            losses = value_losses(stream, logits, states, [sample.value_ids for sample in own])
            answers = answer(stream, logits, states, max_new_tokens, processor.eos_id(), lambda: None)
            scores = [score(processor.decode(ids), sample.value) for ids, sample in zip(answers, own, strict=True)]
            found.append(
                ProbeResult(
                    task,
                    length,
                    len(own),
                    sum(each.substring for each in scores) / len(own),
                    sum(each.first_value for each in scores) / len(own),
                    sum(losses) / sum(len(sample.value_ids) for sample in own),
                )
            )
    return found
