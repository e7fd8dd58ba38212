from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from hogstream.scheduler import RunReport
from hogstream.scheduler.latencies import Latencies


def latencies(*microseconds: float) -> Latencies:
    made = Latencies()
    made.add([round(each * 1000) for each in microseconds])
    return made


REPORT = RunReport(
    policy="lock-free",
    workers=2,
    elements=1000,
    dtype="float32",
    backend="numpy",
    device="cpu",
    seconds=2.0,
    latencies=latencies(10, 20, 30, 40),
    staleness=Counter({0: 1, 1: 2, 6: 1}),
    updates_by_worker=[3, 1],
    dropped=[0, 1],
    nonfinite=[2, 0],
    restarts=[1, 0],
    failures={1: LookupError("no more")},
    block_updates=40,
    lost_block_updates=3,
    overwritten_block_updates=10,
    rows=20,
    stale_rows=5,
    torch_threads=3,
)


def test_figures_of_a_hand_worked_run() -> None:
    assert REPORT.to_dict() == {
        "torch_threads": 3,
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
            "p50": pytest.approx(20.0, rel=0.016),
            "p90": pytest.approx(40.0, rel=0.016),
            "p99": pytest.approx(40.0, rel=0.016),
            # Eight bins between a power of two nanoseconds and the next.
            "histogram": {
                "edges_us": pytest.approx(
                    [
                        *(9.216 + 1.024 * index for index in range(7)),
                        *(16.384 + 2.048 * index for index in range(8)),
                        *(32.768, 36.864, 40.96),
                    ]
                ),
                "counts": [int(index in (0, 8, 13, 16)) for index in range(17)],
            },
        },
        "staleness": {
            "mean": 2.0,
            "p50": 1.0,
            "p99": 6.0,
            "max": 6.0,
            "histogram": {"0": 1, "1": 2, "6": 1},
        },
        "lost_updates_fraction": 3 / 40,
        "overwrites_per_update": 0.25,
        "stale_rows_fraction": 0.25,
        "updates_by_worker": [3, 1],
        "dropped_by_worker": [0, 1],
        "nonfinite_by_worker": [2, 0],
        "restarts_by_worker": [1, 0],
        "failures": {"1": "LookupError: no more"},
        "dead": [],
        "partial": False,
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
        REPORT,
        latencies=Latencies(),
        staleness=Counter(),
        updates_by_worker=[0, 0],
        block_updates=None,
        lost_block_updates=None,
        overwritten_block_updates=None,
        rows=None,
        stale_rows=None,
    ).to_dict()
    assert set(empty["latency_us"].values()) == {None}
    assert set(empty["staleness"].values()) == {None}
    assert empty["lost_updates_fraction"] is empty["overwrites_per_update"] is None
    assert empty["stale_rows_fraction"] is None


def test_runs_join_sample_by_sample() -> None:
    slower = replace(
        REPORT,
        seconds=6.0,
        latencies=latencies(50),
        staleness=Counter({6: 1}),
        updates_by_worker=[0, 1],
        failures={},
        partial=True,
    )
    joined = RunReport.joined([REPORT, slower])
    assert len(joined.latencies) == 5
    assert joined.latencies.percentile_us(100) == pytest.approx(50, rel=0.016)
    assert joined.partial
    assert list(joined.failures) == [1]
    assert joined.lost_updates_fraction == 6 / 80
    assert (joined.rows, joined.stale_rows) == (40, 10)
    assert joined.staleness == Counter({0: 1, 1: 2, 6: 2})
    assert joined.updates_by_worker == [3, 2]
    assert joined.updates_per_second == 5 / 8


def test_runs_of_different_configurations_do_not_join() -> None:
    with pytest.raises(ValueError, match="policy must be 'lock-free' in all reports, got 'locked'"):
        RunReport.joined([REPORT, replace(REPORT, policy="locked")])
    with pytest.raises(ValueError, match="at least one, got none"):
        RunReport.joined([])


def test_processes_beside_each_other_number_their_workers_through() -> None:
    other = replace(REPORT, seconds=3.0, updates_by_worker=[5, 7], failures={0: OSError("gone")})
    beside = RunReport.beside([REPORT, other], dead=[99], block_updates=50)
    assert beside.workers == 4
    assert beside.updates_by_worker == [3, 1, 5, 7]
    assert {worker: type(error) for worker, error in beside.failures.items()} == {
        1: LookupError,
        2: OSError,
    }
    assert beside.seconds == 3.0
    assert beside.dead == [99]
    assert beside.block_updates == 50
    assert (beside.rows, beside.stale_rows) == (40, 10)
    unknown = RunReport.beside([REPORT, replace(other, rows=None, stale_rows=None)])
    assert unknown.rows is unknown.stale_rows is None


@pytest.mark.parametrize("percent", [1, 50, 90, 99, 100])
def test_percentiles_are_within_a_bin_of_the_samples(percent: int) -> None:
    samples = np.random.default_rng(0).lognormal(10, 3, 10_001).astype(np.int64) + 1
    made = Latencies()
    for part in np.array_split(samples, 7):
        made.add(part.tolist())
    exact = np.percentile(samples, percent, method="inverted_cdf") / 1e3
    assert made.percentile_us(percent) == pytest.approx(exact, rel=0.016)
    assert len(made) == 10_001


def test_a_mean_is_within_half_a_bin_of_that_of_the_samples() -> None:
    samples = np.random.default_rng(0).lognormal(10, 1, 10_001).astype(np.int64) + 1
    made = Latencies()
    assert made.mean_us() is None
    made.add(samples.tolist())
    assert made.mean_us() == pytest.approx(samples.mean() / 1e3, rel=0.008)
