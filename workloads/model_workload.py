"""The common case of a workload: a model, its loss, and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.profiling.measure.by_hand import HandRun, Hogwild, Loss
from hogstream.scheduler import ModelWorker, SchedulerSettings, SharedParameters
from hogstream.scheduler.schedules import LrSchedule
from hogstream.workloads.workload import Target

# What torch.optim.RMSprop knows of.
_OF_TORCH = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered")


@dataclass(frozen=True)
class ModelWorkload:
    """A ``Workload`` that trains a model on batches.

    Functions are of a module, as they are pickled.

    Attributes:
        name: What it is called in tables.
        make_model: Returns a new model, on the CPU.
        loss: Maps a model and a batch to a scalar to minimise.
        make_batches: Called in each process; returns an iterable of batches, such as a
            ``DataLoader``. It is begun anew when it ends, unless it is an iterator, which must
            last. The first batch is made before a training's time begins, with what is loaded for
            it. Batches are moved to the model's device.
        metric: Maps a model to what ``target`` is about; it is in eval mode, without gradients.
        target: When a training is done.
        seconds: When a training that has not reached the target is given up, > 0.
        settings: How the scheduler runs, if nothing else is asked for.
        processes: Over how many processes workers are spread, if nothing else is asked for.
        lr_schedule: The learning rate in the course of a training; None for a constant one.
    """

    name: str
    make_model: Callable[[], torch.nn.Module]
    loss: Loss
    make_batches: Callable[[], Iterable[Any]]
    metric: Callable[[torch.nn.Module], float]
    target: Target
    seconds: float = 60.0
    settings: SchedulerSettings = field(default_factory=lambda: SchedulerSettings(workers=2))
    processes: int = 1
    lr_schedule: LrSchedule | None = None

    @property
    def by_hand(self) -> Hogwild | None:
        """Plain Hogwild with ``torch.optim.RMSprop``, its ``eps`` outside the root, under a lock.

        None if torch has no such update, or there is a schedule.
        """
        numbers = self.settings.hyperparameters
        theirs = {name: getattr(numbers, name) for name in _OF_TORCH}
        same = replace(Hyperparameters(eps_inside_sqrt=numbers.eps_inside_sqrt), **theirs)
        if self.lr_schedule is not None or numbers != same:
            return None
        return Hogwild(self._prepare, theirs)

    def model(self, device: torch.device) -> torch.nn.Module:
        """A new model."""
        return self.make_model().to(device)

    def worker(self, shared: SharedParameters, process: int) -> ModelWorker:
        """Trains a model of its own over the shared parameters."""
        model = self.model(shared.flat.device)
        return ModelWorker(shared, model, self.loss, _Begun(self.make_batches()))

    def evaluate(self, model: torch.nn.Module, results: Sequence[Any]) -> float:
        """The metric of the model."""
        model.eval()
        with torch.no_grad():
            return float(self.metric(model))

    def _prepare(self, run: HandRun) -> tuple[Loss, Iterable[Any]]:
        return self.loss, _Begun(self.make_batches())


class _Begun:
    """Batches of which the first is there already."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self._rest: Iterator[Any] | None = iter(batches)
        self._first = list(islice(self._rest, 1))

    def __iter__(self) -> Iterator[Any]:
        """Those that have begun, at first; then from the start."""
        rest, self._rest = self._rest, None
        return iter(self._batches) if rest is None else chain(self._first, rest)
