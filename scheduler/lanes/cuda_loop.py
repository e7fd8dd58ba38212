"""How the loop of lanes launches rows on a GPU, and sees them land: by the driver, without Python.

A launch waits, on its lane's stream, for the stream that made the gradient; and after the kernels
the stream writes a number to a counter in pinned memory. Once the counter has a row's number, the
row has landed: looking there costs a read of memory, where asking for an event costs a call of the
driver under its lock.

This module needs Numba. ``rings`` says what is where in memory, ``cuda_driver`` in which order the
driver's functions are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types

from hogstream.kernels.backends.numba_atomics import (
    atomic_load,
    atomic_store,
    call,
    float_load,
    float_store,
)
from hogstream.kernels.backends.numba_compile import cfunc, njit
from hogstream.kernels.launch_table import ELEMENTS, GRAD, MS, PARAM
from hogstream.scheduler.lanes.cuda_driver import (
    CAPTURED,
    COPY_ON_DEVICE,
    COPY_TO_HOST,
    IS_CAPTURING,
    LAUNCH_GRAPH,
    LAUNCH_KERNEL,
    NOT_READY,
    POP_CONTEXT,
    PUSH_CONTEXT,
    QUERY_EVENT,
    QUERY_STREAM,
    RECORD_EVENT,
    SET_MEMORY,
    SYNCHRONIZE,
    WAIT_EVENT,
    WRITE_VALUE,
)
from hogstream.scheduler.lanes.native_loop import is_turn, lane_of, lock, pass_turn, unlock
from hogstream.scheduler.lanes.rings import (
    ARGUMENT_ADDRESSES,
    ARGUMENTS,
    BYTES,
    CAPTURING,
    COMPUTES,
    CONTEXT,
    COUNTER,
    COUNTER_ON_DEVICE,
    DEVICE_FUNCTIONS,
    DONE,
    DRIVER,
    DRIVER_ERRORS,
    FACTORS,
    FAILED,
    FLAT,
    HELD,
    LAND,
    LANDED,
    LANDED_NS,
    LANE_COUNT,
    LANE_EVENT,
    LANE_THREAD,
    LAST,
    LAUNCHED,
    LAUNCHES,
    LOCK,
    MASK,
    MAY_START,
    NONFINITE,
    NUMBER,
    OUTCOME,
    OWNERS,
    PARTS,
    PAUSE,
    POLLED,
    POPPED,
    RACES,
    READ_VERSION,
    SLEEP,
    SOURCE,
    STALENESS,
    STALENESS_AWARE,
    START,
    STARTED,
    STREAM,
    TAIL,
    TAKEN,
    TIME,
    UPDATE,
    VERDICT,
    WAITS,
    WORD,
    land,
    now,
    of_part,
    row_of,
    version,
    wake,
    wake_loop,
)

#: What a row needs besides, on a GPU: the event behind what made its gradient, or 0; the number
#: that it has landed with, and the lane whose counter has it; where in pinned memory its verdict
#: comes; the batch that it is launched with, or 0; events before and behind it whose times are
#: taken, or 0; and the error of the driver that it failed with, or 0.
MADE, LANDS_WITH, LANDS_ON, FOUND, BATCH, BEGAN, ENDED, ERROR = range(8)
LAUNCH = 8

#: Updates of several lanes that are launched as one graph: the graph, how many rows and lanes it
#: has, and an array of those lanes; how many of these have come to it; the events behind what made
#: the gradients, and how many; where verdicts are found and where they come, 8 bytes each, or 0;
#: whether it was launched, its number and the lane that it was launched on, when, and the error.
GRAPH, BATCH_ROWS, BATCH_LANES, BATCH_LANE_ADDRESSES, ARRIVED = range(5)
MADE_EVENTS, MADE_COUNT, VERDICTS, FOUND_VERDICTS = range(5, 9)
IS_LAUNCHED, BATCH_NUMBER, BATCH_ON, BATCH_STARTED, BATCH_ERROR = range(9, 14)
BATCH_TIMES = 14
BATCH_WORDS = 16

#: A kernel of the update, and the one that looks whether gradients are finite, or 0: the driver's
#: handle, the threads of a program, its shared memory in bytes; and the elements of a program.
FUNCTION, THREADS, SHARED, FINITE_FUNCTION, FINITE_THREADS, FINITE_SHARED, PROGRAM = range(7)
KERNEL = 8

#: An event that somebody waits for: the driver's functions, the context and the event; whether it
#: is done, and the error that it failed with, or 0; and space for a context.
OF_TABLE, OF_CONTEXT, EVENT, IS_DONE, EVENT_ERROR, EVENT_POPPED = range(6)
WATCHED = 6

# Until rows land, their thread gives way, then sleeps from this to that many nanoseconds. When it
# sleeps longest it asks whether the device has failed.
_SHORTEST_NS, _LONGEST_NS = 10_000, 1_000_000

_POLLIN = 1

_poll: Any = types.ExternalFunction(
    "ppoll", types.int32(types.int64, types.int64, types.int64, types.int64)
)


@njit
def driver(settings: int, function: int, arguments: Any) -> Any:
    """Calls a function of the driver; 0 or its error."""
    table = atomic_load(settings + WORD * DRIVER)
    return call(atomic_load(table + WORD * function), arguments) & 0xFFFF_FFFF


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
def may_start(lane: int, thread: int, settings: int) -> bool:
    """Whether a lane may start the next of its rows, which is there."""
    batch = batch_of(lane)
    if batch != 0 and is_launched(batch):
        return True
    if atomic_load(thread + WORD * HELD) or atomic_load(lane + WORD * WAITS):
        return False
    return is_turn(row_of(lane, atomic_load(lane + WORD * TAKEN)), settings)


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
    land_row(lane, settings)
    held = atomic_load(thread + WORD * HELD)
    if held > 0:
        atomic_store(thread + WORD * HELD, held - 1)
        if held == 1:
            unlock(settings)
    atomic_store(lane + WORD * LANDED, atomic_load(lane + WORD * LANDED) + 1)
    wake_loop(lane, settings)


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
        if atomic_load(row + WORD * UPDATE):
            error = update(lane, row, launch, thread, settings)
        else:
            error = copy_parameters(lane, row, settings)
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
def copy_parameters(lane: int, row: int, settings: int) -> Any:
    """Copies the parameters; the version that the copy holds at least is its staleness."""
    atomic_store(row + WORD * OUTCOME, DONE)
    atomic_store(row + WORD * STALENESS, version(settings))
    source, size = atomic_load(settings + WORD * FLAT), atomic_load(settings + WORD * BYTES)
    target, stream = atomic_load(row + WORD * SOURCE), atomic_load(lane + WORD * STREAM)
    return driver(settings, COPY_ON_DEVICE, (target, source, size, stream))


@njit
def update(lane: int, row: int, launch: int, thread: int, settings: int) -> Any:
    """Launches an update, part by part, if its gradient is finite or nobody asks; 0 or an error."""
    kernel, stream = atomic_load(row + WORD * UPDATE), atomic_load(lane + WORD * STREAM)
    found = atomic_load(launch + WORD * FOUND)
    verdict = atomic_load(lane + WORD * VERDICT) if found != 0 else 0
    parts = atomic_load(row + WORD * PARTS)
    error = 0
    if found != 0:
        error = driver(settings, SET_MEMORY, (verdict, 0, 2, stream))
        for part in range(parts):
            if error == 0:
                set_finite_arguments(row, part, verdict, thread)
                error = launch_kernel(kernel, FINITE_FUNCTION, row, part, thread, settings, stream)
    for part in range(parts):
        if error == 0:
            set_update_arguments(row, part, verdict, thread, settings)
            error = launch_kernel(kernel, FUNCTION, row, part, thread, settings, stream)
    if error == 0 and found != 0:
        error = driver(settings, COPY_TO_HOST, (found, verdict, WORD, stream))
    return error


@njit
def set_finite_arguments(row: int, part: int, verdict: int, thread: int) -> None:
    """What ``finite_kernel`` takes."""
    arguments = thread + WORD * ARGUMENTS
    atomic_store(arguments, of_part(row, GRAD, part))
    atomic_store(arguments + WORD, of_part(row, ELEMENTS, part))
    atomic_store(arguments + 2 * WORD, verdict)
    for place in range(3, 5):  # the scratch that every kernel of Triton's takes
        atomic_store(arguments + place * WORD, 0)


@njit
def set_update_arguments(row: int, part: int, verdict: int, thread: int, settings: int) -> None:
    """What ``rmsprop_kernel`` takes."""
    arguments = thread + WORD * ARGUMENTS
    atomic_store(arguments, of_part(row, PARAM, part))
    atomic_store(arguments + WORD, of_part(row, GRAD, part))
    atomic_store(arguments + 2 * WORD, of_part(row, MS, part))
    atomic_store(arguments + 3 * WORD, of_part(row, ELEMENTS, part))
    for place in range(STARTED - FACTORS):
        factor = atomic_load(row + WORD * (FACTORS + place))
        atomic_store(arguments + WORD * (4 + place), factor)
    if atomic_load(settings + WORD * STALENESS_AWARE):
        stale = version(settings) - atomic_load(row + WORD * READ_VERSION)
        lr = arguments + 4 * WORD
        float_store(lr, float_load(lr) / max(stale, 1))
    atomic_store(arguments + 11 * WORD, verdict)
    atomic_store(arguments + 12 * WORD, atomic_load(settings + WORD * RACES))
    for place in range(13, 15):  # the scratch that every kernel of Triton's takes
        atomic_store(arguments + place * WORD, 0)


@njit
def launch_kernel(
    kernel: int, which: int, row: int, part: int, thread: int, settings: int, stream: int
) -> Any:
    """Launches one of a row's two kernels with the arguments that are set; 0 or an error."""
    program = atomic_load(kernel + WORD * PROGRAM)
    programs = (of_part(row, ELEMENTS, part) + program - 1) // program
    if programs == 0:
        return 0
    function = atomic_load(kernel + WORD * which)
    threads = atomic_load(kernel + WORD * (which + THREADS))
    shared = atomic_load(kernel + WORD * (which + SHARED))
    arguments = thread + WORD * ARGUMENT_ADDRESSES
    return driver(
        settings,
        LAUNCH_KERNEL,
        (function, programs, 1, 1, threads, 1, 1, shared, stream, arguments, 0),
    )


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
    elif atomic_load(row + WORD * UPDATE):
        found = atomic_load(launch + WORD * FOUND)
        left_out = found != 0 and atomic_load(found) != 0
        land(row, settings, NONFINITE if left_out else DONE)
    thread = atomic_load(lane + WORD * LANE_THREAD)
    atomic_store(row + WORD * LANDED_NS, now(thread))
    atomic_store(thread + WORD * PAUSE, _SHORTEST_NS)


