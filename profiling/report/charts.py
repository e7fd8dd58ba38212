"""Plots as inline SVG: their text, lines and colours are the page's own, in light and in dark.

Nothing here has an id or a style attribute, so plots never clash and need no leave of a content
security policy; ``page.css`` gives each class its look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

WIDTH, HEIGHT = 340, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 42, 38
_ROW = 32  # of horizontal bars, each under its name
#: How many series have a colour, a marker and a dash of their own.
SERIES = 6
#: The first and the last share that a percentile axis has room for.
PERCENTILES = (0.1, 0.9998)
_TICKS = 5
_LOG_TICKS = 6
# Below so many decades, what a decade is divided into.
_LOG_STEPS = (
    (0.3, (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)),
    (0.9, (1, 1.5, 2, 3, 4, 6, 8)),
    (2.2, (1, 2, 5)),
    (math.inf, (1,)),
)

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """From values to places.

    Attributes:
        label: What is told, with its unit.
        low: The value at the start, transformed.
        high: The value at the end, transformed.
        ticks: Values that are marked, and how they are written.
        transform: Makes equal steps of values equal steps of the axis.
    """

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    transform: Callable[[float], float] = float

    def place(self, value: float) -> float:
        """Where a value lies: 0 at the start of the axis, 1 at its end."""
        return (self.transform(value) - self.low) / (self.high - self.low)


def linear_axis(label: str, values: Iterable[float]) -> Axis:
    """From 0 to a round number above all values."""
    highest = max((*values, 0.0)) or 1.0
    step = 10 ** math.floor(math.log10(highest / _TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if highest <= _TICKS * factor * step)
    count = math.ceil(highest / step)
    marks = [step * index for index in range(count + 1)]
    return Axis(label, 0.0, marks[-1], tuple((mark, short(mark)) for mark in marks))


def log_axis(label: str, values: Iterable[float]) -> Axis:
    """Over all values, in decades; values that are not above 0 have no place on it."""
    values = [value for value in values if value > 0] or [1.0]
    low, high = math.log10(min(values)), math.log10(max(values))
    padding = 0.04 * (high - low) or 0.1
    low, high = low - padding, high + padding
    factors = next(steps for room, steps in _LOG_STEPS if high - low < room)
    every = max(1, math.ceil((high - low) / _LOG_TICKS))
    marks = [
        factor * 10.0**decade
        for decade in range(math.floor(low), math.ceil(high) + 1, every)
        for factor in factors
        if low <= math.log10(factor * 10.0**decade) <= high
    ]
    return Axis(label, low, high, tuple((mark, short(mark)) for mark in marks), math.log10)


def doubling_axis(label: str, values: Iterable[float]) -> Axis:
    """Over a few values, each marked, such as 1, 2, 4 and 8 workers at equal steps."""
    marks = sorted(set(values))
    low, high = math.log2(marks[0]), math.log2(marks[-1])
    padding = 0.05 * (high - low) or 0.5
    ticks = tuple((mark, short(mark)) for mark in marks)
    return Axis(label, low - padding, high + padding, ticks, math.log2)


def category_axis(label: str, names: Sequence[str]) -> Axis:
    """Over names, the first at 0; where there are many, not all are written."""
    every = math.ceil(len(names) / 6)
    ticks = tuple((index, name) for index, name in enumerate(names) if index % every == 0)
    return Axis(label, -0.4, len(names) - 0.6, ticks)


def percentile_axis(label: str) -> Axis:
    """Over the shares of ``PERCENTILES``, each nine at an equal step: 90 %, 99 %, 99.9 % ..."""
    shares = (0.5, 0.9, 0.99, 0.999)
    ticks = tuple((share, f"{100 * share:g}") for share in shares)
    low, high = (-math.log10(1 - share) for share in PERCENTILES)
    return Axis(label, low, high, ticks, lambda share: -math.log10(1 - share))


class Panel:
    """One pair of axes and what is drawn in it."""

    def __init__(self, title: str, x: Axis, y: Axis, text: str, height: int = HEIGHT) -> None:
        """Draws title, axes and grid.

        Args:
            title: Above.
            x: The horizontal axis.
            y: The vertical axis.
            text: What the plot shows, for those who cannot see it.
            height: In the units of ``WIDTH``.
        """
        self._x, self._y = x, y
        self._bottom = height - _BOTTOM
        self._svg = _root(WIDTH, height, text)
        _text(self._svg, 0, 13, title, "title")
        _text(self._svg, 0, 31, y.label, "label")
        _text(self._svg, (_LEFT + WIDTH - _RIGHT) / 2, height - 4, x.label, "label", "middle")
        for value, name in y.ticks:
            place = self._place_y(value)
            _line(self._svg, _LEFT, place, WIDTH - _RIGHT, place, "grid")
            _text(self._svg, _LEFT - 6, place + 4, name, "tick", "end")
        for value, name in x.ticks:
            place = self._place_x(value)
            _line(self._svg, place, self._bottom, place, self._bottom + 4, "axis")
            _text(self._svg, place, self._bottom + 16, name, "tick", "middle")
        _line(self._svg, _LEFT, self._bottom, WIDTH - _RIGHT, self._bottom, "axis")

    def line(self, points: Sequence[Point], series: int) -> None:
        """Joins points."""
        places = [f"{self._place_x(x):.1f},{self._place_y(y):.1f}" for x, y in points]
        if len(places) > 1:
            _add(self._svg, "polyline", points=" ".join(places), **_class("line", series))

    def mark(self, point: Point, series: int, title: str) -> None:
        """Marks a point; the title shows under the mouse."""
        _marker(self._svg, self._place_x(point[0]), self._place_y(point[1]), series, title)

    def stem(self, x: float, y: float, series: int, shift: float, title: str) -> None:
        """A marked point with a line down to 0, ``shift`` to the right of its place."""
        place, height = self._place_x(x) + shift, self._place_y(y)
        _line(self._svg, place, self._place_y(0), place, height, **_class("stem", series))
        _marker(self._svg, place, height, series, title)

    def interval(self, x: float, low: float, high: float, series: int) -> None:
        """A vertical bar from ``low`` to ``high``."""
        place, ends = self._place_x(x), [self._place_y(low), self._place_y(high)]
        _line(self._svg, place, ends[0], place, ends[1], **_class("interval", series))
        for end in ends:
            _line(self._svg, place - 3, end, place + 3, end, **_class("interval", series))

    def roofs(self, slopes: dict[str, float]) -> None:
        """Lines of a slope times x, cut off at the axes, each with its name at its upper end."""
        lowest, highest = 10**self._x.low, 10**self._x.high
        upper = []
        for name, slope in sorted(slopes.items(), key=lambda each: each[1]):
            ends = max(lowest, 10**self._y.low / slope), min(highest, 10**self._y.high / slope)
            start, end = ((self._place_x(x), self._place_y(slope * x)) for x in ends)
            _line(self._svg, *start, *end, "roof")
            upper.append((name, end))
        last = math.inf
        for name, (x, y) in upper:
            last = min(y - 4, last - 12)  # no name over another
            _text(self._svg, x, last, name, "note", "end")

    def names(self, points: Iterable[tuple[Point, str]]) -> None:
        """Names points, to their right, and no name over another."""
        last = math.inf
        for (x, y), name in sorted(points, key=lambda each: each[0][1]):  # from the bottom up
            last = min(self._place_y(y) + 4, last - 12)
            _text(self._svg, self._place_x(x) + 9, last, name, "note")

    def svg(self) -> Markup:
        """The plot."""
        return _written(self._svg)

    def _place_x(self, value: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * self._x.place(value)

    def _place_y(self, value: float) -> float:
        return self._bottom - (self._bottom - _TOP) * self._y.place(value)


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
    interval: tuple[float, float] | None = None


def bars(
    title: str, bars: Sequence[Bar], label: str, text: str, ceiling: float | None = None
) -> Markup:
    """Horizontal bars from 0, each under its name, with a dashed line at ``ceiling``.

    Args:
        title: Above.
        bars: From top to bottom.
        label: What their lengths tell, with its unit.
        text: What the plot shows, for those who cannot see it.
        ceiling: A value not to be beaten, if there is one.
    """
    ends = [bar.interval[1] if bar.interval else bar.value for bar in bars]
    axis = linear_axis(label, [*ends, ceiling or 0.0])
    top, bottom = 24, 24 + _ROW * len(bars)
    room = WIDTH - 62  # for what is told at the end of the longest
    svg = _root(WIDTH, bottom + 38, text)
    _text(svg, 0, 13, title, "title")
    for value, name in axis.ticks:
        place = 1 + room * axis.place(value)
        _line(svg, place, top, place, bottom + 2, "grid")
        _text(svg, place, bottom + 15, name, "tick", "middle" if value else "start")
    if ceiling:
        place = 1 + room * axis.place(ceiling)
        _line(svg, place, top, place, bottom + 2, "roof")
    _text(svg, 0, bottom + 33, label, "label")
    for index, bar in enumerate(bars):
        y = top + _ROW * index
        _text(svg, 1, y + 12, bar.name, "note")
        length = room * axis.place(bar.value)
        kind = "bar ours" if bar.ours else "bar"
        _titled(svg, "rect", bar.told, x=1, y=y + 17, width=length, height=9, **_class(kind))
        end = 1 + length
        if bar.interval:
            low, high = (1 + room * axis.place(value) for value in bar.interval)
            _line(svg, low, y + 21.5, high, y + 21.5, "spread")
            end = max(end, high)
        _text(svg, end + 5, y + 26, bar.told, "bar-end")
    return _written(svg)


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map.

    Attributes:
        told: What is written in it.
        strength: From -1 to 1: how strongly it is coloured, and in which of the two colours; None
            is grey.
        title: Shows under the mouse.
    """

    told: str
    strength: float | None
    title: str


