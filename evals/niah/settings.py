"""Settings of the needle-in-a-haystack evaluation. Imports nothing heavy: `--help` must be quick."""

from dataclasses import dataclass
from pathlib import Path

from evals.command_line import EvaluationError


@dataclass(frozen=True)
class NiahSettings:
    """Finds a needle in a haystack: RULER's niah_single_1 (noise), streamed with constant memory, answered greedily.

    Finished samples stand in OUTPUT/niah.jsonl and are not run again; OUTPUT/niah.json and OUTPUT/niah.png report on
    every sample of this model there.
    """

    checkpoint: Path
    """Run folder (its newest checkpoint is taken) or one checkpoint folder."""
    output: Path
    """Folder for niah.jsonl, niah.json and niah.png."""
    lengths: tuple[int, ...] = (1_024, 4_096, 16_384, 65_536)
    """Tokens of a sample: prompt and room for the answer together."""
    depths: int = 5
    """Places of the needle, evenly from the start (0 %) to the end (100 %) of the haystack; 1 is the middle."""
    samples: int = 1
    """Samples of each length and depth."""
    seed: int = 0
    """Decides keys and values. Runs with several seeds into one folder are reported together."""
    max_new_tokens: int = 32
    """Tokens of the answer, and the room kept for it; RULER's own tables use 128."""
    piece: int = 2_048
    """Tokens read at a time; bounds the memory. Results do not depend on it; multiples of the model's segment are
    fastest."""
    batch: int = 16
    """Most samples read side by side."""
    tokenizer: Path | None = None
    """Tokenizer file; by default RUN/tokenizer/tokenizer.model."""

    def __post_init__(self) -> None:
        if not self.lengths:
            raise EvaluationError("--lengths is empty; give at least one length")
        for name in ("depths", "samples", "max_new_tokens", "piece", "batch", *(["lengths"] if self.lengths else [])):
            value = getattr(self, name)
            if (min(value) if isinstance(value, tuple) else value) < 1:
                raise EvaluationError(f"--{name.replace('_', '-')} is {value}; give at least 1")

    @property
    def depth_percents(self) -> list[float]:
        """Places of the needle in percent of the haystack."""
        if self.depths == 1:
            return [50.0]
        return [round(100 * index / (self.depths - 1), 2) for index in range(self.depths)]
