"""Plots of results that are saved to files of their own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from hogstream.profiling.measure.peers import CEILING, HOGSTREAM, MEMORY
from hogstream.profiling.report.summary import results_by_shape

Result = dict[str, Any]

# Okabe and Ito's colours: told apart by colour-blind readers too. Markers repeat the distinction.
STYLES: dict[str, dict[str, Any]] = {
    "lock-free": {"color": "#0072B2", "marker": "o"},
    "locked": {"color": "#D55E00", "marker": "s"},
    "ordered": {"color": "#009E73", "marker": "^"},
}
# For more lines than there are colours, a marker each as well.
_OURS, _THEIRS = "#0072B2", "#999999"
_COLORS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^vDP*X<>hd"
_COLUMNS = 3


def loss_against_time(results: list[Result], path: Path) -> None:
    """Plots training loss against seconds, all policies in one picture.

    Args:
        results: With ``policy`` and ``losses``, a list of (seconds, loss).
        path: Where to save it; its suffix says the format.

    Raises:
        ValueError: If the suffix names no known format.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for result in results:
        if not result["losses"]:  # interrupted before the first was told
            continue
        seconds, losses = zip(*_smoothed(result["losses"]), strict=True)
        label = f"{result['policy']}: {result['test_accuracy']:.1%} test accuracy"
        style = STYLES.get(result["policy"], {})
        axes.plot(seconds, losses, label=label, color=style.get("color"))
    axes.set_yscale("log")
    axes.set(xlabel="seconds", ylabel="training loss (cross entropy, nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def compare(result: dict[str, Any], path: Path) -> None:
    """Plots a comparison: bandwidths at each shape, and below a roofline of the largest ones.

    Args:
        result: The JSON output of ``hogstream compare``.
        path: Where to save it; its suffix says the format.

    Raises:
        ValueError: If the suffix names no known format.
    """
    shapes = results_by_shape(result)
    measured = dict.fromkeys(entry["peer"] for entry in result["results"])
    peers = [peer for peer in measured if peer not in MEMORY]
    largest = sorted(shapes, key=lambda name: shapes[name][0]["elements"])[-_COLUMNS:]
    rows = math.ceil(len(shapes) / _COLUMNS)
    bars_height = 1.0 + 0.22 * len(peers)
    figure = Figure(figsize=(12, rows * bars_height + 4.5), layout="constrained")
    heights = [*rows * [bars_height], 4.5]
    grid = figure.add_gridspec(rows + 1, _COLUMNS, height_ratios=heights)
    for index, (name, results) in enumerate(shapes.items()):
        axes = figure.add_subplot(grid[divmod(index, _COLUMNS)])
        _draw_bandwidths(axes, name, results, peers)
        axes.tick_params(labelleft=index % _COLUMNS == 0)
    for index, name in enumerate(largest):
        axes = figure.add_subplot(grid[rows, index])
        _draw_roofline(axes, name, shapes[name], peers)
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)


def _draw_bandwidths(axes: Axes, shape: str, results: list[Result], peers: list[str]) -> None:
    speeds = {result["peer"]: result["gigabytes_per_second"] for result in results}
    bars = axes.barh(
        peers,
        [speeds.get(peer, 0) for peer in peers],
        color=[_OURS if peer.startswith(HOGSTREAM) else _THEIRS for peer in peers],
    )
    labels = [f"{speeds[peer]:.1f}" if peer in speeds else "skipped" for peer in peers]
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # else the ceiling crosses it
    axes.bar_label(bars, labels, padding=3, fontsize="small", bbox=paper)
    if CEILING in speeds:
        axes.axvline(speeds[CEILING], color="#D55E00", linestyle="--", label=CEILING)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(title=shape, xlabel="GB/s, least traffic")


def _draw_roofline(axes: Axes, shape: str, results: list[Result], peers: list[str]) -> None:
    intensities = (0.2, 1.0)
    for result in results:
        intensity = result["operations_per_element"] / result["bytes_per_element"]
        speed = result["gigabytes_per_second"]
        if result["peer"] == CEILING:
            roof = [speed * intensity for intensity in intensities]
            axes.plot(intensities, roof, color="#D55E00", linestyle="--", label=CEILING)
        if result["peer"] in MEMORY:
            continue
        index = peers.index(result["peer"])
        axes.plot(
            intensity,
            speed * intensity,
            color=_OURS if result["peer"].startswith(HOGSTREAM) else _COLORS[index % len(_COLORS)],
            marker=_MARKERS[index % len(_MARKERS)],
            linestyle="",
            label=result["peer"],
        )
    axes.set(
        title=f"roofline, {shape}",
        xlabel="arithmetic intensity (operations/byte)",
        ylabel="Gop/s",
        xscale="log",
        yscale="log",
    )
    axes.set_xticks([0.2, 0.5, 1.0])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def _smoothed(losses: list[tuple[float, float]], window: int = 20) -> Iterable[tuple[float, float]]:
    """Running means, over which single batches do not hide the course."""
    window = min(window, len(losses))
    for end in range(window, len(losses) + 1):
        part = losses[end - window : end]
        yield part[-1][0], sum(loss for _, loss in part) / window
