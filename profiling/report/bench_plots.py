"""The plots of a bench: what updates came to under each policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from matplotlib.axes import Axes

from hogstream.profiling.report import charts, drawing
from hogstream.profiling.report.charts import Cell
from hogstream.profiling.report.drawing import DAY, Looks, Plot, short
from hogstream.profiling.report.rows import (
    ONE_ALONE,
    gain_text,
    range_text,
    runs_by_policy,
    runs_by_size,
    share_text,
    worker_counts,
)
from hogstream.profiling.results.gains import Gain, gains_by_place, shares_alone, stronger_of
from hogstream.profiling.results.records import Spread
from hogstream.profiling.results.schema import Bench, BenchRun, Latency
from hogstream.profiling.wording import counted, size_name

_Point = tuple[float, float]
_PERCENTILES = (0.1, 0.9998)  # that the axis has room for


def throughput(bench: Bench, looks: Looks) -> list[Plot]:
    """Updates/s against workers, a plot a size."""
    return [
        Plot(
            f"{size_name(elements)} elements",
            f"Updates per second against workers at {size_name(elements)} elements. {_peaks(runs)}",
            _speeds(runs, worker_counts(bench), looks),
            x="workers",
            y="updates/s",
        )
        for elements, runs in runs_by_size(bench).items()
    ]


def _speeds(runs: list[BenchRun], counts: list[int], looks: Looks) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        drawing.doubling(axes, counts)
        drawing.from_zero(axes, [_top(run.updates_per_second) for run in runs])
        for policy, mine in runs_by_policy(runs).items():
            look = looks[policy]
            medians = [run.updates_per_second.median for run in mine]
            axes.plot([run.workers for run in mine], medians, **look.line)
            for run in mine:
                speed, told = run.updates_per_second, counted(run.workers, "worker")
                if speed.interval is not None:
                    drawing.interval(axes, run.workers, *speed.interval, look)
                tip = f"{policy}, {told}: {speed.median:,.0f} updates/s"
                tip += f" ({range_text(speed.estimate, 0)})"
                drawing.mark(axes, run.workers, speed.median, look, tip)

    return draw


def gains(bench: Bench) -> list[Plot]:
    """The gain of lock-free: a cell for each size and count of several workers."""
    grid, alone = gains_by_place(bench.results), shares_alone(bench)
    if not grid:
        return []
    # At least 2x is full colour, or small gains would look large.
    medians = [gain.ratio.median for gain in grid.values()]
    limit = max([1.0, *(abs(math.log2(median)) for median in medians if median > 0)])
    sizes = sorted({elements for elements, _ in grid})
    counts = sorted({workers for _, workers in grid})
    clear = [gain.ratio.median for gain in grid.values() if gain.ratio.excludes(1)]
    ends = f", from {min(clear):.2f}x to {max(clear):.2f}x" if clear else ""
    over = stronger_of(bench.results)
    text = (
        f"Gain of lock-free over {over} by size and worker count: {len(clear)} of {len(grid)} "
        f"cells are beyond noise{ends}."
    )
    heat_map = charts.heat_map(
        "Gain of lock-free",
        text,
        ("workers", "elements"),
        [str(count) for count in counts],
        {
            size_name(size): [_cell(grid.get((size, count)), limit) for count in counts]
            for size in sizes
        },
        (ONE_ALONE, [share_text(alone.get(size)) for size in sizes]) if alone else None,
    )
    return [heat_map]


def _cell(gain: Gain | None, limit: float) -> Cell | None:
    if gain is None:
        return None
    strength, ratio = None, gain.ratio
    if ratio.excludes(1):
        strength = math.log2(ratio.median) / limit if ratio.median > 0 else -1.0
    tip = f"{ratio.median:.2f}x ({range_text(ratio, 2)}) over {gain.over}"
    return Cell(gain_text(gain), strength, tip)


def latency(bench: Bench, looks: Looks) -> list[Plot]:
    """Latency by percentile, a plot a size, with the most workers."""
    plots = []
    for elements, runs in _with_most_workers(bench).items():
        curves = {run.policy: _percentiles(run.latency_us) for run in runs}
        curves = {policy: curve for policy, curve in curves.items() if curve}
        if not curves:
            continue
        told = " ".join(
            f"{run.policy}: median {_told(run.latency_us.p50)}, 99th percentile "
            f"{_told(run.latency_us.p99)}."
            for run in runs
        )
        title = f"{size_name(elements)} elements, {counted(runs[0].workers, 'worker')}"
        plots.append(
            Plot(
                title,
                f"Latency in microseconds by percentile, {title}. {told}",
                _latencies(curves, looks),
                x="percentile of updates",
                y="latency (us)",
            )
        )
    return plots


def _latencies(curves: dict[str, list[_Point]], looks: Looks) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        axes.set_xlim(*map(_nines, _PERCENTILES))
        shares = (0.5, 0.9, 0.99, 0.999)
        axes.set_xticks([_nines(share) for share in shares], [f"{100 * each:g}" for each in shares])
        drawing.logarithmic(axes, "y", [y for curve in curves.values() for _, y in curve])
        axes.grid(False, axis="x")
        for policy, curve in curves.items():
            look = looks[policy]
            axes.plot([_nines(share) for share, _ in curve], [y for _, y in curve], **look.line)
            for share in shares[:3]:
                value = _value_at(curve, share)
                if value is not None:
                    tip = f"{policy}: {100 * share:g} % within {value:,.1f} us"
                    drawing.mark(axes, _nines(share), value, look, tip)

    return draw


def _nines(share: float) -> float:
    """Where a share lies on an axis on which each nine takes an equal step."""
    return -math.log10(1 - share)


def _percentiles(latency: Latency) -> list[_Point]:
    """(share of updates, microseconds within which they landed), rising."""
    histogram = latency.histogram
    if histogram is None or not sum(histogram.counts):
        return []
    first, last = _PERCENTILES
    total, below, start = sum(histogram.counts), 0, histogram.edges_us[0]
    curve: list[_Point] = []
    for edge, count in zip(histogram.edges_us[1:], histogram.counts, strict=True):
        below += count
        if below / total < first:
            start = edge
        elif count and edge > 0:
            curve.append((min(below / total, last), edge))
            if below / total >= last:
                break
    return [(first, start), *curve] if start > 0 else curve


def _value_at(curve: list[_Point], share: float) -> float | None:
    """Where a rising curve passes a share, as it is drawn."""
    for (low, before), (high, after) in pairwise(curve):
        if low <= share <= high and before > 0:
            x = [_nines(each) for each in (low, share, high)]
            part = (x[1] - x[0]) / (x[2] - x[0]) if x[2] != x[0] else 0.0
            return float(before * (after / before) ** part)
    return next((value for each, value in curve if each == share), None)


def staleness(bench: Bench, looks: Looks) -> list[Plot]:
    """How stale updates were, a plot a size, with the most workers."""
    plots = []
    for elements, runs in _with_most_workers(bench).items():
        shares = {run.policy: _by_doubling(run.staleness.histogram or {}) for run in runs}
        shares = {policy: bins for policy, bins in shares.items() if bins}
        if not shares:
            continue
        told = " ".join(
            f"{run.policy}: mean {_told(run.staleness.mean)}, at most "
            f"{_told(run.staleness.max)} updates."
            for run in runs
        )
        title = f"{size_name(elements)} elements, {counted(runs[0].workers, 'worker')}"
        plots.append(
            Plot(
                title,
                f"Staleness, {title}. {told}",
                _stems(shares, looks),
                x="staleness (updates)",
                y="% of updates",
            )
        )
    return plots


def _stems(shares: dict[str, list[float]], looks: Looks) -> Callable[[Axes], None]:
    names = [_bin_name(index) for index in range(max(map(len, shares.values())))]

    def draw(axes: Axes) -> None:
        drawing.categories(axes, names)
        drawing.from_zero(axes, [share for bins in shares.values() for share in bins])
        step = min(0.2, 0.022 * len(names))
        for place, (policy, bins) in enumerate(shares.items()):
            shift = step * (place - (len(shares) - 1) / 2)
            for index, share in enumerate(bins):
                if share:
                    x, look = index + shift, looks[policy]
                    axes.plot([x, x], [0, share], color=DAY[look.color])
                    tip = f"{policy}: {share:.2g} % of updates at {names[index]}"
                    drawing.mark(axes, x, share, look, tip)

    return draw


def _by_doubling(histogram: dict[int, int]) -> list[float]:
    """Per cent of updates of a staleness of 0, 1, 2 to 3, 4 to 7 and so on."""
    total = sum(histogram.values())
    if not total:
        return []
    bins = [0.0] * (1 + max(age.bit_length() for age, count in histogram.items() if count))
    for age, count in histogram.items():
        if count:
            bins[age.bit_length()] += 100 * count / total
    return bins


def _bin_name(index: int) -> str:
    low, high = (1 << index) >> 1, (1 << index) - 1
    if low == high:
        return str(low)
    return f"{low}-{high}" if high < 64 else f"{short(low)}+"


def _with_most_workers(bench: Bench) -> dict[int, list[BenchRun]]:
    return {
        elements: [run for run in runs if run.workers == max(each.workers for each in runs)]
        for elements, runs in runs_by_size(bench).items()
    }


def _top(spread: Spread) -> float:
    return spread.interval[1] if spread.interval else spread.median


def _peaks(runs: list[BenchRun]) -> str:
    said = []
    for policy, mine in runs_by_policy(runs).items():
        best = max(mine, key=lambda run: run.updates_per_second.median)
        said.append(
            f"{policy} at most {best.updates_per_second.median:,.0f} with "
            f"{counted(best.workers, 'worker')}"
        )
    return f"{'; '.join(said)}."


def _told(value: float | None) -> str:
    return "not measured" if value is None else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
