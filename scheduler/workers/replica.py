"""A worker's own module over what is shared."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

import torch

from hogstream.scheduler.buffers import Buffers, buffers_of
from hogstream.scheduler.context import WorkerContext
from hogstream.scheduler.gradients import Gradient
from hogstream.scheduler.parameters import SharedParameters


class Replica:
    """A worker's own module over the shared parameters, with gradients of its own.

    Attributes:
        module: A copy of the model, with the parameters and buffers of the context.
        context: Of the worker's run.
    """

    def __init__(
        self, shared: SharedParameters, model: torch.nn.Module, context: WorkerContext
    ) -> None:
        """Copies a model.

        Raises:
            ValueError: If its parameters or buffers do not fit the shared ones.
        """
        if not shared.buffers and (missing := list(buffers_of(model))):
            raise ValueError(
                f"shared must have buffers as the model, which has {', '.join(missing)}: make it "
                "by SharedParameters.from_module"
            )
        self.context = context
        self._flat = context.flat
        self._originals = list(model.parameters())
        self._frozen = _frozen(self._originals)
        self.module = copy.deepcopy(model)
        shared.attach(self.module, context.parameters, context.buffers)
        self._parameters = dict(self.module.named_parameters())
        first = self._flat.data_ptr()
        self._offsets = {
            name: view.data_ptr() - first
            for name, view in context.parameters.items()
            if view.numel()
        }
        self._buffers = context.buffers
        self._parameter_slots = _slots(self.module, "_parameters")
        names = {id(buffer): name for name, buffer in self.module.named_buffers()}  # tied ones once
        self._buffer_slots = [
            (names.get(id(slot.tensor), slot.name), slot)
            for slot in _slots(self.module, "_buffers")
            if slot.tensor is None or slot.tensor.layout == torch.strided
        ]
        self._sizes = [
            (held, len(held))
            for each in self.module.modules()
            for held in (each._parameters, each._buffers, each._modules)
        ]
        # Updates may still read gradients while the next is made, so there are several: one more
        # than may be in flight, as an update that nobody waits for any more is so as well.
        flat = context.depth + 1 if context.prefers_flat else 0
        self._grads = [torch.zeros_like(shared.flat) for _ in range(flat)]
        self._views = [shared.views_of(grad) for grad in self._grads]

    def fits(self, context: WorkerContext) -> bool:
        """Whether it was made for a context like this one."""
        return (
            self._flat is context.flat
            and len(self._grads) == (context.depth + 1 if context.prefers_flat else 0)
            and (self._buffers is context.buffers or self._has_buffers(context.buffers))
        )

    def _has_buffers(self, buffers: Buffers) -> bool:
        """Whether these are in the memory that its own are in; remembers them then."""
        same = all(
            each.data_ptr() == self._buffers[name].data_ptr() for name, each in buffers.items()
        )
        if same:
            self._buffers = buffers
        return same

    def clear(self) -> None:
        """Has no parameter a gradient, and freezes those that were frozen in the model since."""
        for parameter in self._parameters.values():
            parameter.grad = None
        frozen = _frozen(self._originals)
        if frozen != self._frozen:  # else what the loss itself has frozen stays so
            self._frozen = frozen
            for parameter, each in zip(self._parameters.values(), frozen, strict=True):
                parameter.requires_grad_(not each)

    def take_grad(self, iteration: int, batches: int, max_norm: float | None) -> Gradient:
        """What backwards have made, where no later one writes.

        Args:
            iteration: Number of the worker's iteration.
            batches: How many backwards it is the sum of; their mean is taken.
            max_norm: Scales it down to this norm; None for any.

        Returns:
            By name, the gradients of the parameters that have one; if the context prefers it, and
            all have, one flat gradient.
        """
        self._check_parameters()
        self._take_buffers()
        grads = {
            name: grad
            for name, parameter in self._parameters.items()
            if (grad := parameter.grad) is not None
        }
        if not grads:
            raise RuntimeError(
                "loss must depend on a parameter of the model that requires a gradient, got none"
            )
        flat = None
        with torch.no_grad():
            if self._grads:
                index = iteration % len(self._grads)
                grads = self._copied(grads, index)
                flat = self._grads[index] if len(grads) == len(self._parameters) else None
            else:
                grads = {name: self._plain(name, grad) for name, grad in grads.items()}
            parts = list(grads.values()) if flat is None else [flat]
            if batches > 1:
                torch._foreach_div_(parts, batches)
            if max_norm is not None:
                _clip(parts, max_norm)
        return grads if flat is None else flat

    def _copied(self, grads: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
        """Gradients in flat memory that no update reads."""
        views = {name: self._views[index][name] for name in grads}
        sources = [
            grad if grad.layout == torch.strided else grad.to_dense() for grad in grads.values()
        ]
        torch._foreach_copy_(list(views.values()), sources)
        return views

    def _plain(self, name: str, grad: torch.Tensor) -> torch.Tensor:
        """A gradient as updates take it; backwards leave it so, but for what is sparse."""
        dtype = self._parameters[name].dtype
        if grad.layout is torch.strided and grad.dtype is dtype and grad.is_contiguous():
            return grad
        return (grad if grad.layout is torch.strided else grad.to_dense()).to(dtype).contiguous()

    def _check_parameters(self) -> None:
        """Checks that the parameters are those that are shared: others would train nothing."""
        for held, size in self._sizes:
            if len(held) != size:
                self._raise_added()
        for slot in self._parameter_slots:
            if slot.held[slot.key] is not slot.tensor:
                raise RuntimeError(
                    f"loss must leave the model its parameters, got another {slot.name}"
                )
        first = self._flat.data_ptr()
        for name, offset in self._offsets.items():
            if self._parameters[name].data_ptr() != first + offset:
                raise RuntimeError(f"loss must leave {name} in shared memory, got other data in it")

    def _raise_added(self) -> None:
        slots = [*_slots(self.module, "_parameters"), *_slots(self.module, "_buffers")]
        before = {slot.name for slot in self._parameter_slots}
        before |= {slot.name for _, slot in self._buffer_slots}
        changed = sorted({slot.name for slot in slots} ^ before)
        raise RuntimeError(
            f"loss must leave the model its parameters and buffers, got another "
            f"{', '.join(changed) or 'module in it'}"
        )

    def _take_buffers(self) -> None:
        """Copies to where a buffer is shared what the loss has put in its place, if it has."""
        for name, (_, held, key, tensor) in self._buffer_slots:
            now, shared = held[key], self._buffers.get(name)
            if now is tensor and (shared is None or now.data_ptr() == shared.data_ptr()):
                continue
            if now is None or shared is None or _kind(now) != _kind(shared):
                raise RuntimeError(
                    f"loss must leave buffer {name} {_kind(shared)}, got {_kind(now)}: register "
                    f"it so, before the shared parameters are made"
                )
            with torch.no_grad():
                shared.copy_(now)
            tensor.data = shared
            held[key] = tensor


class _Slot(NamedTuple):
    """Where a module has a tensor, or None: code may put another there."""

    name: str
    held: MutableMapping[str, Any]
    key: str
    tensor: Any


def _slots(module: torch.nn.Module, kind: str) -> list[_Slot]:
    """The slots of a module and those in it, of ``"_parameters"`` or ``"_buffers"``."""
    return [
        _Slot(f"{prefix}.{key}" if prefix else key, getattr(each, kind), key, tensor)
        for prefix, each in module.named_modules()
        for key, tensor in getattr(each, kind).items()
    ]


def _clip(grads: list[torch.Tensor], max_norm: float) -> None:
    """As ``torch.nn.utils.clip_grad_norm_``, which takes much longer over a single tensor."""
    one, *others = grads
    norm = torch.nn.utils.get_total_norm(grads) if others else torch.linalg.vector_norm(one)
    torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))


def _kind(tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return "None"
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _frozen(parameters: Sequence[torch.nn.Parameter]) -> list[bool]:
    return [not parameter.requires_grad for parameter in parameters]
