"""Processes that share tasks."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tokenization.command_line import TokenizationError
from tokenization.workers import Report, Work, run_tasks


def squares() -> Work:
    def work(number: int, report: Report) -> int:
        return number**2

    return work


def held_back() -> Work:
    def work(_: int, report: Report) -> bool:
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])

    return work


def killed_while_it_answers() -> Work:
    def read_by_the_parent() -> int:
        return int(Path(f"/proc/{os.getppid()}/io").read_text().split()[1])

    def kill(before: int) -> None:
        while read_by_the_parent() < before + 1_000_000:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    class Large:
        def __reduce__(self):
            threading.Thread(target=kill, args=(read_by_the_parent(),)).start()
            return bytes, (bytes(200_000_000),)

    def work(number: int, report: Report) -> Large | int:
        return number or Large()

    return work


def test_a_worker_killed_in_the_middle_of_its_result_is_named():
    with pytest.raises(TokenizationError, match="a worker process was killed, most often for want of memory"):
        list(run_tasks(killed_while_it_answers, (), range(3), 2, lambda *_: None))


def test_tasks_come_back_with_their_results():
    assert dict(run_tasks(squares, (), range(7), 2, lambda *_: None)) == {n: n**2 for n in range(7)}


def test_a_ctrl_c_while_workers_are_started_is_not_lost(monkeypatch):
    start = multiprocessing.context.SpawnProcess.start

    def interrupted(process):
        os.kill(os.getpid(), signal.SIGINT)
        start(process)

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            list(run_tasks(squares, (), range(7), 2, lambda *_: None))
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_first_worker_of_a_process_never_sees_a_ctrl_c():
    command = """
from tests.tokenization.test_workers import held_back
from tokenization.workers import run_tasks
print(sorted(dict(run_tasks(held_back, (), range(2), 2, lambda *_: None)).values()))
"""
    answer = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert answer.stdout == "[True, True]\n"
