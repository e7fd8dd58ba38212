"""Batches: updates of CUDA lanes that are launched as one graph."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from hogstream.scheduler.lanes import cuda_batch_launch
from hogstream.scheduler.lanes.cuda_clock import DeviceClock
from hogstream.scheduler.lanes.cuda_device import CudaDevice, DeviceEvent, PinnedMemory
from hogstream.scheduler.lanes.cuda_driver import CudaError
from hogstream.scheduler.lanes.cuda_graphs import UpdateGraph
from hogstream.scheduler.lanes.rings import WORD


class Batch:
    """What the loop must know of a batch, used again for another of as many updates.

    Attributes:
        rows: How many updates it has.
        address: Of its memory.
        times: Events before and behind it, if times are taken.
        untold: How many of its updates have yet to be told those times.
        words: Its memory.
    """

    def __init__(
        self, device: CudaDevice, rows: int, times: list[DeviceEvent], *, checked: bool
    ) -> None:
        """Makes the memory.

        Args:
            device: Where it is launched.
            rows: How many updates it has.
            times: Two events, which are somebody else's, or none if no times are taken.
            checked: Whether gradients are looked at.

        Raises:
            CudaError: If the driver refuses.
        """
        self.rows = rows
        self.times = times
        self._memory = np.zeros(cuda_batch_launch.BATCH_WORDS, np.int64)
        self.words = self._memory.data
        self.address = self._memory.ctypes.data
        self._graph: UpdateGraph | None = None
        self.untold = 0
        self._made: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._lanes: npt.NDArray[np.int64] = self._made
        self._found = PinnedMemory(device, WORD * rows) if checked else None

    def fill(
        self, graph: UpdateGraph, lanes: Sequence[int], made: Sequence[int], error: int
    ) -> None:
        """Makes it ready to be launched.

        Args:
            graph: What is launched.
            lanes: The addresses of its lanes.
            made: The events behind what makes its gradients.
            error: Of the driver, with which it fails; or 0.
        """
        self._made = np.array(made, np.int64)
        self._lanes = np.array(lanes, np.int64)
        self.words[:] = np.zeros(cuda_batch_launch.BATCH_WORDS, np.int64).data
        for word, value in (
            (cuda_batch_launch.GRAPH, graph.handle),
            (cuda_batch_launch.BATCH_ROWS, self.rows),
            (cuda_batch_launch.BATCH_LANES, len(lanes)),
            (cuda_batch_launch.BATCH_LANE_ADDRESSES, self._lanes.ctypes.data),
            (cuda_batch_launch.MADE_EVENTS, self._made.ctypes.data),
            (cuda_batch_launch.MADE_COUNT, len(made)),
            (cuda_batch_launch.BATCH_ERROR, error),
            (cuda_batch_launch.VERDICTS, graph.verdicts),
            (cuda_batch_launch.FOUND_VERDICTS, self.found(0)),
            *(
                (cuda_batch_launch.BATCH_TIMES + place, event.handle)
                for place, event in enumerate(self.times)
            ),
        ):
            self.words[word] = value
        graph.take()
        self._graph, self.untold = graph, self.rows if self.times else 0

    def found(self, index: int) -> int:
        """Where the verdict of one of its updates comes; 0 if nobody asks."""
        return self._found.address + WORD * index if self._found else 0

    def has_landed(self) -> bool:
        """Whether it can be used again."""
        landed: int = self.words[cuda_batch_launch.BATCH_LANDED]
        return landed == self.rows and not self.untold

    def leave(self, clock: DeviceClock | None = None) -> None:
        """Lets go of its graph, once it has landed.

        Args:
            clock: Counts from when it landed then, if it has counted from long ago.
        """
        if self._graph is not None:
            self._graph.give_back()
            self._graph = None
        if clock is not None:
            with suppress(CudaError):  # such as a device lost since
                self.times[1] = clock.follow(self.times[1])

    def free(self) -> None:
        """Frees what it has on the device; nothing of it may be in flight."""
        self.leave()
        if self._found:
            self._found.free()
