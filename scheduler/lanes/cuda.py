"""Lanes on a GPU: each a CUDA stream of its own, and one thread that launches and sees them land.

How many streams really run beside each other is up to ``CUDA_DEVICE_MAX_CONNECTIONS``: 8, or up to
32 if the environment says so before CUDA starts. Further lanes share a connection, and wait there
for each other; nothing but speed depends on it.
"""

from __future__ import annotations

import ctypes
import itertools
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from hogstream.kernels.backends.triton_launch import factor_words
from hogstream.kernels.hyperparameters import Hyperparameters, Switches
from hogstream.kernels.row_table import CODE, LOCKS, STRIPES, RowTable
from hogstream.scheduler.lanes import cuda_launch, cuda_loop, native_loop, rings
from hogstream.scheduler.lanes.base import Deliver, LaneSettings, Position, Queue
from hogstream.scheduler.lanes.compiled import (
    Form,
    LoopThread,
    RingLane,
    RingLanes,
    RowForm,
    compile_loop,
)
from hogstream.scheduler.lanes.cuda_batches import Batch
from hogstream.scheduler.lanes.cuda_clock import DeviceClock
from hogstream.scheduler.lanes.cuda_device import (
    CudaDevice,
    DeviceEvent,
    DeviceMemory,
    PinnedMemory,
)
from hogstream.scheduler.lanes.cuda_driver import CudaError
from hogstream.scheduler.lanes.cuda_events import cuda_event_done
from hogstream.scheduler.lanes.cuda_graphs import Node, RepeatCache, UpdateGraph
from hogstream.scheduler.lanes.cuda_kernels import RowKernels, UpdateKernels, update_kernels
from hogstream.scheduler.lanes.cuda_launch import DEFAULT_STREAM
from hogstream.scheduler.lanes.rings import DRIVER_ERRORS, WORD
from hogstream.scheduler.memory import allocate_zeros
from hogstream.scheduler.update import Snapshot, Update, Work

_GRAPHS = 256
_PR_SET_TIMERSLACK = 29
_TIMER_SLACK_NS = 1_000  # else a sleep takes 50 us longer than it should
_COUNTER_WORDS = 16  # 128 bytes: no two streams write one line
_ROW_LOCKS = 1 << 16  # 256 KiB: two rows in a hundred updates at once seldom have the same


