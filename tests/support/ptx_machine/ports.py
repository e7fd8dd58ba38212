"""How the threads of a launch reach global memory: in order, or in any order that PTX allows.

What PTX allows is modelled by what it may look like to others. A store that releases nothing takes
effect some time later, and the threads of a warp may see theirs take effect apart. A load may see
an element as it was any time since the last acquisition that this thread, or one that it has met
at a barrier since, made. A release waits for all stores before it, of the thread and of those that
it has met at a barrier. Atomic operations see what is there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ptx_machine.memory import GlobalMemory
from ptx_machine.scalars import Array
from ptx_machine.strands import Order, Strand


class InOrder:
    """Each access takes effect when it is made."""

    def __init__(self, memory: GlobalMemory) -> None:
        self._memory = memory

    def load(
        self, strand: Strand, addresses: Array, width: int, count: int, order: Order
    ) -> list[Array]:
        """As ``Port`` has it."""
        return self._memory.load(addresses, width, count, strand.setting.launch)

    def store(self, strand: Strand, addresses: Array, values: list[Array], order: Order) -> None:
        """As ``Port`` has it."""
        self._memory.store(addresses, values, strand.setting.launch)

    def change(
        self,
        strand: Strand,
        addresses: Array,
        width: int,
        new: Callable[[Array], Array | None],
        reads: bool,
        order: Order,
    ) -> Array:
        """As ``Port`` has it."""
        return self._memory.change(addresses, width, new, reads, strand.setting.launch)

    def fence(self, strand: Strand) -> None:
        """Nothing: all is in order."""

    def met(self, strands: Sequence[Strand]) -> None:
        """Nothing: all is in order."""


class _Range(NamedTuple):
    """The addresses that an access may touch: from the least to the end of the greatest."""

    low: int
    high: int

    @classmethod
    def of(cls, addresses: Array, size: int) -> _Range:
        """Of accesses of so many bytes."""
        return cls(int(addresses.min()), int(addresses.max()) + size)

    def meets(self, other: _Range) -> bool:
        """Whether both may touch the same."""
        return self.low < other.high and other.low < self.high


class _Store(NamedTuple):
    """A store that has not taken effect.

    Attributes:
        strand: Whose.
        meetings: How many barriers its threads had met at before.
        where: What it may touch.
        addresses: Where.
        values: What.
    """

    strand: Strand
    meetings: int
    where: _Range
    addresses: Array
    values: list[Array]


class AnyOrder:
    """Accesses take effect in any order that their qualifiers and barriers allow, by a seed."""

    def __init__(self, memory: GlobalMemory, random: np.random.Generator) -> None:
        self._memory = memory
        self._random = random
        self._pending: list[_Store] = []
        self._acquired: dict[Strand, int] = defaultdict(int)  # when each strand last did
        # When strands have seen what, last: they see nothing there as it was before.
        self._seen: dict[Strand, list[tuple[_Range, int]]] = defaultdict(list)
        self._meetings: dict[Strand, int] = defaultdict(int)
        memory.keep_history()

    @property
    def pending(self) -> bool:
        """Whether there are stores that have not taken effect."""
        return bool(self._pending)

    def settle_one(self) -> None:
        """Has one of the stores take effect that have not."""
        chosen = self._pending[int(self._random.integers(len(self._pending)))]
        self._settle(chosen)

    def load(
        self, strand: Strand, addresses: Array, width: int, count: int, order: Order
    ) -> list[Array]:
        """As ``Port`` has it."""
        where = _Range.of(addresses, width * count)
        self._settle_own(strand, where)
        known = [time for seen, time in self._seen[strand] if seen.meets(where)]
        now = self._memory.time
        earliest = max(self._acquired[strand], *known, 0)
        time = now if self._random.random() < 0.5 else int(self._random.integers(earliest, now + 1))
        self._seen[strand].append((where, time))
        if order.acquires:
            self._acquired[strand] = max(self._acquired[strand], time)
        return self._memory.load(addresses, width, count, strand.setting.launch, time)

    def store(self, strand: Strand, addresses: Array, values: list[Array], order: Order) -> None:
        """As ``Port`` has it."""
        size = values[0].itemsize * len(values)
        self._memory.check(addresses, size)
        if order.releases:
            self._release(strand)
        first = self._random.random(len(addresses)) < 0.5
        for some in (first, ~first):
            if some.any():
                where = _Range.of(addresses[some], size)
                parts = [value[some] for value in values]
                self._pending.append(
                    _Store(strand, self._meetings[strand], where, addresses[some], parts)
                )
                if order.releases:
                    self._settle(self._pending[-1])

    def change(
        self,
        strand: Strand,
        addresses: Array,
        width: int,
        new: Callable[[Array], Array | None],
        reads: bool,
        order: Order,
    ) -> Array:
        """As ``Port`` has it."""
        if order.releases:
            self._release(strand)
        self._settle_own(strand, _Range.of(addresses, width))
        before = self._memory.change(addresses, width, new, reads, strand.setting.launch)
        if order.acquires:
            self._acquired[strand] = self._memory.time
        return before

    def fence(self, strand: Strand) -> None:
        """As ``Port`` has it."""
        self._release(strand)
        self._acquired[strand] = self._memory.time

    def met(self, strands: Sequence[Strand]) -> None:
        """As ``Port`` has it."""
        latest = max(self._acquired[strand] for strand in strands)
        for strand in strands:
            self._meetings[strand] += 1
            self._acquired[strand] = latest

    def _release(self, strand: Strand) -> None:
        met = self._meetings[strand]
        for each in list(self._pending):
            own = each.strand is strand
            if own or (each.strand.mates is strand.mates and each.meetings < met):
                self._settle(each)

    def _settle_own(self, strand: Strand, where: _Range) -> None:
        """Has stores of the block take effect that the strand must see, or may."""
        for each in list(self._pending):
            if each.strand.mates is strand.mates and each.where.meets(where):
                self._settle(each)

    def _settle(self, store: _Store) -> None:
        """Has a store take effect, and before it those of its block to the same elements."""
        place = next((i for i, each in enumerate(self._pending) if each is store), None)
        if place is None:  # it has, on account of another
            return
        for each in self._pending[:place]:
            if each.strand.mates is store.strand.mates and each.where.meets(store.where):
                self._settle(each)
        self._pending = [each for each in self._pending if each is not store]
        self._memory.store(store.addresses, store.values, store.strand.setting.launch)
        for strand in store.strand.mates:
            self._seen[strand].append((store.where, self._memory.time))
