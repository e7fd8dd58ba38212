"""The asyncio scheduler: runs workers, and sends their updates down lanes."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch

from hogstream.kernels.backends import select_backend
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.operands import check_grad, check_operands
from hogstream.scheduler.lanes import Lane, Lanes, open_lanes
from hogstream.scheduler.policies import select_policy
from hogstream.scheduler.run_report import RunReport
from hogstream.scheduler.shared_parameters import SharedParameters
from hogstream.scheduler.updates import Landings, Update

P = ParamSpec("P")
T = TypeVar("T")


class WorkerError(Exception):
    """A worker, or one of its updates, failed.

    Attributes:
        failures: The exception of each worker that failed, by its index.
    """

    def __init__(self, failures: dict[int, BaseException]) -> None:
        self.failures = failures
        super().__init__(
            "; ".join(
                f"worker {index} failed: {type(error).__name__}: {error}"
                for index, error in sorted(failures.items())
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
        does not take the update back.

        Args:
            grad: Flat gradient, shape (elements,), contiguous, of the shared parameters' dtype and
                device. ``SharedParameters.views_of`` gives views of it by name.

        Raises:
            TypeError: If ``grad`` is of another type or dtype.
            ValueError: If it is of another shape or device, sparse, or not contiguous.
            RuntimeError: If this iteration has submitted its update already.
            Exception: Whatever an earlier update of this worker failed with on its lane.
        """
        if self._submitted:
            raise RuntimeError(
                f"worker {self.index} must submit one gradient an iteration, got a second"
            )
        self._submitted = True
        landing = await self._scheduler._launch(self.index, self.lane, self._read_version, grad)
        self._in_flight.append(landing)
        if len(self._in_flight) == self.depth:
            await self._in_flight.popleft()

    async def run_blocking(
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Calls a function that computes or blocks, on a thread, while other workers go on.

        Its CUDA work goes down the worker's lane, ahead of the update submitted after it.
        """

        def call() -> T:
            with self.lane.computing():
                return function(*args, **kwargs)

        return await self._scheduler._run_blocking(call)


Worker = Callable[[WorkerContext], Awaitable[None]]


class StreamScheduler:
    """Runs asynchronous workers that update shared parameters, each down a lane of its own.

    ::

        async with StreamScheduler(shared, workers=16, policy="lock-free") as scheduler:
            report = await scheduler.run(worker, updates=10_000)

    Lanes are CUDA streams for parameters on a GPU, and CPU threads otherwise. Leaving the scope
    waits for all updates in flight, and leaves no task, thread, stream or event behind: on success,
    error and cancellation alike.
    """

    def __init__(
        self,
        shared: SharedParameters,
        *,
        workers: int,
        policy: str = "lock-free",
        depth: int = 1,
        backend: str | None = None,
        **hyperparameters: Any,
    ) -> None:
        """Checks everything; starts nothing.

        Args:
            shared: What the workers update.
            workers: How many, at least 1.
            policy: ``"lock-free"``, ``"locked"`` or ``"ordered"``: what an update waits for.
            depth: How many updates of one worker may be in flight, at least 1. A worker needs as
                many gradient buffers.
            backend: ``"triton"``, ``"numba"`` or ``"numpy"``; None picks by device.
            hyperparameters: ``lr``, ``alpha``, ``eps``, ``weight_decay``, ``eps_inside_sqrt``,
                ``decoupled_weight_decay`` and ``maximize``, as for ``rmsprop_``.

        Raises:
            TypeError: If an argument is unknown or of a wrong type.
            ValueError: If a policy or backend is unknown, or a number is out of range.
            RuntimeError: If the backend is not available here.
        """
        for name, value in (("workers", workers), ("depth", depth)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        self.shared = shared
        self.workers = workers
        self.depth = depth
        self.policy = select_policy(policy)
        self.hyperparameters = Hyperparameters(**hyperparameters)
        self.backend = select_backend(backend, shared.flat.device.type)
        self._param = self.backend.operand(shared.flat)
        self._ms = self.backend.operand(shared.ms)
        self._lanes: Lanes | None = None
        self._running = False

    async def __aenter__(self) -> StreamScheduler:
        """Opens the lanes, and compiles the kernel before any worker can need it."""
        if self._lanes is not None:
            raise RuntimeError("the scheduler is open already: enter it once")
        self._loop = asyncio.get_running_loop()
        self._landings = Landings(self._loop, self._on_landing)
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._lock = asyncio.Lock()
        self._last: Update | None = None
        self._failures: dict[int, BaseException] = {}
        self._blocking: set[Future[Any]] = set()
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="hogstream-worker")
        try:
            self._lanes = open_lanes(self.shared, self.workers, self._landings)
            await self._run_blocking(self._warm_up)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Waits for everything in flight, and closes the lanes."""
        try:
            await self._settle()
        finally:
            self._threads.shutdown()
            if self._lanes is not None:
                self._lanes.close()
                self._lanes = None

    async def run(
        self, worker: Worker, *, updates: int | None = None, seconds: float | None = None
    ) -> RunReport:
        """Runs the workers until enough updates have landed, or for a time.

        Each worker calls ``worker(context)`` again and again: one iteration, which reads the
        parameters, makes a gradient and submits it once. If a worker fails, the others are
        cancelled, and what was submitted still lands.

        Args:
            worker: Called with a context that is the worker's own.
            updates: How many updates to make, over all workers; at least 1.
            seconds: How long to start iterations; > 0. With both, what ends first.

        Returns:
            What was done and how fast.

        Raises:
            ValueError: If neither ``updates`` nor ``seconds`` is given, or one is out of range.
            RuntimeError: If the scheduler is not open, or runs already.
            WorkerError: If a worker failed, or returned without submitting a gradient.
        """
        budget = _Budget(updates, seconds)
        if self._lanes is None:
            raise RuntimeError("the scheduler is not open: use 'async with StreamScheduler(...)'")
        if self._running:
            raise RuntimeError("the scheduler runs already: await that run first")
        self._running = True
        self._latencies_us = array("d")
        self._staleness: Counter[int] = Counter()
        self._updates_by_worker = [0] * self.workers
        self._failures.clear()
        start = time.perf_counter()
        budget.start()
        tasks = [
            asyncio.create_task(self._work(worker, index, lane, budget))
            for index, lane in enumerate(self._lanes.lanes)
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await _uncancelled(partial(asyncio.wait, tasks))
            await self._settle()
            self._running = False
        self._raise_failures(tasks)
        return self._report(time.perf_counter() - start)

    async def _work(self, worker: Worker, index: int, lane: Lane, budget: _Budget) -> None:
        context = WorkerContext(self, index, lane)
        while budget.take():
            # What has landed counts as read, whether the loop has heard of it or not.
            context._read_version = self.shared.version + self._landings.undelivered()
            await worker(context)
            if not context._submitted:
                raise RuntimeError("it returned without submitting a gradient")
            context._submitted = False
            context.iteration += 1

    async def _launch(
        self, worker: int, lane: Lane, read_version: int, grad: torch.Tensor
    ) -> asyncio.Future[None]:
        """Launches an update as soon as the policy lets it, and returns its landing."""
        if not isinstance(grad, torch.Tensor):
            raise TypeError(f"grad must be a torch tensor, got {type(grad).__name__}")
        check_grad(self.shared.flat, grad)
        if not grad.is_contiguous():
            raise ValueError(f"grad must be contiguous, got strides {grad.stride()}")
        update = Update(
            worker=worker,
            grad=grad,
            apply=partial(
                self.backend.kernel,
                self._param,
                self.backend.operand(grad.detach()),
                self._ms,
                self.hyperparameters,
            ),
            read_version=read_version,
            submitted_ns=time.perf_counter_ns(),
            waiter=self._loop.create_future(),
        )
        if self.policy.exclusive:
            await self._lock.acquire()  # released on landing, whatever becomes of this task
        if self.policy.ordered:
            update.after, self._last = self._last, update
        self._in_flight += 1
        self._idle.clear()
        lane.launch(update)
        return update.waiter

    def _on_landing(self, update: Update) -> None:
        if self.policy.exclusive:
            self._lock.release()
        if update.error is None:
            self._staleness[self.shared.version - update.read_version] += 1
            self._latencies_us.append((update.landed_ns - update.submitted_ns) / 1e3)
            self._updates_by_worker[update.worker] += 1
            self.shared.version += 1
        else:
            self._failures.setdefault(update.worker, update.error)
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle.set()
        if update.waiter.done():  # cancelled with the worker
            return
        if update.error is None:
            update.waiter.set_result(None)
        else:
            update.waiter.set_exception(update.error)
            update.waiter.exception()  # seen: it is among the failures, awaited or not

    async def _run_blocking(self, call: Callable[[], T]) -> T:
        future = self._threads.submit(call)
        self._blocking.add(future)
        future.add_done_callback(self._blocking.discard)
        return await asyncio.wrap_future(future)

    def _warm_up(self) -> None:
        # An update of spare tensors: the first call compiles. Triton specialises on alignment, and
        # on whether the size is 1 or a multiple of 16: the spare ones are alike in that.
        elements = min(self.shared.elements, 16 + self.shared.elements % 16)
        param, grad, ms = (
            torch.zeros(elements, dtype=tensor.dtype, device=tensor.device)
            for tensor in (self.shared.flat, self.shared.flat, self.shared.ms)
        )
        self.backend.update_(check_operands(param, grad, ms), self.hyperparameters)

    async def _settle(self) -> None:
        """Waits for all that is in flight; cancellation is raised after that, not before."""
        await _uncancelled(self._idle.wait)
        while self._blocking:
            waits = [asyncio.wrap_future(future) for future in list(self._blocking)]
            await _uncancelled(partial(asyncio.wait, waits))
            for wait in waits:
                wait.cancelled() or wait.exception()  # seen: they belong to a cancelled worker

    def _raise_failures(self, tasks: list[asyncio.Task[None]]) -> None:
        for index, task in enumerate(tasks):
            if not task.cancelled() and (error := task.exception()) is not None:
                self._failures.setdefault(index, error)
        if self._failures:
            raise WorkerError(dict(self._failures)) from next(iter(self._failures.values()))

    def _report(self, seconds: float) -> RunReport:
        return RunReport(
            policy=self.policy.name,
            workers=self.workers,
            elements=self.shared.elements,
            dtype=str(self.shared.flat.dtype).removeprefix("torch."),
            backend=self.backend.name,
            device=str(self.shared.flat.device),
            seconds=seconds,
            latencies_us=self._latencies_us,
            staleness=self._staleness,
            updates_by_worker=self._updates_by_worker,
        )


class _Budget:
    """How many iterations workers may still start."""

    def __init__(self, updates: int | None, seconds: float | None) -> None:
        if updates is None and seconds is None:
            raise ValueError("updates or seconds must be given, got neither")
        if updates is not None and (not isinstance(updates, int) or updates < 1):
            raise ValueError(f"updates must be an integer >= 1, got {updates!r}")
        if seconds is not None and not 0 < seconds < float("inf"):
            raise ValueError(f"seconds must be a finite number > 0, got {seconds!r}")
        self._left = updates
        self._seconds = seconds
        self._deadline = float("inf")

    def start(self) -> None:
        if self._seconds is not None:
            self._deadline = time.perf_counter() + self._seconds

    def take(self) -> bool:
        if time.perf_counter() >= self._deadline or self._left == 0:
            return False
        if self._left is not None:
            self._left -= 1
        return True


async def _uncancelled(wait: Callable[[], Awaitable[Any]]) -> None:
    """Waits to the end, however often it is cancelled, and raises the cancellation then."""
    cancelled: asyncio.CancelledError | None = None
    while True:
        try:
            await wait()
            break
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
