"""Every system of the paper's table, trained under one budget and compared.

Its settings are here and import nothing heavy: `--help` must be quick.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evals.command_line import EvaluationError, check_at_least, check_named_once


@dataclass(frozen=True)
class SystemsComparisonSettings:
    """Trains every system of the paper's table under one budget, seed by seed, and compares them.

    All have the same blocks, width, tokens, tokenizer, learning rate and order of the data, and as many parameters as
    Transformer++ to 3 % beside the embedding, by the width of the feed-forward network. What is finished stands in
    OUTPUT/comparison.jsonl and is not done again; a run that was killed goes on from its checkpoint. comparison.md,
    .json and .png are written anew behind every part.
    """

    output: Path
    """Folder for runs, results, the table and the plot. It belongs to one budget."""
    data: Path | None = None
    """Folder of shards from `python -m tokenization.encode`; the part text needs it."""
    systems: tuple[str, ...] = ()
    """Names of the paper's sizes (the mac of mac_760m), by default all; or of its ablations (lmm_linear, ...)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each decides initial weights and the order of the data, for all systems alike."""
    parts: tuple[Literal["text", "lists", "needles"], ...] = ("text", "lists")
    """text: held-out loss, also by position, speed and size of the state. lists: held-out loss on lists that are said
    again and again, by the preset recall in two blocks, with windows too short to copy from. needles: after lists, the
    answers of documents with needles, then S-NIAH at 1 to 64 times their length."""
    config: str = "comparison"
    """Preset or TOML file that all share; ffn_dim is Transformer++'s."""
    steps: int | None = None
    """Training steps of text; by default the configuration's, minutes on a CPU core."""
    recall_steps: int = 300
    """Training steps of lists, 8 rows of 256 tokens; of needles, 8 rows of 320, there are twice as many."""
    samples: int = 2
    """S-NIAH samples of each length and of 5 depths."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "steps", "recall_steps", "samples")
        check_at_least(0, self, "seeds")
        check_named_once(self, "seeds", "parts", *(["systems"] if self.systems else []))
        if "text" in self.parts and self.data is None:
            raise EvaluationError("--data is missing; the part text reads a folder of shards, --parts lists needs none")
