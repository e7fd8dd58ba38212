"""Starts processes in one way, uses all that they share, and prints what came of it as JSON:

python start_method_script.py METHOD FOLDER
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hogstream.scheduler import ProcessScheduler, SharedParameters, StreamScheduler
from process_workers import count_openmp_threads, die_once, use_openmp
from scheduler_testing import COUNTING, submit_ones


async def main(method: str, folder: Path) -> dict[str, Any]:
    """What the parent hears, and what it finds."""
    torch.set_num_threads(2)
    use_openmp()  # whose threads do not live through a fork
    shared = SharedParameters({"counters": torch.zeros(1 << 12)})
    heard = []
    settings: dict[str, Any] = {"policy": "locked", "on_error": "restart", **COUNTING}
    async with StreamScheduler(shared, workers=2, lr=0.0) as scheduler:
        await scheduler.run(submit_ones(shared), updates=2)
    async with (
        ProcessScheduler(shared, processes=2, start_method=method, **settings) as processes,
        StreamScheduler(shared, workers=2, lr=0.0) as scheduler,
    ):  # lanes are open too
        await processes.run(
            count_openmp_threads, updates=2, on_result=lambda *each: heard.append(each)
        )
        report = await processes.run(partial(die_once, folder / "marker"), updates=40)
        await scheduler.run(submit_ones(shared), updates=2)
    return {
        "counted": sorted(heard),
        "torch_threads": report.torch_threads,
        "share": min(2, max(1, (len(os.sched_getaffinity(0)) - 1) // 2)),
        "fates": [str(each).partition(") ")[2] for each in report.failures.values()],
        "updates": report.updates,
        "lost": 2 + report.updates + shared.flat.unique().tolist()[0],
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], Path(sys.argv[2])))))
