"""Commands as a user starts them, in processes of their own."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.report.records import read_records

ROOT = Path(__file__).resolve().parents[2]


class Job:
    """A command in a process group of its own, with the project's code or that of another root."""

    def __init__(self, command: list[str], cwd: Path, root: Path = ROOT) -> None:
        path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": path}
        # Threads that spin while they wait slow a shared machine down tenfold.
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait(self, timeout_seconds: float = 480) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        try:
            out, err = self.process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = self.process.communicate()
            pytest.fail(f"did not end within {timeout_seconds} s:\n{out}\n{err}")
        return self.process.returncode, out, err

    def kill(self) -> None:
        """kill -9 for every process of the job: torchrun puts each worker into a process group of its own."""
        for pid in descendants(self.process.pid):
            os.kill(pid, signal.SIGKILL)


def descendants(ancestor: int) -> list[int]:
    """A process and all that it has started, directly or not."""
    family = [ancestor]
    for pid in family:
        family += _children(pid)
    return family


def _children(parent: int) -> list[int]:
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # a process may end while we look
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                children.append(int(stat.parent.name))
    return children


def read_metrics(run_dir: Path, kind: str = "step") -> list[dict[str, Any]]:
    """The values of one kind with their steps, as if the run had never stopped."""
    envelope = ("kind", "run", "attempt", "time")
    return [
        {name: value for name, value in record.items() if name not in envelope}
        for record in read_records(run_dir)
        if record["kind"] == kind
    ]
