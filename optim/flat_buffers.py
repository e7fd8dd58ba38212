"""Parameters, gradients and ``ms`` of a group in one piece of memory each."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from hogstream.kernels.operands import (
    COMPUTE_DTYPES,
    Operands,
    check_disjoint,
    lay_flat,
    own_view,
    same_layout,
)
from hogstream.optim.options import Group
from hogstream.optim.parameters import has_memory, is_distributed
from hogstream.optim.state import BUFFERS, Kinds, as_real, first_value

# Each parameter starts on a multiple of this, so that kernels may still read it in wide accesses.
_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, eq=False)
class FlatBuffer:
    """Parameters of one dtype on one device, side by side, with their gradients and state.

    The gaps between them hold zeros, which an update leaves without meaning.

    Attributes:
        operands: The memory, flat.
        params: The parameters, whose data are in ``operands.param``, and which are to torch tensors
            with storages of their own, so that each is saved as what it is.
        starts: Of each parameter, its first element in the flat memory.
        grads: The same in ``operands.grad``, in the shapes and strides of ``params``.
        state: By name, views of what ``operands`` has of it, in the same shapes and strides; shared
            as a whole.
    """

    operands: Operands
    params: list[torch.Tensor]
    starts: list[int]
    grads: list[torch.Tensor]
    state: dict[str, list[torch.Tensor]]

    def __post_init__(self) -> None:
        """Is remembered, for the children of a fork."""
        _buffers.add(self)

    def attach_grads(self, mine: Collection[int]) -> bool:
        """Sets all gradients to zero, and makes them the parameters' own.

        A parameter that requires none now, or whose dtype, device, shape or layout has changed,
        gets None.

        Args:
            mine: The ``id`` of each parameter of the optimizer: others are left alone.

        Returns:
            Whether one was elsewhere before.
        """
        flat = self.operands.grad
        flat.zero_()
        came_back = False
        for index, (param, start, ms) in enumerate(
            zip(self.params, self.starts, self.state["square_avg"], strict=True)
        ):
            if id(param) not in mine:
                continue
            kind = param.dtype, param.device, param.shape
            is_other = kind != (flat.dtype, flat.device, ms.shape) or not same_layout(param, ms)
            if is_other or not param.requires_grad:
                param.grad = None
                continue
            grad = self.grads[index]
            address = flat.data_ptr() + start * flat.element_size() if grad.numel() else 0
            if (grad.data_ptr(), grad.dtype) != (address, flat.dtype):
                # It was moved itself, as ``module.to()`` does it.
                with torch.inference_mode(False):
                    grad = self.grads[index] = own_view(flat, ms, start)
            if param.grad is not grad:
                param.grad = grad
                came_back = True
        return came_back

    def drop_grads_of_frozen(self) -> None:
        """Sets gradients to None that are zero, of parameters that require none any more."""
        for param, grad in zip(self.params, self.grads, strict=True):
            if not param.requires_grad and param.grad is grad and not grad.count_nonzero():
                param.grad = None

    def with_new_state(self, names: Iterable[str], group: Group) -> FlatBuffer:
        """The same parameters, with some of their state anew, in new memory.

        Args:
            names: What of it.
            group: Of the parameters.
        """
        operands, state = self.operands, dict(self.state)
        for name in names:
            like = operands.param if name == "kahan_comp" else operands.ms
            flat = torch.full_like(like, first_value(name, group))
            operands = operands._replace(**{_OPERAND[name]: flat})
            state[name] = _views(flat, self.state["square_avg"], self.starts)
        return replace(self, operands=operands, state=state)

    def unshare_grads(self) -> None:
        """Brings gradients back that ``module.share_memory()`` has moved, with their values.

        It is for a child just after a fork, where torch's threads are not to be used.
        """
        flat = self.operands.grad
        for index, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            if param.grad is grad and grad.device.type == "cpu" and grad.is_shared():
                own = own_view(flat, self.state["square_avg"][index], self.starts[index])
                ctypes.memmove(own.data_ptr(), grad.data_ptr(), own.nbytes)
                param.grad = self.grads[index] = own

    def holds(self, operands: Sequence[Operands | None]) -> bool:
        """Whether all parameters are updated, and none of their tensors has been replaced.

        Args:
            operands: Of each of ``params``; None for one that has no gradient.
        """
        return all(
            each is not None
            and all(
                tensor is None
                or tensor.numel() == 0  # which has no address
                or (
                    flat is not None
                    and tensor.data_ptr() == flat.data_ptr() + start * flat.element_size()
                )
                for tensor, flat in zip(each, self.operands, strict=True)
            )
            for each, start in zip(operands, self.starts, strict=True)
        )


# What ``Operands`` call state.
_OPERAND = dict(zip(BUFFERS, Operands._fields[2:], strict=True))
_buffers: weakref.WeakSet[FlatBuffer] = weakref.WeakSet()


@torch.inference_mode(False)
def _unshare_all_grads() -> None:
    for buffer in list(_buffers):
        buffer.unshare_grads()


if hasattr(os, "register_at_fork"):
    # ``module.share_memory()`` shares gradients too, and workers must have their own.
    os.register_at_fork(after_in_child=_unshare_all_grads)


def check_movable(groups: list[Group]) -> None:
    """Checks that parameters may be moved, and be the same to everybody who knows them.

    Raises:
        ValueError: If two share memory, which they would do no more; if one is in memory that is
            shared with other processes, which would keep the old one; if one is complex; or if a
            group has state by rows.
    """
    named = []
    for group_index, group in enumerate(groups):
        for option in ("rowwise", "lazy_decay"):
            if group[option]:
                raise ValueError(
                    f"{option} of group {group_index} must be False with flat=True, whose updates "
                    "are of all elements alike, got True"
                )
        for index, param in enumerate(group["params"]):
            name = f"param {index} in group {group_index}"
            if param.requires_grad:
                _check_movable(name, param)
                flat = lay_flat(as_real(param))
                named.append(((name, *Operands._fields[1:]), Operands(flat, flat[:0], flat[:0])))
            elif (span := _span_of(param)) is not None:
                names = ("", name, *Operands._fields[2:])
                named.append((names, Operands(span[:0], span, span[:0])))  # read, and not moved
    check_disjoint(named)


def _check_movable(name: str, param: torch.Tensor) -> None:
    if is_distributed(param):
        raise ValueError(
            f"{name} must be a plain tensor with flat=True, got a DTensor, whose memory belongs to "
            "what has distributed it: leave flat out"
        )
    if param.is_complex():
        raise ValueError(f"{name} must be real with flat=True, got {param.dtype}")
    if not has_memory(param):
        raise ValueError(
            f"{name} must have memory before flat=True moves it: make it, and load it, before the "
            "optimizer"
        )
    if param.device.type == "cpu" and param.is_shared():
        raise ValueError(
            f"{name} must not be shared with other processes before flat=True moves it: "
            "share the model when its optimizer has been made"
        )


def _span_of(frozen: torch.Tensor) -> torch.Tensor | None:
    """All from a tensor's first element to its last, flat; None if it is no plain memory."""
    if not has_memory(frozen) or type(frozen) not in (torch.Tensor, torch.nn.Parameter):
        return None
    if frozen.layout != torch.strided or not frozen.numel() or not frozen.data_ptr():
        return None
    size = 1 + sum(
        (size - 1) * stride for size, stride in zip(frozen.shape, frozen.stride(), strict=True)
    )
    return frozen.detach().as_strided((size,), (1,))


