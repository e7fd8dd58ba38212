"""What an update of some rows of a table is made of: checked, and sorted by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.operands import (
    COMPUTE_DTYPES,
    ArrayLike,
    as_tensor,
    check_dense,
    check_disjoint,
    check_not_negated,
    check_param,
    short,
)


class RowOperands(NamedTuple):
    """One update's tensors, all contiguous, sharing storage with what was given.

    Attributes:
        param: The table: shape (N, D), a dtype of ``COMPUTE_DTYPES``.
        grads: Gradients of rows: shape (k, D), a dtype of ``COMPUTE_DTYPES``.
        ms: The compute type of ``param``; shape (N, D), or (N,) if there is one for each row.
        grad_avg: Shape (N, D), the compute type; None if the update is not centered.
        momentum_buffer: The same; None if the update has no momentum.
        kahan_comp: As ``param``; None if the update has no Kahan summation.
        last_update: Which update touched each row last: int64, shape (N,); None unless state that
            is passed by decays.
        rows: Which rows: int32 or int64, shape (k,).
    """

    param: torch.Tensor
    grads: torch.Tensor
    ms: torch.Tensor
    grad_avg: torch.Tensor | None
    momentum_buffer: torch.Tensor | None
    kahan_comp: torch.Tensor | None
    last_update: torch.Tensor | None
    rows: torch.Tensor


@dataclass(frozen=True)
class RowUpdate:
    """An update as backends take it: rows in ascending order, those of one row as they stood.

    Attributes:
        operands: As they were checked.
        rows: int64, shape (k,), ascending.
        order: Where the gradient of each of them is: int64, shape (k,).
        number: Of this update, from 1; of account only if there is ``last_update``.
    """

    operands: RowOperands
    rows: torch.Tensor
    order: torch.Tensor
    number: int

    @classmethod
    def of(cls, operands: RowOperands, number: int = 1) -> RowUpdate:
        """Sorts the rows of checked operands."""
        return cls(operands, *sort_rows(operands.rows, len(operands.param)), number)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.operands.param.device

    @property
    def width(self) -> int:
        """How many elements a row has."""
        return self.operands.param.shape[1]

    @property
    def elements(self) -> int:
        """How many elements the gradients have."""
        return self.operands.grads.numel()

    @property
    def is_rowwise(self) -> bool:
        """Whether there is one ``ms`` for each row."""
        return self.operands.ms.dim() == 1


def sort_rows(rows: torch.Tensor, table_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in ascending order, and where each of them stood; equal ones stay in their order.

    Args:
        rows: int32 or int64, shape (k,); on a CPU all of them in the table.
        table_rows: How many the table has.

    Returns:
        Two of int64, shape (k,).
    """
    place_bits = max(len(rows) - 1, 0).bit_length()
    if rows.device.type != "cpu" or table_rows.bit_length() + place_bits > 63:
        found = torch.sort(rows.to(torch.int64), stable=True)
        return found.values, found.indices
    # No two of these are equal, so any sort is stable: torch's takes seven times as long.
    # Of a copy: a tensor that NumPy sees can be resized no more, as a sparse gradient's may be.
    keys = rows.to(torch.int64, copy=True).numpy()
    keys <<= place_bits
    keys |= np.arange(len(keys))
    keys.sort()
    order = keys & ((1 << place_bits) - 1)
    return torch.from_numpy(keys >> place_bits), torch.from_numpy(order)


def check_row_options(hyperparameters: Hyperparameters, *, rowwise: bool, lazy_decay: bool) -> None:
    """Checks what an update of rows is asked for.

    Raises:
        TypeError: If a switch is not a bool.
        ValueError: If options do not go together.
    """
    for name, switch in (("rowwise", rowwise), ("lazy_decay", lazy_decay)):
        if not isinstance(switch, bool):
            raise TypeError(f"{name} must be True or False, got {switch!r}")
    if rowwise and hyperparameters.centered:
        raise ValueError(
            "centered must be False with rowwise=True, which keeps no mean square of each element "
            "to take the square of its mean from, got True"
        )
    if lazy_decay and hyperparameters.momentum:
        raise ValueError(
            "momentum must be 0 with lazy_decay=True: updates that passed a row by would have "
            f"moved it on, and not only have let state decay, got {hyperparameters.momentum!r}"
        )


