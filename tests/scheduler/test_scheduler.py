from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import numpy as np
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
from scheduler_testing import COUNTING, POLICIES, python_lanes, small, submit_ones


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("policy", POLICIES)
async def test_every_update_asked_for_lands_once(
    backend: str, policy: str, workers: int, depth: int
) -> None:
    shared = small()
    async with StreamScheduler(
        shared, backend=backend, workers=workers, policy=policy, depth=depth
    ) as scheduler:
        first = await scheduler.run(submit_ones(shared), updates=37)
        assert shared.version == 37
        second = await scheduler.run(submit_ones(shared), updates=5)
    assert (first.updates, second.updates) == (37, 5)
    assert shared.version == 42
    assert len(first.updates_by_worker) == workers
    assert sum(first.staleness.values()) == len(first.latencies) == 37


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("policy", POLICIES)
async def test_one_worker_makes_the_updates_of_a_plain_loop(policy: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(1001, generator=generator) for _ in range(4)]
    options: dict[str, Any] = {
        "lr": 0.1,
        "eps": 0.01,
        "weight_decay": 0.1,
        "eps_inside_sqrt": False,
    }
    shared = SharedParameters({"p": torch.ones(1001)})
    async with StreamScheduler(
        shared, workers=1, policy=policy, backend=backend, **options
    ) as scheduler:
        report = await scheduler.run(SimulatedWorker(gradients, workers=1), updates=10)

    param, ms = torch.ones(1001), torch.zeros(1001)
    for step in range(10):
        rmsprop_(param, gradients[step % 4], ms, backend="numpy", **options)
    assert torch.equal(shared.flat, param)
    assert torch.equal(shared.ms, ms)
    assert dict(report.staleness) == {0: 10}


@pytest.mark.parametrize("policy", ["locked", "ordered", "awaited", "bounded:0"])
async def test_without_races_no_update_is_lost(
    backend: str, policy: str, counters: SharedParameters
) -> None:
    async with StreamScheduler(
        counters, backend=backend, workers=4, depth=2, policy=policy, **COUNTING
    ) as scheduler:
        await scheduler.run(submit_ones(counters), updates=200)
    assert counters.flat.eq(-200).all()


async def test_lock_free_updates_overlap(counters: SharedParameters) -> None:
    """Two lanes are inside an update at once: each waits there for the other."""
    together = threading.Barrier(2, timeout=60)

    def meet(update: Callable[..., Any], *operands: Any) -> None:
        together.wait()
        update(*operands)

    async with python_lanes(counters, meet, workers=2, **COUNTING) as scheduler:
        report = await scheduler.run(submit_ones(counters), updates=2)
    assert report.updates == 2


async def test_ordered_updates_land_in_the_order_of_submission(backend: str) -> None:
    """Updates do not commute, so the result tells the order; large and small ones alternate."""
    shared = small()
    submitted: list[float] = []

    async def worker(context: WorkerContext) -> None:
        size = float(context.index + 1 + context.iteration % 3)
        submitted.append(size)
        await context.submit(torch.full_like(shared.flat, size))

    async with StreamScheduler(shared, backend=backend, workers=5, policy="ordered") as scheduler:
        await scheduler.run(worker, updates=60)

    param, ms = torch.zeros(64), torch.zeros(64)
    for size in submitted:
        rmsprop_(param, torch.full((64,), size), ms)
    assert torch.equal(shared.flat, param)
    assert torch.equal(shared.ms, ms)


async def test_staleness_counts_landings_between_read_and_landing(backend: str) -> None:
    """Worker 0 reads first and lands last: after all four updates of worker 1."""
    shared = small()
    others_landed = asyncio.Event()

    async def worker(context: WorkerContext) -> None:
        if context.index == 0:
            await others_landed.wait()
        await context.submit(torch.ones(64))
        if context.iteration == 3:
            others_landed.set()

    async with StreamScheduler(shared, backend=backend, workers=2) as scheduler:
        report = await scheduler.run(worker, updates=5)
    assert dict(report.staleness) == {0: 4, 4: 1}
    assert report.updates_by_worker == [1, 4]


async def test_parameters_are_live_views(backend: str) -> None:
    shared = SharedParameters({"a": torch.zeros(2, 2), "b": torch.zeros(3)})
    seen: list[float] = []

    async def worker(context: WorkerContext) -> None:
        seen.append(context.parameters["b"][0].item())
        await context.submit(torch.ones(7))

    async with StreamScheduler(
        shared, backend=backend, workers=1, lr=1.0, alpha=0.0, eps=0.0
    ) as scheduler:
        await scheduler.run(worker, updates=3)
    assert seen == [0, -1, -2]


