"""Lanes: in-order queues of updates that run beside each other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from hogstream.kernels.backends.select import Backend
from hogstream.kernels.race_counters import RaceCounters
from hogstream.scheduler.checks import check_loop
from hogstream.scheduler.lanes.mutex import Mutex, RowLocks
from hogstream.scheduler.lanes.process_lock import ProcessLock
from hogstream.scheduler.parameters import SharedParameters
from hogstream.scheduler.update import Update, Work

#: Called on the event loop with the index of a lane, and what has landed on it, in its order.
Deliver = Callable[[int, Sequence[Work]], None]


@dataclass(frozen=True)
class LaneSettings:
    """What is the same for all updates of a scheduler.

    Attributes:
        shared: What they update.
        backend: With which kernels.
        ordered: Each waits for the one submitted before it.
        staleness_aware: ``lr`` is divided by the staleness of the update, if that is above 1
            (Zhang et al. 2016, arXiv 1511.05950).
        check_finite: An update whose gradient holds an infinity or NaN is left out.
        races: Where races are counted, if they are.
        lock: Held by a lane around each update and snapshot, if there is one: against other lanes,
            and with a ``ProcessLock`` against other processes.
        row_locks: Of which a lane holds one around the update of a row, if there are some.
        low_water: A compiled lane wakes the event loop when no more updates than so many are left
            on it.
        graphs: On a GPU, updates that are launched together, and come again, are one CUDA graph.
        timed: A GPU takes the times of updates, which costs it something; for a timeline.
        inline: Compiled code applies an update on the thread that launches it, and it is delivered
            at once: for a single CPU lane whose worker would wait for each landing.
    """

    shared: SharedParameters
    backend: Backend
    ordered: bool = False
    staleness_aware: bool = False
    check_finite: bool = False
    races: RaceCounters | None = None
    lock: Mutex | ProcessLock | None = None
    row_locks: RowLocks | None = None
    low_water: int = 0
    graphs: bool = False
    timed: bool = False
    inline: bool = False


class Applier(Protocol):
    """Applies updates on the thread that computes them."""

    def apply(self, update: Update) -> None:
        """Applies an update as its lane would; it is not delivered.

        From any thread, but from one at a time.
        """


class Lane(Protocol):
    """An in-order queue of updates; a CPU thread or a CUDA stream.

    All methods are for the event loop's thread.
    """

    @property
    def applier(self) -> Applier | None:
        """What applies its worker's updates without going down the lane; None if nothing may."""

    def launch(self, work: Work) -> None:
        """Enqueues an update or a snapshot, and launches it; no other may wait to be launched."""

    def launch_all(self, works: Sequence[Work]) -> None:
        """Does that with several at once, in order, whose gradients are there or made alike."""

    def enqueue(self, work: Work) -> None:
        """Enqueues an update or a snapshot, to be launched at the next ``flush`` of the lanes.

        It is delivered when it has landed. So is one that failed: its error is raised nowhere.
        """

    def computing(self) -> AbstractContextManager[object]:
        """A context in which a thread's device work goes down this lane, ahead of later updates.

        Call it where the inputs of that work were made: they are waited for on the device. Enter
        the context on the thread that works.
        """

    def continuing(self) -> AbstractContextManager[object]:
        """A context for device work with what was computed in the lane, or on the current stream.

        It is as ``computing`` if anything was computed in the lane.
        """

    def record_event(self) -> Any:
        """An event that is done when all that was enqueued on the lane until now has landed.

        It is a place in the lane's queue; what waits for its batch is launched now.
        """

    async def done(self, event: Any) -> None:
        """Waits for an event without blocking the event loop; may be cancelled.

        Args:
            event: From ``record_event`` of any lane of the scheduler. On a GPU, any
                ``torch.cuda.Event`` that was recorded, for which it is ``cuda_event_done``.

        Raises:
            TypeError: If it is no such event.
            ValueError: If it was not recorded.
            RuntimeError: If the lane is of another event loop, or the device has failed.
        """


class Lanes(Protocol):
    """All lanes of a scheduler, opened and closed together."""

    @property
    def lanes(self) -> Sequence[Lane]:
        """In order."""

    def flush(self, lanes: Sequence[int]) -> None:
        """Launches what was enqueued first on some lanes, together where the device can do that.

        Args:
            lanes: Their indices, each as often as so many of its updates are launched, if it has
                so many; in this order, if there is one.
        """

    def close(self) -> None:
        """Ends every lane; all updates must have landed."""


class Wakeup:
    """Calls a function on the event loop's thread, at the request of any thread.

    Many requests cost one wake-up of the loop: a thread wakes it only if no wake-up is under way.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        """Remembers the function, and the running loop."""
        self._loop = asyncio.get_running_loop()
        self._function = function
        self._requested = False

    def request(self) -> None:
        """Has the function called once more after this; from any thread, without a lock."""
        if not self._requested:
            self._requested = True
            self._loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._requested = False  # first: what is requested from here on is seen below, or wakes
        self._function()


class Position:
    """An event of a lane: the place in its queue that was the last when it was recorded."""

    def __init__(self, queue: Queue, position: int) -> None:
        """Made by ``Queue.position``."""
        self.queue = queue
        self.position = position


class Queue:
    """How far a lane has come, for those who wait for it.

    Attributes:
        enqueued: How many updates and snapshots were enqueued on the lane.
        delivered: How many of them have landed and were delivered.
    """

    def __init__(self) -> None:
        """An empty one."""
        self.enqueued = self.delivered = 0
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    def position(self) -> Position:
        """The present end of the queue."""
        return Position(self, self.enqueued)

    def advance(self, delivered: int) -> None:
        """Takes note that more were delivered, and wakes who waited for that."""
        self.delivered += delivered
        if not self._waiting:
            return
        for position, waiter in self._waiting:
            if position <= self.delivered and not waiter.done():
                waiter.set_result(None)
        self._waiting = [each for each in self._waiting if not each[1].done()]

    @staticmethod
    async def done(event: Any) -> None:
        """Waits until the lane has come to a position."""
        if not isinstance(event, Position):
            raise TypeError(f"event must be one that a lane recorded, got {type(event).__name__}")
        check_loop("the lane", event.queue._loop)
        if event.queue.delivered < event.position:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            event.queue._waiting.append((event.position, waiter))
            await waiter


class CpuLane:
    """What lanes that are CPU threads have in common."""

    _queue: Queue

    def flush(self) -> None:
        """Launches what was enqueued."""
        raise NotImplementedError

    def computing(self) -> AbstractContextManager[object]:
        """Nothing to set: a CPU thread computes at once."""
        return nullcontext()

    continuing = computing

    def record_event(self) -> Position:
        """The present end of the lane; what waits for its batch is launched now."""
        self.flush()
        return self._queue.position()

    async def done(self, event: Any) -> None:
        """Waits until a lane has come to an event."""
        await Queue.done(event)
