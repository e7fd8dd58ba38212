"""Lanes on a machine without a GPU: CPU threads that run compiled code, free of the GIL."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hogstream.kernels.backends.floating_point import FloatingPointMode
from hogstream.kernels.backends.numba_kernels import finite_function, update_function
from hogstream.kernels.hyperparameters import Factors, Hyperparameters
from hogstream.scheduler.lanes import native_loop
from hogstream.scheduler.lanes.base import CpuLane, Deliver, LaneSettings, Queue
from hogstream.scheduler.lanes.native_loop import (
    DONE,
    FACTORS,
    NONFINITE,
    OUTCOME,
    PARTS,
    READ_VERSION,
    ROW,
    ROWS,
    SOURCE,
    STARTED,
    UPDATE,
)
from hogstream.scheduler.lanes.signals import Signal
from hogstream.scheduler.update import Update, Work

_FORM_END = FACTORS + len(Factors._fields)
_SIGNAL_BYTES = 4096  # more than lanes send before it is taken


class NativeLane(CpuLane):
    """A lane that is a thread: compiled code takes updates from a ring, and applies each."""

    def __init__(self, index: int, lanes: NativeLanes, rows: int) -> None:
        self._index = index
        self._lanes = lanes
        self._event = Signal(blocking=True)
        self._mask = rows - 1
        self._memory = np.zeros(ROWS + rows * ROW, np.int64)
        self._words = self._memory.data
        self._words[native_loop.LANE_EVENT] = self._event.reader
        self._words[native_loop.LANE_WAKER] = self._event.writer
        self._words[native_loop.MASK] = self._mask
        self._words[native_loop.ONE] = 1
        self._words[native_loop.LOW_WATER] = lanes.low_water
        self._address = self._memory.ctypes.data
        table = self._memory[ROWS:].reshape(rows, ROW)
        self._results = table[:, STARTED : OUTCOME + 1]
        self._in_flight: deque[Work] = deque()
        self._hyperparameters: Hyperparameters | None = None
        self._form: memoryview = self._words[:0]
        self._forms: list[memoryview | None] = [None] * rows  # what is in each row
        self._queue = Queue()
        self._launched = 0
        self._thread = threading.Thread(
            target=self._run, name=f"hogstream-lane-{index}", daemon=True
        )
        try:
            self._thread.start()
        except BaseException:
            self._event.close()
            raise

    def launch(self, work: Work) -> None:
        """Enqueues an update or a snapshot, and launches it."""
        self.enqueue(work)
        if self._lanes.ordered:
            self.flush()
        else:
            self._launched = enqueued = self._queue.enqueued
            native_loop.launch(self._address, enqueued)

    def enqueue(self, work: Work) -> None:
        """Enqueues an update or a snapshot, to be launched at the next ``flush``."""
        if self._queue.enqueued - self._queue.delivered > self._mask:
            raise RuntimeError(f"the lane has room for {self._mask + 1} updates, got one more")
        index = self._queue.enqueued & self._mask
        row = ROWS + index * ROW
        words = self._words
        if isinstance(work, Update):
            if work.hyperparameters is not self._hyperparameters:
                self._hyperparameters = work.hyperparameters
                self._form = _as_words(self._lanes.dtype, work.hyperparameters)
            if self._forms[index] is not self._form:
                self._forms[index] = words[row + UPDATE : row + _FORM_END] = self._form
            checked = work.checked
            words[row + SOURCE] = checked.address
            words[row + PARTS] = checked.table.updates
            words[row + READ_VERSION] = work.read_version
        else:
            self._forms[index] = None
            words[row + UPDATE] = 0
            words[row + SOURCE] = work.target.data_ptr()
        self._queue.enqueued += 1
        self._in_flight.append(work)

    def flush(self) -> None:
        """Launches what was enqueued: no system call, unless the lane sleeps."""
        if self._lanes.ordered:
            for index in range(self._launched, self._queue.enqueued):
                row = ROWS + (index & self._mask) * ROW
                self._words[row + native_loop.TICKET] = self._lanes.take_ticket(self._address)
        self._launched = self._queue.enqueued
        native_loop.launch(self._address, self._queue.enqueued)

    def deliver(self) -> None:
        """Delivers what has landed."""
        count = native_loop.landed(self._address) - self._queue.delivered
        if not count:
            return
        landed = [self._in_flight.popleft() for _ in range(count)]
        first = self._queue.delivered & self._mask
        results = self._results[first : first + count].tolist()
        results += self._results[: count - len(results)].tolist()  # round the end of the ring
        for work, result in zip(landed, results, strict=True):
            if isinstance(work, Update):
                work.started_ns, work.landed_ns, work.staleness, outcome = result
            else:
                work.started_ns, work.landed_ns, work.version, outcome = result
            if outcome != DONE:
                _note_outcome(work, outcome)
        self._queue.advance(count)
        self._lanes.deliver(self._index, landed)

    def close(self) -> None:
        """Ends the thread, which has been told to stop."""
        native_loop.wake(self._address)
        self._thread.join()
        self._event.close()

    def _run(self) -> None:
        self._lanes.mode.set()
        native_loop.run(self._address, self._lanes.settings.address)


def _note_outcome(work: Work, outcome: int) -> None:
    """Says of work why it was not done."""
    if outcome < 0:
        work.error = OSError(-outcome, f"lock: {os.strerror(-outcome)}")
    elif isinstance(work, Update):
        work.nonfinite = outcome == NONFINITE


class NativeLanes:
    """A thread for each lane, and the event by which they wake the loop."""

    def __init__(
        self,
        settings: LaneSettings,
        count: int,
        depth: int,
        deliver: Deliver,
    ) -> None:
        self.deliver = deliver
        self.ordered = settings.ordered
        self.low_water = settings.low_water
        self.dtype = _dtype(settings)
        self.mode = FloatingPointMode()  # of the thread that opens them
        self._loop = asyncio.get_running_loop()
        self._event = Signal(blocking=False)
        # As many words as tickets may be out, or more.
        self._owners = np.zeros(1 << (count * (depth + 1)).bit_length(), np.int64)
        self.settings = _Settings(settings, self._event.writer, self._owners)
        self._tickets = 0
        self.lanes: list[NativeLane] = []
        self._loop.add_reader(self._event.reader, self._deliver_landed)
        try:
            rows = 1 << (depth - 1).bit_length()
            for index in range(count):
                self.lanes.append(NativeLane(index, self, rows))
        except BaseException:
            self.close()
            raise

    def take_ticket(self, lane: int) -> int:
        """The place of the next update among those of all lanes, which is this lane's."""
        ticket = self._tickets
        self._tickets += 1
        self._owners[ticket & (len(self._owners) - 1)] = lane
        return ticket

    def flush(self, lanes: Sequence[int]) -> None:
        """Launches what was enqueued on some lanes."""
        for index in lanes:
            self.lanes[index].flush()

    def close(self) -> None:
        """Ends every thread."""
        self.settings.words[native_loop.STOP] = 1
        for lane in self.lanes:
            lane.close()
        self._loop.remove_reader(self._event.reader)
        self._event.close()

    def _deliver_landed(self) -> None:
        os.read(self._event.reader, _SIGNAL_BYTES)
        # Then the flag: what lands from here on is either seen below, or wakes again.
        native_loop.listen(self.settings.address)
        for lane in self.lanes:
            lane.deliver()


