"""What a run did, and how fast."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any

import numpy as np
import torch

from hogstream.kernels.operands import COMPUTE_DTYPES
from hogstream.scheduler.updates import Update


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
        latencies_us: For each update, microseconds from submission to landing, all waits included.
        staleness: How many updates had each staleness: versions that went by between the read of
            the parameters, at the start of an iteration, and the landing of its update.
        updates_by_worker: How many updates of each worker landed.
    """

    policy: str
    workers: int
    elements: int
    dtype: str
    backend: str
    device: str
    seconds: float
    latencies_us: Sequence[float] = field(repr=False)
    staleness: Counter[int] = field(repr=False)
    updates_by_worker: list[int]

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

        It reads grad, ms and param and writes ms and param: 20 bytes an element in float32.
        """
        dtype: torch.dtype = getattr(torch, self.dtype)
        return self.elements * (3 * dtype.itemsize + 2 * COMPUTE_DTYPES[dtype].itemsize)

    @property
    def gigabytes_per_second(self) -> float:
        """The least memory traffic of all updates, in 1e9 bytes/s."""
        return self.updates_per_second * self.bytes_per_update / 1e9

    def to_dict(self) -> dict[str, Any]:
        """The report as one entry of ``results`` in the JSON; null where nothing was measured."""
        ages = np.array(sorted(self.staleness.elements()))
        return {
            "policy": self.policy,
            "workers": self.workers,
            "elements": self.elements,
            "dtype": self.dtype,
            "backend": self.backend,
            "device": self.device,
            "updates": self.updates,
            "seconds": self.seconds,
            "updates_per_second": self.updates_per_second,
            "gigabytes_per_second": self.gigabytes_per_second,
            "latency_us": _summary(self.latencies_us, p50=50, p90=90, p99=99),
            "staleness": {
                "mean": float(ages.mean()) if len(ages) else None,
                **_summary(ages, p50=50, p99=99, max=100),
            },
            "lost_updates_fraction": None,  # not counted yet
            "updates_by_worker": self.updates_by_worker,
        }

    @classmethod
    def joined(cls, reports: Sequence[RunReport]) -> RunReport:
        """Several runs of one configuration as one: samples together, seconds added up.

        Raises:
            ValueError: If there are none, or their configurations differ.
        """
        if not reports:
            raise ValueError("reports must hold at least one, got none")
        same = {name: getattr(reports[0], name) for name in (f.name for f in fields(cls)[:6])}
        for report in reports:
            for name, value in same.items():
                if getattr(report, name) != value:
                    raise ValueError(
                        f"{name} must be {value!r} in all reports, got {getattr(report, name)!r}"
                    )
        return cls(
            **same,
            seconds=sum(report.seconds for report in reports),
            latencies_us=array("d", chain.from_iterable(report.latencies_us for report in reports)),
            staleness=sum((report.staleness for report in reports), Counter()),
            updates_by_worker=np.sum(
                [report.updates_by_worker for report in reports], axis=0
            ).tolist(),
        )


class RunRecord:
    """Takes down a run while it goes on, for its report.

    Attributes:
        failures: The first exception of each worker that failed, by its index.
    """

    def __init__(self, workers: int) -> None:
        """Starts the clock."""
        self.failures: dict[int, BaseException] = {}
        self._start = time.perf_counter()
        self._latencies_us = array("d")
        self._staleness: Counter[int] = Counter()
        self._updates_by_worker = [0] * workers

    def add(self, update: Update, staleness: int) -> None:
        """Takes down an update that has landed."""
        self._latencies_us.append((update.landed_ns - update.submitted_ns) / 1e3)
        self._staleness[staleness] += 1
        self._updates_by_worker[update.worker] += 1

    def report(self, **configuration: Any) -> RunReport:
        """Stops the clock.

        Args:
            configuration: The attributes of the report that say what ran.
        """
        return RunReport(
            **configuration,
            seconds=time.perf_counter() - self._start,
            latencies_us=self._latencies_us,
            staleness=self._staleness,
            updates_by_worker=self._updates_by_worker,
        )


def _summary(samples: Any, **percentiles: int) -> dict[str, float | None]:
    if not len(samples):
        return dict.fromkeys(percentiles)
    values = np.percentile(samples, list(percentiles.values()))
    return dict(zip(percentiles, values.tolist(), strict=True))
