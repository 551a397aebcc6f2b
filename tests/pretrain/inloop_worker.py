"""Run under torchrun by test_inloop_layouts: trains every layout without and with evaluations between its steps.

python -m tests.pretrain.inloop_worker CONFIG.toml OUTPUT.json "NAME: SETTINGS" ...
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.checkpoint.carried import CarriedState
from pretrain.config.command_line import parse
from pretrain.data.batches import Batches
from pretrain.data.folders import keep_tokenizer, open_data, open_samples
from pretrain.engine import build_engine, build_model, train_step
from pretrain.evaluate.evaluations import Evaluations
from pretrain.schedule import rate_of
from titans_mcore.parallel import sample_place, start, stop

from ..parallel.regroup import groups_of


def trained(config, run_dir, groups, evaluated):
    """Loss and gradient norm of every step, the records of evaluations, and what is random afterwards."""
    torch.manual_seed(config.train.seed)
    data = open_data(config)
    if dist.get_rank() == 0:
        keep_tokenizer(data, run_dir)
    samples, heldout = open_samples(config, data, run_dir)
    evaluations = Evaluations(config, data, run_dir, heldout) if evaluated else None
    batches = Batches(samples, config, *sample_place())
    engine = build_engine(build_model(config, groups), config, sample_place().ranks)
    carried = CarriedState(config.model) if config.data.carry_state else None
    steps, records = [], {}
    for step in range(1, config.train.steps + 1):
        result = train_step(engine, batches.fetch(step - 1), rate_of(step, config), carried)
        steps.append([result.loss, result.grad_norm])
        if evaluations and (found := evaluations.after(engine, step)):
            records[step] = found
    batches.close()
    random = torch.get_rng_state().sum().item()
    return {"steps": steps, "records": records, "random": random, "counted": [engine.micro_steps, engine.global_steps]}


def main():
    config_file, output, *layouts = sys.argv[1:]
    named = dict(layout.split(": ") for layout in layouts)
    configs = {
        name: parse(["--config", config_file, "--run-dir", "unused", *text.split()]).config
        for name, text in named.items()
    }
    start(1, seed=0)
    found = {}
    for name, config in configs.items():
        groups = groups_of(config.parallel.tensor, config.parallel.context)
        found[name] = [trained(config, Path(output).parent, groups, evaluated) for evaluated in (False, True)]
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found))
    stop()


if __name__ == "__main__":
    main()
