"""The DNA tasks: what is missing is trained and tested, then the tables are written."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evals.command_line import EvaluationError, say
from evals.genomics import GenomicsSettings
from evals.genomics.data import PAD, VOCABULARY, DnaTask, Sequences, collate, load_task, nucleotide_tokenizer
from evals.report import interval_text, markdown_table, settings_of, write_bytes
from evals.trainer import seed_all, sweep, titans_sizes, train

_NOT_BUDGET = ("data", "output", "systems", "seeds", "export")
_PAPER_SETS = {
    "human_enhancers_cohn": "Cohn",
    "human_enhancers_ensembl": "Ens",
    "human_ensembl_regulatory": "Reg",
    "human_nontata_promoters": "non-TATA",
    "human_ocr_ensembl": "OCR",
}
_PAPER = {
    "CNN": "69.5 68.9 93.3 84.6 68.0",
    "DNABERT": "74.0 85.7 88.1 85.6 75.1",
    "GPT": "70.5 83.5 91.5 87.7 73.0",
    "HyenaDNA": "74.2 89.2 93.8 96.6 80.9",
    "Transformer++": "73.4 89.5 89.9 94.4 79.5",
    "Mamba": "73.0 - - 96.6 -",
    "Based": "74.6 89.5 89.5 96.8 79.0",
    "Titans memory": "75.2 89.6 89.3 96.6 79.9",
}
"""Top-1 accuracy, table 4 of [Titans](https://arxiv.org/abs/2501.00663v1)."""


@dataclass(frozen=True)
class ClassifierResult:
    """One model, tested."""

    task: str
    system: str
    seed: int
    mcc: float
    accuracy: float
    parameters: int
    seconds: float
    sequences: int
    """Of the test."""
    budget: dict[str, Any]
    """The settings that all results of a folder share."""

    @property
    def key(self) -> tuple[str, str, int]:
        """What it is a result of."""
        return self.task, self.system, self.seed


class CNN(nn.Module):
    """GenomicsBenchmarks' baseline: three convolutions of 8 taps, each with a norm and pooling, and two linear maps.

    The published one flattens sequences of one length; the maximum over positions here serves any.

    Args:
        classes: How many.
    """

    WIDTHS = (16, 8, 4)

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(VOCABULARY), 100, padding_idx=PAD)
        layers: list[nn.Module] = []
        for before, width in zip((100, *self.WIDTHS), self.WIDTHS, strict=False):
            layers += [nn.Conv1d(before, width, 8, padding=4), nn.BatchNorm1d(width), nn.ReLU(), nn.MaxPool1d(2)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(self.WIDTHS[-1], 512), nn.ReLU(), nn.Linear(512, classes))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """(B, T) to {"logits": (B, classes)}, and "loss" in front where labels are given."""
        x = self.embedding(F.pad(input_ids, (0, max(0, 8 - input_ids.shape[1])), value=PAD))
        logits = self.head(self.layers(x.transpose(1, 2)).amax(-1))
        return ({} if labels is None else {"loss": F.cross_entropy(logits, labels)}) | {"logits": logits}


def compare(settings: GenomicsSettings) -> str:
    """Trains and tests what is missing, writes genomics.md, and returns the tables.

    Raises:
        EvaluationError: A file or a setting does not fit, or the folder holds results of another budget.
    """
    tasks = [load_task(source, settings.max_length) for source in settings.data]
    for system in settings.systems:
        build(system, settings, 2)
    budget = {name: value for name, value in settings_of(settings).items() if name not in _NOT_BUDGET}
    wanted = (
        ((task.name, system, seed), task, system, seed, settings, budget)
        for seed, task, system in product(settings.seeds, tasks, settings.systems)
    )
    results = sweep(settings.output / "genomics.jsonl", ClassifierResult, budget, wanted, _trained)
    text = _tables(results, settings.protocol)
    write_bytes(settings.output / "genomics.md", text.encode())
    return text


