"""What ends a run from outside, at moments when little of it goes on."""

from __future__ import annotations

import asyncio
import threading

import pytest

from hogstream.scheduler import RunReport, StreamScheduler, WorkerContext, WorkerError
from scheduler_testing import small, submit_ones


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("deadline", [None, 60.0])
async def test_no_run_begins_while_the_scope_ends(deadline: float | None, turns: int) -> None:
    shared = small()
    scheduler = StreamScheduler(shared, workers=2, deadline=deadline)

    async def run_late() -> RunReport:
        for _ in range(turns):
            await asyncio.sleep(0)
        return await scheduler.run(submit_ones(shared), updates=1)

    async with scheduler:
        late = asyncio.ensure_future(run_late())
    done, _ = await asyncio.wait({late}, timeout=60)
    assert done
    with pytest.raises(RuntimeError, match="the scheduler is not open"):
        late.result()
    assert shared.version == 0


async def test_deadline_holds_while_an_update_waits_for_its_batch() -> None:
    shared, released = small(), threading.Event()
    submit = submit_ones(shared)

    async def worker(context: WorkerContext) -> None:
        if context.iteration == 1:
            await context.run_blocking(released.wait)
        await submit(context)

    async with StreamScheduler(
        shared, workers=1, depth=2, batch=2, deadline=0.1, on_error="continue"
    ) as scheduler:
        with pytest.raises(WorkerError, match="longer than deadline"):
            await asyncio.wait_for(scheduler.run(worker, updates=4), timeout=60)
    assert shared.version == 1
    released.set()
    for thread in threading.enumerate():
        if thread.name.startswith("hogstream-worker"):  # it was left behind
            thread.join(timeout=60)
