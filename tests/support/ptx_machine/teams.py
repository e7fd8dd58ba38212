"""Blocks that run together, and the memory that the threads of a block share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ptx_machine.memory import AccessError
from ptx_machine.ports import Port
from ptx_machine.program import Program
from ptx_machine.scalars import UNSIGNED, Array
from ptx_machine.strands import WARP, State, Strand

#: What shared memory holds at first: nothing that a program may count on.
_NEVER_WRITTEN = 0xA5


class Launch(NamedTuple):
    """A kernel with its arguments.

    Attributes:
        program: What to run.
        grid: How many blocks: (x, y, z).
        arguments: One integer for each parameter: a number, an address, or a number's bits.
        shared: How many bytes a block has of the shared memory whose size a launch says.
        number: What tells it from others that are in flight, and what ``Lineage`` calls it.
        threads: How many a block has, (x, y, z), where the program does not say.
    """

    program: Program
    grid: tuple[int, int, int]
    arguments: Sequence[int]
    shared: int = 0
    number: int = 0
    threads: tuple[int, int, int] | None = None

    @property
    def block(self) -> tuple[int, int, int]:
        """How many threads a block has.

        Raises:
            ValueError: If neither the program nor the launch says, or they disagree.
        """
        required, given = self.program.kernel.threads, self.threads
        if required is not None and given is not None and required != given:
            raise ValueError(f"threads must be {required}, as the kernel requires, got {given}")
        if required is None and given is None:
            raise ValueError("threads must be given: the kernel does not say how many")
        return required or given or (0, 0, 0)

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        x, y, z = self.grid
        return x * y * z


class Team:
    """Blocks of one launch that run side by side.

    Attributes:
        launch: Theirs.
        memory: How they reach what all threads share.
        blocks: Which of the grid's they are: int64.
        strands: Their threads.
        shared: What the threads of each block share.
    """

    def __init__(self, launch: Launch, memory: Port, blocks: Array, by_warp: bool) -> None:
        """Makes the threads.

        Args:
            launch: Theirs.
            memory: How they reach what all threads share.
            blocks: Which of the grid's they are.
            by_warp: Whether each warp is a strand; else all threads are one.
        """
        self.launch = launch
        self.memory = memory
        self.blocks = np.asarray(blocks, np.int64)
        program = launch.program
        self.shared = SharedMemory(len(self.blocks), program.shared_size(launch.shared))
        x, y, z = launch.block
        threads = x * y * z
        place = np.repeat(np.arange(len(self.blocks)), threads)
        thread = np.tile(np.arange(threads), len(self.blocks))
        warps = place * threads + thread // WARP
        groups = [np.flatnonzero(warps == each) for each in np.unique(warps)]
        self.strands = [
            Strand(self, place[group], thread[group], program.registers)
            for group in (groups if by_warp else [slice(None)])
        ]

    def wait(self) -> None:
        """Opens the barrier if nobody is left who could still come."""
        if not self.ended and all(strand.state is not State.RUNS for strand in self.strands):
            self.memory.met(self)
            for strand in self.strands:
                strand.release()

    @property
    def ended(self) -> bool:
        """Whether all threads have."""
        return all(strand.state is State.ENDED for strand in self.strands)


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
            raise AccessError(
                int(wrong[0]),
                f"shared address {addresses[wrong[0]]:#x} is not a multiple of {size}, or beyond "
                f"the {self._size} bytes that a block has",
            )
        view = self._bytes.view(UNSIGNED[8 * width])
        return view, (addresses + place * self._stride) // width
