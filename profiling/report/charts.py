"""Kinds of plots, whatever they show: bars, a heat map, a forest of ratios, a roofline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from hogstream.profiling.report.drawing import (
    DASHED,
    DAY,
    HEIGHT,
    ON_PAPER,
    QUIET,
    Look,
    Plot,
    beside,
    legible,
    logarithmic,
    mark,
    round_ticks,
    short,
)
from hogstream.profiling.report.svg import TIP

_ROW = 32  # pixels of a bar, under its name


@dataclass(frozen=True)
class Bar:
    """A horizontal bar.

    Attributes:
        name: Above it.
        value: Its length.
        told: Its length in words, at its end.
        ours: Whether it stands out.
        interval: Of the value, if it is known.
    """

    name: str
    value: float
    told: str
    ours: bool
    interval: tuple[float, float] | None


def bars(title: str, text: str, x: str, rows: Sequence[Bar], ceiling: float | None) -> Plot:
    """Horizontal bars from 0, each under its name, with a dashed line at ``ceiling``."""

    def draw(axes: Axes) -> None:
        ends = [row.interval[1] if row.interval else row.value for row in rows]
        ticks = round_ticks([*ends, ceiling or 0.0])
        axes.set(xlim=(0, ticks[-1]), ylim=(len(rows), 0), yticks=[])
        axes.set_xticks(ticks, [short(tick) for tick in ticks])
        axes.grid(axis="x")
        axes.spines["bottom"].set_visible(False)
        for index, row in enumerate(rows):
            middle = index + 21 / _ROW
            shade = DAY["blue" if row.ours else "quiet"]
            box = Rectangle((0, middle - 0.14), row.value, 0.28, color=shade, linewidth=0)
            box.set(alpha=1 if row.ours else 0.55, gid=f"{TIP}{row.name}: {row.told}")
            axes.add_patch(box)
            axes.text(0, index + 12 / _ROW, legible(row.name))
            if row.interval:
                axes.plot(row.interval, [middle, middle], color=DAY["text"], linewidth=1.3)
            end = (ends[index], middle)
            beside(axes, row.told, end, (5, 0), va="center_baseline", **ON_PAPER)
        if ceiling:
            axes.plot([ceiling, ceiling], [0, len(rows)], **DASHED)

    height = 24 + _ROW * len(rows) + 38
    return Plot(title, text, draw, x=x, height=height, margins=(5, 60, 24, 38))


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map.

    Attributes:
        told: What is written in it.
        strength: From -1 to 1: blue above 0, orange below, the stronger the deeper; None is grey.
        tip: Shows under the mouse, in the page.
    """

    told: str
    strength: float | None
    tip: str


def heat_map(
    title: str,
    text: str,
    labels: tuple[str, str],
    columns: Sequence[str],
    rows: dict[str, list[Cell | None]],
    right: tuple[str, Sequence[str]] | None = None,
) -> Plot:
    """Cells in rows.

    Args:
        title: Above.
        text: What it shows, in words.
        labels: What names of columns and of rows tell.
        columns: Names.
        rows: A cell for each column, None where there is none, by name, from the bottom up.
        right: A heading, and what stands to the right of each row.
    """

    def draw(axes: Axes) -> None:
        axes.set(xlim=(0, len(columns)), ylim=(0, len(rows)))
        axes.set_xticks([index + 0.5 for index in range(len(columns))], columns)
        axes.set_yticks([index + 0.5 for index in range(len(rows))], list(rows))
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
        for row, cells in enumerate(rows.values()):
            for column, cell in enumerate(cells):
                if cell is not None:
                    axes.add_patch(_box(column, row, cell))
                told = "-" if cell is None else cell.told
                axes.text(column + 0.5, row + 0.5, told, ha="center", va="center_baseline")
        if right is not None:
            heading, told_right = right
            for row, told in enumerate(told_right):
                end = (len(columns), row + 0.5)
                beside(axes, told, end, (46, 0), ha="right", va="center_baseline", **QUIET)
            beside(axes, heading, (len(columns), len(rows)), (46, 14), ha="right", **QUIET)

    height = 44 + 26 * len(rows) + 38
    margins = (54, 54 if right else 2, 44, 38)
    return Plot(title, text, draw, *labels, height=height, margins=margins)


def _box(column: int, row: int, cell: Cell) -> Rectangle:
    box = Rectangle((column + 0.02, row + 0.04), 0.96, 0.92, linewidth=0, gid=TIP + cell.tip)
    if cell.strength is None:
        box.set(facecolor=DAY["quiet"], alpha=0.16)
    else:  # text must stay readable on it
        shade = DAY["blue" if cell.strength > 0 else "orange"]
        box.set(facecolor=shade, alpha=0.06 + 0.42 * abs(cell.strength))
    return box


