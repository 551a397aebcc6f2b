"""Tasks on many processes: each takes the next one when it is free, and none outlives the command.

An executor of concurrent.futures would wait for ever for the rest of a result whose worker was killed while it wrote:
all of its workers write into one pipe, which the others keep open.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from tokenization.command_line import TokenizationError

_Task = TypeVar("_Task")
Report = Callable[[int, int], None]
"""Takes bytes done and tokens written since the last call."""
Work = Callable[[Any, Report], Any]
"""Takes a task and what it reports its progress to; both are called in the worker."""

BYTES_WORTH_A_WORKER = 1 << 29
_PROGRESS, _RESULT, _FAULT = range(3)


def worthwhile_workers(workers: int, total_bytes: int) -> int:
    """Returns how many of the workers pay off where each has to import Megatron-core, which takes seconds."""
    return min(workers, 1 + total_bytes // BYTES_WORTH_A_WORKER)


def run_tasks(
    make_work: Callable[..., Work], arguments: Sequence[Any], tasks: Sequence[_Task], workers: int, report: Report
) -> Iterator[tuple[_Task, Any]]:
    """Runs tasks and yields each with its result as they end, in any order.

    Args:
        make_work: Called once in each process with `arguments`; gives the function that does a task. Importable.
        arguments: Picklable.
        tasks: Picklable.
        workers: Processes; with one, or one task, the calling process does the work.
        report: Receives the progress of all tasks.

    Yields:
        Tasks with their results.

    Raises:
        TokenizationError: A worker died, or raised it.
        OSError: A worker raised it.
    """
    if min(workers, len(tasks)) <= 1:
        work = make_work(*arguments) if tasks else None
        for task in tasks:
            assert work is not None
            yield task, work(task, report)
        return
    processes, connections = _start(make_work, arguments, min(workers, len(tasks)))
    try:
        yield from _distribute(connections, deque(tasks), report)
    finally:
        # Nothing half-written counts, so there is no reason to wait for what is under way.
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _start(make_work: Callable[..., Work], arguments: Sequence[Any], count: int) -> tuple[list[Any], list[Connection]]:
    context = multiprocessing.get_context("spawn")
    processes, connections = [], []
    resource_tracker.ensure_running()  # the first process would start it, and that lets interrupts through again
    with _interrupts_held_back():  # the workers inherit it: Ctrl-C is the parent's to handle
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make_work, arguments), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            connections.append(ours)
    return processes, connections


def _distribute(connections: list[Connection], waiting: "deque[_Task]", report: Report) -> Iterator[tuple[_Task, Any]]:
    busy: dict[Connection, _Task] = {}

    def give(connection: Connection) -> None:
        if waiting:
            busy[connection] = waiting.popleft()
            with _death_named():
                connection.send(busy[connection])

    for connection in connections:
        give(connection)
    while busy:
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection)
            with _death_named():
                kind, payload = ready.recv()
            if kind == _PROGRESS:
                report(*payload)
            elif kind == _FAULT:
                raise payload
            else:
                done = busy.pop(ready)
                give(ready)
                yield done, payload


@contextmanager
def _death_named() -> Iterator[None]:
    """Each worker has a pipe of its own that ends with it, in the middle of a message too."""
    try:
        yield
    except (EOFError, OSError):
        raise TokenizationError(
            "a worker process was killed, most often for want of memory; use fewer --workers and run the command "
            "again: it goes on where it stopped"
        ) from None


def _serve(connection: Connection, make_work: Callable[..., Work], arguments: Sequence[Any]) -> None:
    """Runs in a worker until the parent goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work = make_work(*arguments)
        while True:
            result = work(connection.recv(), lambda *progress: connection.send((_PROGRESS, progress)))
            connection.send((_RESULT, result))
    except EOFError:
        return
    except (TokenizationError, OSError) as fault:
        connection.send((_FAULT, fault))
    except BaseException:
        # Exceptions of other libraries may not survive the pipe; their text does.
        connection.send((_FAULT, RuntimeError(traceback.format_exc())))


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, and one that is busy would notice late."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """A Ctrl-C that comes meanwhile arrives at the end; were it ignored, it would be lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
