"""BABILong: questions about a few facts that lie scattered in a long text, streamed through the model in pieces.

Its settings are here and import nothing heavy: `--help` must be quick.
"""

from dataclasses import dataclass
from pathlib import Path

from evals.babilong.stories import check_tasks
from evals.command_line import EvaluationError, ModelOptions, check_at_least

PAPER_TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")


@dataclass(frozen=True)
class BabilongSettings(ModelOptions):
    """Asks BABILong's questions: facts scattered in a long text, streamed with constant memory, answered greedily.

    Finished samples stand in OUTPUT/babilong.jsonl and are not run again; OUTPUT/babilong.json, .md and .png
    report on every sample of this model and these texts there.
    """

    output: Path
    """Folder for babilong.jsonl, .json, .md and .png."""
    babi: Path
    """Folder en-10k of bAbI (tasks_1-20_v1-2); its test split is used."""
    pg19: Path
    """Text file, or folder of .txt files such as PG19's test split, that the facts lie in."""
    tasks: tuple[str, ...] = PAPER_TASKS
    """qa1 to qa20; the paper's mean is over qa1 to qa5."""
    lengths: tuple[int, ...] = (0, 1_000, 2_000, 4_000, 8_000, 16_000)
    """Tokens of a sample, up to 10,000,000; 300 of them are kept for the prompt, as BABILong does. 0: facts alone."""
    length_tokenizer: Path | None = None
    """tokenizer.json whose tokens lengths are given in; BABILong's is GPT-2's. By default the model's own."""
    samples: int = 20
    """Questions of each task and length; BABILong's tables have 100 and more."""
    seed: int = 0
    """Decides which questions, and where in which text their facts lie."""
    max_new_tokens: int = 20
    """Tokens of the answer."""
    piece: int = 2_048
    """Tokens read at a time; bounds the memory. Results do not depend on it; multiples of the model's segment are
    fastest."""
    batch: int = 16
    """Most samples read side by side; those of one task with prompts of one length are."""

    def __post_init__(self) -> None:
        check_tasks(self.tasks)
        if not self.lengths or min(self.lengths) < 0:
            raise EvaluationError(f"--lengths {self.lengths}; give at least one, 0 or more")
        check_at_least(0, self, "lengths")
        check_at_least(1, self, "samples", "max_new_tokens", "piece", "batch")
