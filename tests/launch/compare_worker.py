"""A rank that is a host of its own, whose facts are compared with the others'; see test_preflight.

    python compare_worker.py FOLDER       (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set)

FOLDER/cases.json has for each case the facts and the run folder of every rank; FOLDER/said-RANK.json gets what it said.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from pretrain.launch.__main__ import options
from pretrain.launch.preflight import Meeting, compare_hosts
from pretrain.launch.status import STATUS_DIR

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank = dist.get_rank()
status = folder / f"status-{rank}"
status.mkdir()
os.environ[STATUS_DIR] = str(status)
meeting = Meeting(options([])) if rank == 0 else None
port = [int(meeting.endpoint.rpartition(":")[2]) if meeting else 0]
dist.broadcast_object_list(port)
said = []
for case in json.loads((folder / "cases.json").read_text()):
    own = case[rank]
    (status / "facts.json").write_text(json.dumps({"facts": own["facts"], "store": ["127.0.0.1", port[0]]}))
    try:
        compare_hosts(Path(own["run_dir"]))
        said.append("")
    except ValueError as error:
        said.append(str(error))
(folder / f"said-{rank}.json").write_text(json.dumps(said))
dist.barrier()
dist.destroy_process_group()
