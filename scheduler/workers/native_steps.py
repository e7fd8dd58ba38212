"""The compiled loop of a worker whose step is compiled: step, update, and again, free of the GIL.

This module needs Numba.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, is_jitted

from hogstream.kernels.backends.numba_atomics import (
    atomic_add,
    atomic_exchange,
    atomic_load,
    atomic_store,
    call,
    plain_store,
)
from hogstream.kernels.backends.numba_compile import njit
from hogstream.kernels.backends.numba_vectors import CACHE_LINE
from hogstream.kernels.hyperparameters import Factors
from hogstream.kernels.launch_table import GRAD
from hogstream.kernels.row_table import FIELDS, ORDER, POSITIONS, READ_VERSION, WIDTH
from hogstream.scheduler.lanes import rings
from hogstream.scheduler.lanes.native_loop import divide_lr, lock, unlock
from hogstream.scheduler.lanes.rings import WORD, now

LINE = CACHE_LINE // WORD

#: What a worker and its loop tell each other, as int64: how many updates it may still make, which
#: the event loop may take back; how many it has made, has told others of, and has left out; what
#: went wrong, and with what; and how many updates have been looked at more closely.
PERMITS = 0
MADE, TOLD, NONFINITE, FAULT, FAULT_TABLE, FAULT_ROW, MEASURED = range(LINE, LINE + 7)
CONTROL = 2 * LINE
#: What of each that was looked at: its staleness, and how many nanoseconds it took.
STALENESS, NANOSECONDS = range(2)
#: Faults: a row that is not in its table, a gradient that is not finite; and minus the number of an
#: error of the lock.
ROW_FAULT, NONFINITE_FAULT = 1, 2

# ``TICKETS``: the next one to be given, and the one whose turn it is, on a line each.
GIVEN, TURN = 0, LINE
TICKETS = 2 * LINE

# So many permits are taken at once: to take one is an atomic operation.
_PERMITS = 16
# Steps whose loops are kept: they take some tenths of a second to compile.
_KEPT = 64

_yield: Any = types.ExternalFunction("sched_yield", types.int32())

FACTOR_WORDS = len(Factors._fields)
FACTOR_BYTES = WORD * FACTOR_WORDS


class NativeState(NamedTuple):
    """What a step has besides parameters and samples.

    Attributes:
        sample: Which sample it is for: its index in the arrays of samples.
        rows: For each table, where to write which rows the gradient is of: int64, (r,). One that
            is -1 is left out.
        grads: For each table, where to write the gradients of those rows: (r, D), of the dtype of
            parameters. What is written stays there until it is written over.
    """

    sample: int
    rows: tuple[Any, ...]
    grads: tuple[Any, ...]


class Places(NamedTuple):
    """Where compiled code finds what a worker has, by addresses.

    Attributes:
        control: The words above.
        fields: Of each table, what ``numba_rows`` says of an update.
        update: The function that updates rows.
        settings: Of the lanes.
        thread: Words of a thread, as a lane's.
        factors: The run's, and then room for the update's own.
        landings: How many updates each worker of the process has made: one line each.
        tickets: The words above, if updates are ordered; else 0.
        grad_bytes: Not an address, but the size of an element of gradients.
    """

    control: int
    fields: int
    update: int
    settings: int
    thread: int
    factors: int
    landings: int
    tickets: int
    grad_bytes: int


class Numbers(NamedTuple):
    """What it goes by.

    Attributes:
        worker: Its index.
        workers: How many there are.
        every: One update in so many is looked at more closely.
        counts_rows: Whether it is counted which rows are stale.
        tells: Whether the version is told to all after each update, and not at the end.
        stops: Whether it stops at a gradient that is not finite.
        until_ns: When it takes no more permits.
    """

    worker: int
    workers: int
    every: int
    counts_rows: bool
    tells: bool
    stops: bool
    until_ns: int


def _borrowed(_context: Any, arrays: Any) -> Any:
    """The same arrays, whose owner is somebody else: so nobody counts references to them."""

    def emit(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        values = []
        for kind, value in zip(arrays, cgutils.unpack_tuple(builder, args[0]), strict=True):
            array = context.make_array(kind)(context, builder, value)
            for owner in ("meminfo", "parent"):
                setattr(array, owner, cgutils.get_null_value(getattr(array, owner).type))
            values.append(array._getvalue())
        return context.make_tuple(builder, arrays, values)

    return arrays(arrays), emit


borrowed: Any = intrinsic(_borrowed)


@lru_cache(_KEPT)
def compile_step(step: Callable[..., Any]) -> Callable[..., float]:
    """The loop of a step.

    Args:
        step: A function that Numba can compile, or that it has: ``step(parameters, samples,
            state)``, which returns the loss of a sample.

    Returns:
        ``run(parameters, samples, order, rows, grads, sorted_rows, sorted_order, measured, places,
        numbers)``: goes through ``order``, the indices of samples, as long as it has permits, and
        returns the sum of the losses of the updates that were made. ``measured``: int64, (m, 2).
    """
    compiled: Any = step if is_jitted(step) else numba.njit(nogil=True, error_model="numpy")(step)

    @numba.njit(nogil=True, error_model="numpy")
    def run(  # type: ignore[no-untyped-def]
        parameters,
        samples,
        order,
        rows,
        grads,
        sorted_rows,
        sorted_order,
        measured,
        places,
        numbers,
    ):
        parameters, samples = borrowed(parameters), borrowed(samples)
        rows, grads = borrowed(rows), borrowed(grads)
        sorted_rows, sorted_order = borrowed(sorted_rows), borrowed(sorted_order)
        total, permits, until_watched, begun = 0.0, 0, 0, False
        for sample in order:
            if permits == 0:
                if now(places.thread) >= numbers.until_ns and begun:
                    break
                permits = take_permits(places)
                if permits == 0:
                    break
            begun = True
            watched = until_watched == 0
            until_watched = numbers.every - 1 if watched else until_watched - 1
            started = seen = 0
            if watched:
                started, seen = now(places.thread), landed_by_others(places, numbers)
            if numbers.counts_rows:
                note_read(places, len(rows))
            loss = compiled(parameters, samples, NativeState(sample, rows, grads))
            made = -1
            if sort_all(parameters, rows, sorted_rows, sorted_order, places):
                made = apply(places, numbers, len(rows), seen)
            if made < 0:
                break
            permits -= 1
            if made > 0:  # a loss that is not finite may be of an update that was left out
                total += loss
            if numbers.tells:
                tell_version(places)
            if watched and made:
                measure(places, numbers, measured, seen, started)
        return total

    return run


@njit
def sort_all(  # type: ignore[no-untyped-def]
    parameters, rows, sorted_rows, sorted_order, places
) -> bool:
    """Sorts the rows of each table; whether all of them are in it."""
    for table in range(len(rows)):
        count = sort_rows(
            rows[table], len(parameters[table]), sorted_rows[table], sorted_order[table]
        )
        if count < 0:
            note_fault(places, ROW_FAULT, table, rows[table][-1 - count])
            return False
        plain_store(field_of(places, table, POSITIONS), count)
    return True


@njit
def sort_rows(rows, table_rows, sorted_rows, order) -> int:  # type: ignore[no-untyped-def]
    """Rows in ascending order, equal ones in theirs, without those that are -1: how many.

    If one is not in the table, -1 less its index.
    """
    count = 0
    for index in range(len(rows)):
        row = rows[index]
        if row == -1:
            continue
        if row < 0 or row >= table_rows:
            return -1 - index
        place = count
        while place > 0 and sorted_rows[place - 1] > row:
            sorted_rows[place], order[place] = sorted_rows[place - 1], order[place - 1]
            place -= 1
        sorted_rows[place], order[place] = row, index
        count += 1
    return count


@njit
def field_of(places: Places, table: int, field: int) -> Any:
    """The address of a field of a table."""
    return places.fields + WORD * (table * FIELDS + field)


@njit
def note_read(places: Places, tables: int) -> None:
    """Notes of which version a step reads."""
    read = rings.version(places.settings)
    for table in range(tables):
        plain_store(field_of(places, table, READ_VERSION), read)


@njit
def take_permits(places: Places) -> Any:
    """Takes permits for so many updates, which then are made."""
    left = atomic_add(places.control + WORD * PERMITS, -_PERMITS)
    return min(max(left, 0), _PERMITS)


@njit
def take_back(control: int) -> Any:
    """Takes all permits that are left; from the event loop's thread."""
    return max(atomic_exchange(control + WORD * PERMITS, 0), 0)


