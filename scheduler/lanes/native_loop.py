"""What a thread of lanes does, compiled: takes rows from rings in memory, and has them done.

It never holds the GIL. On a CPU a thread serves one lane, and applies each row's update. On a GPU
one thread serves all lanes; a row is a launch there, and has landed when the device has said so:
that is up to functions which the loop calls by address, those of ``cuda_loop``. While a thread has
work, launching more is a write to memory; a system call is made only to wake a thread that sleeps,
or an event loop that does.

This module needs Numba. ``rings`` says what is where in memory.
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
from hogstream.kernels.launch_table import (
    ELEMENTS,
    GRAD,
    GRAD_AVG,
    MOMENTUM_BUFFER,
    MS,
    PARAM,
)
from hogstream.kernels.verdicts import NONFINITE
from hogstream.scheduler.lanes.process_lock import LOCK_RECOVERIES
from hogstream.scheduler.lanes.rings import (
    ASLEEP,
    BLOCK,
    BLOCKS,
    BYTES,
    COPIER,
    DEVICE,
    DONE,
    FACTOR_WORDS,
    FACTORS,
    FINITE,
    FIRST_LANE,
    FLAT,
    FORM,
    LAND,
    LANDED,
    LANDED_NS,
    LANE_COUNT,
    LANE_THREAD,
    LANES,
    LAUNCHED,
    LOCK,
    MAY_START,
    NEXT,
    OUTCOME,
    OWN_FACTORS,
    OWNERS,
    OWNERS_MASK,
    PARTS,
    RACES,
    READ_VERSION,
    SLEEP,
    SOURCE,
    STALENESS,
    STALENESS_AWARE,
    START,
    STARTED,
    STOP,
    TAKEN,
    THREAD_EVENT,
    TICKET,
    TIME,
    UPDATE,
    WOKEN,
    WORD,
    land,
    now,
    of_part,
    row_of,
    version,
    wake,
    wake_loop,
)

_CLOCK_REALTIME = 0
# An idle thread gives way to others this often, about 50 us, before it sleeps.
_YIELDS = 50

_OWNER_DEAD, _TIMED_OUT = errno.EOWNERDEAD, errno.ETIMEDOUT

_yield: Any = types.ExternalFunction("sched_yield", types.int32())
_read: Any = types.ExternalFunction("read", types.int64(types.int32, types.int64, types.int64))
_copy: Any = types.ExternalFunction("memcpy", types.int64(types.int64, types.int64, types.int64))
_clock: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_timed_lock: Any = types.ExternalFunction(
    "pthread_mutex_timedlock", types.int32(types.int64, types.int64)
)
_consistent: Any = types.ExternalFunction("pthread_mutex_consistent", types.int32(types.int64))
_unlock: Any = types.ExternalFunction("pthread_mutex_unlock", types.int32(types.int64))


@njit
def launch(lane: int, launched: int) -> None:
    """Makes rows visible to a lane's thread, and wakes that if it sleeps.

    Args:
        lane: Its address.
        launched: How many rows have been launched on it since it was opened.
    """
    atomic_store(lane + WORD * LAUNCHED, launched)
    wake(atomic_load(lane + WORD * LANE_THREAD))


@njit
def landed(lane: int) -> Any:
    """How many rows of a lane have landed; what was done for them can be seen then."""
    return atomic_load(lane + WORD * LANDED)


@njit
def listen(settings: int) -> None:
    """From here on, the next update to land wakes the event loop."""
    atomic_exchange(settings + WORD * WOKEN, 0)


@njit
def run(thread: int, settings: int) -> None:
    """The loop of a thread: returns when it is told to stop and has nothing left to do.

    Args:
        thread: Its address.
        settings: Their address.
    """
    yields = _YIELDS
    while True:
        if serve(thread, settings):
            yields = _YIELDS
        elif atomic_load(settings + WORD * STOP) and not has_rows(thread):
            return
        elif yields > 0:
            yields -= 1
            _yield()
        else:
            sleep(thread, settings)
            yields = _YIELDS


@njit
def serve(thread: int, settings: int) -> Any:
    """Lands what has landed on the lanes, and starts a row of each; whether there was anything."""
    count = atomic_load(thread + WORD * LANE_COUNT)
    device = atomic_load(settings + WORD * DEVICE)
    did = device != 0 and call(atomic_load(device + WORD * LAND), (thread, settings)) != 0
    first = atomic_load(thread + WORD * FIRST_LANE)
    for index in range(count):
        lane = lane_of(thread, (first + index) % count)
        if may_start(lane, thread, settings):
            start(lane, thread, settings)
            # Who has had its turn under a lock is the last to have it again.
            atomic_store(thread + WORD * FIRST_LANE, (first + index + 1) % count)
            did = True
    return did


@njit
def lane_of(thread: int, index: int) -> Any:
    """The address of a thread's lane."""
    return atomic_load(atomic_load(thread + WORD * LANES) + WORD * index)


@njit
def has_rows(thread: int) -> bool:
    """Whether there are rows on a thread's lanes that have not landed."""
    for index in range(atomic_load(thread + WORD * LANE_COUNT)):
        lane = lane_of(thread, index)
        if atomic_load(lane + WORD * LAUNCHED) != atomic_load(lane + WORD * LANDED):
            return True
    return False


@njit
def may_start(lane: int, thread: int, settings: int) -> Any:
    """Whether a lane has a row to start, whose turn it is."""
    taken = atomic_load(lane + WORD * TAKEN)
    if atomic_load(lane + WORD * LAUNCHED) == taken:
        return False
    device = atomic_load(settings + WORD * DEVICE)
    if device != 0:
        return call(atomic_load(device + WORD * MAY_START), (lane, thread, settings)) != 0
    return is_turn(row_of(lane, taken), settings)


