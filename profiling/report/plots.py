"""The plots of results, each with a text that says what it shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes

from hogstream.profiling.measure.peers import CEILING, HOGSTREAM, MEMORY, PEERS
from hogstream.profiling.report import drawing
from hogstream.profiling.report.drawing import (
    DAY,
    LOOKS,
    Bar,
    Cell,
    Look,
    Plot,
    Reach,
    legible,
    short,
)
from hogstream.profiling.report.rows import (
    ONE_ALONE,
    gain_text,
    machine_text,
    range_text,
    results_by_shape,
    share_text,
    worker_counts,
)
from hogstream.profiling.results.confidence import Interval
from hogstream.profiling.results.diff import UNKNOWN, Diff
from hogstream.profiling.results.gains import (
    BASELINES,
    CONTENDER,
    gains_over,
    over_stronger,
    shares_alone,
)
from hogstream.profiling.results.records import Spread
from hogstream.profiling.results.schema import (
    Bench,
    BenchRun,
    Compare,
    Latency,
    PeerTime,
    Run,
    Train,
    TrainRun,
)
from hogstream.profiling.wording import counted, size_name

Looks = dict[str, Look]
Point = tuple[float, float]

#: Arithmetic of an update: what an element takes of it.
OPERATIONS = PEERS[HOGSTREAM].operations_per_element
_PERCENTILES = (0.1, 0.9998)  # that the axis has room for
_CURVE = 160  # points of a line, at most
_DRAWN_CHANGES, _CHANGES = 36, 12  # of a diff, and of a plot of it; its table holds all


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


def of_bench(bench: Bench) -> list[Group]:
    """All that is drawn of a bench."""
    looks = _looks(bench.results)
    groups = [
        Group(
            "throughput",
            "Updates per second",
            "Medians over rounds in which the policies took turns; bars are 95 % bootstrap "
            "intervals.",
            throughput(bench, looks),
            looks,
        ),
        Group(
            "gain",
            "Gain",
            "Lock-free's updates/s over the baseline's. Blue is a gain, orange a loss; grey and in "
            "parentheses, it may be noise: the 95 % interval holds 1x.",
            gains(bench),
            {},
        ),
        Group(
            "latency",
            "Latency",
            "From submission to landing, all waits included, with the most workers. Each nine of "
            "the percentiles has the same room, so the tail shows.",
            latency(bench, looks),
            looks,
        ),
        Group(
            "staleness",
            "Staleness",
            "How many updates landed between a worker's read of the parameters and the landing of "
            "the update made from it, with the most workers.",
            staleness(bench, looks),
            looks,
        ),
        Group(
            "roofline",
            "Roofline",
            "Arithmetic per byte against arithmetic per second: an update does "
            f"{OPERATIONS} operations an element, and can be no faster than the level of memory "
            "that holds it (dashed: what an update's traffic reaches there). Each policy with its "
            "best worker count.",
            rooflines(bench, looks),
            looks,
        ),
        kernels(bench),
    ]
    return [group for group in groups if group.plots]


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
        for elements, runs in _by_size(bench).items()
    ]


def _speeds(runs: list[BenchRun], counts: list[int], looks: Looks) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        drawing.doubling(axes, counts)
        drawing.from_zero(axes, [_top(run.updates_per_second) for run in runs])
        for policy, mine in _by_policy(runs).items():
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
    """The gain of lock-free over each baseline: a cell for each size and worker count."""
    grids = {name: gains_over(name, bench.results) for name in BASELINES}
    cells = [gain for grid in grids.values() for gain in grid.values()]
    # At least 2x is full colour, or small gains would look large.
    limit = max([1.0, *(abs(math.log2(gain.median)) for gain in cells if gain.median > 0)])
    return [_gain(bench, baseline, grid, limit) for baseline, grid in grids.items() if grid]


def _gain(bench: Bench, baseline: str, grid: dict[tuple[int, int], Interval], limit: float) -> Plot:
    counts, alone = worker_counts(bench), shares_alone(bench)
    sizes = sorted({elements for elements, _ in grid})
    clear = [gain.median for gain in grid.values() if gain.excludes(1)]
    ends = f", from {min(clear):.2f}x to {max(clear):.2f}x" if clear else ""
    text = (
        f"Gain of lock-free over {baseline} by size and worker count: {len(clear)} of {len(grid)} "
        f"cells are beyond noise{ends}."
    )
    return drawing.heat_map(
        f"Lock-free over {baseline}",
        text,
        ("workers", "elements"),
        [str(count) for count in counts],
        {
            size_name(size): [_cell(grid.get((size, count)), limit) for count in counts]
            for size in sizes
        },
        (ONE_ALONE, [share_text(alone.get(size)) for size in sizes]) if alone else None,
    )


def _cell(gain: Interval | None, limit: float) -> Cell | None:
    if gain is None:
        return None
    strength = None
    if gain.excludes(1):
        strength = math.log2(gain.median) / limit if gain.median > 0 else -1.0
    return Cell(gain_text(gain), strength, f"{gain.median:.2f}x ({range_text(gain, 2)})")


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


def _latencies(curves: dict[str, list[Point]], looks: Looks) -> Callable[[Axes], None]:
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


def _percentiles(latency: Latency) -> list[Point]:
    """(share of updates, microseconds within which they landed), rising."""
    histogram = latency.histogram
    if histogram is None or not sum(histogram.counts):
        return []
    first, last = _PERCENTILES
    total, below, start = sum(histogram.counts), 0, histogram.edges_us[0]
    curve: list[Point] = []
    for edge, count in zip(histogram.edges_us[1:], histogram.counts, strict=True):
        below += count
        if below / total < first:
            start = edge
        elif count and edge > 0:
            curve.append((min(below / total, last), edge))
            if below / total >= last:
                break
    return [(first, start), *curve] if start > 0 else curve


def _value_at(curve: list[Point], share: float) -> float | None:
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


@dataclass(frozen=True)
class _Point:
    """What reaches so many Gop/s at so many operations per byte."""

    name: str
    intensity: float
    speed: float
    look: Look


def rooflines(bench: Bench, looks: Looks) -> list[Plot]:
    """Operations against bytes: how near kernels and policies come to each level's bandwidth."""
    slopes = {
        level.level: level.update_shaped_gigabytes_per_second.median
        for level in bench.ceilings.levels
        if level.update_shaped_gigabytes_per_second
    }
    if not slopes:
        return []
    plots = []
    for elements, runs in _by_size(bench).items():
        points = []
        for policy, mine in _by_policy(runs).items():
            best = max(mine, key=lambda run: run.updates_per_second.median)
            speed = OPERATIONS * elements * best.updates_per_second.median / 1e9
            if speed > 0 and best.gigabytes_per_second > 0:
                intensity = speed / best.gigabytes_per_second
                points.append(_Point(policy, intensity, speed, looks[policy]))
        if points:
            plots.append(_roofline(f"{size_name(elements)} elements", slopes, points))
    alone = []
    for kernel in bench.kernels:
        speed = OPERATIONS * kernel.elements / (kernel.milliseconds.median * 1e6)
        intensity = speed / kernel.gigabytes_per_second
        alone.append(_Point(kernel.name, intensity, speed, _ours(kernel.name)))
    return [*plots, *([_roofline("Kernels alone", slopes, alone)] if alone else [])]


