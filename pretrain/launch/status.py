"""What launcher and workers tell each other, and how a run ends for whoever started it: light to import."""

import ctypes
import os
import signal
import sys
from pathlib import Path

EXIT_FAILED = 1
"""Something was lost on the way: another start goes on from the last checkpoint."""
EXIT_MISTAKE = 2
"""What was asked cannot be done, and not the next time either."""
EXIT_GIVEN_UP = 3
"""Bad steps that skipping and rewinding did not help; somebody has to look at RUN/autopsy first."""
FINAL = (EXIT_MISTAKE, EXIT_GIVEN_UP)
"""After these a start with the same settings ends the same way: nothing is tried again."""
REQUEUE_FILE = "requeue.json"
"""In the run folder of a run that was stopped before its end, in order."""
STATUS_DIR, LAUNCHER = "TITANS_STATUS_DIR", "TITANS_LAUNCHER"
"""Variable with the folder in which each worker of a host leaves a file when it ended well."""
_PR_SET_PDEATHSIG = 1


def follow_launcher() -> None:
    """Called by a worker at its start: it is to save and end when the launcher is killed, not to train on alone."""
    if not (folder := os.environ.get(STATUS_DIR)):
        return
    # What an earlier worker saved, which stopped for a host that came, says nothing of this one's steps.
    _ended(folder).unlink(missing_ok=True)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        # It may have been killed while this process imported, for which nobody sends a signal.
        if str(os.getppid()) != os.environ.get(LAUNCHER, ""):
            raise SystemExit("error: the launcher has ended; nothing is trained without it")


def record_success() -> None:
    """Called by a worker at the end of its work: tells the launcher on this host, if there is one."""
    if folder := os.environ.get(STATUS_DIR):
        _ended(folder).touch()


def ended_well() -> int:
    """Called by the launcher: how many workers of this host have."""
    return len(list(Path(os.environ[STATUS_DIR]).glob("ended-*")))


def _ended(folder: str) -> Path:
    return Path(folder, f"ended-{os.environ.get('LOCAL_RANK', '0')}")
