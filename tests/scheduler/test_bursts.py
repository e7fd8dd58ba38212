"""``WorkerContext.compute``: a worker's thread applies what it computes, in bursts."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hogstream.scheduler import SharedParameters, StreamScheduler, WorkerContext, WorkerError
from hogstream.scheduler import context as context_module
from hogstream.scheduler.budget import Budget
from hogstream.scheduler.bursts import Burst
from hogstream.scheduler.gradients import Gradient
from hogstream.scheduler.tracing.timeline import Timeline
from process_testing import LIMIT_SECONDS
from scheduler_testing import COUNTING, python_lanes, small

ONES = torch.ones(64)

#: What a function of ``compute`` returns.
Computed = tuple[Gradient, float | None]


@pytest.fixture
def long_bursts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst ends for every reason but that its time is over."""
    monkeypatch.setattr(context_module, "SECONDS", LIMIT_SECONDS)
    monkeypatch.setattr(context_module, "SECONDS_ON_LOOP", LIMIT_SECONDS)


class Computing:
    """A worker whose function notes each of its calls, and may do something in some."""

    def __init__(self, in_call: dict[int, Callable[[], object]] | None = None) -> None:
        self.in_call = in_call or {}
        self.begun = self.calls = 0
        self.iterations: list[int] = []  # of each call
        self.threads: set[int] = set()

    async def __call__(self, context: WorkerContext) -> None:
        self.begun += 1
        await context.compute(self.compute, context)

    def compute(self, context: WorkerContext) -> Computed:
        self.calls += 1
        self.iterations.append(context.iteration)
        self.threads.add(threading.get_ident())
        self.in_call.get(self.calls, int)()
        return ONES, float(self.calls)


class Blocker:
    """Blocks a call on a worker's thread until it is released, and says when it was reached."""

    def __init__(self) -> None:
        self.reached, self.released = asyncio.Event(), threading.Event()
        self._loop = asyncio.get_running_loop()

    def block(self) -> None:
        self._loop.call_soon_threadsafe(self.reached.set)
        assert self.released.wait(LIMIT_SECONDS)


def fail() -> Any:
    raise LookupError("no more data")


@pytest.mark.parametrize("policy", ["lock-free", "locked"])
@pytest.mark.parametrize("own_process", [False, True])
async def test_a_worker_makes_several_updates_in_a_burst(
    own_process: bool, policy: str, backend: str
) -> None:
    shared, worker, losses = small(), Computing(), list[float]()
    scheduler = StreamScheduler(
        shared, backend=backend, workers=1, policy=policy, own_process=own_process, **COUNTING
    )
    async with scheduler:
        report = await scheduler.run(
            worker, updates=2000, on_loss=lambda _, loss: losses.append(loss)
        )
    assert report.updates == worker.calls == shared.version == 2000
    assert shared.flat.eq(-2000).all()
    assert losses == [float(call) for call in range(1, 2001)]
    assert report.staleness == {0: 2000}
    assert worker.iterations == list(range(2000))
    assert worker.begun < 2000
    assert (threading.get_ident() in worker.threads) == own_process


# Where the event loop, or the lane, must come between two updates.
ONE_BY_ONE: dict[str, dict[str, Any]] = {
    "ordered": {"policy": "ordered"},
    "awaited": {"policy": "awaited"},
    "bounded": {"policy": "bounded:0"},
    "deep": {"depth": 2},
    "snapshot": {"read": "snapshot"},
    "deadline": {"deadline": LIMIT_SECONDS},
}


@pytest.mark.parametrize("case", ONE_BY_ONE)
async def test_elsewhere_each_update_is_an_iteration(
    case: str, backend: str, long_bursts: None
) -> None:
    shared, worker = small(), Computing()
    settings = {**ONE_BY_ONE[case], **COUNTING}
    async with StreamScheduler(shared, backend=backend, workers=1, **settings) as scheduler:
        report = await scheduler.run(worker, updates=50)
    assert report.updates == worker.begun == 50
    assert worker.iterations == list(range(50))
    assert shared.flat.eq(-50).all()