@njit
def note_fault(places: Places, fault: int, table: int, row: int) -> None:
    """Says what went wrong."""
    atomic_store(places.control + WORD * FAULT, fault)
    atomic_store(places.control + WORD * FAULT_TABLE, table)
    atomic_store(places.control + WORD * FAULT_ROW, row)


@njit
def count(places: Places, word: int) -> None:
    """Counts one more in a word that nobody else writes, and is read when the loop has ended."""
    plain_store(places.control + WORD * word, atomic_load(places.control + WORD * word) + 1)


@njit
def apply(places: Places, numbers: Numbers, tables: int, seen: int) -> Any:
    """Applies an update as its policy has it: 1, or 0 if it was left out, or below 0 at a fault."""
    if not are_finite(places, tables):
        count(places, NONFINITE)
        if numbers.stops:
            note_fault(places, NONFINITE_FAULT, 0, 0)
            return -1
        return 0
    wait_for_turn(places)
    error = lock(places.thread, places.settings)
    if error != 0:
        note_fault(places, -error, 0, 0)
    else:
        if atomic_load(places.settings + WORD * rings.STALENESS_AWARE):
            divide_own_lr(places, max(landed_by_others(places, numbers) - seen, 1))
        for table in range(tables):
            fields = field_of(places, table, 0)
            call(places.update, (fields, 0, atomic_load(fields + WORD * POSITIONS)))
        # Not atomic: that would wait until all that the update has written is in the cache.
        mine = places.landings + WORD * LINE * numbers.worker
        plain_store(mine, atomic_load(mine) + 1)
        unlock(places.settings)
        count(places, MADE)
    pass_turn(places)
    return -1 if error != 0 else 1


