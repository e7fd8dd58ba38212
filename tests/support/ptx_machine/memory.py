"""Global memory: arrays that are there, and arrays that are only pretended.

An access outside of them, or one that is not aligned, raises ``AccessError``; the thread that made
it says who it was.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from ptx_machine.observers import Observer
from ptx_machine.scalars import UNSIGNED, Array


class AccessError(Exception):
    """An access that memory refuses.

    Attributes:
        position: Which of the addresses given.
        problem: What is wrong with it.
    """

    def __init__(self, position: int, problem: str) -> None:
        super().__init__(problem)
        self.position = position
        self.problem = problem


class Region(Protocol):
    """A range of addresses.

    Attributes:
        name: What messages call it.
        base: Its first address.
        size: In bytes.
        observers: Who are told of each access.
    """

    name: str
    base: int
    size: int
    observers: list[Observer]

    def load(self, addresses: Array, width: int) -> Array:
        """Unsigned integers of ``width`` bytes from aligned addresses inside."""
        ...

    def store(self, addresses: Array, values: Array) -> None:
        """Writes unsigned integers to aligned addresses inside; of equal ones the last stays."""
        ...


class Buffer:
    """An array's own memory, at its own address."""

    def __init__(self, name: str, array: Any) -> None:
        self.name = name
        self.base, self._bytes = _bytes_of(array)
        self.size = self._bytes.nbytes
        self.observers: list[Observer] = []
        self._array = array  # which keeps the memory
        self._views: dict[int, tuple[int, Array]] = {}

    def load(self, addresses: Array, width: int) -> Array:
        """As ``Region`` has it."""
        first, view = self._view(width)
        return view[(addresses - np.uint64(first)) // np.uint64(width)]

    def store(self, addresses: Array, values: Array) -> None:
        """As ``Region`` has it."""
        width = values.itemsize
        first, view = self._view(width)
        view[(addresses - np.uint64(first)) // np.uint64(width)] = values

    def _view(self, width: int) -> tuple[int, Array]:
        """The whole of it that is aligned, as integers, and where that begins."""
        if width not in self._views:
            skipped = -self.base % width
            count = max(0, (self.size - skipped) // width)
            view = self._bytes[skipped : skipped + count * width].view(UNSIGNED[8 * width])
            self._views[width] = self.base + skipped, view
        return self._views[width]


class Pretended:
    """Memory of any size, of which only those pages exist that were touched."""

    PAGE = 1 << 16

    def __init__(self, name: str, base: int, size: int, fill: Callable[[int], Array]) -> None:
        self.name = name
        self.base = base
        self.size = size
        self.observers: list[Observer] = []
        self.pages: dict[int, Array] = {}
        self._fill = fill

    def load(self, addresses: Array, width: int) -> Array:
        """As ``Region`` has it."""
        values = np.empty(len(addresses), UNSIGNED[8 * width])
        for places, page, offsets in self._by_page(addresses):
            values[places] = page.view(values.dtype)[offsets // np.uint64(width)]
        return values

    def store(self, addresses: Array, values: Array) -> None:
        """As ``Region`` has it."""
        for places, page, offsets in self._by_page(addresses):
            page.view(values.dtype)[offsets // np.uint64(values.itemsize)] = values[places]

    def _by_page(self, addresses: Array) -> Any:
        offsets = addresses - np.uint64(self.base)
        numbers = offsets // np.uint64(self.PAGE)
        for number in np.unique(numbers):
            places = np.flatnonzero(numbers == number)
            yield places, self._page(int(number)), offsets[places] % np.uint64(self.PAGE)

    def _page(self, number: int) -> Array:
        if number not in self.pages:
            page = np.array(self._fill(number * self.PAGE)).reshape(-1).view(np.uint8)
            if page.nbytes != self.PAGE:
                raise ValueError(f"a page must be of {self.PAGE} bytes, got {page.nbytes}")
            self.pages[number] = page
        return self.pages[number]


class GlobalMemory:
    """All that the threads of all launches share."""

    #: Where pretended memory begins: no system gives a process such addresses.
    PRETENDED = 1 << 60

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._regions: list[Region] = []

    def add(self, name: str, array: Any) -> Buffer:
        """Lets threads reach an array at its own address.

        Args:
            name: What messages call it.
            array: Contiguous: of NumPy's, or a CPU tensor of torch's. It is written in place.

        Raises:
            ValueError: If it is not contiguous, or shares addresses with another.
        """
        buffer = Buffer(name, array)
        self._insert(buffer)
        return buffer

    def pretend(
        self,
        name: str,
        size: int,
        fill: Callable[[int], Array] = lambda offset: np.zeros(Pretended.PAGE, np.uint8),
    ) -> Pretended:
        """Memory that is not there, at an address that nothing has.

        Args:
            name: What messages call it.
            size: In bytes.
            fill: What a page holds at first, by its offset in bytes: as many as ``Pretended.PAGE``.
        """
        last = max(self.PRETENDED, *(each.base + each.size for each in self._regions), 0)
        base = (last // Pretended.PAGE + 1) * Pretended.PAGE
        region = Pretended(name, base, size, fill)
        self._insert(region)
        return region

    def load(self, addresses: Array, width: int, count: int, reader: int) -> list[Array]:
        """What lies at each address: ``count`` integers of ``width`` bytes, as so many arrays.

        Raises:
            AccessError: If an access is not aligned to its whole size, or not within one region.
        """
        return self._load(addresses, width, count, reader)

    def _load(self, addresses: Array, width: int, count: int, reader: int | None) -> list[Array]:
        values = [np.empty(len(addresses), UNSIGNED[8 * width]) for _ in range(count)]
        for places, region in self._regions_of(addresses, width * count):
            here = addresses[places]
            if reader is not None:
                for each in region.observers:
                    each.read(here - np.uint64(region.base), width * count, reader)
            for index, value in enumerate(values):
                value[places] = region.load(here + np.uint64(index * width), width)
        return values

    def store(self, addresses: Array, values: list[Array], writer: int) -> None:
        """Writes an integer of each array, one after the other, to each address.

        Raises:
            AccessError: As ``load`` does; then nothing has been written.
        """
        width = values[0].itemsize
        for places, region in self._regions_of(addresses, width * len(values)):
            here = addresses[places]
            for each in region.observers:
                each.wrote(here - np.uint64(region.base), width * len(values), writer)
            for index, value in enumerate(values):
                region.store(here + np.uint64(index * width), value[places])

    def change(
        self,
        addresses: Array,
        width: int,
        new: Callable[[Array], Array],
        reads: bool,
        launch: int,
    ) -> Array:
        """Writes what follows from what is there, which nobody else changes meanwhile.

        Args:
            addresses: Of integers.
            width: How many bytes each has.
            new: What to write, by what was there.
            reads: Whether that depends on what was there.
            launch: Which launch does so.

        Returns:
            What was there.
        """
        (before,) = self._load(addresses, width, 1, launch if reads else None)
        self.store(addresses, [new(before)], launch)
        return before

    def region(self, name: str) -> Region:
        """The region of a name.

        Raises:
            KeyError: If there is none.
        """
        for region in self._regions:
            if region.name == name:
                return region
        raise KeyError(name)

    def _insert(self, region: Region) -> None:
        place = bisect_right(self._bases, region.base)
        before = self._regions[place - 1 : place]
        after = self._regions[place : place + 1]
        for one, other in [*((each, region) for each in before), *((region, each) for each in after)]:
            if one.base + one.size > other.base:
                raise ValueError(f"{region.name} shares addresses with another region")
        self._bases.insert(place, region.base)
        self._regions.insert(place, region)

    def _regions_of(self, addresses: Array, size: int) -> list[tuple[Any, Region]]:
        """Which of the addresses lie in which region."""
        unaligned = np.flatnonzero(addresses % np.uint64(size))
        if len(unaligned):
            self._refuse(addresses, int(unaligned[0]), f"is not a multiple of {size}")
        lowest, highest = int(addresses.min()), int(addresses.max())
        region = self._region_at(lowest)
        if region is not None and highest + size <= region.base + region.size:
            return [(slice(None), region)]
        if not self._regions:
            self._refuse(addresses, 0, f"is in no region: an access of {size} bytes")
        found = np.searchsorted(np.array(self._bases, np.uint64), addresses, "right") - 1
        outside = np.flatnonzero(
            [
                index < 0
                or int(address) + size > self._regions[index].base + self._regions[index].size
                for index, address in zip(found, addresses, strict=True)
            ]
        )
        if len(outside):
            self._refuse(addresses, int(outside[0]), f"is in no region: an access of {size} bytes")
        return [
            (np.flatnonzero(found == index), self._regions[index]) for index in np.unique(found)
        ]

    def _region_at(self, address: int) -> Region | None:
        place = bisect_right(self._bases, address)
        return self._regions[place - 1] if place else None

    def _refuse(self, addresses: Array, position: int, problem: str) -> None:
        address = int(addresses[position])
        near = self._region_at(address)
        where = "" if near is None else f" ({near.name}, of {near.size} bytes, {address - near.base:+})"
        raise AccessError(position, f"address {address:#x}{where} {problem}")


def _bytes_of(array: Any) -> tuple[int, Array]:
    """Where an array or a tensor lies, and its memory as bytes."""
    if hasattr(array, "data_ptr"):  # torch's: NumPy lacks some of its types
        contiguous, address = array.is_contiguous(), array.data_ptr()
    else:
        contiguous, address = array.flags.c_contiguous, array.ctypes.data
    if not contiguous:
        raise ValueError("an array must be contiguous")
    size = int(array.nbytes)
    return address, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
