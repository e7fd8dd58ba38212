"""The main job: lock-free against the other policies, over worker counts and sizes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hogstream.profiling.capture import captured
from hogstream.profiling.ceilings.machine import (
    ceiling_warnings,
    machine_ceilings,
    measure_ceilings,
    shares,
)
from hogstream.profiling.environment import SCHEMA, cache_bytes, describe_environment, free_memory
from hogstream.profiling.interruption import gather_until_interrupted
from hogstream.profiling.measure.kernels import measure_kernels
from hogstream.profiling.results.confidence import (
    Interval,
    median_interval,
    ratio_interval,
    spread_warnings,
)
from hogstream.profiling.results.gains import BASELINES, CONTENDER
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
    settings: BenchSettings, on_step: Callable[[str], None], timeline: Timeline | None = None
) -> dict[str, Any]:
    """Measures everything.

    Policies take turns, round by round, so that drift of the machine strikes them alike.

    Args:
        settings: What to measure.
        on_step: Called before each of ``settings.steps()`` steps with what is to be measured.
        timeline: Takes down what is measured, but for the cost of telemetry.

    Returns:
        The JSON output, but for the command line. Interrupted, it is partial: sizes and worker
        counts whose rounds were not all made are left out.

    Raises:
        KeyboardInterrupt: If interrupted before there was any result.
        MeasurementError: If workers failed before there was any result.
    """
    on_step("memory ceilings")
    ceilings = {**measure_ceilings(settings.device), **machine_ceilings(settings.device)}
    on_step("kernels alone")
    kernels = measure_kernels(settings.device, settings.seed)
    with captured(settings.device):
        parts, ended = gather_until_interrupted(_measure_all(settings, on_step, timeline))
    results, telemetry_cost = (
        [entry for part in parts for entry in part.get(name, ())]
        for name in ("results", "telemetry_cost")
    )
    for each in results:
        each["share_of_ceilings"] = shares(each, ceilings, depth=settings.scheduling.depth)
    return {
        "schema": SCHEMA,
        "environment": describe_environment(settings.device, settings.backend, settings.processes),
        "settings": {
            "processes": settings.processes,
            **settings.scheduling.options(),
            "rounds": ROUNDS,
            "seconds": settings.seconds,
            "think_time": settings.think_time,
            "think_spread": settings.think_spread,
            "seed": settings.seed,
            "sweep": settings.sweep,
        },
        **ended,
        "ceilings": ceilings,
        "kernels": kernels,
        "results": results,
        "telemetry_cost": telemetry_cost if settings.scheduling.telemetry else None,
        "warnings": spread_warnings(_timings(kernels, results))
        + ceiling_warnings(ceilings, results),
    }


def _timings(kernels: list[dict[str, Any]], results: list[dict[str, Any]]) -> dict[str, Interval]:
    """All that was timed, by name."""
    timings = {
        f"{kernel['name']} alone": median_interval(kernel["milliseconds_of_rounds"])
        for kernel in kernels
    }
    for each in results:
        workers, size = counted(each["workers"], "worker"), size_name(each["elements"])
        name = f"{each['policy']} with {workers} at {size} elements"
        timings[name] = median_interval(each["updates_per_second_of_rounds"])
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
    settings: BenchSettings, on_step: Callable[[str], None], timeline: Timeline | None
) -> AsyncIterator[dict[str, list[dict[str, Any]]]]:
    """Yields entries for the JSON's lists: of all policies at each size and worker count."""
    for elements in settings.elements:
        size = _Size(settings, elements, on_step)
        for workers in settings.workers:
            rounds = await size.take_turns(
                counted(settings.processes * workers, "worker"),
                workers,
                {policy: settings.scheduling.with_policy(policy) for policy in settings.policies},
                timeline,
            )
            yield {"results": _results_of(settings, rounds)}
        if settings.scheduling.telemetry:
            counting = settings.scheduling.with_policy(CONTENDER)
            rounds = await size.take_turns(
                "cost of telemetry",
                max(settings.workers),
                {"with": counting, "without": replace(counting, telemetry=False)},
            )
            yield {"telemetry_cost": [_telemetry_cost(rounds)]}


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
        names = list(variants)
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
                first = index % len(names)  # each goes first in its turn
                for name in names[first:] + names[:first]:
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


def _telemetry_cost(rounds: dict[str, list[RunReport]]) -> dict[str, Any]:
    """Updates/s with telemetry over those without, in the same rounds; null if none landed."""
    speeds, report = _speeds(rounds), rounds["with"][0]
    gain = ratio_interval(speeds["with"], speeds["without"], paired=True)
    return {
        "elements": report.elements,
        "workers": report.workers,
        "updates_per_second_of_rounds": speeds,
        "ratio": None if gain is None else gain.median,
        "ratio_interval": None if gain is None else gain.bounds,
    }


def _speeds(rounds: dict[str, list[RunReport]]) -> dict[str, list[float]]:
    return {
        name: [report.updates_per_second for report in reports] for name, reports in rounds.items()
    }


def _results_of(
    settings: BenchSettings, rounds: dict[str, list[RunReport]]
) -> list[dict[str, Any]]:
    """One result for each policy: medians over its rounds, and its gains over the baselines."""
    speeds = _speeds(rounds)
    results = []
    for policy, reports in rounds.items():
        joined = RunReport.joined(reports)
        speed = median_interval(speeds[policy])
        results.append(
            {
                **joined.to_dict(),
                "processes": settings.processes,
                "batch": settings.scheduling.with_policy(policy).batch,
                "updates_per_second": speed.median,
                "updates_per_second_interval": speed.bounds,
                "gigabytes_per_second": speed.median * joined.bytes_per_update / 1e9,
                "updates_per_second_of_rounds": speeds[policy],
                **_gains_of(policy, speeds),
            }
        )
    return results


def _gains_of(policy: str, speeds: dict[str, list[float]]) -> dict[str, Any]:
    """A policy's gain over each baseline, and its interval; null where there is none."""
    gains: dict[str, Any] = {}
    for baseline in BASELINES:
        gain = None
        if baseline != policy and baseline in speeds:
            gain = ratio_interval(speeds[policy], speeds[baseline], paired=True)
        gains[f"gain_over_{baseline}"] = None if gain is None else gain.median
        gains[f"gain_over_{baseline}_interval"] = None if gain is None else gain.bounds
    return gains