class _Settings:
    """The settings of the lanes, as compiled code reads them."""

    def __init__(
        self, settings: LaneSettings, loop_event: int, owners: npt.NDArray[np.int64]
    ) -> None:
        self._settings = settings  # whose tensors must live as long
        shared, races, lock = settings.shared, settings.races, settings.lock
        self._memory = np.zeros(native_loop.SETTINGS, np.int64)
        self.address = self._memory.ctypes.data
        self.words = self._memory.data
        for word, value in (
            (native_loop.FLAT, shared.flat.data_ptr()),
            (native_loop.BYTES, shared.flat.nbytes),
            (native_loop.VERSIONS, shared.versions.data_ptr()),
            (native_loop.SLOTS, len(shared.versions)),
            (native_loop.SLOT, shared.slot),
            (native_loop.RACES, races.counts.data_ptr() if races else 0),
            (native_loop.BLOCKS, races.counts.shape[1] if races else 0),
            (native_loop.BLOCK, races.block if races else 0),
            (native_loop.FINITE, _finite(settings)),
            (native_loop.STALENESS_AWARE, settings.staleness_aware),
            (native_loop.OWNERS, owners.ctypes.data if settings.ordered else 0),
            (native_loop.OWNERS_MASK, len(owners) - 1),
            (native_loop.LOCK, lock.address if lock else 0),
            (native_loop.LOOP_EVENT, loop_event),
        ):
            self.words[word] = value


def warm_up(settings: LaneSettings, hyperparameters: Hyperparameters) -> None:
    """Compiles what lanes call, by way of a lane that is told to stop at once."""
    lane, words = np.zeros(native_loop.ROWS, np.int64), np.zeros(native_loop.SETTINGS, np.int64)
    words[native_loop.STOP] = 1
    native_loop.launch(lane.ctypes.data, 0)
    native_loop.landed(lane.ctypes.data)
    native_loop.listen(words.ctypes.data)
    native_loop.run(lane.ctypes.data, words.ctypes.data)
    _as_words(_dtype(settings), hyperparameters)
    _finite(settings)


def _as_words(dtype: str, hyperparameters: Hyperparameters) -> memoryview:
    """The words of a row that depend on these: which function updates, and its factors' bits."""
    h = hyperparameters
    function = update_function(dtype, h.eps_inside_sqrt, h.coupled).address
    words = np.empty(_FORM_END - UPDATE, np.int64)
    words[0], words[1:] = function, np.array(h.factors).view(np.int64)
    return words.data


def _finite(settings: LaneSettings) -> int:
    """The address of the function that looks at gradients, or 0 if none has to."""
    return finite_function(_dtype(settings)).address if settings.check_finite else 0


def _dtype(settings: LaneSettings) -> str:
    return str(settings.shared.flat.dtype).removeprefix("torch.")
