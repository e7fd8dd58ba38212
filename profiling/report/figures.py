"""The figures of a report: from results to plots, each with a text that says what it shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from hogstream.profiling.measure.peers import CEILING, HOGSTREAM, MEMORY, PEERS
from hogstream.profiling.report import charts
from hogstream.profiling.report.charts import Bar, Cell, Panel
from hogstream.profiling.report.summary import results_by_shape
from hogstream.profiling.results.confidence import Interval, median_interval
from hogstream.profiling.results.gains import (
    BASELINES,
    CONTENDER,
    gain_text,
    gains_over,
    share_text,
)
from hogstream.profiling.wording import counted, size_name

Result = dict[str, Any]

#: Arithmetic of an update: what an element takes of it.
OPERATIONS = PEERS[HOGSTREAM].operations_per_element
_KNOWN = (CONTENDER, *BASELINES)
_CURVE = 160  # points of a line, at most


@dataclass(frozen=True)
class Figure:
    """Plots of one kind.

    Attributes:
        anchor: Its id in the page.
        title: Its heading.
        text: What to look at.
        panels: The plots.
        legend: What lines and markers stand for.
        missing: Why there is no plot, or not all of it.
    """

    anchor: str
    title: str
    text: str
    panels: Sequence[Markup] = ()
    legend: Sequence[tuple[Markup, str]] = ()
    missing: str = ""


def bench_figures(bench: Result) -> list[Figure]:
    """The figures of a run of ``hogstream bench``."""
    return [
        throughput(bench),
        *gain(bench),
        latency(bench),
        staleness(bench),
        roofline(bench),
        kernels(bench),
    ]


def spread(result: Result) -> Interval:
    """Updates/s, with the interval that the rounds allow."""
    return median_interval(result["updates_per_second_of_rounds"])


def throughput(bench: Result) -> Figure:
    """Updates/s against workers, a panel a size."""
    panels = []
    for elements, results in _by_size(bench).items():
        spreads = {id(result): spread(result) for result in results}
        ends = [interval.high for interval in spreads.values() if math.isfinite(interval.high)]
        panel = Panel(
            f"{size_name(elements)} elements",
            charts.doubling_axis("workers", _workers(bench)),
            charts.linear_axis("updates/s", ends + [r["updates_per_second"] for r in results]),
            f"Updates per second against workers at {size_name(elements)} elements. "
            + _peaks(results),
        )
        for policy, mine in _by_policy(results).items():
            series = _series(bench, policy)
            panel.line([(r["workers"], r["updates_per_second"]) for r in mine], series)
            for result in mine:
                interval = spreads[id(result)]
                if math.isfinite(interval.high):
                    panel.interval(result["workers"], interval.low, interval.high, series)
                panel.mark(
                    (result["workers"], result["updates_per_second"]),
                    series,
                    f"{policy}, {counted(result['workers'], 'worker')}: "
                    f"{result['updates_per_second']:,.0f} updates/s ({range_text(interval, 0)})",
                )
        panels.append(panel.svg())
    return Figure(
        "throughput",
        "Updates per second",
        "Medians over rounds in which the policies took turns; bars are 95 % bootstrap intervals.",
        panels,
        _legend(bench),
    )


def gain(bench: Result) -> list[Figure]:
    """The gain of lock-free over each baseline: a cell for each size and worker count."""
    grids = {name: gains_over(name, bench["results"]) for name in BASELINES}
    grids = {name: gains for name, gains in grids.items() if gains}
    if not grids:
        return []
    ratios = [each.median for gains in grids.values() for each in gains.values() if each.median > 0]
    limit = max([1.0, *(abs(math.log2(ratio)) for ratio in ratios)])
    counts = _workers(bench)
    panels = []
    for name, gains in grids.items():
        sizes = sorted({elements for elements, _ in gains})
        rows = {
            size_name(size): [_cell(gains.get((size, count)), limit) for count in counts]
            for size in sizes
        }
        clear = [each.median for each in gains.values() if each.excludes(1)]
        text = (
            f"Gain of lock-free over {name} by size and worker count: {len(clear)} of {len(gains)} "
            f"cells are beyond noise"
            + (f", from {min(clear):.2f}x to {max(clear):.2f}x." if clear else ".")
        )
        columns = [str(count) for count in counts]
        title, label = f"Lock-free over {name}", "elements; workers"
        panels.append(charts.heat_map(title, rows, columns, label, text))
    return [
        Figure(
            "gain",
            "Gain",
            "Lock-free's updates/s over the baseline's. Blue is a gain, orange a loss; grey and in "
            "parentheses, it may be noise: the 95 % interval holds 1x.",
            panels,
        )
    ]


def _cell(gain: Interval | None, limit: float) -> Cell | None:
    if gain is None:
        return None
    strength = None
    if gain.excludes(1):
        strength = math.log2(gain.median) / limit if gain.median > 0 else -1.0
    title = f"{gain.median:.2f}x ({range_text(gain, 2)})"
    return Cell(gain_text(gain), strength, title)


def latency(bench: Result) -> Figure:
    """Latency by percentile, a panel a size, with the most workers."""
    panels, drawn = [], []
    whole = all(result["latency_us"]["histogram"] for result in bench["results"])
    for elements, results in _by_size(bench).items():
        most = max(result["workers"] for result in results)
        curves = {
            result["policy"]: _percentiles(result["latency_us"])
            for result in results
            if result["workers"] == most
        }
        curves = {policy: curve for policy, curve in curves.items() if curve}
        if not curves:
            continue
        drawn.append(elements)
        panel = Panel(
            f"{size_name(elements)} elements, {counted(most, 'worker')}",
            charts.percentile_axis("percentile of updates"),
            charts.log_axis("latency (us)", [y for curve in curves.values() for _, y in curve]),
            f"Latency in microseconds by percentile at {size_name(elements)} elements with "
            f"{counted(most, 'worker')}. "
            + " ".join(
                f"{result['policy']}: median {_told(result['latency_us']['p50'])}, 99th percentile "
                f"{_told(result['latency_us']['p99'])}."
                for result in results
                if result["workers"] == most
            ),
        )
        for policy, curve in curves.items():
            panel.line(curve, _series(bench, policy))
            for share in (0.5, 0.9, 0.99):
                value = _value_at(curve, share)
                if value is not None:
                    told = f"{policy}: {100 * share:g} % within {value:,.1f} us"
                    panel.mark((share, value), _series(bench, policy), told)
        panels.append(panel.svg())
    return Figure(
        "latency",
        "Latency",
        "From submission to landing, all waits included, with the most workers. Each nine of the "
        "percentiles has the same room, so the tail shows.",
        panels,
        _legend(bench),
        "" if whole else "Of some results only the 50th, 90th and 99th percentiles were kept.",
    )


def _percentiles(latency: Result) -> list[tuple[float, float]]:
    """(share of updates, microseconds within which they landed), rising."""
    histogram = latency["histogram"]
    if not histogram or not sum(histogram["counts"]):
        known = [(share, latency[f"p{100 * share:g}"]) for share in (0.5, 0.9, 0.99)]
        return [(share, value) for share, value in known if value]
    (first, last), edges = charts.PERCENTILES, histogram["edges_us"]
    total, below, start = sum(histogram["counts"]), 0, edges[0]
    curve: list[tuple[float, float]] = []
    for edge, count in zip(edges[1:], histogram["counts"], strict=True):
        below += count
        if below / total < first:
            start = edge
        elif count and edge > 0:
            curve.append((min(below / total, last), edge))
            if below / total >= last:
                break
    return [(first, start), *curve] if start > 0 else curve


def _value_at(curve: list[tuple[float, float]], share: float) -> float | None:
    """Where a rising curve passes a share, as it is drawn."""
    for (low, before), (high, after) in pairwise(curve):
        if low <= share <= high and before > 0:
            x = [math.log1p(-each) for each in (low, share, high)]
            part = (x[1] - x[0]) / (x[2] - x[0]) if x[2] != x[0] else 0.0
            return float(before * (after / before) ** part)
    return next((value for each, value in curve if each == share), None)


def staleness(bench: Result) -> Figure:
    """How stale updates were, a panel a size, with the most workers."""
    panels = []
    for elements, results in _by_size(bench).items():
        most = max(result["workers"] for result in results)
        shares = {
            result["policy"]: _by_doubling(result["staleness"]["histogram"])
            for result in results
            if result["workers"] == most and result["staleness"]["histogram"]
        }
        shares = {policy: bins for policy, bins in shares.items() if bins}
        if not shares:
            continue
        names = [_bin_name(index) for index in range(max(map(len, shares.values())))]
        panel = Panel(
            f"{size_name(elements)} elements, {counted(most, 'worker')}",
            charts.category_axis("staleness (updates)", names),
            charts.linear_axis("% of updates", [y for bins in shares.values() for y in bins]),
            f"Staleness at {size_name(elements)} elements with {counted(most, 'worker')}. "
            + " ".join(
                f"{result['policy']}: mean {_told(result['staleness']['mean'])}, at most "
                f"{_told(result['staleness']['max'])} updates."
                for result in results
                if result["workers"] == most
            ),
        )
        for place, (policy, bins) in enumerate(shares.items()):
            shift = 6 * (place - (len(shares) - 1) / 2)
            for index, share in enumerate(bins):
                if share:
                    told = f"{policy}: {share:.2g} % of updates at {names[index]}"
                    panel.stem(index, share, _series(bench, policy), shift, told)
        panels.append(panel.svg())
    return Figure(
        "staleness",
        "Staleness",
        "How many updates landed between a worker's read of the parameters and the landing of the "
        "update made from it, with the most workers.",
        panels,
        _legend(bench) if panels else (),
        "" if panels else "No histogram of it was kept.",
    )


def _by_doubling(histogram: dict[str, int]) -> list[float]:
    """Per cent of updates of a staleness of 0, 1, 2 to 3, 4 to 7 and so on."""
    total = sum(histogram.values())
    if not total:
        return []
    bins = [0.0] * (1 + max(int(age).bit_length() for age, count in histogram.items() if count))
    for age, count in histogram.items():
        if count:
            bins[int(age).bit_length()] += 100 * count / total
    return bins


def _bin_name(index: int) -> str:
    low, high = (1 << index) >> 1, (1 << index) - 1
    if low == high:
        return str(low)
    return f"{low}-{high}" if high < 64 else f"{charts.short(low)}+"


def roofline(bench: Result) -> Figure:
    """Operations against bytes: how near kernels and policies come to each level's bandwidth."""
    ceilings = bench["ceilings"]
    roofs = {
        level["level"]: level["update_shaped_gigabytes_per_second"]["median"]
        for level in ceilings["levels"] or ()
        if level["update_shaped_gigabytes_per_second"]
    }
    missing = ""
    if not roofs:
        roofs = {"memory": ceilings["update_shaped_gigabytes_per_second"]}
        missing = "Only memory's bandwidth was measured, not that of the caches."
    panels = []
    for elements, results in _by_size(bench).items():
        points = _policy_points(bench, results)
        if points:
            panels.append(_roofline_panel(f"{size_name(elements)} elements", roofs, points))
    alone = _kernel_points(bench)
    if alone:
        panels.append(_roofline_panel("Kernels alone", roofs, alone))
    return Figure(
        "roofline",
        "Roofline",
        "Arithmetic per byte against arithmetic per second: an update does "
        f"{OPERATIONS} operations an element, and can be no faster than the level of memory that "
        "holds it (dashed: what an update's traffic reaches there). Each policy with its best "
        "worker count.",
        panels,
        _legend(bench),
        missing,
    )


