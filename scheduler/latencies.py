"""Latencies in a fixed amount of memory, however many there are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# A bin for each value of the exponent and of the first six bits after it of a float64: bins are 0.8
# to 1.6 % wide. From 1 ns to 2^44 ns, five hours.
_BITS = 6
_BINS = 44 << _BITS
_FIRST = 1023 << _BITS
_TOLD_BITS = 3  # of a histogram to be shown, whose bins are 6 to 13 % wide


class Latencies:
    """A histogram of times, from which percentiles can be read to within 1.6 %.

    Attributes:
        counts: How many fell into each bin, int64.
    """

    def __init__(self) -> None:
        """An empty one."""
        self.counts: npt.NDArray[np.int64] = np.zeros(_BINS, np.int64)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def add(self, nanoseconds: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Adds some; below 1 ns counts as 1, and above five hours as that."""
        bits = np.maximum(np.asarray(nanoseconds, np.float64), 1.0).view(np.int64)
        bins = np.minimum((bits >> (52 - _BITS)) - _FIRST, _BINS - 1)
        self.counts += np.bincount(bins, minlength=_BINS)

    def percentile_us(self, percent: float) -> float | None:
        """The time that so many percent do not exceed, in microseconds; None if there are none."""
        total = len(self)
        if not total:
            return None
        rank = max(int(np.ceil(percent / 100 * total)), 1)
        index = int(np.searchsorted(np.cumsum(self.counts), rank))
        return float(_edges_us(np.array([index, index + 1])).mean())

    def mean_us(self) -> float | None:
        """The mean, in microseconds, to within 0.8 %; None if there are none."""
        total = len(self)
        if not total:
            return None
        edges = _edges_us(np.arange(_BINS + 1))
        return float((self.counts * (edges[:-1] + edges[1:])).sum() / (2 * total))

    def histogram(self) -> dict[str, list[float]] | None:
        """How many fell into each of some bins, from the shortest to the longest; None of none.

        Returns:
            ``edges_us``: the n + 1 edges of the bins in microseconds, and their n ``counts``.
        """
        each = 1 << (_BITS - _TOLD_BITS)
        counts = self.counts.reshape(-1, each).sum(axis=1)
        filled = np.flatnonzero(counts)
        if not len(filled):
            return None
        first, last = int(filled[0]), int(filled[-1]) + 1
        edges = _edges_us(np.arange(first, last + 1) * each)
        return {"edges_us": edges.tolist(), "counts": counts[first:last].tolist()}

    @classmethod
    def merged(cls, each: Sequence[Latencies]) -> Latencies:
        """All of some together."""
        merged = cls()
        for latencies in each:
            merged.counts += latencies.counts
        return merged


def _edges_us(bins: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Where bins begin, in microseconds."""
    edges: npt.NDArray[np.float64] = ((bins + _FIRST) << (52 - _BITS)).view(np.float64) / 1e3
    return edges
