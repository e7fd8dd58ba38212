"""What tests of updates of rows share: operands, and the design's formula, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from hogstream.kernels import sparse_rmsprop_
from update_testing import COMPUTE, State, formula, normal


class Table(NamedTuple):
    """What an update of rows changes.

    Attributes:
        param: The table: (N, D).
        ms: Its mean square: (N, D), or (N,) if it is row-wise.
        grad_avg: Its mean gradient, if the update is centered.
        momentum_buffer: It, if there is momentum.
        last_update: Which update touched each row last, if state decays: (N,).
    """

    param: torch.Tensor
    ms: torch.Tensor
    grad_avg: torch.Tensor | None
    momentum_buffer: torch.Tensor | None
    last_update: torch.Tensor | None

    @classmethod
    def worn(
        cls, rows: int, width: int, dtype: torch.dtype, seed: int = 0, **options: Any
    ) -> Table:
        """One that has had many updates, of such options: ordinary values."""
        compute, shape = COMPUTE[dtype], (rows, width)
        param, ms, grad_avg, buffer = (
            normal(rows * width, torch.float64, seed + i).reshape(shape) for i in range(4)
        )
        ms = ms.square()[:, 0].clone() if options.get("rowwise") else ms.square()
        last = torch.from_numpy(np.random.default_rng(seed).integers(0, 9, rows))
        return cls(
            param.to(dtype),
            ms.to(compute),
            (0.3 * grad_avg).to(compute) if options.get("centered") else None,
            buffer.to(compute) if options.get("momentum") else None,
            last if options.get("lazy_decay") else None,
        )

    def copy(self, device: str = "cpu") -> Table:
        """The same in memory of its own."""
        return Table(*(each if each is None else each.to(device, copy=True) for each in self))  # type: ignore[arg-type]


#: The number of the first update that a worn table takes.
FIRST = 10


def update_rows_(table: Table, rows: Any, grads: Any, number: int = FIRST, **options: Any) -> None:
    """Calls ``sparse_rmsprop_`` with the tensors of a table."""
    if options.get("lazy_decay"):
        options |= {"number": number, "last_update": table.last_update}
    sparse_rmsprop_(
        table.param,
        rows,
        grads,
        table.ms,
        grad_avg=table.grad_avg,
        momentum_buffer=table.momentum_buffer,
        **options,
    )


def updated_rows(
    table: Table, rows: torch.Tensor, grads: torch.Tensor, number: int = FIRST, **options: Any
) -> Table:
    """The design's formula, one row after the other, in plain NumPy: a new table."""
    new = table.copy()
    lazy, rowwise = options.pop("lazy_decay", False), options.pop("rowwise", False)
    for row in dict.fromkeys(rows.tolist()):
        g = _summed([each for at, each in zip(rows, grads, strict=True) if at == row], table)
        state = State.of(None if each is None else each[row] for each in new[:4])
        if lazy:
            assert new.last_update is not None
            passed = max(number - 1 - int(new.last_update[row]), 0)
            left = _power(options.get("alpha", 0.99), passed)
            state = state._replace(
                ms=state.ms * left, grad_avg=None if state[2] is None else state[2] * left
            )
            new.last_update[row] = number
        changed = _rowwise(state, g, options) if rowwise else formula(state, g, **options)
        for old, value in zip(new, changed, strict=False):
            if old is not None and value is not None:
                old[row] = value
    return new


def _summed(grads: list[torch.Tensor], table: Table) -> torch.Tensor:
    compute = COMPUTE[table.param.dtype]
    total = grads[0].to(compute)
    for each in grads[1:]:
        total = total + each.to(compute)
    return total


def _power(base: float, exponent: int) -> float:
    """By squaring, from the lowest bit on."""
    result = 1.0
    while exponent:
        if exponent % 2:
            result *= base
        base *= base
        exponent //= 2
    return result


def _rowwise(state: State, g: torch.Tensor, options: Mapping[str, Any]) -> State:
    """An update of one row with one mean square: the dense formula, given what makes it so.

    With ``alpha`` 1 and what ``ms`` becomes, it has no more to do with the gradient's square.
    """
    compute = state.ms.numpy().dtype.type
    p, decay = state.param.to(state.ms.dtype).numpy(), options.get("weight_decay", 0.0)
    g = g.numpy() * compute(-1 if options.get("maximize") else 1)
    if decay and not options.get("decoupled_weight_decay"):
        g = g + compute(decay) * p
    lanes = [compute(0)] * 32
    with np.errstate(all="ignore"):
        for column, value in enumerate(g):
            lanes[column % 32] = lanes[column % 32] + value * value
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [lanes[i] + lanes[i + half] for i in range(half)]
        alpha = options.get("alpha", 0.99)
        mean = lanes[0] / compute(len(g)) if len(g) else compute(0)
        ms = compute(alpha) * state.ms.numpy() + compute(1 - alpha) * mean
    spread = torch.from_numpy(np.full_like(p, ms))
    rest = {**options, "alpha": 1.0, "maximize": False}
    if not options.get("decoupled_weight_decay"):
        rest.pop("weight_decay", None)
    changed = formula(state._replace(ms=spread), torch.from_numpy(g), **rest)
    return changed._replace(ms=torch.from_numpy(np.asarray(ms)))
