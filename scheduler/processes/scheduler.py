"""Workers as processes: one set of parameters in shared memory, a scheduler in each process."""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.scheduler.budget import Budget
from hogstream.scheduler.callbacks import Callbacks, OnLoss, OnResult
from hogstream.scheduler.cancellation import uncancelled
from hogstream.scheduler.checks import (
    SettingError,
    check_callable,
    check_choice,
    check_integer,
    check_loop,
    check_type,
)
from hogstream.scheduler.context import Worker, WorkerError
from hogstream.scheduler.lanes.process_lock import ProcessLock
from hogstream.scheduler.parameters import SharedParameters
from hogstream.scheduler.processes.outbox import report_to
from hogstream.scheduler.processes.process import (
    Job,
    Setup,
    Start,
    WorkerProcess,
    check_main_module,
    check_portable,
)
from hogstream.scheduler.report import RunRecord, RunReport, described
from hogstream.scheduler.scheduler import MAX_FAILURES_IN_A_ROW
from hogstream.scheduler.schedules import LrSchedule
from hogstream.scheduler.settings import SchedulerSettings, check_hyperparameters
from hogstream.scheduler.thread_state import share_of_cores
from hogstream.scheduler.tracing.timeline import Timeline
from hogstream.scheduler.update_state import check_has_state, kinds_of

POLICIES = ("lock-free", "locked", "awaited")
START_METHODS = ("spawn", "forkserver", "fork")

MakeWorker = Callable[[SharedParameters, int], Worker]


