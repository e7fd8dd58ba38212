"""How plots are drawn: the same look in the page, by day and by night, and in files of their own.

matplotlib draws. Its colours are those of ``COLORS`` by day; in the page each becomes the CSS
variable of its name, which has another value in the dark. Colour never stands alone: series differ
in marker and dash too, and gains from losses in the number that stands there.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, NullLocator

from hogstream.profiling.report.svg import TIP, copy_drawing

#: By name: by day and by night. The series' are Okabe and Ito's, which the colour-blind tell apart.
COLORS = {
    "back": ("#ffffff", "#14171b"),
    "raised": ("#f6f7f9", "#1c2026"),
    "text": ("#16191d", "#e8eaed"),
    "quiet": ("#545c66", "#a3acb8"),
    "line": ("#d9dde2", "#3a414b"),
    "faint": ("#e9ecef", "#272c34"),
    "link": ("#005b96", "#7cc0f0"),
    "warn": ("#8a4b00", "#f0b35a"),
    "blue": ("#0072b2", "#56b4e9"),
    "orange": ("#d55e00", "#e8743b"),
    "green": ("#009e73", "#2fbf94"),
    "pink": ("#b5578f", "#d98fbd"),
    "yellow": ("#b07800", "#e6b422"),
}
DAY = {name: day for name, (day, _) in COLORS.items()}

#: Pixels of a plot, and the margins around its axes: left, right, top and bottom.
WIDTH, HEIGHT = 340, 236
Margins = tuple[int, int, int, int]
MARGINS: Margins = (46, 12, 44, 38)
_ZOOM = 1.05  # in the page: three in a row
_ROW = 32  # of a bar, under its name
_LONGEST = 50  # characters of a name: it may come from anywhere
# Of pictures in files: around plots, between them, and a line below them.
_MARGIN, _GAP, _LINE = 16, 24, 18

_LOOK: dict[Any, Any] = {
    "figure.dpi": 72,  # a point is a pixel
    "font.size": 11,
    "text.parse_math": False,
    "text.color": DAY["text"],
    "axes.edgecolor": DAY["quiet"],
    "axes.facecolor": "none",
    "axes.labelcolor": DAY["quiet"],
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.color": DAY["quiet"],
    "ytick.color": DAY["quiet"],
    "ytick.major.size": 0,
    "grid.color": DAY["faint"],
    "grid.linewidth": 1,
    "lines.linewidth": 1.9,
    "lines.markersize": 6.5,
    "lines.markeredgewidth": 0,
    "legend.frameon": False,
    "legend.labelspacing": 0.35,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Look:
    """How a series looks: no two share a colour, a marker or a dash."""

    color: str
    marker: str
    dashes: tuple[float, ...]

    @property
    def line(self) -> dict[str, Any]:
        """What a line is drawn with."""
        return {"color": DAY[self.color], "linestyle": (0, self.dashes) if self.dashes else "-"}


LOOKS = (
    Look("blue", "o", ()),
    Look("orange", "s", (4, 1.7)),
    Look("green", "^", (1.2, 1.4)),
    Look("pink", "D", (5, 1.6, 1.2, 1.6)),
    Look("yellow", "v", (7, 2.2)),
    Look("text", "X", (2.2, 1.1, 0.6, 1.1)),
)


@dataclass(frozen=True)
class Plot:
    """One pair of axes.

    Attributes:
        title: Above it.
        text: What it shows, in words.
        draw: Draws on its axes.
        x: What is told across, with its unit.
        y: What is told upwards.
        width: In pixels, as all that follows.
        height: With title and labels.
        margins: Around the axes.
    """

    title: str
    text: str
    draw: Callable[[Axes], None]
    x: str = ""
    y: str = ""
    width: int = WIDTH
    height: int = HEIGHT
    margins: Margins = MARGINS


def markup(plot: Plot, name: str) -> Markup:
    """A plot as SVG to stand in a page, where all text stays text.

    Args:
        plot: What to draw.
        name: Unlike those of all other plots of the page: ids are made from it.
    """
    with matplotlib.rc_context({**_LOOK, "svg.hashsalt": name}):
        picture = _picture([plot], columns=1)
        for artist in picture.findobj(lambda each: bool(each.get_gid())):
            artist.set_gid(printable(artist.get_gid() or ""))
        file = io.StringIO()
        with warnings.catch_warnings():  # the page's font has what matplotlib's may not
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            picture.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    variables = {day: f"var(--{name})" for name, day in DAY.items()}
    svg = ElementTree.Element("svg", {"viewBox": f"0 0 {plot.width} {plot.height}"})
    if plot.text:
        svg.attrib |= {"class": "plot", "role": "img", "width": f"{_ZOOM * plot.width:g}"}
        ElementTree.SubElement(svg, "title").text = printable(plot.title or plot.x)
        ElementTree.SubElement(svg, "desc").text = printable(plot.text)
    else:
        svg.attrib |= {"class": "swatch", "aria-hidden": "true"}
    copy_drawing(file.getvalue(), svg, variables)
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def swatch(look: Look, name: str) -> Markup:
    """The line and marker of a series, for a legend.

    Args:
        look: Of the series.
        name: As for ``markup``.
    """

    def draw(axes: Axes) -> None:
        axes.set_axis_off()
        axes.plot([0, 0.5, 1], [0, 0, 0], marker=look.marker, markevery=[1], **look.line)

    plot = Plot("", "", draw, width=30, height=12, margins=(1, 1, 0, 0))
    return markup(plot, name)


def save(
    plots: Sequence[Plot],
    path: Path,
    *,
    columns: int = 2,
    looks: Mapping[str, Look] | None = None,
    note: str = "",
) -> None:
    """Saves plots as one picture, on white.

    Args:
        plots: What to draw, row by row.
        path: Where to; its suffix says the format.
        columns: Plots in a row.
        looks: What lines and markers stand for, by name.
        note: Below it all.

    Raises:
        ValueError: If the suffix names no known format.
    """
    plots = plots or [Plot("There is nothing to draw.", "", Axes.set_axis_off)]
    names = looks or {}
    below = _LINE * (len(names) + bool(note))
    with matplotlib.rc_context(_LOOK):
        picture = _picture(plots, columns, margin=_MARGIN, below=below)
        for name, look in names.items():
            picture.axes[0].plot([], [], label=legible(name), marker=look.marker, **look.line)
        left, bottom = (_MARGIN / 72 / size for size in picture.get_size_inches())
        if note:
            picture.text(left, bottom, note, color=DAY["quiet"])
        if names:
            corner = (left, bottom + _LINE * bool(note) / 72 / picture.get_figheight())
            picture.legend(loc="lower left", bbox_to_anchor=corner, borderpad=0, borderaxespad=0)
        for artist in picture.findobj(lambda each: bool(each.get_gid())):
            artist.set_gid("")  # only the page shows tips
        picture.savefig(path, dpi=200, facecolor=DAY["back"])


def _picture(plots: Sequence[Plot], columns: int, margin: int = 0, below: int = 0) -> Figure:
    """Plots in a grid of cells as wide as the first, each row as high as its highest."""
    columns = min(columns, len(plots))
    rows = [plots[start : start + columns] for start in range(0, len(plots), columns)]
    heights = [max(plot.height for plot in row) for row in rows]
    cell = plots[0].width
    width = 2 * margin + columns * cell + (columns - 1) * _GAP
    height = 2 * margin + below + sum(heights) + (len(rows) - 1) * _GAP
    picture = Figure(figsize=(width / 72, height / 72))
    top = height - margin
    for row, row_height in zip(rows, heights, strict=True):
        for column, plot in enumerate(row):
            left = margin + column * (cell + _GAP)
            _draw(picture, plot, left / width, top / height, width, height)
        top -= row_height + _GAP
    for text in picture.findobj(Text):
        assert isinstance(text, Text)
        text.set_text(printable(text.get_text()))
    return picture


def _draw(picture: Figure, plot: Plot, left: float, top: float, width: int, height: int) -> None:
    before, after, above, below = plot.margins
    box = (
        left + before / width,
        top - (plot.height - below) / height,
        (plot.width - before - after) / width,
        (plot.height - above - below) / height,
    )
    axes = picture.add_axes(box)
    plot.draw(axes)
    _beside(axes, plot.title, (0, 1), (-before, above - 12), **_OF_AXES, **_BOLD)
    _beside(axes, plot.y, (0, 1), (-before, above - 30), **_OF_AXES, **_QUIET)
    _beside(axes, plot.x, (0.5, 0), (0, 4 - below), ha="center", **_OF_AXES, **_QUIET)


def legible(name: str) -> str:
    """A name, not too long to be drawn."""
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


def printable(text: str) -> str:
    """Text with a mark in place of what is no character."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _beside(
    axes: Axes, text: str, point: tuple[float, float], offset: tuple[float, float], **more: Any
) -> None:
    """Writes so many pixels to the right of a point and above it."""
    axes.annotate(text, point, offset, textcoords="offset points", annotation_clip=False, **more)


