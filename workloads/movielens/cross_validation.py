"""Matrix factorisation by k-fold cross-validation: each policy, and others, in turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch

from hogstream.profiling.environment import describe_environment
from hogstream.profiling.interruption import gather_until_interrupted
from hogstream.profiling.measure.by_hand import ByHand
from hogstream.profiling.results.confidence import spread_warnings
from hogstream.profiling.results.gains import ALONE, CONTENDER
from hogstream.profiling.results.movielens_schema import (
    MovieLens,
    MovieLensRun,
    MovieLensSettings,
)
from hogstream.profiling.results.records import PositiveSpread, Ratio, SignedSpread
from hogstream.profiling.turns import in_turn
from hogstream.scheduler import SchedulerSettings, StreamScheduler
from hogstream.workloads.movielens import (
    factorization,
    factorization_machine,
    surprise,
    torch_processes,
)
from hogstream.workloads.movielens.block_order import CHUNKS
from hogstream.workloads.movielens.fold import Fold
from hogstream.workloads.movielens.ratings import Ratings, folds

#: Surprise's own factorisation, which trains beside policies where it is installed.
SURPRISE = "Surprise SVD"
#: Processes with sparse embeddings of torch, which do so too.
TORCH = "torch, processes"
#: What may be trained: modules that make parameters and workers, and predict.
MODELS = {"mf": factorization, "fm": factorization_machine}

# Of memory for the copies that a curve is made of.
_COPIES_BYTES = 1 << 30


@dataclass(frozen=True)
class Task:
    """What is trained, and how.

    Attributes:
        ratings: What.
        data: Their name.
        model: Of ``MODELS``.
        width: Columns of a table: a bias and factors.
        epochs: How many each training takes.
        target: RMSE that is to be reached.
        folds: How many there are.
        repeats: How often each fold is trained, with other first values.
        seed: Of folds, first values and orders.
        scheduling: How the scheduler runs, but for the policy.
        policies: Their names.
        beside: Whether one worker alone, processes with torch and, if it is installed, Surprise
            train too.
    """

    ratings: Ratings
    data: str
    model: str
    width: int
    epochs: int
    target: float
    folds: int
    repeats: int
    seed: int
    scheduling: SchedulerSettings
    policies: Sequence[str]
    beside: bool

    @property
    def contenders(self) -> list[str]:
        """Who trains: policies, and others by their names."""
        others = [ALONE, *([TORCH] if self.model == "mf" else [])]
        others += [SURPRISE] if find_spec("surprise") else []
        return [*self.policies, *(others if self.beside else [])]


class Point(NamedTuple):
    """What tables were at some time: copied while workers went on, and evaluated later.

    Attributes:
        seconds: Since the training began.
        epochs: That they had had.
        rmse: Of the part held out.
    """

    seconds: float
    epochs: float
    rmse: float


class Training(NamedTuple):
    """What one training of one fold came to.

    Attributes:
        seconds: Of all epochs.
        points: In the order of time, the last one at the end.
        staleness: The mean of updates that were looked at; None if not known.
    """

    seconds: float
    points: list[Point]
    staleness: float | None

    def reached(self, target: float) -> float | None:
        """After how many seconds it had reached a target; None if it did not.

        Between two copies, one above the target and one not, errors are taken to fall in a line.
        """
        before = None
        for point in self.points:
            if point.rmse <= target:
                if before is None:
                    return point.seconds
                part = (before.rmse - target) / (before.rmse - point.rmse)
                return before.seconds + part * (point.seconds - before.seconds)
            before = point
        return None


def cross_validate(
    task: Task, command: str = "", on_step: Callable[[str], object] = str
) -> MovieLens:
    """Trains each fold with each contender in turn.

    Args:
        task: What is trained.
        command: What repeats it, for the result.
        on_step: Called before each training with what is to be done.

    Returns:
        The result; interrupted, of the rounds until then.

    Raises:
        KeyboardInterrupt: If interrupted before the end of a round.
        WorkerError: If a worker fails.
    """
    rounds, end = gather_until_interrupted(_rounds(task, on_step))
    results = _results(task, rounds)
    hyperparameters = asdict(task.scheduling.hyperparameters)
    return MovieLens(
        command=command,
        environment=describe_environment(torch.device("cpu"), "numba", 1),
        partial=end.partial,
        error=end.error,
        warnings=spread_warnings(
            {f"the seconds of {run.name}": run.seconds.estimate for run in results}
        ),
        settings=MovieLensSettings(
            data=task.data,
            model=task.model,
            ratings=len(task.ratings.values),
            users=task.ratings.user_count,
            items=task.ratings.item_count,
            width=task.width,
            workers=task.scheduling.workers,
            epochs=task.epochs,
            target=task.target,
            folds=task.folds,
            repeats=task.repeats,
            seed=task.seed,
            hyperparameters=hyperparameters,
        ),
        results=results,
    )


async def _rounds(
    task: Task, on_step: Callable[[str], object]
) -> AsyncIterator[dict[str, Training]]:
    """Yields what all came to, of one fold after the other."""
    parts = list(folds(task.ratings, task.folds, task.seed))
    for repeat in range(task.repeats):
        for index, (train, test) in enumerate(parts):
            fold, seed = Fold(task.ratings, train, test), task.seed + repeat
            done: dict[str, Training] = {}
            for name in in_turn(task.contenders, repeat * len(parts) + index):
                on_step(f"fold {index + 1}, repeat {repeat + 1}: {name}")
                if name == TORCH:
                    done[name] = await _by_torch(fold, seed, task)
                elif name == SURPRISE:
                    done[name] = await asyncio.to_thread(_by_surprise, fold, seed)
                else:
                    done[name] = await _by_scheduler(name, fold, seed, task)
            yield done


async def _by_torch(fold: Fold, seed: int, task: Task) -> Training:
    model = torch_processes.Factors(fold, task.width, seed)
    extra = {
        "samples": torch_processes.samples(fold),
        "weight_decay": task.scheduling.hyperparameters.weight_decay,
    }
    batches = task.epochs * len(fold.train) // torch_processes.BATCH
    copies: list[tuple[float, int, dict[str, torch.Tensor]]] = []
    processes = task.scheduling.workers
    async with ByHand(torch_processes.work, model, processes, extra=extra) as by_hand:

        def keep(_process: int, _loss: float) -> None:
            now, made = time.perf_counter(), by_hand.made
            if not copies or made > copies[-1][1]:
                copies.append((now, made, model.tables()))

        report = await by_hand.run(updates=batches, on_loss=keep)
        ended = time.perf_counter()
    start = ended - report.seconds
    points = [
        Point(
            seconds=max(at - start, 0.0),
            epochs=made * torch_processes.BATCH / len(fold.train),
            rmse=fold.rmse(factorization.predict(tables, fold)),
        )
        for at, made, tables in copies
    ]
    return Training(report.seconds, points, None)


async def _by_scheduler(name: str, fold: Fold, seed: int, task: Task) -> Training:
    settings = task.scheduling.with_policy(CONTENDER if name == ALONE else name)
    if name == ALONE:
        settings = replace(settings, workers=1)
    model = MODELS[task.model]
    shared = model.make_parameters(fold, task.width, seed)
    worker = model.make_worker(shared, fold, settings.workers, seed)
    copies: list[tuple[float, int, torch.Tensor]] = []
    updates = task.epochs * len(fold.train)
    most = min(task.epochs * CHUNKS, _COPIES_BYTES // shared.flat.nbytes + 1)
    # Written before workers start: new memory would cost more than what is copied to it.
    memory = torch.zeros(most, shared.elements)

    def keep(worker: int, _loss: float) -> None:
        # Of one worker's chunks: others are as far by then.
        if worker == 0 and shared.version > len(copies) * updates // most:
            copy = memory[len(copies)].copy_(shared.flat)
            copies.append((time.perf_counter(), shared.version, copy))

    async with StreamScheduler(shared, settings) as scheduler:
        report = await scheduler.run(worker, updates=updates, on_loss=keep)
        end = time.perf_counter()
    copies.append((end, shared.version, shared.flat))
    start = end - report.seconds
    points = [
        Point(
            seconds=at - start,
            epochs=made / len(fold.train),
            rmse=fold.rmse(model.predict(shared.views_of(flat), fold)),
        )
        for at, made, flat in copies
    ]
    ages = np.array([*report.staleness.elements()])
    return Training(report.seconds, points, float(ages.mean()))


def _by_surprise(fold: Fold, seed: int) -> Training:
    """Its default: 100 factors, 20 epochs; it is evaluated at its end alone."""
    model, trainset = surprise.svd(seed), surprise.trainset(fold)
    start = time.perf_counter()
    model.fit(trainset)
    seconds = time.perf_counter() - start
    rmse = fold.rmse(surprise.predict(model, fold))
    return Training(seconds, [Point(seconds, float(surprise.EPOCHS), rmse)], None)


def _results(task: Task, rounds: Sequence[dict[str, Training]]) -> list[MovieLensRun]:
    results = []
    for name in task.contenders:
        mine = [done[name] for done in rounds]
        reached = [each.reached(task.target) for each in mine]
        known = [each.staleness for each in mine if each.staleness is not None]
        results.append(
            MovieLensRun(
                name=name,
                workers=1 if name in (ALONE, SURPRISE) else task.scheduling.workers,
                seconds=PositiveSpread.of([each.seconds for each in mine]),
                epochs=task.epochs if name != SURPRISE else surprise.EPOCHS,
                rmse=SignedSpread.of([each.points[-1].rmse for each in mine]),
                curve=[(point.seconds, point.epochs, point.rmse) for point in mine[0].points],
                reached=[each is not None for each in reached],
                seconds_to_target=PositiveSpread.of(
                    [
                        each.seconds if at is None else at
                        for at, each in zip(reached, mine, strict=True)
                    ]
                ),
                staleness=float(np.mean(known)) if known else None,
                gains={},
            )
        )
    for run in results:
        for other in results:
            gain = Ratio.of(other.seconds_to_target.samples, run.seconds_to_target.samples)
            if other is not run and gain is not None and all(run.reached):
                run.gains[other.name] = gain
    return results
