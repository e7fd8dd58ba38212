"""The scheduler's runs as the types of the result files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from hogstream.profiling.ceilings.machine import shares
from hogstream.profiling.results.records import Ceilings, Spread
from hogstream.profiling.results.schema import Run, Scheduling
from hogstream.scheduler import RunReport, SchedulerSettings

SomeRun = TypeVar("SomeRun", bound=Run)


def run_of(
    type_: type[SomeRun],
    reports: Sequence[RunReport],
    ceilings: Ceilings,
    *,
    processes: int,
    batch: int,
    depth: int,
    **more: Any,
) -> SomeRun:
    """The rounds of one policy, at one size and worker count.

    Args:
        type_: What to make of them.
        reports: One of each round.
        ceilings: Of the machine.
        processes: How many the workers were spread over.
        batch: Updates that were launched at once.
        depth: How many updates of a worker could be in flight.
        more: What the type has besides.
    """
    joined, speed = RunReport.joined(reports), speed_of(reports)
    share = shares(joined, speed.median, ceilings, processes=processes, batch=batch, depth=depth)
    return msgspec.convert(
        {
            **joined.to_dict(),
            "processes": processes,
            "batch": batch,
            "updates_per_second": speed,
            "gigabytes_per_second": speed.median * joined.bytes_per_update / 1e9,
            "share_of_ceilings": share,
            **more,
        },
        type_,
        str_keys=True,
    )


def speed_of(reports: Sequence[RunReport]) -> Spread:
    """Updates/s of each round."""
    return Spread.of([report.updates_per_second for report in reports])


def scheduling_of(settings: SchedulerSettings) -> Scheduling:
    """How the scheduler ran, as results say it."""
    return Scheduling(**settings.options())