def heat_map(
    title: str, rows: dict[str, list[Cell | None]], columns: Sequence[str], label: str, text: str
) -> Markup:
    """Cells in rows, the first at the bottom.

    Args:
        title: Above.
        rows: A cell for each column, None where there is none, by the name of the row.
        columns: Their names.
        label: What names of columns and rows tell.
        text: What the plot shows, for those who cannot see it.
    """
    left, top, height = 54, 42, 26
    width, bottom = (WIDTH - left) / len(columns), top + height * len(rows)
    svg = _root(WIDTH, bottom + 38, text)
    _text(svg, 0, 13, title, "title")
    _text(svg, 0, 33, label.split("; ")[0], "label")
    for row, (name, cells) in enumerate(rows.items()):
        y = bottom - height * (row + 1)
        _text(svg, left - 6, y + height / 2 + 4, name, "tick", "end")
        for column, cell in enumerate(cells):
            x = left + width * column
            if cell is not None:
                box = {"x": x + 1, "y": y + 1, "width": width - 2, "height": height - 2}
                _titled(svg, "rect", cell.title, rx=2, **box, **_shade(cell.strength))
            told, middle = "-" if cell is None else cell.told, y + height / 2 + 4
            _text(svg, x + width / 2, middle, told, "cell", "middle")
    for column, name in enumerate(columns):
        _text(svg, left + width * (column + 0.5), bottom + 15, name, "tick", "middle")
    _text(svg, (left + WIDTH) / 2, bottom + 33, label.split("; ")[1], "label", "middle")
    return _written(svg)


