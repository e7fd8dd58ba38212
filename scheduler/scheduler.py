"""The asyncio scheduler: runs workers, whose updates go down lanes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from operator import itemgetter
from types import TracebackType
from typing import Any

import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.scheduler.budget import Budget
from hogstream.scheduler.callbacks import Callbacks, OnLoss, OnResult
from hogstream.scheduler.cancellation import uncancelled
from hogstream.scheduler.checks import (
    check_async_callable,
    check_integer,
    check_loop,
    check_type,
)
from hogstream.scheduler.context import ScheduledContext, Worker, WorkerError
from hogstream.scheduler.dispatch import Dispatch
from hogstream.scheduler.lanes.base import Lanes
from hogstream.scheduler.lanes.process_lock import ProcessLock
from hogstream.scheduler.memory import allocate_zeros
from hogstream.scheduler.nvtx_context import RangedContext
from hogstream.scheduler.parameters import SharedParameters
from hogstream.scheduler.report import RunRecord, RunReport, described
from hogstream.scheduler.schedules import LrSchedule, ScheduledRate
from hogstream.scheduler.settings import SchedulerSettings, check_hyperparameters
from hogstream.scheduler.thread_state import bounded_torch_threads
from hogstream.scheduler.tracing.nvtx import open_ranges
from hogstream.scheduler.tracing.timeline import Timeline
from hogstream.scheduler.update_state import UpdateState, check_has_state, kinds_of

#: A worker that fails so many times without an update in between is not started again.
MAX_FAILURES_IN_A_ROW = 3

# A worker alone in its process gives way to what else the event loop has to do: by one turn of the
# loop, of some microseconds, for each so many seconds that it has taken. To be read, heeded and
# answered, a message takes about ten turns: after a long iteration it has them before the next.
_SECONDS_PER_TURN = 1e-3
_MOST_TURNS = 100


class StreamScheduler:
    """Runs asynchronous workers that update shared parameters, each down a lane of its own.

    ::

        async with StreamScheduler(shared, workers=16, policy="lock-free") as scheduler:
            report = await scheduler.run(worker, updates=10_000)

    Lanes are CUDA streams for parameters on a GPU, and CPU threads otherwise. A GPU runs 8 streams
    beside each other, or as many as ``CUDA_DEVICE_MAX_CONNECTIONS`` says when CUDA starts, at most
    32: set it before, as the command line does; here it is too late. Leaving the scope ends a run
    under way, waits for all updates in flight, and leaves no task, thread, stream or event behind:
    on success, error and cancellation alike.

    Attributes:
        shared: What the workers update.
        settings: How the scheduler runs.
        backend: With which kernels.
        report: Of the run that ended last, also if it failed or was cancelled; None before.
    """

    def __init__(
        self,
        shared: SharedParameters,
        settings: SchedulerSettings | None = None,
        *,
        timeline: Timeline | None = None,
        process_lock: ProcessLock | None = None,
        own_process: bool = False,
        **values: Any,
    ) -> None:
        """Checks everything; starts nothing.

        Args:
            shared: What the workers update.
            settings: How to run; None for the defaults of ``SchedulerSettings``.
            timeline: Takes down each update and wait, for a trace.
            process_lock: Held by a lane around each update, in the place of the mutex of
                ``policy="locked"``, against schedulers of other processes.
            own_process: Whether nothing else goes on in this process. Then a single worker without
                a deadline computes, and at a depth of 1 on a CPU updates, on the event loop's
                thread: threads of its own would only hand things over.
            values: By name, in the place of those in ``settings``: settings, at least ``workers``
                if none were given, and hyperparameters, such as ``lr``.

        Raises:
            TypeError: If an argument is unknown or of a wrong type.
            ValueError: If a name is unknown, a number is out of range, or settings do not go with
                each other or the device.
            RuntimeError: If the backend is not available here.
        """
        check_type("shared", shared, SharedParameters)
        self.settings = SchedulerSettings.make(settings, values)
        self.settings.hyperparameters.check_held_by(shared.flat.dtype)
        for name, value, kind in (
            ("timeline", timeline, Timeline),
            ("process_lock", process_lock, ProcessLock),
        ):
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__} or None, got {value!r}")
        self.shared = shared
        self.backend = self.settings.select_backend(shared.flat.device.type)
        self.report: RunReport | None = None
        self._opened = False
        self._closing = False
        self._running = False
        self._stopping = False
        self._budget: Budget | None = None
        alone = own_process and self.settings.workers == 1 and self.settings.deadline is None
        self._dispatch = Dispatch(self.settings, shared, timeline, process_lock, alone=alone)
        self._ranges = open_ranges(self.settings.policy)

    @property
    def hyperparameters(self) -> Hyperparameters:
        """What updates are made with.

        Assign others, even while workers run, and updates submitted from then on use them:
        ``dataclasses.replace(..., lr=1e-4)``. In a run with an ``lr_schedule``, that says ``lr``.
        While the scheduler is open its updates have the state that it was opened with: momentum may
        change or end then, but not begin, nor may ``centered``.
        """
        return self._dispatch.hyperparameters

    @hyperparameters.setter
    def hyperparameters(self, hyperparameters: Hyperparameters) -> None:
        check_hyperparameters(hyperparameters)
        hyperparameters.check_held_by(self.shared.flat.dtype)
        if self._opened:
            check_has_state(hyperparameters, self._kinds)
        self._dispatch.hyperparameters = hyperparameters

    async def __aenter__(self) -> StreamScheduler:
        """Opens the lanes, and compiles the kernel before any worker can need it."""
        if self._opened:
            raise RuntimeError("the scheduler is open already: enter it once")
        self._opened, self._closing = True, False
        self._loop, self._pid = asyncio.get_running_loop(), os.getpid()
        self._kinds = kinds_of(self.hyperparameters.switches)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        try:
            with self.shared.undone_on_error():
                self._allocate()
                await self._dispatch.open(self.backend)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends a run under way, waits for everything in flight, and closes the lanes."""
        if os.getpid() != self._pid:
            return  # a fork leaves this scope too, but the lanes are its parent's
        check_loop("the scheduler", self._loop)
        self._closing = True  # no run may begin while others end
        try:
            await uncancelled(self._drain, self._cancel_workers)
        finally:
            self._dispatch.close()
            self._opened = False

    async def run(
        self,
        worker: Worker,
        *,
        updates: int | None = None,
        seconds: float | None = None,
        iterations: Sequence[int] | None = None,
        on_loss: OnLoss | None = None,
        on_result: OnResult | None = None,
        lr_schedule: LrSchedule | None = None,
    ) -> RunReport:
        """Runs the workers until enough updates have landed, for a time, or until ``stop``.

        Each worker calls ``worker(context)`` again and again: one iteration, or by ``compute`` a
        burst of them, which reads the parameters, makes a gradient and submits it once. What was
        submitted lands, or is reported as dropped, whatever happens.

        Args:
            worker: Called with a context that is the worker's own.
            updates: How many updates to submit, over all workers; at least 1.
            seconds: How long to start iterations; > 0. With both, what ends first.
            iterations: How many iterations each worker has finished before this run, as from a
                checkpoint; None for zeros. Who has finished least starts first.
            on_loss: Called on this event loop with a worker's index and the loss that it has
                submitted with an update, once that has landed, and of a burst some 10 ms later; for
                each worker in order.
            on_result: Called here with a worker's index and what it has sent; in order too.
            lr_schedule: Called on this event loop for each update that is submitted, with how far
                the run has come: returns the learning rate of the update.

        Returns:
            What was done and how fast. After an error or a cancellation, it is in ``report``.

        Raises:
            Exception: Whatever ``on_loss`` or ``on_result`` has raised: that ends the run, and
                what was submitted lands first.
            TypeError: If a number is of a wrong type, or a function cannot be called.
            ValueError: If neither ``updates`` nor ``seconds`` is given, or one is out of range.
            RuntimeError: If the scheduler is not open, runs already, or is closed meanwhile.
            WorkerError: If a worker failed and ``on_error`` is ``"stop"``, or if all have failed
                before the updates were made or ``stop`` was called. A worker also fails if it
                returns without submitting a gradient.
        """
        callbacks = Callbacks(on_loss, on_result, self._end_workers)
        return await self._run(worker, Budget(updates, seconds), iterations, callbacks, lr_schedule)

    def stop(self) -> None:
        """Has no iteration of the run begin any more; those under way finish, and ``run`` returns.

        Its report is partial if there was more to do. Without a run, or when it ends already,
        nothing happens. From any task or callback of the event loop.

        Raises:
            RuntimeError: If a run goes on in another thread's event loop.
        """
        if self._budget is not None:
            check_loop("the scheduler", self._loop)
            self._budget.stop()

    async def _run(
        self,
        worker: Worker,
        budget: Budget,
        iterations: Sequence[int] | None,
        callbacks: Callbacks,
        lr_schedule: LrSchedule | None,
    ) -> RunReport:
        """As ``run``, and so for whoever hears of it in another way."""
        check_async_callable("worker", worker)
        finished = self._check_iterations(iterations)
        if self._dispatch.lanes is None or self._closing:
            raise RuntimeError("the scheduler is not open: use 'async with StreamScheduler(...)'")
        check_loop("the scheduler", self._loop)
        if self._running:
            raise RuntimeError("the scheduler runs already: await that run first")
        contexts = self._make_contexts(self._dispatch.lanes, finished, budget)
        telemetry, shared = self.settings.telemetry, self.shared
        record = RunRecord(
            self.settings.workers,
            shared if telemetry else None,
            counts_rows=telemetry and shared.row_versions is not None,
        )
        rate = None if lr_schedule is None else ScheduledRate(lr_schedule, self.shared)
        self._running, self._stopping, self._budget = True, False, budget
        if self.settings.buffers == "average":
            self.shared.reset_worker_buffers()
        self._dispatch.begin_run(record, callbacks, rate)
        budget.start()
        self._tasks = {
            context.index: asyncio.create_task(self._work(worker, context, budget, record))
            for context in sorted(contexts, key=lambda context: context.iteration)
        }
        spent = closed = False
        policy, ranges = self.settings.policy, self._ranges
        with (
            nullcontext() if ranges is None else ranges.around(f"run {policy}"),
            bounded_torch_threads(self._dispatch.torch_threads),  # for who computes on this thread
        ):
            try:
                await self._watch(contexts, record)
                closed, spent = self._stopping, budget.is_spent()
            finally:
                try:
                    await uncancelled(self._drain, self._cancel_workers)
                finally:
                    whole = spent and budget.is_spent()  # and nothing was given back meanwhile
                    report = self.report = self._finish(contexts, record, whole)
                    if callbacks.error is not None:  # of which nobody else would hear
                        raise callbacks.error
        all_failed = len(record.failures) == self.settings.workers and report.partial
        all_failed &= not budget.stopped  # when they may have been started again
        if record.failures and (self.settings.on_error == "stop" or all_failed):
            raise WorkerError(record.failures) from next(iter(record.failures.values()))
        if closed:
            raise RuntimeError("the scheduler was closed while it ran: await the run first")
        return report

    def _finish(
        self, contexts: Sequence[ScheduledContext], record: RunRecord, whole: bool
    ) -> RunReport:
        """Ends a run of which nothing is under way any more, and reports it."""
        self._running, self._budget = False, None
        self._dispatch.end_run()
        for context in contexts:
            context.retire()
        for index, task in self._tasks.items():  # what ended a worker's task
            if not task.cancelled() and (error := task.exception()) is not None:
                record.failures.setdefault(index, error)
        threads = self._dispatch.torch_threads
        ran = described(self.settings, self.shared, self.backend, self._kinds, threads)
        report = record.report(**ran, partial=not whole)
        if self.settings.buffers == "average" and not self.shared.slot:  # else its parent does it
            self.shared.average_worker_buffers(report.updates_by_worker)
        return report

    async def _watch(self, contexts: Sequence[ScheduledContext], record: RunRecord) -> None:
        """Waits for the workers, and has those fail that take longer than they may."""
        pending = set(self._tasks.values())
        deadline = self.settings.deadline
        pause = None if deadline is None else deadline / 8
        while pending and not (record.failures and self.settings.on_error == "stop"):
            start = time.perf_counter()
            _, pending = await asyncio.wait(
                pending, timeout=pause, return_when=asyncio.FIRST_COMPLETED
            )
            if pause is None:
                continue
            now = time.perf_counter()
            blocked = max(now - start - pause, 0.0)
            for context in contexts:
                if context.becomes_overdue(now, blocked):
                    self._tasks[context.index].cancel()

    async def _work(
        self, worker: Worker, context: ScheduledContext, budget: Budget, record: RunRecord
    ) -> None:
        """Runs a worker's iterations until the budget is spent or it has failed for good."""
        failures, turn = 0, time.perf_counter()
        try:
            while not self._stopping and (budget.take() or await self._take_back(budget)):
                try:
                    if self._dispatch.alone and time.perf_counter() - turn > _SECONDS_PER_TURN:
                        await _give_way(turn)
                        turn = time.perf_counter()
                        if budget.stopped:  # meanwhile: what was taken goes back
                            context.abandon()
                            budget.finish()
                            return
                    if not context.begin():
                        await context.read()
                    iteration = worker(context)
                    if not hasattr(iteration, "__await__"):
                        raise TypeError(f"worker must be an async callable, got {worker!r}")
                    await iteration
                    context.end()
                except BaseException as error:
                    if context.abandon():
                        failures = 0
                    budget.finish()
                    failure = self._why_failed(context, error)
                else:
                    budget.finish()
                    failures = 0
                    continue
                record.failures.setdefault(context.index, failure)
                failures += 1
                if self.settings.on_error != "restart" or failures == MAX_FAILURES_IN_A_ROW:
                    return
                record.restarts[context.index] += 1
        finally:
            self._dispatch.leave()

    async def _take_back(self, budget: Budget) -> bool:
        """Takes what another worker gives back because it fails; False if nobody will."""
        if self.settings.on_error == "stop":
            return False
        self._dispatch.leave()
        try:
            return await budget.take_back()
        finally:
            self._dispatch.come_back()

    def _why_failed(self, context: ScheduledContext, error: BaseException) -> BaseException:
        """What a worker failed with; raises what ends the run, or Python."""
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise error
        if not isinstance(error, asyncio.CancelledError):
            return error
        if self._stopping:
            raise error
        task: Any = asyncio.current_task()
        if hasattr(task, "uncancel"):  # from Python 3.11 on
            task.uncancel()
        if not context.overdue:
            return RuntimeError("it was cancelled, but not by the scheduler")
        deadline = self.settings.deadline
        late = f"iteration {context.iteration} took longer than deadline={deadline:g} s"
        if self._dispatch.leave_thread(context.index):
            late += "; its thread could not be ended, and was left behind"
        return TimeoutError(late)

    async def _drain(self) -> None:
        """Ends all workers, and waits for all that is under way; may be begun again."""
        self._end_workers()
        if self._tasks:
            await asyncio.wait(self._tasks.values())
        await self._dispatch.drain()

    def _end_workers(self) -> None:
        """Has all workers give up what they do."""
        self._stopping = True
        self._cancel_workers()

    def _cancel_workers(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    def _check_iterations(self, iterations: Sequence[int] | None) -> list[int]:
        workers = self.settings.workers
        if iterations is None:
            return [0] * workers
        if not isinstance(iterations, Sequence):
            raise TypeError(f"iterations must be a sequence of integers, got {iterations!r}")
        if len(iterations) != workers:
            raise ValueError(
                f"iterations must be {workers}, one of each worker, got {len(iterations)}"
            )
        return [check_integer("iterations", each, at_least=0) for each in iterations]

    def _allocate(self) -> None:
        """Makes what the settings ask for and memory may not hold."""
        shared, workers = self.shared, self.settings.workers
        self._states: list[UpdateState]
        if self.settings.state == "per-worker":
            states = shared.make_worker_state(workers, self._kinds)
            self._states = [states.map(itemgetter(worker)) for worker in range(workers)]
        else:
            self._states = [shared.make_state(self._kinds)] * workers
        if self.settings.buffers != "shared":
            shared.make_worker_buffers(workers, kept=self.settings.buffers == "worker")
        self._snapshots: Sequence[torch.Tensor | None] = [None] * workers
        if self.settings.read == "snapshot":
            shape, flat = (workers, shared.elements), shared.flat
            self._snapshots = list(allocate_zeros("snapshots", shape, flat.dtype, flat.device))

    def _make_contexts(
        self, lanes: Lanes, iterations: list[int], budget: Budget
    ) -> list[ScheduledContext]:
        make: Callable[..., ScheduledContext] = ScheduledContext
        if self._ranges is not None:
            make = partial(RangedContext, ranges=self._ranges)
        return [
            make(self._dispatch, index, lane, state, snapshot, iteration, budget)
            for index, (lane, state, snapshot, iteration) in enumerate(
                zip(lanes.lanes, self._states, self._snapshots, iterations, strict=True)
            )
        ]


async def _give_way(since: float) -> None:
    """Lets the event loop do what else there is, after iterations that may wait for nothing.

    Args:
        since: When it last could, by ``time.perf_counter``.
    """
    turns = int((time.perf_counter() - since) / _SECONDS_PER_TURN)
    for _ in range(min(turns, _MOST_TURNS)):
        await asyncio.sleep(0)
