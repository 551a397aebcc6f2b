"""From raw results to the report: accuracy with intervals by length and by cell, speed, memory, table and heat map."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evals.models import EvalModel
from evals.niah.records import Record
from evals.niah.settings import NiahSettings
from evals.niah.templates import TASK
from evals.report import bytes_text, heat_map, table, wilson_interval, write_figure, write_json


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Every number of the report that comes from the results.

    Args:
        records: Results of one model; at least one.
    """
    lengths = sorted({record.length for record in records})
    places = sorted({(record.length, record.depth) for record in records})
    by_length = [
        {"length": length, **_scores(own), **_costs(own)}
        for length in lengths
        if (own := [record for record in records if record.length == length])
    ]
    cells = [
        {"length": length, "depth": depth, **_scores([r for r in records if (r.length, r.depth) == (length, depth)])}
        for length, depth in places
    ]
    accuracy = {str(row["length"]): row["accuracy"] for row in by_length}
    return {"accuracy_by_length": accuracy, "by_length": by_length, "cells": cells}


def write_report(model: EvalModel, settings: NiahSettings, records: Sequence[Record]) -> dict[str, Any]:
    """Writes niah.json and niah.png, and returns what the JSON holds."""
    summary = summarise(records)
    report = {
        "task": TASK,
        "haystack": "noise",
        "fill": "exact",
        "score": "RULER substring, letter case aside",
        **summary,
        "trained_length": model.trained_length,
        "checkpoint": model.checkpoint,
        "checkpoint_sha256": model.checkpoint_sha256,
        "tokenizer_sha256": model.tokenizer.sha256,
        "model": model.config.to_dict(),
        "device": model.device.type,
        "settings": {name: _plain(value) for name, value in asdict(settings).items()},
    }
    write_json(settings.output / "niah.json", report)
    cells = {(cell["length"], cell["depth"]): (cell["accuracy"], cell["n"]) for cell in summary["cells"]}
    lengths, depths = ({place[axis] for place in cells} for axis in (0, 1))
    title = f"S-NIAH, noise haystack ({model.config.variant})"
    plot = heat_map(title, sorted(lengths), sorted(depths), cells, model.trained_length)
    write_figure(settings.output / "niah.png", plot)
    return report


def summary_table(report: dict[str, Any]) -> str:
    """A line for each length."""
    header = (
        *("length", "accuracy", "n", "95 % interval", "first value", "wrong value"),
        *("prefill tok/s", "decode ms/tok", "peak memory", "state/sample"),
    )
    rows = []
    for row in report["by_length"]:
        low, high = row["interval"]
        rows.append(
            [
                *(f"{row['length']:,}", f"{row['accuracy']:.2f}", str(row["n"]), f"{low:.2f}-{high:.2f}"),
                *(f"{row['first_value_accuracy']:.2f}", f"{row['wrong_value_rate']:.2f}"),
                *(f"{row['prefill_tokens_per_second']:,.0f}", f"{row['decode_ms_per_token']:.1f}"),
                *(bytes_text(row["peak_bytes"]), bytes_text(row["state_bytes_per_sample"])),
            ]
        )
    return table(header, rows)


def _scores(records: Sequence[Record]) -> dict[str, Any]:
    n = len(records)
    hits, first = sum(record.substring for record in records), sum(record.first_value for record in records)
    return {
        "n": n,
        "accuracy": hits / n,
        "interval": list(wilson_interval(hits, n)),
        "first_value_accuracy": first / n,
        "first_value_interval": list(wilson_interval(first, n)),
        "wrong_value_rate": sum(record.wrong_value for record in records) / n,
    }


def _costs(records: Sequence[Record]) -> dict[str, Any]:
    """Speed and memory of one length. Each record has its batch's time, so it stands for a share of it."""
    seconds = sum(record.prefill_seconds / record.batch for record in records)
    return {
        "prompt_tokens": max(record.prompt_tokens for record in records),
        "prefill_tokens_per_second": sum(record.prompt_tokens for record in records) / seconds,
        "decode_ms_per_token": sum(record.decode_ms_per_token for record in records) / len(records),
        "peak_bytes": max(record.peak_bytes for record in records),
        "state_bytes_per_sample": max(record.state_bytes_per_sample for record in records),
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
