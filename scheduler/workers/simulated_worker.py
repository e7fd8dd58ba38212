"""A worker that has its gradients ready, for benchmarks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import torch

from hogstream.scheduler.checks import check_integer, check_number
from hogstream.scheduler.context import WorkerContext


class SimulatedWorker:
    """Submits ready gradients in rotation, each after a think time.

    Think times sleep on the event loop's timer, whose resolution is about a millisecond.
    """

    def __init__(
        self,
        gradients: Sequence[torch.Tensor],
        *,
        workers: int,
        think_time: float = 0.0,
        think_spread: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Deals the gradients out.

        Args:
            gradients: Each of shape (elements,); at least as many as workers.
            workers: How many workers share them out.
            think_time: Median seconds between a read and its submission; >= 0.
            think_spread: Sigma of the log-normal distribution of think times; 0 is constant, and
                at 1 one in forty takes seven times the median or more.
            seed: Of the think times.

        Raises:
            TypeError: If a number is of a wrong type.
            ValueError: If there are too few gradients, or a number is out of range.
        """
        workers = check_integer("workers", workers, at_least=1, at_most=len(gradients))
        self._gradients = [gradients[index::workers] for index in range(workers)]
        self._random = [random.Random(f"{seed}/{index}") for index in range(workers)]
        self._think_time = check_number("think_time", think_time)
        self._think_spread = check_number("think_spread", think_spread)

    async def __call__(self, context: WorkerContext) -> None:
        """One iteration: thinks, and submits the next gradient."""
        if self._think_time:
            stretch = self._random[context.index].lognormvariate(0.0, self._think_spread)
            await asyncio.sleep(self._think_time * stretch)
        mine = self._gradients[context.index]
        await context.submit(mine[context.iteration % len(mine)])
