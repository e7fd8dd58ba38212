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


Looks = dict[str, Look]
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


@dataclass(frozen=True)
class Group:
    """Plots of one kind.

    Attributes:
        anchor: Its id in the page.
        title: Its heading.
        text: What to look at.
        plots: Side by side.
        looks: What lines and markers stand for, by name.
    """

    anchor: str
    title: str
    text: str
    plots: Sequence[Plot]
    looks: Looks


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
        # Which has a date otherwise, and is another file each time.
        metadata = {"Date": None} if path.suffix == ".svg" else None
        picture.savefig(path, dpi=200, facecolor=DAY["back"], metadata=metadata)


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
    beside(axes, plot.title, (0, 1), (-before, above - 12), **_OF_AXES, **_BOLD)
    beside(axes, plot.y, (0, 1), (-before, above - 30), **_OF_AXES, **QUIET)
    beside(axes, plot.x, (0.5, 0), (0, 4 - below), ha="center", **_OF_AXES, **QUIET)


def legible(name: str) -> str:
    """A name, not too long to be drawn."""
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


def printable(text: str) -> str:
    """Text with a mark in place of what is no character."""
    return "".join(each if each.isprintable() else "?" for each in text)


def beside(
    axes: Axes, text: str, point: tuple[float, float], offset: tuple[float, float], **more: Any
) -> None:
    """Writes so many pixels to the right of a point and above it."""
    axes.annotate(text, point, offset, textcoords="offset points", annotation_clip=False, **more)


_OF_AXES = {"xycoords": "axes fraction"}
_BOLD = {"fontweight": "bold", "fontsize": 12.5}
QUIET = {"color": DAY["quiet"]}
# Or lines would cross the text.
ON_PAPER = {"bbox": {"facecolor": DAY["back"], "linewidth": 0, "pad": 0.5}}
DASHED: dict[str, Any] = {**QUIET, "linewidth": 1.3, "linestyle": (0, (4, 3))}


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
    ticks = round_ticks(values)
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


def short(value: float) -> str:
    """A number in as few characters as tell it: 20k, 1.5M, 0.05."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def round_ticks(values: Iterable[float]) -> list[float]:
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
