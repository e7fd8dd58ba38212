"""What a run did, and how fast."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from hogstream.kernels.backends.select import Backend
from hogstream.kernels.operands import COMPUTE_DTYPES
from hogstream.kernels.row_table import STALE, UPDATED, RowTable
from hogstream.scheduler.checks import error_text
from hogstream.scheduler.chunks import CompiledRun
from hogstream.scheduler.latencies import Latencies
from hogstream.scheduler.parameters import SharedParameters
from hogstream.scheduler.settings import SchedulerSettings
from hogstream.scheduler.update import Snapshot, Work

_BUFFERED = 1024


@dataclass(frozen=True)
class RunReport:
    """What a run of the scheduler did.

    Attributes:
        policy: Name of the policy.
        workers: Number of workers.
        elements: Number of shared parameters.
        dtype: Their dtype, such as ``"float32"``.
        backend: Name of the backend.
        device: Such as ``"cpu"`` or ``"cuda:0"``.
        seconds: From the start of the workers until the last update had landed.
        latencies: From submission to landing of each update, all waits included; of a
            ``NativeWorker``'s, from its read to its landing.
        staleness: How many updates had each staleness: versions that went by between the read of
            the parameters, at the start of an iteration, and the landing of its update. Of a
            ``NativeWorker``'s, only one in 16 is looked at.
        updates_by_worker: How many updates of each worker landed.
        dropped: How many updates of each worker were submitted and did not land, because their
            lane failed.
        nonfinite: How many updates of each worker were left out because of an infinity or NaN.
        restarts: How often each worker was started again.
        failures: What made workers fail, by their index: the first error of each.
        dead: Process ids of workers that were killed.
        partial: Whether the run ended before it had done what it was asked for.
        block_updates: With telemetry, how many updates landed, counted for each block of the
            parameters; else None. On a GPU, those of rows are counted for each row.
        lost_block_updates: How many of those were lost.
        overwritten_block_updates: How often one of those was overwritten; see ``RaceCounters``.
        rows: With telemetry on a CPU, how many rows were updated by updates of rows, each counted
            once for an update; else None.
        stale_rows: How many of those another update of rows had changed between the update's read
            and its landing.
        state_kinds: How many numbers of state an element has: 1 for ``ms``, and 1 more each if
            updates are centered, and if they have momentum.
        torch_threads: How many threads torch used for operations of a thread that computes for a
            worker, unless the worker has set another number there.
    """

    policy: str
    workers: int
    elements: int
    dtype: str
    backend: str
    device: str
    seconds: float
    latencies: Latencies = field(repr=False)
    staleness: Counter[int] = field(repr=False)
    updates_by_worker: list[int]
    dropped: list[int]
    nonfinite: list[int]
    restarts: list[int]
    failures: dict[int, BaseException]
    dead: list[int] = field(default_factory=list)
    partial: bool = False
    block_updates: int | None = None
    lost_block_updates: int | None = None
    overwritten_block_updates: int | None = None
    rows: int | None = None
    stale_rows: int | None = None
    state_kinds: int = 1
    torch_threads: int = 1

    @property
    def updates(self) -> int:
        """How many updates landed."""
        return sum(self.updates_by_worker)

    @property
    def updates_per_second(self) -> float:
        """Updates that landed, for each second of the run."""
        return self.updates / self.seconds

    @property
    def bytes_per_update(self) -> int:
        """The least memory traffic that an update needs.

        It reads grad, state and param and writes state and param: 20 bytes an element in float32,
        and 8 more for each kind of state besides ``ms``.
        """
        dtype: torch.dtype = getattr(torch, self.dtype)
        state = self.state_kinds * COMPUTE_DTYPES[dtype].itemsize
        return self.elements * (3 * dtype.itemsize + 2 * state)

    @property
    def gigabytes_per_second(self) -> float:
        """The least memory traffic of all updates, in 1e9 bytes/s."""
        return self.updates_per_second * self.bytes_per_update / 1e9

    @property
    def lost_updates_fraction(self) -> float | None:
        """The share of updates that were lost, block by block; None without telemetry."""
        if not self.block_updates or self.lost_block_updates is None:
            return None
        return self.lost_block_updates / self.block_updates

    @property
    def stale_rows_fraction(self) -> float | None:
        """The share of updated rows that were stale; None if there were none, or not counted."""
        if not self.rows or self.stale_rows is None:
            return None
        return self.stale_rows / self.rows

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON; None where nothing was measured."""
        return {
            "policy": self.policy,
            "workers": self.workers,
            "elements": self.elements,
            "dtype": self.dtype,
            "backend": self.backend,
            "device": self.device,
            "torch_threads": self.torch_threads,
            "updates": self.updates,
            "seconds": self.seconds,
            "updates_per_second": self.updates_per_second,
            "gigabytes_per_second": self.gigabytes_per_second,
            "latency_us": {
                **{
                    f"p{percent}": self.latencies.percentile_us(percent) for percent in (50, 90, 99)
                },
                "histogram": self.latencies.histogram(),
            },
            "staleness": staleness_summary(self.staleness),
            "lost_updates_fraction": self.lost_updates_fraction,
            "overwrites_per_update": None
            if not self.block_updates or self.overwritten_block_updates is None
            else self.overwritten_block_updates / self.block_updates,
            "stale_rows_fraction": self.stale_rows_fraction,
            "updates_by_worker": self.updates_by_worker,
            "dropped_by_worker": self.dropped,
            "nonfinite_by_worker": self.nonfinite,
            "restarts_by_worker": self.restarts,
            "failures": {str(worker): error_text(error) for worker, error in self.failures.items()},
            "dead": self.dead,
            "partial": self.partial,
        }

    @classmethod
    def joined(cls, reports: Sequence[RunReport]) -> RunReport:
        """Several runs of one configuration as one: samples together, seconds added up.

        Raises:
            ValueError: If there are none, or their configurations differ.
        """
        if not reports:
            raise ValueError("reports must hold at least one, got none")
        for report in reports:
            for name in (each.name for each in fields(cls)[:6]):
                mine, value = getattr(report, name), getattr(reports[0], name)
                if mine != value:
                    raise ValueError(f"{name} must be {value!r} in all reports, got {mine!r}")
        return _merged(
            reports,
            workers=reports[0].workers,
            seconds=sum(report.seconds for report in reports),
            **{
                name: np.sum([getattr(report, name) for report in reports], axis=0).tolist()
                for name in _BY_WORKER
            },
            failures={
                worker: error
                for report in reversed(reports)
                for worker, error in report.failures.items()
            },
        )

    @classmethod
    def beside(cls, reports: Sequence[RunReport], **ended: Any) -> RunReport:
        """Runs of several processes at the same time as one; workers are numbered through.

        Args:
            reports: One of each process, at least one.
            ended: Attributes that the processes cannot know, such as ``seconds`` or ``dead``.
        """
        firsts = np.cumsum([0, *(report.workers for report in reports)]).tolist()
        return _merged(
            reports,
            **{
                "workers": firsts[-1],
                "seconds": max(report.seconds for report in reports),
                **{
                    name: [count for report in reports for count in getattr(report, name)]
                    for name in _BY_WORKER
                },
                "failures": {
                    first + worker: error
                    for first, report in zip(firsts, reports, strict=False)
                    for worker, error in report.failures.items()
                },
                **ended,
            },
        )


