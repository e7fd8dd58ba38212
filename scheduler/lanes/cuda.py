"""Lanes on a GPU: each a CUDA stream of its own, and one thread that sees updates land.

How many streams really run beside each other is up to ``CUDA_DEVICE_MAX_CONNECTIONS``: 8, or up to
32 if the environment says so before CUDA starts. Further lanes share a connection, and wait there
for each other; nothing but speed depends on it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from hogstream.scheduler.lanes.base import Deliver, LaneSettings, Position, Queue
from hogstream.scheduler.lanes.cuda_graphs import RepeatCache, capture
from hogstream.scheduler.lanes.cuda_marks import DeviceClock, Mark, Pool
from hogstream.scheduler.lanes.cuda_streams import (
    copy_to_host,
    create_stream,
    destroy_stream,
    make_current,
)
from hogstream.scheduler.lanes.cuda_watcher import EventWatcher
from hogstream.scheduler.lanes.mutex import Mutex
from hogstream.scheduler.lanes.process_lock import ProcessLock
from hogstream.scheduler.update import Snapshot, Update, Work

_GRAPHS = 256
_LOCK_SLICE_SECONDS = 1.0


class CudaLane:
    """A lane that is a CUDA stream, owned by it and not from torch's pool of 32.

    Attributes:
        index: Its number.
        stream: The stream.
        last: The batch that its latest update was launched in, on this stream or another's.
        computes: Whether threads may launch on the stream too.
    """

    def __init__(self, index: int, stream: torch.cuda.Stream, lanes: CudaLanes) -> None:
        self.index = index
        self.stream = stream
        self.last: LaunchedBatch | None = None
        self.computes = False
        self._lanes = lanes
        self._queue = Queue()

    def launch(self, work: Work) -> None:
        """Enqueues an update or a snapshot, and launches it."""
        self.enqueue(work)
        self._lanes.flush((self.index,))

    def enqueue(self, work: Work) -> None:
        """Enqueues an update or a snapshot, to be launched at the next ``flush``."""
        self._queue.enqueued += 1
        maker = torch.cuda.current_stream(self.stream.device)
        self._lanes.enqueue(_Enqueued(self, work, maker))

    def deliver(self, landed: Sequence[Work]) -> None:
        """Delivers what has landed."""
        self._lanes.deliver(self.index, landed)
        self._queue.advance(len(landed))

    def computing(self) -> AbstractContextManager[object]:
        """Makes the lane's stream the current one, after the caller's current one."""
        self._check_open()
        self.computes = True
        _follow_current(self.stream)
        _wait_for(self.last, self.stream)
        return torch.cuda.stream(self.stream)

    def record_event(self) -> Any:
        """An event behind all that was enqueued on the lane.

        What waits for its batch is launched now. Under a lock of processes, updates are launched
        later, and it is a place in the queue.
        """
        self._check_open()
        self._lanes.flush((self.index,))
        if self._lanes.launches_later:
            return self._queue.position()
        _wait_for(self.last, self.stream)
        return self.stream.record_event(torch.cuda.Event())

    async def done(self, event: Any) -> None:
        """Waits until the device has come to an event."""
        if isinstance(event, Position):
            await Queue.done(event)
            return
        if not isinstance(event, torch.cuda.Event):
            raise TypeError(f"event must be a torch.cuda.Event, got {type(event).__name__}")
        if not event.cuda_event:
            raise ValueError("event must have been recorded, got one that was not")
        await self._lanes.watcher.done(event)

    def _check_open(self) -> None:
        if self._lanes.closed:
            raise RuntimeError("the lanes are closed: their streams are destroyed")


class _Enqueued(NamedTuple):
    """An update or a snapshot on a lane, and the stream that made its gradient."""

    lane: CudaLane
    work: Work
    maker: torch.cuda.Stream


class LaunchedBatch:
    """Updates that were launched together, from then until their delivery.

    Attributes:
        stream: Which they were launched on.
        mark: What they leave behind there; None if the launch failed, or once they were delivered.
        queues: They land in the order of their lanes, or of all if updates are ordered.
        landed: Set when they have.
    """

    def __init__(self, members: Sequence[_Enqueued], lanes: CudaLanes) -> None:
        self.stream = members[0].lane.stream
        self.mark: Mark | None = None
        self.queues: Collection[Hashable] = (
            ("ordered",) if lanes.settings.ordered else {each.lane.index for each in members}
        )
        self.landed = threading.Event()
        self._members = members
        self._lanes = lanes
        self._prepared: _Prepared | None = None

    def launch(self, prepared: _Prepared, ready: Sequence[torch.cuda.Event]) -> None:
        """Launches them behind what made their gradients, and behind what their lanes did before.

        Args:
            prepared: What to launch.
            ready: Behind what made the gradients.
        """
        mark, stream, lanes = prepared.marks.take(), self.stream, self._lanes
        before = {each.lane.last for each in self._members}
        if lanes.settings.ordered:
            before.add(lanes.last)
        for event in ready:
            stream.wait_event(event)
        for batch in before:
            _wait_for(batch, stream)
        started_ns = time.perf_counter_ns()
        with torch.cuda.stream(stream):
            if mark.started is not None:
                mark.started.record(stream)
            prepared.launch()
            if mark.verdicts is not None and prepared.verdicts is not None:
                copy_to_host(mark.verdicts, prepared.verdicts, stream)
            mark.landed.record(stream)
        self.mark, self._prepared = mark, prepared
        for each in self._members:
            each.lane.last = self
            each.work.started_ns = started_ns
        lanes.last = self

    def fail(self, error: BaseException) -> None:
        """Makes an error that of every update."""
        for each in self._members:
            each.work.error = each.work.error or error

    def query(self) -> bool:
        """Whether they have landed."""
        return self.mark is None or bool(self.mark.landed.query())

    def land(self, error: BaseException | None) -> None:
        """Counts them, and notes when they landed and what became of them."""
        left_out = [0] * len(self._members)
        if error is not None:
            self._lanes.failed = True
            self.fail(error)
        elif self.mark is not None:
            self._read_times(self.mark)
            if self.mark.verdicts is not None:
                left_out = self.mark.verdicts.tolist()
        shared, now = self._lanes.settings.shared, time.perf_counter_ns()
        for (_, work, _), verdict in zip(self._members, left_out, strict=True):
            work.landed_ns = work.landed_ns or now
            work.started_ns = work.started_ns or now
            if work.error is not None or isinstance(work, Snapshot):
                continue
            work.nonfinite = verdict != 0
            if not work.nonfinite:
                work.staleness = shared.land(work.read_version)
        self.landed.set()

    def deliver(self) -> None:
        """Delivers them by lane, and lets go of all that the launch needed."""
        members, self._members = self._members, ()
        mark, self.mark = self.mark, None
        prepared, self._prepared = self._prepared, None
        if mark is not None and prepared is not None:
            prepared.marks.give_back(mark)
        landed: dict[CudaLane, list[Work]] = {}
        for lane, work, _ in members:
            landed.setdefault(lane, []).append(work)
        for lane, works in landed.items():
            lane.deliver(works)

    def _read_times(self, mark: Mark) -> None:
        """Has the device say when it began with them and when they landed, if it took the time."""
        clock = self._lanes.clock
        if clock is None or mark.started is None:
            return
        started_ns, landed_ns = clock.read(mark.started), clock.read(mark.landed)
        mark.landed = clock.follow(mark.landed)
        for _, work, _ in self._members:  # two clocks may differ by some microseconds
            work.started_ns = max(started_ns, work.submitted_ns)
            work.landed_ns = max(landed_ns, work.started_ns)


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What is launched on a stream, again and again if it is a graph.

    Attributes:
        launch: Launches it on the current stream.
        verdicts: Where it finds out, on the device, which updates to leave out; int32, shape
            (updates,).
        marks: What it leaves behind, with as many verdicts.
    """

    launch: Callable[[], None]
    verdicts: torch.Tensor | None
    marks: Pool[Mark]


