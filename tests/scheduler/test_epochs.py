"""How parts of epochs are dealt to workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from hogstream.scheduler.workers.epochs import Epochs, Indices


def epochs(*sizes: int) -> Epochs:
    """Of parts of so many samples each, numbered from 0 without gaps."""
    ends = np.cumsum(sizes)
    parts = np.split(np.arange(ends[-1]), ends[:-1])
    return Epochs(int(ends[-1]), lambda _: parts, np.random.default_rng(0))


def flat(taken: Sequence[Indices]) -> list[int]:
    assert all(map(len, taken))
    return [int(each) for part in taken for each in part]


def test_parts_are_dealt_in_turn():
    four = epochs(2, 2, 2, 2)
    assert flat(four.take(0, 2, 3)) == [0, 1, 4]
    assert flat(four.take(1, 2, 4)) == [2, 3, 6, 7]
    assert flat(four.take(0, 2, 1)) == [5]


def test_who_has_none_left_takes_the_last_of_who_has_most():
    """And no more than it has use for."""
    four = epochs(2, 2, 2, 3)
    assert flat(four.take(1, 2, 6)) == [2, 3, 6, 7, 8, 5]
    assert flat(four.take(0, 2, 3)) == [0, 1, 4]
    three = epochs(4, 1, 9)
    assert flat(three.take(1, 3, 3)) == [4, 12, 13]
    assert flat(three.take(2, 3, 8)) == [5, 6, 7, 8, 9, 10, 11, 3]


def test_an_empty_part_is_its_workers_too():
    some = epochs(0, 2, 3, 0, 4)
    assert flat(some.take(1, 2, 2)) == [0, 1]
    assert flat(some.take(0, 2, 7)) == [2, 3, 4, 5, 6, 7, 8]


def test_an_order_that_fails_loses_no_sample():
    made = iter([[np.arange(4)], None, [np.arange(4)]])

    def order(_: np.random.Generator) -> Sequence[Indices]:
        if (parts := next(made)) is None:
            raise OSError("no order")
        return parts

    some = Epochs(4, order, np.random.default_rng(0))
    assert flat(some.take(0, 2, 1)) == [0]
    with pytest.raises(OSError, match="no order"):
        some.take(0, 2, 5)
    assert flat(some.take(0, 2, 4)) == [1, 2, 3, 0]


def test_a_whole_epoch_is_gone_through_by_all():
    whole = epochs(6)
    assert flat(whole.take(0, 3, 2)) == [0, 1]
    assert flat(whole.take(2, 3, 2)) == [4, 5]
    assert flat(whole.take(0, 3, 4)) == [2, 3, 0, 1]


def test_what_is_given_back_comes_next():
    two = epochs(3, 3)
    taken = two.take(0, 2, 3)[0]
    two.give_back(0, taken[1:])
    two.give_back(0, taken[:0])
    assert flat(two.take(0, 2, 2)) == [1, 2]


def test_what_a_worker_leaves_behind_is_taken_by_others():
    """Of a scheduler with more workers, that was closed."""
    three = epochs(1, 1, 1)
    assert flat(three.take(0, 3, 1)) == [0]
    assert sorted(flat(three.take(0, 1, 2))) == [1, 2]
    assert flat(three.take(0, 1, 3)) == [0, 1, 2]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_each_sample_comes_once_an_epoch_whoever_is_faster(workers: int):
    chances = np.random.default_rng(workers)
    some = epochs(7, 1, 30, 5, 12)
    seen: Counter[int] = Counter()
    for _ in range(40):
        worker = int(chances.integers(workers))
        taken = flat(some.take(worker, workers, int(chances.integers(1, 20))))
        back = int(chances.integers(0, len(taken) + 1))
        seen.update(taken[back:])
        some.give_back(worker, np.array(taken[:back], np.int64))
        assert max(seen.values(), default=0) - min(seen.get(each, 0) for each in range(55)) <= 2
    left = 55 * max(seen.values()) - seen.total()
    seen.update(flat(some.take(0, workers, left)))
    assert set(seen.values()) == {max(seen.values())}
