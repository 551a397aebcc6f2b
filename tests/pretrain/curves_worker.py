"""Run under torchrun by test_equivalence: trains some layouts one after the other and writes their curves.

python -m tests.pretrain.curves_worker CONFIG.toml OUTPUT.json "NAME: SETTINGS" ...
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.checkpoint.carried import CarriedState
from pretrain.config.command_line import parse
from pretrain.data.batches import Batches
from pretrain.data.folders import open_data, open_samples
from pretrain.engine import build_engine, build_model, train_step
from pretrain.evaluate.losses import heldout_losses
from pretrain.schedule import rate_of
from titans_mcore.parallel import sample_place, start, stop

from ..parallel.regroup import groups_of


def curve(config, run_dir, groups):
    torch.manual_seed(config.train.seed)
    samples, heldout = open_samples(config, open_data(config), run_dir)
    batches = Batches(samples, config, *sample_place())
    engine = build_engine(build_model(config, groups), config, sample_place().ranks)
    carried = CarriedState(config.model) if config.data.carry_state else None
    results = []
    for step in range(1, config.train.steps + 1):
        rate, in_flight = rate_of(step, config), config.parallel.in_flight
        results.append(train_step(engine, batches.fetch(step - 1), rate, carried, in_flight=in_flight))
    batches.close()
    return {
        "loss": [result.loss for result in results],
        "grad_norm": [result.grad_norm for result in results],
        "heldout": heldout_losses(engine, heldout, config).mean,
    }


def main():
    config_file, output, *layouts = sys.argv[1:]
    named = dict(layout.split(": ") for layout in layouts)
    flags = {name: ["--config", config_file, "--run-dir", "unused", *text.split()] for name, text in named.items()}
    configs = {name: parse(words).config for name, words in flags.items()}
    start(1, seed=0)
    curves = {}
    for name, config in configs.items():
        groups = groups_of(config.parallel.tensor, config.parallel.context)
        curves[name] = curve(config, Path(output).parent, groups)
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(curves))
    stop()


if __name__ == "__main__":
    main()
