"""How a row is launched on a GPU: by the driver's functions, without Python.

A launch waits, on its lane's stream, for the stream that made the gradient; and after the kernels
the stream writes a number to a counter in pinned memory.

The driver has one lock. A thread that meets another there sleeps, which takes longer than all that
a launch needs: 15 us on an H200, where the call takes 0.2 us. So the loop calls the driver, and who
submits does not if the default stream is current: the loop records the event, as soon as it notices
the row. Another stream may be captured a moment later, so who submits has to record there.

This module needs Numba. ``rings`` says what is where in memory.
"""

from __future__ import annotations

from typing import Any

from hogstream.kernels.backends.numba_atomics import atomic_load, atomic_store
from hogstream.kernels.backends.numba_compile import njit
from hogstream.scheduler.lanes.cuda_calls import driver
from hogstream.scheduler.lanes.cuda_dense_update import update_all
from hogstream.scheduler.lanes.cuda_driver import (
    CAPTURED,
    COPY_ON_DEVICE,
    IS_CAPTURING,
    POP_CONTEXT,
    PUSH_CONTEXT,
    RECORD_EVENT,
    SYNCHRONIZE,
    WAIT_EVENT,
    WRITE_VALUE,
)
from hogstream.scheduler.lanes.cuda_row_update import copy_rows, update_rows
from hogstream.scheduler.lanes.rings import (
    BYTES,
    CAPTURING,
    CONTEXT,
    COPIER,
    COUNTER_ON_DEVICE,
    DONE,
    FAILED,
    FLAT,
    FORM,
    LANE_EVENT,
    LANE_THREAD,
    LAST,
    LAUNCHED,
    LAUNCHES,
    MASK,
    NUMBER,
    OWNERS,
    POPPED,
    SOURCE,
    STALENESS,
    STARTED,
    STREAM,
    TAIL,
    TAKEN,
    UPDATE,
    WORD,
    now,
    version,
    wake,
)

#: What a row needs besides, on a GPU: the event behind what made its gradient, or 0; the number
#: that it has landed with, and the lane whose counter has it; where in pinned memory its verdict
#: comes, or 0 in a batch of which nobody asks; the batch that it is launched with, or 0; events
#: before and behind it whose times are taken, or 0; the error of the driver that it failed with, or
#: 0; whether that first event is still to be recorded; and where its verdict comes when it is
#: launched alone.
MADE, LANDS_WITH, LANDS_ON, FOUND, BATCH, BEGAN, ENDED, ERROR, UNRECORDED, FOUND_ALONE = range(10)
LAUNCH = 10

#: The default stream, which nobody can capture.
DEFAULT_STREAM = 0


@njit
def submit(lane: int, launched: int, settings: int, event: int, maker: int) -> None:
    """Records an event behind what makes a gradient, then launches a row as ``launch`` does.

    It is for the thread that submits; the context need not be current there. If the driver refuses,
    the row fails with its error.

    Args:
        lane: Its address.
        launched: How many rows have been launched on it since it was opened.
        settings: Their address.
        event: The event.
        maker: The stream.
    """
    atomic_store(launch_of(lane, launched - 1) + WORD * ERROR, record(settings, event, maker))
    atomic_store(lane + WORD * LAUNCHED, launched)
    wake(atomic_load(lane + WORD * LANE_THREAD))


@njit
def record(settings: int, event: int, stream: int) -> Any:
    """Records an event, whatever context is current, unless in a capture; 0 or an error."""
    error = driver(settings, PUSH_CONTEXT, (atomic_load(settings + WORD * CONTEXT),))
    if error != 0:
        return error
    if stream != DEFAULT_STREAM:
        # An event of a capture would draw the lane's stream into that, and the update with it.
        captured = settings + WORD * CAPTURING
        error = driver(settings, IS_CAPTURING, (stream, captured))
        if error == 0 and atomic_load(captured) != 0:
            error = CAPTURED
    if error == 0:
        error = driver(settings, RECORD_EVENT, (event, stream))
    popped = driver(settings, POP_CONTEXT, (settings + WORD * POPPED,))
    return error if error != 0 else popped


@njit
def launch_of(lane: int, index: int) -> Any:
    """The address of what a lane's row needs besides, by how many rows came before it."""
    place = index & atomic_load(lane + WORD * MASK)
    return atomic_load(lane + WORD * LAUNCHES) + WORD * LAUNCH * place


@njit
def launch_row(lane: int, row: int, error: int, thread: int, settings: int) -> None:
    """Launches a row, or has it fail; either way it is taken from the ring, and will land.

    Args:
        lane: Its lane.
        row: The row.
        error: What it fails with, if it does.
        thread: Of the lane.
        settings: Of the lanes.
    """
    taken = atomic_load(lane + WORD * TAKEN)
    launch = launch_of(lane, taken)
    atomic_store(row + WORD * STARTED, now(thread))
    if error == 0:
        error = atomic_load(launch + WORD * ERROR)
    if error == 0:
        error = enqueue_row(lane, row, launch, thread, settings)
        if error != 0:
            settle(lane, settings)
    atomic_store(launch + WORD * ERROR, error)
    atomic_store(launch + WORD * LANDS_WITH, atomic_load(lane + WORD * NUMBER))
    atomic_store(launch + WORD * LANDS_ON, lane)
    atomic_store(lane + WORD * TAKEN, taken + 1)


