"""How events of CUDA are asked for, by who waits for them, without the GIL.

This module needs Numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from hogstream.kernels.backends.numba_atomics import atomic_load, atomic_store, call
from hogstream.kernels.backends.numba_compile import njit
from hogstream.scheduler.lanes.cuda_driver import NOT_READY, POP_CONTEXT, PUSH_CONTEXT, QUERY_EVENT
from hogstream.scheduler.lanes.rings import WORD

#: An event that somebody waits for: the driver's functions, the context and the event; whether it
#: is done, and the error that it failed with, or 0; and space for a context.
OF_TABLE, OF_CONTEXT, EVENT, IS_DONE, EVENT_ERROR, EVENT_POPPED = range(6)
WATCHED = 6


#: Between two looks at what is not done a thread sleeps from this to that many nanoseconds.
SHORTEST_NS, LONGEST_NS = 10_000, 1_000_000

poll: Any = types.ExternalFunction(
    "ppoll", types.int32(types.int64, types.int64, types.int64, types.int64)
)


@njit
def watch(events: int, count: int, changed: int) -> None:
    """Asks for events until one is done, or others are to be asked for.

    Args:
        events: Address of ``WATCHED`` words for each.
        count: How many there are.
        changed: Address of a word that is set when others are.
    """
    pause, done = SHORTEST_NS, False
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
            poll(0, 0, time.ctypes.data, 0)
            pause = min(2 * pause, LONGEST_NS)


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