class CudaLane(RingLane):
    """A lane that is a CUDA stream, owned by it and not from torch's pool of 32.

    Attributes:
        stream: The stream.
        enqueued: What was enqueued and not launched.
    """

    def __init__(self, index: int, lanes: CudaLanes, rows: int) -> None:
        """Makes the memory, and what every row needs on the device.

        Args:
            index: Its number.
            lanes: That it is one of.
            rows: How many there are: a power of two.

        Raises:
            CudaError: If the driver refuses; the lanes destroy what was made.
        """
        super().__init__(index, lanes, rows)
        self._cuda = lanes
        self.enqueued: deque[_Enqueued] = deque()
        self.stream = lanes.take_stream()
        self._launches = np.zeros(rows * cuda_launch.LAUNCH, np.int64)
        self._more = self._launches.data
        self._timed_batches: list[Batch | None] = [None] * rows
        self._made = [lanes.make_event().handle for _ in range(rows)]
        self._event = lanes.make_event()  # for those who compute on the stream
        timed = lanes.settings.of.timed
        self._times = [
            [lanes.make_event(timed=True) for _ in range(2)] for _ in range(rows if timed else 0)
        ]
        self._current_stream = lanes.device.current_stream
        self._settings = lanes.settings.address
        counter = WORD * (_COUNTER_WORDS * index)
        for word, value in (
            (rings.LAUNCHES, self._launches.ctypes.data),
            (rings.STREAM, self.stream),
            (rings.COUNTER, lanes.pinned.address + counter),
            (rings.COUNTER_ON_DEVICE, lanes.pinned.on_device + counter),
            (rings.LANE_EVENT, lanes.make_event().handle),
            (rings.VERDICT, lanes.verdicts.address + WORD * index),
        ):
            self.words[word] = value
        for row in range(rows):
            self._set_up(row)

    def _set_up(self, index: int) -> None:
        """Writes what does not change of a row, but while it is in a batch."""
        place = index * cuda_launch.LAUNCH
        found = self._cuda.found(self.index, index)
        self._more[place + cuda_launch.FOUND] = found
        self._more[place + cuda_launch.FOUND_ALONE] = found
        if self._times:
            began, ended = self._times[index]
            self._more[place + cuda_launch.BEGAN] = began.handle
            self._more[place + cuda_launch.ENDED] = ended.handle

    def launch(self, work: Work) -> None:
        """Enqueues an update or a snapshot, and launches it."""
        super().enqueue(work)
        index = self._take_next()
        event, maker = self._made[index], self._current_stream()
        place = index * cuda_launch.LAUNCH
        self._more[place + cuda_launch.MADE] = event
        if maker == DEFAULT_STREAM:
            self._more[place + cuda_launch.UNRECORDED] = 1
            self.publish()
        else:
            cuda_launch.submit(self.address, self._launched, self._settings, event, maker)

    def launch_all(self, works: Sequence[Work]) -> None:
        """Does that with several at once: the first waits for what makes their gradients."""
        event = self._made[self._launched & self._mask]
        unrecorded, error = self._record(event, self._current_stream())
        for work in works:
            super().enqueue(work)
            place = self._take_next() * cuda_launch.LAUNCH
            self._more[place + cuda_launch.MADE] = event
            self._more[place + cuda_launch.ERROR] = error
            self._more[place + cuda_launch.UNRECORDED] = unrecorded
            event = unrecorded = 0  # the others follow it on the stream
        self.publish()

    def enqueue(self, work: Work) -> None:
        """Enqueues an update or a snapshot, to be launched at the next ``flush``."""
        index = self._queue.enqueued & self._mask
        super().enqueue(work)
        event, maker = self._made[index], self._current_stream()
        unrecorded, error = self._record(event, maker)
        place = index * cuda_launch.LAUNCH
        self._more[place + cuda_launch.MADE] = event
        self._more[place + cuda_launch.ERROR] = error
        self._more[place + cuda_launch.UNRECORDED] = unrecorded
        self.enqueued.append(_Enqueued(self, work, next(self._cuda.places), maker, event, error))

    def _record(self, event: int, maker: int) -> tuple[int, int]:
        """Whether the loop is to record an event behind what makes a gradient, and the error."""
        if maker == DEFAULT_STREAM:
            return 1, 0
        return 0, cuda_launch.record(self._settings, event, maker)

    def flush(self) -> None:
        """Launches what was enqueued."""
        self._cuda.flush([self.index] * len(self.enqueued))

    def launch_next(self, error: CudaError | None = None) -> None:
        """Launches the first row that was enqueued and not launched, by itself.

        Args:
            error: It fails with this, in its turn.
        """
        index = self._take_next()
        if error is not None:
            place = index * cuda_launch.LAUNCH
            self._more[place + cuda_launch.UNRECORDED] = 0
            self._more[place + cuda_launch.ERROR] = error.code
        self.publish()

    def _take_next(self) -> int:
        """The index of that row, which has its place in the order of all now."""
        index = self._launched & self._mask
        if self._cuda.ordered:
            self._set_ticket(index, self._cuda.take_ticket(self.words[rings.LANE_THREAD]))
        self._launched += 1
        return index

    def add_to(self, batch: Batch, member: int, ticket: int) -> None:
        """Makes that row one of a batch; ``publish`` launches it.

        Args:
            batch: The batch.
            member: Which of its updates it is.
            ticket: The batch's place in the order of all.
        """
        index = self._launched & self._mask
        place = index * cuda_launch.LAUNCH
        self._more[place + cuda_launch.BATCH] = batch.address
        self._more[place + cuda_launch.FOUND] = batch.found(member)
        if self._times:
            self._timed_batches[index] = batch
        self._set_ticket(index, ticket)
        self._launched += 1

    def publish(self) -> None:
        """Launches the rows that were given their place."""
        native_loop.launch(self.address, self._launched)

    def computing(self) -> AbstractContextManager[object]:
        """Makes the lane's stream the current one, after the caller's current one."""
        self._cuda.check_open()
        self.words[rings.COMPUTES] = 1
        self.follow_current()
        return self._cuda.device.computing(self.stream)

    def continuing(self) -> AbstractContextManager[object]:
        """As ``computing``, if anything was computed so; else the current stream goes on."""
        return self.computing() if self.words[rings.COMPUTES] else nullcontext()

    def follow_current(self) -> None:
        """Has the stream wait for what the caller's current one has been given."""
        device = self._cuda.device
        self._event.record(device.current_stream())
        device.wait(self.stream, self._event.handle)

    def record_event(self) -> Position:
        """The present end of the lane; what waits for its batch is launched now."""
        self._cuda.check_open()
        self.flush()
        return self._queue.position()

    async def done(self, event: Any) -> None:
        """Waits until a lane has come to an event, or the device to one of torch's."""
        if isinstance(event, Position):
            await Queue.done(event)
        else:
            await cuda_event_done(event)

    def _set_ticket(self, index: int, ticket: int) -> None:
        self.words[rings.ROWS + index * rings.ROW + rings.TICKET] = ticket

    def take_down(self, clock: DeviceClock, landed: Sequence[Work]) -> None:
        """Reads the device's times of what is delivered now."""
        for place, work in enumerate(landed, self._queue.delivered - len(landed)):
            index = place & self._mask
            if work.error is None:
                self._read_times(clock, index, work)
            batch, self._timed_batches[index] = self._timed_batches[index], None
            if batch is not None:
                batch.untold -= 1

    def _read_times(self, clock: DeviceClock, index: int, work: Work) -> None:
        """Has the device say when it began with a row, and when that landed."""
        batch = self._timed_batches[index]
        times = self._times[index] if batch is None else batch.times
        try:
            started_ns, landed_ns = map(clock.read, times)
            if batch is None:
                times[1] = clock.follow(times[1])
        except CudaError:  # such as a device lost since: the loop's own times stay
            return
        work.started_ns = max(started_ns, work.submitted_ns)  # clocks may differ by microseconds
        work.landed_ns = max(landed_ns, work.started_ns)
        if batch is None:
            self._more[index * cuda_launch.LAUNCH + cuda_launch.ENDED] = times[1].handle