# Name, operations per byte, Gop/s and series.
_RoofPoint = tuple[str, float, float, int]


def _policy_points(bench: Result, results: list[Result]) -> list[_RoofPoint]:
    points = []
    for policy, mine in _by_policy(results).items():
        best = max(mine, key=lambda result: result["updates_per_second"])
        speed = OPERATIONS * best["elements"] * best["updates_per_second"] / 1e9
        if speed > 0 and best["gigabytes_per_second"] > 0:
            intensity = speed / best["gigabytes_per_second"]
            points.append((policy, intensity, speed, _series(bench, policy)))
    return points


def _kernel_points(bench: Result) -> list[_RoofPoint]:
    return [
        (
            kernel["name"],
            OPERATIONS * kernel["elements"] / (kernel["milliseconds"] * 1e6) / speed,
            OPERATIONS * kernel["elements"] / (kernel["milliseconds"] * 1e6),
            charts.SERIES - 1,
        )
        for kernel in bench["kernels"]
        if (speed := kernel["gigabytes_per_second"]) > 0
    ]


def _roofline_panel(
    title: str,
    roofs: dict[str, float],
    points: list[_RoofPoint],
    height: int = charts.HEIGHT,
) -> Markup:
    around = [each[1] * factor for each in points for factor in (0.5, 4)]
    x = charts.log_axis("operations per byte", around)
    middle = points[0][1]
    heights = [speed * middle for speed in roofs.values()] + [each[2] for each in points]
    y = charts.log_axis("Gop/s", [min(heights) / 2, max(heights) * 2])
    reached = "; ".join(f"{name} {speed:.3g} Gop/s" for name, _, speed, _ in points)
    tops = ", ".join(f"{name} {speed * middle:.3g}" for name, speed in roofs.items())
    text = f"Roofline, {title}: {reached}. The roofs there, in Gop/s: {tops}."
    panel = Panel(title, x, y, text, height)
    panel.roofs(roofs)
    for name, intensity, speed, series in points:
        panel.mark((intensity, speed), series, f"{name}: {speed:.3g} Gop/s")
    panel.names(((intensity, speed), name) for name, intensity, speed, _ in points)
    return panel.svg()