class CudaLanes:
    """A stream for each lane, and the threads that they share.

    A batch of updates that comes again becomes a CUDA graph, launched on the stream of its first
    lane; unless ``lr`` depends on the staleness of each, which a graph could not know.

    Attributes:
        settings: What is the same for all updates.
        lanes: In order.
        deliver: Takes what has landed.
        watcher: Sees them land.
        clock: Tells when they did, if times are taken.
        last: The batch that was launched last on any lane.
        failed: Whether the device has.
        closed: Whether there are no streams any more.
    """

    def __init__(self, settings: LaneSettings, count: int, deliver: Deliver) -> None:
        device = settings.shared.flat.device
        if torch.version.hip is not None:
            raise ValueError(f"shared must be on a CUDA or CPU device, got ROCm's {device}")
        self.settings = settings
        self.deliver = deliver
        self.clock: DeviceClock | None = None
        self.last: LaunchedBatch | None = None
        self.failed = self.closed = False
        self._device = device
        self._enqueued: list[_Enqueued] = []
        self._events = Pool(torch.cuda.Event)
        self._marks = self._pool_of_marks(1)
        self._graphs: RepeatCache[_Prepared] = RepeatCache(_GRAPHS)
        self._capturing: list[torch.cuda.Stream] = []
        self._launcher: _LockingLauncher | None = None
        self.lanes: list[CudaLane] = []
        self.watcher = EventWatcher()
        try:
            if settings.check_finite:
                self._verdicts = torch.empty(count, dtype=torch.int32, device=device).split(1)
            for index in range(count):
                lane = CudaLane(index, create_stream(device), self)
                self.lanes.append(lane)
                _follow_current(lane.stream)  # which may still be making what lanes use
            if settings.timed:
                self.clock = DeviceClock(
                    self.lanes[0].stream.record_event(torch.cuda.Event(enable_timing=True))
                )
            if settings.lock is not None:
                self._launcher = _LockingLauncher(settings.lock, self)
        except BaseException:
            self.close()
            raise

    @property
    def launches_later(self) -> bool:
        """Whether updates are launched on a thread that has to wait first."""
        return self._launcher is not None

    def enqueue(self, enqueued: _Enqueued) -> None:
        """Keeps an update or a snapshot, to be launched at the next ``flush`` of its lane."""
        self._enqueued.append(enqueued)

    def flush(self, lanes: Sequence[int]) -> None:
        """Launches what was enqueued on some lanes, as one graph if it comes again."""
        chosen = [each for each in self._enqueued if each.lane.index in lanes]
        if not chosen:
            return
        self._enqueued = [each for each in self._enqueued if each.lane.index not in lanes]
        try:
            ready = self._record_makers(chosen)
        except BaseException as error:
            self.fail(chosen, error)
            return
        if self._launcher is None:
            self.launch(chosen, ready)
        else:
            self._launcher.enqueue(chosen, ready)

    def launch(
        self, members: Sequence[_Enqueued], ready: Sequence[torch.cuda.Event]
    ) -> list[LaunchedBatch]:
        """Launches updates and snapshots; whatever goes wrong is their error.

        Args:
            members: In the order of their lanes.
            ready: Behind what made their gradients; to be used again.
        """
        batches: list[LaunchedBatch] = []
        for _, group in groupby(members, lambda each: isinstance(each.work, Snapshot)):
            batches += self._launch_group(list(group), ready)
        for event in ready:  # what waits for it does not wait for what is recorded later
            self._events.give_back(event)
        return batches

    def fail(self, members: Sequence[_Enqueued], error: BaseException) -> LaunchedBatch:
        """Has updates land with an error in place of a launch, in their order on the lanes."""
        batch = LaunchedBatch(members, self)
        batch.fail(error)
        self.watcher.watch(batch)
        return batch

    def close(self) -> None:
        """Ends the threads, and destroys every stream and event."""
        self.closed = True
        with ExitStack() as each:  # also if one fails; the last comes first
            for stream in [*(lane.stream for lane in self.lanes), *self._capturing]:
                each.callback(self._destroy, stream)
            for kept in (self._graphs, self._marks, self._events):
                each.callback(kept.clear)
            each.callback(self.watcher.close)
            if self._launcher is not None:
                each.callback(self._launcher.close)

    def _destroy(self, stream: torch.cuda.Stream) -> None:
        try:
            destroy_stream(stream)
        except RuntimeError:
            if not self.failed:  # else its streams are gone with it, and updates carry the error
                raise

    def _record_makers(self, members: Sequence[_Enqueued]) -> list[torch.cuda.Event]:
        """Events behind what makes the gradients, on all streams that may."""
        makers = dict.fromkeys(each.maker for each in members)
        if len(members) > 1:  # else it is launched on the lane's own stream
            makers.update((each.lane.stream, None) for each in members if each.lane.computes)
        return [maker.record_event(self._events.take()) for maker in makers]

    def _launch_group(
        self, group: list[_Enqueued], ready: Sequence[torch.cuda.Event]
    ) -> Sequence[LaunchedBatch]:
        """Launches updates together, as a graph if they come again; or snapshots."""
        if not self.settings.ordered:  # else the order among lanes matters too
            group.sort(key=lambda each: each.lane.index)
        try:
            graph = self._find_graph(group)
        except BaseException as error:
            return [self.fail(group, self._explain(error))]
        if graph is not None:
            return [self._launch_batch(group, graph, ready)]
        return [self._launch_batch([each], self._prepare(each), ready) for each in group]

    def _launch_batch(
        self,
        members: Sequence[_Enqueued],
        prepared: _Prepared,
        ready: Sequence[torch.cuda.Event],
    ) -> LaunchedBatch:
        batch = LaunchedBatch(members, self)
        try:
            batch.launch(prepared, ready)
        except BaseException as error:
            batch.fail(self._explain(error))
        self.watcher.watch(batch)  # failed or not, it lands, and nobody waits for ever
        return batch

    def _explain(self, error: BaseException) -> BaseException:
        """The error, or what did not fit if memory ran out."""
        if not isinstance(error, RuntimeError) or "out of memory" not in str(error):
            return error
        shared = self.settings.shared
        dtype = str(shared.flat.dtype).removeprefix("torch.")
        explained = MemoryError(
            f"no memory on {self._device} to launch an update of {shared.elements:,} {dtype} "
            f"elements with: {error}"
        )
        explained.__cause__ = error
        return explained

    def _find_graph(self, group: Sequence[_Enqueued]) -> _Prepared | None:
        """The graph of updates that have come before; None if they are launched one by one."""
        updates = [(lane, work) for lane, work, _ in group if isinstance(work, Update)]
        if len(updates) < 2 or self.settings.staleness_aware:
            return None
        numbers = updates[0][1].hyperparameters
        key: list[Hashable] = [numbers]  # and what is the same for all: the settings
        for lane, update in updates:
            if update.hyperparameters is not numbers:
                return None
            if update.checked.table.updates > 1:  # a graph would keep a copy of the table for ever
                return None
            key += lane.index, update.checked.memory
        return self._graphs.find(tuple(key), partial(self._capture, updates))

    def _capture(self, updates: Sequence[tuple[CudaLane, Update]]) -> _Prepared:
        """Captures updates: those of a lane one after the other, and lanes beside each other."""
        verdicts: Sequence[torch.Tensor | None] = [None] * len(updates)
        found = None
        if self.settings.check_finite:
            found = torch.empty(len(updates), dtype=torch.int32, device=self._device)
            _follow_current(updates[0][0].stream)  # where others may still use that memory
            verdicts = found.split(1)
        branches: dict[Hashable, list[Callable[[], None]]] = {}
        for (lane, update), verdict in zip(updates, verdicts, strict=True):
            branch = branches.setdefault(None if self.settings.ordered else lane.index, [])
            branch.append(partial(self._update, update, verdict))
        while len(self._capturing) < len(branches):
            self._capturing.append(create_stream(self._device))
        graph = capture(list(branches.values()), self._capturing[: len(branches)])
        return _Prepared(graph.replay, found, self._pool_of_marks(len(updates)))

    def _prepare(self, enqueued: _Enqueued) -> _Prepared:
        """One update, or a snapshot, to be launched by itself."""
        work = enqueued.work
        if isinstance(work, Snapshot):
            return _Prepared(partial(self._take, work), None, self._marks)
        verdict = self._verdicts[enqueued.lane.index] if self.settings.check_finite else None
        return _Prepared(partial(self._update, work, verdict), verdict, self._marks)

    def _take(self, snapshot: Snapshot) -> None:
        shared = self.settings.shared
        snapshot.version = shared.version
        snapshot.target.copy_(shared.flat, non_blocking=True)

    def _update(self, update: Update, verdict: torch.Tensor | None) -> None:
        settings, numbers = self.settings, update.hyperparameters
        staleness = settings.shared.version - update.read_version
        if settings.staleness_aware and staleness > 1:
            numbers = replace(numbers, lr=numbers.lr / staleness)
        settings.backend.kernel(
            update.checked.table, numbers, counters=settings.races, verdict=verdict
        )

    def _pool_of_marks(self, updates: int) -> Pool[Mark]:
        verdicts = updates if self.settings.check_finite else 0
        return Pool(partial(Mark, timed=self.settings.timed, verdicts=verdicts))


