"""A ceiling is the best that was seen of a machine: it only rises.

A busy machine is measured too low, and nothing tells. So another measurement, or a result, that is
higher takes the place of what is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise

import torch
from msgspec.structs import replace

from hogstream.kernels.operands import COMPUTE_DTYPES
from hogstream.profiling.results.records import (
    COPY,
    LAUNCHES,
    TURNS,
    UPDATE_SHAPED,
    Ceiling,
    Ceilings,
)
from hogstream.profiling.results.schema import KernelTime, PeerTime, Run, Shares

# Memory is measured over as many times what the last caches hold: of less they hold a part.
_BEYOND_CACHES = 4
# By bytes for an element of float32. Adam's 28 go over one array more, and are bounded by neither.
_KINDS = {8: COPY, 20: UPDATE_SHAPED}


@dataclass(frozen=True)
class Reached:
    """What a result reached.

    Attributes:
        kind: ``COPY``, ``UPDATE_SHAPED``, ``LAUNCHES`` or ``TURNS``.
        samples: One of each round, in the unit of the ceiling.
        bytes: Of the memory that it went over; None of the host.
    """

    kind: str
    samples: list[float]
    bytes: int | None = None


def new_ceiling(samples: list[float]) -> Ceiling:
    """A ceiling that was measured now."""
    measured = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return replace(Ceiling.of(samples), measured=measured)


def higher(kept: Ceilings, measured: Ceilings) -> Ceilings:
    """The higher of each ceiling of a machine that was measured twice; those kept come first."""
    best = measured.rates()
    for name, rate in kept.rates().items():
        if name in best and rate.median > best[name].median:
            best[name] = rate
    return measured.with_rates(best)


def raised(ceilings: Ceilings, reached: Iterable[Reached]) -> Ceilings:
    """Ceilings, and in place of those that are exceeded what exceeds them.

    What has too few samples for an interval raises none. Nor does what may have come in part from
    the caches below those of its level.
    """
    best = ceilings.rates()
    for each in reached:
        name, ceiling = each.kind, new_ceiling(each.samples)
        if each.bytes is not None:
            level = ceilings.level_of(each.bytes)
            name = f"{level.level} {each.kind}"
            if each.bytes < _least_bytes(ceilings)[level.level]:
                continue
        if ceiling.interval and name in best and ceiling.median > best[name].median:
            best[name] = ceiling
    return ceilings.with_rates(best)


def _least_bytes(ceilings: Ceilings) -> dict[str, int]:
    """How much of each level says what it can do: as much as all caches below it hold, or more."""
    least = {ceilings.levels[0].level: 0}
    for below, level in pairwise(ceilings.levels):
        times = 1 if level.cache_bytes else _BEYOND_CACHES
        least[level.level] = 2 * below.bytes * times  # which was measured over half of its caches
    return least


def of_runs(runs: Iterable[Run], ceilings: Ceilings) -> Iterator[Reached]:
    """What runs of the scheduler reached, whose shares are of some ceilings."""
    rates = ceilings.rates()
    for run in runs:
        shares, speed = run.share_of_ceilings, run.updates_per_second
        dtype: torch.dtype = getattr(torch, run.dtype)
        size = run.elements * (dtype.itemsize + COMPUTE_DTYPES[dtype].itemsize)
        for kind, name, share, bytes_ in (
            (UPDATE_SHAPED, f"{shares.level} {UPDATE_SHAPED}", shares.bandwidth, size),
            (LAUNCHES, LAUNCHES, shares.launch_rate, None),
            (TURNS, TURNS, shares.event_loop_rate, None),
        ):
            if share and min(speed.samples) > 0:
                factor = share * rates[name].median / speed.median
                yield Reached(kind, [factor * sample for sample in speed.samples], bytes_)


def of_kernels(kernels: Iterable[KernelTime]) -> Iterator[Reached]:
    """What updates of one float32 array reached, at 20 bytes an element."""
    for kernel in kernels:
        rates = [2e-5 * kernel.elements / sample for sample in kernel.milliseconds.samples]
        yield Reached(UPDATE_SHAPED, rates, 8 * kernel.elements)


def of_peers(times: Iterable[PeerTime]) -> Iterator[Reached]:
    """What steps of float32 tensors, and copies, reached; others go over memory otherwise."""
    for time in times:
        kind = _KINDS.get(time.bytes_per_element)
        if kind is not None:
            scale = 1e-6 * time.bytes_per_element * time.elements
            rates = [scale / sample for sample in time.milliseconds.samples]
            yield Reached(kind, rates, 8 * time.elements)


def rescaled(shares: Shares, before: Ceilings, after: Ceilings) -> Shares:
    """Shares of ceilings, as shares of what these were raised to."""
    old, new = before.rates(), after.rates()

    def share(value: float | None, name: str) -> float | None:
        return value and value * old[name].median / new[name].median

    return replace(
        shares,
        bandwidth=share(shares.bandwidth, f"{shares.level} {UPDATE_SHAPED}"),
        launch_rate=share(shares.launch_rate, LAUNCHES),
        event_loop_rate=share(shares.event_loop_rate, TURNS),
    )
