"""What the loop of lanes does on a GPU: launches rows, and sees them land.

Once the counter that a lane's stream writes has a row's number, the row has landed: looking there
costs a read of memory, where asking for an event costs a call of the driver under its lock.

The loop calls these functions by address, so that none of them is compiled for a CPU. This module
needs Numba. ``rings`` says what is where in memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types

from hogstream.kernels.backends.numba_atomics import atomic_load, atomic_store
from hogstream.kernels.backends.numba_compile import cfunc, njit
from hogstream.scheduler.lanes.cuda_batch_launch import (
    BATCH_ERROR,
    batch_of,
    completes,
    is_launched,
    launch_batch,
    leave_batch,
    rows_of,
    take_member,
)
from hogstream.scheduler.lanes.cuda_calls import VERDICT_BITS, driver
from hogstream.scheduler.lanes.cuda_driver import (
    NOT_READY,
    QUERY_EVENT,
    QUERY_STREAM,
    RECORD_EVENT,
)
from hogstream.scheduler.lanes.cuda_event_loop import LONGEST_NS, SHORTEST_NS, poll, watch
from hogstream.scheduler.lanes.cuda_launch import (
    BATCH,
    DEFAULT_STREAM,
    ERROR,
    FOUND,
    LANDS_ON,
    LANDS_WITH,
    MADE,
    UNRECORDED,
    launch_of,
    launch_row,
    record,
    submit,
)
from hogstream.scheduler.lanes.native_loop import is_turn, lane_of, lock, pass_turn, unlock
from hogstream.scheduler.lanes.rings import (
    COMPUTES,
    COUNTER,
    DEVICE_FUNCTIONS,
    DONE,
    DRIVER_ERRORS,
    FAILED,
    FORM,
    HELD,
    LAND,
    LANDED,
    LANDED_NS,
    LANE_COUNT,
    LANE_THREAD,
    LAUNCHED,
    LOCK,
    MAY_START,
    NOTICED,
    OUTCOME,
    PAUSE,
    POLLED,
    SLEEP,
    START,
    STREAM,
    TAKEN,
    TIME,
    WAITS,
    WORD,
    land,
    now,
    row_of,
    wake_loop,
)


@njit
def land_all(thread: int, settings: int) -> bool:
    """Lands what has landed on a thread's lanes; whether anything has."""
    did = False
    for index in range(atomic_load(thread + WORD * LANE_COUNT)):
        lane = lane_of(thread, index)
        while has_landed(lane, settings):
            finish(lane, settings)
            did = True
    return did


@njit
def notice(lane: int, settings: int) -> None:
    """Records the events that are to be recorded behind what makes gradients of a lane's new rows.

    If the driver refuses, the row fails with its error, and so does all that counts on the event:
    the batch that the row is of, or the rows that were launched with it and have none of their own.

    Args:
        lane: Its address.
        settings: Of the lanes.
    """
    launched, error = atomic_load(lane + WORD * LAUNCHED), 0
    for index in range(atomic_load(lane + WORD * NOTICED), launched):
        launch = launch_of(lane, index)
        made, batch = atomic_load(launch + WORD * MADE), atomic_load(launch + WORD * BATCH)
        if atomic_load(launch + WORD * UNRECORDED):
            error = driver(settings, RECORD_EVENT, (made, DEFAULT_STREAM))
            atomic_store(launch + WORD * ERROR, error)
            atomic_store(launch + WORD * UNRECORDED, 0)
            if error != 0 and batch != 0:
                atomic_store(batch + WORD * BATCH_ERROR, error)
        elif made != 0:
            error = 0
        elif error != 0:
            atomic_store(launch + WORD * ERROR, error)
    atomic_store(lane + WORD * NOTICED, launched)


@njit
def may_start(lane: int, thread: int, settings: int) -> Any:
    """Whether a lane may start the next of its rows, which is there; notices all that are new."""
    notice(lane, settings)
    batch = batch_of(lane)
    if batch != 0 and is_launched(batch):
        return True
    if atomic_load(thread + WORD * HELD) or atomic_load(lane + WORD * WAITS):
        return False
    if not is_turn(row_of(lane, atomic_load(lane + WORD * TAKEN)), settings):
        return False
    return atomic_load(settings + WORD * LOCK) == 0 or is_made(lane, settings)


@njit
def is_made(lane: int, settings: int) -> Any:
    """Whether the gradient of a lane's next row is there: nobody is locked out for its making."""
    launch = launch_of(lane, atomic_load(lane + WORD * TAKEN))
    if atomic_load(launch + WORD * ERROR) or atomic_load(settings + WORD * FAILED):
        return True
    made = atomic_load(launch + WORD * MADE)
    if made != 0 and driver(settings, QUERY_EVENT, (made,)) == NOT_READY:
        return False
    if atomic_load(lane + WORD * COMPUTES) == 0:
        return True
    return driver(settings, QUERY_STREAM, (atomic_load(lane + WORD * STREAM),)) != NOT_READY


@njit
def start(lane: int, thread: int, settings: int) -> None:
    """Launches a lane's next row, or the batch that it is of once that is complete.

    The lock, if there is one, is held until it has landed. Members of a batch that was launched are
    only taken from the ring.
    """
    row, batch = row_of(lane, atomic_load(lane + WORD * TAKEN)), batch_of(lane)
    if batch != 0 and is_launched(batch):
        take_member(lane, row, batch)
        return
    if batch != 0 and not completes(lane, batch):
        return
    atomic_store(thread + WORD * PAUSE, SHORTEST_NS)
    error = -lock(thread, settings)
    if error == 0 and atomic_load(settings + WORD * LOCK):
        atomic_store(thread + WORD * HELD, rows_of(batch))
    if batch != 0:
        launch_batch(lane, batch, error, thread, settings)
    else:
        launch_row(lane, row, error, thread, settings)
    pass_turn(row, thread, settings)