@dataclass(frozen=True)
class Change:
    """A row of a forest plot: a ratio, its interval, and whether that is to stand out."""

    name: str
    ratio: float
    interval: tuple[float, float]
    clear: bool


def forest(changes: Sequence[Change], axis: Axis, text: str) -> Markup:
    """Ratios with their intervals, a row each under its name, around a line at 1.

    Args:
        changes: From top to bottom; ratios and intervals are above 0.
        axis: Of the ratios, with room for 1.
        text: What the plot shows, for those who cannot see it.
    """
    margin, bottom = 14, _ROW * len(changes) + 6
    svg = _root(WIDTH, bottom + 38, text)

    def across(value: float) -> float:
        return margin + (WIDTH - 2 * margin) * axis.place(value)

    for value, name in axis.ticks:
        _line(svg, across(value), 0, across(value), bottom, "grid")
        _text(svg, across(value), bottom + 15, name + "x", "tick", "middle")
    _text(svg, WIDTH / 2, bottom + 33, axis.label, "label", "middle")
    for index, change in enumerate(changes):
        y = _ROW * index
        _text(svg, 1, y + 12, change.name, "note")
        _line(svg, across(1), y + 15, across(1), y + 31, "roof")
        low, high = change.interval
        kind = ("better" if change.ratio > 1 else "worse") if change.clear else "same"
        _line(svg, across(low), y + 23, across(high), y + 23, f"reach {kind}")
        told = f"{change.name}: {change.ratio:.2f}x ({low:.2f} to {high:.2f})"
        look = _class(f"dot {kind}")
        _titled(svg, "circle", told, cx=across(change.ratio), cy=y + 23, r=4, **look)
    return _written(svg)


