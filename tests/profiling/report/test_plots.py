"""Plots: what is drawn of known results, for the page and in files of their own."""

from __future__ import annotations

import copy
import re
from itertools import pairwise
from pathlib import Path

import matplotlib
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hogstream.profiling.report import charts, drawing, plots
from hogstream.profiling.report.drawing import DAY, Plot
from hogstream.profiling.results.records import Spread
from hogstream.profiling.results.schema import Bench, Compare, Train
from report_testing import committed, full_bench, with_gains


def drawn(plot: Plot) -> str:
    return str(drawing.markup(plot, "some name"))


def bench_of(**rounds: list[float]) -> Bench:
    """A bench of 2^12 elements and 4 workers, with a policy for each list of rounds."""
    bench = committed("races", Bench)
    (template, *_) = (run for run in bench.results if (run.elements, run.workers) == (4096, 4))
    runs = []
    for policy, speeds in rounds.items():
        run = copy.copy(template)
        run.policy, run.updates_per_second = policy.replace("_", "-"), Spread.of(speeds)
        runs.append(run)
    bench.results = with_gains(runs)
    return bench


def test_colours_in_the_page_are_its_own_and_nothing_needs_a_name() -> None:
    for group in plots.of_bench(full_bench()):
        for plot in group.plots:
            svg = drawn(plot)
            assert not any(color in svg for color in DAY.values())
            assert re.search(r"(fill|stroke):var\(--\w+\)", svg)
            ids = set(re.findall(r' id="([^"]+)"', svg))
            assert ids == set(re.findall(r'href="#([^"]+)"', svg))
            assert "clip-path" not in svg
            assert "font-family" not in svg


def test_what_a_marker_stands_for_shows_under_the_mouse() -> None:
    bench = bench_of(lock_free=[200.0, 210.0, 220.0, 230.0, 240.0])
    (plot,) = plots.of_bench(bench)[0].plots
    assert "<title>lock-free, 4 workers: 220 updates/s (200 to 240)</title>" in drawn(plot)


def test_no_two_policies_look_alike_even_without_colours() -> None:
    rounds = {name: [1.0] * 5 for name in ("lock_free", "locked", "ordered", "a", "b", "c")}
    looks = plots.of_bench(bench_of(**rounds))[0].looks
    for feature in ("color", "marker", "dashes"):
        assert len({getattr(look, feature) for look in looks.values()}) == len(rounds)


@pytest.mark.parametrize(
    ("low", "high"), [(1, 1), (3, 3.3), (1, 2), (0.02, 0.9), (7, 70), (1, 1e4), (1e-3, 1e9)]
)
def test_a_logarithmic_axis_has_a_few_ticks(low: float, high: float) -> None:
    axes = Figure().add_subplot()
    drawing.logarithmic(axes, "y", [low, high, 0.0])
    bottom, top = axes.get_ylim()
    assert bottom < low <= high < top
    assert 2 <= len(axes.get_yticks()) <= 8
    assert all(bottom <= tick <= top for tick in axes.get_yticks())


def test_names_are_drawn_apart() -> None:
    picture = Figure(dpi=72)
    axes = picture.add_subplot()
    axes.set_ylim(0, 100)
    charts.names_beside(axes, [(0, 50, "one"), (0, 50, "two"), (0, 51, "three"), (0, 90, "far")])
    picture.draw_without_rendering()
    heights = sorted(text.get_window_extent().y0 for text in axes.texts)
    tall = axes.texts[0].get_window_extent().height
    assert all(later - before >= tall - 1 for before, later in pairwise(heights))


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    def settings() -> list[object]:
        return [value for name, value in matplotlib.rcParams.items() if name != "backend"]

    before = settings()
    drawn(plots.of_bench(full_bench())[0].plots[0])
    assert settings() == before


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures_are_saved_as_their_suffix_says(tmp_path: Path, suffix: str) -> None:
    begins = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    pictures = {name: tmp_path / f"{name}.{suffix}" for name in ("gains", "gain", "loss", "peers")}
    plots.write_gains(committed("sweep", Bench), pictures["gains"])
    plots.write_gain(committed("sweep", Bench), pictures["gain"])
    plots.write_training(committed("train-digits", Train), pictures["loss"])
    plots.write_compare(committed("compare", Compare), pictures["peers"])
    for path in pictures.values():
        assert path.read_bytes().startswith(begins)
    if suffix == "svg":
        (run, *_) = committed("train-digits", Train).results
        rounds = len(run.reached)
        took = f"{run.seconds_to_target.median:.2f} s, in {rounds} of {rounds} rounds"
        assert f"{run.policy}: {took}" in pictures["loss"].read_text("utf-8")
        assert not any("tip:" in path.read_text("utf-8") for path in pictures.values())


def test_an_unknown_suffix_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="doc"):
        plots.write_gains(full_bench(), tmp_path / "gains.doc")


def test_a_picture_of_nothing_says_so(tmp_path: Path) -> None:
    plots.write_gains(bench_of(locked=[1.0] * 5), tmp_path / "gains.svg")
    assert "There is nothing to draw." in (tmp_path / "gains.svg").read_text("utf-8")
    train = committed("train-digits", Train)
    for run in train.results:
        run.losses = run.metrics = []
    plots.write_training(train, tmp_path / "loss.svg")
    assert "There is nothing to draw." in (tmp_path / "loss.svg").read_text("utf-8")


@pytest.mark.parametrize("higher", [True, False])
def test_trainings_are_drawn_with_their_target_and_losses_below_zero(higher: bool) -> None:
    train = committed("train-digits", Train)
    train.settings.higher_is_better = higher
    train.settings.target = 3.0 if higher else -3.0  # beyond all that was reached
    for run in train.results:
        run.losses = [(at, loss - 1.0) for at, loss in run.losses]
    for plot in plots.of_train(train).plots:
        axes = Figure().add_subplot()
        plot.draw(axes)
        assert axes.get_yscale() == "linear"
    assert axes.get_ylim()[higher] == pytest.approx(train.settings.target, rel=0.1)


def test_the_front_picture_is_of_the_stronger_baseline(tmp_path: Path) -> None:
    bench = bench_of(lock_free=[200.0] * 5, locked=[50.0] * 5, ordered=[160.0] * 5)
    plots.write_gain(bench, tmp_path / "gain.svg")
    svg = (tmp_path / "gain.svg").read_text("utf-8")
    assert ">1.25x<" in svg
    assert "4.00x" not in svg
    assert ">2^12<" in svg
    assert "4 workers on AMD EPYC" in svg
    assert DAY["blue"] in svg
    assert DAY["orange"] not in svg


def test_long_names_are_cut_and_what_is_no_character_is_marked() -> None:
    plot = charts.bars("title", "1", "x", [charts.Bar("a\x1b" + 99 * "b", 1, "1", True, None)], 2)
    shown = re.findall("<text[^>]*>([^<]+)", drawn(plot))
    assert f"a?{47 * 'b'}…" in shown


def test_a_formula_in_a_name_is_no_formula() -> None:
    def draw(axes: Axes) -> None:
        axes.text(0, 0, "$\\frac{1}$")

    assert ">$\\frac{1}$<" in drawn(Plot("", "1", draw))
