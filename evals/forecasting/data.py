"""Time series as Time-Series-Library reads, splits and scales them (its data_provider/data_loader.py)."""

import csv
import gzip
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from evals.command_line import EvaluationError

HUB = "thuml/Time-Series-Library"
SETS = ("ETTh1", "ETTh2", "ETTm1", "ETTm2", "weather", "electricity", "traffic")
"""The paper's sets, as files and on the hub."""
_MONTH = 30 * 24  # hours


@dataclass(frozen=True)
class Series:
    """A set, scaled by its training rows.

    Attributes:
        name: Of the file.
        channels: Their names.
        values: (rows, C), float32.
        train: Rows [from, to).
        validation: The same; windows begin `context` rows before, so that all their targets are inside.
        test: The same.
    """

    name: str
    channels: tuple[str, ...]
    values: Tensor
    train: tuple[int, int]
    validation: tuple[int, int]
    test: tuple[int, int]

    def windows(self, part: str, context: int, horizon: int) -> "Windows":
        """All windows of a part, "train", "validation" or "test".

        Raises:
            EvaluationError: There is none.
        """
        begin, end = getattr(self, part)
        values = self.values[max(0, begin - (0 if part == "train" else context)) : end]
        if len(values) < context + horizon:
            raise EvaluationError(
                f"{self.name}: {part} has {len(values)} rows with the {context} in front; a horizon of {horizon} needs "
                f"{context + horizon}, give a shorter one or more data"
            )
        return Windows(values, context, horizon)


class Windows(Dataset[dict[str, Tensor]]):
    """Every window of rows (N, C) with stride 1: past_values (context, C) and future_values (horizon, C)."""

    def __init__(self, values: Tensor, context: int, horizon: int) -> None:
        self.values, self.context, self.horizon = values, context, horizon

    def __len__(self) -> int:
        return len(self.values) - self.context - self.horizon + 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        between = index + self.context
        return {
            "past_values": self.values[index:between],
            "future_values": self.values[between : between + self.horizon],
        }


def load_series(source: str) -> Series:
    """A set from a CSV file, or by its name from the hub.

    Raises:
        EvaluationError: There is neither, or the values are none to learn from: the message names row and column.
    """
    path = Path(source)
    if path.is_file():
        name = path.name.removesuffix(".gz").removesuffix(".csv")
        channels, rows = _read_csv(path)
    elif source in SETS:
        name = source
        channels, rows = _read_hub(source)
    else:
        raise EvaluationError(f"--data {source}: no such file; give a CSV file, or one of {', '.join(SETS)}")
    return scaled(name, channels, torch.tensor(rows, dtype=torch.float64))


def scaled(name: str, channels: tuple[str, ...], values: Tensor) -> Series:
    """A set from its values (rows, C): the splits, and the training rows' mean and deviation taken off all rows.

    Raises:
        EvaluationError: A channel does not change in the training rows, or there are hardly any rows.
    """
    train, validation, test = splits(name, len(values))
    rows = values[slice(*train)]
    mean, deviation = rows.mean(0), rows.std(0, correction=0)
    for channel, one in zip(channels, deviation.tolist(), strict=True):
        if one < 1e-12:
            raise EvaluationError(f"{name}: column {channel} is constant in the training rows; leave it out")
    return Series(name, channels, ((values - mean) / deviation).float(), train, validation, test)


def splits(name: str, rows: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Rows of train, validation and test: ETT 12, 4 and 4 months of 30 days, others 70, 10 and 20 percent.

    Raises:
        EvaluationError: The rows do not suffice.
    """
    per_hour = {"etth": 1, "ettm": 4}.get(name[:4].lower())
    if per_hour:
        first, second, third = (months * _MONTH * per_hour for months in (12, 16, 20))
        if rows < third:
            raise EvaluationError(
                f"{name} has {rows:,} rows; its split needs {third:,}, rename the file if it is no ETT"
            )
        return (0, first), (first, second), (second, third)
    train, test = int(0.7 * rows), int(0.2 * rows)
    if test < 1 or rows - train - test < 1:
        raise EvaluationError(f"{name} has {rows} rows; they cannot be split into train, validation and test")
    return (0, train), (train, rows - test), (rows - test, rows)


def _read_csv(path: Path) -> tuple[tuple[str, ...], list[list[float]]]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        # Names of columns may hold broken characters; numbers cannot.
        with opened(path, "rt", encoding="utf-8", errors="replace", newline="") as file:
            lines = csv.reader(file)
            return _numbers(str(path), next(lines, []), lines)
    except (OSError, EOFError, csv.Error) as fault:
        raise EvaluationError(f"--data {path}: cannot be read ({fault}); give a CSV file, or one in gzip") from None


def _numbers(source: str, header: list[str], lines: Iterable[list[str]]) -> tuple[tuple[str, ...], list[list[float]]]:
    """Channels and rows, without the column of dates."""
    first = 1 if header and header[0].strip().lower() == "date" else 0
    channels = tuple(header[first:])
    rows: list[list[float]] = []
    for number, line in enumerate(lines, 2):
        if not line:
            continue
        if len(line) != len(header):
            raise EvaluationError(
                f"{source}, line {number}: has {len(line)} columns, the header {len(header)}; mend it"
            )
        try:
            row = [float(cell) for cell in line[first:]]
        except ValueError:
            row = [_number(cell) for cell in line[first:]]
        if not all(map(math.isfinite, row)):
            column = next(index for index, value in enumerate(row) if not math.isfinite(value))
            came = line[first + column].strip()
            what = "a value is missing" if came.lower() in ("", "nan", "na", "null") else f"{came!r} is no number"
            raise EvaluationError(
                f"{source}, line {number}, column {channels[column]}: {what}; fill it in, or leave the column out"
            )
        rows.append(row)
    if not channels or not rows:
        raise EvaluationError(
            f"{source} has no {'rows' if channels else 'columns'} of numbers; give a CSV with a header"
        )
    return channels, rows


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _read_hub(name: str) -> tuple[tuple[str, ...], list[list[float]]]:
    from datasets import load_dataset

    try:
        table = next(iter(load_dataset(HUB, name=name).values()))
    except Exception as fault:  # datasets and the hub raise many kinds
        reason = " ".join(str(fault).split())[:200]
        raise EvaluationError(
            f"--data {name}: no such file, and {HUB} cannot be read ({reason}); give the set's CSV file"
        ) from None
    columns = [column for column in table.column_names if column.lower() != "date"]
    cells = zip(*(map(str, table[column]) for column in columns), strict=True)
    return _numbers(f"{HUB} {name}", columns, map(list, cells))
