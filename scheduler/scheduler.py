"""The asyncio scheduler: runs workers, and sends their updates down lanes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch

from hogstream.kernels.backends.select import select_backend
from hogstream.kernels.hyperparameters import HYPERPARAMETERS, Hyperparameters
from hogstream.kernels.race_counters import RaceCounters
from hogstream.scheduler.budget import Budget
from hogstream.scheduler.cancellation import uncancelled
from hogstream.scheduler.checks import check_choice, check_integer, check_number, check_switch
from hogstream.scheduler.context import Worker, WorkerContext, WorkerError
from hogstream.scheduler.lanes.base import Lanes, LaneSettings
from hogstream.scheduler.lanes.factory import open_lanes, warm_up
from hogstream.scheduler.lanes.process_lock import ProcessLock
from hogstream.scheduler.nvtx_context import RangedContext
from hogstream.scheduler.parameters import SharedParameters, allocate_zeros
from hogstream.scheduler.policies import Gate, LockGate, Passage, make_gate, select_policy
from hogstream.scheduler.report import RunRecord, RunReport
from hogstream.scheduler.tracing.nvtx import Ranges, open_ranges
from hogstream.scheduler.tracing.timeline import Timeline
from hogstream.scheduler.update import Update
from hogstream.scheduler.worker_thread import WorkerThread

T = TypeVar("T")

#: A worker that fails so many times without an update in between is not started again.
MAX_FAILURES_IN_A_ROW = 3


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
        hyperparameters: What updates are made with. Assign others, even while workers run, and
            updates submitted from then on use them: ``dataclasses.replace(..., lr=1e-4)``.
        report: Of the run that ended last, also if it failed or was cancelled; None before.
    """

    def __init__(
        self,
        shared: SharedParameters,
        *,
        workers: int,
        policy: str = "lock-free",
        depth: int = 1,
        batch: int = 1,
        batch_of: str = "lane",
        state: str = "shared",
        read: str = "live",
        staleness_aware: bool = False,
        telemetry: bool = False,
        on_error: str = "stop",
        on_nonfinite: str = "apply",
        deadline: float | None = None,
        timeline: Timeline | None = None,
        process_lock: ProcessLock | None = None,
        backend: str | None = None,
        **hyperparameters: Any,
    ) -> None:
        """Checks everything; starts nothing.

        Args:
            shared: What the workers update.
            workers: How many, at least 1.
            policy: ``"lock-free"``, ``"locked"``, ``"ordered"`` or ``"bounded:K"``: what an update
                waits for. A bound is on updates of this scheduler.
            depth: How many updates of one worker may be in flight, at least 1. A worker needs as
                many gradient buffers.
            batch: How many updates are handed over at once, at least 1. On a GPU, those of the same
                lanes and gradients as some before are one CUDA graph, which pays where an update is
                not worth a launch of its own; not with ``staleness_aware``.
            batch_of: ``"lane"``: a batch is of one worker's updates, at most ``depth``, one after
                the other. ``"lanes"``: it is of all workers' updates, at most ``depth`` times
                ``workers``, each down its lane, beside each other.
            state: ``"shared"``: one ``ms`` for all, as RMSpropAsync. ``"per-worker"``: each its
                own, as A3C's unshared RMSProp (Mnih et al. 2016, arXiv 1602.01783).
            read: ``"live"``: workers read parameters that change under them (Hogwild).
                ``"snapshot"``: they read a copy, made at the start of each iteration (A3C).
            staleness_aware: Divide ``lr`` by an update's staleness (Zhang et al. 2016, arXiv
                1511.05950) as it is known when its lane begins with it.
            telemetry: Count lost updates in the kernel.
            on_error: When a worker fails: ``"stop"`` all, let the others ``"continue"``, or
                ``"restart"`` it too, unless it failed three times without an update in between.
            on_nonfinite: When a gradient holds an infinity or NaN: ``"apply"`` it, ``"skip"`` it,
                or skip it and ``"raise"`` an error in its worker. The kernel finds it.
            deadline: How many seconds a worker may take between two waits for the scheduler or
                landings, > 0: then it is cancelled, and has failed. None: any time. A worker that
                blocks the event loop cannot be cancelled: let it block in ``run_blocking``, or in
                a process of ``ProcessScheduler``.
            timeline: Takes down each update and wait, for a trace.
            process_lock: Held for each update too, against schedulers of other processes.
            backend: ``"triton"``, ``"numba"`` or ``"numpy"``; None picks by device.
            hyperparameters: ``lr``, ``alpha``, ``eps``, ``weight_decay``, ``eps_inside_sqrt``,
                ``decoupled_weight_decay`` and ``maximize``, as for ``rmsprop_``.

        Raises:
            TypeError: If an argument is unknown or of a wrong type.
            ValueError: If a name is unknown, a number is out of range, or ``batch`` does not go
                with the policy or depth.
            RuntimeError: If the backend is not available here, or cannot count races.
        """
        if not isinstance(shared, SharedParameters):
            raise TypeError(f"shared must be SharedParameters, got {type(shared).__name__}")
        self.shared = shared
        self.workers = check_integer("workers", workers, at_least=1)
        self.policy = select_policy(policy)
        self.depth = check_integer("depth", depth, at_least=1)
        self.batch = check_integer("batch", batch, at_least=1)
        self.batch_of = check_choice("batch_of", batch_of, ("lane", "lanes"))
        self.state = check_choice("state", state, ("shared", "per-worker"))
        self.read = check_choice("read", read, ("live", "snapshot"))
        self.staleness_aware = check_switch("staleness_aware", staleness_aware)
        self.telemetry = check_switch("telemetry", telemetry)
        self.on_error = check_choice("on_error", on_error, ("stop", "continue", "restart"))
        nonfinite = ("apply", "skip", "raise")
        self.on_nonfinite = check_choice("on_nonfinite", on_nonfinite, nonfinite)
        self.deadline = None if deadline is None else check_number("deadline", deadline, above=0)
        for name, value, kind in (
            ("timeline", timeline, Timeline),
            ("process_lock", process_lock, ProcessLock),
        ):
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__} or None, got {value!r}")
        self.timeline = timeline
        self.process_lock = process_lock
        unknown = hyperparameters.keys() - set(HYPERPARAMETERS)
        if unknown:
            allowed = ", ".join(HYPERPARAMETERS)
            raise TypeError(f"hyperparameters must be among {allowed}, got {sorted(unknown)}")
        self.hyperparameters = Hyperparameters(**hyperparameters)
        self.backend = select_backend(backend, shared.flat.device.type)
        self._check_together()
        # A worker that has filled its lane goes on when half of it is free: so neither wakes the
        # other for each update. Where updates wait for their batch, they could wait for ever then.
        self._low_water = self.depth // 2 if self.batch == 1 else self.depth - 1
        self.report: RunReport | None = None
        self._opened = False
        self._lanes: Lanes | None = None
        self._record: RunRecord | None = None
        self._ranges: Ranges | None = open_ranges(self.policy.name)

    @property
    def hyperparameters(self) -> Hyperparameters:
        """What updates are made with."""
        return self._hyperparameters

    @hyperparameters.setter
    def hyperparameters(self, hyperparameters: Hyperparameters) -> None:
        if not isinstance(hyperparameters, Hyperparameters):
            raise TypeError(
                f"hyperparameters must be Hyperparameters, got {type(hyperparameters).__name__}"
            )
        self._hyperparameters = hyperparameters

    def _check_together(self) -> None:
        most = self.depth * (self.workers if self.batch_of == "lanes" else 1)
        if self.batch > most:
            raise ValueError(
                f"batch must be an integer <= {most}, as many updates as may be in flight, "
                f"got {self.batch}"
            )
        if self.batch > 1 and (self.policy.exclusive or self.policy.bound is not None):
            raise ValueError(
                f"batch must be 1 with policy {self.policy.name!r}, which waits for each update, "
                f"got {self.batch}"
            )
        if self.telemetry and not self.backend.counts_races:
            raise RuntimeError(
                f"telemetry needs a backend that counts races (triton or numba), "
                f"got {self.backend.name!r}"
            )

    async def __aenter__(self) -> StreamScheduler:
        """Opens the lanes, and compiles the kernel before any worker can need it."""
        if self._opened:
            raise RuntimeError("the scheduler is open already: enter it once")
        self._opened = True
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._contexts: list[WorkerContext] = []
        self._running = 0
        self._stopping = False
        self._under_way = 0  # updates in flight and blocking calls
        self._idle = asyncio.Event()
        self._put: list[int] = []  # the lane of each update that waits for its batch
        self._blocking: dict[int, list[Callable[[], None]]] = {}
        self._gate: Gate | None = make_gate(self.policy, lambda: self.shared.version)
        self._threads = [WorkerThread(f"hogstream-worker-{index}") for index in range(self.workers)]
        try:
            self._allocate()
            settings = LaneSettings(
                shared=self.shared,
                backend=self.backend,
                ordered=self.policy.ordered,
                staleness_aware=self.staleness_aware,
                check_finite=self.on_nonfinite != "apply",
                races=self._count_races() if self.telemetry else None,
                lock=self.process_lock,
                low_water=self._low_water,
                timed=self.timeline is not None,
            )
            await self._run_blocking(0, partial(warm_up, settings, self.hyperparameters))
            self._lanes = open_lanes(settings, self.workers, self.depth + 1, self._on_landing)
            self.shared.users += 1
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
        try:
            await uncancelled(self._drain)
        finally:
            for thread in self._threads:
                thread.close()
            if self._lanes is not None:
                self._lanes.close()
                self._lanes = None
                self.shared.users -= 1
            self._opened = False

    async def run(
        self,
        worker: Worker,
        *,
        updates: int | None = None,
        seconds: float | None = None,
        iterations: Sequence[int] | None = None,
    ) -> RunReport:
        """Runs the workers until enough updates have landed, or for a time.

        Each worker calls ``worker(context)`` again and again: one iteration, which reads the
        parameters, makes a gradient and submits it once. What was submitted lands, or is reported
        as dropped, whatever happens.

        Args:
            worker: Called with a context that is the worker's own.
            updates: How many updates to submit, over all workers; at least 1.
            seconds: How long to start iterations; > 0. With both, what ends first.
            iterations: How many iterations each worker has finished before this run, as from a
                checkpoint; None for zeros. Who has finished least starts first.

        Returns:
            What was done and how fast. After an error or a cancellation, it is in ``report``.

        Raises:
            TypeError: If a number is of a wrong type.
            ValueError: If neither ``updates`` nor ``seconds`` is given, or one is out of range.
            RuntimeError: If the scheduler is not open, runs already, or is closed meanwhile.
            WorkerError: If a worker failed and ``on_error`` is ``"stop"``, or if all have failed
                before the updates were made. A worker also fails if it returns without submitting
                a gradient.
        """
        budget = Budget(updates, seconds)
        finished = self._check_iterations(iterations)
        if self._lanes is None:
            raise RuntimeError("the scheduler is not open: use 'async with StreamScheduler(...)'")
        if self._record is not None:
            raise RuntimeError("the scheduler runs already: await that run first")
        self._contexts = self._make_contexts(self._lanes, finished)
        self._record = record = RunRecord(
            self.workers, self.shared.races if self.telemetry else None
        )
        self._stopping = False
        budget.start()
        self._tasks = {
            context.index: asyncio.create_task(self._work(worker, context, budget, record))
            for context in sorted(self._contexts, key=lambda context: context.iteration)
        }
        self._running = self.workers
        ended = closed = False
        with self._ranges.around(f"run {self.policy.name}") if self._ranges else nullcontext():
            try:
                await self._watch(record)
                closed, ended = self._stopping, True
            finally:
                try:
                    await uncancelled(self._drain)
                finally:
                    self._record = None
                    self._note_failures(record)
                    whole = ended and budget.is_spent()
                    self.report = record.report(**self._described(), partial=not whole)
        all_failed = len(record.failures) == self.workers and self.report.partial
        if record.failures and (self.on_error == "stop" or all_failed):
            raise WorkerError(record.failures) from next(iter(record.failures.values()))
        if closed:
            raise RuntimeError("the scheduler was closed while it ran: await the run first")
        return self.report

    async def _watch(self, record: RunRecord) -> None:
        """Waits for the workers, and has those fail that take longer than they may."""
        pending = set(self._tasks.values())
        pause = None if self.deadline is None else self.deadline / 8
        while pending and not (record.failures and self.on_error == "stop"):
            start = time.perf_counter()
            _, pending = await asyncio.wait(
                pending, timeout=pause, return_when=asyncio.FIRST_COMPLETED
            )
            if self.deadline is None or pause is None:
                continue
            now = time.perf_counter()
            blocked = max(now - start - pause, 0.0)  # the event loop was: no worker's own fault
            for context in self._contexts:
                if context._busy_since is None or context._overdue or context._in_flight:
                    continue  # with an update in flight, it may wait for an event of its lane
                context._busy_since += blocked
                if context._busy_since < now - self.deadline:
                    context._overdue = True
                    self._tasks[context.index].cancel()

    async def _work(
        self, worker: Worker, context: WorkerContext, budget: Budget, record: RunRecord
    ) -> None:
        """Runs a worker's iterations until the budget is spent or it has failed for good."""
        failures = 0
        try:
            while not self._stopping and (budget.take() or await self._take_back(budget)):
                try:
                    if not context._begin():
                        await context._read()
                    iteration = worker(context)
                    if not hasattr(iteration, "__await__"):
                        raise TypeError(f"worker must be an async callable, got {worker!r}")
                    await iteration
                    context._end()
                except BaseException as error:
                    launched = context._abandon()
                    failure = self._why_failed(context, error)
                else:
                    budget.finish()
                    failures = 0
                    continue
                record.failures.setdefault(context.index, failure)
                if launched:
                    budget.finish()
                    failures = 0
                else:
                    budget.give_back()
                failures += 1
                if self.on_error != "restart" or failures == MAX_FAILURES_IN_A_ROW:
                    return
                record.restarts[context.index] += 1
        finally:
            self._running -= 1
            self._flush()

    async def _take_back(self, budget: Budget) -> bool:
        """Takes what another worker gives back because it fails; False if nobody will."""
        if self.on_error == "stop":
            return False
        self._running -= 1  # meanwhile, so that no batch waits for this worker
        self._flush()
        try:
            return await budget.take_back()
        finally:
            self._running += 1

    def _why_failed(self, context: WorkerContext, error: BaseException) -> BaseException:
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
        if not context._overdue:
            return RuntimeError("it was cancelled, but not by the scheduler")
        late = f"iteration {context.iteration} took longer than deadline={self.deadline:g} s"
        if self._blocking.get(context.index):
            self._leave_thread(context.index)
            late += "; its thread could not be ended, and was left behind"
        return TimeoutError(late)

    def _launch(self, update: Update) -> None:
        """Puts an update on its lane, and flushes the lanes if a batch is complete."""
        assert self._lanes is not None
        worker = update.worker
        lane = self._lanes.lanes[worker]
        if self.batch == 1:
            lane.launch(update)
            self._under_way += 1
            return
        lane.put(update)
        self._under_way += 1
        self._put.append(worker)
        if self.batch_of == "lane":
            complete = self._put.count(worker) == self.batch
        else:
            complete = len(self._put) >= min(self.batch, self._running * self.depth)
        if complete or update.checked is None:
            self._flush(worker if self.batch_of == "lane" else None)

    def _flush(self, worker: int | None = None) -> None:
        """Launches what waits for a batch: of one worker, or of all."""
        if self._put:
            assert self._lanes is not None
            chosen = dict.fromkeys(self._put if worker is None else (worker,))
            self._put = [each for each in self._put if each not in chosen]
            self._lanes.flush(tuple(chosen))

    def _on_landing(self, lane: int, landed: Sequence[Update]) -> None:
        """Takes note of what is through on a lane."""
        context, record = self._contexts[lane], self._record
        assert record is not None  # a run ends only when all its updates have landed
        updates = [update for update in landed if update.checked is not None]
        try:
            record.add(lane, updates)
            for update in landed:
                if update.nonfinite and self.on_nonfinite == "raise":
                    update.error = FloatingPointError(
                        "a gradient held an infinity or NaN: it was left out"
                    )
                if update.error is not None:
                    record.failures.setdefault(lane, update.error)
                if update.passage is not None and self._gate is not None:
                    self._gate.end(update.passage)
            if self.timeline is not None:
                for update in updates:
                    _add_to_timeline(self.timeline, update)
        finally:
            context._deliver(landed, len(updates))
            self._end(len(landed))

    async def _snapshot_passage(self) -> Passage | None:
        """Waits for the lock, under a policy that has one: a snapshot is whole then."""
        if not isinstance(self._gate, LockGate):
            return None
        passage = await self._gate.begin()
        await self._gate.launch(passage)
        return passage

    async def _run_blocking(self, worker: int, call: Callable[[], T]) -> T:
        """Calls a function on a worker's thread."""
        self._under_way += 1
        calls = self._blocking.setdefault(worker, [])

        def end() -> None:
            if end in calls:  # and was not left behind
                calls.remove(end)
                self._end()

        calls.append(end)
        result: T = await self._threads[worker].call(call, end)
        return result

    def _leave_thread(self, worker: int) -> None:
        """Stops waiting for a blocking call, and gives the worker another thread."""
        self._threads[worker].close(hangs=True)
        self._threads[worker] = WorkerThread(f"hogstream-worker-{worker}")
        for end in list(self._blocking[worker]):
            end()

    def _end(self, count: int = 1) -> None:
        self._under_way -= count
        if self._under_way == 0:
            self._idle.set()

    async def _until_idle(self) -> None:
        """Waits until nothing is under way."""
        while self._under_way:
            self._idle.clear()
            await self._idle.wait()

    async def _drain(self) -> None:
        """Ends all workers, and waits for all that is under way; may be begun again."""
        self._stopping = True
        for task in self._tasks.values():
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks.values())
        try:
            await asyncio.wait_for(self._until_idle(), self.deadline)
        except asyncio.TimeoutError:
            for worker in [worker for worker, calls in self._blocking.items() if calls]:
                self._leave_thread(worker)
                if self._record is not None:
                    self._record.failures.setdefault(
                        worker, TimeoutError("a blocking call did not end; it was left behind")
                    )
            await self._until_idle()

    def _check_iterations(self, iterations: Sequence[int] | None) -> list[int]:
        if iterations is None:
            return [0] * self.workers
        if not isinstance(iterations, Sequence):
            raise TypeError(f"iterations must be a sequence of integers, got {iterations!r}")
        if len(iterations) != self.workers:
            raise ValueError(
                f"iterations must be {self.workers}, one of each worker, got {len(iterations)}"
            )
        return [check_integer("iterations", each, at_least=0) for each in iterations]

    def _allocate(self) -> None:
        """Makes what the settings ask for and memory may not hold."""
        flat = self.shared.flat
        self._ms = [self.shared.ms] * self.workers
        if self.state == "per-worker":
            self._ms = list(self.shared.make_worker_ms(self.workers))
        self._snapshots: Sequence[torch.Tensor | None] = [None] * self.workers
        if self.read == "snapshot":
            shape = self.workers, self.shared.elements
            self._snapshots = list(allocate_zeros("snapshots", shape, flat.dtype, flat.device))

    def _count_races(self) -> RaceCounters:
        assert self.backend.race_block is not None  # checked before
        flat = self.shared.flat
        return self.shared.count_races(self.backend.race_block(flat.dtype, flat.device))

    def _make_contexts(self, lanes: Lanes, iterations: list[int]) -> list[WorkerContext]:
        make: Callable[..., WorkerContext] = WorkerContext
        if self._ranges is not None:
            make = partial(RangedContext, ranges=self._ranges)
        return [
            make(self, index, lane, ms, snapshot, iteration)
            for index, (lane, ms, snapshot, iteration) in enumerate(
                zip(lanes.lanes, self._ms, self._snapshots, iterations, strict=True)
            )
        ]

    def _note_failures(self, record: RunRecord) -> None:
        """Takes down what ended a worker's task."""
        for index, task in self._tasks.items():
            if not task.cancelled() and (error := task.exception()) is not None:
                record.failures.setdefault(index, error)

    def _described(self) -> dict[str, Any]:
        """What runs here, as attributes of a report."""
        return {
            "policy": self.policy.name,
            "workers": self.workers,
            "elements": self.shared.elements,
            "dtype": str(self.shared.flat.dtype).removeprefix("torch."),
            "backend": self.backend.name,
            "device": str(self.shared.flat.device),
        }


def _add_to_timeline(timeline: Timeline, update: Update) -> None:
    outcome = "failed" if update.error else "left out" if update.nonfinite else "landed"
    timeline.add_update(
        update.worker,
        update.worker,
        update.submitted_ns,
        update.started_ns,
        update.landed_ns,
        update.staleness,
        outcome,
    )
