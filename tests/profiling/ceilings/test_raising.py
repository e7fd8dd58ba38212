"""A ceiling is the best that was seen: what may raise it, and what may not."""

from __future__ import annotations

import pytest

from hogstream.profiling.ceilings.raising import Reached, of_kernels, of_peers, of_runs, raised
from hogstream.profiling.results.records import (
    COPY,
    LAUNCHES,
    TURNS,
    UPDATE_SHAPED,
    Ceiling,
    Ceilings,
    Level,
)
from hogstream.profiling.results.schema import Bench, Compare, KernelTime, PeerTime
from report_testing import committed

MIB = 1 << 20
DATE = "2026-01-02T03:04:05+00:00"
ROUNDS = [0.99, 1.0, 1.01, 0.98, 1.02, 0.97, 1.03]


def ceiling(median: float) -> Ceiling:
    return Ceiling.of([median * each for each in ROUNDS])


# Two cores, whose own caches were measured over a half of them: 1 MiB of 2, 16 of 32.
CEILINGS = Ceilings(
    measured=DATE,
    levels=[
        Level("L2", MIB, 2, MIB, ceiling(100.0), ceiling(100.0)),
        Level("L3", 16 * MIB, 2, 32 * MIB, None, ceiling(50.0)),
        Level("memory", 192 * MIB, 2, None, ceiling(3.5), ceiling(10.0)),
    ],
    launches_per_second=ceiling(1e6),
    event_loop_turns_per_second=ceiling(1e5),
)


@pytest.mark.parametrize(
    ("kind", "rate", "size", "raises"),
    [
        (COPY, 25.0, 128 * MIB, "memory copy"),
        (COPY, 3.4, 128 * MIB, None),  # no higher
        (COPY, 25.0, 127 * MIB, None),  # some of it may have come from the last cache
        (UPDATE_SHAPED, 60.0, 32 * MIB, "L3 update-shaped"),
        (UPDATE_SHAPED, 60.0, 2 * MIB, "L3 update-shaped"),
        (UPDATE_SHAPED, 60.0, 2 * MIB - 1, None),  # some may have come from L2
        (COPY, 60.0, 32 * MIB, None),  # which was not measured
        (UPDATE_SHAPED, 110.0, MIB, "L2 update-shaped"),
        (LAUNCHES, 2e6, None, "launches"),
        (LAUNCHES, 9e5, None, None),
        (TURNS, 2e5, None, "turns of the event loop"),
    ],
)
def test_what_exceeds_a_ceiling_raises_it_alone(kind, rate, size, raises):
    found = raised(CEILINGS, [Reached(kind, [rate * each for each in ROUNDS], size)])
    before, after = CEILINGS.rates(), found.rates()
    assert [name for name in before if after[name] != before[name]] == ([raises] if raises else [])
    if raises:
        assert after[raises].median == pytest.approx(rate)
        assert (after[raises].measured or "") > DATE


def test_too_few_rounds_raise_nothing():
    assert raised(CEILINGS, [Reached(LAUNCHES, [2e6, 2e6])]) == CEILINGS


def test_the_highest_of_many_is_taken():
    many = [Reached(LAUNCHES, [rate] * 7) for rate in (2e6, 5e6, 3e6)]
    assert raised(CEILINGS, many).launches_per_second.median == 5e6


def test_runs_reach_their_own_bandwidth():
    bench = committed("bench", Bench)
    found = [each for each in of_runs(bench.results, bench.ceilings) if each.kind == UPDATE_SHAPED]
    runs = [run for run in bench.results if run.share_of_ceilings.bandwidth]
    assert runs
    for each, run in zip(found, runs, strict=True):
        assert Ceiling.of(each.samples).median == pytest.approx(run.gigabytes_per_second)
        assert each.bytes == 8 * run.elements


def test_kernels_and_peers_reach_their_own_bandwidth():
    bench, compare = committed("bench", Bench), committed("compare", Compare)
    bounded = [each for each in compare.results if each.bytes_per_element in (8, 20)]
    assert len(bounded) < len(compare.results)  # Adam is bounded by no ceiling, and raises none
    results: list[KernelTime | PeerTime] = [*bench.kernels, *bounded]
    found = [*of_kernels(bench.kernels), *of_peers(compare.results)]
    for each, result in zip(found, results, strict=True):
        # Medians of as many times and of their inverses differ, if they are an even number.
        assert Ceiling.of(each.samples).median == pytest.approx(
            result.gigabytes_per_second, rel=0.03
        )
        assert each.bytes == 8 * result.elements
    copies = [isinstance(each, PeerTime) and each.peer == "memory-copy" for each in results]
    assert [each.kind == COPY for each in found] == copies
    assert any(copies)
