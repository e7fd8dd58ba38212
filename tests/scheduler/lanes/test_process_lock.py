from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch

from hogstream.scheduler.lanes.process_lock import ProcessLock
from process_testing import LIMIT_SECONDS, may_fork_with_threads

pytestmark = may_fork_with_threads
FORK = multiprocessing.get_context("fork")  # which need not import torch again


def count(lock: ProcessLock, total: Any, rounds: int) -> None:
    for _ in range(rounds):
        assert lock.acquire(LIMIT_SECONDS)
        total[0] = int(total[0]) + 1  # a read and a write, with nothing to make them one
        lock.release()


def hold(lock: ProcessLock, held: Connection) -> None:
    assert lock.acquire(LIMIT_SECONDS)
    held.send(True)
    held.recv()  # never sent


@pytest.fixture
def lock() -> ProcessLock:
    return ProcessLock()


@pytest.fixture
def holder(lock: ProcessLock) -> Iterator[BaseProcess]:
    """Another process that holds the lock."""
    mine, its = FORK.Pipe()
    process = FORK.Process(target=hold, args=(lock, its))
    process.start()
    assert mine.poll(LIMIT_SECONDS)
    yield process
    process.kill()
    process.join()
    mine.close()
    its.close()


def test_processes_exclude_each_other(lock: ProcessLock) -> None:
    total = torch.zeros(1, dtype=torch.int64).share_memory_().numpy()
    processes = [FORK.Process(target=count, args=(lock, total, 20_000)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_SECONDS)
    assert [process.exitcode for process in processes] == [0, 0]
    assert total[0] == 40_000
    assert lock.recoveries == 0


def test_wait_for_a_lock_that_is_held_has_an_end(lock: ProcessLock, holder: BaseProcess) -> None:
    assert not lock.acquire(0.05)
    assert holder.is_alive()


def test_lock_of_a_killed_holder_is_taken_over(lock: ProcessLock, holder: BaseProcess) -> None:
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    assert lock.acquire(LIMIT_SECONDS)
    assert lock.recoveries == 1
    lock.release()
    count(lock, [0], 3)  # it is as good as new
    assert lock.recoveries == 1
