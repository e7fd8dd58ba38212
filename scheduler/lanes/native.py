"""Lanes on a machine without a GPU: CPU threads that run compiled code, free of the GIL.

A worker that waits for each landing gains nothing by such a thread. Where it may, the thread that
computes a gradient runs the same code for its update; and one that has a process for itself has a
lane that does so on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hogstream.kernels.backends import numba_rows
from hogstream.kernels.backends.floating_point import FloatingPointMode, InMode
from hogstream.kernels.backends.numba_kernels import finite_function, update_function
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.row_table import CODE, LOCK_BLOCK, LOCKS, RowTable
from hogstream.scheduler.lanes import native_loop, rings
from hogstream.scheduler.lanes.base import CpuLane, Deliver, LaneSettings
from hogstream.scheduler.lanes.compiled import (
    Form,
    Loop,
    LoopThread,
    RingLane,
    RingLanes,
    RowForm,
    SettingsMemory,
    compile_loop,
)
from hogstream.scheduler.update import Update, Work


class NativeLane(RingLane, CpuLane):
    """A lane that is a thread: compiled code takes updates from a ring, and applies each."""

    applier: NativeApplier | None = None

    def launch(self, work: Work) -> None:
        """Enqueues an update or a snapshot, and launches it: no system call, unless it sleeps."""
        self.enqueue(work)
        if self._lanes.ordered:
            self.take_next()
        else:
            self._launched += 1
        native_loop.launch(self.address, self._launched)

    def launch_all(self, works: Sequence[Work]) -> None:
        """Does that with several at once."""
        for work in works:
            self.enqueue(work)
            self.take_next()
        self.publish()

    def flush(self) -> None:
        """Launches what was enqueued."""
        for _ in range(self._queue.enqueued - self._launched):
            self.take_next()
        self.publish()

    def take_next(self) -> None:
        """Gives what was enqueued first its place in the order of all; ``publish`` launches it."""
        if self._launched == self._queue.enqueued:
            return
        if self._lanes.ordered:
            row = rings.ROWS + (self._launched & self._mask) * rings.ROW
            ticket = self._lanes.take_ticket(self.words[rings.LANE_THREAD])
            self.words[row + rings.TICKET] = ticket
        self._launched += 1

    def publish(self) -> None:
        """Launches what was given its place."""
        native_loop.launch(self.address, self._launched)


class InlineLane(NativeLane):
    """A lane on the thread that calls it: what is launched is applied at once, and delivered."""

    def __init__(self, index: int, lanes: NativeLanes, rows: int, deliver: Deliver) -> None:
        """Makes it.

        Args:
            index: Its number.
            lanes: That it is one of.
            rows: How many there are: a power of two.
            deliver: Takes what has landed.
        """
        super().__init__(index, lanes, rows)
        self._deliver = deliver
        self._loop = Loop([self], lanes.inline)
        self._mode = InMode(lanes.mode)

    def launch(self, work: Work) -> None:
        """Enqueues an update or a snapshot, and launches it."""
        self.launch_all([work])

    def publish(self) -> None:
        """Applies what was given its place, and delivers it."""
        super().publish()
        with self._mode:
            self._loop.run()
        self.deliver()


class NativeApplier:
    """Applies updates by an inline lane, whoever delivers them."""

    def __init__(self, index: int, lanes: NativeLanes) -> None:
        """Makes the lane."""
        self._lane = InlineLane(index, lanes, rows=1, deliver=_to_nobody)

    def apply(self, update: Update) -> None:
        """Applies an update."""
        self._lane.launch(update)


class NativeLanes(RingLanes[NativeLane]):
    """A thread for each lane.

    Attributes:
        mode: The floating-point mode of the thread that opens them.
        threads: One of each lane that is not inline.
        inline: The settings as a loop reads them that ends when nothing is left to do, and wakes
            nobody.
    """

    def __init__(self, settings: LaneSettings, count: int, depth: int, deliver: Deliver) -> None:
        """Starts the threads; what lands is delivered on the running loop.

        Args:
            settings: What is the same for all updates.
            count: How many lanes.
            depth: How many updates and snapshots may be in flight on each.
            deliver: Takes what has landed.

        Raises:
            OSError: If there is no file descriptor left.
            RuntimeError: If there can be no more threads; nothing is left open.
        """
        super().__init__(settings, count, depth, deliver)
        self._dtype = _dtype(settings)
        self.inline = SettingsMemory(settings)
        self.inline.words[rings.STOP] = self.inline.words[rings.WOKEN] = 1
        for memory in (self.settings, self.inline):
            memory.words[rings.FINITE] = _finite(settings)
        self.threads: list[LoopThread] = []
        self.mode = FloatingPointMode()
        try:
            rows = 1 << (depth - 1).bit_length()
            for index in range(count):
                if settings.inline:
                    lane: NativeLane = InlineLane(index, self, rows, deliver)
                else:
                    lane = NativeLane(index, self, rows)
                    name = f"hogstream-lane-{index}"
                    self.threads.append(LoopThread(name, [lane], self.settings, self.mode.set))
                if not self.ordered:
                    lane.applier = NativeApplier(index, self)
                self.lanes.append(lane)
        except BaseException:
            self.close()
            raise

    def form(self, hyperparameters: Hyperparameters) -> Form:
        """Which function updates, and its factors."""
        return _form(self._dtype, hyperparameters)

    def row_form(self, hyperparameters: Hyperparameters) -> RowForm:
        """Which function updates rows, its factors, and what it locks."""
        return _row_form(self.settings.of, hyperparameters)

    def copier(self, table: RowTable) -> int:
        """The address of what copies rows for a snapshot; completes their table."""
        table.fields[:, LOCKS : LOCK_BLOCK + 1] = _locks(self.settings.of)
        address: int = numba_rows.copy_function(self._dtype).address
        return address

    def flush(self, lanes: Sequence[int]) -> None:
        """Launches what was enqueued first on some lanes, as often as they are named."""
        for index in lanes:
            self.lanes[index].take_next()
        for index in dict.fromkeys(lanes):
            self.lanes[index].publish()

    def close(self) -> None:
        """Ends every thread."""
        self.settings.stop()
        for thread in self.threads:
            thread.close()
        super().close()


def warm_up(settings: LaneSettings, hyperparameters: Hyperparameters) -> None:
    """Compiles what lanes call, by way of a thread that is told to stop at once."""
    compile_loop()
    if settings.row_locks is None:
        _form(_dtype(settings), hyperparameters)
    else:
        _row_form(settings, hyperparameters)
    _finite(settings)


def _to_nobody(lane: int, landed: Sequence[Work]) -> None:
    """Where what was applied is delivered by whoever had it applied."""


def _form(dtype: str, hyperparameters: Hyperparameters) -> Form:
    update = update_function(dtype, hyperparameters.switches).address
    return Form(update, _bits(hyperparameters))


def _row_form(settings: LaneSettings, hyperparameters: Hyperparameters) -> RowForm:
    dtype = settings.shared.flat.dtype
    switches = hyperparameters.switches.of_dtype(dtype).bits
    name = _dtype(settings)
    kinds = numba_rows.Kinds(name, name, switches, rowwise=False, lazy=False)
    update, code = numba_rows.part_function(), numba_rows.update_function(kinds)
    known = (*_locks(settings), code.address)

    def complete(table: RowTable) -> None:
        table.fields[:, LOCKS : CODE + 1] = known

    return RowForm(update.address, _bits(hyperparameters), complete)


def _locks(settings: LaneSettings) -> tuple[int, int, int]:
    """The fields that say what is locked around each row."""
    locks = settings.row_locks
    return (0, 0, 0) if locks is None else (locks.address, locks.stripes, locks.block)


def _bits(hyperparameters: Hyperparameters) -> list[int]:
    """Those of each factor."""
    bits: list[int] = np.array(hyperparameters.factors).view(np.int64).tolist()
    return bits


def _finite(settings: LaneSettings) -> int:
    """The address of the function that looks at gradients, or 0 if none has to."""
    return finite_function(_dtype(settings)).address if settings.check_finite else 0


def _dtype(settings: LaneSettings) -> str:
    return str(settings.shared.flat.dtype).removeprefix("torch.")
