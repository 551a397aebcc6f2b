"""Run under torchrun by test_token_hashes: what the ranks of a layout read, step by step, as one hash a step.

python batches_worker.py CONFIG.toml RUN_DIR OUTPUT.json "NAME TENSOR CONTEXT FIRST STOP [--SETTING VALUE ...]" ...
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.config.command_line import parse
from pretrain.data.batches import Batches
from pretrain.data.folders import open_data, open_samples
from tests.parallel.regroup import groups_of
from titans_mcore.parallel import context_place, start, stop


def hashes(config, groups, run_dir, first, stop_before):
    """For the steps `first` to before `stop_before`, counted from 0: the hash of the global batch. Collective."""
    samples, _ = open_samples(config, open_data(config), run_dir)
    batches = Batches(samples, config, groups.dp.rank(), groups.dp.size())
    found = {step: hash_of(parts_of(batches.fetch(step), groups)) for step in range(first, stop_before)}
    batches.close()
    return found


def parts_of(micro_batches, groups):
    """What this rank holds of the step's rows: (row, first column) -> tokens, labels and starts of documents."""
    parts = {}
    for turn, batch in enumerate(micro_batches):
        batch = batch.part(*context_place())
        starts = torch.zeros_like(batch.tokens, dtype=torch.bool) if batch.starts is None else batch.starts
        rows, columns = batch.tokens.shape
        # A layout that cuts rows over ranks holds later columns.
        column = groups.cp.rank() * columns
        for row in range(rows):
            place = (turn * groups.dp.size() + groups.dp.rank()) * rows + row
            parts[place, column] = [field[row].tolist() for field in (batch.tokens, batch.labels, starts)]
    return parts


def hash_of(mine):
    """SHA-256 of the whole rows in their order, put together from the parts of all ranks, which must not differ."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    whole = {}
    for parts in gathered:
        for place, part in parts.items():
            assert whole.setdefault(place, part) == part, f"two ranks differ in row and column {place}"
    rows = {}
    for row, column in sorted(whole):
        fields = rows.setdefault(row, ([], [], []))
        assert len(fields[0]) == column, f"columns before {column} of row {row} are missing"
        for field, values in zip(fields, whole[row, column], strict=True):
            field.extend(values)
    assert sorted(rows) == list(range(len(rows))), "rows are missing"
    assert len({len(tokens) for tokens, *_ in rows.values()}) == 1, "rows have different lengths"
    return hashlib.sha256(json.dumps([rows[row] for row in sorted(rows)]).encode()).hexdigest()


def main():
    config_file, run_dir, output, *cases = sys.argv[1:]
    start(seed=0)
    found = {}
    for case in cases:
        name, tensor, context, first, stop_before, *flags = case.split()
        groups = groups_of(int(tensor), int(context))
        config = parse(["--config", config_file, "--run-dir", run_dir, *flags]).config
        found[name] = hashes(config, groups, Path(run_dir), int(first), int(stop_before))
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found))
    stop()


if __name__ == "__main__":
    main()
