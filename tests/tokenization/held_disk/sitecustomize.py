"""A disk that never takes files whose path HOLD_AT matches, for processes that find this folder on their path: until it
is stopped, a command that writes them cannot end, however seldom the test that stops it gets its turn."""

import os
import re
import time

_fsync = os.fsync


def _held(descriptor: int) -> None:
    while re.search(os.environ["HOLD_AT"], os.readlink(f"/proc/self/fd/{descriptor}")):
        time.sleep(0.01)
    _fsync(descriptor)


os.fsync = _held
