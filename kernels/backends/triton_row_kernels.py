"""The update of some rows of a table in Triton: one fused kernel, compiled or interpreted.

``triton_rows`` launches it. A program takes a tile: some of the positions of the sorted rows, by
COLUMNS columns at a time. The first position of each row is its head, which updates the row; the
gradients of the positions behind it are added to its own. The other positions of a tile are idle:
to leave them out, the host would have to wait for their number.

As in ``triton_kernels``, addresses and factors are int64, and no argument is specialised on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hogstream.kernels.backends.triton_locks import hold, lock_of, release
from hogstream.kernels.backends.triton_pieces import (
    FACTORS,
    as_factors,
    as_stored,
    formula,
    is_nonzero,
    round_factors,
    widened,
)
from hogstream.kernels.formula import LANES
from hogstream.kernels.race_counters import LANDED, OVERWRITTEN, SURVIVED

_LANDED, _SURVIVED, _OVERWRITTEN = map(tl.constexpr, (LANDED, SURVIVED, OVERWRITTEN))
# How often lanes are halved until there is one.
_HALVINGS = tl.constexpr(LANES.bit_length() - 1)
_gradient, _descend, _rmsprop = formula.gradient, formula.descend, formula.rmsprop
_row_mean_square, _decay = formula.row_mean_square, formula.decay


@triton.jit(
    do_not_specialize=[
        *("param", "grads", "ms", "grad_avg", "buffer", "comp", "last_update", "rows", "order"),
        *("positions", "table_rows", "units", "number", "number_bits"),
        *(*FACTORS, "key", "grad_factor", "found_inf", "verdict", "counts"),
        *("locks", "first_lock", "stripes"),
    ],
)
def row_rmsprop_kernel(
    param: tl.int64,  # address of the table: STORAGE, (table_rows, width)
    grads: tl.int64,  # address of gradients: GRAD_STORAGE, (positions, width)
    ms: tl.int64,  # of its mean square, one a row if ROWWISE: float64 if STORAGE is, else float32
    grad_avg: tl.int64,  # address of its mean gradient, if CENTERED: dtype of ms, shape of param
    buffer: tl.int64,  # address of its momentum buffer, if MOMENTUM: the same
    comp: tl.int64,  # address of what rounding has left of the table, if COMPENSATED: as param
    last_update: tl.int64,  # address of what touched each row last, if LAZY: int64, (table_rows,)
    rows: tl.int64,  # address of the rows to update, in ascending order: int64, (positions,)
    order: tl.int64,  # address of where the gradient of each is: int64, (positions,)
    positions: tl.int64,  # how many there are, at least one
    table_rows: tl.int64,  # how many the table has
    units: tl.int64,  # how many times UNIT elements a row has
    number: tl.int64,  # of this update, if LAZY
    number_bits: tl.int64,  # how many bits that has
    lr: tl.int64,  # bits of a float64, or the address of one if LR_ON_DEVICE
    alpha: tl.int64,  # bits of a float64, as all factors
    beta: tl.int64,  # 1 - alpha
    eps: tl.int64,  # what keeps the denominator from zero
    weight_decay: tl.int64,  # what COUPLED adds to the gradient, times the parameter
    decoupled_decay: tl.int64,  # weight decay if it is decoupled, else 0
    sign: tl.int64,  # -1 to maximize, else 1
    momentum: tl.int64,  # what stays of the momentum buffer
    key: tl.int64,  # of the step, if STOCHASTIC
    grad_factor: tl.int64,  # address of what gradients are multiplied by, if SCALED: float64, (1,)
    found_inf: tl.int64,  # address of what forbids the update if it is not 0, if CHECKED: 32 bits
    verdict: tl.int64,  # address of what becomes 1 if a row is outside of it, else 0: int32, (1,)
    counts: tl.int64,  # address of ``RaceCounters.counts``, if COUNTED: int64, (3, table_rows)
    locks: tl.int64,  # address of locks, if LOCKED: int32, (stripes,), all 0
    first_lock: tl.int64,  # which of them the first row has; each row after it the next
    stripes: tl.int64,  # how many there are: a power of 2
    STORAGE: tl.constexpr,  # how the table is stored: int16 is bfloat16
    GRAD_STORAGE: tl.constexpr,  # how gradients are
    EPS_INSIDE_SQRT: tl.constexpr,  # bool: this and six that follow as in ``Switches``
    COUPLED: tl.constexpr,
    CENTERED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    LR_IN_MOMENTUM: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    COMPENSATED: tl.constexpr,
    ROWWISE: tl.constexpr,  # bool: whether there is one mean square for each row
    LAZY: tl.constexpr,  # bool: whether state decays by the updates that passed it by
    SCALED: tl.constexpr,  # bool: whether there is a factor of gradients in memory
    LR_ON_DEVICE: tl.constexpr,  # bool: whether ``lr`` is an address
    CHECKED: tl.constexpr,  # bool: whether something may forbid the update
    COUNTED: tl.constexpr,  # bool: whether to count races
    LOCKED: tl.constexpr,  # bool: whether to hold a row's lock around its update; then ROWS is 1
    ROWS: tl.constexpr,  # positions of a tile: a power of 2
    COLUMNS: tl.constexpr,  # its columns: a power of 2, if ROWWISE one that divides ``LANES``
    UNIT: tl.constexpr,  # if all rows are aligned, how many elements fill 128 bits at least; else 1
):
    """Updates the rows whose heads are in one tile.

    Who counts does so by row, as ``rmsprop_kernel`` does by block. State that there is once for
    each row is read by several threads and written by one: a barrier lies between.
    """
    rows_ptr = rows.to(tl.int64).to(tl.pointer_type(tl.int64))
    table_rows = table_rows.to(tl.int64)
    tile = tl.program_id(0).to(tl.int64)
    if _are_outside(rows_ptr, positions, table_rows, tile, verdict):
        return
    if CHECKED:  # noqa: SIM102 - known when the kernel is compiled, and what was found is not
        if is_nonzero(found_inf):
            return
    compute: tl.constexpr = tl.float64 if tl.float64 == STORAGE else tl.float32
    float64_factors = as_factors(
        lr, alpha, beta, eps, weight_decay, decoupled_decay, sign, momentum, grad_factor,
        LR_ON_DEVICE, SCALED,
    )  # fmt: skip
    factors = round_factors(float64_factors, compute)
    position = tile * ROWS + tl.arange(0, ROWS)
    row, count, most = _heads(rows_ptr, position, positions.to(tl.int64))
    head = count > 0
    if LOCKED:
        if most == 0:
            return
        lock_ptr = lock_of(tl.max(row, 0), locks, first_lock, stripes)
        hold(lock_ptr)
    if COUNTED:
        of_row = counts.to(tl.int64).to(tl.pointer_type(tl.int64)) + row
        # Adding nothing is a read that other memory is read after, in every version of Triton.
        version = tl.atomic_add(of_row + _LANDED * table_rows, 0, head, sem="acquire")
        witness = tl.atomic_add(of_row + _SURVIVED * table_rows, 0, head, sem="acquire")
        tl.debug_barrier()
    left = None
    if LAZY:
        last_ptr = last_update.to(tl.int64).to(tl.pointer_type(tl.int64)) + row
        passed = tl.maximum(number - 1 - tl.load(last_ptr, head, 0), 0)
        one = tl.full([ROWS], 1.0, tl.float64)
        left = _decay(one, float64_factors[1], passed, number_bits).to(compute)
    tables = (
        _table(param, STORAGE, UNIT),
        _table(ms, compute, UNIT),
        _table(grad_avg, compute, UNIT),
        _table(buffer, compute, UNIT),
        _table(comp, STORAGE, UNIT),
    )
    gradients = (
        _table(grads, GRAD_STORAGE, UNIT),
        order.to(tl.int64).to(tl.pointer_type(tl.int64)) + position,
        count,
        most,
    )
    width = units.to(tl.int64) * UNIT
    if ROWWISE:
        ms_ptr = ms.to(tl.int64).to(tl.pointer_type(compute)) + row
        row_ms = tl.load(ms_ptr, head)
        if LAZY:
            row_ms = row_ms * left
        squares = _sum_of_squares(
            tables, gradients, row, width, factors, COUPLED, COMPENSATED, ROWS, COLUMNS
        )
        row_ms = _row_mean_square(row_ms, squares, width.to(compute), factors)
    else:
        row_ms = None
    for first in range(0, width, COLUMNS):
        _update_columns(
            tables, gradients, row, width, first, row_ms, left, key.to(tl.int64), factors,
            EPS_INSIDE_SQRT, COUPLED, CENTERED, MOMENTUM, LR_IN_MOMENTUM, STOCHASTIC, COMPENSATED,
            ROWWISE, LAZY, COLUMNS,
        )  # fmt: skip
    if ROWWISE or LAZY or COUNTED:
        tl.debug_barrier()
    if ROWWISE:
        tl.store(ms_ptr, row_ms, head)
    if LAZY:
        tl.store(last_ptr, number, head)
    if COUNTED:
        tl.atomic_xchg(of_row + _SURVIVED * table_rows, witness + 1, head, sem="release")
        landed = tl.atomic_add(of_row + _LANDED * table_rows, 1, head, sem="acq_rel")
        overlapping = landed - version
        tl.atomic_add(
            of_row + _OVERWRITTEN * table_rows, overlapping, head & (overlapping != 0),
            sem="relaxed",
        )  # fmt: skip
    if LOCKED:
        release(lock_ptr)


@triton.jit
def _are_outside(
    rows_ptr,  # where the rows are, in ascending order: pointer to int64
    positions,  # how many there are, at least one
    table_rows,  # how many the table has
    tile,  # of this program
    verdict,  # address, as in ``row_rmsprop_kernel``
):
    """Whether some rows are not in the table; the first program sets the verdict."""
    # They ascend: so all are in it if these two are.
    first, last = tl.load(rows_ptr), tl.load(rows_ptr + positions - 1)
    outside = (first < 0) | (last >= table_rows)
    verdict_ptr = verdict.to(tl.int64).to(tl.pointer_type(tl.int32))
    tl.store(verdict_ptr, outside.to(tl.int32), tile == 0)
    return outside


@triton.jit
def _heads(
    rows_ptr,  # where the rows are, in ascending order: pointer to int64
    position,  # of this tile's: int64, (ROWS,)
    positions,  # how many there are
):
    """The row of each position, how many it has if this is its head, else 0, and the most of these.

    Rows of positions beyond the last are 0. All are int64.
    """
    inside = position < positions
    row = tl.load(rows_ptr + position, inside, 0)
    before = tl.load(rows_ptr + position - 1, inside & (position > 0), -1)
    here = inside & (row != before)
    count, most = tl.zeros_like(row), tl.full([], 0, tl.int64)
    while tl.max(here.to(tl.int32), 0) != 0:
        count += here.to(tl.int64)
        most += 1
        position += 1
        here = here & (position < positions)
        here = here & (tl.load(rows_ptr + position, here, -1) == row)
    return row, count, most


@triton.jit
def _table(
    address,  # of the first element
    dtype: tl.constexpr,  # of elements as they are stored
    UNIT: tl.constexpr,  # as in ``row_rmsprop_kernel``
):
    """Where a table is; for accesses of 128 bits, if it is aligned."""
    pointer = address.to(tl.int64).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if UNIT > 1 else pointer


@triton.jit
def _summed(
    gradients,  # where they are, where the order of these positions is, their counts, and the most
    width,  # how many elements a row has
    column,  # which are wanted: int64, (COLUMNS,)
    compute: tl.constexpr,  # float32 or float64
):
    """The sums of heads' gradients in their order, in the compute type: (ROWS, COLUMNS)."""
    grads_ptr, order_ptr, count, most = gradients
    column, inside = column[None, :], (column < width)[None, :]
    place = tl.load(order_ptr, count > 0, 0)[:, None]
    g = widened(tl.load(grads_ptr + place * width + column, (count > 0)[:, None] & inside), compute)
    for step in range(1, most):
        place = tl.load(order_ptr + step, count > step, 0)[:, None]
        mask = (count > step)[:, None] & inside
        more = tl.load(grads_ptr + place * width + column, mask)
        g = tl.where(mask, g + widened(more, compute), g)
    return g


