"""What CUDA lanes are made of and needs no GPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hogstream.scheduler.lanes.cuda_clock import DeviceClock
from hogstream.scheduler.lanes.cuda_graphs import RepeatCache


class Kept(str):
    """Something to keep, which notes when it is dropped."""

    dropped = False

    def drop(self) -> None:
        assert not self.dropped
        self.dropped = True


def making(made: list[Kept], name: str) -> Callable[[], Kept]:
    def make() -> Kept:
        made.append(Kept(name))
        return made[-1]

    return make


def test_graph_is_made_when_its_key_comes_again_and_then_kept() -> None:
    made: list[Kept] = []
    cache: RepeatCache[Kept] = RepeatCache(8)
    found = [cache.find(key, making(made, key)) for key in ("a", "b", "a", "a", "b", "c", "b")]
    assert found == [None, None, "a", "a", "b", None, "b"]
    assert made == ["a", "b"]
    assert not any(each.dropped for each in made)
    cache.clear()
    assert all(each.dropped for each in made)


def test_graph_not_used_for_longest_is_dropped() -> None:
    made: list[Kept] = []
    cache: RepeatCache[Kept] = RepeatCache(2)
    for key in "aabb" + "a" + "cc" + "a":  # a is used after b: c takes the place of b
        cache.find(key, making(made, key))
    assert made == ["a", "b", "c"]
    assert [each.dropped for each in made] == [False, True, False]
    assert cache.find("b", making(made, "b")) is None


def test_keys_that_never_come_again_drop_no_graph() -> None:
    made: list[Kept] = []
    cache: RepeatCache[Kept] = RepeatCache(2)
    for key in "aa" + "bcdefgh" + "a":
        cache.find(key, making(made, key))
    assert made == ["a"]
    assert not made[0].dropped
    assert cache.find("b", making(made, "b")) is None  # forgotten: only so many are remembered


def test_graph_that_cannot_be_made_is_tried_again() -> None:
    cache: RepeatCache[Kept] = RepeatCache(2)

    def fail() -> Kept:
        raise MemoryError("no room")

    assert cache.find("a", fail) is None
    with pytest.raises(MemoryError):
        cache.find("a", fail)
    assert cache.find("a", making([], "a")) is None
    assert cache.find("a", making([], "a")) == "a"


class TimedEvent:
    """An event at a time of a device's clock, which tells float32 milliseconds, as CUDA does."""

    def __init__(self, at_ns: int) -> None:
        self.at_ns = at_ns

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: TimedEvent) -> float:
        return float(np.float32((end.at_ns - self.at_ns) / 1e6))


def test_clock_tells_short_times_apart_after_an_hour() -> None:
    """Counted from an event an hour before, they would be multiples of 250 microseconds."""
    reference = TimedEvent(0)
    clock = DeviceClock(reference)
    origin = clock.read(reference)
    for at_ns in range(0, 3_600_000_000_000, 300_001_234):
        landed = TimedEvent(at_ns + 5_000)
        took = clock.read(landed) - clock.read(TimedEvent(at_ns))
        assert abs(took - 5_000) < 200
        assert abs(clock.read(landed) - origin - landed.at_ns) < 1_000_000
        clock.follow(landed)


def test_clock_gives_an_event_back_for_each_that_it_keeps() -> None:
    reference, soon, late = TimedEvent(0), TimedEvent(1_000_000), TimedEvent(2_000_000_000)
    clock = DeviceClock(reference)
    assert clock.follow(soon) is soon
    before = clock.read(late)
    assert clock.follow(late) is reference
    assert clock.read(late) == before
