"""A clock of the device's: when it came to an event."""

from __future__ import annotations

import time
from typing import Any

_FOLLOW_AFTER_NS = 1_000_000_000


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