def build(system: str, settings: GenomicsSettings, classes: int) -> nn.Module:
    """A new model.

    Raises:
        EvaluationError: The sizes do not fit it, or there is no such system.
    """
    if system == "cnn":
        return CNN(classes)
    from titans_mcore.hf.configuration_titans import TitansHFConfig
    from titans_mcore.hf.tasks_titans import TitansForSequenceClassification

    try:
        config = TitansHFConfig(
            variant=system,
            vocab_size=len(VOCABULARY),
            pad_token_id=PAD,
            num_labels=classes,
            classifier_pooling=settings.pooling,
            **titans_sizes(settings.layers, settings.dim, max(1, settings.dim // 32), settings.chunk_size),
        )
        return TitansForSequenceClassification(config)
    except ValueError as fault:
        raise EvaluationError(f"--systems {system}: {fault}") from None


def _trained(
    task: DnaTask, system: str, seed: int, settings: GenomicsSettings, budget: dict[str, Any]
) -> list[ClassifierResult]:
    learned, chosen = parts_of(task, settings.protocol, seed)
    seed_all(seed)
    model = build(system, settings, len(task.classes))
    strands = random.Random(seed) if settings.reverse_complement == "train" else None
    _, seconds = train(
        model,
        Sequences(learned, strands),
        Sequences(chosen),
        label="labels",
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        seed=seed,
        collate=collate,
    )
    mcc, accuracy = scores(model, task.parts["test"], settings.batch)
    say(f"{task.name}, {system}, seed {seed}: MCC {mcc:.3f}, accuracy {accuracy:.3f}, {seconds:.0f} s")
    if seed == settings.seeds[0] and settings.export and system != "cnn":
        from titans_mcore.hf.save import save_alone

        sample = {name: x for name, x in collate([Sequences(chosen)[0]]).items() if name != "labels"}
        folder = settings.output / "models" / f"{task.name.replace('/', '-')}-{system}"
        save_alone(model, folder, sample, nucleotide_tokenizer())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    measured = (mcc, accuracy, parameters, round(seconds, 1), len(task.parts["test"]))
    return [ClassifierResult(task.name, system, seed, *measured, budget)]


def parts_of(task: DnaTask, protocol: str, seed: int) -> tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]:
    """What is learned from, and what chooses among states: test data under hyenadna, else dev or a tenth held out."""
    if protocol == "hyenadna":
        return task.parts["train"], task.parts["test"]
    if "validation" in task.parts:
        return task.parts["train"], task.parts["validation"]
    shuffled = list(task.parts["train"])
    random.Random(seed).shuffle(shuffled)
    held_out = max(1, len(shuffled) // 10)
    return shuffled[held_out:], shuffled[:held_out]


@torch.inference_mode()
def scores(model: nn.Module, samples: Sequence[tuple[Tensor, int]], batch: int) -> tuple[float, float]:
    """Matthews' correlation coefficient, of several classes too, and accuracy."""
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    data, said = Sequences(samples), list[int]()
    for begin in range(0, len(data), batch):
        given = collate([data[index] for index in range(begin, min(begin + batch, len(data)))])
        del given["labels"]
        said += model(**given)["logits"].argmax(-1).tolist()
    labels = [label for _, label in samples]
    return float(matthews_corrcoef(labels, said)), float(accuracy_score(labels, said))


def _tables(results: Sequence[ClassifierResult], protocol: str) -> str:
    contaminated = ", chosen by TEST data (contaminated)" if protocol == "hyenadna" else ""
    groups: dict[tuple[str, str], list[ClassifierResult]] = {}
    for result in results:
        groups.setdefault((result.task, result.system), []).append(result)
    rows, paper = [], {name: dict(zip(_PAPER_SETS, cells.split(), strict=True)) for name, cells in _PAPER.items()}
    for (task, system), group in sorted(groups.items()):
        mcc, accuracy = (interval_text([getattr(result, name) for result in group]) for name in ("mcc", "accuracy"))
        seconds = f"{statistics.fmean(result.seconds for result in group):.0f}"
        row = [task, system + contaminated, f"{group[0].parameters:,}", mcc, accuracy]
        rows.append([*row, str(len(group)), seconds, f"{group[0].sequences:,}"])
        benchmark = task.rpartition("/")[2]
        if benchmark in _PAPER_SETS:
            mean = 100 * statistics.fmean(result.accuracy for result in group)
            paper.setdefault(f"here, from scratch: {system}{contaminated}", {})[benchmark] = f"{mean:.1f}"
    header = ["task", "system", "parameters", "MCC", "accuracy", "seeds", "seconds", "test sequences"]
    text = markdown_table(header, rows) + "\n"
    if len(paper) == len(_PAPER):
        return text
    body = [[name, *(cells.get(column, "-") for column in _PAPER_SETS)] for name, cells in paper.items()]
    return f"{text}\n{markdown_table(['top-1 %, the paper (pretrained but CNN)', *_PAPER_SETS.values()], body)}\n"
