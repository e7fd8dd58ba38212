"""Threads for CPU kernels: a list of updates in pieces, each taken by whichever thread is free.

Compiled kernels run on torch's own OpenMP threads. Where there are none, and for kernels in Python,
there is a pool. Numba's own threading layers are not used: OpenMP's kills a forked child, and the
workqueue aborts the process when two threads enter it at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Protocol

import torch

from hogstream.kernels.backends.floating_point import FloatingPointMode
from hogstream.kernels.launch_table import LaunchTable

# A thread that sleeps is there after 0.1 to 0.2 ms: it is woken for no less than this much of the
# parameters, which takes one thread a few times as long.
MIN_BYTES_PER_THREAD = 4 << 20
PIECE_ELEMENTS = 1 << 17

_pool: ThreadPoolExecutor


class Pieces:
    """The elements of a table, to be taken piece by piece from several threads.

    Attributes:
        elements: How many there are, counted from the first of the table's first update.
        size: Elements in a piece; the last one may have fewer.
    """

    def __init__(self, elements: int, size: int) -> None:
        self.elements, self.size = elements, max(size, 1)
        self._taken = 0
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Takes pieces until there is none left, each as ``(start, stop)``."""
        while True:
            with self._lock:
                start = self._taken
                self._taken += self.size
            if start >= self.elements:
                return
            yield start, min(start + self.size, self.elements)


#: Updates what it takes of the pieces.
Kernel = Callable[..., None]


def run_in_pieces(kernel: Kernel, table: LaunchTable, *args: object) -> None:
    """Calls ``kernel(table, *args, pieces)`` on several threads, until all pieces are done.

    At most ``torch.get_num_threads()`` threads work, the calling one among them, all in its
    floating-point mode.

    Args:
        kernel: Takes pieces until there is none left.
        table: Of updates on the CPU.
        args: Passed on to the kernel.
    """
    threads = pool_threads(table)
    pieces = Pieces(table.elements, PIECE_ELEMENTS if threads > 1 else table.elements)
    call_on(threads, lambda: kernel(table, *args, pieces))


class Sized(Protocol):
    """What is updated: how much, and of which dtype."""

    @property
    def elements(self) -> int:
        """How many."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""


def pool_threads(table: Sized) -> int:
    """How many threads an update is worth waking, the calling one among them."""
    size = table.elements * table.dtype.itemsize
    return max(1, min(torch.get_num_threads(), size // MIN_BYTES_PER_THREAD))


def call_on(threads: int, work: Callable[[], object]) -> None:
    """Calls ``work`` on the calling thread, and on others beside it, until it has all returned.

    Others work in the floating-point mode of the caller. One that comes too late, when the caller
    has returned from its own call, is not waited for.

    Args:
        threads: How many at most, the calling one among them.
        work: Takes of what there is to do until there is none left.
    """
    if threads <= 1:
        work()
        return
    pool, team, refused = _pool, _Team(work), False
    try:
        try:
            try:
                for _ in range(threads - 1):
                    pool.submit(team.help)
            except RuntimeError:  # no thread can be started, or Python is ending: do with fewer
                refused = True
            work()
        finally:
            team.dismiss()
    except BaseException:
        team.dismiss()  # as an interrupt may have come on the way into that above
        raise
    finally:
        if refused:
            pool.shutdown()  # the helper that was refused is queued all the same
            _make_pool()
    if team.errors:
        raise team.errors[0]


class _Team:
    """Who helps a caller, whom an interrupt may reach anywhere: it may lose a future, for example.

    A lock and a queue that are in C are taken and left as a whole, and no count is the caller's.

    Attributes:
        errors: What helpers have raised.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        """Helps with ``work``, in the floating-point mode of the thread that makes the team."""
        self.errors: list[BaseException] = []
        self._work, self._mode = work, FloatingPointMode()
        self._at_work, self._dismissed, self._lock = 0, False, threading.Lock()
        self._leaving: SimpleQueue[None] = SimpleQueue()

    def help(self) -> None:
        """Works on the calling thread, but for one that comes too late."""
        with self._lock:
            if self._dismissed:
                return
            self._at_work += 1
        try:
            self._mode.set()  # which the thread keeps only until it helps another caller
            self._work()
        except BaseException as error:
            self.errors.append(error)
        finally:
            with self._lock:
                self._at_work -= 1
            self._leaving.put(None)

    def dismiss(self) -> None:
        """Waits for those at work, even if interrupted: what they work on may be freed then."""
        try:
            with self._lock:
                self._dismissed = True
            while self._at_work:
                self._leaving.get()
        except BaseException:
            self.dismiss()
            raise


def _make_pool() -> None:
    global _pool
    _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="hogstream-kernel")


_make_pool()  # it starts a thread when there is work for one, and not before
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_make_pool)  # which inherits the pool, but no threads
