"""A lock in shared memory that outlives whoever dies while holding it."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from functools import cache

import torch

from hogstream.scheduler.memory import allocate_zeros

# At least sizeof(pthread_mutex_t) and pthread_mutexattr_t of any 64-bit Linux.
_BYTES = 64
#: Where in it the number of its recoveries is, an int64.
LOCK_RECOVERIES = 2 * _BYTES - 8
_PROCESS_SHARED = 1
_ROBUST = 1


class ProcessLock:
    """A robust mutex of POSIX threads, shared among processes.

    If its holder dies, whoever waits gets the lock (``EOWNERDEAD``), where a
    ``multiprocessing.Lock`` would stay locked for ever. What it guards is then as the dead left it:
    an update half done, each element of which is whole.

    Pickled, as for a process of ``torch.multiprocessing``, it is the same lock there. Acquire and
    release it on one thread.
    """

    def __init__(self) -> None:
        """Makes it, free.

        Raises:
            OSError: If the system has no such mutexes, as macOS.
            RuntimeError: If there is no room in shared memory.
        """
        libc = _libc()
        device = torch.device("cpu")
        self._memory = allocate_zeros("lock", (2 * _BYTES,), torch.uint8, device).share_memory_()
        attributes = self.address + _BYTES
        for made in (
            libc.pthread_mutexattr_init(attributes),
            libc.pthread_mutexattr_setpshared(attributes, _PROCESS_SHARED),
            libc.pthread_mutexattr_setrobust(attributes, _ROBUST),
            libc.pthread_mutex_init(self.address, attributes),
        ):
            _check(made)

    @property
    def address(self) -> int:
        """Where the mutex is, in this process."""
        return int(self._memory.data_ptr())

    @property
    def recoveries(self) -> int:
        """How often it was taken over from a holder that had died."""
        return int(self._memory[LOCK_RECOVERIES:].view(torch.int64))

    def acquire(self, timeout: float) -> bool:
        """Waits for the lock, without the GIL.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            Whether it is held now.
        """
        until = time.time() + timeout
        deadline = _Timespec(int(until), int(until % 1 * 1e9))
        result = _libc().pthread_mutex_timedlock(self.address, ctypes.byref(deadline))
        if result == errno.EOWNERDEAD:
            self._memory[LOCK_RECOVERIES:].view(torch.int64).add_(1)
            result = _libc().pthread_mutex_consistent(self.address)
        if result == errno.ETIMEDOUT:
            return False
        _check(result)
        return True

    def release(self) -> None:
        """Releases it."""
        _check(_libc().pthread_mutex_unlock(self.address))


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    address, integer = ctypes.c_void_p, ctypes.c_int
    for name, arguments in {
        "pthread_mutexattr_init": [address],
        "pthread_mutexattr_setpshared": [address, integer],
        "pthread_mutexattr_setrobust": [address, integer],
        "pthread_mutex_init": [address, address],
        "pthread_mutex_timedlock": [address, address],
        "pthread_mutex_consistent": [address],
        "pthread_mutex_unlock": [address],
    }.items():
        try:
            getattr(libc, name).argtypes = arguments
        except AttributeError:
            raise OSError(errno.ENOSYS, f"process lock: this system has no {name}") from None
    return libc


def _check(result: int) -> None:
    if result != 0:
        raise OSError(result, f"process lock: {os.strerror(result)}")