@njit
def enqueue_row(lane: int, row: int, launch: int, thread: int, settings: int) -> Any:
    """Gives the driver all that a row needs, in the order of its stream; 0 or an error."""
    error = atomic_load(settings + WORD * FAILED)
    if error == 0:
        error = follow(lane, atomic_load(launch + WORD * MADE), settings)
    if error == 0:
        error = take_time(lane, atomic_load(launch + WORD * BEGAN), settings)
    if error == 0:
        found = atomic_load(launch + WORD * FOUND)
        atomic_store(found, DONE)
        if atomic_load(row + WORD * FORM):
            error = update(lane, row, found, thread, settings)
        else:
            error = copy(lane, row, found, thread, settings)
    if error == 0:
        error = take_time(lane, atomic_load(launch + WORD * ENDED), settings)
    if error == 0 and atomic_load(settings + WORD * OWNERS):
        error = record_lane(lane, settings)
        atomic_store(settings + WORD * LAST, lane)
    return error if error != 0 else count_on(lane, settings)


@njit
def follow(lane: int, made: int, settings: int) -> Any:
    """Has a lane's stream wait for what made a gradient, and for its turn; 0 or an error."""
    error = 0
    if made != 0:
        error = wait_for(lane, made, settings)
    last = atomic_load(settings + WORD * LAST)
    if error == 0 and last != 0 and last != lane:
        error = wait_for(lane, atomic_load(last + WORD * LANE_EVENT), settings)
    tail = atomic_load(lane + WORD * TAIL)
    if error == 0 and tail != 0:
        error = wait_for(lane, atomic_load(tail + WORD * LANE_EVENT), settings)
        if error == 0:  # else the next row waits
            atomic_store(lane + WORD * TAIL, 0)
    return error


@njit
def wait_for(lane: int, event: int, settings: int) -> Any:
    """Has a lane's stream wait for an event; 0 or an error."""
    return driver(settings, WAIT_EVENT, (atomic_load(lane + WORD * STREAM), event, 0))


@njit
def record_lane(lane: int, settings: int) -> Any:
    """Records a lane's own event, behind all on its stream; 0 or an error."""
    event, stream = atomic_load(lane + WORD * LANE_EVENT), atomic_load(lane + WORD * STREAM)
    return driver(settings, RECORD_EVENT, (event, stream))


@njit
def take_time(lane: int, event: int, settings: int) -> Any:
    """Records an event for its time, if there is one; 0 or an error."""
    if event == 0:
        return 0
    return driver(settings, RECORD_EVENT, (event, atomic_load(lane + WORD * STREAM)))


@njit
def count_on(lane: int, settings: int) -> Any:
    """Has a lane's counter go on, behind all on its stream; 0 or an error."""
    number = atomic_load(lane + WORD * NUMBER) + 1
    stream, counter = (
        atomic_load(lane + WORD * STREAM),
        atomic_load(lane + WORD * COUNTER_ON_DEVICE),
    )
    error = driver(settings, WRITE_VALUE, (stream, counter, number, 0))
    if error == 0:
        atomic_store(lane + WORD * NUMBER, number)
    return error


@njit
def settle(lane: int, settings: int) -> None:
    """Waits for what a launch that failed has left on the stream: it may read the gradient."""
    driver(settings, SYNCHRONIZE, (atomic_load(lane + WORD * STREAM),))


@njit
def update(lane: int, row: int, found: int, thread: int, settings: int) -> Any:
    """Launches an update, of rows or of more; 0 or an error.

    Args:
        lane: Its lane.
        row: Its row.
        found: Where in pinned memory its verdict comes, if there is one.
        thread: Of the lane.
        settings: Of the lanes.
    """
    if atomic_load(atomic_load(row + WORD * FORM) + WORD * UPDATE):
        return update_all(lane, row, found, thread, settings)
    return update_rows(lane, row, found, thread, settings)


@njit
def copy(lane: int, row: int, found: int, thread: int, settings: int) -> Any:
    """Copies parameters; the version that the copy holds at least is its staleness."""
    atomic_store(row + WORD * STALENESS, version(settings))
    if atomic_load(row + WORD * COPIER):
        return copy_rows(lane, row, found, thread, settings)
    source, size = atomic_load(settings + WORD * FLAT), atomic_load(settings + WORD * BYTES)
    target, stream = atomic_load(row + WORD * SOURCE), atomic_load(lane + WORD * STREAM)
    return driver(settings, COPY_ON_DEVICE, (target, source, size, stream))
