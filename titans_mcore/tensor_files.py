"""Tensors in safetensors files: written one by one, as ranks hold them, and read at any other layout.

Three things say how tensor-parallel ranks share a tensor, and one is made of the other: Megatron's attributes of a
parameter, the rule (`TPSplit`) that files note, and how the flattened numbers are dealt out by it (`Division`). Numbers
that were saved at one layout are found for another by `SavedTensors` alone: a rank's part of a tensor lies in one file
or, for the optimizer, in the files of the data-parallel ranks that each held a fragment of it.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


def write_tensors(
    file: Path,
    shapes: Mapping[str, Sequence[int]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Writes fp32 tensors as they come.

    Args:
        file: The file; its folder is made when missing.
        shapes: Of every tensor, by name, in the order in which the tensors come; the file begins with them.
        tensors: Names and values, of any type and on any device.
        metadata: Of the file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), (given, tensor) in zip(shapes.items(), tensors, strict=True):
            assert (given, list(tensor.shape)) == (name, list(shape))
            values = tensor.detach().to("cpu", torch.float32).contiguous()
            stream.write(values.view(-1).numpy().astype("<f4", copy=False).data)


def read_tensors(file: Path, holding: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file. It is mapped: values come from the disk when and where they are used.

    Args:
        file: The file.
        holding: What it holds, for the message.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the {holding} in {file}: {error}") from error


@dataclass(frozen=True)
class TPSplit:
    """How tensor-parallel ranks share a tensor.

    The whole tensor is cut along `dim` into `stride` blocks (two for a gated linear: gate and value in one matrix),
    and every rank holds its part of each block, one after the other.
    """

    dim: int
    stride: int = 1

    def take(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """The part of rank `rank` of `size`."""
        return torch.cat(whole.chunk(size * self.stride, self.dim)[rank::size], self.dim)

    def whole_shape(self, part_shape: torch.Size, size: int) -> list[int]:
        """Shape of the whole tensor, from the shape of one of `size` parts."""
        return [n * size if i == self.dim else n for i, n in enumerate(part_shape)]


def split_of(parameter: Tensor) -> TPSplit | None:
    """The rule in Megatron's attributes of a parameter; None when every rank holds the whole."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return TPSplit(parameter.partition_dim, getattr(parameter, "partition_stride", 1))  # type: ignore[attr-defined]


def rules_to_json(rules: Mapping[str, TPSplit | None]) -> str:
    """Rules by name, for a file's metadata."""
    return json.dumps({name: asdict(rule) if rule else None for name, rule in rules.items()})


def rules_from_json(text: str) -> dict[str, TPSplit | None]:
    """What `rules_to_json` wrote."""
    return {name: TPSplit(**rule) if rule else None for name, rule in json.loads(text).items()}


def shape_on_rank(parameter: Tensor) -> torch.Size:
    """Shape of this tensor-parallel rank's part; ZeRO 3 empties a parameter between uses and keeps it beside."""
    return getattr(parameter, "ds_shape", parameter.shape)


def check_names(targets: Mapping[str, object], state: Mapping[str, object]) -> None:
    """Compares names of tensors: those of this model, and those of a checkpoint.

    Raises:
        ValueError: They differ.
    """
    missing, unexpected = sorted(set(targets) - set(state)), sorted(set(state) - set(targets))
    if missing or unexpected:
        parts = [
            f"{len(names)} tensors {what}, {names[0]} first"
            for names, what in (
                (missing, "of this model are missing there"),
                (unexpected, "there are not in this model"),
            )
            if names
        ]
        raise ValueError(f"checkpoint of another model: {' and '.join(parts)}")


@dataclass(frozen=True)
class Division:
    """How the numbers of a flattened tensor are dealt out to tensor-parallel ranks.

    Cutting along a dimension, into however many blocks (`TPSplit`), deals out spans of one length in turn: span n of
    the whole tensor goes to rank n % ranks, where it is span n // ranks.
    """

    span: int
    """Numbers in a span."""
    ranks: int
    """Ranks that take turns; 1 when every rank holds the whole."""

    @classmethod
    def of(cls, rule: TPSplit | None, part_shape: Sequence[int], ranks: int) -> "Division":
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