async def test_time_limit_ends_a_run(backend: str) -> None:
    shared = small()
    async with StreamScheduler(shared, backend=backend, workers=2) as scheduler:
        report = await scheduler.run(submit_ones(shared), seconds=0.02)
    assert report.updates == shared.version > 0
    assert report.seconds >= 0.02


async def test_blocking_work_leaves_the_event_loop_free(backend: str) -> None:
    shared = small()
    release = threading.Event()

    async def worker(context: WorkerContext) -> None:
        if context.index == 0:
            assert await context.run_blocking(release.wait, timeout=60)
        else:
            await context.run_blocking(release.set)  # reached only if worker 0 blocks no one
        await context.submit(torch.ones(64))

    async with StreamScheduler(shared, backend=backend, workers=2) as scheduler:
        await scheduler.run(worker, updates=2)
    assert shared.version == 2


@pytest.mark.parametrize("policy", POLICIES)
async def test_failing_worker_is_named_and_what_was_submitted_lands(
    backend: str, policy: str
) -> None:
    shared = small()

    async def worker(context: WorkerContext) -> None:
        if context.index == 2 and context.iteration == 3:
            raise LookupError("no more episodes")
        await context.submit(torch.ones(64))

    async with StreamScheduler(shared, backend=backend, workers=4, policy=policy) as scheduler:
        with pytest.raises(WorkerError, match="worker 2 failed: LookupError: no more ep") as caught:
            await scheduler.run(worker, updates=10**9)
        assert isinstance(caught.value.failures[2], LookupError)
        assert caught.value.__cause__ is caught.value.failures[2]
        landed = shared.version
        report = await scheduler.run(submit_ones(shared), updates=8)  # still of use
    assert report.updates == 8
    assert shared.version == landed + 8  # nothing was left to land late


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
async def test_update_that_fails_on_its_lane_is_an_error_of_its_worker(
    policy: str, depth: int
) -> None:
    shared = small()
    broken = True

    def fail(update: Callable[..., Any], *operands: Any) -> None:
        if broken:
            raise MemoryError("no scratch")
        update(*operands)

    async with python_lanes(shared, fail, workers=2, policy=policy, depth=depth) as scheduler:
        with pytest.raises(WorkerError, match="MemoryError: no scratch"):
            await scheduler.run(submit_ones(shared), updates=10)
        assert shared.version == 0
        assert scheduler.report is not None
        assert sum(scheduler.report.dropped) >= 1
        broken = False
        report = await scheduler.run(submit_ones(shared), updates=10)
    assert report.updates == 10


