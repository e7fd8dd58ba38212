"""Asynchronous training on real input: an MLP on scikit-learn's handwritten digits."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from hogstream.profiling.capture import captured
from hogstream.profiling.ceilings.machine import (
    ceiling_warnings,
    machine_ceilings,
    raise_by_runs,
)
from hogstream.profiling.environment import describe_environment
from hogstream.profiling.interruption import gather_until_interrupted
from hogstream.profiling.measure.runs import run_of, scheduling_of
from hogstream.profiling.results import schema
from hogstream.profiling.results.confidence import spread_warnings
from hogstream.profiling.results.gains import training_gains_of
from hogstream.profiling.results.records import MOST, Ceilings, Ratio, Spread
from hogstream.profiling.results.schema import Train, TrainRun
from hogstream.profiling.turns import in_turn
from hogstream.scheduler import (
    ModelWorker,
    ProcessScheduler,
    RunReport,
    SchedulerSettings,
    SharedParameters,
    StreamScheduler,
    Timeline,
)

Batch = tuple[torch.Tensor, torch.Tensor]

BATCH_SIZE = 32
HIDDEN = 128
LEARNING_RATE = 1e-3
_TEST_SHARE = 0.2


@dataclass(frozen=True)
class Digits:
    """Images of shape (n, 64) in [0, 1], float32, and their digits, int64, in two parts."""

    train: Batch
    test: Batch


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        device: Where.
        backend: Which kernels.
        processes: How many the workers are spread over.
        epochs: How often each training image is seen, over all workers.
        rounds: How many times each policy trains.
        seed: Of the split, the first parameters and the order of the images; the latter two are
            others in each round.
        scheduling: How the scheduler runs, but for the policy; its workers are of each process.
    """

    device: torch.device
    backend: str
    processes: int
    epochs: int
    rounds: int
    seed: int
    scheduling: SchedulerSettings


