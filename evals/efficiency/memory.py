"""The measurement of the memory: the cases, each in a process of its own, and the report.

A row for every case, whatever becomes of it.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from evals.command_line import EvaluationError, python_path, say
from evals.efficiency import MemorySettings
from evals.efficiency.worker import BOTH, FORWARD, OURS, TITANS_PYTORCH, Case, Limits
from evals.measure import circumstances
from evals.report import bytes_text, table, write_bytes, write_json

_START_SECONDS = 300.0  # beside a case's limit: importing torch takes long on a busy machine
_ORACLE_LENGTH = 256  # tokens; the literal loop is a reference, not a contender
# On two CPU cores: T, titans-pytorch's setting, how much longer it is to take and how much more memory.
_TARGETS = (
    (256, "chunk_size=1 batch_size=16", 100, 30),
    (256, "chunk_size=1 batch_size=None", 100, 30),
    (4_096, "chunk_size=16 batch_size=16", 30, 4),
    (4_096, "chunk_size=16 batch_size=None", 8, 4),
)
_REPEAT_SECONDS = 1.0
_MOST_MEMORY = {256: 26.7e6, 4_096: 186e6}  # bytes by T: what a layer took in torch operations
_COMPARED = """Every case runs in a process of its own. On a CPU the repeats of cases of one length take turns, so that
what else the machine does hits all alike; a repeat is as many runs as take a second, or one, and the median of the
repeats counts. Threads spin while they wait, as torch has it. Peak memory is what the first two full-size runs take
above the process with its libraries, inputs and parameters: resident memory on a CPU, allocated memory on a GPU. Inputs
and parameters are random; denormals are flushed.

- titans-mcore layer: pre-norm, projections, convolution, gates per token, head and weight matrix, the memory,
  output norm and gate, output projection; no persistent tokens. scan: `memory_scan` alone, by backend.
- titans-pytorch layer: its `NeuralMemory` with its own pre-norm, projections and output projection, the same heads and
  the same memory network, momentum and forgetting on, a learning rate per weight matrix. It has one momentum and one
  forgetting gate per head, not per weight matrix, and no convolution.
  `chunk_size` is how many tokens share a gate and an update (1: per token, as ours; more: pooled, and a read sees the
  memory of an earlier chunk). `batch_size` is how many share the weights at which gradients are taken:
  `batch_size` = b is our recurrence, the like-for-like setting; with None, its default, all gradients of a sequence are
  taken at the first weights, which is less work and another function."""


def measure(settings: MemorySettings) -> str:
    """Measures and writes memory.json and memory.md.

    Returns:
        What memory.md holds.

    Raises:
        EvaluationError: There is no such device, or --only leaves nothing.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise EvaluationError("--device cuda, but torch finds no GPU; give --device cpu")
    device = "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"
    cases = plan(settings, device)
    if not cases:
        raise EvaluationError(f"--only {' '.join(settings.only)} matches no case; see the names in a memory.json")
    settings.output.mkdir(parents=True, exist_ok=True)
    limits = Limits(
        repeats=2 if settings.quick else settings.repeats,
        repeat_seconds=0.0 if settings.quick else _REPEAT_SECONDS,
        threads=settings.threads,
        seconds=settings.limit_seconds,
        gigabytes=settings.limit_gigabytes,
    )
    report = {**circumstances(settings, device), "rows": list[dict[str, Any]]()}
    for group in _groups(cases, device):
        say(f"{len(report['rows'])} of {len(cases)} cases done; {len(group)} at T = {group[0].length:,}")
        report["rows"] += run_cases(group, limits)  # what is finished is written, whatever becomes of the rest
        write_json(settings.output / "memory.json", report)
        write_bytes(settings.output / "memory.md", markdown(report).encode())
    return markdown(report)


