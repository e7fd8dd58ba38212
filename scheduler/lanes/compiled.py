"""What lanes have in common whose loop is compiled: rings of rows in memory, and threads."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.row_table import READ_VERSION, RowTable
from hogstream.kernels.verdicts import NONFINITE, OUTSIDE
from hogstream.scheduler.lanes import native_loop, rings
from hogstream.scheduler.lanes.base import Applier, Deliver, LaneSettings, Queue
from hogstream.scheduler.lanes.rings import (
    COPIER,
    DONE,
    FORM,
    OUTCOME,
    PARTS,
    ROW,
    ROWS,
    SOURCE,
    STARTED,
    WORD,
)
from hogstream.scheduler.lanes.signals import Signal
from hogstream.scheduler.update import Update, Work

AnyLane = TypeVar("AnyLane", bound="RingLane")

#: Fills in what a lane knows of tables: whose code updates them, and what it locks.
Complete = Callable[[RowTable], None]

_SIGNAL_BYTES = 4096  # more than lanes send before it is taken


class Form:
    """What updates with the same hyperparameters have in common, as compiled code reads it.

    Attributes:
        address: Of its memory.
    """

    def __init__(self, update: int, factors: Sequence[int]) -> None:
        """Lays it out.

        Args:
            update: What updates: see ``rings``.
            factors: The bits of each.
        """
        self._memory = np.array([update, *factors], np.int64)
        self.address = self._memory.ctypes.data


class RowForm(Form):
    """The same of updates of rows, of which more is in the fields of each part."""

    def __init__(self, update: int, factors: Sequence[int], complete: Complete) -> None:
        """Lays it out.

        Args:
            update: As of ``Form``.
            factors: The bits of each.
            complete: Fills in what a lane knows of a table.
        """
        super().__init__(update, factors)
        self._complete = complete

    def complete(self, table: RowTable, read_version: int) -> None:
        """Fills in what is not known before an update is enqueued."""
        self._complete(table)
        table.fields[:, READ_VERSION] = read_version


class RingLane:
    """A lane that is a ring of rows, which a thread's compiled loop takes from there.

    Attributes:
        index: Its number.
        address: Of its memory.
        words: Its memory.
        applier: As of any lane.
    """

    applier: Applier | None = None

    def __init__(self, index: int, lanes: RingLanes[Any], rows: int) -> None:
        """Makes the memory.

        Args:
            index: Its number.
            lanes: That it is one of.
            rows: How many there are: a power of two.
        """
        self.index = index
        self._lanes = lanes
        self._deliver = lanes.deliver
        self._mask = rows - 1
        self._memory = np.zeros(ROWS + rows * ROW, np.int64)
        self.words = self._memory.data
        self.words[rings.MASK] = self._mask
        self.words[rings.LOW_WATER] = lanes.low_water
        self.address = self._memory.ctypes.data
        self._results = self._memory[ROWS:].reshape(rows, ROW)[:, STARTED : OUTCOME + 1]
        self._in_flight: deque[Work] = deque()
        self._hyperparameters: Hyperparameters | None = None
        self._form: Any = None  # of those
        self._row_hyperparameters: Hyperparameters | None = None
        self._row_form: Any = None  # of those
        self._forms: list[Form | None] = [None] * rows  # of each row, alive as long as it is there
        self._queue = Queue()
        self._launched = 0

    def enqueue(self, work: Work) -> None:
        """Enqueues an update or a snapshot, to be launched at the next ``flush``."""
        if self._queue.enqueued - self._queue.delivered > self._mask:
            raise RuntimeError(f"the lane has room for {self._mask + 1} updates, got one more")
        index = self._queue.enqueued & self._mask
        row = ROWS + index * ROW
        words = self.words
        if isinstance(work, Update):
            checked = work.checked
            if isinstance(checked.table, RowTable):
                form = self._form_of_rows(work, checked.table)
            else:
                if work.hyperparameters is not self._hyperparameters:
                    self._form = self._lanes.form(work.hyperparameters)
                    self._hyperparameters = work.hyperparameters
                form = self._form
            if self._forms[index] is not form:
                self._forms[index] = form
                words[row + FORM] = form.address
            words[row + SOURCE] = checked.address
            words[row + PARTS] = checked.table.updates
            words[row + rings.READ_VERSION] = work.read_version
        else:
            self._forms[index] = None
            words[row + FORM] = 0
            words[row + SOURCE] = work.target.data_ptr()
            words[row + COPIER] = 0
            if work.rows is not None:
                words[row + SOURCE] = work.rows.fields.ctypes.data
                words[row + COPIER] = self._lanes.copier(work.rows)
        self._queue.enqueued += 1
        self._in_flight.append(work)

    def _form_of_rows(self, update: Update, table: RowTable) -> RowForm:
        """The form of an update of rows, which completes its table."""
        if update.hyperparameters is not self._row_hyperparameters:
            self._row_form = self._lanes.row_form(update.hyperparameters)
            self._row_hyperparameters = update.hyperparameters
        form: RowForm = self._row_form
        form.complete(table, update.read_version)
        return form

    def deliver(self) -> None:
        """Delivers what has landed."""
        count = native_loop.landed(self.address) - self._queue.delivered
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
                self._note_outcome(work, outcome)
        self._queue.advance(count)
        try:
            self._deliver(self.index, landed)
        except BaseException:  # of a user's function: nobody else would deliver on other lanes
            self._lanes.deliver_soon()
            raise

    def _note_outcome(self, work: Work, outcome: int) -> None:
        """Says of work why it was not done."""
        if outcome < 0:
            work.error = self._lanes.error(-outcome)
            if isinstance(work, Update):
                work.staleness = 0  # the row has the version still
        elif outcome == OUTSIDE:
            work.error = _outside(work)
        elif isinstance(work, Update):
            work.nonfinite = outcome == NONFINITE


def _outside(work: Work) -> IndexError:
    """The error of rows of which a kernel has found that they are not in their table."""
    table = work.checked.table if isinstance(work, Update) else work.rows
    assert isinstance(table, RowTable)
    sizes = " or ".join(str(len(part.operands.param)) for part in table.parts)
    what = "nothing was updated" if isinstance(work, Update) else "such rows were not copied"
    return IndexError(f"rows must be >= 0 and < {sizes}, the rows of their table: {what}")


class RingLanes(Generic[AnyLane]):
    """Lanes that are rings, what their loops know of all, and how those wake the event loop.

    Attributes:
        deliver: Takes what has landed.
        ordered: Whether each waits for the one launched before it.
        low_water: How many rows may be left on a lane that wakes the event loop.
        settings: As compiled code reads them.
        lanes: In order.
    """

    def __init__(self, settings: LaneSettings, count: int, depth: int, deliver: Deliver) -> None:
        """Makes what is the same for all.

        Args:
            settings: What is the same for all updates.
            count: How many lanes.
            depth: How many updates and snapshots may be in flight on each.
            deliver: Takes what has landed.
        """
        self.lanes: list[AnyLane] = []
        self.deliver = deliver
        self.ordered = settings.ordered
        self.low_water = settings.low_water
        self._loop = asyncio.get_running_loop()
        self._event = Signal(blocking=False)
        # As many words as tickets may be out, or more.
        self._owners = np.zeros(1 << (count * (depth + 1)).bit_length(), np.int64)
        self._tickets = 0
        self.settings = SettingsMemory(settings)
        words = self.settings.words
        words[rings.LOOP_EVENT] = self._event.writer
        words[rings.OWNERS] = self._owners.ctypes.data if self.ordered else 0
        words[rings.OWNERS_MASK] = len(self._owners) - 1
        self._loop.add_reader(self._event.reader, self._deliver_landed)

    def form(self, hyperparameters: Hyperparameters) -> Form:
        """The form of updates with these."""
        raise NotImplementedError

    def row_form(self, hyperparameters: Hyperparameters) -> RowForm:
        """The form of updates of rows with these."""
        raise NotImplementedError

    def copier(self, table: RowTable) -> int:
        """The address of what copies rows for a snapshot; completes their table."""
        raise NotImplementedError

    def error(self, number: int) -> BaseException:
        """What went wrong, by minus the outcome of a row."""
        return OSError(number, f"lock: {os.strerror(number)}")

    def take_ticket(self, thread: int) -> int:
        """The place of the next update among those of all lanes, which a thread will start."""
        ticket = self._tickets
        self._tickets += 1
        self._owners[ticket & (len(self._owners) - 1)] = thread
        return ticket

    def deliver_soon(self) -> None:
        """Delivers what has landed on all lanes, in another turn of the event loop."""
        for lane in self.lanes:
            self._loop.call_soon(lane.deliver)

    def close(self) -> None:
        """Wakes the event loop no more; the threads must have ended."""
        self._loop.remove_reader(self._event.reader)
        self._event.close()

    def _deliver_landed(self) -> None:
        os.read(self._event.reader, _SIGNAL_BYTES)
        # Then the flag: what lands from here on is either seen below, or wakes again.
        native_loop.listen(self.settings.address)
        for lane in self.lanes:
            lane.deliver()


class Enter(Protocol):
    """Called on a thread of lanes before its loop."""

    def __call__(self) -> None:
        """Sets what is the thread's own."""


