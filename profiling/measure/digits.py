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
from hogstream.profiling.ceilings.machine import ceiling_warnings, machine_ceilings, shares
from hogstream.profiling.environment import SCHEMA, describe_environment
from hogstream.profiling.interruption import gather_until_interrupted
from hogstream.profiling.results.confidence import median_interval, spread_warnings
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
_TOLD_OF_ROUNDS = (
    "test_accuracy",
    "final_loss",
    "updates_per_second",
    "training_seconds",
    "epochs",
)


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
    on_step: Callable[[str], None],
    timeline: Timeline | None = None,
) -> dict[str, Any]:
    """Trains a new model with each policy in turn, for some rounds.

    Args:
        settings: How.
        policies: Names of policies.
        digits: The data.
        on_step: Called before each epoch of each policy with what is to be done.
        timeline: Takes all of it down.

    Returns:
        The JSON output, but for the command line: medians over the rounds, and the ``losses`` of
        the first. Cut short, it is partial: whole trainings are given, or, of a policy that has
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
            results, ended = gather_until_interrupted(
                _train_all(settings, policies, digits, on_step, timeline)
            )
    finally:
        torch.set_num_threads(threads)
    for each in results:
        each["share_of_ceilings"] = shares(each, ceilings, depth=settings.scheduling.depth)
    return {
        "schema": SCHEMA,
        "environment": describe_environment(settings.device, settings.backend, settings.processes),
        "settings": {
            "seed": settings.seed,
            "epochs": settings.epochs,
            "rounds": settings.rounds,
            "processes": settings.processes,
            **settings.scheduling.options(),
        },
        **ended,
        "ceilings": ceilings,
        "results": results,
        "warnings": spread_warnings(
            {
                f"the seconds of {each['policy']}": median_interval(
                    each["training_seconds_of_rounds"]
                )
                for each in results
            }
        )
        + ceiling_warnings(ceilings, results),
    }


async def _train_all(
    settings: TrainSettings,
    policies: Sequence[str],
    digits: Digits,
    on_step: Callable[[str], None],
    timeline: Timeline | None,
) -> AsyncIterator[dict[str, Any]]:
    """Yields the result of each policy, cut short or not, over the rounds that it had."""
    rounds: dict[str, list[_Training]] = {policy: [] for policy in policies}
    try:
        for index in range(settings.rounds):
            of_round = replace(settings, seed=settings.seed + index)
            first = index % len(policies)  # each goes first in its turn
            for policy in (*policies[first:], *policies[:first]):
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
            yield _result_of(trainings)


def _result_of(trainings: Sequence[_Training]) -> dict[str, Any]:
    """One entry of ``results`` in the JSON output: medians over a policy's rounds."""
    each = [training.result() for training in trainings]
    told: dict[str, Any] = {}
    for name in _TOLD_OF_ROUNDS:
        samples = [result[name] for result in each]
        interval = median_interval(samples)
        told[name] = interval.median
        told |= {f"{name}_interval": interval.bounds, f"{name}_of_rounds": samples}
    joined = RunReport.joined([result["report"] for result in each])
    told["gigabytes_per_second"] = told["updates_per_second"] * joined.bytes_per_update / 1e9
    first = {name: value for name, value in each[0].items() if name != "report"}
    return {**first, **joined.to_dict(), **told}


class _Training:
    """One training of a new model.

    Attributes:
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
                await scheduler.run(worker, updates=updates)
            finally:
                self.report = scheduler.report

    def _prepare(self, timeline: Timeline | None) -> tuple[Any, Any]:
        """The scheduler, of this process or of others, and what its ``run`` takes."""
        settings, shared = self._settings, SharedParameters.from_module(self._model)
        if settings.processes > 1:
            scheduler = ProcessScheduler(
                shared, self._scheduling, processes=settings.processes, lr=LEARNING_RATE
            )
            return scheduler, partial(make_worker_of_process, settings)
        batches = shuffled(self._digits.train, settings.seed)
        worker = ModelWorker(shared, self._model, batch_loss, batches, self._on_loss)
        return (
            StreamScheduler(shared, self._scheduling, timeline=timeline, lr=LEARNING_RATE),
            worker,
        )

    def result(self) -> dict[str, Any]:
        """What it came to, and its ``report``."""
        report = self.report
        assert report is not None
        images, labels = self._digits.test
        with torch.no_grad():
            correct = (self._model(images).argmax(dim=1) == labels).float().mean().item()
            loss = batch_loss(self._model, self._digits.train).item()
        return {
            "report": report,
            "processes": self._settings.processes,
            "batch": self._scheduling.batch,
            "training_seconds": report.seconds,
            "updates_per_second": report.updates_per_second,
            "epochs": report.updates / self._updates_per_epoch,
            "test_accuracy": correct,
            "final_loss": loss,
            "losses": [
                (round(landed - self._start, 4), round(loss, 5)) for landed, loss in self._losses
            ],
        }

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
