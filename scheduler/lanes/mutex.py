"""The locks of ``policy="locked"`` and ``"row-locked"``: a lane holds one, and nobody else does."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from functools import cache
from typing import Any

import numpy as np

from hogstream.scheduler.checks import SettingError

# At least sizeof(pthread_mutex_t) of any 64-bit Linux; and a cache line.
_BYTES = 64

_ADDRESS, _INTEGER = ctypes.c_void_p, ctypes.c_int
_ARGUMENTS = {
    "pthread_mutexattr_init": (_ADDRESS,),
    "pthread_mutexattr_setpshared": (_ADDRESS, _INTEGER),
    "pthread_mutexattr_setrobust": (_ADDRESS, _INTEGER),
    "pthread_mutex_init": (_ADDRESS, _ADDRESS),
    "pthread_mutex_timedlock": (_ADDRESS, _ADDRESS),
    "pthread_mutex_consistent": (_ADDRESS,),
    "pthread_mutex_unlock": (_ADDRESS,),
}


class Mutex:
    """A lock of the lanes of one scheduler, in a cache line of its own.

    It is a mutex of POSIX threads, which compiled lanes take by its address. On a system whose
    mutexes know no time limit, as macOS, no lanes are compiled, and it is a lock of Python's.

    Acquire and release it on one thread.
    """

    def __init__(self) -> None:
        """Makes it, free."""
        self._memory = np.zeros(2 * _BYTES, np.uint8)
        self._python: threading.Lock | None = None
        if has_timed_lock():
            call("pthread_mutex_init", self.address, None)
        else:
            self._python = threading.Lock()

    @property
    def address(self) -> int:
        """Where it is, for compiled lanes."""
        return -(-self._memory.ctypes.data // _BYTES) * _BYTES

    def acquire(self, timeout: float) -> bool:
        """Waits for it, without the GIL.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            Whether it is held now.
        """
        if self._python is not None:
            return self._python.acquire(timeout=timeout)
        return timed_lock(self.address, timeout) != errno.ETIMEDOUT

    def release(self) -> None:
        """Releases it."""
        if self._python is not None:
            self._python.release()
        else:
            call("pthread_mutex_unlock", self.address)


class RowLocks:
    """The locks of rows, for compiled lanes of one scheduler: mutexes of POSIX threads.

    The shared parameters are cut into blocks, and a row is of the block in which it begins: so two
    updates of a row meet at one mutex. Block after block has the next of them, round and round.
    Two blocks that have the same one wait for each other in vain, which is rare among so many. A
    lane holds one at a time, so that none waits for ever.

    Attributes:
        block: How many elements a block has. Rows as wide as that, or wider, are locked each by
            itself. Narrower ones share a mutex with some neighbours: to lock costs as much as to
            update some 64 elements, so a lane would gain little by anything finer.
        stripes: How many mutexes there are, each in a cache line of its own: 64 KiB.
    """

    block = 64
    stripes = 1024

    def __init__(self) -> None:
        """Makes them, free.

        Raises:
            SettingError: If no lanes are compiled on this system.
        """
        if not has_timed_lock():
            raise SettingError("policy", "must be another than row-locked on this system")
        self._memory = np.zeros((self.stripes + 1) * _BYTES, np.uint8)
        for stripe in range(self.stripes):
            call("pthread_mutex_init", self.address + stripe * _BYTES, None)

    @property
    def address(self) -> int:
        """Where the first is, in a cache line of its own, as each that follows."""
        return -(-self._memory.ctypes.data // _BYTES) * _BYTES


def has_timed_lock() -> bool:
    """Whether the mutexes of this system know a time limit; compiled lanes need that."""
    return hasattr(ctypes.CDLL(None), "pthread_mutex_timedlock")


def timed_lock(address: int, timeout: float) -> int:
    """Waits for the mutex at an address, without the GIL.

    Args:
        address: Where it is.
        timeout: Seconds to wait at most.

    Returns:
        0, ``ETIMEDOUT``, or ``EOWNERDEAD`` if it is held now but its holder had died.

    Raises:
        OSError: If the mutex refuses.
    """
    until = time.time() + timeout
    deadline = _Timespec(int(until), int(until % 1 * 1e9))
    expected = errno.ETIMEDOUT, errno.EOWNERDEAD
    return call("pthread_mutex_timedlock", address, ctypes.byref(deadline), expected=expected)


def call(name: str, *arguments: Any, expected: tuple[int, ...] = ()) -> int:
    """Calls a function of POSIX threads.

    Args:
        name: Its name.
        arguments: What it takes.
        expected: What it may return besides 0.

    Raises:
        OSError: If the system has none of that name, or it returns something else.
    """
    result: int = _function(name)(*arguments)
    if result != 0 and result not in expected:
        raise OSError(result, f"lock: {os.strerror(result)}")
    return result


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


@cache
def _function(name: str) -> Any:
    try:
        function = getattr(ctypes.CDLL(None), name)
    except AttributeError:
        raise OSError(errno.ENOSYS, f"lock: this system has no {name}") from None
    function.argtypes = _ARGUMENTS[name]
    return function
