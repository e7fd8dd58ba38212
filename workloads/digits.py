"""Real input: an MLP on scikit-learn's handwritten digits (1,797 images of 8 by 8)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch.nn import functional

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.scheduler import SchedulerSettings
from hogstream.workloads.model_workload import ModelWorkload
from hogstream.workloads.workload import Target

Batch = tuple[torch.Tensor, torch.Tensor]

BATCH_SIZE = 32
HIDDEN = 128
_TEST_SHARE = 0.2


class Digits(NamedTuple):
    """Images of shape (n, 64) in [0, 1], float32, and their digits, int64, in two parts."""

    train: Batch
    test: Batch


@cache
def load_digits() -> Digits:
    """Loads scikit-learn's digits; a fifth, the same of each digit, is held out for testing."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    images, labels = load(return_X_y=True)
    parts = train_test_split(
        images / 16, labels, test_size=_TEST_SHARE, stratify=labels, random_state=0
    )
    x, x_test, y, y_test = map(torch.from_numpy, parts)
    return Digits((x.float(), y.long()), (x_test.float(), y_test.long()))


def make_model() -> torch.nn.Sequential:
    """A multilayer perceptron with one hidden layer."""
    layers = torch.nn.Linear(64, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 10)
    return torch.nn.Sequential(*layers)


def batch_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross entropy of a batch."""
    images, labels = batch
    return functional.cross_entropy(model(images), labels)


def make_batches() -> Iterator[Batch]:
    """Yields batches for ever, each epoch in a new order."""
    images, labels = load_digits().train
    while True:
        for part in torch.randperm(len(images)).split(BATCH_SIZE):
            yield images[part], labels[part]


def test_accuracy(model: torch.nn.Module) -> float:
    """The share of the images held out that a model recognises."""
    device = next(model.parameters()).device
    images, labels = (each.to(device) for each in load_digits().test)
    return float((model(images).argmax(dim=1) == labels).float().mean())


DIGITS = ModelWorkload(
    name="digits",
    make_model=make_model,
    loss=batch_loss,
    make_batches=make_batches,
    metric=test_accuracy,
    target=Target("test accuracy", 0.97),
    seconds=20.0,
    # As torch.optim.RMSprop by hand, with its eps outside of the root.
    settings=SchedulerSettings(
        workers=2, hyperparameters=Hyperparameters(lr=3e-4, eps_inside_sqrt=False)
    ),
)
