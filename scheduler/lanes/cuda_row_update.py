"""What the loop of CUDA lanes launches for an update of rows of tables, and for a copy of rows.

An update changes nothing, in no table, if one of its rows is not in its own: the kernels that look
come before those that update, and the verdict is theirs.

This module needs Numba.
"""

from __future__ import annotations

from typing import Any

from hogstream.kernels.backends.numba_atomics import atomic_load
from hogstream.kernels.backends.numba_compile import njit
from hogstream.kernels.launch_table import GRAD, PARAM
from hogstream.kernels.row_table import (
    BEFORE,
    CODE,
    COUNTS,
    LOCKS,
    ORDER,
    POSITIONS,
    ROWS,
    STRIPES,
    TABLE_ROWS,
    WIDTH,
)
from hogstream.scheduler.lanes.cuda_calls import (
    FINITE_FUNCTION,
    FUNCTION,
    RANGE_FUNCTION,
    TILE,
    UNIT,
    clear_verdict,
    fetch_verdict,
    launch_kernel,
    set_argument,
    set_scratch,
)
from hogstream.scheduler.lanes.cuda_dense_update import check_finite, set_factors
from hogstream.scheduler.lanes.rings import COPIER, PARTS, SOURCE, VERDICT, WORD, of_part

# Where in the word of a verdict its other half is.
_SPARE = WORD // 2


@njit
def update_rows(lane: int, row: int, found: int, thread: int, settings: int) -> Any:
    """Launches an update of rows, table by table, if all of it may be; 0 or an error."""
    parts = atomic_load(row + WORD * PARTS)
    error = clear_verdict(lane, settings)
    for part in range(parts):
        if error == 0:
            error = check_gradient(lane, row, part, thread, settings)
    for part in range(parts):  # last: their verdict stays if both have something to say
        if error == 0:
            error = check_range(lane, row, part, thread, settings)
    for part in range(parts):
        fields = of_part(row, PARAM, part)
        if error == 0 and _field(fields, POSITIONS):
            set_update_arguments(lane, row, fields, thread, settings)
            programs = programs_of(fields)
            kernel = _field(fields, CODE)
            error = launch_kernel(kernel, FUNCTION, programs, lane, thread, settings)
    return error if error != 0 else fetch_verdict(lane, found, settings)


@njit
def check_gradient(lane: int, row: int, part: int, thread: int, settings: int) -> Any:
    """Launches what looks at the gradient of a table, if anything has to; 0 or an error."""
    kernel = _field(of_part(row, PARAM, part), CODE)
    if atomic_load(kernel + WORD * FINITE_FUNCTION) == 0:
        return 0
    return check_finite(kernel, lane, row, part, thread, settings)


@njit
def check_range(lane: int, row: int, part: int, thread: int, settings: int) -> Any:
    """Launches what looks whether rows are in their table; 0 or an error."""
    fields = of_part(row, PARAM, part)
    if _field(fields, POSITIONS) == 0:
        return 0
    kernel = _field(fields, CODE)
    set_argument(thread, 0, _field(fields, ROWS))
    set_argument(thread, 1, _field(fields, POSITIONS))
    set_argument(thread, 2, _field(fields, TABLE_ROWS))
    set_argument(thread, 3, atomic_load(lane + WORD * VERDICT))
    set_scratch(thread, 4)
    return launch_kernel(kernel, RANGE_FUNCTION, 1, lane, thread, settings)


@njit
def set_update_arguments(lane: int, row: int, fields: int, thread: int, settings: int) -> None:
    """What ``row_rmsprop_kernel`` takes."""
    for place in range(ORDER + 1):  # addresses, in the order of the kernel
        set_argument(thread, place, _field(fields, place))
    place = ORDER + 1
    set_argument(thread, place, _field(fields, POSITIONS))
    set_argument(thread, place + 1, _field(fields, TABLE_ROWS))
    set_argument(thread, place + 2, units_of(fields))
    for unused in range(place + 3, place + 5):  # the number of the update, and its bits
        set_argument(thread, unused, 0)
    place = set_factors(row, place + 5, thread, settings)
    verdict = atomic_load(lane + WORD * VERDICT)
    set_argument(thread, place, verdict)
    set_argument(thread, place + 1, verdict + _SPARE)
    set_argument(thread, place + 2, _field(fields, COUNTS))
    set_locks(fields, place + 3, thread)


@njit
def set_locks(fields: int, place: int, thread: int) -> None:
    """The last arguments of both kernels: which locks there are, if any, and no scratch."""
    set_argument(thread, place, _field(fields, LOCKS))
    set_argument(thread, place + 1, _field(fields, BEFORE))
    set_argument(thread, place + 2, _field(fields, STRIPES))
    set_scratch(thread, place + 3)


@njit
def copy_rows(lane: int, row: int, found: int, thread: int, settings: int) -> Any:
    """Launches a copy of rows of a table; 0 or an error."""
    fields, kernel = atomic_load(row + WORD * SOURCE), atomic_load(row + WORD * COPIER)
    error = clear_verdict(lane, settings)
    if error != 0:
        return error
    set_argument(thread, 0, _field(fields, PARAM))
    set_argument(thread, 1, _field(fields, GRAD))
    set_argument(thread, 2, _field(fields, ROWS))
    set_argument(thread, 3, _field(fields, POSITIONS))
    set_argument(thread, 4, _field(fields, TABLE_ROWS))
    set_argument(thread, 5, units_of(fields))
    set_argument(thread, 6, atomic_load(lane + WORD * VERDICT))
    set_locks(fields, 7, thread)
    error = launch_kernel(kernel, FUNCTION, programs_of(fields), lane, thread, settings)
    return error if error != 0 else fetch_verdict(lane, found, settings)


@njit
def programs_of(fields: int) -> Any:
    """How many programs take the positions of a table's rows."""
    tile = atomic_load(_field(fields, CODE) + WORD * TILE)
    return (_field(fields, POSITIONS) + tile - 1) // tile


@njit
def units_of(fields: int) -> Any:
    """How many times UNIT elements a row has."""
    return _field(fields, WIDTH) // atomic_load(_field(fields, CODE) + WORD * UNIT)


@njit
def _field(fields: int, index: int) -> Any:
    return atomic_load(fields + WORD * index)
