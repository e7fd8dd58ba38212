"""Global memory: arrays that are there, and arrays that are only pretended.

An access outside of them, or one that is not aligned, is a ``ThreadError``.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NoReturn, Protocol

import numpy as np

from ptx_machine.errors import ThreadError
from ptx_machine.observers import Observer
from ptx_machine.past import Past
from ptx_machine.scalars import UNSIGNED, Array


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

    def load(self, addresses: Array, width: int, time: int | None) -> Array:
        """Unsigned integers of ``width`` bytes from aligned addresses, at a time or (None) now."""

    def store(self, addresses: Array, values: Array) -> None:
        """Writes unsigned integers to aligned addresses; of those to the same the last stays."""

    def remember(self, time: int) -> None:
        """What is there now is so until this time."""


class Buffer:
    """An array's own memory, at its own address."""

    def __init__(self, name: str, array: Any) -> None:
        self.name = name
        self.base, self._bytes = _bytes_of(array)
        self.size = self._bytes.nbytes
        self.observers: list[Observer] = []
        self._array = array  # which keeps the memory
        self._past: Past[Array] = Past()

    def load(self, addresses: Array, width: int, time: int | None) -> Array:
        """As ``Region`` has it."""
        first, view = self._view(self._past.at(time, self._bytes), width)
        values: Array = view[(addresses - np.uint64(first)) // np.uint64(width)]
        return values

    def store(self, addresses: Array, values: Array) -> None:
        """As ``Region`` has it."""
        first, view = self._view(self._bytes, values.itemsize)
        view[(addresses - np.uint64(first)) // np.uint64(values.itemsize)] = values

    def remember(self, time: int) -> None:
        """As ``Region`` has it."""
        self._past.keep(time, self._bytes.copy())

    def _view(self, octets: Array, width: int) -> tuple[int, Array]:
        """All of it that is aligned, as integers, and where that begins."""
        skipped = -self.base % width
        count = max(0, (self.size - skipped) // width)
        view = octets[skipped : skipped + count * width].view(UNSIGNED[8 * width])
        return self.base + skipped, view


class Pretended:
    """Memory of any size, of which only those pages exist that were touched.

    It keeps no history: whoever asks for an earlier time sees it as it is.

    Attributes:
        pages: Those, by number: uint8, (``PAGE``,).
    """

    PAGE = 1 << 16

    def __init__(self, name: str, base: int, size: int, fill: Callable[[int], Array]) -> None:
        self.name = name
        self.base = base
        self.size = size
        self.observers: list[Observer] = []
        self.pages: dict[int, Array] = {}
        self._fill = fill

    def load(self, addresses: Array, width: int, time: int | None) -> Array:
        """As ``Region`` has it."""
        values = np.empty(len(addresses), UNSIGNED[8 * width])
        for places, page, offsets in self._by_page(addresses):
            values[places] = page.view(values.dtype)[offsets // np.uint64(width)]
        return values

    def store(self, addresses: Array, values: Array) -> None:
        """As ``Region`` has it."""
        for places, page, offsets in self._by_page(addresses):
            page.view(values.dtype)[offsets // np.uint64(values.itemsize)] = values[places]

    def remember(self, time: int) -> None:
        """As the class says, nothing."""

    def _by_page(self, addresses: Array) -> Iterator[tuple[Array, Array, Array]]:
        offsets = addresses - np.uint64(self.base // self.PAGE * self.PAGE)
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


def _zeros(offset: int) -> Array:
    return np.zeros(Pretended.PAGE, np.uint8)


class GlobalMemory:
    """All that the threads of all launches share.

    Attributes:
        time: How many stores have taken effect.
    """

    #: Where pretended memory begins: no system gives a process such addresses.
    PRETENDED = 1 << 60

    def __init__(self) -> None:
        self.time = 0
        self._bases: list[int] = []
        self._regions: list[Region] = []
        self._keeps_history = False

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
        self, name: str, size: int, fill: Callable[[int], Array] = _zeros, offset: int = 0
    ) -> Pretended:
        """Memory that is not there, at addresses that nothing has.

        Args:
            name: What messages call it.
            size: In bytes.
            fill: What a page holds at first, ``Pretended.PAGE`` bytes, by how many bytes lie
                between the first page and it.
            offset: By how many bytes the memory lies off the start of its first page.
        """
        last = max(self.PRETENDED, *(each.base + each.size for each in self._regions), 0)
        base = (last // Pretended.PAGE + 1) * Pretended.PAGE + offset
        region = Pretended(name, base, size, fill)
        self._insert(region)
        return region

    def region(self, name: str) -> Region:
        """The first region of a name.

        Raises:
            KeyError: If there is none.
        """
        for region in self._regions:
            if region.name == name:
                return region
        raise KeyError(name)

    def keep_history(self) -> None:
        """Lets loads ask, from now on, what was there at an earlier time."""
        self._keeps_history = True

    def check(self, addresses: Array, size: int) -> None:
        """Checks accesses of so many bytes at each address.

        Raises:
            ThreadError: If one is not aligned to its whole size, or not within one region.
        """
        self._regions_of(addresses, size)

    def load(
        self, addresses: Array, width: int, count: int, launch: int, time: int | None = None
    ) -> list[Array]:
        """What lies at each address: ``count`` integers of ``width`` bytes, as so many arrays.

        Args:
            addresses: uint64.
            width: In bytes.
            count: How many lie one after the other.
            launch: Who asks.
            time: When, if not now.

        Raises:
            ThreadError: As ``check`` does.
        """
        values = [np.empty(len(addresses), UNSIGNED[8 * width]) for _ in range(count)]
        for places, region in self._regions_of(addresses, width * count):
            here = addresses[places]
            for each in region.observers:
                each.read(here - np.uint64(region.base), width * count, launch, time)
            for index, value in enumerate(values):
                value[places] = region.load(here + np.uint64(index * width), width, time)
        return values

    def store(self, addresses: Array, values: list[Array], launch: int) -> None:
        """Writes an integer of each array, one after the other, to each address.

        Raises:
            ThreadError: As ``check`` does; then nothing has been written.
        """
        width = values[0].itemsize
        for places, region in self._regions_of(addresses, width * len(values)):
            here = addresses[places]
            if self._keeps_history:
                region.remember(self.time)
            for each in region.observers:
                if self._keeps_history:
                    each.remember(self.time)
                each.wrote(here - np.uint64(region.base), width * len(values), launch)
            for index, value in enumerate(values):
                region.store(here + np.uint64(index * width), value[places])
        self.time += 1

    def change(
        self,
        address: Array,
        width: int,
        new: Callable[[Array], Array | None],
        reads: bool,
        launch: int,
    ) -> Array:
        """Writes what follows from what is there, which nobody else changes meanwhile.

        Args:
            address: Of an integer: uint64, (1,).
            width: How many bytes it has.
            new: What to write, by what was there; None for nothing.
            reads: Whether that depends on what was there.
            launch: Who does so.

        Returns:
            What was there.
        """
        ((_, region),) = self._regions_of(address, width)
        if reads:
            for each in region.observers:
                each.read(address - np.uint64(region.base), width, launch, None)
        before = region.load(address, width, None)
        after = new(before)
        if after is not None:
            self.store(address, [after], launch)
        return before

    def _insert(self, region: Region) -> None:
        place = bisect_right(self._bases, region.base)
        around = [*self._regions[:place][-1:], region, *self._regions[place : place + 1]]
        for one, other in pairwise(around):
            if one.base + one.size > other.base:
                raise ValueError(f"{one.name} and {other.name} share addresses")
        self._bases.insert(place, region.base)
        self._regions.insert(place, region)

    def _regions_of(self, addresses: Array, size: int) -> list[tuple[Any, Region]]:
        """Which of the addresses lie in which region."""
        unaligned = np.flatnonzero(addresses % np.uint64(size))
        if len(unaligned):
            self._refuse(addresses, int(unaligned[0]), f"is not a multiple of {size}")
        region = self._region_at(int(addresses.min()))
        if region is not None and int(addresses.max()) + size <= region.base + region.size:
            return [(slice(None), region)]
        found = np.array([self._index_of(int(address), size) for address in addresses])
        outside = np.flatnonzero(found < 0)
        if len(outside):
            self._refuse(addresses, int(outside[0]), f"is in no region: {size} bytes")
        indices = [int(index) for index in np.unique(found)]
        return [(np.flatnonzero(found == index), self._regions[index]) for index in indices]

    def _index_of(self, address: int, size: int) -> int:
        """Which region holds so many bytes from an address on; -1 if none does."""
        index = bisect_right(self._bases, address) - 1
        if index < 0 or address + size > self._regions[index].base + self._regions[index].size:
            return -1
        return index

    def _region_at(self, address: int) -> Region | None:
        """The last region that begins at or before an address."""
        place = bisect_right(self._bases, address)
        return self._regions[place - 1] if place else None

    def _refuse(self, addresses: Array, position: int, problem: str) -> NoReturn:
        address = int(addresses[position])
        near = self._region_at(address)
        where = "" if near is None else f" (that of {near.name} {address - near.base:+} bytes)"
        raise ThreadError(f"address {address:#x}{where} {problem}", position)


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
