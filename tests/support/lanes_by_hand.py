"""Compiled CPU lanes whose threads have ended: their loop runs when, and where, a test calls it.

As a script, it applies updates between two calls of ``getppid``, which whoever traces it sees.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import torch

from hogstream.kernels.backends.select import select_backend
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands
from hogstream.scheduler import SharedParameters
from hogstream.scheduler.lanes.base import LaneSettings
from hogstream.scheduler.lanes.native import NativeLanes
from hogstream.scheduler.update import Checked, Update, Work


@asynccontextmanager
async def lanes_by_hand(
    count: int = 1,
    *,
    depth: int,
    low_water: int = 0,
    ordered: bool = False,
    elements: int = 64,
) -> AsyncIterator[NativeLanes]:
    """Lanes whose threads have ended."""
    shared = SharedParameters({"p": torch.zeros(elements)})
    backend = select_backend("numba", "cpu")
    settings = LaneSettings(shared, backend, ordered=ordered, low_water=low_water)
    lanes = NativeLanes(settings, count, depth, _forget)
    try:
        end_threads(lanes)
        yield lanes
    finally:
        lanes.close()


def end_threads(lanes: NativeLanes) -> None:
    """Tells lanes to stop: from then on their loop returns when it has nothing left to do."""
    lanes.settings.stop()
    for thread in lanes.threads:
        thread.end()


def updates_of(lanes: NativeLanes, count: int) -> list[Update]:
    """Updates that may be enqueued on any lane."""
    shared = lanes.settings.of.shared
    grad = torch.ones_like(shared.flat)
    checked = Checked(LaunchTable([Operands(shared.flat, grad, shared.ms)]))
    hyperparameters = Hyperparameters()
    return [Update(0, 0, None, grad, checked, hyperparameters, 0) for _ in range(count)]


def written(event: int) -> int:
    """How often an eventfd has been written since it was read."""
    info = Path(f"/proc/self/fdinfo/{event}").read_text("utf-8")
    count = next(line for line in info.splitlines() if line.startswith("eventfd-count:"))
    return int(count.split()[1], 16)


def _forget(lane: int, landed: Sequence[Work]) -> None:
    """Takes what has landed."""


async def main(*counts: int) -> None:
    """Launches updates on a lane that is awake, and applies them, between two marks."""
    async with lanes_by_hand(depth=max(counts)) as lanes:
        (lane,) = lanes.lanes
        for count in counts:
            updates = updates_of(lanes, count)
            os.getppid()
            for update in updates:
                lane.launch(update)
            lanes.threads[0].run()
            os.getppid()
            lanes._deliver_landed()


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
