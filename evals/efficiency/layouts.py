"""What layouts cost: traffic of a step by group, counted; bytes on a rank at every ZeRO stage, beside the ideal."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.command_line import EvaluationError
from evals.efficiency.circumstances import circumstances
from evals.efficiency.settings import LayoutsSettings
from evals.report import bytes_text, table, write_bytes, write_json
from titans_mcore.config import VARIANTS

_MODEL: dict[str, Any] = {
    "vocab_size": 1024,
    "num_layers": 2,
    "dim": 256,
    "num_heads": 8,
    "memory_heads": 8,
    "ffn_dim": 512,
    "chunk_size": 32,
    "memory_expansion": 2,
    "persistent_tokens": 16,
    "segment_length": 512,
    "window": 256,
}
# As small as a long row in a test's time asks for; what context ranks send depends on the length in no layer.
_LONG_MODEL = {
    **_MODEL,
    "num_layers": 1,
    "dim": 32,
    "num_heads": 2,
    "memory_heads": 2,
    "ffn_dim": 32,
    "vocab_size": 128,
    "chunk_size": 128,
}
_LENGTH = 1024
_WORDS = {"all_reduce": "all-reduce", "all_gather": "all-gather", "reduce_scatter": "reduce-scatter", "send": "send"}


@dataclass(frozen=True)
class Case:
    """A layout of a model.

    Attributes:
        table: Which of the tables it is for: "traffic", "context" or "zero".
        variant: Of the model.
        name: Of the layout, a column or row of the table.
        processes: Of the run.
        parallel: Its settings of that section.
        length: Tokens of a row.
        model: Its settings of that section, besides the variant.
    """

    table: str
    variant: str
    name: str
    processes: int
    parallel: dict[str, Any]
    length: int
    model: dict[str, Any]

    @property
    def division(self) -> tuple[int, int, int]:
        """Processes, tensor and context: what one start of processes can serve."""
        return self.processes, self.parallel.get("tensor", 1), self.parallel.get("context", 1)

    def tree(self) -> dict[str, Any]:
        """The settings of a run."""
        return {
            "model": {**self.model, "variant": self.variant},
            "train": {
                "sequence_length": self.length,
                "global_batch": 4 if self.table == "zero" else 1,
                "micro_batch": 1,
                "precision": "fp32",
            },
            "parallel": {"zero_stage": 1, **self.parallel},
        }


def cases(settings: LayoutsSettings) -> Iterator[Case]:
    """All that is measured."""
    for variant in VARIANTS:
        for name, parallel in (
            ("heads", {"tensor": 2}),
            ("heads, sequence", {"tensor": 2, "sequence": True}),
            ("hidden", {"tensor": 2, "memory_parallel": "hidden"}),
            ("context", {"context": 2}),
        ):
            if variant != "transformer" or name != "hidden":
                yield Case("traffic", variant, name, 2, parallel, _LENGTH, _MODEL)
        for length in settings.context_lengths:
            yield Case("context", variant, f"{length:,}", 2, {"context": 2}, length, _LONG_MODEL)
    for ranks in (1, 2, 4):
        for stage in range(4):
            yield Case("zero", "mag", f"{ranks} {stage}", ranks, {"zero_stage": stage}, 128, _MODEL)


def measure(settings: LayoutsSettings) -> str:
    """Measures and writes layouts.json and layouts.md.

    Returns:
        The tables.

    Raises:
        EvaluationError: A run failed.
    """
    settings.output.mkdir(parents=True, exist_ok=True)
    by_division: dict[tuple[int, int, int], list[Case]] = {}
    for case in cases(settings):
        by_division.setdefault(case.division, []).append(case)
    rows: list[dict[str, Any]] = []
    for division, members in by_division.items():
        print(f"{len(members)} layouts on {division[0]} processes", file=sys.stderr, flush=True)
        for case, found in zip(members, _run(division, members, settings.threads), strict=True):
            layout = {"table": case.table, "variant": case.variant, "layout": case.name, "length": case.length}
            rows.append({**layout, "processes": case.processes, "parallel": case.parallel, **found})
    write_json(settings.output / "layouts.json", {**circumstances(settings, "cpu"), "model": _MODEL, "rows": rows})
    text = "\n\n".join([_traffic_table(rows), _context_table(rows), _zero_table(rows)])
    write_bytes(settings.output / "layouts.md", f"```text\n{text}\n```\n".encode())
    return text


def _run(division: tuple[int, int, int], members: list[Case], threads: int) -> list[dict[str, Any]]:
    processes, tensor, context = division
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = [folder / f"{index}.json" for index in range(len(members))]
        for file, case in zip(files, members, strict=True):
            file.write_text(json.dumps({"run": case.tree(), "held": case.table == "zero"}))
        output = folder / "found.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        worker = ["-m", "evals.efficiency.layouts_worker", str(output), str(tensor), str(context), *map(str, files)]
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, threads // processes))}
        done = subprocess.run(
            [*torchrun, *rendezvous, *worker], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise EvaluationError(f"{processes} processes failed: {done.stderr.strip()[-2000:]}")
        return json.loads(output.read_text())["cases"]


def _traffic_table(rows: list[dict[str, Any]]) -> str:
    chosen = [row for row in rows if row["table"] == "traffic"]
    lines = []
    for row in chosen:
        for key, size in sorted(row["bytes"].items()):
            group, _, operation = key.partition(" ")
            if group != "data":
                words = [row["variant"], row["layout"], group, _WORDS.get(operation, operation)]
                lines.append([*words, f"{row['calls'][key]:,}", bytes_text(size)])
    head = f"One step of {_MODEL['num_layers']} blocks of width {_MODEL['dim']} on 1 row of {_LENGTH:,} tokens, rank 0"
    return f"{head}\n\n{table(['variant', 'layout', 'group', 'operation', 'calls', 'bytes'], lines)}"


def _context_table(rows: list[dict[str, Any]]) -> str:
    chosen = [row for row in rows if row["table"] == "context"]
    lengths = sorted({row["length"] for row in chosen})
    by_place = {(row["variant"], row["length"]): row["bytes"].get("context send", 0) for row in chosen}
    lines = [
        [variant, *(bytes_text(by_place[variant, length]) for length in lengths)]
        for variant in dict.fromkeys(row["variant"] for row in chosen)
    ]
    head = "What the first of two context ranks sends in a step, by the length of the row"
    return f"{head}\n\n{table(['variant', *(f'{length:,}' for length in lengths)], lines)}"


def _zero_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in (row for row in rows if row["table"] == "zero"):
        ranks, stage = map(int, row["layout"].split())
        ideal = ideal_bytes(row["numbers"], ranks, stage)
        cells = [
            f"{bytes_text(row['held'][part])} ({row['held'][part] / ideal[part]:.2f})"
            for part in ("weights", "gradients", "optimizer")
        ]
        lines.append([str(ranks), str(stage), *cells])
    head = "Bytes on a rank before the update, fp32, over the ideal in brackets"
    return f"{head}\n\n{table(['data ranks', 'ZeRO', 'weights', 'gradients', 'optimizer'], lines)}"


def ideal_bytes(numbers: int, ranks: int, stage: int) -> dict[str, float]:
    """Bytes of N fp32 numbers on each of d ranks: 4 N of weights, 4 N of gradients, 8 N of moments (12 N with masters).

    A stage divides by d what it shares. DeepSpeed keeps masters beside fp32 weights from stage 1 on.
    """
    return {
        "weights": 4 * numbers / (ranks if stage == 3 else 1),
        "gradients": 4 * numbers / (ranks if stage >= 2 else 1),
        "optimizer": (12 if stage else 8) * numbers / (ranks if stage else 1),
    }
