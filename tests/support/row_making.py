"""What tests of the update of rows share: tables, gradients of some of their rows, and bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hogstream.kernels.rows import RowOperands
from update_testing import COMPUTE, bits, normal

#: Which update the tests make, counted from 1: it decides how much state decays with ``lazy``.
NUMBER = 9


def row_operands(
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    shape: tuple[int, int],
    positions: int,
    *,
    rowwise: bool = False,
    lazy: bool = False,
    values: Callable[[int, torch.dtype, int], torch.Tensor] = normal,
    **options: Any,
) -> RowOperands:
    """A table that has had updates, with gradients of some rows: about half of them repeat a row.

    Args:
        dtype: Of the table.
        grad_dtype: Of the gradients.
        shape: Of the table: (N, D).
        positions: How many gradients there are.
        rowwise: Whether there is one mean square for each row.
        lazy: Whether state decays by what passed it by.
        values: Makes numbers, by how many, their dtype and a seed.
        options: Of the update, as ``Hyperparameters`` has them.
    """
    table_rows, width = shape
    compute = COMPUTE[dtype]

    def table(dtype: torch.dtype, seed: int, rows: int = table_rows) -> torch.Tensor:
        return values(rows * width, dtype, seed).reshape(rows, width)

    ms = values(table_rows, compute, 3).abs() if rowwise else table(compute, 3).abs()
    last = torch.from_numpy(np.random.default_rng(7).integers(0, NUMBER + 2, table_rows))
    left = 0.3 * torch.finfo(dtype).eps * normal(table_rows * width, torch.float64, 6)
    return RowOperands(
        table(dtype, 1),
        table(grad_dtype, 2, positions),
        ms,
        table(compute, 4) if options.get("centered") else None,
        table(compute, 5) if options.get("momentum") else None,
        left.to(dtype).reshape(shape) if options.get("kahan_sum") else None,
        last if lazy else None,
        repeated_rows(table_rows, positions),
    )


def repeated_rows(table_rows: int, positions: int) -> torch.Tensor:
    """Some rows, among them the first and the last, one of which is there very often."""
    random = np.random.default_rng(positions)
    rows = random.integers(0, table_rows, positions)
    rows[random.random(positions) < 0.3] = random.integers(table_rows)
    rows[: positions // 2 : 7] = table_rows - 1
    rows[-1:] = 0
    return torch.from_numpy(rows)


def each_of(function: Callable[[torch.Tensor], torch.Tensor], operands: RowOperands) -> RowOperands:
    """What a function makes of each tensor that there is."""
    tensors: list[Any] = [tensor if tensor is None else function(tensor) for tensor in operands]
    return RowOperands(*tensors)


def assert_same_rows(actual: RowOperands, expected: RowOperands) -> None:
    """Every element is equal to the bit; any NaN equals any other."""
    for name, got, want in zip(expected._fields, actual, expected, strict=True):
        assert (got is None) == (want is None), f"{name}: {got} instead of {want}"
        if got is None or want is None:
            continue
        same = bits(got) == bits(want) if want.is_floating_point() else got == want
        differ = (~same).nonzero()
        assert not len(differ), (
            f"{len(differ)} elements of {name} differ, first at {differ[0].tolist()}: "
            f"{got[tuple(differ[0])]!r} instead of {want[tuple(differ[0])]!r}"
        )
