"""The update of rows in NumPy, which the other backends are held to."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from hogstream.kernels.backends.numpy_numbers import (
    STORED,
    Array,
    Numbers,
    Places,
    Scratch,
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
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    array: Array = tensor.numpy()
    return array.view(STORED.get(tensor.dtype, np.uint16)) if array.dtype == np.int16 else array


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
    h, width = hyperparameters, update.width
    switches = h.switches.of_dtype(update.operands.param.dtype)
    factors = h.in_float64 if scratch.dtype == np.float64 else h.in_float32
    param, comp = (
        None if each is None else each[rows].ravel() for each in (tensors[0], tensors[4])
    )
    p = widened(param, scratch)
    if switches.compensated:
        p = p + widened(comp, scratch)
    state = [None if each is None else each[rows] for each in tensors[1:4]]
    if tensors.last_update is not None:
        passed = np.maximum(update.number - 1 - tensors.last_update[rows], 0)
        left = formula.decay(np.ones(len(rows)), h.alpha, passed, update.number.bit_length())
        for each in state[:2]:
            if each is not None:
                each *= left.astype(scratch.dtype).reshape(-1, *[1] * (each.ndim - 1))
        tensors.last_update[rows] = update.number
    ms, ga, buf = (None if each is None else Numbers(scratch, each.ravel()) for each in state)
    if update.is_rowwise:
        g = formula.gradient(p, g, factors, switches.coupled)
        squares = _lane_sums((g * g).array.reshape(-1, width))
        new_ms = formula.row_mean_square(state[0], squares, scratch.dtype.type(width), factors)
        spread = Numbers(scratch, np.repeat(new_ms, width))
        p, ga, buf = formula.descend(p, g, spread, ga, buf, factors, *switches.of_descent)
        ms = Numbers(scratch, new_ms)
    else:
        p, ms, ga, buf = formula.rmsprop(p, g, ms, ga, buf, factors, *switches.of_formula)
    for array, new in zip(tensors[1:4], (ms, ga, buf), strict=True):
        if array is not None and new is not None:
            array[rows] = new.array.reshape(-1, *array.shape[1:])
    places = None
    if switches.stochastic:
        of_elements = rows.astype(np.uint64)[:, None] * np.uint64(width)
        of_elements = of_elements + np.arange(width, dtype=np.uint64)
        places = Places(of_elements.ravel(), key)
    store(p, param, comp, switches, places, scratch)
    for array, flat in ((tensors.param, param), (tensors.comp, comp)):
        if array is not None:
            array[rows] = flat.reshape(-1, width)


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
