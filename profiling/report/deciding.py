"""What a decision rests on, as tables and in words."""

from __future__ import annotations

from hogstream.profiling.report.rows import Table, machine_text, range_text, spread_texts
from hogstream.profiling.results.confidence import Interval
from hogstream.profiling.results.records import SignedSpread
from hogstream.profiling.results.schema import Decision, UnderLock, Way
from hogstream.profiling.wording import counted, number_text


def tables(decision: Decision) -> list[Table]:
    """How fast each way is, how it learns, and what would be under a lock."""
    return [_speeds(decision), _losses(decision), _under_lock(decision)]


def _speeds(decision: Decision) -> Table:
    columns = (
        *(*_PLACE, "torch threads", "updates per s", "95 % interval"),
        *("landing us", "staleness mean/max"),
    )
    rows = [
        (
            *_place(way),
            str(way.torch_threads),
            *spread_texts(way.updates_per_second, 0 if way.updates_per_second.median > 99 else 1),
            number_text(None if way.latency_us is None else way.latency_us.median),
            _staleness(way),
        )
        for way in decision.results
    ]
    return Table("Ways to train", columns, rows, len(_PLACE))


def _losses(decision: Decision) -> Table:
    columns = (*_PLACE, "after updates", "loss", "over a loop's", "95 % interval")
    rows = [
        (
            *_place(way),
            number_text(way.updates_compared),
            number_text(None if way.loss is None else way.loss.median, 4),
            *_difference(way.loss_over_loop),
        )
        for way in decision.results
    ]
    return Table("Loss after as many updates", columns, rows, len(_PLACE))


_PLACE = ("run by", "policy", "workers")


def _place(way: Way) -> tuple[str, str, str]:
    run_by = {"loop": "a plain loop", "hand": "by hand"}.get(way.run_by, way.run_by)
    return run_by, "-" if way.workers == 1 else str(way.policy), str(way.workers)


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
        *("workers", "torch threads", "gradient ms", "update ms"),
        *("lock-free gains at most", "95 % interval"),
    )
    rows = [
        (
            str(each.workers),
            str(each.torch_threads),
            number_text(each.gradient_ms.median, 3),
            number_text(each.update_ms.median, 4),
            *spread_texts(each.most_gain, 3),
        )
        for each in decision.under_lock
    ]
    return Table("What would be under a lock", columns, rows, 0)


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
    gradient, update, gain = (
        each.estimate for each in (cost.gradient_ms, cost.update_ms, cost.most_gain)
    )
    share = 100 * update.median / (gradient.median + update.median)
    return (
        f"With {counted(cost.workers, 'worker')} lock-free could make at most "
        f"{_estimate(gain, 3, ' times')} the updates/s of locked, if the lock itself cost nothing, "
        f"by Amdahl's law: it would be held for an update, {_estimate(update, 4, ' ms')}, which is "
        f"{share:.1f} % of an iteration with its gradient, {_estimate(gradient, 3, ' ms')}."
    )


def _waits(decision: Decision) -> list[str]:
    """What updates have waited for the lock, where that was measured."""
    waits = [
        f"{_estimate(way.lock_wait_us.estimate, 0, ' us')} over {way.run_by} with {way.workers} "
        f"workers{'' if way.lock_wait_us.estimate.excludes(0) else ', which may be noise'}"
        for way in decision.results
        if way.lock_wait_us is not None
    ]
    if not waits:
        return []
    return [
        f"By so much longer than those of lock-free did updates of locked take to land, as they "
        f"waited for the lock: {'; '.join(waits)}."
    ]


def _estimate(interval: Interval, digits: int, unit: str) -> str:
    said = f"{interval.median:,.{digits}f}{unit}"
    return said if interval.bounds is None else f"{said} (95 %: {range_text(interval, digits)})"
