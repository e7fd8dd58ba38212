"""Workers to run: simulated ones for benchmarks, and a model's forward and backward."""

from __future__ import annotations

import asyncio
import copy
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hogstream.scheduler.checks import check_integer, check_number
from hogstream.scheduler.context import WorkerContext
from hogstream.scheduler.parameters import SharedParameters


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


@dataclass(frozen=True)
class _Replica:
    """A worker's own module over the shared parameters, with gradients of its own.

    An update may still read one gradient while the next is made: there are as many as the depth.
    """

    module: torch.nn.Module
    flat: torch.Tensor
    grads: list[torch.Tensor]
    views: list[dict[str, torch.Tensor]]

    def fits(self, context: WorkerContext) -> bool:
        """Whether it was made for a context like this one."""
        return self.flat is context.flat and len(self.grads) == context.depth

    def next_grad(self, iteration: int) -> torch.Tensor:
        """Points the module's gradients into a flat one that no update reads, and clears it."""
        index = iteration % len(self.grads)
        for name, parameter in self.module.named_parameters():
            parameter.grad = self.views[index][name]
        return self.grads[index].zero_()


class ModelWorker:
    """Trains a model: forward and backward on a batch, on a thread, then one update.

    Every worker has a replica of the model. Its parameters are those that its context has: the
    shared ones, live (Hogwild: they change while it reads them), or its snapshot of them. Its
    gradients and buffers are its own. The flat gradient is zero where a batch does not reach a
    parameter, whose ``ms`` then decays.
    """

    def __init__(
        self,
        shared: SharedParameters,
        model: torch.nn.Module,
        loss: Callable[[torch.nn.Module, Any], torch.Tensor],
        batches: Iterator[Any],
        on_loss: Callable[[int, float], None] | None = None,
    ) -> None:
        """Holds what the workers share.

        Args:
            shared: The shared parameters, made from ``model`` or one like it.
            model: Copied for each worker.
            loss: Maps a model and a batch to a scalar to minimise.
            batches: Read by all workers in turn, one batch an iteration, on their threads; must not
                run out.
            on_loss: Called on the event loop after each update, with worker index and loss.
        """
        self._shared = shared
        self._model = model
        self._loss = loss
        self._batches = batches
        self._on_loss = on_loss
        self._reading = threading.Lock()  # workers share the iterator of batches
        self._replicas: dict[int, _Replica] = {}

    async def __call__(self, context: WorkerContext) -> None:
        """One iteration: a batch, its gradient, the update.

        Raises:
            RuntimeError: If the batches have run out.
        """
        replica = self._replicas.get(context.index)
        if replica is None or not replica.fits(context):
            replica = self._replicas[context.index] = self._make_replica(context)
        loss, grad = await context.run_blocking(self._forward_backward, replica, context.iteration)
        await context.submit(grad)
        if self._on_loss is not None:
            self._on_loss(context.index, loss)

    def _make_replica(self, context: WorkerContext) -> _Replica:
        module = copy.deepcopy(self._model)
        self._shared.attach(module, context.parameters)
        grads = [torch.zeros_like(self._shared.flat) for _ in range(context.depth)]
        views = [self._shared.views_of(grad) for grad in grads]
        return _Replica(module, context.flat, grads, views)

    def _forward_backward(self, replica: _Replica, iteration: int) -> tuple[float, torch.Tensor]:
        with self._reading:
            try:
                batch = next(self._batches)
            except StopIteration:
                raise RuntimeError("batches must last for every update, but ran out") from None
        grad = replica.next_grad(iteration)
        loss = self._loss(replica.module, batch)
        loss.backward()
        return loss.item(), grad
