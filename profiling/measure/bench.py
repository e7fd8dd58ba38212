"""The main job: lock-free against the other policies, over worker counts and sizes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial

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
from hogstream.profiling.results import schema
from hogstream.profiling.results.confidence import Interval, spread_warnings
from hogstream.profiling.results.gains import CONTENDER, gains_of
from hogstream.profiling.results.records import Ceilings, Ratio
from hogstream.profiling.results.schema import Bench, BenchRun, KernelTime, TelemetryCost
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

    def steps(self) -> int:
        """How many times ``run_bench`` reports progress."""
        measured = len(self.workers) + int(self.scheduling.telemetry)
        return 2 + len(self.elements) * measured * ROUNDS


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
    ceilings, results = raise_by_runs(settings.device, ceilings, results, of_kernels(kernels))
    return Bench(
        command=command,
        environment=describe_environment(settings.device, settings.backend, settings.processes),
        partial=end.partial,
        error=end.error,
        warnings=spread_warnings(_timings(kernels, results))
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
    )


def _timings(kernels: list[KernelTime], results: list[BenchRun]) -> dict[str, Interval]:
    """All that was timed, by name."""
    timings = {f"{kernel.name} alone": kernel.milliseconds.estimate for kernel in kernels}
    for run in results:
        workers, size = counted(run.workers, "worker"), size_name(run.elements)
        name = f"{run.policy} with {workers} at {size} elements"
        timings[name] = run.updates_per_second.estimate
    return timings


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


async def _measure_all(
    settings: BenchSettings,
    ceilings: Ceilings,
    on_step: Callable[[str], None],
    timeline: Timeline | None,
) -> AsyncIterator[list[BenchRun | TelemetryCost]]:
    """Yields what all policies did at each size and worker count, and what telemetry cost there."""
    for elements in settings.elements:
        size = _Size(settings, elements, on_step)
        for workers in settings.workers:
            rounds = await size.take_turns(
                counted(settings.processes * workers, "worker"),
                workers,
                {policy: settings.scheduling.with_policy(policy) for policy in settings.policies},
                timeline,
            )
            yield [*_runs_of(settings, ceilings, rounds)]
        if settings.scheduling.telemetry:
            counting = settings.scheduling.with_policy(CONTENDER)
            rounds = await size.take_turns(
                "cost of telemetry",
                max(settings.workers),
                {"with": counting, "without": replace(counting, telemetry=False)},
            )
            yield [_telemetry_cost(rounds)]


class _Size:
    """What is measured at one size of the shared parameters."""

    def __init__(
        self, settings: BenchSettings, elements: int, on_step: Callable[[str], None]
    ) -> None:
        self._settings = settings
        self._elements = elements
        self._on_step = on_step
        self._gradients = make_gradients(settings, elements) if settings.processes == 1 else []

    async def take_turns(
        self,
        title: str,
        workers: int,
        variants: dict[str, SchedulerSettings],
        timeline: Timeline | None = None,
    ) -> dict[str, list[RunReport]]:
        """Measures variants of the scheduler's settings in turn, for all rounds."""
        rounds: dict[str, list[RunReport]] = {name: [] for name in variants}
        async with AsyncExitStack() as stack:
            measures = {}
            for name, variant in variants.items():
                scheduling = replace(variant, workers=workers)
                measures[name] = (
                    self._with_threads(scheduling, timeline)
                    if self._settings.processes == 1
                    else await self._with_processes(stack, scheduling)
                )
            for index in range(ROUNDS):
                self._on_step(f"{size_name(self._elements)} elements, {title}, round {index + 1}")
                for name in in_turn(list(variants), index):
                    rounds[name].append(await measures[name]())
        return rounds

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
        self, stack: AsyncExitStack, scheduling: SchedulerSettings
    ) -> Measure:
        """Other processes, kept for all rounds: they take seconds to start."""
        settings = self._settings
        scheduler = await stack.enter_async_context(
            ProcessScheduler(self._make_shared(), scheduling, processes=settings.processes)
        )
        make_worker = partial(_make_worker_of_process, settings, scheduling.workers)
        await scheduler.run(make_worker, updates=_WARM_UP_UPDATES, seconds=self._seconds)
        return partial(scheduler.run, make_worker, seconds=self._seconds)

    def _make_shared(self) -> SharedParameters:
        settings = self._settings
        flat = torch.zeros(self._elements, dtype=settings.dtype, device=settings.device)
        return SharedParameters({"flat": flat})

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
