"""Results as tables: columns and rows of text, for the console, the page and the docs alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hogstream.profiling.results.confidence import Interval
from hogstream.profiling.results.diff import UNKNOWN, Change, Diff, described
from hogstream.profiling.results.files import Reported
from hogstream.profiling.results.gains import (
    Gain,
    contender_of,
    gain_of,
    gains_by_place,
    shares_alone,
    stronger_of,
)
from hogstream.profiling.results.records import Ceilings, Measurement, Ratio, Spread
from hogstream.profiling.results.schema import (
    Bench,
    BenchRun,
    Compare,
    PeerTime,
    Run,
    TodayRun,
    Train,
    TrainRun,
)
from hogstream.profiling.wording import counted, number_text, rounded_text, size_name

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        title: Above them.
        columns: Names of the columns.
        rows: A text for each column.
        text_columns: How many of the first hold words; the others hold numbers.
        grouped_by: How many of the first are alike in rows that belong together.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    text_columns: int = 1
    grouped_by: int = 0


def results(bench: Bench, *, intervals: bool = False) -> list[Table]:
    """All results of a bench, and what races there were, if they were counted.

    Args:
        bench: What was measured.
        intervals: Whether those of updates/s have a column, for which a terminal is too narrow.
    """
    columns = (
        *("elements", "workers", "policy", "updates per s", "95 % interval", "GB/s"),
        *("p50 ms", "p99 ms", "staleness mean/max", "gain", "over"),
    )
    lines = [columns, *(_result_row(run) for run in bench.results)]
    if not intervals:
        lines = [(*line[:4], *line[5:]) for line in lines]
    tables = [Table("Updates", lines[0], lines[1:], 3, 2)]
    return [*tables, *filter(None, [today(bench, intervals=intervals), races(bench)])]


def _result_row(run: BenchRun) -> Row:
    latency = run.latency_us
    return (
        *_where(run),
        *spread_texts(run.updates_per_second, 0),
        _brief(run.gigabytes_per_second, 1),
        *("-" if us is None else _milliseconds(us / 1000) for us in (latency.p50, latency.p99)),
        _staleness(run),
        *_gain_texts(gain_of(run)),
    )


def today(bench: Bench, *, intervals: bool = False) -> Table | None:
    """What people run today, if it was measured, and how many times as fast lock-free is.

    Args:
        bench: What was measured.
        intervals: Whether there are columns for them, for which a terminal is too narrow.
    """
    columns = (
        *("elements", "workers", "workers are", "update", "updates per s", "95 % interval"),
        *("lock-free over it", "95 % interval"),
    )
    lines = [columns, *(_today_row(run) for run in bench.today or ())]
    if not intervals:
        lines = [(*line[:5], line[6]) for line in lines]
    return Table("What people run today", lines[0], lines[1:], 4, 2) if bench.today else None


def _today_row(run: TodayRun) -> Row:
    ratio = run.lock_free_ratio
    return (
        *(size_name(run.elements), str(run.workers)),
        run.spread_over + (", with a lock" if run.lock else ""),
        run.update,
        *spread_texts(run.updates_per_second, 0),
        *(("-", "-") if ratio is None else _estimate_texts(ratio.estimate, 2, "x")),
    )


def races(bench: Bench) -> Table | None:
    """What going without a lock cost, if lost updates were counted."""
    columns = (
        *("elements", "workers", "policy", "updates per s", "lost", "overwrites per update"),
        *("staleness mean/max", "p50", "p99"),
    )
    rows = [
        (
            *_where(run),
            number_text(run.updates_per_second.median),
            lost_text(run.lost_updates_fraction),
            number_text(run.overwrites_per_update, 4),
            _staleness(run),
            *(number_text(each) for each in (run.staleness.p50, run.staleness.p99)),
        )
        for run in bench.results
        if run.lost_updates_fraction is not None
    ]
    return Table("Races", columns, rows, 3, 2) if rows else None


def gains(bench: Bench) -> list[Table]:
    """Lock-free's gain, if a baseline was measured: a row a size, a column a worker count."""
    grid, alone = gains_by_place(bench.results), shares_alone(bench)
    counts = sorted({workers for _, workers in grid})
    columns = ("elements", *(counted(count, "worker") for count in counts), ONE_ALONE)
    rows = [
        (
            size_name(elements),
            *(gain_text(grid.get((elements, count))) for count in counts),
            share_text(alone.get(elements)),
        )
        for elements in sorted({elements for elements, _ in grid})
    ]
    title = f"Lock-free over {stronger_of(bench.results)}"
    return [Table(title, columns, rows)] if rows else []


