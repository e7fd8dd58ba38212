"""What CUDA lanes must do; the other tests of the scheduler run on CPU lanes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from hogstream.kernels import rmsprop_
from hogstream.scheduler import (
    SharedParameters,
    SimulatedWorker,
    StreamScheduler,
    WorkerContext,
    WorkerError,
)

pytestmark = pytest.mark.gpu

COUNTING: dict[str, Any] = {"lr": 1.0, "alpha": 0.0, "eps": 0.0}
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("policy", ["lock-free", "locked", "ordered"])
async def test_one_worker_makes_the_updates_of_the_cpu(policy: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(100_001, generator=generator) for _ in range(3)]
    shared = SharedParameters({"p": torch.zeros(100_001, device=CUDA)})
    worker = SimulatedWorker([gradient.to(CUDA) for gradient in gradients], workers=1)
    async with StreamScheduler(shared, workers=1, policy=policy, depth=2) as scheduler:
        await scheduler.run(worker, updates=9)
    param, ms = torch.zeros(100_001), torch.zeros(100_001)
    for step in range(9):
        rmsprop_(param, gradients[step % 3], ms, backend="numpy")
    assert torch.equal(shared.flat.cpu(), param)
    assert torch.equal(shared.ms.cpu(), ms)


@pytest.mark.parametrize("workers", [4, 40])  # torch's pool has 32 streams: 40 are our own
@pytest.mark.parametrize("policy", ["locked", "ordered"])
async def test_without_races_no_update_is_lost(policy: str, workers: int) -> None:
    shared = SharedParameters({"counters": torch.zeros(1 << 22, device=CUDA)})
    grad = torch.ones_like(shared.flat)

    async def worker(context: WorkerContext) -> None:
        await context.submit(grad)

    async with StreamScheduler(
        shared, workers=workers, policy=policy, depth=2, **COUNTING
    ) as scheduler:
        report = await scheduler.run(worker, updates=400)
    assert report.updates == 400
    assert shared.flat.eq(-400).all()


async def test_update_waits_for_the_stream_that_made_its_gradient() -> None:
    """The gradient is all zeros until a long queue of work on the current stream is through."""
    shared = SharedParameters({"counters": torch.zeros(1 << 20, device=CUDA)})

    async def worker(context: WorkerContext) -> None:
        grad = torch.zeros_like(shared.flat)
        torch.cuda._sleep(50_000_000)  # device cycles
        grad.fill_(1.0)
        await context.submit(grad)

    async with StreamScheduler(shared, workers=2, policy="ordered", **COUNTING) as scheduler:
        await scheduler.run(worker, updates=6)
    assert shared.flat.eq(-6).all()


async def test_blocking_work_runs_on_the_lane() -> None:
    shared = SharedParameters({"counters": torch.zeros(1 << 20, device=CUDA)})
    streams: set[int] = set()

    def make_grad() -> torch.Tensor:
        streams.add(torch.cuda.current_stream().cuda_stream)
        torch.cuda._sleep(10_000_000)
        return torch.ones_like(shared.flat)

    async def worker(context: WorkerContext) -> None:
        await context.submit(await context.run_blocking(make_grad))

    async with StreamScheduler(shared, workers=3, policy="ordered", **COUNTING) as scheduler:
        await scheduler.run(worker, updates=9)
    assert shared.flat.eq(-9).all()
    assert len(streams) == 3
    assert torch.cuda.default_stream().cuda_stream not in streams


async def test_event_loop_turns_while_the_device_works() -> None:
    shared = SharedParameters({"p": torch.zeros(1 << 10, device=CUDA)})
    grad = torch.ones_like(shared.flat)
    turns = 0

    async def worker(context: WorkerContext) -> None:
        await context.run_blocking(torch.cuda._sleep, 200_000_000)
        await context.submit(grad)

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with StreamScheduler(shared, workers=1) as scheduler:
        turning = asyncio.create_task(turn())
        await scheduler.run(worker, updates=2)
        turning.cancel()
    assert turns > 100


@pytest.mark.parametrize("policy", ["lock-free", "locked", "ordered"])
async def test_launch_that_fails_is_an_error_of_its_worker(policy: str) -> None:
    shared = SharedParameters({"p": torch.zeros(64, device=CUDA)})

    async def worker(context: WorkerContext) -> None:
        await context.submit(torch.ones_like(shared.flat))

    def fail(*_operands: Any) -> None:
        raise MemoryError("no scratch")

    async with StreamScheduler(shared, workers=2, policy=policy) as scheduler:
        working = scheduler.backend
        scheduler.backend = replace(working, kernel=fail)
        with pytest.raises(WorkerError, match="MemoryError: no scratch"):
            await scheduler.run(worker, updates=4)
        scheduler.backend = working
        report = await scheduler.run(worker, updates=4)
    assert report.updates == 4
