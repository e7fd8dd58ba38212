"""What lanes ask of rows besides their update, in Triton: whether they are there, and copies.

As in ``triton_kernels``, addresses are int64, and no argument is specialised on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hogstream.kernels.backends.triton_locks import hold, lock_of, release
from hogstream.kernels.verdicts import OUTSIDE

_OUTSIDE = tl.constexpr(OUTSIDE)


@triton.jit(do_not_specialize=["rows", "positions", "table_rows", "verdict"])
def row_range_kernel(
    rows: tl.int64,  # address of rows, in ascending order: int64, (positions,)
    positions: tl.int64,  # how many there are, at least one
    table_rows: tl.int64,  # how many the table has
    verdict: tl.int64,  # address of what becomes OUTSIDE if one is not in it: int32, (1,)
):
    """Sets the verdict if a row is not in the table; in one program."""
    rows_ptr = rows.to(tl.int64).to(tl.pointer_type(tl.int64))
    first, last = tl.load(rows_ptr), tl.load(rows_ptr + positions - 1)
    verdict_ptr = verdict.to(tl.int64).to(tl.pointer_type(tl.int32))
    tl.store(verdict_ptr, _OUTSIDE, (first < 0) | (last >= table_rows))


@triton.jit(
    do_not_specialize=[
        *("table", "copies", "rows", "positions", "table_rows", "units", "verdict"),
        *("locks", "first_lock", "stripes"),
    ],
)
def row_copy_kernel(
    table: tl.int64,  # address of a table, whose elements are as large as BITS: (table_rows, width)
    copies: tl.int64,  # address of where copies go: the same, (positions, width)
    rows: tl.int64,  # address of which rows: int64, (positions,)
    positions: tl.int64,  # how many there are
    table_rows: tl.int64,  # how many the table has
    units: tl.int64,  # how many times UNIT elements a row has
    verdict: tl.int64,  # address of what becomes OUTSIDE if a row is not in the table: int32, (1,)
    locks: tl.int64,  # this and two that follow as in ``row_rmsprop_kernel``
    first_lock: tl.int64,
    stripes: tl.int64,
    BITS: tl.constexpr,  # dtype: an integer of the size of an element
    LOCKED: tl.constexpr,  # bool: whether to hold a row's lock around its copy; then ROWS is 1
    ROWS: tl.constexpr,  # positions of a tile: a power of 2
    COLUMNS: tl.constexpr,  # its columns: a power of 2
    UNIT: tl.constexpr,  # as in ``row_rmsprop_kernel``
):
    """Copies the rows of one tile, but those that are not in the table."""
    position = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = position < positions
    row = tl.load(rows.to(tl.int64).to(tl.pointer_type(tl.int64)) + position, inside, 0)
    outside = (row < 0) | (row >= table_rows)
    verdict_ptr = verdict.to(tl.int64).to(tl.pointer_type(tl.int32))
    tl.store(verdict_ptr, _OUTSIDE, tl.max(outside.to(tl.int32), 0) != 0)
    inside = inside & ~outside
    table_ptr = table.to(tl.int64).to(tl.pointer_type(BITS))
    copies_ptr = copies.to(tl.int64).to(tl.pointer_type(BITS))
    if UNIT > 1:
        table_ptr, copies_ptr = tl.multiple_of(table_ptr, 16), tl.multiple_of(copies_ptr, 16)
    width = units.to(tl.int64) * UNIT
    if LOCKED:
        if tl.max(inside.to(tl.int32), 0) == 0:
            return
        lock_ptr = lock_of(tl.max(row, 0), locks, first_lock, stripes)
        hold(lock_ptr)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < width)[None, :]
        values = tl.load(table_ptr + row[:, None] * width + column[None, :], mask)
        tl.store(copies_ptr + position[:, None] * width + column[None, :], values, mask)
    if LOCKED:
        release(lock_ptr)