class _LockingLauncher:
    """A thread that launches under a lock, and holds it until all have landed.

    It waits for the lock, and so the event loop need not. It must be one thread: a mutex is
    released by the thread that took it.
    """

    def __init__(self, lock: Mutex | ProcessLock, lanes: CudaLanes) -> None:
        self._lock = lock
        self._lanes = lanes
        self._batches: SimpleQueue[tuple[Sequence[_Enqueued], Sequence[torch.cuda.Event]] | None]
        self._batches = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="hogstream-launcher", daemon=True)
        self._thread.start()

    def enqueue(self, members: Sequence[_Enqueued], ready: Sequence[torch.cuda.Event]) -> None:
        """Enqueues what to launch together."""
        self._batches.put((members, ready))

    def close(self) -> None:
        """Ends the thread, once all that it was given has landed."""
        self._batches.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._batches.get()) is not None:
            self._launch_locked(*batch)
            del batch  # and gradients, while the thread waits for the next

    def _launch_locked(
        self, members: Sequence[_Enqueued], ready: Sequence[torch.cuda.Event]
    ) -> None:
        try:
            make_current(self._lanes.settings.shared.flat.device)
            while not self._lock.acquire(_LOCK_SLICE_SECONDS):
                pass
        except BaseException as error:
            self._lanes.fail(members, error)
            return
        for batch in self._lanes.launch(members, ready):
            batch.landed.wait()
        self._lock.release()


def _follow_current(stream: torch.cuda.Stream) -> None:
    """Has a stream wait for what the current one has been given."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))


def _wait_for(batch: LaunchedBatch | None, stream: torch.cuda.Stream) -> None:
    """Has a stream wait for a batch on another one, if that was not delivered yet."""
    mark = None if batch is None or batch.stream is stream else batch.mark
    if mark is not None:
        stream.wait_event(mark.landed)
