"""CUDA lanes on the driver of tests: events, times, streams, memory and errors, one by one."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_testing
from gpu_testing import BLOCK, TestGpu, faults, scheduler_on
from gradient_making import Memory
from hogstream.kernels.backends.triton_launch import factor_words
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.scheduler import Timeline, WorkerContext, WorkerError
from hogstream.scheduler.lanes import cuda_batch_launch, cuda_clock
from hogstream.scheduler.lanes.cuda_batches import Batch
from hogstream.scheduler.lanes.cuda_device import DeviceEvent
from hogstream.scheduler.lanes.cuda_driver import CudaError
from hogstream.scheduler.lanes.cuda_events import cuda_event_done
from hogstream.scheduler.lanes.cuda_graphs import Node, UpdateGraph
from hogstream.scheduler.lanes.cuda_kernels import UpdateKernels
from scenarios import LAUNCH_FAILED
from scheduler_testing import COUNTING, POLICIES, small, submit_ones


@pytest.fixture
def gpu() -> Iterator[TestGpu]:
    with gpu_testing.gpu_of_tests() as gpu:
        yield gpu
    assert not faults(gpu)


class Event:
    """Stands for ``torch.cuda.Event``."""

    def __init__(self, gpu: Any) -> None:
        self._event = DeviceEvent(gpu)
        self.device = torch.device("cuda", 0)
        self.cuda_event = 0  # until it is recorded

    def record(self, stream: int) -> None:
        self._event.record(stream)
        self.cuda_event = self._event.handle

    def destroy(self) -> None:
        with suppress(CudaError):  # the device is lost
            self._event.destroy()


@pytest.fixture
def event(gpu: TestGpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    event = Event(gpu)
    yield event
    for thread in threading.enumerate():  # which ends when nobody waits
        if thread.name == "hogstream-events":
            thread.join()
    event.destroy()


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_an_event_is_awaited_without_a_scheduler(gpu: TestGpu, event: Any) -> None:
    stream = gpu.torch.make_stream()
    gpu.tests.hold(stream)
    event.record(stream)
    first, second = (asyncio.ensure_future(cuda_event_done(event)) for _ in range(2))
    await turns(20)
    assert not first.done()
    second.cancel()
    gpu.tests.release(stream)
    await first
    assert gpu.tests.call("cuEventQuery", event.cuda_event) == 0
    with pytest.raises(asyncio.CancelledError):
        await second


@pytest.mark.slow
async def test_an_event_is_awaited_by_a_worker(gpu: TestGpu, event: Any) -> None:
    stream, other = gpu.torch.make_stream(), Event(gpu)
    shared = small()
    grad = torch.ones(64)

    async def worker(context: WorkerContext) -> None:
        gpu.tests.hold(stream)
        event.record(stream)
        other.record(0)
        await context.lane.done(other)  # whatever else is waited for
        asyncio.get_running_loop().call_soon(gpu.tests.release, stream)
        await asyncio.gather(context.lane.done(event), context.lane.done(other))
        await context.submit(grad)
        await context.lane.done(context.lane.record_event())
        assert shared.flat.eq(-1 - context.iteration).all()

    async with scheduler_on(shared, workers=1, depth=4, **COUNTING) as scheduler:
        await scheduler.run(worker, updates=5)
    other.destroy()


async def test_an_event_of_a_device_that_is_lost_is_an_error(gpu: TestGpu, event: Any) -> None:
    stream = gpu.torch.make_stream()
    gpu.tests.hold(stream)
    event.record(stream)
    wait = asyncio.ensure_future(cuda_event_done(event))
    await turns(5)
    gpu.tests.lose()
    with pytest.raises(CudaError, match="failed with CUDA_ERROR_ILLEGAL_ADDRESS"):
        await wait


async def test_what_is_no_event_or_was_not_recorded_is_refused(gpu: TestGpu, event: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.cuda\.Event, got str"):
        await cuda_event_done("now")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have been recorded"):
        await cuda_event_done(event)


@pytest.mark.parametrize("batch", [1, 2])
async def test_times_are_the_device_s(gpu: TestGpu, batch: int, tmp_path: Path) -> None:
    """An update begins when its gradient is made, long after the host has launched it."""
    shared, timeline = small(), Timeline()
    grads = [torch.ones(64) for _ in range(2)]
    stream = gpu.torch.make_stream()
    released: list[int] = []

    def release() -> None:
        released.append(time.perf_counter_ns())
        gpu.tests.release(stream)

    async def worker(context: WorkerContext) -> None:
        if context.iteration == 0:
            gpu.tests.hold(stream)
            asyncio.get_running_loop().call_later(0.02, release)
        with gpu.computing(stream):
            await context.submit(grads[context.iteration % 2])

    async with scheduler_on(
        shared, workers=1, depth=2, batch=batch, timeline=timeline, **COUNTING
    ) as scheduler:
        await scheduler.run(worker, updates=8)
    timeline.write(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text("utf-8"))
    updates = [event for event in trace["traceEvents"] if event.get("cat") == "update"]
    assert len(updates) == 8
    began_ns = trace["otherData"]["perf_counter_ns"] + 1000 * min(each["ts"] for each in updates)
    assert began_ns >= released[0] - 10_000  # to which clocks agree, and more


async def test_schedulers_use_the_streams_of_those_before(gpu: TestGpu) -> None:
    before, destroyed = gpu.tests.streams_created, gpu.tests.streams_destroyed
    for workers in (3, 1, 4, 2):
        shared = small()
        async with scheduler_on(shared, workers=workers, policy="ordered", **COUNTING) as scheduler:
            await scheduler.run(submit_ones(shared), updates=8)
    assert gpu.tests.streams_created - before == 4
    assert gpu.tests.streams_destroyed == destroyed


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_gradient_lives_until_its_update_has_landed(gpu: TestGpu, policy: str) -> None:
    shared = small()
    memory = Memory(gpu, 64, torch.float32)

    async def worker(context: WorkerContext) -> None:
        if context.iteration:
            return
        gpu.tests.hold(next(iter(gpu.streams)))
        grad = memory.take()
        with gpu.computing(0):
            gpu.torch.launch_fill(0, grad, 1.0)
        await context.submit(grad)
        del grad
        gc.collect(0)
        await turns(20)
        assert memory.blocks == 0
        gpu.tests.release(next(iter(gpu.streams)))
        await context.lane.done(context.lane.record_event())
        assert memory.blocks == 1

    async with scheduler_on(shared, workers=1, depth=4, policy=policy, **COUNTING) as scheduler:
        await scheduler.run(worker, updates=1)
    assert shared.flat.eq(-1).all()
    memory.close()


async def test_a_device_lost_while_nothing_is_under_way(gpu: TestGpu) -> None:
    shared = small()
    scheduler = await scheduler_on(shared, workers=3, policy="ordered", **COUNTING).__aenter__()
    await scheduler.run(submit_ones(shared), updates=9)
    gpu.tests.lose()
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        await scheduler.__aexit__(None, None, None)
    assert shared.flat.eq(-9).all()


@pytest.mark.parametrize("policy", POLICIES)
async def test_everybody_is_told_of_a_device_that_is_lost(gpu: TestGpu, policy: str) -> None:
    shared = small()
    async with scheduler_on(
        shared, workers=3, depth=2, policy=policy, on_error="continue", **COUNTING
    ) as scheduler:
        gpu.tests.lose()
        with pytest.raises(WorkerError, match=r"workers 0, 1, 2 failed: .*ILLEGAL_ADDRESS"):
            await scheduler.run(submit_ones(shared), updates=9)
    assert scheduler.report is not None
    assert scheduler.report.updates == 0
    assert shared.flat.eq(0).all()


async def test_a_launch_that_fails_says_why(gpu: TestGpu) -> None:
    shared = small()
    async with scheduler_on(shared, workers=1, **COUNTING) as scheduler:
        calls = gpu.tests.calls["cuLaunchKernel"]
        gpu.tests.fail("cuLaunchKernel", calls + 3, LAUNCH_FAILED)
        with pytest.raises(WorkerError, match=r"launch of an update failed with .*LAUNCH_FAILED"):
            await scheduler.run(submit_ones(shared), updates=9)
    assert shared.flat.eq(-2).all()
    assert scheduler.report is not None
    assert (scheduler.report.updates, scheduler.report.dropped) == (2, [1])


def test_batch_is_used_again_once_it_has_landed_and_its_times_were_read(gpu: TestGpu) -> None:
    memory = torch.zeros(3, BLOCK)
    addresses = [row.data_ptr() for row in memory]
    constants = {"STORAGE": "fp32", "BLOCK": BLOCK}
    kernels = UpdateKernels(gpu.function("rmsprop_kernel", constants), None, BLOCK)
    nodes = [Node([*addresses, 0, 0, 0, BLOCK], branch=0)] * 2
    graph = UpdateGraph(gpu, kernels, nodes, factor_words(Hyperparameters()), 0)
    events = [DeviceEvent(gpu, timed=True) for _ in range(2)]
    for times in ([], events):
        batch = Batch(gpu, 2, times, checked=False)
        batch.fill(graph, [], [], 0)
        assert not batch.has_landed()
        batch.words[cuda_batch_launch.BATCH_LANDED] = 2
        assert batch.has_landed() is not bool(times)
        batch.untold = 0
        assert batch.has_landed()
        batch.free()
    for event in events:
        event.destroy()
    graph.drop()


async def test_batches_are_used_again_while_another_is_in_flight(gpu: TestGpu) -> None:
    shared = small()
    grads = [torch.ones(64) for _ in range(4)]
    stream = gpu.torch.make_stream()

    async def worker(context: WorkerContext) -> None:
        first = context.index == 0
        if first and context.iteration == 2:  # when what it launches is a graph
            gpu.tests.hold(stream)
        with gpu.computing(stream if first else 0):
            await context.submit(grads[2 * context.index + context.iteration % 2])
        if not first and context.iteration == 60:
            gpu.tests.release(stream)

    settings: dict[str, Any] = {"workers": 2, "depth": 2, "batch": 2, "policy": "locked"}
    async with scheduler_on(shared, on_nonfinite="skip", **settings, **COUNTING) as scheduler:
        before = gpu.tests.calls["cuMemHostAlloc"]
        await scheduler.run(worker, updates=120)
        assert gpu.tests.calls["cuMemHostAlloc"] - before <= 3
    assert shared.flat.eq(-120).all()


@pytest.mark.parametrize("batch", [1, 2])
async def test_an_event_not_recorded_fails_all_that_counts_on_it(gpu: TestGpu, batch: int) -> None:
    shared = small()
    grads = [torch.ones(64) for _ in range(2)]

    async def worker(context: WorkerContext) -> None:
        await context.submit(grads)

    async with scheduler_on(shared, workers=1, depth=2, batch=batch, **COUNTING) as scheduler:
        await scheduler.run(worker, updates=8)
        gpu.tests.fail("cuEventRecord", gpu.tests.calls["cuEventRecord"] + 1, LAUNCH_FAILED)
        with pytest.raises(WorkerError, match="LAUNCH_FAILED"):
            await scheduler.run(worker, updates=2)
        assert scheduler.report is not None
        assert scheduler.report.dropped == [2]
        assert shared.flat.eq(-8).all()
        await scheduler.run(worker, updates=2)
    assert shared.flat.eq(-10).all()


@pytest.mark.parametrize("updates", [18, 20])  # each batch swaps two events
async def test_a_clock_that_moves_along_destroys_no_event_twice(
    gpu: TestGpu, monkeypatch: pytest.MonkeyPatch, updates: int
) -> None:
    monkeypatch.setattr(cuda_clock, "_FOLLOW_AFTER_NS", 0)
    shared = small()
    grads = [torch.ones(64) for _ in range(2)]

    async def worker(context: WorkerContext) -> None:
        await context.submit(grads)

    async with scheduler_on(
        shared, workers=1, depth=2, batch=2, timeline=Timeline(), **COUNTING
    ) as scheduler:
        await scheduler.run(worker, updates=updates)
    assert shared.flat.eq(-updates).all()
