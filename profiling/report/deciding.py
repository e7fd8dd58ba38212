"""What a decision rests on, as tables and in words."""

from __future__ import annotations

from hogstream.profiling.report.rows import Table, machine_text, range_text, spread_texts
from hogstream.profiling.results.records import SignedSpread
from hogstream.profiling.results.schema import Decision, UnderLock, Way
from hogstream.profiling.wording import counted, number_text


def tables(decision: Decision) -> list[Table]:
    """Every way, and what would be under a lock."""
    return [_ways(decision), _under_lock(decision)]


def _ways(decision: Decision) -> Table:
    columns = (
        *("way", "updates per s", "95 % interval", "landing us", "staleness mean/max"),
        *("loss", "over a loop's", "95 % interval", "after updates"),
    )
    rows = [
        (
            way.name + (" (use this)" if index == decision.use else ""),
            *spread_texts(way.updates_per_second, 0 if way.updates_per_second.median > 99 else 1),
            number_text(None if way.latency_us is None else way.latency_us.median),
            _staleness(way),
            number_text(None if way.loss is None else way.loss.median, 4),
            *_difference(way.loss_over_loop),
            number_text(way.updates_compared),
        )
        for index, way in enumerate(decision.results)
    ]
    return Table("Ways to train", columns, rows)


def _staleness(way: Way) -> str:
    if way.staleness is None:
        return "-"
    return f"{number_text(way.staleness.median, 1)}/{number_text(way.most_staleness)}"


def _difference(difference: SignedSpread | None) -> tuple[str, str]:
    if difference is None:
        return "-", "-"
    return number_text(difference.median, 4), range_text(difference.estimate, 4)


def _under_lock(decision: Decision) -> Table:
    columns = (
        *("workers", "torch threads", "gradient ms", "95 % interval", "update ms"),
        *("95 % interval", "lock-free gains at most", "95 % interval"),
    )
    rows = [
        (
            str(each.workers),
            str(each.torch_threads),
            *spread_texts(each.gradient_ms, 3),
            *spread_texts(each.update_ms, 4),
            *spread_texts(each.most_gain, 3),
        )
        for each in decision.under_lock
    ]
    return Table("Under a lock", columns, rows)


def said(decision: Decision) -> list[str]:
    """The answer, what bounds lock-free, and how all was compared."""
    return [
        decision.answer,
        *map(_bound, decision.under_lock),
        *_waits(decision),
        (
            f"Measured on {machine_text(decision)}, with {decision.elements:,} parameters. Each "
            f"turn begins with the same parameters. A loss is the mean over the last fifth of a "
            f"turn's updates; it is set against a plain loop's after as many updates. Of ways that "
            f"are not slower by 5 % and beyond noise, the simplest is to be used: a plain loop, "
            f"threads, processes, processes by hand; of each locked, ordered, lock-free."
        ),
        *decision.warnings,
    ]


def _bound(cost: UnderLock) -> str:
    iteration = cost.gradient_ms.median + cost.update_ms.median
    share = 100 * cost.update_ms.median / iteration
    interval = cost.most_gain.estimate
    sure = "" if interval.bounds is None else f" (95 %: {range_text(interval, 3)})"
    return (
        f"With {counted(cost.workers, 'worker')} lock-free could make at most "
        f"{interval.median:.3f} times{sure} the updates/s of locked, by Amdahl's law: of an "
        f"iteration of {iteration:.3g} ms a lock would be held for {cost.update_ms.median:.3g} ms, "
        f"the update ({share:.1f} %)."
    )


def _waits(decision: Decision) -> list[str]:
    """What updates have waited for the lock, where that was measured."""
    waits = [
        f"{_microseconds(way.lock_wait_us)} over {way.run_by} with {way.workers} workers"
        for way in decision.results
        if way.lock_wait_us is not None
    ]
    if not waits:
        return []
    return [
        f"Measured, an update waits for the lock for {'; '.join(waits)}: so much longer do those "
        f"of locked take to land than those of lock-free."
    ]


def _microseconds(wait: SignedSpread) -> str:
    bounds = wait.estimate.bounds
    sure = "" if bounds is None else f" (95 %: {range_text(wait.estimate, 0)})"
    return f"{wait.median:,.0f} us{sure}"