@torch.inference_mode(False)
@torch.no_grad()
def make_flat_buffers(groups: Iterable[Group]) -> list[list[FlatBuffer]]:
    """Moves parameters, and gradients that they have, into flat memory: one for each dtype, device.

    Nothing is moved if there is not enough memory for all.

    Args:
        groups: Parameter groups, checked; of parameters that require gradients, ``data`` and
            ``grad`` are replaced.

    Returns:
        Those of each group.
    """
    buffers = []
    for group in groups:
        alike: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for param in group["params"]:
            if param.requires_grad:
                alike.setdefault((param.dtype, param.device), []).append(param)
        buffers.append([_new_flat_buffer(params, group) for params in alike.values()])
    for buffer in (each for of_group in buffers for each in of_group):
        _move_into(buffer)
    return buffers


def _new_flat_buffer(params: list[torch.Tensor], group: Group) -> FlatBuffer:
    first = params[0]
    step = _ALIGNMENT_BYTES // first.element_size()
    ends = [0, *accumulate(-(-param.numel() // step) * step for param in params)]
    dtypes = (first.dtype, first.dtype, COMPUTE_DTYPES[first.dtype])
    operands = Operands(
        *(torch.zeros(ends[-1], dtype=dtype, device=first.device) for dtype in dtypes)
    )
    starts = ends[:-1]
    grads = [
        own_view(operands.grad, param, start) for param, start in zip(params, starts, strict=True)
    ]
    state = {"square_avg": _views(operands.ms, params, starts)}
    buffer = FlatBuffer(operands, params, starts, grads, state)
    return buffer.with_new_state(Kinds.of_group(group).buffers(first), group)


def _views(flat: torch.Tensor, like: list[torch.Tensor], starts: list[int]) -> list[torch.Tensor]:
    return [
        flat.as_strided(each.size(), each.stride(), start)
        for each, start in zip(like, starts, strict=True)
    ]


def _move_into(buffer: FlatBuffer) -> None:
    for param, start, grad in zip(buffer.params, buffer.starts, buffer.grads, strict=True):
        with torch.inference_mode(param.is_inference()):  # data of another kind would not do
            own = own_view(buffer.operands.param, param, start)
            own.copy_(param.detach())
        if param.grad is not None:
            grad.copy_(param.grad)
        param.data = own
        param.grad = grad
