from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import replace

import pytest

from hogstream.scheduler import RunReport

REPORT = RunReport(
    policy="lock-free",
    workers=2,
    elements=1000,
    dtype="float32",
    backend="numpy",
    device="cpu",
    seconds=2.0,
    latencies_us=array("d", [10.0, 20.0, 30.0, 40.0]),
    staleness=Counter({0: 1, 1: 2, 6: 1}),
    updates_by_worker=[3, 1],
)


def test_figures_of_a_hand_worked_run() -> None:
    assert REPORT.to_dict() == {
        "policy": "lock-free",
        "workers": 2,
        "elements": 1000,
        "dtype": "float32",
        "backend": "numpy",
        "device": "cpu",
        "updates": 4,
        "seconds": 2.0,
        "updates_per_second": 2.0,
        "gigabytes_per_second": pytest.approx(2 * 1000 * 20 / 1e9),
        "latency_us": {
            "p50": pytest.approx(25.0),
            "p90": pytest.approx(37.0),
            "p99": pytest.approx(39.7),
        },
        "staleness": {"mean": 2.0, "p50": 1.0, "p99": pytest.approx(5.85), "max": 6.0},
        "lost_updates_fraction": None,
        "updates_by_worker": [3, 1],
    }


@pytest.mark.parametrize(
    ("dtype", "bytes_an_element"),
    [("float16", 14), ("bfloat16", 14), ("float32", 20), ("float64", 40)],
)
def test_traffic_counts_state_in_the_compute_type(dtype: str, bytes_an_element: int) -> None:
    report = replace(REPORT, dtype=dtype)
    assert report.gigabytes_per_second == pytest.approx(2 * 1000 * bytes_an_element / 1e9)


def test_what_was_not_measured_is_null() -> None:
    empty = replace(
        REPORT, latencies_us=array("d"), staleness=Counter(), updates_by_worker=[0, 0]
    ).to_dict()
    assert set(empty["latency_us"].values()) == {None}
    assert set(empty["staleness"].values()) == {None}


def test_runs_join_sample_by_sample() -> None:
    slower = replace(
        REPORT,
        seconds=6.0,
        latencies_us=array("d", [50.0]),
        staleness=Counter({6: 1}),
        updates_by_worker=[0, 1],
    )
    joined = RunReport.joined([REPORT, slower])
    assert list(joined.latencies_us) == [10, 20, 30, 40, 50]
    assert joined.staleness == Counter({0: 1, 1: 2, 6: 2})
    assert joined.updates_by_worker == [3, 2]
    assert joined.updates_per_second == 5 / 8


def test_runs_of_different_configurations_do_not_join() -> None:
    with pytest.raises(ValueError, match="policy must be 'lock-free' in all reports, got 'locked'"):
        RunReport.joined([REPORT, replace(REPORT, policy="locked")])
    with pytest.raises(ValueError, match="at least one, got none"):
        RunReport.joined([])
