"""Calls of the CUDA driver by compiled code: any function, and launches of kernels.

This module needs Numba. ``cuda_driver`` says in which order the driver's functions are.
"""

from __future__ import annotations

from typing import Any

from hogstream.kernels.backends.numba_atomics import atomic_load, atomic_store, call
from hogstream.kernels.backends.numba_compile import njit
from hogstream.scheduler.lanes.cuda_driver import COPY_TO_HOST, LAUNCH_KERNEL, SET_MEMORY
from hogstream.scheduler.lanes.rings import (
    ARGUMENT_ADDRESSES,
    ARGUMENTS,
    DRIVER,
    STREAM,
    VERDICT,
    WORD,
)

#: A kernel of the update, and the one that looks whether gradients are finite, or 0: the driver's
#: handle, the threads of a program, its shared memory in bytes; and the elements of a program of
#: either, or of the second. Of an update of rows besides, the kernel that looks whether they are in
#: the table, and of a program of the update how many positions it takes, and its UNIT. Of a copy of
#: rows, only its kernel and those.
FUNCTION, THREADS, SHARED, FINITE_FUNCTION, FINITE_THREADS, FINITE_SHARED, PROGRAM = range(7)
RANGE_FUNCTION, RANGE_THREADS, RANGE_SHARED, TILE, UNIT = range(7, 12)
KERNEL = 12

#: Of the word of a verdict, what is the verdict. The kernel of rows has its own say in the other
#: half: whether those of its table are there, which is known by then.
VERDICT_BITS = 0xFFFF_FFFF


@njit
def driver(settings: int, function: int, arguments: Any) -> Any:
    """Calls a function of the driver; 0 or its error."""
    table = atomic_load(settings + WORD * DRIVER)
    return call(atomic_load(table + WORD * function), arguments) & 0xFFFF_FFFF


@njit
def launch_kernel(
    kernel: int, which: int, programs: int, lane: int, thread: int, settings: int
) -> Any:
    """Launches a kernel on a lane's stream with the arguments that are set; 0 or an error.

    Args:
        kernel: The address of a ``KERNEL``.
        which: Of its functions, as the first of its words.
        programs: How many; of 0, nothing is launched.
        lane: The lane.
        thread: Of the lane, which has the arguments.
        settings: Of the lanes.
    """
    if programs == 0:
        return 0
    function = atomic_load(kernel + WORD * which)
    threads = atomic_load(kernel + WORD * (which + THREADS))
    shared = atomic_load(kernel + WORD * (which + SHARED))
    stream = atomic_load(lane + WORD * STREAM)
    arguments = thread + WORD * ARGUMENT_ADDRESSES
    return driver(
        settings,
        LAUNCH_KERNEL,
        (function, programs, 1, 1, threads, 1, 1, shared, stream, arguments, 0),
    )


@njit
def set_argument(thread: int, place: int, value: int) -> None:
    """Sets an argument of the launch to come."""
    atomic_store(thread + WORD * (ARGUMENTS + place), value)


@njit
def set_scratch(thread: int, place: int) -> None:
    """Sets what every kernel of Triton's takes last: where its scratch is, of which it has none."""
    set_argument(thread, place, 0)
    set_argument(thread, place + 1, 0)


@njit
def clear_verdict(lane: int, settings: int) -> Any:
    """Has a lane's stream set its verdict to 0; 0 or an error."""
    stream, verdict = atomic_load(lane + WORD * STREAM), atomic_load(lane + WORD * VERDICT)
    return driver(settings, SET_MEMORY, (verdict, 0, 2, stream))


@njit
def fetch_verdict(lane: int, found: int, settings: int) -> Any:
    """Has a lane's stream copy its verdict to where the host finds it; 0 or an error."""
    stream, verdict = atomic_load(lane + WORD * STREAM), atomic_load(lane + WORD * VERDICT)
    return driver(settings, COPY_TO_HOST, (found, verdict, WORD, stream))