#: What one update alone moves, as one worker's updates follow one another down one lane.
ONE_ALONE = "one alone, of ceiling"


def sizes(bench: Bench) -> Table:
    """The fastest at each size."""
    columns = (
        *("elements", "fastest policy", "workers", "updates per s"),
        *("gain", "over", "95 % interval"),
        *("staleness mean", "staleness max", "lost"),
    )
    rows = []
    for run in fastest(bench):
        gain = gain_of(run)
        rows.append(
            (
                size_name(run.elements),
                run.policy,
                str(run.workers),
                number_text(run.updates_per_second.median),
                *_gain_texts(gain),
                "-" if gain is None else range_text(gain.ratio, 2),
                number_text(run.staleness.mean, 1),
                number_text(run.staleness.max),
                lost_text(run.lost_updates_fraction),
            )
        )
    return Table("The fastest at each size", columns, rows, 2)


def kernels(bench: Bench) -> Table:
    """The kernels alone."""
    columns = ("kernel", "elements", "ms", "95 % interval", "GB/s", "differing bits")
    rows = [
        (
            kernel.name,
            size_name(kernel.elements),
            *spread_texts(kernel.milliseconds, 3),
            number_text(kernel.gigabytes_per_second, 1),
            number_text(kernel.differing_bits),
        )
        for kernel in bench.kernels
    ]
    return Table("Kernels alone", columns, rows)


def training(train: Train) -> Table:
    """When each who trained reached the target."""
    columns = (
        *("who", "workers", "reached", "seconds to target", "95 % interval", "updates to target"),
        *("updates per s", "staleness mean/max", "lost", "gain over it"),
    )
    mine = contender_of(train)
    rows = [_training_row(run, mine) for run in train.results]
    title = f"{train.settings.workload}, to {target_text(train)}"
    return _of_what_is_told(Table(title, columns, rows))


def _training_row(run: TrainRun, mine: TrainRun) -> Row:
    gain = mine.gains.get(run.policy)
    return (
        run.policy,
        str(run.workers),
        f"{sum(run.reached)} of {len(run.reached)}",
        *_to_target_texts(run, run.seconds_to_target, 2),
        _to_target_texts(run, run.updates_to_target, 0)[0],
        number_text(run.updates_per_second.median),
        "-" if run.staleness.mean is None else _staleness(run),
        lost_text(run.lost_updates_fraction),
        gain_text(None if gain is None else Gain(run.policy, gain.estimate)),
    )


def _to_target_texts(run: TrainRun, spread: Spread, digits: int) -> tuple[str, str]:
    """Median and interval of what it took; a bound, if most rounds did not get there."""
    if run.mostly_reached:
        return spread_texts(spread, digits)
    return f">{number_text(spread.median, digits)}", "-"


def target_text(train: Train) -> str:
    """What was to be reached, such as ``test accuracy 0.97``."""
    settings = train.settings
    beyond = "" if settings.higher_is_better else " or less"
    return f"{settings.metric} {settings.target:g}{beyond}"


def levels(ceilings: Ceilings) -> Table:
    """The bandwidth of each level of memory."""
    columns = (
        *("memory", "KiB used", "threads", "copy GB/s", "95 % interval"),
        *("update-shaped GB/s", "95 % interval"),
    )
    rows = [
        (
            level.level,
            number_text(level.bytes / 1024),
            number_text(level.threads),
            *spread_texts(level.copy_gigabytes_per_second, 1),
            *spread_texts(level.update_shaped_gigabytes_per_second, 1),
        )
        for level in ceilings.levels
    ]
    return Table("Memory", columns, rows)


