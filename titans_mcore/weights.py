"""Native weights: what a checkpoint holds of the model itself, readable without pickle, Megatron or DeepSpeed.

A checkpoint folder has `weights/model.json` (the model's settings) and one `weights/tp-RR-of-SS.safetensors` for each
tensor-parallel rank, fp32. The metadata of each file says, for every tensor, how ranks share it: a rule of Megatron's
(dimension, stride), or none when every rank holds the whole. `checkpoint.json`, written last, lists every file of the
folder; a folder without it, or with other files than it lists, is not a checkpoint.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titans_mcore.config import TitansConfig
from titans_mcore.io import sha256_of
from titans_mcore.tensor_files import (
    SavedPart,
    SavedTensors,
    TPSplit,
    check_names,
    read_tensors,
    rules_from_json,
    rules_to_json,
    shape_on_rank,
    split_of,
    write_tensors,
)

FORMAT = 1
WEIGHTS_FOLDER = "weights"
DESCRIPTION = "model.json"
MARKER = "checkpoint.json"
BEGINS = "begins_with"  # in the marker of weights that no run has trained: what they were made of
_CHECKPOINT_NAME = re.compile(r"step-\d+")
_SPEED_SETTINGS = ("memory_backend", "attention_backend", "linear_backend")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint must hold: parameters, and buffers that are part of the state; tied ones once."""
    saved = set(model.state_dict())
    tensors: dict[str, Tensor] = {name: p.data for name, p in model.named_parameters()}
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return tensors


class ShardHeader(NamedTuple):
    """What a tensor-parallel rank's file says about its tensors."""

    shapes: dict[str, torch.Size]
    """On this rank, by name, in the order of `model_tensors`."""
    rules: dict[str, TPSplit | None]
    """How ranks share each."""

    @classmethod
    def of(cls, model: nn.Module) -> "ShardHeader":
        """Of this rank's part of a model; its parameters' attributes give the rules."""
        tensors, parameters = model_tensors(model), dict(model.named_parameters())
        return cls(
            {name: shape_on_rank(parameters.get(name, tensor)) for name, tensor in tensors.items()},
            {name: split_of(parameters[name]) if name in parameters else None for name in tensors},
        )


def save_shard(
    folder: Path,
    header: ShardHeader,
    values: Iterable[tuple[str, Tensor]],
    config: TitansConfig,
    *,
    rank: int,
    size: int,
    step: int,
    tokens: int,
) -> None:
    """Writes one tensor-parallel rank's weights; rank 0 writes `model.json` too.

    Args:
        folder: The `weights` folder; made when missing.
        header: Of this rank's part.
        values: The tensors in the order of the header, one after the other.
        config: Settings of the model.
        rank: Tensor-parallel rank that writes.
        size: Tensor-parallel ranks.
        step: Optimizer steps done.
        tokens: Tokens trained on.
    """
    write_shard(folder / shard_name(rank, size), header, values)
    if rank == 0:
        write_description(folder / DESCRIPTION, config, size=size, step=step, tokens=tokens)


def write_shard(file: Path, header: ShardHeader, values: Iterable[tuple[str, Tensor]]) -> None:
    """Writes the tensors of one tensor-parallel rank; see `save_shard`."""
    write_tensors(file, header.shapes, values, {"rules": rules_to_json(header.rules)})


def write_description(file: Path, config: TitansConfig, *, size: int, step: int, tokens: int) -> None:
    """Writes what all shards have in common; see `save_shard`."""
    description = {"format": FORMAT, "tensor_parallel": size, "step": step, "tokens": tokens}
    text = json.dumps({**description, "model": config.to_dict()}, indent=2)
    file.write_text(text + "\n", encoding="utf-8")


def shard_name(rank: int, size: int) -> str:
    """Name of the file of one of so many tensor-parallel ranks."""
    return f"tp-{rank:02d}-of-{size:02d}.safetensors"


def load_config(checkpoint: Path) -> TitansConfig:
    """The settings of the model in a checkpoint folder.

    Raises:
        ValueError: No readable description is there.
    """
    return TitansConfig.from_dict(_description(_weights_folder(checkpoint))["model"])


def saved_weights(checkpoint: Path, *, verify: bool = True) -> SavedTensors:
    """The weights, as the tensor-parallel ranks wrote them.

    Args:
        checkpoint: A checkpoint folder, or its `weights` folder.
        verify: Compare their checksums with those that the checkpoint has noted; for who has not done so before.

    Raises:
        ValueError: Files are missing or damaged.
    """
    folder = _weights_folder(checkpoint)
    size = _description(folder)["tensor_parallel"]
    parts: list[dict[str, SavedPart]] = []
    for rank in range(size):
        file = folder / shard_name(rank, size)
        tensors, metadata = read_tensors(file, "weights")
        try:
            rules = rules_from_json(metadata["rules"])
            for name in parts[0] if parts else rules:
                if name not in tensors:
                    raise ValueError(f"{folder}: {name} is missing in the weights of one rank")
            parts.append({name: SavedPart.of_file(tensor, rules[name], file.name) for name, tensor in tensors.items()})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"cannot read the weights in {file}: {error!r}") from error
    if verify:
        _check_sums(folder)
    return SavedTensors(folder, parts, "weights")


def load_full(checkpoint: Path, *, verify: bool = True) -> tuple[TitansConfig, dict[str, Tensor]]:
    """The whole weights, fp32, whatever the number of tensor-parallel ranks that wrote them.

    Args:
        checkpoint: A checkpoint folder, or its `weights` folder.
        verify: See saved_weights.

    Raises:
        ValueError: Files are missing or damaged, or the ranks disagree about a tensor that all of them hold.
    """
    saved = saved_weights(checkpoint, verify=verify)
    return load_config(checkpoint), {name: saved.whole(name) for name in saved.parts[0]}