def plan(settings: MemorySettings, device: str) -> list[Case]:
    """The cases of a run.

    Args:
        settings: What is asked for; `quick` makes the shapes tiny.
        device: "cpu" or "cuda".
    """
    gpu = device == "cuda"
    shape = (settings.batch or (4 if gpu else 1), settings.heads or (24 if gpu else 4), settings.width)
    expansion = settings.expansion or (4 if gpu else 2)
    lengths = sorted(set(settings.lengths))
    if settings.quick:
        shape, expansion, lengths = (1, 2, 8), 2, [4 * settings.chunk_size]
    batch, heads, width = shape
    base = Case(
        implementation=OURS,
        part="layer",
        setting="auto",
        direction=FORWARD,
        batch=batch,
        length=0,
        heads=heads,
        width=width,
        depth=settings.depth,
        expansion=expansion,
        chunk=settings.chunk_size,
        gates=1,
        dtype="bfloat16" if gpu else "float32",
        device=device,
    )
    every = (case for length in lengths for case in _side_by_side(replace(base, length=length)))
    return [case for case in every if not settings.only or any(word in case.name for word in settings.only)]


def _side_by_side(base: Case) -> Iterator[Case]:
    """This project's backends, and titans-pytorch's settings: gates per token or chunk, gradients frozen or not."""
    for direction in (FORWARD, BOTH):
        case = replace(base, direction=direction)
        yield case
        yield replace(case, part="scan", setting="auto")
        yield replace(case, part="scan", setting="chunked")
        if base.device == "cpu":
            yield replace(case, setting="chunked")
            yield replace(case, part="scan", setting="native")
        if base.length <= _ORACLE_LENGTH:
            yield replace(case, part="scan", setting="oracle")
        theirs = replace(case, implementation=TITANS_PYTORCH)
        for gates in (1, base.chunk):
            for chunk in (base.chunk, 0):
                setting = f"chunk_size={gates} batch_size={chunk or None}"
                yield replace(theirs, setting=setting, gates=gates, chunk=chunk)


def _groups(cases: Sequence[Case], device: str) -> list[list[Case]]:
    """Cases that take turns. A GPU is nobody else's, and what those that wait would hold of its memory is much."""
    if device == "cuda":
        return [[case] for case in cases]
    return [[case for case in cases if case.length == length] for length in dict.fromkeys(x.length for x in cases)]


def run_cases(cases: Sequence[Case], limits: Limits) -> list[dict[str, Any]]:
    """Measures cases: each one's process warms up and stops, and the repeats go round.

    Returns:
        For each the case itself, `status` ("measured", "out of memory", "not run", "failed"), and either numbers or a
        `reason`.
    """
    processes: list[subprocess.Popen[str]] = []
    try:
        for case in cases:
            processes.append(_started(case, limits))
            _wait(processes[-1], _START_SECONDS + limits.seconds)
        for process in limits.repeats * processes:
            process.send_signal(signal.SIGCONT)
            _wait(process, limits.seconds)
        rows = []
        for case, process in zip(cases, processes, strict=True):
            out, errors = process.communicate()
            found = json.loads(out) if out.endswith("}\n") else _crashed(process.returncode, errors, limits)
            rows.append({"name": case.name, **asdict(case), **found})
        return rows
    finally:
        for process in processes:
            process.kill()


