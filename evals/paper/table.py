"""A table whose cells are numbers or empty, as Markdown and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals.report import markdown_table

PAPER, OURS = "paper", "ours"
Number = float | None


@dataclass(frozen=True)
class Row:
    """One line."""

    label: str
    """Which model."""
    source: str
    """PAPER or OURS."""
    cells: tuple[Number, ...]
    """One a column; None was not run."""
    errors: tuple[Number, ...] = ()
    """Standard errors, where there are any; one a column."""


@dataclass(frozen=True)
class Table:
    """One of the paper's tables."""

    key: str
    """Short name, of its plot's file too."""
    title: str
    """Heading."""
    columns: tuple[str, ...]
    """Headings of the cells."""
    rows: tuple[Row, ...]
    """Lines."""
    notes: tuple[str, ...] = ()
    """What a reader has to know, below it."""
    digits: int = 2
    """Behind the point."""

    def markdown(self) -> str:
        """The table under its heading."""
        lines = [[row.label, row.source, *self._texts(row)] for row in self.rows]
        parts = [f"## {self.title}", markdown_table(("model", "source", *self.columns), lines)]
        return "\n\n".join([*parts, *self.notes])

    def to_json(self) -> dict[str, Any]:
        """Every cell, by its column's heading."""
        rows = [
            {
                "model": row.label,
                "source": row.source,
                "cells": dict(zip(self.columns, row.cells, strict=True)),
                "stderr": dict(zip(self.columns, row.errors, strict=True)) if row.errors else {},
            }
            for row in self.rows
        ]
        return {"title": self.title, "rows": rows, "notes": list(self.notes)}

    def _texts(self, row: Row) -> Sequence[str]:
        errors = row.errors or (None,) * len(row.cells)
        return [self._text(cell, error) for cell, error in zip(row.cells, errors, strict=True)]

    def _text(self, cell: Number, error: Number) -> str:
        if cell is None:
            return ""
        return f"{cell:,.{self.digits}f}" + ("" if error is None else f" ± {error:,.{self.digits}f}")


def paper_rows(numbers: Mapping[str, tuple[float, ...]]) -> list[Row]:
    """The paper's own lines."""
    return [Row(label, PAPER, cells) for label, cells in numbers.items()]


def interleave(published: Sequence[Row], ours: Sequence[tuple[str, Row]]) -> tuple[Row, ...]:
    """Our lines, each with the paper's name of what it is, below the paper's line of that name; the rest at the end."""
    rows: list[Row] = []
    for row in published:
        rows += [row, *(own for name, own in ours if name == row.label)]
    labels = {row.label for row in published}
    return (*rows, *(own for name, own in ours if name not in labels))
