"""What lock-free gains over the baselines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hogstream.profiling.results.confidence import Interval
from hogstream.profiling.results.records import Ratio, Spread
from hogstream.profiling.results.schema import Bench, BenchRun, Train, TrainRun

CONTENDER = "lock-free"
BASELINES = ("locked", "ordered")


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


def gains_over(baseline: str, runs: Iterable[BenchRun]) -> dict[tuple[int, int], Interval]:
    """The gain for each (elements, workers) at which lock-free and the baseline were measured.

    Args:
        baseline: Name of the policy to compare with.
        runs: Those of ``hogstream bench``.
    """
    return {
        (run.elements, run.workers): run.gains[baseline].estimate
        for run in runs
        if run.policy == CONTENDER and baseline in run.gains
    }


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


def over_stronger(run: BenchRun | TrainRun) -> tuple[str, Interval] | None:
    """The baseline that a run gains least over, which is the stronger one, and that gain.

    Returns:
        None if no baseline took turns with it.
    """
    gains = {name: run.gains[name].estimate for name in BASELINES if name in run.gains}
    return min(gains.items(), key=lambda each: each[1].median) if gains else None


def greatest_gain(bench: Bench) -> tuple[BenchRun, str, Interval] | None:
    """Where lock-free gains most over the stronger baseline: beyond noise, if anywhere."""
    gains = [
        (run, *over)
        for run in bench.results
        if run.policy == CONTENDER and (over := over_stronger(run))
    ]
    return max(gains, key=lambda each: (each[2].low > 1, each[2].median)) if gains else None


def training_gains_of(policy: str, seconds: Mapping[str, Spread]) -> dict[str, Ratio]:
    """How many times as fast a policy trained as each other one that finished as many rounds.

    Args:
        policy: Its name.
        seconds: Of whole trainings with each policy, by name.

    Returns:
        By policy; nothing if it finished none itself.
    """
    if policy not in seconds:
        return {}
    mine = seconds[policy].samples
    gains = {
        other: Ratio.of(theirs.samples, mine)
        for other, theirs in seconds.items()
        if other != policy and len(theirs.samples) == len(mine)
    }
    return {other: gain for other, gain in gains.items() if gain is not None}


def training_gains(train: Train) -> dict[str, Interval]:
    """How many times as fast lock-free trained as each baseline that was measured."""
    return {
        name: run.gains[name].estimate
        for run in train.results
        if run.policy == CONTENDER
        for name in BASELINES
        if name in run.gains
    }
