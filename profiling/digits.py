"""Asynchronous training on real input: an MLP on scikit-learn's handwritten digits."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from hogstream.profiling.environment import SCHEMA, describe_environment
from hogstream.profiling.interruption import gather_until_interrupted
from hogstream.scheduler import ModelWorker, RunReport, SharedParameters, StreamScheduler

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
        workers: How many workers.
        epochs: How often each training image is seen, over all workers.
        seed: Of the split, the first parameters and the order of the images.
    """

    device: torch.device
    backend: str
    workers: int
    epochs: int
    seed: int


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
) -> dict[str, Any]:
    """Trains a new model with each policy in turn.

    Args:
        settings: How.
        policies: Names of policies.
        digits: The data.
        on_step: Called before each epoch of each policy with what is to be done.

    Returns:
        The JSON output, but for the command line. Interrupted, it is partial: the training under
        way is given as far as it went, its latencies and staleness as null.

    Raises:
        KeyboardInterrupt: If interrupted before the first update.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # workers are the parallelism; torch's own would fight over the cores
    try:
        results, partial = gather_until_interrupted(_train_all(settings, policies, digits, on_step))
    finally:
        torch.set_num_threads(threads)
    return {
        "schema": SCHEMA,
        "environment": describe_environment(settings.device, settings.backend),
        "settings": {"seed": settings.seed, "epochs": settings.epochs},
        "partial": partial,
        "results": results,
    }


async def _train_all(
    settings: TrainSettings,
    policies: Sequence[str],
    digits: Digits,
    on_step: Callable[[str], None],
) -> AsyncIterator[dict[str, Any]]:
    """Yields the result of each policy, and of one that is cancelled what there is of it."""
    for policy in policies:
        training = _Training(settings, policy, digits, on_step)
        try:
            report = await training.run()
        except asyncio.CancelledError:
            if training.losses:
                yield training.result(training.report_so_far())
            raise
        yield training.result(report)


class _Training:
    """One training of a new model, whose course can be told at any time.

    Attributes:
        losses: Of each update that has landed: when, in seconds of ``time.perf_counter``, and the
            loss of its batch.
    """

    def __init__(
        self,
        settings: TrainSettings,
        policy: str,
        digits: Digits,
        on_step: Callable[[str], None],
    ) -> None:
        torch.manual_seed(settings.seed)
        self.losses: list[tuple[float, float]] = []
        self._settings = settings
        self._policy = policy
        self._digits = digits
        self._on_step = on_step
        self._model = torch.nn.Sequential(
            torch.nn.Linear(64, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 10)
        ).to(settings.device)
        self._shared = SharedParameters.from_module(self._model)
        self._updates_by_worker = [0] * settings.workers
        self._updates_per_epoch = -(-len(digits.train[0]) // BATCH_SIZE)
        self._start = time.perf_counter()

    async def run(self) -> RunReport:
        """Trains for all epochs."""
        self._on_step(f"{self._policy}, epoch 1")
        batches = shuffled(self._digits.train, self._settings.seed)
        worker = ModelWorker(self._shared, self._model, batch_loss, batches, self._on_loss)
        async with StreamScheduler(
            self._shared,
            workers=self._settings.workers,
            policy=self._policy,
            backend=self._settings.backend,
            lr=LEARNING_RATE,
        ) as scheduler:
            self._start = time.perf_counter()
            updates = self._settings.epochs * self._updates_per_epoch
            return await scheduler.run(worker, updates=updates)

    def result(self, report: RunReport) -> dict[str, Any]:
        """One entry of ``results`` in the JSON output."""
        images, labels = self._digits.test
        with torch.no_grad():
            correct = (self._model(images).argmax(dim=1) == labels).float().mean().item()
        return {
            **report.to_dict(),
            "epochs": len(self.losses) / self._updates_per_epoch,
            "test_accuracy": correct,
            "final_loss": statistics.fmean(loss for _, loss in self.losses[-50:]),
            "losses": [
                (round(landed - self._start, 4), round(loss, 5)) for landed, loss in self.losses
            ],
        }

    def report_so_far(self) -> RunReport:
        """What is known of a run that the scheduler did not report: how many updates, how fast."""
        return RunReport(
            policy=self._policy,
            workers=self._settings.workers,
            elements=self._shared.elements,
            dtype="float32",
            backend=self._settings.backend,
            device=str(self._settings.device),
            seconds=self.losses[-1][0] - self._start,
            latencies_us=[],
            staleness=Counter(),
            updates_by_worker=self._updates_by_worker,
        )

    def _on_loss(self, worker: int, loss: float) -> None:
        self.losses.append((time.perf_counter(), loss))
        self._updates_by_worker[worker] += 1
        done, rest = divmod(len(self.losses), self._updates_per_epoch)
        if rest == 0 and done < self._settings.epochs:
            self._on_step(f"{self._policy}, epoch {done + 1}, loss {loss:.4f}")


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
