"""Trainings of a workload in rounds, in which all who train take turns, and what they come to."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hogstream.profiling.capture import captured
from hogstream.profiling.ceilings.machine import ceiling_warnings, machine_ceilings, raise_by_runs
from hogstream.profiling.environment import describe_environment
from hogstream.profiling.interruption import gather_until_interrupted
from hogstream.profiling.measure.runs import run_of, scheduling_of
from hogstream.profiling.results import schema
from hogstream.profiling.results.confidence import spread_warnings
from hogstream.profiling.results.gains import training_gains
from hogstream.profiling.results.records import MOST, Ceilings, PositiveSpread, SignedSpread
from hogstream.profiling.results.schema import Shares, Train, TrainRun
from hogstream.profiling.turns import in_turn
from hogstream.scheduler import SchedulerSettings, Timeline
from hogstream.workloads.training import (
    TORCH,
    Contender,
    Limit,
    Outcome,
    Training,
    contenders,
)
from hogstream.workloads.workload import Workload

_POINTS = 200  # of a curve in a result, at most

Outcomes = list[Outcome]


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        device: Where.
        backend: Which kernels.
        policies: Names of policies.
        beside: Whether one worker alone and the training by hand take turns with them.
        processes: How many the workers are spread over.
        limit: When a training that has not reached the target is given up.
        rounds: How many times each trains.
        seed: Of all random input, which is other in each round.
        scheduling: How the scheduler runs, but for the policy; its workers are of each process.
    """

    device: torch.device
    backend: str
    policies: Sequence[str]
    beside: bool
    processes: int
    limit: Limit
    rounds: int
    seed: int
    scheduling: SchedulerSettings

    def contenders(self, workload: Workload) -> list[Contender]:
        """Who trains a workload."""
        return contenders(
            workload, self.scheduling, self.policies, self.processes, beside=self.beside
        )


def train(
    workload: Workload,
    settings: TrainSettings,
    command: str,
    on_step: Callable[[str], object],
    timeline: Timeline | None = None,
    make_training: Callable[..., Training] = Training,
) -> Train:
    """Trains a new model with each who trains in turn, for some rounds, to the target.

    Args:
        workload: What is trained.
        settings: How.
        command: The command line that repeats it.
        on_step: Called before each training with what is to be done.
        timeline: Takes all of it down.
        make_training: Makes a training, as ``Training`` is made: of others than it knows.

    Returns:
        The result. Cut short, it is partial: whole trainings are given, or, of who has none yet,
        the one under way as far as it went.

    Raises:
        KeyboardInterrupt: If interrupted before the first update.
        MeasurementError: If workers failed before the first update, or the workload itself.
    """
    ceilings = machine_ceilings(settings.device)
    with captured(settings.device):
        rounds, end = gather_until_interrupted(
            _rounds(workload, settings, on_step, timeline, make_training)
        )
    outcomes = dict(rounds)
    results = _results(outcomes, ceilings)
    ceilings, results = raise_by_runs(settings.device, ceilings, results, ())
    return Train(
        command=command,
        environment=describe_environment(settings.device, settings.backend, settings.processes),
        partial=end.partial,
        error=end.error,
        warnings=_warnings(workload, settings, results)
        + ceiling_warnings(ceilings, (run.share_of_ceilings for run in results)),
        settings=schema.TrainSettings(
            workload=workload.name,
            metric=workload.target.metric,
            target=workload.target.value,
            higher_is_better=workload.target.higher_is_better,
            updates=settings.limit.updates,
            seconds=settings.limit.seconds,
            hyperparameters=asdict(settings.scheduling.hyperparameters),
            scheduling=scheduling_of(settings.scheduling),
            processes=settings.processes,
            rounds=settings.rounds,
            seed=settings.seed,
        ),
        ceilings=ceilings,
        results=results,
    )


async def _rounds(
    workload: Workload,
    settings: TrainSettings,
    on_step: Callable[[str], object],
    timeline: Timeline | None,
    make_training: Callable[..., Training],
) -> AsyncIterator[tuple[Contender, Outcomes]]:
    """Yields who has trained, and what the rounds came to that they had, cut short or not."""
    outcomes: dict[Contender, Outcomes] = {each: [] for each in settings.contenders(workload)}
    try:
        for index in range(settings.rounds):
            for contender in in_turn(list(outcomes), index):
                on_step(f"round {index + 1}: {contender.name}")
                training = make_training(
                    workload,
                    contender,
                    settings.device,
                    settings.limit,
                    settings.seed + index,
                    timeline,
                )
                try:
                    await training.run()
                finally:
                    # One that was cut short would spoil the medians of whole ones.
                    ended = training.outcome
                    if ended and (ended.whole or not outcomes[contender]):
                        outcomes[contender].append(ended)
    finally:
        for contender, mine in outcomes.items():
            if mine:
                yield contender, mine


def _results(outcomes: Mapping[Contender, Outcomes], ceilings: Ceilings) -> list[TrainRun]:
    results = [_run(contender, mine, ceilings) for contender, mine in outcomes.items()]
    for run in results:
        run.gains = training_gains(run, results)
    return results


def _run(contender: Contender, outcomes: Outcomes, ceilings: Ceilings) -> TrainRun:
    """What the trainings of one came to; gains are not known yet."""
    first = outcomes[0]
    metrics = [outcome.end.value for outcome in outcomes]
    seconds = sum(outcome.report.seconds for outcome in outcomes)
    more: dict[str, Any] = {
        "policy": contender.name,
        "partial": not all(outcome.whole for outcome in outcomes),
        "reached": [outcome.reached for outcome in outcomes],
        "seconds_to_target": PositiveSpread.of([outcome.end.time for outcome in outcomes]),
        "updates_to_target": PositiveSpread.of(
            [float(outcome.end.updates) for outcome in outcomes]
        ),
        "metric": SignedSpread.of(metrics) if all(map(_is_told, metrics)) else None,
        "evaluations": sum(len(outcome.points) for outcome in outcomes),
        "evaluation_share": sum(outcome.evaluating for outcome in outcomes) / seconds,
        "losses": _means(first.losses),
        "metrics": _thinned([(point.time, point.value) for point in first.points]),
        "gains": {},
    }
    if first.report.backend == TORCH:  # nothing is launched down lanes
        more["share_of_ceilings"] = Shares(None, None, None, None)
    return run_of(
        TrainRun,
        [outcome.report for outcome in outcomes],
        ceilings,
        processes=contender.processes,
        batch=contender.scheduling.batch,
        depth=contender.scheduling.depth,
        **more,
    )


def _warnings(
    workload: Workload, settings: TrainSettings, results: Sequence[TrainRun]
) -> list[str]:
    said = spread_warnings(
        {f"the seconds of {run.policy}": run.seconds_to_target.estimate for run in results}
    )
    if settings.beside and workload.by_hand is None:
        said.append(f"{workload.name} has no training by hand: it is not set against that.")
    return said


def _means(losses: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of windows of as many losses each: when the last was, and their mean, if it is a number."""
    window = math.ceil(len(losses) / _POINTS) or 1
    parts = [losses[start : start + window] for start in range(0, len(losses), window)]
    means = [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]
    return [(round(at, 4), loss) for at, loss in means if _is_told(loss)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that are numbers, and of too many some: the last among them."""
    told = [(round(at, 4), value) for at, value in points if _is_told(value)]
    step = math.ceil(len(told) / _POINTS) or 1
    return told[::-1][::step][::-1]


def _is_told(value: float) -> bool:
    """Whether a loss or metric is a number: of a training that diverged it is none, or infinite."""
    return abs(value) <= MOST
