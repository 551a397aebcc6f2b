"""torchrun for launch/torchrun.sh: settings checked first, less noise, and an exit status that tells the truth.

    python -m pretrain.launcher [TORCHRUN FLAGS] -- [--nproc N] --config FILE --run-dir DIR [SETTINGS]

torchrun ends with a traceback of its own after any failure of a worker, which buries the worker's sentence, and with
status 1 after a signal even when every worker saved and left in order. Here a failure ends with the status of the
worker that failed first, and a signal with 0 when all workers of this host ended well.
"""

import ctypes
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from pretrain.command_line import parse
from titans_mcore.division import check_divisible, check_world

_STATUS_DIR = "TITANS_STATUS_DIR"
_EXIT_MISTAKE = 2
_PR_SET_PDEATHSIG = 1


def follow_launcher() -> None:
    """Called by a worker at its start: it is to save and end when the launcher is killed, not to train on alone."""
    if os.environ.get(_STATUS_DIR) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def record_success() -> None:
    """Called by a worker at the end of its work: tells the launcher on this host, if there is one."""
    if folder := os.environ.get(_STATUS_DIR):
        Path(folder, f"ended-{os.environ.get('LOCAL_RANK', '0')}").touch()


def main() -> None:
    """Checks the settings, starts the workers and waits for them."""
    at = sys.argv.index("--")
    flags, words = sys.argv[1:at], sys.argv[at + 1 :]
    try:
        asked, words = _take_nproc(words)
        config = parse(words).config
        parallel = config.parallel
        processes = asked or _gpus() or parallel.tensor * parallel.context
        world_size = processes * int(os.environ.get("NNODES", "1"))
        config.accumulation(check_world(world_size, parallel.tensor, parallel.context))
        check_divisible(config.model, parallel.tensor, parallel.memory_parallel)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(_EXIT_MISTAKE) from None
    _run([*flags, "--nproc-per-node", str(processes), "-m", "pretrain.train", *words])


def _take_nproc(words: list[str]) -> tuple[int | None, list[str]]:
    if "--nproc" not in words:
        return None, words
    at = words.index("--nproc")
    value = words[at + 1] if at + 1 < len(words) else ""
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"--nproc is {value!r}; it must be a number of processes")
    return int(value), words[:at] + words[at + 2 :]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _run(arguments: list[str]) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The agent reports a worker's end as errors with process tables; one line below says what matters.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    parsed = run.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="titans-") as folder:
        os.environ[_STATUS_DIR] = folder
        try:
            run.run(parsed)
        except ChildFailedError as error:
            raise SystemExit(_status(error)) from None
        except SignalException as error:
            if len(list(Path(folder).iterdir())) < int(parsed.nproc_per_node):
                print(f"error: stopped by {error.sigval.name} before every process had saved", file=sys.stderr)
                raise SystemExit(128 + error.sigval) from None


def _status(error: Any) -> int:
    rank, failure = error.get_first_failure()
    status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    if status != _EXIT_MISTAKE:  # that one comes with a sentence
        what = f"was killed by signal {-failure.exitcode}" if failure.exitcode < 0 else f"ended with status {status}"
        print(f"error: process {rank} {what}; the others were stopped", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
