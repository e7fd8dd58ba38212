"""The types of the result files: what they hold, and that nothing is lost on the way."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest

from hogstream.profiling.results.files import (
    AnyResult,
    BadResultError,
    decoded,
    encoded,
    write_result,
)
from hogstream.profiling.results.profile_schema import KernelCounters, NcuProfile
from hogstream.profiling.results.records import PositiveSpread, Ratio, Spread
from report_testing import RESULTS


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_file_is_written_as_it_was_read(path: Path, tmp_path: Path) -> None:
    result = msgspec.json.decode(path.read_bytes(), type=AnyResult)
    write_result(result, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_a_spread_is_of_its_samples_in_their_order() -> None:
    spread = Spread.of([5.0, 1.0, 2.0, 3.0, 4.0])
    assert spread == Spread(median=3.0, interval=(1.0, 5.0), samples=[5.0, 1.0, 2.0, 3.0, 4.0])
    assert (spread.estimate.median, spread.estimate.bounds) == (3.0, (1.0, 5.0))
    few = PositiveSpread.of([1.0, 2.0])
    assert (type(few), few.median, few.interval) == (PositiveSpread, 1.5, None)
    assert few.estimate.low == -math.inf
    assert few.estimate.wide


def test_a_ratio_is_paired_by_round_and_none_over_what_stood_still() -> None:
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]
    ratio = Ratio.of([3 * each for each in drift], drift)
    assert ratio == Ratio(median=3.0, interval=(3.0, 3.0))
    assert Ratio.of([1.0], [2.0]) == Ratio(median=0.5, interval=None)
    assert Ratio.of([1.0, 1.0], [1.0, 0.0]) is None


@pytest.mark.parametrize("sample", [math.nan, -1.0, 1e-300])
def test_what_is_no_sample_is_refused_when_it_is_taken(sample: float) -> None:
    with pytest.raises(ValueError, match=r"must hold the median|must each be 0 or from 1e-18"):
        Spread.of([sample])


def test_what_is_in_no_type_is_in_no_file() -> None:
    counters = KernelCounters("k", "", "", 1, *[None] * 11)
    profile = NcuProfile(
        command="hogstream profile read x",
        environment=None,
        profiler_version=None,
        results=[counters],
    )
    text = encoded(profile)
    assert decoded(text, NcuProfile) == profile
    with pytest.raises(BadResultError, match=r"^results\[0\].more is unknown$"):
        decoded(text.replace(b'"kernel"', b'"more": 1, "kernel"'), NcuProfile)
    with pytest.raises(BadResultError, match=r"^results\[0\].grid is missing$"):
        decoded(text.replace(b'"grid": "",', b""), NcuProfile)