@njit
def finish(lane: int, settings: int) -> None:
    """Takes down that a row has landed on a GPU, or has failed, and lets go of its lock."""
    thread = atomic_load(lane + WORD * LANE_THREAD)
    landed = atomic_load(lane + WORD * LANDED)
    launch = launch_of(lane, landed)
    error = atomic_load(launch + WORD * ERROR)
    land_row(lane, settings)
    leave_batch(launch)
    held = atomic_load(thread + WORD * HELD)
    if held > 0 and error >= 0:  # else it was the lock that failed
        atomic_store(thread + WORD * HELD, held - 1)
        if held == 1:
            unlock(settings)
    atomic_store(lane + WORD * LANDED, landed + 1)
    wake_loop(lane, settings)


@njit
def has_landed(lane: int, settings: int) -> bool:
    """Whether the first row on a lane that is in flight has landed, or has failed."""
    landed = atomic_load(lane + WORD * LANDED)
    if landed == atomic_load(lane + WORD * TAKEN):
        return False
    if atomic_load(settings + WORD * FAILED):
        return True
    launch = launch_of(lane, landed)
    counter = atomic_load(atomic_load(launch + WORD * LANDS_ON) + WORD * COUNTER)
    return bool(atomic_load(counter) >= atomic_load(launch + WORD * LANDS_WITH))


@njit
def land_row(lane: int, settings: int) -> None:
    """Takes down what became of the first row in flight on a lane."""
    landed = atomic_load(lane + WORD * LANDED)
    row, launch = row_of(lane, landed), launch_of(lane, landed)
    error = atomic_load(launch + WORD * ERROR)
    if error == 0:
        error = atomic_load(settings + WORD * FAILED)
    if error < 0:
        atomic_store(row + WORD * OUTCOME, error)
    elif error > 0:
        atomic_store(row + WORD * OUTCOME, -error - DRIVER_ERRORS)
    else:
        found = atomic_load(launch + WORD * FOUND)
        outcome = DONE if found == 0 else atomic_load(found) & VERDICT_BITS
        if atomic_load(row + WORD * FORM):
            land(row, settings, outcome)
        else:
            atomic_store(row + WORD * OUTCOME, outcome)
    thread = atomic_load(lane + WORD * LANE_THREAD)
    atomic_store(row + WORD * LANDED_NS, now(thread))
    atomic_store(thread + WORD * PAUSE, SHORTEST_NS)


@njit
def sleep(thread: int, settings: int) -> bool:
    """Sleeps for a while, or until it is woken, if rows are in flight; whether it has.

    Under a lock rows wait to be launched too: nobody sends word when their gradients are made.
    """
    waits = False
    for index in range(atomic_load(thread + WORD * LANE_COUNT)):
        lane = lane_of(thread, index)
        locked = atomic_load(settings + WORD * LOCK) != 0
        last = atomic_load(lane + WORD * (LAUNCHED if locked else TAKEN))
        if atomic_load(lane + WORD * LANDED) != last:
            waits = True
            if atomic_load(thread + WORD * PAUSE) >= LONGEST_NS:
                look_for_failure(lane, settings)
    if waits:
        sleep_for_a_while(thread)
    return waits


@njit
def look_for_failure(lane: int, settings: int) -> None:
    """Asks a lane's stream whether the device has failed: no counter would ever say so."""
    error = driver(settings, QUERY_STREAM, (atomic_load(lane + WORD * STREAM),))
    if error != 0 and error != NOT_READY:
        atomic_store(settings + WORD * FAILED, error)


@njit
def sleep_for_a_while(thread: int) -> None:
    """Sleeps until it is woken, or some time has gone by; longer each time that nothing lands."""
    pause = min(max(atomic_load(thread + WORD * PAUSE), SHORTEST_NS), LONGEST_NS)
    atomic_store(thread + WORD * PAUSE, 2 * pause)
    atomic_store(thread + WORD * TIME, 0)
    atomic_store(thread + WORD * (TIME + 1), pause)
    poll(thread + WORD * POLLED, 1, thread + WORD * TIME, 0)


@cache
def device_functions() -> Any:
    """Compiles what the loop calls: int64, shape (``DEVICE_FUNCTIONS``,), their addresses."""
    word, addresses = types.int64, np.zeros(DEVICE_FUNCTIONS, np.int64)
    _compiled.extend(
        cfunc(word(*[word] * arguments))(function)
        for function, arguments in ((_land, 2), (_may_start, 3), (_start, 3), (_sleep, 2))
    )
    addresses[[LAND, MAY_START, START, SLEEP]] = [each.address for each in _compiled]
    return addresses


_compiled: list[Any] = []  # which must live as long as their addresses are called


def _land(thread: int, settings: int) -> int:
    return 1 if land_all(thread, settings) else 0


def _may_start(lane: int, thread: int, settings: int) -> int:
    return 1 if may_start(lane, thread, settings) else 0


def _start(lane: int, thread: int, settings: int) -> int:
    start(lane, thread, settings)
    return 0


def _sleep(thread: int, settings: int) -> int:
    return 1 if sleep(thread, settings) else 0


def compile_for_lanes() -> None:
    """Compiles what is called from Python, besides the loop."""
    device_functions()
    word = types.int64
    for function, arguments in ((submit, 5), (record, 3), (watch, 3)):
        compiled: Any = function
        compiled.compile((word,) * arguments)