class Loop:
    """The compiled loop of some lanes, and its memory; it runs on whichever thread calls it."""

    def __init__(self, lanes: Sequence[RingLane], settings: SettingsMemory) -> None:
        """Makes the memory; of a loop that never sleeps, as it is told to stop.

        Args:
            lanes: Which it serves.
            settings: Of the lanes.
        """
        self._served = tuple(lanes)  # whose memory must live as long, whoever lets go of them
        self._lanes = np.array([lane.address for lane in lanes], np.int64)
        self._memory = np.zeros(rings.THREAD, np.int64)
        self._settings = settings
        self.address = self._memory.ctypes.data
        arguments = self.address + WORD * rings.ARGUMENTS
        places = range(rings.ARGUMENT_ADDRESSES - rings.ARGUMENTS)
        self.words = self._memory.data
        for word, value in (
            (rings.ONE, 1),
            (rings.LANES, self._lanes.ctypes.data),
            (rings.LANE_COUNT, len(lanes)),
            *((rings.ARGUMENT_ADDRESSES + place, arguments + WORD * place) for place in places),
        ):
            self.words[word] = value
        for lane in lanes:
            lane.words[rings.LANE_THREAD] = self.address

    def run(self) -> None:
        """Returns when it is told to stop and has nothing left to do."""
        native_loop.run(self.address, self._settings.address)


