"""Evaluation of a model while it is trained, without stopping anybody."""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from hogstream.profiling.errors import MeasurementError
from hogstream.scheduler.thread_state import ThreadState
from hogstream.workloads.workload import Workload, called

# An evaluation is followed by a pause so many times as long, but for the last: in a training that
# lasts, it takes a twentieth of a core.
_PAUSE = 19
_LEAST_PAUSE = 0.01


class Point(NamedTuple):
    """What a model was at some time.

    Attributes:
        time: By ``time.perf_counter``, when it was copied.
        updates: That it had had since the training began.
        value: Of the metric; NaN if there is none yet.
    """

    time: float
    updates: int
    value: float


class Watch:
    """Evaluates copies of a model now and then, on a thread of its own, until the target.

    Attributes:
        points: One of each evaluation; the first is of the model before its training.
        results: What workers have sent.
        seconds: That evaluations and copies took during the training.
        reached: The point that reached the target; None before.
    """

    def __init__(self, workload: Workload, model: torch.nn.Module, made: Callable[[], int]) -> None:
        """Evaluates the model once.

        Args:
            workload: What is trained.
            model: That is trained; what others do to it meanwhile is seen.
            made: How many updates it has had.
        """
        self._workload = workload
        self._made = made
        self._live = [*model.parameters(), *model.buffers()]
        self._model = copy.deepcopy(model)
        self._copied = [*self._model.parameters(), *self._model.buffers()]
        self.results: list[Any] = []
        self.points: list[Point] = []
        self.reached: Point | None = None
        self.seconds = 0.0
        self.evaluate()
        # Before the training, and with what is needed once: data, first kernels.
        self.seconds, self._pause = 0.0, _LEAST_PAUSE

    def note_result(self, worker: int, value: Any) -> None:
        """Keeps what a worker has sent."""
        self.results.append(value)

    async def follow(self, stop: Callable[[], None]) -> None:
        """Evaluates until the target is reached, or this is cancelled.

        Args:
            stop: Ends the training then; also if an evaluation fails.

        Raises:
            MeasurementError: If an evaluation fails.
        """
        loop = asyncio.get_running_loop()
        # One thread for an operation, as evaluations are to take a part of one core only.
        try:
            with ThreadPoolExecutor(1, initializer=ThreadState(1).enter) as thread:
                while self.reached is None:
                    await asyncio.sleep(self._pause)
                    if self._made() > self.points[-1].updates:
                        await loop.run_in_executor(thread, self.evaluate)
        finally:
            stop()

    def evaluate(self) -> None:
        """Copies the model and evaluates the copy.

        Raises:
            MeasurementError: If the workload cannot evaluate it.
        """
        began = time.perf_counter()
        updates = self._made()
        with torch.no_grad():
            for copied, live in zip(self._copied, self._live, strict=True):
                copied.copy_(live)
        copied_at = time.perf_counter()
        value = called(self._workload, "evaluate", self._model, tuple(self.results))
        if not isinstance(value, (int, float)):
            raise MeasurementError(
                f"evaluate of {self._workload.name} must return a number, got {value!r}"
            )
        point = Point(copied_at, updates, value if math.isfinite(value) else math.nan)
        self.points.append(point)
        if self.reached is None and self._workload.target.is_reached_by(point.value):
            self.reached = point
        took = time.perf_counter() - began
        self.seconds += took
        self._pause = max(_LEAST_PAUSE, _PAUSE * took)
