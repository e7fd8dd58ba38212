"""The update in NumPy: the backend that is always there, and that the others are held to.

It has no atomic operations, so it counts no races.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from operator import truediv
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hogstream.kernels import rounding
from hogstream.kernels.backends.cpu_threads import Pieces, run_in_pieces
from hogstream.kernels.formula import rmsprop_over
from hogstream.kernels.hyperparameters import Hyperparameters, Switches
from hogstream.kernels.launch_table import ELEMENTS, GRAD, LaunchTable
from hogstream.kernels.rounding import PLACES

Array = npt.NDArray[Any]

# Scratch of this size stays in cache, and each call of NumPy is long enough to be worth giving up
# the GIL for; 16 to 512 KiB are slower, up to three times with two threads.
BLOCK_BYTES = 1 << 20

# NumPy has no bfloat16: it goes by its bits.
_STORED: dict[torch.dtype, np.dtype[Any]] = {
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(np.uint16),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}


class _Scratch:
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


class _Numbers:
    """Numbers with Python's operators, whose results are in scratch for as long as they are used.

    Attributes:
        array: Shape (n,), of the compute type.
    """

    __slots__ = "_scratch", "_taken", "array"

    def __init__(self, scratch: _Scratch, array: Array, taken: Array | None = None) -> None:
        """Those in an array, for which another was taken from scratch."""
        self._scratch, self.array, self._taken = scratch, array, taken

    def __del__(self) -> None:
        if self._taken is not None:
            self._scratch.give_back(self._taken)

    def __add__(self, other: _Operand) -> _Numbers:
        return self.of(np.add, other)

    def __sub__(self, other: _Operand) -> _Numbers:
        return self.of(np.subtract, other)

    def __mul__(self, other: _Operand) -> _Numbers:
        if type(other) is not _Numbers and other == 1:  # as factors are that are not used
            return self
        return self.of(np.multiply, other)

    def __truediv__(self, other: _Operand) -> _Numbers:
        return self.of(np.divide, other)

    def sqrt(self) -> _Numbers:
        """Each number's root."""
        result = self.new()
        np.sqrt(self.array, result.array)
        return result

    def clamp(self) -> _Numbers:
        """0 in place of what is less than 0; NaN stays."""
        result = self.new()
        np.copyto(result.array, self.array)
        np.copyto(result.array, 0, where=self.array < 0)
        return result

    def of(self, function: np.ufunc, other: _Operand) -> _Numbers:
        """A function of these numbers and others."""
        result = self.new()
        function(self.array, other.array if type(other) is _Numbers else other, result.array)
        return result

    def new(self) -> _Numbers:
        """As many numbers, to be written."""
        taken = self._scratch.take()
        return _Numbers(self._scratch, taken[: len(self.array)], taken)

    __radd__, __rmul__ = __add__, __mul__  # which commute, to the bit
    __array_ufunc__ = None  # else NumPy's numbers, on the left, would take these for an object


