from __future__ import annotations

import ctypes
import errno
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from hogstream.scheduler.lanes.mutex import Mutex, RowLocks, call, timed_lock
from process_testing import LIMIT_SECONDS

ROUNDS = 5_000


@pytest.fixture(params=["of POSIX threads", "of Python"])
def mutex(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Mutex:
    """One of this system, or of one that has no timed locks, as macOS."""
    if request.param == "of Python":
        with monkeypatch.context() as patch:
            patch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
            return Mutex()
    return Mutex()


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_exclude_each_other(mutex: Mutex, switching: None) -> None:
    total = [0]

    def count() -> None:
        for _ in range(ROUNDS):
            assert mutex.acquire(LIMIT_SECONDS)
            total[0] = int(total[0]) + 1  # a read and a write, with nothing to make them one
            mutex.release()

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_SECONDS)
    assert total == [4 * ROUNDS]


def test_wait_for_one_that_is_held_has_an_end(mutex: Mutex) -> None:
    assert mutex.acquire(0)
    taken: list[bool] = []
    waiting = threading.Thread(target=lambda: taken.append(mutex.acquire(0.01)))
    waiting.start()
    waiting.join(LIMIT_SECONDS)
    assert taken == [False]
    mutex.release()
    assert mutex.acquire(0)


def test_it_has_a_cache_line_of_its_own() -> None:
    mutexes = [Mutex() for _ in range(20)]
    addresses = {mutex.address for mutex in mutexes}
    assert len(addresses) == 20
    assert all(address % 64 == 0 for address in addresses)
    assert all(
        0 <= mutex.address - mutex._memory.ctypes.data <= mutex._memory.nbytes - 64
        for mutex in mutexes
    )


def test_what_the_system_refuses_is_an_error() -> None:
    mutex = Mutex()
    mutex.acquire(0)
    with pytest.raises(OSError, match="lock: Invalid argument"):
        call("pthread_mutex_timedlock", mutex.address, ctypes.byref((ctypes.c_long * 2)(0, -1)))


def test_locks_of_rows_have_a_cache_line_each_and_exclude_each_other() -> None:
    locks = RowLocks()
    assert locks.address % 64 == 0
    addresses = [locks.address + 64 * stripe for stripe in range(locks.stripes)]
    for address in addresses:
        assert timed_lock(address, LIMIT_SECONDS) == 0
    assert timed_lock(addresses[-1], 0) == errno.ETIMEDOUT
    for address in addresses:
        call("pthread_mutex_unlock", address)
    assert timed_lock(addresses[-1], 0) == 0
    call("pthread_mutex_unlock", addresses[-1])
