"""DNA tasks: sequences, classes, the nucleotide tokenizer and batches."""

import csv
import gzip
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from evals.command_line import EvaluationError

LETTERS = "ACGTN"
"""N is a nucleotide that is not known."""
PAD = 0
VOCABULARY = {"[PAD]": PAD, **{letter: index for index, letter in enumerate(LETTERS, 1)}}
_COMPLEMENT = torch.tensor([PAD, *(VOCABULARY[letter] for letter in "TGCAN")])
_IDS = {letter.encode()[0]: index for letter, index in VOCABULARY.items() if len(letter) == 1}
_SPLITS = {"train": "train", "dev": "validation", "valid": "validation", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class DnaTask:
    """A classification task.

    Attributes:
        name: Of its folder.
        classes: Names, sorted.
        parts: "train", "test" and perhaps "validation": sequences as ids, and classes.
    """

    name: str
    classes: tuple[str, ...]
    parts: dict[str, list[tuple[Tensor, int]]]


class Sequences(Dataset[dict[str, Any]]):
    """Sequences with classes, from either strand where a random number generator is given."""

    def __init__(self, samples: Sequence[tuple[Tensor, int]], strands: random.Random | None = None) -> None:
        self.samples, self.strands = samples, strands

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids, label = self.samples[index]
        turned = self.strands is not None and self.strands.random() < 0.5
        return {"input_ids": reverse_complement(ids) if turned else ids, "labels": label}


def reverse_complement(ids: Tensor) -> Tensor:
    """The other strand of ids (T,), read in its direction."""
    return _COMPLEMENT[ids.flip(0)]


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch, padded on the left: input_ids and attention_mask (B, T), labels (B,)."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    ids = torch.full((len(samples), longest), PAD)
    for row, sample in zip(ids, samples, strict=True):
        row[longest - len(sample["input_ids"]) :] = sample["input_ids"]
    labels = torch.tensor([sample["labels"] for sample in samples])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def encode(sequence: str, where: str, max_length: int) -> Tensor:
    """Ids of a sequence's middle.

    Raises:
        EvaluationError: It is empty, or has letters that are no nucleotides.
    """
    letters = sequence.strip().upper()
    if wrong := sorted(set(letters) - set(LETTERS)):
        raise EvaluationError(f"{where}: {wrong[0]!r} is no nucleotide; a sequence has the letters {LETTERS} alone")
    if not letters:
        raise EvaluationError(f"{where}: the sequence is empty; leave it out")
    begin = max(0, len(letters) - max_length) // 2
    return torch.tensor([_IDS[letter] for letter in letters[begin : begin + max_length].encode()])


def nucleotide_tokenizer() -> Any:
    """The tokenizer beside an exported model, transformers' own class: a token a letter, padding on the left.

    It knows ACGTN in either case; any other letter becomes N.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="N"))
    upper = [normalizers.Replace(letter.lower(), letter) for letter in LETTERS]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s"), ""), *upper])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="N",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def load_task(source: str, max_length: int) -> DnaTask:
    """A task from a folder, or by its name from the hub.

    Raises:
        EvaluationError: There is neither, a part is missing or has one class only, or a sequence is none.
    """
    folder = Path(source)
    if not folder.is_dir():
        rows = _from_hub(source)
    elif files := [file for file in sorted(folder.iterdir()) if file.name.endswith((".csv", ".csv.gz"))]:
        rows = {part: list(_from_csv(file)) for file in files if (part := _SPLITS.get(file.name.partition(".")[0]))}
    else:
        # Sorted: the order in which a file system lists classes is its own, and would be that of the labels.
        splits = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name in _SPLITS]
        rows = {_SPLITS[path.name]: list(_from_texts(path)) for path in splits}
    if missing := [part for part in ("train", "test") if not rows.get(part)]:
        raise EvaluationError(f"--data {source}: has no {missing[0]} sequences; give a folder with train and test")
    classes = tuple(sorted({label for _, label, _ in rows["train"]}))
    if len(classes) < 2:
        raise EvaluationError(f"--data {source}: all training sequences are of class {classes[0]}; give at least two")
    number = {label: index for index, label in enumerate(classes)}
    parts: dict[str, list[tuple[Tensor, int]]] = {}
    for part, samples in rows.items():
        encoded = [encode(sequence, where, max_length) for sequence, _, where in samples]
        if unknown := sorted({label for _, label, _ in samples} - set(classes)):
            raise EvaluationError(f"--data {source}: {part} has class {unknown[0]}, which training has not")
        parts[part] = [(ids, number[label]) for ids, (_, label, _) in zip(encoded, samples, strict=True)]
    return DnaTask("/".join(folder.parts[-2:]) if folder.is_dir() else source, classes, parts)


Labelled = tuple[str, str, str]
"""Sequence, class, and where it stands."""


def _from_csv(file: Path) -> Iterable[Labelled]:
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines)
            if not {"sequence", "label"} <= set(reader.fieldnames or ()):
                raise EvaluationError(f"{file}: its first line is not `sequence,label`; name the columns so")
            for row in reader:
                yield row["sequence"] or "", row["label"] or "", f"{file}, line {reader.line_num}"
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as fault:
        raise EvaluationError(f"{file}: cannot be read ({fault}); give a CSV file, or one in gzip") from None


def _from_texts(split: Path) -> Iterable[Labelled]:
    for folder in sorted(path for path in split.iterdir() if path.is_dir()):
        for file in sorted(folder.glob("*.txt")):
            yield file.read_text(encoding="utf-8", errors="replace"), folder.name, str(file)


def _from_hub(name: str) -> dict[str, list[Labelled]]:
    from datasets import load_dataset

    hub = f"katarinagresova/Genomic_Benchmarks_{name}"
    try:
        splits = load_dataset(hub)
        return {
            _SPLITS[split]: [(row["seq"], str(row["label"]), f"{hub}, {split}") for row in table]
            for split, table in splits.items()
        }
    except Exception as fault:  # datasets and the hub raise many kinds
        reason = " ".join(str(fault).split())[:200]
        raise EvaluationError(
            f"--data {name}: no such folder, and {hub} cannot be read ({reason}); give a folder"
        ) from None
