"""The update in NumPy: the backend that is always there, and that the others are held to.

It has no atomic operations, so it counts no races.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hogstream.kernels.backends.cpu_threads import Pieces, run_in_pieces
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
from hogstream.kernels.hyperparameters import Hyperparameters, Switches
from hogstream.kernels.launch_table import ELEMENTS, GRAD, LaunchTable
from hogstream.kernels.rounding import PLACES
from hogstream.kernels.row_table import RowTable

# Scratch of this size stays in cache, and each call of NumPy is long enough to be worth giving up
# the GIL for; 16 to 512 KiB are slower, up to three times with two threads.
BLOCK_BYTES = 1 << 20


def update_(table: LaunchTable, hyperparameters: Hyperparameters, key: int = 0) -> None:
    """Updates the parameters and ``ms`` of a table in place, block by block, on the calling thread.

    Args:
        table: Of tensors on the CPU.
        hyperparameters: The numbers and switches of the update.
        key: Of the step, from ``key_of_step``, for stochastic rounding.
    """
    _update_pieces(table, hyperparameters, key, Pieces(table.elements, table.elements))


def update_in_pieces_(table: LaunchTable, hyperparameters: Hyperparameters, key: int = 0) -> None:
    """The same on all threads that the update is worth.

    Args:
        table: Of tensors on the CPU.
        hyperparameters: The numbers and switches of the update.
        key: Of the step, from ``key_of_step``, for stochastic rounding.
    """
    run_in_pieces(_update_pieces, table, hyperparameters, key)


def _update_pieces(
    table: LaunchTable, hyperparameters: Hyperparameters, key: int, pieces: Pieces
) -> None:
    compute: np.dtype[Any] = np.dtype(np.float64 if table.dtype == torch.float64 else np.float32)
    scratch = Scratch(compute, min(BLOCK_BYTES // compute.itemsize, pieces.size))
    with np.errstate(all="ignore"):  # infinities and NaN are results like others
        for start, stop in pieces:
            _update_range(table, hyperparameters, key, start, stop, scratch)


def all_finite(table: LaunchTable | RowTable) -> bool:
    """Whether no gradient of a table has an element that is infinite or NaN.

    Args:
        table: Of tensors on the CPU.
    """
    stored = STORED[table.grad_dtype]
    block = BLOCK_BYTES // stored.itemsize
    return all(
        _finite(array_at(grad, stored, low, min(low + block, elements))).all()
        for grad, elements in table.columns[[GRAD, ELEMENTS]].T.tolist()
        for low in range(0, elements, block)
    )


def _finite(values: Array) -> npt.NDArray[np.bool_]:
    exponent = 0x7F80  # its bits in bfloat16
    finite: npt.NDArray[np.bool_] = (
        (values & exponent) != exponent if values.dtype == np.uint16 else np.isfinite(values)
    )
    return finite


def _update_range(
    table: LaunchTable,
    hyperparameters: Hyperparameters,
    key: int,
    start: int,
    stop: int,
    scratch: Scratch,
) -> None:
    stored, compute = STORED[table.dtype], scratch.dtype
    dtypes = (stored, STORED[table.grad_dtype], compute, compute, compute, stored)
    switches = hyperparameters.switches.of_dtype(table.dtype)
    first = 0
    for index, (*addresses, elements) in enumerate(table.columns.T.tolist()):
        begin, end = max(start - first, 0), min(stop - first, elements)
        first += elements
        for low in range(begin, end, scratch.size):
            high = min(low + scratch.size, end)
            arrays = [
                array_at(address, dtype, low, high) if address else None
                for address, dtype in zip(addresses, dtypes, strict=True)
            ]
            places = None
            if switches.stochastic:
                place = index * PLACES + low
                places = Places(np.arange(place, place + high - low, dtype=np.uint64), key)
            _update_block(arrays, hyperparameters, switches, places, scratch)


def _update_block(
    arrays: Sequence[Any],  # as ``Operands``, (n,) each; None where there is none
    hyperparameters: Hyperparameters,
    switches: Switches,
    places: Places | None,  # if rounding is stochastic
    scratch: Scratch,
) -> None:
    param, grad, *state, comp = arrays
    h = hyperparameters
    factors = h.in_float64 if scratch.dtype == np.float64 else h.in_float32
    p, g = (widened(each, scratch) for each in (param, grad))
    if switches.compensated:
        p = p + widened(comp, scratch)
    is_used = True, switches.centered, switches.momentum
    state = [each if used else None for each, used in zip(state, is_used, strict=True)]
    numbers = [each if each is None else Numbers(scratch, each) for each in state]
    p, *new = formula.rmsprop(p, g, *numbers, factors, *switches.of_formula)
    # Each is written once, whole: who updates it at the same time finds no product yet to be added
    # to.
    for array, result in zip(state, new, strict=True):
        if array is not None:
            np.copyto(array, result.array)
    store(p, param, comp, switches, places, scratch)
