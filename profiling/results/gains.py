"""What lock-free gains: over the stronger of two baselines, and never over less.

A gain is of several workers. With one there is nobody to wait for: what it wins is pipelining.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hogstream.profiling.results.confidence import Interval
from hogstream.profiling.results.records import Ratio, Spread
from hogstream.profiling.results.schema import Bench, BenchRun, Run, TodayRun, Train, TrainRun

CONTENDER = "lock-free"
#: Who trains beside policies: lock-free with one worker, and plain processes with a lock.
ALONE, BY_HAND = "one alone", "by hand"
BASELINES = ("locked", "ordered")


@dataclass(frozen=True)
class Gain:
    """What a policy gains.

    Attributes:
        over: The stronger baseline: the one that it gains least over.
        ratio: How many times as fast it is.
    """

    over: str
    ratio: Interval


def gains_of(policy: str, speeds: Mapping[str, Spread]) -> dict[str, Ratio]:
    """A policy's updates/s over those of each other policy, in the same rounds.

    Args:
        policy: Its name.
        speeds: Of each policy by name, its own among them.

    Returns:
        By policy; one that stood still in a round is left out.
    """
    gains = {
        other: Ratio.of(speeds[policy].samples, speed.samples)
        for other, speed in speeds.items()
        if other != policy
    }
    return {other: gain for other, gain in gains.items() if gain is not None}


def gain_of(run: BenchRun) -> Gain | None:
    """What a run gains over the stronger baseline.

    Returns:
        None if no baseline took turns with it, if it is of one itself, or of one worker alone.
    """
    if run.workers == 1 or run.policy in BASELINES:
        return None
    gains = [Gain(name, run.gains[name].estimate) for name in BASELINES if name in run.gains]
    return min(gains, key=lambda gain: gain.ratio.median, default=None)


def gains_by_place(runs: Iterable[BenchRun]) -> dict[tuple[int, int], Gain]:
    """What lock-free gains for each (elements, workers) at which a baseline took turns with it."""
    gains = {(run.elements, run.workers): gain_of(run) for run in runs if run.policy == CONTENDER}
    return {place: gain for place, gain in gains.items() if gain is not None}


def stronger_of(runs: Iterable[Run]) -> str:
    """What gains are over, in words: of the baselines that were measured."""
    measured = {run.policy for run in runs}
    names = [name for name in BASELINES if name in measured]
    return names[0] if len(names) == 1 else f"the stronger of {' and '.join(BASELINES)}"


def shares_alone(bench: Bench) -> dict[int, float]:
    """For each size, the share of the update-shaped ceiling that one worker alone moves.

    Its updates follow one another down one lane: what is left is all that overlap can win. The
    ceiling is that of the level of memory that holds the parameters and ``ms``; a size for which
    that was not measured is left out.
    """
    return {
        run.elements: run.share_of_ceilings.bandwidth
        for run in bench.results
        if (run.policy, run.workers) == (CONTENDER, 1)
        and run.share_of_ceilings.bandwidth is not None
    }


def greatest_gain(bench: Bench) -> tuple[BenchRun, Gain] | None:
    """Where lock-free gains most: beyond noise, if anywhere."""
    gains = [
        (run, gain)
        for run in bench.results
        if run.policy == CONTENDER and (gain := gain_of(run)) is not None
    ]
    return max(gains, key=lambda each: (each[1].ratio.low > 1, each[1].ratio.median), default=None)


def fastest_today(bench: Bench, elements: int, workers: int) -> TodayRun | None:
    """The fastest of what people run today with torch, at a place, if it was measured."""
    here = [
        run
        for run in bench.today or ()
        if (run.elements, run.workers) == (elements, workers) and run.update.startswith("torch")
    ]
    return max(here, key=lambda run: run.updates_per_second.median, default=None)


def training_gains(run: TrainRun, runs: Iterable[TrainRun]) -> dict[str, Ratio]:
    """How many times as fast one reached the target as each other that had as many rounds.

    Args:
        run: Whose gains.
        runs: All, itself among them.

    Returns:
        By policy; without those that reached it in no more than half of the rounds.
    """
    if run.partial or not run.mostly_reached:
        return {}
    mine = run.seconds_to_target.samples
    gains = {
        other.policy: Ratio.of(other.seconds_to_target.samples, mine)
        for other in runs
        if other is not run
        and other.mostly_reached
        and not other.partial
        and len(other.reached) == len(mine)
    }
    return {other: gain for other, gain in gains.items() if gain is not None}


def contender_of(train: Train) -> TrainRun:
    """Whose gains are told: lock-free's, or else those of the first policy."""
    return next((run for run in train.results if run.policy == CONTENDER), train.results[0])


def strongest_other(train: Train) -> Gain | None:
    """What the contender gains over the strongest other: the one over which it gains least."""
    mine = contender_of(train).gains
    gains = [
        Gain(run.policy, mine[run.policy].estimate) for run in train.results if run.policy in mine
    ]
    return min(gains, key=lambda gain: gain.ratio.median, default=None)