class TensorSpan(NamedTuple):
    """Numbers that lie one after the other in a rank's flattened part."""

    rank: int
    start: int
    length: int


def spans_in(stored: Division, wanted: Wanted) -> Iterator[TensorSpan]:
    """Where the wanted numbers lie in another division of the same tensor, in order, in spans as long as possible."""
    division, rank = wanted.division, wanted.rank % wanted.division.ranks
    position, pending = wanted.start, None
    while position < wanted.stop:
        turn, inside = divmod(position, division.span)
        whole = (turn * division.ranks + rank) * division.span + inside
        stored_turn, stored_inside = divmod(whole, stored.span)
        start = stored_turn // stored.ranks * stored.span + stored_inside
        found = TensorSpan(
            rank=stored_turn % stored.ranks,
            start=start,
            length=min(wanted.stop - position, division.span - inside, stored.span - stored_inside),
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
class SavedPart:
    """One tensor-parallel rank's part of a saved tensor."""

    shape: tuple[int, ...]
    """Of the part."""
    rule: TPSplit | None
    """How the tensor was shared; None when every rank held the whole."""
    fragments: tuple[Fragment, ...]
    """In order; they follow each other without a gap."""

    @classmethod
    def of_file(cls, tensor: Tensor, rule: TPSplit | None, file: str) -> "SavedPart":
        """A part that one file holds."""
        return cls(tuple(tensor.shape), rule, (Fragment(0, tensor.numel(), file),))


class SavedTensors:
    """The tensors in one folder of a checkpoint. A file is opened when something in it is wanted."""

    def __init__(self, folder: Path, parts: Sequence[Mapping[str, SavedPart]], holding: str) -> None:
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
        check_names(shapes, self.parts[0])
        for name, shape in shapes.items():
            if (saved := self.whole_shape(name)) != list(shape):
                raise ValueError(
                    f"checkpoint of another model: {name} is {saved} in {self.folder} and {list(shape)} here"
                )

    def whole_shape(self, name: str) -> list[int]:
        """Shape of a tensor, of all ranks' parts together."""
        part = self.parts[0][name]
        return part.rule.whole_shape(torch.Size(part.shape), len(self.parts)) if part.rule else list(part.shape)

    def whole(self, name: str) -> Tensor:
        """A tensor in its shape; where one file holds it, the numbers come from the disk when they are used.

        Raises:
            ValueError: Ranks that should all hold the same do not.
        """
        part, shape = self.parts[0][name], self.whole_shape(name)
        held = [self._tensor(by_name[name].fragments[0].file, name) for by_name in self.parts]
        if part.rule is None and any(not torch.equal(held[0].view(torch.int32), one.view(torch.int32)) for one in held):
            raise ValueError(
                f"{self.folder}: the ranks hold different values of {name}, which all of them should share"
            )
        if part.rule is None or len(held) == 1:
            return held[0].view(shape)
        count = math.prod(shape)
        return self.read(name, Wanted(Division(count, 1), 0, 0, count)).view(shape)

    def read(self, name: str, wanted: Wanted, kind: str = "") -> Tensor:
        """Numbers of a tensor, 1-D fp32 on the CPU.

        Args:
            name: Of the tensor.
            wanted: Which of its numbers.
            kind: Which of several tensors of this name.
        """
        part, ranks = self.parts[0][name], len(self.parts)
        values, done = torch.empty(wanted.stop - wanted.start), 0
        for span in spans_in(Division.of(part.rule, part.shape, ranks), wanted):
            # What every rank held is read from as many files as there are, not all of it from the first.
            rank = span.rank if part.rule else wanted.rank % ranks
            self._read_span(
                values[done : done + span.length], self.parts[rank][name].fragments, span.start, kind + name
            )
            done += span.length
        return values

    def _read_span(self, values: Tensor, fragments: Sequence[Fragment], start: int, key: str) -> None:
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


def _check_complete(part: SavedPart, what: str) -> None:
    end = 0
    for fragment in part.fragments:
        if fragment.start != end:
            break
        end = fragment.stop
    if end != math.prod(part.shape):
        raise ValueError(f"{what} is incomplete: the numbers from {end} on are missing")
