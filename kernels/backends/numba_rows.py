"""The update of rows in Numba: one pass over what is touched, without the GIL.

This module needs Numba; ``select`` imports it when it is first asked for.
"""

from __future__ import annotations

import ctypes
from functools import cache
from operator import truediv
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numba import types

from hogstream.kernels.backends.numba_atomics import (
    atomic_exchange,
    atomic_load,
    call,
    float_load,
    plain_store,
    prefetch,
)
from hogstream.kernels.backends.numba_compile import cfunc, part
from hogstream.kernels.backends.numba_kernels import begin_block, end_block
from hogstream.kernels.backends.numba_pieces import (
    ARGUMENT,
    COLUMNS,
    Kernel,
    in_update,
    run_alone,
    run_in_pieces,
    take_piece,
)
from hogstream.kernels.backends.numba_row_formula import squares, update_row
from hogstream.kernels.backends.numba_vectors import (
    CACHE_LINE,
    FORMATS,
    computed_at,
    factors_at,
    set_computed,
)
from hogstream.kernels.formula import formula_over
from hogstream.kernels.hyperparameters import Factors, Hyperparameters
from hogstream.kernels.launch_table import GRAD, MS, PARAM
from hogstream.kernels.operands import DTYPE_NAMES
from hogstream.kernels.race_counters import RaceCounters
from hogstream.kernels.row_table import (
    BEFORE,
    BLOCK,
    BLOCKS,
    CODE,
    COUNTS,
    FACTORS,
    KEY,
    LAST_UPDATE,
    LOCK_BLOCK,
    LOCKS,
    NUMBER,
    ORDER,
    POSITIONS,
    READ_VERSION,
    ROW_VERSIONS,
    ROWS,
    SLOTS,
    STALE,
    STRIPES,
    UPDATED,
    VERSIONS,
    WIDTH,
    fields_of,
)
from hogstream.kernels.rows import RowUpdate

# Rows are asked for when the kernel is at the one so many positions before: 4 to 16 do as well.
_POSITIONS_AHEAD = 8
# How much of a row is asked for: the processor finds the rest.
_ASKED_BYTES = 4 * CACHE_LINE
# Where alpha is in the factors, in bytes.
_ALPHA = 8 * Factors._fields.index("alpha")

_lock: Any = types.ExternalFunction("pthread_mutex_lock", types.int32(types.int64))
_copy_bytes: Any = types.ExternalFunction(
    "memcpy", types.int64(types.int64, types.int64, types.int64)
)
_unlock: Any = types.ExternalFunction("pthread_mutex_unlock", types.int32(types.int64))


class Kinds(NamedTuple):
    """What the code of an update of rows depends on.

    Attributes:
        dtype: Name of the parameter's.
        grad_dtype: Name of the gradients'.
        switches: ``Switches.bits``.
        rowwise: Whether there is one ``ms`` for each row.
        lazy: Whether there is ``last_update``.
    """

    dtype: str
    grad_dtype: str
    switches: int
    rowwise: bool
    lazy: bool


def update_(
    update: RowUpdate,
    hyperparameters: Hyperparameters,
    key: int = 0,
    counters: RaceCounters | None = None,
) -> None:
    """Updates rows of a table in place, in one pass, on the calling thread.

    Args:
        update: Of tensors on the CPU.
        hyperparameters: The numbers and switches of the update.
        key: Of the step, from ``key_of_step``, for stochastic rounding.
        counters: To count the update with: for the rows of the table, in blocks of any number.

    Raises:
        ValueError: If counters are not for the table's rows.
    """
    if counters is not None and counters.elements != len(update.operands.param):
        raise ValueError(
            f"counters must be for {len(update.operands.param)} rows, got {counters.elements}"
        )
    span = _Span.of(update, hyperparameters, key, counters)
    if span.elements:
        run_alone(_kernel(), span, update_function(span.kinds).address)


