"""Tensors that were saved at one layout, read at another: which numbers of which file a rank needs.

Everything is flat. A tensor-parallel rank's part of a tensor lies in one file or, for the optimizer, in the files of
the data-parallel ranks that each held a fragment of it.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from titans_mcore.tensor_files import read_tensors
from titans_mcore.weights import Split, check_names


@dataclass(frozen=True)
class Division:
    """How the numbers of a flattened tensor are dealt out to tensor-parallel ranks.

    Cutting along a dimension, into however many blocks (`Split`), deals out runs of one length in turn: run n of the
    whole tensor goes to rank n % ranks, where it is run n // ranks.
    """

    run: int
    """Numbers in a run."""
    ranks: int
    """Ranks that take turns; 1 when every rank holds the whole."""

    @classmethod
    def of(cls, rule: Split | None, part_shape: Sequence[int], ranks: int) -> "Division":
        """The division that gives each of `ranks` ranks a part of this shape."""
        if rule is None:
            return cls(math.prod(part_shape), 1)
        return cls(math.prod(part_shape[rule.dim :]) // rule.stride, ranks)


class Wanted(NamedTuple):
    """The numbers [start, stop) of a rank's flattened part."""

    division: Division
    rank: int
    start: int
    stop: int


class Run(NamedTuple):
    """Numbers that lie one after the other in a rank's flattened part."""

    rank: int
    start: int
    length: int


def runs_in(stored: Division, wanted: Wanted) -> Iterator[Run]:
    """Where the wanted numbers lie in another division of the same tensor, in order and in runs as long as possible."""
    division, rank = wanted.division, wanted.rank % wanted.division.ranks
    position, pending = wanted.start, None
    while position < wanted.stop:
        turn, inside = divmod(position, division.run)
        whole = (turn * division.ranks + rank) * division.run + inside
        stored_turn, stored_inside = divmod(whole, stored.run)
        start = stored_turn // stored.ranks * stored.run + stored_inside
        found = Run(
            rank=stored_turn % stored.ranks,
            start=start,
            length=min(wanted.stop - position, division.run - inside, stored.run - stored_inside),
        )
        position += found.length
        if pending and (pending.rank, pending.start + pending.length) == (found.rank, found.start):
            pending = pending._replace(length=pending.length + found.length)
            continue
        if pending:
            yield pending
        pending = found
    if pending:
        yield pending


class Fragment(NamedTuple):
    """The numbers [start, stop) of a rank's flattened part, and the file that holds them."""

    start: int
    stop: int
    file: str


@dataclass(frozen=True)
class Part:
    """One tensor-parallel rank's part of a saved tensor."""

    shape: tuple[int, ...]
    """Of the part."""
    rule: Split | None
    """How the tensor was shared; None when every rank held the whole."""
    fragments: tuple[Fragment, ...]
    """In order; they follow each other without a gap."""


class SavedTensors:
    """The tensors in one folder of a checkpoint. A file is opened when something in it is wanted."""

    def __init__(self, folder: Path, parts: Sequence[Mapping[str, Part]], holding: str) -> None:
        """Takes what `parts` says about every tensor-parallel rank's tensors, by name.

        Raises:
            ValueError: Numbers are missing.
        """
        self.folder, self.parts, self.holding = folder, parts, holding
        self.opened: dict[str, dict[str, Tensor]] = {}
        for rank, by_name in enumerate(parts):
            for name, part in by_name.items():
                _check_complete(part, f"{folder}: the {holding} of {name} at tensor-parallel rank {rank}")

    def check_same(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Compares with the whole shapes of the tensors that are wanted.

        Raises:
            ValueError: Names or shapes differ.
        """
        ranks = len(self.parts)
        saved = {
            name: part.rule.whole_shape(torch.Size(part.shape), ranks) if part.rule else list(part.shape)
            for name, part in self.parts[0].items()
        }
        check_names(shapes, saved)
        for name, shape in shapes.items():
            if saved[name] != list(shape):
                raise ValueError(
                    f"checkpoint of another model: {name} is {saved[name]} in {self.folder} and {list(shape)} here"
                )

    def read(self, name: str, wanted: Wanted, kind: str = "") -> Tensor:
        """Numbers of a tensor, 1-D fp32 on the CPU.

        Args:
            name: Of the tensor.
            wanted: Which of its numbers.
            kind: Which of several tensors of this name.
        """
        part, ranks = self.parts[0][name], len(self.parts)
        values, done = torch.empty(wanted.stop - wanted.start), 0
        for run in runs_in(Division.of(part.rule, part.shape, ranks), wanted):
            # What every rank held is read from as many files as there are, not all of it from the first.
            rank = run.rank if part.rule else wanted.rank % ranks
            self._read_run(values[done : done + run.length], self.parts[rank][name].fragments, run.start, kind + name)
            done += run.length
        return values

    def _read_run(self, values: Tensor, fragments: Sequence[Fragment], start: int, key: str) -> None:
        index, done = bisect_right(fragments, start, key=lambda fragment: fragment.start) - 1, 0
        while done < len(values):
            fragment = fragments[index]
            begin = start + done - fragment.start
            count = min(len(values) - done, fragment.stop - start - done)
            values[done : done + count] = self._tensor(fragment.file, key)[begin : begin + count]
            index, done = index + 1, done + count

    def _tensor(self, file: str, key: str) -> Tensor:
        if file not in self.opened:
            tensors, _ = read_tensors(self.folder / file, self.holding)
            self.opened[file] = {name: tensor.view(-1) for name, tensor in tensors.items()}
        return self.opened[file][key]


def _check_complete(part: Part, what: str) -> None:
    end = 0
    for fragment in part.fragments:
        if fragment.start != end:
            break
        end = fragment.stop
    if end != math.prod(part.shape):
        raise ValueError(f"{what} is incomplete: the numbers from {end} on are missing")
