"""What becomes of a run when workers fail, hang or are cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hogstream.scheduler import (
    ModelWorker,
    SharedParameters,
    SimulatedWorker,
    StreamScheduler,
    WorkerContext,
    WorkerError,
)
from scheduler_testing import COUNTING, POLICIES, python_lanes, small

ONES = torch.ones(64)


@pytest.mark.parametrize("policy", ["lock-free", "locked", "ordered", "awaited", "bounded:8"])
async def test_others_go_on_without_the_worker_that_failed(policy: str, backend: str) -> None:
    """And do the updates that it leaves; they wait for its failure first, or could do them all."""
    shared = small()
    failed = asyncio.Event()

    async def worker(context: WorkerContext) -> None:
        if context.index == 1 and context.iteration == 2:
            failed.set()
            raise LookupError("no more episodes")
        if context.index != 1:
            await failed.wait()
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


@pytest.mark.parametrize("policy", ["lock-free", "locked", "awaited", "bounded:1"])
async def test_worker_that_hangs_misses_its_deadline(policy: str) -> None:
    async def worker(context: WorkerContext) -> None:
        if context.index == 1:  # in its first iteration, which it is sure to get
            await asyncio.Event().wait()
        await context.submit(ONES)

    async with StreamScheduler(
        small(), workers=2, policy=policy, on_error="continue", deadline=0.2
    ) as scheduler:
        report = await scheduler.run(worker, updates=20)
    assert report.updates_by_worker == [20, 0]
    assert isinstance(report.failures[1], TimeoutError)
    assert str(report.failures[1]) == "iteration 0 took longer than deadline=0.2 s"


@pytest.mark.parametrize("policy", ["locked", "awaited"])
async def test_waiting_for_others_is_not_hanging(policy: str) -> None:
    """Worker 1 waits for the lock much longer: its lane does, or the event loop."""
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

    def hold(update: Callable[..., Any], *operands: Any) -> None:
        release.wait(timeout=60)
        update(*operands)

    async with python_lanes(shared, hold, workers=2, policy=policy, deadline=0.03) as scheduler:
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
    loop_errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, error: loop_errors.append(error))

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
    await asyncio.sleep(0)  # a turn of the loop, which hears of that
    assert not loop_errors


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
    assert report.updates == 8  # of 9 that were submitted
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

    async with StreamScheduler(small(), workers=2, policy="awaited") as scheduler:
        await scheduler.run(worker, updates=4, iterations=[3, 2])
        with pytest.raises(ValueError, match="iterations must be 2, one of each worker, got 1"):
            await scheduler.run(worker, updates=4, iterations=[3])
        with pytest.raises(ValueError, match=r"iterations must be an integer >= 0, got -1"):
            await scheduler.run(worker, updates=4, iterations=[3, -1])
    assert seen == [(1, 2), (0, 3), (1, 3), (0, 4)]


@pytest.mark.parametrize("depth", [1, 3])
async def test_cancelled_waits_do_not_put_more_in_flight_than_the_depth(
    backend: str, depth: int
) -> None:
    """Each update has a weight of its own, so that one applied twice or never changes the sum."""
    shared = SharedParameters({"p": torch.zeros(1 << 15)})
    expected = 0.0

    async def worker(context: WorkerContext) -> None:
        nonlocal expected
        # With alpha=0 and eps=0 an update subtracts exactly lr.
        scheduler.hyperparameters = replace(scheduler.hyperparameters, lr=2.0**context.iteration)
        expected -= 2.0**context.iteration
        submission = asyncio.ensure_future(context.submit(torch.ones(1 << 15)))
        for _ in range(2):
            await asyncio.sleep(0)
        submission.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await submission

    async with StreamScheduler(
        shared, workers=1, depth=depth, on_error="continue", backend=backend, **COUNTING
    ) as scheduler:
        run = scheduler.run(worker, updates=12)
        with contextlib.suppress(WorkerError):  # if even the wait for room was cancelled
            await asyncio.wait_for(run, timeout=60)
        assert scheduler.report is not None
        landed = scheduler.report.updates
    assert landed == shared.version
    assert shared.flat.eq(1 - 2.0**landed).all()


@pytest.mark.parametrize("on_error", ["stop", "continue", "restart"])
@pytest.mark.parametrize("policy", POLICIES)
async def test_submission_left_behind_by_a_failing_iteration_locks_nobody_out(
    policy: str, on_error: str
) -> None:
    """``gather`` does not cancel the submission when what runs beside it fails."""
    shared = small()

    async def step(context: WorkerContext) -> None:
        if context.index == 1 and context.iteration == 2:
            raise LookupError("the environment has gone")

    async def worker(context: WorkerContext) -> None:
        await asyncio.gather(context.submit(ONES), step(context))

    async with StreamScheduler(
        shared, workers=3, policy=policy, on_error=on_error, **COUNTING
    ) as scheduler:
        with contextlib.suppress(WorkerError):
            await asyncio.wait_for(scheduler.run(worker, updates=30), timeout=60)
        with contextlib.suppress(WorkerError):
            await asyncio.wait_for(scheduler.run(worker, updates=30), timeout=60)
        assert scheduler.report is not None
        landed = scheduler.report.updates
        assert landed <= 30
    assert policy not in ("locked", "ordered", "awaited") or shared.flat.eq(-shared.version).all()


async def test_submission_may_be_awaited_in_the_next_iteration(backend: str) -> None:
    """Gradients are made while the one before is on its way."""
    shared = small()
    before: dict[int, asyncio.Future[None]] = {}

    async def worker(context: WorkerContext) -> None:
        if context.index in before:
            await before[context.index]
        before[context.index] = asyncio.ensure_future(context.submit(ONES))
        await asyncio.sleep(0)

    async with StreamScheduler(
        shared, workers=2, policy="ordered", backend=backend, **COUNTING
    ) as scheduler:
        report = await asyncio.wait_for(scheduler.run(worker, updates=20), timeout=60)
    await asyncio.gather(*before.values())
    assert report.updates == 20
    assert shared.flat.eq(-20).all()


class Outcome(BaseException):
    """As test frameworks have to skip a test."""


@pytest.mark.parametrize("on_error", ["stop", "continue"])
@pytest.mark.parametrize("policy", POLICIES)
async def test_any_exception_is_a_failure(policy: str, on_error: str) -> None:
    async def worker(context: WorkerContext) -> None:
        if context.index == 1:
            raise Outcome("skipped")
        await context.submit(ONES)

    async with StreamScheduler(small(), workers=2, policy=policy, on_error=on_error) as scheduler:
        run = asyncio.wait_for(scheduler.run(worker, updates=10), timeout=60)
        if on_error == "stop":
            with pytest.raises(WorkerError, match="worker 1 failed: Outcome: skipped"):
                await run
        else:
            report = await run
            assert report.updates_by_worker == [10, 0]
            assert isinstance(report.failures[1], Outcome)


async def test_failure_after_the_update_does_not_take_it_back() -> None:
    """Nor does it count as a failure without an update."""
    shared = small()

    async def worker(context: WorkerContext) -> None:
        await context.submit(ONES)
        raise LookupError("the log is full")

    async with StreamScheduler(shared, workers=1, on_error="restart", **COUNTING) as scheduler:
        report = await scheduler.run(worker, updates=10)
    assert report.updates == shared.version == 10
    assert shared.flat.eq(-10).all()
    assert not report.partial


async def test_model_whose_worker_fails_after_submitting_keeps_its_gradients_apart() -> None:
    """The next iteration must not clear the gradient of an update in flight."""
    model = torch.nn.Linear(200, 200, bias=False)
    shared = SharedParameters.from_module(model)
    shared.flat.zero_()

    def loss(module: torch.nn.Module, _: None) -> torch.Tensor:
        return sum((parameter.sum() for parameter in module.parameters()), torch.zeros(()))

    model_worker = ModelWorker(shared, model, loss, [None])

    async def worker(context: WorkerContext) -> None:
        await model_worker(context)
        raise LookupError("the log is full")

    async with StreamScheduler(
        shared, workers=1, depth=2, on_error="restart", **COUNTING
    ) as scheduler:
        report = await scheduler.run(worker, updates=20)
    assert report.updates == 20
    assert shared.flat.eq(-20).all()


async def test_model_that_waits_for_no_landing_keeps_its_gradients_apart() -> None:
    """An update in flight whose submission was cancelled still reads its gradient."""
    model = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.zeros_(model.weight)
    shared = SharedParameters.from_module(model)
    loop, applies, released = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def kernel(update: Any, *operands: Any) -> None:
        loop.call_soon_threadsafe(applies.set)
        released.wait(timeout=60)
        update(*operands)

    def loss(module: torch.nn.Module, sign: float) -> torch.Tensor:
        return sign * next(module.parameters()).sum()

    model_worker = ModelWorker(shared, model, loss, iter([1.0, -1.0]))

    async def worker(context: WorkerContext) -> None:
        if context.iteration == 0:
            iteration = asyncio.ensure_future(model_worker(context))
            await applies.wait()
            iteration.cancel()
            raise LookupError("it takes too long")
        submit = context.submit

        async def submit_and_release(*arguments: Any, **options: Any) -> None:
            released.set()  # only now, when the second gradient has been made
            await submit(*arguments, **options)

        context.submit = submit_and_release  # type: ignore[method-assign]
        await model_worker(context)

    # On a lane: where they are not ordered, its own thread applies a worker's updates.
    settings = {"workers": 1, "policy": "ordered", "on_error": "restart", **COUNTING}
    async with python_lanes(shared, kernel, **settings) as scheduler:
        report = await scheduler.run(worker, updates=2)
    assert report.updates == 2
    assert model.weight.eq(0).all()  # one up, one down


async def test_run_that_all_workers_left_early_is_an_error() -> None:
    async def worker(context: WorkerContext) -> None:
        if context.iteration == 3:
            raise LookupError("no more data")
        await context.submit(ONES)

    async with StreamScheduler(small(), workers=2, on_error="continue") as scheduler:
        with pytest.raises(WorkerError, match="workers 0, 1 failed: LookupError") as caught:
            await scheduler.run(worker, updates=1000)
        assert scheduler.report is not None
        assert scheduler.report.updates == 6
        assert scheduler.report.partial
    copied = pickle.loads(pickle.dumps(caught.value))
    assert str(copied) == str(caught.value)
    assert sorted(copied.failures) == [0, 1]


async def test_two_schedulers_with_a_bound_do_not_wait_for_each_other() -> None:
    shared = small()

    async def run() -> int:
        async with StreamScheduler(shared, workers=2, policy="bounded:1") as scheduler:
            return (await scheduler.run(SimulatedWorker([ONES] * 2, workers=2), updates=50)).updates

    assert list(await asyncio.wait_for(asyncio.gather(run(), run()), timeout=60)) == [50, 50]
    assert shared.version == 100


async def test_worker_may_clean_up_after_its_deadline() -> None:
    cleaned = False

    async def worker(context: WorkerContext) -> None:
        nonlocal cleaned
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.2)  # some deadlines
            cleaned = True

    async with StreamScheduler(small(), workers=1, deadline=0.05) as scheduler:
        with pytest.raises(WorkerError, match="TimeoutError: iteration 0 took longer"):
            await scheduler.run(worker, updates=1)
    assert cleaned


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tasks count cancellations from 3.11 on")
async def test_deadline_that_was_missed_leaves_no_cancellation_behind() -> None:
    """Or ``asyncio.timeout`` and task groups of later iterations would take it for theirs."""
    seen: list[int] = []

    async def worker(context: WorkerContext) -> None:
        task: Any = asyncio.current_task()
        seen.append(task.cancelling())
        if len(seen) == 1:
            await asyncio.Event().wait()
        await context.submit(ONES)

    async with StreamScheduler(small(), workers=1, on_error="restart", deadline=0.05) as scheduler:
        await scheduler.run(worker, updates=2)
    assert seen == [0, 0, 0]


async def test_run_cancelled_before_its_last_update_is_partial() -> None:
    waiting = asyncio.Event()

    async def worker(context: WorkerContext) -> None:
        waiting.set()
        await asyncio.Event().wait()
        await context.submit(ONES)

    async with StreamScheduler(small(), workers=1) as scheduler:
        run = asyncio.create_task(scheduler.run(worker, updates=1))
        await waiting.wait()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert scheduler.report is not None
        assert (scheduler.report.updates, scheduler.report.partial) == (0, True)


async def test_blocked_event_loop_is_not_the_fault_of_who_waits() -> None:
    blocked = False

    async def worker(context: WorkerContext) -> None:
        nonlocal blocked
        if context.index == 0 and not blocked:
            blocked = True
            threading.Event().wait(timeout=0.5)  # ten deadlines, of the event loop
        await asyncio.sleep(0.001)
        await context.submit(ONES)

    async with StreamScheduler(small(), workers=2, deadline=0.05) as scheduler:
        report = await scheduler.run(worker, updates=20)
    assert report.updates == 20


async def test_waiting_for_an_event_of_the_lane_is_not_hanging() -> None:
    release = threading.Event()

    def hold(update: Callable[..., Any], *operands: Any) -> None:
        release.wait(timeout=0.3)  # six deadlines
        update(*operands)

    async def worker(context: WorkerContext) -> None:
        await context.submit(ONES)
        await context.lane.done(context.lane.record_event())

    async with python_lanes(small(), hold, workers=1, depth=2, deadline=0.25) as scheduler:
        report = await scheduler.run(worker, updates=2)
    assert report.updates == 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("timeline", "trace.json", "timeline must be a Timeline or None, got 'trace.json'"),
        ("process_lock", threading.Lock(), "process_lock must be a ProcessLock or None, got"),
    ],
)
def test_settings_of_a_wrong_type_are_refused(name: str, value: Any, message: str) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(TypeError, match=message):
        StreamScheduler(small(), workers=1, **settings)


async def test_other_things_cannot_be_changed_while_it_runs() -> None:
    shared = small()
    async with StreamScheduler(shared, workers=1) as scheduler:
        with pytest.raises(TypeError, match="hyperparameters must be Hyperparameters, got dict"):
            scheduler.hyperparameters = {"lr": 1e-4}  # type: ignore[assignment]
        with pytest.raises(RuntimeError, match="shared must not move while a scheduler is open"):
            shared.share_memory_(1)
        with pytest.raises(TypeError, match="iterations must be a sequence of integers, got 3"):
            await scheduler.run(SimulatedWorker([ONES], workers=1), updates=1, iterations=3)  # type: ignore[arg-type]
    shared.share_memory_(1)


async def test_gradient_may_be_pointed_elsewhere_while_its_update_is_in_flight(
    backend: str,
) -> None:
    """What is updated with is the memory that was submitted."""
    shared = small()
    grad = torch.ones(64)

    async def worker(context: WorkerContext) -> None:
        await context.submit(grad)
        grad.data = torch.ones(64)

    async with StreamScheduler(
        shared, workers=1, depth=3, backend=backend, **COUNTING
    ) as scheduler:
        await scheduler.run(worker, updates=50)
    assert shared.flat.eq(-50).all()
