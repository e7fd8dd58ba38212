"""Compiled kernels that take a table piece by piece, on all threads that it is worth.

They run on torch's own OpenMP threads, and on the pool of ``cpu_threads`` where there are none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from numba import types

from hogstream.kernels.backends.cpu_threads import PIECE_ELEMENTS, call_on, pool_threads
from hogstream.kernels.backends.floating_point import ENVIRONMENT_BYTES, write_environment
from hogstream.kernels.backends.numba_atomics import atomic_add, atomic_load, call, local_bytes
from hogstream.kernels.backends.numba_compile import cfunc, njit
from hogstream.kernels.backends.openmp import torch_threads
from hogstream.kernels.launch_table import LaunchTable

# torch's threads are awake after a backward: they take as few elements as torch gives them.
MIN_ELEMENTS_PER_TORCH_THREAD = 1 << 15

# A job, as int64 in memory: how many elements have been taken, on a cache line of its own, the
# kernel's address, elements of a piece and of all updates, the address of the table's columns, how
# many it has, what the kernel takes besides, and the caller's floating-point mode.
_TAKEN, _KERNEL, _SIZE, _ELEMENTS, COLUMNS, UPDATES, ARGUMENT, _MODE = 0, *range(8, 15)
_Job = ctypes.c_int64 * (_MODE + ENVIRONMENT_BYTES // 8)


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


def run_alone(kernel: Kernel, table: LaunchTable, argument: int = 0) -> None:
    """Calls a kernel for all of a table on the calling thread.

    Args:
        kernel: Reads what is at ``COLUMNS``, ``UPDATES`` and ``ARGUMENT`` of its job.
        table: Of updates on the CPU.
        argument: A number or an address for the kernel.
    """
    job = _job(kernel, table, table.elements, argument)
    kernel.call(ctypes.addressof(job))


def run_in_pieces(kernel: Kernel, table: LaunchTable, argument: int = 0) -> None:
    """The same on all threads that the table is worth, in the caller's floating-point mode.

    At most ``torch.get_num_threads()`` threads work, the calling one among them.

    Args:
        kernel: As for ``run_alone``.
        table: Of updates on the CPU.
        argument: A number or an address for the kernel.
    """
    parallel = torch_threads()
    if parallel is None:
        threads = pool_threads(table)
    else:
        threads = min(torch.get_num_threads(), table.elements // MIN_ELEMENTS_PER_TORCH_THREAD)
    if threads <= 1:
        run_alone(kernel, table, argument)
        return
    size = min(-(-table.elements // threads), PIECE_ELEMENTS)
    job = _job(kernel, table, size, argument)
    address = ctypes.addressof(job)
    if parallel is None:
        call_on(threads, lambda: kernel.call(ctypes.addressof(job)))  # which lives as long as it
    else:
        write_environment(address + 8 * _MODE)
        # All of torch's threads: those that another number leaves over would end.
        parallel(_on_torch_thread().address, address, 0, 0)


def _job(kernel: Kernel, table: LaunchTable, size: int, argument: int) -> Any:
    # Not ``ctypes.data``, which runs Python: after a backward that comes from memory, slowly.
    columns = ctypes.addressof(ctypes.c_char.from_buffer(table.columns.data))
    size = max(size, 1)
    job = _Job()
    job[_KERNEL:_MODE] = [kernel.address, size, table.elements, columns, table.updates, argument]
    return job


@njit
def take_piece(job: int) -> tuple[int, int]:
    """Takes the next piece, as where it starts and stops; nothing is left if they are alike.

    Args:
        job: Its address.
    """
    elements, size = atomic_load(job + 8 * _ELEMENTS), atomic_load(job + 8 * _SIZE)
    start = min(atomic_add(job + 8 * _TAKEN, size), elements)
    return start, min(start + size, elements)


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