async def test_a_schedule_is_asked_for_each_update(backend: str, long_bursts: None) -> None:
    shared, asked = small(), list[int]()

    def schedule(progress: Any) -> float:
        asked.append(progress.version)
        return float(progress.version + 1)

    async with StreamScheduler(shared, backend=backend, workers=1, **COUNTING) as scheduler:
        await scheduler.run(Computing(), updates=5, lr_schedule=schedule)
    assert asked == [0, 1, 2, 3, 4]
    assert shared.flat.eq(-(1 + 2 + 3 + 4 + 5)).all()


async def test_a_slow_worker_leaves_the_others_what_there_is_to_do(
    backend: str, long_bursts: None
) -> None:
    """It takes no more from the run's budget than it is likely to make."""
    shared, others = small(), threading.Event()
    calls = [0, 0]

    def compute(worker: int) -> Computed:
        calls[worker] += 1
        if worker == 0 and calls[0] == 3:
            assert others.wait(LIMIT_SECONDS)
        if calls[1] == 990:
            others.set()
        return ONES, None

    async def worker(context: WorkerContext) -> None:
        await context.compute(compute, context.index)

    async with StreamScheduler(shared, backend=backend, workers=2) as scheduler:
        report = await scheduler.run(worker, updates=1000)
    assert report.updates == shared.version == 1000


@pytest.mark.parametrize(
    ("left", "taken"), [(None, 50), (1000, 50), (160, 10), (15, 0), (0, 0)], ids=str
)
def test_the_less_is_left_the_less_one_of_four_takes_at_once(left: int | None, taken: int) -> None:
    budget = Budget(1, None) if left is not None else Budget(None, 1.0)
    budget.updates = left
    assert budget.take_part(4, 50) == taken
    assert budget.updates == (None if left is None else left - taken)


async def test_hyperparameters_are_those_of_the_moment(backend: str, long_bursts: None) -> None:
    shared = small()
    scheduler = StreamScheduler(shared, backend=backend, workers=1, **COUNTING)

    def double() -> None:
        scheduler.hyperparameters = replace(scheduler.hyperparameters, lr=2.0)

    async with scheduler:
        await scheduler.run(Computing({3: double}), updates=8)
    assert shared.flat.eq(-(2 * 1 + 6 * 2)).all()


# Ends of a burst


@pytest.mark.parametrize("own_process", [False, True])
async def test_what_has_landed_counts_when_a_later_call_fails(
    own_process: bool, backend: str, long_bursts: None
) -> None:
    shared = small()
    scheduler = StreamScheduler(
        shared, backend=backend, workers=1, own_process=own_process, **COUNTING
    )
    async with scheduler:
        with pytest.raises(WorkerError, match="LookupError: no more data"):
            await scheduler.run(Computing({3: fail}), updates=100)
        assert scheduler.report is not None
        assert scheduler.report.updates == 2
        assert shared.flat.eq(-2).all()


async def test_a_worker_that_fails_in_a_burst_is_started_again(
    backend: str, long_bursts: None
) -> None:
    """As often as updates have landed in between."""
    calls = [3, 4, 8, 10, 12, 14, 16]
    shared, worker = small(), Computing(dict.fromkeys(calls, fail))
    settings = {"workers": 1, "on_error": "restart", **COUNTING}
    async with StreamScheduler(shared, backend=backend, **settings) as scheduler:
        report = await scheduler.run(worker, updates=100)
    assert report.updates == 100
    assert report.restarts == [len(calls)]
    assert worker.calls == 100 + len(calls)
    assert shared.flat.eq(-100).all()


async def test_a_burst_ends_when_its_time_is_over(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_module, "SECONDS", 0.0)
    worker = Computing()
    async with StreamScheduler(small(), backend=backend, workers=1) as scheduler:
        await scheduler.run(worker, updates=50)
    assert worker.begun == 50


