"""Compile one kernel for sm_90 and print the bytes of its machine code: see test_compile.py for the arguments."""

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from titans_mcore.kernels import launch
from titans_mcore.kernels.fused import Shape

KERNELS = {
    "scan": launch.scan_kernel,
    "walk": launch.scan_kernel,
    "reads": launch.reads_backward_kernel,
    "chain": launch.chain_backward_kernel,
}
TOKENS = {"queries", "keys", "values", "reads", "of_reads", "of_queries", "of_keys", "of_values"}
OPTIONAL = {"scale", "shift", "kept", "factors", "fresh", "anchors", "of_fresh", "of_anchors", "restarts", "closed"}
OPTIONAL |= {"alike", "aims", "known"}
HOLDING = {"mass", "of_mass", "held"}  # of memories of two matrices
OPTIONAL |= HOLDING
LEFT_OUT = {"scan": ["factors", "narrow", "known", "held"], "walk": ["reads"]}


def signature(kernel: Any, constants: dict[str, Any], tokens: str, optional: bool) -> dict[str, str]:
    """Types of a kernel's arguments; of what is left out or constant it is `constexpr`, the value in `constants`."""
    types = {}
    for name in kernel.arg_names:
        if name in OPTIONAL and not optional:
            constants[name] = None
        if name in constants:
            types[name] = "constexpr"
        elif name in TOKENS:
            types[name] = tokens
        elif name in ("restarts", "closed"):
            types[name] = "*i8"
        elif name.startswith(("stride", "memories", "heads", "tiles", "chunk", "keep_every", "group")):
            types[name] = "i32"
        else:
            types[name] = "i32" if name == "fresh_rows" else "*fp32"
    return types


def main(kernel_name: str, depth: int, width: int, hidden: int, block: int, operands: str, optional: bool) -> None:
    kernel = KERNELS[kernel_name]
    limit = 3.0 if optional else None
    shape = Shape(1, 1, 2, block, width, hidden, depth, residual_norm=optional, exact=optional, rms_limit=limit)
    on_chip = shape.on_chip if kernel_name in LEFT_OUT else shape.gradient_on_chip
    constants = launch.constants(shape, getattr(torch, operands), on_chip)
    constants |= dict.fromkeys(LEFT_OUT.get(kernel_name, ()))
    if depth == 1:
        constants |= dict.fromkeys(HOLDING.intersection(kernel.arg_names))
    if kernel_name != "reads":
        constants |= {"LIMIT": limit, "EXACT": shape.exact, "ON_CHIP": on_chip}
    if constants["tiles"] > 1:
        del constants["tiles"]  # Triton makes a constant of it only where it is 1
    types = signature(kernel, constants, "*bf16" if operands == "bfloat16" else "*fp32", optional)
    pointers = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if types[name][0] == "*"}
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=pointers)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options(shape, on_chip))
    print(len(compiled.asm["cubin"]), compiled.metadata.shared)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6], sys.argv[7] == "all")  # type: ignore[arg-type]
