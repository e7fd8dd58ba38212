"""Threads for CPU kernels: a list of updates in pieces, each taken by whichever thread is free.

Numba's own threading layers are not used: OpenMP's kills a forked child, and the workqueue aborts
the process when two threads enter it at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
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
        counters: int64, shape (16,): how many elements have been taken is in the first, how many
            are done in the ninth, on a cache line of its own. A compiled kernel takes pieces by
            adding to them atomically, instead of by the methods.
    """

    def __init__(self, elements: int, size: int) -> None:
        self.elements, self.size = elements, max(size, 1)
        self.counters = np.zeros(16, np.int64)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Takes pieces until there is none left, each as ``(start, stop)``."""
        while True:
            with self._lock:
                start = int(self.counters[0])
                self.counters[0] += self.size
            if start >= self.elements:
                return
            stop = min(start + self.size, self.elements)
            yield start, stop
            with self._lock:
                self.counters[8] += stop - start

    def done(self) -> bool:
        """Whether no thread works on them any more."""
        return bool(self.counters[8] >= self.elements)


#: Updates what it takes of the pieces, and says whether all are done; without the GIL, mostly.
Kernel = Callable[..., bool]


def run_in_pieces(kernel: Kernel, table: LaunchTable, *args: object) -> None:
    """Calls ``kernel(table, *args, pieces)`` on several threads, until all pieces are done.

    At most ``torch.get_num_threads()`` threads work, the calling one among them, all in its
    floating-point mode. One that comes too late finds nothing left to do, and is not waited for.

    Args:
        kernel: Takes pieces until there is none left.
        table: Of updates on the CPU.
        args: Passed on to the kernel.
    """
    size = table.elements * table.dtype.itemsize
    threads = min(torch.get_num_threads(), size // MIN_BYTES_PER_THREAD)
    if threads <= 1:
        kernel(table, *args, Pieces(table.elements, table.elements))
        return
    pieces = Pieces(table.elements, PIECE_ELEMENTS)
    pool, mode = _pool, FloatingPointMode()

    def help_caller() -> bool:
        mode.set()  # which the thread keeps only until it helps another caller
        return kernel(table, *args, pieces)

    helpers: list[Future[bool]] = []
    done = refused = False
    try:
        try:
            helpers.extend(pool.submit(help_caller) for _ in range(threads - 1))
        except RuntimeError:  # no thread can be started, or Python is ending: do with fewer
            refused = True
        done = kernel(table, *args, pieces)
    finally:
        errors = [] if done else [helper.exception() for helper in helpers]
        if refused and not done:
            pool.shutdown()  # the helper that was refused is queued all the same
            _make_pool()
    for error in errors:
        if error is not None:
            raise error


def _make_pool() -> None:
    global _pool
    _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="hogstream-kernel")


_make_pool()  # it starts a thread when there is work for one, and not before
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_make_pool)  # which inherits the pool, but no threads
