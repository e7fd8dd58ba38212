"""Launches, and their blocks that run together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ptx_machine.program import Program
from ptx_machine.scalars import Array
from ptx_machine.shared import SharedMemory
from ptx_machine.strands import WARP, Port, Setting, State, Strand


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

    @property
    def setting(self) -> Setting:
        """What its threads know of it.

        Raises:
            ValueError: If the program takes another number of arguments.
        """
        needed = len(self.program.kernel.parameters)
        if len(self.arguments) != needed:
            raise ValueError(f"arguments must be {needed}, got {len(self.arguments)}")
        return Setting(self.number, self.grid, self.block, self.arguments)


class Team:
    """Blocks of one launch that run side by side.

    Attributes:
        strands: Their threads.
    """

    def __init__(self, launch: Launch, memory: Port, blocks: Array, by_warp: bool) -> None:
        """Makes the threads.

        Args:
            launch: Theirs.
            memory: How they reach what all threads share.
            blocks: Which of the grid's they are.
            by_warp: Whether each warp is a strand; else all threads are one.
        """
        self._memory = memory
        self._steps = launch.program.steps
        x, y, z = launch.block
        threads = x * y * z
        shared = SharedMemory(len(blocks), launch.program.shared_size(launch.shared))
        place = np.repeat(np.arange(len(blocks)), threads)
        thread = np.tile(np.arange(threads), len(blocks))
        warps = np.unique(place * threads + thread // WARP, return_inverse=True)[1]
        groups = np.split(np.arange(len(warps)), np.flatnonzero(np.diff(warps)) + 1)
        self.strands: list[Strand] = []
        for group in groups if by_warp else [slice(None)]:
            of_threads = blocks[place[group]], place[group], thread[group]
            self.strands.append(
                Strand(
                    launch.setting,
                    memory,
                    shared,
                    self.strands,
                    of_threads,
                    launch.program.registers,
                )
            )

    @property
    def ended(self) -> bool:
        """Whether all threads have."""
        return all(strand.state is State.ENDED for strand in self.strands)

    def go_on(self, strand: Strand, stop: bool) -> None:
        """Runs one of the strands, and opens the barrier if nobody is left who could still come.

        Args:
            strand: Which; it must be able to run.
            stop: As ``Strand.go_on`` has it.
        """
        strand.go_on(self._steps, stop)
        states = {each.state for each in self.strands}
        if State.WAITS in states and State.RUNS not in states:
            self._memory.met(self.strands)
            for each in self.strands:
                each.release()
