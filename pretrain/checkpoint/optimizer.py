"""What the optimizer holds, as parts of parameters that no layout is left in: saved by every rank, read by any.

DeepSpeed lets AdamW step a parameter itself (ZeRO 0), the rank's partition of all parameters laid end to end (1, 2), or
the rank's partition of each parameter laid end to end (3). Whichever it is, what a rank owns of a parameter is one
fragment, a range of the flattened parameter, and lies as one range in what AdamW steps.

    optimizer/tp-RR-data-DDD.safetensors
        exp_avg.NAME, exp_avg_sq.NAME     the owned fragments of the moments, fp32, 1-D
        metadata                          place, step, and for every name shape, rule and range of the fragment
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.engine import DeepSpeedEngine
from titans_mcore.parallel import DeepSpeedGroups
from titans_mcore.tensor_files import (
    Division,
    Fragment,
    SavedPart,
    SavedTensors,
    TPSplit,
    Wanted,
    read_tensors,
    rules_from_json,
    rules_to_json,
    shape_on_rank,
    split_of,
    write_tensors,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
HOLDING = "optimizer state"


@dataclass(frozen=True)
class Owned:
    """The range [start, stop) of a flattened parameter that this rank's optimizer updates."""

    start: int
    stop: int
    stepped: Tensor
    """What AdamW steps, and keeps its state by; it is fp32."""
    offset: int
    """Where the range begins in it."""

    def of(self, tensor: Tensor) -> Tensor:
        """The range in a tensor that is laid out like `stepped`."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.stop - self.start)


def owned_by_name(engine: DeepSpeedEngine) -> dict[str, Owned]:
    """What this rank owns of every parameter; parameters of which it owns nothing are left out."""
    stage = engine.zero_optimization_stage()
    if not stage:
        return {name: Owned(0, p.numel(), p, 0) for name, p in engine.module.named_parameters()}
    find = _owned_partition if stage == 3 else _owned_of_group
    found = {name: find(engine, parameter) for name, parameter in engine.module.named_parameters()}
    return {name: owned for name, owned in found.items() if owned}


def file_of_this_rank() -> str:
    """Name of the file with what this rank alone holds."""
    groups = DeepSpeedGroups()
    return f"tp-{groups.get_tensor_model_parallel_rank():02d}-data-{groups.get_data_parallel_rank():03d}.safetensors"


class Moments(NamedTuple):
    """What a rank's file holds."""

    shapes: dict[str, list[int]]
    """By name, in the order of the values."""
    values: Iterable[tuple[str, Tensor]]
    """The owned fragments, one after the other."""
    metadata: dict[str, str]
    """Of the file."""

    def write(self, file: Path) -> None:
        """Writes the file."""
        write_tensors(file, self.shapes, self.values, self.metadata)


def moments_of(engine: DeepSpeedEngine) -> Moments | None:
    """What this rank has to save; None where all data ranks own the same and this is not the first."""
    groups = DeepSpeedGroups()
    if engine.zero_optimization_stage() == 0 and groups.get_data_parallel_rank() > 0:
        return None
    parameters, owned = dict(engine.module.named_parameters()), owned_by_name(engine)
    state = engine.basic_optimizer.state
    place = {
        "tensor_rank": groups.get_tensor_model_parallel_rank(),
        "tensor_parallel": groups.get_tensor_model_parallel_world_size(),
    }
    metadata = {
        "place": json.dumps(place),
        "steps": json.dumps(sorted({int(state[part.stepped]["step"]) for part in owned.values()})),
        "shapes": json.dumps({name: list(shape_on_rank(parameters[name])) for name in owned}),
        "rules": rules_to_json({name: split_of(parameters[name]) for name in owned}),
        "ranges": json.dumps({name: (part.start, part.stop) for name, part in owned.items()}),
    }
    shapes = {f"{moment}.{name}": [part.stop - part.start] for moment in MOMENTS for name, part in owned.items()}
    return Moments(shapes, _moments(state, owned), metadata)


def saved_moments(folder: Path) -> tuple[list[dict[str, SavedPart]], int]:
    """What the files of all ranks hold: parts by name for each tensor-parallel rank, and steps done.

    Raises:
        ValueError: A file cannot be read, or they disagree.
    """
    found: dict[int, list[_Contents]] = {}
    sizes: set[int] = set()
    steps: set[int] = set()
    for file in sorted(folder.glob("*.safetensors")):
        _, metadata = read_tensors(file, HOLDING)
        try:
            place, shapes, ranges = (json.loads(metadata[key]) for key in ("place", "shapes", "ranges"))
            sizes.add(place["tensor_parallel"])
            steps.update(json.loads(metadata["steps"]))
            contents = _Contents(file.name, shapes, rules_from_json(metadata["rules"]), ranges)
            found.setdefault(place["tensor_rank"], []).append(contents)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"cannot read the {HOLDING} in {file}: {error!r}") from error
    if len(steps) != 1 or len(sizes) != 1 or sorted(found) != list(range(*sizes)):
        raise ValueError(f"the files in {folder} do not make an {HOLDING}; some are missing, or of another checkpoint")
    return [_parts(found[rank]) for rank in sorted(found)], steps.pop()


