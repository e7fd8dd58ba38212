"""What a machine can do at most, measured once, and what results are as shares of it."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch

from hogstream.kernels.operands import COMPUTE_DTYPES
from hogstream.profiling.ceilings.cache import remember
from hogstream.profiling.ceilings.host import launch_rate, turn_rate
from hogstream.profiling.ceilings.memory import COPY, UPDATE_SHAPED, bandwidths, memory_levels
from hogstream.profiling.results.records import Ceilings, Level, PositiveSpread
from hogstream.profiling.results.schema import Shares
from hogstream.profiling.turns import Rate, sample_in_turn
from hogstream.scheduler import RunReport

ROUNDS = 9
_LAUNCHES, _TURNS = "launches", "turns of the event loop"
_EXCEEDED = 1.1  # by more than what drift from one minute to the next explains


def machine_ceilings(device: torch.device, *, fresh: bool = False) -> Ceilings:
    """The ceilings of a machine: measured at first, in ten seconds or so, and then remembered.

    Everything is sampled nine times in turn, for 20 ms or more each.

    Args:
        device: A CPU or CUDA device of it.
        fresh: Measure anew, and remember that.
    """
    return remember(device, partial(_measure_machine, device), fresh=fresh)


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
    level = next(each for each in ceilings.levels if (each.cache_bytes or size) >= size)
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
    named = {
        _LAUNCHES: ceilings.launches_per_second,
        _TURNS: ceilings.event_loop_turns_per_second,
    }
    for level in ceilings.levels:
        for kind, rate in (
            (COPY, level.copy_gigabytes_per_second),
            (UPDATE_SHAPED, level.update_shaped_gigabytes_per_second),
        ):
            if rate is not None:
                named[f"{level.level} {kind}"] = rate
    wide = [name for name, rate in named.items() if rate.estimate.wide]
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
        rates: dict[Any, Rate] = {_LAUNCHES: launch_rate(device), _TURNS: turn_rate(), **of_memory}
        samples = sample_in_turn(rates, ROUNDS)
    spreads = {key: PositiveSpread.of(each) for key, each in samples.items()}
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
        launches_per_second=spreads[_LAUNCHES],
        event_loop_turns_per_second=spreads[_TURNS],
    )