class ProcessScheduler:
    """Runs asynchronous workers in several processes, which update the same shared parameters.

    Models that are run by Python do not scale over threads; over processes they do. Each process
    has an event loop and a ``StreamScheduler`` of its own; parameters, state and counts are in
    shared memory from the start (on a GPU, shared by CUDA's inter-process handles)::

        async with ProcessScheduler(shared, processes=4, policy="lock-free") as scheduler:
            report = await scheduler.run(make_worker, updates=10_000)

    Processes that are not forked import ``__main__``, so a script needs its
    ``if __name__ == "__main__":``. They end with
    the scope, however it is left, and with this process, however it ends, but not with one that it
    forks. They ignore Ctrl-C, which cancels a run here: one cancellation has them stop and report,
    another kills them. Those that come within a tenth of a second of each other are one, such as
    those of an anyio scope.

    What a process shares of a GPU's memory, it gives back when it ends. One that is killed cannot,
    and torch then keeps that memory for it until this process ends, also when nothing here uses
    it any more.

    While the scope is open, no other ``ProcessScheduler`` can be over the same parameters. A
    ``StreamScheduler`` of this process can: its updates count in ``shared.version``, but not in the
    report, and it has no part in the lock of ``policy="locked"`` or ``"awaited"``.

    Attributes:
        shared: What the workers update.
        settings: How the scheduler of each process runs.
        report: Of the run that ended last, also if it failed or was cancelled; None before.
    """

    def __init__(
        self,
        shared: SharedParameters,
        settings: SchedulerSettings | None = None,
        *,
        processes: int,
        start_method: str = "spawn",
        timeline: Timeline | None = None,
        **values: Any,
    ) -> None:
        """Checks everything; starts nothing.

        Args:
            shared: What the workers update.
            settings: How the scheduler of each process runs; None for the defaults, and one worker.
                Workers are numbered through: the first of process 2 is worker ``2 * workers``.
                The policy is ``"lock-free"``, or ``"locked"`` or ``"awaited"``: with one lock for
                all processes, which the death of its holder releases. With ``on_error="restart"``,
                a new process makes what was left of the share of one that died.
            processes: How many, at least 1.
            start_method: How they are started. ``"spawn"``: as new interpreters, which import what
                they need. ``"forkserver"``: as forks of a server that multiprocessing spawns.
                ``"fork"``: as forks of this process, at once, with all that it has imported; not
                for parameters on a GPU, as CUDA does not live through a fork.
            timeline: Takes down each update and wait, for a trace: those of a process when it is
                done with a run, and none of one that died.
            values: By name, in the place of those in ``settings``: settings and hyperparameters.

        Raises:
            TypeError: If an argument is unknown or of a wrong type.
            ValueError: If a name is unknown, or a number is out of range.
            RuntimeError: If the backend is not available here.
        """
        check_type("shared", shared, SharedParameters)
        if timeline is not None and not isinstance(timeline, Timeline):
            raise TypeError(f"timeline must be a Timeline or None, got {timeline!r}")
        if (lock := values.pop("process_lock", None)) is not None:
            raise SettingError("process_lock", f"must be None over processes, got {lock!r}")
        self.processes = check_integer("processes", processes, at_least=1)
        check_choice("start_method", start_method, START_METHODS)
        if start_method == "fork" and shared.flat.is_cuda:
            raise SettingError(
                "start_method",
                f"must be spawn or forkserver for parameters on {shared.flat.device}, as CUDA does "
                f"not live through a fork, got 'fork'",
            )
        one_worker = {} if settings is not None else {"workers": 1}
        self.settings = SchedulerSettings.make(settings, {**one_worker, **values})
        self.settings.hyperparameters.check_held_by(shared.flat.dtype)
        check_choice("policy", self.settings.policy, POLICIES)
        self.shared = shared
        self._backend = self.settings.select_backend(shared.flat.device.type)
        self.report: RunReport | None = None
        self._start_method = start_method
        self._timeline = timeline
        self._hyperparameters = self.settings.hyperparameters
        self._open = False
        self._stopping = False
        self._started: dict[int, WorkerProcess] = {}
        self._tasks: list[asyncio.Task[Any]] = []
        self._running: _Run | None = None

    @property
    def hyperparameters(self) -> Hyperparameters:
        """What updates are made with.

        As ``StreamScheduler.hyperparameters``: assign others, even while workers run. Processes
        hear of it a moment later, one that is started in the place of another before all else.
        """
        return self._hyperparameters

    @hyperparameters.setter
    def hyperparameters(self, hyperparameters: Hyperparameters) -> None:
        check_hyperparameters(hyperparameters)
        hyperparameters.check_held_by(self.shared.flat.dtype)
        if self._open:
            check_has_state(hyperparameters, self._kinds)
        self._hyperparameters = hyperparameters
        self._send_all("hyperparameters", hyperparameters)

    async def __aenter__(self) -> ProcessScheduler:
        """Moves the parameters to shared memory, and starts the processes.

        Raises:
            ProcessDied: If a process ends meanwhile; what it printed says why.
            RuntimeError: If a scheduler is open over the parameters, shared memory has no room for
                them, or other processes cannot import ``__main__``; nothing has changed then.
            MemoryError: If what the settings ask for does not fit; nothing has changed then.
            OSError: If there is no more room for a process, or no lock for processes.
            Exception: Whatever kept the scheduler of a process from opening.
        """
        if self._open:
            raise RuntimeError("the scheduler is open already: enter it once")
        check_main_module(self._start_method)
        with self.shared.undone_on_error():
            self._share()
            await self._start()
        return self

    async def _start(self) -> None:
        """Starts the processes; if one does not start, none is left."""
        self._loop, self._pid = asyncio.get_running_loop(), os.getpid()
        seed = torch.empty((), dtype=torch.int64, device="cpu").random_()
        self._seeds = itertools.count(int(seed))
        self._torch_threads = share_of_cores(self.processes * self.settings.workers)
        # A fork has all files that are open then, also the ends of others that are being started:
        # so it is one at a time.
        self._starting = asyncio.Semaphore(1 if self._start_method == "fork" else self.processes)
        self._open = True
        self._tasks = [asyncio.ensure_future(self._process(each)) for each in range(self.processes)]
        try:
            await asyncio.gather(*self._tasks)
        except BaseException:
            for task in self._tasks:
                task.cancel()
            self._kill()
            await self.__aexit__(None, None, None)
            raise
        finally:
            self._tasks = []

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends a run under way, and every process."""
        if os.getpid() != self._pid:
            return  # a fork leaves this scope too, but the processes are its parent's
        check_loop("the scheduler", self._loop)
        self._open = False
        self._cancel()
        try:
            await uncancelled(self._end, self._cancel, self._kill)
        finally:
            self.shared.users -= 1

    async def run(
        self,
        make_worker: MakeWorker,
        *,
        updates: int | None = None,
        seconds: float | None = None,
        on_loss: OnLoss | None = None,
        on_result: OnResult | None = None,
        lr_schedule: LrSchedule | None = None,
    ) -> RunReport:
        """Runs workers in all processes until enough updates have landed, a time, or ``stop``.

        Args:
            make_worker: Called in each process with the shared parameters and the number of the
                process, from 0; returns what ``StreamScheduler.run`` takes. It is pickled: a
                function of a module, or a ``functools.partial`` of one. There it makes the model,
                attaches it to the shared parameters, opens the data.
            updates: How many updates to make, over all workers; at least 1. Each process makes the
                same share of them, give or take one.
            seconds: How long to start iterations, from when all are ready; > 0. With both, what
                ends first.
            on_loss: Called on this event loop with a worker's number and the loss that it has
                submitted with an update, once that has landed; for each worker in order, and some
                hundredths of a second late.
            on_result: Called so with a worker's number and what it has sent. What a process had not
                sent on its way when it died is lost.
            lr_schedule: Called in each process for each update that is submitted, with how far the
                run has come: returns the learning rate of the update. It is pickled.

        Returns:
            What was done and how fast. After an error or a cancellation, it is in ``report``. Of a
            process that died, only the number of its updates is known, and counted as of its first
            worker.

        Raises:
            Exception: Whatever ``on_loss`` or ``on_result`` has raised, or unpickling what a worker
                has sent: that ends the run, and what was submitted lands first.
            TypeError: If a number is of a wrong type, a function cannot be called, or
                ``make_worker`` or ``lr_schedule`` cannot be pickled.
            ValueError: If neither ``updates`` nor ``seconds`` is given, or one is out of range.
            RuntimeError: If the scheduler is not open, runs already, or is closed meanwhile.
            WorkerError: If a worker failed and ``on_error`` is ``"stop"``, or if all have failed
                before the updates were made or ``stop`` was called. When a process has died, its
                workers have failed: with ``ProcessDied``, or with ``TimeoutError`` if it was killed
                because it showed no sign of life.
        """
        budget = Budget(updates, seconds)
        callbacks = Callbacks(on_loss, on_result, self._cancel)
        check_callable("make_worker", make_worker)
        if lr_schedule is not None:
            check_callable("lr_schedule", lr_schedule)
        job = Job(
            self._pickled("make_worker", make_worker),
            None if lr_schedule is None else self._pickled("lr_schedule", lr_schedule),
            losses=callbacks.hears_losses,
            results=callbacks.hears_results,
        )
        if not self._open:
            raise RuntimeError("the scheduler is not open: use 'async with ProcessScheduler(...)'")
        check_loop("the scheduler", self._loop)
        if self._tasks:
            raise RuntimeError("the scheduler runs already: await that run first")
        self._stopping = False
        counted = self.shared if self.settings.telemetry else None
        run = self._running = _Run(job, callbacks, self._divide(budget), counted)
        tasks = self._tasks = [asyncio.create_task(self._work(each, run)) for each in run.shares]
        try:
            await uncancelled(lambda: asyncio.wait(tasks), self._cancel, self._kill)
        finally:
            self._tasks, self._running = [], None
            self.report = run.report()
            if self.settings.buffers == "average":
                self.shared.average_worker_buffers(self.report.updates_by_worker)
            if callbacks.error is not None:  # of which nobody else would hear
                raise callbacks.error
        failures = self.report.failures
        if failures and (self.settings.on_error == "stop" or run.all_failed()):
            raise WorkerError(failures) from next(iter(failures.values()))
        if not self._open:
            raise RuntimeError("the scheduler was closed while it ran: await the run first")
        return self.report

    def stop(self) -> None:
        """Has no iteration of the run begin any more; those under way finish, and ``run`` returns.

        As ``StreamScheduler.stop``; processes hear of it a moment later.

        Raises:
            RuntimeError: If a run goes on in another thread's event loop.
        """
        if self._running is not None:
            check_loop("the scheduler", self._loop)
            self._running.stopped = True
            self._send_all("stop")

    def _pickled(self, name: str, value: Any) -> bytes:
        """A function, as other processes can unpickle it.

        Raises:
            TypeError: If they cannot.
        """
        try:
            pickled = pickle.dumps(value)
        except Exception as error:
            raise TypeError(
                f"{name} must be a function of a module, or something else that can be pickled, "
                f"got {value!r}"
            ) from error
        if self._start_method != "fork":  # which has the same __main__
            check_portable(name, value, pickled)
        return pickled

    def _share(self) -> None:
        """Moves all that the processes share to where they can reach it."""
        shared, settings = self.shared, self.settings
        workers = self.processes * settings.workers
        self._lock = ProcessLock() if settings.policy != "lock-free" else None
        if settings.telemetry:
            shared.count_races_with(self._backend)
            if self._backend.name == "triton":
                for name, view in shared.views.items():
                    if view.dim():
                        shared.count_races_of_rows(name)
            else:
                shared.count_stale_rows()
        self._opened_with = self.hyperparameters
        self._kinds = kinds_of(self._opened_with.switches)
        if settings.state == "per-worker":
            shared.make_worker_state(workers, self._kinds)
        else:
            shared.make_state(self._kinds)
        if settings.buffers != "shared":
            shared.make_worker_buffers(workers, kept=settings.buffers == "worker")
        shared.share_memory_(self.processes)
        shared.users += 1

    async def _end(self) -> None:
        """Waits for what is under way to end, and ends every process; may be begun again."""
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.gather(*(process.end() for process in self._started.values()))
        self._started.clear()

    def _divide(self, budget: Budget) -> list[_Share]:
        ran = described(self.settings, self.shared, self._backend, self._kinds, self._torch_threads)
        counts_rows = self.settings.telemetry and self.shared.row_versions is not None
        return [
            _Share(
                index,
                part,
                [
                    RunRecord(self.settings.workers, counts_rows=counts_rows).report(
                        **ran, partial=not part.is_spent()
                    )
                ],
            )
            for index, part in enumerate(budget.divided(self.processes))
        ]

    async def _work(self, share: _Share, run: _Run) -> None:
        """Has a process make a share; if it dies and may be replaced, another makes the rest."""
        failures = 0
        again = not share.budget.is_spent()
        try:
            while again:
                before = self._landed(share)
                try:
                    await self._conduct(share, run)
                    return
                except Exception as error:
                    landed = self._landed(share) - before
                    failures = 1 if landed else failures + 1
                    share.budget.spend(landed)
                    again = (
                        self.settings.on_error == "restart"
                        and failures < MAX_FAILURES_IN_A_ROW
                        and not self._stopping
                        and not run.stopped
                        and not share.budget.is_spent()
                    )
                    share.reports.append(self._make_report(share, landed, error, again))
                    run.ends.append(time.perf_counter())
                    if self.settings.on_error == "stop":
                        self._cancel()
        finally:
            run.arrive(share)

    async def _conduct(self, share: _Share, run: _Run) -> None:
        """Sees a process through its share, to its report."""
        process = await self._process(share.index)
        if self._stopping:
            return
        process.send("make", run.job)
        await process.receive("made")
        run.arrive(share)
        await run.begun.wait()
        # Made before the budget is looked at: if that is not spent, it had seconds left here.
        start = Start(share.budget.updates, share.budget.seconds, run.start)
        if self._stopping or run.stopped or share.budget.is_spent():
            process.send("cancel")
            return
        process.send("go", start)
        first = share.index * self.settings.workers

        async def finish() -> None:
            done = await process.receive("report", partial(report_to, run.callbacks, first))
            share.reports.append(done.report)
            run.ends.append(done.end)
            if self._timeline is not None:
                self._timeline.add_workers(done.timeline, first)
            if done.report.failures and self.settings.on_error == "stop":
                self._cancel()

        with process.watched(self.settings.deadline):
            await uncancelled(finish, partial(process.send, "cancel"), process.kill)

    async def _process(self, index: int) -> WorkerProcess:
        """The process of that number, started if there is none."""
        process = self._started.get(index)
        if process is None:
            setup = Setup(
                index,
                replace(self.settings, hyperparameters=self._opened_with),
                next(self._seeds),
                self._torch_threads,
                timed=self._timeline is not None,
            )
            async with self._starting:
                process = self._started[index] = await WorkerProcess.start(
                    setup, self._start_method, self.shared, self._lock
                )
            await process.receive("open")
            process.send("hyperparameters", self.hyperparameters)
        return process

    def _make_report(self, share: _Share, landed: int, error: Exception, again: bool) -> RunReport:
        """The report of a process that sent none; forgets the process, if it is no more."""
        dead = []
        process = self._started.get(share.index)
        if process is not None and process.has_ended:
            dead.append(process.pid)
            del self._started[share.index]
        workers = self.settings.workers
        return replace(
            share.reports[0],
            updates_by_worker=[landed] + [0] * (workers - 1),
            restarts=[int(again)] * workers,
            failures=dict.fromkeys(range(workers), error),
            dead=dead,
            rows=None,  # which nobody knows
            stale_rows=None,
            partial=not share.budget.is_spent(),
        )

    def _landed(self, share: _Share) -> int:
        return int(self.shared.versions[share.index + 1])

    def _cancel(self) -> None:
        """Has all processes give up what is under way."""
        self._stopping = True
        self._send_all("cancel")

    def _send_all(self, kind: str, content: Any = None) -> None:
        for process in self._started.values():
            process.send(kind, content)

    def _kill(self) -> None:
        self._stopping = True
        for process in self._started.values():
            process.kill()


@dataclass
class _Share:
    """What one process is to do of a run, and what it has done.

    Attributes:
        index: Number of the process.
        budget: What is left to do.
        reports: An empty one, and one of each process that did some of it.
    """

    index: int
    budget: Budget
    reports: list[RunReport]

    def report(self) -> RunReport:
        """All that was done."""
        return replace(RunReport.joined(self.reports), partial=self.reports[-1].partial)


class _Run:
    """A run while it goes on.

    Attributes:
        job: What all workers are to do.
        callbacks: Who hears of what they report.
        shares: One of each process.
        begun: Set when every process is ready, or will never be.
        start: When it was, by ``time.perf_counter``.
        ends: When each process ended its part.
        stopped: Whether no iteration is to begin any more.
    """

    def __init__(
        self,
        job: Job,
        callbacks: Callbacks,
        shares: list[_Share],
        counted: SharedParameters | None,
    ) -> None:
        self.job = job
        self.callbacks = callbacks
        self.shares = shares
        self.stopped = False
        self.begun = asyncio.Event()
        self.ends: list[float] = []
        self._awaited = {share.index for share in shares}
        self._record = RunRecord(0, counted)
        self.start = time.perf_counter()

    def arrive(self, share: _Share) -> None:
        """Takes note that nobody need wait for a process any more; the last one starts all."""
        self._awaited.discard(share.index)
        if not self._awaited and not self.begun.is_set():
            self.start = time.perf_counter()
            self.ends.clear()  # of those that never began
            for each in self.shares:
                each.budget.start()
            self.begun.set()

    def all_failed(self) -> bool:
        """Whether all who had something to do have failed for good, before it was done."""
        ends = [share.reports[-1] for share in self.shares if len(share.reports) > 1]
        failed = [end.partial and len(end.failures) == end.workers for end in ends]
        return all(failed) and not self.stopped

    def report(self) -> RunReport:
        """What all processes have done."""
        return RunReport.beside(
            [share.report() for share in self.shares],
            seconds=max(self.ends, default=time.perf_counter()) - self.start,
            **self._record.races(),
        )
