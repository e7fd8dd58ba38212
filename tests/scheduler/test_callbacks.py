"""What is heard of a run while it goes on, and how it is steered and stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hogstream.scheduler import (
    LinearDecay,
    Progress,
    StreamScheduler,
    WorkerContext,
    WorkerError,
)
from scheduler_testing import COUNTING, POLICIES, small, submit_ones

Heard = list[tuple[int, Any]]


def into(heard: Heard) -> Callable[[int, Any], None]:
    return lambda worker, value: heard.append((worker, value))


def of(heard: Heard, worker: int) -> list[Any]:
    return [value for index, value in heard if index == worker]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("batch", [1, 2])
async def test_losses_and_results_come_in_order(backend: str, policy: str, batch: int) -> None:
    """A loss for each update that has one, however many are in flight."""
    if batch > 1 and policy in ("awaited", "bounded:2"):
        pytest.skip("has no batches")
    shared = small()
    grad = torch.ones_like(shared.flat)
    losses: Heard = []
    results: Heard = []

    async def worker(context: WorkerContext) -> None:
        context.send([context.index, context.iteration])
        loss = None if context.iteration % 3 == 2 else context.iteration
        await context.submit(grad, loss=loss)

    settings: dict[str, Any] = {"workers": 3, "depth": 4, "batch": batch, "policy": policy}
    async with StreamScheduler(shared, backend=backend, **settings) as scheduler:
        report = await scheduler.run(
            worker, updates=60, on_loss=into(losses), on_result=into(results)
        )
    for index, updates in enumerate(report.updates_by_worker):
        assert of(losses, index) == [each for each in range(updates) if each % 3 != 2]
        assert of(results, index) == [[index, each] for each in range(updates)]
    assert all(type(loss) is float for _, loss in losses)


async def test_each_of_several_gradients_has_a_loss(backend: str) -> None:
    """Those beyond the run's updates have none landed."""
    shared = small()
    grads = [torch.ones_like(shared.flat)] * 4
    losses: Heard = []

    async def worker(context: WorkerContext) -> None:
        await context.submit(grads, loss=[float(4 * context.iteration + each) for each in range(4)])

    async with StreamScheduler(shared, backend=backend, workers=1, depth=2) as scheduler:
        await scheduler.run(worker, updates=10, on_loss=into(losses))
    assert losses == [(0, each) for each in range(10)]


async def test_what_does_not_land_has_no_loss(backend: str) -> None:
    shared = small()
    grads = [torch.ones(64), torch.full((64,), torch.inf)]
    losses: Heard = []

    async def worker(context: WorkerContext) -> None:
        await context.submit(grads[context.iteration % 2], loss=context.iteration)

    settings: dict[str, Any] = {"workers": 1, "on_nonfinite": "skip"}
    async with StreamScheduler(shared, backend=backend, **settings) as scheduler:
        await scheduler.run(worker, updates=6, on_loss=into(losses))
    assert losses == [(0, 0), (0, 2), (0, 4)]


@pytest.mark.parametrize(
    ("loss", "error", "text"),
    [
        ("low", TypeError, "loss must be a number or None, got 'low'"),
        (True, TypeError, "loss must be a number or None, got True"),
        ([1.0], TypeError, r"loss must be a number or None, got \[1.0\]"),
    ],
)
async def test_a_wrong_loss_submits_nothing(loss: Any, error: type[Exception], text: str) -> None:
    shared = small()

    async def worker(context: WorkerContext) -> None:
        with pytest.raises(error, match=text):
            await context.submit(torch.ones(64), loss=loss)
        with pytest.raises(ValueError, match="loss must be 2 numbers, one of each gradient, got 1"):
            await context.submit([torch.ones(64)] * 2, loss=[1.0])
        with pytest.raises(TypeError, match="loss must be a list or tuple of numbers"):
            await context.submit([torch.ones(64)] * 2, loss=1.0)
        await context.submit(torch.ones(64), loss=float(torch.tensor(1.0)))

    async with StreamScheduler(shared, workers=1) as scheduler:
        report = await scheduler.run(worker, updates=1)
    assert report.updates == 1


