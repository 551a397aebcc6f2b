"""The report in words and tables: memory.md."""

from collections.abc import Iterator, Sequence
from typing import Any

from evals.report import bytes_text, table

Row = dict[str, Any]
_COMPARED = """Every case runs in a process of its own; the repeats of cases that stand in one table take turns, and the
median counts. Peak memory is what the first two full-size runs take above the process with its libraries, inputs and
parameters: resident memory on a CPU, allocated memory on a GPU. Inputs and parameters are random; denormals are
flushed.

- titans-mcore layer: pre-norm, projections, convolution, gates per token, head and weight matrix, the memory,
  output norm and gate, output projection; no persistent tokens. scan: `memory_scan` alone, by backend. On random
  tokens the memory's bounds act in nearly every chunk; "gentle" is the scan with steps so small that none acts.
- titans-pytorch layer: its `NeuralMemory` with its own pre-norm, projections and output projection, the same heads and
  the same memory network, momentum and forgetting on, a learning rate per weight matrix. It has one momentum and one
  forgetting gate per head, not per weight matrix, and no convolution.
  `chunk_size` is how many tokens share a gate and an update (1: per token, as ours; more: pooled, and a read sees the
  memory of an earlier chunk). `batch_size` is how many share the weights at which gradients are taken:
  `batch_size` = b is our recurrence, the like-for-like setting; with None, its default, all gradients of a sequence are
  taken at the first weights, which is less work and another function.
- FLOP/s count what the dual form needs (titans_mcore/mixers/costs.py), recomputation not counted, and are compared
  with one large matrix product."""


def markdown(report: dict[str, Any]) -> str:
    """memory.md from the report."""
    others = [row for row in report["rows"] if row["implementation"] == "titans-pytorch"]
    versions = {row["version"] for row in others if row.get("version")}
    facts = [
        ("device", report["device"]),
        ("threads", report["threads"]),
        ("torch", report["torch"]),
        ("titans-pytorch", ", ".join(sorted(versions)) or "not measured"),
        ("commit", report["commit"] or "unknown"),
        ("date", report["date"]),
        ("large matrix product", _flops_text(report["matmul_ceiling_flops_per_second"])),
    ]
    parts = ["# Efficiency of the neural memory", f"`{report['command']}`"]
    parts.append("\n".join(f"- {name}: {value}" for name, value in facts))
    parts.append("## What is compared\n\n" + _COMPARED)
    header = ("", "L", "T", "direction", "tokens/s", "ms", "peak memory", "FLOP/s", "of matmul")
    for title, rows in _sections(report["rows"]):
        notes = "".join(f"\n- {note}" for note in _notes(rows))
        parts.append(f"## {title}\n\n```text\n{table(header, list(map(_row_cells, rows)))}\n```{notes}")
    if report["device_kind"] != "cuda":
        parts.append("## GPU\n\nnot measured: no GPU")
    return "\n\n".join(parts) + "\n"


def _sections(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Titles and the rows that took turns."""
    titles: dict[str, list[Row]] = {}
    for row in rows:
        shape = f"B = {row['batch']}, H = {row['heads']}, D = {row['width']}, {row['dtype']}"
        length = "" if row["section"] == "growth" else f", T = {row['length']:,}"
        titles.setdefault(f"{row['section']}{length} ({shape})", []).append(row)
    yield from titles.items()


def _row_cells(row: Row) -> list[str]:
    cells = [row["label"], str(row["depth"]), f"{row['length']:,}", row["direction"]]
    if row["status"] != "measured":
        return [*cells, row["status"], "", "", "", ""]
    achieved = row.get("flops_per_second")
    share = "" if achieved is None else f"{row['share_of_matmul_ceiling']:.1%}"
    numbers = [f"{row['tokens_per_second']:,.0f}", f"{1000 * row['seconds']:,.1f}", bytes_text(row["peak_bytes"])]
    return [*cells, *numbers, "" if achieved is None else _flops_text(achieved), share]


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row["reason"] is not None:
            yield f"{row['name']}: {row['status']}: {row['reason']}"
        elif not row["finite"]:
            yield f"{row['name']}: its result has NaN or infinite numbers"


def _flops_text(flops_per_second: float) -> str:
    unit, size = ("TFLOP/s", 1e12) if flops_per_second >= 1e12 else ("GFLOP/s", 1e9)
    return f"{flops_per_second / size:.1f} {unit}"
