"""A disk that takes 40 s, for workers that find this folder on their path: the first fsync waits as long."""

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
    _fsync(descriptor)


if "pretrain.train" in sys.orig_argv:
    os.fsync = _slow