_OF_AXES = {"xycoords": "axes fraction"}
_BOLD = {"fontweight": "bold", "fontsize": 12.5}
_QUIET = {"color": DAY["quiet"]}
# Or lines would cross the text.
_ON_PAPER = {"bbox": {"facecolor": DAY["back"], "linewidth": 0, "pad": 0.5}}
_DASHED: dict[str, Any] = {**_QUIET, "linewidth": 1.3, "linestyle": (0, (4, 3))}


# What is drawn on axes.


def mark(axes: Axes, x: float, y: float, look: Look, tip: str) -> None:
    """A marker; the tip shows under the mouse, in the page."""
    point = {"marker": look.marker, "color": DAY[look.color], "linestyle": ""}
    axes.plot([x], [y], gid=TIP + tip, **point)  # type: ignore[arg-type]


def interval(axes: Axes, x: float, low: float, high: float, look: Look) -> None:
    """A vertical bar from ``low`` to ``high``."""
    middle, reach = (low + high) / 2, (high - low) / 2
    line: dict[str, Any] = {"ecolor": DAY[look.color], "elinewidth": 1.1, "capthick": 1.1}
    axes.errorbar(x, middle, reach, fmt="none", capsize=2.5, **line)


def from_zero(axes: Axes, values: Iterable[float], unit: str = "") -> None:
    """The vertical axis, from 0 to a round number above all values."""
    ticks = _round_ticks(values)
    axes.set_ylim(0, ticks[-1])
    axes.set_yticks(ticks, [short(tick) + unit for tick in ticks])
    axes.grid(axis="y")


