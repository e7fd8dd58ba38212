"""What workers read, whose state they use, and how large a step they take."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hogstream.kernels import rmsprop_
from hogstream.scheduler import (
    ModelWorker,
    SharedParameters,
    SimulatedWorker,
    StreamScheduler,
    WorkerContext,
)
from scheduler_testing import python_lanes

POLICIES = ["lock-free", "locked", "ordered", "awaited", "bounded:8"]
N = 1001


def gradients_of(workers: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(N, generator=generator) for _ in range(workers)]


@pytest.mark.parametrize("policy", ["awaited", "ordered"])  # which apply them in that order
async def test_each_worker_has_its_own_ms(policy: str, backend: str) -> None:
    shared = SharedParameters({"p": torch.ones(N)})
    gradients = gradients_of(3)
    order: list[int] = []

    async def worker(context: WorkerContext) -> None:
        order.append(context.index)
        await context.submit(gradients[context.index])

    async with StreamScheduler(
        shared, workers=3, policy=policy, backend=backend, state="per-worker"
    ) as scheduler:
        await scheduler.run(worker, updates=9)

    param, mss = torch.ones(N), torch.zeros(3, N)
    for index in order:
        rmsprop_(param, gradients[index], mss[index])
    assert torch.equal(shared.flat, param)
    assert shared.worker_ms is not None
    assert torch.equal(shared.worker_ms, mss)
    assert shared.ms.eq(0).all()


async def test_own_ms_are_kept_for_the_next_scheduler() -> None:
    shared = SharedParameters({"p": torch.zeros(N)})
    for _ in range(2):
        async with StreamScheduler(shared, workers=2, state="per-worker") as scheduler:
            await scheduler.run(SimulatedWorker(gradients_of(2), workers=2), updates=2)
    with pytest.raises(ValueError, match="workers must be 2, as many as have an ms, got 3"):
        async with StreamScheduler(shared, workers=3, state="per-worker"):
            pass


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
async def test_snapshot_does_not_change_while_others_land(
    policy: str, depth: int, backend: str
) -> None:
    """Worker 0 looks at its snapshot, lets the others go on, and looks again."""
    shared = SharedParameters({"p": torch.zeros(N)})
    ones = torch.ones(N)
    mixed = 0

    async def worker(context: WorkerContext) -> None:
        nonlocal mixed
        before = context.parameters["p"].clone()
        if context.index == 0:
            landed = shared.version
            for _ in range(50):
                await asyncio.sleep(0)
                if shared.version != landed:
                    break
            assert torch.equal(context.parameters["p"], before)
        mixed += bool(before.ne(before[0]).any())
        await context.submit(ones)

    async with StreamScheduler(
        shared, workers=3, policy=policy, depth=depth, backend=backend, read="snapshot",
        lr=1.0, alpha=0.0, eps=0.0,
    ) as scheduler:  # fmt: skip
        report = await scheduler.run(worker, updates=30)
    assert report.updates == 30
    if policy in ("locked", "ordered", "awaited"):
        assert mixed == 0  # a snapshot is of one version
        assert shared.flat.eq(-30).all()


async def test_snapshot_is_of_the_version_that_staleness_is_counted_from(backend: str) -> None:
    shared = SharedParameters({"p": torch.zeros(N)})
    seen: list[float] = []

    async def worker(context: WorkerContext) -> None:
        seen.append(-context.flat[0].item())
        await context.submit(torch.ones(N))

    async with StreamScheduler(
        shared, workers=1, read="snapshot", backend=backend, lr=1.0, alpha=0.0, eps=0.0
    ) as scheduler:
        report = await scheduler.run(worker, updates=4)
    assert seen == [0, 1, 2, 3]
    assert dict(report.staleness) == {0: 4}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
async def test_lr_is_divided_by_staleness(backend: str, weight_decay: float) -> None:
    """Worker 0 reads first and lands last: with a staleness of 3 its step is a third."""
    shared = SharedParameters({"p": torch.ones(N)})
    gradients = gradients_of(2)
    others_landed = asyncio.Event()

    async def worker(context: WorkerContext) -> None:
        if context.index == 0:
            await others_landed.wait()
        await context.submit(gradients[context.index])
        if context.iteration == 2:
            others_landed.set()

    options: dict[str, Any] = {"weight_decay": weight_decay, "decoupled_weight_decay": True}
    async with StreamScheduler(
        shared, workers=2, staleness_aware=True, backend=backend, lr=0.3, **options
    ) as scheduler:
        report = await scheduler.run(worker, updates=4)
    assert dict(report.staleness) == {0: 3, 3: 1}

    param, ms = torch.ones(N), torch.zeros(N)
    for _ in range(3):
        rmsprop_(param, gradients[1], ms, lr=0.3, **options)
    rmsprop_(param, gradients[0], ms, lr=0.3 / 3, **options)
    assert torch.equal(shared.flat, param)
    assert torch.equal(shared.ms, ms)


async def test_staleness_divides_each_learning_rate_anew(backend: str) -> None:
    """Worker 0 reads, worker 1 makes two updates, worker 0 submits; ten times over."""
    shared = SharedParameters({"p": torch.zeros(N)})
    ends = [[asyncio.Event() for _ in range(10)] for worker in range(2)]

    async def worker(context: WorkerContext) -> None:
        turn, second = divmod(context.iteration, 1 + context.index)
        if context.index == 0:
            await ends[1][turn].wait()
        elif turn:
            await ends[0][turn - 1].wait()
        await context.submit(torch.ones(N))
        if context.index == 0 or second:
            ends[context.index][turn].set()

    async with StreamScheduler(
        shared, workers=2, staleness_aware=True, backend=backend, lr=1.0, alpha=0.0, eps=0.0
    ) as scheduler:
        report = await scheduler.run(worker, updates=30)
    assert report.staleness[2] == 10  # and of the others 0 or 1
    assert shared.flat.tolist() == [-(20 + 10 / 2)] * N


async def test_snapshot_waits_for_the_lock() -> None:
    """Worker 0 is in its update while worker 1 starts again, and is to read."""
    shared = SharedParameters({"p": torch.zeros(N)})
    inside, failed = asyncio.Event(), asyncio.Event()
    release = threading.Event()
    loop = asyncio.get_running_loop()
    reads: list[int] = []

    def hold(update: Callable[..., Any], *operands: Any) -> None:
        loop.call_soon_threadsafe(inside.set)
        release.wait(timeout=60)
        update(*operands)

    async def worker(context: WorkerContext) -> None:
        if context.index == 1:
            reads.append(context.read_version)
            if len(reads) == 1:
                await inside.wait()
                failed.set()
                raise LookupError("no data")
        await context.submit(torch.ones(N))

    async with python_lanes(
        shared, hold, workers=2, policy="awaited", read="snapshot", on_error="restart"
    ) as scheduler:
        run = asyncio.create_task(scheduler.run(worker, updates=2))
        await failed.wait()
        for _ in range(2):
            for _ in range(20):  # turns of the loop, in which a snapshot would be enqueued
                await asyncio.sleep(0)
            assert scheduler._dispatch.lanes is not None
            lane = scheduler._dispatch.lanes.lanes[1]
            await lane.done(lane.record_event())
        assert reads == [0]
        release.set()
        await run
    assert reads == [0, 1]


async def test_snapshot_of_an_iteration_that_fails_spoils_no_later_update(backend: str) -> None:
    shared = SharedParameters({"p": torch.zeros(N)})
    ones = torch.ones(N)

    async def worker(context: WorkerContext) -> None:
        if len(failed) < context.iteration // 3:
            failed.append(context.iteration)
            raise LookupError("no data")
        await context.submit(ones)

    failed: list[int] = []
    async with StreamScheduler(
        shared, workers=1, read="snapshot", on_error="restart", backend=backend,
        lr=1.0, alpha=0.0, eps=0.0,
    ) as scheduler:  # fmt: skip
        await scheduler.run(worker, updates=20)
    assert failed == [3, 6, 9, 12, 15, 18]
    assert shared.flat.eq(-20).all()
    assert ones.eq(1).all()


@pytest.mark.parametrize("form", [{}, {"eps_inside_sqrt": False}, {"weight_decay": 0.1}])
async def test_form_of_the_update_may_change_while_it_runs(
    backend: str, form: dict[str, Any]
) -> None:
    shared = SharedParameters({"p": torch.ones(N)})
    gradients = gradients_of(1)

    async def worker(context: WorkerContext) -> None:
        if context.iteration == 10:
            scheduler.hyperparameters = replace(scheduler.hyperparameters, **form)
        await context.submit(gradients[0])

    async with StreamScheduler(shared, workers=1, depth=2, backend=backend) as scheduler:
        await scheduler.run(worker, updates=20)
    param, ms = torch.ones(N), torch.zeros(N)
    for step in range(20):
        rmsprop_(param, gradients[0], ms, **(form if step >= 10 else {}))
    assert torch.equal(shared.flat, param)


@pytest.mark.parametrize(
    ("batch_of", "workers", "depth", "batch"),
    [
        ("lane", 1, 8, 8),
        ("lane", 3, 8, 3),
        ("lane", 2, 5, 4),
        ("lanes", 4, 1, 4),
        ("lanes", 3, 4, 7),
    ],
)
@pytest.mark.parametrize("updates", [1, 40, 43])
async def test_batches_lose_and_keep_no_update(
    backend: str, batch_of: str, workers: int, depth: int, batch: int, updates: int
) -> None:
    """Also those of a last batch that never fills."""
    shared = SharedParameters({"p": torch.zeros(N)})
    ones = torch.ones(N)

    async def worker(context: WorkerContext) -> None:
        await context.submit(ones)

    async with StreamScheduler(
        shared, workers=workers, depth=depth, batch=batch, batch_of=batch_of, policy="ordered",
        backend=backend, lr=1.0, alpha=0.0, eps=0.0,
    ) as scheduler:  # fmt: skip
        report = await asyncio.wait_for(scheduler.run(worker, updates=updates), timeout=60)
    assert report.updates == updates
    assert shared.flat.eq(-updates).all()


async def test_batch_is_handed_over_when_it_is_full(backend: str) -> None:
    """With a batch of 3 nothing lands until the third is submitted."""
    shared = SharedParameters({"p": torch.zeros(N)})
    versions: list[int] = []

    async def worker(context: WorkerContext) -> None:
        await context.submit(torch.ones(N))
        if context.iteration < 2:
            for _ in range(20):
                await asyncio.sleep(0)
        else:
            await context.lane.done(context.lane.record_event())
        versions.append(shared.version)

    async with StreamScheduler(shared, workers=1, depth=4, batch=3, backend=backend) as scheduler:
        await scheduler.run(worker, updates=3)
    assert versions == [0, 0, 3]


async def test_event_does_not_wait_for_a_batch_to_fill(backend: str) -> None:
    shared = SharedParameters({"p": torch.zeros(N)})

    async def worker(context: WorkerContext) -> None:
        await context.submit(torch.ones(N))
        await asyncio.wait_for(context.lane.done(context.lane.record_event()), timeout=60)
        assert shared.version == context.iteration + 1

    async with StreamScheduler(shared, workers=1, depth=4, batch=3, backend=backend) as scheduler:
        await scheduler.run(worker, updates=7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 3, "depth": 2}, r"batch must be an integer <= 2, as many .* got 3"),
        ({"batch": 9, "depth": 2, "batch_of": "lanes"}, r"batch must be an integer <= 8, .* got 9"),
        ({"batch": 2, "depth": 2, "policy": "awaited"}, "batch must be 1 with policy 'awaited'"),
        (
            {"batch": 2, "depth": 2, "policy": "bounded:3"},
            "batch must be 1 with policy 'bounded:3'",
        ),
        ({"batch_of": "all"}, "batch_of must be one of lane, lanes, got 'all'"),
        ({"state": "own"}, "state must be one of shared, per-worker, got 'own'"),
        ({"read": "copy"}, "read must be one of live, snapshot, got 'copy'"),
        ({"on_error": "ignore"}, "on_error must be one of stop, continue, restart, got 'ignore'"),
        ({"on_nonfinite": 1}, "on_nonfinite must be one of apply, skip, raise, got 1"),
        ({"deadline": 0}, "deadline must be a finite number > 0, got 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        StreamScheduler(SharedParameters({"p": torch.zeros(3)}), workers=4, **settings)


@pytest.mark.parametrize("name", ["telemetry", "staleness_aware"])
def test_switches_take_nothing_but_booleans(name: str) -> None:
    settings: dict[str, Any] = {name: "yes"}
    with pytest.raises(TypeError, match=f"{name} must be True or False, got 'yes'"):
        StreamScheduler(SharedParameters({"p": torch.zeros(3)}), workers=1, **settings)


async def test_event_of_a_lane_is_done_when_all_enqueued_before_has_landed(backend: str) -> None:
    shared = SharedParameters({"p": torch.zeros(1 << 16)})

    async def worker(context: WorkerContext) -> None:
        nothing = context.lane.record_event()
        await context.lane.done(nothing)  # at once: nothing was enqueued before
        await context.submit(torch.ones(1 << 16))
        event = context.lane.record_event()
        await context.lane.done(event)
        assert shared.version == context.iteration + 1
        await context.lane.done(event)  # again
        with pytest.raises(TypeError, match="event must be one that a lane recorded, got str"):
            await context.lane.done("now")

    async with StreamScheduler(shared, workers=1, depth=4, backend=backend) as scheduler:
        await scheduler.run(worker, updates=5)


async def test_wait_for_an_event_may_be_cancelled() -> None:
    shared = SharedParameters({"p": torch.zeros(N)})
    release = threading.Event()

    def hold(update: Callable[..., Any], *operands: Any) -> None:
        release.wait(timeout=60)
        update(*operands)

    async def worker(context: WorkerContext) -> None:
        await context.submit(torch.ones(N))
        waiting = asyncio.ensure_future(context.lane.done(context.lane.record_event()))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        release.set()

    async with python_lanes(shared, hold, workers=1, depth=2) as scheduler:
        report = await scheduler.run(worker, updates=1)
    assert report.updates == 1


@pytest.mark.parametrize("read", ["live", "snapshot"])
async def test_model_trains_from_what_its_worker_reads(read: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    shared = SharedParameters.from_module(model)
    x = torch.randn(64, 4)

    def loss(module: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = ((module(batch) - batch.sum(dim=1, keepdim=True)) ** 2).mean()
        return result

    def batches() -> Any:
        while True:
            yield x

    before = loss(model, x).item()
    worker = ModelWorker(shared, model, loss, batches())
    async with StreamScheduler(shared, workers=2, read=read, lr=0.02) as scheduler:
        await scheduler.run(worker, updates=150)
    assert loss(model, x).item() < before / 10


def test_memory_that_cannot_be_had_is_an_error_that_says_how_much() -> None:
    shared = SharedParameters({"p": torch.zeros(1 << 20)})
    with pytest.raises(MemoryError, match=r"worker_ms needs [0-9,]{15,} bytes on cpu"):
        shared.make_worker_state(1 << 30)
