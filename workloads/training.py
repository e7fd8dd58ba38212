"""One training of a workload: by the scheduler, or by hand, until the target or the limit."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from hogstream.profiling.errors import MeasurementError
from hogstream.profiling.measure.by_hand import ByHand, HandReport
from hogstream.profiling.results.gains import ALONE, BY_HAND, CONTENDER
from hogstream.scheduler import (
    ProcessScheduler,
    RunReport,
    SchedulerSettings,
    SharedParameters,
    StreamScheduler,
    Timeline,
)
from hogstream.scheduler.latencies import Latencies
from hogstream.workloads.watch import Point, Watch
from hogstream.workloads.workload import Workload, called

#: The backend of updates that are not the scheduler's.
TORCH = "torch"


class Limit(NamedTuple):
    """When a training that has not reached the target is given up: at the first of both."""

    updates: int | None
    seconds: float | None


@dataclass(frozen=True)
class Contender:
    """Who trains.

    Attributes:
        name: A policy's, ``ALONE`` or ``BY_HAND``.
        scheduling: How the scheduler runs; of ``BY_HAND``, how many workers there are.
        processes: How many the workers are spread over.
    """

    name: str
    scheduling: SchedulerSettings
    processes: int

    @property
    def in_processes(self) -> bool:
        """Whether workers are in other processes."""
        return self.processes > 1 or self.name == BY_HAND


def contenders(
    workload: Workload,
    scheduling: SchedulerSettings,
    policies: Sequence[str],
    processes: int,
    *,
    beside: bool,
) -> list[Contender]:
    """Who trains a workload: each policy, and beside them one worker alone, and by hand.

    Args:
        workload: Which.
        scheduling: How the scheduler runs, but for the policy; its workers are of each process.
        policies: Their names.
        processes: How many the workers are spread over.
        beside: Whether there are others than the policies.
    """
    several = [Contender(name, scheduling.with_policy(name), processes) for name in policies]
    if not beside:
        return several
    one = replace(scheduling, policy=CONTENDER, workers=1, depth=1, batch=1)
    several.append(Contender(ALONE, one, 1))
    if workload.by_hand is not None:
        plain = replace(scheduling, workers=1)
        several.append(Contender(BY_HAND, plain, scheduling.workers * processes))
    return several


class Outcome(NamedTuple):
    """What a training came to.

    Attributes:
        report: Of the scheduler; by hand, what is known of it.
        whole: Whether it ended at the target or the limit.
        reached: Whether it reached the target.
        end: Where it reached it, or else its end; seconds since its start.
        points: Of all evaluations; seconds since its start.
        losses: Seconds since its start, and the loss of an update.
        evaluating: Seconds that evaluations took.
    """

    report: RunReport
    whole: bool
    reached: bool
    end: Point
    points: list[Point]
    losses: list[tuple[float, float]]
    evaluating: float


class _Runner(Protocol):
    """What trains, and how far it is; both schedulers, and plain processes."""

    @property
    def report(self) -> RunReport | HandReport | None: ...

    def stop(self) -> None: ...


class Training:
    """One training of a new model.

    Attributes:
        contender: Who trains.
        outcome: What it came to, also if it failed or was cancelled; None before its first update.
    """

    def __init__(
        self,
        workload: Workload,
        contender: Contender,
        device: torch.device,
        limit: Limit,
        seed: int,
        timeline: Timeline | None,
    ) -> None:
        """Holds what it needs.

        Args:
            workload: What is trained.
            contender: Who trains.
            device: Where the model is.
            limit: When it is given up.
            seed: Of all random input.
            timeline: Takes down what the scheduler does.
        """
        self.contender = contender
        self.outcome: Outcome | None = None
        self._workload = workload
        self._device = device
        self._limit = limit
        self._seed = seed
        self._timeline = timeline
        self._losses: list[tuple[float, float]] = []

    async def run(self) -> None:
        """Trains until the target or the limit.

        Raises:
            WorkerError: If a worker failed.
            MeasurementError: If a process by hand failed, or the target is reached already.
        """
        seed_all(self._seed)
        model = called(self._workload, "model", self._device)
        async with self._opened(model) as (runner, made, start):
            watch = Watch(self._workload, model, made)
            if watch.reached is not None:
                target = self._workload.target
                raise MeasurementError(
                    f"{self._workload.name} has its target of {target.value:g} {target.metric} "
                    f"before any training: it must be one that is not reached yet"
                )
            seed_all(self._seed)  # whatever was drawn until now
            whole = False
            following = asyncio.create_task(watch.follow(runner.stop))
            try:
                await start(on_loss=self._note_loss, on_result=watch.note_result)
                if following.done():
                    following.result()  # or what it has failed with, which has ended the run
                whole = True
            finally:
                ended = time.perf_counter()
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
                report = runner.report
                if isinstance(report, HandReport):
                    report = as_run_report(BY_HAND, report, model)
                if report is not None and report.updates:
                    self.outcome = self._ended(watch, report, ended, whole=whole)

    @asynccontextmanager
    async def _opened(
        self, model: torch.nn.Module
    ) -> AsyncIterator[tuple[_Runner, Callable[[], int], Callable[..., Awaitable[Any]]]]:
        """What trains; how many updates it has made; and its ``run``, but for callbacks."""
        workload, contender, budget = self._workload, self.contender, self._limit._asdict()
        if contender.name == BY_HAND:
            assert workload.by_hand is not None
            async with ByHand(workload.by_hand, model, processes=contender.processes) as by_hand:
                yield by_hand, lambda: by_hand.made, partial(by_hand.run, **budget)
            return
        shared = SharedParameters.from_module(model)
        worker: Any
        scheduler: Any
        if contender.processes > 1:
            worker = workload.worker
            scheduler = ProcessScheduler(
                shared,
                contender.scheduling,
                processes=contender.processes,
                timeline=self._timeline,
            )
        else:
            worker = called(workload, "worker", shared, 0)
            scheduler = StreamScheduler(shared, contender.scheduling, timeline=self._timeline)
        async with scheduler:
            run = partial(scheduler.run, worker, **budget, lr_schedule=workload.lr_schedule)
            yield scheduler, lambda: shared.version, run

    def _note_loss(self, worker: int, loss: float) -> None:
        self._losses.append((time.perf_counter(), loss))

    def _ended(self, watch: Watch, report: RunReport, ended: float, *, whole: bool) -> Outcome:
        """What it came to, with times since its start: before, processes came up."""
        watched = watch.seconds
        if whole and watch.reached is None:
            watch.evaluate()  # what it came to in the end
        start = ended - report.seconds
        points = [
            point._replace(time=min(max(point.time - start, 0.0), report.seconds))
            for point in watch.points
        ]
        end = points[-1]
        if watch.reached is None:
            end = end._replace(time=report.seconds, updates=report.updates)
        return Outcome(
            report=report,
            whole=whole,
            reached=watch.reached is not None,
            end=end,
            points=points,
            losses=[(max(landed - start, 0.0), loss) for landed, loss in self._losses],
            evaluating=watched,
        )


def as_run_report(policy: str, report: HandReport, model: torch.nn.Module) -> RunReport:
    """What plain processes have done, of which latencies and staleness are not known."""
    trained = [each for each in model.parameters() if each.requires_grad]
    nobody = [0] * len(report.updates_by_process)
    return RunReport(
        policy=policy,
        workers=len(report.updates_by_process),
        elements=sum(each.numel() for each in trained),
        dtype=str(trained[0].dtype).removeprefix("torch."),
        backend=TORCH,
        device=str(trained[0].device),
        seconds=report.seconds,
        latencies=Latencies(),
        staleness=Counter(),
        updates_by_worker=report.updates_by_process,
        dropped=nobody,
        nonfinite=nobody,
        restarts=nobody,
        failures={},
        partial=report.partial,
        torch_threads=report.torch_threads,
    )


def seed_all(seed: int) -> None:
    """Seeds the generators of torch, ``random`` and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002 (the one that others draw from)
