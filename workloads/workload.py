"""What can be trained and measured: a model, its workers, and when it is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hogstream.profiling.measure.by_hand import Work
from hogstream.scheduler import SchedulerSettings, SharedParameters, Worker
from hogstream.scheduler.schedules import LrSchedule


@dataclass(frozen=True)
class Target:
    """When a training is done.

    Attributes:
        metric: What ``Workload.evaluate`` returns, in words, such as ``"test accuracy"``.
        value: That is to be reached, finite.
        higher_is_better: Whether a value above is reached too, or one below.

    Raises:
        ValueError: If ``value`` is not finite.
    """

    metric: str
    value: float
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"value must be finite, got {self.value!r}")

    def is_reached_by(self, value: float) -> bool:
        """Whether a value is as good, or better; a NaN is not."""
        return value >= self.value if self.higher_is_better else value <= self.value


class Workload(Protocol):
    """What ``hogstream train`` trains: with each policy, one worker alone, and by hand.

    It is pickled for other processes. Before ``model``, and in each process before ``worker`` or
    ``by_hand``, the generators of torch, ``random`` and NumPy are seeded, in each process otherwise
    and in each round otherwise: what is drawn from them needs no seed of its own.
    """

    @property
    def name(self) -> str:
        """What it is called in tables."""

    @property
    def target(self) -> Target:
        """When a training is done."""

    @property
    def seconds(self) -> float:
        """When a training that has not reached the target is given up, > 0."""

    @property
    def settings(self) -> SchedulerSettings:
        """How the scheduler runs, if nothing else is asked for: hyperparameters, workers, depth."""

    @property
    def processes(self) -> int:
        """Over how many processes workers are spread, if nothing else is asked for."""

    @property
    def lr_schedule(self) -> LrSchedule | None:
        """The learning rate in the course of a training; None for a constant one."""

    @property
    def by_hand(self) -> Work | None:
        """The same training without the scheduler: ``torch.optim.RMSprop`` under ``run.lock``.

        A function of a module, or a method of this. It is called in each of the processes, over the
        same model (``run.model``). None if there is none.
        """

    def model(self, device: torch.device) -> torch.nn.Module:
        """A new model with its first parameters; its parameters are those that are trained."""

    def worker(self, shared: SharedParameters, process: int) -> Worker:
        """What trains in a process; called there, once for each training.

        Args:
            shared: Made from a model.
            process: Number of the process, from 0.
        """

    def evaluate(self, model: torch.nn.Module, results: Sequence[Any]) -> float:
        """The metric of ``target``; called now and then while workers go on, on another thread.

        Args:
            model: Has a copy of the parameters and buffers as they were a moment ago, in whatever
                mode this left it in. Nobody else uses it.
            results: What workers have sent until then (``context.send`` or ``run.send``), in the
                order in which it came.
        """
