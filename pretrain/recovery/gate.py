"""Whether the optimizer's update happens, decided where the gradients are, by selection.

A step whose loss or gradient is not a number must leave weights and moments as they are. Multiplying its update with
0 would not do it: 0 x NaN is NaN. AdamW's fused kernels take a number on the device, `found_inf`, and touch nothing
where it is 1; nobody has to wait for it on the host.
"""

from typing import Any

import torch
from torch import Tensor


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
