"""The update in NumPy: the backend that is always there, and that the others are held to.

It has no atomic operations, so it counts no races.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hogstream.kernels.backends.cpu_threads import Pieces
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import ELEMENTS, GRAD, LaunchTable

Array = npt.NDArray[Any]

# Scratch of this size stays in cache, and each call of NumPy is long enough to be worth giving up
# the GIL for; 16 to 256 KiB were up to three times slower with two threads.
BLOCK_BYTES = 512 << 10

# NumPy has no bfloat16: it goes by its bits.
_STORED: dict[torch.dtype, np.dtype[Any]] = {
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(np.uint16),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}


def update_(
    table: LaunchTable, hyperparameters: Hyperparameters, pieces: Pieces | None = None
) -> bool:
    """Updates the parameters and ``ms`` of a table in place, block by block.

    Args:
        table: Of tensors on the CPU.
        hyperparameters: The numbers and switches of the update.
        pieces: Shared with other threads that do the same; None to do all on this one.

    Returns:
        Whether all is done: if not, other threads are still at it.
    """
    pieces = pieces or Pieces(table.elements, table.elements)
    stored = _STORED[table.dtype]
    compute: np.dtype[Any] = np.dtype(np.float64 if table.dtype == torch.float64 else np.float32)
    block = min(BLOCK_BYTES // compute.itemsize, pieces.size)
    scratch = np.empty((5 if stored != compute else 3, block), compute)
    with np.errstate(all="ignore"):  # infinities and NaN are results like others
        for start, stop in pieces:
            _update_range(table, hyperparameters, start, stop, stored, scratch)
    return pieces.done()


def all_finite(table: LaunchTable) -> bool:
    """Whether no gradient of a table has an element that is infinite or NaN.

    Args:
        table: Of tensors on the CPU.
    """
    stored = _STORED[table.dtype]
    block = BLOCK_BYTES // stored.itemsize
    return all(
        _finite(_array_at(grad, stored, low, min(low + block, elements))).all()
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
    start: int,
    stop: int,
    stored: np.dtype[Any],
    scratch: Array,
) -> None:
    compute, block = scratch.dtype, scratch.shape[1]
    first = 0
    for param, grad, ms, elements in table.columns.T.tolist():
        begin, end = max(start - first, 0), min(stop - first, elements)
        first += elements
        for low in range(begin, end, block):
            high = min(low + block, end)
            _update_block(
                _array_at(param, stored, low, high),
                _array_at(grad, stored, low, high),
                _array_at(ms, compute, low, high),
                hyperparameters,
                scratch[:, : high - low],
            )


def _array_at(address: int, dtype: np.dtype[Any], low: int, high: int) -> Array:
    """The elements from ``low`` to ``high`` of an array in memory, as an array."""
    size = (high - low) * dtype.itemsize
    memory = (ctypes.c_byte * size).from_address(address + low * dtype.itemsize)
    return np.frombuffer(memoryview(memory), dtype)


def _update_block(
    param: Array, grad: Array, ms: Array, hyperparameters: Hyperparameters, scratch: Array
) -> None:
    wide = ms.dtype == np.float64
    factors = hyperparameters.in_float64 if wide else hyperparameters.in_float32
    lr, alpha, beta, eps, weight_decay, shrink, sign = factors
    # Param and ms are written once, whole: who updates them at the same time finds no product yet
    # to be added to.
    t, u, v = scratch[:3]
    p, g = param, grad
    if param.dtype != ms.dtype:
        p, g = scratch[3:]
        _widen(param, out=p)
        _widen(grad, out=g)
    if hyperparameters.maximize or hyperparameters.coupled:
        g = np.multiply(g, sign, out=u)
    if hyperparameters.coupled:
        np.add(g, np.multiply(p, weight_decay, out=t), out=u)
    np.multiply(g, beta, out=t)
    np.multiply(t, g, out=t)
    np.multiply(ms, alpha, out=v)
    np.add(v, t, out=v)
    ms[...] = v
    if hyperparameters.eps_inside_sqrt:
        np.add(v, eps, out=v)
        np.sqrt(v, out=v)
    else:
        np.sqrt(v, out=v)
        np.add(v, eps, out=v)
    np.multiply(g, lr, out=u)
    np.divide(u, v, out=u)
    if hyperparameters.decoupled_weight_decay:
        p = np.multiply(p, shrink, out=t)
    np.subtract(p, u, out=param if param.dtype == ms.dtype else p)
    if param.dtype != ms.dtype:
        _narrow(p, out=param, scratch=v)


def _widen(narrow: Array, out: Array) -> None:
    if narrow.dtype == np.uint16:
        bits = out.view(np.uint32)
        bits[...] = narrow
        np.left_shift(bits, 16, out=bits)
    else:
        out[...] = narrow


def _narrow(wide: Array, out: Array, scratch: Array) -> None:
    if out.dtype != np.uint16:
        out[...] = wide
        return
    # Round to nearest even on the bits: add half of the last place kept, less one if that is even.
    bits, odd = wide.view(np.uint32), scratch.view(np.uint32)
    nan = np.isnan(wide)
    np.right_shift(bits, 16, out=odd)
    np.bitwise_and(odd, 1, out=odd)
    np.add(odd, 0x7FFF, out=odd)
    np.add(bits, odd, out=odd)
    np.right_shift(odd, 16, out=odd)
    odd[nan] = 0x7FC0
    out[...] = odd
