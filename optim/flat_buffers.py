"""Parameters, gradients and ``ms`` of a group in one piece of memory each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from hogstream.kernels.operands import COMPUTE_DTYPES, Operands, check_disjoint, lay_flat

# Each parameter starts on a multiple of this, so that kernels may still read it in wide accesses.
_ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class FlatBuffer:
    """Parameters of one dtype on one device, side by side, with their gradients and ``ms``.

    The gaps between them hold zeros, which an update leaves without meaning.

    Attributes:
        operands: The memory, flat.
        params: The parameters, whose data are views of ``operands.param``.
        starts: Of each parameter, its first element in the flat memory.
        grads: Views of ``operands.grad``, in the shapes and strides of ``params``.
        mss: The same of ``operands.ms``.
    """

    operands: Operands
    params: list[torch.Tensor]
    starts: list[int]
    grads: list[torch.Tensor]
    mss: list[torch.Tensor]

    def attach_grads(self) -> bool:
        """Sets all gradients to zero, and makes them the parameters' own.

        A parameter whose dtype, device or shape has changed keeps a gradient that is its own.

        Returns:
            Whether one was elsewhere before.
        """
        flat = self.operands.grad
        flat.zero_()
        came_back = False
        for index, (param, start, ms) in enumerate(
            zip(self.params, self.starts, self.mss, strict=True)
        ):
            kind = param.dtype, param.device, param.shape
            if kind != (flat.dtype, flat.device, ms.shape):
                param.grad = None
                continue
            grad = self.grads[index]
            address = flat.data_ptr() + start * flat.element_size() if grad.numel() else 0
            if (grad.data_ptr(), grad.dtype) != (address, flat.dtype):
                # It was moved itself, as ``module.to()`` does it.
                grad = self.grads[index] = flat.as_strided(ms.size(), ms.stride(), start)
            if param.grad is not grad:
                param.grad = grad
                came_back = True
        return came_back

    def holds(self, operands: Sequence[Operands | None]) -> bool:
        """Whether all parameters are updated, and none of their tensors has been replaced.

        Args:
            operands: Of each of ``params``; None for one that has no gradient.
        """
        return all(
            each is not None
            and all(
                tensor.numel() == 0  # which has no address
                or tensor.data_ptr() == flat.data_ptr() + start * flat.element_size()
                for tensor, flat in zip(each, self.operands, strict=True)
            )
            for each, start in zip(operands, self.starts, strict=True)
        )


def check_params_disjoint(groups: list[dict[str, Any]]) -> None:
    """Checks that no two parameters share memory: moved, they would do so no more.

    Raises:
        ValueError: If two do.
    """
    named = []
    for group_index, group in enumerate(groups):
        for index, param in enumerate(group["params"]):
            flat, name = lay_flat(param), f"param {index} in group {group_index}"
            named.append(((name, "", ""), Operands(flat, flat[:0], flat[:0])))
    check_disjoint(named)


def make_flat_buffers(params: list[torch.Tensor]) -> list[FlatBuffer]:
    """Moves parameters, and gradients that they have, into flat memory: one for each dtype, device.

    Args:
        params: Checked parameters; their ``data`` and ``grad`` are replaced.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for param in params:
        groups.setdefault((param.dtype, param.device), []).append(param)
    return [_make_flat_buffer(group) for group in groups.values()]


@torch.no_grad()
def _make_flat_buffer(params: list[torch.Tensor]) -> FlatBuffer:
    first = params[0]
    step = _ALIGNMENT_BYTES // first.element_size()
    ends = [0, *accumulate(-(-param.numel() // step) * step for param in params)]
    dtypes = (first.dtype, first.dtype, COMPUTE_DTYPES[first.dtype])
    operands = Operands(
        *(torch.zeros(ends[-1], dtype=dtype, device=first.device) for dtype in dtypes)
    )
    starts = ends[:-1]
    data, grads, mss = (
        [
            flat.as_strided(param.size(), param.stride(), start)
            for param, start in zip(params, starts, strict=True)
        ]
        for flat in operands
    )
    for param, own, grad in zip(params, data, grads, strict=True):
        own.copy_(param)
        if param.grad is not None:
            grad.copy_(param.grad)
        param.data = own
        param.grad = grad
    return FlatBuffer(operands, params, starts, grads, mss)
