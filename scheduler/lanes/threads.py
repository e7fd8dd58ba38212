"""Lanes of the NumPy backend: CPU threads that call the update from Python."""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch

from hogstream.kernels.backends.floating_point import FloatingPointMode, InMode
from hogstream.kernels.backends.numpy_kernels import all_finite
from hogstream.kernels.backends.select import select_row_backend
from hogstream.kernels.row_table import RowTable
from hogstream.kernels.rows import RowUpdate
from hogstream.scheduler.lanes.base import CpuLane, Deliver, LaneSettings, Queue, Wakeup
from hogstream.scheduler.update import Snapshot, Update, Work

_LOCK_SLICE_SECONDS = 1.0


class _Launched(NamedTuple):
    """Work that a lane was given to do.

    Attributes:
        work: An update or a snapshot.
        after: Set when that which it waits for has landed; None if it waits for nothing.
        landed: Set when it has landed itself.
    """

    work: Work
    after: threading.Event | None
    landed: threading.Event


class ThreadLane(CpuLane):
    """A lane that is a thread: takes updates in order and applies each, free of the GIL.

    Attributes:
        applier: As of any lane.
    """

    def __init__(self, index: int, lanes: ThreadLanes) -> None:
        self.applier = None if lanes.ordered else _Applier(lanes)
        self._index = index
        self._lanes = lanes
        self._queue = Queue()
        self._enqueued: deque[Work] = deque()
        self._taken: list[_Launched] = []
        self._launched: SimpleQueue[list[_Launched] | None] = SimpleQueue()
        self._landed: deque[Work] = deque()
        self._thread = threading.Thread(
            target=self._run, name=f"hogstream-lane-{index}", daemon=True
        )
        self._thread.start()

    def launch(self, work: Work) -> None:
        """Enqueues an update or a snapshot, and launches it."""
        self._queue.enqueued += 1
        self._launched.put([self._lanes.take_turn(work)])

    def launch_all(self, works: Sequence[Work]) -> None:
        """Does that with several at once."""
        self._queue.enqueued += len(works)
        self._launched.put([self._lanes.take_turn(work) for work in works])

    def enqueue(self, work: Work) -> None:
        """Enqueues an update or a snapshot, to be launched at the next ``flush``."""
        self._queue.enqueued += 1
        self._enqueued.append(work)

    def flush(self) -> None:
        """Launches what was enqueued."""
        self._lanes.flush([self._index] * len(self._enqueued))

    def take_next(self) -> None:
        """Gives what was enqueued first its turn; ``publish`` launches it."""
        if self._enqueued:
            self._taken.append(self._lanes.take_turn(self._enqueued.popleft()))

    def publish(self) -> None:
        """Launches what was given its turn."""
        if self._taken:
            self._launched.put(self._taken)
            self._taken = []

    def deliver(self) -> None:
        """Delivers what has landed."""
        landed = [self._landed.popleft() for _ in range(len(self._landed))]
        if landed:
            self._queue.advance(len(landed))
            self._lanes.deliver(self._index, landed)

    def close(self) -> None:
        """Ends the thread, once all on its queue has landed."""
        self._launched.put(None)
        self._thread.join()

    def _run(self) -> None:
        self._lanes.mode.set()
        while (batch := self._launched.get()) is not None:
            for launched in batch:
                if launched.after is not None:
                    launched.after.wait()
                self._lanes.apply(launched.work)
                self._landed.append(launched.work)
                self._lanes.wakeup.request()
                launched.landed.set()
            del batch, launched  # and gradients, while the lane waits for the next


class _Applier:
    """Applies updates on the thread that computes them, in the mode of a lane's."""

    def __init__(self, lanes: ThreadLanes) -> None:
        self._lanes = lanes
        self._mode = InMode(lanes.mode)

    def apply(self, update: Update) -> None:
        """Applies an update, and does not deliver it."""
        with self._mode:
            self._lanes.apply(update)


class ThreadLanes:
    """A thread for each lane.

    Attributes:
        deliver: Takes what has landed.
        wakeup: Has that delivered.
        mode: The floating-point mode of the thread that opens them.
        ordered: Whether each update waits for the one launched before it.
        lanes: In order.
    """

    def __init__(self, settings: LaneSettings, count: int, deliver: Deliver) -> None:
        self.deliver = deliver
        self.wakeup = Wakeup(self._deliver_landed)
        self.mode = FloatingPointMode()
        self.ordered = settings.ordered
        self._settings = settings
        self._last: threading.Event | None = None  # of what was launched last on any lane
        self.lanes: list[ThreadLane] = []
        try:
            for index in range(count):
                self.lanes.append(ThreadLane(index, self))
        except BaseException:
            self.close()
            raise

    def take_turn(self, work: Work) -> _Launched:
        """Work with its place in the order of all, if updates are ordered."""
        landed = threading.Event()
        if not self.ordered:
            return _Launched(work, None, landed)
        after, self._last = self._last, landed
        return _Launched(work, after, landed)

    def flush(self, lanes: Sequence[int]) -> None:
        """Launches what was enqueued first on some lanes, as often as they are named."""
        for index in lanes:
            self.lanes[index].take_next()
        for index in dict.fromkeys(lanes):
            self.lanes[index].publish()

    def apply(self, work: Work) -> None:
        """Applies an update, or takes a snapshot; whatever goes wrong is its error."""
        lock = self._settings.lock
        try:
            while lock is not None and not lock.acquire(_LOCK_SLICE_SECONDS):
                pass
            try:
                work.started_ns = time.perf_counter_ns()
                if isinstance(work, Snapshot):
                    self._take(work)
                else:
                    self._update(work)
            finally:
                work.landed_ns = time.perf_counter_ns()
                if lock is not None:
                    lock.release()
        except BaseException as error:
            work.error = error

    def close(self) -> None:
        """Ends every thread."""
        for lane in self.lanes:
            lane.close()

    def _take(self, snapshot: Snapshot) -> None:
        shared, target = self._settings.shared, snapshot.target
        snapshot.version = shared.version
        if snapshot.rows is not None:
            _copy_rows(*snapshot.rows.parts)
            return
        # Not by torch, which may start threads of OpenMP for it, on each lane its own.
        ctypes.memmove(target.data_ptr(), shared.flat.data_ptr(), shared.flat.nbytes)

    def _update(self, update: Update) -> None:
        settings, shared = self._settings, self._settings.shared
        backend, table = settings.backend, update.checked.table
        if settings.check_finite and not all_finite(table):
            update.nonfinite = True
            return
        hyperparameters = update.hyperparameters
        staleness = shared.version - update.read_version
        if settings.staleness_aware and staleness > 1:
            hyperparameters = replace(hyperparameters, lr=hyperparameters.lr / staleness)
        if isinstance(table, RowTable):
            kernel = select_row_backend(backend.name, "cpu").kernel
            for part in table.parts:
                kernel(part, hyperparameters)
        else:
            backend.kernel(table, hyperparameters)
        update.staleness = shared.land(update.read_version)

    def _deliver_landed(self) -> None:
        try:
            for lane in self.lanes:
                lane.deliver()
        except BaseException:  # of a user's function: nobody else would deliver on other lanes
            self.wakeup.request()
            raise


def _copy_rows(part: RowUpdate) -> None:
    """Copies rows of a table to where their gradients are in an update."""
    table, copies = (each.view(torch.uint8).numpy() for each in part.operands[:2])
    np.take(table, part.rows.numpy(), axis=0, out=copies, mode="clip")  # without another copy
