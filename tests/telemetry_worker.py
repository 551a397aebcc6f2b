"""Run under torchrun by test_telemetry: telemetry of one model at many layouts, and training with it and without.

python -m tests.telemetry_worker OUTPUT.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.config.command_line import parse
from pretrain.data.batches import MicroBatch
from pretrain.engine import build_engine, build_model
from titans_mcore.config import TitansConfig
from titans_mcore.model import TitansModel
from titans_mcore.parallel import start, stop, transformer_config
from titans_mcore.telemetry import MemoryTelemetry

from .parallel.layouts_worker import SETTINGS, Layout, batch
from .parallel.regroup import groups_of

# Memories along whole rows, and along MAC's segments.
LAYOUTS = {
    "mag": ("tensor=2", "tensor=2 memory=hidden", "tensor=2 sequence", "context=2", "data=2"),
    "mac": ("tensor=2 memory=hidden", "context=2"),
}
ZERO = ("1 block", "3 none", "3 except_memory")


def seen(variant: str, words: str) -> dict[str, list[float | None]]:
    """Means over both rows: one after the other where the ranks share a row, at once where they share the batch."""
    layout = Layout(words)
    config = TitansConfig(variant=variant, **SETTINGS)  # type: ignore[arg-type]
    groups = groups_of(layout.tensor, layout.context)
    torch.manual_seed(0)
    megatron = transformer_config(
        config,
        tensor_parallel=layout.tensor,
        sequence_parallel=layout.sequence,
        memory_parallel=layout.memory,
        dtype=torch.float64,
    )
    model = TitansModel(config, megatron, groups, memory_parallel=layout.memory)
    telemetry = MemoryTelemetry(model, every_tokens=8)
    tokens, starts, _ = batch()
    for row in [groups.dp.rank()] if "data" in words else [0, 1]:
        parts = [x[row : row + 1].chunk(groups.cp.size(), 1)[groups.cp.rank()] for x in (tokens, starts)]
        with telemetry.watching(), torch.no_grad():
            model(parts[0], starts=parts[1] if bool(parts[1].any()) else None)
    return telemetry.collect()


def largest_error(found: dict[str, Any], right: dict[str, Any]) -> float:
    """Relative."""
    return max(abs(a - b) / abs(b) for name in right for a, b in zip(found[name], right[name], strict=True) if b)


def losses(config_file: str, zero: str, watched: bool) -> tuple[list[float], bool]:
    """Of two steps on two data ranks, and whether something was seen."""
    stage, recompute = zero.split()
    arguments = ["--config", config_file, "--run-dir", "unused", "--parallel.zero-stage", stage]
    config = parse([*arguments, "--train.recompute", recompute]).config
    groups = groups_of(1, 1)
    torch.manual_seed(1)
    engine = build_engine(build_model(config, groups), config, 2)
    telemetry, found = MemoryTelemetry(engine.module), []
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(2):
        tokens = torch.randint(0, config.model.vocab_size, (2, 32), generator=generator)
        micro_batch = MicroBatch(tokens, tokens, None).arguments(torch.device("cpu"))
        if watched:
            with telemetry.watching():
                loss = engine(**micro_batch).mean()
        else:
            loss = engine(**micro_batch).mean()
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found, bool(telemetry.collect())


def main() -> None:
    output = Path(sys.argv[1])
    start(1, seed=0)
    errors = {}
    for variant, layouts in LAYOUTS.items():
        # Two ranks with the same rows are one process twice.
        whole = seen(variant, "")
        errors |= {f"{variant} {words}": largest_error(seen(variant, words), whole) for words in layouts}
    config = output.with_suffix(f".{dist.get_rank()}.toml")
    model = "".join(f"{name} = {value}\n" for name, value in SETTINGS.items())
    config.write_text(
        f'[model]\nvariant = "mac"\n{model}[train]\nglobal_batch = 4\nmicro_batch = 2\nprecision = "fp32"\n'
    )
    found: dict[str, Any] = {"errors": errors, "watched": {}, "unwatched": {}, "seen": {}}
    for zero in ZERO:
        found["watched"][zero], found["seen"][zero] = losses(str(config), zero, watched=True)
        found["unwatched"][zero], _ = losses(str(config), zero, watched=False)
    if dist.get_rank() == 0:
        output.write_text(json.dumps(found))
    stop()


if __name__ == "__main__":
    main()
