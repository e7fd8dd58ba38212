"""A program for an NVTX tool to be attached to; prints what each of its runs did, as JSON."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import torch

from hogstream.scheduler import SharedParameters, StreamScheduler, WorkerContext, WorkerError
from hogstream.scheduler.context import Worker

GRAD = torch.ones(64)


async def submit(context: WorkerContext) -> None:
    """Submits, as workers do."""
    await context.submit(GRAD)


async def compute(context: WorkerContext) -> None:
    """Has its thread compute what it submits."""
    await context.compute(lambda: (GRAD, None))


async def fail(context: WorkerContext) -> None:
    """Fails in the second iteration of worker 0, before it submits."""
    if context.index == 0 and context.iteration == 1:
        raise ArithmeticError("the worker failed")
    await context.submit(GRAD)


async def cancel(context: WorkerContext) -> None:
    """Cancels the run while one worker computes, and the other's update is in flight."""
    await context.submit(GRAD)
    if context.index == 0:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            if task.get_name() == "run":
                task.cancel()
    await asyncio.Event().wait()


async def run(worker: Worker, **settings: Any) -> list[int]:
    """Runs two workers for six updates; how many each made."""
    shared = SharedParameters({"p": torch.zeros(64)})
    async with StreamScheduler(shared, workers=2, backend="numpy", **settings) as scheduler:
        with suppress(WorkerError, asyncio.CancelledError):
            await asyncio.create_task(scheduler.run(worker, updates=6), name="run")
        assert scheduler.report is not None
        return scheduler.report.updates_by_worker


def main() -> None:
    """Runs each policy once, to different ends."""
    runs: dict[str, tuple[Worker, dict[str, Any]]] = {
        "awaited": (submit, {}),
        "locked": (compute, {}),
        "ordered": (submit, {"read": "snapshot"}),
        "lock-free": (submit, {"depth": 2, "batch": 2}),
        "bounded:1": (fail, {}),
        "bounded:2": (cancel, {}),
    }
    made = {
        policy: asyncio.run(run(worker, policy=policy, **settings))
        for policy, (worker, settings) in runs.items()
    }
    print(json.dumps(made))


if __name__ == "__main__":
    main()
