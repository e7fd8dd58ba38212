"""The memory that the threads of a block share."""

from __future__ import annotations

import numpy as np

from ptx_machine.errors import ThreadError
from ptx_machine.scalars import UNSIGNED, Array

#: What it holds at first: nothing that a program may count on.
_NEVER_WRITTEN = 0xA5


class SharedMemory:
    """What the threads of a block share, for several blocks."""

    def __init__(self, blocks: int, size: int) -> None:
        """Makes so many bytes for each block, which hold nothing yet."""
        self._size = size
        self._stride = -(-size // 16) * 16
        self._bytes = np.full(blocks * self._stride, _NEVER_WRITTEN, np.uint8)

    def load(self, addresses: Array, place: Array, width: int, count: int) -> list[Array]:
        """What lies at each address in the memory of its block; as ``GlobalMemory`` has it."""
        view, first = self._found(addresses, place, width, count)
        return [view[first + index] for index in range(count)]

    def store(self, addresses: Array, place: Array, values: list[Array]) -> None:
        """Writes to each address in the memory of its block; as ``GlobalMemory`` has it."""
        view, first = self._found(addresses, place, values[0].itemsize, len(values))
        for index, value in enumerate(values):
            view[first + index] = value

    def _found(self, addresses: Array, place: Array, width: int, count: int) -> tuple[Array, Array]:
        addresses = addresses.astype(np.int64)
        size = width * count
        wrong = np.flatnonzero((addresses % size != 0) | (addresses + size > self._size))
        if len(wrong):
            raise ThreadError(
                f"shared address {addresses[wrong[0]]:#x} is not a multiple of {size}, or beyond "
                f"the {self._size} bytes that a block has",
                int(wrong[0]),
            )
        view = self._bytes.view(UNSIGNED[8 * width])
        return view, (addresses + place * self._stride) // width
