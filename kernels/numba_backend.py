"""The update in Numba: one pass over memory on a CPU thread, without the GIL.

This module needs Numba; ``backends`` imports it on first use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hogstream.kernels.hyperparameters import Hyperparameters

Array = npt.NDArray[Any]


def update_(param: Array, grad: Array, ms: Array, hyperparameters: Hyperparameters) -> None:
    """Updates ``param`` and ``ms`` in place, in one pass, on one thread.

    Args:
        param: Shape (n,); float16, float32, float64, or the bits of bfloat16 as uint16.
        grad: Shape and dtype of ``param``.
        ms: Shape (n,); float64 for float64 parameters, else float32.
        hyperparameters: The numbers and switches of the update.
    """
    if param.dtype == np.float16:  # Numba has no float16 on CPUs: int16 stands for its bits
        param, grad = param.view(np.int16), grad.view(np.int16)
    kernel = _kernel(hyperparameters.eps_inside_sqrt, hyperparameters.coupled)
    kernel(param, grad, ms, *hyperparameters.scalars().rounded(ms.dtype))


@cache
def _kernel(eps_inside_sqrt: bool, coupled: bool) -> Callable[..., None]:
    @numba.njit(nogil=True, error_model="numpy", cache=True)
    def kernel(
        param: Array,
        grad: Array,
        ms: Array,
        lr: float,
        alpha: float,
        beta: float,
        eps: float,
        weight_decay: float,
        shrink: float,
        sign: float,
    ) -> None:
        for i in range(param.size):
            p = _widen(param[i])
            g = _widen(grad[i]) * sign
            if coupled:
                g = g + weight_decay * p
            p = p * shrink
            m = alpha * ms[i] + (beta * g) * g
            ms[i] = m
            d = np.sqrt(m + eps) if eps_inside_sqrt else np.sqrt(m) + eps
            param[i] = _narrow(p - (lr * g) / d, param)

    return kernel


def _widen_intrinsic(_context: Any, stored: types.Type) -> Any:
    """A stored element in the compute type; exact."""

    def half(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    def bfloat(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.IntType(32)(16))
        return builder.bitcast(bits, ir.FloatType())

    def same(_context: Any, _builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        return args[0]

    if stored == types.int16:
        return types.float32(stored), half
    if stored == types.uint16:
        return types.float32(stored), bfloat
    return stored(stored), same


def _narrow_intrinsic(_context: Any, computed: types.Type, array: types.Array) -> Any:
    """A computed value as an element of ``array``, rounded to nearest even."""

    def half(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    def bfloat(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        i32 = ir.IntType(32)
        bits = builder.bitcast(args[0], i32)
        odd = builder.and_(builder.lshr(bits, i32(16)), i32(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, i32(0x7FFF))), i32(16))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(is_nan, i32(0x7FC0), rounded), ir.IntType(16))

    def same(_context: Any, _builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        return args[0]

    if array.dtype == types.int16:
        return array.dtype(computed, array), half
    if array.dtype == types.uint16:
        return array.dtype(computed, array), bfloat
    return array.dtype(computed, array), same


# As seen by a type checker, an intrinsic still has its typing context as a parameter.
_widen: Any = intrinsic(_widen_intrinsic)
_narrow: Any = intrinsic(_narrow_intrinsic)