@njit
def sleep(thread: int, settings: int) -> bool:
    """Sleeps for a while if rows are in flight, or until it is woken; whether it has."""
    waits = False
    for index in range(atomic_load(thread + WORD * LANE_COUNT)):
        lane = lane_of(thread, index)
        if atomic_load(lane + WORD * LANDED) != atomic_load(lane + WORD * TAKEN):
            waits = True
            if atomic_load(thread + WORD * PAUSE) >= _LONGEST_NS:
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
    pause = min(max(atomic_load(thread + WORD * PAUSE), _SHORTEST_NS), _LONGEST_NS)
    atomic_store(thread + WORD * PAUSE, 2 * pause)
    atomic_store(thread + WORD * TIME, 0)
    atomic_store(thread + WORD * (TIME + 1), pause)
    _poll(thread + WORD * POLLED, 1, thread + WORD * TIME, 0)


@njit
def watch(events: int, count: int, changed: int) -> None:
    """Asks for events until one is done, or others are to be asked for.

    Args:
        events: Address of ``WATCHED`` words for each.
        count: How many there are.
        changed: Address of a word that is set when others are.
    """
    pause, done = _SHORTEST_NS, False
    time = np.zeros(2, np.int64)
    while not done and not atomic_load(changed):
        for index in range(count):
            event = events + WORD * WATCHED * index
            error = query_event(event)
            if error != NOT_READY:
                atomic_store(event + WORD * EVENT_ERROR, error)
                atomic_store(event + WORD * IS_DONE, 1)
                done = True
        if not done:
            time[1] = pause
            _poll(0, 0, time.ctypes.data, 0)
            pause = min(2 * pause, _LONGEST_NS)


@njit
def query_event(event: int) -> Any:
    """Asks for one event, whatever context is current; 0 or an error."""
    table, context = atomic_load(event + WORD * OF_TABLE), atomic_load(event + WORD * OF_CONTEXT)
    error = call(atomic_load(table + WORD * PUSH_CONTEXT), (context,)) & 0xFFFF_FFFF
    if error != 0:
        return error
    handle = atomic_load(event + WORD * EVENT)
    error = call(atomic_load(table + WORD * QUERY_EVENT), (handle,)) & 0xFFFF_FFFF
    call(atomic_load(table + WORD * POP_CONTEXT), (event + WORD * EVENT_POPPED,))
    return error


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
    for function, arguments in ((submit, 5), (watch, 3)):
        compiled: Any = function
        compiled.compile((word,) * arguments)
