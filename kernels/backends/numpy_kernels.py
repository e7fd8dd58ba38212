"""The update in NumPy: the backend that is always there, and that the others are held to.

It has no atomic operations, so it counts no races.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hogstream.kernels.backends.cpu_threads import Pieces, run_in_pieces
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


def _rmsprop_(
    p: Array,  # elements of the parameter: compute type, (n,)
    g: Array,  # those of its gradient: compute type, (n,)
    ms: Array,  # their mean square, updated in place: compute type, (n,)
    hyperparameters: Hyperparameters,
    scratch: Array,  # compute type, (4, n)
    out: Array,  # where the new p goes, which may be p itself: compute type, (n,)
) -> None:
    """The update: each operation is rounded once.

    ``ms`` and ``out`` are written once, whole: who updates them at the same time finds no product
    yet to be added to.
    """
    h = hyperparameters
    factors = h.in_float64 if ms.dtype == np.float64 else h.in_float32
    lr, alpha, beta, eps, weight_decay, shrink, sign = factors
    t, u, v, w = scratch  # for products, and for the new g, ms and p
    if h.maximize:
        g = np.multiply(sign, g, out=u)
    if h.coupled:  # g = g + weight_decay * p
        g = np.add(g, np.multiply(weight_decay, p, out=t), out=u)
    if h.decoupled_weight_decay:
        p = np.multiply(shrink, p, out=w)
    # ms = alpha * ms + (beta * g) * g
    np.multiply(np.multiply(beta, g, out=t), g, out=t)
    ms[...] = np.add(np.multiply(alpha, ms, out=v), t, out=v)
    if h.eps_inside_sqrt:  # d = sqrt(ms + eps)
        d = np.sqrt(np.add(v, eps, out=v), out=v)
    else:  # d = sqrt(ms) + eps
        d = np.add(np.sqrt(v, out=v), eps, out=v)
    # p = p - (lr * g) / d
    np.subtract(p, np.divide(np.multiply(lr, g, out=t), d, out=t), out=out)


def update_(table: LaunchTable, hyperparameters: Hyperparameters) -> None:
    """Updates the parameters and ``ms`` of a table in place, block by block, on the calling thread.

    Args:
        table: Of tensors on the CPU.
        hyperparameters: The numbers and switches of the update.
    """
    _update_pieces(table, hyperparameters, Pieces(table.elements, table.elements))


def update_in_pieces_(table: LaunchTable, hyperparameters: Hyperparameters) -> None:
    """The same on all threads that the update is worth.

    Args:
        table: Of tensors on the CPU.
        hyperparameters: The numbers and switches of the update.
    """
    run_in_pieces(_update_pieces, table, hyperparameters)


def _update_pieces(table: LaunchTable, hyperparameters: Hyperparameters, pieces: Pieces) -> None:
    stored = _STORED[table.dtype]
    compute: np.dtype[Any] = np.dtype(np.float64 if table.dtype == torch.float64 else np.float32)
    block = min(BLOCK_BYTES // compute.itemsize, pieces.size)
    scratch = np.empty((6 if stored != compute else 4, block), compute)
    with np.errstate(all="ignore"):  # infinities and NaN are results like others
        for start, stop in pieces:
            _update_range(table, hyperparameters, start, stop, stored, scratch)


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
    param: Array,  # as stored, (n,)
    grad: Array,  # as stored, (n,)
    ms: Array,  # compute type, (n,)
    hyperparameters: Hyperparameters,
    scratch: Array,  # compute type: (4, n), or (6, n) if param and grad are of another
) -> None:
    if param.dtype == ms.dtype:
        _rmsprop_(param, grad, ms, hyperparameters, scratch, out=param)
        return
    p, g = scratch[4:]
    _widen(param, out=p)
    _widen(grad, out=g)
    _rmsprop_(p, g, ms, hyperparameters, scratch[:4], out=p)
    _narrow(p, out=param, scratch=g)


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