def logarithmic(axes: Axes, which: str, values: Iterable[float], unit: str = "") -> None:
    """The axis ``x`` or ``y`` in decades, over all values above 0."""
    values = [value for value in values if value > 0] or [1.0]
    room = (max(values) / min(values)) ** 0.04
    room = room if room > 1 else 1.26
    low, high = min(values) / room, max(values) * room
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    ticks = _log_ticks(low, high)
    axis.set_ticks(ticks, [short(tick) + unit for tick in ticks])
    axis.set_minor_locator(NullLocator())
    axis.grid(True)


def doubling(axes: Axes, values: Iterable[int]) -> None:
    """The horizontal axis over a few numbers, such as 1, 2, 4 and 8 workers, at equal steps."""
    marks = sorted(set(values))
    room = (marks[-1] / marks[0]) ** 0.05 if len(marks) > 1 else 1.4
    axes.set(xscale="log", xlim=(marks[0] / room, marks[-1] * room))
    axes.set_xticks(marks, [short(each) for each in marks])
    axes.xaxis.set_minor_locator(NullLocator())


def categories(axes: Axes, names: Sequence[str], most: int = 6) -> None:
    """The horizontal axis over names, the first at 0, of which at most so many are written."""
    every = math.ceil(len(names) / most)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_xticks(range(0, len(names), every), names[::every])


