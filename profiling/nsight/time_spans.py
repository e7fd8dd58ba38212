"""Arithmetic of intervals of time: unions, overlaps and gaps.

Times are int64, in nanoseconds, in arrays of shape (n,). An interval holds its start but not its
end, so two that only touch do not overlap. Everything is O(n log n).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_NEVER = np.int64(1 << 62)


def merge(starts: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """Joins intervals that overlap or touch: sorted starts and ends of what is left."""
    if not len(starts):
        return starts, ends
    order = np.argsort(starts, kind="stable")
    starts, reached = starts[order], np.maximum.accumulate(ends[order])
    first = np.append(True, starts[1:] > reached[:-1])
    last = np.append(first[1:], True)
    return starts[first], reached[last]


def time_at_least(depth: int, starts: Ints, ends: Ints) -> int:
    """For how long at least ``depth`` of the intervals run at once."""
    times = np.concatenate([starts, ends])
    steps = np.repeat(np.array([1, -1]), len(starts))
    order = np.argsort(times, kind="stable")
    running = np.cumsum(steps[order])[:-1]
    return int(np.diff(times[order])[running >= depth].sum())


def apart(groups: Ints, starts: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """Shifts each group in time, so that intervals of different groups never overlap.

    Args:
        groups: Of each interval, from 0 on.
        starts: Where intervals start.
        ends: Where they end.
    """
    if not len(starts):
        return starts, ends
    first = starts.min()
    shift = groups * (ends.max() - first + 1) - first
    return starts + shift, ends + shift


def gaps(groups: Ints, starts: Ints, ends: Ints) -> Ints:
    """For each interval but the first of its group, the time since all before it had ended.

    It is 0 where one of them still ran. Gaps are in the order of groups, then of starts.
    """
    groups, starts, _, reached = _sweep(groups, starts, ends)
    later = np.append(False, groups[1:] == groups[:-1])[: len(groups)]
    idle: Ints = np.maximum(starts - reached, 0)[later]
    return idle


def busy(groups: Ints, starts: Ints, ends: Ints) -> Ints:
    """For each group from 0 on, for how long at least one of its intervals runs."""
    groups, starts, ends, reached = _sweep(groups, starts, ends)
    added = np.maximum(ends - np.maximum(starts, reached), 0)
    # Sums of float64 are exact up to 2^53 ns, which is 104 days.
    sums: Ints = np.bincount(groups, weights=added).astype(np.int64)
    return sums


def extents(groups: Ints, starts: Ints, ends: Ints) -> Ints:
    """For each group from 0 on, the time from its first start to its last end; 0 if it is empty."""
    count = int(groups.max(initial=-1)) + 1
    first, last = np.full(count, _NEVER), np.full(count, -_NEVER)
    np.minimum.at(first, groups, starts)
    np.maximum.at(last, groups, ends)
    lengths: Ints = np.where(last < first, 0, last - first)
    return lengths


def window_of(times: Ints, starts: Ints, ends: Ints) -> Ints:
    """Which of some disjoint, sorted intervals each time lies in; -1 for none."""
    index = np.searchsorted(starts, times, side="right") - 1
    inside = (index >= 0) & (times < np.append(ends, 0)[index])
    return np.where(inside, index, -1)


def _sweep(groups: Ints, starts: Ints, ends: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Intervals by group, then by start, and the latest end of those before each.

    Groups are shifted apart, so that what another group has reached lies before all of a group.
    """
    starts, ends = apart(groups, starts, ends)
    order = np.lexsort((starts, groups))
    groups, starts, ends = groups[order], starts[order], ends[order]
    reached = np.append(starts[:1], np.maximum.accumulate(ends)[:-1])
    return groups, starts, ends, reached
