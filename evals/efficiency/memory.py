"""The measurement of the memory: runs the cases, adds what follows from their numbers, writes the report."""

import statistics
import time
from collections.abc import Iterator

import torch

from evals.command_line import EvaluationError
from evals.efficiency.cases import OURS, Case, plan
from evals.efficiency.circumstances import circumstances
from evals.efficiency.implementations import layer_config
from evals.efficiency.runner import Limits, run_group
from evals.efficiency.settings import MemorySettings
from evals.efficiency.summary import markdown
from evals.efficiency.targets import Row, judge
from evals.progress import StatusLine
from evals.report import write_bytes, write_json


def measure(settings: MemorySettings) -> str:
    """Measures and writes memory.json and memory.md.

    Returns:
        What memory.md holds.

    Raises:
        EvaluationError: There is no such device, or --only leaves nothing.
    """
    device = _device(settings.device)
    groups = plan(settings, device)
    if not groups:
        raise EvaluationError(f"--only {' '.join(settings.only)} matches no case; see the names in a memory.json")
    settings.output.mkdir(parents=True, exist_ok=True)
    ceiling = matmul_ceiling(device, settings.threads, size=256 if settings.quick else None)
    report = {**circumstances(settings, device), "matmul_ceiling_flops_per_second": ceiling}
    rows: list[Row] = []
    for group in _run(groups, settings):  # what is finished is written, whatever becomes of the rest
        rows += [_with_flops(row, ceiling) for row in group]
        targets = [verdict.to_dict() for verdict in judge(rows, device)]
        text = markdown({**report, "rows": rows, "targets": targets})
        write_json(settings.output / "memory.json", {**report, "rows": rows, "targets": targets})
        write_bytes(settings.output / "memory.md", text.encode())
    return text


def matmul_ceiling(device: str, threads: int, size: int | None = None) -> float:
    """Operations a second of a large matrix product, in the dtype of the cases: what could be reached at best."""
    size = size or (8_192 if device == "cuda" else 2_048)
    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[3:])


def flops(row: Row) -> int | None:
    """Operations of one repeat of our rows, recomputation left out; None for others, whose work is another."""
    if row["implementation"] != OURS:
        return None
    from titans_mcore.mixers.costs import memory_flops

    config = layer_config(row["heads"], row["width"], row["depth"], row["expansion"], row["chunk"])
    per_token = memory_flops(config)
    if row["part"] == "layer":  # q, k, v, output gate, gates, output
        per_token += 2 * config.dim * (5 * config.dim + 3 * row["depth"] * row["heads"])
    return row["batch"] * row["length"] * per_token * (3 if "backward" in row["direction"] else 1)


def _run(groups: list[list[Case]], settings: MemorySettings) -> Iterator[list[Row]]:
    repeats = 2 if settings.quick else settings.repeats
    limits = Limits(repeats, settings.threads, settings.limit_seconds, settings.limit_gigabytes)
    line, total, done = StatusLine(), sum(map(len, groups)), 0
    for group in groups:
        line.show(f"{done} of {total} cases done; {len(group)} at T = {group[-1].length:,}")
        yield run_group(group, limits)
        done += len(group)
    line.clear()


def _with_flops(row: Row, ceiling: float) -> Row:
    needed = flops(row)
    if needed is None or row["status"] != "measured":
        return row
    achieved = needed / row["seconds"]
    return {**row, "flops": needed, "flops_per_second": achieved, "share_of_matmul_ceiling": achieved / ceiling}


def _device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise EvaluationError("--device cuda, but torch finds no GPU; give --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
