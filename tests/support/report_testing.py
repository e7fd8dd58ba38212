"""Results to test with: committed ones, and one whose noise and speed are known."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from hogstream.profiling.measure.today import SETUPS
from hogstream.profiling.results.gains import gains_of
from hogstream.profiling.results.records import (
    Ceiling,
    Ceilings,
    Level,
    PositiveSpread,
    Ratio,
    Spread,
)
from hogstream.profiling.results.schema import Bench, BenchRun, TodayRun

T = TypeVar("T")

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def committed(job: str, type_: type[T]) -> T:
    """A committed result, such as of ``bench``, as it is."""
    return msgspec.json.decode(committed_file(job).read_bytes(), type=type_)


def committed_file(job: str) -> Path:
    """Where it is: of a CPU, the first by name."""
    return min(RESULTS.glob(f"*-2-cores-{job}.json"))


def full_bench(job: str = "bench", *, speed: float = 1.0, seed: int = 0) -> Bench:
    """A committed run of ``bench`` with calm ceilings and kernels, and noise of 2 % on its rounds.

    Args:
        job: Which.
        speed: A factor on every round of lock-free, so that two runs differ by it.
        seed: Of the noise.
    """
    bench, random = committed(job, Bench), np.random.default_rng(seed)
    bench.ceilings = _calm_ceilings(random)
    for kernel in bench.kernels:
        kernel.milliseconds = PositiveSpread.of(_noisy(kernel.milliseconds.median, random))
    for run in bench.results:
        factor = speed if run.policy == "lock-free" else 1.0
        noise = np.exp(0.02 * random.standard_normal(len(run.updates_per_second.samples)))
        rounds = factor * noise * np.asarray(run.updates_per_second.samples)
        run.updates_per_second = Spread.of(rounds.tolist())
        run.gigabytes_per_second = 20e-9 * run.elements * run.updates_per_second.median
    with_gains(bench.results)
    bench.warnings = ["The spread of 1 of 28 timings is too wide to conclude from them."]
    return bench


def with_today(bench: Bench) -> Bench:
    """A bench with what people run today: each a tenth as fast as lock-free, or less."""
    bench.today = [
        TodayRun(
            spread_over=setup.spread_over,
            update=setup.update,
            lock=setup.lock,
            workers=run.workers,
            elements=run.elements,
            updates_per_second=PositiveSpread.of(speeds),
            lock_free_ratio=Ratio.of(run.updates_per_second.samples, speeds),
        )
        for run in bench.results
        if run.policy == "lock-free"
        for index, setup in enumerate(SETUPS)
        for speeds in [[speed / (10 + index) for speed in run.updates_per_second.samples]]
    ]
    return bench


def with_gains(runs: list[BenchRun]) -> list[BenchRun]:
    """Makes gains anew from the rounds, as ``bench`` makes them."""
    speeds: dict[tuple[int, int], dict[str, Spread]] = defaultdict(dict)
    for run in runs:
        speeds[run.elements, run.workers][run.policy] = run.updates_per_second
    for run in runs:
        run.gains = gains_of(run.policy, speeds[run.elements, run.workers])
    return runs


def _calm_ceilings(random: np.random.Generator) -> Ceilings:
    levels = (
        ("L1", 48 << 10, 48 << 10, 310.0),
        ("L2", 1 << 20, 1 << 20, 170.0),
        ("L3", 24 << 20, 24 << 20, 88.0),
        ("memory", 320 << 20, None, 40.5),
    )
    return Ceilings(
        measured="2026-11-22T17:05:11+00:00",
        levels=[
            Level(
                level=level,
                bytes=size,
                threads=2,
                cache_bytes=cache_bytes,
                copy_gigabytes_per_second=Ceiling.of(_noisy(0.6 * top, random)),
                update_shaped_gigabytes_per_second=Ceiling.of(_noisy(top, random)),
            )
            for level, size, cache_bytes, top in levels
        ],
        launches_per_second=Ceiling.of(_noisy(412_000.0, random)),
        event_loop_turns_per_second=Ceiling.of(_noisy(168_000.0, random)),
    )


def _noisy(median: float, random: np.random.Generator) -> list[float]:
    samples: list[float] = (median * np.exp(0.03 * random.standard_normal(9))).tolist()
    return samples