def update_in_pieces_(update: RowUpdate, hyperparameters: Hyperparameters, key: int = 0) -> None:
    """The same on all threads that the update is worth.

    Args:
        update: Of tensors on the CPU.
        hyperparameters: The numbers and switches of the update.
        key: Of the step, from ``key_of_step``, for stochastic rounding.
    """
    span = _Span.of(update, hyperparameters, key, None)
    if span.elements:
        run_in_pieces(_kernel(), span, update_function(span.kinds).address)


class _Span(NamedTuple):
    """An update of rows as ``numba_pieces`` takes it, which keeps what it points to.

    Attributes:
        columns: The fields: int64.
        elements: How many the gradients have.
        dtype: Of the parameter.
        kinds: What its code depends on.
        kept: What has the memory.
        updates: It is one.
    """

    columns: npt.NDArray[np.int64]
    elements: int
    dtype: torch.dtype
    kinds: Kinds
    kept: Any
    updates: int = 1

    @classmethod
    def of(
        cls,
        update: RowUpdate,
        hyperparameters: Hyperparameters,
        key: int,
        counters: RaceCounters | None,
    ) -> _Span:
        given, factors = update.operands, hyperparameters.in_memory
        columns = np.array(fields_of(update), np.int64)
        columns[FACTORS], columns[KEY] = ctypes.addressof(factors), key - (key >> 63 << 64)
        if counters is not None:
            block = counters.block * update.width
            columns[COUNTS : BLOCK + 1] = counters.counts.data_ptr(), counters.blocks, block
        kinds = Kinds(
            DTYPE_NAMES[given.param.dtype],
            DTYPE_NAMES[given.grads.dtype],
            hyperparameters.switches.of_dtype(given.param.dtype).bits,
            update.is_rowwise,
            given.last_update is not None,
        )
        kept = update, factors, counters
        return cls(columns, update.elements, given.param.dtype, kinds, kept)


