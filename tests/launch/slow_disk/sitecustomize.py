"""A disk that takes 40 s, for workers that find this folder on their path: the first fsync waits as long, and says so
in the file WAITED, where one is named."""

import os
import sys
import time

SECONDS = 40.0
_fsync = os.fsync
_waited = False


def _slow(descriptor: int) -> None:
    global _waited
    if not _waited and "checkpoints" in os.readlink(f"/proc/self/fd/{descriptor}"):
        _waited = True
        time.sleep(SECONDS)
        if waited := os.environ.get("WAITED"):
            os.close(os.open(waited, os.O_CREAT))
    _fsync(descriptor)


if "pretrain.train" in sys.orig_argv:
    os.fsync = _slow
