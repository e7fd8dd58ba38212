"""The gain of lock-free as a heat map: a cell for each size and worker count."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from hogstream.profiling.report.plots import STYLES
from hogstream.profiling.results.confidence import Interval
from hogstream.profiling.results.gains import (
    BASELINES,
    gain_text,
    gains_over,
    share_text,
    shares_alone,
)
from hogstream.profiling.wording import size_name

# From the colour of the baselines over white to that of lock-free, as in the other plots.
_COLORS = LinearSegmentedColormap.from_list(
    "gain", [STYLES["locked"]["color"], "#ffffff", STYLES["lock-free"]["color"]]
).with_extremes(bad="#dddddd")


def gain_heat_map(bench: dict[str, Any]) -> Figure:
    """Draws the gain over each baseline: workers across, sizes upwards.

    White is 1x, and a gain is as far from it as a loss of the same factor. A cell is grey, its
    number in parentheses, where the difference may be noise: the 95 % interval holds 1x.

    Args:
        bench: The JSON output of ``hogstream bench``, with lock-free and a baseline among the
            policies.
    """
    results = bench["results"]
    grids = {baseline: gains_over(baseline, results) for baseline in BASELINES}
    grids = {baseline: gains for baseline, gains in grids.items() if gains}
    sizes = sorted({result["elements"] for result in results})
    counts = sorted({result["workers"] for result in results})
    ratios = [gain.median for gains in grids.values() for gain in gains.values()]
    largest = max((abs(math.log2(ratio)) for ratio in ratios if ratio), default=1.0)
    limit = 2 ** max(1.0, largest)  # at least 2x, or small gains would look large
    norm = LogNorm(1 / limit, limit)
    size = (2.6 + len(grids) * (0.6 + 0.75 * len(counts)), max(3.6, 1.7 + 0.42 * len(sizes)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(grids), squeeze=False, sharey=True)[0]
    for axes, (baseline, gains) in zip(panels, grids.items(), strict=True):
        _draw_cells(axes, gains, sizes, counts, norm)
        axes.set_title(f"over {baseline}")
    panels[0].set_yticks(_centres(sizes), [size_name(elements) for elements in sizes])
    panels[0].set_ylabel("elements of the shared parameters")
    _label_shares(panels[-1], sizes, shares_alone(bench))
    colors = figure.colorbar(panels[0].collections[0], ax=panels, label="gain in updates/s")
    powers = range(-math.floor(math.log2(limit)), math.floor(math.log2(limit)) + 1)
    colors.ax.yaxis.set_major_locator(FixedLocator([2.0**power for power in powers]))
    colors.ax.yaxis.set_minor_locator(NullLocator())
    colors.ax.yaxis.set_major_formatter("{x:g}x")
    figure.suptitle("Gain of lock-free updates")
    figure.supxlabel(
        "grey, in parentheses: the difference may be noise (the 95 % interval holds 1x)",
        fontsize="small",
    )
    return figure


def plot_gains(bench: dict[str, Any], path: Path) -> None:
    """Saves the heat map; the path's suffix says the format."""
    gain_heat_map(bench).savefig(path, dpi=150)


def _draw_cells(
    axes: Axes,
    gains: dict[tuple[int, int], Interval],
    sizes: list[int],
    counts: list[int],
    norm: LogNorm,
) -> None:
    ratios = np.full((len(sizes), len(counts)), np.nan)
    for row, elements in enumerate(sizes):
        for column, workers in enumerate(counts):
            gain, color = gains.get((elements, workers)), "black"
            if gain is not None and gain.excludes(1) and gain.median > 0:
                ratios[row, column] = gain.median
                color = _text_color(float(norm(gain.median)))
            axes.text(
                column + 0.5, row + 0.5, gain_text(gain), color=color, ha="center", va="center"
            )
    axes.pcolormesh(ratios, cmap=_COLORS, norm=norm, edgecolors="white", linewidth=1)
    axes.set_xticks(_centres(counts), [str(count) for count in counts])
    axes.set_xlabel("workers")
    axes.tick_params(length=0)


def _label_shares(axes: Axes, sizes: list[int], alone: dict[int, float]) -> None:
    """Says on the right what one update alone moves, as that is where the gain ends."""
    if not alone:
        return
    right = axes.twinx()
    right.set_ylim(axes.get_ylim())
    right.set_yticks(_centres(sizes), [share_text(alone.get(elements)) for elements in sizes])
    right.set_ylabel("one update alone, of the\nupdate-shaped ceiling")
    right.tick_params(length=0)


def _text_color(shade: float) -> str:
    """Black on light cells, white on dark ones."""
    red, green, blue, _ = _COLORS(shade)
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5 else "black"


def _centres(items: list[int]) -> list[float]:
    return [index + 0.5 for index in range(len(items))]
