"""How sure a median is, and a ratio of medians: 95 % bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
#: Fewer samples bound nothing: the range of four holds their median in 7 of 8 cases only.
FEWEST = 5
#: An interval of more than this share of the median is too wide to conclude from.
WIDE = 0.25
_RESAMPLES = 5000
_NAMED = 3

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate and the 95 % confidence interval around it.

    Attributes:
        median: The estimate: a median, or a ratio of two.
        low: Lower end of the interval.
        high: Upper end.
    """

    median: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """How wide the interval is, as a share of the estimate."""
        return (self.high - self.low) / abs(self.median) if self.median else math.inf

    @property
    def wide(self) -> bool:
        """Whether the interval is too wide to conclude from: over a quarter of the estimate."""
        return self.width > WIDE

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Both ends, for JSON; None if too few samples bound nothing."""
        return (self.low, self.high) if math.isfinite(self.high - self.low) else None

    def excludes(self, value: float) -> bool:
        """Whether a value lies outside: then the estimate differs from it beyond noise."""
        return not self.low <= value <= self.high


def median_interval(samples: Sequence[float]) -> Interval:
    """The median of some samples, with the expanded percentile bootstrap's interval.

    So few samples as ours make the percentile bootstrap (Efron 1979) too narrow, so its tails are
    made smaller, by Student's t (Hesterberg 2015, arXiv 1411.5279). Of five to eight samples it is
    all of their range; of fewer than five it is without bounds, as their range would not do.

    Raises:
        ValueError: If there are none.
    """
    if not samples:
        raise ValueError("samples must hold at least one, got none")
    mine = np.asarray(samples, np.float64)
    return _interval(float(np.median(mine)), len(mine), partial(_medians, mine))


def ratio_interval(
    mine: Sequence[float], theirs: Sequence[float], *, paired: bool
) -> Interval | None:
    """The median of some samples over that of others, with an interval as ``median_interval``'s.

    Args:
        mine: Those above the line.
        theirs: Those below it.
        paired: Whether they were measured in the same rounds, which are then drawn together: what
            strikes both alike leaves their ratio as it is.

    Returns:
        The ratio, or None if one of ``theirs`` is 0.

    Raises:
        ValueError: If there are none, or ``paired`` ones are not as many.
    """
    if not mine or not theirs:
        raise ValueError(f"mine and theirs must hold samples, got {len(mine)} and {len(theirs)}")
    if paired and len(mine) != len(theirs):
        raise ValueError(f"theirs must hold {len(mine)} samples if paired, got {len(theirs)}")
    if min(theirs) == 0:
        return None
    above, below = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)

    def resample(random: np.random.Generator) -> Floats:
        if not paired:
            return _medians(above, random) / _medians(below, random)
        rows = random.integers(len(above), size=(_RESAMPLES, len(above)))
        ratios: Floats = np.median(above[rows], axis=1) / np.median(below[rows], axis=1)
        return ratios

    estimate = float(np.median(above) / np.median(below))
    return _interval(estimate, min(len(above), len(below)), resample)


def spread_warnings(timings: Mapping[str, Interval]) -> list[str]:
    """A sentence on the timings whose intervals are too wide to conclude from, if there are some.

    Args:
        timings: By what was timed, as the sentence is to call it.
    """
    widest = sorted(
        (name for name, interval in timings.items() if interval.wide),
        key=lambda name: timings[name].width,
        reverse=True,
    )
    if not widest:
        return []
    named = ", ".join(f"{name} ({_width_text(timings[name])})" for name in widest[:_NAMED])
    return [
        f"The spread of {len(widest)} of {len(timings)} timings is too wide to conclude from them: "
        f"the 95 % interval is over {100 * WIDE:.0f} % of the median. The widest: {named}. Measure "
        f"for longer, or on a machine with less else to do."
    ]


def _width_text(interval: Interval) -> str:
    if interval.bounds is None:
        return f"fewer than {FEWEST} rounds"
    return f"{100 * interval.width:.0f} %" if interval.median else "it stood still"


def _medians(samples: Floats, random: np.random.Generator) -> Floats:
    """Medians of as many samples as there are, drawn from them again and again."""
    rows = random.integers(len(samples), size=(_RESAMPLES, len(samples)))
    medians: Floats = np.median(samples[rows], axis=1)
    return medians


def _interval(
    estimate: float, count: int, resample: Callable[[np.random.Generator], Floats]
) -> Interval:
    if count < FEWEST:
        return Interval(estimate, -math.inf, math.inf)
    tail = _tail(count)
    # The same samples always give the same interval.
    low, high = np.quantile(resample(np.random.default_rng(0)), [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))


def _tail(count: int) -> float:
    """The share of resamples to leave out on either side, for so many samples."""
    normal, free = NormalDist(), count - 1
    z = normal.inv_cdf((1 + LEVEL) / 2)
    # Student's t of so many degrees of freedom (Abramowitz and Stegun 1964, 26.7.5).
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return normal.cdf(-t * math.sqrt(count / free))
