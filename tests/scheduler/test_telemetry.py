"""Races that are counted, and not guessed."""

from __future__ import annotations

import pytest
import torch

from hogstream.scheduler import SettingError, SharedParameters, SimulatedWorker, StreamScheduler
from scheduler_testing import COUNTING

N = 1 << 16


def ones(workers: int) -> SimulatedWorker:
    return SimulatedWorker([torch.ones(N)] * workers, workers=workers)


@pytest.mark.parametrize("policy", ["locked", "ordered", "awaited", "bounded:0"])
async def test_nothing_is_lost_where_nothing_races(policy: str) -> None:
    shared = SharedParameters({"p": torch.zeros(N)})
    async with StreamScheduler(
        shared, workers=4, depth=2, policy=policy, telemetry=True, **COUNTING
    ) as scheduler:
        report = await scheduler.run(ones(4), updates=200)
    assert shared.races is not None
    assert report.block_updates == 200 * shared.races.blocks
    assert report.lost_updates_fraction == 0
    assert report.overwritten_block_updates == 0


async def test_each_update_that_landed_is_counted_however_they_race() -> None:
    shared = SharedParameters({"p": torch.zeros(N)})
    async with StreamScheduler(shared, workers=4, depth=8, telemetry=True, **COUNTING) as scheduler:
        first = await scheduler.run(ones(4), updates=500)
        second = await scheduler.run(ones(4), updates=300)
    assert shared.races is not None
    assert first.block_updates == 500 * shared.races.blocks
    assert second.block_updates == 300 * shared.races.blocks
    for report in (first, second):
        assert report.lost_block_updates is not None
        assert report.overwritten_block_updates is not None
        assert 0 <= report.lost_block_updates <= report.overwritten_block_updates
    assert shared.races.landed == 800 * shared.races.blocks
    # The witness of a block loses what the elements lose: with this update, each element of the
    # parameters is a count of those that survived in it.
    survived = -shared.flat.view(shared.races.blocks, -1)
    assert survived.max() <= 800
    if shared.races.lost == 0:
        assert survived.eq(800).all()


async def test_update_that_is_left_out_is_not_counted() -> None:
    shared = SharedParameters({"p": torch.zeros(N)})
    gradients = [torch.ones(N), torch.full((N,), float("nan"))]
    async with StreamScheduler(shared, workers=1, telemetry=True, on_nonfinite="skip") as scheduler:
        report = await scheduler.run(SimulatedWorker(gradients, workers=1), updates=10)
    assert shared.races is not None
    assert report.block_updates == 5 * shared.races.blocks


async def test_without_telemetry_nothing_is_counted() -> None:
    shared = SharedParameters({"p": torch.zeros(N)})
    async with StreamScheduler(shared, workers=1) as scheduler:
        report = await scheduler.run(ones(1), updates=3)
    assert shared.races is None
    assert report.block_updates is None
    assert report.lost_updates_fraction is None


def test_backend_that_cannot_count_is_refused() -> None:
    shared = SharedParameters({"p": torch.zeros(N)})
    with pytest.raises(SettingError, match="telemetry needs a backend that counts races"):
        StreamScheduler(shared, workers=1, telemetry=True, backend="numpy")


async def test_counters_of_any_block_go_on_counting() -> None:
    """On a CPU: those that a checkpoint has brought, or a test wants smaller."""
    shared = SharedParameters({"p": torch.zeros(N)})
    shared.count_races(100)
    async with StreamScheduler(shared, workers=1, telemetry=True) as scheduler:
        report = await scheduler.run(ones(1), updates=3)
    assert report.block_updates == 3 * -(-N // 100)
