"""The update in NumPy: the backend that is always there, and that the others are held to."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hogstream.kernels.hyperparameters import Hyperparameters

Array = npt.NDArray[Any]

# Scratch of this size stays in cache, and each call of NumPy is long enough to be worth giving up
# the GIL for; 16 to 256 KiB were up to three times slower with two threads.
BLOCK_BYTES = 512 << 10


def update_(param: Array, grad: Array, ms: Array, hyperparameters: Hyperparameters) -> None:
    """Updates ``param`` and ``ms`` in place, block by block, on one thread.

    Args:
        param: Shape (n,); float16, float32, float64, or the bits of bfloat16 as uint16.
        grad: Shape and dtype of ``param``.
        ms: Shape (n,); float64 for float64 parameters, else float32.
        hyperparameters: The numbers and switches of the update.
    """
    block = min(param.size, BLOCK_BYTES // ms.itemsize)
    scratch = np.empty((4 if param.dtype != ms.dtype else 2, block), ms.dtype)
    with np.errstate(all="ignore"):  # infinities and NaN are results like others
        for start in range(0, param.size, max(block, 1)):
            stop = min(start + block, param.size)
            _update_block(
                param[start:stop],
                grad[start:stop],
                ms[start:stop],
                hyperparameters,
                scratch[:, : stop - start],
            )


def _update_block(
    param: Array, grad: Array, ms: Array, hyperparameters: Hyperparameters, scratch: Array
) -> None:
    lr, alpha, beta, eps, weight_decay, shrink, sign = hyperparameters.scalars().rounded(ms.dtype)
    t, u = scratch[:2]
    p, g = param, grad
    if param.dtype != ms.dtype:
        p, g = scratch[2:]
        _widen(param, out=p)
        _widen(grad, out=g)
    if hyperparameters.maximize or hyperparameters.coupled:
        g = np.multiply(g, sign, out=u)
    if hyperparameters.coupled:
        np.add(g, np.multiply(p, weight_decay, out=t), out=u)
    if hyperparameters.decoupled_weight_decay:
        np.multiply(p, shrink, out=p)
    np.multiply(g, beta, out=t)
    np.multiply(t, g, out=t)
    np.multiply(ms, alpha, out=ms)
    np.add(ms, t, out=ms)
    if hyperparameters.eps_inside_sqrt:
        np.add(ms, eps, out=t)
        np.sqrt(t, out=t)
    else:
        np.sqrt(ms, out=t)
        np.add(t, eps, out=t)
    np.multiply(g, lr, out=u)
    np.divide(u, t, out=u)
    np.subtract(p, u, out=p)
    if p is not param:
        _narrow(p, out=param, scratch=t)


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
