from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable

import pytest

from hogstream.scheduler.policies import BoundGate, LockGate, Passage, make_gate, select_policy


class Versions:
    """The parameters' version, as far as a gate sees it."""

    def __init__(self) -> None:
        self.value = 0

    def __call__(self) -> int:
        return self.value


async def is_ready(wait: Awaitable[object]) -> bool:
    """Whether a wait ends without anything else happening."""
    task = asyncio.ensure_future(wait)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    if not task.done():
        task.cancel()
        return False
    return True


async def test_bound_of_zero_lets_one_in_at_a_time() -> None:
    gate = BoundGate(0, Versions())
    first = await gate.begin()
    assert not await is_ready(gate.begin())
    await gate.admit(first)
    assert not await is_ready(gate.begin())
    gate.end(first)
    assert await is_ready(gate.begin())


async def test_fast_worker_waits_for_the_one_that_read_first() -> None:
    """With a bound of 2, two updates may land over one that is being made, and not a third."""
    version = Versions()
    gate = BoundGate(2, version)
    slow = await gate.begin()
    for _ in range(2):
        fast = await gate.begin()
        await gate.admit(fast)
        version.value += 1
        gate.end(fast)
    fast = await gate.begin()
    waiting = asyncio.ensure_future(gate.admit(fast))
    assert not await is_ready(asyncio.shield(waiting))
    await asyncio.wait_for(gate.admit(slow), timeout=60)  # who read first always may
    version.value += 1
    gate.end(slow)
    await asyncio.wait_for(waiting, timeout=60)


async def test_worker_that_gives_up_lets_the_others_go_on() -> None:
    version = Versions()
    gate = BoundGate(0, version)
    failing = await gate.begin()
    waiting = asyncio.ensure_future(gate.begin())
    assert not await is_ready(asyncio.shield(waiting))
    gate.end(failing)
    assert isinstance(await asyncio.wait_for(waiting, timeout=60), Passage)


@pytest.mark.parametrize("workers", [2, 3, 7])
@pytest.mark.parametrize("bound", [0, 1, 3, 10])
async def test_no_order_of_landings_exceeds_the_bound_or_stops(bound: int, workers: int) -> None:
    """Workers read and submit, and lanes land, in a random order that is the worst of many."""
    most = 0
    for seed in range(20):
        chance = random.Random(seed)
        version, in_flight, stalenesses = Versions(), list[Passage](), list[int]()
        gate = BoundGate(bound, version)

        async def work(gate: BoundGate, in_flight: list[Passage], chance: random.Random) -> None:
            for _ in range(10):
                passage = await gate.begin()
                for _ in range(chance.randrange(5)):
                    await asyncio.sleep(0)
                await gate.admit(passage)
                in_flight.append(passage)
                while passage in in_flight:  # noqa: ASYNC110, turns of the loop are the clock
                    await asyncio.sleep(0)

        tasks = [asyncio.create_task(work(gate, in_flight, chance)) for _ in range(workers)]
        turns = 0
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            turns += 1
            assert turns < 100_000, "nobody goes on"
            if in_flight and chance.random() < 0.4:
                passage = in_flight.pop(chance.randrange(len(in_flight)))
                stalenesses.append(version.value - passage.read_version)
                version.value += 1
                gate.end(passage)
        assert len(stalenesses) == 10 * workers
        most = max(most, *stalenesses)
    assert most <= bound
    if bound < workers:  # and the gate is no narrower than it must be
        assert most == bound


async def test_lock_is_given_to_who_waits_longest() -> None:
    gate = LockGate(Versions())
    passages = [await gate.begin() for _ in range(4)]
    order: list[int] = []

    async def take(index: int) -> None:
        await gate.admit(passages[index])
        order.append(index)
        await asyncio.sleep(0)
        gate.end(passages[index])

    await asyncio.gather(*(take(index) for index in range(4)))
    assert order == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        *(("lock-free", None), ("locked", None), ("ordered", None)),
        *(("awaited", LockGate), ("bounded:3", BoundGate), ("row-locked", None)),
    ],
)
def test_each_policy_has_its_gate(policy: str, kind: type | None) -> None:
    gate = make_gate(select_policy(policy), Versions())
    assert gate is None if kind is None else isinstance(gate, kind)


@pytest.mark.parametrize(
    "name", ["bounded", "bounded:", "bounded:-1", "bounded:x", "Bounded:1", ""]
)
def test_names_that_are_no_policy_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"policy must be one of .*bounded:K"):
        select_policy(name)
