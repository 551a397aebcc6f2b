"""Accelerators that a plan can be made for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """What a plan needs to know of one.

    Attributes:
        flops: Dense bf16 operations a second of its matrix units, from the manufacturer; half of the figure with
            sparsity where only that is printed.
        memory_bytes: Its memory.
        network_bytes: What one of them sends to another host in a second, with one adapter each.
        source: Where these stand.
    """

    flops: float
    memory_bytes: float
    network_bytes: float
    source: str


_HDR, _NDR = 25e9, 50e9  # NVIDIA InfiniBand at 200 and 400 Gb/s: the adapters of a DGX A100, and of H100 to B200

GPUS = {
    "a100": Gpu(312e12, 80e9, _HDR, "NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM: BF16 312 TFLOPS dense"),
    "h100": Gpu(989.5e12, 80e9, _NDR, "NVIDIA H100 Tensor Core GPU data sheet, SXM: BF16 1,979 TFLOPS with sparsity"),
    "h200": Gpu(989.5e12, 141e9, _NDR, "NVIDIA H200 Tensor Core GPU data sheet, SXM: BF16 1,979 TFLOPS with sparsity"),
    "b200": Gpu(2.25e15, 180e9, _NDR, "NVIDIA DGX B200 data sheet: 8 GPUs, BF16 36 PFLOPS with sparsity, 1,440 GB"),
}
