"""What every thread has for itself, and what a worker's thread starts with of that."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hogstream.kernels.backends.floating_point import FloatingPointMode

# Finds names in all that torch is linked with.
_torch = ctypes.PyDLL(torch._C.__file__)
# In C: ``void omp_set_num_threads(int)``, and MKL's for the calling thread alone. A torch without
# the first has one pool of threads for all that call it, and there is nothing to bound.
_SETTERS = "omp_set_num_threads", "MKL_Set_Num_Threads_Local"


class ThreadState:
    """What a thread starts with that computes for a worker.

    It has the floating-point mode of the thread that makes this, and a bound on the threads that
    torch gives its operations. OpenMP and MKL keep their number of threads for each thread that
    calls them: to set it on another thread has no effect here.
    """

    def __init__(self, torch_threads: int) -> None:
        """Takes the calling thread's floating-point mode.

        Args:
            torch_threads: How many threads torch may use at most; at least 1.
        """
        self._mode = FloatingPointMode()
        self._torch_threads = torch_threads

    def enter(self) -> None:
        """Gives it to the calling thread, and to no other."""
        self._mode.set()
        # Torch sets what it gives a new thread when it is first asked; later, that would undo this.
        if torch.get_num_threads() > self._torch_threads:
            _set_torch_threads(self._torch_threads)


class _Bounds(threading.local):
    """Of the calling thread: those in force, and how many threads it has without them."""

    def __init__(self) -> None:
        self.in_force: list[int] = []
        self.without = 0

    def least(self) -> int:
        """How many threads it has with them, unless somebody has set others."""
        return min([self.without, *self.in_force])


_bounds = _Bounds()


@contextmanager
def bounded_torch_threads(most: int) -> Iterator[None]:
    """Bounds how many threads torch uses for operations of the calling thread, while in here.

    Several such blocks may overlap. What somebody sets meanwhile with ``torch.set_num_threads``
    stays.

    Args:
        most: At least 1.
    """
    if torch.get_num_threads() != _bounds.least():
        _bounds.without = torch.get_num_threads()
    _bounds.in_force.append(most)
    _set_torch_threads(_bounds.least())
    try:
        yield
    finally:
        ours = torch.get_num_threads() == _bounds.least()
        _bounds.in_force.remove(most)
        if ours:
            _set_torch_threads(_bounds.least())


def _set_torch_threads(threads: int) -> None:
    """Has torch use so many for the calling thread alone.

    ``torch.set_num_threads`` would set besides what threads get that are new to torch.
    """
    for name in _SETTERS:
        if hasattr(_torch, name):
            getattr(_torch, name)(threads)


def share_of_cores(workers: int) -> int:
    """How many threads torch uses for each of so many workers, over all processes; at least 1.

    No more than ``torch.get_num_threads()`` says here. One core is left to the event loop and the
    lanes: threads of OpenMP spin while they wait for each other, and stall those that hand over
    updates where cores are short.
    """
    can_ask = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if can_ask else os.cpu_count() or 1
    given = torch.get_num_threads()
    if given == _bounds.least():  # while another scheduler runs, whose bound is not for this one
        given = _bounds.without
    return min(given, max(1, (cores - 1) // workers))
