"""Cancellations that come again and again, event loops that change, contexts kept too long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hogstream.scheduler import StreamScheduler, WorkerContext, WorkerError, budget
from hogstream.scheduler.cancellation import uncancelled
from scheduler_testing import POLICIES, small, submit_ones


async def cancel_until_done(task: asyncio.Future[Any]) -> None:
    """As a scope does whose deadline has passed: at every turn of the loop."""
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_wait_goes_on_whatever_is_cancelled_and_how_often() -> None:
    begun, release = [], asyncio.Event()

    async def wait() -> str:
        begun.append(1)
        await release.wait()
        return "seen through"

    task = asyncio.ensure_future(uncancelled(wait))
    canceller = asyncio.ensure_future(cancel_until_done(task))
    await turns(50)
    assert not task.done()
    release.set()
    await canceller
    assert task.cancelled()
    assert len(begun) == 1


async def test_wait_begins_again_when_all_tasks_are_cancelled() -> None:
    begun, release = [], asyncio.Event()

    async def wait() -> None:
        begun.append(1)
        await release.wait()

    task = asyncio.ensure_future(uncancelled(wait))
    await turns(2)
    for each in asyncio.all_tasks() - {asyncio.current_task()}:
        each.cancel()
    await turns(5)
    assert not task.done()
    release.set()
    await asyncio.wait({task})
    assert task.cancelled()
    assert len(begun) == 2


async def test_error_of_what_is_waited_for_is_raised() -> None:
    async def wait() -> None:
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        await uncancelled(wait)


@pytest.mark.parametrize("bursts", [1, 2, 3])
async def test_burst_of_cancellations_is_answered_once(
    bursts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[str] = []
    release = asyncio.Event()

    async def wait() -> None:
        await release.wait()

    # The clock of the loop is the test's: it goes on only between bursts.
    loop, now = asyncio.get_running_loop(), [0.0]
    monkeypatch.setattr(loop, "time", lambda: now[0])
    answers = (lambda: answered.append("stop")), (lambda: answered.append("kill"))
    task = asyncio.ensure_future(uncancelled(wait, *answers))
    await turns(2)
    for _ in range(bursts):
        for _ in range(30):
            task.cancel()
            await asyncio.sleep(0)
        now[0] += 1.0
        await turns(30)
    assert answered == ["stop", "kill"][:bursts]
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("policy", POLICIES)
async def test_run_ends_under_endless_cancellation(policy: str, backend: str) -> None:
    shared = small()
    started = asyncio.Event()
    grad = torch.ones(64)

    async def worker(context: WorkerContext) -> None:
        started.set()
        await context.submit(grad)
        await asyncio.sleep(0)

    async with StreamScheduler(shared, backend=backend, workers=2, policy=policy) as scheduler:
        run = asyncio.ensure_future(scheduler.run(worker, updates=1_000_000))
        await started.wait()
        await cancel_until_done(run)
        assert run.cancelled()
        assert scheduler.report is not None
        assert scheduler.report.partial
        assert scheduler.report.updates == shared.version
        whole = await scheduler.run(worker, updates=4)
        assert (whole.updates, whole.partial) == (4, False)


@pytest.mark.parametrize("after_turns", [0, 1, 3, 10])
async def test_scope_closes_under_endless_cancellation(after_turns: int, backend: str) -> None:
    shared = small()

    async def scope() -> None:
        async with StreamScheduler(shared, backend=backend, workers=2) as scheduler:
            await scheduler.run(submit_ones(shared), updates=1_000_000)

    task = asyncio.ensure_future(scope())
    await turns(1 + after_turns)
    await cancel_until_done(task)
    assert task.cancelled()
    assert shared.users == 0


async def test_worker_that_puts_off_its_end_is_waited_for(backend: str) -> None:
    shared = small()
    started, release = asyncio.Event(), asyncio.Event()

    async def worker(context: WorkerContext) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await release.wait()

    async with StreamScheduler(shared, backend=backend, workers=1) as scheduler:
        run = asyncio.ensure_future(scheduler.run(worker, updates=1))
        await started.wait()
        canceller = asyncio.ensure_future(cancel_until_done(run))
        await turns(50)
        assert not run.done()
        release.set()
        await canceller
        assert scheduler.report is not None
        assert (scheduler.report.updates, scheduler.report.partial) == (0, True)


Use = Callable[[StreamScheduler], Awaitable[Any]]


@pytest.mark.parametrize(
    "use",
    [
        lambda scheduler: scheduler.run(submit_ones(scheduler.shared), updates=1),
        lambda scheduler: scheduler.__aexit__(None, None, None),
    ],
    ids=["run", "leave"],
)
def test_another_event_loop_is_refused(use: Use, backend: str) -> None:
    scheduler = StreamScheduler(small(), backend=backend, workers=1)
    loop, other = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        loop.run_until_complete(scheduler.__aenter__())
        with pytest.raises(RuntimeError, match="in the event loop that it was opened in"):
            other.run_until_complete(use(scheduler))
        report = loop.run_until_complete(scheduler.run(submit_ones(scheduler.shared), updates=3))
        assert report.updates == 3
        loop.run_until_complete(scheduler.__aexit__(None, None, None))
    finally:
        loop.close()
        other.close()


#: What a context is asked for, and with what.
METHODS: dict[str, Any] = {
    "submit": torch.ones(64),
    "run_blocking": int,
    "compute": lambda: (torch.ones(64), None),
}


@pytest.mark.parametrize("method", METHODS)
async def test_context_is_of_one_thread(method: str, backend: str) -> None:
    argument = METHODS[method]

    async def worker(context: WorkerContext) -> None:
        def elsewhere() -> None:
            asyncio.run(getattr(context, method)(argument))

        with pytest.raises(RuntimeError, match=f"worker 0 must call {method} in its scheduler's"):
            await asyncio.to_thread(elsewhere)
        await context.submit(torch.ones(64))

    async with StreamScheduler(small(), backend=backend, workers=1) as scheduler:
        assert (await scheduler.run(worker, updates=2)).updates == 2


async def test_lane_is_of_one_event_loop(backend: str) -> None:
    async def worker(context: WorkerContext) -> None:
        await context.submit(torch.ones(64))
        event = context.lane.record_event()

        async def wait() -> None:
            await context.lane.done(event)

        with pytest.raises(RuntimeError, match="the lane must be used in the event loop that"):
            await asyncio.to_thread(asyncio.run, wait())

    async with StreamScheduler(small(), backend=backend, workers=1) as scheduler:
        assert (await scheduler.run(worker, updates=2)).updates == 2


async def test_no_room_for_a_thread_is_an_error_of_the_worker(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def worker(context: WorkerContext) -> None:
        await context.run_blocking(int)
        await context.submit(torch.ones(64))

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")  # as Python has it

    async with StreamScheduler(small(), backend=backend, workers=2) as scheduler:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(WorkerError, match="start new thread"):
                await scheduler.run(worker, updates=2)
        assert (await scheduler.run(worker, updates=2)).updates == 2


@pytest.mark.parametrize("open_", [True, False])
@pytest.mark.parametrize("blocked_before", [True, False])
@pytest.mark.parametrize("method", METHODS)
async def test_context_is_of_one_run(
    method: str, blocked_before: bool, open_: bool, backend: str
) -> None:
    argument = METHODS[method]
    kept: list[WorkerContext] = []

    async def worker(context: WorkerContext) -> None:
        kept.append(context)
        if blocked_before:
            await context.run_blocking(int)
        await context.submit(torch.ones(64))

    async def use() -> None:
        with pytest.raises(RuntimeError, match=f"must call {method} while its run goes on"):
            await getattr(kept[0], method)(argument)

    async with StreamScheduler(small(), backend=backend, workers=1) as scheduler:
        await scheduler.run(worker, updates=1)
        if open_:
            await use()
    if not open_:
        await use()


async def test_submission_outside_of_an_iteration_says_so(backend: str) -> None:
    refused = asyncio.Event()
    late: list[asyncio.Task[None]] = []

    async def submit_late(context: WorkerContext) -> None:
        await turns(100)  # by then the worker has found that nothing is left to do
        assert context.iteration == 1
        with pytest.raises(RuntimeError, match="worker 0 must call submit within an iteration"):
            await context.submit(torch.ones(64))
        refused.set()

    async def worker(context: WorkerContext) -> None:
        await context.submit(torch.ones(64))
        if context.index == 0:
            late.append(asyncio.ensure_future(submit_late(context)))
        else:
            await refused.wait()

    async with StreamScheduler(small(), backend=backend, workers=2) as scheduler:
        await scheduler.run(worker, updates=2)
        await late[0]


@pytest.mark.parametrize("failing_after", [True, False])
async def test_what_was_handed_out_and_not_done_is_missing(
    failing_after: bool, backend: str
) -> None:
    """One worker fails while another has taken the last update, and has not submitted it yet."""
    shared = small()
    taken = asyncio.Event()

    async def worker(context: WorkerContext) -> None:
        if context.index == 1:
            taken.set()
            await asyncio.Event().wait()
        await taken.wait()
        if failing_after:
            await context.submit(torch.ones(64))
        raise ValueError("fails")

    async with StreamScheduler(shared, backend=backend, workers=2) as scheduler:
        with pytest.raises(WorkerError, match="worker 0 failed: ValueError: fails"):
            await scheduler.run(worker, updates=2)
        assert scheduler.report is not None
        assert scheduler.report.updates == int(failing_after)
        assert scheduler.report.partial


async def test_time_that_passes_while_a_run_is_stopped_is_missing(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    failing, release = asyncio.Event(), threading.Event()

    def block() -> None:
        release.wait(timeout=60)
        now[0] = 10.0

    async def worker(context: WorkerContext) -> None:
        if context.index == 1:
            failing.set()
            try:
                await context.run_blocking(block)
            finally:
                release.set()  # the run is being stopped
        await failing.wait()
        raise ValueError("fails")

    async with StreamScheduler(small(), backend=backend, workers=2) as scheduler:
        with pytest.raises(WorkerError, match="worker 0 failed"):
            await scheduler.run(worker, seconds=5.0)
        assert scheduler.report is not None
        assert scheduler.report.partial


class Unprintable(Exception):
    def __str__(self) -> str:
        raise TypeError("no text")


async def test_error_without_a_text_is_still_told(backend: str) -> None:
    async def worker(context: WorkerContext) -> None:
        raise Unprintable

    async with StreamScheduler(small(), backend=backend, workers=1) as scheduler:
        with pytest.raises(WorkerError, match="worker 0 failed: Unprintable: ") as caught:
            await scheduler.run(worker, updates=1)
        assert isinstance(caught.value.failures[0], Unprintable)
        assert scheduler.report is not None
        assert scheduler.report.to_dict()["failures"]["0"].startswith("Unprintable: ")
