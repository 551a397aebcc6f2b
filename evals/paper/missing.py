"""Running the evaluations whose results are missing, each as a command of its own."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from evals.paper.results import find_report, places
from evals.paper.settings import PaperSettings


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
            *("-m", "evals.harness", *common),
            *_option("--data", settings.harness_data),
            *_option("--limit", settings.harness_limit),
        ],
        "niah": [
            *("-m", "evals.niah", *common, "--tasks", "pk", "n", "w"),
            *("--lengths", *map(str, settings.niah_lengths), "--samples", str(settings.niah_samples)),
            *_option("--text", settings.niah_text),
        ],
        "babilong": [
            *("-m", "evals.babilong", *common, "--lengths", *map(str, settings.babilong_lengths)),
            *("--samples", str(settings.babilong_samples)),
            *_option("--babi", settings.babi),
            *_option("--pg19", settings.pg19),
        ],
        "position_perplexity": [
            *("-m", "evals.position_perplexity", *common, "--length", str(settings.position_length)),
            *_option("--data", settings.data),
            *(("--text", *map(str, settings.text)) if settings.text else ()),
        ],
        "context": [
            *("-m", "evals.efficiency", "context", "--checkpoint", str(folder)),
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
                status = _run(words)
                if status:
                    failed.append(f"{kind} of {name} ended with status {status}")
    return failed


def _run(words: Sequence[str]) -> int:
    print(f"$ python {shlex.join(words)}", file=sys.stderr, flush=True)
    # Wherever this package was found, the command finds it too.
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    return subprocess.run([sys.executable, *words], env={**os.environ, "PYTHONPATH": path}).returncode


def _option(flag: str, value: object) -> tuple[str, ...]:
    return () if value is None else (flag, str(value))
