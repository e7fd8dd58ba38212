"""What a machine can do at most, and what results are as shares of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import Any, TypeVar

import torch
from msgspec.structs import replace

from hogstream.kernels.operands import COMPUTE_DTYPES
from hogstream.profiling.ceilings.cache import keep, recall, remember
from hogstream.profiling.ceilings.host import launch_rate, turn_rate
from hogstream.profiling.ceilings.memory import bandwidths, memory_levels
from hogstream.profiling.ceilings.raising import Reached, new_ceiling, of_runs, raised, rescaled
from hogstream.profiling.results.records import (
    COPY,
    LAUNCHES,
    TURNS,
    UPDATE_SHAPED,
    Ceilings,
    Level,
)
from hogstream.profiling.results.schema import Run, Shares
from hogstream.profiling.turns import Rate, sample_in_turn
from hogstream.scheduler import RunReport

SomeRun = TypeVar("SomeRun", bound=Run)

ROUNDS = 9
_EXCEEDED = 1.1  # by more than what drift from one minute to the next explains


def machine_ceilings(device: torch.device, *, fresh: bool = False) -> Ceilings:
    """The ceilings of a machine: measured at first, in ten seconds or so, and then remembered.

    Everything is sampled nine times in turn, for 20 ms or more each.

    Args:
        device: A CPU or CUDA device of it.
        fresh: Measure again; what is higher than before is remembered.
    """
    return remember(device, partial(_measure_machine, device), fresh=fresh)


def raise_by_runs(
    device: torch.device, ceilings: Ceilings, runs: Sequence[SomeRun], besides: Iterable[Reached]
) -> tuple[Ceilings, list[SomeRun]]:
    """Raises the ceilings of a machine, for good, to what results reached.

    Args:
        device: Of it.
        ceilings: From ``machine_ceilings``.
        runs: Results, whose shares are of these.
        besides: What else was reached.

    Returns:
        The ceilings now, and the results with shares of them.
    """
    best = keep(device, raised(ceilings, [*of_runs(runs, ceilings), *besides]))
    return best, [
        replace(run, share_of_ceilings=rescaled(run.share_of_ceilings, ceilings, best))
        for run in runs
    ]


def raise_known(device: torch.device, reached: Iterable[Reached]) -> None:
    """Raises the ceilings of a machine to what was reached, if they were measured before."""
    ceilings = recall(device)
    if ceilings is not None:
        keep(device, raised(ceilings, reached))


def when_measured(ceilings: Ceilings) -> str:
    """When each was measured: a sentence."""
    names: dict[str, list[str]] = {}
    for name, rate in ceilings.rates().items():
        names.setdefault(rate.measured or ceilings.measured, []).append(name)
    if len(names) == 1:
        return f"Measured at {next(iter(names))}."
    dated = "; ".join(f"{', '.join(names[date])} at {date}" for date in sorted(names))
    return f"The best that was measured: {dated}."


def shares(
    report: RunReport, speed: float, ceilings: Ceilings, *, processes: int, batch: int, depth: int
) -> Shares:
    """What a run of the benchmark is, as shares of the ceilings of its machine.

    Args:
        report: Of the run.
        speed: Its updates/s.
        ceilings: From ``machine_ceilings``.
        processes: How many launch, each by itself, and turn an event loop.
        batch: Updates that are launched at once; on a GPU they are one launch, which is a graph.
        depth: How many updates of a worker could be in flight: no more are served by a turn of the
            event loop.
    """
    dtype: torch.dtype = getattr(torch, report.dtype)
    size = report.elements * (dtype.itemsize + COMPUTE_DTYPES[dtype].itemsize)
    level = ceilings.level_of(size)
    bandwidth, launched = level.update_shaped_gigabytes_per_second, processes
    if report.device != "cpu":
        launched *= batch
    return Shares(
        level=level.level,
        bandwidth=None
        if bandwidth is None
        else 1e-9 * speed * report.bytes_per_update / bandwidth.median,
        launch_rate=speed / (launched * ceilings.launches_per_second.median),
        event_loop_rate=speed / (processes * depth * ceilings.event_loop_turns_per_second.median),
    )


def ceiling_warnings(ceilings: Ceilings, reached: Iterable[Shares] = ()) -> list[str]:
    """Why a machine's ceilings may be none: they spread too widely, or results exceed them.

    Args:
        ceilings: From ``machine_ceilings``.
        reached: Shares of them.
    """
    wide = [name for name, rate in ceilings.rates().items() if rate.estimate.wide]
    most = max(
        (
            share
            for each in reached
            for share in (each.bandwidth, each.launch_rate, each.event_loop_rate)
            if share is not None
        ),
        default=0.0,
    )
    said = []
    if wide:
        said.append(f"spread too widely to conclude from: {', '.join(wide)}")
    if most > _EXCEEDED:
        said.append(f"are exceeded by some results, to {100 * most:.0f} %")
    if not said:
        return []
    return [
        f"Ceilings of this machine {'; and they '.join(said)}. They were measured at "
        f"{ceilings.measured}; if it was busy then, measure anew: hogstream ceilings --fresh."
    ]


def _measure_machine(device: torch.device) -> Ceilings:
    levels = memory_levels(device)
    with bandwidths(levels, device) as of_memory:
        rates: dict[Any, Rate] = {LAUNCHES: launch_rate(device), TURNS: turn_rate(), **of_memory}
        samples = sample_in_turn(rates, ROUNDS)
    spreads = {key: new_ceiling(each) for key, each in samples.items()}
    return Ceilings(
        measured=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        levels=[
            Level(
                level=level.name,
                bytes=level.bytes,
                threads=level.threads,
                cache_bytes=level.cache_bytes,
                copy_gigabytes_per_second=spreads.get((level, COPY)),
                update_shaped_gigabytes_per_second=spreads.get((level, UPDATE_SHAPED)),
            )
            for level in levels
        ],
        launches_per_second=spreads[LAUNCHES],
        event_loop_turns_per_second=spreads[TURNS],
    )
