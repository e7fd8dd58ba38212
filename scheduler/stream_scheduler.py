"""The asyncio scheduler: runs workers, and sends their updates down lanes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch

from hogstream.kernels.backends import select_backend
from hogstream.kernels.hyperparameters import HYPERPARAMETERS, Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands, check_disjoint, check_grad
from hogstream.scheduler.checks import check_integer, check_number
from hogstream.scheduler.lanes import Lane, Lanes, open_lanes
from hogstream.scheduler.policies import select_policy
from hogstream.scheduler.run_report import RunRecord, RunReport
from hogstream.scheduler.shared_parameters import SharedParameters
from hogstream.scheduler.updates import Landings, Update
from hogstream.scheduler.worker_context import Worker, WorkerContext, WorkerError

T = TypeVar("T")


class StreamScheduler:
    """Runs asynchronous workers that update shared parameters, each down a lane of its own.

    ::

        async with StreamScheduler(shared, workers=16, policy="lock-free") as scheduler:
            report = await scheduler.run(worker, updates=10_000)

    Lanes are CUDA streams for parameters on a GPU, and CPU threads otherwise. Leaving the scope
    ends a run under way, waits for all updates in flight, and leaves no task, thread, stream or
    event behind: on success, error and cancellation alike.

    Attributes:
        shared: What the workers update.
        hyperparameters: What updates are made with. Assign others, even while workers run, and
            updates submitted from then on use them: ``dataclasses.replace(..., lr=1e-4)``.
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
        if not isinstance(shared, SharedParameters):
            raise TypeError(f"shared must be SharedParameters, got {type(shared).__name__}")
        self.shared = shared
        self.workers = check_integer("workers", workers, at_least=1)
        self.depth = check_integer("depth", depth, at_least=1)
        self.policy = select_policy(policy)
        unknown = hyperparameters.keys() - set(HYPERPARAMETERS)
        if unknown:
            allowed = ", ".join(HYPERPARAMETERS)
            raise TypeError(f"hyperparameters must be among {allowed}, got {sorted(unknown)}")
        self.hyperparameters = Hyperparameters(**hyperparameters)
        self.backend = select_backend(backend, shared.flat.device.type)
        self._lanes: Lanes | None = None
        self._record: RunRecord | None = None

    async def __aenter__(self) -> StreamScheduler:
        """Opens the lanes, and compiles the kernel before any worker can need it."""
        if self._lanes is not None:
            raise RuntimeError("the scheduler is open already: enter it once")
        self._loop = asyncio.get_running_loop()
        self._landings = Landings(self._loop, self._on_landing)
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._under_way = 0  # updates in flight and blocking calls
        self._idle = asyncio.Event()
        self._idle.set()
        self._lock = asyncio.Lock()
        self._last: Update | None = None
        # A thread for each worker, and not any thread of a pool: some state of CUDA libraries
        # belongs to a thread and its stream.
        self._threads = [
            ThreadPoolExecutor(1, thread_name_prefix=f"hogstream-worker-{index}")
            for index in range(self.workers)
        ]
        try:
            self._lanes = open_lanes(self.shared, self.workers, self._landings)
            await self._run_blocking(0, self._warm_up)
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
        """Ends a run under way, waits for everything in flight, and closes the lanes."""
        try:
            await _uncancelled(self._drain)
        finally:
            for thread in self._threads:
                thread.shutdown()
            if self._lanes is not None:
                self._lanes.close()
                self._lanes = None
            self._last = None

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
            TypeError: If ``updates`` or ``seconds`` is no number.
            ValueError: If neither is given, or one is out of range.
            RuntimeError: If the scheduler is not open, runs already, or is closed meanwhile.
            WorkerError: If a worker failed, or returned without submitting a gradient.
        """
        budget = _Budget(updates, seconds)
        if self._lanes is None:
            raise RuntimeError("the scheduler is not open: use 'async with StreamScheduler(...)'")
        if self._record is not None:
            raise RuntimeError("the scheduler runs already: await that run first")
        self._record = record = RunRecord(self.workers)
        self._stopping = False
        budget.start()
        self._tasks = [
            asyncio.create_task(self._work(worker, index, lane, budget))
            for index, lane in enumerate(self._lanes.lanes)
        ]
        try:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
            closed = self._stopping
        finally:
            try:
                await _uncancelled(self._drain)
            finally:
                self._record = None
        self._raise_failures(record)
        if closed:
            raise RuntimeError("the scheduler was closed while it ran: await the run first")
        return self._report(record)

    async def _work(self, worker: Worker, index: int, lane: Lane, budget: _Budget) -> None:
        context = WorkerContext(self, index, lane)
        while not self._stopping and budget.take():
            # What has landed counts as read, whether the loop has heard of it or not.
            context._begin(self.shared.version + self._landings.undelivered())
            try:
                iteration = worker(context)
                if not hasattr(iteration, "__await__"):
                    raise TypeError(f"worker must be an async callable, got {worker!r}")
                await iteration
            except asyncio.CancelledError:
                if self._stopping:
                    raise
                raise RuntimeError("it was cancelled, but not by the scheduler") from None
            context._end()

    async def _launch(
        self, worker: int, lane: Lane, read_version: int, grad: torch.Tensor
    ) -> asyncio.Future[None]:
        """Launches an update as soon as the policy lets it, and returns its landing."""
        if not isinstance(grad, torch.Tensor):
            raise TypeError(f"grad must be a torch tensor, got {type(grad).__name__}")
        check_grad(self.shared.flat, grad)
        if not grad.is_contiguous():
            raise ValueError(f"grad must be contiguous, got strides {grad.stride()}")
        grad = grad.detach().resolve_neg()
        operands = Operands(self.shared.flat, grad, self.shared.ms)
        check_disjoint([(("param", "grad", "ms"), operands)])
        update = Update(
            worker=worker,
            grad=grad,
            apply=partial(self.backend.kernel, LaunchTable([operands]), self.hyperparameters),
            read_version=read_version,
            submitted_ns=time.perf_counter_ns(),
            waiter=self._loop.create_future(),
        )
        if self.policy.exclusive:
            await self._lock.acquire()  # released on landing, whatever becomes of this task
        if self.policy.ordered:
            update.after, self._last = self._last, update
        self._begin()
        lane.launch(update)
        return update.waiter

    def _on_landing(self, update: Update) -> None:
        if self.policy.exclusive:
            self._lock.release()
        assert self._record is not None  # a run ends only when all its updates have landed
        if update.error is None:
            self._record.add(update, staleness=self.shared.version - update.read_version)
            self.shared.version += 1
        else:
            self._record.failures.setdefault(update.worker, update.error)
        self._end()
        if update.waiter.done():  # cancelled with the worker
            return
        if update.error is None:
            update.waiter.set_result(None)
        else:
            update.waiter.set_exception(update.error)
            update.waiter.exception()  # seen: it is among the failures, awaited or not

    async def _run_blocking(self, worker: int, call: Callable[[], T]) -> T:
        self._begin()
        future = self._threads[worker].submit(call)
        future.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._end))
        return await asyncio.wrap_future(future)

    def _begin(self) -> None:
        self._under_way += 1
        self._idle.clear()

    def _end(self) -> None:
        self._under_way -= 1
        if self._under_way == 0:
            self._idle.set()

    def _warm_up(self) -> None:
        # An update of a spare element: the first call compiles.
        spare = Operands(
            *(
                torch.zeros_like(each[:1])
                for each in (self.shared.flat, self.shared.flat, self.shared.ms)
            )
        )
        self.backend.update_(LaunchTable([spare]), self.hyperparameters)

    async def _drain(self) -> None:
        """Ends all workers, and waits for all that is under way; may be begun again."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._idle.wait()

    def _raise_failures(self, record: RunRecord) -> None:
        for index, task in enumerate(self._tasks):
            if not task.cancelled() and (error := task.exception()) is not None:
                record.failures.setdefault(index, error)
        if record.failures:
            failures = dict(record.failures)
            raise WorkerError(failures) from next(iter(failures.values()))

    def _report(self, record: RunRecord) -> RunReport:
        return record.report(
            policy=self.policy.name,
            workers=self.workers,
            elements=self.shared.elements,
            dtype=str(self.shared.flat.dtype).removeprefix("torch."),
            backend=self.backend.name,
            device=str(self.shared.flat.device),
        )


class _Budget:
    """How many iterations workers may still start."""

    def __init__(self, updates: int | None, seconds: float | None) -> None:
        if updates is None and seconds is None:
            raise ValueError("updates or seconds must be given, got neither")
        self._left = None if updates is None else check_integer("updates", updates, at_least=1)
        self._seconds = None if seconds is None else check_number("seconds", seconds, above=0)
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
    """Waits to the end, begun again after each cancellation, and raises the cancellation then."""
    cancelled: asyncio.CancelledError | None = None
    while True:
        try:
            await wait()
            break
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
