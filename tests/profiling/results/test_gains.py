"""What lock-free gains, and where it ends: tables, sentences and heat map of known rounds."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hogstream.profiling.report import bench_plots, rows, sentences
from hogstream.profiling.results.confidence import Floats
from hogstream.profiling.results.gains import (
    Gain,
    gain_of,
    gains_by_place,
    gains_of,
    shares_alone,
    stronger_of,
)
from hogstream.profiling.results.records import Spread
from hogstream.profiling.results.schema import Bench, Shares
from report_testing import committed, with_gains

# Updates/s of the rounds of locked are 100; those of lock-free, for each size and worker count:
CLEAR = [290.0, 295.0, 300.0, 305.0, 310.0]
NOISE = [90.0, 100.0, 110.0, 115.0, 120.0]
LOSS = [50.0, 50.0, 50.0, 70.0, 90.0]


def bench_of(*rows: list[list[float]]) -> Bench:
    """A bench of 2^10, 2^12, ... elements against 2, 4, ... workers, and 1, which is CLEAR."""
    bench = committed("races", Bench)
    template, bench.results = bench.results[0], []
    for row, cells in enumerate(rows):
        for column, rounds in enumerate([CLEAR, *cells]):
            for policy, speeds in (("lock-free", rounds), ("locked", [100.0] * len(rounds))):
                run = copy.copy(template)
                run.policy, run.elements, run.workers = policy, 1 << (10 + 2 * row), 1 << column
                run.updates_per_second = Spread.of(speeds)
                run.share_of_ceilings = Shares("L2", 0.25 * (row + 1) if column == 0 else 2, 0, 0)
                bench.results.append(run)
    with_gains(bench.results)
    return bench


def test_gain_is_that_of_medians_and_its_interval_that_of_paired_rounds() -> None:
    speeds = {
        "lock-free": Spread.of([200.0, 100.0, 330.0, 200.0, 200.0]),
        "locked": Spread.of([100.0, 200.0, 110.0, 110.0, 110.0]),
        "ordered": Spread.of([0.0, 100.0, 100.0, 100.0, 100.0]),  # stood still in one round
        "bounded:2": Spread.of([100.0] * 5),
    }
    gains = gains_of("lock-free", speeds)
    assert gains.keys() == {"locked", "bounded:2"}
    assert (gains["locked"].median, gains["locked"].interval) == (200 / 110, (0.5, 3.0))
    assert not gains["locked"].estimate.excludes(1)
    assert gains_of("ordered", speeds)["locked"].median == 100 / 110
    bench = bench_of([NOISE])
    alone, _, run, baseline = bench.results
    gain = Gain("locked", run.gains["locked"].estimate)
    assert gains_by_place(bench.results) == {(1024, 2): gain}
    assert alone.gains["locked"].median == 3  # by pipelining, which is no gain over a lock
    assert gain_of(alone) is gain_of(baseline) is None


@pytest.mark.parametrize(
    ("policy", "speeds", "over", "ratio"),
    [
        ("lock-free", {"locked": 100, "ordered": 160, "awaited": 50}, "ordered", 1.25),
        ("lock-free", {"locked": 160, "ordered": 100, "bounded:1": 180}, "locked", 1.25),
        ("lock-free", {"locked": 100}, "locked", 2),
        ("lock-free", {"awaited": 100, "bounded:1": 100}, None, None),
        ("bounded:1", {"locked": 400, "ordered": 100}, "locked", 0.5),
        ("awaited", {"locked": 400, "ordered": 100}, "locked", 0.5),
        ("locked", {"ordered": 100}, None, None),
        ("ordered", {"locked": 100}, None, None),
    ],
)
def test_gain_is_over_the_stronger_baseline_and_over_nothing_else(
    policy: str, speeds: dict[str, float], over: str | None, ratio: float | None
) -> None:
    bench = committed("races", Bench)
    run = bench.results[0]
    spreads = {name: Spread.of([float(speed)] * 5) for name, speed in speeds.items()}
    run.policy, run.gains = policy, gains_of(policy, {policy: Spread.of([200.0] * 5), **spreads})
    gain = gain_of(run)
    assert (None if gain is None else (gain.over, gain.ratio.median)) == (
        None if over is None else (over, ratio)
    )


@pytest.mark.parametrize(
    ("without", "said"),
    [
        (None, "the stronger of locked and ordered"),
        ("locked", "ordered"),
        ("ordered", "locked"),
    ],
)
def test_gains_are_said_to_be_over_what_was_measured(without: str | None, said: str) -> None:
    runs = committed("races", Bench).results
    assert stronger_of(run for run in runs if run.policy != without) == said


def test_shares_alone_are_of_one_worker_where_they_are_known() -> None:
    bench = bench_of([CLEAR, CLEAR], [CLEAR, CLEAR])
    bench.results[0].share_of_ceilings.bandwidth = None
    assert shares_alone(bench) == {4096: 0.5}


def test_table_marks_what_may_be_noise() -> None:
    bench = bench_of([CLEAR, NOISE], [LOSS, CLEAR])
    bench.results = with_gains(bench.results[:-1])  # interrupted before the last
    (table,) = rows.gains(bench)
    assert table.title == "Lock-free over locked"
    assert table.columns == ("elements", "2 workers", "4 workers", "one alone, of ceiling")
    assert table.rows == [
        ("2^10", "3.00x", "(1.10x)", "25 %"),
        ("2^12", "0.50x", "-", "50 %"),
    ]


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (
            [[NOISE, NOISE, CLEAR], [NOISE, CLEAR, CLEAR], [CLEAR, NOISE, LOSS]],
            "Lock-free clearly gains over locked, with most worker counts, up to 2^12 elements; "
            "the most, 3.00x, with 4 workers at 2^12. From 2^14 on it does not: at 2^14 one update "
            "alone moves 75 % of the update-shaped ceiling.",
        ),
        (
            [[CLEAR, CLEAR], [CLEAR, [400.0] * 5]],
            "Lock-free clearly gains over locked, with most worker counts, up to 2^12 elements; "
            "the most, 4.00x, with 4 workers at 2^12. That is the largest size: at 2^12 one update "
            "alone moves 50 % of the update-shaped ceiling.",
        ),
        (
            [[NOISE, NOISE], [LOSS, LOSS]],
            "Lock-free clearly gains over locked, with most worker counts, at no size.",
        ),
        (
            [[CLEAR, CLEAR, NOISE], [NOISE]],
            "Lock-free clearly gains over locked, with most worker counts, up to 2^10 elements; "
            "the most, 3.00x, with 2 workers at 2^10. That is the largest size: at 2^10 one update "
            "alone moves 25 % of the update-shaped ceiling.",
        ),
    ],
    ids=["ends", "does_not_end", "never", "interrupted"],
)
def test_sentence_says_where_the_gain_ends(cells: list[list[list[float]]], said: str) -> None:
    assert sentences.gains(bench_of(*cells)) == [said]


def test_sentence_leaves_out_what_was_not_measured_alone() -> None:
    bench = bench_of([CLEAR, CLEAR], [NOISE, NOISE])
    bench.results = [run for run in bench.results if run.workers > 1]
    assert sentences.gains(bench)[0].endswith("at 2^10. From 2^12 on it does not.")


def heat_map(bench: Bench) -> tuple[dict[tuple[int, int], Floats], dict[tuple[int, int], str]]:
    """Colours and texts of the cells, by column and row."""
    (plot,) = bench_plots.gains(bench)
    axes = Figure().add_subplot()
    plot.draw(axes)
    colors = {
        (int(patch.get_x()), int(patch.get_y())): np.array(to_rgb(patch.get_facecolor()))
        for patch in axes.patches
        if isinstance(patch, Rectangle)
    }
    texts = {
        (int(text.get_position()[0]), int(text.get_position()[1])): text.get_text()
        for text in axes.texts
        if "x" in text.get_text()
    }
    return colors, texts


def test_heat_map_colours_only_what_is_clear_and_alike_on_both_sides() -> None:
    colors, texts = heat_map(bench_of([[200.0] * 5, NOISE], [[50.0] * 5, [100.0] * 5]))
    blue, orange = colors[0, 0], colors[0, 1]
    assert blue[2] > blue[0]
    assert orange[0] > orange[2]
    grey = np.array([colors[1, 0], colors[1, 1]])  # noise, and a tie
    assert np.ptp(grey, axis=0).max() == 0
    assert np.ptp(grey[0]) < 0.1
    assert texts == {(0, 0): "2.00x", (1, 0): "(1.10x)", (0, 1): "0.50x", (1, 1): "(1.00x)"}


def test_heat_map_shows_a_policy_that_stood_still() -> None:
    _, texts = heat_map(bench_of([[0.0] * 5, CLEAR]))
    assert texts == {(0, 0): "0.00x", (1, 0): "3.00x"}