def load_into(
    model: nn.Module, state: Mapping[str, Tensor], *, rank: int | None = None, size: int | None = None
) -> None:
    """Copies this rank's part of the whole weights into a model.

    Args:
        model: Built at any tensor-parallel size.
        state: Whole tensors by name, as `load_full` returns them.
        rank: Tensor-parallel rank; Megatron's by default, 0 where Megatron's groups are not started.
        size: Tensor-parallel ranks; likewise.

    Raises:
        ValueError: Names or shapes are not the model's; nothing is copied then.
    """
    if rank is None or size is None:
        rank, size = _tensor_parallel_place()
    targets = model_tensors(model)
    rules = {name: split_of(p) for name, p in model.named_parameters()}
    check_names(targets, state)
    for name, target in targets.items():
        rule = rules.get(name)
        expected = rule.whole_shape(target.shape, size) if rule else list(target.shape)
        if list(state[name].shape) != expected:
            raise ValueError(
                f"checkpoint of another model: {name} is {list(state[name].shape)} there and {expected} here"
            )
    with torch.no_grad():
        for name, target in targets.items():
            rule = rules.get(name)
            target.copy_(rule.take(state[name], rank, size) if rule else state[name])


def check_same_model(saved: TitansConfig, wanted: TitansConfig, where: Path) -> None:
    """Compares settings, except those that change speed alone.

    Raises:
        ValueError: They differ; the message names every setting with both values.
    """
    names = [field.name for field in fields(TitansConfig) if field.name not in _SPEED_SETTINGS]
    saved, wanted = saved.spelled_out(), wanted.spelled_out()
    differing = [
        f"{name} is {getattr(saved, name)!r} there and {getattr(wanted, name)!r} here"
        for name in names
        if getattr(saved, name) != getattr(wanted, name)
    ]
    if differing:
        raise ValueError(f"{where} is a checkpoint of another model: {'; '.join(differing)}")


def find_checkpoint(path: Path) -> Path:
    """The newest whole checkpoint of a run folder, or the checkpoint folder itself.

    Args:
        path: A run folder (with `checkpoints/` in it), that `checkpoints` folder, or one checkpoint.

    Raises:
        ValueError: Nothing is there, or nothing whole; the message says what is wrong with the newest one.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no checkpoint at {path}: there is no such folder")
    if (path / MARKER).is_file() or (path / WEIGHTS_FOLDER).is_dir():
        if reason := damage(path):
            raise ValueError(f"{path} is not a whole checkpoint: {reason}")
        return path
    reasons = []
    for folder in checkpoints_newest_first(path):
        if (reason := damage(folder)) is None:
            return folder
        reasons.append(f"{folder.name}: {reason}")
    raise ValueError(f"no whole checkpoint in {path}" + (f" ({reasons[0]})" if reasons else ""))


def run_of(checkpoint: Path) -> Path:
    """RUN for RUN/checkpoints/step-N, or the folder around a checkpoint that lies elsewhere."""
    parent = checkpoint.absolute().parent
    return parent.parent if parent.name == "checkpoints" else parent


def checkpoints_newest_first(run: Path) -> Iterator[Path]:
    """Folders named like checkpoints in a run folder or its `checkpoints` folder; they need not be whole."""
    parent = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    names = (
        (f for f in parent.iterdir() if f.is_dir() and _CHECKPOINT_NAME.fullmatch(f.name)) if parent.is_dir() else ()
    )
    yield from sorted(names, key=lambda f: int(f.name.removeprefix("step-")), reverse=True)


def damage(checkpoint: Path, *, read_files: bool = False) -> str | None:
    """What is wrong with a checkpoint folder; None when it is whole.

    Args:
        checkpoint: The folder.
        read_files: Compare the checksum of every file too, not the sizes alone.
    """
    try:
        files = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"{MARKER} is missing, so it was not finished"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MARKER} cannot be read ({error})"
    for name, known in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != known["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {known['bytes']}"
        if read_files and sha256_of(file) != known["sha256"]:
            return f"{name} has changed since it was written (its sha256 differs)"
    return None


def _check_sums(folder: Path) -> None:
    """Compares the files of a `weights` folder with what its checkpoint, the folder around, says of them."""
    try:
        files = json.loads((folder.parent / MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # weights by themselves; a checkpoint without a readable record is refused where it is looked for
    for file in sorted(folder.iterdir()):
        noted = files.get(f"{folder.name}/{file.name}", {}).get("sha256")
        if noted and sha256_of(file) != noted:
            raise ValueError(
                f"{file} has changed since it was written (its sha256 differs); take another checkpoint or a whole "
                "copy of this one (--no-verify reads it as it is)"
            )


def _weights_folder(checkpoint: Path) -> Path:
    return checkpoint / WEIGHTS_FOLDER if (checkpoint / WEIGHTS_FOLDER).is_dir() else checkpoint


def _description(folder: Path) -> dict[str, Any]:
    file = folder / DESCRIPTION
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        written = description["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read the description of the weights, {file}: {error}") from error
    if written != FORMAT:
        raise ValueError(f"{file} has format {written}; this version reads format {FORMAT}")
    return description


def _tensor_parallel_place() -> tuple[int, int]:
    # Imported at use: exporting and reading weights in one process needs no Megatron.
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return 0, 1
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