@triton.jit
def _sum_of_squares(
    tables,  # these as in ``_update_columns``
    gradients,
    row,
    width,
    factors,
    COUPLED: tl.constexpr,
    COMPENSATED: tl.constexpr,
    ROWS: tl.constexpr,  # as in ``row_rmsprop_kernel``
    COLUMNS: tl.constexpr,  # how many to take at once: a power of 2 that divides ``LANES``
):
    """The sum of the squares of each row's gradient, in the order of all backends: (ROWS,).

    What it lacks of ``LANES`` sums would be 0.
    """
    _, _, count, _ = gradients
    compute: tl.constexpr = tables[1].dtype.element_ty
    sums = tl.zeros([ROWS, COLUMNS], compute)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (count > 0)[:, None] & (column < width)[None, :]
        g = _summed(gradients, width, column, compute)
        p = _read_param(tables, row[:, None] * width + column[None, :], mask, COMPENSATED)
        g = _gradient(p, g, factors, COUPLED)
        sums += tl.where(mask, g * g, 0.0)
    for halving in tl.static_range(_HALVINGS):
        if COLUMNS >> halving > 1:
            # Two numbers for each sum: so there is one order to add them in.
            pairs = tl.reshape(sums, [ROWS, 2, COLUMNS >> halving + 1])
            sums = tl.sum(pairs, 1)
    return tl.reshape(sums, [ROWS])


