"""Policies: what an update must wait for, and the gates where it waits on the host."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hogstream.scheduler.checks import SettingError


@dataclass(frozen=True)
class Policy:
    """One answer to the question of what an update waits for.

    Attributes:
        name: As in ``policy=``.
        locked: An update waits, on its lane, for a mutex that is held around it alone, on a GPU
            until it has landed: the strongest lock there is.
        awaited: An update waits for an asyncio lock that is held until the event loop has seen it
            land: what an asyncio program with a lock does.
        ordered: An update waits, on its lane and on a GPU on the device, for the one submitted
            before it.
        bound: An update waits while it could make its own staleness, or another's, exceed this.
        row_locked: An update of rows waits, at each row, for a mutex of the rows about there, which
            its lane holds around the update of that row; there are no other updates.
    """

    name: str
    locked: bool = False
    awaited: bool = False
    ordered: bool = False
    bound: int | None = None
    row_locked: bool = False

    @property
    def takes_batches(self) -> bool:
        """Whether updates may wait for a batch: not where the host waits for each to land."""
        return not self.awaited and self.bound is None


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("lock-free"),
        Policy("locked", locked=True),
        Policy("ordered", ordered=True),
        Policy("awaited", awaited=True),
        Policy("row-locked", row_locked=True),
    )
}

#: Names of those that take dense updates too.
DENSE_POLICIES = tuple(name for name, policy in POLICIES.items() if not policy.row_locked)

#: Names of those that need no event loop between two updates, as the steps of a ``NativeWorker``.
COMPILED_POLICIES = ("lock-free", "locked", "row-locked", "ordered")

_BOUNDED = "or bounded:K with an integer K >= 0"
#: What ``policy=`` may be, in words; and where updates are dense.
ALLOWED = f"one of {', '.join(POLICIES)}, {_BOUNDED}"
ALLOWED_DENSE = f"one of {', '.join(DENSE_POLICIES)}, {_BOUNDED}"


def select_policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        SettingError: If there is none.
    """
    if isinstance(name, str):
        if name in POLICIES:
            return POLICIES[name]
        bounded = re.fullmatch(r"bounded:([0-9]{1,9})", name)
        if bounded is not None:
            return Policy(f"bounded:{int(bounded[1])}", bound=int(bounded[1]))
    raise SettingError("policy", f"must be {ALLOWED}, got {name!r}")


@dataclass(eq=False)
class Passage:
    """One iteration's way through a gate: from the read of the parameters to the landing.

    Attributes:
        read_version: Version of the parameters that it read.
        ended_before: How many others were through this gate by then.
        admitted: Whether its update may go on a lane, and maybe has.
    """

    read_version: int
    ended_before: int = 0
    admitted: bool = False


class Gate(Protocol):
    """Makes a worker wait before it reads, and before its update goes on a lane.

    Attributes:
        reason: What one waits for there, as a trace shows it.
    """

    reason: str

    async def begin(self) -> Passage:
        """Waits until the parameters may be read for a new update."""

    async def admit(self, passage: Passage) -> None:
        """Waits until its update may go on a lane; cancelled, it may not."""

    def end(self, passage: Passage) -> None:
        """Lets others in: its update has landed or failed, or there will be none."""


class LockGate:
    """The lock of ``awaited``, held from before an update is enqueued until its delivery.

    It is given in the order of asking. Over processes each has one, and a lane holds a
    ``ProcessLock`` around each update besides.
    """

    reason = "lock"

    def __init__(self, version: Callable[[], int]) -> None:
        self._version = version
        self._lock = asyncio.Lock()

    async def begin(self) -> Passage:
        """Never waits: workers read without the lock."""
        return Passage(self._version())

    async def admit(self, passage: Passage) -> None:
        """Waits for the lock."""
        await self._lock.acquire()
        passage.admitted = True

    def end(self, passage: Passage) -> None:
        """Releases the lock, if it is held for this passage."""
        if passage.admitted:
            passage.admitted = False
            self._lock.release()


class BoundGate:
    """Staleness of at most K: stale-synchronous parallel (Ho et al. 2013), update by update.

    An update is admitted only if all that have read before and not landed yet can still land, one
    after the other in the order of their reads, with a staleness of at most K each. So whoever read
    first can always go on, and nobody waits for ever but for a worker that never submits.

    What counts are the updates that pass here: those of other schedulers make nobody wait.
    """

    reason = "bound"

    def __init__(self, bound: int, version: Callable[[], int]) -> None:
        self._bound = bound
        self._version = version
        self._ended = 0
        self._under_way: list[Passage] = []  # in the order of their reads
        self._waiting: list[asyncio.Future[None]] = []

    async def begin(self) -> Passage:
        """Waits until no more than K others are under way, all of which may land first."""
        await self._until(lambda: len(self._under_way) <= self._bound)
        passage = Passage(self._version(), self._ended)
        self._under_way.append(passage)
        return passage

    async def admit(self, passage: Passage) -> None:
        """Waits until everybody's staleness stays within the bound whatever lands first."""
        await self._until(lambda: self._may_admit(passage))
        passage.admitted = True

    def end(self, passage: Passage) -> None:
        """Forgets a passage, and has all who wait look again."""
        if passage in self._under_way:
            self._under_way.remove(passage)
            self._ended += passage.admitted
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    def _may_admit(self, passage: Passage) -> bool:
        in_flight = 1 + sum(other.admitted for other in self._under_way)
        elders = 0  # read before, and not admitted
        for other in self._under_way:
            if other is passage:
                continue
            # What may land before it: all in flight but itself, and its elders.
            first = in_flight - 1 if other.admitted else in_flight + elders
            if self._ended + first - other.ended_before > self._bound:
                return False
            elders += not other.admitted
        return self._ended + in_flight - 1 - passage.ended_before <= self._bound

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter


def make_gate(policy: Policy, version: Callable[[], int]) -> Gate | None:
    """The gate of a policy; None if nothing waits on the host.

    Args:
        policy: What updates wait for.
        version: Gives the present version of the parameters.
    """
    if policy.awaited:
        return LockGate(version)
    if policy.bound is not None:
        return BoundGate(policy.bound, version)
    return None
