"""The arithmetic of intervals, against counting nanosecond by nanosecond."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hogstream.profiling.nsight.time_spans import (
    Ints,
    apart,
    busy,
    extents,
    gaps,
    merge,
    time_at_least,
    window_of,
)

Span = tuple[int, int, int]  # group, start, end


def arrays(spans: list[Span]) -> tuple[Ints, Ints, Ints]:
    groups, starts, ends = np.array(spans, np.int64).reshape(-1, 3).T
    return groups, starts, ends


@st.composite
def intervals(draw: st.DrawFn) -> list[Span]:
    drawn = draw(
        st.lists(st.tuples(st.integers(0, 3), st.integers(-20, 20), st.integers(0, 12)), max_size=9)
    )
    # Far from 0, as Nsight's times may be, and groups without holes.
    offset = draw(st.sampled_from([0, 10**15]))
    numbers = sorted({group for group, _, _ in drawn})
    return [
        (numbers.index(group), offset + start, offset + start + length)
        for group, start, length in drawn
    ]


def running(spans: list[Span]) -> list[int]:
    """How many intervals run, in each nanosecond in which any does."""
    seconds: dict[int, int] = {}
    for _, start, end in spans:
        for each in range(start, end):
            seconds[each] = seconds.get(each, 0) + 1
    return list(seconds.values())


# Two streams: A runs 0-10 and 20-30, B 5-25 and 40-45.
HAND = [(0, 0, 10), (0, 20, 30), (1, 5, 25), (1, 40, 45)]


def test_hand_worked_case() -> None:
    groups, starts, ends = arrays(HAND)
    assert time_at_least(1, starts, ends) == 35
    assert time_at_least(2, starts, ends) == 10
    assert time_at_least(3, starts, ends) == 0
    assert busy(groups, starts, ends).tolist() == [20, 25]
    assert gaps(groups, starts, ends).tolist() == [10, 15]
    assert extents(groups, starts, ends).tolist() == [30, 40]
    assert [each.tolist() for each in merge(starts, ends)] == [[0, 40], [30, 45]]


@pytest.mark.parametrize(
    ("spans", "at_once", "idle"),
    [
        pytest.param([(0, 0, 5), (0, 5, 9)], 0, [0], id="touching"),
        pytest.param([(0, 0, 9), (0, 2, 3), (0, 12, 13)], 1, [0, 3], id="nested"),
        pytest.param([(0, 3, 3), (0, 3, 7)], 0, [0], id="empty interval"),
        pytest.param([(0, 1, 4)] * 3, 3, [0, 0], id="the same three times"),
        pytest.param([(0, 9, 10), (0, 0, 1)], 0, [8], id="not sorted"),
    ],
)
def test_borders(spans: list[Span], at_once: int, idle: list[int]) -> None:
    groups, starts, ends = arrays(spans)
    assert time_at_least(2, starts, ends) == at_once
    assert gaps(groups, starts, ends).tolist() == idle


def test_nothing_is_no_error() -> None:
    groups, starts, ends = arrays([])
    assert time_at_least(1, starts, ends) == 0
    for function in (gaps, busy, extents):
        assert function(groups, starts, ends).tolist() == []
    assert [each.tolist() for each in merge(starts, ends)] == [[], []]
    assert window_of(np.array([5]), starts, ends).tolist() == [-1]


@given(intervals())
def test_time_at_least_counts_every_nanosecond(spans: list[Span]) -> None:
    _, starts, ends = arrays(spans)
    counts = running(spans)
    for depth in (1, 2, 3):
        assert time_at_least(depth, starts, ends) == sum(each >= depth for each in counts)


@given(intervals())
def test_groups_are_apart(spans: list[Span]) -> None:
    groups, starts, ends = arrays(spans)
    each_alone = [[span for span in spans if span[0] == group] for group in set(groups.tolist())]
    assert time_at_least(2, *apart(groups, starts, ends)) == sum(
        each >= 2 for alone in each_alone for each in running(alone)
    )
    assert busy(groups, starts, ends).tolist() == [len(running(alone)) for alone in each_alone]
    assert extents(groups, starts, ends).tolist() == [
        max(end for _, _, end in alone) - min(start for _, start, _ in alone)
        for alone in each_alone
    ]


@given(intervals())
def test_gaps_are_the_idle_time_before_each_start(spans: list[Span]) -> None:
    expected = []
    for group in sorted({span[0] for span in spans}):
        alone = sorted((span for span in spans if span[0] == group), key=lambda span: span[1])
        for index in range(1, len(alone)):
            reached = max(end for _, _, end in alone[:index])
            expected.append(max(0, alone[index][1] - reached))
    assert gaps(*arrays(spans)).tolist() == expected


@given(intervals(), st.lists(st.integers(-25, 40), max_size=5))
def test_windows_hold_their_starts_and_not_their_ends(spans: list[Span], times: list[int]) -> None:
    starts, ends = merge(*arrays(spans)[1:])
    found = window_of(np.array(times, np.int64), starts, ends).tolist()
    windows = list(zip(starts.tolist(), ends.tolist(), strict=True))
    for time, window in zip(times, found, strict=True):
        holding = [index for index, (start, end) in enumerate(windows) if start <= time < end]
        assert holding == ([window] if window >= 0 else [])


@given(intervals())
def test_merged_intervals_are_disjoint_and_cover_the_same(spans: list[Span]) -> None:
    starts, ends = merge(*arrays(spans)[1:])
    assert (starts[1:] > ends[:-1]).all()
    assert int((ends - starts).sum()) == len(running(spans))
