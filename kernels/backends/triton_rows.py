"""Launches Triton's kernel on some rows of a table.

This module needs Triton; ``select`` imports it when it is first asked for.
"""

from __future__ import annotations

import torch
import triton

from hogstream.kernels.backends.triton_launch import (
    INTERPRETED_BLOCK,
    STORAGE,
    address,
    check_verdict,
    current,
    factor_words,
    launch,
    signed,
    switch_constants,
)
from hogstream.kernels.backends.triton_row_kernels import row_rmsprop_kernel
from hogstream.kernels.formula import LANES
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.race_counters import RaceCounters
from hogstream.kernels.rows import RowOperands, RowUpdate

#: Elements of a tile, by dtype of the table: one 128-bit access a thread to ``ms``. Where accesses
#: are of one element, each has an address of its own: fewer save registers. There are never more
#: threads than elements, 256 on ROCm: else an element that one writes is read by another.
TILE = {torch.float16: 512, torch.bfloat16: 512, torch.float32: 512, torch.float64: 256}
_TILE_OF_SINGLE = 256
# Its columns, at most: then a row of float32 is one access of a warp.
_COLUMNS = 128
# And at least, where it is of one row: one for each thread of a warp.
_COLUMNS_OF_ROW = 32

#: What the kernels take last, if they lock nothing.
NO_LOCKS = [0, 0, 0]


def update_(
    update: RowUpdate,
    hyperparameters: Hyperparameters,
    key: int = 0,
    *,
    verdict: torch.Tensor | None = None,
    lr_on_device: torch.Tensor | None = None,
    grad_factor: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    counters: RaceCounters | None = None,
) -> None:
    """Updates rows of a table in place, in one launch on the current stream.

    Args:
        update: Of tensors on one CUDA device, or on the CPU if Triton interprets.
        hyperparameters: The numbers and switches of the update.
        key: Of the step, from ``key_of_step``, for stochastic rounding.
        verdict: Becomes 1 if a row is not in the table, and then nothing is changed, else 0: int32,
            shape (1,), on the device of the table. Streams that run side by side need one each.
        lr_on_device: In place of the number, where the kernel reads it: float64, shape (), on that
            device, as all that follow.
        grad_factor: What gradients are multiplied by, where the kernel reads it: float64, of one
            element.
        found_inf: As torch's ``GradScaler`` has it: float32, of one element; if it is not 0,
            nothing is changed.
        counters: To count with: for the rows of the table, in blocks of one.

    Raises:
        TypeError: If ``verdict`` is of another dtype.
        ValueError: If counters do not fit the table, or ``verdict`` is of another shape or device.
    """
    tensors, device = update.operands, update.operands.param.device
    table_rows = len(tensors.param)
    if counters is not None:
        _check_counters(counters, table_rows, device)
    if verdict is None:
        verdict = torch.empty(1, dtype=torch.int32, device=device)
    check_verdict(verdict, device)
    if not update.elements:
        verdict.copy_(((update.rows < 0) | (update.rows >= table_rows)).any())
        return
    dtype = tensors.param.dtype
    constants = {
        "STORAGE": STORAGE[dtype],
        "GRAD_STORAGE": STORAGE[tensors.grads.dtype],
        **switch_constants(hyperparameters.switches.of_dtype(dtype)),
        "ROWWISE": update.is_rowwise,
        "LAZY": tensors.last_update is not None,
        "SCALED": grad_factor is not None,
        "LR_ON_DEVICE": lr_on_device is not None,
        "CHECKED": found_inf is not None,
        "COUNTED": counters is not None,
        "LOCKED": False,
        **tile_constants(tensors),
    }
    factors = factor_words(hyperparameters)
    if lr_on_device is not None:
        factors[0] = lr_on_device.data_ptr()
    arguments = [
        *row_words(update, constants["UNIT"]),
        *factors,
        signed(key),
        *map(address, (grad_factor, found_inf, verdict)),
        address(None if counters is None else counters.counts),
        *NO_LOCKS,
    ]
    with current(device):
        programs = triton.cdiv(len(update.rows), constants["ROWS"])
        launch(row_rmsprop_kernel, programs, arguments, constants, device)


def tile_constants(tensors: RowOperands) -> dict[str, int]:
    """What part of an update one program takes, and what it may know of alignment."""
    return tile_of(tensors, unit_of(tensors))


def unit_of(tensors: RowOperands) -> int:
    """The constant UNIT of the kernels: of 128 bits, if all rows are aligned so; else 1."""
    tables = [each for each in tensors[:6] if each is not None and each.dim() == 2]
    unit = 16 // min(each.element_size() for each in tables)
    aligned = all(each.data_ptr() % 16 == 0 for each in tables)
    return unit if aligned and tensors.param.shape[1] % unit == 0 else 1


def tile_of(tensors: RowOperands, unit: int, *, locked: bool = False) -> dict[str, int]:
    """What part of an update one program takes.

    Args:
        tensors: Of the update.
        unit: What it may know of alignment.
        locked: Whether a program holds a lock: of one row, as all that it takes.
    """
    param = tensors.param
    most = LANES if tensors.ms.dim() == 1 else _COLUMNS
    columns = min(triton.next_power_of_2(max(param.shape[1], 1)), most)
    if locked:
        return {"ROWS": 1, "COLUMNS": max(columns, _COLUMNS_OF_ROW), "UNIT": unit}
    rows = INTERPRETED_BLOCK // columns
    if param.device.type == "cuda":
        rows = tile_rows(param.dtype, columns, unit)
    return {"ROWS": rows, "COLUMNS": columns, "UNIT": unit}


def tile_rows(dtype: torch.dtype, columns: int, unit: int) -> int:
    """How many positions a tile has on a GPU.

    Args:
        dtype: Of the table.
        columns: Of the tile.
        unit: The constant UNIT.
    """
    return (_TILE_OF_SINGLE if unit == 1 else TILE[dtype]) // columns


def row_words(update: RowUpdate, unit: int) -> list[int]:
    """What the kernel takes before the factors, in its order.

    Args:
        update: It.
        unit: Its constant UNIT.
    """
    tensors = update.operands
    return [
        *map(address, (*tensors[:7], update.rows, update.order)),
        *(len(update.rows), len(tensors.param), update.width // unit),
        *(update.number, update.number.bit_length()),
    ]


def _check_counters(counters: RaceCounters, table_rows: int, device: torch.device) -> None:
    fit = (table_rows, 1, device)
    given = (counters.elements, counters.block, counters.counts.device)
    if given != fit:
        raise ValueError(
            "counters must be for {} rows in blocks of {} on {}, ".format(*fit)
            + "got {} in blocks of {} on {}".format(*given)
        )