async def test_what_is_computed_waits_for_an_update_that_nobody_waits_for() -> None:
    """One of the worker's own is on its lane still: they are applied one after the other."""
    shared, loop = small(), asyncio.get_running_loop()
    applies, computed, released = asyncio.Event(), asyncio.Event(), threading.Event()
    under_way, most = 0, 0

    def kernel(update: Any, *operands: Any) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        loop.call_soon_threadsafe(applies.set)
        assert released.wait(LIMIT_SECONDS)
        update(*operands)
        under_way -= 1

    def compute() -> Computed:
        loop.call_soon_threadsafe(computed.set)
        return ONES, None

    async def worker(context: WorkerContext) -> None:
        if context.iteration == 0:
            submits = asyncio.ensure_future(context.submit(ONES))
            await applies.wait()
            submits.cancel()
        else:
            waits = asyncio.ensure_future(context.compute(compute))
            await computed.wait()
            for _ in range(10):  # turns, in which it may go on
                await asyncio.sleep(0)
            released.set()
            await waits

    async with python_lanes(shared, kernel, workers=1, **COUNTING) as scheduler:
        await scheduler.run(worker, updates=20)
    assert most == 1
    assert shared.flat.eq(-20).all()


# The first burst makes up to two updates, the second up to four. In an iteration that has made
# none, the worker must submit again.
@pytest.mark.parametrize(("call", "again"), [(1, True), (2, False), (4, True), (5, False)])
async def test_what_is_computed_still_is_dropped_when_the_wait_is_cancelled(
    call: int, again: bool, backend: str, long_bursts: None
) -> None:
    """And what has landed in the burst counts; the run makes the updates that it was asked for."""
    shared, blocker = small(), Blocker()
    computing = Computing({call: blocker.block})

    async def worker(context: WorkerContext) -> None:
        waits, reaches = map(asyncio.ensure_future, (computing(context), blocker.reached.wait()))
        await asyncio.wait({waits, reaches}, return_when=asyncio.FIRST_COMPLETED)
        if blocker.released.is_set() or not blocker.reached.is_set():
            await waits
            reaches.cancel()
            return
        waits.cancel()
        with suppress(asyncio.CancelledError):
            await waits
        blocker.released.set()
        if again:
            await computing(context)

    async with StreamScheduler(shared, backend=backend, workers=1, **COUNTING) as scheduler:
        report = await scheduler.run(worker, updates=100)
    assert report.updates == shared.version == 100
    assert computing.calls == 101
    assert shared.flat.eq(-100).all()


async def test_a_run_that_is_cancelled_hears_of_what_has_landed(
    backend: str, long_bursts: None
) -> None:
    shared, blocker = small(), Blocker()
    computing = Computing({5: blocker.block})

    async def worker(context: WorkerContext) -> None:
        try:
            await computing(context)
        except asyncio.CancelledError:
            blocker.released.set()
            raise

    async with StreamScheduler(shared, backend=backend, workers=1, **COUNTING) as scheduler:
        run = asyncio.ensure_future(scheduler.run(worker, updates=100))
        await blocker.reached.wait()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert scheduler.report is not None
        assert scheduler.report.updates == 4
        assert shared.flat.eq(-4).all()


async def test_a_burst_ends_with_its_iteration(backend: str, long_bursts: None) -> None:
    """Though whoever awaits it goes on: the next iteration has the updates that it left."""
    shared, blocker = small(), Blocker()
    computing, detached = Computing({5: blocker.block}), list[asyncio.Future[Any]]()

    async def worker(context: WorkerContext) -> None:
        if blocker.reached.is_set():
            blocker.released.set()
            await context.submit(ONES)
            return
        detached[:] = [asyncio.ensure_future(computing(context))]
        reaches: asyncio.Future[Any] = asyncio.ensure_future(blocker.reached.wait())
        await asyncio.wait([*detached, reaches], return_when=asyncio.FIRST_COMPLETED)
        reaches.cancel()
        if blocker.reached.is_set():
            raise LookupError("it takes too long")

    settings = {"workers": 1, "on_error": "restart", **COUNTING}
    async with StreamScheduler(shared, backend=backend, **settings) as scheduler:
        report = await scheduler.run(worker, updates=100)
        await asyncio.wait(detached)
    assert report.updates == shared.version == 100
    assert report.restarts == [1]
    assert shared.flat.eq(-100).all()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("computes", [True, False])