async def test_last_update_may_fail_unawaited_and_is_an_error_all_the_same() -> None:
    """With depth 2, the worker ends before its last update has landed."""
    shared = small()
    calls = 0

    def fail_third(update: Callable[..., Any], *operands: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise MemoryError("no scratch")
        update(*operands)

    async with python_lanes(shared, fail_third, workers=1, depth=2) as scheduler:
        with pytest.raises(WorkerError, match="worker 0 failed: MemoryError: no scratch"):
            await scheduler.run(submit_ones(shared), updates=3)
    assert shared.version == 2


async def test_failing_worker_ends_those_that_wait(backend: str) -> None:
    async def worker(context: WorkerContext) -> None:
        if context.index == 1:
            raise LookupError
        await asyncio.Event().wait()

    async with StreamScheduler(small(), backend=backend, workers=2) as scheduler:
        run = scheduler.run(worker, updates=2)
        with pytest.raises(WorkerError, match="worker 1 failed"):
            await asyncio.wait_for(run, timeout=60)


@pytest.mark.parametrize("policy", POLICIES)
async def test_cancelled_run_drains_and_leaves_whole_parameters(
    backend: str, policy: str, counters: SharedParameters
) -> None:
    under_way = asyncio.Event()

    async def worker(context: WorkerContext) -> None:
        await context.submit(torch.ones_like(counters.flat))
        if context.iteration == 5:
            under_way.set()

    async with StreamScheduler(
        counters, backend=backend, workers=4, depth=2, policy=policy, **COUNTING
    ) as scheduler:
        run = asyncio.create_task(scheduler.run(worker, updates=1_000_000))
        await under_way.wait()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        landed = counters.version
    assert counters.version == landed
    lost = landed + counters.flat  # each update takes 1 from each element
    if policy in ("locked", "ordered", "awaited"):
        assert lost.eq(0).all()
    else:  # updates may overwrite each other, but none is there that was not counted
        assert lost.ge(0).all()
        assert lost.lt(landed).all()


@pytest.mark.parametrize("cancellations", [1, 3])
async def test_cancelled_blocking_work_is_waited_for(backend: str, cancellations: int) -> None:
    started, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def block() -> None:
        loop.call_soon_threadsafe(started.set)
        release.wait(timeout=60)

    async def worker(context: WorkerContext) -> None:
        await context.run_blocking(block)

    async with StreamScheduler(small(), backend=backend, workers=1) as scheduler:
        run = asyncio.create_task(scheduler.run(worker, updates=1))
        await started.wait()
        for _ in range(cancellations):
            run.cancel()
            for _ in range(20):  # turns of the loop, in which an abandoned run would end
                await asyncio.sleep(0)
            assert not run.done()
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await run
        await scheduler.run(submit_ones(scheduler.shared), updates=1)  # still of use


async def test_leaving_the_scope_ends_a_run_under_way(backend: str) -> None:
    shared = small()
    under_way = asyncio.Event()

    async def worker(context: WorkerContext) -> None:
        await context.submit(torch.ones(64))
        under_way.set()

    async with StreamScheduler(shared, backend=backend, workers=3, depth=2) as scheduler:
        run = asyncio.create_task(scheduler.run(worker, updates=1_000_000))
        await under_way.wait()
    landed = shared.version
    with pytest.raises(RuntimeError, match="closed while it ran"):
        await run
    assert shared.version == landed


async def test_worker_that_cancels_itself_is_an_error(backend: str) -> None:
    async def worker(context: WorkerContext) -> None:
        raise asyncio.CancelledError

    async with StreamScheduler(small(), backend=backend, workers=2) as scheduler:
        with pytest.raises(WorkerError, match="cancelled, but not by the scheduler"):
            await scheduler.run(worker, updates=10)


async def test_gradient_refused_may_be_submitted_better(backend: str) -> None:
    shared = small()

    async def worker(context: WorkerContext) -> None:
        with pytest.raises(ValueError, match="shape"):
            await context.submit(torch.ones(63))
        await context.submit(torch.ones(64))

    async with StreamScheduler(shared, backend=backend, workers=1) as scheduler:
        report = await scheduler.run(worker, updates=3)
    assert report.updates == 3


async def test_update_given_up_before_its_launch_is_not_counted() -> None:
    """Worker 1 gives up the wait for the lock, which worker 0 holds until it is told."""
    shared = small()
    waiting = asyncio.Event()
    release = threading.Event()

    async def worker(context: WorkerContext) -> None:
        if context.index == 0:
            await context.submit(torch.ones(64))
            return
        submission = asyncio.ensure_future(context.submit(torch.ones(64)))
        await asyncio.sleep(0)  # it waits for the lock now
        submission.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submission
        waiting.set()

    async def unblock() -> None:
        await waiting.wait()
        release.set()

    def hold(update: Callable[..., Any], *operands: Any) -> None:
        release.wait(timeout=60)
        update(*operands)

    async with python_lanes(shared, hold, workers=2, policy="awaited") as scheduler:
        unblocking = asyncio.create_task(unblock())
        with pytest.raises(WorkerError, match=r"worker 1 .*without submitting a gradient"):
            await scheduler.run(worker, updates=2)
        await unblocking
    assert shared.version == 1


async def test_blocking_work_has_the_context_variables_of_its_caller(backend: str) -> None:
    batch = ContextVar("batch", default=-1)
    seen = []

    async def worker(context: WorkerContext) -> None:
        batch.set(10 * context.index + context.iteration)
        seen.append(await context.run_blocking(batch.get))
        await context.submit(torch.ones(64))

    async with StreamScheduler(small(), backend=backend, workers=2, policy="ordered") as scheduler:
        await scheduler.run(worker, updates=6)
    assert len(set(seen)) == 6
    assert min(seen) == 0


async def test_stop_iteration_in_blocking_work_is_an_error(backend: str) -> None:
    async def worker(context: WorkerContext) -> None:
        await context.run_blocking(next, iter(()))

    async with StreamScheduler(small(), backend=backend, workers=1) as scheduler:
        with pytest.raises(WorkerError, match="raised StopIteration"):
            await scheduler.run(worker, updates=1)


async def test_gradient_that_was_resized_is_refused(backend: str) -> None:
    """Its address has not changed, nor has the tensor."""
    grad = torch.ones(64)

    async def worker(context: WorkerContext) -> None:
        await context.submit(grad)
        grad.resize_(32)

    async with StreamScheduler(small(), backend=backend, workers=1) as scheduler:
        with pytest.raises(WorkerError, match=r"grad must have .*shape.*32"):
            await scheduler.run(worker, updates=2)


async def test_lazily_negated_gradient_is_taken_by_its_value(backend: str) -> None:
    negated = torch._neg_view(torch.ones(64))  # as autograd makes of complex numbers
    shared = small()

    async def worker(context: WorkerContext) -> None:
        await context.submit(negated)

    async with StreamScheduler(
        shared, backend=backend, workers=1, lr=1.0, alpha=0.0, eps=0.0
    ) as scheduler:
        await scheduler.run(worker, updates=1)
    assert shared.flat.eq(1).all()


async def test_error_in_the_scope_closes_the_lanes(backend: str) -> None:
    """That no thread is left is checked after each test here."""
    with pytest.raises(LookupError):
        async with StreamScheduler(small(), backend=backend, workers=3):
            raise LookupError


async def test_gradient_is_kept_until_it_has_landed(backend: str) -> None:
    """Each gradient is dropped by its worker at once; a reused buffer would change the sum."""
    shared = SharedParameters({"p": torch.zeros(1 << 14, dtype=torch.float64)})
    async with StreamScheduler(
        shared, backend=backend, workers=4, depth=4, policy="ordered", lr=1.0, alpha=0.0, eps=0.0
    ) as scheduler:

        async def worker(context: WorkerContext) -> None:
            await context.submit(torch.ones(1 << 14, dtype=torch.float64))

        await scheduler.run(worker, updates=100)
    assert shared.flat.eq(-100).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"workers": 0}, ValueError, "workers must be an integer >= 1, got 0"),
        ({"workers": 1.5}, TypeError, "workers must be an integer >= 1, got 1.5"),
        ({"workers": True}, TypeError, "workers must be an integer >= 1, got True"),
        ({"depth": 0}, ValueError, "depth must be an integer >= 1, got 0"),
        (
            {"policy": "free"},
            ValueError,
            "policy must be one of lock-free, .*, row-locked, or bounded:K .* got 'free'",
        ),
        ({"backend": "fortran"}, ValueError, "backend must be one of .*numpy.*, got 'fortran'"),
        ({"lr": -1}, ValueError, "lr must be a finite number >= 0, got -1"),
        ({"eps": float("nan")}, ValueError, "eps must be a finite number >= 0, got nan"),
        ({"policy": ["locked"]}, ValueError, r"policy must be one of .*, got \['locked'\]"),
        ({"backend": ["numpy"]}, ValueError, r"backend must be one of .*, got \['numpy'\]"),
        ({"lr": 10**400}, ValueError, "lr must be a finite number >= 0, got inf"),
        (
            {"nesterov": True},
            TypeError,
            r"hyperparameters must be among lr, .*, got \['nesterov'\]",
        ),
        ({"kahan_sum": True}, ValueError, "kahan_sum must be False in a scheduler, .* got True"),
        (
            {"stochastic_rounding": True},
            ValueError,
            "stochastic_rounding must be False in a scheduler, .* got True",
        ),
        ({"shared": torch.zeros(3)}, TypeError, "shared must be SharedParameters, got Tensor"),
    ],
)
def test_bad_settings_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        StreamScheduler(**{"shared": small(), "workers": 1, **arguments})


