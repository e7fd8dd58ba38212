import math

import numpy as np
import pytest

from hogstream.profiling.results.confidence import (
    Interval,
    median_interval,
    ratio_interval,
    spread_warnings,
)


def test_few_samples_leave_all_of_their_range():
    interval = median_interval([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (interval.low, interval.median, interval.high) == (1.0, 3.0, 5.0)


@pytest.mark.parametrize("count", [1, 4])
def test_too_few_samples_bound_nothing(count: int):
    assert median_interval([2.0] * count).low == -math.inf
    assert median_interval([2.0] * count).bounds is None
    ratio = ratio_interval([1.0] * count, [2.0] * count, paired=True)
    assert ratio is not None
    assert ratio.median == 0.5
    assert not ratio.excludes(1.0)
    assert ratio.wide


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [5, 7, 9, 25])
def test_interval_holds_the_true_median_as_often_as_it_says(rounds: int):
    random = np.random.default_rng(0)
    held = sum(
        not median_interval(random.lognormal(size=rounds).tolist()).excludes(1.0)
        for _ in range(400)
    )
    assert 0.915 < held / 400 < 0.999  # 0.9375 is the most that there is of five


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [5, 7, 9])
def test_interval_holds_the_true_ratio_as_often_as_it_says(rounds: int):
    random, held = np.random.default_rng(1), 0
    for _ in range(300):
        drift, mine, theirs = (random.lognormal(sigma=0.2, size=rounds) for _ in range(3))
        interval = ratio_interval((drift * mine).tolist(), (drift * theirs).tolist(), paired=True)
        assert interval is not None
        held += not interval.excludes(1.0)
    assert held / 300 > 0.9


def test_drift_that_strikes_a_round_alike_leaves_a_paired_ratio_as_it_is():
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]
    mine = [3 * speed for speed in drift]
    paired, apart = (ratio_interval(mine, drift, paired=each) for each in (True, False))
    assert paired is not None
    assert apart is not None
    assert (paired.low, paired.median, paired.high) == (3.0, 3.0, 3.0)
    assert apart.low < 1.0 < apart.high


def test_ratio_to_what_stood_still_is_none():
    assert ratio_interval([1.0, 2.0], [0.0, 1.0], paired=True) is None


def test_warning_names_the_widest_intervals_alone():
    intervals = {
        "a": (1.0, 1.2),
        "b": (0.5, 2.5),
        "c": (0.9, 1.2),
        "d": (0.8, 1.5),
        "e": (0.0, 9.0),
    }
    (said,) = spread_warnings({name: Interval(1.0, *each) for name, each in intervals.items()})
    assert "4 of 5 timings" in said  # and a's is 20 % of the median
    assert "The widest: e (900 %), b (200 %), d (70 %)." in said
    assert spread_warnings({"a": Interval(1.0, 1.0, 1.2)}) == []
    (said,) = spread_warnings({"a": median_interval([1.0]), "b": median_interval([0.0] * 5)})
    assert "a (fewer than 5 rounds), b (it stood still)" in said


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: median_interval([]), "samples must hold at least one, got none"),
        (lambda: ratio_interval([], [1.0], paired=False), "must hold samples, got 0 and 1"),
        (lambda: ratio_interval([1.0], [1.0, 2.0], paired=True), "theirs must hold 1 samples"),
    ],
)
def test_wrong_samples_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
