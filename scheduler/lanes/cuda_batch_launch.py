"""How a batch is launched on a GPU: updates of one lane or several, as one graph.

It goes down the stream of the lane that comes to it last, behind what its other lanes have been
given before; what those are given later goes behind it.

This module needs Numba.
"""

from __future__ import annotations

from typing import Any

from hogstream.kernels.backends.numba_atomics import atomic_load, atomic_store
from hogstream.kernels.backends.numba_compile import njit
from hogstream.scheduler.lanes.cuda_calls import driver
from hogstream.scheduler.lanes.cuda_driver import COPY_TO_HOST, LAUNCH_GRAPH
from hogstream.scheduler.lanes.cuda_launch import (
    BATCH,
    ERROR,
    FOUND,
    FOUND_ALONE,
    LANDS_ON,
    LANDS_WITH,
    count_on,
    follow,
    launch_of,
    record_lane,
    settle,
    take_time,
    wait_for,
)
from hogstream.scheduler.lanes.rings import (
    COMPUTES,
    COUNTER,
    FAILED,
    LANE_EVENT,
    LAST,
    NUMBER,
    OWNERS,
    STARTED,
    STREAM,
    TAIL,
    TAKEN,
    WAITS,
    WORD,
    now,
)

#: Updates of several lanes that are launched as one graph: the graph, how many rows and lanes it
#: has, and an array of those lanes; how many of these have come to it; the events behind what made
#: the gradients, and how many; where verdicts are found and where they come, 8 bytes each, or 0;
#: whether it was launched, its number and the lane that it was launched on, when, and the error;
#: events whose times are taken, or 0; and how many of its rows have landed.
GRAPH, BATCH_ROWS, BATCH_LANES, BATCH_LANE_ADDRESSES, ARRIVED = range(5)
MADE_EVENTS, MADE_COUNT, VERDICTS, FOUND_VERDICTS = range(5, 9)
IS_LAUNCHED, BATCH_NUMBER, BATCH_ON, BATCH_STARTED, BATCH_ERROR = range(9, 14)
BATCH_TIMES = 14
BATCH_LANDED = 16
BATCH_WORDS = 17


@njit
def batch_of(lane: int) -> Any:
    """The batch that a lane's next row is of; 0 if none."""
    return atomic_load(launch_of(lane, atomic_load(lane + WORD * TAKEN)) + WORD * BATCH)


@njit
def rows_of(batch: int) -> Any:
    """How many rows are launched together with one: those of its batch, or that alone."""
    return 1 if batch == 0 else atomic_load(batch + WORD * BATCH_ROWS)


@njit
def is_launched(batch: int) -> bool:
    """Whether a batch has been."""
    return bool(atomic_load(batch + WORD * IS_LAUNCHED) != 0)


@njit
def completes(lane: int, batch: int) -> bool:
    """Whether a lane is the last to come to a batch; else it waits there for the others."""
    arrived = atomic_load(batch + WORD * ARRIVED) + 1
    atomic_store(batch + WORD * ARRIVED, arrived)
    if arrived == atomic_load(batch + WORD * BATCH_LANES):
        return True
    atomic_store(lane + WORD * WAITS, 1)
    return False


@njit
def launch_batch(lane: int, batch: int, error: int, thread: int, settings: int) -> None:
    """Launches a batch on a lane's stream, or has it fail; its rows can be taken then.

    Args:
        lane: On whose stream.
        batch: The batch.
        error: What it fails with, if it does.
        thread: Of the lane.
        settings: Of the lanes.
    """
    atomic_store(batch + WORD * BATCH_STARTED, now(thread))
    if error == 0:
        error = atomic_load(batch + WORD * BATCH_ERROR)
    if error == 0:
        error = enqueue_batch(lane, batch, settings)
        if error != 0:
            settle(lane, settings)
    atomic_store(batch + WORD * BATCH_ERROR, error)
    atomic_store(batch + WORD * BATCH_NUMBER, atomic_load(lane + WORD * NUMBER))
    atomic_store(batch + WORD * BATCH_ON, lane)
    atomic_store(batch + WORD * IS_LAUNCHED, 1)


