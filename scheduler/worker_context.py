"""What a worker is, and what it may see and do."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

from hogstream.scheduler.lanes import Lane

if TYPE_CHECKING:
    from hogstream.scheduler.stream_scheduler import StreamScheduler

P = ParamSpec("P")
T = TypeVar("T")


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
        iteration: How many iterations this worker has finished in this run.
        depth: How many of its updates may be in flight at once.
        parameters: Each shared parameter by name: live views, which change as updates land.
    """

    def __init__(self, scheduler: StreamScheduler, index: int, lane: Lane) -> None:
        self.index = index
        self.lane = lane
        self.iteration = 0
        self.depth = scheduler.depth
        self.parameters = scheduler.shared.views
        self._scheduler = scheduler
        self._read_version = 0
        self._submitted = False
        self._in_flight: deque[asyncio.Future[None]] = deque()

    async def submit(self, grad: torch.Tensor) -> None:
        """Sends this iteration's update down the worker's lane.

        Returns when fewer than ``depth`` of the worker's updates are in flight: with a depth of 1,
        when this one has landed. Until it has, the gradient must not change. Cancelling the wait
        for a landing does not take the update back; cancelling that for the lock does.

        Args:
            grad: Flat gradient, shape (elements,), contiguous, of the shared parameters' dtype and
                device. ``SharedParameters.views_of`` gives views of it by name.

        Raises:
            TypeError: If ``grad`` is of another type or dtype.
            ValueError: If it is of another shape or device, sparse, not contiguous, or overlaps
                the shared parameters.
            RuntimeError: If this iteration has submitted its update already.
            Exception: Whatever an earlier update of this worker failed with on its lane.
        """
        if self._submitted:
            raise RuntimeError(
                f"worker {self.index} must submit one gradient an iteration, got a second"
            )
        self._submitted = True
        try:
            landing = await self._scheduler._launch(self.index, self.lane, self._read_version, grad)
        except BaseException:
            self._submitted = False  # nothing was launched
            raise
        self._in_flight.append(landing)
        if len(self._in_flight) == self.depth:
            await self._in_flight.popleft()

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

    def _begin(self, read_version: int) -> None:
        self._read_version = read_version

    def _end(self) -> None:
        if not self._submitted:
            raise RuntimeError("it returned without submitting a gradient")
        self._submitted = False
        self.iteration += 1


Worker = Callable[[WorkerContext], Awaitable[None]]
