"""The measurement of the memory: the cases, each in a process of its own, and the report.

A row for every case, whatever becomes of it.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from evals.command_line import EvaluationError, python_path, say
from evals.efficiency import MemorySettings
from evals.efficiency.worker import BOTH, FORWARD, OURS, TITANS_PYTORCH, Case, Limits
from evals.measure import circumstances
from evals.report import bytes_text, table, write_bytes, write_json

Row = dict[str, Any]
_START_SECONDS = 300.0  # beside a case's limit: importing torch takes long on a busy machine
_ORACLE_LENGTH = 256  # tokens; the literal loop is a reference, not a contender
_COMPARED = """Every case runs in a process of its own, one after the other, and the median of its repeats counts. Peak
memory is what the first two full-size runs take above the process with its libraries, inputs and parameters: resident
memory on a CPU, allocated memory on a GPU. Inputs and parameters are random; denormals are flushed.

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
    device = _device(settings.device)
    cases = plan(settings, device)
    if not cases:
        raise EvaluationError(f"--only {' '.join(settings.only)} matches no case; see the names in a memory.json")
    settings.output.mkdir(parents=True, exist_ok=True)
    limits = Limits(
        2 if settings.quick else settings.repeats, settings.threads, settings.limit_seconds, settings.limit_gigabytes
    )
    report = {**circumstances(settings, device), "rows": list[Row]()}
    for number, case in enumerate(cases, 1):
        say(f"{number} of {len(cases)}: {case.name}")
        report["rows"].append(run_case(case, limits))  # what is finished is written, whatever becomes of the rest
        write_json(settings.output / "memory.json", report)
        write_bytes(settings.output / "memory.md", markdown(report).encode())
    return markdown(report)


def _device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise EvaluationError("--device cuda, but torch finds no GPU; give --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


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


def run_case(case: Case, limits: Limits) -> Row:
    """Measures a case: the case itself, `status` ("measured", "out of memory", "not run", "failed"), and either numbers
    or a `reason`."""
    words = [json.dumps(asdict(case)), json.dumps(asdict(limits))]
    # Threads that wait must not spin.
    own = {"OMP_NUM_THREADS": str(limits.threads), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": python_path()}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "evals.efficiency.worker", *words],
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_START_SECONDS + limits.seconds,
        )
    except subprocess.TimeoutExpired:
        found = {"status": "not run", "reason": f"did not start in {_START_SECONDS:g} s"}
    else:
        found = json.loads(done.stdout) if done.stdout.endswith("}\n") else _crashed(done, limits)
    return {"name": case.name, **asdict(case), **found}


def _crashed(done: "subprocess.CompletedProcess[str]", limits: Limits) -> Row:
    """How a process ended without a last word: mostly it was killed for memory."""
    if done.returncode == -signal.SIGALRM:
        return {"status": "not run", "reason": f"takes more than --limit-seconds {limits.seconds:g}"}
    if done.returncode == -signal.SIGKILL:
        return {"status": "out of memory", "reason": "the system killed the process"}
    last = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
    return {"status": "failed", "reason": f"the process ended with status {done.returncode}: {last}"}


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
    if report["device_kind"] != "cuda":
        parts.append("## GPU\n\nnot measured: no GPU")
    return "\n\n".join(parts) + "\n"


def _cells(row: Row) -> list[str]:
    cells = [f"{row['implementation']} {row['part']} {row['setting']}", row["direction"]]
    if row["status"] != "measured":
        return [*cells, row["status"], "", ""]
    return [*cells, f"{row['tokens_per_second']:,.0f}", f"{1000 * row['seconds']:,.1f}", bytes_text(row["peak_bytes"])]


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row["reason"] is not None:
            yield f"{row['name']}: {row['status']}: {row['reason']}"
        elif not row["finite"]:
            yield f"{row['name']}: its result has NaN or infinite numbers"
