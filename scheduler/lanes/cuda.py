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
from hogstream.scheduler.lanes.process_lock import ProcessLock
from hogstream.scheduler.update import Update

_GRAPHS = 256
_LOCK_SLICE_SECONDS = 1.0


class CudaLane:
    """A lane that is a CUDA stream, owned by it and not from torch's pool of 32.

    Attributes:
        index: Its number.
        stream: The stream.
        last: The launch that its latest update was in, on this stream or another's.
        computes: Whether threads may launch on the stream too.
    """

    def __init__(self, index: int, stream: torch.cuda.Stream, lanes: CudaLanes) -> None:
        self.index = index
        self.stream = stream
        self.last: Launch | None = None
        self.computes = False
        self._lanes = lanes
        self._queue = Queue()

    def launch(self, update: Update) -> None:
        """Queues an update and launches it."""
        self.put(update)
        self._lanes.flush((self.index,))

    def put(self, update: Update) -> None:
        """Queues an update, to be launched at the next ``flush``."""
        self._queue.put += 1
        self._lanes.put(_Put(self, update, torch.cuda.current_stream(self.stream.device)))

    def deliver(self, landed: Sequence[Update]) -> None:
        """Hands on what has landed."""
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
        """An event behind all that was put on the lane; what waits for its batch is launched now.

        Under a lock of processes, updates are launched later, and it is a place in the queue.
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


class _Put(NamedTuple):
    """An update on a lane, and the stream that made its gradient."""

    lane: CudaLane
    update: Update
    maker: torch.cuda.Stream


class Launch:
    """Updates that were launched together, from then until their delivery.

    Attributes:
        stream: Which they were launched on.
        mark: What they leave behind there; None if the launch failed, or once it is through.
        queues: They land in the order of their lanes, or of all if updates are ordered.
        landed: Set when they have.
    """

    def __init__(self, puts: Sequence[_Put], lanes: CudaLanes) -> None:
        self.stream = puts[0].lane.stream
        self.mark: Mark | None = None
        self.queues: Collection[Hashable] = (
            ("ordered",) if lanes.settings.ordered else {put.lane.index for put in puts}
        )
        self.landed = threading.Event()
        self._puts = puts
        self._lanes = lanes
        self._work: _Work | None = None

    def send(self, work: _Work, ready: Sequence[torch.cuda.Event]) -> None:
        """Launches them behind what made their gradients, and behind what their lanes did before.

        Args:
            work: What to launch.
            ready: Behind what made the gradients.
        """
        mark, stream, lanes = work.marks.take(), self.stream, self._lanes
        before = {put.lane.last for put in self._puts}
        if lanes.settings.ordered:
            before.add(lanes.last)
        for event in ready:
            stream.wait_event(event)
        for launch in before:
            _wait_for(launch, stream)
        started_ns = time.perf_counter_ns()
        with torch.cuda.stream(stream):
            if mark.started is not None:
                mark.started.record(stream)
            work.launch()
            if mark.verdicts is not None and work.verdicts is not None:
                copy_to_host(mark.verdicts, work.verdicts, stream)
            mark.landed.record(stream)
        self.mark, self._work = mark, work
        for put in self._puts:
            put.lane.last = self
            put.update.started_ns = started_ns
        lanes.last = self

    def fail(self, error: BaseException) -> None:
        """Makes an error that of every update."""
        for put in self._puts:
            put.update.error = put.update.error or error

    def query(self) -> bool:
        """Whether the device is through with them."""
        return self.mark is None or bool(self.mark.landed.query())

    def land(self, error: BaseException | None) -> None:
        """Counts them, and notes when they landed and what became of them."""
        left_out = [0] * len(self._puts)
        if error is not None:
            self._lanes.failed = True
            self.fail(error)
        elif self.mark is not None:
            self._read_times(self.mark)
            if self.mark.verdicts is not None:
                left_out = self.mark.verdicts.tolist()
        shared, now = self._lanes.settings.shared, time.perf_counter_ns()
        for (_, update, _), verdict in zip(self._puts, left_out, strict=True):
            update.landed_ns = update.landed_ns or now
            update.started_ns = update.started_ns or now
            if update.error is not None or update.checked is None:
                continue
            update.nonfinite = verdict != 0
            if not update.nonfinite:
                update.staleness = shared.land(update.read_version)
        self.landed.set()

    def deliver(self) -> None:
        """Delivers them by lane, and lets go of all that the launch needed."""
        puts, self._puts = self._puts, ()
        mark, self.mark = self.mark, None
        work, self._work = self._work, None
        if mark is not None and work is not None:
            work.marks.give_back(mark)
        landed: dict[CudaLane, list[Update]] = {}
        for lane, update, _ in puts:
            landed.setdefault(lane, []).append(update)
        for lane, updates in landed.items():
            lane.deliver(updates)

    def _read_times(self, mark: Mark) -> None:
        """Has the device say when it began with them and when they landed, if it took the time."""
        clock = self._lanes.clock
        if clock is None or mark.started is None:
            return
        started_ns, landed_ns = clock.read(mark.started), clock.read(mark.landed)
        mark.landed = clock.follow(mark.landed)
        for _, update, _ in self._puts:  # two clocks may differ by some microseconds
            update.started_ns = max(started_ns, update.submitted_ns)
            update.landed_ns = max(landed_ns, update.started_ns)


@dataclass(frozen=True, eq=False)
class _Work:
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
        deliver: Takes what is through.
        watcher: Sees them land.
        clock: Tells when they did, if times are taken.
        last: The latest launch on any lane.
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
        self.last: Launch | None = None
        self.failed = self.closed = False
        self._device = device
        self._put: list[_Put] = []
        self._events = Pool(torch.cuda.Event)
        self._marks = self._pool_of_marks(1)
        self._graphs: RepeatCache[_Work] = RepeatCache(_GRAPHS)
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

    def put(self, put: _Put) -> None:
        """Queues an update, to be launched at the next ``flush`` of its lane."""
        self._put.append(put)

    def flush(self, lanes: Sequence[int]) -> None:
        """Launches what was put on some lanes, as one graph if it comes again."""
        chosen = [put for put in self._put if put.lane.index in lanes]
        if not chosen:
            return
        self._put = [put for put in self._put if put.lane.index not in lanes]
        try:
            ready = self._record_makers(chosen)
        except BaseException as error:
            self.fail(chosen, error)
            return
        if self._launcher is None:
            self.launch(chosen, ready)
        else:
            self._launcher.put(chosen, ready)

    def launch(self, puts: Sequence[_Put], ready: Sequence[torch.cuda.Event]) -> list[Launch]:
        """Launches updates and snapshots; whatever goes wrong is their error.

        Args:
            puts: In the order of their lanes.
            ready: Behind what made their gradients; to be used again.
        """
        launches: list[Launch] = []
        for _, group in groupby(puts, lambda put: put.update.checked is None):
            launches += self._launch_group(list(group), ready)
        for event in ready:  # what waits for it does not wait for what is recorded later
            self._events.give_back(event)
        return launches

    def fail(self, puts: Sequence[_Put], error: BaseException) -> Launch:
        """Has updates land with an error in place of a launch, in their order on the lanes."""
        launch = Launch(puts, self)
        launch.fail(error)
        self.watcher.watch(launch)
        return launch

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

    def _record_makers(self, puts: Sequence[_Put]) -> list[torch.cuda.Event]:
        """Events behind what makes the gradients, on all streams that may."""
        makers = dict.fromkeys(put.maker for put in puts)
        if len(puts) > 1:  # else it is launched on the lane's own stream
            makers.update((put.lane.stream, None) for put in puts if put.lane.computes)
        return [maker.record_event(self._events.take()) for maker in makers]

    def _launch_group(
        self, group: list[_Put], ready: Sequence[torch.cuda.Event]
    ) -> Sequence[Launch]:
        """Launches updates together, as a graph if they come again; or snapshots."""
        if not self.settings.ordered:  # else the order among lanes matters too
            group.sort(key=lambda put: put.lane.index)
        try:
            graph = self._find_graph(group)
        except BaseException as error:
            return [self.fail(group, self._explain(error))]
        if graph is not None:
            return [self._send(group, graph, ready)]
        return [self._send([put], self._make_work(put), ready) for put in group]

    def _send(self, puts: Sequence[_Put], work: _Work, ready: Sequence[torch.cuda.Event]) -> Launch:
        launch = Launch(puts, self)
        try:
            launch.send(work, ready)
        except BaseException as error:
            launch.fail(self._explain(error))
        self.watcher.watch(launch)  # failed or not, it lands, and nobody waits for ever
        return launch

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

    def _find_graph(self, group: Sequence[_Put]) -> _Work | None:
        """The graph of updates that have come before; None if they are launched one by one."""
        numbers = group[0].update.hyperparameters
        if len(group) == 1 or self.settings.staleness_aware:
            return None
        key: list[Hashable] = [numbers]  # and what is the same for all: the settings
        for lane, update, _ in group:
            if update.checked is None or update.hyperparameters is not numbers:
                return None
            key += lane.index, update.checked.address, update.checked.ms_address
        return self._graphs.find(tuple(key), partial(self._capture, group))

    def _capture(self, group: Sequence[_Put]) -> _Work:
        """Captures updates: those of a lane one after the other, and lanes beside each other."""
        verdicts: Sequence[torch.Tensor | None] = [None] * len(group)
        found = None
        if self.settings.check_finite:
            found = torch.empty(len(group), dtype=torch.int32, device=self._device)
            _follow_current(group[0].lane.stream)  # where others may still use that memory
            verdicts = found.split(1)
        branches: dict[Hashable, list[Callable[[], None]]] = {}
        for put, verdict in zip(group, verdicts, strict=True):
            branch = branches.setdefault(None if self.settings.ordered else put.lane.index, [])
            branch.append(partial(self._update, put.update, verdict))
        while len(self._capturing) < len(branches):
            self._capturing.append(create_stream(self._device))
        graph = capture(list(branches.values()), self._capturing[: len(branches)])
        return _Work(graph.replay, found, self._pool_of_marks(len(group)))

    def _make_work(self, put: _Put) -> _Work:
        """One update, or a snapshot, to be launched by itself."""
        update = put.update
        if update.checked is None:
            return _Work(partial(self._copy, update), None, self._marks)
        verdict = self._verdicts[put.lane.index] if self.settings.check_finite else None
        return _Work(partial(self._update, update, verdict), verdict, self._marks)

    def _copy(self, update: Update) -> None:
        shared = self.settings.shared
        update.staleness = shared.version
        update.tensor.copy_(shared.flat, non_blocking=True)

    def _update(self, update: Update, verdict: torch.Tensor | None) -> None:
        assert update.checked is not None
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
    """A thread that launches under a lock of processes, and holds it until all have landed.

    It waits for the lock, and so the event loop need not. It must be one thread: a robust mutex is
    released by the thread that took it.
    """

    def __init__(self, lock: ProcessLock, lanes: CudaLanes) -> None:
        self._lock = lock
        self._lanes = lanes
        self._batches: SimpleQueue[tuple[Sequence[_Put], Sequence[torch.cuda.Event]] | None]
        self._batches = SimpleQueue()
        self._thread = threading.Thread(
            target=self._carry_out, name="hogstream-launcher", daemon=True
        )
        self._thread.start()

    def put(self, puts: Sequence[_Put], ready: Sequence[torch.cuda.Event]) -> None:
        """Queues what to launch together."""
        self._batches.put((puts, ready))

    def close(self) -> None:
        """Ends the thread, once it is through with its queue."""
        self._batches.put(None)
        self._thread.join()

    def _carry_out(self) -> None:
        while (batch := self._batches.get()) is not None:
            self._launch_locked(*batch)
            del batch  # and gradients, while the thread waits for the next

    def _launch_locked(self, puts: Sequence[_Put], ready: Sequence[torch.cuda.Event]) -> None:
        try:
            make_current(self._lanes.settings.shared.flat.device)
            while not self._lock.acquire(_LOCK_SLICE_SECONDS):
                pass
        except BaseException as error:
            self._lanes.fail(puts, error)
            return
        for launch in self._lanes.launch(puts, ready):
            launch.landed.wait()
        self._lock.release()


def _follow_current(stream: torch.cuda.Stream) -> None:
    """Has a stream wait for what the current one has been given."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))


def _wait_for(launch: Launch | None, stream: torch.cuda.Stream) -> None:
    """Has a stream wait for a launch on another one, if that is not through."""
    mark = None if launch is None or launch.stream is stream else launch.mark
    if mark is not None:
        stream.wait_event(mark.landed)
