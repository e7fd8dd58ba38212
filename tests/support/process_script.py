"""Runs a process until it is interrupted: python process_script.py [FATE [METHOD]]."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
from functools import partial

import torch

from hogstream.scheduler import ProcessScheduler, SharedParameters
from process_workers import block, misbehave, until_landed


async def main(fates: dict[int, str], method: str) -> None:
    shared = SharedParameters({"counters": torch.zeros(1 << 12)})
    scheduler = ProcessScheduler(
        shared,
        processes=1,
        start_method=method,
        policy="locked",
        backend="numpy",
        lr=1.0,
        alpha=0.0,
        eps=0.0,
    )
    try:
        async with scheduler:
            run = asyncio.create_task(scheduler.run(partial(misbehave, fates), updates=10**9))
            await until_landed(shared, 3)
            if fates.get(0) == "outlived" and os.fork() == 0:
                block()
            print(*(process.pid for process in multiprocessing.active_children()), flush=True)
            await run
    finally:
        report = scheduler.report
        assert report is not None
        print("partial" if report.partial else "")
        print("whole" if shared.flat.eq(-report.updates).all() else shared.flat)
        print(f"dead={report.dead}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    asyncio.run(
        main(
            {0: sys.argv[1]} if len(sys.argv) > 1 else {},
            sys.argv[2] if len(sys.argv) > 2 else "spawn",
        )
    )
