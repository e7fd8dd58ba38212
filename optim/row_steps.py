"""Parameters that a step updates by rows: those with sparse gradients, or with state by rows.

A gradient of ``nn.Embedding(sparse=True)`` is taken as it comes from a backward, uncoalesced. Each
is checked and sorted anew at each step, so there is no plan to keep.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import torch

from hogstream.kernels.backends.select import RowBackend, select_row_backend
from hogstream.kernels.rows import RowOperands, RowUpdate, check_row_operands
from hogstream.optim.options import Group
from hogstream.optim.parameters import is_distributed
from hogstream.optim.state import ROW_BUFFERS, Kinds, as_real, check_step
from hogstream.optim.step_counts import exact_count

Groups = list[dict[str, Any]]
State = dict[torch.Tensor, dict[str, torch.Tensor]]


class RowStep(NamedTuple):
    """The update of one parameter.

    Attributes:
        group: Index of its group.
        param: It.
        step: Its count of steps.
        update: What is launched.
        backend: What launches it.
    """

    group: int
    param: torch.Tensor
    step: torch.Tensor
    update: RowUpdate
    backend: RowBackend


def is_by_rows(group: Group, param: torch.Tensor) -> bool:
    """Whether a step updates a parameter of a group by rows, for the gradient that it has now."""
    if group["rowwise"] or group["lazy_decay"]:
        return True
    return param.grad is not None and param.grad.layout == torch.sparse_coo


def params_by_rows(groups: Groups) -> dict[int, torch.Tensor]:
    """All parameters that a step updates by rows now, by their ids."""
    return {
        id(param): param
        for group in groups
        for param in group["params"]
        if is_by_rows(group, param)
    }


def are_by_rows(groups: Groups, known: Collection[int]) -> bool:
    """Whether parameters that were updated by rows still are, as far as they have gradients."""
    return all(
        param.grad is None or is_by_rows(group, param)
        for group in groups
        for param in group["params"]
        if id(param) in known
    )


def without(groups: Groups, by_rows: Collection[int]) -> Groups:
    """Parameters of groups but for those that are updated by rows."""
    if not by_rows:
        return groups
    return [
        {"params": [param for param in group["params"] if id(param) not in by_rows]}
        for group in groups
    ]


@torch.no_grad()
def row_steps(
    groups: Groups,
    state: State,
    kinds: list[Kinds],
    counts: list[torch.Tensor],
    by_rows: Collection[int],
    backend: str | None,
) -> list[RowStep]:
    """Checks parameters that are updated by rows and have gradients, and sorts their rows.

    Args:
        groups: The optimizer's parameter groups.
        state: Its state.
        kinds: What state the updates of each group take.
        counts: From ``new_counts``: where the state's steps are.
        by_rows: The ids of these parameters.
        backend: Which kernels to use; None picks by device.

    Raises:
        TypeError: If a gradient is not of a dtype that can be read, or a step cannot count.
        ValueError: If a gradient is of another shape or device, or not one of rows, a parameter is
            not contiguous or is distributed, or memory overlaps.
        IndexError: If a row is not in its parameter.
    """
    steps: list[RowStep] = []
    for index, (group, of_group) in enumerate(zip(groups, kinds, strict=True)):
        for place, param in enumerate(group["params"]):
            if id(param) not in by_rows or param.grad is None:
                continue
            name, own = f"param {place} in group {index}", state[param]
            check_step(f"step of {name}", own["step"])
            operands = _checked(name, param, param.grad, own, of_group)
            number = exact_count(own["step"], counts) + 1 if of_group.lazy else 1
            update = RowUpdate.of(operands, number)
            chosen = select_row_backend(backend, param.device.type)
            steps.append(RowStep(index, param, own["step"], update, chosen))
    return steps


def _checked(
    name: str,
    param: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, torch.Tensor],
    kinds: Kinds,
) -> RowOperands:
    of_grad = f"grad of {name}"
    if is_distributed(param) or is_distributed(grad):
        raise ValueError(f"{name} must be a plain tensor to be updated by rows, got a DTensor")
    if grad.shape != param.shape:
        raise ValueError(
            f"{of_grad} must have the shape of its param, {tuple(param.shape)}, "
            f"got {tuple(grad.shape)}"
        )
    if grad.is_complex() != param.is_complex():
        raise TypeError(f"{of_grad} must be complex just as its param is, got {grad.dtype}")
    if param.is_conj():
        raise ValueError(f"{name} must be memory as it is, got a lazily conjugated view of it")
    if not param.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous to be updated by rows, got shape {tuple(param.shape)} with "
            f"strides {param.stride()}"
        )
    rows, grads = _rows_of(of_grad, grad)
    buffers = {
        each: state[each] if kinds.is_by_row(each) else _as_table(state[each])
        for each in kinds.buffers(param)
    }
    return check_row_operands(
        _as_table(param),
        rows,
        grads,
        buffers.pop("square_avg"),
        **buffers,
        rowwise=kinds.rowwise,
        names=[
            *(name, of_grad, *(f"{each} of {name}" for each in ROW_BUFFERS)),
            f"rows of {of_grad}",
        ],
    )


def _rows_of(name: str, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows a gradient is of, and their gradients; of a dense one, all."""
    if grad.layout == torch.strided:
        table = _as_table(grad.contiguous())
        return torch.arange(len(table), device=grad.device), table
    if grad.layout != torch.sparse_coo or grad.sparse_dim() != 1:
        kind = (
            f"{grad.sparse_dim()} sparse axes" if grad.layout == torch.sparse_coo else grad.layout
        )
        raise ValueError(
            f"{name} must be dense, or of layout torch.sparse_coo and sparse in its first axis "
            f"alone, got {kind}"
        )
    return grad._indices()[0], _as_table(grad._values().contiguous())


def _as_table(tensor: torch.Tensor) -> torch.Tensor:
    """A view of shape (N, D): rows along the first axis, with all that is in each of them."""
    tensor = as_real(tensor.detach().resolve_conj())
    shape = tensor.shape or (1,)
    return tensor.view(shape[0], math.prod(shape[1:]))
