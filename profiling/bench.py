"""The main job: lock-free against the other policies, over worker counts and sizes."""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hogstream.profiling.ceilings import measure_ceilings
from hogstream.profiling.console import counted, size_name
from hogstream.profiling.environment import SCHEMA, cache_bytes, describe_environment, free_memory
from hogstream.profiling.gains import BASELINES
from hogstream.profiling.interruption import gather_until_interrupted
from hogstream.profiling.kernel_bench import measure_kernels
from hogstream.scheduler import RunReport, SharedParameters, SimulatedWorker, StreamScheduler

ROUNDS = 5
_WARM_UP_UPDATES = 20


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
        depth: How many updates of one worker may be in flight.
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
    depth: int
    seconds: float
    think_time: float
    think_spread: float
    seed: int
    sweep: bool = False

    def steps(self) -> int:
        """How many times ``run_bench`` reports progress."""
        return 2 + len(self.elements) * len(self.workers) * ROUNDS


def run_bench(settings: BenchSettings, on_step: Callable[[str], None]) -> dict[str, Any]:
    """Measures everything.

    Policies take turns, round by round, so that drift of the machine strikes them alike.

    Args:
        settings: What to measure.
        on_step: Called before each of ``settings.steps()`` steps with what is to be measured.

    Returns:
        The JSON output, but for the command line. Interrupted, it is partial: sizes and worker
        counts whose rounds were not all made are left out.

    Raises:
        KeyboardInterrupt: If interrupted before there was any result.
    """
    on_step("memory ceilings")
    ceilings = measure_ceilings(settings.device)
    on_step("kernels alone")
    kernels = measure_kernels(settings.device, settings.seed)
    parts, partial = gather_until_interrupted(_measure_all(settings, on_step))
    return {
        "schema": SCHEMA,
        "environment": describe_environment(settings.device, settings.backend),
        "settings": {
            "depth": settings.depth,
            "rounds": ROUNDS,
            "seconds": settings.seconds,
            "think_time": settings.think_time,
            "think_spread": settings.think_spread,
            "seed": settings.seed,
            "sweep": settings.sweep,
        },
        "partial": partial,
        "ceilings": ceilings,
        "kernels": kernels,
        "results": [result for part in parts for result in part],
    }


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
    # The parameters, the gradients, and ms, which is of float64 at most.
    bytes_each = (1 + _gradient_count(settings, elements)) * settings.dtype.itemsize + 8
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
    settings: BenchSettings, on_step: Callable[[str], None]
) -> AsyncIterator[list[dict[str, Any]]]:
    """Yields the results of all policies at each size and worker count."""
    for elements in settings.elements:
        shared = SharedParameters(
            {"flat": torch.zeros(elements, dtype=settings.dtype, device=settings.device)}
        )
        gradients = make_gradients(settings, elements)
        for workers in settings.workers:
            rounds: dict[str, list[RunReport]] = {policy: [] for policy in settings.policies}
            for index in range(ROUNDS):
                on_step(
                    f"{size_name(elements)} elements, {counted(workers, 'worker')}, "
                    f"round {index + 1}"
                )
                first = index % len(settings.policies)  # each goes first in its turn
                for policy in settings.policies[first:] + settings.policies[:first]:
                    rounds[policy].append(
                        await _measure(settings, shared, gradients, workers, policy)
                    )
            yield _results_of(rounds)


async def _measure(
    settings: BenchSettings,
    shared: SharedParameters,
    gradients: Sequence[torch.Tensor],
    workers: int,
    policy: str,
) -> RunReport:
    worker = SimulatedWorker(
        gradients,
        workers=workers,
        think_time=settings.think_time,
        think_spread=settings.think_spread,
        seed=settings.seed,
    )
    async with StreamScheduler(
        shared, workers=workers, policy=policy, depth=settings.depth, backend=settings.backend
    ) as scheduler:
        await scheduler.run(worker, updates=_WARM_UP_UPDATES, seconds=settings.seconds / ROUNDS)
        return await scheduler.run(worker, seconds=settings.seconds / ROUNDS)


def _results_of(rounds: dict[str, list[RunReport]]) -> list[dict[str, Any]]:
    """One result for each policy: medians over its rounds, and its gains over the baselines."""
    speeds = {
        policy: [report.updates_per_second for report in reports]
        for policy, reports in rounds.items()
    }
    results = []
    for policy, reports in rounds.items():
        joined = RunReport.joined(reports)
        median = statistics.median(speeds[policy])
        gains = {
            f"gain_over_{baseline}": median / statistics.median(speeds[baseline])
            if baseline != policy and statistics.median(speeds.get(baseline, [0.0])) > 0
            else None
            for baseline in BASELINES
        }
        results.append(
            {
                **joined.to_dict(),
                "updates_per_second": median,
                "gigabytes_per_second": median * joined.bytes_per_update / 1e9,
                "updates_per_second_of_rounds": speeds[policy],
                **gains,
            }
        )
    return results
