"""What is left after very many updates, and after everything that can go wrong at once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import threading

import psutil
import pytest
import torch

from hogstream.scheduler import (
    SharedParameters,
    SimulatedWorker,
    StreamScheduler,
    WorkerContext,
    WorkerError,
)
from process_testing import shared_memory
from scheduler_testing import COUNTING

pytestmark = pytest.mark.slow

N = 1 << 10


@pytest.fixture(scope="module", autouse=True)
def all_may_be_garbage(nothing_older_is_garbage: None) -> None:
    """What was there before may be let go too."""
    gc.unfreeze()


def resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def what_is_open() -> tuple[set[str], int, int]:
    """Threads by name, and how many files and shared-memory segments there are."""
    gc.collect()  # which closes what other tests have left open
    threads = {thread.name for thread in threading.enumerate()}
    ours = {name for name in threads if not name.startswith("hogstream-kernel")}
    return ours, len(os.listdir("/proc/self/fd")), len(shared_memory())


async def test_million_updates_leave_memory_level_and_nothing_open() -> None:
    before = what_is_open()
    shared = SharedParameters({"p": torch.zeros(N)})
    worker = SimulatedWorker([torch.ones(N)] * 8, workers=4)
    async with StreamScheduler(
        shared, workers=4, depth=64, telemetry=True, on_nonfinite="skip", **COUNTING
    ) as scheduler:
        await scheduler.run(worker, updates=200_000)
        warm = resident_bytes()
        report = await scheduler.run(worker, updates=800_000)
        grown = resident_bytes() / warm - 1
    assert shared.version == 1_000_000
    assert sum(report.staleness.values()) == len(report.latencies) == 800_000
    assert grown < 0.01
    assert what_is_open() == before


@pytest.mark.parametrize("policy", ["lock-free", "locked", "ordered", "awaited", "bounded:3"])
async def test_chance_may_cancel_and_break_what_it_likes(policy: str, backend: str) -> None:
    """Every update that is counted is there, every run ends, and nothing is left."""
    before = what_is_open()
    chance = random.Random(policy + backend)
    shared = SharedParameters({"p": torch.zeros(N)})
    ones, broken = torch.ones(N), torch.full((N,), float("nan"))

    async def worker(context: WorkerContext) -> None:
        kind = chance.random()
        if kind < 0.02:
            raise LookupError("no data")
        if kind < 0.04:
            await context.run_blocking(sum, range(1000))
        if kind < 0.06:
            await asyncio.sleep(0)
        await context.submit(broken if kind > 0.98 else ones.clone() if kind > 0.9 else ones)

    landed = 0
    async with StreamScheduler(
        shared, workers=4, depth=3, policy=policy, backend=backend, on_nonfinite="skip",
        on_error="restart", read=chance.choice(["live", "snapshot"]), **COUNTING,
    ) as scheduler:  # fmt: skip
        for _ in range(20):
            run = asyncio.create_task(scheduler.run(worker, updates=chance.randrange(1, 300)))
            for _ in range(chance.randrange(400)):
                await asyncio.sleep(0)
            if chance.random() < 0.7:
                run.cancel()
            with contextlib.suppress(asyncio.CancelledError, WorkerError):
                await asyncio.wait_for(run, timeout=60)
            if scheduler.report is not None:  # a run that never began leaves none
                landed += scheduler.report.updates
                scheduler.report = None
    assert shared.version == landed
    if policy not in ("lock-free", "bounded:3"):
        assert shared.flat.eq(-landed).all()
    assert shared.flat.isfinite().all()
    assert what_is_open() == before
