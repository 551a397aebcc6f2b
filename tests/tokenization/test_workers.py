"""Processes that share tasks."""

import multiprocessing
import os
import signal

import pytest

from tokenization.workers import Report, Work, run_tasks


def squares() -> Work:
    def work(number: int, report: Report) -> int:
        return number**2

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
