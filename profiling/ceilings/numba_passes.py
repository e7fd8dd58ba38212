"""What memory can do, as Numba kernels: copies, and the traffic of updates without arithmetic.

Updates are of all elements, or of some rows of a table.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hogstream.kernels.backends.numba_atomics import atomic_load, prefetch
from hogstream.kernels.backends.numba_compile import cfunc, njit, part
from hogstream.kernels.backends.numba_pieces import (
    ARGUMENT,
    COLUMNS,
    Kernel,
    in_update,
    run_alone,
    run_in_pieces,
    take_piece,
)
from hogstream.kernels.launch_table import ELEMENTS, LaunchTable
from hogstream.kernels.rows import RowUpdate

Floats = npt.NDArray[np.float32]

_LINE = 16  # elements: one cache line of each array, as the update's own kernel goes
_AHEAD_BYTES = 1024
# What a job of rows is, as int64 in memory: addresses, and how many rows of how many elements.
_PARAM, _GRAD, _MS, _ROWS, _ORDER, _POSITIONS, _WIDTH = range(7)
# How much of a row is asked for, as the update's own kernel does: the processor finds the rest.
_ASKED_ELEMENTS = 4 * _LINE

_memcpy: Any = types.ExternalFunction("memcpy", types.int64(types.int64, types.int64, types.int64))


def update_shaped(table: LaunchTable, ahead: bool) -> None:
    """Reads three float32 arrays and writes two of them in place, going as the update goes.

    Args:
        table: Of one update.
        ahead: Whether to prefetch what follows: processors differ in what is faster.
    """
    run_in_pieces(_update_shaped(), table, int(ahead))


def update_shaped_rows(update: RowUpdate, ahead: int, *, alone: bool) -> None:
    """The same for the rows of a float32 table that an update touches, in its order.

    Args:
        update: On the CPU, of float32 throughout; no row is there twice.
        ahead: A row is prefetched when so many are to come before it; 0 for never.
        alone: Whether it runs on this thread, or on all that the update is worth.
    """
    run = run_alone if alone else run_in_pieces
    run(_update_shaped_rows(), _Rows.of(update), ahead)


class _Rows(NamedTuple):
    """Rows of a table as ``numba_pieces`` takes them, which keeps what it points to.

    Attributes:
        columns: The fields: int64.
        elements: How many the gradients have.
        dtype: Of the table.
        kept: What has the memory.
        updates: It is one.
    """

    columns: npt.NDArray[np.int64]
    elements: int
    dtype: torch.dtype
    kept: RowUpdate
    updates: int = 1

    @classmethod
    def of(cls, update: RowUpdate) -> _Rows:
        given = update.operands
        tensors = given.param, given.grads, given.ms, update.rows, update.order
        fields = [*(each.data_ptr() for each in tensors), len(update.rows), update.width]
        return cls(np.array(fields, np.int64), update.elements, given.param.dtype, update)


def update_shaped_passes(buffer: Floats, passes: int, ahead: bool = False) -> None:
    """The same over the thirds of a buffer, again and again on this thread, without the GIL.

    Args:
        buffer: float32, shape (3 n,): ``param``, ``grad`` and ``ms``. The middle is added to both
            others, once a pass.
        passes: How many.
        ahead: Whether to prefetch what follows.
    """
    _update_shaped_passes(buffer.ctypes.data, len(buffer) // 3, passes, ahead)


def copy_passes(buffer: Floats, passes: int) -> None:
    """Copies one half of a buffer to the other, again and again on this thread, without the GIL.

    Args:
        buffer: float32, shape (2 n,); the second half is copied.
        passes: How often.
    """
    _copy_passes(buffer.ctypes.data, buffer.nbytes // 2, passes)


@cache
def _update_shaped() -> Kernel:
    """Takes pieces of a job of ``numba_pieces``, whose argument is whether to prefetch."""

    @cfunc(types.void(types.int64))
    def update_shaped(job: int) -> None:
        columns, ahead = atomic_load(job + 8 * COLUMNS), atomic_load(job + 8 * ARGUMENT) != 0
        param, grad, ms = atomic_load(columns), atomic_load(columns + 8), atomic_load(columns + 16)
        elements = atomic_load(columns + 8 * ELEMENTS)  # one update: a column has one number
        share, start, stop = take_piece(job)
        while start < stop:
            begin, end, _ = in_update(job, share, start, stop, elements)
            _add(param + 4 * begin, grad + 4 * begin, ms + 4 * begin, end - begin, ahead)
            share, start, stop = take_piece(job)

    return Kernel.of(update_shaped)


@cache
def _update_shaped_rows() -> Kernel:
    """The same of rows, whose argument is how far ahead to prefetch."""

    @cfunc(types.void(types.int64))
    def update_shaped_rows(job: int) -> None:
        fields, ahead = atomic_load(job + 8 * COLUMNS), atomic_load(job + 8 * ARGUMENT)
        width = atomic_load(fields + 8 * _WIDTH)
        elements = atomic_load(fields + 8 * _POSITIONS) * width
        share, start, stop = take_piece(job)
        while start < stop:
            begin, end, _ = in_update(job, share, start, stop, elements)
            for position in range(-(-begin // width), -(-end // width)):
                if ahead > 0:
                    _ask_for_row(fields, position + ahead)
                param, grad, ms = _row_at(fields, position)
                _add(param, grad, ms, width, False)
            share, start, stop = take_piece(job)

    return Kernel.of(update_shaped_rows)


@part
def _row_at(fields: int, position: int) -> tuple[int, int, int]:
    """Where the row at a position, its gradient and its ``ms`` are."""
    row_bytes = 4 * atomic_load(fields + 8 * _WIDTH)
    of_row = row_bytes * atomic_load(atomic_load(fields + 8 * _ROWS) + 8 * position)
    of_grad = row_bytes * atomic_load(atomic_load(fields + 8 * _ORDER) + 8 * position)
    return (
        atomic_load(fields + 8 * _PARAM) + of_row,
        atomic_load(fields + 8 * _GRAD) + of_grad,
        atomic_load(fields + 8 * _MS) + of_row,
    )


@part
def _ask_for_row(fields: int, position: int) -> None:
    """Prefetches a row, its gradient and its ``ms``, if there is one at that position."""
    if position >= atomic_load(fields + 8 * _POSITIONS):
        return
    param, grad, ms = _row_at(fields, position)
    for element in range(0, min(atomic_load(fields + 8 * _WIDTH), _ASKED_ELEMENTS), _LINE):
        prefetch(param + 4 * element)
        prefetch(grad + 4 * element)
        prefetch(ms + 4 * element)


@njit
def _update_shaped_passes(
    param: int,  # address, where grad and ms follow: float32, (3 * elements,)
    elements: int,
    passes: int,
    ahead: bool,  # whether to prefetch what follows
) -> None:
    for _ in range(passes):
        _add(param, param + 4 * elements, param + 8 * elements, elements, ahead)


@njit
def _copy_passes(
    target: int,  # address, where the source follows
    size: int,  # bytes of each
    passes: int,
) -> None:
    for _ in range(passes):
        _memcpy(target, target + size, size)


@njit
def _add(
    param: int,  # address: float32, (elements,)
    grad: int,  # the same
    ms: int,  # the same
    elements: int,
    ahead: bool,  # whether to prefetch what follows
) -> None:
    """Adds so many elements at ``grad`` to those at ``param`` and at ``ms``."""
    for _ in range(elements // _LINE):
        if ahead:
            prefetch(param + _AHEAD_BYTES)
            prefetch(grad + _AHEAD_BYTES)
            prefetch(ms + _AHEAD_BYTES)
        _add_vector(param, grad, ms, _LINE)
        param += 4 * _LINE
        grad += 4 * _LINE
        ms += 4 * _LINE
    for _ in range(elements % _LINE):
        _add_vector(param, grad, ms, 1)
        param += 4
        grad += 4
        ms += 4


def _add_vector_intrinsic(
    _context: Any,
    param: types.Type,  # address: int64
    grad: types.Type,  # the same
    ms: types.Type,  # the same
    elements: Any,  # how many there are: literal
) -> Any:
    """Adds a few elements at once."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        vector = ir.VectorType(ir.FloatType(), elements.literal_value).as_pointer()
        p, g, m = (builder.inttoptr(address, vector) for address in args[:3])
        added = builder.load(g, align=4)
        for target in (m, p):
            builder.store(builder.fadd(builder.load(target, align=4), added), target, align=4)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    return types.void(param, grad, ms, elements), emit


_add_vector: Any = intrinsic(prefer_literal=True)(_add_vector_intrinsic)
