"""The main job: lock-free against the other policies, over worker counts and sizes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hogstream.profiling.capture import captured
from hogstream.profiling.ceilings.machine import (
    ceiling_warnings,
    machine_ceilings,
    raise_by_runs,
)
from hogstream.profiling.ceilings.raising import of_kernels
from hogstream.profiling.environment import cache_bytes, describe_environment, free_memory
from hogstream.profiling.interruption import gather_until_interrupted
from hogstream.profiling.measure.kernels import measure_kernels
from hogstream.profiling.measure.runs import run_of, scheduling_of, speed_of
from hogstream.profiling.measure.today import SETUPS, Gradients, Setup, Today
from hogstream.profiling.results import schema
from hogstream.profiling.results.confidence import Interval, spread_warnings
from hogstream.profiling.results.gains import CONTENDER, gains_of
from hogstream.profiling.results.records import Ceilings, PositiveSpread, Ratio
from hogstream.profiling.results.schema import Bench, BenchRun, KernelTime, TelemetryCost, TodayRun
from hogstream.profiling.turns import in_turn
from hogstream.profiling.wording import counted, size_name
from hogstream.scheduler import (
    ProcessScheduler,
    RunReport,
    SchedulerSettings,
    SharedParameters,
    SimulatedWorker,
    StreamScheduler,
    Timeline,
)

ROUNDS = 7
_WARM_UP_UPDATES = 20

Measure = Callable[[], Awaitable[RunReport]]


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Attributes:
        device: Where.
        backend: Which kernels.
        dtype: Of the parameters.
        workers: Worker counts.
        elements: Sizes of the shared parameters.
        policies: Policies, measured in turn.
        processes: How many the workers are spread over; the counts are of each.
        scheduling: How the scheduler runs, but for the policy and the number of workers. With
            telemetry, what that costs is measured too.
        seconds: Measured for each configuration, over all rounds.
        think_time: Median seconds that a worker thinks.
        think_spread: Sigma of the think times' log-normal distribution.
        seed: Of gradients and think times.
        sweep: Whether it is a sweep over many sizes, to be told as such.
        today: Whether to measure what people run today in the same rounds.
    """

    device: torch.device
    backend: str
    dtype: torch.dtype
    workers: tuple[int, ...]
    elements: tuple[int, ...]
    policies: tuple[str, ...]
    processes: int
    scheduling: SchedulerSettings
    seconds: float
    think_time: float
    think_spread: float
    seed: int
    sweep: bool = False
    today: bool = False

    def steps(self) -> int:
        """How many times ``run_bench`` reports progress."""
        measured = len(self.workers) + int(self.scheduling.telemetry)
        prepared = len(self.elements) * len(self.workers) if self.today else 0
        return 2 + len(self.elements) * measured * ROUNDS + prepared


def run_bench(
    settings: BenchSettings,
    command: str,
    on_step: Callable[[str], None],
    timeline: Timeline | None = None,
) -> Bench:
    """Measures everything.

    Policies take turns, round by round, so that drift of the machine strikes them alike.

    Args:
        settings: What to measure.
        command: The command line that repeats it.
        on_step: Called before each of ``settings.steps()`` steps with what is to be measured.
        timeline: Takes down what is measured, but for the cost of telemetry.

    Returns:
        The result. Interrupted, it is partial: sizes and worker counts whose rounds were not all
        made are left out.

    Raises:
        KeyboardInterrupt: If interrupted before there was any result.
        MeasurementError: If workers failed before there was any result.
    """
    on_step("ceilings of this machine")
    ceilings = machine_ceilings(settings.device)
    on_step("kernels alone")
    kernels = measure_kernels(settings.device, settings.seed)
    with captured(settings.device):
        parts, end = gather_until_interrupted(_measure_all(settings, ceilings, on_step, timeline))
    measured = [each for part in parts for each in part]
    results = [each for each in measured if isinstance(each, BenchRun)]
    costs = [each for each in measured if isinstance(each, TelemetryCost)]
    today = [each for each in measured if isinstance(each, TodayRun)]
    ceilings, results = raise_by_runs(settings.device, ceilings, results, of_kernels(kernels))
    return Bench(
        command=command,
        environment=describe_environment(settings.device, settings.backend, settings.processes),
        partial=end.partial,
        error=end.error,
        warnings=spread_warnings(_timings(kernels, results, today))
        + ceiling_warnings(ceilings, (each.share_of_ceilings for each in results)),
        settings=schema.BenchSettings(
            scheduling=scheduling_of(settings.scheduling),
            processes=settings.processes,
            rounds=ROUNDS,
            seconds=settings.seconds,
            think_time=settings.think_time,
            think_spread=settings.think_spread,
            seed=settings.seed,
            sweep=settings.sweep,
        ),
        ceilings=ceilings,
        kernels=kernels,
        results=results,
        telemetry_cost=costs if settings.scheduling.telemetry else None,
        today=today if settings.today else None,
    )


