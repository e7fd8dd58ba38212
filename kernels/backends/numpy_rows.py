"""The update of rows in NumPy, which the other backends are held to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from hogstream.kernels.backends.numpy_numbers import (
    STORED,
    Array,
    Numbers,
    Places,
    Scratch,
    array_at,
    formula,
    store,
    widened,
)
from hogstream.kernels.formula import LANES
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.rows import RowUpdate

# As many elements are updated at once, in whole rows, at least one.
_BLOCK = 1 << 18


class _Tensors(NamedTuple):
    """What is updated, as arrays: (N, D) or (N,) each; None where there is none."""

    param: Array
    ms: Array
    grad_avg: Array | None
    buffer: Array | None
    comp: Array | None
    last_update: Array | None

    @property
    def state(self) -> tuple[Array | None, ...]:
        """What an update keeps: ``ms``, mean gradients and momentum buffer."""
        return self[1:4]


def update_(update: RowUpdate, hyperparameters: Hyperparameters, key: int = 0) -> None:
    """Updates rows of a table in place, on the calling thread.

    Args:
        update: Of tensors on the CPU.
        hyperparameters: The numbers and switches of the update.
        key: Of the step, from ``key_of_step``, for stochastic rounding.
    """
    if not update.elements:
        return
    given = update.operands
    order, grads = update.order.numpy(), _array(given.grads)
    tensors = _Tensors(
        *(
            None if each is None else _array(each)
            for each in (given.param, *given[2:6], given.last_update)
        )  # type: ignore[arg-type]
    )
    rows, starts, counts = np.unique(update.rows.numpy(), return_index=True, return_counts=True)
    compute = tensors.ms.dtype
    block = max(_BLOCK // update.width, 1)
    scratch = Scratch(compute, min(block, len(rows)) * update.width)
    with np.errstate(all="ignore"):  # infinities and NaN are results like others
        for low in range(0, len(rows), block):
            here = slice(low, low + block)
            g = _summed(grads, order, starts[here], counts[here], scratch)
            _update_block(tensors, update, rows[here], g, hyperparameters, key, scratch)


def _array(tensor: torch.Tensor) -> Array:
    """The memory of a tensor; not by ``numpy()``, after which torch does not resize it any more."""
    dtype = STORED.get(tensor.dtype, np.dtype(np.int64))
    return array_at(tensor.data_ptr(), dtype, 0, tensor.numel()).reshape(tensor.shape)


def _summed(grads: Array, order: Array, starts: Array, counts: Array, scratch: Scratch) -> Numbers:
    """The gradient of each row, of which there may be several, in the compute type: (u, D), flat.

    Args:
        grads: As they were given: (k, D).
        order: Where the gradient of each position is, of rows in ascending order: (k,).
        starts: The first position of each row: (u,).
        counts: How many there are of each: (u,).
        scratch: Of the compute type.
    """
    result = widened(grads[order[starts]].ravel(), scratch)
    sums = result.array.reshape(len(starts), -1)
    for number in range(1, counts.max()):
        more = np.flatnonzero(counts > number)
        added = grads[order[starts[more] + number]]
        sums[more] += widened(added.ravel(), scratch).array.reshape(added.shape)
    return result


def _update_block(
    tensors: _Tensors,
    update: RowUpdate,
    rows: Array,  # (u,)
    g: Numbers,  # their gradients: (u, D), flat
    hyperparameters: Hyperparameters,
    key: int,
    scratch: Scratch,
) -> None:
    switches = hyperparameters.switches.of_dtype(update.operands.param.dtype)
    param = tensors.param[rows].ravel()
    comp = None if tensors.comp is None else tensors.comp[rows].ravel()
    p = widened(param, scratch)
    if comp is not None and switches.compensated:
        p = p + widened(comp, scratch)
    state = [None if each is None else each[rows] for each in tensors.state]
    if tensors.last_update is not None:
        passed = np.maximum(update.number - 1 - tensors.last_update[rows], 0)
        _decay(state[:2], passed, hyperparameters.alpha, update.number)
        tensors.last_update[rows] = update.number
    p, *new = _new_state(update, p, g, state, hyperparameters, scratch)
    for array, numbers in zip(tensors.state, new, strict=True):
        if array is not None:
            array[rows] = numbers.array.reshape(-1, *array.shape[1:])
    places = _places(rows, update.width, key) if switches.stochastic else None
    store(p, param, comp, switches, places, scratch)
    tensors.param[rows] = param.reshape(-1, update.width)
    if tensors.comp is not None and comp is not None:
        tensors.comp[rows] = comp.reshape(-1, update.width)


def _decay(state: Sequence[Array | None], passed: Array, alpha: float, number: int) -> None:
    """Has state of rows decay for the updates that have passed each of them by: (u,)."""
    left = formula.decay(np.ones(len(passed)), alpha, passed, number.bit_length())
    for each in state:
        if each is not None:
            each *= left.astype(each.dtype).reshape(-1, *[1] * (each.ndim - 1))


def _new_state(
    update: RowUpdate,
    p: Numbers,  # (u, D), flat, as the gradients
    g: Numbers,
    state: Sequence[Array | None],  # ``ms``, mean gradients and momentum buffer of the rows
    hyperparameters: Hyperparameters,
    scratch: Scratch,
) -> tuple[Any, ...]:
    """The new parameters, and of state what there is."""
    h, width = hyperparameters, update.width
    switches = h.switches.of_dtype(update.operands.param.dtype)
    factors = h.in_float64 if scratch.dtype == np.float64 else h.in_float32
    ms, ga, buf = (None if each is None else Numbers(scratch, each.ravel()) for each in state)
    if not update.is_rowwise:
        new: tuple[Any, ...] = formula.rmsprop(p, g, ms, ga, buf, factors, *switches.of_formula)
        return new
    g = formula.gradient(p, g, factors, switches.coupled)
    squares = _lane_sums((g * g).array.reshape(-1, width))
    of_rows = formula.row_mean_square(state[0], squares, scratch.dtype.type(width), factors)
    spread = Numbers(scratch, np.repeat(of_rows, width))
    p, ga, buf = formula.descend(p, g, spread, ga, buf, factors, *switches.of_descent)
    return p, Numbers(scratch, of_rows), ga, buf


def _places(rows: Array, width: int, key: int) -> Places:
    """Those of all elements of some rows."""
    firsts = rows.astype(np.uint64)[:, None] * np.uint64(width)
    return Places((firsts + np.arange(width, dtype=np.uint64)).ravel(), key)


def _lane_sums(squares: Array) -> Array:
    """The sum of each row, in the order that all backends add: (u, D) to (u,).

    Lane by lane first, then the upper half of the lanes to the lower, until there is one.
    """
    sums = np.zeros((len(squares), LANES), squares.dtype)
    for first in range(0, squares.shape[1], LANES):
        part = squares[:, first : first + LANES]
        sums[:, : part.shape[1]] += part
    half = LANES // 2
    while half:
        sums[:, :half] += sums[:, half : 2 * half]
        half //= 2
    return sums[:, 0].copy()
