"""A lock in shared memory that outlives whoever dies while holding it."""

from __future__ import annotations

import errno

import torch

from hogstream.scheduler.lanes.mutex import call, timed_lock
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
        device = torch.device("cpu")
        self._memory = allocate_zeros("lock", (2 * _BYTES,), torch.uint8, device).share_memory_()
        attributes = self.address + _BYTES
        call("pthread_mutexattr_init", attributes)
        call("pthread_mutexattr_setpshared", attributes, _PROCESS_SHARED)
        call("pthread_mutexattr_setrobust", attributes, _ROBUST)
        call("pthread_mutex_init", self.address, attributes)

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
        result = timed_lock(self.address, timeout)
        if result == errno.EOWNERDEAD:
            self._memory[LOCK_RECOVERIES:].view(torch.int64).add_(1)
            call("pthread_mutex_consistent", self.address)
        return result != errno.ETIMEDOUT

    def release(self) -> None:
        """Releases it."""
        call("pthread_mutex_unlock", self.address)