def _started(case: Case, limits: Limits) -> "subprocess.Popen[str]":
    words = [json.dumps(asdict(case)), json.dumps(asdict(limits))]
    own = {"OMP_NUM_THREADS": str(limits.threads), "PYTHONPATH": python_path()}
    # One at a time computes: threads may spin while they wait, which is torch's default and not this project's.
    others = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    return subprocess.Popen(
        [sys.executable, "-m", "evals.efficiency.worker", *words],
        env={**others, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def _wait(process: "subprocess.Popen[str]", seconds: float) -> None:
    """Until a process has stopped itself or ended; one that takes longer is ended as if by its own alarm."""
    deadline, stopped = time.monotonic() + seconds, os.WSTOPPED | os.WNOWAIT | os.WNOHANG
    while process.poll() is None and not os.waitid(os.P_PID, process.pid, stopped):
        if time.monotonic() > deadline:
            process.send_signal(signal.SIGALRM)
        time.sleep(0.01)


def _crashed(status: int, errors: str, limits: Limits) -> dict[str, Any]:
    """How a process ended without a last word: mostly it was killed for memory."""
    if status == -signal.SIGALRM:
        return {"status": "not run", "reason": f"takes more than --limit-seconds {limits.seconds:g}"}
    if status == -signal.SIGKILL:
        return {"status": "out of memory", "reason": "the system killed the process"}
    last = (errors.strip().splitlines() or ["no message"])[-1][:200]
    return {"status": "failed", "reason": f"the process ended with status {status}: {last}"}


def markdown(report: dict[str, Any]) -> str:
    """memory.md from the report."""
    versions = {row["version"] for row in report["rows"] if row.get("version")}
    facts = {name: report[name] for name in ("device", "threads", "torch")}
    facts |= {"titans-pytorch": ", ".join(sorted(versions)) or "not measured"}
    facts |= {"commit": report["commit"] or "unknown", "date": report["date"]}
    parts = ["# Efficiency of the neural memory", f"`{report['command']}`"]
    parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    parts.append("## What is compared\n\n" + _COMPARED)
    for length in dict.fromkeys(row["length"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["length"] == length]
        first = rows[0]
        shape = f"B = {first['batch']}, H = {first['heads']}, D = {first['width']}, L = {first['depth']}"
        notes = "".join(f"\n- {note}" for note in _notes(rows))
        lines = table(("", "direction", "tokens/s", "ms", "peak memory"), list(map(_cells, rows)))
        parts.append(f"## T = {length:,} ({shape}, {first['dtype']})\n\n```text\n{lines}\n```{notes}")
    if targets := list(_targets(report["rows"])):
        what = f"Forward and backward of a layer on two CPU cores, {TITANS_PYTORCH} over {OURS}; then of {OURS} alone."
        lines = table(("", "quantity", "aimed at", "this run", ""), targets)
        parts.append(f"## Targets\n\n{what}\n\n```text\n{lines}\n```")
    if report["device_kind"] != "cuda":
        parts.append("## GPU\n\nnot measured: no GPU")
    return "\n\n".join(parts) + "\n"


def _targets(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    measured = {
        (row["length"], row["setting"]): row
        for row in rows
        if (row["part"], row["direction"], row["status"], row["device"]) == ("layer", BOTH, "measured", "cpu")
    }
    for length, setting, longer, larger in _TARGETS:
        ours, theirs = measured.get((length, "auto")), measured.get((length, setting))
        if ours is None or theirs is None:
            continue
        in_turn = zip(theirs["all_seconds"], ours["all_seconds"], strict=False)
        found = statistics.median(a / b for a, b in in_turn), theirs["peak_bytes"] / ours["peak_bytes"]
        for what, wanted, ratio in zip(("time", "peak memory"), (longer, larger), found, strict=True):
            reached = "reached" if ratio >= wanted else "missed"
            yield [f"T = {length:,}, {setting}", what, f">= {wanted}x", f"{ratio:.1f}x", reached]
    for length, most in _MOST_MEMORY.items():
        if ours := measured.get((length, "auto")):
            found_bytes, reached = ours["peak_bytes"], "reached" if ours["peak_bytes"] <= most else "missed"
            yield [f"T = {length:,}", "peak memory", f"<= {bytes_text(most)}", bytes_text(found_bytes), reached]


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [f"{row['implementation']} {row['part']} {row['setting']}", row["direction"]]
    if row["status"] != "measured":
        return [*cells, row["status"], "", ""]
    return [*cells, f"{row['tokens_per_second']:,.0f}", f"{1000 * row['seconds']:,.1f}", bytes_text(row["peak_bytes"])]


def _notes(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if row["reason"] is not None:
            yield f"{row['name']}: {row['status']}: {row['reason']}"
        elif not row["finite"]:
            yield f"{row['name']}: its result has NaN or infinite numbers"
