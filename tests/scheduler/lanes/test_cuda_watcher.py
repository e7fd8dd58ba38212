"""The watcher needs no GPU: whatever has ``query()`` will do."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Hashable

import pytest

from hogstream.scheduler.lanes.cuda_watcher import EventWatcher

LIMIT_SECONDS = 60


class Event(threading.Event):
    """Done once it is set; fails if it was told to."""

    error: Exception | None = None

    def query(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.is_set()


class Noted:
    """Takes down where it lands and is delivered."""

    def __init__(self, event: Event, delivered: list[Noted], *queues: Hashable) -> None:
        self.event = event
        self.delivered = delivered
        self.queues = queues
        self.error: BaseException | None = None
        self.threads: list[threading.Thread] = []

    def query(self) -> bool:
        return self.event.query()

    def land(self, error: BaseException | None) -> None:
        self.error = error
        self.threads.append(threading.current_thread())

    def deliver(self) -> None:
        self.delivered.append(self)
        self.threads.append(threading.current_thread())


@pytest.fixture
async def watcher() -> AsyncIterator[EventWatcher]:
    watcher = EventWatcher()
    yield watcher
    watcher.close()


def done_event() -> Event:
    event = Event()
    event.set()
    return event


async def test_each_wait_ends_with_its_event_in_any_order(watcher: EventWatcher) -> None:
    events = [Event() for _ in range(100)]
    waits = [asyncio.ensure_future(watcher.done(event)) for event in events]
    for index in (71, 0, 99):
        threading.Thread(target=events[index].set).start()
        await asyncio.wait_for(waits[index], LIMIT_SECONDS)
    await watcher.done(done_event())
    assert [index for index, wait in enumerate(waits) if wait.done()] == [0, 71, 99]
    for event in events:
        event.set()
    await asyncio.wait_for(asyncio.gather(*waits), LIMIT_SECONDS)


async def test_delivery_keeps_the_order_of_each_queue(watcher: EventWatcher) -> None:
    """What is done before its predecessor waits for it; what is in no queue with it does not."""
    first = Event()
    delivered: list[Noted] = []
    held = Noted(first, delivered, 0)
    both = Noted(done_event(), delivered, 0, 1)  # as a graph of two lanes
    after = Noted(done_event(), delivered, 1)
    other = Noted(done_event(), delivered, 2)
    for noted in (held, both, after, other):
        watcher.watch(noted)
    await asyncio.wait_for(watcher.done(done_event()), LIMIT_SECONDS)
    assert delivered == [other]
    first.set()
    await asyncio.wait_for(watcher.done(first), LIMIT_SECONDS)
    assert delivered == [other, held, both, after]
    for noted in delivered:
        on, told = noted.threads
        assert on is not threading.current_thread()
        assert told is threading.current_thread()


async def test_what_is_through_at_once_is_delivered_in_one_turn_of_the_loop(
    watcher: EventWatcher,
) -> None:
    gate = Event()
    turn = 0
    turns: set[int] = set()

    class Counted(Noted):
        def deliver(self) -> None:
            super().deliver()
            turns.add(turn)

    delivered: list[Noted] = []
    for index in range(1000):
        watcher.watch(Counted(gate, delivered, index))
    await watcher.done(done_event())
    gate.set()
    while len(delivered) < 1000:
        turn += 1
        await asyncio.sleep(0)
    assert len(turns) <= 2  # two, if it looked at some just before they were done


async def test_error_of_one_event_is_not_that_of_others(watcher: EventWatcher) -> None:
    failing, sound = Event(), Event()
    delivered: list[Noted] = []
    noted = Noted(failing, delivered, 0)
    watcher.watch(noted)
    waits = [asyncio.ensure_future(watcher.done(event)) for event in (failing, sound)]
    failing.error = RuntimeError("illegal memory access")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        await asyncio.wait_for(waits[0], LIMIT_SECONDS)
    assert noted.error is failing.error
    assert delivered == [noted]
    sound.set()
    await asyncio.wait_for(waits[1], LIMIT_SECONDS)


async def test_cancelled_wait_leaves_nothing_behind(watcher: EventWatcher) -> None:
    event = Event()
    wait = asyncio.ensure_future(watcher.done(event))
    await watcher.done(done_event())
    wait.cancel()
    await asyncio.wait([wait])
    reference = weakref.ref(event)
    del event, wait
    await asyncio.wait_for(watcher.done(done_event()), LIMIT_SECONDS)
    gc.collect()
    assert reference() is None


async def test_what_is_left_at_the_end_gets_an_error() -> None:
    watcher = EventWatcher()
    wait = asyncio.ensure_future(watcher.done(Event()))
    delivered: list[Noted] = []
    noted = Noted(Event(), delivered, 0)
    watcher.watch(noted)
    await watcher.done(done_event())
    watcher.close()
    assert delivered == [noted]
    assert "closed before" in str(noted.error)
    with pytest.raises(RuntimeError, match="closed before"):
        await asyncio.wait_for(wait, LIMIT_SECONDS)
    with pytest.raises(RuntimeError, match="closed"):
        await watcher.done(done_event())