@pytest.mark.parametrize("on_error", ["stop", "continue", "restart"])
@pytest.mark.parametrize("raising", ["on_loss", "on_result"])
async def test_a_callback_that_raises_ends_the_run(
    backend: str, on_error: str, raising: str
) -> None:
    """With its error, once all has landed that was submitted; no callback is called any more."""
    shared = small()
    grad = torch.ones_like(shared.flat)
    submitted = 0
    calls = []

    def call(worker: int, value: float) -> None:
        calls.append(value)
        if len(calls) == 5:
            raise LookupError("nobody listens")

    async def worker(context: WorkerContext) -> None:
        nonlocal submitted
        context.send(context.iteration)
        submitted += 1
        await context.submit(grad, loss=1.0)

    settings: dict[str, Any] = {"workers": 3, "depth": 3, "on_error": on_error, **COUNTING}
    async with StreamScheduler(shared, backend=backend, policy="locked", **settings) as scheduler:
        callbacks: dict[str, Any] = {raising: call}
        with pytest.raises(LookupError, match="nobody listens"):
            await scheduler.run(worker, updates=10_000, **callbacks)
        assert len(calls) == 5
        assert scheduler.report is not None
        assert scheduler.report.partial
        assert scheduler.report.updates == submitted == -int(shared.flat[0])
        assert not scheduler.report.failures
        assert (await scheduler.run(worker, updates=3)).updates == 3


async def test_an_error_of_a_callback_is_raised_when_the_run_is_cancelled() -> None:
    """It comes of what lands as the run ends, and nobody else would tell of it."""
    shared = small()
    started = asyncio.Event()

    def call(worker: int, loss: float) -> None:
        raise LookupError("nobody listens")

    async def worker(context: WorkerContext) -> None:
        try:
            started.set()
            await asyncio.sleep(3600)
        finally:
            await context.submit(torch.ones(64), loss=1.0)

    async with StreamScheduler(shared, workers=1) as scheduler:
        run = asyncio.ensure_future(scheduler.run(worker, updates=1, on_loss=call))
        await started.wait()
        run.cancel()
        with pytest.raises(LookupError, match="nobody listens"):
            await run


async def awaited(worker: int, value: Any) -> None:
    """No callback, as nobody would await it."""


@pytest.mark.parametrize("name", ["on_loss", "on_result", "lr_schedule"])
@pytest.mark.parametrize("value", [3, awaited])
async def test_callbacks_are_plain_functions(name: str, value: Any) -> None:
    shared = small()
    async with StreamScheduler(shared, workers=1) as scheduler:
        with pytest.raises(TypeError, match=f"{name} must be a plain function, got "):
            await scheduler.run(submit_ones(shared), updates=1, **{name: value})
        assert (await scheduler.run(submit_ones(shared), updates=1)).updates == 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget", [{"updates": 10_000}, {"seconds": 3600.0}])
@pytest.mark.parametrize("asks", ["on_loss", "on_result", "task"])
async def test_stop_lets_iterations_finish(
    backend: str, policy: str, budget: dict[str, Any], asks: str
) -> None:
    shared = small()
    grad = torch.ones_like(shared.flat)
    begun = [0, 0, 0]
    finished = [0, 0, 0]
    enough = asyncio.Event()

    async def worker(context: WorkerContext) -> None:
        begun[context.index] += 1
        context.send(None)
        await asyncio.sleep(0)
        await context.submit(grad, loss=1.0)
        finished[context.index] += 1
        if finished[context.index] == 4:
            enough.set()

    def call(worker: int, value: Any) -> None:
        if worker == 1 and begun[1] >= 4:
            scheduler.stop()

    async def stop() -> None:
        await enough.wait()
        scheduler.stop()

    callbacks: dict[str, Any] = {} if asks == "task" else {asks: call}
    async with StreamScheduler(shared, backend=backend, workers=3, policy=policy) as scheduler:
        scheduler.stop()  # before a run it stops nothing
        task = asyncio.ensure_future(stop()) if asks == "task" else None
        report = await scheduler.run(worker, **budget, **callbacks)
        if task is not None:
            await task
        scheduler.stop()  # nor the next one
        assert report.partial
        assert report.updates_by_worker == begun == finished
        assert not report.failures
        assert (await scheduler.run(submit_ones(shared), updates=5)).updates == 5


async def test_stop_where_all_was_begun_leaves_nothing_out() -> None:
    """Also of an iteration that has several gradients, and of workers that wait for others."""
    shared = small()

    async def worker(context: WorkerContext) -> None:
        scheduler.stop()
        await asyncio.sleep(0)
        await context.submit([torch.ones(64)] * 4)

    settings: dict[str, Any] = {"workers": 3, "on_error": "continue"}
    async with StreamScheduler(shared, **settings) as scheduler:
        report = await scheduler.run(worker, updates=4)
    assert report.updates == 4
    assert not report.partial


