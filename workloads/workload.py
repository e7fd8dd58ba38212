"""What can be trained and measured: a model, its workers, and when it is done."""

from __future__ import annotations

import math
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hogstream.profiling.errors import MeasurementError
from hogstream.profiling.measure.by_hand import Work
from hogstream.scheduler import SchedulerSettings, SharedParameters, Worker
from hogstream.scheduler.checks import (
    check_callable,
    check_integer,
    check_number,
    check_type,
    error_text,
)
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


def check_workload(found: Any) -> Workload:
    """What has all that a ``Workload`` has.

    Raises:
        TypeError: If it has not, or something in it is of a wrong type.
        ValueError: If a number is out of range.
    """
    missing = [name for name in _MEMBERS if not hasattr(found, name)]
    if missing:
        raise TypeError(
            f"must be a Workload, with {', '.join(_MEMBERS)}, got {found!r} without "
            f"{', '.join(missing)}"
        )
    check_type("name", found.name, str)
    check_type("target", found.target, Target)
    check_number("seconds", found.seconds, above=0)
    check_type("settings", found.settings, SchedulerSettings)
    check_integer("processes", found.processes, at_least=1)
    for name in ("model", "worker", "evaluate"):
        check_callable(name, getattr(found, name))
    for name in ("by_hand", "lr_schedule"):
        if getattr(found, name) is not None:
            check_callable(name, getattr(found, name))
    workload: Workload = found
    return workload


_MEMBERS = tuple(name for name in vars(Workload) if not name.startswith("_"))


def called(workload: Workload, name: str, *arguments: Any) -> Any:
    """What a method of a workload returns.

    Args:
        workload: Whose.
        name: Of the method.
        arguments: For it.

    Raises:
        MeasurementError: If it raises something; says what, and where.
    """
    try:
        return getattr(workload, name)(*arguments)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise MeasurementError(
            f"{name} of {workload.name} failed: {error_text(error)} ({last.filename}:{last.lineno})"
        ) from error
