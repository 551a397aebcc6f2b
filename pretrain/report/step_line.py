"""A step in one line, and how long the rest of the run will take."""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from pretrain.config.settings import TrainConfig
from pretrain.schedule import tokens_after

_STEPS_LOOKED_AT = 1_000


class Eta:
    """Time to the end of a run, from what its last steps took with all that stood between them.

    It counts in tokens, so that steps which grow in a warm-up count as what they will be. The first step of an attempt,
    which compiles and allocates, counts only until there is a second one.
    """

    def __init__(self, train: TrainConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._train, self._clock = train, clock
        self._ends: deque[tuple[float, int]] = deque(maxlen=_STEPS_LOOKED_AT)

    def after(self, step: int, seconds: float) -> float:
        """Seconds to the end of the run.

        Args:
            step: Done now.
            seconds: That it took.
        """
        tokens = tokens_after(step, self._train)
        if not self._ends:
            self._ends.append((self._clock(), tokens))
            begun, before = self._ends[0][0] - seconds, tokens_after(step - 1, self._train)
        else:
            begun, before = self._ends[0]
            self._ends.append((self._clock(), tokens))
        rate = (self._ends[-1][0] - begun) / max(1, tokens - before)
        return max(0.0, rate * (tokens_after(self._train.steps, self._train) - tokens))

    def rewound(self) -> None:
        """The run has gone back to an earlier step; what it took to get there says nothing of what is to come."""
        self._ends.clear()


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
