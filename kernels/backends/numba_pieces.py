"""Compiled kernels that take a table piece by piece, on all threads that it is worth.

They run on torch's own OpenMP threads, and on the pool of ``cpu_threads`` where there are none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from numba import types

from hogstream.kernels.backends.cpu_threads import PIECE_ELEMENTS, Sized, call_on, pool_threads
from hogstream.kernels.backends.floating_point import ENVIRONMENT_BYTES, write_environment
from hogstream.kernels.backends.numba_atomics import atomic_add, atomic_load, call, local_bytes
from hogstream.kernels.backends.numba_compile import cfunc, part
from hogstream.kernels.backends.numba_vectors import CACHE_LINE
from hogstream.kernels.backends.openmp import torch_threads

# torch's threads are awake after a backward: they take as few elements as torch gives them.
MIN_ELEMENTS_PER_TORCH_THREAD = 1 << 15

# A job, as int64 in memory: the kernel's address, the address of the table's columns, how many it
# has, what the kernel takes besides, elements of a share and of a piece, how many shares there are,
# the address of what gives a thread's number, the caller's floating-point mode, and how many
# elements of each share have been taken: a line for each, away from what all threads read.
_KERNEL, COLUMNS, UPDATES, ARGUMENT, _SHARE, _SIZE, _SHARES, _NUMBER, _MODE = range(9)
_LINE = CACHE_LINE // 8
# Parts of updates are multiples of so many elements, a cache line of float32: so few lines are
# written by two threads.
_PART = 16
_TAKEN = _MODE + ENVIRONMENT_BYTES // 8 + _LINE


class Kernel(NamedTuple):
    """Compiled code that takes the address of a job, and takes pieces of it by ``take_piece``.

    Attributes:
        address: Of the code.
        call: Runs it, without the GIL.
        compiled: What has its memory: a ``CFunc`` of Numba.
    """

    address: int
    call: Callable[[int], object]
    compiled: Any

    @classmethod
    def of(cls, compiled: Any) -> Kernel:
        """That of a ``CFunc`` of Numba."""
        return cls(compiled.address, compiled.ctypes, compiled)


class Columns(Sized, Protocol):
    """What a kernel takes pieces of: a launch table, or whatever else is said in columns."""

    @property
    def columns(self) -> npt.NDArray[np.int64]:
        """int64, contiguous."""

    @property
    def updates(self) -> int:
        """How many updates it is of."""


def run_alone(kernel: Kernel, table: Columns, argument: int = 0) -> None:
    """Calls a kernel for all of a table on the calling thread.

    Args:
        kernel: Reads what is at ``COLUMNS``, ``UPDATES`` and ``ARGUMENT`` of its job.
        table: Of updates on the CPU.
        argument: A number or an address for the kernel.
    """
    job = _job(kernel, table, argument)
    kernel.call(ctypes.addressof(job))


def run_in_pieces(kernel: Kernel, table: Columns, argument: int = 0) -> None:
    """The same on all threads that the table is worth, in the caller's floating-point mode.

    At most ``torch.get_num_threads()`` threads work, the calling one among them. Those of torch
    have a share each: the part of each update that torch's own operators give them, if those split
    it, which they do from 2^15 elements a thread on. It is the same at each step, and in their
    core's cache.

    Args:
        kernel: As for ``run_alone``.
        table: Of updates on the CPU.
        argument: A number or an address for the kernel.
    """
    team = torch_threads()
    if team is None:
        threads = pool_threads(table)
    else:
        threads = min(torch.get_num_threads(), table.elements // MIN_ELEMENTS_PER_TORCH_THREAD)
    if threads <= 1:
        run_alone(kernel, table, argument)
        return
    if team is None:
        job = _job(kernel, table, argument, threads)
        call_on(threads, lambda: kernel.call(ctypes.addressof(job)))  # which lives as long as it
    else:
        job = _job(kernel, table, argument, threads, threads, team.number)
        address = ctypes.addressof(job)
        write_environment(address + 8 * _MODE)
        # All of torch's threads: those that another number leaves over would end.
        team.parallel(_on_torch_thread().address, address, 0, 0)


def _job(
    kernel: Kernel,
    table: Columns,
    argument: int,
    threads: int = 1,
    shares: int = 1,
    number: int = 0,
) -> Any:
    # Not ``ctypes.data``, which runs Python: after a backward that comes from memory, slowly.
    columns = ctypes.addressof(ctypes.c_char.from_buffer(table.columns.data))
    # Room for the parts of all updates, each of which is rounded up.
    share = -(-table.elements // shares) + table.updates * _PART
    size = share if threads == 1 else min(-(-table.elements // threads), PIECE_ELEMENTS)
    job = _job_class(shares)()
    job[:_MODE] = [
        *(kernel.address, columns, table.updates, argument),
        *(share, size, shares, number),
    ]
    return job


@cache
def _job_class(shares: int) -> Any:
    """Memory of a job; kept, as a class takes long to make."""
    return ctypes.c_int64 * (_TAKEN + shares * _LINE)


@part
def take_piece(job: int) -> tuple[int, int, int]:
    """Takes the next piece, as a share and where in it the piece starts and stops.

    A thread takes of its own share first, then of those of others that are late. Nothing is left
    if start and stop are alike.

    Args:
        job: Its address.
    """
    size, length = atomic_load(job + 8 * _SIZE), atomic_load(job + 8 * _SHARE)
    shares, own = atomic_load(job + 8 * _SHARES), 0
    if shares > 1:
        own = call(atomic_load(job + 8 * _NUMBER), ()) & 0xFFFF_FFFF  # an int32
        if own >= shares:  # the table is not worth this thread
            return 0, 0, 0
    for turn in range(shares):
        share = (own + turn) % shares
        taken = job + 8 * (_TAKEN + share * _LINE)
        # Written only where something is left: a line that is written moves between cores.
        if atomic_load(taken) < length:
            start = atomic_add(taken, size)
            if start < length:
                return share, start, min(start + size, length)
    return 0, 0, 0


@part
def in_update(job: int, share: int, start: int, stop: int, elements: int) -> tuple[int, int, int]:
    """Where a piece begins and ends in an update, and how many elements each share has of it.

    A share has a part of each update, so that each core has the part that torch gives it. Where
    nothing of the piece is in the update, it ends where it begins.

    Args:
        job: Its address.
        share: As ``take_piece`` gave it.
        start: The same, counted from where the update begins in the share.
        stop: The same.
        elements: Of the update.
    """
    width = atomic_load(job + 8 * _SHARES) * _PART
    length = -(-elements // width) * _PART
    begin = share * length + max(start, 0)
    end = min(share * length + min(stop, length), elements)
    return begin, max(begin, end), length


_fegetenv: Any = types.ExternalFunction("fegetenv", types.int32(types.int64))
_fesetenv: Any = types.ExternalFunction("fesetenv", types.int32(types.int64))


@cache
def _on_torch_thread() -> Kernel:
    """What each of torch's threads calls: a job's kernel, in the mode of the job's caller.

    The threads are torch's: they get their own mode back.
    """

    @cfunc(types.void(types.int64))
    def on_torch_thread(job: int) -> None:
        own = local_bytes(ENVIRONMENT_BYTES)
        _fegetenv(own)
        _fesetenv(job + 8 * _MODE)
        call(atomic_load(job + 8 * _KERNEL), (job,))
        _fesetenv(own)

    return Kernel.of(on_torch_thread)
