"""Processes that share the tokens of a row against one that reads it alone, in turn: at once, and as a wavefront.

python -m tests.parallel.shared_rows --output evals/results/wavefront

Writes OUTPUT/at_once.json and OUTPUT/at_once.md. Under torchrun the module is one of the processes.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titans_mcore.config import TitansConfig
from titans_mcore.mixers import MIXERS
from titans_mcore.model import TitansModel
from titans_mcore.parallel import start, stop, transformer_config
from titans_mcore.parallel.sequence import tokens_unshared

from ..pretrain.jobs import ROOT
from ..pretrain.wavefront import Link, Work, simulate

VARIANTS = [*(name for name, mixer in MIXERS.items() if mixer.composes), "gated_deltanet+transformer"]
SETTINGS: dict[str, Any] = {"vocab_size": 256, "num_layers": 6, "dim": 64, "num_heads": 2, "linear_heads": 2}
SETTINGS |= {"ffn_dim": 128, "window": 256}
ALONE, WAVEFRONT, AT_ONCE = "alone", "wavefront", "at once"


def config_of(variant: str) -> TitansConfig:
    return TitansConfig(variant=variant, **SETTINGS)


@contextmanager
def sharing(model: TitansModel, case: str) -> Iterator[None]:
    """The model as it reads alone, as a wavefront, or as it is."""
    composing = [mixer for mixer in MIXERS.values() if mixer.composes and case == WAVEFRONT]
    for mixer in composing:
        mixer.composes = False
    try:
        if case == ALONE:
            with tokens_unshared(model):
                yield
        else:
            yield
    finally:
        for mixer in composing:
            mixer.composes = True


def step(model: TitansModel, case: str, tokens: torch.Tensor) -> dict[str, Any]:
    """One step of a row: its seconds, and each rank's own CPU seconds forward and backward."""
    rank, ranks, cpu = dist.get_rank(), dist.get_world_size(), [0.0, 0.0]
    model.zero_grad()
    dist.barrier()
    began = time.perf_counter()
    if case != ALONE or rank == 0:
        part = tokens if case == ALONE else tokens.chunk(ranks, 1)[rank]
        with sharing(model, case):
            before = time.thread_time()
            loss = model(part, labels=part).mean()
            between = time.thread_time()
            loss.backward()
            cpu = [between - before, time.thread_time() - between]
    dist.barrier()
    seconds, everyones = time.perf_counter() - began, [None] * ranks
    dist.all_gather_object(everyones, cpu)
    return {"seconds": seconds, "cpu": everyones}


def worker(output: Path, length: int, repeats: int) -> None:
    """One of the processes; the first step of each case warms up."""
    groups = start(1, int(os.environ["WORLD_SIZE"]), seed=0)
    torch.set_num_threads(1)
    tokens = torch.randint(SETTINGS["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))
    found = {}
    for variant in VARIANTS:
        model = TitansModel(config_of(variant), transformer_config(config_of(variant)), groups)
        steps: dict[str, list[Any]] = {case: [] for case in (ALONE, WAVEFRONT, AT_ONCE)}
        for _ in range(repeats + 1):
            for case, of_case in steps.items():
                of_case.append(step(model, case, tokens))
        found[variant] = {case: of_case[1:] for case, of_case in steps.items()}
    if dist.get_rank() == 0:
        output.write_text(json.dumps(found))
    stop()


def run(ranks: int, length: int, repeats: int) -> dict[str, Any]:
    """What so many processes measured."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d"]
        asked = ["--output", str(found), "--tokens", str(length), "--repeats", str(repeats), "--ranks", "0"]
        module = ["--rdzv-endpoint", "localhost:0", "-m", "tests.parallel.shared_rows", *asked]
        subprocess.run([sys.executable, *torchrun, *module], cwd=ROOT, check=True)
        read: dict[str, Any] = json.loads(found.read_text())
        return read


def least(steps: list[dict[str, Any]]) -> list[list[float]]:
    """By rank the CPU seconds forward and backward of the steps in which it needed least: the rest is the machine's."""
    return [
        [min(way) for way in zip(*of_rank, strict=True)] for of_rank in zip(*(s["cpu"] for s in steps), strict=True)
    ]


def rows_of(ranks: int, found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each variant and way of sharing."""
    rows = []
    for variant, cases in found.items():
        alone, layers = min(each["seconds"] for each in cases[ALONE]), SETTINGS["num_layers"]
        alone_cpu = sum(least(cases[ALONE])[0])
        for case in (WAVEFRONT, AT_ONCE):
            cpu, seconds = least(cases[case]), min(each["seconds"] for each in cases[case])
            blocks = config_of(variant).blocks if case == AT_ONCE else ()
            link = Link(at_once=[block for block, mixer in enumerate(blocks) if mixer.composes])
            work = [Work([forth / layers] * layers, [back / layers] * layers) for forth, back in cpu]
            row = {"variant": variant, "ranks": ranks, "case": case, "alone_seconds": alone, "seconds": seconds}
            row |= {"efficiency": alone / ranks / seconds, "work": sum(map(sum, cpu)) / alone_cpu}
            rows.append(row | {"simulated": alone_cpu / ranks / simulate([work], link).seconds})
    return rows


PAGE = """# Ranks that share a row: at once, and as a wavefront

One row of {tokens:,} tokens, forward and backward, {num_layers} layers, dim {dim}, float32, one thread a process; the
least of {repeats} steps, in turn (`{command}`, {date}).
On {cores} cores under a load of {load:.0f}: where that is more than the ranks, the clock says what others did.

```text
{table}
```

- efficiency: seconds of one process over the ranks' seconds times their number, as clocked. Four processes on two cores
  cannot have more than 0.5; more than 1 is noise.
- work: CPU seconds of all ranks over those of one process. A wavefront does no more than that: what it has above 1 is
  short parts, and cores that are shared.
- simulated: the efficiency that the ranks' CPU seconds have in the order of the work (`tests/pretrain/wavefront.py`)
  with a core for each and messages that take no time.
"""


def page(report: dict[str, Any]) -> str:
    lines = [
        f"{'model':27}{'ranks':>5}  {'':9}{'s, one':>8}{'s, ranks':>10}{'efficiency':>12}{'work':>7}{'simulated':>11}"
    ]
    for row in report["rows"]:
        numbers = f"{row['efficiency']:12.2f}{row['work']:7.2f}{row['simulated']:11.2f}"
        seconds = f"{row['alone_seconds']:8.2f}{row['seconds']:10.2f}"
        lines.append(f"{row['variant']:27}{row['ranks']:5}  {row['case']:9}{seconds}{numbers}")
    return PAGE.format(**report, **SETTINGS, table="\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    if asked.ranks == [0]:
        worker(asked.output, asked.tokens, asked.repeats)
        return
    report: dict[str, Any] = {"command": f"python -m tests.parallel.shared_rows {shlex.join(sys.argv[1:])}"}
    report |= {"date": f"{datetime.now(UTC):%Y-%m-%d}", "tokens": asked.tokens, "repeats": asked.repeats, "rows": []}
    report |= {"cores": os.cpu_count(), "load": 0.0}
    for ranks in asked.ranks:
        report["rows"] += rows_of(ranks, run(ranks, asked.tokens, asked.repeats))
        report["load"] = os.getloadavg()[2]
        asked.output.mkdir(parents=True, exist_ok=True)
        (asked.output / "at_once.json").write_text(json.dumps(report, indent=2) + "\n")
        (asked.output / "at_once.md").write_text(page(report))
    print(page(report))


if __name__ == "__main__":
    main()
