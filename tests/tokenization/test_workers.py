"""Processes that share tasks."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from tokenization.workers import Report, Work, run_tasks


def squares() -> Work:
    def work(number: int, report: Report) -> int:
        return number**2

    return work


def held_back() -> Work:
    def work(_: int, report: Report) -> bool:
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])

    return work


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
