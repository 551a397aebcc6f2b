"""From raw results to numbers: accuracy with intervals by length and by cell, losses, speed, memory."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evals.niah.records import Record
from evals.niah.samples import MAIN
from evals.report import bytes_text, seconds_text, wilson_interval


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Every number of the report that comes from the results.

    Args:
        records: Results of one model; at least one.

    Returns:
        `accuracy_by_length`, by task, without controls; `by_length` and `cells`, rows that name their control and task.
    """
    lengths = _grouped(records, lambda record: (record.control, record.task, record.length))
    cells = _grouped(records, lambda record: (record.control, record.task, record.length, record.depth))
    by_length = [
        {"control": control, "task": task, "length": length, **_scores(own), **_costs(own)}
        for (control, task, length), own in lengths
    ]
    accuracy: dict[str, dict[str, float]] = defaultdict(dict)
    for row in by_length:
        if row["control"] == MAIN:
            accuracy[row["task"]][str(row["length"])] = row["accuracy"]
    return {
        "accuracy_by_length": dict(accuracy),
        "by_length": by_length,
        "cells": [
            {"control": control, "task": task, "length": length, "depth": depth, **_scores(own)}
            for (control, task, length, depth), own in cells
        ],
    }


HEADER = (
    *("control", "task", "length", "prompt", "accuracy", "n", "95 % interval", "first value", "wrong value"),
    *("nats/token", "seconds", "prefill tok/s", "decode ms/tok", "peak memory", "state/sample"),
)


def table_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """A line for each control, task and length, in words; see HEADER."""
    rows = []
    for row in summary["by_length"]:
        low, high = row["interval"]
        rows.append(
            [
                *(row["control"], row["task"], f"{row['length']:,}", f"{row['prompt_tokens']:,.0f}"),
                *(f"{row['accuracy']:.3f}", str(row["n"]), f"{low:.2f}-{high:.2f}"),
                *(f"{row['first_value_accuracy']:.3f}", f"{row['wrong_value_rate']:.3f}"),
                *(f"{row['value_loss_per_token']:.3f}", seconds_text(row["seconds"])),
                *(f"{row['prefill_tokens_per_second']:,.0f}", f"{row['decode_ms_per_token']:.1f}"),
                *(bytes_text(row["peak_bytes"]), bytes_text(row["state_bytes_per_sample"])),
            ]
        )
    return rows


def _grouped(records: Sequence[Record], key: Callable[[Record], tuple]) -> list[tuple[tuple, list[Record]]]:
    """Records by key, what is no control first."""
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return sorted(groups.items(), key=lambda group: (group[0][0] != MAIN, group[0]))


def _scores(records: Sequence[Record]) -> dict[str, Any]:
    n = len(records)
    hits, first = sum(record.substring for record in records), sum(record.first_value for record in records)
    return {
        "n": n,
        "seeds": len({record.seed for record in records}),
        "accuracy": hits / n,
        "interval": list(wilson_interval(hits, n)),
        "first_value_accuracy": first / n,
        "first_value_interval": list(wilson_interval(first, n)),
        "wrong_value_rate": sum(record.wrong_value for record in records) / n,
        "value_loss": sum(record.value_loss for record in records) / n,
        "value_loss_per_token": sum(r.value_loss for r in records) / sum(r.value_tokens for r in records),
    }


def _costs(records: Sequence[Record]) -> dict[str, Any]:
    """Speed and memory of one length. Each record has its batch's time, so it stands for a share of it."""
    prompts = [record.prompt_tokens for record in records]
    read = sum(record.prefill_tokens / record.batch for record in records)
    return {
        "prompt_tokens": sum(prompts) / len(prompts),
        "prompt_tokens_least": min(prompts),
        "prompt_tokens_most": max(prompts),
        "seconds": sum(record.seconds / record.batch for record in records),
        "prefill_tokens_per_second": read / sum(record.prefill_seconds / record.batch for record in records),
        "tokens_read_over_prompts": read / sum(prompts),
        "decode_ms_per_token": sum(record.decode_ms_per_token for record in records) / len(records),
        "peak_bytes": max(record.peak_bytes for record in records),
        "state_bytes_per_sample": max(record.state_bytes_per_sample for record in records),
    }
