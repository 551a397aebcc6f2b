"""Forecasts of time series under one budget, beside the paper's table.

Its settings are here and import nothing heavy: `--help` must be quick.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evals.command_line import EvaluationError, check_at_least, check_named_once

OTHERS = ("repeat", "dlinear", "patchtst", "patchtsmixer")
"""Systems that are not ours: the last value again and again; DLinear; transformers' PatchTST and PatchTSMixer."""
DEFAULT_SYSTEMS = ("lmm", *OTHERS)


@dataclass(frozen=True)
class ForecastingSettings:
    """Trains forecasters on time series under one budget, seed by seed, and prints the paper's table with ours beside.

    The protocol is Time-Series-Library's: windows of 96 steps, a model for each horizon, the splits of each set, values
    scaled by the training rows, errors over all test windows. Every system gets the same batches, steps and learning
    rate; of five looks at validation the best one's weights are tested. What is finished stands in
    OUTPUT/forecasting.jsonl and is not done again. forecasting.md and .png are written at the end.
    """

    data: tuple[str, ...]
    """CSV files (.gz too), a column a channel, behind a column `date` or not; the name's beginning, ETTh or ETTm, says
    how it is split, all others 70/10/20. A name of a set without a file (ETTh1, weather, ...) comes from the hub."""
    output: Path
    """Folder for results, table and plot. It belongs to one budget."""
    systems: tuple[str, ...] = DEFAULT_SYSTEMS
    """Variants of ours (lmm, mac, mag, mal, transformer, mamba2, ...), repeat, dlinear, patchtst, patchtsmixer."""
    horizons: tuple[int, ...] = (96,)
    """Steps to forecast; the paper's means are of 96 192 336 720."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each decides initial weights and the order of the data, for all systems alike."""
    steps: int = 1_000
    """Updates."""
    batch: int = 32
    """Windows of an update."""
    learning_rate: float = 1e-3
    """The highest, AdamW."""
    context: int = 96
    """Steps of a window."""
    patch_length: int = 16
    """Steps of a token; 1 is a token a step. PatchTST and PatchTSMixer have the same."""
    patch_stride: int = 8
    """Steps from token to token."""
    channels: Literal["apart", "together"] = "apart"
    """ours: every channel a sequence of its own, or all in each token."""
    scaling: Literal["std", "revin", "none"] = "std"
    """ours: of every window the mean and deviation are taken off; revin learns a gain and a shift beside it."""
    frame: Literal["swiglu", "einfft"] = "swiglu"
    """ours: what follows the memory in a block; einfft is SiMBA's."""
    chunk_size: int = 4
    """ours: tokens whose inner gradients are taken at the same memory; a window of patches is a dozen tokens."""
    dim: int = 32
    """Width of ours, PatchTST and PatchTSMixer."""
    layers: int = 2
    """Blocks of each of these."""
    carried: bool = False
    """ours: measure also windows that follow each other, with the memory's state going on from one to the next, in rows
    of their own beside the same windows read from an empty state; comparable with nothing else."""
    export: bool = False
    """Write each of our models of the first seed as a folder that transformers loads alone, OUTPUT/models/..."""

    def __post_init__(self) -> None:
        check_at_least(
            1, self, "horizons", "steps", "batch", "context", "patch_length", "patch_stride", "dim", "layers"
        )
        check_at_least(0, self, "seeds")
        check_named_once(self, "data", "systems", "horizons", "seeds")
        if not self.learning_rate > 0:
            raise EvaluationError(f"--learning-rate is {self.learning_rate}; it must be above 0")
        if self.carried and self.frame == "einfft":
            raise EvaluationError("--carried needs a causal model; give --frame swiglu")
        if self.patch_length > self.context:
            raise EvaluationError(f"--patch-length {self.patch_length} is longer than --context {self.context}")
