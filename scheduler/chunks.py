"""Chunks: updates of one worker that compiled code computes and applies, one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from time import perf_counter_ns
from typing import Protocol

from hogstream.kernels.hyperparameters import Hyperparameters

#: A chunk of less is not worth the 0.1 ms that the event loop takes for it.
LEAST_UPDATES = 4096


class CompiledLoop(Protocol):
    """The loop of a worker whose step is compiled.

    Attributes:
        chunk: How many updates it makes at most between two turns of the event loop.
    """

    chunk: int

    def begin(self, updates: int) -> None:
        """Prepares a chunk of so many updates, on the event loop's thread."""

    def run(self, hyperparameters: Hyperparameters) -> float:
        """Makes them on the thread that calls it, unless it is ended: the sum of their losses.

        Raises:
            Exception: Whatever the step raises, or says that is wrong; what was made before counts.
        """

    def end(self) -> int:
        """Has it make no more, from any thread: how many it could have made still."""

    @property
    def made(self) -> int:
        """How many updates it has made."""

    @property
    def nonfinite(self) -> int:
        """How many were left out, because a gradient holds an infinity or NaN."""

    def measured(self) -> tuple[Counter[int], Sequence[int]]:
        """Of some updates that were made, how many had each staleness, and their nanoseconds."""


class Chunk:
    """A chunk on its way; for the context, what a ``Burst`` is.

    Attributes:
        updates: How many it may make, taken from the budget.
        loop: What makes them.
        loss: The mean of those that were made; None before, or if there were none.
        started_ns: When it was begun, by ``time.perf_counter_ns``.
        ended_ns: When it ended; 0 before.
    """

    loss: float | None = None
    started_ns = ended_ns = 0

    def __init__(self, loop: CompiledLoop, updates: int, hyperparameters: Hyperparameters) -> None:
        """Begins nothing.

        Args:
            loop: What makes the updates.
            updates: How many it has been prepared for.
            hyperparameters: What they are made with.
        """
        self.loop = loop
        self.updates = updates
        self._hyperparameters = hyperparameters
        self._ended: int | None = None

    @property
    def made(self) -> int:
        """How many updates it has made."""
        return self.loop.made + self.loop.nonfinite

    def run(self) -> None:
        """Makes updates until there is no permit left, or one fails.

        Raises:
            Exception: As the loop.
        """
        if self._ended is None:
            self.started_ns = perf_counter_ns()
            try:
                total = self.loop.run(self._hyperparameters)
            finally:
                self.ended_ns = perf_counter_ns()
            if self.loop.made:
                self.loss = total / self.loop.made

    def end(self) -> int:
        """Has it make no more: how many it has made, or is about to."""
        if self._ended is None:
            self._ended = self.updates - self.loop.end()
        return self._ended
