"""Needles in a haystack, streamed through the model in pieces: RULER's tasks niah_*, S-NIAH the first three of them.

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
    """Finds needles in a haystack: RULER's tasks, streamed with constant memory, answered greedily.

    Finished samples stand in OUTPUT/niah.jsonl and are not run again; niah.json, .md and two plots beside it
    report on every sample of this model there. Under torchrun the samples are spread over the processes.
    """

    output: Path
    """Folder for niah.jsonl and the reports."""
    tasks: tuple[TaskLetters, ...] = ("pk",)
    """The paper's columns: pk (niah_single_1: noise, a number), n (niah_single_2: prose, a number), w (niah_single_3:
    prose, a uuid). RULER's others: mk1 (niah_multikey_1: prose, one of four keys asked for), mk2 and mk3
    (niah_multikey_2 and _3: a haystack of needles; numbers by words, uuids by uuids), mv (niah_multivalue: prose, the
    four values of a key), mq (niah_multiquery: prose, the values of four keys)."""
    lengths: tuple[int, ...] = (1_024, 4_096, 16_384, 65_536)
    """Tokens of a sample: prompt and room for the answer together, exactly."""
    depths: int = 11
    """Places of the needle, evenly from the start (0 %) to the end (100 %) of the haystack; 1 is the middle. Of several
    needles one that is asked for stands there, the others anywhere."""
    samples: int = 1
    """Samples of each length and depth; RULER's tables have 500 a length."""
    seed: int = 0
    """Decides keys, values and synthetic prose. Runs with several seeds into one folder are reported together."""
    text: Path | None = None
    """Haystack of n, w, mk1, mv and mq: UTF-8 text, or RULER's PaulGrahamEssays.json; by default synthetic prose."""
    words: Path | None = None
    """Folder of RULER's adjectivelist.txt and nounlist.txt, of which keys are made: the package wonderwords has them in
    its folder assets. By default lists of this project's own."""
    keys: tuple[int, ...] = (4,)
    """Keys in the haystack of mk1: 4 is RULER's; each other number is a task of its own in the report, so that what is
    found can be seen against what has to be kept."""
    controls: tuple[Literal["needle_absent", "memory_reset", "memory_off", "window_only", "random_init"], ...] = ()
    """The same samples once more: without a needle; with the memory's state reset before the question; with a memory
    that is never written; with the last window of the prompt alone; with weights as before training."""
    max_new_tokens: int = 128
    """Tokens of the answer, and the room kept for it; 128 is RULER's."""
    piece: int = 2_048
    """Tokens read at a time; bounds the memory. Results do not depend on it; multiples of the model's segment are
    fastest."""
    batch: int = 16
    """Most samples read side by side."""

    def __post_init__(self) -> None:
        for name in ("tasks", "lengths", "keys"):
            if not getattr(self, name):
                raise EvaluationError(f"--{name} is empty; give at least one")
        check_at_least(1, self, "depths", "samples", "max_new_tokens", "piece", "batch", "lengths", "keys")
        if self.keys != (4,) and "mk1" not in self.tasks:
            raise EvaluationError("--keys is for the task mk1; add it to --tasks, or leave --keys out")

    @property
    def depth_percents(self) -> list[float]:
        """Places of the needle in percent of the haystack."""
        if self.depths == 1:
            return [50.0]
        return [round(100 * index / (self.depths - 1), 2) for index in range(self.depths)]
