"""The report's files: niah.json, niah.csv, niah.md, niah.png (heat maps) and niah_by_length.png."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.models import EvalModel
from evals.niah.records import Identity, Record
from evals.niah.samples import MAIN
from evals.niah.settings import NiahSettings
from evals.niah.summary import HEADER, summarise, table_rows
from evals.niah.templates import BY_NAME, OWN_WORDS
from evals.report import (
    accuracy_plot,
    heat_maps,
    markdown_table,
    settings_of,
    write_bytes,
    write_csv,
    write_figure,
    write_json,
)

FILES = ("niah.json", "niah.csv", "niah.md", "niah.png", "niah_by_length.png", "niah.jsonl")


def write_report(
    model: EvalModel,
    settings: NiahSettings,
    records: Sequence[Record],
    identities: Mapping[str, Identity],
    grid: Mapping[int, tuple[int, int]] | None,
) -> dict[str, Any]:
    """Writes the files, and returns what the JSON holds.

    Args:
        model: The model.
        settings: Of this run.
        records: Results of the model; at least one.
        identities: What they have in common, by task.
        grid: Depths and samples that a budget chose for each length; None without one.
    """
    summary = summarise(records)
    report = {
        "score": "RULER substring, letter case aside",
        **summary,
        "fill": settings.fill,
        "words": next(iter(identities.values())).words,
        "haystacks": {
            task: {"label": identities[task].haystack, "sha256": identities[task].haystack_sha256}
            for task in sorted({record.task for record in records})
        },
        "seeds": sorted({record.seed for record in records}),
        "budget_grid": None
        if grid is None
        else {str(length): {"depths": depths, "samples": n} for length, (depths, n) in grid.items()},
        **model.facts(),
        "device": model.device.type,
        "settings": settings_of(settings),
    }
    write_json(settings.output / "niah.json", report)
    write_bytes(settings.output / "niah.md", markdown(report).encode())
    write_csv(settings.output / "niah.csv", summary["cells"])
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
        "fill": report["fill"],
        "keys' words": "own" if report["words"] == OWN_WORDS.name else f"RULER's lists, sha256 `{report['words']}`",
        "seeds": ", ".join(map(str, report["seeds"])),
        "trained length": f"{report['trained_length']:,} tokens" if report["trained_length"] else "not known",
        "device": report["device"],
    }
    left_out = [length for length, size in (report["budget_grid"] or {}).items() if not size["depths"]]
    if left_out:
        facts["not run, the budget was too small"] = ", ".join(f"{int(length):,}" for length in left_out)
    lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    legend = (
        "accuracy: the value stands in the answer (RULER); first value: the first number or uuid of the answer is it; "
        "wrong value: it is another one; nats/token: cross-entropy of the value fed as it stands; prompt: mean tokens."
    )
    return f"# S-NIAH\n\n{lines}\n\n{markdown_table(HEADER, table_rows(report))}\n\n{legend}\n"


def _write_plots(output: Path, report: Mapping[str, Any]) -> None:
    """Heat maps of what is no control, and accuracy against length of all."""
    cells = report["cells"]
    main = [cell for cell in cells if cell["control"] == MAIN] or cells
    lengths, depths = (sorted({cell[axis] for cell in main}) for axis in ("length", "depth"))
    variant, trained = report["model"]["variant"], report["trained_length"]
    maps: dict[str, dict[tuple[int, float], tuple[float, int]]] = {}
    for cell in main:
        title = f"{BY_NAME[cell['task']].column}, {report['haystacks'][cell['task']]['label']} haystack ({variant})"
        maps.setdefault(title, {})[cell["length"], cell["depth"]] = cell["accuracy"], cell["n"]
    write_figure(output / "niah.png", heat_maps(maps, lengths, depths, trained))
    lines: dict[str, list[tuple[int, float, tuple[float, float]]]] = {}
    for row in report["by_length"]:
        name = BY_NAME[row["task"]].column + ("" if row["control"] == MAIN else f", {row['control']}")
        lines.setdefault(name, []).append((row["length"], row["accuracy"], tuple(row["interval"])))
    write_figure(output / "niah_by_length.png", accuracy_plot(f"S-NIAH by length ({variant})", lines, trained))
