"""How much of the hardware a step uses: model FLOP utilisation, and the memory that it needed.

    MFU = operations of the step's forward and backward pass / (seconds x processes x peak)

Operations are those of `plan.step_time.step_flops`, of the step's own batch and rows: matrix products, attention over
the keys that the mask lets be seen in a row of one document, and the products of memories and scans; what recomputation
does a second time is no work of the model's. The peak is the dense bf16 one of `plan.hardware.GPUS`, whatever the
precision. `tests/pretrain/test_throughput.py` holds the operations against torch's counter. On a CPU, or a GPU that is
not in the table, there is no MFU.
"""

import re
from dataclasses import replace
from pathlib import Path

import torch

from pretrain.config.run_config import RunConfig
from pretrain.plan.parameters import Parameter, parameters_of
from pretrain.plan.step_time import GPUS, Gpu, step_flops
from pretrain.schedule import Portion, portion_of

_PAGE_FILE = Path("/proc/self/statm")
_PAGE_BYTES = 4096


class MfuMeter:
    """Model FLOP utilisation of a run's steps."""

    def __init__(self, config: RunConfig, processes: int, gpu: Gpu | None) -> None:
        """Counts a model's operations once, if they will be needed.

        Args:
            config: Of the run.
            processes: GPUs that compute a step together.
            gpu: What each of them is; None leaves the utilisation out.
        """
        self._config, self._processes, self._gpu = config, processes, gpu
        self._parameters: list[Parameter] = [] if gpu is None else parameters_of(config.model)
        self._flops: dict[tuple[int, int], int] = {}

    @classmethod
    def here(cls, config: RunConfig, processes: int) -> "MfuMeter":
        """For the GPU of this process."""
        return cls(config, processes, gpu_named(torch.cuda.get_device_name()) if torch.cuda.is_available() else None)

    def mfu(self, step: int, seconds: float) -> float | None:
        """Utilisation of a step counted from 1, 0 to 1; None where no peak is known."""
        if self._gpu is None:
            return None
        portion = portion_of(step, self._config.train)
        shape = portion.samples, portion.row_length
        if shape not in self._flops:
            self._flops[shape] = flops_of_portion(self._config, portion, self._parameters)
        return self._flops[shape] / (seconds * self._processes * self._gpu.flops)


def flops_of_portion(config: RunConfig, portion: Portion, parameters: list[Parameter]) -> int:
    """Operations of a step on all ranks, forward and backward, with the batch and the rows that it has."""
    cuts = config.train.sequence_length // portion.row_length
    train = replace(
        config.train,
        global_batch=portion.samples * cuts,
        micro_batch=config.train.micro_batch * cuts,
        sequence_length=portion.row_length,
        batch_warmup_from=0,
        batch_warmup_tokens=0,
        sequence_warmup_from=0,
        sequence_warmup_tokens=0,
    )
    return step_flops(replace(config, train=train), parameters)["total"]


def gpu_named(name: str) -> Gpu | None:
    """The GPU of a device's name, as in "NVIDIA H100 80GB HBM3"; None for what the table does not have.

    H100 and H200 on cards for PCIe are slower than the table's SXM modules; A100 are equally fast.
    """
    found = re.search(r"\b(A100|H100|H200|B200)\b", name)
    if not found or (found[1] in ("H100", "H200") and re.search(r"PCIe|NVL", name, re.IGNORECASE)):
        return None
    return GPUS[found[1].lower()]


def memory_bytes() -> int | None:
    """The largest GPU memory that this process's tensors had so far; without a GPU its resident memory now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return int(_PAGE_FILE.read_text().split()[1]) * _PAGE_BYTES if _PAGE_FILE.exists() else None
