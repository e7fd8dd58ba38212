"""How many updates a second lanes take; run it as a script, on a machine that does nothing else.

On this machine's CPU lanes, and on CUDA lanes over the driver of tests, whose counted time is that
of a GPU on which an update takes 4 us: once with calls of the driver that cost what they cost on a
GPU's machine, and once with calls that cost nothing.
"""

from __future__ import annotations

import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from hogstream.scheduler import SharedParameters, StreamScheduler, WorkerContext

WORKERS = {"CPU, 2^12 elements": 4, "GPU, calls cost": 16, "GPU, calls cost nothing": 16}
POLICIES = ["lock-free", "locked", "ordered"]
#: Nanoseconds that calls of the driver keep their thread; those of ``Timing`` if not named.
COSTS: dict[str, dict[str, int]] = {
    "GPU, calls cost": {},
    "GPU, calls cost nothing": dict.fromkeys(("launch", "graph", "record", "wait", "write"), 0),
}
AT_ONCE = [1, 8]  # gradients in a submit
DEPTH, SECONDS, ROUNDS = 16, 0.5, 9


async def rate(kind: str, policy: str, at_once: int) -> float:
    """Updates a second of workers whose gradients are ready."""
    from cuda_testing import Timing
    from gpu_testing import gpu_of_tests, scheduler_on

    with ExitStack() as opened:
        make: Any = StreamScheduler
        if kind in COSTS:
            opened.enter_context(gpu_of_tests(mode="timed", timing=Timing(**COSTS[kind])))
            make = scheduler_on
        shared = SharedParameters({"p": torch.zeros(1 << 12)})
        grads = [torch.zeros(1 << 12) for _ in range(at_once)]

        async def worker(context: WorkerContext) -> None:
            await context.submit(grads if at_once > 1 else grads[0])

        workers = WORKERS[kind]
        async with make(shared, workers=workers, policy=policy, depth=DEPTH) as scheduler:
            await scheduler.run(worker, updates=1000)
            report = await scheduler.run(worker, seconds=SECONDS)
        return float(report.updates_per_second)


def main() -> None:
    """Prints a table: medians of rounds in which every line has its turn, and their range."""
    import uvloop

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    torch.set_num_threads(1)
    lines = [(k, p, n) for k in WORKERS for p in POLICIES for n in AT_ONCE]
    rates: dict[tuple[str, str, int], list[float]] = {line: [] for line in lines}
    for _ in range(ROUNDS):
        for line in lines:
            rates[line].append(uvloop.run(rate(*line)))
    print("| lanes | workers | policy | gradients a submit | updates/s |\n|---|---|---|---|---|")
    for (kind, policy, at_once), found in rates.items():
        low, _, high = statistics.quantiles(found)
        text = f"{statistics.median(found):,.0f} ({low:,.0f} to {high:,.0f})"
        print(f"| {kind} | {WORKERS[kind]} | {policy} | {at_once} | {text} |")


if __name__ == "__main__":
    main()
