"""What a worker is, and what it may see and do."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands, check_disjoint, check_grad
from hogstream.scheduler.gates import Passage
from hogstream.scheduler.lanes import Lane
from hogstream.scheduler.updates import Checked, Update

if TYPE_CHECKING:
    from hogstream.scheduler.stream_scheduler import StreamScheduler

P = ParamSpec("P")
T = TypeVar("T")

_CHECKED_GRADIENTS = 64


class WorkerError(Exception):
    """A worker, or one of its updates, failed.

    Attributes:
        failures: The exception of each worker that failed, by its index.
    """

    def __init__(self, failures: dict[int, BaseException]) -> None:
        self.failures = failures
        workers: dict[str, list[str]] = {}  # who failed alike is named together
        for index, error in sorted(failures.items()):
            workers.setdefault(f"{type(error).__name__}: {error}", []).append(str(index))
        super().__init__(
            "; ".join(
                f"{'worker' if len(each) == 1 else 'workers'} {', '.join(each)} failed: {text}"
                for text, each in workers.items()
            )
        )


class WorkerContext:
    """What a worker may see and do.

    Attributes:
        index: The worker's number, from 0.
        lane: The lane that the worker's updates go down.
        iteration: How many iterations this worker has finished.
        depth: How many of its updates may be in flight at once.
        flat: The parameters that this iteration reads, shape (elements,): the shared ones, which
            change as updates land, or with ``read="snapshot"`` this worker's copy of them.
        parameters: Views of ``flat`` by name.
    """

    def __init__(
        self,
        scheduler: StreamScheduler,
        index: int,
        lane: Lane,
        ms: torch.Tensor,
        snapshot: torch.Tensor | None,
        iteration: int,
    ) -> None:
        shared = scheduler.shared
        self.index = index
        self.lane = lane
        self.iteration = iteration
        self.depth = scheduler.depth
        self.flat = shared.flat if snapshot is None else snapshot
        self.parameters: Mapping[str, torch.Tensor] = (
            shared.views if snapshot is None else shared.views_of(snapshot)
        )
        self._scheduler = scheduler
        self._gate = scheduler._gate
        self._reads_at_once = scheduler._gate is None and snapshot is None
        self._gradients = _CheckedGradients(shared.flat, ms)
        self._passage: Passage | None = None
        self._read_version = 0
        self._submitted = False
        self._in_flight = 0
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._snapshot: Update | None = None
        self._busy_since: float | None = None
        self._overdue = False

    async def submit(self, grad: torch.Tensor) -> None:
        """Sends this iteration's update down the worker's lane.

        Returns when fewer than ``depth`` of the worker's updates are in flight: with a depth of 1,
        when this one has landed. Until it has, the gradient must not change. Cancelling the wait
        for a landing does not take the update back; cancelling that for a lock or a bound does.

        Args:
            grad: Flat gradient, shape (elements,), contiguous, of the shared parameters' dtype and
                device. ``SharedParameters.views_of`` gives views of it by name.

        Raises:
            TypeError: If ``grad`` is of another type or dtype.
            ValueError: If it is of another shape or device, sparse, not contiguous, or overlaps
                the shared parameters.
            RuntimeError: If this iteration has submitted its update already.
            FloatingPointError: If an earlier gradient of this worker held an infinity or NaN, with
                ``on_nonfinite="raise"``.
            Exception: Whatever an earlier update of this worker failed with on its lane.
        """
        scheduler = self._scheduler
        if self._submitted:
            raise RuntimeError(
                f"worker {self.index} must submit one gradient an iteration, got a second"
            )
        grad, checked = self._gradients.check(grad)
        update = Update(
            self.index,
            grad,
            checked,
            scheduler.hyperparameters,
            self._read_version,
            time.perf_counter_ns(),
        )
        self._submitted = True
        if self._gate is not None and self._passage is not None:
            try:
                await self._wait(self._gate.launch(self._passage), self._gate.reason)
            except BaseException:
                self._submitted = False  # nothing was launched
                raise
            update.passage, self._passage = self._passage, None
        self._in_flight += 1
        scheduler._launch(update)
        if self._in_flight >= self.depth:
            await self._wait(self._landing(), "landing")
        if self._error is not None:
            self._raise_error()

    async def run_blocking(
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Calls a function that computes or blocks, on the worker's own thread.

        Other workers go on meanwhile. Its CUDA work goes down the worker's lane: after what the
        caller's current stream was given before, and ahead of the update submitted after it.
        """
        computing = self.lane.computing()

        def call() -> T:
            with computing:
                try:
                    return function(*args, **kwargs)
                except StopIteration as stop:  # which no future can carry
                    raise RuntimeError(f"{function!r} raised StopIteration") from stop

        return await self._scheduler._run_blocking(self.index, call)

    def _begin(self) -> bool:
        """Begins an iteration; whether it may read at once, without ``_read``."""
        self._submitted = False
        if self._reads_at_once:
            self._read_version = self._scheduler.shared.version
            self._set_busy()
        return self._reads_at_once

    async def _read(self) -> None:
        """Reads the parameters as soon as the policy lets it."""
        if self._gate is not None:
            self._passage = await self._wait(self._gate.begin(), self._gate.reason)
            self._read_version = self._passage.read_version
        if self._scheduler.read == "snapshot":
            await self._wait(self._take_snapshot(), "snapshot")

    def _set_busy(self) -> None:
        if self._scheduler.deadline is not None:
            self._busy_since = time.perf_counter()

    def _end(self) -> None:
        if not self._submitted:
            raise RuntimeError("it returned without submitting a gradient")
        self._busy_since = None
        self.iteration += 1

    def _abandon(self) -> None:
        """Gives up an iteration that failed."""
        self._busy_since = None
        self._error = None
        if self._gate is not None and self._passage is not None:
            self._gate.end(self._passage)
            self._passage = None

    def _deliver(self, landed: Sequence[Update], updates: int) -> None:
        """Takes note of what is through on the lane: so many updates, and maybe a snapshot."""
        self._in_flight -= updates
        for update in landed:
            if update.error is not None:
                self._error = self._error or update.error
            elif update.checked is None:
                self._read_version = update.staleness
            if update is self._snapshot:
                self._snapshot = None
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _landing(self) -> None:
        """Waits until fewer than ``depth`` updates are in flight, or one has failed."""
        while self._in_flight >= self.depth and self._error is None:
            await self._delivery()

    async def _take_snapshot(self) -> None:
        """Copies the parameters down the lane: under the policy, as an update would go."""
        passage = await self._scheduler._snapshot_passage()
        snapshot = Update(
            self.index, self.flat, None, self._scheduler.hyperparameters, 0, time.perf_counter_ns()
        )
        snapshot.passage = passage
        self._snapshot = snapshot
        self._scheduler._launch(snapshot)
        while self._snapshot is not None:
            await self._delivery()
        self._raise_error()

    async def _delivery(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    async def _wait(self, wait: Awaitable[T], reason: str) -> T:
        """Waits for the scheduler: such time is not the worker's own."""
        self._busy_since = None
        start = time.perf_counter_ns()
        try:
            return await wait
        finally:
            self._set_busy()
            timeline = self._scheduler.timeline
            if timeline is not None:
                timeline.add_wait(self.index, reason, start, time.perf_counter_ns())


class _CheckedGradients:
    """Checks a worker's gradients, each once as long as it stays where and what it is."""

    def __init__(self, flat: torch.Tensor, ms: torch.Tensor) -> None:
        self._flat, self._ms = flat, ms
        self._elements, self._dtype = flat.numel(), flat.dtype
        self._kept: dict[int, tuple[weakref.ref[torch.Tensor], Checked]] = {}

    def check(self, grad: torch.Tensor) -> tuple[torch.Tensor, Checked]:
        """The gradient to keep alive until its update has landed, and where it lies."""
        kept = self._kept.get(id(grad))
        if (
            kept is not None
            and kept[0]() is grad
            and grad.data_ptr() == kept[1].address
            and grad.numel() == self._elements
            and grad.dtype is self._dtype
            and grad.is_contiguous()
        ):
            return grad, kept[1]
        if not isinstance(grad, torch.Tensor):
            raise TypeError(f"grad must be a torch tensor, got {type(grad).__name__}")
        check_grad(self._flat, grad)
        if not grad.is_contiguous():
            raise ValueError(f"grad must be contiguous, got strides {grad.stride()}")
        plain = grad.detach().resolve_neg()
        operands = Operands(self._flat, plain, self._ms)
        check_disjoint([(("param", "grad", "ms"), operands)])
        checked = Checked(LaunchTable([operands]), plain.data_ptr(), self._ms.data_ptr())
        if not grad.is_neg():
            if len(self._kept) == _CHECKED_GRADIENTS:
                self._kept.clear()
            self._kept[id(grad)] = weakref.ref(grad), checked
        return plain, checked


Worker = Callable[[WorkerContext], Awaitable[None]]
