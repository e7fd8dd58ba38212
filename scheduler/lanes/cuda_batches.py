"""Batches: updates of CUDA lanes that are launched as one graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hogstream.scheduler.lanes import cuda_loop
from hogstream.scheduler.lanes.cuda_device import CudaDevice, DeviceEvent, PinnedMemory
from hogstream.scheduler.lanes.cuda_graphs import UpdateGraph
from hogstream.scheduler.lanes.rings import WORD


class Batch:
    """What the loop must know of a batch, used again for another of as many updates.

    Attributes:
        rows: How many updates it has.
        address: Of its memory.
        times: Events before and behind it, if times are taken.
        words: Its memory.
    """

    def __init__(self, device: CudaDevice, rows: int, *, checked: bool, timed: bool) -> None:
        """Makes the memory.

        Args:
            device: Where it is launched.
            rows: How many updates it has.
            checked: Whether gradients are looked at.
            timed: Whether times are taken.

        Raises:
            CudaError: If the driver refuses; nothing is left.
        """
        self.rows = rows
        self._device = device
        self._memory = np.zeros(cuda_loop.BATCH_WORDS, np.int64)
        self.words = self._memory.data
        self.address = self._memory.ctypes.data
        self._graph: UpdateGraph | None = None
        self._left = 0
        self._made: list[DeviceEvent] = []
        self._made_handles: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._lanes: npt.NDArray[np.int64] = self._made_handles
        self._found = PinnedMemory(device, WORD * rows) if checked else None
        self.times: list[DeviceEvent] = []
        try:
            if timed:
                for _ in range(2):
                    self.times.append(DeviceEvent(device, timed=True))
        except BaseException:
            self.free()
            raise

    def fill(self, graph: UpdateGraph, lanes: Sequence[int], makers: Sequence[int]) -> None:
        """Makes it ready to be launched.

        Args:
            graph: What is launched.
            lanes: The addresses of its lanes.
            makers: The streams that make the gradients; it is launched behind what they have now.

        Raises:
            CudaError: If an event cannot be recorded.
        """
        while len(self._made) < len(makers):
            self._made.append(DeviceEvent(self._device))
        for event, maker in zip(self._made, makers, strict=False):
            event.record(maker)
        self._made_handles = np.array([each.handle for each in self._made], np.int64)
        self._lanes = np.array(lanes, np.int64)
        self.words[:] = np.zeros(cuda_loop.BATCH_WORDS, np.int64).data
        for word, value in (
            (cuda_loop.GRAPH, graph.handle),
            (cuda_loop.BATCH_ROWS, self.rows),
            (cuda_loop.BATCH_LANES, len(lanes)),
            (cuda_loop.BATCH_LANE_ADDRESSES, self._lanes.ctypes.data),
            (cuda_loop.MADE_EVENTS, self._made_handles.ctypes.data),
            (cuda_loop.MADE_COUNT, len(makers)),
            (cuda_loop.VERDICTS, graph.verdicts),
            (cuda_loop.FOUND_VERDICTS, self.found(0)),
            *(
                (cuda_loop.BATCH_TIMES + place, event.handle)
                for place, event in enumerate(self.times)
            ),
        ):
            self.words[word] = value
        graph.take()
        self._graph, self._left = graph, self.rows

    def found(self, index: int) -> int:
        """Where the verdict of one of its updates comes; 0 if nobody asks."""
        return self._found.address + WORD * index if self._found else 0

    def deliver(self, rows: int) -> bool:
        """So many of its updates were delivered; whether those were the last."""
        self._left -= rows
        if self._left:
            return False
        assert self._graph is not None
        self._graph.give_back()
        self._graph = None
        return True

    def free(self) -> None:
        """Destroys what it has on the device; nothing of it may be in flight."""
        for event in [*self._made, *self.times]:
            event.destroy()
        if self._found:
            self._found.free()