@triton.jit
def _read_param(
    tables,  # as in ``_update_columns``
    offsets,  # of its elements
    mask,  # of those that there are
    COMPENSATED: tl.constexpr,
):
    """Elements of the parameter, with what rounding has left of them, in the compute type."""
    param_ptr, ms_ptr, _, _, comp_ptr = tables
    compute: tl.constexpr = ms_ptr.dtype.element_ty
    p = widened(tl.load(param_ptr + offsets, mask), compute)
    if COMPENSATED:
        p = p + widened(tl.load(comp_ptr + offsets, mask), compute)
    return p


@triton.jit
def _update_columns(
    tables,  # where the parameter is, its mean square, mean, momentum buffer and what is left of it
    gradients,  # as in ``_summed``
    row,  # of each position: int64, (ROWS,)
    width,  # how many elements a row has
    first,  # of the columns
    row_ms,  # new mean squares of rows, if ROWWISE: (ROWS,)
    left,  # what is left of state, if LAZY: (ROWS,)
    key,  # of the step: an int64
    factors,  # in the compute type
    EPS_INSIDE_SQRT: tl.constexpr,  # these as in ``row_rmsprop_kernel``
    COUPLED: tl.constexpr,
    CENTERED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    LR_IN_MOMENTUM: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    COMPENSATED: tl.constexpr,
    ROWWISE: tl.constexpr,
    LAZY: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Updates some columns of the rows of heads."""
    param_ptr, ms_ptr, avg_ptr, buffer_ptr, comp_ptr = tables
    _, _, count, _ = gradients
    storage: tl.constexpr = param_ptr.dtype.element_ty
    compute: tl.constexpr = ms_ptr.dtype.element_ty
    column = first + tl.arange(0, COLUMNS)
    mask = (count > 0)[:, None] & (column < width)[None, :]
    offsets = row[:, None] * width + column[None, :]
    g = _summed(gradients, width, column, compute)
    p = _read_param(tables, offsets, mask, COMPENSATED)
    ga = tl.load(avg_ptr + offsets, mask) if CENTERED else 0.0  # which no code reads
    buf = tl.load(buffer_ptr + offsets, mask) if MOMENTUM else 0.0
    if LAZY and CENTERED:
        ga = ga * left[:, None]
    if ROWWISE:
        g = _gradient(p, g, factors, COUPLED)
        p, ga, buf = _descend(
            p, g, row_ms[:, None], ga, buf, factors, EPS_INSIDE_SQRT, CENTERED, MOMENTUM,
            LR_IN_MOMENTUM,
        )  # fmt: skip
    else:
        ms = tl.load(ms_ptr + offsets, mask)
        if LAZY:
            ms = ms * left[:, None]
        p, ms, ga, buf = _rmsprop(
            p, g, ms, ga, buf, factors, EPS_INSIDE_SQRT, COUPLED, CENTERED, MOMENTUM,
            LR_IN_MOMENTUM,
        )  # fmt: skip
        tl.store(ms_ptr + offsets, ms, mask)
    stored = as_stored(p, comp_ptr + offsets, mask, offsets, key, storage, STOCHASTIC, COMPENSATED)
    if CENTERED:
        tl.store(avg_ptr + offsets, ga, mask)
    if MOMENTUM:
        tl.store(buffer_ptr + offsets, buf, mask)
    tl.store(param_ptr + offsets, stored, mask)