@njit
def is_turn(row: int, settings: int) -> bool:
    """Whether all rows with an earlier ticket have landed, or on a GPU have been launched."""
    if atomic_load(settings + WORD * OWNERS) == 0 or atomic_load(settings + WORD * STOP):
        return True
    return bool(atomic_load(settings + WORD * NEXT) == atomic_load(row + WORD * TICKET))


@njit
def start(lane: int, thread: int, settings: int) -> None:
    """Takes a lane's next row from the ring: applies it, or launches it on a GPU."""
    device = atomic_load(settings + WORD * DEVICE)
    if device != 0:
        call(atomic_load(device + WORD * START), (lane, thread, settings))
        return
    taken = atomic_load(lane + WORD * TAKEN)
    row = row_of(lane, taken)
    error = lock(thread, settings)
    atomic_store(row + WORD * STARTED, now(thread))
    if error != 0:
        atomic_store(row + WORD * OUTCOME, -error)
    elif atomic_load(row + WORD * FORM) == 0:
        take_snapshot(row, settings)
    else:
        land(row, settings, apply(row, thread, settings))
    if error == 0:
        unlock(settings)
    atomic_store(lane + WORD * TAKEN, taken + 1)
    atomic_store(row + WORD * LANDED_NS, now(thread))
    atomic_store(lane + WORD * LANDED, taken + 1)
    pass_turn(row, thread, settings)
    wake_loop(lane, settings)


@njit
def take_snapshot(row: int, settings: int) -> None:
    """Copies parameters; the version that the copy holds at least is its staleness."""
    atomic_store(row + WORD * OUTCOME, DONE)
    atomic_store(row + WORD * STALENESS, version(settings))
    source, copier = atomic_load(row + WORD * SOURCE), atomic_load(row + WORD * COPIER)
    if copier != 0:
        call(copier, (source,))
    else:
        _copy(source, atomic_load(settings + WORD * FLAT), atomic_load(settings + WORD * BYTES))


@njit
def apply(row: int, thread: int, settings: int) -> int:
    """Applies the update of a row, and returns its outcome."""
    if not is_finite(row, settings):
        return NONFINITE
    form = atomic_load(row + WORD * FORM)
    factors = form + WORD * FACTORS
    if atomic_load(settings + WORD * STALENESS_AWARE):
        stale = version(settings) - atomic_load(row + WORD * READ_VERSION)
        own = thread + WORD * OWN_FACTORS
        _copy(own, factors, WORD * FACTOR_WORDS)
        divide_lr(own, max(stale, 1))
        factors = own
    for part in range(atomic_load(row + WORD * PARTS)):
        call(
            atomic_load(form + WORD * UPDATE),
            (
                of_part(row, PARAM, part),
                of_part(row, GRAD, part),
                of_part(row, MS, part),
                of_part(row, GRAD_AVG, part),
                of_part(row, MOMENTUM_BUFFER, part),
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
def divide_lr(factors: int, divisor: int) -> None:
    """Divides ``lr`` among the factors, in the order of ``Factors``, and what depends on it."""
    lr, weight_decay, shrink = factors, factors + 4 * WORD, factors + 5 * WORD
    float_store(lr, float_load(lr) / divisor)
    if float_load(shrink) != 1.0:
        float_store(shrink, 1.0 - float_load(lr) * float_load(weight_decay))


@njit
def pass_turn(row: int, thread: int, settings: int) -> None:
    """Lets the next in order go on, if there is an order."""
    owners = atomic_load(settings + WORD * OWNERS)
    if owners == 0:
        return
    following = atomic_load(row + WORD * TICKET) + 1
    atomic_store(settings + WORD * NEXT, following)
    owner = atomic_load(owners + WORD * (following & atomic_load(settings + WORD * OWNERS_MASK)))
    if owner != 0 and owner != thread:
        wake(owner)  # in vain, if the ticket is not handed out yet


@njit
def sleep(thread: int, settings: int) -> None:
    """Sleeps until there may be something to do: for a while only, if the device has rows."""
    atomic_store(thread + WORD * ASLEEP, 1)
    # Whoever launches, stops or has had the turn before from here on sees that it sleeps, and sends
    # the event.
    if not has_work(thread, settings):
        device = atomic_load(settings + WORD * DEVICE)
        for_a_while = device != 0 and call(atomic_load(device + WORD * SLEEP), (thread, settings))
        if for_a_while and atomic_exchange(thread + WORD * ASLEEP, 0):
            return  # nobody has sent it
    elif atomic_exchange(thread + WORD * ASLEEP, 0):
        return
    _read(atomic_load(thread + WORD * THREAD_EVENT), thread + WORD * TIME, WORD)


@njit
def has_work(thread: int, settings: int) -> bool:
    """Whether a thread has a row to start, or is told to stop and has none that has not landed."""
    if atomic_load(settings + WORD * STOP) and not has_rows(thread):
        return True
    for index in range(atomic_load(thread + WORD * LANE_COUNT)):
        if may_start(lane_of(thread, index), thread, settings):
            return True
    return False


@njit
def lock(thread: int, settings: int) -> Any:
    """Takes the lock that updates hold, if there is one; 0 or an error."""
    mutex = atomic_load(settings + WORD * LOCK)
    if mutex == 0:
        return 0
    until = thread + WORD * TIME
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
