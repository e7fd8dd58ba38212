"""Events of CUDA are awaited without a scheduler; here they are those of the driver of tests."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator, Sequence

import pytest
import torch

from gpu_testing import TestGpu, gpu_of_tests
from hogstream.scheduler import cuda_event_done
from hogstream.scheduler.lanes.cuda_device import DeviceEvent

LIMIT_SECONDS = 60


class Event(torch.cuda.Event):
    """One of torch's, as far as waiting for it goes."""

    cuda_event = 0
    device = torch.device("cuda", 0)

    def __new__(cls) -> Event:
        # torch without CUDA makes none of its own, and torch with CUDA insists on its own.
        return super().__new__(cls) if torch.backends.cuda.is_built() else object.__new__(cls)

    def __init__(self) -> None:
        pass


@pytest.fixture
def gpu() -> Iterator[TestGpu]:
    with gpu_of_tests() as gpu:
        yield gpu
    assert gpu.tests.violations() == []


@pytest.fixture
def streams(gpu: TestGpu) -> list[int]:
    """Streams that are held, so that what is recorded on them is not done."""
    streams = [gpu.take_stream() for _ in range(20)]
    for stream in streams:
        gpu.tests.hold(stream)
    return streams


def join_watcher() -> None:
    for thread in threading.enumerate():
        if thread.name == "hogstream-events":
            thread.join(LIMIT_SECONDS)


@pytest.fixture
def made(gpu: TestGpu, streams: list[int]) -> Iterator[list[DeviceEvent]]:
    """The events that were made, to be destroyed at the end, when nobody asks for them any more."""
    made: list[DeviceEvent] = []
    yield made
    join_watcher()
    for stream in streams:
        gpu.tests.release(stream)
        gpu.tests.wait_idle(stream)
    for event in made:
        event.destroy()


def recorded(gpu: TestGpu, stream: int, made: list[DeviceEvent]) -> Event:
    event = Event()
    made.append(DeviceEvent(gpu))
    event.cuda_event = made[-1].handle
    made[-1].record(stream)
    return event


async def ended(waits: Sequence[asyncio.Future[None]]) -> list[int]:
    """Which waits have ended, once the loop has had a turn."""
    await asyncio.sleep(0)
    return [index for index, wait in enumerate(waits) if wait.done()]


async def test_each_wait_ends_with_its_event_in_any_order(gpu, streams, made):
    waits = [
        asyncio.ensure_future(cuda_event_done(recorded(gpu, stream, made))) for stream in streams
    ]
    for index in (7, 0, 19):
        gpu.tests.release(streams[index])
        await asyncio.wait_for(waits[index], LIMIT_SECONDS)
    assert await ended(waits) == [0, 7, 19]
    for stream in streams:
        gpu.tests.release(stream)
    await asyncio.wait_for(asyncio.gather(*waits), LIMIT_SECONDS)


async def test_the_thread_ends_when_nobody_waits(gpu, streams, made):
    for stream in streams[:3]:
        wait = asyncio.ensure_future(cuda_event_done(recorded(gpu, stream, made)))
        await asyncio.sleep(0)
        (thread,) = [each for each in threading.enumerate() if each.name == "hogstream-events"]
        gpu.tests.release(stream)
        await asyncio.wait_for(wait, LIMIT_SECONDS)
        thread.join(LIMIT_SECONDS)
        assert not thread.is_alive()


async def test_cancelled_wait_leaves_nothing_behind(gpu, streams, made):
    event = recorded(gpu, streams[0], made)
    wait = asyncio.ensure_future(cuda_event_done(event))
    await asyncio.sleep(0)
    wait.cancel()
    await asyncio.wait([wait])
    reference = weakref.ref(event)
    del event, wait
    join_watcher()
    gc.collect()
    assert reference() is None


async def test_wait_for_a_device_that_is_lost_says_so(gpu, streams, made):
    wait = asyncio.ensure_future(cuda_event_done(recorded(gpu, streams[0], made)))
    await asyncio.sleep(0)
    gpu.tests.lose()
    with pytest.raises(RuntimeError, match="failed with CUDA_ERROR_ILLEGAL_ADDRESS"):
        await asyncio.wait_for(wait, LIMIT_SECONDS)
    made.clear()  # gone with the device


def test_loops_of_several_threads_wait_at_once(gpu, streams, made):
    events = [recorded(gpu, stream, made) for stream in streams]
    waiting = threading.Barrier(len(events) + 1)

    def run(event: Event) -> None:
        async def wait() -> None:
            waiting.wait(LIMIT_SECONDS)
            await asyncio.wait_for(cuda_event_done(event), LIMIT_SECONDS)

        asyncio.run(wait())

    runs = [threading.Thread(target=run, args=(event,)) for event in events]
    for each in runs:
        each.start()
    waiting.wait(LIMIT_SECONDS)
    for stream in streams:
        gpu.tests.release(stream)
    for each in runs:
        each.join(LIMIT_SECONDS)
    assert not any(each.is_alive() for each in runs)


@pytest.mark.parametrize(
    ("event", "error", "told"),
    [
        ("now", TypeError, r"event must be a torch\.cuda\.Event, got str"),
        (Event(), ValueError, "event must have been recorded"),
    ],
)
async def test_what_cannot_be_awaited_is_refused(event, error, told):
    with pytest.raises(error, match=told):
        await cuda_event_done(event)
