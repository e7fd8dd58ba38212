"""One worker's update on its way from submission to landing."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(slots=True, eq=False)
class Update:
    """An update: made by the scheduler, carried out by a lane, seen landing by the scheduler.

    Attributes:
        worker: Index of the worker that submitted it.
        grad: The gradient; referenced until the update has landed.
        apply: Updates the shared parameters: on the calling thread, or on the current stream.
        read_version: Version of the parameters that the gradient was made from.
        submitted_ns: When the worker submitted it, by ``time.perf_counter_ns``.
        waiter: Resolved when it has landed; cancelling it takes nothing back.
        after: The update that this one waits for on the device, if any.
        on_device: The lane's own mark of its landing, for a later update to wait on: a
            ``threading.Event`` or a ``torch.cuda.Event``.
        landed_ns: When it landed, or failed; 0 before.
        error: Why it failed, if it did.
    """

    worker: int
    grad: torch.Tensor
    apply: Callable[[], None]
    read_version: int
    submitted_ns: int
    waiter: asyncio.Future[None]
    after: Update | None = None
    on_device: Any = None
    landed_ns: int = 0
    error: BaseException | None = None


class Landings:
    """Carries landed updates from any thread to the event loop, in landing order.

    A whole batch costs one wake-up of the loop: threads wake it only if no wake-up is under way.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[Update], None]) -> None:
        """Delivers to ``deliver``, called on the loop's thread, once for each update."""
        self._loop = loop
        self._deliver = deliver
        self._landed: deque[Update] = deque()
        self._woken = False

    def append(self, update: Update) -> None:
        """Hands over an update that has landed; from any thread, without a lock."""
        self._landed.append(update)
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._drain)

    def undelivered(self) -> int:
        """How many updates have landed that were not delivered yet."""
        return len(self._landed)

    def _drain(self) -> None:
        # The flag first: an update that lands from here on either is seen below or wakes again.
        self._woken = False
        while self._landed:
            self._deliver(self._landed.popleft())
