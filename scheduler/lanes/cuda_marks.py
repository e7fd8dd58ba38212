"""What a launch leaves on the device for the host to see, made once and used again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")

_FOLLOW_AFTER_NS = 1_000_000_000


class Pool(Generic[T]):
    """Things that cost more to make than to use again."""

    def __init__(self, make: Callable[[], T]) -> None:
        """An empty one.

        Args:
            make: Makes one more.
        """
        self._make = make
        self._idle: list[T] = []

    def take(self) -> T:
        """One that nobody uses; from any thread."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._make()

    def give_back(self, thing: T) -> None:
        """Lets it be used again; from any thread."""
        self._idle.append(thing)

    def clear(self) -> None:
        """Lets go of all that nobody uses."""
        self._idle.clear()


class Mark:
    """The events and verdicts of one launch.

    Attributes:
        landed: Recorded behind it; times are taken only if asked for, and cost ten times more.
        started: Recorded ahead of it, if times are taken.
        verdicts: Pinned, int32, shape (updates,): nonzero for an update that was left out; None if
            nobody asks.
    """

    def __init__(self, *, timed: bool, verdicts: int) -> None:
        self.landed = torch.cuda.Event(enable_timing=timed)
        self.started = torch.cuda.Event(enable_timing=True) if timed else None
        self.verdicts = (
            torch.zeros(verdicts, dtype=torch.int32, device="cpu", pin_memory=True)
            if verdicts
            else None
        )


class DeviceClock:
    """Tells when the device came to an event, by ``time.perf_counter_ns``.

    The device gives the milliseconds between two events as float32, which after 20 minutes cannot
    tell times apart that are 60 microseconds apart. So the event to count from is moved along.
    """

    def __init__(self, reference: Any) -> None:
        """Waits for an event, recorded on an idle stream, to count from."""
        reference.synchronize()
        self._reference, self._reference_ns = reference, time.perf_counter_ns()

    def read(self, event: Any) -> int:
        """When an event was, in nanoseconds."""
        return self._reference_ns + self._ns_since(event)

    def follow(self, event: Any) -> Any:
        """Counts from an event that is done, if the old one was long ago.

        Returns:
            The event of the two that is free to be recorded again.
        """
        since = self._ns_since(event)
        if since < _FOLLOW_AFTER_NS:
            return event
        free, self._reference = self._reference, event
        self._reference_ns += since
        return free

    def _ns_since(self, event: Any) -> int:
        milliseconds: float = self._reference.elapsed_time(event)
        return round(milliseconds * 1e6)
