"""What a CPU lane does, compiled: takes updates from a ring in memory, and applies them.

It runs on the lane's thread and never holds the GIL. While it has work, launching more is a write
to memory; a system call is made only to wake a lane that sleeps, or a loop that does.

This module needs Numba. Blocks of memory are int64 words, given by address; the constants below say
what each word is. Words that several threads write have a cache line each.
"""

from __future__ import annotations

import errno
from typing import Any

from numba import types

from hogstream.kernels.backends.numba_atomics import (
    atomic_add,
    atomic_exchange,
    atomic_load,
    atomic_store,
    call,
    float_load,
    float_store,
)
from hogstream.kernels.backends.numba_compile import njit
from hogstream.kernels.launch_table import ELEMENTS, GRAD, MS, PARAM
from hogstream.scheduler.lanes.process_lock import LOCK_RECOVERIES

WORD = 8

#: A lane: how many rows were launched, how many have landed, whether it sleeps; the file
#: descriptor of the event that wakes it, its number of rows (a power of two) less one, the number
#: 1, space for a time, how many rows may be left when it wakes the loop, the file descriptor by
#: which that event is sent, space for factors; and then the rows.
LAUNCHED, LANDED, ASLEEP = 0, 8, 16
LANE_EVENT, MASK, ONE, TIME, LOW_WATER, LANE_WAKER = 24, 25, 26, 27, 29, 30
OWN_FACTORS, ROWS = 32, 40

#: A row: the columns of the update's ``LaunchTable`` and how many parts those have, or where the
#: snapshot goes; what else the update needs; the address of the function that updates, 0 for a
#: snapshot, and its factors; and what became of it.
SOURCE, PARTS, READ_VERSION, TICKET, UPDATE, FACTORS = 0, 1, 2, 3, 4, 5
STARTED, LANDED_NS, STALENESS, OUTCOME = 12, 13, 14, 15
ROW = 16

#: All lanes of a scheduler: what they update and how; then words that they write.
FLAT, BYTES, VERSIONS, SLOTS, SLOT, RACES, BLOCKS, BLOCK = range(8)
FINITE, STALENESS_AWARE, LOCK, LOOP_EVENT = range(8, 12)
#: Under an order, where it is noted which lane has which ticket: a word for each, by the ticket's
#: remainder, as many as a power of two, of which this is one less; 0 if there is no order.
OWNERS, OWNERS_MASK = 13, 14
NEXT, WOKEN, STOP = 16, 24, 32
SETTINGS = 40

#: Outcomes; below 0, minus the number of an error of the lock.
DONE, NONFINITE = 0, 1

_CLOCK_MONOTONIC, _CLOCK_REALTIME = 1, 0
# An idle lane gives way to other threads this often, about 50 us, before it sleeps.
_YIELDS = 50

_OWNER_DEAD, _TIMED_OUT = errno.EOWNERDEAD, errno.ETIMEDOUT

_yield: Any = types.ExternalFunction("sched_yield", types.int32())
_read: Any = types.ExternalFunction("read", types.int64(types.int32, types.int64, types.int64))
_write: Any = types.ExternalFunction("write", types.int64(types.int32, types.int64, types.int64))
_copy: Any = types.ExternalFunction("memcpy", types.int64(types.int64, types.int64, types.int64))
_clock: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_timed_lock: Any = types.ExternalFunction(
    "pthread_mutex_timedlock", types.int32(types.int64, types.int64)
)
_consistent: Any = types.ExternalFunction("pthread_mutex_consistent", types.int32(types.int64))
_unlock: Any = types.ExternalFunction("pthread_mutex_unlock", types.int32(types.int64))


@njit
def launch(lane: int, launched: int) -> None:
    """Makes rows visible to a lane, and wakes it if it sleeps.

    Args:
        lane: Its address.
        launched: How many rows have been launched on it since it was opened.
    """
    atomic_store(lane + WORD * LAUNCHED, launched)
    wake(lane)


@njit
def wake(lane: int) -> None:
    """Has a lane look at its words again, if it sleeps."""
    if atomic_exchange(lane + WORD * ASLEEP, 0):
        _write(atomic_load(lane + WORD * LANE_WAKER), lane + WORD * ONE, WORD)


@njit
def landed(lane: int) -> Any:
    """How many rows of a lane have landed; what was done for them can be seen then."""
    return atomic_load(lane + WORD * LANDED)


