"""A worker's context that shows an NVTX tool what the worker does."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import TypeVar

import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.operands import ArrayLike
from hogstream.scheduler.budget import Budget
from hogstream.scheduler.context import Iteration, ScheduledContext
from hogstream.scheduler.dispatch import Dispatch
from hogstream.scheduler.gradients import Gradient
from hogstream.scheduler.lanes.base import Lane
from hogstream.scheduler.row_gradients import RowGradient
from hogstream.scheduler.tracing.nvtx import Ranges
from hogstream.scheduler.update import Checked, Snapshot, Work
from hogstream.scheduler.update_state import UpdateState

T = TypeVar("T")


class RangedContext(ScheduledContext):
    """A context whose iterations, submits, waits and updates are ranges; see ``tracing/nvtx.py``.

    It is made in the place of a plain one only while a tool is attached, so that nobody else pays.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        index: int,
        lane: Lane,
        state: UpdateState,
        snapshot: torch.Tensor | None,
        iteration: int,
        budget: Budget,
        ranges: Ranges,
    ) -> None:
        super().__init__(dispatch, index, lane, state, snapshot, iteration, budget)
        self._ranges = ranges
        self._range = ranges.around("iteration", index)
        self._enqueue = self._enqueue_in_range

    async def submit(
        self,
        grad: Gradient | Sequence[Gradient],
        loss: float | Sequence[float] | None = None,
    ) -> None:
        """As ``WorkerContext.submit``."""
        with self._ranges.around("submit", self.index):
            await super().submit(grad, loss)

    async def submit_rows(
        self,
        name: str | Mapping[str, RowGradient],
        rows: ArrayLike | None = None,
        grads: ArrayLike | None = None,
        loss: float | None = None,
    ) -> None:
        """As ``WorkerContext.submit_rows``."""
        with self._ranges.around("submit", self.index):
            await super().submit_rows(name, rows, grads, loss)

    def _may_burst(self) -> bool:
        return False  # each update has its range, on the event loop's thread

    def begin(self) -> bool:
        """As ``ScheduledContext.begin``."""
        self._range.start()
        return super().begin()

    def end(self) -> None:
        """As ``ScheduledContext.end``."""
        super().end()  # or else it is abandoned
        self._range.end()

    def abandon(self) -> bool:
        """As ``ScheduledContext.abandon``."""
        self._range.end()
        return super().abandon()

    def _enqueue_in_range(self, work: Work) -> None:
        text = "snapshot" if isinstance(work, Snapshot) else "update"
        with self._ranges.around(text, self.index):
            self._dispatch.enqueue(work)

    def _enqueue_several(
        self,
        current: Iteration,
        gradients: Sequence[tuple[object, Checked]],
        losses: Sequence[float] | None,
        numbers: Hyperparameters,
        submitted_ns: int,
    ) -> None:
        with self._ranges.around("updates", self.index):
            super()._enqueue_several(current, gradients, losses, numbers, submitted_ns)

    async def _wait(self, wait: Awaitable[T], reason: str) -> T:
        with self._ranges.around(f"wait {reason}", self.index):
            return await super()._wait(wait, reason)
