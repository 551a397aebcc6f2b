"""One run at a time in a run folder."""

import os
from pathlib import Path

from tokenization.io import try_lock


def lock_run_folder(run_dir: Path) -> int:
    """Makes the folder and holds its lock until this process ends, however it ends.

    Returns:
        The descriptor of the lock file, which stays open.

    Raises:
        ValueError: Another process holds it: two runs would write over each other's checkpoints.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    if not try_lock(descriptor):
        os.close(descriptor)
        raise ValueError(f"another process is training in {run_dir}; wait for it or use another --run-dir")
    return descriptor
