"""Arithmetic in NumPy on blocks of elements, and how they are read and stored."""

from __future__ import annotations

import ctypes
from operator import truediv
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hogstream.kernels import rounding
from hogstream.kernels.formula import formula_over
from hogstream.kernels.hyperparameters import Switches

Array = npt.NDArray[Any]

#: How NumPy has elements: no bfloat16, which goes by its bits.
STORED: dict[torch.dtype, np.dtype[Any]] = {
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(np.uint16),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}


class Scratch:
    """Arrays that numbers are computed into, and that come back from there.

    New memory for each operation would not be in cache, and may have to be asked of the system.
    """

    def __init__(self, dtype: np.dtype[Any], size: int) -> None:
        """Makes arrays of so many elements, as they are asked for."""
        self.dtype, self.size = dtype, size
        self._free: list[Array] = []

    def take(self) -> Array:
        """One that nobody uses."""
        return self._free.pop() if self._free else np.empty(self.size, self.dtype)

    def give_back(self, array: Array) -> None:
        """It may be taken again."""
        self._free.append(array)


class Numbers:
    """Numbers with Python's operators, whose results are in scratch for as long as they are used.

    Attributes:
        array: Shape (n,), of the compute type.
    """

    __slots__ = "_scratch", "_taken", "array"

    def __init__(self, scratch: Scratch, array: Array, taken: Array | None = None) -> None:
        """Those in an array, for which another was taken from scratch."""
        self._scratch, self.array, self._taken = scratch, array, taken

    def __del__(self) -> None:
        if self._taken is not None:
            self._scratch.give_back(self._taken)

    def __add__(self, other: _Operand) -> Numbers:
        return self.of(np.add, other)

    def __sub__(self, other: _Operand) -> Numbers:
        return self.of(np.subtract, other)

    def __mul__(self, other: _Operand) -> Numbers:
        if type(other) is not Numbers and other == 1:  # as factors are that are not used
            return self
        return self.of(np.multiply, other)

    def __truediv__(self, other: _Operand) -> Numbers:
        return self.of(np.divide, other)

    def sqrt(self) -> Numbers:
        """Each number's root."""
        result = self.new()
        np.sqrt(self.array, result.array)
        return result

    def clamp(self) -> Numbers:
        """0 in place of what is less than 0; NaN stays."""
        result = self.new()
        np.copyto(result.array, self.array)
        np.copyto(result.array, 0, where=self.array < 0)
        return result

    def of(self, function: np.ufunc, other: _Operand) -> Numbers:
        """A function of these numbers and others."""
        result = self.new()
        function(self.array, other.array if type(other) is Numbers else other, result.array)
        return result

    def new(self) -> Numbers:
        """As many numbers, to be written."""
        taken = self._scratch.take()
        return Numbers(self._scratch, taken[: len(self.array)], taken)

    __radd__, __rmul__ = __add__, __mul__  # which commute, to the bit
    __array_ufunc__ = None  # else NumPy's numbers, on the left, would take these for an object


_Operand = Numbers | np.floating[Any]
#: The formula over ``Numbers``; of rows, over arrays.
formula = formula_over(sqrt=Numbers.sqrt, divide=truediv, clamp=Numbers.clamp, where=np.where)
_random = rounding.over(rounding.random, mixed=rounding.mixed)
_bfloat16, _float16 = (
    rounding.over(each, where=np.where) for each in (rounding.bfloat16, rounding.float16)
)


def array_at(address: int, dtype: np.dtype[Any], low: int, high: int) -> Array:
    """The elements from ``low`` to ``high`` of an array in memory, as an array."""
    size = (high - low) * dtype.itemsize
    memory = (ctypes.c_byte * size).from_address(address + low * dtype.itemsize)
    return np.frombuffer(memoryview(memory), dtype)


class Places(NamedTuple):
    """What stochastic rounding depends on.

    Attributes:
        of_elements: Their places: uint64, (n,).
        key: Of the step.
    """

    of_elements: Array
    key: int


def store(
    p: Numbers,
    param: Array,
    comp: Array | None,
    switches: Switches,
    places: Places | None,
    scratch: Scratch,
) -> None:
    """Stores elements of a parameter, and what rounding leaves of them.

    Args:
        p: They, of the compute type: (n,).
        param: Where to: (n,).
        comp: Where to store what is left, if that is kept: (n,).
        switches: Of the update.
        places: Of the elements, for stochastic rounding; None to round to nearest.
        scratch: Of the compute type.
    """
    if places is not None:
        param[...] = _rounded_by_chance(p.array, places, param.dtype)
        return
    rounded = _narrowed(p.array, param.dtype)
    param[...] = rounded
    if comp is not None and switches.compensated:
        left = (p - widened(rounded, scratch)).array
        left[~np.isfinite(left)] = 0  # of a parameter that is not finite
        comp[...] = _narrowed(left, comp.dtype)


def _rounded_by_chance(wide: Array, places: Places, dtype: np.dtype[Any]) -> Array:
    """float32 as parameters of 16 bits are stored, rounded stochastically."""
    place = places.of_elements
    low, high = place.astype(np.uint32), (place >> np.uint64(32)).astype(np.uint32)
    keys = (np.uint32(places.key & 0xFFFF_FFFF), np.uint32(places.key >> 32))
    to_bits = _bfloat16 if dtype == np.uint16 else _float16
    bits: Array = to_bits(wide.view(np.uint32), _random(low, high, *keys)).astype(np.uint16)
    return bits.view(dtype)


def widened(stored: Array, scratch: Scratch) -> Numbers:
    """Stored elements in the compute type: exact, but for gradients of a wider one."""
    if stored.dtype == scratch.dtype:
        return Numbers(scratch, stored)
    taken = scratch.take()
    wide = taken[: len(stored)]
    if stored.dtype == np.uint16:
        stored = np.left_shift(stored, 16, dtype=np.uint32).view(np.float32)
    np.copyto(wide, stored, casting="same_kind")
    return Numbers(scratch, wide, taken)


def _narrowed(wide: Array, dtype: np.dtype[Any]) -> Array:
    """Numbers as parameters of a dtype are stored, rounded to nearest even."""
    if dtype != np.uint16:
        return wide.astype(dtype, copy=False)
    # On the bits: add half of the last place that is kept, less one if that is even.
    bits = wide.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    rounded[np.isnan(wide)] = 0x7FC0
    narrow: Array = rounded.astype(np.uint16)
    return narrow
