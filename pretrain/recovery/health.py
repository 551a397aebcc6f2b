"""Bad steps: which ones are, whether their update happens, what follows, and which checkpoints have proven good.

Health is a function of numbers that all ranks share, so that all of them come to the same decision.

A step whose loss or gradient is not a number must leave weights and moments as they are. UpdateGate decides it where
the gradients are, by selection: multiplying the update with 0 would not do it, as 0 x NaN is NaN. AdamW's fused kernels
take a number on the device, `found_inf`, and touch nothing where it is 1; nobody has to wait for it on the host.
"""

import math
import statistics
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.config.settings import HealthConfig

Action = Literal["go on", "note", "skip", "rewind", "stop"]
_NORMAL = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation."""


@dataclass(frozen=True)
class Verdict:
    """What a step was, and what follows."""

    action: Action
    """go on: a good step; note, skip: the run goes on after a bad one; rewind, stop: it does not."""
    reason: str = ""
    """What was bad, as a part of a sentence."""


@dataclass
class Health:
    """The run's record of good and bad steps.

    Attributes:
        updates: Updates of the weights so far; the learning rate follows them.
        left_out: Steps so far whose update was left out.
        bad_in_a_row: Bad steps up to now.
        first_bad: First of them, while there are some.
        last_bad: Last bad step; 0 before there is one.
        losses: Of the latest good steps.
    """

    settings: HealthConfig
    updates: int = 0
    left_out: int = 0
    bad_in_a_row: int = 0
    first_bad: int = 0
    last_bad: int = 0
    losses: deque[float] = field(default_factory=deque)

    def usual_limit(self) -> float:
        """The loss above which a step is a spike; infinite while too few steps are known."""
        if len(self.losses) < self.settings.spike_window:
            return math.inf
        median = statistics.median(self.losses)
        deviation = _NORMAL * statistics.median(abs(loss - median) for loss in self.losses)
        return median + max(self.settings.spike_nats, self.settings.spike_deviations * deviation)

    def update_limit(self) -> float:
        """The loss above which an update is left out."""
        return math.inf if self.settings.spike == "note" else self.usual_limit()

    def judge(self, step: int, loss: float, grad_norm: float, updated: bool) -> Verdict:
        """Notes a step and says what follows from it.

        Args:
            step: Counted from 1.
            loss: Of the global batch, before the update.
            grad_norm: Of the whole gradient; infinite where it was not a number.
            updated: Whether the weights changed.
        """
        limit = self.usual_limit()
        if updated:
            self.updates += 1
        else:
            self.left_out += 1
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
            return self._bad(step, self.settings.nonfinite, what)
        if loss > limit and self.settings.spike != "note":
            return self._bad(step, self.settings.spike, f"the loss of {loss:.4f} is above the usual {limit:.4f}")
        self.bad_in_a_row, self.first_bad = 0, 0
        self.losses.append(loss)
        while len(self.losses) > self.settings.spike_window:
            self.losses.popleft()
        if loss > limit:
            # It joins the usual ones: what is only noted may be how the data is from here on.
            self.last_bad = step
            return Verdict("note", f"the loss of {loss:.4f} is above the usual {limit:.4f}")
        return Verdict("go on")

    def has_proven(self, step: int, updates: int) -> bool:
        """Whether what came after a checkpoint makes it a healthy one.

        Args:
            step: Of the checkpoint.
            updates: Updates of the weights up to it.
        """
        return self.last_bad <= step and self.updates - updates >= self.settings.healthy_after_steps

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint; floats are written exactly by JSON."""
        state = {name: value for name, value in asdict(self).items() if name != "settings"}
        return {**state, "losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a checkpoint's; settings stay."""
        for name, value in state.items():
            setattr(self, name, deque(value) if name == "losses" else value)

    def _bad(self, step: int, action: Action, what: str) -> Verdict:
        self.bad_in_a_row += 1
        self.first_bad = self.first_bad or step
        self.last_bad = step
        if action == "skip" and self.bad_in_a_row >= self.settings.in_a_row:
            return Verdict("stop", f"{what}, and this is bad step {self.bad_in_a_row} in a row")
        return Verdict(action, what)


class UpdateGate:
    """Stands before every update of an engine's AdamW, which has to be a fused one."""

    def __init__(self, engine: Any, device: torch.device) -> None:
        """Opens the gate.

        Args:
            engine: A DeepSpeedEngine; its optimizer is watched from now on.
            device: Where it computes.
        """
        self._zero = engine.optimizer if engine.zero_optimization_stage() else None
        self._closed = torch.zeros((), dtype=torch.bool, device=device)
        self._norm: Tensor | float = 0.0
        engine.basic_optimizer.register_step_pre_hook(self._before_update)

    def judge_loss(self, loss: Tensor, limit: float) -> None:
        """Closes the gate for the next update when a loss is above the limit, or not a number; opens it if not."""
        self._closed = ~torch.isfinite(loss) | (loss > limit)

    def set_norm(self, norm: Tensor) -> None:
        """The gradient's norm of the next update, where DeepSpeed keeps none (ZeRO 0)."""
        self._norm = norm

    def result(self) -> tuple[Tensor, Tensor]:
        """The gradient's norm, infinite where it was not a number, and whether the update was left out."""
        norm = torch.as_tensor(self._norm_now(), device=self._closed.device).float()
        bad = _is_bad(norm)
        return torch.where(bad, torch.inf, norm), self._closed | bad

    def _before_update(self, optimizer: Any, arguments: Any, named: Any) -> None:
        norm = torch.as_tensor(self._norm_now(), device=self._closed.device)
        optimizer.found_inf = (self._closed | _is_bad(norm)).float()

    def _norm_now(self) -> Tensor | float:
        return self._norm if self._zero is None else self._zero._global_grad_norm


def _is_bad(norm: Tensor) -> Tensor:
    return ~torch.isfinite(norm) | (norm < 0)  # DeepSpeed makes a norm that is not a number -1