def load_digits(settings: TrainSettings) -> Digits:
    """Loads scikit-learn's digits; a fifth, the same of each digit, is held out for testing."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    images, labels = load(return_X_y=True)
    parts = train_test_split(
        images / 16, labels, test_size=_TEST_SHARE, stratify=labels, random_state=settings.seed
    )
    x, x_test, y, y_test = (torch.from_numpy(part).to(settings.device) for part in parts)
    return Digits((x.float(), y.long()), (x_test.float(), y_test.long()))


def run_training(
    settings: TrainSettings,
    policies: Sequence[str],
    digits: Digits,
    command: str,
    on_step: Callable[[str], None],
    timeline: Timeline | None = None,
) -> Train:
    """Trains a new model with each policy in turn, for some rounds.

    Args:
        settings: How.
        policies: Names of policies.
        digits: The data.
        command: The command line that repeats it.
        on_step: Called before each epoch of each policy with what is to be done.
        timeline: Takes all of it down.

    Returns:
        The result. Cut short, it is partial: whole trainings are given, or, of a policy that has
        none yet, the one under way as far as it went.
        Losses in other processes are not known: ``losses`` is empty.

    Raises:
        KeyboardInterrupt: If interrupted before the first update.
        MeasurementError: If workers failed before the first update.
    """
    ceilings = machine_ceilings(settings.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # workers are the parallelism; torch's own would fight over the cores
    try:
        with captured(settings.device):
            rounds, end = gather_until_interrupted(
                _train_all(settings, policies, digits, on_step, timeline)
            )
    finally:
        torch.set_num_threads(threads)
    ends = {trainings[0].policy: [training.end() for training in trainings] for trainings in rounds}
    seconds = {
        policy: Spread.of([end.report.seconds for end in each]) for policy, each in ends.items()
    }
    # One that was cut short is not as fast as it seems: it is no measure for others.
    whole = {
        policy: seconds[policy]
        for policy, each in ends.items()
        if not any(end.report.partial for end in each)
    }
    results = [
        _run_of(ends[policy], seconds[policy], settings, ceilings, training_gains_of(policy, whole))
        for policy in ends
    ]
    ceilings, results = raise_by_runs(settings.device, ceilings, results, ())
    return Train(
        command=command,
        environment=describe_environment(settings.device, settings.backend, settings.processes),
        partial=end.partial,
        error=end.error,
        warnings=spread_warnings(
            {f"the seconds of {run.policy}": run.training_seconds.estimate for run in results}
        )
        + ceiling_warnings(ceilings, (run.share_of_ceilings for run in results)),
        settings=schema.TrainSettings(
            scheduling=scheduling_of(settings.scheduling),
            processes=settings.processes,
            rounds=settings.rounds,
            epochs=settings.epochs,
            seed=settings.seed,
        ),
        ceilings=ceilings,
        results=results,
    )


async def _train_all(
    settings: TrainSettings,
    policies: Sequence[str],
    digits: Digits,
    on_step: Callable[[str], None],
    timeline: Timeline | None,
) -> AsyncIterator[list[_Training]]:
    """Yields the trainings of each policy, cut short or not, over the rounds that it had."""
    rounds: dict[str, list[_Training]] = {policy: [] for policy in policies}
    try:
        for index in range(settings.rounds):
            of_round = replace(settings, seed=settings.seed + index)
            for policy in in_turn(policies, index):
                training = _Training(of_round, policy, digits, on_step, f"round {index + 1}")
                try:
                    await training.run(timeline)
                finally:
                    # One that was cut short would spoil the medians of whole ones.
                    report = training.report
                    if report and report.updates and not (report.partial and rounds[policy]):
                        rounds[policy].append(training)
    finally:
        for trainings in filter(None, rounds.values()):
            yield trainings


def _run_of(
    ends: Sequence[_End],
    seconds: Spread,
    settings: TrainSettings,
    ceilings: Ceilings,
    gains: dict[str, Ratio],
) -> TrainRun:
    """What a policy's trainings came to.

    Args:
        ends: Of its trainings.
        seconds: Of each.
        settings: How it trained.
        ceilings: Of the machine.
        gains: Over each other policy.
    """
    policy = ends[0].report.policy
    final_losses = [end.final_loss for end in ends]
    return run_of(
        TrainRun,
        [end.report for end in ends],
        ceilings,
        processes=settings.processes,
        batch=settings.scheduling.with_policy(policy).batch,
        depth=settings.scheduling.depth,
        test_accuracy=Spread.of([end.test_accuracy for end in ends]),
        final_loss=Spread.of(final_losses) if all(map(_is_told, final_losses)) else None,
        training_seconds=seconds,
        epochs=Spread.of([end.epochs for end in ends]),
        losses=[(time, loss) for time, loss in ends[0].losses if _is_told(loss)],
        gains=gains,
    )


def _is_told(loss: float) -> bool:
    """Whether a loss is a number: of a training that diverged it is none, or infinite."""
    return loss <= MOST


@dataclass(frozen=True)
class _End:
    """What a training came to.

    Attributes:
        report: Of the scheduler.
        test_accuracy: From 0 to 1.
        final_loss: Of the finished model over all training data.
        epochs: How often each image was seen.
        losses: Seconds since its start, and the loss of a batch.
    """

    report: RunReport
    test_accuracy: float
    final_loss: float
    epochs: float
    losses: list[tuple[float, float]]


class _Training:
    """One training of a new model.

    Attributes:
        policy: Under which.
        report: Of the scheduler, also if it failed or was cancelled; None before.
    """

    def __init__(
        self,
        settings: TrainSettings,
        policy: str,
        digits: Digits,
        on_step: Callable[[str], None],
        title: str,
    ) -> None:
        self.report: RunReport | None = None
        self._settings = settings
        self.policy = policy
        self._scheduling = settings.scheduling.with_policy(policy)
        self._digits = digits
        self._on_step = on_step
        self._title = f"{policy}, {title}"
        self._model = make_model(settings)
        self._losses: list[tuple[float, float]] = []  # when an update landed, and its batch's loss
        self._updates_per_epoch = -(-len(digits.train[0]) // BATCH_SIZE)
        self._start = time.perf_counter()

    async def run(self, timeline: Timeline | None) -> None:
        """Trains for all epochs."""
        self._on_step(f"{self._title}, epoch 1")
        scheduler, worker = self._prepare(timeline)
        async with scheduler:
            self._start = time.perf_counter()
            try:
                updates = self._settings.epochs * self._updates_per_epoch
                on_loss = self._on_loss if self._settings.processes == 1 else None
                await scheduler.run(worker, updates=updates, on_loss=on_loss)
            finally:
                self.report = scheduler.report

    def _prepare(self, timeline: Timeline | None) -> tuple[Any, Any]:
        """The scheduler, of this process or of others, and what its ``run`` takes."""
        settings, shared = self._settings, SharedParameters.from_module(self._model)
        if settings.processes > 1:
            scheduler = ProcessScheduler(
                shared,
                self._scheduling,
                processes=settings.processes,
                timeline=timeline,
                lr=LEARNING_RATE,
            )
            return scheduler, partial(make_worker_of_process, settings)
        batches = shuffled(self._digits.train, settings.seed)
        worker = ModelWorker(shared, self._model, batch_loss, batches)
        return (
            StreamScheduler(shared, self._scheduling, timeline=timeline, lr=LEARNING_RATE),
            worker,
        )

    def end(self) -> _End:
        """What it came to."""
        report = self.report
        assert report is not None
        images, labels = self._digits.test
        with torch.no_grad():
            correct = (self._model(images).argmax(dim=1) == labels).float().mean().item()
            loss = batch_loss(self._model, self._digits.train).item()
        return _End(
            report=report,
            test_accuracy=correct,
            final_loss=loss,
            epochs=report.updates / self._updates_per_epoch,
            losses=[
                (round(landed - self._start, 4), round(loss, 5)) for landed, loss in self._losses
            ],
        )

    def _on_loss(self, worker: int, loss: float) -> None:
        self._losses.append((time.perf_counter(), loss))
        done, rest = divmod(len(self._losses), self._updates_per_epoch)
        if rest == 0 and done < self._settings.epochs:
            self._on_step(f"{self._title}, epoch {done + 1}, loss {loss:.4f}")


def make_model(settings: TrainSettings) -> torch.nn.Sequential:
    """The model, with its first parameters."""
    torch.manual_seed(settings.seed)
    layers = torch.nn.Linear(64, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 10)
    return torch.nn.Sequential(*layers).to(settings.device)


def make_worker_of_process(
    settings: TrainSettings, shared: SharedParameters, process: int
) -> ModelWorker:
    """What trains in another process, on the same images, in an order of its own."""
    batches = shuffled(load_digits(settings).train, settings.seed + process)
    return ModelWorker(shared, make_model(settings), batch_loss, batches)


def batch_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross entropy of a batch."""
    images, labels = batch
    return functional.cross_entropy(model(images), labels)


def shuffled(data: Batch, seed: int) -> Iterator[Batch]:
    """Yields batches for ever, each epoch in a new order."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for part in order.split(BATCH_SIZE):
            yield images[part], labels[part]
