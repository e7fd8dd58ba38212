"""What lock-free gains, and where it ends: tables, sentences and heat map of known rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hogstream.profiling.report import summary
from hogstream.profiling.report.heat_map import gain_heat_map
from hogstream.profiling.results.gains import gain_columns, gain_sentences, gain_tables, gains_over
from results_page import updated

# Updates/s of the rounds of locked are 100; those of lock-free, for each size and worker count:
CLEAR = [290.0, 295.0, 300.0, 305.0, 310.0]
NOISE = [90.0, 100.0, 110.0, 115.0, 120.0]
LOSS = [50.0, 50.0, 50.0, 70.0, 90.0]


def bench_of(*rows: list[list[float]], ceiling: float = 40.0) -> dict[str, Any]:
    """A bench of 2^10, 2^12, ... elements against 1, 2, ... workers."""
    results: list[dict[str, Any]] = []
    for row, cells in enumerate(rows):
        for column, rounds in enumerate(cells):
            for policy, speeds in (("lock-free", rounds), ("locked", [100.0] * len(rounds))):
                results.append(
                    {
                        "policy": policy,
                        "elements": 1 << (10 + 2 * row),
                        "workers": 1 << column,
                        "updates_per_second_of_rounds": speeds,
                        "gigabytes_per_second": 10.0 * (row + 1) if column == 0 else 80.0,
                    }
                )
    return {"ceilings": {"update_shaped_gigabytes_per_second": ceiling}, "results": results}


def test_gain_is_that_of_medians_and_its_interval_that_of_paired_rounds() -> None:
    bench = bench_of([[200.0, 100.0, 330.0, 200.0, 200.0]])
    bench["results"][1]["updates_per_second_of_rounds"] = [100.0, 200.0, 110.0, 110.0, 110.0]
    gain = gains_over("locked", bench["results"])[1024, 1]
    assert (gain.median, gain.low, gain.high) == (200 / 110, 0.5, 3.0)
    assert not gain.excludes(1)
    assert gains_over("ordered", bench["results"]) == {}


def test_table_marks_what_may_be_noise() -> None:
    bench = bench_of([CLEAR, NOISE], [LOSS, CLEAR])
    bench["results"] = bench["results"][:-1]  # interrupted before the last
    assert gain_columns(bench) == ("elements", "1 worker", "2 workers", "one alone, of ceiling")
    assert gain_tables(bench) == {
        "Lock-free over locked": [
            ("2^10", "3.00x", "(1.10x)", "25 %"),
            ("2^12", "0.50x", "-", "50 %"),
        ]
    }


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [[NOISE, NOISE, CLEAR], [NOISE, CLEAR, CLEAR], [CLEAR, NOISE, LOSS]],
            "Lock-free clearly gains over locked, with most worker counts, up to 2^12 elements; "
            "the most, 3.00x, with 2 workers at 2^12. From 2^14 on it does not: at 2^14 one update "
            "alone moves 75 % of the update-shaped ceiling.",
        ),
        (
            [[CLEAR, CLEAR], [CLEAR, [400.0] * 5]],
            "Lock-free clearly gains over locked, with most worker counts, up to 2^12 elements; "
            "the most, 4.00x, with 2 workers at 2^12. That is the largest size: at 2^12 one update "
            "alone moves 50 % of the update-shaped ceiling.",
        ),
        (
            [[NOISE, NOISE], [LOSS, LOSS]],
            "Lock-free clearly gains over locked, with most worker counts, at no size.",
        ),
        (
            [[CLEAR, CLEAR, NOISE], [NOISE]],
            "Lock-free clearly gains over locked, with most worker counts, up to 2^10 elements; "
            "the most, 3.00x, with 1 worker at 2^10. That is the largest size: at 2^10 one update "
            "alone moves 25 % of the update-shaped ceiling.",
        ),
    ],
    ids=["ends", "does_not_end", "never", "interrupted"],
)
def test_sentence_says_where_the_gain_ends(rows: list[list[list[float]]], said: str) -> None:
    assert gain_sentences(bench_of(*rows)) == [said]


def test_sentence_leaves_out_what_was_not_measured_alone() -> None:
    bench = bench_of([CLEAR, CLEAR], [NOISE, NOISE])
    bench["results"] = [result for result in bench["results"] if result["workers"] > 1]
    assert gain_sentences(bench)[0].endswith("at 2^10. From 2^12 on it does not.")


def test_heat_map_colours_only_what_is_clear_and_alike_on_both_sides() -> None:
    figure = gain_heat_map(bench_of([[200.0] * 5, NOISE], [[50.0] * 5, [100.0] * 5]))
    cells: Any = figure.axes[0].collections[0]
    figure.draw_without_rendering()  # which gives the cells their colours
    colors = cells.get_facecolor().reshape(2, 2, 4)
    assert [cells.norm(ratio) for ratio in (0.5, 1.0, 2.0)] == pytest.approx([0.0, 0.5, 1.0])
    blue, orange = colors[0, 0], colors[1, 0]
    assert blue[2] > blue[0]
    assert orange[0] > orange[2]
    grey = colors[:, 1, :3]  # noise, and a tie
    assert np.ptp(grey, axis=1).max() == 0
    assert grey.max() < 1  # and not the white of 1x
    texts = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert texts == {
        (0.5, 0.5): "2.00x",
        (1.5, 0.5): "(1.10x)",
        (0.5, 1.5): "0.50x",
        (1.5, 1.5): "(1.00x)",
    }


def test_heat_map_shows_a_policy_that_stood_still() -> None:
    figure = gain_heat_map(bench_of([[0.0] * 5, CLEAR]))
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.00x", "3.00x"]


def test_results_page_tells_of_a_sweep(tmp_path: Path) -> None:
    sweep = bench_of([CLEAR, CLEAR], [NOISE, NOISE]) | {
        "command": "hogstream bench --sweep",
        "settings": {"depth": 2, "sweep": True},
        "environment": {
            "device": "cuda:0",
            "device_name": "H200",
            "backend": "triton",
            "cores": 16,
        },
    }
    sweep["ceilings"]["copy_gigabytes_per_second"] = 30.0
    (tmp_path / "some-sweep.json").write_text(json.dumps(sweep))
    begin = "<!-- results: made by `make results`, not by hand -->\n"
    page = updated("docs/results.md", f"{begin}<!-- end of results -->\n", tmp_path)
    assert "`hogstream bench --sweep` ([JSON](results/some-sweep.json)):" in page
    assert f"- {gain_sentences(sweep)[0]}\n" in page
    assert "Lock-free over locked:\n\n| elements | 1 worker | 2 workers |" in page
    assert "| 2^12 | (1.10x) | (1.10x) | 50 % |" in page
    assert "Lock-free against" not in "".join(summary.sentences(sweep))  # too many, in a sweep
