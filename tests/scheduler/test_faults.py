"""What becomes of a run when workers fail, hang or are cancelled."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from hogstream.scheduler import SharedParameters, StreamScheduler, WorkerContext, WorkerError

POLICIES = ["lock-free", "locked", "ordered", "bounded:2"]
COUNTING: dict[str, Any] = {"lr": 1.0, "alpha": 0.0, "eps": 0.0}
ONES = torch.ones(64)


def small() -> SharedParameters:
    return SharedParameters({"p": torch.zeros(64)})


@pytest.mark.parametrize("policy", POLICIES)
async def test_others_go_on_without_the_worker_that_failed(policy: str, backend: str) -> None:
    """And do the updates that it leaves."""
    shared = small()

    async def worker(context: WorkerContext) -> None:
        if context.index == 1 and context.iteration == 2:
            raise LookupError("no more episodes")
        await context.submit(ONES)

    async with StreamScheduler(
        shared, workers=3, policy=policy, on_error="continue", backend=backend, **COUNTING
    ) as scheduler:
        report = await scheduler.run(worker, updates=30)
    assert report.updates == shared.version == 30
    assert report.updates_by_worker[1] == 2
    assert list(report.failures) == [1]
    assert isinstance(report.failures[1], LookupError)
    assert not report.partial


async def test_run_in_which_all_fail_is_an_error_even_if_others_could_go_on() -> None:
    async def worker(context: WorkerContext) -> None:
        raise LookupError(f"no data for {context.index}")

    async with StreamScheduler(small(), workers=2, on_error="continue") as scheduler:
        with pytest.raises(WorkerError, match=r"worker 0 failed: .* 0; worker 1 failed: .* 1"):
            await scheduler.run(worker, updates=10)


@pytest.mark.parametrize("policy", POLICIES)
async def test_failed_worker_starts_again(policy: str) -> None:
    """It fails at every third iteration, once."""
    shared = small()
    failed: set[int] = set()

    async def worker(context: WorkerContext) -> None:
        if context.iteration % 3 == 0 and context.iteration not in failed:
            failed.add(context.iteration)
            raise LookupError("try again")
        await context.submit(ONES)

    async with StreamScheduler(
        shared, workers=1, policy=policy, on_error="restart", **COUNTING
    ) as scheduler:
        report = await scheduler.run(worker, updates=10)
    assert report.updates_by_worker == [10]
    assert report.restarts == [4]
    assert shared.flat.eq(-10).all()
    assert isinstance(report.failures[0], LookupError)


async def test_worker_that_always_fails_is_given_up() -> None:
    tries = [0, 0]

    async def worker(context: WorkerContext) -> None:
        tries[context.index] += 1
        if context.index == 1:
            raise LookupError("no data")
        await context.submit(ONES)

    async with StreamScheduler(small(), workers=2, on_error="restart") as scheduler:
        report = await scheduler.run(worker, updates=10)
    assert tries == [10, 3]
    assert report.restarts == [0, 2]
    assert report.updates_by_worker == [10, 0]


@pytest.mark.parametrize("policy", ["lock-free", "locked", "bounded:1"])
async def test_worker_that_hangs_misses_its_deadline(policy: str) -> None:
    async def worker(context: WorkerContext) -> None:
        if context.index == 1 and context.iteration == 1:
            await asyncio.Event().wait()
        await context.submit(ONES)

    async with StreamScheduler(
        small(), workers=2, policy=policy, on_error="continue", deadline=0.2
    ) as scheduler:
        report = await scheduler.run(worker, updates=20)
    assert report.updates_by_worker == [19, 1]
    assert isinstance(report.failures[1], TimeoutError)
    assert str(report.failures[1]) == "iteration 1 took longer than deadline=0.2 s"


async def test_waiting_for_others_is_not_hanging() -> None:
    """Worker 1 waits for the lock much longer than the deadline."""
    shared = small()
    release = threading.Event()
    waited = asyncio.Event()

    async def worker(context: WorkerContext) -> None:
        if context.index == 1:
            waited.set()
        await context.submit(ONES)

    async def let_go() -> None:
        await waited.wait()
        await asyncio.sleep(0.3)  # ten deadlines
        release.set()

    scheduler = StreamScheduler(shared, workers=2, policy="locked", deadline=0.03, backend="numpy")
    update = scheduler.backend.kernel

    def hold(*operands: Any) -> None:
        if operands[0].elements > 1:
            release.wait(timeout=60)
        update(*operands)

    object.__setattr__(scheduler.backend, "kernel", hold)
    async with scheduler:
        letting_go = asyncio.create_task(let_go())
        report = await scheduler.run(worker, updates=2)
        await letting_go
    assert report.updates == 2
    assert not report.failures


@pytest.mark.parametrize("on_error", ["stop", "restart"])
async def test_blocking_call_that_hangs_is_left_behind(on_error: str) -> None:
    """And the worker gets another thread, if it starts again."""
    release = threading.Event()
    threads: list[int] = []

    def hang() -> None:
        threads.append(threading.get_ident())
        if len(threads) == 1:
            release.wait(timeout=60)

    async def worker(context: WorkerContext) -> None:
        await context.run_blocking(hang)
        await context.submit(ONES)

    async with StreamScheduler(small(), workers=1, on_error=on_error, deadline=0.2) as scheduler:
        if on_error == "stop":
            with pytest.raises(
                WorkerError, match="worker 0 failed: TimeoutError: iteration 0 took"
            ):
                await scheduler.run(worker, updates=3)
            report = scheduler.report
        else:
            report = await scheduler.run(worker, updates=3)
            assert report.updates == 3
            assert len(set(threads)) == 2
    assert report is not None
    assert "could not be ended, and was left behind" in str(report.failures[0])
    hung = [each for each in threading.enumerate() if each.ident == threads[0]]
    release.set()
    for thread in hung:
        thread.join()  # so that it ends once its call does


async def test_cancelled_run_does_not_wait_for_a_hanging_call_for_ever() -> None:
    release = threading.Event()
    started = threading.Event()

    def hang() -> None:
        started.set()
        release.wait(timeout=60)

    async def worker(context: WorkerContext) -> None:
        await context.run_blocking(hang)

    async with StreamScheduler(small(), workers=1, deadline=0.2) as scheduler:
        run = asyncio.create_task(scheduler.run(worker, updates=3))
        await asyncio.get_running_loop().run_in_executor(None, started.wait)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert scheduler.report is not None
        assert "left behind" in str(scheduler.report.failures[0])
    hung = [each for each in threading.enumerate() if each.name == "hogstream-worker-0"]
    release.set()
    for thread in hung:
        thread.join()
    await asyncio.get_running_loop().shutdown_default_executor()


@pytest.mark.parametrize("policy", POLICIES)
async def test_cancelled_run_leaves_a_report(policy: str, backend: str) -> None:
    shared = small()
    under_way = asyncio.Event()

    async def worker(context: WorkerContext) -> None:
        await context.submit(ONES)
        if context.iteration == 5:
            under_way.set()

    async with StreamScheduler(shared, workers=3, policy=policy, backend=backend) as scheduler:
        run = asyncio.create_task(scheduler.run(worker, updates=1_000_000))
        await under_way.wait()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        report = scheduler.report
    assert report is not None
    assert report.partial
    assert report.updates == shared.version >= 5
    assert report.to_dict()["partial"] is True


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("policy", POLICIES)
async def test_gradient_that_is_not_finite_is_left_out(
    policy: str, value: float, backend: str
) -> None:
    shared = SharedParameters({"p": torch.zeros(1000)})
    broken = torch.ones(1000)
    broken[777] = value

    async def worker(context: WorkerContext) -> None:
        await context.submit(broken if context.iteration == 1 else torch.ones(1000))

    async with StreamScheduler(
        shared, workers=1, policy=policy, on_nonfinite="skip", backend=backend, **COUNTING
    ) as scheduler:
        report = await scheduler.run(worker, updates=4)
    assert report.updates_by_worker == [3]
    assert report.nonfinite == [1]
    assert shared.version == 3
    assert shared.flat.eq(-3).all()
    assert shared.ms.eq(1).all()


async def test_gradient_that_is_not_finite_may_be_an_error(backend: str) -> None:
    shared = small()

    async def worker(context: WorkerContext) -> None:
        await context.submit(ONES * (float("nan") if context.index else 1))

    async with StreamScheduler(
        shared, workers=2, on_nonfinite="raise", on_error="continue", backend=backend
    ) as scheduler:
        report = await scheduler.run(worker, updates=9)
    assert isinstance(report.failures[1], FloatingPointError)
    assert report.nonfinite == [0, 1]
    assert report.updates == 9
    assert shared.flat.isfinite().all()


async def test_gradient_that_is_not_finite_is_applied_unless_told_otherwise(backend: str) -> None:
    shared = small()

    async def worker(context: WorkerContext) -> None:
        await context.submit(ONES * float("nan"))

    async with StreamScheduler(shared, workers=1, backend=backend) as scheduler:
        report = await scheduler.run(worker, updates=1)
    assert report.updates == 1
    assert shared.flat.isnan().all()


async def test_run_goes_on_from_the_iterations_of_another() -> None:
    seen: list[tuple[int, int]] = []

    async def worker(context: WorkerContext) -> None:
        seen.append((context.index, context.iteration))
        await context.submit(ONES)

    async with StreamScheduler(small(), workers=2, policy="locked") as scheduler:
        await scheduler.run(worker, updates=4, iterations=[3, 2])
        with pytest.raises(ValueError, match="iterations must be 2, one of each worker, got 1"):
            await scheduler.run(worker, updates=4, iterations=[3])
        with pytest.raises(ValueError, match=r"iterations must be an integer >= 0, got -1"):
            await scheduler.run(worker, updates=4, iterations=[3, -1])
    assert seen == [(1, 2), (0, 3), (1, 3), (0, 4)]