def _roofline(
    title: str, slopes: dict[str, float], points: list[_Point], height: int = drawing.HEIGHT
) -> Plot:
    around = [point.intensity * factor for point in points for factor in (0.5, 4)]
    middle = points[0].intensity
    speeds = [slope * middle for slope in slopes.values()] + [point.speed for point in points]
    reached = "; ".join(f"{point.name} {point.speed:.3g} Gop/s" for point in points)
    tops = ", ".join(f"{name} {slope * middle:.3g}" for name, slope in slopes.items())

    def draw(axes: Axes) -> None:
        drawing.logarithmic(axes, "x", around)
        drawing.logarithmic(axes, "y", [min(speeds) / 2, max(speeds) * 2])
        axes.grid(False, axis="x")
        drawing.roofs(axes, slopes)
        for point in points:
            tip = f"{point.name}: {point.speed:.3g} Gop/s"
            drawing.mark(axes, point.intensity, point.speed, point.look, tip)
        drawing.names_beside(axes, [(each.intensity, each.speed, each.name) for each in points])

    text = f"Roofline, {title}: {reached}. The roofs there, in Gop/s: {tops}."
    return Plot(title, text, draw, x="operations per byte", y="Gop/s", height=height)


def kernels(bench: Bench) -> Group:
    """The kernels alone, against the ceiling."""
    title = "Kernels alone"
    ceiling = bench.ceilings.memory.update_shaped_gigabytes_per_second
    rows = [
        _speed_bar(kernel.name, kernel.gigabytes_per_second, kernel.milliseconds)
        for kernel in sorted(bench.kernels, key=lambda kernel: -kernel.gigabytes_per_second)
    ]
    if not rows:
        return Group("kernels", title, "", [], {})
    text = f"{rows[0].name} is the fastest with {rows[0].told} GB/s"
    if ceiling is not None:
        share = share_text(rows[0].value / ceiling.median)
        text += f", {share} of the update-shaped ceiling of {ceiling.median:.1f} GB/s (dashed)"
    said = f"{title}: {', '.join(f'{row.name} {row.told} GB/s' for row in rows)}. {text}."
    across = f"GB/s at {size_name(bench.kernels[0].elements)} elements"
    most = None if ceiling is None else ceiling.median
    plot = drawing.bars("One large update, all cores", said, across, rows, most)
    return Group("kernels", title, f"{text}.", [plot], {})


