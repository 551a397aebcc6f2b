"""What each rule of the memory lets it memorise: `python -m evals.memory_rule --output DIR`.

Trains small models on lists of random words that are said again and again, one after the other, and prints held-out
nats a token beside the norms of the outer gradients. About two minutes a model on one CPU core. What it gave stands in
titans_mcore/memory/STABILITY.md.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.command_line import EvaluationError, check_at_least, parse_settings, run_command

_PLAIN = {"memory-network": "plain"}
CASES: dict[str, dict[str, Any]] = {
    "lmm": {},
    "lmm, L_M 1": {"memory-depth": 1},
    "lmm, L_M 3": {"memory-depth": 3},
    "lmm, plain, L_M 1": _PLAIN | {"memory-depth": 1},
    "lmm, plain, L_M 2": _PLAIN,
    "mag": {"variant": "mag"},
    "mac": {"variant": "mac", "segment-length": 64},
    "lmm, with forgetting": {"memory-forgetting": "true"},
    "mag, with forgetting": {"variant": "mag", "memory-forgetting": "true"},
    "mac, with forgetting": {"variant": "mac", "segment-length": 64, "memory-forgetting": "true"},
}
"""What differs from the settings of the first, an LMM whose memory is the default one."""
_ROWS = ("--train.sequence-length", 256, "--train.global-batch", 8, "--train.micro-batch", 8)
_COMMON = {
    "variant": "lmm",
    "num-heads": 2,
    "memory-heads": 2,
    "memory-depth": 2,
    "memory-expansion": 4,
    "memory-network": "residual_norm",
    "memory-forgetting": "false",
    "theta-max": 1,
    "gate-margin": 0,
    "conv-kernel": 4,
    "chunk-size": 32,
}


@dataclass(frozen=True)
class RuleSettings:
    """Compares the rules of the memory on lists that are said again and again."""

    output: Path
    """Folder for the lists, the runs, memory_rule.json and memory_rule.md; what is there is not done again."""
    rules: tuple[str, ...] = ("stable", "literal")
    """Values of model.memory_rule."""
    cases: tuple[str, ...] = tuple(CASES)
    """Which of the models."""
    steps: int = 300
    """Steps of 8 rows of 256 tokens."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.cases) - set(CASES)):
            raise EvaluationError(f"--cases names {', '.join(unknown)}; choose among: {'; '.join(CASES)}")
        check_at_least(1, self, "steps")


def compare(settings: RuleSettings) -> str:
    """Trains what is missing, and returns the table."""
    from evals.comparison.run import child, outcome, recall_shards
    from evals.report import markdown_table, write_bytes

    output = settings.output.resolve()
    lists = recall_shards(output, "lists", 256, "--lists")
    rows = []
    for name in settings.cases:
        for rule in settings.rules:
            run = output / "runs" / f"{rule} {name} {settings.steps}".replace(", ", " ").replace(" ", "-")
            model = _COMMON | CASES[name] | {"memory-rule": rule}
            flags = [word for key, value in model.items() for word in (f"--model.{key}", value)]
            train = ["--train.steps", settings.steps, "--evaluate.heldout-sequences", 48]
            every = ["--checkpoint.every-steps", settings.steps, "--logging.every-steps", 1]
            named = ["--config", "recall", "--run-dir", run, "--data.path", lists, *_ROWS]
            try:
                found = outcome(run, settings.steps)
            except (OSError, EvaluationError):  # not begun, or not ended
                child("pretrain.train", *named, *flags, *train, *every)
                found = outcome(run, settings.steps)
            rows.append({"model": name, "rule": rule} | found)
    write_bytes(output / "memory_rule.json", (json.dumps(rows, indent=1) + "\n").encode())
    header = ("model", "rule", "held-out nats a token", "largest outer gradient norm after 20 steps")
    lines = [[row["model"], row["rule"], f"{row['loss']:.3f}", f"{row['largest_norm']:.2f}"] for row in rows]
    table = markdown_table(header, lines)
    write_bytes(output / "memory_rule.md", (table + "\n").encode())
    return table


if __name__ == "__main__":
    run_command(lambda: print(compare(parse_settings(RuleSettings, "python -m evals.memory_rule"))))
