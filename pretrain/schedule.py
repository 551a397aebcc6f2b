"""The learning rate as a function of the step: nothing to save, nothing to restore."""

import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, min_fraction: float) -> float:
    """Linear warm-up to the peak, then half a cosine down to `min_fraction` of it at the last step.

    Args:
        step: Optimizer step, counted from 1: the first one has 1 / warmup_steps of the peak.
        peak: Largest learning rate.
        warmup_steps: Step that has the peak; 0 starts there.
        total_steps: Step that has the minimum.
        min_fraction: The minimum over the peak.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return peak * (min_fraction + (1 - min_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))
