"""Asynchronous training on real input: an MLP on scikit-learn's handwritten digits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

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


def updates_of(settings: TrainSettings, digits: Digits) -> int:
    """How many updates the epochs make."""
    return settings.epochs * -(-len(digits.train[0]) // BATCH_SIZE)


def train(
    settings: TrainSettings,
    policy: str,
    digits: Digits,
    on_update: Callable[[float], None],
) -> dict[str, Any]:
    """Trains the model with one policy.

    Args:
        settings: How.
        policy: Name of the policy.
        digits: The data.
        on_update: Called after each update with its batch's loss.

    Returns:
        One entry of ``results`` in the JSON output.
    """
    torch.manual_seed(settings.seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 10)
    ).to(settings.device)
    shared = SharedParameters.from_module(model)
    losses: list[tuple[float, float]] = []

    def on_loss(_worker: int, loss: float) -> None:
        losses.append((time.perf_counter(), loss))
        on_update(loss)

    worker = ModelWorker(shared, model, batch_loss, shuffled(digits.train, settings.seed), on_loss)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # workers are the parallelism; torch's own would fight over the cores
    try:
        start, report = asyncio.run(
            _run(settings, policy, shared, worker, updates_of(settings, digits))
        )
    finally:
        torch.set_num_threads(threads)
    images, labels = digits.test
    with torch.no_grad():
        correct = (model(images).argmax(dim=1) == labels).float().mean().item()
    return {
        **report.to_dict(),
        "epochs": settings.epochs,
        "test_accuracy": correct,
        "final_loss": sum(loss for _, loss in losses[-50:]) / len(losses[-50:]),
        "losses": [(round(landed - start, 4), round(loss, 5)) for landed, loss in losses],
    }


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


async def _run(
    settings: TrainSettings,
    policy: str,
    shared: SharedParameters,
    worker: ModelWorker,
    updates: int,
) -> tuple[float, RunReport]:
    """The report, and when the workers started."""
    async with StreamScheduler(
        shared,
        workers=settings.workers,
        policy=policy,
        backend=settings.backend,
        lr=LEARNING_RATE,
    ) as scheduler:
        return time.perf_counter(), await scheduler.run(worker, updates=updates)
