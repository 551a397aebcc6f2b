"""Commands of the project, run in the test's own process, which has imported already what they import."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from titans_mcore.command_line import run_command


def status_of(main: Callable[[], object], *words: object) -> int:
    """Runs a command with these words behind its name, and returns the status that it ends with."""
    before, sys.argv = sys.argv, ["command", *map(str, words)]
    try:
        run_command(lambda: main() and None)
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    raise AssertionError("run_command always ends with a status")


def help_of(*words: str) -> tuple[str, set[str]]:
    """What a module prints for `--help`, and all that it imports for that, in a process of its own."""
    command = [sys.executable, "-X", "importtime", "-m", *words, "--help"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    return done.stdout, {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
