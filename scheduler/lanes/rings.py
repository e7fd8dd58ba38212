"""The memory by which an event loop and the compiled loop of lanes speak with each other.

Blocks of memory are int64 words, given by address; the constants below say what each word is. Words
that several threads write have a cache line each.

This module needs Numba.
"""

from __future__ import annotations

from typing import Any

from numba import types

from hogstream.kernels.backends.numba_atomics import (
    atomic_add,
    atomic_exchange,
    atomic_load,
    atomic_store,
)
from hogstream.kernels.backends.numba_compile import njit
from hogstream.kernels.hyperparameters import Factors

WORD = 8

#: A thread that serves lanes: whether it sleeps; the file descriptors by which it is woken and by
#: which that is sent, and the number 1; space for a time; its lanes: an array of their addresses,
#: how many, and which comes first; space for factors. On a GPU besides: how many rows hold the
#: lock, how long to sleep, what ``ppoll`` takes, and a launch's arguments and their addresses.
ASLEEP = 0
THREAD_EVENT, THREAD_WAKER, ONE, TIME = 8, 9, 10, 11
LANES, LANE_COUNT, FIRST_LANE = 13, 14, 15
OWN_FACTORS = 16
HELD, PAUSE, POLLED = 24, 25, 26
ARGUMENTS, ARGUMENT_ADDRESSES = 32, 64
THREAD = 96

#: A lane: how many rows were launched, and how many have landed; how many were taken from the ring,
#: its number of rows (a power of two) less one, how many may be left when it wakes the event loop,
#: and its thread.
LAUNCHED, LANDED = 0, 8
TAKEN, MASK, LOW_WATER, LANE_THREAD = 16, 17, 18, 19
#: And on a GPU: the ``LAUNCH`` of its first row; its stream, the counter in pinned memory that the
#: stream writes, as the host and as the device sees it, and what was written last; an event of the
#: stream; the lane whose event it must wait for; whether others launch on the stream; where on the
#: device verdicts go; whether it waits for a batch; and how many rows the loop has noticed.
#: Then, for all, the rows.
LAUNCHES, STREAM, COUNTER, COUNTER_ON_DEVICE, NUMBER = 20, 21, 22, 23, 24
LANE_EVENT, TAIL, COMPUTES, VERDICT, WAITS, NOTICED = 25, 26, 27, 28, 29, 30
ROWS = 32

#: A row, of one cache line: the columns of the update's table and how many parts those have, or
#: where the snapshot goes and 0, or the fields of a snapshot of rows and what copies them; its
#: place in the order of all; its form, 0 for a snapshot; and what became of it. Where its staleness
#: comes is at first the version that it was made from.
SOURCE, PARTS, TICKET, FORM = range(4)
STARTED, LANDED_NS, STALENESS, OUTCOME = range(4, 8)
READ_VERSION, COPIER = STALENESS, PARTS
ROW = 8

#: A form, of updates with the same hyperparameters: what updates, on a CPU the address of a
#: function, on a GPU a ``KERNEL``, or 0 of rows, each table of which has its own; and the factors.
UPDATE, FACTORS = 0, 1
FACTOR_WORDS = len(Factors._fields)

#: All lanes of a scheduler: what they update and how; then words that they write.
FLAT, BYTES, VERSIONS, SLOTS, SLOT, RACES, BLOCKS, BLOCK = range(8)
FINITE, STALENESS_AWARE, LOCK, LOOP_EVENT = range(8, 12)
#: On a GPU, what the loop calls there, by ``DEVICE_FUNCTIONS``; else 0.
DEVICE = 12
#: Under an order, where it is noted which thread has which ticket: a word for each, by the ticket's
#: remainder, as many as a power of two, of which this is one less; 0 if there is no order.
OWNERS, OWNERS_MASK = 13, 14
NEXT, WOKEN, STOP = 16, 24, 32
#: On a GPU, the lane on which the last in order was launched, the error that the device failed
#: with, the driver's functions, and the context; and space for a context and for whether a stream
#: is captured, for the thread that submits.
LAST, FAILED, DRIVER, CONTEXT = range(40, 44)
POPPED, CAPTURING = 48, 49
SETTINGS = 56

#: What the loop of lanes calls on a GPU: a function that lands what has landed, of a thread and the
#: settings, and says whether anything has; one that says whether a lane may start its next row, and
#: one that starts it, of the lane and those; and one that sleeps for a while if rows are in flight,
#: and says whether it has.
LAND, MAY_START, START, SLEEP = range(4)
DEVICE_FUNCTIONS = 4

#: Outcomes: this one, or a verdict; below 0, minus the number of an error of the lock, or of the
#: driver beyond it.
DONE = 0
DRIVER_ERRORS = 10_000

_CLOCK_MONOTONIC = 1

_clock: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_write: Any = types.ExternalFunction("write", types.int64(types.int32, types.int64, types.int64))


@njit
def row_of(lane: int, index: int) -> Any:
    """The address of a lane's row, by how many came before it."""
    return lane + WORD * (ROWS + ROW * (index & atomic_load(lane + WORD * MASK)))


@njit
def wake(thread: int) -> None:
    """Has a thread look at its lanes again, if it sleeps."""
    if atomic_exchange(thread + WORD * ASLEEP, 0):
        _write(atomic_load(thread + WORD * THREAD_WAKER), thread + WORD * ONE, WORD)


@njit
def wake_loop(lane: int, settings: int) -> None:
    """Wakes the event loop, if few enough rows are left on a lane and nobody has woken it yet."""
    left = atomic_load(lane + WORD * LAUNCHED) - atomic_load(lane + WORD * LANDED)
    if left > atomic_load(lane + WORD * LOW_WATER):
        return
    if not atomic_exchange(settings + WORD * WOKEN, 1):
        one = atomic_load(lane + WORD * LANE_THREAD) + WORD * ONE
        _write(atomic_load(settings + WORD * LOOP_EVENT), one, WORD)


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
def of_part(row: int, what: int, part: int) -> Any:
    """An address, or the number of elements, of one part of a row's update."""
    columns, parts = atomic_load(row + WORD * SOURCE), atomic_load(row + WORD * PARTS)
    return atomic_load(columns + WORD * (what * parts + part))


@njit
def now(thread: int) -> Any:
    """Nanoseconds, by the clock of ``time.perf_counter_ns``."""
    time = thread + WORD * TIME
    _clock(_CLOCK_MONOTONIC, time)
    return atomic_load(time) * 1_000_000_000 + atomic_load(time + WORD)