_BY_WORKER = ("updates_by_worker", "dropped", "nonfinite", "restarts")
_RACES = ("block_updates", "lost_block_updates", "overwritten_block_updates")
_STALE_ROWS = ("rows", "stale_rows")


def _merged(reports: Sequence[RunReport], **attributes: Any) -> RunReport:
    first = reports[0]
    counts = {
        name: [getattr(report, name) for report in reports] for name in (*_RACES, *_STALE_ROWS)
    }
    return RunReport(
        **{
            **{each.name: getattr(first, each.name) for each in fields(RunReport)[:6]},
            "state_kinds": first.state_kinds,
            "torch_threads": first.torch_threads,
            "latencies": Latencies.merged([report.latencies for report in reports]),
            "staleness": sum((report.staleness for report in reports), Counter()),
            "dead": [pid for report in reports for pid in report.dead],
            "partial": any(report.partial for report in reports),
            **{name: None if None in each else sum(each) for name, each in counts.items()},
            **attributes,
        }
    )


def staleness_summary(staleness: Counter[int]) -> dict[str, Any]:
    """Mean, percentiles, the largest, and how many updates had each; null if there are none."""
    if not staleness:
        return dict.fromkeys(("mean", "p50", "p99", "max", "histogram"))
    ages = np.array(sorted(staleness))
    counts = np.array([staleness[int(age)] for age in ages])
    reached = np.cumsum(counts) / counts.sum()
    return {
        "mean": float((ages * counts).sum() / counts.sum()),
        "p50": float(ages[np.searchsorted(reached, 0.5)]),
        "p99": float(ages[np.searchsorted(reached, 0.99)]),
        "max": float(ages[-1]),
        "histogram": {str(age): int(count) for age, count in zip(ages, counts, strict=True)},
    }


