"""CPU lanes on systems that lack some of what Linux has."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from hogstream.scheduler import SchedulerSettings, SettingError, SharedParameters, StreamScheduler
from hogstream.scheduler.lanes import mutex
from hogstream.scheduler.lanes.process_lock import ProcessLock
from scheduler_testing import COUNTING, POLICIES, submit_ones


@pytest.fixture
def no_eventfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "eventfd")


@pytest.fixture
def no_timed_lock(monkeypatch: pytest.MonkeyPatch, no_eventfd: None) -> Iterator[None]:
    """As macOS, whose C library has neither."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    mutex._function.cache_clear()
    yield
    mutex._function.cache_clear()


@pytest.mark.parametrize("system", ["no_eventfd", "no_timed_lock"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("settings", [{}, {"depth": 4, "batch": 2}, {"read": "snapshot"}], ids=str)
async def test_updates_land_all_the_same(
    system: str,
    policy: str,
    settings: dict[str, Any],
    counters: SharedParameters,
    request: pytest.FixtureRequest,
) -> None:
    request.getfixturevalue(system)
    workers = 3 if policy in ("locked", "ordered", "awaited") else 1  # under the others, they race
    before = len(os.listdir("/proc/self/fd"))
    chosen = SchedulerSettings.make(None, {"workers": workers, **settings, **COUNTING})
    chosen = chosen.with_policy(policy)
    async with StreamScheduler(counters, chosen, backend="numba") as scheduler:
        report = await scheduler.run(submit_ones(counters), updates=60)
    assert report.updates == counters.version == 60
    assert counters.flat.eq(-60).all()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_races_are_counted_through_pipes(
    no_eventfd: None, counters: SharedParameters
) -> None:
    async with StreamScheduler(
        counters, workers=2, backend="numba", telemetry=True, **COUNTING
    ) as scheduler:
        report = await scheduler.run(submit_ones(counters), updates=20)
    assert counters.races is not None
    assert report.block_updates == 20 * counters.races.blocks


async def test_what_the_system_cannot_do_is_refused(
    no_timed_lock: None, counters: SharedParameters
) -> None:
    with pytest.raises(ValueError, match="telemetry must be off: this system cannot run the loop"):
        await StreamScheduler(counters, workers=1, backend="numba", telemetry=True).__aenter__()
    with pytest.raises(SettingError, match="policy must be another than row-locked on this system"):
        await StreamScheduler(counters, workers=1, policy="row-locked").__aenter__()
    with pytest.raises(OSError, match="this system has no pthread_mutexattr_init"):
        ProcessLock()
    assert counters.races is None
