"""The measurement of the data of a run: building the index, starting, resuming, reading, and at which size.

Every start is a process of its own. A set with tokens gives the speed of reading; larger ones, whose token files are
holes of the right size, have real indices, which is all that opening reads.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from evals.command_line import EvaluationError
from evals.efficiency.circumstances import circumstances
from evals.efficiency.settings import DataSettings
from evals.report import bytes_text, table, write_json
from tokenization.manifest import Manifest, ManifestError

TARGET_WAIT_SHARE = 0.02
_DISK_BYTES_PER_TOKEN = 5  # units, shards and index at once


def measure(settings: DataSettings) -> str:
    """Measures and writes data.json.

    Returns:
        The tables.

    Raises:
        EvaluationError: The disk is too small, there are fewer tokens than a sample, or --shards holds none.
    """
    settings.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.output) as scratch:
        folder = settings.shards or Path(scratch, "shards")
        if not settings.shards:
            _write(settings, folder)
        report = {**circumstances(settings, "cpu"), **_measure(settings, folder, Path(scratch))}
    write_json(settings.output / "data.json", report)
    return _tables(report)


def _write(settings: DataSettings, folder: Path) -> None:
    from evals.efficiency.synthetic_shards import write_synthetic_shards

    free, needed = shutil.disk_usage(settings.output).free, _DISK_BYTES_PER_TOKEN * settings.tokens
    if free < needed:
        raise EvaluationError(
            f"--output {settings.output} has {bytes_text(free)} free and {settings.tokens:,.0f} tokens need "
            f"{bytes_text(needed)}; give another folder or fewer --tokens"
        )
    _say(f"writing {settings.tokens:,.0f} tokens to {folder}")
    write_synthetic_shards(folder, int(settings.tokens), int(settings.shard_tokens), settings.threads)


def _measure(settings: DataSettings, folder: Path, scratch: Path) -> dict[str, Any]:
    found = [_measure_set(settings, folder, scratch / "index", settings.builds)]
    for tokens in settings.sparse:
        from evals.efficiency.synthetic_shards import write_sparse_shards

        with tempfile.TemporaryDirectory(dir=scratch) as sparse:
            _say(f"writing the index files of {tokens:,.0f} tokens")
            write_sparse_shards(Path(sparse, "shards"), int(tokens))
            found.append(_measure_set(settings, Path(sparse, "shards"), Path(sparse, "index"), 1))
    return {"sets": found}


def _measure_set(settings: DataSettings, folder: Path, index: Path, builds: int) -> dict[str, Any]:
    """Starts that build the index, of which the fastest counts, one that finds it, one in the middle of the epoch."""
    try:
        train = Manifest.load(folder).splits["train"]
    except ManifestError as fault:
        raise EvaluationError(f"--shards: {fault}") from fault

    def start(name: str, place: Path, epochs: float = 0.0, cold: bool = False) -> dict[str, Any]:
        _say(f"{train.tokens:,} tokens: {name}")
        request = {"folder": str(folder), "index": str(place), "epochs": epochs, "cold": cold, "asked": time.time()}
        request |= {"sequence_length": settings.sequence_length, "global_batch": settings.global_batch}
        return _run({**request, "steps": settings.steps})

    built = [start("building the index", index / str(turn)) for turn in range(builds)]
    starts = {
        "index built": min(built, key=lambda one: one["open_cpu_seconds"]),
        "index there": start("starting with the index there", index / "0"),
        "resumed, disk cold": start("resuming in the middle of the epoch", index / "0", epochs=0.5, cold=True),
    }
    return {
        "tokens": train.tokens,
        "documents": train.documents,
        "shards": len(train.datasets),
        "samples": starts["index built"]["samples"],
        "index_bytes": sum(file.stat().st_size for file in (index / "0").rglob("*") if file.is_file()),
        "starts": starts,
    }


def _run(request: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "evals.efficiency.data_worker", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise EvaluationError(f"a measurement failed: {last}; more --tokens or a shorter --sequence-length may help")
    return json.loads(done.stdout)


def _tables(report: dict[str, Any]) -> str:
    parts = []
    for one in report["sets"]:
        sizes = f"{one['documents']:,} documents, {one['shards']} shards, {one['samples']:,} samples"
        parts.append(f"{one['tokens']:,} tokens, {sizes}, index {bytes_text(one['index_bytes'])}")
        parts.append(table(_HEADER, [_row(name, start) for name, start in one["starts"].items()]))
    share = max(start["wait_share"] for start in report["sets"][0]["starts"].values())
    verdict = "reached" if share < TARGET_WAIT_SHARE else "missed"
    parts.append(
        f"largest median wait {share:.2%} of a step that computes twice as long as its batch takes to read "
        f"(target {TARGET_WAIT_SHARE:.0%}: {verdict})"
    )
    return "\n\n".join(parts)


_HEADER = ["", "open s", "CPU s", "peak", "first batch s", "own", "mapped", "tokens/s", "tokens/CPU s", "wait"]


def _row(name: str, start: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{start['open_seconds']:.2f}",
        f"{start['open_cpu_seconds']:.2f}",
        bytes_text(start["open_peak_bytes"]),
        f"{start['first_batch_seconds']:.2f}",
        bytes_text(start["anonymous_bytes"]),
        bytes_text(start["mapped_bytes"]),
        f"{start['tokens_per_second'] / 1e6:.1f}M",
        f"{start['tokens_per_cpu_second'] / 1e6:.1f}M",
        f"{start['wait_share']:.2%}",
    ]


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