@njit
def listen(settings: int) -> None:
    """From here on, the next update to land wakes the event loop."""
    atomic_exchange(settings + WORD * WOKEN, 0)


@njit
def run(lane: int, settings: int) -> None:
    """The loop of a lane: returns when it is told to stop and has nothing left to do.

    Args:
        lane: Its address.
        settings: Their address.
    """
    done = atomic_load(lane + WORD * LANDED)
    while await_row(lane, settings, done):
        row = lane + WORD * (ROWS + ROW * (done & atomic_load(lane + WORD * MASK)))
        await_turn(lane, row, settings)
        error = lock(lane, settings)
        atomic_store(row + WORD * STARTED, now(lane))
        if error != 0:
            atomic_store(row + WORD * OUTCOME, -error)
        elif atomic_load(row + WORD * UPDATE) == 0:
            take_snapshot(row, settings)
        else:
            land(row, settings, apply(lane, row, settings))
        if error == 0:
            unlock(settings)
        atomic_store(row + WORD * LANDED_NS, now(lane))
        done += 1
        atomic_store(lane + WORD * LANDED, done)
        wake_others(lane, row, settings, done)


@njit
def take_snapshot(row: int, settings: int) -> None:
    """Copies the parameters; the version that the copy holds at least is its staleness."""
    atomic_store(row + WORD * OUTCOME, DONE)
    atomic_store(row + WORD * STALENESS, version(settings))
    _copy(
        atomic_load(row + WORD * SOURCE),
        atomic_load(settings + WORD * FLAT),
        atomic_load(settings + WORD * BYTES),
    )


@njit
def apply(lane: int, row: int, settings: int) -> int:
    """Applies the update of a row, and returns its outcome."""
    if not is_finite(row, settings):
        return NONFINITE
    factors = row + WORD * FACTORS
    if atomic_load(settings + WORD * STALENESS_AWARE):
        stale = version(settings) - atomic_load(row + WORD * READ_VERSION)
        own = lane + WORD * OWN_FACTORS
        _copy(own, factors, WORD * (STARTED - FACTORS))
        divide_lr(own, max(stale, 1))
        factors = own
    for part in range(atomic_load(row + WORD * PARTS)):
        call(
            atomic_load(row + WORD * UPDATE),
            (
                of_part(row, PARAM, part),
                of_part(row, GRAD, part),
                of_part(row, MS, part),
                of_part(row, ELEMENTS, part),
                factors,
                atomic_load(settings + WORD * RACES),
                atomic_load(settings + WORD * BLOCKS),
                atomic_load(settings + WORD * BLOCK),
                atomic_load(settings + WORD * FLAT),
            ),
        )
    return DONE


@njit
def is_finite(row: int, settings: int) -> bool:
    """Whether the gradient of a row is finite in all its parts, if that matters."""
    finite = atomic_load(settings + WORD * FINITE)
    if finite == 0:
        return True
    for part in range(atomic_load(row + WORD * PARTS)):
        if call(finite, (of_part(row, GRAD, part), of_part(row, ELEMENTS, part))) == 0:
            return False
    return True


@njit
def of_part(row: int, what: int, part: int) -> Any:
    """An address, or the number of elements, of one part of a row's update."""
    columns, parts = atomic_load(row + WORD * SOURCE), atomic_load(row + WORD * PARTS)
    return atomic_load(columns + WORD * (what * parts + part))


@njit
def divide_lr(factors: int, divisor: int) -> None:
    """Divides ``lr`` among the factors, in the order of ``Factors``, and what depends on it."""
    lr, weight_decay, shrink = factors, factors + 4 * WORD, factors + 5 * WORD
    float_store(lr, float_load(lr) / divisor)
    if float_load(shrink) != 1.0:
        float_store(shrink, 1.0 - float_load(lr) * float_load(weight_decay))


