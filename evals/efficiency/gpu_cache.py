"""Compiles the memory's kernels for an H100 or H200 where there is none: `python -m evals.efficiency.gpu_cache DIR`.

It takes some ten minutes of a core, which a lent machine need not spend. There, `TRITON_CACHE_DIR=DIR bash
launch/gpu_check.sh` finds them if the Triton is the same to the byte, that of the same Python: `gpu_jobs facts` prints
`triton_key_sha256` here and there. Scans behind DIR, such as B1-T4096-H24-D64-L2-F256-b16, are compiled alone, in place
of those of the check and of its models' memories.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch


class Hopper:
    """As much of a driver of Triton as compiling asks for."""

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Any."""
        return 0

    def get_current_target(self) -> Any:
        """Compute capability 9.0, warps of 32 threads."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def compile_for_hopper(launched: Callable[..., Any]) -> None:
    """From here on launches of kernels compile and run nothing, on tensors of the CPU; their results are any numbers.

    Args:
        launched: Called in place of a launch, with kernel, grid, arguments and named ones.
    """
    import triton
    from triton.runtime.driver import driver

    from titans_mcore import kernels
    from titans_mcore.kernels import fused

    def launcher(function: Any, grid: object) -> Callable[..., None]:
        return lambda *arguments, **named: launched(function, grid, arguments, named)

    driver.set_active(Hopper())
    triton.runtime.JITFunction.__getitem__ = launcher
    fused.fused_fits = kernels.fused_fits = lambda *_: ""


def main() -> None:
    """Compiles with wgmma and without, in a process each."""
    folder, *names = sys.argv[1:] or ["-"]
    if folder.startswith("-"):
        sys.exit("error: give a folder for the kernels: python -m evals.efficiency.gpu_cache DIR [SCAN ...]")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(Path(folder).resolve())
    code = "import sys; from evals.efficiency.gpu_cache import compile_all; compile_all(sys.argv[1:])"
    running = [
        subprocess.Popen([sys.executable, "-c", code, *names], env=environment | {"DISABLE_MMA_V3": value})
        for value in ("0", "1")
    ]
    statuses = [process.wait() for process in running]
    print(f"{len(list(Path(folder).rglob('*.cubin')))} kernels in {folder}")
    sys.exit(any(statuses))


def compile_all(names: Sequence[str]) -> None:
    """Every kernel that these scans launch, forward and backward; without names those of the check."""
    from evals.efficiency import gpu, gpu_jobs
    from titans_mcore.mixers.mag import MagMixer
    from titans_mcore.mixers.parts import Parts

    compile_for_hopper(
        lambda function, grid, arguments, named: function.run(*arguments, grid=grid, warmup=True, **named)
    )
    for name in names or gpu.SCANS:
        length = f"-T{2 * gpu_jobs.scan_case(name, setting='fused', dtype='bfloat16').chunk}-"
        gpu_jobs.gradients(re.sub(r"-T\d+-", length, name))  # lengths are no constants of the code
    if not names:
        size = ("--model.num-layers", "1", "--model.dim", "128", "--model.num-heads", "2")
        config = replace(gpu_jobs.run_config("mag_340m", *size).model, memory_backend="fused")
        tokens = torch.zeros(1, 64, config.dim, dtype=torch.bfloat16, requires_grad=True)
        MagMixer(config, Parts(config)).bfloat16()(tokens, None)[0].sum().backward()


if __name__ == "__main__":
    main()
