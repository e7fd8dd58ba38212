"""Who see each access to a region, and so know the truth about what raced there."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from ptx_machine.past import Past
from ptx_machine.scalars import Array


class Observer(Protocol):
    """Is told of each access to a region, in the order in which they take effect."""

    def read(self, offsets: Array, size: int, launch: int, time: int | None) -> None:
        """A launch reads ``size`` bytes at each offset, as they were at a time, or are (None)."""

    def wrote(self, offsets: Array, size: int, launch: int) -> None:
        """A launch writes ``size`` bytes at each offset."""

    def remember(self, time: int) -> None:
        """What is so now is so until this time."""


class Event(NamedTuple):
    """An access.

    Attributes:
        offset: Where in the region, in bytes.
        launch: Whose.
        writes: Whether it is a write.
        after: How many writes had taken effect before it, or before what it saw.
    """

    offset: int
    launch: int
    writes: bool
    after: int


class Journal:
    """All accesses.

    Attributes:
        events: They, as they were made.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._writes = 0
        self._past: Past[int] = Past()

    def read(self, offsets: Array, size: int, launch: int, time: int | None) -> None:
        """Notes reads."""
        after = self._past.at(time, self._writes)
        self.events += [Event(int(offset), launch, False, after) for offset in offsets]

    def wrote(self, offsets: Array, size: int, launch: int) -> None:
        """Notes writes."""
        for offset in offsets:
            self.events.append(Event(int(offset), launch, True, self._writes))
            self._writes += 1

    def remember(self, time: int) -> None:
        """Keeps how many writes there were."""
        self._past.keep(time, self._writes)


class Lineage:
    """Which updates are in each element.

    That is found by following the elements, not by counting: a launch that writes an element passes
    on whatever was in it when that launch last read it, and itself. Whatever landed meanwhile is
    lost. There are at most 64 launches, numbered from 0 on.

    Attributes:
        held: For each element, a bit for each launch whose write is in it: uint64, (elements,).
        written: For each, a bit for each launch that has written it: uint64, (elements,).
    """

    def __init__(self, elements: int, width: int) -> None:
        """For a region of so many elements, each of so many bytes."""
        self.held = np.zeros(elements, np.uint64)
        self.written = np.zeros(elements, np.uint64)
        self._width = width
        self._read: dict[int, Array] = {}
        self._past: Past[Array] = Past()

    def read(self, offsets: Array, size: int, launch: int, time: int | None) -> None:
        """Notes what a launch sees."""
        elements = self._elements(offsets, size)
        self._seen_by(launch)[elements] = self._past.at(time, self.held)[elements]

    def wrote(self, offsets: Array, size: int, launch: int) -> None:
        """Passes on what a launch has seen, and itself."""
        elements = self._elements(offsets, size)
        itself = np.uint64(1 << launch)
        self.held[elements] = self._seen_by(launch)[elements] | itself
        self.written[elements] |= itself

    def remember(self, time: int) -> None:
        """Keeps what is in each element."""
        self._past.keep(time, self.held.copy())

    def lost(self) -> Array:
        """How many launches wrote each element, and are in it no more: int64, (elements,)."""
        return count_bits(self.written & ~self.held)

    def _elements(self, offsets: Array, size: int) -> Array:
        if size % self._width:
            raise ValueError(f"an access of {size} bytes to elements of {self._width}")
        first = offsets // np.uint64(self._width)
        return (first[:, None] + np.arange(size // self._width, dtype=np.uint64)).reshape(-1)

    def _seen_by(self, launch: int) -> Array:
        if launch not in self._read:
            self._read[launch] = np.zeros_like(self.held)
        return self._read[launch]


def count_bits(words: Array) -> Array:
    """How many bits of each are set: int64, of the same shape."""
    octets = np.ascontiguousarray(words, np.uint64).view(np.uint8).reshape(*words.shape, 8)
    counted: Array = np.unpackbits(octets, axis=-1).sum(axis=-1, dtype=np.int64)
    return counted