def test_python_may_end_in_on_loss(
    computes: bool, error: type[BaseException], workers: int, backend: str
) -> None:
    """It ends what is under way, on all lanes."""
    shared, left = small(), list[Any]()

    def on_loss(worker: int, loss: float) -> None:
        if shared.version > 20:
            raise error("enough")

    async def worker(context: WorkerContext) -> None:
        if computes:
            await context.compute(lambda: (ONES, 1.0))
        else:
            await context.submit(ONES, loss=1.0)

    async def main() -> None:
        async with StreamScheduler(shared, backend=backend, workers=workers) as scheduler:
            left.append(scheduler)
            await scheduler.run(worker, updates=100_000, on_loss=on_loss)

    with pytest.raises(error, match="enough"):
        asyncio.run(main())
    assert left[0].report.updates == shared.version


def test_a_child_of_a_fork_leaves_a_burst_to_its_parent() -> None:
    applied, children = torch.zeros(1).share_memory_(), list[int]()

    class Applier:
        def apply(self, update: Any) -> None:
            applied.add_(1)

    def make_update() -> Any:
        if not children:
            children.append(os.fork())
        return SimpleNamespace(error=None, nonfinite=False)

    Burst(make_update, Applier(), 3, LIMIT_SECONDS, Budget(3, None)).run()
    if children == [0]:
        os._exit(0)
    os.waitpid(children[0], 0)
    assert applied.item() == 3


async def test_stop_ends_a_burst(backend: str, long_bursts: None) -> None:
    loop, stopped = asyncio.get_running_loop(), threading.Event()
    scheduler = StreamScheduler(small(), backend=backend, workers=1)

    def stop() -> None:
        scheduler.stop()
        stopped.set()

    def ask() -> None:
        loop.call_soon_threadsafe(stop)
        assert stopped.wait(LIMIT_SECONDS)

    async with scheduler:
        report = await scheduler.run(Computing({3: ask}), updates=100)
    assert report.updates == 3
    assert report.partial


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
async def test_a_gradient_that_is_not_finite(
    on_nonfinite: str, backend: str, long_bursts: None
) -> None:
    shared, calls = small(), 0

    def compute() -> Computed:
        nonlocal calls
        calls += 1
        return (ONES * float("nan") if calls == 2 else ONES.clone()), None

    async def worker(context: WorkerContext) -> None:
        await context.compute(compute)

    settings = {"workers": 1, "on_nonfinite": on_nonfinite, **COUNTING}
    async with StreamScheduler(shared, backend=backend, **settings) as scheduler:
        if on_nonfinite == "raise":
            with pytest.raises(WorkerError, match="FloatingPointError: a gradient held"):
                await scheduler.run(worker, updates=10)
        else:
            await scheduler.run(worker, updates=10)
        assert scheduler.report is not None
        done = 1 if on_nonfinite == "raise" else 9
        assert scheduler.report.updates == done
        assert scheduler.report.nonfinite == [1]
        assert shared.flat.eq(-done).all()


# What it leaves alone


async def test_the_mode_of_a_thread_stays_its_own(backend: str) -> None:
    """What a function has set for its thread is not for the update, and is there afterwards."""
    tiny = torch.full((64,), 1e-39)  # a denormal number
    shared, seen = small(), list[bool]()

    def compute() -> Computed:
        seen.append(bool((tiny * 1).eq(0).all()))
        torch.set_flush_denormal(True)
        return ONES, None

    async def worker(context: WorkerContext) -> None:
        await context.compute(compute)

    numbers = {**COUNTING, "lr": 1e-39}
    async with StreamScheduler(shared, backend=backend, workers=1, **numbers) as scheduler:
        await scheduler.run(worker, updates=3)
    assert seen == [False, True, True]
    assert torch.equal(shared.flat, -(tiny + tiny + tiny))