def _speed_bar(name: str, speed: float, milliseconds: Spread) -> Bar:
    interval = None
    if milliseconds.interval is not None and milliseconds.interval[0] > 0:
        quick, slow = milliseconds.interval
        interval = (speed * milliseconds.median / slow, speed * milliseconds.median / quick)
    return Bar(name, speed, f"{speed:.1f}", name.startswith(HOGSTREAM), interval)


def of_train(train: Train) -> Group:
    """Training loss against time."""
    looks = _looks(train.results)
    curves = {
        run.policy: [point for point in _smoothed(run.losses) if point[1] > 0]
        for run in train.results
    }
    curves = {policy: curve for policy, curve in curves.items() if curve}
    text = " ".join(map(_trained, train.results))

    def draw(axes: Axes) -> None:
        end = max(x for curve in curves.values() for x, _ in curve)
        drawing.logarithmic(axes, "y", [y for curve in curves.values() for _, y in curve])
        axes.grid(False, axis="x")
        axes.set_xlim(0, end * 1.02 or 1)
        axes.locator_params(axis="x", nbins=6)
        for policy, curve in curves.items():
            look, every = looks[policy], max(1, len(curve) // 8)
            axes.plot([x for x, _ in curve], [y for _, y in curve], **look.line)
            for x, y in curve[every - 1 :: every]:
                drawing.mark(axes, x, y, look, f"{policy}: {y:.4f} after {x:.2f} s")

    plot = Plot(
        "Training loss",
        f"Training loss against seconds, of the first round. {text}",
        draw,
        x="seconds",
        y="cross entropy (nats), running mean",
        width=520,
        height=300,
    )
    return Group(
        "training", "Training", "The loss of the first round.", [plot] if curves else [], looks
    )


def _trained(run: TrainRun) -> str:
    loss = "the loss diverged" if run.final_loss is None else f"loss {run.final_loss.median:.4f}"
    return (
        f"{run.policy}: {100 * run.test_accuracy.median:.1f} % test accuracy, {loss}, after "
        f"{run.training_seconds.median:.1f} s (medians)."
    )


def _smoothed(losses: list[Point]) -> list[Point]:
    """Running means, over which single batches do not hide the course; not too many of them."""
    window = min(max(20, len(losses) // 25), len(losses))
    ends = range(window, len(losses) + 1, max(1, len(losses) // _CURVE)) if window else ()
    return [
        (losses[end - 1][0], sum(loss for _, loss in losses[end - window : end]) / window)
        for end in ends
    ]


def of_compare(compare: Compare) -> list[Group]:
    """What each optimizer moves at each shape, and a roofline at the largest one."""
    shapes = results_by_shape(compare)
    groups = [
        Group(
            "optimizers",
            "Optimizers",
            "What each moves in a step, counted as the least traffic that it needs; lines are "
            "95 % bootstrap intervals. Dashed: the update-shaped ceiling, in the same turns.",
            [plot for results in shapes.values() for plot in _speeds_at(results)],
            {},
        ),
        Group(
            "optimizer-roofline",
            "Optimizers: roofline",
            "At the largest shape: arithmetic per byte against arithmetic per second, under what "
            "memory can do.",
            _optimizer_roofline(shapes),
            {"hogstream": _ours(HOGSTREAM), "others": _ours("")},
        ),
    ]
    return [group for group in groups if group.plots]


def _speeds_at(results: list[PeerTime]) -> list[Plot]:
    shape, speeds = results[0].shape, {each.peer: each.gigabytes_per_second for each in results}
    peers = [result for result in results if result.peer not in MEMORY]
    rows = [
        _speed_bar(result.peer, result.gigabytes_per_second, result.milliseconds)
        for result in sorted(peers, key=lambda result: -result.gigabytes_per_second)
    ]
    said = ", ".join(f"{row.name} {row.told}" for row in rows)
    text = f"GB/s at {shape}, the fastest first: {said}."
    across = "GB/s, least traffic"
    return [drawing.bars(legible(shape), text, across, rows, speeds.get(CEILING))] if rows else []


def _optimizer_roofline(shapes: dict[str, list[PeerTime]]) -> list[Plot]:
    if not shapes:
        return []
    largest = max(shapes.values(), key=lambda results: results[0].elements)
    slopes = {
        "update-shaped" if each.peer == CEILING else "copy": each.gigabytes_per_second
        for each in largest
        if each.peer in MEMORY
    }
    points = [
        _Point(
            result.peer,
            intensity := result.operations_per_element / result.bytes_per_element,
            result.gigabytes_per_second * intensity,
            _ours(result.peer),
        )
        for result in largest
        if result.peer not in MEMORY and result.operations_per_element
    ]
    if not slopes or not points:
        return []
    return [_roofline(legible(largest[0].shape), slopes, points, 3 * drawing.HEIGHT // 2)]


def of_diff(diff: Diff) -> Group:
    """The greatest effects, each with its interval."""
    rows = [
        Reach(each.name, speed.median, speed.low, speed.high, speed.excludes(1))
        for each in diff.changes
        if each.verdict != UNKNOWN and (speed := each.speed) and speed.low > 0
    ][:_DRAWN_CHANGES]
    around = [end for row in rows for end in (row.low, row.high, 1.0)]
    axis = "speed, second over first"
    plots = []
    for start in range(0, len(rows), _CHANGES):
        part = rows[start : start + _CHANGES]
        said = "; ".join(f"{row.name} {row.ratio:.2f}x" for row in part)
        text = f"Speed of the second run over the first with 95 % intervals: {said}."
        plots.append(drawing.forest(text, axis, part, around))
    hint = "Right of the dashed line the second run is faster. Hollow dots: no change beyond noise."
    return Group(f"changes-{diff.kind}", "", hint, plots, {})


# Pictures in files of their own.


def write_gains(bench: Bench, path: Path) -> None:
    """Saves what lock-free gains at each size and worker count; the suffix says the format."""
    note = "grey, in parentheses: the difference may be noise (the 95 % interval holds 1x)"
    drawing.save(gains(bench), path, note=note)


def write_losses(train: Train, path: Path) -> None:
    """Saves training loss against time; the suffix says the format."""
    group = of_train(train)
    named = {
        f"{run.policy}: {100 * run.test_accuracy.median:.1f} % test accuracy": group.looks[
            run.policy
        ]
        for run in train.results
    }
    drawing.save(group.plots, path, looks=named)


def write_compare(compare: Compare, path: Path) -> None:
    """Saves what each optimizer moves, and a roofline; the suffix says the format."""
    plots = [plot for group in of_compare(compare) for plot in group.plots]
    drawing.save(plots, path, columns=3)


def write_gain(bench: Bench, path: Path) -> None:
    """Saves lock-free's gain over the stronger of locked and ordered, with the most workers.

    Args:
        bench: Best of many sizes.
        path: Where to; the suffix says the format.
    """
    workers = max(worker_counts(bench))
    stronger = {
        run.elements: over[1]
        for run in bench.results
        if (run.policy, run.workers) == (CONTENDER, workers) and (over := over_stronger(run))
    }

    sizes = sorted(stronger)

    medians = [stronger[size].median for size in sizes]

    def draw(axes: Axes) -> None:
        drawing.categories(axes, [size_name(size) for size in sizes], 12)
        drawing.from_zero(axes, [(gain.bounds or medians)[-1] for gain in stronger.values()], "x")
        for index, size in enumerate(sizes):
            gain = stronger[size]
            shade = "quiet" if not gain.excludes(1) else "blue" if gain.median > 1 else "orange"
            axes.bar(index, gain.median, 0.62, color=DAY[shade])
            if gain.bounds is not None:
                drawing.interval(axes, index, *gain.bounds, LOOKS[-1])
            axes.text(index, 0.12, f"{gain.median:.2f}x", ha="center", color=DAY["back"])
        axes.axhline(1, color=DAY["text"], linewidth=1.3)

    plot = Plot(
        f"Without a lock: {min(medians):.2f} to {max(medians):.2f} times as many updates/s",
        "",
        draw,
        x="elements of the shared parameters",
        y="lock-free over the stronger of locked and ordered; lines: 95 % intervals; grey: may be "
        "noise",
        width=620,
        height=300,
    )
    drawing.save([plot], path, note=f"{counted(workers, 'worker')} on {machine_text(bench)}")


def _looks(runs: Iterable[Run]) -> Looks:
    """The look of each policy: the known ones have their own, others follow in order."""
    known = (CONTENDER, *BASELINES)
    policies = dict.fromkeys(run.policy for run in runs)
    others = [policy for policy in policies if policy not in known]
    free = LOOKS[len(known) :]
    return {
        policy: LOOKS[known.index(policy)]
        if policy in known
        else free[others.index(policy) % len(free)]
        for policy in policies
    }


def _ours(name: str) -> Look:
    """The look of what may be ours, among others."""
    return LOOKS[0 if name.startswith(HOGSTREAM) else 1]


def _by_size(bench: Bench) -> dict[int, list[BenchRun]]:
    sizes: dict[int, list[BenchRun]] = {}
    for run in sorted(bench.results, key=lambda run: run.elements):
        sizes.setdefault(run.elements, []).append(run)
    return sizes


def _with_most_workers(bench: Bench) -> dict[int, list[BenchRun]]:
    return {
        elements: [run for run in runs if run.workers == max(each.workers for each in runs)]
        for elements, runs in _by_size(bench).items()
    }


def _by_policy(runs: list[BenchRun]) -> dict[str, list[BenchRun]]:
    """Runs of each policy, by worker count."""
    policies: dict[str, list[BenchRun]] = {run.policy: [] for run in runs}
    for run in sorted(runs, key=lambda run: run.workers):
        policies[run.policy].append(run)
    return policies


def _top(spread: Spread) -> float:
    return spread.interval[1] if spread.interval else spread.median


def _peaks(runs: list[BenchRun]) -> str:
    said = []
    for policy, mine in _by_policy(runs).items():
        best = max(mine, key=lambda run: run.updates_per_second.median)
        said.append(
            f"{policy} at most {best.updates_per_second.median:,.0f} with "
            f"{counted(best.workers, 'worker')}"
        )
    return f"{'; '.join(said)}."


def _told(value: float | None) -> str:
    return "not measured" if value is None else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