@dataclass(frozen=True)
class Reach:
    """A ratio, its interval, and whether that is to stand out."""

    name: str
    ratio: float
    low: float
    high: float
    clear: bool


def forest(text: str, x: str, rows: Sequence[Reach], around: Iterable[float]) -> Plot:
    """Ratios with their intervals, each under its name, around a dashed line at 1.

    Args:
        text: What it shows, in words.
        x: What the ratios tell.
        rows: From top to bottom; ratios and intervals are above 0.
        around: What the axis has room for.
    """

    def draw(axes: Axes) -> None:
        logarithmic(axes, "x", around, "x")
        axes.set(ylim=(len(rows), 0), yticks=[])
        for index, row in enumerate(rows):
            middle = index + 23 / _ROW
            axes.plot([1, 1], [index + 15 / _ROW, index + 31 / _ROW], **DASHED)
            shade = DAY[("blue" if row.ratio > 1 else "orange") if row.clear else "quiet"]
            axes.plot([row.low, row.high], [middle, middle], color=shade)
            axes.plot(
                [row.ratio],
                [middle],
                marker=("^" if row.ratio > 1 else "v") if row.clear else "o",
                color=shade,
                linestyle="",
                markeredgewidth=1.5,
                markerfacecolor=shade if row.clear else DAY["back"],
                gid=f"{TIP}{row.name}: {row.ratio:.2f}x ({row.low:.2f} to {row.high:.2f})",
            )
            place = axes.get_yaxis_transform()
            axes.text(0, index + 12 / _ROW, legible(row.name), transform=place, **ON_PAPER)

    height = _ROW * len(rows) + 6 + 38
    return Plot("", text, draw, x=x, height=height, margins=(14, 14, 6, 38))


@dataclass(frozen=True)
class Point:
    """What reaches so many Gop/s at so many operations per byte."""

    name: str
    intensity: float
    speed: float
    look: Look


def roofline(
    title: str, slopes: dict[str, float], points: list[Point], height: int = HEIGHT
) -> Plot:
    """Points under the roofs of what memory can do, on logarithmic axes.

    Args:
        title: Above.
        slopes: 1e9 bytes/s of each level of memory, by name.
        points: At least one.
        height: In pixels.
    """
    around = [point.intensity * factor for point in points for factor in (0.5, 4)]
    middle = points[0].intensity
    speeds = [slope * middle for slope in slopes.values()] + [point.speed for point in points]
    reached = "; ".join(f"{point.name} {point.speed:.3g} Gop/s" for point in points)
    tops = ", ".join(f"{name} {slope * middle:.3g}" for name, slope in slopes.items())

    def draw(axes: Axes) -> None:
        logarithmic(axes, "x", around)
        logarithmic(axes, "y", [min(speeds) / 2, max(speeds) * 2])
        axes.grid(False, axis="x")
        _roofs(axes, slopes)
        for point in points:
            tip = f"{point.name}: {point.speed:.3g} Gop/s"
            mark(axes, point.intensity, point.speed, point.look, tip)
        names_beside(axes, [(each.intensity, each.speed, each.name) for each in points])

    text = f"Roofline, {title}: {reached}. The roofs there, in Gop/s: {tops}."
    return Plot(title, text, draw, x="operations per byte", y="Gop/s", height=height)


def _roofs(axes: Axes, slopes: dict[str, float]) -> None:
    """Dashed lines of a slope times x, on logarithmic axes, each with its name at its upper end."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    last = -math.inf
    for name, slope in sorted(slopes.items(), key=lambda each: each[1]):
        start, end = max(left, bottom / slope), min(right, top / slope)
        axes.plot([start, end], [slope * start, slope * end], **DASHED)
        point = (end, slope * end)
        place = float(axes.transData.transform(point)[1])
        last = max(place + 3, last + 12)
        offset = (-1, last - place)
        beside(axes, legible(name), point, offset, ha="right", **QUIET, **ON_PAPER)


def names_beside(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Names points, to their right, and no name over another."""
    last = -math.inf
    for x, y, name in sorted(points, key=lambda point: point[1]):
        place = float(axes.transData.transform((x, y))[1])
        last = max(place, last + 13)
        told = legible(name)
        beside(axes, told, (x, y), (9, last - place), va="center_baseline", **ON_PAPER)
