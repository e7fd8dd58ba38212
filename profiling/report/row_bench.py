"""What updates of rows of tables came to, as tables and in words."""

from __future__ import annotations

from hogstream.profiling.report.rows import (
    Row,
    Table,
    gain_text,
    lost_text,
    machine_text,
    range_text,
    share_text,
    spread_texts,
)
from hogstream.profiling.results.gains import CONTENDER, Gain
from hogstream.profiling.results.rows_schema import RowBench, RowRun
from hogstream.profiling.wording import counted, number_text, size_name


def kernels(result: RowBench) -> Table:
    """What an update of rows takes by itself, and how much of what memory can do that is."""
    columns = (
        *("rows", "threads", "updated", "ms", "95 % interval", "growth", "GB/s", "ceiling"),
        "share",
    )
    rows = [
        (
            size_name(kernel.rows),
            str(kernel.threads),
            "the same" if kernel.same_rows else "others",
            *spread_texts(kernel.milliseconds, 3),
            "-" if kernel.over_smallest is None else f"{kernel.over_smallest.median:.2f}x",
            number_text(kernel.gigabytes_per_second.median, 1),
            number_text(kernel.ceiling_gigabytes_per_second.median, 1),
            share_text(kernel.share_of_ceiling.median),
        )
        for kernel in result.kernels
    ]
    updated = {kernel.updated_rows for kernel in result.kernels}
    fewer = ", or of all that there are" if len(updated) > 1 else ""
    return Table(f"An update of {max(updated):,} rows{fewer}", columns, rows, 3, 1)


def policies(result: RowBench) -> Table:
    """What workers did under each policy, what lock-free gains over it, and what it costs.

    A gain that may be noise is in parentheses.
    """
    columns = (
        *("rows", "workers", "policy", "updates per s", "gain over it"),
        *("staleness", "overlaps", "lost"),
    )
    contenders = {(run.rows, run.workers): run for run in result.results if run.policy == CONTENDER}
    rows = [_policy_row(run, contenders.get((run.rows, run.workers))) for run in result.results]
    return Table("Updates of rows by workers", columns, rows, 3, 2)


def _policy_row(run: RowRun, contender: RowRun | None) -> Row:
    gain = None if contender is None else contender.gains.get(run.policy)
    return (
        *(size_name(run.rows), str(run.workers), run.policy),
        number_text(run.updates_per_second.median),
        gain_text(None if gain is None else Gain(run.policy, gain.estimate)),
        number_text(run.staleness, 1),
        number_text(run.overlaps, 4),
        lost_text(run.lost_updates_fraction),
    )


def said(result: RowBench) -> list[str]:
    """Whether cost follows the rows or the table, what lock-free gains, and how it was measured."""
    settings = result.settings
    rows_of = "uniformly" if settings.zipf == 0 else f"by Zipf, exponent {settings.zipf:g}"
    return [
        *_growths(result),
        *(_gains(run) for run in result.results if _tells_gains(run)),
        _meetings(result),
        f"Measured on {machine_text(result)}: tables of {counted(settings.width, 'column')} in "
        f"float32; workers' updates are of {counted(settings.rows_per_update, 'row')}, drawn "
        f"{rows_of}.",
        *result.warnings,
    ]


def _growths(result: RowBench) -> list[str]:
    """How much longer a row takes in the largest table than in the smallest."""
    least, most = (pick(kernel.rows for kernel in result.kernels) for pick in (min, max))
    return [
        f"A row takes {ratio.median:.2f} times as long in {size_name(most)} as in "
        f"{size_name(least)} (95 %: {range_text(ratio.estimate, 2)}), if "
        f"{'the same rows are' if kernel.same_rows else 'other rows are'} updated each time, on "
        f"{counted(kernel.threads, 'thread')}."
        for kernel in result.kernels
        if kernel.rows == most and (ratio := kernel.over_smallest) is not None
    ]


def _tells_gains(run: RowRun) -> bool:
    """Whether it is lock-free, of several workers, which have somebody to wait for."""
    return run.policy == CONTENDER and run.workers > 1 and bool(run.gains)


def _gains(run: RowRun) -> str:
    gains = ", ".join(
        f"{gain.median:.2f} times as fast as {name} (95 %: {range_text(gain.estimate, 2)})"
        for name, gain in run.gains.items()
    )
    workers = counted(run.workers, "worker")
    return f"In {size_name(run.rows)} rows with {workers} lock-free is {gains}."


def _meetings(result: RowBench) -> str:
    """How often two draws are of the same row, and what overlaps are."""
    chances = {run.rows: run.same_row for run in result.results}
    told = ", ".join(f"{chance:.1e} of {size_name(rows)}" for rows, chance in chances.items())
    return (
        f"Two draws are of the same row with a probability of {told}. Overlaps, how many others "
        f"of its row landed during an update, and lost updates were counted in a run of its own."
    )
