"""A worker's context that shows an NVTX tool what the worker does."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, TypeVar

import torch

from hogstream.scheduler.context import WorkerContext
from hogstream.scheduler.lanes.base import Lane
from hogstream.scheduler.tracing.nvtx import Ranges
from hogstream.scheduler.update import Update

if TYPE_CHECKING:
    from hogstream.scheduler.scheduler import StreamScheduler

T = TypeVar("T")


class RangedContext(WorkerContext):
    """A context whose iterations, submits, waits and hand-overs are ranges; see ``nvtx_ranges``.

    It is made in the place of a plain one only while a tool is attached, so that nobody else pays.
    """

    def __init__(
        self,
        scheduler: StreamScheduler,
        index: int,
        lane: Lane,
        ms: torch.Tensor,
        snapshot: torch.Tensor | None,
        iteration: int,
        ranges: Ranges,
    ) -> None:
        super().__init__(scheduler, index, lane, ms, snapshot, iteration)
        self._ranges = ranges
        self._range = ranges.around("iteration", index)
        self._launch = self._launch_in_range

    async def submit(self, grad: torch.Tensor) -> None:
        """As ``WorkerContext.submit``."""
        with self._ranges.around("submit", self.index):
            await super().submit(grad)

    def _begin(self) -> bool:
        self._range.start()
        return super()._begin()

    def _end(self) -> None:
        super()._end()  # or else it is abandoned
        self._range.end()

    def _abandon(self) -> bool:
        self._range.end()
        return super()._abandon()

    def _launch_in_range(self, update: Update) -> None:
        with self._ranges.around("snapshot" if update.checked is None else "update", self.index):
            self._scheduler._launch(update)

    async def _wait(self, wait: Awaitable[T], reason: str) -> T:
        with self._ranges.around(f"wait {reason}", self.index):
            return await super()._wait(wait, reason)