@cache
def _kernel() -> Kernel:
    """Takes pieces of a job of ``numba_pieces``, whose columns are the fields of an update.

    Its argument is the address of what ``update_function`` gives.
    """

    @cfunc(types.void(types.int64))
    def kernel(job: int) -> None:
        fields, update = atomic_load(job + 8 * COLUMNS), atomic_load(job + 8 * ARGUMENT)
        width = atomic_load(fields + 8 * WIDTH)
        elements = atomic_load(fields + 8 * POSITIONS) * width
        share, start, stop = take_piece(job)
        while start < stop:
            begin, end, _ = in_update(job, share, start, stop, elements)
            # A position belongs to the piece in which its first element is.
            call(update, (fields, -(-begin // width), -(-end // width)))
            share, start, stop = take_piece(job)

    return Kernel.of(kernel)


@cache
def update_function(kinds: Kinds) -> Any:
    """An update of rows as other compiled code calls it, with race counters or without.

    Returns:
        ``update(fields, begin, end)``, a ``CFunc`` of Numba: all int64, and it returns 0.
        ``fields`` is the address of what the constants of this module say. It updates the rows
        whose first position is one of ``begin`` to ``end``.
    """
    dtype, grad_dtype, switches, rowwise, lazy = kinds
    stored_bytes, compute_bytes = FORMATS[dtype].stored_bytes, FORMATS[dtype].compute_bytes
    grad_bytes = FORMATS[grad_dtype].stored_bytes
    compute = np.float64 if dtype == "float64" else np.float32

    @cfunc(types.int64(types.int64, types.int64, types.int64))
    def update(fields: int, begin: int, end: int) -> int:
        factors = factors_at(_field(fields, FACTORS), dtype)
        width = compute(_field(fields, WIDTH))
        window, held = (-1, 0, 0), -1
        position = _first_of_row(fields, begin)
        while position < end:
            row, stop = _row_from(fields, position)
            _ask_ahead(fields, position, stored_bytes, grad_bytes, compute_bytes, rowwise)
            window = _leave_block(fields, row, window)
            held = _hold(fields, row, held)
            window = _enter_block(fields, row, window)
            left, ms = compute(1), compute(0)
            if lazy:
                left = compute(_left_of(fields, row))
            place = row, position, stop - position
            if rowwise:
                squared = squares(fields, place, factors, dtype, grad_dtype, switches)
                of_ms = _field(fields, MS) + row * compute_bytes
                ms = _row_mean_square(computed_at(of_ms, dtype) * left, squared, width, factors)
                set_computed(of_ms, ms)
            update_row(fields, place, factors, ms, left, dtype, grad_dtype, switches, rowwise, lazy)
            if lazy:
                plain_store(_field(fields, LAST_UPDATE) + 8 * row, _field(fields, NUMBER))
            _note_version(fields, row)
            position = stop
        _leave_block(fields, -1, window)
        _hold(fields, -1, held)
        return 0

    return update


@cache
def part_function() -> Any:
    """An update of rows as lanes call it: as a part of a dense one.

    Returns:
        A ``CFunc`` of Numba with the arguments of ``numba_kernels.update_function``, all int64; it
        returns 0. Where that takes the parameter's address, this takes that of the fields, whose
        ``CODE`` it calls, and writes there what only the lane knows: the factors, and the race
        counters.
    """

    @cfunc(types.int64(*[types.int64] * 11))
    def update_part(
        fields: int,
        _grad: int,
        _ms: int,
        _grad_avg: int,
        _buffer: int,
        _elements: int,
        factors: int,
        counts: int,
        blocks: int,
        block_elements: int,
        _flat: int,
    ) -> int:
        plain_store(fields + 8 * FACTORS, factors)
        plain_store(fields + 8 * COUNTS, counts)
        plain_store(fields + 8 * BLOCKS, blocks)
        plain_store(fields + 8 * BLOCK, block_elements)
        call(_field(fields, CODE), (fields, 0, _field(fields, POSITIONS)))
        return 0

    return update_part


@cache
def copy_function(dtype: str) -> Any:
    """A copy of rows of a table, each as an update of it would be locked.

    Args:
        dtype: Of the table: ``float16``, ``bfloat16``, ``float32`` or ``float64``.

    Returns:
        ``copy(fields)``, a ``CFunc`` of Numba: it takes the address of fields, whose ``GRAD`` says
        where copies go, one after the other, and returns 0.
    """
    stored_bytes = FORMATS[dtype].stored_bytes

    @cfunc(types.int64(types.int64))
    def copy(fields: int) -> int:
        size = _field(fields, WIDTH) * stored_bytes
        held = -1
        for position in range(_field(fields, POSITIONS)):
            row = _field(_field(fields, ROWS), position)
            held = _hold(fields, row, held)
            source = _field(fields, PARAM) + row * size
            _copy_bytes(_field(fields, GRAD) + position * size, source, size)
        _hold(fields, -1, held)
        return 0

    return copy


@part
def _field(fields: int, index: int) -> Any:
    return atomic_load(fields + 8 * index)


@part
def _first_of_row(fields: int, position: int) -> int:
    """The first position from one on at which a row begins."""
    rows, positions = _field(fields, ROWS), _field(fields, POSITIONS)
    while 0 < position < positions and _field(rows, position) == _field(rows, position - 1):
        position += 1
    return position


@part
def _row_from(fields: int, position: int) -> tuple[int, int]:
    """Which row begins at a position, and where the next one does."""
    rows, positions = _field(fields, ROWS), _field(fields, POSITIONS)
    row, stop = _field(rows, position), position + 1
    while stop < positions and _field(rows, stop) == row:
        stop += 1
    return row, stop


@part
def _leave_block(fields: int, row: int, window: tuple[int, int, int]) -> tuple[int, int, int]:
    """Counts an update of the block before, if a row is in another; before its mutex is released.

    Args:
        fields: Their address.
        row: What is updated next; -1 is in no block.
        window: The block of the row before, or -1, its version and its witness.

    Returns:
        The same, or that of no block.
    """
    block, version, witness = window
    if block < 0 or _block_of(fields, row, BLOCK) == block:
        return window
    end_block(_field(fields, COUNTS), _field(fields, BLOCKS), block, version, witness)
    return -1, 0, 0


@part
def _enter_block(fields: int, row: int, window: tuple[int, int, int]) -> tuple[int, int, int]:
    """Begins to count an update of a row's block, once its mutex is held, if races are counted.

    Args:
        fields: Their address.
        row: What is updated next.
        window: That of its block, or of none.

    Returns:
        That of its block, if races are counted.
    """
    counts = _field(fields, COUNTS)
    if counts == 0 or window[0] >= 0:
        return window
    block = _block_of(fields, row, BLOCK)
    version, witness = begin_block(counts, _field(fields, BLOCKS), block)
    return block, version, witness


@part
def _hold(fields: int, row: int, held: int) -> Any:
    """Holds the mutex of a row's block, and no other; of -1 none.

    Args:
        fields: Their address.
        row: What is updated next.
        held: Which is held, or -1.

    Returns:
        Which is held now.
    """
    locks = _field(fields, LOCKS)
    if locks == 0:
        return held
    block = _block_of(fields, row, LOCK_BLOCK)
    wanted = block if block < 0 else block % _field(fields, STRIPES)
    if wanted != held:
        if held >= 0:
            _unlock(locks + CACHE_LINE * held)
        if wanted >= 0:
            _lock(locks + CACHE_LINE * wanted)
    return wanted


@part
def _note_version(fields: int, row: int) -> None:
    """Notes that a row was changed, and whether another update has done so since this one's read.

    The version is looked up once the row is written. So whoever reads it still unwritten reads an
    older version, and finds the row stale when its own update comes; of two updates that meet in a
    row, whoever is second here finds the other.
    """
    versions_of_rows = _field(fields, ROW_VERSIONS)
    if versions_of_rows == 0:
        return
    version = 1
    for slot in range(_field(fields, SLOTS)):
        version += _field(_field(fields, VERSIONS), slot)
    before = atomic_exchange(versions_of_rows + 8 * row, version)
    stale = 1 if before > _field(fields, READ_VERSION) else 0
    plain_store(fields + 8 * UPDATED, _field(fields, UPDATED) + 1)
    plain_store(fields + 8 * STALE, _field(fields, STALE) + stale)


@part
def _block_of(fields: int, row: int, of: int) -> Any:
    """The block in which a row begins, of as many elements as a field says; -1 of none."""
    if row < 0:
        return -1
    return (_field(fields, BEFORE) + row * _field(fields, WIDTH)) // _field(fields, of)


@part
def _ask_ahead(
    fields: int,
    position: int,
    stored_bytes: int,
    grad_bytes: int,
    compute_bytes: int,
    rowwise: bool,
) -> None:
    """Asks for the memory of a row that comes later."""
    ahead = min(position + _POSITIONS_AHEAD, _field(fields, POSITIONS) - 1)
    row, width = _field(_field(fields, ROWS), ahead), _field(fields, WIDTH)
    _ask(_field(fields, PARAM) + row * width * stored_bytes, width * stored_bytes)
    of_grad = _field(_field(fields, ORDER), ahead)
    _ask(_field(fields, GRAD) + of_grad * width * grad_bytes, width * grad_bytes)
    if rowwise:
        width = 1
    _ask(_field(fields, MS) + row * width * compute_bytes, width * compute_bytes)


@part
def _ask(address: int, size: int) -> None:
    for line in range(0, min(size, _ASKED_BYTES), CACHE_LINE):
        prefetch(address + line)
    prefetch(address + size - 1)


@part
def _left_of(fields: int, row: int) -> Any:
    """What is left of a row's state after the updates that have passed it by."""
    number = _field(fields, NUMBER)
    passed = max(number - 1 - _field(_field(fields, LAST_UPDATE), row), 0)
    bits = 0
    while number >> bits:
        bits += 1
    return _decay(1.0, float_load(_field(fields, FACTORS) + _ALPHA), passed, bits)


@part
def _where(condition: bool, x: float, y: float) -> float:
    return x if condition else y


_of_scalars = formula_over(compiled=part, divide=truediv, where=_where)
_decay, _row_mean_square = _of_scalars.decay, _of_scalars.row_mean_square
