"""What CUDA lanes must do; the other tests of the scheduler run on CPU lanes."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest
import torch

from hogstream.scheduler import (
    SharedParameters,
    StreamScheduler,
    WorkerContext,
    cuda_event_done,
)
from hogstream.scheduler.lanes.cuda_graphs import UpdateGraph
from hogstream.scheduler.lanes.process_lock import ProcessLock
from hogstream.scheduler.tracing.timeline import Timeline
from process_testing import run_python
from scheduler_testing import COUNTING, submit_ones

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
LIMIT_SECONDS = 60
LONG = 50_000_000  # device cycles: tens of milliseconds


def zeros(elements: int) -> SharedParameters:
    return SharedParameters({"p": torch.zeros(elements, device=CUDA)})


async def test_lane_waits_for_its_update_in_a_graph_on_another(
    graphs: list[UpdateGraph],
) -> None:
    """The graph hangs back on lane 0, and what follows it on lane 1 must not overtake it."""
    shared = zeros(1 << 16)
    left_out, counted = torch.full_like(shared.flat, float("nan")), torch.ones_like(shared.flat)
    first_is_enqueued, both_are_enqueued = asyncio.Event(), asyncio.Event()
    seen: list[tuple[int, float]] = []

    async def worker(context: WorkerContext) -> None:
        if context.index == 0:
            await context.run_blocking(torch.cuda._sleep, LONG)
            first_is_enqueued.set()
            await context.submit(left_out)
            await both_are_enqueued.wait()
            both_are_enqueued.clear()
        else:
            seen.append((context.iteration, context.flat.max().item()))
            await first_is_enqueued.wait()
            first_is_enqueued.clear()
            both_are_enqueued.set()
            await context.submit(counted)

    async with StreamScheduler(
        shared,
        workers=2,
        depth=2,
        batch=2,
        batch_of="lanes",
        read="snapshot",
        on_nonfinite="skip",
        **COUNTING,
    ) as scheduler:
        await scheduler.run(worker, updates=20)
    assert graphs
    assert seen == [(iteration, -iteration) for iteration in range(len(seen))]


async def test_update_waits_for_the_stream_that_made_its_gradient() -> None:
    """The gradient is all zeros until a long queue of work on the current stream is done."""
    shared = zeros(1 << 20)

    async def worker(context: WorkerContext) -> None:
        grad = torch.zeros_like(shared.flat)
        torch.cuda._sleep(LONG)
        grad.fill_(1.0)
        await context.submit(grad)

    async with StreamScheduler(shared, workers=2, policy="ordered", **COUNTING) as scheduler:
        await scheduler.run(worker, updates=6)
    assert shared.flat.eq(-6).all()


@pytest.mark.parametrize("batch_of", ["lane", "lanes"])
async def test_graph_waits_for_the_lanes_that_made_its_gradients(batch_of: str) -> None:
    """Each gradient is made on its worker's lane; a graph of both lanes runs on one of them."""
    shared = zeros(1 << 20)
    grads = [torch.zeros_like(shared.flat) for _ in range(4)]

    def make(grad: torch.Tensor) -> torch.Tensor:
        grad.zero_()
        torch.cuda._sleep(LONG)
        return grad.fill_(1.0)

    async def worker(context: WorkerContext) -> None:
        grad = grads[2 * context.index + context.iteration % 2]
        await context.submit(await context.run_blocking(make, grad))

    async with StreamScheduler(
        shared, workers=2, depth=2, batch=2, batch_of=batch_of, policy="ordered", **COUNTING
    ) as scheduler:
        await scheduler.run(worker, updates=32)
    assert shared.flat.eq(-32).all()


async def test_gradient_lives_until_its_update_has_landed() -> None:
    """The lane is busy when its memory would be used again, for a gradient of another sign."""
    shared = zeros(1 << 20)

    async def worker(context: WorkerContext) -> None:
        if context.iteration:
            await context.submit(torch.full_like(shared.flat, -1.0))
            return
        await context.run_blocking(torch.cuda._sleep, 10 * LONG)
        await context.submit(torch.ones_like(shared.flat))

    async with StreamScheduler(shared, workers=1, depth=2, **COUNTING) as scheduler:
        await scheduler.run(worker, updates=2)
    assert shared.flat.eq(0).all()  # one down, one up