def kernels(bench: Result) -> Figure:
    """The kernels alone, against the ceiling."""
    ceiling = bench["ceilings"]["update_shaped_gigabytes_per_second"]
    rows = []
    for kernel in bench["kernels"]:
        speed, rounds = kernel["gigabytes_per_second"], kernel["milliseconds_of_rounds"]
        ends = None
        if rounds and min(rounds) > 0:
            interval = median_interval(rounds)
            if math.isfinite(interval.high):
                factor = speed * kernel["milliseconds"]
                ends = (factor / interval.high, factor / interval.low)
        ours = kernel["name"].startswith(HOGSTREAM)
        rows.append(Bar(kernel["name"], speed, f"{speed:.1f}", ours, ends))
    if not rows:
        return Figure("kernels", "Kernels alone", "", missing="No kernel was measured alone.")
    rows.sort(key=lambda row: -row.value)
    size = size_name(bench["kernels"][0]["elements"])
    text = (
        f"{rows[0].name} is the fastest with {rows[0].told} GB/s, "
        f"{share_text(rows[0].value / ceiling)} of the update-shaped ceiling of {ceiling:.1f} GB/s."
    )
    bars = ", ".join(f"{row.name} {row.told} GB/s" for row in rows)
    label, said = f"GB/s at {size} elements", f"Kernels alone: {bars}. {text}"
    panel = charts.bars("One large update, all cores", rows, label, said, ceiling)
    dashed = " Dashed: the update-shaped ceiling of memory, in the same run."
    return Figure("kernels", "Kernels alone", text + dashed, [panel])


