"""A step in one line, and how long the rest of the run will take."""

import math
from typing import Any

from pretrain.config.settings import TrainConfig
from pretrain.schedule import tokens_after


def seconds_left(step: int, seconds: float, train: TrainConfig) -> float:
    """Seconds to the end of a run if every token takes what those of a step took, which took so many seconds.

    Counted in tokens, steps that grow in a warm-up count as what they will be; evaluations and saves come on top.
    """
    before, done, every = (tokens_after(number, train) for number in (step - 1, step, train.steps))
    return seconds * (every - done) / (done - before)


def step_line(step: int, steps: int, values: dict[str, Any], eta_seconds: float) -> str:
    """A step for people; what was not measured is left out.

    Args:
        step: Counted from 1.
        steps: Of the run.
        values: Of a step's record.
        eta_seconds: To the end.
    """
    parts = [
        f"step {step:>{len(str(steps))}}/{steps}",
        f"loss {values['loss']:.4f}",
        f"{values['tokens_per_second']:,.0f} tokens/s",
        f"lr {values['lr']:.2e}",
        f"grad norm {values['grad_norm']:.3f}",
    ]
    if values.get("mfu") is not None:
        parts.append(f"MFU {values['mfu']:.1%}")
    if values.get("memory_bytes") is not None:
        parts.append(f"memory {values['memory_bytes'] / 1e9:.1f} GB")
    if values.get("seconds"):
        parts.append(f"data wait {values.get('data_wait_seconds', 0.0) / values['seconds']:.1%}")
    return " | ".join([*parts, f"ETA {clock(eta_seconds)}"])


def clock(seconds: float) -> str:
    """A duration as h:mm:ss."""
    whole = math.ceil(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