@njit
def are_finite(places: Places, tables: int) -> bool:
    """Whether all gradients of an update are finite, if that matters."""
    finite = atomic_load(places.settings + WORD * rings.FINITE)
    if finite == 0:
        return True
    for table in range(tables):
        width = atomic_load(field_of(places, table, WIDTH))
        order, grads = (
            atomic_load(field_of(places, table, ORDER)),
            atomic_load(field_of(places, table, GRAD)),
        )
        for position in range(atomic_load(field_of(places, table, POSITIONS))):
            index = atomic_load(order + WORD * position)
            if call(finite, (grads + index * width * places.grad_bytes, width)) == 0:
                return False
    return True


@njit
def wait_for_turn(places: Places) -> None:
    """Takes the next ticket, and waits until it has its turn, if updates are ordered."""
    if places.tickets == 0:
        return
    ticket = atomic_add(places.tickets + WORD * GIVEN, 1)
    while atomic_load(places.tickets + WORD * TURN) != ticket:
        _yield()


@njit
def pass_turn(places: Places) -> None:
    """Gives the turn to the next ticket, if updates are ordered."""
    if places.tickets != 0:
        turn = places.tickets + WORD * TURN
        atomic_store(turn, atomic_load(turn) + 1)


@njit
def divide_own_lr(places: Places, divisor: int) -> None:
    """Makes the update's own factors, with a learning rate that is divided."""
    own = places.factors + FACTOR_BYTES
    for word in range(FACTOR_WORDS):
        plain_store(own + WORD * word, atomic_load(places.factors + WORD * word))
    divide_lr(own, divisor)


@njit
def landed_by_others(places: Places, numbers: Numbers) -> Any:
    """How many updates all other workers have made, of this process and of others."""
    total = 0
    for worker in range(numbers.workers):
        if worker != numbers.worker:
            total += atomic_load(places.landings + WORD * LINE * worker)
    versions = atomic_load(places.settings + WORD * rings.VERSIONS)
    for slot in range(atomic_load(places.settings + WORD * rings.SLOTS)):
        if slot != atomic_load(places.settings + WORD * rings.SLOT):
            total += atomic_load(versions + WORD * slot)
    return total


@njit
def tell_version(places: Places) -> None:
    """Adds what was made, and is not yet there, to the version that all know."""
    made = atomic_load(places.control + WORD * MADE)
    untold = made - atomic_load(places.control + WORD * TOLD)
    if untold != 0:
        slot = atomic_load(places.settings + WORD * rings.SLOT)
        atomic_add(atomic_load(places.settings + WORD * rings.VERSIONS) + WORD * slot, untold)
        atomic_store(places.control + WORD * TOLD, made)


@njit
def measure(  # type: ignore[no-untyped-def]
    places, numbers, measured, seen, started
) -> None:
    """Takes down an update that has landed."""
    index = atomic_load(places.control + WORD * MEASURED)
    if index < len(measured):
        measured[index, STALENESS] = landed_by_others(places, numbers) - seen
        measured[index, NANOSECONDS] = now(places.thread) - started
        atomic_store(places.control + WORD * MEASURED, index + 1)