def training(train: Result) -> Figure:
    """Training loss against time."""
    curves = {
        result["policy"]: _smoothed([(x, y) for x, y in result["losses"]])
        for result in train["results"]
    }
    curves = {
        policy: [point for point in curve if point[1] > 0] for policy, curve in curves.items()
    }
    curves = {policy: curve for policy, curve in curves.items() if curve}
    text = " ".join(
        f"{result['policy']}: {result['test_accuracy']:.1%} test accuracy, final loss "
        f"{result['final_loss']:.4f}, after {_seconds(result):.1f} s."
        for result in train["results"]
    )
    if not curves:
        return Figure("training", "Training", text, missing="No losses were kept.")
    panel = Panel(
        "Training loss",
        charts.linear_axis("seconds", [x for curve in curves.values() for x, _ in curve]),
        charts.log_axis(
            "cross entropy (nats), running mean", [y for curve in curves.values() for _, y in curve]
        ),
        f"Training loss against seconds. {text}",
    )
    for policy, curve in curves.items():
        panel.line(curve, _series(train, policy))
        every = max(1, len(curve) // 8)
        for x, y in curve[every - 1 :: every]:
            told = f"{policy}: {y:.4f} after {x:.2f} s"
            panel.mark((x, y), _series(train, policy), told)
    return Figure("training", "Training", text, [panel.svg()], _legend(train))


def optimizers(compare: Result) -> list[Figure]:
    """What each optimizer moves at each shape, and a roofline at the largest ones."""
    shapes = results_by_shape(compare)
    panels = []
    for shape, results in shapes.items():
        ceiling = next((r["gigabytes_per_second"] for r in results if r["peer"] == CEILING), None)
        rows = []
        for result in results:
            if result["peer"] not in MEMORY:
                speed, interval = result["gigabytes_per_second"], None
                quick, slow = result["milliseconds_interval"]
                if quick > 0 and slow > 0:
                    factor = speed * result["milliseconds"]
                    interval = (factor / slow, factor / quick)
                ours = result["peer"].startswith(HOGSTREAM)
                rows.append(Bar(result["peer"], speed, f"{speed:.1f}", ours, interval))
        rows.sort(key=lambda row: -row.value)
        if not rows:
            continue
        said = ", ".join(f"{row.name} {row.told}" for row in rows)
        text = f"GB/s at {shape}, the fastest first: {said}."
        panels.append(charts.bars(shape, rows, "GB/s, least traffic", text, ceiling))
    return [
        Figure(
            "optimizers",
            "Optimizers",
            "What each moves in a step, counted as the least traffic that it needs; lines are "
            "95 % bootstrap intervals. Dashed: the update-shaped ceiling, in the same turns.",
            panels,
        ),
        *_optimizer_roofline(shapes),
    ]


def _optimizer_roofline(shapes: dict[str, list[Result]]) -> list[Figure]:
    largest = max(shapes.values(), key=lambda results: results[0]["elements"])
    roofs = {
        {CEILING: "update-shaped"}.get(r["peer"], "copy"): r["gigabytes_per_second"]
        for r in largest
        if r["peer"] in MEMORY
    }
    peers = [r for r in largest if r["peer"] not in MEMORY and r["operations_per_element"]]
    if not roofs or not peers:
        return []
    points = [
        (
            result["peer"],
            result["operations_per_element"] / result["bytes_per_element"],
            result["gigabytes_per_second"]
            * result["operations_per_element"]
            / result["bytes_per_element"],
            0 if result["peer"].startswith(HOGSTREAM) else 1,
        )
        for result in peers
    ]
    legend = [(charts.swatch(0), "hogstream"), (charts.swatch(1), "others")]
    return [
        Figure(
            "optimizer-roofline",
            "Optimizers: roofline",
            f"At {largest[0]['shape']}: arithmetic per byte against arithmetic per second, under "
            "what memory can do.",
            [_roofline_panel(largest[0]["shape"], roofs, points, 3 * charts.HEIGHT // 2)],
            legend,
        )
    ]


def _seconds(result: Result) -> float:
    """Of a training; older files had one round."""
    name = "training_seconds" if "training_seconds" in result else "seconds"
    return float(result[name])


def range_text(interval: Interval, digits: int) -> str:
    """The ends of an interval; a dash if it is without bounds."""
    if not math.isfinite(interval.high - interval.low):
        return "-"
    return f"{interval.low:,.{digits}f} to {interval.high:,.{digits}f}"


def _smoothed(losses: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Running means, over which single batches do not hide the course; not too many of them."""
    window = min(max(20, len(losses) // 25), len(losses))
    ends = range(window, len(losses) + 1, max(1, len(losses) // _CURVE)) if window else ()
    return [
        (losses[end - 1][0], sum(loss for _, loss in losses[end - window : end]) / window)
        for end in ends
    ]


def _peaks(results: list[Result]) -> str:
    said = []
    for policy, mine in _by_policy(results).items():
        best = max(mine, key=lambda result: result["updates_per_second"])
        said.append(
            f"{policy} at most {best['updates_per_second']:,.0f} with "
            f"{counted(best['workers'], 'worker')}"
        )
    return f"{'; '.join(said)}."


def _told(value: float | None) -> str:
    return "not measured" if value is None else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"


def _legend(result: Result) -> list[tuple[Markup, str]]:
    policies = dict.fromkeys(each["policy"] for each in result["results"])
    return [(charts.swatch(_series(result, policy)), policy) for policy in policies]


def _series(result: Result, policy: str) -> int:
    """The look of a policy: the known ones have their own, others follow in order."""
    if policy in _KNOWN:
        return _KNOWN.index(policy)
    others = [name for name in _names(result) if name not in _KNOWN]
    return len(_KNOWN) + others.index(policy) % (charts.SERIES - len(_KNOWN))


def _names(result: Result) -> Iterable[str]:
    return dict.fromkeys(each["policy"] for each in result["results"])


def _workers(bench: Result) -> list[int]:
    return sorted({result["workers"] for result in bench["results"]})


def _by_size(bench: Result) -> dict[int, list[Result]]:
    sizes: dict[int, list[Result]] = {}
    for result in sorted(bench["results"], key=lambda result: result["elements"]):
        sizes.setdefault(result["elements"], []).append(result)
    return sizes


def _by_policy(results: list[Result]) -> dict[str, list[Result]]:
    """Results of each policy, by worker count."""
    policies: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result["workers"]):
        policies.setdefault(result["policy"], []).append(result)
    return {policy: policies[policy] for policy in dict.fromkeys(r["policy"] for r in results)}