@njit
def enqueue_batch(lane: int, batch: int, settings: int) -> Any:
    """Gives the driver all that a batch needs, in the order of a lane's stream; 0 or an error."""
    stream = atomic_load(lane + WORD * STREAM)
    error = atomic_load(settings + WORD * FAILED)
    if error == 0:
        error = follow(lane, 0, settings)
    for index in range(atomic_load(batch + WORD * MADE_COUNT)):
        if error == 0:
            events = atomic_load(batch + WORD * MADE_EVENTS)
            error = wait_for(lane, atomic_load(events + WORD * index), settings)
    for index in range(atomic_load(batch + WORD * BATCH_LANES)):
        if error == 0:
            error = follow_lane(lane, lane_of_batch(batch, index), settings)
    if error == 0:
        error = take_time(lane, atomic_load(batch + WORD * BATCH_TIMES), settings)
    if error == 0:
        error = driver(settings, LAUNCH_GRAPH, (atomic_load(batch + WORD * GRAPH), stream))
    found, verdicts = (
        atomic_load(batch + WORD * FOUND_VERDICTS),
        atomic_load(batch + WORD * VERDICTS),
    )
    if error == 0 and found != 0:
        size = WORD * atomic_load(batch + WORD * BATCH_ROWS)
        error = driver(settings, COPY_TO_HOST, (found, verdicts, size, stream))
    if error == 0:
        error = take_time(lane, atomic_load(batch + WORD * (BATCH_TIMES + 1)), settings)
    if error == 0:
        error = lead(lane, batch, settings)
    return error if error != 0 else count_on(lane, settings)


@njit
def lane_of_batch(batch: int, index: int) -> Any:
    """The address of one of a batch's lanes."""
    return atomic_load(atomic_load(batch + WORD * BATCH_LANE_ADDRESSES) + WORD * index)


@njit
def follow_lane(lane: int, other: int, settings: int) -> Any:
    """Has a lane's stream wait for what another lane was given before; 0 or an error."""
    if other == lane:
        return 0
    error = 0
    tail = atomic_load(other + WORD * TAIL)
    if tail != 0 and tail != lane:
        error = wait_for(lane, atomic_load(tail + WORD * LANE_EVENT), settings)
    counter = atomic_load(atomic_load(other + WORD * COUNTER))
    busy = counter != atomic_load(other + WORD * NUMBER) or atomic_load(other + WORD * COMPUTES)
    if error == 0 and busy:
        error = record_lane(other, settings)
        if error == 0:
            error = wait_for(lane, atomic_load(other + WORD * LANE_EVENT), settings)
    return error


@njit
def lead(lane: int, batch: int, settings: int) -> Any:
    """Has a batch's lanes, and who is next in order, wait for the lane that it is on."""
    error = record_lane(lane, settings)
    if error == 0 and atomic_load(settings + WORD * OWNERS):
        atomic_store(settings + WORD * LAST, lane)
    for index in range(atomic_load(batch + WORD * BATCH_LANES)):
        other = lane_of_batch(batch, index)
        if error == 0 and other != lane:
            atomic_store(other + WORD * TAIL, lane)
    return error


@njit
def take_member(lane: int, row: int, batch: int) -> None:
    """Takes a row from the ring that was launched with its batch."""
    taken = atomic_load(lane + WORD * TAKEN)
    launch = launch_of(lane, taken)
    atomic_store(row + WORD * STARTED, atomic_load(batch + WORD * BATCH_STARTED))
    atomic_store(launch + WORD * ERROR, atomic_load(batch + WORD * BATCH_ERROR))
    atomic_store(launch + WORD * LANDS_WITH, atomic_load(batch + WORD * BATCH_NUMBER))
    atomic_store(launch + WORD * LANDS_ON, atomic_load(batch + WORD * BATCH_ON))
    atomic_store(lane + WORD * WAITS, 0)
    atomic_store(lane + WORD * TAKEN, taken + 1)


@njit
def leave_batch(launch: int) -> None:
    """Takes a row that has landed out of its batch, if it is of one.

    Args:
        launch: What the row needs besides.
    """
    batch = atomic_load(launch + WORD * BATCH)
    if batch == 0:
        return
    atomic_store(launch + WORD * BATCH, 0)
    atomic_store(launch + WORD * FOUND, atomic_load(launch + WORD * FOUND_ALONE))
    landed = atomic_load(batch + WORD * BATCH_LANDED)
    atomic_store(batch + WORD * BATCH_LANDED, landed + 1)  # last: with all of them, it is free