@njit
def await_row(lane: int, settings: int, done: int) -> bool:
    """Waits until there is another row; False if there is none and the lane is to stop."""
    yields = _YIELDS
    while atomic_load(lane + WORD * LAUNCHED) == done:
        if atomic_load(settings + WORD * STOP):
            return False
        if yields > 0:
            yields -= 1
            _yield()
            continue
        atomic_store(lane + WORD * ASLEEP, 1)
        # Whoever launches or stops from here on sees that it sleeps, and sends the event.
        if (
            atomic_load(lane + WORD * LAUNCHED) == done and not atomic_load(settings + WORD * STOP)
        ) or not atomic_exchange(lane + WORD * ASLEEP, 0):
            _read(atomic_load(lane + WORD * LANE_EVENT), lane + WORD * TIME, WORD)
        yields = _YIELDS
    return True


@njit
def await_turn(lane: int, row: int, settings: int) -> None:
    """Waits, under an order, until all rows with an earlier ticket have landed."""
    if atomic_load(settings + WORD * OWNERS) == 0:
        return
    ticket = atomic_load(row + WORD * TICKET)
    yields = _YIELDS
    while atomic_load(settings + WORD * NEXT) != ticket and not atomic_load(settings + WORD * STOP):
        if yields > 0:
            yields -= 1
            _yield()
            continue
        atomic_store(lane + WORD * ASLEEP, 1)
        # Whoever has the ticket before sees from here on that it sleeps, and sends the event.
        if atomic_load(settings + WORD * NEXT) != ticket or not atomic_exchange(
            lane + WORD * ASLEEP, 0
        ):
            _read(atomic_load(lane + WORD * LANE_EVENT), lane + WORD * TIME, WORD)


@njit
def lock(lane: int, settings: int) -> Any:
    """Takes the lock that is shared with other processes, if there is one; 0 or an error."""
    mutex = atomic_load(settings + WORD * LOCK)
    if mutex == 0:
        return 0
    until = lane + WORD * TIME
    while True:
        _clock(_CLOCK_REALTIME, until)
        atomic_add(until, 1)
        result = _timed_lock(mutex, until)
        if result == _OWNER_DEAD:
            _consistent(mutex)
            atomic_add(mutex + LOCK_RECOVERIES, 1)
            return 0
        if result != _TIMED_OUT:
            return result


@njit
def unlock(settings: int) -> None:
    """Releases that lock, if there is one."""
    mutex = atomic_load(settings + WORD * LOCK)
    if mutex != 0:
        _unlock(mutex)


@njit
def land(row: int, settings: int, outcome: int) -> None:
    """Counts an update that was applied, and how stale it was."""
    atomic_store(row + WORD * OUTCOME, outcome)
    slot = atomic_load(settings + WORD * SLOT)
    mine = atomic_load(settings + WORD * VERSIONS) + WORD * slot
    before = atomic_add(mine, 1 if outcome == DONE else 0)
    for other in range(atomic_load(settings + WORD * SLOTS)):
        if other != slot:
            before += atomic_load(atomic_load(settings + WORD * VERSIONS) + WORD * other)
    atomic_store(row + WORD * STALENESS, before - atomic_load(row + WORD * READ_VERSION))


@njit
def version(settings: int) -> int:
    """How many updates the parameters have had."""
    versions = atomic_load(settings + WORD * VERSIONS)
    total = 0
    for slot in range(atomic_load(settings + WORD * SLOTS)):
        total += atomic_load(versions + WORD * slot)
    return total


@njit
def wake_others(lane: int, row: int, settings: int, done: int) -> None:
    """Lets the next in order go on, and wakes the event loop, if it is time and nobody has yet."""
    owners = atomic_load(settings + WORD * OWNERS)
    if owners != 0:
        following = atomic_load(row + WORD * TICKET) + 1
        atomic_store(settings + WORD * NEXT, following)
        slot = following & atomic_load(settings + WORD * OWNERS_MASK)
        owner = atomic_load(owners + WORD * slot)
        if owner != 0 and owner != lane:
            wake(owner)  # in vain, if the ticket is not handed out yet
    left = atomic_load(lane + WORD * LAUNCHED) - done
    if left > atomic_load(lane + WORD * LOW_WATER):
        return
    if not atomic_exchange(settings + WORD * WOKEN, 1):
        _write(atomic_load(settings + WORD * LOOP_EVENT), lane + WORD * ONE, WORD)


@njit
def now(lane: int) -> Any:
    """Nanoseconds, by the clock of ``time.perf_counter_ns``."""
    time = lane + WORD * TIME
    _clock(_CLOCK_MONOTONIC, time)
    return atomic_load(time) * 1_000_000_000 + atomic_load(time + WORD)