def _timings(
    kernels: list[KernelTime], results: list[BenchRun], today: list[TodayRun]
) -> dict[str, Interval]:
    """All that was timed, by name."""
    timings = {f"{kernel.name} alone": kernel.milliseconds.estimate for kernel in kernels}
    for run in results:
        timings[_timing(run.policy, run.workers, run.elements)] = run.updates_per_second.estimate
    for each in today:
        timings[_timing(each.name, each.workers, each.elements)] = each.updates_per_second.estimate
    return timings


def _timing(name: str, workers: int, elements: int) -> str:
    return f"{name} with {counted(workers, 'worker')} at {size_name(elements)} elements"


def make_gradients(settings: BenchSettings, elements: int) -> list[torch.Tensor]:
    """Normal gradients for simulated workers to rotate: two for each, or one if it is large.

    If parameters and ``ms`` do not fit the cache of a core, a worker's next gradient must not sit
    in cache either, whatever the worker count: all together fill the last level twice.
    """
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    return [
        torch.randn(elements, generator=generator, device=settings.device).to(settings.dtype)
        for _ in range(_gradient_count(settings, elements))
    ]


def check_memory(settings: BenchSettings) -> None:
    """Checks that the largest size fits the device's free memory.

    Raises:
        ValueError: If it does not.
    """
    elements = max(settings.elements)
    workers, scheduling = settings.processes * max(settings.workers), settings.scheduling
    snapshots = workers if scheduling.read == "snapshot" else 0
    mss = 1 + (workers if scheduling.state == "per-worker" else 0)
    # Each policy has parameters and ms of its own; the latter are of float64 at most.
    policies = max(len(settings.policies), 2 if scheduling.telemetry else 1)
    bytes_each = policies * ((1 + snapshots) * settings.dtype.itemsize + 8 * mss)
    bytes_each += settings.processes * _gradient_count(settings, elements) * settings.dtype.itemsize
    if settings.today:
        # Optimizers have ms of their own, in each setup of threads or processes, and two tensors
        # that a step needs; and there are their gradients.
        bytes_each += (3 + 2 * 4 * workers) * settings.dtype.itemsize + 8
        bytes_each += 2 * _all_gradients(settings, elements) * settings.dtype.itemsize
    needed, free = elements * bytes_each, free_memory(settings.device)
    if needed > free:
        raise ValueError(
            f"must fit the memory of {settings.device}, of which {free / 1e9:.1f} GB are free, "
            f"got {elements:,}, which needs {needed / 1e9:.1f} GB"
        )


