"""The fused multiply-add, rounded once: NumPy has none."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from ptx_machine.scalars import Array


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c``, of float32 or float64, rounded once to nearest even."""
    a, b, c = np.broadcast_arrays(a, b, c)
    return _in_float32(a, b, c) if a.dtype == np.float32 else _in_float64(a, b, c)


def _in_float32(a: Array, b: Array, c: Array) -> Array:
    """By way of float64, which holds the product whole.

    The sum is rounded to odd there: whatever was cut off shows in its last bit. As float64 has more
    than two bits beyond those of float32, rounding that once more is as good as rounding but once.
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    # What the sum lacks, exactly (Knuth's two-sum).
    part = total - product
    lacks = (product - (total - part)) + (addend - part)
    even = (total.view(np.int64) & 1) == 0
    inexact = np.isfinite(total) & (lacks != 0) & even
    towards = np.where(lacks > 0, np.inf, -np.inf)
    odd = np.where(inexact, np.nextafter(total, towards), total)
    return odd.astype(np.float32)


def _in_float64(a: Array, b: Array, c: Array) -> Array:
    """By fractions, one by one."""
    result = a * b + c  # right where it is not finite, or 0
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    for index in np.flatnonzero(finite):
        exact = Fraction(float(a[index])) * Fraction(float(b[index])) + Fraction(float(c[index]))
        if exact != 0:
            result[index] = _nearest(exact)
    return result


def _nearest(exact: Fraction) -> float:
    try:
        return exact.numerator / exact.denominator  # Python rounds it once
    except OverflowError:
        return np.inf if exact > 0 else -np.inf
