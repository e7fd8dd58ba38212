"""Who see each access to a region, and so know the truth about what raced there."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from ptx_machine.scalars import Array


class Observer(Protocol):
    """Is told of each access to a region, in the order in which memory has them."""

    def read(self, offsets: Array, size: int, launch: int) -> None:
        """A launch has read ``size`` bytes at each offset."""

    def wrote(self, offsets: Array, size: int, launch: int) -> None:
        """A launch has written ``size`` bytes at each offset."""


class Event(NamedTuple):
    """An access.

    Attributes:
        offset: Where in the region, in bytes.
        launch: Whose.
        writes: Whether it is a write.
    """

    offset: int
    launch: int
    writes: bool


class Journal:
    """All accesses, in their order.

    Attributes:
        events: They.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []

    def read(self, offsets: Array, size: int, launch: int) -> None:
        """Notes reads."""
        self.events += [Event(int(offset), launch, False) for offset in offsets]

    def wrote(self, offsets: Array, size: int, launch: int) -> None:
        """Notes writes."""
        self.events += [Event(int(offset), launch, True) for offset in offsets]


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

    def read(self, offsets: Array, size: int, launch: int) -> None:
        """Notes that a launch has read so many bytes at each offset."""
        elements = self._elements(offsets, size)
        self._seen_by(launch)[elements] = self.held[elements]

    def wrote(self, offsets: Array, size: int, launch: int) -> None:
        """Notes that a launch writes so many bytes at each offset."""
        elements = self._elements(offsets, size)
        itself = np.uint64(1 << launch)
        self.held[elements] = self._seen_by(launch)[elements] | itself
        self.written[elements] |= itself

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