@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (np.ones(64, np.float32), TypeError, "grad must be a torch tensor, got ndarray"),
        (torch.ones(63), ValueError, r"grad must have the shape of param, \(64,\), got \(63,\)"),
        (torch.ones(64).double(), TypeError, "grad must be float32 as param, got float64"),
        (torch.ones(64).to_sparse(), ValueError, "grad must be dense, got layout sparse_coo"),
        (torch.ones(64, device="meta"), ValueError, "grad must be on cpu as param, got meta"),
        (torch.ones(128)[::2], ValueError, r"grad must be contiguous, got strides \(2,\)"),
    ],
)
async def test_bad_gradient_is_refused_and_changes_nothing(
    backend: str, grad: Any, error: type[Exception], message: str
) -> None:
    shared = small()

    async def worker(context: WorkerContext) -> None:
        await context.submit(grad)

    async with StreamScheduler(shared, backend=backend, workers=1) as scheduler:
        with pytest.raises(WorkerError, match=message) as caught:
            await scheduler.run(worker, updates=1)
    assert isinstance(caught.value.failures[0], error)
    assert shared.flat.eq(0).all()
    assert shared.version == 0


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        ({}, ValueError, "updates or seconds must be given"),
        ({"updates": 0}, ValueError, "updates must be an integer >= 1, got 0"),
        ({"updates": True}, TypeError, "updates must be an integer >= 1, got True"),
        ({"seconds": 0.0}, ValueError, "seconds must be a finite number > 0, got 0.0"),
        ({"seconds": float("nan")}, ValueError, "seconds must be a finite number > 0, got nan"),
        ({"seconds": "1"}, TypeError, "seconds must be a finite number > 0, got '1'"),
    ],
)
async def test_bad_budget_is_refused(
    backend: str, budget: dict[str, Any], error: type[Exception], message: str
) -> None:
    shared = small()
    async with StreamScheduler(shared, backend=backend, workers=1) as scheduler:
        with pytest.raises(error, match=message):
            await scheduler.run(submit_ones(shared), **budget)


