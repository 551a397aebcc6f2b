"""From raw results, a JSON line a sample in niah.jsonl, to the report: accuracy with intervals, losses, costs.

Its files are niah.json, niah.md, niah.png (heat maps) and niah_by_length.png.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.models import EvalModel
from evals.niah import NiahSettings
from evals.niah.samples import MAIN, SampleKey
from evals.niah.templates import OWN_WORDS, by_name
from evals.record_file import Identity, SampleResult
from evals.report import (
    accuracy_plot,
    bytes_text,
    heat_maps,
    markdown_table,
    seconds_text,
    settings_of,
    wilson_interval,
    write_bytes,
    write_figure,
    write_json,
)

FILL = "exact"  # to the token


@dataclass(frozen=True, kw_only=True)
class NeedleIdentity(Identity):
    """What results of a task must have in common."""

    fill: str
    """How prompts fill their length: FILL; files of earlier versions may have another."""
    haystack: str
    """noise, synthetic, file, essay or needles."""
    haystack_sha256: str
    """Of the text."""
    words: str
    """Those that keys are made of: own, or SHA-256 of the user's lists."""


@dataclass(frozen=True, kw_only=True)
class NeedleResult(NeedleIdentity, SampleResult):
    """One sample's result."""

    depth: float
    control: str
    needle_key: str
    """The key that was asked for, or several as the question names them."""
    value: str
    """The right answer: the value, or several."""
    prompt_sha256: str
    """Of the prompt's ids as 32-bit little-endian numbers: equal for equal samples, whatever read them."""
    answer_ids: list[int]
    """Its tokens, end token left out."""
    substring: float
    first_value: bool
    wrong_value: bool
    value_loss: float
    """Cross-entropy of the value in nats, summed over its tokens, each fed as it stands."""
    value_tokens: int
    prefill_tokens: int
    """Tokens that the batch read, all rows together, and its part of the beginning that several batches share."""
    seconds: float
    """All that the batch took."""
    words: str = OWN_WORDS.name

    @property
    def name(self) -> SampleKey:
        """Which sample it is."""
        return SampleKey(self.task, self.length, self.depth, self.sample, self.seed, self.control)


def summarise(records: Sequence[NeedleResult]) -> dict[str, Any]:
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


def _grouped(
    records: Sequence[NeedleResult], key: Callable[[NeedleResult], tuple]
) -> list[tuple[tuple, list[NeedleResult]]]:
    """Records by key, what is no control first."""
    groups: dict[tuple, list[NeedleResult]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return sorted(groups.items(), key=lambda group: (group[0][0] != MAIN, group[0]))


def _scores(records: Sequence[NeedleResult]) -> dict[str, Any]:
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


def _costs(records: Sequence[NeedleResult]) -> dict[str, Any]:
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


FILES = ("niah.json", "niah.md", "niah.png", "niah_by_length.png", "niah.jsonl")


def write_report(
    model: EvalModel,
    settings: NiahSettings,
    records: Sequence[NeedleResult],
    identities: Mapping[str, NeedleIdentity],
) -> dict[str, Any]:
    """Writes the files, and returns what the JSON holds.

    Args:
        model: The model.
        settings: Of this run.
        records: Results of the model; at least one.
        identities: What they have in common, by task.
    """
    summary = summarise(records)
    report = {
        "score": "RULER's string_match_all: the share of the values that stand in the answer, letter case aside",
        **summary,
        "fill": FILL,
        "words": next(iter(identities.values())).words,
        "haystacks": {
            task: {"label": identities[task].haystack, "sha256": identities[task].haystack_sha256}
            for task in sorted({record.task for record in records})
        },
        "seeds": sorted({record.seed for record in records}),
        **model.facts(),
        "device": model.device.type,
        "settings": settings_of(settings),
    }
    write_json(settings.output / "niah.json", report)
    write_bytes(settings.output / "niah.md", markdown(report).encode())
    _write_plots(settings.output, report)
    return report


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page: the table by length, and what it was made from."""
    haystacks = [f"{task}: {hay['label']}, sha256 `{hay['sha256']}`" for task, hay in report["haystacks"].items()]
    facts = {
        "model": report["model"]["variant"],
        "checkpoint": f"{report['checkpoint']}, sha256 `{report['checkpoint_sha256']}`",
        "tokenizer": f"sha256 `{report['tokenizer_sha256']}`",
        "haystacks": "; ".join(haystacks),
        "keys' words": "own" if report["words"] == OWN_WORDS.name else f"RULER's lists, sha256 `{report['words']}`",
        "seeds": ", ".join(map(str, report["seeds"])),
        "trained length": f"{report['trained_length']:,} tokens" if report["trained_length"] else "not known",
        "device": report["device"],
    }
    lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    legend = (
        "accuracy: the value stands in the answer, of several the share that does (RULER); interval: Wilson's with a "
        "sample as a trial, for shares too wide rather than too narrow; first value: the first number or uuid of the "
        "answer is a value; wrong value: it is another one; nats/token: cross-entropy of the right answer fed as it "
        "stands; prompt: mean tokens."
    )
    return f"# Needles in a haystack\n\n{lines}\n\n{markdown_table(HEADER, table_rows(report))}\n\n{legend}\n"


def _write_plots(output: Path, report: Mapping[str, Any]) -> None:
    """Heat maps of what is no control, and accuracy against length of all."""
    cells = report["cells"]
    main = [cell for cell in cells if cell["control"] == MAIN] or cells
    lengths, depths = (sorted({cell[axis] for cell in main}) for axis in ("length", "depth"))
    variant, trained = report["model"]["variant"], report["trained_length"]
    maps: dict[str, dict[tuple[int, float], tuple[float, int]]] = {}
    for cell in main:
        title = f"{by_name(cell['task']).column}, {report['haystacks'][cell['task']]['label']} haystack ({variant})"
        maps.setdefault(title, {})[cell["length"], cell["depth"]] = cell["accuracy"], cell["n"]
    write_figure(output / "niah.png", heat_maps(maps, lengths, depths, trained))
    lines: dict[str, list[tuple[int, float, tuple[float, float]]]] = {}
    for row in report["by_length"]:
        name = by_name(row["task"]).column + ("" if row["control"] == MAIN else f", {row['control']}")
        lines.setdefault(name, []).append((row["length"], row["accuracy"], tuple(row["interval"])))
    write_figure(output / "niah_by_length.png", accuracy_plot(f"Needles found by length ({variant})", lines, trained))
