"""Workloads that are trained in a fraction of a second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.scheduler import SchedulerSettings, SharedParameters, Worker, WorkerContext
from hogstream.workloads import ModelWorkload, Target

Batch = tuple[torch.Tensor, torch.Tensor]

_INPUTS = torch.eye(8)
_OUTPUTS = torch.linspace(-1, 1, 8)[:, None]


def make_model() -> torch.nn.Linear:
    """A linear map, of 8 numbers to one."""
    return torch.nn.Linear(8, 1)


def error(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The mean squared error of a batch."""
    inputs, outputs = batch
    return torch.nn.functional.mse_loss(model(inputs), outputs)


def make_batches() -> list[Batch]:
    """All there is, in two batches."""
    return [(_INPUTS[:4], _OUTPUTS[:4]), (_INPUTS[4:], _OUTPUTS[4:])]


def error_of_all(model: torch.nn.Module) -> float:
    """The mean squared error of all there is."""
    return error(model, (_INPUTS, _OUTPUTS)).item()


TINY = ModelWorkload(
    name="tiny",
    make_model=make_model,
    loss=error,
    make_batches=make_batches,
    metric=error_of_all,
    target=Target("error", 1e-3, higher_is_better=False),
    seconds=60.0,
    settings=SchedulerSettings(
        workers=2, hyperparameters=Hyperparameters(lr=0.01, eps_inside_sqrt=False)
    ),
)

#: Of which other processes can have nothing.
BOUND_TO_ITS_PROCESS = replace(TINY, metric=lambda model: 0.0)

#: No workload.
NOTHING = 3


class Counting:
    """Whose workers send how often they were called; 50 iterations are the target."""

    name = "counting"
    target = Target("iterations", 50.0)
    seconds = 60.0
    settings = SchedulerSettings(workers=2)
    processes = 1
    lr_schedule = None
    by_hand = None

    def model(self, device: torch.device) -> torch.nn.Module:
        """A model that nobody looks at."""
        return make_model().to(device)

    def worker(self, shared: SharedParameters, process: int) -> Worker:
        """Sends each iteration, and submits a gradient of zeros."""
        grads = [torch.zeros_like(shared.flat) for _ in range(4)]

        async def work(context: WorkerContext) -> None:
            context.send(context.iteration)
            await context.submit(grads[context.index])

        return work

    def evaluate(self, model: torch.nn.Module, results: Sequence[Any]) -> float:
        """How many iterations there were; none before the first."""
        return len(results) if results else float("nan")
