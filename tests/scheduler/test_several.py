"""Several gradients in one ``submit``: each an update of its own."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from hogstream.scheduler import SharedParameters, StreamScheduler, WorkerContext, WorkerError
from hogstream.scheduler.lanes.threads import ThreadLanes
from process_testing import LIMIT_SECONDS
from scheduler_testing import COUNTING, POLICIES, python_lanes, small

SEVERAL = [policy for policy in POLICIES if not policy.startswith("bounded")]


def submit_several(shared: SharedParameters, count: int) -> Callable[[WorkerContext], Any]:
    """A worker that submits so many gradients of 1 an iteration."""
    grads = [torch.ones_like(shared.flat) for _ in range(count)]

    async def worker(context: WorkerContext) -> None:
        await context.submit(grads)

    return worker


@pytest.mark.parametrize("policy", SEVERAL)
@pytest.mark.parametrize("depth", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 5, 17])
async def test_each_is_an_update_and_as_many_land_as_were_asked_for(
    backend: str, policy: str, depth: int, count: int
) -> None:
    shared = small()
    settings: dict[str, Any] = {"policy": policy, "depth": depth, **COUNTING}
    async with StreamScheduler(shared, workers=3, backend=backend, **settings) as scheduler:
        report = await scheduler.run(submit_several(shared, count), updates=103)
        again = await scheduler.run(submit_several(shared, count), updates=1)
    assert (report.updates, again.updates, shared.version) == (103, 1, 104)
    assert not report.partial
    assert sum(report.staleness.values()) == len(report.latencies) == 103
    if policy != "lock-free":
        assert shared.flat.tolist() == [-104.0] * 64


@pytest.mark.parametrize(("batch", "batch_of"), [(2, "lane"), (4, "lane"), (3, "lanes")])
async def test_they_go_in_batches(backend: str, batch: int, batch_of: str) -> None:
    shared = small()
    settings: dict[str, Any] = {"depth": 4, "batch": batch, "batch_of": batch_of, **COUNTING}
    async with StreamScheduler(
        shared, workers=2, backend=backend, policy="ordered", **settings
    ) as scheduler:
        report = await scheduler.run(submit_several(shared, 7), updates=40)
    assert report.updates == 40
    assert shared.flat.tolist() == [-40.0] * 64


async def test_all_have_the_version_that_the_iteration_has_read(backend: str) -> None:
    shared = small()
    iterations = []

    async def worker(context: WorkerContext) -> None:
        iterations.append((context.iteration, context.read_version))
        await context.submit([torch.ones(64)] * 4)

    async with StreamScheduler(shared, workers=1, backend=backend) as scheduler:
        report = await scheduler.run(worker, updates=10)
    assert iterations == [(0, 0), (1, 4), (2, 8)]
    assert report.staleness == Counter({0: 3, 1: 3, 2: 2, 3: 2})


async def test_no_more_than_depth_are_in_flight() -> None:
    """And those that wait are enqueued when half of the lane is free."""
    may_land = threading.Semaphore(0)
    shared = small()

    def kernel(update: Callable[..., Any], *operands: Any) -> None:
        assert may_land.acquire(timeout=LIMIT_SECONDS)
        update(*operands)

    async with python_lanes(shared, kernel, workers=1, depth=4) as scheduler:
        lanes: Any = scheduler._dispatch.lanes
        (lane,) = lanes.lanes
        run = asyncio.create_task(scheduler.run(submit_several(shared, 9), updates=9))
        enqueued = []
        for landed in range(8):
            while lane._queue.delivered < landed:  # noqa: ASYNC110 (turns are what is counted)
                await asyncio.sleep(0)
            for _ in range(10):  # turns, in which the worker may go on
                await asyncio.sleep(0)
            enqueued.append(lane._queue.enqueued)
            may_land.release()
        may_land.release(2)
        report = await run
    assert enqueued == [4, 4, 6, 6, 8, 8, 9, 9]
    assert report.updates == 9


async def test_a_cancelled_submit_leaves_out_those_that_it_has_not_come_to() -> None:
    may_land = threading.Event()
    shared = small()
    submitted: list[int] = []

    def kernel(update: Callable[..., Any], *operands: Any) -> None:
        assert may_land.wait(LIMIT_SECONDS)
        update(*operands)

    async def worker(context: WorkerContext) -> None:
        grads = [torch.ones(64)] * 5
        if context.iteration:
            submitted.append(len(grads))
            await context.submit(grads)
            return
        submit = asyncio.create_task(context.submit(grads))
        await asyncio.sleep(0)  # it has filled the lane, and waits
        submit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submit
        with pytest.raises(RuntimeError, match="submit once an iteration, got a second call"):
            await context.submit(grads)
        may_land.set()

    async with python_lanes(shared, kernel, workers=1, depth=2, **COUNTING) as scheduler:
        report = await scheduler.run(worker, updates=12)
    assert submitted == [5, 5]  # after 2
    assert report.updates == shared.version == 12
    assert shared.flat.tolist() == [-12.0] * 64


@pytest.mark.parametrize("policy", ["lock-free", "locked"])
async def test_a_run_that_is_cancelled_lands_what_was_enqueued(policy: str) -> None:
    started, may_land = threading.Event(), threading.Event()
    shared = small()

    def kernel(update: Callable[..., Any], *operands: Any) -> None:
        started.set()
        assert may_land.wait(LIMIT_SECONDS)
        update(*operands)

    async with python_lanes(
        shared, kernel, workers=2, depth=2, policy=policy, **COUNTING
    ) as scheduler:
        run = asyncio.create_task(scheduler.run(submit_several(shared, 5), updates=100))
        await asyncio.to_thread(started.wait, LIMIT_SECONDS)
        run.cancel()
        may_land.set()
        with pytest.raises(asyncio.CancelledError):
            await run
        report = scheduler.report
        assert report is not None
        assert report.partial
        assert 1 <= report.updates == shared.version <= 4
        again = await scheduler.run(submit_several(shared, 5), updates=7)  # no lock is held
    assert again.updates == 7


@pytest.mark.parametrize("policy", SEVERAL)
@pytest.mark.parametrize("depth", [1, 3])
async def test_after_an_error_the_others_are_left_to_later_iterations(
    backend: str, policy: str, depth: int
) -> None:
    shared = small()
    good, bad = torch.ones(64), torch.full((64,), torch.inf)

    async def worker(context: WorkerContext) -> None:
        await context.submit([good, bad, good, good, good] if not context.iteration else [good] * 5)

    async with StreamScheduler(
        shared,
        workers=2,
        depth=depth,
        backend=backend,
        policy=policy,
        on_nonfinite="raise",
        on_error="restart",
    ) as scheduler:
        report = await scheduler.run(worker, updates=43)
    assert report.updates + sum(report.nonfinite) == 43
    assert report.nonfinite == [1, 1]
    assert report.updates == shared.version
    assert not report.partial


async def test_a_worker_that_fails_after_them_has_submitted_them(backend: str) -> None:
    shared = small()

    async def worker(context: WorkerContext) -> None:
        await context.submit([torch.ones(64)] * 3)
        raise LookupError("late")

    async with StreamScheduler(shared, workers=1, backend=backend, on_error="restart") as scheduler:
        report = await scheduler.run(worker, updates=10)
    assert report.updates == 10
    assert report.restarts == [4]


async def test_a_submit_that_is_not_awaited_to_its_end_is_an_error(backend: str) -> None:
    shared = small()
    submits = []

    async def worker(context: WorkerContext) -> None:
        submits.append(asyncio.create_task(context.submit([torch.ones(64)] * 5)))
        await asyncio.sleep(0)

    async with StreamScheduler(shared, workers=1, depth=2, backend=backend) as scheduler:
        with pytest.raises(WorkerError, match="returned before submit did"):
            await scheduler.run(worker, updates=5)
        await asyncio.gather(*submits, return_exceptions=True)
        assert scheduler.report is not None
        assert scheduler.report.updates == shared.version == 2


@pytest.mark.parametrize(
    ("grad", "policy", "error", "message"),
    [
        ([], "lock-free", ValueError, "grad must hold at least one gradient, got none"),
        ([torch.ones(64), torch.ones(63)], "lock-free", ValueError, "grad must"),
        ([torch.ones(64), None], "lock-free", TypeError, "grad must be a torch tensor"),
        (iter([torch.ones(64)]), "lock-free", TypeError, "grad must be a torch tensor"),
        (
            (torch.ones(64), torch.ones(64)),
            "bounded:1",
            ValueError,
            "grad must be one gradient with policy='bounded:1', got 2",
        ),
    ],
)
async def test_bad_gradients_are_refused_before_any_is_submitted(
    backend: str, grad: Any, policy: str, error: type[Exception], message: str
) -> None:
    shared = small()

    async def worker(context: WorkerContext) -> None:
        with pytest.raises(error, match=message):
            await context.submit(grad)
        assert shared.version == context.iteration
        await context.submit((torch.ones(64),))

    async with StreamScheduler(shared, workers=1, policy=policy, backend=backend) as scheduler:
        report = await scheduler.run(worker, updates=3)
    assert report.updates == 3


async def test_some_parameters_only(backend: str) -> None:
    shared = SharedParameters({"a": torch.zeros(3), "b": torch.zeros(5)})

    async def worker(context: WorkerContext) -> None:
        await context.submit([{"b": torch.ones(5)}] * 2)

    async with StreamScheduler(shared, workers=1, backend=backend, **COUNTING) as scheduler:
        await scheduler.run(worker, updates=4)
    assert shared.flat.tolist() == [0.0] * 3 + [-4.0] * 5


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("workers", "depth", "batch"), [(4, 4, 4), (4, 8, 16), (3, 2, 3), (2, 4, 8)]
)
async def test_workers_take_turns_in_a_batch_over_lanes(
    workers: int, depth: int, batch: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One update of each, and again: not all that one has room for, and then all of the next."""
    shared = small()
    batches: list[list[int]] = []
    flush = ThreadLanes.flush

    def note_batch(lanes: ThreadLanes, indices: Sequence[int]) -> None:
        batches.append(list(indices))
        flush(lanes, indices)

    monkeypatch.setattr(ThreadLanes, "flush", note_batch)
    settings: dict[str, Any] = {"depth": depth, "batch": batch, "batch_of": "lanes"}
    async with StreamScheduler(shared, workers=workers, backend="numpy", **settings) as scheduler:
        await scheduler.run(submit_several(shared, count), updates=workers * depth)
    assert [len(each) for each in batches] == [batch] * (workers * depth // batch)
    for each in batches:
        turns = [each[start : start + workers] for start in range(0, batch, workers)]
        assert all(sorted(turn) == list(range(workers)) for turn in turns), batches