async def test_blocking_work_runs_on_the_lane() -> None:
    shared = zeros(1 << 20)
    streams: set[int] = set()

    def make_grad() -> torch.Tensor:
        streams.add(torch.cuda.current_stream().cuda_stream)
        torch.cuda._sleep(LONG // 5)
        return torch.ones_like(shared.flat)

    async def worker(context: WorkerContext) -> None:
        await context.submit(await context.run_blocking(make_grad))

    async with StreamScheduler(shared, workers=3, policy="ordered", **COUNTING) as scheduler:
        await scheduler.run(worker, updates=9)
    assert shared.flat.eq(-9).all()
    assert len(streams) == 3
    assert torch.cuda.default_stream().cuda_stream not in streams


async def test_event_loop_turns_while_the_device_works() -> None:
    shared = zeros(1 << 10)
    grad = torch.ones_like(shared.flat)
    turns = 0

    async def worker(context: WorkerContext) -> None:
        await context.run_blocking(torch.cuda._sleep, 4 * LONG)
        await context.submit(grad)

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with StreamScheduler(shared, workers=1) as scheduler:
        turning = asyncio.create_task(turn())
        await scheduler.run(worker, updates=2)
        turning.cancel()
    assert turns > 100


async def test_event_loop_turns_while_another_holds_the_lock() -> None:
    shared = zeros(1 << 10)
    lock = ProcessLock()
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        assert lock.acquire(LIMIT_SECONDS)
        held.set()
        free.wait(LIMIT_SECONDS)
        lock.release()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(LIMIT_SECONDS)
    async with StreamScheduler(shared, workers=2, process_lock=lock, **COUNTING) as scheduler:
        running = asyncio.create_task(scheduler.run(submit_ones(shared), updates=4))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not running.done()
        assert shared.version == 0
        free.set()
        await running
    holder.join()
    assert shared.flat.eq(-4).all()


async def test_recorded_event_is_done_when_all_before_it_has_landed() -> None:
    """Also what still waits for its batch; and on another lane than the one that awaits it."""
    shared = zeros(1 << 20)
    highest: list[tuple[int, float]] = []

    async def worker(context: WorkerContext) -> None:
        torch.cuda._sleep(LONG)
        await context.submit(torch.ones_like(shared.flat))
        event = context.lane.record_event()
        await lanes[1 - context.index].done(event)
        highest.append((context.iteration, shared.flat.max().item()))

    async with StreamScheduler(
        shared, workers=2, depth=2, batch=4, batch_of="lanes", policy="ordered", **COUNTING
    ) as scheduler:
        assert scheduler._dispatch.lanes is not None
        lanes = scheduler._dispatch.lanes.lanes
        await scheduler.run(worker, updates=12)
    assert len(highest) == 12
    assert all(value <= -(iteration + 1) for iteration, value in highest)


async def test_any_recorded_event_can_be_awaited() -> None:
    shared = zeros(1 << 10)
    made = torch.zeros(1, device=CUDA)
    turns = 0

    async def worker(context: WorkerContext) -> None:
        nonlocal turns
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(LONG)
            made.fill_(1.0)
            event = torch.cuda.Event()
            event.record()
        wait = asyncio.ensure_future(context.lane.done(event))
        while not wait.done():
            turns += 1
            await asyncio.sleep(0)
        assert event.query()
        with pytest.raises(TypeError, match=r"must be a torch\.cuda\.Event, got str"):
            await context.lane.done("now")
        with pytest.raises(ValueError, match="must have been recorded"):
            await context.lane.done(torch.cuda.Event())
        await context.submit(torch.ones_like(shared.flat))

    async with StreamScheduler(shared, workers=1) as scheduler:
        await scheduler.run(worker, updates=1)
    assert made.item() == 1.0
    assert turns > 10


async def test_event_can_be_awaited_without_a_scheduler_and_the_wait_cancelled() -> None:
    torch.cuda._sleep(40 * LONG)
    event = torch.cuda.Event()
    event.record()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(cuda_event_done(event), 0.001)
    await asyncio.wait_for(cuda_event_done(event), LIMIT_SECONDS)
    assert event.query()


async def test_timeline_shows_when_the_device_began(tmp_path: Path) -> None:
    """The device comes to an update long after the host: its gradient is still being made."""
    shared = zeros(1 << 20)
    timeline = Timeline()

    async def worker(context: WorkerContext) -> None:
        torch.cuda._sleep(4 * LONG)
        await context.submit(torch.ones_like(shared.flat))

    async with StreamScheduler(shared, workers=1, timeline=timeline, **COUNTING) as scheduler:
        await scheduler.run(worker, updates=2)
    timeline.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    updates = [event for event in events if event.get("cat") == "update"]
    assert len(updates) == 2
    for update in updates:
        assert update["args"]["waited_us"] > 10_000
        assert update["dur"] < update["args"]["waited_us"]


async def test_capture_of_another_thread_goes_on_beside_lanes() -> None:
    """In the mode that is torch's default, in which others may not ask for events or memory."""
    shared = zeros(1 << 16)
    x = torch.zeros(1 << 10, device=CUDA)

    def capture() -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(200):
                x.add_(1.0)
        return graph

    async with StreamScheduler(shared, workers=4, depth=2, **COUNTING) as scheduler:
        captured = asyncio.create_task(asyncio.to_thread(capture))
        report = await scheduler.run(submit_ones(shared), updates=400)
        graph = await captured
    assert report.updates == 400
    graph.replay()
    assert x.eq(200).all()


def test_device_that_fails_is_an_error_of_all_and_nobody_hangs() -> None:
    """In a process of its own: nothing on the device can be used by it any more."""
    told = run_python("-c", _FAILING_DEVICE)
    assert told.strip().endswith("4 workers failed")


_FAILING_DEVICE = """
import asyncio
import os
import torch
from hogstream.scheduler import SharedParameters, StreamScheduler, WorkerError

shared = SharedParameters({"p": torch.zeros(1 << 20, device="cuda")})
grad = torch.ones_like(shared.flat)
beyond = torch.full((1,), 1 << 20, device="cuda")

async def worker(context):
    if context.index == 0:
        grad[beyond]
    await context.submit(grad)

async def main():
    try:
        async with StreamScheduler(shared, workers=4, on_error="continue") as scheduler:
            await scheduler.run(worker, updates=100)
    except WorkerError as error:
        print(len(error.failures), "workers failed", flush=True)

asyncio.run(asyncio.wait_for(main(), 60))
os._exit(0)  # what torch does at the end may fail as well
"""
