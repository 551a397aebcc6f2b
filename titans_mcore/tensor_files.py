"""Safetensors files written tensor by tensor and read by slices: no more than one tensor has to be in memory."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
