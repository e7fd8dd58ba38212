"""Lanes: in-order queues of updates that run beside each other."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from hogstream.scheduler.shared_parameters import SharedParameters
from hogstream.scheduler.updates import Landings, Update


class Lane(Protocol):
    """An in-order queue of updates; a CPU thread or a CUDA stream."""

    def launch(self, update: Update) -> None:
        """Queues an update and returns at once; it is appended to the landings when it lands.

        A failure is carried in the update too, and raised nowhere.
        """

    def computing(self) -> AbstractContextManager[object]:
        """A context in which a thread's device work goes down this lane, ahead of later updates.

        Call it where the inputs of that work were made: they are waited for on the device. Enter
        the context on the thread that works.
        """

    def close(self) -> None:
        """Ends the lane; all its updates must have landed."""


class Lanes(Protocol):
    """All lanes of a scheduler, opened and closed together."""

    lanes: list[Lane]

    def close(self) -> None:
        """Ends every lane; all updates must have landed."""


def open_lanes(shared: SharedParameters, count: int, landings: Landings) -> Lanes:
    """Opens lanes on the device of the shared parameters: CUDA streams, or CPU threads.

    Args:
        shared: The parameters that the lanes update.
        count: How many lanes.
        landings: Where updates go when they land.

    Raises:
        ValueError: If there are no lanes for the device.
        RuntimeError: If the device refuses; nothing is left open.
    """
    if shared.flat.device.type == "cuda":
        from hogstream.scheduler.cuda_lanes import CudaLanes

        return CudaLanes(shared.flat.device, count, landings)
    if shared.flat.device.type == "cpu":
        from hogstream.scheduler.thread_lanes import ThreadLanes

        return ThreadLanes(count, landings)
    raise ValueError(f"shared must be on a CUDA or CPU device, got {shared.flat.device}")