def rates(ceilings: Ceilings) -> Table:
    """What the host can do."""
    rows = [
        ("launches down a lane", *spread_texts(ceilings.launches_per_second, 0)),
        ("turns of the event loop", *spread_texts(ceilings.event_loop_turns_per_second, 0)),
    ]
    return Table("Host", ("of the host", "per second", "95 % interval"), rows)


def peers(compare: Compare) -> Table:
    """All optimizers at all shapes."""
    rows = [(result.shape, *_peer_row(result)) for result in compare.results]
    return _of_what_is_told(Table("Optimizers", ("shape", *_PEER_COLUMNS), rows, 2, 1))


def peers_by_shape(compare: Compare) -> list[Table]:
    """A table of optimizers for each shape, then what was skipped."""
    tables = []
    for shape, results in results_by_shape(compare).items():
        title = (
            f"{shape}: {counted(results[0].tensors, 'tensor')}, {results[0].elements:,} elements"
        )
        table = Table(title, _PEER_COLUMNS, [_peer_row(result) for result in results])
        tables.append(_of_what_is_told(table))
    return [*tables, *filter(None, [skipped(compare)])]


_PEER_COLUMNS = (
    *("optimizer", "step ms", "95 % interval", "ratio"),
    *("iteration ms", "its ratio"),
    *("GB/s", "of ceiling", "launches", "host us"),
)


def _peer_row(result: PeerTime) -> Row:
    times, iterations = result.milliseconds, result.iteration_milliseconds
    ends = " to ".join(_milliseconds(end) for end in times.interval or ()) or "-"
    return (
        result.peer,
        _milliseconds(times.median),
        ends,
        _ratio_text(result.time_against_hogstream),
        "-" if iterations is None else _milliseconds(iterations.median),
        _ratio_text(result.iteration_against_hogstream),
        number_text(result.gigabytes_per_second, 1),
        share_text(result.share_of_ceiling),
        number_text(result.launches),
        number_text(result.host_us),
    )


def _ratio_text(ratio: Ratio | None) -> str:
    return number_text(None if ratio is None else ratio.median, 2, "x")


def _of_what_is_told(table: Table) -> Table:
    """The same without columns in which nothing stands, such as those of a GPU on a CPU."""
    told = [
        index
        for index in range(len(table.columns))
        if not table.rows or any(row[index] != "-" for row in table.rows)
    ]
    return replace(
        table,
        columns=tuple(table.columns[index] for index in told),
        rows=[tuple(row[index] for index in told) for row in table.rows],
    )


def results_by_shape(compare: Compare) -> dict[str, list[PeerTime]]:
    """The results of ``compare``, in order."""
    shapes: dict[str, list[PeerTime]] = {}
    for result in compare.results:
        shapes.setdefault(result.shape, []).append(result)
    return shapes


def skipped(compare: Compare) -> Table | None:
    """Which optimizers did not run, at which shapes, and why: a row for each reason."""
    shapes: dict[tuple[str, str], list[str]] = {}
    for entry in compare.skipped:
        shapes.setdefault((entry.peer, entry.reason), []).append(entry.shape)
    rows = [
        (peer, "every shape" if where == compare.settings.shapes else ", ".join(where), reason)
        for (peer, reason), where in shapes.items()
    ]
    return Table("Skipped", ("optimizer", "shapes", "why"), rows, 3) if rows else None


def changes(diff: Diff) -> Table:
    """What one run is against another."""
    columns = (
        *("what", "first", "second", "unit"),
        *("second over first", "interval from", "to", "verdict"),
    )
    return Table("Changes", columns, [_change_row(change) for change in diff.changes])


def _change_row(change: Change) -> Row:
    speed, sure = change.speed, change.verdict != UNKNOWN
    ratio = change.second.value / change.first.value if change.first.value else None
    if change.first.unit == "ms":  # less is faster
        ratio = None if not ratio else 1 / ratio
    return (
        change.name,
        rounded_text(change.first.value),
        rounded_text(change.second.value),
        change.first.unit,
        number_text(ratio if speed is None else speed.median, 3, "x"),
        f"{speed.low:.3f}x" if speed and sure else "-",
        f"{speed.high:.3f}x" if speed and sure else "-",
        change.verdict,
    )


