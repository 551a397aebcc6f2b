"""The measurement of the data on shards of synthetic tokens: index, start, resume and reading, and what follows.

Every start is a process of its own: the first builds the index of all shards, others that of half of them, open what is
built, and go on in the middle of an epoch. The index grows by the document and by the sample: the processor's time and
memory at other sizes are those of the whole set and the slope between half and whole. What does not grow so, joining
the shards, is measured at the real size.
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

TARGET_WAIT_SHARE = 0.02
_DISK_BYTES_PER_TOKEN = 5  # units, shards and index at once
_SHARD_TOKENS = 1e9  # what tokenization.encode takes unless it is told otherwise


def measure(settings: DataSettings) -> str:
    """Measures and writes data.json.

    Returns:
        The tables.

    Raises:
        EvaluationError: The disk is too small, there are fewer tokens than can be measured, or --shards holds none.
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
    from tokenization.manifest import Manifest, ManifestError

    try:
        train = Manifest.load(folder).splits["train"]
    except ManifestError as fault:
        raise EvaluationError(f"--shards: {fault}") from fault
    shards = len(train.datasets)
    if shards < 2:
        raise EvaluationError(
            f"{train.tokens:,} tokens are one shard; give --shard-tokens of half of --tokens or less, or --shards "
            "with several"
        )

    def start(name: str, shards: int, index: str, epochs: float = 0.0, cold: bool = False) -> dict[str, Any]:
        _say(name)
        request = {"folder": str(folder), "index": str(scratch / index), "shards": shards, "epochs": epochs}
        request |= {"sequence_length": settings.sequence_length, "global_batch": settings.global_batch}
        return _run({"start": {**request, "steps": settings.steps, "cold": cold, "asked": time.time()}})

    def build(name: str, shards: int, index: str) -> dict[str, Any]:
        turns = range(settings.builds)
        built = [start(f"{name}, {turn + 1} of {settings.builds}", shards, f"{index}-{turn}") for turn in turns]
        return min(built, key=lambda one: one["open_cpu_seconds"])

    starts = {
        "half, index built": build("building the index of half of the shards", shards // 2, "half"),
        "whole, index built": build("building the index of all shards", shards, "whole"),
        "whole, index there": start("starting with the index there", shards, "whole-0"),
        "whole, resumed in mid-epoch, tokens not in memory": start(
            "resuming in the middle of the epoch", shards, "whole-0", epochs=0.5, cold=True
        ),
    }
    half = sum(shard.tokens for shard in train.datasets[: shards // 2])
    sizes = {
        "documents": train.documents,
        "tokens": train.tokens,
        "tokens_of_half": half,
        "shards": shards,
        "index_bytes": sum(file.stat().st_size for file in (scratch / "whole-0").rglob("*") if file.is_file()),
    }
    report = {"set": sizes, "starts": starts}
    return {**report, "extrapolated": [_extrapolate(report, tokens, settings) for tokens in settings.extrapolate]}


def _extrapolate(report: dict[str, Any], tokens: float, settings: DataSettings) -> dict[str, Any]:
    """What a set of so many tokens, in shards of a billion, takes."""
    sizes, starts = report["set"], report["starts"]
    half, whole = starts["half, index built"], starts["whole, index built"]
    shards, samples = max(2, round(tokens / _SHARD_TOKENS)), int(tokens / settings.sequence_length)
    _say(f"joining {shards} shards of {tokens:,.0f} tokens")
    join = _run({"join": {"shards": shards, "samples": samples}})

    def line(name: str) -> float:
        slope = (whole[name] - half[name]) / (sizes["tokens"] - sizes["tokens_of_half"])
        return max(0.0, whole[name] + max(0.0, slope) * (tokens - sizes["tokens"]))

    return {
        "tokens": tokens,
        "shards": shards,
        "samples": samples,
        "build_cpu_seconds": line("open_cpu_seconds") + join["cpu_seconds"],
        "join_cpu_seconds": join["cpu_seconds"],
        "join_bytes": join["bytes"],
        "build_peak_bytes": line("peak_bytes"),
        "index_bytes": sizes["index_bytes"] / sizes["tokens"] * tokens,
    }


def _run(request: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "evals.efficiency.data_worker", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise EvaluationError(f"a measurement failed: {last}; more --tokens or a shorter --sequence-length may help")
    return json.loads(done.stdout)


def _tables(report: dict[str, Any]) -> str:
    sizes = report["set"]
    rows = [
        [
            name,
            f"{one['open_seconds']:.2f}",
            f"{one['open_cpu_seconds']:.2f}",
            f"{one['first_batch_seconds']:.2f}",
            bytes_text(one["peak_bytes"]),
            bytes_text(one["anonymous_bytes"]),
            bytes_text(one["mapped_bytes"]),
            f"{one['tokens_per_second'] / 1e6:.1f}M",
            f"{one['tokens_per_cpu_second'] / 1e6:.1f}M",
            f"{one['wait_share']:.2%}",
        ]
        for name, one in report["starts"].items()
    ]
    header = ["start", "open s", "CPU s", "first batch s", "peak", "own", "mapped", "tokens/s", "tokens/CPU s", "wait"]
    measured = table(header, rows)
    larger = [
        [
            f"{one['tokens'] / 1e9:g}B",
            f"{one['samples']:,}",
            f"{one['build_cpu_seconds']:.0f}",
            bytes_text(one["build_peak_bytes"]),
            bytes_text(one["index_bytes"]),
        ]
        for one in report["extrapolated"]
    ]
    extrapolated = table(["tokens", "samples", "build CPU s", "peak while building", "index on disk"], larger)
    share = max(one["wait_share"] for one in report["starts"].values())
    verdict = "reached" if share < TARGET_WAIT_SHARE else "missed"
    return (
        f"{sizes['tokens']:,} tokens, {sizes['documents']:,} documents, {sizes['shards']} shards, "
        f"index {bytes_text(sizes['index_bytes'])}\n\n{measured}\n\n"
        f"largest median wait {share:.2%} of a step that computes twice as long as its batch takes to read "
        f"(target {TARGET_WAIT_SHARE:.0%}: {verdict})\n\nextrapolated\n\n{extrapolated}"
    )


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