def swatch(series: int) -> Markup:
    """The line and marker of a series, for a legend."""
    svg = ElementTree.Element("svg", {"class": "swatch", "viewBox": "0 0 30 12"})
    svg.set("aria-hidden", "true")
    _line(svg, 1, 6, 29, 6, **_class("line", series))
    _marker(svg, 15, 6, series, "")
    return _written(svg)


def short(value: float) -> str:
    """A number in as few characters as tell it: 20k, 1.5M, 0.05."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _marker(svg: ElementTree.Element, x: float, y: float, series: int, title: str) -> None:
    look = _class("mark", series)
    kind = series % SERIES
    if kind == 0:
        _titled(svg, "circle", title, cx=x, cy=y, r=3.6, **look)
        return
    corners = (
        ((-3.3, -3.3), (3.3, -3.3), (3.3, 3.3), (-3.3, 3.3)),  # square
        ((0.0, -4.4), (4.1, 3.1), (-4.1, 3.1)),  # triangle
        ((0.0, -4.6), (4.6, 0.0), (0.0, 4.6), (-4.6, 0.0)),  # diamond
        ((0.0, 4.4), (4.1, -3.1), (-4.1, -3.1)),  # triangle, upside down
        ((-4.6, -1.4), (4.6, -1.4), (4.6, 1.4), (-4.6, 1.4)),  # bar
    )[kind - 1]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    _titled(svg, "polygon", title, points=points, **look)


def _shade(strength: float | None) -> dict[str, str]:
    if strength is None:
        return _class("heat noise")
    opacity = f"{0.06 + 0.42 * abs(strength):.2f}"  # text must stay readable on it
    return {**_class("heat gain" if strength > 0 else "heat loss"), "fill-opacity": opacity}


def _class(kind: str, series: int | None = None) -> dict[str, str]:
    return {"class": kind if series is None else f"{kind} s{series % SERIES}"}


def _root(width: float, height: float, text: str) -> ElementTree.Element:
    svg = ElementTree.Element("svg", {"class": "plot", "viewBox": f"0 0 {width} {height:g}"})
    svg.set("role", "img")
    svg.set("aria-label", text)
    return svg


def _add(parent: ElementTree.Element, tag: str, **attributes: object) -> ElementTree.Element:
    written = {
        name: f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
        for name, value in attributes.items()
    }
    return ElementTree.SubElement(parent, tag, written)


def _titled(parent: ElementTree.Element, tag: str, title: str, **attributes: object) -> None:
    element = _add(parent, tag, **attributes)
    if title:
        _add(element, "title").text = title


def _line(
    parent: ElementTree.Element,
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    kind: str = "",
    **attributes: object,
) -> None:
    look = _class(kind) if kind else attributes
    _add(parent, "line", x1=x1, y1=y1, x2=x2, y2=y2, **look)


def _text(
    parent: ElementTree.Element, x: float, y: float, text: str, kind: str, anchor: str = "start"
) -> None:
    look = {} if anchor == "start" else {"text-anchor": anchor}
    _add(parent, "text", x=x, y=y, **_class(kind), **look).text = text


def _written(svg: ElementTree.Element) -> Markup:
    """The element as markup, in which all text and all attributes are escaped."""
    return Markup(ElementTree.tostring(svg, encoding="unicode"))