class _Enqueued(NamedTuple):
    """An update or a snapshot on a lane.

    Attributes:
        lane: The lane.
        work: The update or snapshot.
        place: Among all that were enqueued on any lane.
        maker: The stream that makes its gradient.
        made: The event behind that.
        error: Of the driver, with which it could not be recorded; or 0.
    """

    lane: CudaLane
    work: Work
    place: int
    maker: int
    made: int
    error: int


class CudaLanes(RingLanes[CudaLane]):
    """A stream for each lane, and one thread for all.

    One thread launches for all lanes: the driver launches one at a time in any case. A batch of
    updates that comes again becomes a CUDA graph, unless ``lr`` depends on the staleness of each,
    which a graph could not know.

    Attributes:
        device: The GPU.
        clock: Tells when updates landed, if times are taken.
        places: Numbers what is enqueued on any lane.
        pinned: Where the device writes counters, and verdicts come.
        verdicts: Where on the device each lane's is found.
        threads: The one.
    """

    def __init__(
        self,
        settings: LaneSettings,
        device: CudaDevice,
        count: int,
        depth: int,
        deliver: Deliver,
    ) -> None:
        """Starts the thread; what lands is delivered on the running loop.

        Args:
            settings: What is the same for all updates.
            device: The GPU.
            count: How many lanes.
            depth: How many updates and snapshots may be in flight on each.
            deliver: Takes what has landed.

        Raises:
            CudaError: If the driver refuses; nothing is left open.
            OSError: If there is no file descriptor left.
            RuntimeError: If there can be no more threads.
        """
        super().__init__(settings, count, depth, self._deliver)
        self._deliver_further = deliver
        self.device = device
        self.clock: DeviceClock | None = None
        self.threads: list[LoopThread] = []
        self._kept: dict[Switches, tuple[UpdateKernels, Any]] = {}
        self._row_kernels = RowKernels(device, settings)
        self._row_locks: torch.Tensor | None = None
        self._graphs: RepeatCache[UpdateGraph] = RepeatCache(_GRAPHS)
        self._batches: dict[int, deque[Batch]] = {}  # by their sizes, those launched first ahead
        self._rows = 1 << (depth - 1).bit_length()
        self.places = itertools.count()
        self._closed = False
        self._told: set[int] = set()  # errors of the driver that updates have failed with
        self._closing = ExitStack()
        try:
            self._open(count)
        except BaseException:
            self.close()
            raise

    def _open(self, count: int) -> None:
        words = self.settings.words
        words[rings.DRIVER] = self.device.driver.table.ctypes.data
        words[rings.CONTEXT] = self.device.context
        words[rings.DEVICE] = cuda_loop.device_functions().ctypes.data
        self._counter_words = count * _COUNTER_WORDS
        found = count * self._rows
        self.pinned = PinnedMemory(self.device, WORD * (self._counter_words + found))
        self._closing.callback(self.pinned.free)
        self.verdicts = DeviceMemory(self.device, WORD * count)
        self._closing.callback(self.verdicts.free)
        if self.settings.of.row_locks is not None:  # in place of those of a CPU
            device = self.settings.of.shared.flat.device
            self._row_locks = allocate_zeros("row locks", (_ROW_LOCKS,), torch.int32, device)
        for index in range(count):
            self.lanes.append(CudaLane(index, self, self._rows))
            self.lanes[-1].follow_current()  # which may still be making what lanes use
        if self.settings.of.timed:
            reference = self.make_event(timed=True)
            reference.record(self.lanes[0].stream)
            self.clock = DeviceClock(reference)
        thread = LoopThread("hogstream-lanes", self.lanes, self.settings, self._enter)
        self.threads.append(thread)

    # What lanes take when they are made, and what is destroyed when they are closed

    def take_stream(self) -> int:
        """A stream that is a lane's until the lanes are closed."""
        stream = self.device.take_stream()
        self._closing.callback(self.device.give_back_stream, stream)
        return stream

    def make_event(self, *, timed: bool = False) -> DeviceEvent:
        """An event that lives until the lanes are closed."""
        event = DeviceEvent(self.device, timed=timed)
        self._closing.callback(event.destroy)
        return event

    def found(self, lane: int, row: int) -> int:
        """Where in pinned memory the verdict of a row comes."""
        return self.pinned.address + WORD * (self._counter_words + self._rows * lane + row)

    def check_open(self) -> None:
        """Checks that lanes are open.

        Raises:
            RuntimeError: If they are closed.
        """
        if self._closed:
            raise RuntimeError("the lanes are closed: their streams are others' now")

    # What launches

    def form(self, hyperparameters: Hyperparameters) -> Form:
        """The kernel and the factors."""
        _, kernel = self._kernels(hyperparameters)
        return Form(kernel.ctypes.data, factor_words(hyperparameters))

    def row_form(self, hyperparameters: Hyperparameters) -> RowForm:
        """The factors; and for each table, its kernels and locks."""

        def complete(table: RowTable) -> None:
            with self._telling():
                table.fields[:, CODE] = [
                    self._row_kernels.update(hyperparameters.switches, part.operands)
                    for part in table.parts
                ]
            table.fields[:, LOCKS : STRIPES + 1] = self._locks()

        return RowForm(0, factor_words(hyperparameters), complete)

    def copier(self, table: RowTable) -> int:
        """The address of the kernel that copies rows for a snapshot; completes their table."""
        with self._telling():
            kernel = self._row_kernels.copy(table.parts[0].operands)
        table.fields[:, CODE] = kernel
        table.fields[:, LOCKS : STRIPES + 1] = self._locks()
        return kernel

    def _locks(self) -> tuple[int, int]:
        """Where the locks of rows are, and how many; 0 if there are none."""
        locks = self._row_locks
        return (0, 0) if locks is None else (locks.data_ptr(), len(locks))

    def _kernels(self, hyperparameters: Hyperparameters) -> tuple[UpdateKernels, Any]:
        switches = hyperparameters.switches
        if switches not in self._kept:
            with self._telling():
                kernels = update_kernels(self.device, self.settings.of, switches)
            self._kept[switches] = kernels, kernels.words()
        return self._kept[switches]

    def flush(self, lanes: Sequence[int]) -> None:
        """Launches what was enqueued first on some lanes, as one graph if it comes again.

        Args:
            lanes: Their indices, each as often as so many of its updates are launched.
        """
        chosen = [
            self.lanes[index].enqueued.popleft() for index in lanes if self.lanes[index].enqueued
        ]
        for _, group in groupby(chosen, lambda each: isinstance(each.work, Snapshot)):
            self._launch_group(list(group))

    def _launch_group(self, group: list[_Enqueued]) -> None:
        """Launches updates together, as a graph if they come again; or snapshots."""
        if not self.ordered:  # else the order among lanes matters too
            group.sort(key=lambda each: each.lane.index)
        try:
            graph = self._find_graph(group)
            if graph is not None:
                self._launch_batch(group, graph)
                return
        except CudaError as error:  # nothing of it was launched
            for each in group:
                each.lane.launch_next(error)
            return
        for each in group:
            each.lane.launch_next()

    def _launch_batch(self, group: Sequence[_Enqueued], graph: UpdateGraph) -> None:
        batch = self._take_batch(len(group))
        lanes = dict.fromkeys(each.lane for each in group)
        recorded = sorted(group, key=lambda each: each.place)
        last = {each.maker: each.made for each in recorded}  # of a stream, behind all before
        error = next((each.error for each in group if each.error), 0)
        batch.fill(graph, [lane.address for lane in lanes], list(last.values()), error)
        ticket = self.take_ticket(self.threads[0].address) if self.ordered else 0
        for member, each in enumerate(group):
            each.lane.add_to(batch, member, ticket)
        for lane in lanes:
            lane.publish()

    def _find_graph(self, group: Sequence[_Enqueued]) -> UpdateGraph | None:
        """The graph of updates that have come before; None if they are launched one by one."""
        settings = self.settings.of
        updates = [(each.lane, each.work) for each in group if isinstance(each.work, Update)]
        if len(updates) < 2 or not settings.graphs or settings.staleness_aware:
            return None
        numbers = updates[0][1].hyperparameters
        key: list[Hashable] = [numbers]  # and what is the same for all: the settings
        for lane, update in updates:
            table = update.checked.table
            if isinstance(table, RowTable) or table.updates > 1 or not table.elements:
                return None
            if update.hyperparameters is not numbers:
                return None
            key += lane.index, update.checked.memory
        return self._graphs.find(tuple(key), partial(self._make_graph, updates))

    def _make_graph(self, updates: Sequence[tuple[CudaLane, Update]]) -> UpdateGraph:
        """Those of a lane one after the other; lanes beside each other, if updates may race."""
        numbers = updates[0][1].hyperparameters
        kernels, _ = self._kernels(numbers)
        race = not self.ordered and self.settings.of.lock is None
        nodes = [
            Node(update.checked.table.columns[:, 0].tolist(), lane.index if race else 0)
            for lane, update in updates
        ]
        races = self.settings.words[rings.RACES]
        return UpdateGraph(self.device, kernels, nodes, factor_words(numbers), races)

    def _take_batch(self, rows: int) -> Batch:
        """A batch of so many updates: one that has landed, if there is one."""
        batches = self._batches.setdefault(rows, deque())
        batch = next((each for each in batches if each.has_landed()), None)  # mostly the first
        if batch is not None:
            batches.remove(batch)
            batch.leave(self.clock)
        else:
            settings = self.settings.of
            times = [self.make_event(timed=True) for _ in range(2 if settings.timed else 0)]
            batch = Batch(self.device, rows, times, checked=settings.check_finite)
            self._closing.callback(batch.free)
        batches.append(batch)
        return batch

    # What becomes of it

    def _deliver(self, lane: int, landed: Sequence[Work]) -> None:
        if self.clock is not None:
            self.lanes[lane].take_down(self.clock, landed)
        self._deliver_further(lane, landed)

    def error(self, number: int) -> BaseException:
        """What went wrong, by minus the outcome of a row."""
        if number < DRIVER_ERRORS:
            return super().error(number)
        self._told.add(number - DRIVER_ERRORS)
        error = self.device.driver.error("the launch of an update", number - DRIVER_ERRORS)
        return self._explain(error)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Notes an error of the driver that is raised, which its worker fails with."""
        try:
            yield
        except CudaError as error:
            self._told.add(error.code)
            raise

    def _explain(self, error: CudaError) -> BaseException:
        """The error, or what did not fit if memory ran out."""
        if not error.is_out_of_memory():
            return error
        shared = self.settings.of.shared
        dtype = str(shared.flat.dtype).removeprefix("torch.")
        return MemoryError(
            f"no memory on {shared.flat.device} to launch an update of {shared.elements:,} {dtype} "
            f"elements with: {error}"
        )

    def close(self) -> None:
        """Ends the thread, and destroys what was made on the device but streams and kernels."""
        self._closed = True
        self.settings.stop()
        for thread in self.threads:
            thread.close()
        super().close()
        self._closing.callback(self._graphs.clear)
        for lane in self.lanes:  # ahead of all else: workers may have computed there to the last
            self._closing.callback(self.device.synchronize, lane.stream)
        try:
            self._closing.close()  # also if one fails; the last comes first
        except CudaError as error:
            if error.code not in self._told:  # else all was gone with the device
                raise

    def _enter(self) -> None:
        try:
            self.device.enter_thread()
        except CudaError as error:  # every row fails with it
            self.settings.words[rings.FAILED] = error.code
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_TIMER_SLACK_NS), 0, 0, 0)


def warm_up(settings: LaneSettings, device: CudaDevice, hyperparameters: Hyperparameters) -> None:
    """Compiles what lanes call and launch, before any worker can need it.

    Kernels of rows are compiled now if all updates are of rows, and else when there is one.
    """
    compile_loop()
    cuda_loop.compile_for_lanes()
    if settings.row_locks is None:
        update_kernels(device, settings, hyperparameters.switches)
    else:
        RowKernels(device, settings).compile(hyperparameters.switches)
