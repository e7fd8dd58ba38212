"""A run that was stopped, saved and resumed is the run that was not, to the bit."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from hogstream.scheduler import SharedParameters, StreamScheduler, Worker, WorkerContext
from hogstream.scheduler.checkpoints import load_checkpoint, save_checkpoint

N = 500


def make_shared() -> SharedParameters:
    return SharedParameters({"w": torch.ones(N - 1), "b": torch.zeros(())})


def seeded_worker(reads: bool) -> Worker:
    """Gradients depend on worker and iteration, and on the parameters if it reads them."""

    async def worker(context: WorkerContext) -> None:
        seed = 1000 * context.index + context.iteration
        grad = torch.randn(N, generator=torch.Generator().manual_seed(seed))
        await context.submit(grad + 0.1 * context.flat if reads else grad)

    return worker


async def run(
    shared: SharedParameters, worker: Worker, settings: dict[str, Any], **budget: Any
) -> list[int]:
    async with StreamScheduler(shared, lr=0.01, **settings) as scheduler:
        report = await scheduler.run(worker, **budget)
    return report.updates_by_worker


async def cancelled(
    shared: SharedParameters, worker: Worker, settings: dict[str, Any]
) -> list[int]:
    """Starts a run without end, and cancels it when some updates have landed."""
    async with StreamScheduler(shared, lr=0.01, **settings) as scheduler:
        task = asyncio.create_task(scheduler.run(worker, updates=10**9))
        while shared.version < 5:  # noqa: ASYNC110, the landing is what it waits for
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert scheduler.report is not None
        return scheduler.report.updates_by_worker


@pytest.mark.parametrize("stop", [7, "cancel"])
@pytest.mark.parametrize(
    ("settings", "reads"),
    [
        ({"workers": 1}, True),
        ({"workers": 1, "policy": "ordered", "read": "snapshot"}, True),
        ({"workers": 1, "policy": "bounded:0", "staleness_aware": True}, True),
        ({"workers": 1, "state": "per-worker", "telemetry": True}, True),
        ({"workers": 1, "policy": "locked"}, True),
        ({"workers": 1, "policy": "awaited"}, True),
        ({"workers": 3, "policy": "awaited"}, False),
        ({"workers": 3, "policy": "awaited", "state": "per-worker", "telemetry": True}, False),
    ],
    ids=str,
)
async def test_resumed_run_is_the_run_that_was_not_stopped(
    tmp_path: Path, settings: dict[str, Any], reads: bool, stop: Any
) -> None:
    worker, path = seeded_worker(reads), tmp_path / "run.safetensors"
    stopped = make_shared()
    if stop == "cancel":
        iterations = await cancelled(stopped, worker, settings)
    else:
        iterations = await run(stopped, worker, settings, updates=stop)
    save_checkpoint(path, stopped, iterations=iterations)

    resumed = make_shared()
    checkpoint = load_checkpoint(path, resumed)
    assert checkpoint.version == sum(checkpoint.iterations) == stopped.version
    await run(resumed, worker, settings, updates=10, iterations=checkpoint.iterations)

    whole = make_shared()
    await run(whole, worker, settings, updates=stopped.version + 10)
    assert resumed.version == whole.version
    for mine, theirs in zip(_state(resumed), _state(whole), strict=True):
        assert torch.equal(mine, theirs)


def _state(shared: SharedParameters) -> list[torch.Tensor]:
    races = None if shared.races is None else shared.races.counts
    each = (shared.flat, shared.ms, shared.worker_ms, races)
    return [tensor for tensor in each if tensor is not None]
