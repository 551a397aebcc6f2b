"""Needles in haystacks (S-NIAH in noise), read in pieces by the model that trains."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from evals.command_line import EvaluationError
from evals.models import load_tokenizer
from evals.niah.samples import Sample, SampleBuilder, SampleKey
from evals.niah.templates import TASK, score
from pretrain.config.run_config import RunConfig
from pretrain.evaluate.losses import evaluating, turns
from titans_mcore.parallel import DeepSpeedGroups, Place, device
from titans_mcore.parallel.sequence import tokens_unshared

ANSWER_TOKENS = 32
"""Of an answer, and the room kept for it; a value has 7 digits, and `python -m evals.niah` asks for more."""
SEED = 0
"""Of keys and values, always: evaluations of all steps and runs ask the same."""


class Answers(NamedTuple):
    """What a model made of some haystacks.

    Attributes:
        texts: What it went on with after the question, greedily, up to its end token.
        losses_BT: Cross-entropy of the right value's tokens, nats.
        real_BT: Where there are such tokens; values may be of different lengths.
    """

    texts: list[str]
    losses_BT: Tensor
    real_BT: Tensor


@dataclass(frozen=True)
class NeedleProbe:
    """Asks for needles at every length of the settings."""

    config: RunConfig
    """Of the run."""
    processor: Any
    """Its tokenizer, a `sentencepiece.SentencePieceProcessor`."""
    builder: SampleBuilder
    """Makes the haystacks."""

    @classmethod
    def open(cls, config: RunConfig, tokenizer: Path) -> "NeedleProbe":
        """Checks that haystacks can be made.

        Args:
            config: Of the run.
            tokenizer: RUN/tokenizer/tokenizer.model.

        Raises:
            ValueError: The tokenizer cannot be used, or the shortest haystack is too short for its words.
        """
        try:
            processor = load_tokenizer(tokenizer).processor
            builder = SampleBuilder(processor, ANSWER_TOKENS)
        except EvaluationError as error:
            raise ValueError(f"evaluate.probe_length asks questions in words, and {error}") from error
        probe = cls(config, processor, builder)
        shortest = config.evaluate.probe_shortest
        if not probe._fits(shortest):
            enough = next(n for n in (shortest << power for power in range(1, 32)) if probe._fits(n))
            raise ValueError(
                f"evaluate.probe_shortest {shortest} is too short for the words of a haystack with this tokenizer; "
                f"take {enough}"
            )
        return probe

    def run(self, engine: DeepSpeedEngine) -> dict[str, Any]:
        """Asks at every length; collective, and the same at every layout.

        Args:
            engine: Its model is asked.

        Returns:
            `name` of the task, `lengths`, `samples` of each, and by length `accuracy`, the share of needles found, and
            `answer_loss`, that of the right values in nats a token: it falls long before the first needle is found,
            and is no number where logits are not finite.
        """
        config, groups = self.config.evaluate, DeepSpeedGroups()
        # Ranks that have the whole model, with their tensor-parallel ranks, read: context ranks do, rows of their own.
        place = Place(groups.get_data_parallel_rank(), groups.get_data_parallel_world_size())
        sums = torch.zeros(len(config.probe_lengths), 4, dtype=torch.float64, device=device())
        with evaluating(engine), tokens_unshared(engine.module):
            for sums_of_length, length in zip(sums, config.probe_lengths, strict=True):
                for numbers, counted_B in turns(config.probe_samples, self.config.train.micro_batch, place):
                    samples = [self.builder.build(self._name(length, number)) for number in numbers]
                    sums_of_length += self._sums(samples, self.ask(engine, samples), counted_B)
        dist.all_reduce(sums, group=groups.get_data_parallel_group())
        found, asked, losses, tokens = sums.T
        return {
            "name": TASK,
            "lengths": list(config.probe_lengths),
            "samples": config.probe_samples,
            "accuracy": (found / asked).tolist(),
            "answer_loss": (losses / tokens).tolist(),
        }

    def ask(self, engine: DeepSpeedEngine, samples: list[Sample]) -> Answers:
        """Reads haystacks of one length side by side, and has them answered.

        The number of passes does not depend on the answers, which ranks of ZeRO 3 need to make together.

        Args:
            engine: Its model is asked.
            samples: Of one length.
        """
        prompts_BT = torch.from_numpy(np.stack([sample.prompt for sample in samples])).long().to(device())
        states: list[Any] = []
        # As many at a time as a rank has of a row in training, which its memory has room for.
        piece = self.config.train.sequence_length // self.config.parallel.context
        for part in prompts_BT[:, :-1].split(piece, 1):
            # Asked for losses, not logits: those of a piece are never gathered from the tensor-parallel ranks.
            _, states = engine(tokens=part, labels=part, states=states)
        values_BT, real_BT = _values(samples)
        before_BT = torch.cat([prompts_BT[:, -1:], values_BT[:, :-1]], 1)
        losses_BT, _ = engine(tokens=before_BT, labels=values_BT, states=states)
        answer = [prompts_BT[:, -1:]]
        for _ in range(ANSWER_TOKENS):
            logits, states = engine(tokens=answer[-1], states=states)
            answer.append(logits[:, -1:].argmax(-1))
        end, texts = self.processor.eos_id(), []
        for ids in torch.cat(answer[1:], 1).tolist():
            texts.append(self.processor.decode(ids[: ids.index(end)] if end in ids else ids))
        return Answers(texts, losses_BT, real_BT)

    def _name(self, length: int, number: int) -> SampleKey:
        samples = self.config.evaluate.probe_samples
        depth = round(100 * number / (samples - 1), 2) if samples > 1 else 50.0
        return SampleKey(TASK, length, depth, 0, SEED)

    def _fits(self, length: int) -> bool:
        try:
            for number in range(self.config.evaluate.probe_samples):
                self.builder.check(self._name(length, number))
        except EvaluationError:
            return False
        return True

    def _sums(self, samples: list[Sample], answers: Answers, counted_B: Tensor) -> Tensor:
        """Needles found, haystacks, loss of the values, their tokens: of those that count."""
        found = [score(text, sample.value).substring for text, sample in zip(answers.texts, samples, strict=True)]
        found_B = torch.tensor(found, device=device())
        real_BT = answers.real_BT & counted_B[:, None]
        losses = answers.losses_BT[real_BT].double()
        counts = [found_B[counted_B].sum(), counted_B.sum(), losses.sum(), real_BT.sum()]
        return torch.stack([count.double() for count in counts])


def _values(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Tokens of the right answers, (B, T), and where they are real."""
    rows = [torch.tensor(sample.value_ids) for sample in samples]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(device())
    return padded.clamp_min(0), padded >= 0
