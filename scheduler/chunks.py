"""Chunks: updates of one worker that compiled code computes and applies, one after the other."""

from __future__ import annotations

from collections import Counter
from time import perf_counter_ns
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hogstream.kernels.hyperparameters import Hyperparameters

#: A chunk of less is not worth the 0.1 ms that the event loop takes for it.
LEAST_UPDATES = 4096


class CompiledRun(Protocol):
    """One chunk's run of a compiled loop; what it counts is of no other."""

    def run(self, hyperparameters: Hyperparameters, until_ns: int) -> float:
        """Makes updates on the thread that calls it, until it is ended: the sum of their losses.

        Args:
            hyperparameters: What they are made with.
            until_ns: When it begins no more but for a few, by ``time.perf_counter_ns``.

        Raises:
            Exception: Whatever the step raises, or says that is wrong; what was made before counts.
        """

    def end(self) -> int:
        """Has it make no more, from any thread: how many it could have made still."""

    def finish(self) -> None:
        """Leaves to others what it has not come to; on the event loop's thread, when it has run."""

    @property
    def made(self) -> int:
        """How many updates it has made."""

    @property
    def nonfinite(self) -> int:
        """How many were left out, because a gradient holds an infinity or NaN."""

    def measured(self) -> tuple[Counter[int], npt.NDArray[np.int64]]:
        """Of some updates that were made, how many had each staleness, and their nanoseconds."""

    def stale_rows(self) -> tuple[int, int] | None:
        """How many rows were updated, and how many of those were stale; None if not counted."""


class CompiledLoop(Protocol):
    """The loop of a worker whose step is compiled.

    Attributes:
        chunk: How many updates it makes at most between two turns of the event loop.
    """

    chunk: int

    def begin(self, updates: int) -> CompiledRun:
        """Prepares a chunk of so many updates, on the event loop's thread."""


class Chunk:
    """A chunk on its way; for the context, what a ``Burst`` is.

    Attributes:
        updates: How many it may make, taken from the budget.
        of: What makes them.
        loss: The mean of those that were made; None before, or if there were none.
        started_ns: When it was begun, by ``time.perf_counter_ns``.
        ended_ns: When it ended; 0 before.
    """

    loss: float | None = None
    started_ns = ended_ns = 0

    def __init__(
        self, of: CompiledRun, updates: int, hyperparameters: Hyperparameters, seconds: float
    ) -> None:
        """Begins nothing.

        Args:
            of: What makes the updates.
            updates: How many it has been prepared for.
            hyperparameters: What they are made with.
            seconds: How long it may take, if it is not a single one that takes longer.
        """
        self.of = of
        self.updates = updates
        self._hyperparameters = hyperparameters
        self._nanoseconds = int(seconds * 1e9)
        self._ended: int | None = None

    @property
    def made(self) -> int:
        """How many updates it has made."""
        return self.of.made + self.of.nonfinite

    def run(self) -> None:
        """Makes updates until there is no permit left, or no time, or one fails.

        Raises:
            Exception: As ``CompiledRun``.
        """
        if self._ended is not None:
            return
        self.started_ns = perf_counter_ns()
        try:
            total = self.of.run(self._hyperparameters, self.started_ns + self._nanoseconds)
        finally:
            self.ended_ns = perf_counter_ns()
        if self.of.made:
            self.loss = total / self.of.made

    def end(self) -> int:
        """Has it make no more: how many it has made, or is about to."""
        if self._ended is None:
            self._ended = self.updates - self.of.end()
        return self._ended
