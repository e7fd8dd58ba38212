"""How many updates a second lanes take; run it as a script, on a machine that does nothing else.

Where there is a GPU, on its lanes. Else on CPU lanes, and on CUDA lanes over the driver of tests,
in counted time: once with calls of the driver that cost what they cost on a GPU's machine, and once
with calls that cost nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hogstream.scheduler import SharedParameters, StreamScheduler, WorkerContext

POLICIES = ["lock-free", "locked", "ordered"]
AT_ONCE = [1, 8]  # gradients in a submit
DEPTH = 16


@dataclass(frozen=True)
class Lanes:
    """What is measured.

    Attributes:
        workers: How many there are.
        elements: Of the parameters.
        device: Where.
        costs: Nanoseconds that calls of the driver of tests keep their thread, those of ``Timing``
            if not named; None if it is not used.
        settings: Of the scheduler.
    """

    workers: int
    elements: int
    device: str = "cpu"
    costs: dict[str, int] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


_FREE = dict.fromkeys(("launch", "graph", "record", "wait", "write"), 0)
_GRAPHS = {"batch": 16, "batch_of": "lanes"}
ON_CPU = {
    "CPU, 2^12 elements": Lanes(4, 1 << 12),
    "GPU, calls cost": Lanes(16, 1 << 12, costs={}),
    "GPU, calls cost nothing": Lanes(16, 1 << 12, costs=_FREE),
}
ON_GPU = {
    "GPU, 2^16 elements": Lanes(16, 1 << 16, "cuda"),
    "GPU, 2^16 elements, graphs": Lanes(16, 1 << 16, "cuda", settings=_GRAPHS),
    "GPU, 2^20 elements": Lanes(16, 1 << 20, "cuda"),
}


async def rate(lanes: Lanes, policy: str, at_once: int, seconds: float) -> float:
    """Updates a second of workers whose gradients are ready."""
    with ExitStack() as opened:
        make: Any = StreamScheduler
        if lanes.costs is not None:
            from cuda_testing import Timing
            from gpu_testing import gpu_of_tests, scheduler_on

            opened.enter_context(gpu_of_tests(mode="timed", timing=Timing(**lanes.costs)))
            make = scheduler_on
        shared = SharedParameters({"p": torch.zeros(lanes.elements, device=lanes.device)})
        grads = [torch.zeros_like(shared.flat) for _ in range(at_once)]

        async def worker(context: WorkerContext) -> None:
            await context.submit(grads if at_once > 1 else grads[0])

        settings = {"workers": lanes.workers, "depth": DEPTH, **lanes.settings}
        async with make(shared, policy=policy, **settings) as scheduler:
            await scheduler.run(worker, updates=1000)
            report = await scheduler.run(worker, seconds=seconds)
        return float(report.updates_per_second)


def main() -> None:
    """Prints a table: medians of rounds in which every line has its turn, and quartiles."""
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each line, in each round")
    asked = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    torch.set_num_threads(1)
    kinds = ON_GPU if torch.cuda.is_available() else ON_CPU
    lines = [(k, p, n) for k in kinds for p in POLICIES for n in AT_ONCE]
    rates: dict[tuple[str, str, int], list[float]] = {line: [] for line in lines}
    for _ in range(asked.rounds):
        for kind, policy, at_once in lines:
            found = uvloop.run(rate(kinds[kind], policy, at_once, asked.seconds))
            rates[kind, policy, at_once].append(found)
    print("| lanes | workers | policy | gradients a submit | updates/s |\n|---|---|---|---|---|")
    for (kind, policy, at_once), measured in rates.items():
        low, _, high = statistics.quantiles(measured)
        text = f"{statistics.median(measured):,.0f} ({low:,.0f} to {high:,.0f})"
        print(f"| {kind} | {kinds[kind].workers} | {policy} | {at_once} | {text} |")


if __name__ == "__main__":
    main()