def names_beside(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Names points, to their right, and no name over another."""
    last = -math.inf
    for x, y, name in sorted(points, key=lambda point: point[1]):
        place = float(axes.transData.transform((x, y))[1])
        last = max(place, last + 13)
        told = legible(name)
        _beside(axes, told, (x, y), (9, last - place), va="center_baseline", **_ON_PAPER)


def roofs(axes: Axes, slopes: dict[str, float]) -> None:
    """Dashed lines of a slope times x, on logarithmic axes, each with its name at its upper end."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    last = -math.inf
    for name, slope in sorted(slopes.items(), key=lambda each: each[1]):
        start, end = max(left, bottom / slope), min(right, top / slope)
        axes.plot([start, end], [slope * start, slope * end], **_DASHED)
        point = (end, slope * end)
        place = float(axes.transData.transform(point)[1])
        last = max(place + 3, last + 12)
        offset = (-1, last - place)
        _beside(axes, legible(name), point, offset, ha="right", **_QUIET, **_ON_PAPER)


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
        ticks = _round_ticks([*ends, ceiling or 0.0])
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
            _beside(axes, row.told, end, (5, 0), va="center_baseline", **_ON_PAPER)
        if ceiling:
            axes.plot([ceiling, ceiling], [0, len(rows)], **_DASHED)

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
    beside: tuple[str, Sequence[str]] | None = None,
) -> Plot:
    """Cells in rows.

    Args:
        title: Above.
        text: What it shows, in words.
        labels: What names of columns and of rows tell.
        columns: Names.
        rows: A cell for each column, None where there is none, by name, from the bottom up.
        beside: A heading, and what stands to the right of each row.
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
        if beside is not None:
            heading, told_beside = beside
            for row, told in enumerate(told_beside):
                end = (len(columns), row + 0.5)
                _beside(axes, told, end, (46, 0), ha="right", va="center_baseline", **_QUIET)
            _beside(axes, heading, (len(columns), len(rows)), (46, 14), ha="right", **_QUIET)

    height = 44 + 26 * len(rows) + 38
    margins = (54, 54 if beside else 2, 44, 38)
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
            axes.plot([1, 1], [index + 15 / _ROW, index + 31 / _ROW], **_DASHED)
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
            axes.text(0, index + 12 / _ROW, legible(row.name), transform=place, **_ON_PAPER)

    height = _ROW * len(rows) + 6 + 38
    return Plot("", text, draw, x=x, height=height, margins=(1, 14, 6, 38))


def short(value: float) -> str:
    """A number in as few characters as tell it: 20k, 1.5M, 0.05."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _round_ticks(values: Iterable[float]) -> list[float]:
    """From 0 to a round number above all values."""
    highest = max((*values, 0.0)) or 1.0
    ticks = [float(each) for each in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(0, highest)]
    return [tick for tick in ticks if tick >= 0]


# Below so many decades, what a decade is divided into.
_LOG_STEPS = (
    (0.9, (1, 1.5, 2, 3, 4, 6, 8)),
    (2.2, (1, 2, 5)),
    (math.inf, (1,)),
)


def _log_ticks(low: float, high: float) -> list[float]:
    decades = math.log10(high / low)
    if decades < 0.4:
        ticks = [float(each) for each in MaxNLocator(4).tick_values(low, high)]
        return [tick for tick in ticks if low <= tick <= high]
    factors = next(steps for room, steps in _LOG_STEPS if decades < room)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil(decades / 6))
    ticks = [factor * 10.0**ten for ten in range(first, last + 1, every) for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]
