"""Lanes on a machine with neither GPU nor Numba: CPU threads that call the kernel from Python."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from queue import SimpleQueue

from hogstream.kernels.backends.numpy_kernels import all_finite
from hogstream.scheduler.lanes.base import CpuLane, Deliver, LaneSettings, Queue, Wakeup
from hogstream.scheduler.update import Update

_LOCK_SLICE_SECONDS = 1.0


class ThreadLane(CpuLane):
    """A lane that is a thread: takes updates in order and applies each, free of the GIL."""

    def __init__(self, index: int, lanes: ThreadLanes) -> None:
        self._index = index
        self._lanes = lanes
        self._queue = Queue()
        self._put: list[Update] = []
        self._launched: SimpleQueue[list[Update] | None] = SimpleQueue()
        self._landed: deque[Update] = deque()
        self._thread = threading.Thread(
            target=self._carry_out, name=f"hogstream-lane-{index}", daemon=True
        )
        self._thread.start()

    def launch(self, update: Update) -> None:
        """Queues an update and launches it."""
        self.put(update)
        self.flush()

    def put(self, update: Update) -> None:
        """Queues an update, to be launched at the next ``flush``."""
        self._queue.put += 1
        self._put.append(update)

    def flush(self) -> None:
        """Hands over what was put."""
        if self._put:
            for update in self._put:
                update.on_device = threading.Event()
                update.after = self._lanes.take_turn(update)
            self._launched.put(self._put)
            self._put = []

    def collect(self) -> None:
        """Delivers what has landed."""
        landed = [self._landed.popleft() for _ in range(len(self._landed))]
        if landed:
            self._lanes.deliver(self._index, landed)
            self._queue.advance(len(landed))

    def close(self) -> None:
        """Ends the thread, once it is through with its queue."""
        self._launched.put(None)
        self._thread.join()

    def _carry_out(self) -> None:
        while (updates := self._launched.get()) is not None:
            for update in updates:
                if update.after is not None:
                    update.after.on_device.wait()
                    update.after = None  # or each update would keep all before it alive
                self._lanes.apply(update)
                self._landed.append(update)
                self._lanes.wakeup.request()
                update.on_device.set()
            del updates, update  # and gradients, while the lane waits for the next


class ThreadLanes:
    """A thread for each lane."""

    def __init__(self, settings: LaneSettings, count: int, deliver: Deliver) -> None:
        self.deliver = deliver
        self.wakeup = Wakeup(self._collect)
        self._settings = settings
        self._last: Update | None = None
        self.lanes: list[ThreadLane] = []
        try:
            for index in range(count):
                self.lanes.append(ThreadLane(index, self))
        except BaseException:
            self.close()
            raise

    def take_turn(self, update: Update) -> Update | None:
        """The update that this one waits for, if updates are ordered."""
        if not self._settings.ordered:
            return None
        before, self._last = self._last, update
        return before

    def flush(self, lanes: Sequence[int]) -> None:
        """Hands over what was put on some lanes."""
        for index in lanes:
            self.lanes[index].flush()

    def apply(self, update: Update) -> None:
        """Carries out an update on the calling thread; whatever goes wrong is its error."""
        lock = self._settings.lock
        try:
            while lock is not None and not lock.acquire(_LOCK_SLICE_SECONDS):
                pass
            try:
                update.started_ns = time.perf_counter_ns()
                if update.checked is None:
                    self._copy(update)
                else:
                    self._update(update)
            finally:
                update.landed_ns = time.perf_counter_ns()
                if lock is not None:
                    lock.release()
        except BaseException as error:
            update.error = error

    def close(self) -> None:
        """Ends every thread."""
        for lane in self.lanes:
            lane.close()

    def _copy(self, update: Update) -> None:
        update.staleness = self._settings.shared.version
        update.tensor.copy_(self._settings.shared.flat)

    def _update(self, update: Update) -> None:
        assert update.checked is not None
        settings, shared = self._settings, self._settings.shared
        backend, table = settings.backend, update.checked.table
        if settings.check_finite and not all_finite(table):
            update.nonfinite = True
            return
        hyperparameters = update.hyperparameters
        staleness = shared.version - update.read_version
        if settings.staleness_aware and staleness > 1:
            hyperparameters = replace(hyperparameters, lr=hyperparameters.lr / staleness)
        backend.kernel(table, hyperparameters)
        update.staleness = shared.land(update.read_version)

    def _collect(self) -> None:
        for lane in self.lanes:
            lane.collect()
