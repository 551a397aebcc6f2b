"""Classes of DNA under one budget, beside the paper's table.

Its settings are here and import nothing heavy: `--help` must be quick.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evals.command_line import EvaluationError, check_at_least, check_named_once


@dataclass(frozen=True)
class GenomicsSettings:
    """Trains classifiers of DNA from scratch under one budget, seed by seed: MCC and accuracy on the test sequences.

    A token is a nucleotide. What is finished stands in OUTPUT/genomics.jsonl and is not done again; genomics.md is
    written at the end, GenomicsBenchmarks' sets beside what the paper reports, whose models were pretrained.
    """

    data: tuple[str, ...]
    """Task folders: train, dev and test.csv (.gz too) with `sequence,label` as in GUE, or split/class/*.txt as in
    GenomicsBenchmarks; a name of a GenomicsBenchmarks set without a folder comes from the hub."""
    output: Path
    """Folder for results and tables. It belongs to one budget."""
    systems: tuple[str, ...] = ("lmm", "mag", "transformer", "cnn")
    """Variants of ours, or cnn, GenomicsBenchmarks' baseline."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each decides initial weights, the order of the data and what is held out, for all systems alike."""
    protocol: Literal["caduceus", "hyenadna"] = "caduceus"
    """What chooses among five states of a training. caduceus: a dev file, or a tenth of the training data; hyenadna:
    the TEST data, as the paper's numbers are made; its rows are labelled as contaminated."""
    steps: int = 1_000
    """Updates."""
    batch: int = 64
    """Sequences of an update."""
    learning_rate: float = 1e-3
    """The highest, AdamW."""
    weight_decay: float = 0.1
    """AdamW's."""
    pooling: Literal["mean", "last"] = "mean"
    """ours: what of the last hidden states is classified."""
    reverse_complement: Literal["train", "off"] = "train"
    """train: half of the training sequences are read from the other strand, drawn anew each time."""
    dim: int = 64
    """Width of ours."""
    layers: int = 2
    """Blocks of ours."""
    chunk_size: int = 16
    """ours: tokens whose inner gradients are taken at the same memory."""
    max_length: int = 1_024
    """Nucleotides that are read of a sequence, its middle ones."""
    export: bool = False
    """Write each of our models of the first seed as a folder that transformers loads alone, OUTPUT/models/..."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "steps", "batch", "dim", "layers", "chunk_size", "max_length")
        check_at_least(0, self, "seeds", "weight_decay")
        check_named_once(self, "data", "systems", "seeds")
        if not self.learning_rate > 0:
            raise EvaluationError(f"--learning-rate is {self.learning_rate}; it must be above 0")
