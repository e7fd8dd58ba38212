"""A model to train, with BatchNorm and dropout, and what it is to learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hogstream.kernels import rmsprop_
from hogstream.scheduler import ModelWorker, SharedParameters

Batch = tuple[torch.Tensor, torch.Tensor]
OPTIONS: dict[str, Any] = {"lr": 0.01, "eps": 0.01}


def make_classifier(seed: int = 0, dropout: float = 0.0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 8),
        torch.nn.BatchNorm1d(8),
        torch.nn.ReLU(),
        torch.nn.Dropout(dropout),
        torch.nn.Linear(8, 2),
    )


def points(seed: int, size: int = 16) -> Iterator[Batch]:
    """Points far from zero, and whether a linear function of them is above its mean."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = 5 + 3 * torch.randn(size, 4, generator=generator)
        yield x, (x.sum(dim=1) > 20).long()


def classified(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    x, labels = batch
    return torch.nn.functional.cross_entropy(model(x), labels)


def train_in_process(shared: SharedParameters, process: int, dropout: float = 0.0) -> ModelWorker:
    """Makes a worker, for another process too."""
    model = make_classifier(dropout=dropout)
    return ModelWorker(shared, model, classified, points(process), seed=process)


class PlainLoop:
    """What one worker is to do, in a loop."""

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Callable[[torch.nn.Module, Any], torch.Tensor],
        batches: Iterator[Any],
        **options: Any,
    ) -> None:
        self._model, self._loss, self._batches = model, loss, batches
        self._options = {**OPTIONS, **options}
        self._mss = {
            name: torch.zeros(each.shape, dtype=torch.promote_types(each.dtype, torch.float32))
            for name, each in model.named_parameters()
        }

    def run(self, updates: int) -> None:
        for _ in range(updates):
            self._model.zero_grad()
            self._loss(self._model, next(self._batches)).backward()
            self.update()

    def update(self) -> None:
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                rmsprop_(parameter, parameter.grad, self._mss[name], **self._options)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread here, as for a worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