def restore_parameters(engine: DeepSpeedEngine, masters: SavedTensors, moments: SavedTensors | None, step: int) -> None:
    """Sets parameters, masters and moments of an engine, one parameter after the other. Collective.

    Args:
        engine: A new one, or one that goes back.
        masters: The weights.
        moments: The optimizer's; None leaves it as it is.
        step: Steps that the optimizer has done.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.basic_optimizer
    groups = DeepSpeedGroups()
    rank, ranks = groups.get_tensor_model_parallel_rank(), groups.get_tensor_model_parallel_world_size()
    parameters = dict(engine.module.named_parameters())
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()  # no gathered copy of an old value stays
    done: set[Tensor] = set()
    for name, owned in owned_by_name(engine).items():
        parameter = parameters[name]
        division = Division.of(split_of(parameter), shape_on_rank(parameter), ranks)
        wanted = Wanted(division, rank, owned.start, owned.stop)
        owned.of(owned.stepped).copy_(masters.read(name, wanted))
        if moments is not None:
            if owned.stepped not in done:
                _set_step(optimizer, owned.stepped, step)
                done.add(owned.stepped)
            for moment in MOMENTS:
                owned.of(optimizer.state[owned.stepped][moment]).copy_(moments.read(name, wanted, kind=f"{moment}."))
        if stage == 3:
            parameter.ds_tensor.narrow(0, 0, owned.stop - owned.start).copy_(owned.of(owned.stepped))
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
    if stage == 3:
        engine.optimizer.checkpoint_event_epilogue()


def _owned_of_group(engine: DeepSpeedEngine, parameter: nn.Parameter) -> Owned | None:
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    (stepped,) = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"]
    start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
    return Owned(start, start + count, stepped, mapping.hp_fragment_address.start)


def _owned_partition(engine: DeepSpeedEngine, parameter: Any) -> Owned | None:
    # The last partitions are padded, or padding altogether.
    start = parameter.ds_tensor.ds_numel * parameter.ds_zero_partition_rank
    stop = min(start + parameter.ds_tensor.ds_numel, parameter.ds_numel)
    zero = engine.optimizer
    group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
    return Owned(start, stop, zero.fp32_partitioned_groups_flat[group], offset) if start < stop else None


class _Contents(NamedTuple):
    file: str
    shapes: dict[str, list[int]]
    rules: dict[str, TPSplit | None]
    ranges: dict[str, tuple[int, int]]


def _parts(files: Sequence[_Contents]) -> dict[str, SavedPart]:
    """One tensor-parallel rank's parts, from the files of its data ranks."""
    fragments: dict[str, list[Fragment]] = {}
    shapes: dict[str, list[int]] = {}
    rules: dict[str, TPSplit | None] = {}
    for file in files:
        shapes, rules = shapes | file.shapes, rules | file.rules
        for name, (start, stop) in file.ranges.items():
            fragments.setdefault(name, []).append(Fragment(start, stop, file.file))
    return {
        name: SavedPart(tuple(shapes[name]), rules[name], tuple(sorted(found))) for name, found in fragments.items()
    }


def _moments(state: Mapping[Tensor, Mapping[str, Tensor]], owned: Mapping[str, Owned]) -> Iterator[tuple[str, Tensor]]:
    for moment in MOMENTS:
        for name, part in owned.items():
            yield f"{moment}.{name}", part.of(state[part.stepped][moment])


def _set_step(optimizer: torch.optim.Optimizer, stepped: Tensor, step: int) -> None:
    """Sets AdamW's count of updates, and makes the state that its first update would make where there is none."""
    count: Any = step  # DeepSpeed's optimizers count in an int, torch's in a tensor, on the device when it is fused
    if isinstance(optimizer, torch.optim.AdamW):
        count = torch.tensor(float(step), device=stepped.device if optimizer.defaults["fused"] else "cpu")
    state = optimizer.state[stepped]
    state["step"] = count
    for moment in MOMENTS:
        state.setdefault(moment, torch.zeros_like(stepped, requires_grad=False))