_Operand = _Numbers | np.floating[Any]
_rmsprop = rmsprop_over(_Numbers.sqrt, truediv, _Numbers.clamp)
_random = rounding.over(rounding.random, mixed=rounding.mixed)
_bfloat16, _float16 = (
    rounding.over(each, where=np.where) for each in (rounding.bfloat16, rounding.float16)
)


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
    scratch = _Scratch(compute, min(BLOCK_BYTES // compute.itemsize, pieces.size))
    with np.errstate(all="ignore"):  # infinities and NaN are results like others
        for start, stop in pieces:
            _update_range(table, hyperparameters, key, start, stop, scratch)


def all_finite(table: LaunchTable) -> bool:
    """Whether no gradient of a table has an element that is infinite or NaN.

    Args:
        table: Of tensors on the CPU.
    """
    stored = _STORED[table.grad_dtype]
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
    key: int,
    start: int,
    stop: int,
    scratch: _Scratch,
) -> None:
    stored, compute = _STORED[table.dtype], scratch.dtype
    dtypes = (stored, _STORED[table.grad_dtype], compute, compute, compute, stored)
    switches = hyperparameters.switches.of_dtype(table.dtype)
    first = 0
    for index, (*addresses, elements) in enumerate(table.columns.T.tolist()):
        begin, end = max(start - first, 0), min(stop - first, elements)
        first += elements
        for low in range(begin, end, scratch.size):
            high = min(low + scratch.size, end)
            arrays = [
                _array_at(address, dtype, low, high) if address else None
                for address, dtype in zip(addresses, dtypes, strict=True)
            ]
            places = _Places(index * PLACES + low, key)
            _update_block(arrays, hyperparameters, switches, places, scratch)


def _array_at(address: int, dtype: np.dtype[Any], low: int, high: int) -> Array:
    """The elements from ``low`` to ``high`` of an array in memory, as an array."""
    size = (high - low) * dtype.itemsize
    memory = (ctypes.c_byte * size).from_address(address + low * dtype.itemsize)
    return np.frombuffer(memoryview(memory), dtype)


class _Places(NamedTuple):
    """What stochastic rounding depends on: the place of a block's first element, and the key."""

    first: int
    key: int


def _update_block(
    arrays: Sequence[Any],  # as ``Operands``, (n,) each; None where there is none
    hyperparameters: Hyperparameters,
    switches: Switches,
    places: _Places,
    scratch: _Scratch,
) -> None:
    param, grad, *state, comp = arrays
    h = hyperparameters
    factors = h.in_float64 if scratch.dtype == np.float64 else h.in_float32
    p, g = (_widened(each, scratch) for each in (param, grad))
    if switches.compensated:
        p = p + _widened(comp, scratch)
    is_used = True, switches.centered, switches.momentum
    state = [each if used else None for each, used in zip(state, is_used, strict=True)]
    numbers = [each if each is None else _Numbers(scratch, each) for each in state]
    p, *new = _rmsprop(p, g, *numbers, factors, *switches.of_formula)
    # Each is written once, whole: who updates it at the same time finds no product yet to be added
    # to.
    for array, result in zip(state, new, strict=True):
        if array is not None:
            np.copyto(array, result.array)
    if switches.stochastic:
        param[...] = _rounded_by_chance(p.array, places, param.dtype)
        return
    rounded = _narrowed(p.array, param.dtype)
    param[...] = rounded
    if switches.compensated:
        left = (p - _widened(rounded, scratch)).array
        left[~np.isfinite(left)] = 0  # of a parameter that is not finite
        comp[...] = _narrowed(left, comp.dtype)


def _rounded_by_chance(wide: Array, places: _Places, dtype: np.dtype[Any]) -> Array:
    """float32 as parameters of 16 bits are stored, rounded stochastically."""
    place = np.arange(places.first, places.first + len(wide), dtype=np.uint64)
    low, high = place.astype(np.uint32), (place >> np.uint64(32)).astype(np.uint32)
    keys = (np.uint32(places.key & 0xFFFF_FFFF), np.uint32(places.key >> 32))
    to_bits = _bfloat16 if dtype == np.uint16 else _float16
    bits: Array = to_bits(wide.view(np.uint32), _random(low, high, *keys)).astype(np.uint16)
    return bits.view(dtype)


def _widened(stored: Array, scratch: _Scratch) -> _Numbers:
    """Stored elements in the compute type: exact, but for gradients of a wider one."""
    if stored.dtype == scratch.dtype:
        return _Numbers(scratch, stored)
    taken = scratch.take()
    wide = taken[: len(stored)]
    if stored.dtype == np.uint16:
        stored = np.left_shift(stored, 16, dtype=np.uint32).view(np.float32)
    np.copyto(wide, stored, casting="same_kind")
    return _Numbers(scratch, wide, taken)


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
