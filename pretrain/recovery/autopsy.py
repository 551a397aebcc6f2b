"""What a run leaves that stops because of bad steps: RUN/autopsy/step-00000041/.

checkpoint/     the state before the step: bad steps in a row leave no trace in the weights
autopsy.json    why the run stopped, the documents of the batch, and the command that does the step again in one
                process, and says where the first number that is not finite comes up (pretrain.replay)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.checkpoint.format import step_name

AUTOPSY_FILE = "autopsy.json"
CHECKPOINT = "checkpoint"


def autopsy_folder(run_dir: Path, step: int) -> Path:
    """Where the autopsy of a step lies."""
    return run_dir / "autopsy" / step_name(step)


class NonfiniteWatch:
    """Notes the first modules whose output, or the gradient of it, is not finite."""

    def __init__(self) -> None:
        self.forward = ""
        """The first one in the order of the forward pass, and what was not finite."""
        self.backward = ""
        """The first one in the order of the backward pass."""

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator["NonfiniteWatch"]:
        """Looks at all that passes inside the `with`; it waits for the device at every module."""
        names = {module: name or "the model" for name, module in model.named_modules()}
        handles = [module.register_forward_hook(self._look(name)) for module, name in names.items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not self.forward and (words := nonfinite(tensor)):
                    self.forward = f"{name} ({type(module).__name__}): {words} of its output"
                if tensor.requires_grad:
                    tensor.register_hook(gradient_hook(type(module).__name__))

        def gradient_hook(kind: str) -> Any:
            def look(gradient: Tensor) -> None:
                if not self.backward and (words := nonfinite(gradient)):
                    self.backward = f"{name} ({kind}): {words} of the gradient of its output"

            return look

        return hook


def nonfinite(tensor: Tensor) -> str:
    """How many numbers are not finite, in words; empty when all are."""
    count = int((~torch.isfinite(tensor)).sum())
    return f"{count:,} of {tensor.numel():,} numbers" if count else ""


def _tensors(output: Any) -> Sequence[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in _tensors(part)]
    return []