def around_changes(diff: Diff) -> list[Table]:
    """What else sets two runs apart: environment, settings, ceilings, and what only one has."""
    what = ("what", "first", "second")
    only = [(name, "first") for name in diff.only_first]
    only += [(name, "second") for name in diff.only_second]
    tables = [
        Table("What differs in environment and settings", what, diff.differences, 3),
        Table("Ceilings of the two runs", (*what, "second over first"), diff.ceilings),
        Table("Measured in one run only", ("what", "run"), only, 2),
    ]
    return [table for table in tables if table.rows]


def origin(result: Reported) -> Table:
    """Where a result comes from: environment and settings."""
    rows = list(described(result).items())
    return Table("Environment and settings", ("what", "value"), rows, 2)


def machine_text(result: Measurement) -> str:
    """What it was measured on."""
    where = result.environment
    cores = counted(where.cores, "core")
    return f"{where.device_name} ({where.device}, {cores}), {where.backend} backend"


def fastest(bench: Bench) -> list[BenchRun]:
    """The fastest of all policies and worker counts at each size, from the smallest on."""
    best: dict[int, BenchRun] = {}
    for run in sorted(bench.results, key=lambda run: run.elements):
        before = best.get(run.elements)
        if before is None or run.updates_per_second.median > before.updates_per_second.median:
            best[run.elements] = run
    return list(best.values())


def runs_by_size(bench: Bench) -> dict[int, list[BenchRun]]:
    """The runs at each size, from the smallest on."""
    sizes: dict[int, list[BenchRun]] = {}
    for run in sorted(bench.results, key=lambda run: run.elements):
        sizes.setdefault(run.elements, []).append(run)
    return sizes


def runs_by_policy(runs: list[BenchRun]) -> dict[str, list[BenchRun]]:
    """Runs of each policy, by worker count."""
    policies: dict[str, list[BenchRun]] = {run.policy: [] for run in runs}
    for run in sorted(runs, key=lambda run: run.workers):
        policies[run.policy].append(run)
    return policies


def worker_counts(bench: Bench) -> list[int]:
    """How many workers there were, rising."""
    return sorted({run.workers for run in bench.results})


def spread_texts(spread: Spread | None, digits: int) -> tuple[str, str]:
    """Median and interval; dashes for what was not measured."""
    return ("-", "-") if spread is None else _estimate_texts(spread.estimate, digits)


def _estimate_texts(estimate: Interval, digits: int, unit: str = "") -> tuple[str, str]:
    return number_text(estimate.median, digits, unit), range_text(estimate, digits)


def range_text(interval: Interval, digits: int) -> str:
    """The ends of an interval; a dash if it is without bounds."""
    if interval.bounds is None:
        return "-"
    return f"{interval.low:,.{digits}f} to {interval.high:,.{digits}f}"


def gain_text(gain: Gain | None) -> str:
    """A gain, in parentheses if it may be noise, or a dash."""
    if gain is None:
        return "-"
    told = f"{gain.ratio.median:.2f}x"
    return told if gain.ratio.excludes(1) else f"({told})"


def _gain_texts(gain: Gain | None) -> Row:
    """A gain, and over what."""
    return ("-", "-") if gain is None else (_brief(gain.ratio.median, 2, "x"), gain.over)


def share_text(share: float | None) -> str:
    """A share as per cent, never 0 if there is some, or a dash."""
    if share and share < 0.005:
        return "<1 %"
    return number_text(None if share is None else 100 * share, 0, " %")


def lost_text(share: float | None) -> str:
    """A share of lost updates as per cent; never 0 if there were any."""
    return "<0.01 %" if share and share < 1e-4 else number_text(share and 100 * share, 2, " %")


def _where(run: BenchRun) -> Row:
    return size_name(run.elements), str(run.workers), run.policy


def _staleness(run: Run) -> str:
    return f"{_brief(run.staleness.mean, 1)}/{number_text(run.staleness.max)}"


def _brief(value: float | None, digits: int, unit: str = "") -> str:
    """A number without a fraction from 100 on, so that a table of many columns fits a terminal."""
    return number_text(value, 0 if value is not None and value >= 100 else digits, unit)


def _milliseconds(value: float) -> str:
    """Milliseconds in three digits or more."""
    return number_text(value, 3 if value < 10 else 1 if value < 100 else 0)