class LoopThread(Loop):
    """A thread that runs the compiled loop for some lanes."""

    def __init__(
        self, name: str, lanes: Sequence[RingLane], settings: SettingsMemory, enter: Enter
    ) -> None:
        """Starts it.

        Args:
            name: Of the thread.
            lanes: Which it serves.
            settings: Of the lanes.
            enter: Called on it first; may raise nothing.

        Raises:
            OSError: If there is no file descriptor left.
            RuntimeError: If there can be no more threads.
        """
        super().__init__(lanes, settings)
        self._event = Signal(blocking=True)
        self.words[rings.THREAD_EVENT] = self._event.reader
        self.words[rings.THREAD_WAKER] = self._event.writer
        self.words[rings.POLLED] = self._event.reader | 1 << 32  # a ``pollfd`` that asks for POLLIN
        self._enter = enter
        self._thread = threading.Thread(target=self.run, name=name, daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self._event.close()
            raise

    def run(self) -> None:
        """The loop: returns when it is told to stop and has nothing left to do."""
        self._enter()
        super().run()

    def end(self) -> None:
        """Waits until the thread, which has been told to stop, has ended."""
        rings.wake(self.address)
        self._thread.join()

    def close(self) -> None:
        """Ends the thread, which has been told to stop."""
        self.end()
        self._event.close()


class SettingsMemory:
    """The settings of lanes, as compiled code reads them.

    Attributes:
        address: Of the memory.
        words: The memory.
    """

    def __init__(self, settings: LaneSettings) -> None:
        """Lays out what is the same on every device."""
        self.of = settings  # whose tensors must live as long
        shared, races, lock = settings.shared, settings.races, settings.lock
        self._memory = np.zeros(rings.SETTINGS, np.int64)
        self.address = self._memory.ctypes.data
        self.words = self._memory.data
        for word, value in (
            (rings.FLAT, shared.flat.data_ptr()),
            (rings.BYTES, shared.flat.nbytes),
            (rings.VERSIONS, shared.versions.data_ptr()),
            (rings.SLOTS, len(shared.versions)),
            (rings.SLOT, shared.slot),
            (rings.RACES, races.counts.data_ptr() if races else 0),
            (rings.BLOCKS, races.counts.shape[1] if races else 0),
            (rings.BLOCK, races.block if races else 0),
            (rings.STALENESS_AWARE, settings.staleness_aware),
            (rings.LOCK, lock.address if lock else 0),
        ):
            self.words[word] = value

    def stop(self) -> None:
        """Tells threads to stop once they have nothing left to do."""
        self.words[rings.STOP] = 1


def compile_loop() -> None:
    """Compiles the loop, by way of a thread without lanes that is told to stop at once."""
    lane, thread, words = (
        np.zeros(size, np.int64) for size in (rings.ROWS, rings.THREAD, rings.SETTINGS)
    )
    lane[rings.LANE_THREAD] = thread.ctypes.data
    words[rings.STOP] = 1
    native_loop.launch(lane.ctypes.data, 0)
    native_loop.landed(lane.ctypes.data)
    native_loop.listen(words.ctypes.data)
    native_loop.run(thread.ctypes.data, words.ctypes.data)
