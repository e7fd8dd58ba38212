"""Workers to run: simulated ones for benchmarks, and a model's forward and backward."""

from __future__ import annotations

import asyncio
import copy
import random
import threading
from collections.abc import Callable, Iterator, Sequence
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


class _Replica:
    """A worker's own module over the shared parameters, with gradients of its own.

    Updates may still read gradients while the next is made, so there are several.
    """

    def __init__(
        self, shared: SharedParameters, model: torch.nn.Module, context: WorkerContext
    ) -> None:
        self._flat = context.flat
        self._originals = list(model.parameters())
        self._frozen = _frozen(self._originals)
        self.module = copy.deepcopy(model)
        shared.attach(self.module, context.parameters)
        self._parameters = dict(self.module.named_parameters())
        self._targets = context.parameters
        # One more than may be in flight: an update that nobody waits for any more is so as well.
        self._grads = [torch.zeros_like(shared.flat) for _ in range(context.depth + 1)]
        self._views = [shared.views_of(grad) for grad in self._grads]

    def fits(self, context: WorkerContext) -> bool:
        """Whether it was made for a context like this one."""
        return self._flat is context.flat and len(self._grads) == context.depth + 1

    def clear(self) -> None:
        """Has no parameter a gradient, and freezes those that were frozen in the model since."""
        for parameter in self._parameters.values():
            parameter.grad = None
        frozen = _frozen(self._originals)
        if frozen != self._frozen:  # else what the loss itself has frozen stays so
            self._frozen = frozen
            for parameter, each in zip(self._parameters.values(), frozen, strict=True):
                parameter.requires_grad_(not each)

    def take_grad(self, iteration: int) -> tuple[torch.Tensor, Sequence[str] | None]:
        """Copies what a backward has made into a flat gradient that no update reads.

        Returns:
            The gradient, and the names of the parameters that have one; None if all do.
        """
        self._check_parameters()
        index = iteration % len(self._grads)
        made = {
            name: parameter.grad
            for name, parameter in self._parameters.items()
            if parameter.grad is not None
        }
        if not made:
            raise RuntimeError(
                "loss must depend on a parameter of the model that requires a gradient, got none"
            )
        with torch.no_grad():
            torch._foreach_copy_(
                [self._views[index][name] for name in made],
                [
                    each if each.layout == torch.strided else each.to_dense()
                    for each in made.values()
                ],
            )
        return self._grads[index], None if len(made) == len(self._parameters) else tuple(made)

    def _check_parameters(self) -> None:
        """Checks that the parameters are those that are shared: others would train nothing."""
        now = dict(self.module.named_parameters())
        for name in {**self._parameters, **now}:
            parameter = self._parameters.get(name)
            if parameter is None or now.get(name) is not parameter:
                raise RuntimeError(f"loss must leave the model its parameters, got another {name}")
            if parameter.data_ptr() != self._targets[name].data_ptr():
                raise RuntimeError(f"loss must leave {name} in shared memory, got other data in it")


def _frozen(parameters: Sequence[torch.nn.Parameter]) -> list[bool]:
    return [not parameter.requires_grad for parameter in parameters]


class ModelWorker:
    """Trains a model: forward and backward on a batch, on a thread, then one update.

    Every worker has a replica of the model. Its parameters are those that its context has: the
    shared ones, live (Hogwild: they change while it reads them), or its snapshot of them. Its
    gradients and buffers are its own.

    A parameter that a batch's loss does not reach, or that is frozen, is left alone by that batch's
    update, its ``ms`` too, as an optimizer leaves one whose ``grad`` is None. Replicas follow
    ``requires_grad`` of the model's parameters, which may change at any time; in processes, of the
    model that each of them has made.
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
            RuntimeError: If the batches have run out, or the loss depends on no parameter, or has
                put another in the place of one, or other data into it.
        """
        replica = self._replicas.get(context.index)
        if replica is None or not replica.fits(context):
            replica = self._replicas[context.index] = _Replica(self._shared, self._model, context)
        loss, grad, reached = await context.run_blocking(
            self._forward_backward, replica, context.iteration
        )
        await context.submit(grad, only=reached)
        if self._on_loss is not None:
            self._on_loss(context.index, loss)

    def _forward_backward(
        self, replica: _Replica, iteration: int
    ) -> tuple[float, torch.Tensor, Sequence[str] | None]:
        with self._reading:
            try:
                batch = next(self._batches)
            except StopIteration:
                raise RuntimeError("batches must last for every update, but ran out") from None
        replica.clear()
        loss = self._loss(replica.module, batch)
        if loss.requires_grad:  # else it has reached nothing, or has gone backward itself
            loss.backward()
        return loss.item(), *replica.take_grad(iteration)
