"""What the paper reports: "Titans: Learning to Memorize at Test Time", arXiv 2501.00663 and its NeurIPS 2025 version.

Percent and perplexities. BABILong, efficiency and the effect of depth are figures there, without numbers.
"""

LANGUAGE_AT = "760M parameters, 30B tokens"
LANGUAGE = {
    "Transformer++": (25.21, 27.64, 35.78, 66.92, 42.19, 51.95, 60.38, 32.46, 39.51, 60.37, 48.69),
    "Gated DeltaNet": (21.18, 22.09, 35.54, 68.01, 44.95, 50.73, 66.87, 33.09, 39.21, 59.14, 49.69),
    "Titans LMM": (20.04, 21.96, 37.40, 69.28, 48.46, 52.27, 66.31, 35.84, 40.13, 62.76, 51.56),
    "Titans MAC": (19.93, 20.12, 39.62, 70.46, 49.01, 53.18, 67.86, 36.01, 41.87, 62.05, 52.51),
    "Titans MAG": (18.61, 19.86, 40.98, 70.25, 48.94, 52.89, 68.23, 36.19, 40.38, 62.11, 52.50),
    "Titans MAL": (19.07, 20.33, 40.05, 69.99, 48.82, 53.02, 67.54, 35.65, 30.98, 61.72, 50.97),
}
"""Columns as in evals.harness.tasks.COLUMNS, then the average of the accuracies."""

NIAH_TASKS = {"niah_single_1": "PK", "niah_single_2": "N", "niah_single_3": "W"}
NIAH_LENGTHS = (2_048, 4_096, 8_192, 16_384)
NIAH = {
    "Mamba2": (98.6, 61.4, 31.0, 5.4, 98.4, 55.8, 14.2, 0.0, 42.2, 4.2, 0.0, 0.0),
    "Titans LMM": (99.8, 98.4, 98.2, 96.2, 100.0, 99.8, 93.4, 80.2, 90.4, 89.4, 85.8, 80.6),
    "Titans MAC": (99.2, 98.8, 99.0, 98.4, 99.6, 98.2, 97.6, 97.4, 98.2, 98.2, 95.6, 95.2),
    "Titans MAG": (99.4, 98.0, 97.4, 97.4, 99.2, 98.8, 97.2, 98.6, 98.0, 98.0, 90.2, 88.2),
    "Titans MAL": (98.8, 98.6, 98.8, 97.8, 99.8, 98.1, 96.8, 96.4, 98.0, 97.4, 92.0, 90.4),
}
"""By task, lengths inside."""

ABLATION_AT = "400M parameters"
ABLATION = {
    "LMM": (27.01, 92.68),
    "linear memory": (28.49, 85.34),
    "no convolution": (28.73, 90.28),
    "no momentum": (28.98, 87.12),
    "no weight decay": (29.04, 85.60),
    "no persistent tokens": (27.63, 92.49),
}
"""Mean perplexity of wikitext and LAMBADA, mean accuracy over the twelve cells of S-NIAH."""