def described(
    settings: SchedulerSettings,
    shared: SharedParameters,
    backend: Backend,
    kinds: Collection[str],
    torch_threads: int,
) -> dict[str, Any]:
    """What runs, as attributes of a report.

    Args:
        settings: How.
        shared: What is updated.
        backend: With which kernels.
        kinds: Of the state that updates have besides ``ms``.
        torch_threads: How many torch uses for a worker.
    """
    return {
        "policy": settings.policy,
        "workers": settings.workers,
        "elements": shared.elements,
        "dtype": str(shared.flat.dtype).removeprefix("torch."),
        "backend": backend.name,
        "device": str(shared.flat.device),
        "state_kinds": 1 + len(kinds),
        "torch_threads": torch_threads,
    }


class RunRecord:
    """Takes down a run while it goes on, in a fixed amount of memory, for its report.

    Attributes:
        failures: The first exception of each worker that failed, by its index.
        restarts: How often each worker was started again.
    """

    def __init__(
        self,
        workers: int,
        counted: SharedParameters | None = None,
        *,
        counts_rows: bool = False,
    ) -> None:
        """Starts the clock.

        Args:
            workers: How many there are.
            counted: Whose races are counted, if they are.
            counts_rows: Whether updates of rows count those that were stale.
        """
        self.failures: dict[int, BaseException] = {}
        self.restarts = [0] * workers
        self._counted = counted
        self._races_before = _totals(counted)
        self._start = time.perf_counter()
        self._counts_rows = counts_rows
        self._rows = np.zeros(len(_STALE_ROWS), np.int64)
        self._latencies = Latencies()
        self._staleness: Counter[int] = Counter()
        self._updates_by_worker = [0] * workers
        self._dropped = [0] * workers
        self._nonfinite = [0] * workers
        self._new_latencies_ns: list[int] = []
        self._new_staleness: list[int] = []

    def add(self, worker: int, landed: Sequence[Work]) -> None:
        """Takes down the updates among what was delivered of a worker, and its first failure."""
        add_latency, add_staleness = self._new_latencies_ns.append, self._new_staleness.append
        updates = 0
        for work in landed:
            if isinstance(work, Snapshot):
                continue  # its error is that of who waits for it
            if work.error is not None:
                self.failures.setdefault(worker, work.error)
            if work.nonfinite:
                self._nonfinite[worker] += 1
            elif work.error is not None:
                self._dropped[worker] += 1
            else:
                add_latency(work.landed_ns - work.submitted_ns)
                add_staleness(work.staleness)
                updates += 1
                if self._counts_rows and isinstance(work.checked.table, RowTable):
                    self._rows += work.checked.table.fields[:, UPDATED : STALE + 1].sum(axis=0)
        self._updates_by_worker[worker] += updates
        if len(self._new_staleness) >= _BUFFERED:
            self._count()

    def add_chunk(self, worker: int, chunk: CompiledRun) -> None:
        """Takes down the updates of a chunk, of some of which it is known how they were."""
        self._updates_by_worker[worker] += chunk.made
        self._nonfinite[worker] += chunk.nonfinite
        staleness, nanoseconds = chunk.measured()
        self._staleness.update(staleness)
        self._latencies.add(nanoseconds)
        if (rows := chunk.stale_rows()) is not None:
            self._rows += rows

    def report(self, **attributes: Any) -> RunReport:
        """Stops the clock.

        Args:
            attributes: Those of the report that say what ran, and how it ended.
        """
        seconds = time.perf_counter() - self._start
        self._count()
        rows, stale = self._rows.tolist() if self._counts_rows else (None, None)
        return RunReport(
            **attributes,
            **self.races(),
            rows=rows,
            stale_rows=stale,
            seconds=seconds,
            latencies=self._latencies,
            staleness=self._staleness,
            updates_by_worker=self._updates_by_worker,
            dropped=self._dropped,
            nonfinite=self._nonfinite,
            restarts=self.restarts,
            failures=self.failures,
        )

    def races(self) -> dict[str, Any]:
        """What races were counted since the start, as attributes of a report."""
        if self._counted is None:
            return dict.fromkeys(_RACES)
        landed, survived, overwritten = (
            now - before
            for now, before in zip(_totals(self._counted), self._races_before, strict=True)
        )
        return dict(zip(_RACES, (landed, landed - survived, overwritten), strict=True))

    def _count(self) -> None:
        self._latencies.add(self._new_latencies_ns)
        self._staleness.update(self._new_staleness)
        self._new_latencies_ns.clear()
        self._new_staleness.clear()


def _totals(counted: SharedParameters | None) -> list[int]:
    """How many updates of a block landed, survived and were overwritten until now."""
    if counted is None:
        return []
    totals = [each.counts.sum(dim=1) for each in counted.race_counters]
    of_all: list[int] = torch.stack(totals).sum(0).tolist()
    return of_all
