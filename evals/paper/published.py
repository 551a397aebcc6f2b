"""What papers report of all systems. Percent and perplexities; nothing where a paper has a figure without numbers.

Titans' own rows are here at 760M alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TITANS = "[Titans: Learning to Memorize at Test Time](https://arxiv.org/abs/2501.00663)"
"""With its NeurIPS 2025 version."""
GATED_DELTANET = "[Gated Delta Networks](https://arxiv.org/abs/2412.06464)"
Rows = Mapping[str, tuple[float, ...]]
"""By the name of a model."""

HYBRIDS = {
    "mamba+transformer": "Samba",
    "gated_deltanet+transformer": "Gated DeltaNet-H1",
    "mamba2+gated_deltanet+transformer": "Gated DeltaNet-H2",
}
"""What the papers call mixers that take turns; one alone says so itself."""


@dataclass(frozen=True)
class Published:
    """A table of models of one size."""

    at: str
    """Parameters and tokens."""
    source: str
    """The paper."""
    rows: Rows
    """Of the nine tasks columns as in evals.harness.tasks.COLUMNS, then the average of the accuracies as printed."""
    shape: Mapping[str, Any] = field(default_factory=dict)
    """Of the nine tasks: settings by which a model of ours is of that size."""
    columns: tuple[tuple[str, int], ...] = ()
    """Of S-NIAH, percent: task and length."""


LANGUAGE = {
    "340M": Published(
        "340M parameters, 15B tokens",
        TITANS,
        shape={"num_layers": 24, "dim": 1024, "tie_embeddings": True},
        rows={
            "Transformer++": (31.52, 41.08, 30.76, 62.98, 34.76, 50.53, 45.21, 24.05, 36.81, 58.24, 42.92),
            "RetNet": (32.50, 49.73, 28.24, 62.61, 34.15, 50.91, 44.27, 23.62, 36.79, 59.72, 42.54),
            "Mamba": (30.83, 40.21, 29.94, 63.79, 35.88, 49.82, 49.24, 24.56, 35.41, 60.07, 43.59),
            "DeltaNet": (28.65, 47.30, 28.43, 63.52, 35.95, 49.63, 52.68, 25.37, 37.96, 58.79, 44.04),
            "TTT": (27.44, 34.19, 30.06, 63.97, 35.71, 50.08, 53.01, 26.11, 37.32, 59.83, 44.51),
            "Gated DeltaNet": (27.01, 30.94, 34.11, 63.08, 38.12, 51.60, 55.28, 26.77, 34.89, 59.54, 45.42),
        },
    ),
    "400M": Published(
        "400M parameters, 15B tokens",
        TITANS,
        shape={"num_layers": 24, "dim": 1024, "tie_embeddings": False},
        rows={
            "Transformer++": (30.63, 37.37, 29.64, 64.27, 37.72, 51.53, 54.95, 27.36, 38.07, 61.59, 45.64),
            "RetNet": (29.92, 46.83, 29.16, 65.23, 36.97, 51.85, 56.01, 27.55, 37.30, 59.66, 45.47),
            "Mamba": (29.22, 39.88, 29.82, 65.72, 37.93, 50.11, 58.37, 26.70, 37.76, 61.13, 45.94),
            "Mamba2": (26.34, 33.19, 32.03, 65.77, 39.73, 52.48, 59.00, 27.64, 37.92, 60.72, 46.91),
            "DeltaNet": (27.69, 44.04, 29.96, 64.52, 37.03, 50.82, 56.77, 27.13, 38.22, 60.09, 45.57),
            "TTT": (26.11, 31.52, 33.25, 65.70, 39.11, 51.68, 58.04, 28.99, 38.26, 59.87, 46.86),
            "Gated DeltaNet": (25.47, 29.24, 34.40, 65.94, 40.46, 51.46, 59.80, 28.58, 37.43, 60.03, 47.26),
            "Samba": (25.32, 29.47, 36.86, 66.09, 39.24, 51.45, 60.12, 27.20, 38.68, 58.22, 47.23),
            "Gated DeltaNet-H2": (24.19, 28.09, 36.77, 66.43, 40.79, 52.17, 59.55, 29.09, 39.04, 58.56, 47.69),
        },
    ),
    "760M": Published(
        "760M parameters, 30B tokens",
        TITANS,
        shape={"num_layers": 24, "dim": 1536},
        rows={
            "Transformer++": (25.21, 27.64, 35.78, 66.92, 42.19, 51.95, 60.38, 32.46, 39.51, 60.37, 48.69),
            "RetNet": (26.08, 24.45, 34.51, 67.19, 41.63, 52.09, 63.17, 32.78, 38.36, 57.92, 48.46),
            "Mamba": (28.12, 23.96, 32.80, 66.04, 39.15, 52.38, 61.49, 30.34, 37.96, 57.62, 47.22),
            "Mamba2": (22.94, 28.37, 33.54, 67.90, 42.71, 49.77, 63.48, 31.09, 40.06, 58.15, 48.34),
            "DeltaNet": (24.37, 24.60, 37.06, 66.93, 41.98, 50.65, 64.87, 31.39, 39.88, 59.02, 48.97),
            "TTT": (24.17, 23.51, 34.74, 67.25, 43.92, 50.99, 64.53, 33.81, 40.16, 59.58, 47.32),
            "Gated DeltaNet": (21.18, 22.09, 35.54, 68.01, 44.95, 50.73, 66.87, 33.09, 39.21, 59.14, 49.69),
            "Samba": (20.63, 22.71, 39.72, 69.19, 47.35, 52.01, 66.92, 33.20, 38.98, 61.24, 51.08),
            "Gated DeltaNet-H2": (19.88, 20.83, 39.18, 68.95, 48.22, 52.57, 67.01, 35.49, 39.39, 61.11, 51.49),
            "Titans LMM": (20.04, 21.96, 37.40, 69.28, 48.46, 52.27, 66.31, 35.84, 40.13, 62.76, 51.56),
            "Titans MAC": (19.93, 20.12, 39.62, 70.46, 49.01, 53.18, 67.86, 36.01, 41.87, 62.05, 52.51),
            "Titans MAG": (18.61, 19.86, 40.98, 70.25, 48.94, 52.89, 68.23, 36.19, 40.38, 62.11, 52.50),
            "Titans MAL": (19.07, 20.33, 40.05, 69.99, 48.82, 53.02, 67.54, 35.65, 30.98, 61.72, 50.97),
        },
    ),
    "1.3B": Published(
        "1.3B parameters, 100B tokens",
        GATED_DELTANET,
        shape={"num_layers": 18, "dim": 2048},
        rows={
            "RetNet": (19.08, 17.27, 40.52, 70.07, 49.16, 54.14, 67.34, 33.78, 40.78, 60.39, 52.02),
            "Mamba": (17.92, 15.06, 43.98, 71.32, 52.91, 52.95, 69.52, 35.40, 37.76, 61.13, 53.12),
            "Mamba2": (16.56, 12.56, 45.66, 71.87, 55.67, 55.24, 72.47, 37.88, 40.20, 60.13, 54.89),
            "DeltaNet": (17.71, 16.88, 42.46, 70.72, 50.93, 53.35, 68.47, 35.66, 40.22, 55.29, 52.14),
            "Gated DeltaNet": (16.42, 12.17, 46.65, 72.25, 55.76, 57.45, 71.21, 38.39, 40.63, 60.24, 55.32),
            "Transformer++": (18.53, 18.32, 42.60, 70.02, 50.23, 53.51, 68.83, 35.10, 40.66, 57.09, 52.25),
            "Samba": (16.13, 13.29, 44.94, 70.94, 53.42, 55.56, 68.81, 36.17, 39.96, 62.11, 54.00),
            "Gated DeltaNet-H1": (16.07, 12.12, 47.73, 72.57, 56.53, 58.40, 71.75, 40.10, 41.40, 63.21, 56.40),
            "Gated DeltaNet-H2": (15.91, 12.55, 48.76, 72.19, 56.88, 57.77, 71.33, 39.07, 41.91, 61.55, 56.18),
        },
    ),
}
"""By size."""
USUAL_SIZE = "760M"
"""Where models of other sizes are put."""


NIAH_TASKS = {"niah_single_1": "PK", "niah_single_2": "N", "niah_single_3": "W"}
NIAH_LENGTHS = (2_048, 4_096, 8_192, 16_384)
NIAH = {
    "niah": Published(
        "760M parameters, 30B tokens",
        TITANS,
        columns=tuple((task, length) for task in NIAH_TASKS for length in NIAH_LENGTHS),
        rows={
            "TTT": (98.4, 98.8, 98.0, 88.4, 60.2, 36.6, 10.2, 4.4, 78.8, 28.0, 4.4, 0.0),
            "Mamba2": (98.6, 61.4, 31.0, 5.4, 98.4, 55.8, 14.2, 0.0, 42.2, 4.2, 0.0, 0.0),
            "DeltaNet": (96.8, 98.8, 98.6, 71.4, 47.2, 15.4, 12.8, 5.4, 46.2, 20.0, 1.6, 0.0),
            "Titans LMM": (99.8, 98.4, 98.2, 96.2, 100.0, 99.8, 93.4, 80.2, 90.4, 89.4, 85.8, 80.6),
            "Titans MAC": (99.2, 98.8, 99.0, 98.4, 99.6, 98.2, 97.6, 97.4, 98.2, 98.2, 95.6, 95.2),
            "Titans MAG": (99.4, 98.0, 97.4, 97.4, 99.2, 98.8, 97.2, 98.6, 98.0, 98.0, 90.2, 88.2),
            "Titans MAL": (98.8, 98.6, 98.8, 97.8, 99.8, 98.1, 96.8, 96.4, 98.0, 97.4, 92.0, 90.4),
        },
    ),
    "niah_short": Published(
        "1.3B parameters, 100B tokens",
        GATED_DELTANET,
        columns=tuple((task, n) for task in NIAH_TASKS for n in (1_024, 2_048, 4_096, 8_192))[:-1],
        rows={
            "DeltaNet": (97.4, 96.8, 99.0, 98.8, 98.4, 45.6, 18.6, 14.4, 85.2, 47.0, 22.4),
            "Mamba2": (99.2, 98.8, 65.4, 30.4, 99.4, 98.8, 56.2, 17.0, 64.4, 47.6, 4.6),
            "Gated DeltaNet": (98.4, 88.4, 91.4, 91.8, 100.0, 99.8, 92.2, 29.6, 86.6, 84.2, 27.6),
        },
    ),
}
"""By the key of their table."""

ABLATION_AT = "400M parameters"
ABLATION = {
    "LMM": (27.01, 92.68),
    "linear memory": (28.49, 85.34),
    "no convolution": (28.73, 90.28),
    "no momentum": (28.98, 87.12),
    "no weight decay": (29.04, 85.60),
    "no persistent tokens": (27.63, 92.49),
}
"""Titans: mean perplexity of wikitext and LAMBADA, mean accuracy over the twelve cells of S-NIAH."""
