"""The kernels compile to machine code for a GPU. That takes no GPU, only a Triton that does not interpret."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Kernel, L, D, F, b, operands: each kernel with its state in registers and streamed, and all that may be left out.
COMPILED = [
    ("scan", 1, 64, 64, 16, "bfloat16", "all"),
    ("scan", 2, 64, 256, 16, "bfloat16", "all"),
    ("scan", 2, 16, 16, 16, "float32", "none"),
    ("walk", 2, 64, 256, 16, "bfloat16", "all"),
    ("reads", 2, 64, 256, 16, "bfloat16", "all"),
    ("reads", 1, 16, 16, 16, "float32", "none"),
    ("chain", 1, 64, 64, 16, "bfloat16", "all"),
    ("chain", 2, 64, 256, 16, "bfloat16", "all"),
    ("chain", 2, 16, 16, 16, "float32", "none"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", COMPILED, ids=lambda a: f"{a[0]}-L{a[1]}-D{a[2]}-F{a[3]}-b{a[4]}-{a[5]}-optional_{a[6]}"
)
def test_kernels_compile_for_hopper(arguments: tuple[object, ...]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_kernel.py")), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 0  # bytes of machine code
