"""What things were like before."""

from __future__ import annotations

from bisect import bisect_left
from typing import Generic, TypeVar

T = TypeVar("T")


class Past(Generic[T]):
    """States of something, each with the last time at which it was so."""

    def __init__(self) -> None:
        self._times: list[int] = []
        self._states: list[T] = []

    def keep(self, time: int, state: T) -> None:
        """Keeps a state that ends at a time, which is later than those before."""
        self._times.append(time)
        self._states.append(state)

    def at(self, time: int | None, now: T) -> T:
        """The state at a time; that of now if it has not changed since, or time is None."""
        if time is None:
            return now
        place = bisect_left(self._times, time)
        return self._states[place] if place < len(self._times) else now