async def test_a_gradient_by_name_does_not_outlive_its_update(
    backend: str, long_bursts: None
) -> None:
    shared = SharedParameters({"a": torch.zeros(64), "b": torch.zeros(4)})
    made: list[weakref.ref[torch.Tensor]] = []

    def compute() -> Computed:
        assert all(grad() is None for grad in made)
        grad = torch.ones(64)
        made.append(weakref.ref(grad))
        return {"a": grad}, None

    async def worker(context: WorkerContext) -> None:
        await context.compute(compute)

    async with StreamScheduler(shared, backend=backend, workers=1, **COUNTING) as scheduler:
        await scheduler.run(worker, updates=20)
    assert len(made) == 20
    assert shared.views["a"].eq(-20).all()
    assert shared.views["b"].eq(0).all()


# What is refused


class Stopped:
    """A loss that is no number."""

    def __float__(self) -> float:
        raise StopIteration


A_TUPLE = "function must return a tuple of a gradient and a loss or None, got"
RETURNED: dict[str, tuple[Any, str]] = {
    "nothing": (None, f"{A_TUPLE} NoneType"),
    "no loss": (ONES, f"{A_TUPLE} Tensor"),
    "one": ((ONES,), f"{A_TUPLE} a tuple of 1"),
    "three": ((ONES, 1.0, 2), f"{A_TUPLE} a tuple of 3"),
    "several gradients": (([ONES], None), "function must return one gradient, got a list"),
    "no gradient": ((None, 1.0), "grad must be a torch tensor, got NoneType"),
    "no number": ((ONES, "small"), "loss must be a number or None, got 'small'"),
    "a loss that stops": ((ONES, Stopped()), "raised StopIteration"),
    "another shape": ((ONES[:3], None), r"ValueError: .*\(3,\)"),
}


@pytest.mark.parametrize("policy", ["lock-free", "ordered"])
@pytest.mark.parametrize("case", RETURNED)
async def test_what_a_function_may_not_return(case: str, policy: str, backend: str) -> None:
    computed, error = RETURNED[case]

    async def worker(context: WorkerContext) -> None:
        await context.compute(lambda: computed)

    shared = small()
    async with StreamScheduler(shared, backend=backend, workers=1, policy=policy) as scheduler:
        with pytest.raises(WorkerError, match=error):
            await scheduler.run(worker, updates=3)
    assert shared.version == 0


async def test_an_iteration_submits_once(backend: str, long_bursts: None) -> None:
    refused = 0

    async def worker(context: WorkerContext) -> None:
        nonlocal refused
        await context.compute(lambda: (ONES, None))
        for again in (context.compute(lambda: (ONES, None)), context.submit(ONES)):
            with pytest.raises(RuntimeError, match="must submit once an iteration, got a second"):
                await again
            refused += 1

    async with StreamScheduler(small(), backend=backend, workers=1) as scheduler:
        assert (await scheduler.run(worker, updates=2)).updates == 2
    assert refused


async def test_nothing_else_is_submitted_during_a_burst(backend: str, long_bursts: None) -> None:
    shared, blocker = small(), Blocker()
    computing = Computing({1: blocker.block})

    async def worker(context: WorkerContext) -> None:
        waits = asyncio.ensure_future(computing(context))
        await blocker.reached.wait()
        if not blocker.released.is_set():
            try:
                with pytest.raises(
                    RuntimeError, match="must submit once an iteration, got a second"
                ):
                    await context.submit(ONES)
            finally:
                blocker.released.set()
        await waits

    async with StreamScheduler(shared, backend=backend, workers=1, **COUNTING) as scheduler:
        await scheduler.run(worker, updates=10)
    assert blocker.released.is_set()
    assert shared.flat.eq(-10).all()