async def test_gradient_that_is_the_parameters_is_refused(backend: str) -> None:
    shared = small()

    async def worker(context: WorkerContext) -> None:
        await context.submit(shared.flat)

    async with StreamScheduler(shared, backend=backend, workers=1) as scheduler:
        with pytest.raises(WorkerError, match="must not overlap"):
            await scheduler.run(worker, updates=1)


async def test_worker_that_is_not_async_is_an_error(backend: str) -> None:
    async with StreamScheduler(small(), backend=backend, workers=1) as scheduler:
        with pytest.raises(WorkerError, match=r"worker must be an async callable, got .*lambda"):
            await scheduler.run(lambda context: None, updates=1)  # type: ignore[arg-type,return-value]
        with pytest.raises(TypeError, match="worker must be an async callable, got None"):
            await scheduler.run(None, updates=1)  # type: ignore[arg-type]


async def test_new_learning_rate_holds_for_later_updates(backend: str) -> None:
    shared = small()

    async def worker(context: WorkerContext) -> None:
        scheduler.hyperparameters = replace(scheduler.hyperparameters, lr=10.0**-context.iteration)
        await context.submit(torch.ones(64))

    async with StreamScheduler(shared, backend=backend, workers=1, alpha=0.0, eps=0.0) as scheduler:
        await scheduler.run(worker, updates=3)
    assert shared.flat.tolist() == pytest.approx([-1.11] * 64)


async def test_workers_that_fail_alike_are_named_together(backend: str) -> None:
    async def worker(context: WorkerContext) -> None:
        raise LookupError("no data" if context.index < 2 else "no disk")

    async with StreamScheduler(small(), backend=backend, workers=3) as scheduler:
        with pytest.raises(WorkerError) as caught:
            await scheduler.run(worker, updates=3)
    assert str(caught.value) == (
        "workers 0, 1 failed: LookupError: no data; worker 2 failed: LookupError: no disk"
    )


async def test_worker_that_submits_nothing_is_an_error(backend: str) -> None:
    async def worker(context: WorkerContext) -> None:
        pass

    async with StreamScheduler(small(), backend=backend, workers=1) as scheduler:
        with pytest.raises(WorkerError, match="without submitting a gradient"):
            await scheduler.run(worker, updates=1)


async def test_worker_that_submits_twice_is_an_error(backend: str) -> None:
    async def worker(context: WorkerContext) -> None:
        await context.submit(torch.ones(64))
        await context.submit(torch.ones(64))

    async with StreamScheduler(small(), backend=backend, workers=1) as scheduler:
        with pytest.raises(WorkerError, match="submit once an iteration, got a second call"):
            await scheduler.run(worker, updates=2)


async def test_scheduler_used_out_of_its_scope_is_an_error(backend: str) -> None:
    shared = small()
    scheduler = StreamScheduler(shared, backend=backend, workers=1)
    with pytest.raises(RuntimeError, match="not open"):
        await scheduler.run(submit_ones(shared), updates=1)
    async with scheduler:
        with pytest.raises(RuntimeError, match="open already"):
            await scheduler.__aenter__()
    with pytest.raises(RuntimeError, match="not open"):
        await scheduler.run(submit_ones(shared), updates=1)
