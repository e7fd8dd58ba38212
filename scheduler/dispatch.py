"""The way of an update, from a worker to its lane and back.

1. A worker *submits* a gradient (``context.py``), which is checked, and waits for room on the lane
   and for the policy's gate (``policies.py``). It is an ``Update`` then (``update.py``).
2. ``Dispatch.enqueue``, here: it is *enqueued* on the worker's lane, and *launched* by that: at
   once, or when its batch is complete.
3. ``lanes/``: ``compiled.py`` has it in a ring (``rings.py``), from which the compiled loop
   (``native_loop.py``) takes it. On a CPU (``native.py``) the loop applies it; on a GPU
   (``cuda.py``) it has the driver do so (``cuda_loop.py``). Where nothing is compiled, a Python
   thread applies it (``threads.py``). Once its writes are visible and its version is counted, it
   has *landed*.
4. The lane wakes the event loop and *delivers* what has landed to ``Dispatch.deliver``, here: it is
   taken down for the report (``report.py``) and a trace, and leaves the gate.
5. Its worker's context receives it last, and the worker goes on if it has waited for that.

Where nothing has to come between, a worker's thread computes and applies several updates, one after
the other, in a *burst* (``bursts.py``): without step 2, and with the code of step 3 on that thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

from hogstream.kernels.backends.select import Backend
from hogstream.scheduler.callbacks import Callbacks
from hogstream.scheduler.chunks import Chunk
from hogstream.scheduler.forks import forget_in_forks, let_go_in_forks, part_loop
from hogstream.scheduler.lanes.base import Lanes, LaneSettings
from hogstream.scheduler.lanes.factory import open_lanes, warm_up
from hogstream.scheduler.lanes.mutex import Mutex, RowLocks
from hogstream.scheduler.lanes.process_lock import ProcessLock
from hogstream.scheduler.parameters import SharedParameters
from hogstream.scheduler.policies import Gate, LockGate, Passage, make_gate, select_policy
from hogstream.scheduler.report import RunRecord
from hogstream.scheduler.schedules import ScheduledRate
from hogstream.scheduler.settings import SchedulerSettings
from hogstream.scheduler.thread_state import ThreadState, share_of_cores
from hogstream.scheduler.tracing.timeline import Timeline
from hogstream.scheduler.update import Snapshot, Update, Work
from hogstream.scheduler.worker_thread import WorkerThread

T = TypeVar("T")

#: Called with what is delivered of one worker.
Receive = Callable[[Sequence[Work]], None]


class Dispatch:
    """Enqueues what workers submit on their lanes, and takes back what is delivered.

    All methods are for the event loop's thread.

    Attributes:
        settings: How.
        policy: What an update waits for.
        shared: What is updated.
        hyperparameters: What updates are made with that are submitted from now on.
        rate: What gives them the learning rate of a run's schedule, if it has one.
        callbacks: Who hears of the run that goes on; None before the first.
        timeline: Takes down each update and wait, if there is one.
        process_lock: Held by a lane around each update, if there is one.
        low_water: A worker that has filled its lane goes on when no more updates than so many are
            left on it.
        torch_threads: How many threads torch uses for what computes for a worker; since ``open``.
        alone: Whether its one worker has the process for itself, and nobody has to watch it for a
            deadline: then it computes on the event loop's thread.
        lanes: One of each worker; None while they are not open.
        lane_settings: What is the same for all their updates; None before they are opened.
        gate: Where the policy makes updates wait on the host, if it does.
        receivers: Who receives what is delivered of a worker, by its index.
        counts_races_of_rows: Whether races of each row are counted apart, as on a GPU; since
            ``open``.
        on_close: What workers want to have called at last.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        shared: SharedParameters,
        timeline: Timeline | None,
        process_lock: ProcessLock | None,
        *,
        alone: bool,
    ) -> None:
        self.settings = settings
        self.policy = select_policy(settings.policy)
        self.shared = shared
        self.hyperparameters = settings.hyperparameters
        self.rate: ScheduledRate | None = None
        self.callbacks: Callbacks | None = None
        self.timeline = timeline
        self.process_lock = process_lock
        self.alone = alone
        # When half of its lane is free: so neither wakes the other for each update. Where updates
        # wait for their batch, they could wait for ever then.
        self.low_water = settings.depth // 2 if settings.batch == 1 else settings.depth - 1
        self.lanes: Lanes | None = None
        self.lane_settings: LaneSettings | None = None
        self.gate: Gate | None = None
        self.receivers: dict[int, Receive] = {}
        self.counts_races_of_rows = False
        self.on_close = ExitStack()
        self._batches_lanes = settings.batch > 1 and settings.batch_of == "lanes"
        self._batch = settings.batch
        self._raises_nonfinite = settings.on_nonfinite == "raise"
        self._record: RunRecord | None = None
        self._hears_losses = False
        self._threads: list[WorkerThread] = []
        self._nothing_under_way()

    def _nothing_under_way(self) -> None:
        self._enqueued: list[int] = []  # the lane of each update that waits for its batch
        self._flushes_soon = False
        self._submitting = 0  # workers that a batch may wait for
        self._under_way = 0  # updates and snapshots in flight, and blocking calls
        self._blocking: dict[int, list[Callable[[], None]]] = {}  # what ends each call, by worker

    async def open(self, backend: Backend) -> None:
        """Opens the lanes, and compiles the kernel before any worker can need it.

        Whatever goes wrong, ``close`` must follow.

        Args:
            backend: With which kernels.
        """
        settings, shared, policy = self.settings, self.shared, self.policy
        self.gate = make_gate(policy, lambda: shared.version)
        self._loop = asyncio.get_running_loop()
        self._forked = False  # and what is under way, in this child of a fork, is the parent's
        self._idle = asyncio.Event()
        self._nothing_under_way()
        self.torch_threads = share_of_cores(settings.workers)
        self._thread_state = ThreadState(self.torch_threads)
        self._threads = [self._make_thread(worker) for worker in range(settings.workers)]
        let_go_in_forks(self)
        row_locks = RowLocks() if policy.row_locked else None
        races = None
        if settings.telemetry:
            self.counts_races_of_rows = backend.name == "triton"
            by_blocks = row_locks is not None and not self.counts_races_of_rows
            races = shared.count_races_with(backend, RowLocks.block if by_blocks else None)
            if not self.counts_races_of_rows:
                shared.count_stale_rows()
        of_lanes = LaneSettings(
            shared=shared,
            backend=backend,
            ordered=policy.ordered,
            staleness_aware=settings.staleness_aware,
            check_finite=settings.on_nonfinite != "apply",
            races=races,
            lock=self.process_lock or (Mutex() if policy.locked else None),
            row_locks=row_locks,
            low_water=self.low_water,
            graphs=settings.batch > 1,
            timed=self.timeline is not None,
            inline=self.alone and settings.depth == 1,
        )
        self.lane_settings = of_lanes
        await self.run_blocking(0, partial(warm_up, of_lanes, self.hyperparameters))
        self.lanes = open_lanes(of_lanes, settings.workers, settings.depth + 1, self.deliver)
        shared.users += 1

    def close(self) -> None:
        """Closes the lanes; nothing may be under way."""
        forget_in_forks(self)
        for thread in self._threads:
            thread.close()
        if self.lanes is not None:
            self.lanes.close()
            self.lanes = None
            self.shared.users -= 1
        self.on_close.close()

    def let_go(self) -> None:
        """Leaves, in a child of ``os.fork``, what is under way to the parent."""
        part_loop(self._loop)
        self._forked = True
        self._idle.set()

    def begin_run(
        self, record: RunRecord, callbacks: Callbacks, rate: ScheduledRate | None
    ) -> None:
        """All workers submit from here on.

        Args:
            record: Takes down what is delivered.
            callbacks: Who hears of it.
            rate: What gives updates their learning rate, if not the hyperparameters.
        """
        self._record, self.callbacks, self.rate = record, callbacks, rate
        self._hears_losses = callbacks.hears_losses
        self._submitting = self.settings.workers

    def end_run(self) -> None:
        """Ends that; nothing may be under way."""
        self._record = self.rate = None

    def leave(self) -> None:
        """One worker less submits, for now or for good: no batch waits for it."""
        self._submitting -= 1
        self.flush()

    def come_back(self) -> None:
        """One that had left submits again."""
        self._submitting += 1

    def enqueue(self, work: Work) -> None:
        """Enqueues work on its worker's lane, which launches it once its batch is complete."""
        assert self.lanes is not None
        worker = work.worker
        lane = self.lanes.lanes[worker]
        if self._batch == 1:
            lane.launch(work)
            self._under_way += 1
            return
        lane.enqueue(work)
        self._under_way += 1
        self._enqueued.append(worker)
        if isinstance(work, Snapshot):
            self.flush(None if self._batches_lanes else worker)
        elif not self._batches_lanes:
            if self._enqueued.count(worker) == self._batch:
                self.flush(worker)
        elif self._is_complete() and not self._flushes_soon:
            self._flushes_soon = True
            self._loop.call_soon(self._flush_complete)

    def enqueue_several(self, updates: Sequence[Update]) -> None:
        """Enqueues updates of one worker on its lane, which launches them at once or in batches."""
        if self._batch > 1:
            for update in updates:
                self.enqueue(update)
            return
        assert self.lanes is not None
        worker = updates[0].worker
        self.lanes.lanes[worker].launch_all(updates)
        self._under_way += len(updates)

    def flush(self, worker: int | None = None) -> None:
        """Launches what waits for a batch: of one worker, or of all."""
        chosen = [each for each in self._enqueued if worker in (None, each)]
        if chosen:
            assert self.lanes is not None
            self._enqueued = [each for each in self._enqueued if worker not in (None, each)]
            self.lanes.flush(chosen)

    def _is_complete(self) -> bool:
        """Whether so many updates of all workers wait as make a batch, or as there can be."""
        most = self._submitting * self.settings.depth
        return 0 < min(self._batch, most) <= len(self._enqueued)

    def _flush_complete(self) -> None:
        """Launches complete batches of all workers: one update of each in turn, and again.

        It is called when every worker has had its turn on the event loop: so a batch is of updates
        beside each other, and not of all that one worker has ready.
        """
        assert self.lanes is not None
        self._flushes_soon = False
        before = [0] * self.settings.workers
        turns = []
        for place, worker in enumerate(self._enqueued):
            turns.append((before[worker], place, worker))
            before[worker] += 1
        turns.sort()
        self._enqueued = [worker for _, _, worker in turns]
        while self._is_complete():
            chosen = self._enqueued[: self._batch]
            del self._enqueued[: self._batch]
            self.lanes.flush(chosen)

    def _make_thread(self, worker: int) -> WorkerThread:
        return WorkerThread(f"hogstream-worker-{worker}", self._thread_state)

    def deliver(self, lane: int, landed: Sequence[Work]) -> None:
        """Takes note of what has landed on a lane; its worker's context receives it last."""
        record, gate = self._record, self.gate
        assert record is not None  # a run ends only when all its updates have landed
        try:
            if self._raises_nonfinite:
                _raise_nonfinite(landed)
            record.add(lane, landed)
            if gate is not None:
                for work in landed:
                    if work.passage is not None:
                        gate.end(work.passage)
            if self.timeline is not None:
                for work in landed:
                    if isinstance(work, Update):
                        _add_to_timeline(self.timeline, work)
            if self._hears_losses and self.callbacks is not None:
                self.callbacks.note_landed(landed)
        finally:
            self.receivers[lane](landed)
            self._end(len(landed))

    async def snapshot_passage(self) -> Passage | None:
        """Waits for the lock, under a policy that has one on the host: a snapshot is whole then."""
        if not isinstance(self.gate, LockGate):
            return None
        passage = await self.gate.begin()
        await self.gate.admit(passage)
        return passage

    def deliver_applied(self, worker: int, landed: Sequence[Update]) -> None:
        """Takes note of what a worker's thread has applied itself, as if its lane delivered it."""
        self._under_way += len(landed)
        self.deliver(worker, landed)

    def deliver_chunk(self, worker: int, chunk: Chunk) -> None:
        """Takes note of a chunk that has ended."""
        record = self._record
        assert record is not None  # a run ends only when nothing is under way
        record.add_chunk(worker, chunk.of)
        if self.timeline is not None and chunk.ended_ns:
            times = chunk.started_ns, chunk.started_ns, chunk.ended_ns
            self.timeline.add_update(worker, worker, *times, 0, f"chunk of {chunk.made}")
        if self._hears_losses and self.callbacks is not None and chunk.loss is not None:
            self.callbacks.report_loss(worker, chunk.loss)

    async def run_blocking(
        self, worker: int, call: Callable[[], T], on_end: Callable[[], object] | None = None
    ) -> T:
        """Calls a function on a worker's thread, or on this one for a worker alone.

        Args:
            worker: Its index.
            call: What to call.
            on_end: Called here when that has returned or raised, before it counts as ended, even if
                nobody waits for it any more.
        """
        if self.alone:
            try:
                return call()
            finally:
                if on_end is not None:
                    on_end()
        self._under_way += 1
        calls = self._blocking.setdefault(worker, [])

        def end() -> None:
            if end in calls:  # and was not left behind
                calls.remove(end)
                try:
                    if on_end is not None:
                        on_end()
                finally:
                    self._end()

        calls.append(end)
        try:
            future = self._threads[worker].call(call, end)
        except BaseException:  # such as no more threads
            end()
            raise
        result: T = await future
        return result

    def leave_thread(self, worker: int) -> bool:
        """Stops waiting for a worker's blocking calls, and gives it another thread.

        Returns:
            Whether there were any; else it keeps its thread.
        """
        calls = list(self._blocking.get(worker, ()))
        if calls:
            self._threads[worker].close(hangs=True)
            self._threads[worker] = self._make_thread(worker)
        for end in calls:
            end()
        return bool(calls)

    async def drain(self) -> None:
        """Waits until nothing is under way; may be begun again.

        Blocking calls that take longer than the deadline are left behind.
        """
        try:
            await asyncio.wait_for(self._until_idle(), self.settings.deadline)
        except asyncio.TimeoutError:
            for worker in range(self.settings.workers):
                if self.leave_thread(worker) and self._record is not None:
                    self._record.failures.setdefault(
                        worker, TimeoutError("a blocking call did not end; it was left behind")
                    )
            await self._until_idle()

    def _end(self, count: int = 1) -> None:
        """So many are under way no more."""
        self._under_way -= count
        if self._under_way == 0:
            self._idle.set()

    async def _until_idle(self) -> None:
        while self._under_way and not self._forked:
            self._idle.clear()
            await self._idle.wait()


def _raise_nonfinite(landed: Sequence[Work]) -> None:
    """Makes an error of each update that was left out."""
    for work in landed:
        if isinstance(work, Update) and work.nonfinite:
            work.error = FloatingPointError("a gradient held an infinity or NaN: it was left out")


def _add_to_timeline(timeline: Timeline, update: Update) -> None:
    outcome = "failed" if update.error else "left out" if update.nonfinite else "landed"
    timeline.add_update(
        update.worker,
        update.worker,
        update.submitted_ns,
        update.started_ns,
        update.landed_ns,
        update.staleness,
        outcome,
    )
