"""Updates through the scheduler: by policy, by depth and batch, and by kind of lane.

Each round is a run of as many updates as a group's name says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from hogstream.scheduler import SharedParameters, StreamScheduler
from hogstream.scheduler.workers import SimulatedWorker

Time = Callable[[Callable[[], object]], None]

UPDATES = 512


@contextmanager
def _running(
    device: torch.device, elements: int, workers: int, **settings: Any
) -> Iterator[Callable[[], object]]:
    """A call that makes so many updates, on lanes that are open already."""
    shared = SharedParameters({"p": torch.zeros(elements, device=device)})
    gradients = [torch.randn(elements, device=device) for _ in range(2 * workers)]
    worker = SimulatedWorker(gradients, workers=workers)
    scheduler = StreamScheduler(shared, workers=workers, **settings)
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(scheduler.__aenter__())
        try:
            yield lambda: loop.run_until_complete(scheduler.run(worker, updates=UPDATES))
        finally:
            loop.run_until_complete(scheduler.__aexit__(None, None, None))
    finally:
        loop.close()


@pytest.mark.parametrize("policy", ["lock-free", "locked", "ordered", "bounded:4"])
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("elements", [1 << 12, 1 << 16])
def bench_policy(
    time: Time, benchmark: Any, device: torch.device, policy: str, workers: int, elements: int
) -> None:
    """What waiting costs; eight updates of a worker may be in flight."""
    benchmark.group = f"{UPDATES} updates of {elements:,}, {workers} workers"
    with _running(device, elements, workers, policy=policy, depth=8) as run:
        time(run)


@pytest.mark.parametrize(
    "settings",
    [
        {"depth": 1},
        {"depth": 8},
        {"depth": 64},
        {"depth": 64, "batch": 16},
        {"depth": 64, "telemetry": True},
        {"depth": 64, "on_nonfinite": "skip"},
        {"read": "snapshot"},
    ],
    ids=lambda settings: "-".join(f"{name}_{value}" for name, value in settings.items()),
)
def bench_hand_over(
    time: Time, benchmark: Any, device: torch.device, settings: dict[str, Any]
) -> None:
    """What the host does for an update, of one worker, that takes the lane next to nothing."""
    benchmark.group = f"{UPDATES} updates of 64, 1 worker"
    with _running(device, 64, 1, **settings) as run:
        time(run)


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("depth", [1, 8])
def bench_cpu_lanes(
    time: Time, benchmark: Any, device: torch.device, backend: str, depth: int
) -> None:
    """Compiled lanes, and those that call the kernel from Python."""
    if device.type != "cpu":
        pytest.skip(f"the lanes are of {device}")
    benchmark.group = f"{UPDATES} updates of 4,096, 2 workers, depth {depth}"
    with _running(device, 1 << 12, 2, backend=backend, depth=depth) as run:
        time(run)