@pytest.mark.parametrize(
    ("decay", "progress", "expected"),
    [
        (LinearDecay(0.8, updates=100), (25, 9.0), 0.6),
        (LinearDecay(0.8, updates=100, to=0.4), (50, 0.0), 0.6),
        (LinearDecay(0.8, updates=100, to=0.4), (1000, 0.0), 0.4),
        (LinearDecay(0.8, seconds=10.0), (5, 2.5), 0.6),
        (LinearDecay(0.8, updates=100, seconds=10.0), (25, 5.0), 0.4),
        (LinearDecay(0.8, updates=100, seconds=10.0), (75, 5.0), 0.2),
        (LinearDecay(0.0, updates=4, to=1.0), (1, 0.0), 0.25),
    ],
)
def test_linear_decay(decay: LinearDecay, progress: tuple[int, float], expected: float) -> None:
    assert decay(Progress(*progress)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        ({}, ValueError, "updates or seconds must be given, got neither"),
        ({"updates": 0}, ValueError, "updates must be an integer >= 1, got 0"),
        ({"seconds": 0}, ValueError, "seconds must be a finite number > 0, got 0"),
        ({"updates": 1, "to": -1}, ValueError, "to must be a finite number >= 0, got -1"),
        ({"updates": 1, "lr": "1"}, TypeError, "lr must be a finite number >= 0, got '1'"),
    ],
)
def test_a_decay_must_be_one(values: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        LinearDecay(**{"lr": 0.1, **values})


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("at_once", [1, 2])
async def test_updates_have_the_learning_rate_of_their_schedule(
    backend: str, policy: str, at_once: int
) -> None:
    """It is asked of each as it is submitted; other hyperparameters stay as they are assigned."""
    if at_once > 1 and policy == "bounded:2":
        pytest.skip("takes one gradient")
    shared = small()
    grads = [torch.ones_like(shared.flat)] * at_once
    asked: list[Progress] = []
    rates = [2.0 ** (n // 2) for n in range(1, 4 * at_once + 1)]  # the same when others change

    def schedule(progress: Progress) -> float:
        asked.append(progress)
        return rates[len(asked) - 1]

    async def worker(context: WorkerContext) -> None:
        if context.iteration == 2:
            scheduler.hyperparameters = replace(scheduler.hyperparameters, lr=64.0, maximize=True)
        await context.submit(grads if at_once > 1 else grads[0])

    settings: dict[str, Any] = {"workers": 1, "policy": policy, **COUNTING}
    async with StreamScheduler(shared, backend=backend, **settings) as scheduler:
        await scheduler.run(worker, updates=4 * at_once, lr_schedule=schedule)
        expected = sum(rates[2 * at_once :]) - sum(rates[: 2 * at_once])
        assert shared.flat.tolist() == [expected] * 64
        assert [progress.version for progress in asked] == list(range(4 * at_once))
        seconds = [progress.seconds for progress in asked]
        assert 0 <= seconds[0] <= seconds[-1] <= scheduler.report.seconds  # type: ignore[union-attr]
        shared.flat.zero_()
        await scheduler.run(worker, updates=at_once)
    assert shared.flat.tolist() == [64.0 * at_once] * 64


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("wrong", [-1.0, "fast", 1e-60, "raises"])
async def test_a_wrong_learning_rate_fails_its_worker(
    policy: str, at_once: int, wrong: Any
) -> None:
    """And keeps no other from going on."""
    if at_once > 1 and policy == "bounded:2":
        pytest.skip("takes one gradient")
    shared = small()

    def schedule(progress: Progress) -> Any:
        if progress.version < 3:
            return 1.0
        if wrong == "raises":
            raise LookupError("lr")
        return wrong

    async def worker(context: WorkerContext) -> None:
        await context.submit([torch.ones(64)] * at_once if at_once > 1 else torch.ones(64))

    async with StreamScheduler(shared, workers=2, policy=policy, on_error="continue") as scheduler:
        with pytest.raises(WorkerError, match="lr"):
            await scheduler.run(worker, updates=50, lr_schedule=schedule)
        assert scheduler.report is not None
        assert 3 <= scheduler.report.updates == shared.version < 8
        assert (await scheduler.run(worker, updates=4)).updates == 4


async def test_sending_is_for_the_run_and_its_loop() -> None:
    shared = small()
    contexts: list[WorkerContext] = []

    async def worker(context: WorkerContext) -> None:
        contexts.append(context)
        context.send(object())  # nobody wants it
        with pytest.raises(RuntimeError, match="must call send in its scheduler's event loop"):
            await context.run_blocking(context.send, 1)
        await context.submit(torch.ones(64))

    async with StreamScheduler(shared, workers=1) as scheduler:
        await scheduler.run(worker, updates=1)
        with pytest.raises(RuntimeError, match="must call send while its run goes on"):
            contexts[0].send(1)
