"""What other commands found out about a model, gathered from their JSON files, and running those that are missing."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.command_line import EvaluationError, run_module
from evals.paper import PaperSettings
from evals.paper.published import HYBRIDS
from titans_mcore.mixers import MIXERS, MixerSpec

KINDS = {
    "harness": "columns",
    "niah": "by_length",
    "babilong": "by_length",
    "position_perplexity": "buckets",
    "context": "rows",
}
"""Evaluations, whose file is KIND.json, and a field that each has."""


@dataclass(frozen=True)
class ModelResults:
    """One model's results."""

    name: str
    """As the user calls it."""
    reports: Mapping[str, Mapping[str, Any]]
    """By kind; what was not run is missing."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's settings; empty where no result has them."""
        return next((report["model"] for report in self.reports.values() if isinstance(report.get("model"), dict)), {})

    @property
    def variant(self) -> str:
        """The papers' name of the variant; empty when unknown."""
        if self.mixer is not None:
            return self.mixer.paper
        return HYBRIDS.get(self.config.get("variant", ""), "")

    @property
    def mixer(self) -> MixerSpec | None:
        """The token mixer of every block; None when unknown, or where blocks differ."""
        return MIXERS.get(self.config.get("variant", ""))


def places(name: str, folder: Path, output: Path) -> list[Path]:
    """Where results of a model may lie, those of this command first."""
    return [output / name, folder, folder / "eval"]


def find_report(kind: str, folders: Sequence[Path]) -> Mapping[str, Any] | None:
    """The first report of a kind.

    Raises:
        EvaluationError: A file with its name is something else, or damaged.
    """
    for folder in folders:
        file = folder / f"{kind}.json"
        if file.is_file():
            return _read(file, KINDS[kind])
    return None


def read_results(name: str, folder: Path, output: Path) -> ModelResults:
    """All results of a model.

    Raises:
        EvaluationError: The folder is missing, or a file is damaged.
    """
    if not folder.is_dir():
        raise EvaluationError(f"--models {name}={folder}: no such folder")
    found = {kind: find_report(kind, places(name, folder, output)) for kind in KINDS}
    return ModelResults(name, {kind: report for kind, report in found.items() if report is not None})


def _read(file: Path, field: str) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{file} is not JSON ({error}); delete it and run its evaluation again") from None
    if isinstance(content, list):
        content = {"rows": content}
    if not isinstance(content.get(field), list):
        raise EvaluationError(f"{file} has no {field!r}; delete it and run its evaluation again")
    return content


def commands(settings: PaperSettings, folder: Path, output: Path) -> dict[str, list[str]]:
    """The command of each kind of evaluation, without the interpreter.

    Args:
        settings: Say how large they are.
        folder: Run or exported folder.
        output: Where results go.
    """
    common = ["--checkpoint", str(folder), "--output", str(output)]
    return {
        "harness": [
            *("evals.harness", *common),
            *_option("--data", settings.harness_data),
            *_option("--limit", settings.harness_limit),
        ],
        "niah": [
            *("evals.niah", *common, "--tasks", "pk", "n", "w"),
            *("--lengths", *map(str, settings.niah_lengths), "--samples", str(settings.niah_samples)),
            *_option("--text", settings.niah_text),
        ],
        "babilong": [
            *("evals.babilong", *common, "--lengths", *map(str, settings.babilong_lengths)),
            *("--samples", str(settings.babilong_samples)),
            *_option("--babi", settings.babi),
            *_option("--pg19", settings.pg19),
        ],
        "position_perplexity": [
            *("evals.position_perplexity", *common, "--length", str(settings.position_length)),
            *_option("--data", settings.data),
            *(("--text", *map(str, settings.text)) if settings.text else ()),
        ],
        "context": [
            *("evals.efficiency", "context", "--checkpoint", str(folder)),
            *("--lengths", *map(str, settings.context_lengths), "--json", str(output / "context.json")),
        ],
    }


def run_missing(settings: PaperSettings) -> list[str]:
    """Runs what no folder has yet. One that fails leaves its cells empty; the others still run.

    Returns:
        A sentence for each command that failed.
    """
    failed = []
    for name, folder in settings.folders.items():
        output = settings.output / name
        for kind, words in commands(settings, folder, output).items():
            if kind in settings.only and find_report(kind, places(name, folder, settings.output)) is None:
                status = run_module(*words)
                if status:
                    failed.append(f"{kind} of {name} ended with status {status}")
    return failed


def _option(flag: str, value: object) -> tuple[str, ...]:
    return () if value is None else (flag, str(value))