def check_row_operands(
    param: ArrayLike,
    rows: ArrayLike,
    grads: ArrayLike,
    ms: ArrayLike,
    *,
    grad_avg: ArrayLike | None = None,
    momentum_buffer: ArrayLike | None = None,
    kahan_comp: ArrayLike | None = None,
    last_update: ArrayLike | None = None,
    rowwise: bool = False,
    names: Sequence[str] = RowOperands._fields,
) -> RowOperands:
    """Checks the operands of an update of rows.

    Args:
        param: The table: shape (N, D); float16, bfloat16 (torch only), float32 or float64.
        rows: Which rows: int32 or int64, shape (k,).
        grads: Their gradients: shape (k, D), any of the dtypes of parameters.
        ms: The compute type; shape (N, D), or (N,) if ``rowwise``.
        grad_avg: The compute type, shape (N, D); None if the update is not centered.
        momentum_buffer: The same; None if the update has no momentum.
        kahan_comp: As ``param``; None if the update has no Kahan summation.
        last_update: int64, shape (N,); None if state that is passed by stays.
        rowwise: Whether there is one ``ms`` for each row.
        names: What errors call the operands, in the order of ``RowOperands``.

    Raises:
        TypeError: If an operand is of a wrong type or dtype.
        ValueError: If shapes or devices differ, or memory is read-only, not contiguous or shared.
        IndexError: If a row is not in the table; on a GPU, the kernel finds that.
    """
    called = dict(zip(RowOperands._fields, names, strict=True))
    param = as_tensor(called["param"], param, written=True)
    check_param(param, called["param"])
    if param.dim() != 2:
        raise ValueError(f"{called['param']} must have shape (N, D), got {tuple(param.shape)}")
    _check_contiguous(param, called["param"])
    rows, grads = check_rows(param, rows, grads, names=(called["rows"], called["grads"]))
    table, compute = tuple(param.shape), COMPUTE_DTYPES[param.dtype]
    # Their shapes and dtypes.
    wanted: dict[str, tuple[ArrayLike | None, tuple[int, ...], torch.dtype]] = {
        "ms": (ms, table[:1] if rowwise else table, compute),
        "grad_avg": (grad_avg, table, compute),
        "momentum_buffer": (momentum_buffer, table, compute),
        "kahan_comp": (kahan_comp, table, param.dtype),
        "last_update": (last_update, table[:1], torch.int64),
    }
    others = {
        name: None if given is None else _as_fits(called[name], param, given, shape, dtype)
        for name, (given, shape, dtype) in wanted.items()
    }
    operands = RowOperands(param, grads, **others, rows=rows)  # type: ignore[arg-type]
    check_disjoint([(names, operands)])
    return operands


def check_rows(
    param: torch.Tensor,
    rows: ArrayLike,
    grads: ArrayLike,
    *,
    names: tuple[str, str] = ("rows", "grads"),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks what comes anew with each update of a table; not whether memory is apart.

    Args:
        param: The table: shape (N, D).
        rows: As for ``check_row_operands``.
        grads: Likewise.
        names: What errors call those.

    Returns:
        Rows and gradients, as tensors.

    Raises:
        TypeError: If one is of a wrong type or dtype.
        ValueError: If a shape or device is another, or memory is not contiguous.
        IndexError: If a row is not in the table; on a GPU, the kernel finds that.
    """
    rows = check_row_numbers(param, rows, names[0])
    return rows, _as_fits(names[1], param, grads, (len(rows), param.shape[1]), None)


def check_row_numbers(param: torch.Tensor, rows: ArrayLike, name: str) -> torch.Tensor:
    """Checks which rows of a table are meant.

    Args:
        param: The table: shape (N, D).
        rows: As for ``check_row_operands``.
        name: What errors call them.

    Returns:
        They, as a tensor.

    Raises:
        TypeError: If they are of a wrong type or dtype.
        ValueError: If their shape or device is another, or their memory is not contiguous.
        IndexError: If one is not in the table; on a GPU, the kernel finds that.
    """
    rows = as_tensor(name, rows, written=False, dtypes=(np.int32, np.int64))
    if rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {short(rows.dtype)}")
    if rows.layout != torch.strided or rows.dim() != 1:
        raise ValueError(
            f"{name} must be dense and have shape (k,), got {short(rows.layout)}, "
            f"{tuple(rows.shape)}"
        )
    _check_contiguous(rows, name)
    if rows.device != param.device:
        raise ValueError(f"{name} must be on {param.device} as the table, got {rows.device}")
    if param.device.type == "cpu" or not param.shape[1]:  # for which no kernel is launched
        _check_in_table(rows, name, param.shape[0])
    return rows


def _as_fits(
    name: str,
    param: torch.Tensor,
    given: ArrayLike,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,  # None for any of those of parameters
) -> torch.Tensor:
    dtypes = (np.int64,) if dtype == torch.int64 else (np.float16, np.float32, np.float64)
    tensor = as_tensor(name, given, written=dtype is not None, dtypes=dtypes)
    if tensor.dtype not in (COMPUTE_DTYPES if dtype is None else (dtype,)):
        allowed = "float16, bfloat16, float32 or float64" if dtype is None else short(dtype)
        raise TypeError(f"{name} must be {allowed}, got {short(tensor.dtype)}")
    if tensor.layout != torch.strided or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} must be dense and have shape {shape}, got {short(tensor.layout)}, "
            f"{tuple(tensor.shape)}"
        )
    if tensor.device != param.device:
        raise ValueError(f"{name} must be on {param.device} as the table, got {tensor.device}")
    check_not_negated(tensor, name)
    _check_contiguous(tensor, name)
    return tensor


def _check_contiguous(tensor: torch.Tensor, name: str) -> None:
    check_dense(name, tensor)
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got shape {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}"
        )


def _check_in_table(rows: torch.Tensor, name: str, table_rows: int) -> None:
    if not len(rows):
        return
    least, greatest = torch.aminmax(rows)
    if least < 0 or greatest >= table_rows:
        place = int(((rows < 0) | (rows >= table_rows)).nonzero()[0])
        raise IndexError(
            f"{name} must be >= 0 and < {table_rows}, the rows of the table, "
            f"got {int(rows[place])} at {place}"
        )