async def test_an_update_that_cannot_be_applied_has_not_landed(
    monkeypatch: pytest.MonkeyPatch, long_bursts: None
) -> None:
    """Such as of hyperparameters for which nothing can be compiled."""
    native = pytest.importorskip("hogstream.scheduler.lanes.native")
    shared = small()
    scheduler = StreamScheduler(shared, backend="numba", workers=1, timeline=Timeline(), **COUNTING)

    def break_compiler() -> None:
        def compile_form(*form: Any) -> None:
            raise LookupError("no compiler")

        monkeypatch.setattr(native, "_form", compile_form)
        scheduler.hyperparameters = replace(scheduler.hyperparameters, lr=2.0)

    unheard = list[Any]()
    asyncio.get_running_loop().set_exception_handler(lambda _, said: unheard.append(said))
    async with scheduler:
        with pytest.raises(WorkerError, match="LookupError: no compiler"):
            await scheduler.run(Computing({3: break_compiler}), updates=10)
        assert scheduler.report is not None
        assert (scheduler.report.updates, scheduler.report.dropped) == (2, [1])
    assert not unheard
    assert shared.flat.eq(-2).all()


@pytest.mark.parametrize("fails", range(1, 6))
async def test_a_worker_may_compute_again_after_an_error(
    fails: int, backend: str, long_bursts: None
) -> None:
    """Wherever in a burst it was: as if each update were an iteration."""
    shared, computing, failures = small(), Computing({fails: fail}), list[BaseException]()

    async def worker(context: WorkerContext) -> None:
        try:
            await computing(context)
        except LookupError as error:
            failures.append(error)
            await computing(context)

    async with StreamScheduler(shared, backend=backend, workers=1, **COUNTING) as scheduler:
        report = await scheduler.run(worker, updates=100)
    assert report.updates == 100
    assert len(failures) == 1
    assert computing.calls == 101
    iterations = [*range(fails), *range(fails - 1, 100)]  # the one that failed, once more
    assert computing.iterations == iterations
    assert shared.flat.eq(-100).all()


async def test_a_worker_may_leave_it_at_what_a_burst_has_made(
    backend: str, long_bursts: None
) -> None:
    """Though what it has tried since has failed."""
    shared, computing = small(), Computing({4: fail, 5: fail})

    async def worker(context: WorkerContext) -> None:
        for _ in range(2):
            with suppress(LookupError):
                await computing(context)
                break

    async with StreamScheduler(shared, backend=backend, workers=1, **COUNTING) as scheduler:
        report = await scheduler.run(worker, updates=100)
    assert (report.updates, report.failures) == (100, {})
    assert shared.flat.eq(-100).all()


async def test_a_burst_that_is_cancelled_in_its_last_update_has_made_it(long_bursts: None) -> None:
    shared, loop = small(), asyncio.get_running_loop()
    applies, released = asyncio.Event(), threading.Event()
    made = 0

    def kernel(update: Any, *operands: Any) -> None:
        nonlocal made
        made += 1
        if made == 2:
            loop.call_soon_threadsafe(applies.set)
            assert released.wait(LIMIT_SECONDS)
        update(*operands)

    async def worker(context: WorkerContext) -> None:
        if released.is_set():
            await context.submit(ONES)
            return
        waits = asyncio.ensure_future(context.compute(lambda: (ONES, None)))
        await applies.wait()
        waits.cancel()
        await asyncio.wait([waits])
        with pytest.raises(RuntimeError, match="must submit once an iteration, got a second"):
            await context.submit(ONES)
        released.set()

    async with python_lanes(shared, kernel, workers=1, **COUNTING) as scheduler:
        report = await scheduler.run(worker, updates=8)
    assert report.updates == shared.version == 8
    assert shared.flat.eq(-8).all()


async def test_a_function_that_fails_may_be_followed_by_another(backend: str) -> None:
    shared = small()

    async def worker(context: WorkerContext) -> None:
        with pytest.raises(LookupError):
            await context.compute(fail)
        with pytest.raises(RuntimeError, match="raised StopIteration"):
            await context.compute(next, iter(()))
        await context.submit(ONES)

    async with StreamScheduler(shared, backend=backend, workers=1, **COUNTING) as scheduler:
        report = await scheduler.run(worker, updates=3)
    assert report.staleness == {0: 3}
    assert shared.flat.eq(-3).all()
