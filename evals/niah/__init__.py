"""S-NIAH: a needle in a haystack, streamed through the model in pieces (RULER's niah_single_1, _2 and _3).

Its settings are here and import nothing heavy: `--help` must be quick.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evals.command_line import EvaluationError, ModelOptions, check_at_least

TaskLetters = Literal["pk", "n", "w", "mk1", "mk2", "mk3", "mv", "mq"]
"""See evals.niah.templates.TASKS."""


@dataclass(frozen=True)
class NiahSettings(ModelOptions):
    """Finds a needle in a haystack: RULER's S-NIAH tasks, streamed with constant memory, answered greedily.

    Finished samples stand in OUTPUT/niah.jsonl and are not run again; niah.json, .csv, .md and two plots beside it
    report on every sample of this model there. Under torchrun the samples are spread over the processes.
    """

    output: Path
    """Folder for niah.jsonl and the reports."""
    tasks: tuple[Literal["pk", "n", "w"], ...] = ("pk",)
    """The paper's columns: pk (niah_single_1: noise, a number), n (niah_single_2: prose, a number), w (niah_single_3:
    prose, a uuid)."""
    lengths: tuple[int, ...] = (1_024, 4_096, 16_384, 65_536)
    """Tokens of a sample: prompt and room for the answer together."""
    depths: int = 11
    """Places of the needle, evenly from the start (0 %) to the end (100 %) of the haystack; 1 is the middle."""
    samples: int = 1
    """Samples of each length and depth; RULER's tables have 500 a length."""
    seed: int = 0
    """Decides keys, values and synthetic prose. Runs with several seeds into one folder are reported together."""
    fill: Literal["exact", "ruler_2024"] = "exact"
    """exact fills a length to the token; ruler_2024 in RULER's steps of that year: 500 words or 25 lines, whatever
    fits. The report has the tokens there really were."""
    text: Path | None = None
    """Haystack of n and w: UTF-8 text, or RULER's PaulGrahamEssays.json; by default synthetic prose."""
    words: Path | None = None
    """Folder of RULER's adjectivelist.txt and nounlist.txt, of which keys are made: the package wonderwords has them in
    its folder assets. By default lists of this project's own."""
    controls: tuple[Literal["needle_absent", "memory_reset", "memory_off", "window_only", "random_init"], ...] = ()
    """The same samples once more: without a needle; with the memory's state reset before the question; with a memory
    that is never written; with the last window of the prompt alone; with weights as before training."""
    budget: float | None = None
    """Minutes: a grid that should fit is chosen, fewer samples first, then fewer depths, then fewer lengths."""
    max_new_tokens: int = 128
    """Tokens of the answer, and the room kept for it; 128 is RULER's."""
    piece: int = 2_048
    """Tokens read at a time; bounds the memory. Results do not depend on it; multiples of the model's segment are
    fastest."""
    batch: int = 16
    """Most samples read side by side."""

    def __post_init__(self) -> None:
        for name in ("tasks", "lengths"):
            if not getattr(self, name):
                raise EvaluationError(f"--{name} is empty; give at least one")
        check_at_least(1, self, "depths", "samples", "max_new_tokens", "piece", "batch", "lengths")
        if self.budget is not None and not self.budget > 0:
            raise EvaluationError(f"--budget is {self.budget}; give minutes above 0")

    @property
    def depth_percents(self) -> list[float]:
        """Places of the needle in percent of the haystack."""
        if self.depths == 1:
            return [50.0]
        return [round(100 * index / (self.depths - 1), 2) for index in range(self.depths)]
