"""Which way to train is to be used: the simplest of those that are not clearly slower.

Ways from the simplest on: a plain loop; workers over threads, over processes, and processes that
one writes by hand; of each, one worker before several, and ``locked``, whose updates are whole,
before ``ordered``, and that before ``lock-free``, whose updates race.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hogstream.profiling.results.confidence import FEWEST
from hogstream.profiling.results.records import Ratio, SignedSpread
from hogstream.profiling.results.schema import Way
from hogstream.profiling.wording import counted, number_text

#: A gain of less than this is not worth a less simple way, however sure it is.
WORTH = 1.05
_RUN_BY = ("loop", "threads", "processes", "hand")
_POLICIES = (None, "locked", "ordered", "lock-free")


@dataclass(frozen=True)
class Verdict:
    """What to use.

    Attributes:
        use: The way; if all diverged, as if none had.
        next_best: The fastest of the others; None if there is none.
        gain: Updates/s of the way over those of that one; None if there is none.
        over_loop: The same over those of a plain loop; None if it is the loop, or there is none.
    """

    use: Way
    next_best: Way | None
    gain: Ratio | None
    over_loop: Ratio | None


def simplicity(way: Way) -> tuple[int, bool, int, int]:
    """Sorts ways, the simplest first."""
    several = way.workers > 1
    return _RUN_BY.index(way.run_by), several, _POLICIES.index(way.policy), way.workers


def decided(ways: Sequence[Way]) -> Verdict:
    """The simplest of the ways that are not clearly slower than the fastest.

    Clearly slower: by 5 % or more, and beyond noise. If a plain loop is, what takes its place is
    clearly faster than that: of noisy ways not all are which do not differ from the fastest. A way
    that makes more updates/s than a plain loop is out of the question if they come to nothing: if
    its loss after the same time is beyond noise above the loop's. So is what diverges, the loop
    too, unless all do.

    Args:
        ways: At least one.
    """
    finite = [way for way in ways if way.loss is not None] or ways
    loop = next((way for way in finite if way.run_by == "loop"), None)
    learning = [way for way in finite if loop is None or way is loop or _learns(way, loop)]
    fastest = max(learning, key=_speed)
    alike = [way for way in learning if way is fastest or not is_clear(_ratio(fastest, way))]
    if loop is not None and loop not in alike:
        alike = [way for way in alike if way is fastest or is_clear(_ratio(way, loop))]
    use = min(alike, key=simplicity)
    next_best = max((way for way in learning if way is not use), key=_speed, default=None)
    return Verdict(
        use,
        next_best,
        None if next_best is None else _ratio(use, next_best),
        None if loop is None or use is loop else _ratio(use, loop),
    )


def is_clear(ratio: Ratio) -> bool:
    """Whether something is faster than another beyond noise, and by enough to matter."""
    return ratio.estimate.low > 1 and ratio.median >= WORTH


def most_gain(workers: int, under_lock: float) -> float:
    """How many times as fast as with a lock workers can be without it, at most.

    By Amdahl's law: of a worker's iteration a share is under the lock. With it, if it is fair, an
    update waits at worst for one of each other worker; without, for none.

    Args:
        workers: How many.
        under_lock: The share, from 0 to 1.
    """
    return 1 + (workers - 1) * under_lock


def answer(verdict: Verdict) -> str:
    """The verdict in a sentence, with its numbers."""
    way, other = verdict.use, verdict.next_best
    if way.loss is None:
        return (
            "Every way diverged, to a loss that is not finite, so none can be recommended: lower "
            "lr, and look at the data."
        )
    speed = f"{_speed_text(way)} updates/s"
    if way.run_by == "loop":  # whose threads are its owner's to set
        speed += f" with torch on {counted(way.torch_threads, 'thread')}"
    if other is None or verdict.gain is None:
        return f"Use {way.name}, which makes {speed}: there is nothing to compare it with."
    over_loop = [] if verdict.over_loop is None else [f"{times(verdict.over_loop)} a plain loop's"]
    if len(way.updates_per_second.samples) < FEWEST:
        rounds = len(way.updates_per_second.samples)
        return (
            f"{rounds} of {FEWEST} rounds tell nothing for sure: until then use {way.name}, which "
            f"is the simplest and makes {speed}; the fastest of the others, {other.name}, makes "
            f"{_speed_text(other)}."
        )
    if not is_clear(verdict.gain):
        said = "It makes no difference here: use" if way.run_by == "loop" else "Use"
        facts = [f"{way.name}, at {speed}", *over_loop, *_costs(way)]
        simpler = ", and it is less simple" if simplicity(other) > simplicity(way) else ""
        return (
            f"{said} {', '.join(facts)}; the fastest of the others, {other.name}, makes "
            f"{times(_ratio(other, way))} as many, which is no clear difference{simpler}."
        )
    gains = [speed, f"{times(verdict.gain)} those of the next best, {other.name}"]
    if other.run_by != "loop":
        gains += over_loop
    return f"Use {', '.join([f'{way.name}: it makes {gains[0]}', *gains[1:], *_costs(way)])}."


def times(ratio: Ratio) -> str:
    """A ratio in words, with its interval."""
    if ratio.interval is None:
        return f"{ratio.median:.2f} times"
    low, high = ratio.interval
    return f"{ratio.median:.2f} times (95 %: {low:.2f} to {high:.2f})"


def difference_text(difference: SignedSpread) -> str:
    """A difference of losses in words: how sure it is, too."""
    estimate = difference.estimate
    more = "higher" if estimate.median >= 0 else "lower"
    said = f"{_digits(abs(estimate.median))} {more}"
    if estimate.bounds is None:
        return said
    sure = "" if estimate.excludes(0) else ", which may be noise"
    return f"{said} (95 %: {_digits(estimate.low)} to {_digits(estimate.high)}{sure})"


def _costs(way: Way) -> list[str]:
    """Staleness, and loss after as many updates; nothing of a plain loop."""
    said = []
    if way.staleness is not None and way.workers > 1:
        most = number_text(way.most_staleness)
        said.append(f"with a staleness of {way.staleness.median:.1f} on average and {most} at most")
    if way.loss_over_loop is not None:
        updates = number_text(way.updates_compared)
        said.append(
            f"and after the same {updates} updates a loss that is "
            f"{difference_text(way.loss_over_loop)} than a plain loop's"
        )
    return said


def _learns(way: Way, loop: Way) -> bool:
    """Whether more updates than a plain loop's are worth as much."""
    difference = way.loss_over_loop_in_time
    return difference is None or _speed(way) <= _speed(loop) or not difference.estimate.low > 0


def _speed(way: Way) -> float:
    return way.updates_per_second.median


def _speed_text(way: Way) -> str:
    return number_text(_speed(way), 0 if _speed(way) >= 100 else 1)


def _ratio(way: Way, other: Way) -> Ratio:
    ratio = Ratio.of(way.updates_per_second.samples, other.updates_per_second.samples)
    assert ratio is not None  # as neither is ever 0
    return ratio


def _digits(value: float) -> str:
    return f"{value:.3g}"
