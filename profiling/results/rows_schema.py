"""The result file of ``hogstream bench --rows``: updates of some rows of a table."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from hogstream.profiling.results.records import (
    Count,
    Measurement,
    Number,
    Positive,
    PositiveSpread,
    Ratio,
    Record,
    Size,
    Spread,
)


class RowBenchSettings(Record):
    """What ``bench --rows`` was asked for.

    Attributes:
        width: Columns of each table.
        zipf: Exponent of the distribution that workers' rows are drawn from; 0 is uniform.
        rows_per_update: How many rows a worker's update has, some of which may be the same.
        rounds: How many there were.
        seconds: For each policy, worker count and size, over all rounds.
        seed: Of rows and gradients.
    """

    width: Size
    zipf: Number
    rows_per_update: Size
    rounds: Size
    seconds: Positive
    seed: Count


class RowKernel(Record):
    """An update of rows of a table by itself: distinct ones, drawn uniformly.

    Gradients are in cache, as after a backward, as far as it holds them.

    Attributes:
        rows: How many the table has.
        updated_rows: How many the update touches.
        threads: How many it may run on.
        same_rows: Whether each update is of the same rows, which then are in cache; else others
            are updated each time, over all of the table or until the caches are full twice over.
        milliseconds: Of an update.
        over_smallest: How many times as long a row takes as in the smallest table; null of that.
        gigabytes_per_second: 20 bytes an element that is touched, in 1e9 bytes/s.
        ceiling_gigabytes_per_second: Of a loop with the same accesses to the same rows, and almost
            no arithmetic: with prefetches or without, whichever is faster.
        share_of_ceiling: The one over the other.
    """

    rows: Size
    updated_rows: Size
    threads: Size
    same_rows: bool
    milliseconds: PositiveSpread
    over_smallest: Ratio | None
    gigabytes_per_second: PositiveSpread
    ceiling_gigabytes_per_second: PositiveSpread
    share_of_ceiling: Ratio


class RowRun(Record):
    """Updates of rows by workers under a policy, or by one worker alone (lock-free).

    Races are counted in a run of its own.

    Attributes:
        rows: How many the table has.
        same_row: The probability that two draws are of the same row.
        workers: How many workers there were beside each other, also while one was alone.
        policy: What updates waited for; or ``one alone``.
        updates_per_second: Of all workers together.
        staleness: The mean of updates that were looked at; null if none was.
        overlaps: Of an update of a row, how many others landed meanwhile; null if not counted.
        lost_updates_fraction: The share of updates of a row that were overwritten; null likewise.
        gains: How many times as many updates/s there were as of each other, by name.
    """

    rows: Size
    same_row: Number
    workers: Size
    policy: str
    updates_per_second: Spread
    staleness: Number | None
    overlaps: Number | None
    lost_updates_fraction: Number | None
    gains: dict[str, Ratio]


class RowBench(Measurement, kw_only=True, tag="rows"):
    """``hogstream bench --rows``."""

    settings: RowBenchSettings
    kernels: Annotated[list[RowKernel], Meta(min_length=1)]
    results: Annotated[list[RowRun], Meta(min_length=1)]
