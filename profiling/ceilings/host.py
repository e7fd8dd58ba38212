"""What the host can do: launches a second, and turns of the event loop a second."""

from __future__ import annotations

import asyncio
import time

import torch

from hogstream.kernels.backends.select import select_backend
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands
from hogstream.profiling.event_loop import run
from hogstream.profiling.turns import Rate
from hogstream.scheduler import SharedParameters
from hogstream.scheduler.lanes.base import LaneSettings
from hogstream.scheduler.lanes.factory import open_lanes, warm_up
from hogstream.scheduler.update import Checked, Update

# How many updates are enqueued on a lane before any is waited for, and launched at once.
_QUEUE = 4096
_BATCH = 64
# Coroutines that take turns: with fewer of them, the event loop itself takes more of the time.
_COROUTINES = 64


def launch_rate(device: torch.device) -> Rate:
    """Launches of next to nothing, from one thread and down one lane.

    They are updates of one element, launched in batches until the queue of the lane is full, and
    waited for: what an update needs at least of the thread of the event loop, which launches for
    all lanes of its process, and on a GPU of the thread of lanes, which calls the driver for all.

    Args:
        device: A CPU or CUDA device.
    """
    return Rate(lambda queues: run(_launch(device, queues)), _QUEUE)


def turn_rate() -> Rate:
    """Turns of coroutines on the event loop of measurements.

    A turn is one wait: a coroutine makes a future and awaits it, a callback of the loop resolves
    it, and the loop resumes the coroutine. Many wait at once, and one callback resolves all. A
    worker needs a turn at least each time that it has filled its depth.
    """
    return Rate(lambda rounds: run(_turn(rounds)), _COROUTINES)


async def _launch(device: torch.device, queues: int) -> float:
    one = torch.zeros(1, dtype=torch.float32, device=device)
    shared = SharedParameters({"flat": one})
    settings = LaneSettings(shared, select_backend(None, device.type))
    numbers, grad = Hyperparameters(), torch.zeros_like(one)
    checked = Checked(LaunchTable([Operands(shared.flat, grad, shared.ms)]))
    updates = [Update(0, 0, None, grad, checked, numbers, 0) for _ in range(_QUEUE)]
    warm_up(settings, numbers)
    lanes = open_lanes(settings, 1, _QUEUE, lambda _lane, _landed: None)
    (lane,) = lanes.lanes
    try:
        start = time.perf_counter()
        for _ in range(queues):
            for first in range(0, _QUEUE, _BATCH):
                for update in updates[first : first + _BATCH]:
                    lane.enqueue(update)
                lanes.flush([0] * _BATCH)
            await lane.done(lane.record_event())
        return time.perf_counter() - start
    finally:
        lanes.close()


async def _turn(rounds: int) -> float:
    loop = asyncio.get_running_loop()
    waiting: list[asyncio.Future[None]] = []

    async def take_turns() -> None:
        for _ in range(rounds):
            future: asyncio.Future[None] = loop.create_future()
            waiting.append(future)
            await future

    def resolve() -> None:
        due = waiting.copy()
        waiting.clear()
        for future in due:
            if not future.done():  # who waited for it was interrupted
                future.set_result(None)
        if due:  # those whom they resume come before the next call
            loop.call_soon(resolve)

    tasks = [asyncio.create_task(take_turns()) for _ in range(_COROUTINES)]
    loop.call_soon(resolve)
    start = time.perf_counter()
    await asyncio.gather(*tasks)
    return time.perf_counter() - start
