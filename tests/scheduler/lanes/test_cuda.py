"""What CUDA lanes must do; the other tests of the scheduler run on CPU lanes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hogstream.kernels import rmsprop_
from hogstream.scheduler import (
    SharedParameters,
    SimulatedWorker,
    StreamScheduler,
    WorkerContext,
    WorkerError,
)
from hogstream.scheduler.lanes import cuda
from hogstream.scheduler.lanes.process_lock import ProcessLock
from hogstream.scheduler.tracing.timeline import Timeline
from process_testing import run_python
from scheduler_testing import COUNTING, submit_ones

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
N = 100_001
LIMIT_SECONDS = 60
LONG = 50_000_000  # device cycles: tens of milliseconds


def zeros(elements: int) -> SharedParameters:
    return SharedParameters({"p": torch.zeros(elements, device=CUDA)})


def normal_gradients(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(N, generator=generator) for _ in range(count)]


def assert_made_by(shared: SharedParameters, gradients: list[torch.Tensor]) -> None:
    """The state is that of updates with these gradients, one after the other, on the CPU."""
    param, ms = torch.zeros(N), torch.zeros(N)
    for gradient in gradients:
        rmsprop_(param, gradient, ms, backend="numpy")
    assert torch.equal(shared.flat.cpu(), param)
    assert torch.equal(shared.ms.cpu(), ms)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often streams were made and destroyed, and graphs captured."""
    calls = dict.fromkeys(("create_stream", "destroy_stream", "capture"), 0)

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return function(*arguments)

        return call

    for name in calls:
        monkeypatch.setattr(cuda, name, counted(name, getattr(cuda, name)))
    return calls


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"on_nonfinite": "skip"},
        {"telemetry": True},
        {"telemetry": True, "on_nonfinite": "skip"},
        {"timeline": Timeline()},
        {"process_lock": ProcessLock()},
        {"batch": 2, "batch_of": "lane"},
        {"batch": 2, "batch_of": "lanes", "on_nonfinite": "skip", "telemetry": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("policy", ["lock-free", "locked", "ordered", "awaited", "bounded:3"])
async def test_one_worker_makes_the_updates_of_the_cpu(
    policy: str, options: dict[str, Any], calls: dict[str, int]
) -> None:
    if "batch" in options and policy in ("awaited", "bounded:3"):
        pytest.skip("a policy that waits for each update has no batches")
    gradients = normal_gradients(3)
    shared = zeros(N)
    worker = SimulatedWorker([gradient.to(CUDA) for gradient in gradients], workers=1)
    async with StreamScheduler(shared, workers=1, policy=policy, depth=6, **options) as scheduler:
        report = await scheduler.run(worker, updates=30)
    assert report.updates == shared.version == 30
    assert_made_by(shared, gradients * 10)
    assert calls["capture"] == (3 if "batch" in options else 0)  # for each pair of gradients


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"on_nonfinite": "skip"},
        {"process_lock": ProcessLock()},
        {"batch": 2, "batch_of": "lane", "on_nonfinite": "skip"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
async def test_updates_of_some_parameters_are_those_of_the_cpu(options: dict[str, Any]) -> None:
    sizes = {"a": 3, "b": 20_000, "c": 5, "d": 9_000}
    only = [None, ["a"], ["a", "c", "d"], ["b", "d"]]
    grads = normal_gradients(1)[0][: sum(sizes.values())].repeat(3, 1)
    grads[1, 25_000] = float("nan")  # in d
    states = []
    for device in ("cpu", "cuda"):
        shared = SharedParameters({k: torch.ones(n, device=device) for k, n in sizes.items()})
        of_device = list(grads.to(device))

        async def worker(context: WorkerContext, grads: Any = of_device) -> None:
            await context.submit(grads[context.iteration % 3], only[context.iteration % 4])

        async with StreamScheduler(
            shared, workers=1, depth=4, weight_decay=0.1, **options
        ) as scheduler:
            await scheduler.run(worker, updates=48)
        states.append((shared.flat.cpu(), shared.ms.cpu(), shared.version))
    (flat, ms, version), (on_gpu, ms_on_gpu, version_on_gpu) = states
    torch.testing.assert_close(on_gpu, flat, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ms_on_gpu, ms, rtol=0, atol=0, equal_nan=True)
    assert version_on_gpu == version


async def test_updates_of_some_parameters_are_not_counted() -> None:
    shared = zeros(64)
    grad = torch.ones_like(shared.flat)

    async def worker(context: WorkerContext) -> None:
        await context.submit(grad, only=["p"])

    async with StreamScheduler(shared, workers=1, telemetry=True) as scheduler:
        with pytest.raises(WorkerError, match="only must be None with telemetry on a GPU"):
            await scheduler.run(worker, updates=1)
    assert shared.version == 0


@pytest.mark.parametrize("workers", [4, 40])  # torch's pool has 32 streams: 40 are our own
@pytest.mark.parametrize(
    "options",
    [
        {"policy": "locked"},
        {"policy": "locked", "batch": 4, "batch_of": "lanes"},
        {"policy": "awaited"},
        {"policy": "ordered"},
        {"policy": "ordered", "batch": 4, "batch_of": "lanes"},
        {"policy": "ordered", "batch": 2, "batch_of": "lane", "on_nonfinite": "skip"},
        pytest.param(
            {"policy": "lock-free", "process_lock": ProcessLock()}, id="lock-free-process_lock"
        ),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
async def test_without_races_no_update_is_lost(options: dict[str, Any], workers: int) -> None:
    shared = zeros(1 << 22)
    async with StreamScheduler(shared, workers=workers, depth=2, **COUNTING, **options) as each:
        report = await each.run(submit_ones(shared), updates=400)
    assert report.updates == 400
    assert shared.flat.eq(-400).all()


@pytest.mark.parametrize("batch_of", ["lane", "lanes"])
async def test_graphs_race_as_launches_do_and_count_the_same(
    batch_of: str, calls: dict[str, int]
) -> None:
    shared = zeros(1 << 16)
    async with StreamScheduler(
        shared, workers=8, depth=4, batch=4, batch_of=batch_of, telemetry=True, **COUNTING
    ) as scheduler:
        report = await scheduler.run(submit_ones(shared), updates=800)
    assert calls["capture"] > 0
    assert shared.races is not None
    assert report.updates == shared.version == 800
    assert report.block_updates == 800 * shared.races.blocks
    assert shared.flat.min() >= -800
    assert shared.flat.max() <= -1


async def test_no_update_overlaps_another_if_they_are_ordered() -> None:
    shared = zeros(1 << 20)
    async with StreamScheduler(
        shared, workers=8, depth=2, policy="ordered", telemetry=True, **COUNTING
    ) as scheduler:
        report = await scheduler.run(submit_ones(shared), updates=400)
    assert report.lost_block_updates == report.overwritten_block_updates == 0


async def test_graph_follows_a_launch_on_its_lanes_and_is_followed() -> None:
    """A batch of lanes runs on one stream, and a snapshot on its lane's: each waits."""
    shared = zeros(1 << 22)
    seen: list[torch.Tensor] = []
    grad = torch.ones_like(shared.flat)

    async def worker(context: WorkerContext) -> None:
        seen.append(torch.stack(context.flat.aminmax()))
        await context.submit(grad)

    async with StreamScheduler(
        shared,
        workers=4,
        policy="ordered",
        read="snapshot",
        batch=4,
        batch_of="lanes",
        **COUNTING,
    ) as scheduler:
        await scheduler.run(worker, updates=200)
    assert shared.flat.eq(-200).all()
    for low, high in torch.stack(seen).tolist():
        assert low == high  # no snapshot was taken in the midst of an update


async def test_lane_waits_for_its_update_in_a_graph_on_another(
    calls: dict[str, int],
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
    assert calls["capture"] > 0
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


async def test_wait_for_an_event_can_be_cancelled_and_ends_with_the_lanes() -> None:
    shared = zeros(1 << 10)
    waits: list[asyncio.Future[None]] = []

    async def worker(context: WorkerContext) -> None:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(40 * LONG)
            event = torch.cuda.Event()
            event.record()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(context.lane.done(event), 0.001)
        waits.append(asyncio.ensure_future(context.lane.done(event)))
        await context.submit(torch.ones_like(shared.flat))

    async with StreamScheduler(shared, workers=1) as scheduler:
        await scheduler.run(worker, updates=1)
    with pytest.raises(RuntimeError, match="closed before"):
        await asyncio.wait_for(waits[0], LIMIT_SECONDS)


@pytest.mark.parametrize("batch", [1, 4])
async def test_update_that_is_not_finite_is_left_out(batch: int) -> None:
    gradients = normal_gradients(4)
    gradients[1][N - 1] = float("nan")
    gradients[2][0] = float("inf")
    shared = zeros(N)
    worker = SimulatedWorker([gradient.to(CUDA) for gradient in gradients], workers=1)
    async with StreamScheduler(
        shared, workers=1, depth=8, batch=batch, on_nonfinite="skip", telemetry=True
    ) as scheduler:
        report = await scheduler.run(worker, updates=32)
    assert report.nonfinite == [16]
    assert report.updates == shared.version == 16
    assert shared.races is not None
    assert report.block_updates == 16 * shared.races.blocks
    assert_made_by(shared, [gradients[0], gradients[3]] * 8)


async def test_gradient_that_is_not_finite_is_an_error_of_its_worker() -> None:
    shared = zeros(64)

    async def worker(context: WorkerContext) -> None:
        value = float("nan") if context.index else 1.0
        await context.submit(torch.full_like(shared.flat, value))

    async with StreamScheduler(
        shared, workers=2, on_nonfinite="raise", on_error="continue", **COUNTING
    ) as scheduler:
        report = await scheduler.run(worker, updates=8)
    assert isinstance(report.failures[1], FloatingPointError)
    assert shared.flat.eq(-report.updates).all()


async def test_staleness_counts_what_landed_since_the_read() -> None:
    shared = zeros(64)
    others_landed = asyncio.Event()

    async def worker(context: WorkerContext) -> None:
        if context.index == 0:
            await others_landed.wait()
        await context.submit(torch.ones_like(shared.flat))
        if context.iteration == 3:
            others_landed.set()

    async with StreamScheduler(shared, workers=2, staleness_aware=True, **COUNTING) as scheduler:
        report = await scheduler.run(worker, updates=5)
    assert dict(report.staleness) == {0: 4, 4: 1}
    assert shared.version == 5
    assert shared.flat.eq(-4.25).all()  # four whole steps, and one of a quarter


async def test_snapshot_is_of_the_version_that_it_says() -> None:
    shared = zeros(1 << 20)
    seen: list[tuple[int, float]] = []

    async def worker(context: WorkerContext) -> None:
        seen.append((context.read_version, context.flat.max().item()))
        await context.submit(torch.ones_like(shared.flat))

    async with StreamScheduler(
        shared, workers=4, policy="locked", read="snapshot", **COUNTING
    ) as scheduler:
        report = await scheduler.run(worker, updates=40)
    assert report.updates == 40
    assert all(value == -version for version, value in seen)


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


@pytest.mark.parametrize("workers", [1, 40])
async def test_closing_destroys_every_stream(workers: int, calls: dict[str, int]) -> None:
    shared = zeros(1 << 10)
    async with StreamScheduler(
        shared, workers=workers, depth=2, batch=2, batch_of="lanes"
    ) as scheduler:
        assert calls["create_stream"] == workers
        await scheduler.run(submit_ones(shared), updates=100)
        assert scheduler._dispatch.lanes is not None
        lane = scheduler._dispatch.lanes.lanes[0]
    assert calls["destroy_stream"] == calls["create_stream"] >= workers
    with pytest.raises(RuntimeError, match="closed"):
        lane.record_event()
    with pytest.raises(RuntimeError, match="closed"):
        lane.computing()


async def test_lanes_that_cannot_all_be_opened_leave_nothing_open(
    calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    create = vars(cuda)["create_stream"]  # which counts

    def refuse(device: torch.device) -> torch.cuda.Stream:
        if calls["create_stream"] == 3:
            raise RuntimeError("cuStreamCreateWithPriority failed with CUDA error 2")
        stream: torch.cuda.Stream = create(device)
        return stream

    monkeypatch.setattr(cuda, "create_stream", refuse)
    with pytest.raises(RuntimeError, match="cuStreamCreateWithPriority"):
        async with StreamScheduler(zeros(64), workers=8):
            pass
    assert calls["destroy_stream"] == calls["create_stream"] == 3


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("policy", ["lock-free", "locked", "ordered", "awaited"])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("no such kernel"), "ValueError: no such kernel"),
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory."),
            "MemoryError: no memory on cuda:0 to launch an update of 64 float32 elements",
        ),
    ],
)
async def test_launch_that_fails_is_an_error_of_its_worker(
    policy: str, batch: int, error: Exception, told: str
) -> None:
    if batch > 1 and policy == "awaited":
        pytest.skip("a policy that waits for each update has no batches")
    shared = zeros(64)
    works = True
    scheduler = StreamScheduler(shared, workers=2, policy=policy, batch=batch, depth=batch)
    kernel = scheduler.backend.kernel

    def launch(*operands: Any, **more: Any) -> None:
        if not works:
            raise error
        kernel(*operands, **more)

    scheduler.backend = replace(scheduler.backend, kernel=launch)
    async with scheduler:
        works = False
        with pytest.raises(WorkerError, match=told):
            await scheduler.run(submit_ones(shared), updates=4)
        assert shared.version == 0
        works = True
        report = await scheduler.run(submit_ones(shared), updates=4)
    assert report.updates == 4


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
