"""Threads for CPU kernels: a list of updates in slices of as many bytes, each on a thread of ours.

Numba's own threading layers are not used: OpenMP's kills a forked child, and the workqueue aborts
the process when two threads enter it at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from hogstream.kernels.launch_table import ELEMENTS, PARAM, LaunchTable

# Waking a thread costs about 0.1 ms; below this much of a parameter one thread is done sooner.
MIN_SLICE_BYTES = 4 << 20
_CACHE_LINE = 64

_pool: ThreadPoolExecutor


def run_in_slices(kernel: Callable[..., None], table: LaunchTable, *args: object) -> None:
    """Calls ``kernel(table, *args, start, stop)`` over slices of a table, at once; waits for all.

    At most ``torch.get_num_threads()`` threads work, the calling one among them.

    Args:
        kernel: Works on one slice, and releases the GIL. ``start`` and ``stop`` count elements from
            the first of the table's first update.
        table: Of updates on the CPU.
        args: Passed on to the kernel.
    """
    slices = slice_bounds(table, torch.get_num_threads())
    others = [_pool.submit(kernel, table, *args, *bounds) for bounds in slices[1:]]
    try:
        kernel(table, *args, *slices[0])
    finally:
        errors = [other.exception() for other in others]
    for error in errors:
        if error is not None:
            raise error


def slice_bounds(table: LaunchTable, threads: int) -> list[tuple[int, int]]:
    """Splits a table into at most ``threads`` ranges of about as many elements.

    A cut inside a parameter lies on a cache line of it, so that no two threads write the same line.

    Returns:
        ``(start, stop)`` element ranges, at least one, together covering ``[0, table.elements)``.
    """
    count = min(threads, table.elements * table.dtype.itemsize // MIN_SLICE_BYTES)
    if count <= 1:
        return [(0, table.elements)]
    cuts = [_cut_near(table, table.elements * index // count) for index in range(1, count)]
    return list(zip([0, *cuts], [*cuts, table.elements], strict=True))


def _cut_near(table: LaunchTable, position: int) -> int:
    ends = np.cumsum(table.columns[ELEMENTS])
    update = int(np.searchsorted(ends, position, side="right"))
    elements = int(table.columns[ELEMENTS, update])
    start = int(ends[update]) - elements
    line = _CACHE_LINE // table.dtype.itemsize
    into_line = int(table.columns[PARAM, update]) % _CACHE_LINE // table.dtype.itemsize
    inside = round((position - start + into_line) / line) * line - into_line
    return start + min(max(inside, 0), elements)


def _make_pool() -> None:
    global _pool
    _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="hogstream-kernel")


_make_pool()  # it starts a thread when there is work for one, and not before
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_make_pool)  # which inherits the pool, but no threads
