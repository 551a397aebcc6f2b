"""Compile for sm_90 every kernel that scans, or a layer, launch with their gradients, without a GPU: test_compile.py.

The launches are the real ones, up to the point where Triton would hand machine code to a device. A line of JSON for
each variant that was compiled says what it is and what ptxas found.
"""

import contextlib
import io
import json
import math
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton

from evals.efficiency.gpu_cache import compile_for_hopper
from titans_mcore.config import TitansConfig
from titans_mcore.memory import PackedRows
from titans_mcore.memory.triton_faults import FAULTS, avoid
from titans_mcore.mixers.mag import MagMixer
from titans_mcore.mixers.parts import Parts

from .problems import Problem, Sizes, by_kernels, make_problem, with_gradients

CHAINED = ("walk", "chain_backward", "anchors_backward")
_LABEL = re.compile(r"\.L_x_\d+")
_PTXAS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads\s.*?Used (\d+) registers", re.S)


def main(dtype: str, documents: bool, guarded: bool, scans: list[dict[str, Any]], batches: list[list[int]]) -> None:
    """Compiles what these scans, or a layer with batches of (B, T), launch one after the other in one process.

    With `guarded` as on a GPU where this Triton is known to be wrong.
    """
    compile_for_hopper(compiling)
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # what comes from a cache has not been through ptxas
    if guarded:
        avoid(FAULTS[0])
    for sizes in scans:
        problem = make_problem(Sizes(**sizes)).cast(getattr(torch, dtype), "cpu")
        if documents:
            begin_documents(problem)
        with torch.no_grad():  # nothing is run, so every number is whatever lay there
            by_kernels(problem)
        with_gradients(by_kernels, problem)
    if batches:
        train_layer(batches)


def train_layer(batches: list[list[int]]) -> None:
    """A MAG layer whose memory is as small as kernels take it; every batch without documents and with some."""
    memory = {"memory_head_dim": 16, "memory_expansion": 2, "memory_backend": "fused"}
    config = TitansConfig("mag", dim=32, num_heads=2, persistent_tokens=8, window=32, **memory)  # type: ignore[arg-type]
    layer = MagMixer(config, Parts(config)).bfloat16()
    for rows, length in batches:
        starts = torch.zeros(rows, length, dtype=torch.bool)
        starts[-1, length // 3] = True
        tokens = torch.zeros(rows, length, 32, dtype=torch.bfloat16, requires_grad=True)
        for documents in (None, PackedRows(starts)):
            layer(tokens, None, documents)[0].sum().backward()


def begin_documents(problem: Problem) -> None:
    problem.restarts = torch.zeros(problem.chunks, problem.sizes.batch, dtype=torch.bool)
    problem.restarts[-1] = True
    problem.closed = ~problem.restarts


def compiling(function: Any, grid: object, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """What a launch does here."""
    known = len(function.device_caches[0][0])
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = function.run(*arguments, grid=grid, warmup=True, **named)
    if len(function.device_caches[0][0]) > known:
        name = function.__name__.removesuffix("_kernel")
        found = properties(compiled, log.getvalue()) | of_a_chunk(compiled, named, chained=name in CHAINED)
        print(json.dumps({"kernel": name, **found}), flush=True)


def properties(compiled: Any, log: str) -> dict[str, int]:
    """What is known of machine code without running it; barriers and wgmma are counted as they are written."""
    stores, loads, registers = map(int, _PTXAS.search(log).groups())  # type: ignore[union-attr]
    ptx = compiled.asm["ptx"]
    return {
        "bytes": len(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "registers": registers,
        "spill_stores": stores,
        "spill_loads": loads,
        "barriers": ptx.count("bar.sync"),
        "wgmma": ptx.count("wgmma.mma_async"),
    }


def of_a_chunk(compiled: Any, named: dict[str, Any], *, chained: bool) -> dict[str, int]:
    """Barriers that a chunk waits at, and bytes that all its threads spill, store and load, from the machine code.

    What stands in a loop counts as often as the loop turns: one with matrix products goes over tiles, another one with
    barriers over tokens, and what has neither is the state shell, which seldom acts. Where a kernel is `chained` its
    widest loop goes over chunks.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
    jumps = [(labels[to[0]], at) for at, one in enumerate(code) if "BRA" in one and (to := _LABEL.findall(one))]
    ends = {begin: max(at for to, at in jumps if to == begin) for begin, end in jumps if begin < end}
    loops = sorted(ends.items(), key=lambda loop: loop[1] - loop[0])[: -1 if chained else None]
    begin, end = max(ends.items(), key=lambda loop: loop[1] - loop[0]) if chained else (0, len(code))
    turns = []
    for first, behind in loops:
        body = " ".join(code[first:behind])
        turns.append(named["tiles"] if "MMA" in body else named["BLOCK"] - 1 if "BAR.SYNC" in body else 0)
    barriers = spilled = 0
    for at in range(begin, end):
        times = math.prod(n for n, (first, behind) in zip(turns, loops, strict=True) if first <= at <= behind)
        barriers += times * ("BAR.SYNC" in code[at])
        if spill := re.search(r"\b(?:STL|LDL)(\.\d+)?", code[at]):
            spilled += times * int((spill[1] or ".32")[1:]) // 8
    return {"waits": barriers, "spilled": spilled * 32 * compiled.metadata.num_warps}


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
