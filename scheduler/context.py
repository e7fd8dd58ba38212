"""What a worker is, and what it may see and do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from threading import get_ident
from time import perf_counter, perf_counter_ns
from typing import Any, ParamSpec, TypeVar

import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.operands import ArrayLike
from hogstream.kernels.row_table import RowTable
from hogstream.scheduler.budget import Budget
from hogstream.scheduler.bursts import MOST_UPDATES, SECONDS, SECONDS_ON_LOOP, Burst
from hogstream.scheduler.checks import error_text
from hogstream.scheduler.chunks import LEAST_UPDATES, Chunk, CompiledLoop
from hogstream.scheduler.dispatch import Dispatch
from hogstream.scheduler.gradients import Gradient, Gradients
from hogstream.scheduler.lanes.base import Applier, Lane, LaneSettings
from hogstream.scheduler.policies import BoundGate, Passage
from hogstream.scheduler.row_gradients import RowGradient, RowGradients
from hogstream.scheduler.settings import SchedulerSettings
from hogstream.scheduler.update import Checked, Snapshot, Update, Work
from hogstream.scheduler.update_state import UpdateState

#: Up to so many a gradient is copied in less time than it takes to check it by name.
_SMALL_BYTES = 1 << 17

P = ParamSpec("P")
T = TypeVar("T")


class WorkerError(Exception):
    """A worker, or one of its updates, failed.

    Attributes:
        failures: The exception of each worker that failed, by its index.
    """

    def __init__(self, failures: dict[int, BaseException]) -> None:
        self.failures = dict(failures)
        workers: dict[str, list[str]] = {}  # who failed alike is named together
        for index, error in sorted(failures.items()):
            workers.setdefault(error_text(error), []).append(str(index))
        super().__init__(
            "; ".join(
                f"{'worker' if len(each) == 1 else 'workers'} {', '.join(each)} failed: {text}"
                for text, each in workers.items()
            )
        )

    def __reduce__(self) -> tuple[type[WorkerError], tuple[dict[int, BaseException]]]:
        """Pickles what it was made of, and not the text."""
        return WorkerError, (self.failures,)


class Iteration:
    """One iteration on its way; without an ``__init__``, as one is made for each update.

    Attributes:
        read_version: Version of the parameters that it read.
        passage: The way of its next update through the policy's gate, if there is one.
        submitted: Whether ``submit`` was called for it.
        updates: How many updates it may submit, taken from the run's budget.
        enqueued: How many of them are on the lane, or have been applied without it.
        has_made: Whether it follows on a burst that has failed, but has made updates.
    """

    read_version = 0
    passage: Passage | None = None
    submitted = False
    updates = 1
    enqueued = 0
    has_made = False


class WorkerContext:
    """What a worker may see and do.

    Attributes:
        index: The worker's number, from 0.
        lane: The lane that the worker's updates go down.
        depth: How many of its updates may be in flight at once.
        flat: The parameters that this iteration reads, shape (elements,): the shared ones, which
            change as updates land, or with ``read="snapshot"`` this worker's copy of them.
        parameters: Views of ``flat`` by name.
        buffers: By name, what this worker's replica of a model has for its buffers: the shared
            ones, or with ``buffers="worker"`` or ``"average"`` its own.
        state: What its updates have besides parameters, of shape (elements,): all workers' or its
            own.
        prefers_flat: Whether a flat gradient is best, even if it has to be copied: a small one,
            which costs less than to check each by name; on a GPU, which launches each part by
            itself; and with ``telemetry``, which counts races by blocks of the flat parameters.
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
    ) -> None:
        shared = dispatch.shared
        self.index = index
        self.lane = lane
        self.depth = dispatch.settings.depth
        self.flat = shared.flat if snapshot is None else snapshot
        self.parameters: Mapping[str, torch.Tensor] = (
            shared.views if snapshot is None else shared.views_of(snapshot)
        )
        self.buffers: Mapping[str, torch.Tensor] = shared.buffers
        if shared.worker_buffers is not None and dispatch.settings.buffers != "shared":
            self.buffers = {name: rows[index] for name, rows in shared.worker_buffers.items()}
        self.state = state
        self._dispatch = dispatch
        self._budget = budget
        self._enqueue: Callable[[Work], None] = dispatch.enqueue
        self._gate = dispatch.gate
        self._reads_at_once = dispatch.gate is None and snapshot is None
        self._applier = lane.applier if self._may_burst() else None
        self._burst: Burst | Chunk | None = None
        self._burst_made = 1  # updates, by the last
        self._finished = iteration
        self._goes_alone = dispatch.gate is not None
        self._deadline = dispatch.settings.deadline
        telemetry, on_gpu = dispatch.settings.telemetry, shared.flat.is_cuda
        self.prefers_flat = telemetry or on_gpu or shared.flat.nbytes <= _SMALL_BYTES
        self._gradients = Gradients(
            shared,
            state,
            whole_only=telemetry and on_gpu,
            rows_only=dispatch.policy.row_locked,
        )
        self._row_gradients = RowGradients(
            shared,
            state,
            self._gradients,
            counts_races=dispatch.counts_races_of_rows,
            continuing=lane.continuing,
        )
        self._current: Iteration | None = None
        self._snapshot: Snapshot | None = None
        self._in_flight = 0
        self._error: BaseException | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._busy_since: float | None = None
        self._thread = get_ident()  # of the event loop, for which nothing is quicker to ask
        self._retired = False
        dispatch.receivers[index] = self._receive

    @property
    def iteration(self) -> int:
        """How many iterations this worker has finished; each update of a burst is one."""
        return self._finished if self._burst is None else self._finished + self._burst.made

    @property
    def settings(self) -> SchedulerSettings:
        """How the scheduler runs."""
        return self._dispatch.settings

    @property
    def lane_settings(self) -> LaneSettings:
        """The same, as lanes have it."""
        settings = self._dispatch.lane_settings
        assert settings is not None  # a worker runs when lanes are open
        return settings

    @property
    def read_version(self) -> int:
        """Version of the parameters that this iteration reads; of a snapshot, at least."""
        return 0 if self._current is None else self._current.read_version

    async def submit(
        self,
        grad: Gradient | Sequence[Gradient],
        loss: float | Sequence[float] | None = None,
    ) -> None:
        """Submits this iteration's update, to go down the worker's lane; or several.

        Returns at once if fewer than ``depth`` of the worker's updates are in flight then, else
        when half of them have landed: with a depth of 1, when this one has. Until its update has
        landed, the gradient must neither change nor be resized. Cancelling the wait for a landing
        does not take the update back; cancelling that for a lock or a bound does.

        Several gradients, all made from what this iteration has read, are each an update of its
        own, in their order, at most ``depth`` of them in flight: for whoever has them together, the
        event loop has less to do than in an iteration for each. Those that would be more than the
        run's ``updates`` are left out. After an error or a cancellation, those before
        it land, and the others are not submitted.

        Args:
            grad: Flat gradient, shape (elements,), contiguous, of the shared parameters' dtype and
                device; ``SharedParameters.views_of`` gives views of it by name. Or a mapping from
                names of parameters, at least one, to such gradients, each of its parameter's shape:
                other parameters are left alone, their state too, where a gradient of zeros would
                have weight decay move them. Or a list or tuple of such gradients, at least one.
            loss: A number for the run's ``on_loss``, which is called with it once the update has
                landed; of several gradients, a list or tuple of as many.

        Raises:
            TypeError: If ``grad`` is of another type or dtype, or ``loss`` no number.
            ValueError: If it is of another shape or device, sparse, not contiguous, or overlaps
                the shared parameters; if there are none, or several with a policy ``bounded:K``,
                which must know of each update when its parameters are read; if there are not as
                many losses as gradients; if a mapping names what is no parameter, or is given
                with ``telemetry`` on a GPU, where races of whole updates are counted; or if the
                policy is ``"row-locked"``, which takes ``submit_rows`` alone. Nothing was submitted
                then.
            RuntimeError: If this iteration has called ``submit`` already, or has ended, or this
                is not the thread of the scheduler's event loop.
            FloatingPointError: If an earlier gradient of this worker held an infinity or NaN, with
                ``on_nonfinite="raise"``.
            Exception: Whatever an earlier update of this worker failed with on its lane, or the
                run's ``lr_schedule`` raises.
        """
        current = self._current
        if current is None or current.submitted or get_ident() != self._thread:
            raise self._why_refused("submit")
        if type(grad) is not torch.Tensor and isinstance(grad, (list, tuple)):
            await self._submit_several(current, grad, loss)
            return
        held, checked = self._gradients.check(grad)  # type: ignore[arg-type]  # it is one
        if loss is not None:
            loss = _checked_loss(loss)
        submitted_ns = perf_counter_ns()
        current.submitted = True
        if self._goes_alone or self._in_flight >= self.depth:
            await self._wait_to_enqueue(current)
        dispatch = self._dispatch
        numbers, rate = dispatch.hyperparameters, dispatch.rate
        update = Update(
            self.index,
            submitted_ns,
            current.passage,
            held,
            checked,
            numbers if rate is None else rate.apply(numbers),
            current.read_version,
            loss,
        )
        self._enqueue(update)
        current.enqueued = 1
        self._in_flight += 1
        if self._in_flight >= self.depth:
            await self._wait(self._landing(), "landing")
        if self._error is not None:
            self._raise_error()

    async def submit_rows(
        self,
        name: str | Mapping[str, RowGradient],
        rows: ArrayLike | None = None,
        grads: ArrayLike | None = None,
        loss: float | None = None,
    ) -> None:
        """Submits this iteration's update as one of some rows of a table, or of several tables.

        A table is a shared parameter of any axes, at least one: shape (N, ...), taken as (N, D).
        Rows are updated as ``sparse_rmsprop_`` does it: gradients of the same row are summed first;
        no other row is read or written, and no state of another. So weight decay reaches no other
        either. All else is as with ``submit``: waits, the policy, versions and staleness, for which
        this is one update, of however many tables.

        Of no rows, nothing happens to a table. An update of none at all lands and counts, and
        changes nothing. The first one in a process compiles for a while, unless the policy is
        ``"row-locked"``.

        Args:
            name: Of the table. Or a mapping from names, at least one, to tuples of rows and their
                gradients, each as here.
            rows: int32 or int64, shape (k,): in any order, and as often as may be. A tensor where
                the parameters are, or on the CPU an array, as grads. On a CPU they may change once
                this has been called and waits; on a GPU no sooner than grads.
            grads: Of those rows: shape (k, D), contiguous, of the shared parameters' dtype. Until
                the update has landed, they must neither change nor be resized.
            loss: As of ``submit``.

        Raises:
            TypeError: If something is of a wrong type or dtype.
            ValueError: If a name is of no parameter or of a scalar, ``grads`` do not fit the table
                or overlap the shared parameters, or there is no table.
            IndexError: If a row is not in the table. Nothing was submitted then, as with those. A
                GPU finds it when it comes to the update, and changes nothing, in no table: the
                update is dropped, its worker counts as failed, and with a depth above 1 it is a
                later call that raises this.
            RuntimeError: As ``submit``.
            FloatingPointError: As ``submit``.
            Exception: As ``submit``.
        """
        current = self._current
        if current is None or current.submitted or get_ident() != self._thread:
            raise self._why_refused("submit_rows")
        checked = self._row_gradients.check(name, rows, grads)
        losses = None if loss is None else [_checked_loss(loss)]
        await self._submit_checked(current, [checked], losses)

    async def read_rows(self, name: str, rows: ArrayLike) -> torch.Tensor:
        """Copies rows of a table, however long it is; ``parameters`` has the live ones.

        The copy is made down the worker's lane, after its updates before, as the policy has it:
        under the lock of ``"locked"`` and ``"awaited"``, in its turn under ``"ordered"``, and under
        ``"row-locked"`` row by row with the mutex of each; else whatever is updated meanwhile may
        be in it in part. Staleness counts from the iteration's begin all the same.

        Args:
            name: Of the table.
            rows: As of ``submit_rows``.

        Returns:
            Shape (k, D).

        Raises:
            TypeError: As ``submit_rows``.
            ValueError: As ``submit_rows``.
            IndexError: As ``submit_rows``.
            RuntimeError: If the worker's run has ended, or this is not the thread of the
                scheduler's event loop.
            Exception: Whatever an earlier update of this worker failed with.
        """
        if self._retired or get_ident() != self._thread:
            raise self._why_refused("read_rows")
        target, table = self._row_gradients.lay_out_copy(name, rows)
        await self._wait(self._take_snapshot(target, table), "snapshot")
        return target

    async def compute(
        self,
        function: Callable[P, tuple[Gradient, float | None]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> None:
        """Calls a function that computes a gradient on the worker's own thread, and submits that.

        It is ``run_blocking`` and ``submit`` for less. On a CPU, with a depth of 1, without a
        deadline, and with a policy that is neither ordered nor makes the host wait, that thread
        applies the update as well. And for some 10 ms it calls the function again, for the next
        update, before the event loop hears of what has landed: a burst. Each call is an iteration,
        with its own ``iteration`` and ``read_version``, and the parameters as they are then. No
        event of the lane waits for what is applied so.

        When the function fails, or the wait is cancelled, what has landed before counts, and what
        is computed still is dropped; then this may be called again.

        Args:
            function: Returns a gradient, as ``submit`` takes one, and a loss or None.
            args: What it is called with, each time.
            kwargs: By name.

        Raises:
            TypeError: If the function returns something else; and as ``submit``.
            Exception: Whatever the function raises; and as ``submit`` and ``run_blocking``.
        """
        current = self._current
        if current is None or current.submitted or get_ident() != self._thread:
            raise self._why_refused("compute")
        if self._applier is None or self._in_flight:
            grad, loss = await self.run_blocking(_compute, function, args, kwargs)
            await self.submit(grad, loss)
            return
        await self._make_burst(current, self._applier, partial(_compute, function, args, kwargs))

    async def run_chunk(self, loop: CompiledLoop) -> None:
        """Has compiled code compute and apply updates on the worker's own thread: a chunk of them.

        Each is an iteration. The event loop hears of them when the chunk has ended.

        Args:
            loop: What makes them.

        Raises:
            RuntimeError: As ``submit``.
            Exception: Whatever the loop raises; what has landed before counts.
        """
        current = self._current
        if current is None or current.submitted or get_ident() != self._thread:
            raise self._why_refused("run_chunk")
        dispatch = self._dispatch
        numbers = dispatch.hyperparameters
        if dispatch.rate is not None:
            numbers = dispatch.rate.apply(numbers)
        workers, most = dispatch.settings.workers, loop.chunk - 1
        least = most if workers == 1 else min(LEAST_UPDATES, most)
        current.updates += self._budget.take_part(workers, most, least)
        seconds = SECONDS_ON_LOOP if dispatch.alone else SECONDS
        seconds = min(seconds, self._budget.closes - perf_counter())
        of = loop.begin(current.updates)
        await self._run_burst(current, Chunk(of, current.updates, numbers, seconds))

    def send(self, value: Any) -> None:
        """Sends a value to the ``on_result`` of the run, which drops it if it has none.

        Args:
            value: Anything. Over processes it is pickled here and now, and on its way for some
                hundredths of a second.

        Raises:
            TypeError: If it has to be pickled and cannot be.
            RuntimeError: If the worker's run has ended, or this is not the thread of the
                scheduler's event loop.
        """
        if self._retired or get_ident() != self._thread:
            raise self._why_refused("send")
        assert self._dispatch.callbacks is not None
        self._dispatch.callbacks.report_result(self.index, value)

    async def run_blocking(
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Calls a function that computes or blocks, on the worker's own thread.

        Other workers go on meanwhile. It has the caller's context variables. Its CUDA work goes
        down the worker's lane: after what the caller's current stream was given before, and ahead
        of the update submitted after it. Over processes, a worker that has one for itself, without
        a deadline, calls it on the event loop's thread: nothing else is to be done there, and
        nothing that it calls may wait for that loop.

        Raises:
            RuntimeError: If the worker's run has ended, or this is not the thread of the
                scheduler's event loop.
            Exception: Whatever the function raises.
        """
        if self._retired or get_ident() != self._thread:
            raise self._why_refused("run_blocking")
        computing = self.lane.computing()

        def call() -> T:
            with computing:
                return _call(function, args, kwargs)

        return await self._dispatch.run_blocking(self.index, call)

    def on_close(self, function: Callable[[], object]) -> None:
        """Has a function called on the event loop when the scheduler's scope is left.

        Nothing of the scheduler is under way then: so a worker ends what it has opened.
        """
        self._dispatch.on_close.callback(function)

    def _why_refused(self, method: str) -> RuntimeError:
        """Why a call is not possible now."""
        if self._retired:
            reason = f"must call {method} while its run goes on, which has ended"
        elif get_ident() != self._thread:
            reason = f"must call {method} in its scheduler's event loop, got another thread"
        elif self._current is None:
            reason = f"must call {method} within an iteration, and is in none"
        else:
            reason = f"must submit once an iteration, got a second call, of {method}"
        return RuntimeError(f"worker {self.index} {reason}")

    def _may_burst(self) -> bool:
        """Whether updates may be applied where they are computed: nothing has to come between."""
        settings = self._dispatch.settings
        one_by_one = settings.depth == 1 and settings.batch == 1
        return one_by_one and self._reads_at_once and settings.deadline is None

    async def _make_burst(
        self, current: Iteration, applier: Applier, compute: Callable[[], tuple[Gradient, Any]]
    ) -> None:
        """Has the worker's thread compute and apply updates: one, if the run says its rate."""
        dispatch, numbers = self._dispatch, None
        if dispatch.rate is None:
            more = min(2 * self._burst_made, MOST_UPDATES) - 1  # than the last, twice as many
            current.updates += self._budget.take_part(dispatch.settings.workers, more)
        else:
            numbers = dispatch.rate.apply(dispatch.hyperparameters)

        def make_update() -> Update:
            version = current.read_version = dispatch.shared.version
            grad, loss = compute()
            held, checked = self._gradients.check(grad)
            if loss is not None:
                loss = _checked_loss(loss)
            now = perf_counter_ns()
            made_with = dispatch.hyperparameters if numbers is None else numbers
            return Update(self.index, now, None, held, checked, made_with, version, loss)

        seconds = SECONDS_ON_LOOP if dispatch.alone else SECONDS
        await self._run_burst(
            current, Burst(make_update, applier, current.updates, seconds, self._budget)
        )

    async def _run_burst(self, current: Iteration, burst: Burst | Chunk) -> None:
        """Has the worker's thread make the updates of a burst."""
        self._burst = burst
        current.submitted = True
        try:
            await self._dispatch.run_blocking(
                self.index, partial(_call, burst.run, (), {}), partial(self._note_end, burst)
            )
        except BaseException:
            self._end_burst(burst)
            self._renew(current)
            raise
        self._give_back(current)
        if self._error is not None:
            self._raise_error()

    def _end_burst(self, burst: Burst | Chunk | None) -> None:
        """Ends a burst, if it is under way: what it has made is in flight until its delivery."""
        if burst is None or self._burst is not burst:
            return
        current, self._burst = self._current, None
        assert current is not None
        made = current.enqueued = burst.end()
        self._in_flight += made
        self._finished += max(made - 1, 0)  # and one more when the iteration ends
        self._burst_made = max(made, 1)

    def _note_end(self, burst: Burst | Chunk) -> None:
        """A burst's thread is done with it."""
        self._end_burst(burst)
        if isinstance(burst, Chunk):
            self._in_flight -= burst.end()
            burst.of.finish()
            self._dispatch.deliver_chunk(self.index, burst)
        elif burst.landed:
            self._dispatch.deliver_applied(self.index, burst.landed)

    def _renew(self, current: Iteration) -> None:
        """Has an iteration, whose burst has failed or was given up, begin once more.

        As if what the burst has made had been iterations of their own. Where it has made all that
        it might, the iteration stays as it is: it has submitted. So it does when it was abandoned.
        """
        left = current.updates - current.enqueued
        if not left:
            return
        self._budget.give_back(left - 1)
        renewed = self._current = Iteration()
        renewed.read_version = self._dispatch.shared.version
        renewed.has_made = current.has_made or current.enqueued > 0
        self._finished += current.enqueued > 0

    async def _submit_several(
        self,
        current: Iteration,
        grads: Sequence[Gradient],
        loss: float | Sequence[float] | None,
    ) -> None:
        """Checks several gradients, and submits an update of each."""
        if not grads:
            raise ValueError("grad must hold at least one gradient, got none")
        if len(grads) > 1 and isinstance(self._gate, BoundGate):
            policy = self._dispatch.settings.policy
            raise ValueError(f"grad must be one gradient with policy={policy!r}, got {len(grads)}")
        gradients = [self._gradients.check(each) for each in grads]
        losses = None if loss is None else _checked_losses(loss, len(grads))
        await self._submit_checked(current, gradients, losses)

    async def _submit_checked(
        self,
        current: Iteration,
        gradients: Sequence[tuple[object, Checked]],
        losses: Sequence[float] | None,
    ) -> None:
        """Submits an update of each: at once, as many as the lane has room for."""
        submitted_ns = perf_counter_ns()
        current.submitted = True
        current.updates += self._budget.take_more(len(gradients) - 1)
        try:
            while current.enqueued < current.updates:
                numbers, rate = self._dispatch.hyperparameters, self._dispatch.rate
                if rate is not None:
                    numbers = rate.apply(numbers)  # it may raise: not with the gate's passage
                if self._goes_alone or self._in_flight >= self.depth:
                    await self._wait_to_enqueue(current)
                self._enqueue_several(current, gradients, losses, numbers, submitted_ns)
                if self._in_flight >= self.depth:
                    await self._wait(self._landing(), "landing")
                if self._error is not None:
                    self._raise_error()
        finally:
            self._give_back(current)

    def _enqueue_several(
        self,
        current: Iteration,
        gradients: Sequence[tuple[object, Checked]],
        losses: Sequence[float] | None,
        numbers: Hyperparameters,
        submitted_ns: int,
    ) -> None:
        """Enqueues the updates that come next: one, if others must land in between."""
        room = 1 if self._goes_alone else self.depth - self._in_flight
        first, last = current.enqueued, min(current.enqueued + room, current.updates)
        updates = [
            Update(
                self.index,
                submitted_ns,
                current.passage,
                held,
                checked,
                numbers,
                current.read_version,
            )
            for held, checked in gradients[first:last]
        ]
        if losses is not None:
            for update, loss in zip(updates, losses[first:last], strict=True):
                update.loss = loss
        self._dispatch.enqueue_several(updates)
        current.enqueued = last
        self._in_flight += len(updates)

    def _give_back(self, current: Iteration) -> None:
        """Leaves the updates that an iteration does not come to submit to others."""
        kept = max(current.enqueued, 1)
        self._budget.give_back(current.updates - kept)
        current.updates = kept

    async def _wait_to_enqueue(self, current: Iteration) -> None:
        """Waits until the lane has room for an update, and the policy lets it go there."""
        gate = self._gate
        try:
            while self._in_flight >= self.depth:  # a wait for a landing was cancelled before
                await self._wait(self._landing(), "landing")
                self._raise_error()
            if gate is not None:
                if current.enqueued:  # whose passage has gone with it
                    current.passage = await gate.begin()
                assert current.passage is not None
                await self._wait(gate.admit(current.passage), gate.reason)
        except BaseException:
            current.submitted = current.enqueued > 0
            raise
        if self._current is not current:
            if gate is not None and current.passage is not None:
                gate.end(current.passage)
            raise RuntimeError(f"worker {self.index} must await submit within its iteration")

    def _set_busy(self) -> None:
        if self._deadline is not None:
            self._busy_since = perf_counter()

    def _receive(self, landed: Sequence[Work]) -> None:
        """Takes note of what was delivered: updates, and maybe the snapshot."""
        self._in_flight -= len(landed)
        for work in landed:
            if isinstance(work, Update) and work.error is not None and self._error is None:
                self._error = work.error
        if self._snapshot is not None and self._snapshot in landed:
            self._snapshot = None
            self._in_flight += 1  # which counts updates only
        if self._busy_since is not None:
            self._set_busy()  # it may be for this that it has waited
        if self._waiters:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    async def _landing(self) -> None:
        """Waits until enough of the updates in flight have landed, or one has failed."""
        while self._in_flight > self._dispatch.low_water and self._error is None:
            await self._delivery()

    async def _take_snapshot(self, target: torch.Tensor, rows: RowTable | None = None) -> int:
        """Copies parameters down the lane: under the policy, as an update would go.

        Args:
            target: Where to.
            rows: Which, if not all.

        Returns:
            The version that the copy holds at least.
        """
        while self._snapshot is not None:  # one that was given up
            await self._delivery()
        passage = await self._dispatch.snapshot_passage()
        submitted_ns = perf_counter_ns()
        snapshot = self._snapshot = Snapshot(self.index, submitted_ns, passage, target, rows)
        try:
            self._enqueue(snapshot)
        except BaseException:
            self._snapshot = None
            if self._gate is not None and passage is not None:
                self._gate.end(passage)
            raise
        while self._snapshot is snapshot:
            await self._delivery()
        self._raise_error()
        if snapshot.error is not None:
            raise snapshot.error
        return snapshot.version

    def _delivery(self) -> asyncio.Future[None]:
        """What is done when anything of this worker is delivered."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        return waiter

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    async def _wait(self, wait: Awaitable[T], reason: str) -> T:
        """Waits for the scheduler: such time is not the worker's own."""
        self._busy_since = None
        start = perf_counter_ns()
        try:
            return await wait
        finally:
            self._set_busy()
            timeline = self._dispatch.timeline
            if timeline is not None:
                timeline.add_wait(self.index, reason, start, perf_counter_ns())


class ScheduledContext(WorkerContext):
    """A context as the scheduler has it, which begins and ends the worker's iterations.

    Attributes:
        overdue: Whether this iteration has taken longer than the deadline.
    """

    overdue = False

    def begin(self) -> bool:
        """Begins an iteration; whether it has read the parameters already, without ``read``."""
        self.overdue = False
        current = self._current = Iteration()
        if not self._reads_at_once:
            return False
        current.read_version = self._dispatch.shared.version
        if self._deadline is not None:
            self._set_busy()
        return True

    async def read(self) -> None:
        """Reads the parameters as soon as the policy lets it."""
        current = self._current
        assert current is not None
        if self._gate is not None:
            current.passage = await self._wait(self._gate.begin(), self._gate.reason)
            current.read_version = current.passage.read_version
        if self._dispatch.settings.read == "snapshot":
            current.read_version = await self._wait(self._take_snapshot(self.flat), "snapshot")

    def end(self) -> None:
        """Ends an iteration that has returned.

        Raises:
            RuntimeError: If it has not submitted a gradient, or not to the end.
        """
        current = self._current
        if current is None or current.enqueued != current.updates:
            if current is not None and current.submitted:
                raise RuntimeError("it returned before submit did: await that")
            if current is None or not current.has_made:
                raise RuntimeError("it returned without submitting a gradient")
            self._budget.give_back(1)
        else:
            self._finished += 1
        self._current = None
        self._busy_since = None

    def abandon(self) -> bool:
        """Gives up an iteration that failed; whether an update was enqueued all the same."""
        self._end_burst(self._burst)
        current, self._current = self._current, None
        self._busy_since = None
        self._error = None
        if current is None:
            self._budget.give_back(1)
            return False
        self._budget.give_back(current.updates - current.enqueued)
        current.updates = current.enqueued  # should its submit still wait, it ends there
        if current.enqueued:
            self._finished += 1
        elif self._gate is not None and current.passage is not None:
            self._gate.end(current.passage)
        return current.enqueued > 0 or current.has_made

    def retire(self) -> None:
        """Its run has ended: whoever kept it can do nothing with it any more."""
        self._retired = True

    def becomes_overdue(self, now: float, blocked: float) -> bool:
        """Whether the worker takes longer than the deadline, and was not known to.

        Args:
            now: By ``time.perf_counter``.
            blocked: How many seconds the event loop was blocked since the last call: that is no
                worker's own fault.
        """
        if self._deadline is None or self._busy_since is None or self.overdue:
            return False
        self._busy_since += blocked
        late = self._busy_since < now - self._deadline
        if late and self._in_flight:
            # It may wait for an event of its lane; nothing there may wait for a batch meanwhile.
            self._dispatch.flush(self.index)
            return False
        self.overdue = late
        return late


def _call(function: Callable[..., T], args: Sequence[Any], kwargs: Mapping[str, Any]) -> T:
    """Calls a function on a worker's thread."""
    try:
        return function(*args, **kwargs)
    except StopIteration as stop:  # which no future can carry
        raise RuntimeError(f"{function!r} raised StopIteration") from stop


def _compute(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Gradient, Any]:
    """Calls one there that computes a gradient.

    Raises:
        TypeError: If it returns something else than a gradient and a loss.
    """
    result = _call(function, args, kwargs)
    if not isinstance(result, tuple) or len(result) != 2:
        got = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise TypeError(f"function must return a tuple of a gradient and a loss or None, got {got}")
    if isinstance(result[0], (list, tuple)):  # for which there is no room in the run's budget
        raise TypeError(f"function must return one gradient, got a {type(result[0]).__name__}")
    return result


def _checked_loss(loss: Any) -> float:
    """A loss that goes with an update: any number, also if it is not finite.

    Raises:
        TypeError: If it is something else.
    """
    if isinstance(loss, bool) or not hasattr(loss, "__float__"):
        raise TypeError(f"loss must be a number or None, got {loss!r}")
    return float(loss)


def _checked_losses(losses: Any, count: int) -> Sequence[float]:
    """The losses of so many updates."""
    if not isinstance(losses, (list, tuple)):
        raise TypeError(f"loss must be a list or tuple of numbers or None, got {losses!r}")
    if len(losses) != count:
        raise ValueError(f"loss must be {count} numbers, one of each gradient, got {len(losses)}")
    return [_checked_loss(loss) for loss in losses]


Worker = Callable[[WorkerContext], Awaitable[None]]
