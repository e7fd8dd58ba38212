"""Threads for CPU kernels: one flat update in slices, each slice on a thread of ours.

Numba's own threading layers are not used: OpenMP's kills a forked child, and the workqueue aborts
the process when two threads enter it at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy.typing as npt
import torch

# Waking a thread costs about 0.1 ms; below this much of a parameter one thread is done sooner.
MIN_SLICE_BYTES = 4 << 20
_CACHE_LINE = 64

Array = npt.NDArray[Any]

_pool: ThreadPoolExecutor


def run_in_slices(kernel: Callable[..., None], arrays: tuple[Array, ...], *args: object) -> None:
    """Calls ``kernel(*slices, *args)`` over slices of flat arrays, at once, and waits for all.

    At most ``torch.get_num_threads()`` threads work, the calling one among them; slices end on
    cache lines of the first array, so that no two threads write the same line.

    Args:
        kernel: Works on one slice of each array, and releases the GIL.
        arrays: Each of shape (n,).
        args: Passed on to the kernel.
    """
    bounds = slice_bounds(arrays[0], torch.get_num_threads())
    slices = [tuple(array[start:stop] for array in arrays) for start, stop in bounds]
    others = [_pool.submit(kernel, *part, *args) for part in slices[1:]]
    try:
        kernel(*slices[0], *args)
    finally:
        errors = [other.exception() for other in others]
    for error in errors:
        if error is not None:
            raise error


def slice_bounds(array: Array, threads: int) -> list[tuple[int, int]]:
    """Splits ``array``, shape (n,), into at most ``threads`` ranges of about as many bytes.

    Returns:
        ``(start, stop)`` element ranges, at least one, together covering ``[0, n)``.
    """
    count = max(1, min(threads, array.nbytes // MIN_SLICE_BYTES))
    line = _CACHE_LINE // array.itemsize
    into_line = (array.ctypes.data % _CACHE_LINE) // array.itemsize if count > 1 else 0
    cuts = [
        round((array.size * index / count + into_line) / line) * line - into_line
        for index in range(1, count)
    ]
    return list(zip([0, *cuts], [*cuts, array.size], strict=True))


def _make_pool() -> None:
    global _pool
    _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="hogstream-kernel")


_make_pool()  # it starts a thread when there is work for one, and not before
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_make_pool)  # which inherits the pool, but no threads
