"""Run under torchrun by test_equivalence: trains some layouts one after the other and writes their curves.

python curves_worker.py CONFIG.toml OUTPUT.json NAME=SETTING=VALUE[,SETTING=VALUE ...] ...
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.command_line import parse
from pretrain.data import Batches
from pretrain.engine import build_engine, build_model, heldout_loss, train_step
from pretrain.folders import open_data
from pretrain.train import open_samples, rate_of
from titans_mcore.parallel import start, stop


def curve(config, groups, run_dir):
    torch.manual_seed(config.train.seed)
    samples, heldout = open_samples(config, open_data(config), run_dir)
    batches = Batches(samples, config, groups.dp.rank(), groups.dp.size())
    engine = build_engine(build_model(config, groups), config, groups.dp.size())
    results = []
    for step in range(1, config.train.steps + 1):
        results.append(train_step(engine, batches.fetch(step - 1), rate_of(step, config)))
    batches.close()
    return {
        "loss": [result.loss for result in results],
        "grad_norm": [result.grad_norm for result in results],
        "heldout": heldout_loss(engine, heldout, config),
    }


def main():
    config_file, output, *layouts = sys.argv[1:]
    curves, groups = {}, None
    for layout in layouts:
        name, _, settings = layout.partition("=")
        flags = [word for setting in settings.split(",") for word in setting.split("=")]
        config = parse(["--config", config_file, "--run-dir", "unused", *flags]).config
        groups = groups or start(config.parallel.tensor, seed=config.train.seed)
        curves[name] = curve(config, groups, Path(output).parent)
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(curves))
    stop()


if __name__ == "__main__":
    main()