def _gradient_count(settings: BenchSettings, elements: int) -> int:
    own_cache, last_level = cache_bytes(settings.device)
    grad_bytes = elements * settings.dtype.itemsize
    if 2 * grad_bytes <= own_cache:
        return 2 * max(settings.workers)
    return max(max(settings.workers), -(-2 * last_level // grad_bytes))


def _all_gradients(settings: BenchSettings, elements: int) -> int:
    """How many there are for the workers of all processes."""
    workers = tuple(settings.processes * each for each in settings.workers)
    return _gradient_count(replace(settings, workers=workers), elements)


async def _measure_all(
    settings: BenchSettings,
    ceilings: Ceilings,
    on_step: Callable[[str], None],
    timeline: Timeline | None,
) -> AsyncIterator[list[BenchRun | TelemetryCost | TodayRun]]:
    """Yields what all did at each size and worker count, and what telemetry cost there."""
    async with AsyncExitStack() as stack:
        today = None
        if settings.today:
            most = settings.processes * max(settings.workers)
            gradients = Gradients(settings.seed, settings.dtype, settings.device)
            today = await stack.enter_async_context(Today(settings.elements, most, gradients))
        for elements in settings.elements:
            async for measured in _measure_size(
                _Size(settings, elements, on_step, today), settings, ceilings, timeline
            ):
                yield measured


async def _measure_size(
    size: _Size, settings: BenchSettings, ceilings: Ceilings, timeline: Timeline | None
) -> AsyncIterator[list[BenchRun | TelemetryCost | TodayRun]]:
    for workers in settings.workers:
        rounds = await size.take_turns(
            counted(settings.processes * workers, "worker"),
            workers,
            {policy: settings.scheduling.with_policy(policy) for policy in settings.policies},
            timeline,
            with_today=True,
        )
        yield [*_runs_of(settings, ceilings, rounds.reports), *_today_of(rounds)]
    if settings.scheduling.telemetry:
        counting = settings.scheduling.with_policy(CONTENDER)
        rounds = await size.take_turns(
            "cost of telemetry",
            max(settings.workers),
            {"with": counting, "without": replace(counting, telemetry=False)},
        )
        yield [_telemetry_cost(rounds.reports)]


@dataclass(frozen=True)
class _Rounds:
    """What took turns.

    Attributes:
        elements: Of the shared parameters.
        workers: How many, over all processes.
        reports: Of each variant of the scheduler's settings, by name: one a round.
        today: Updates/s of what people run today.
    """

    elements: int
    workers: int
    reports: dict[str, list[RunReport]]
    today: dict[Setup, list[float]]


class _Size:
    """What is measured at one size of the shared parameters."""

    def __init__(
        self,
        settings: BenchSettings,
        elements: int,
        on_step: Callable[[str], None],
        today: Today | None,
    ) -> None:
        self._settings = settings
        self._today = today
        self._elements = elements
        self._on_step = on_step
        self._gradients = make_gradients(settings, elements) if settings.processes == 1 else []

    async def take_turns(
        self,
        title: str,
        workers: int,
        variants: dict[str, SchedulerSettings],
        timeline: Timeline | None = None,
        *,
        with_today: bool = False,
    ) -> _Rounds:
        """Measures variants of the scheduler's settings in turn, for all rounds."""
        everyone = self._settings.processes * workers
        async with AsyncExitStack() as stack:
            measures: dict[str | Setup, Callable[[], Awaitable[Any]]] = {}
            for name, variant in variants.items():
                scheduling = replace(variant, workers=workers)
                measures[name] = (
                    self._with_threads(scheduling, timeline)
                    if self._settings.processes == 1
                    else await self._with_processes(stack, scheduling, timeline)
                )
            if self._today is not None and with_today:
                self._on_step(f"{self._name}, {title}: what people run today")
                measures |= await self._measures_of(self._today, everyone)
            rounds: dict[str | Setup, list[Any]] = {name: [] for name in measures}
            for index in range(ROUNDS):
                self._on_step(f"{self._name}, {title}, round {index + 1}")
                for each in in_turn(list(measures), index):
                    rounds[each].append(await measures[each]())
        return _Rounds(
            self._elements,
            everyone,
            {name: rounds[name] for name in variants},
            {setup: rounds[setup] for setup in SETUPS if setup in rounds},
        )

    async def _measures_of(
        self, today: Today, workers: int
    ) -> dict[str | Setup, Callable[[], Awaitable[Any]]]:
        """What people run today, for a round each."""
        gradients = _all_gradients(self._settings, self._elements)
        measures = await today.prepare(self._elements, workers, gradients)
        return {setup: partial(measure, self._seconds) for setup, measure in measures.items()}

    def _with_threads(self, scheduling: SchedulerSettings, timeline: Timeline | None) -> Measure:
        """A scheduler of this process, opened for each round, as streams share hardware queues."""
        shared, settings = self._make_shared(), self._settings
        worker = _make_worker(settings, self._gradients, scheduling.workers, settings.seed)

        async def measure() -> RunReport:
            async with StreamScheduler(shared, scheduling, timeline=timeline) as scheduler:
                await scheduler.run(worker, updates=_WARM_UP_UPDATES, seconds=self._seconds)
                return await scheduler.run(worker, seconds=self._seconds)

        return measure

    async def _with_processes(
        self, stack: AsyncExitStack, scheduling: SchedulerSettings, timeline: Timeline | None
    ) -> Measure:
        """Other processes, kept for all rounds: they take seconds to start."""
        settings = self._settings
        scheduler = await stack.enter_async_context(
            ProcessScheduler(
                self._make_shared(), scheduling, processes=settings.processes, timeline=timeline
            )
        )
        make_worker = partial(_make_worker_of_process, settings, scheduling.workers)
        await scheduler.run(make_worker, updates=_WARM_UP_UPDATES, seconds=self._seconds)
        return partial(scheduler.run, make_worker, seconds=self._seconds)

    def _make_shared(self) -> SharedParameters:
        settings = self._settings
        flat = torch.zeros(self._elements, dtype=settings.dtype, device=settings.device)
        return SharedParameters({"flat": flat})

    @property
    def _name(self) -> str:
        return f"{size_name(self._elements)} elements"

    @property
    def _seconds(self) -> float:
        return self._settings.seconds / ROUNDS


def _make_worker_of_process(
    settings: BenchSettings, workers: int, shared: SharedParameters, process: int
) -> SimulatedWorker:
    seed = settings.seed + process
    gradients = make_gradients(replace(settings, seed=seed), shared.elements)
    return _make_worker(settings, gradients, workers, seed)


def _make_worker(
    settings: BenchSettings, gradients: Sequence[torch.Tensor], workers: int, seed: int
) -> SimulatedWorker:
    return SimulatedWorker(
        gradients,
        workers=workers,
        think_time=settings.think_time,
        think_spread=settings.think_spread,
        seed=seed,
    )


def _telemetry_cost(rounds: dict[str, list[RunReport]]) -> TelemetryCost:
    on, off = speed_of(rounds["with"]), speed_of(rounds["without"])
    report = rounds["with"][0]
    return TelemetryCost(
        elements=report.elements,
        workers=report.workers,
        with_telemetry=on,
        without_telemetry=off,
        ratio=Ratio.of(on.samples, off.samples),
    )


def _today_of(rounds: _Rounds) -> Iterator[TodayRun]:
    """What people run today came to, with lock-free's updates/s over theirs."""
    mine = rounds.reports.get(CONTENDER)
    for setup, speeds in rounds.today.items():
        yield TodayRun(
            spread_over=setup.spread_over,
            update=setup.update,
            lock=setup.lock,
            workers=rounds.workers,
            elements=rounds.elements,
            updates_per_second=PositiveSpread.of(speeds),
            lock_free_ratio=None if mine is None else Ratio.of(speed_of(mine).samples, speeds),
        )


def _runs_of(
    settings: BenchSettings, ceilings: Ceilings, rounds: dict[str, list[RunReport]]
) -> Iterator[BenchRun]:
    """What each policy did over its rounds, with its gains over the others."""
    speeds = {policy: speed_of(reports) for policy, reports in rounds.items()}
    for policy, reports in rounds.items():
        yield run_of(
            BenchRun,
            reports,
            ceilings,
            processes=settings.processes,
            batch=settings.scheduling.with_policy(policy).batch,
            depth=settings.scheduling.depth,
            gains=gains_of(policy, speeds),
        )
