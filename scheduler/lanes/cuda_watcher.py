"""One thread that sees what has landed on a device, and wakes the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Collection, Hashable
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from hogstream.scheduler.checks import check_loop
from hogstream.scheduler.lanes.base import Wakeup

_BACK_OFF_SECONDS = (10e-6, 1e-3)


class Watched(Protocol):
    """What the watcher waits for.

    Attributes:
        queues: It lands after all that was watched before it in one of these, so nobody looks at it
            until then.
    """

    @property
    def queues(self) -> Collection[Hashable]:
        """The queues that it is in."""

    def query(self) -> bool:
        """Whether the device has done it; called on the watcher's thread."""

    def land(self, error: BaseException | None) -> None:
        """It has landed, or nobody will know, because of an error; on the watcher's thread."""

    def deliver(self) -> None:
        """Delivers it, once it has landed; on the event loop's thread."""


class EventWatcher:
    """A thread that polls what is watched, and backs off while nothing lands.

    A host callback in its place would wait for the GIL while it holds the driver's lock, and
    deadlock; ``event.synchronize`` would need a thread for each event.
    """

    def __init__(self) -> None:
        """Starts the thread; what it sees is delivered on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._wakeup = Wakeup(self._deliver)
        self._watched: SimpleQueue[Watched | None] = SimpleQueue()
        self._landed: deque[Watched] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="hogstream-watcher", daemon=True)
        self._thread.start()

    def watch(self, watched: Watched) -> None:
        """Has something looked at until it has landed; from any thread."""
        self._watched.put(watched)

    async def done(self, event: Any) -> None:
        """Waits for an event; may be cancelled.

        Args:
            event: Anything that has ``query()``, as a ``torch.cuda.Event``.

        Raises:
            RuntimeError: If the watcher is closed before the event is done, or belongs to another
                event loop.
            Exception: Whatever ``query`` raises.
        """
        if self._closed:
            raise RuntimeError("the lanes are closed: nobody watches events any more")
        check_loop("the lane", self._loop)
        waiter = _Waiter(event)
        self.watch(waiter)
        await waiter.future

    def close(self) -> None:
        """Ends the thread; what has not landed by now lands with an error."""
        self._closed = True
        self._watched.put(None)
        self._thread.join()
        self._deliver()

    def _watch(self) -> None:
        watched: list[Watched] = []
        shortest, longest = _BACK_OFF_SECONDS
        pause = shortest
        while self._take_more(watched):
            before = len(watched)
            watched = self._sift(watched)
            if len(watched) < before:
                self._wakeup.request()
                pause = shortest
            else:
                time.sleep(pause)
                pause = min(2 * pause, longest)
        for each in watched:
            each.land(RuntimeError("the lanes were closed before the device was done"))
            self._landed.append(each)

    def _take_more(self, watched: list[Watched]) -> bool:
        """Adds what is new, waiting for it if there is nothing else; False once closed."""
        try:
            while (new := self._watched.get(block=not watched)) is not None:
                watched.append(new)
        except Empty:
            return True
        return False

    def _sift(self, watched: list[Watched]) -> list[Watched]:
        """Lands what the device has done, in the order of the queues, and returns the rest."""
        still: list[Watched] = []
        held: set[Hashable] = set()
        for each in watched:
            if held.isdisjoint(each.queues) and _lands(each):
                self._landed.append(each)
            else:
                still.append(each)
                held.update(each.queues)
        return still

    def _deliver(self) -> None:
        while self._landed:
            self._landed.popleft().deliver()


def _lands(watched: Watched) -> bool:
    try:
        if not watched.query():
            return False
        watched.land(None)
    except BaseException as error:  # the device failed; it will say so of everything in flight
        watched.land(error)
    return True


class _Waiter:
    """A coroutine that waits for an event."""

    queues = ()

    def __init__(self, event: Any) -> None:
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._event = event
        self._error: BaseException | None = None

    def query(self) -> bool:
        return self.future.cancelled() or bool(self._event.query())

    def land(self, error: BaseException | None) -> None:
        self._error = error

    def deliver(self) -> None:
        if self.future.done():
            return
        if self._error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(self._error)
