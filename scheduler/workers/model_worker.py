"""A worker that trains a model: forward and backward on batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from hogstream.scheduler.checks import check_integer, check_number, check_type
from hogstream.scheduler.context import WorkerContext
from hogstream.scheduler.gradients import Gradient
from hogstream.scheduler.parameters import SharedParameters
from hogstream.scheduler.workers.batches import Batches, moved
from hogstream.scheduler.workers.random_numbers import NothingDrawn, RandomNumbers
from hogstream.scheduler.workers.replica import Replica

_NOTHING = nullcontext()


class ModelWorker:
    """Trains a model: forward and backward on a batch, on a thread, then one update.

    Every worker has a replica of the model. Its parameters are those that its context has: the
    shared ones, live (Hogwild: they change while it reads them), or its snapshot of them. Its
    buffers are the context's too: the model's own, or as ``buffers=`` of the scheduler says. Where
    the loss puts a new tensor in the place of a buffer, that is copied into it. Its gradients are
    its own.

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
        batches: Iterable[Any],
        *,
        accumulate: int = 1,
        max_grad_norm: float | None = None,
        autocast: torch.dtype | None = None,
        seed: int | None = None,
    ) -> None:
        """Holds what the workers share.

        Args:
            shared: The shared parameters, made from ``model`` or one like it. If ``model`` is
                attached to them, it must be so when a run begins.
            model: Copied for each worker.
            loss: Maps a model and a batch to a scalar to minimise.
            batches: Read by all workers in turn, on their threads. An iterable that is not an
                iterator is begun in each scope of a scheduler, and anew whenever it ends, such as a
                ``DataLoader``, whose processes end with the scope. An iterator must not run out.
                Tensors are moved to the parameters' device, those in pinned memory without waiting.
            accumulate: How many batches an update is made of; its gradient is that of the mean of
                their losses. All read the parameters as they are at that moment.
            max_grad_norm: Scales a gradient down to this norm, > 0, over all that the loss has
                reached, as ``torch.nn.utils.clip_grad_norm_``.
            autocast: ``torch.bfloat16`` or ``torch.float16``: the loss is computed under
                ``torch.autocast``. The loss is not scaled, for which float16 may be too small.
            seed: Each worker draws the random numbers of its loss, dropout too, from a generator of
                its own, made from this, the number of its process and its index in that. What takes
                no generator, and a forward that is run again in the backward
                (``torch.utils.checkpoint``), is an error then. It costs some 10 us for each
                operation of forward and backward. None: from torch's default generator, which is
                one for all threads of a process.

        Raises:
            TypeError: If an argument is of a wrong type.
            ValueError: If a number is out of range, or ``autocast`` another dtype.
        """
        check_type("shared", shared, SharedParameters)
        check_type("model", model, torch.nn.Module)
        if not callable(loss):
            raise TypeError(f"loss must be callable, got {loss!r}")
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast must be bfloat16, float16 or None, got {autocast!r}")
        self._shared = shared
        self._model = model
        self._loss = loss
        self._batches = Batches(batches)
        self._accumulate = check_integer("accumulate", accumulate, at_least=1)
        self._max_grad_norm = (
            None if max_grad_norm is None else check_number("max_grad_norm", max_grad_norm, above=0)
        )
        self._autocast = autocast
        self._seed = None if seed is None else check_integer("seed", seed, at_least=0)
        self._random_numbers: dict[int, RandomNumbers] = {}
        self._replicas: dict[int, Replica] = {}

    async def __call__(self, context: WorkerContext) -> None:
        """One iteration: its batches, their gradient, the update.

        Raises:
            TypeError: If the loss is no tensor, or complex.
            ValueError: If the loss is no scalar, or the model does not fit what is shared.
            RuntimeError: If the model was attached to what is shared, and is elsewhere when a run
                begins; if the batches have run out, the loss depends on no parameter, or has put
                another in the place of one, or other data into it, or in that of a buffer what does
                not fit there; or if ``seed`` cannot be kept.
        """
        replica = self._replicas.get(context.index)
        if replica is None or replica.context is not context:
            replica = self._begin_run(context)
        await context.compute(self._compute, replica, context)

    def _begin_run(self, context: WorkerContext) -> Replica:
        """A worker's replica for a run, whose context is new: that of its last one if it fits."""
        self._shared.check_still_attached(self._model)
        replica = self._replicas.get(context.index)
        if replica is None or not replica.fits(context):
            replica = self._replicas[context.index] = Replica(self._shared, self._model, context)
            context.on_close(self._close)
        replica.context = context
        return replica

    def _compute(self, replica: Replica, context: WorkerContext) -> tuple[Gradient, float]:
        """The gradient of some batches, and the mean of their losses."""
        random_numbers = self._random_numbers_of(context.index)
        replica.clear()
        losses = [
            self._forward_backward(replica.module, random_numbers) for _ in range(self._accumulate)
        ]
        grad = replica.take_grad(context.iteration, len(losses), self._max_grad_norm)
        return grad, sum(loss.item() for loss in losses) / len(losses)

    def _forward_backward(
        self, module: torch.nn.Module, random_numbers: RandomNumbers | None
    ) -> torch.Tensor:
        device = self._shared.flat.device
        batch = moved(self._batches.read(), device)
        drawing: AbstractContextManager[object] = _NOTHING
        drawing_nothing: AbstractContextManager[object] = _NOTHING
        if random_numbers is not None:
            drawing = random_numbers.drawn()
            drawing_nothing = NothingDrawn()  # type: ignore[no-untyped-call]
        casting: AbstractContextManager[object] = _NOTHING
        if self._autocast is not None:
            casting = torch.autocast(device.type, self._autocast)
        with drawing, casting:
            loss = self._loss(module, batch)
        if not isinstance(loss, torch.Tensor):
            raise TypeError(f"loss must return a tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"loss must return a scalar, got shape {tuple(loss.shape)}")
        if loss.is_complex():
            name = str(loss.dtype).removeprefix("torch.")
            raise TypeError(f"loss must return a real scalar, got {name}")
        if loss.requires_grad:  # else it has reached nothing, or has gone backward itself
            with drawing_nothing:
                loss.backward()
        return loss.detach()

    def _random_numbers_of(self, worker: int) -> RandomNumbers | None:
        if self._seed is None:
            return None
        numbers = self._random_numbers.get(worker)
        if numbers is None:
            process = max(self._shared.slot - 1, 0)
            numbers = RandomNumbers(f"{self._seed}/{process}/{worker}")
            self._random_numbers[worker] = numbers
        return numbers

    def _close(self) -> None:
        """Leaves nothing behind when a scheduler's scope is left."""
        self._replicas.clear()
        self._batches.close()
