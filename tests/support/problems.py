"""Problems to decide for, right and wrong: functions of a module, which other processes import."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


class _Line(torch.nn.Module):
    """A line through the origin, and a count of its batches."""

    batches: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.batches += 1
        return self.weight * x


def square_loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Of a line that should have slope 3."""
    return torch.nn.functional.mse_loss(model(batch), 3 * batch)


def line() -> Any:
    """A model of one parameter, and random batches."""
    torch.manual_seed(0)

    def batches() -> Iterator[torch.Tensor]:
        while True:
            yield torch.randn(4)

    return _Line(), square_loss, batches()


def two_batches() -> Any:
    """Batches in a list."""
    return _Line(), square_loss, [torch.ones(4), torch.full((4,), 2.0)]


def diverges() -> Any:
    """A loss that is no number after the first two batches."""
    made = line()
    count = 0

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return square_loss(model, batch) * (float("nan") if count > 2 else 1)

    return made[0], loss, made[2]


def not_three() -> Any:
    return _Line(), square_loss


def no_model() -> Any:
    return "model", square_loss, [torch.ones(4)]


def frozen() -> Any:
    return _Line().requires_grad_(False), square_loss, [torch.ones(4)]


def no_loss() -> Any:
    return _Line(), 0.5, [torch.ones(4)]


def no_batches() -> Any:
    return _Line(), square_loss, 3


def empty() -> Any:
    return _Line(), square_loss, []


def not_a_scalar() -> Any:
    return _Line(), lambda model, batch: model(batch), [torch.ones(4)]


def a_float() -> Any:
    return _Line(), lambda model, batch: 0.5, [torch.ones(4)]


def no_gradient() -> Any:
    return _Line(), lambda model, batch: model(batch).detach().sum(), [torch.ones(4)]


def fails() -> Any:
    raise LookupError("no data here")


def loss_fails() -> Any:
    return _Line(), lambda model, batch: model(batch, batch), [torch.ones(4)]


def of_two_dtypes() -> Any:
    model = torch.nn.Sequential(_Line(), _Line().double())
    return model, lambda model, batch: model(batch).sum(), [torch.ones(4)]
