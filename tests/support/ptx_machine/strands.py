"""Threads that go in step.

A strand is one warp, where launches race, or many whole blocks, where they don't: whatever an
instruction does it does to all of its threads at once, in arrays with an element for each. Threads
that part wait where they are, and those at the lowest instruction go on: so they meet again where
their ways do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any, NamedTuple, Protocol

import numpy as np

from ptx_machine.errors import ExecutionError, ThreadError
from ptx_machine.scalars import Array, Mask
from ptx_machine.shared import SharedMemory
from ptx_machine.syntax import Instruction

WARP = 32

#: What a register holds in those threads that have not written it.
NEVER_WRITTEN = 0xA5A5_A5A5_A5A5_A5A5


class Kind(Enum):
    """What a step is to whoever schedules it."""

    COMPUTES = auto()
    ACCESSES = auto()  # memory that other threads see
    BRANCHES = auto()
    WAITS = auto()  # at the block's barrier
    ENDS = auto()


class Step(NamedTuple):
    """An instruction that has been made ready.

    Attributes:
        kind: What it is.
        run: What it does, to the active threads of a strand.
        predicate: The register that says for which threads it is; -1 if for all.
        negated: Whether it is for the others.
        target: The step that it branches to.
        instruction: What it was made of.
    """

    kind: Kind
    run: Callable[[Strand], None]
    predicate: int
    negated: bool
    target: int
    instruction: Instruction


class Order(NamedTuple):
    """What an access says of others, to the threads of all blocks.

    Attributes:
        acquires: Whether what comes after it sees what the store it sees had released.
        releases: Whether who acquires what it stores sees all that came before it.
    """

    acquires: bool
    releases: bool


class Port(Protocol):
    """How threads reach global memory. Addresses are uint64; values are unsigned integers."""

    def load(
        self, strand: Strand, addresses: Array, width: int, count: int, order: Order
    ) -> list[Array]:
        """Loads for the active threads of a strand."""

    def store(self, strand: Strand, addresses: Array, values: list[Array], order: Order) -> None:
        """Stores for the active threads of a strand."""

    def change(
        self,
        strand: Strand,
        addresses: Array,
        width: int,
        new: Callable[[Array], Array | None],
        reads: bool,
        order: Order,
    ) -> Array:
        """An atomic operation at one address; as ``GlobalMemory.change``."""

    def fence(self, strand: Strand) -> None:
        """Releases and acquires, for the active threads of a strand."""

    def met(self, strands: Sequence[Strand]) -> None:
        """Tells that all threads of some blocks, which these strands are, have met at a barrier."""


class Setting(NamedTuple):
    """What threads know of their launch.

    Attributes:
        launch: Its number.
        grid: How many blocks there are: (x, y, z).
        block: How many threads each has: (x, y, z).
        arguments: One integer for each parameter.
    """

    launch: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    arguments: Sequence[int]


class State(Enum):
    """What a strand is up to."""

    RUNS = auto()
    WAITS = auto()
    ENDED = auto()


class Strand:
    """Threads that go in step, with their registers.

    Attributes:
        setting: What they know of their launch.
        memory: How they reach global memory.
        shared: What they share with the threads of their blocks.
        mates: All strands of their blocks, this one among them.
        block: For each thread, which block of the grid it is of: int64.
        place: For each, which block of ``shared``: int64.
        thread: For each, its index in its block: int64.
        registers: By number, an array each; None until it is written.
        state: What it is up to.
    """

    def __init__(
        self,
        setting: Setting,
        memory: Port,
        shared: SharedMemory,
        mates: list[Strand],
        threads: tuple[Array, Array, Array],
        registers: int,
    ) -> None:
        """Makes threads, of which ``threads`` says block, place and index."""
        self.setting = setting
        self.memory = memory
        self.shared = shared
        self.mates = mates
        self.block, self.place, self.thread = threads
        self.registers: list[Array | None] = [None] * registers
        self.state = State.RUNS
        self._everybody = np.ones(len(self.thread), np.bool_)
        self._active: Mask = self._everybody
        self._places: dict[int, Mask] = {}  # where those are who wait to go on
        self._parked: dict[int, Mask] = {}  # where those will be whom the barrier holds
        self._next = 0

    @property
    def everybody(self) -> bool:
        """Whether all threads are active."""
        return self._active is self._everybody

    @property
    def active(self) -> Array | slice:
        """The threads that are active, as an index of arrays."""
        return slice(None) if self.everybody else np.flatnonzero(self._active)

    def write(self, register: int, values: Array) -> None:
        """Sets a register in the active threads, from an array for all threads or a number."""
        if values.ndim == 0:
            values = np.full(len(self.thread), values)
        if not self.everybody:
            values = np.where(self._active, values, self._before(register, values.dtype))
        self.registers[register] = values

    def write_active(self, register: int, values: Array) -> None:
        """Sets a register in the active threads, from an array for these alone."""
        if not self.everybody:
            spread = self._before(register, values.dtype).copy()
            spread[self._active] = values
            values = spread
        self.registers[register] = values

    def go_on(self, steps: Sequence[Step], stop: bool) -> None:
        """Runs until all threads have ended or wait at the barrier.

        Args:
            steps: The program.
            stop: Whether to return after each access to memory that other threads see as well.
        """
        while self.state is State.RUNS:
            step = steps[self._next]
            before = self._active
            if step.predicate < 0:
                stopped = self._take(step)
            elif self._narrow(step):
                stopped = self._take(step, rest=before)
            else:
                stopped = self._pass(before)
            if stop and stopped:
                return

    def release(self) -> None:
        """Lets go on those whom the barrier holds."""
        if self.state is State.WAITS:
            self._check_warps()
            self._places, self._parked = self._parked, {}
            self.state = State.RUNS
            self._choose()

    def error(self, step: Step, problem: str, position: int = 0) -> ExecutionError:
        """An error of an instruction, which says whose it is.

        Args:
            step: The instruction.
            problem: What is wrong.
            position: Which of the active threads it is.
        """
        thread = int(np.flatnonzero(self._active)[position])
        return ExecutionError(
            f"launch {self.setting.launch}, block {int(self.block[thread])}, "
            f"thread {int(self.thread[thread])}, line {step.instruction.line}, "
            f"{step.instruction.text!r}: {problem}"
        )

    def _before(self, register: int, dtype: Any) -> Array:
        old = self.registers[register]
        if old is None:
            old = np.full(len(self.thread), NEVER_WRITTEN, np.uint64).astype(dtype)
        return old

    def _narrow(self, step: Step) -> bool:
        """Leaves active only those that the predicate is for; whether there are any."""
        predicate = self.registers[step.predicate]
        if predicate is None:
            raise self.error(step, "its predicate has not been written")
        chosen = ~predicate if step.negated else predicate
        self._set_active(chosen if self.everybody else chosen & self._active)
        return bool(self._active.any())

    def _set_active(self, mask: Mask) -> None:
        self._active = self._everybody if mask.all() else mask

    def _take(self, step: Step, rest: Mask | None = None) -> bool:
        """Runs a step; whether it was an access.

        Args:
            step: The step.
            rest: Who was active before the predicate narrowed that down.
        """
        if step.kind in (Kind.COMPUTES, Kind.ACCESSES):
            try:
                step.run(self)
            except ThreadError as error:
                raise self.error(step, error.problem, error.position) from None
            self._pass(self._active if rest is None else rest)
            return step.kind is Kind.ACCESSES
        if rest is not None:
            self._put(self._places, self._next + 1, rest & ~self._active)
        if step.kind is Kind.BRANCHES:
            self._put(self._places, step.target, self._active)
        elif step.kind is Kind.WAITS:
            self._put(self._parked, self._next + 1, self._active)
        self._choose()
        return False

    def _pass(self, active: Mask) -> bool:
        """Goes to the next step with these threads, and those that wait there."""
        self._active = active
        self._next += 1
        if self._next in self._places:
            self._set_active(active | self._places.pop(self._next))
        return False

    def _put(self, places: dict[int, Mask], step: int, mask: Mask) -> None:
        if mask.any():
            places[step] = places[step] | mask if step in places else mask

    def _choose(self) -> None:
        """Goes on with those threads that are at the lowest step."""
        if self._places:
            self._next = min(self._places)
            self._set_active(self._places.pop(self._next))
        else:
            self.state = State.WAITS if self._parked else State.ENDED

    def _check_warps(self) -> None:
        """Checks that the threads of a warp wait at the same barrier: it is for all of them."""
        if len(self._parked) > 1:
            warps = self.place * (1 << 32) + self.thread // WARP
            waiting = [np.unique(warps[mask]) for mask in self._parked.values()]
            together = np.concatenate(waiting)
            if len(np.unique(together)) < len(together):
                raise ExecutionError(
                    f"launch {self.setting.launch}: threads of one warp wait at different "
                    f"barriers, before instructions {sorted(self._parked)}"
                )
