"""All that is drawn of results, in groups, each with a text that says what to look at."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes

from hogstream.profiling.measure.peers import HOGSTREAM
from hogstream.profiling.report import bench_plots, ceiling_plots, charts, drawing, training_plots
from hogstream.profiling.report.charts import Reach
from hogstream.profiling.report.drawing import DAY, LOOKS, Group, Looks, Plot
from hogstream.profiling.report.rows import (
    machine_text,
    results_by_shape,
    target_text,
    worker_counts,
)
from hogstream.profiling.results.diff import UNKNOWN, Diff
from hogstream.profiling.results.gains import gains_by_place, stronger_of
from hogstream.profiling.results.schema import Bench, Compare, Run, Train
from hogstream.profiling.wording import counted, size_name
from hogstream.scheduler.policies import POLICIES

_DRAWN_CHANGES, _CHANGES = 36, 12  # of a diff, and of a plot of it; its table holds all


def of_bench(bench: Bench) -> list[Group]:
    """All that is drawn of a bench."""
    looks = _looks(bench.results)
    groups = [
        Group(
            "throughput",
            "Updates per second",
            "Medians over rounds in which the policies took turns; bars are 95 % bootstrap "
            "intervals.",
            bench_plots.throughput(bench, looks),
            looks,
        ),
        Group(
            "gain",
            "Gain",
            "Lock-free's updates/s over those of the stronger of locked and ordered, with several "
            "workers: one alone waits for nobody. Blue is a gain, orange a loss; grey and in "
            "parentheses, it may be noise: the 95 % interval holds 1x.",
            bench_plots.gains(bench),
            {},
        ),
        Group(
            "latency",
            "Latency",
            "From submission to landing, all waits included, with the most workers. Each nine of "
            "the percentiles has the same room, so the tail shows.",
            bench_plots.latency(bench, looks),
            looks,
        ),
        Group(
            "staleness",
            "Staleness",
            "How many updates landed between a worker's read of the parameters and the landing of "
            "the update made from it, with the most workers.",
            bench_plots.staleness(bench, looks),
            looks,
        ),
        Group(
            "roofline",
            "Roofline",
            "Arithmetic per byte against arithmetic per second: an update does "
            f"{ceiling_plots.OPERATIONS} operations an element, and can be no faster than the "
            "level of memory that holds it (dashed: what an update's traffic reaches there). "
            "Each policy with its best worker count.",
            ceiling_plots.rooflines(bench, looks),
            looks,
        ),
        ceiling_plots.kernels(bench),
    ]
    return [group for group in groups if group.plots]


def of_train(train: Train) -> Group:
    """Loss and metric against time."""
    looks = _looks(train.results)
    return Group(
        "training",
        f"Training: {train.settings.workload}",
        "The first round, until the target or the end of each training.",
        [*training_plots.losses(train, looks), *training_plots.metrics(train, looks)],
        looks,
    )


def of_compare(compare: Compare) -> list[Group]:
    """What each optimizer moves at each shape, and a roofline at the largest one."""
    shapes = results_by_shape(compare)
    groups = [
        Group(
            "optimizers",
            "Optimizers",
            "What each moves in a step after a backward, counted as the least traffic that it "
            "needs; lines are 95 % bootstrap intervals. Dashed: the update-shaped ceiling, which "
            "took turns with them in a loop.",
            [plot for results in shapes.values() for plot in ceiling_plots.optimizers(results)],
            {},
        ),
        Group(
            "optimizer-roofline",
            "Optimizers: roofline",
            "At the largest shape: arithmetic per byte against arithmetic per second, under what "
            "memory can do.",
            ceiling_plots.optimizer_roofline(shapes),
            {"hogstream": ceiling_plots.our_look(HOGSTREAM), "others": ceiling_plots.our_look("")},
        ),
    ]
    return [group for group in groups if group.plots]


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
        plots.append(charts.forest(text, axis, part, around))
    hint = "Right of the dashed line the second run is faster. Hollow dots: no change beyond noise."
    return Group(f"changes-{diff.kind}", "", hint, plots, {})


# Pictures in files of their own.


def write_gains(bench: Bench, path: Path) -> None:
    """Saves what lock-free gains at each size and worker count; the suffix says the format."""
    note = f"updates/s over those of {stronger_of(bench.results)}; "
    note += "grey, in parentheses: the difference may be noise (the 95 % interval holds 1x)"
    drawing.save(bench_plots.gains(bench), path, note=note)


def write_training(train: Train, path: Path) -> None:
    """Saves loss and metric against time; the suffix says the format."""
    group = of_train(train)
    named = {training_plots.reached_text(run): group.looks[run.policy] for run in train.results}
    note = f"medians to {target_text(train)}, on {machine_text(train)}"
    drawing.save(group.plots, path, looks=named, note=note)


def write_compare(compare: Compare, path: Path) -> None:
    """Saves what each optimizer moves, and a roofline; the suffix says the format."""
    plots = [plot for group in of_compare(compare) for plot in group.plots]
    note = "dashed: the update-shaped ceiling; lines: 95 % intervals"
    drawing.save(plots, path, columns=3, note=note)


def write_gain(bench: Bench, path: Path) -> None:
    """Saves what lock-free gains, with the most workers.

    Args:
        bench: Best of many sizes.
        path: Where to; the suffix says the format.
    """
    workers = max(worker_counts(bench))
    stronger = {
        elements: gain.ratio
        for (elements, count), gain in gains_by_place(bench.results).items()
        if count == workers
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
    """The look of each policy: those with a name have their own, bounds follow in order."""
    known = tuple(POLICIES)
    policies = dict.fromkeys(run.policy for run in runs)
    others = [policy for policy in policies if policy not in known]
    absent = [index for index, policy in enumerate(known) if policy not in policies]
    free = [*LOOKS[len(known) :], *(LOOKS[index] for index in absent)]
    return {
        policy: LOOKS[known.index(policy)]
        if policy in known
        else free[others.index(policy) % len(free)]
        for policy in policies
    }
