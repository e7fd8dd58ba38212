"""Forks while workers run: python fork_program.py SCHEDULER END...; prints what is left.

SCHEDULER is ``numba``, ``numpy``, ``cuda`` on the driver of tests, or ``processes``. The child ENDs
by ``_exit``; by ``handlers``, which a script's end calls; by ``exit``, out of the coroutine and
through the event loop; or it ``stays`` until the parent has ended its scheduler. Of several ENDs,
each has a scheduler and a line of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
from typing import Any

import torch

from gpu_testing import faults, gpu_of_tests, scheduler_on
from hogstream.scheduler import ProcessScheduler, SharedParameters, StreamScheduler
from process_workers import submit_ones, until_landed


def end_child(end: str, parent_goes_on: int) -> None:
    """Ends this process."""
    if end == "exit":
        sys.exit(3)
    if end == "handlers":
        atexit._run_exitfuncs()
    if end == "stays":
        os.read(parent_goes_on, 1)
    os._exit(3)


async def main(kind: str, end: str) -> None:
    """Runs workers, and forks when some of their updates have landed."""
    shared = SharedParameters({"counters": torch.zeros(1 << 12)})
    settings: dict[str, Any] = {"lr": 1.0, "alpha": 0.0, "eps": 0.0, "policy": "locked"}
    updates = 200 if kind == "cuda" else 6000  # where streams are delayed
    scheduler: Any
    worker: Any = submit_ones
    if kind == "processes":
        scheduler = ProcessScheduler(shared, processes=2, **settings)
    elif kind == "cuda":
        scheduler = scheduler_on(shared, workers=3, depth=4, **settings)
        worker = submit_ones(shared, 0)
    else:
        scheduler = StreamScheduler(shared, workers=3, backend=kind, depth=4, **settings)
        worker = submit_ones(shared, 0)
    goes_on, tell = os.pipe()
    async with scheduler:
        run = asyncio.ensure_future(scheduler.run(worker, updates=updates))
        await until_landed(shared, 10)
        pid = os.fork()
        if pid == 0:
            os.close(tell)
            end_child(end, goes_on)
        if end != "stays":
            os.waitpid(pid, 0)  # noqa: ASYNC222 (lanes and processes go on meanwhile)
        report = await run
    os.close(tell)
    if end == "stays":
        os.waitpid(pid, 0)  # noqa: ASYNC222
    whole = bool(shared.flat.eq(-updates).all())
    print(report.updates, shared.version, whole, report.failures, flush=True)


if __name__ == "__main__":
    kind, *ends = sys.argv[1:]
    for end in ends:
        if kind == "cuda":
            with gpu_of_tests() as gpu:
                asyncio.run(main(kind, end))
            assert not faults(gpu), faults(gpu)
        else:
            asyncio.run(main(kind, end))
