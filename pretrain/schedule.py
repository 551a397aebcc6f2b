"""What a step learns from, and at which rate, as functions of the step: nothing to save, nothing to restore."""

import math
from typing import NamedTuple

from pretrain.config.run_config import RunConfig
from pretrain.config.settings import ScheduleConfig, TrainConfig


class Portion(NamedTuple):
    """What a step learns from.

    Attributes:
        first: Number of its first sample; all before it have been learned from.
        samples: How many samples.
        row_length: Tokens of a row; a sample is cut into rows of this length.
    """

    first: int
    samples: int
    row_length: int


def portion_of(step: int, train: TrainConfig) -> Portion:
    """The samples of a step, counted from 1, and the length of its rows.

    Both warm-ups are stairs over the tokens learned from before the step. A batch grows by `batch_warmup_from` samples
    a stair; a row doubles. Samples keep their full length and so their numbers: short rows are parts of a sample, the
    last token of each is predicted as before, and only what it may look back at is shorter.
    """
    first, samples = _samples_of(step - 1, train)
    return Portion(first, samples, _row_length(first * train.sequence_length, train))


def tokens_after(steps: int, train: TrainConfig) -> int:
    """Tokens that so many steps learn from."""
    return portion_of(steps + 1, train).first * train.sequence_length


def _samples_of(steps_before: int, train: TrainConfig) -> tuple[int, int]:
    """First sample and number of samples: stair by stair, because stairs have whole steps."""
    first = 0
    if train.batch_warmup_tokens:
        stairs = train.global_batch // train.batch_warmup_from - 1
        for stair in range(1, stairs + 1):
            batch = stair * train.batch_warmup_from
            # The stair ends with the step after which stair / stairs of the tokens are learned from.
            last = -(-train.batch_warmup_tokens * stair // (stairs * train.sequence_length))
            steps = max(0, -((first - last) // batch))
            if steps_before < steps:
                return first + steps_before * batch, batch
            first += steps * batch
            steps_before -= steps
    return first + steps_before * train.global_batch, train.global_batch


def _row_length(tokens: int, train: TrainConfig) -> int:
    if not train.sequence_warmup_tokens:
        return train.sequence_length
    doublings = (train.sequence_length // train.sequence_warmup_from).bit_length() - 1
    return train.sequence_warmup_from << min(doublings, tokens * doublings // train.sequence_warmup_tokens)


def rate_of(update: int, config: RunConfig) -> float:
    """Learning rate of an update of the weights, counted from 1; a step without one does not move it."""
    return learning_rate(update, config.schedule, peak=config.optimizer.lr, total_steps=config.train.steps)


def learning_rate(step: int, schedule: ScheduleConfig, *, peak: float, total_steps: int) -> float:
    """Linear warm-up to the peak, then down to a fraction of it at the last step, as the schedule's shape says.

    Args:
        step: Optimizer step, counted from 1: the first one has 1 / warmup_steps of the peak.
        schedule: Shape, warm-up, decay and the fraction; a warm-up of 0 steps starts at the peak.
        peak: Largest learning rate.
        total_steps: Step that has the minimum.
    """
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    stable = schedule.warmup_steps  # the last step at the peak
    if schedule.shape == "wsd":
        stable = max(stable, total_steps - schedule.decay_steps)
    progress = min(1.0, max(0, step - stable) / max(1, total_steps - stable))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.shape == "cosine" else 1 - progress
    return peak * (schedule.min_lr_fraction + (1 - schedule.min_lr_fraction) * left)
