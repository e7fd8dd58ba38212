"""Learning rates that change while a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import NamedTuple

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.scheduler.checks import check_callable, check_integer, check_number
from hogstream.scheduler.parameters import SharedParameters


class Progress(NamedTuple):
    """How far a run has come when an update is submitted.

    Attributes:
        version: Of the shared parameters: how many updates they have had, from all processes, and
            before this run too.
        seconds: Since the run began.
    """

    version: int
    seconds: float


#: Maps the progress of a run to the learning rate of an update, finite and >= 0.
LrSchedule = Callable[[Progress], float]


@dataclass(frozen=True)
class LinearDecay:
    """A learning rate that goes from one to another in a straight line, and stays there.

    With both ``updates`` and ``seconds``, it goes by the one that is further on its way.

    Attributes:
        lr: Where it starts, finite and >= 0.
        updates: The version of the shared parameters at which it has arrived, >= 1; or None.
        seconds: How long after the start of the run it has arrived, > 0; or None.
        to: Where it goes, finite and >= 0.

    Raises:
        TypeError: If a number is of a wrong type.
        ValueError: If one is out of range, or neither ``updates`` nor ``seconds`` is given.
    """

    lr: float
    updates: int | None = None
    seconds: float | None = None
    to: float = 0.0

    def __init__(
        self,
        lr: float,
        *,
        updates: int | None = None,
        seconds: float | None = None,
        to: float = 0.0,
    ) -> None:
        if updates is None and seconds is None:
            raise ValueError("updates or seconds must be given, got neither")
        checked = {
            "lr": check_number("lr", lr),
            "updates": None if updates is None else check_integer("updates", updates, at_least=1),
            "seconds": None if seconds is None else check_number("seconds", seconds, above=0),
            "to": check_number("to", to),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def __call__(self, progress: Progress) -> float:
        """The learning rate at a progress."""
        by_updates = 0.0 if self.updates is None else progress.version / self.updates
        by_seconds = 0.0 if self.seconds is None else progress.seconds / self.seconds
        way = min(max(by_updates, by_seconds), 1.0)
        return self.lr + (self.to - self.lr) * way


class ScheduledRate:
    """Gives hyperparameters the learning rate that a run's schedule has for them."""

    def __init__(self, schedule: LrSchedule, shared: SharedParameters) -> None:
        """Starts the run's clock.

        Args:
            schedule: What is asked for each update.
            shared: Whose version it is told.

        Raises:
            TypeError: If the schedule cannot be called.
        """
        self._schedule = check_callable("lr_schedule", schedule)
        self._shared = shared
        self._start = perf_counter()
        self._before: tuple[Hyperparameters, float] | None = None

    def apply(self, hyperparameters: Hyperparameters) -> Hyperparameters:
        """These with the learning rate of now; the same object again while nothing changes.

        Raises:
            TypeError: If the schedule returns no number.
            ValueError: If it is out of range, or lost where updates are computed.
            Exception: Whatever the schedule raises.
        """
        lr = self._schedule(Progress(self._shared.version, perf_counter() - self._start))
        if self._before != (hyperparameters, lr):
            scheduled = replace(hyperparameters, lr=lr)
            scheduled.check_held_by(self._shared.flat.dtype)
            self._before, self._now = (hyperparameters, lr), scheduled
        return self._now
