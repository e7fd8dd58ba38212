"""The update in NumPy: the backend that is always there, and that the others are held to.

It has no atomic operations, so it counts no races.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from operator import truediv
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hogstream.kernels.backends.cpu_threads import Pieces, run_in_pieces
from hogstream.kernels.formula import rmsprop_over
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import ELEMENTS, GRAD, LaunchTable

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
    compute: np.dtype[Any] = np.dtype(np.float64 if table.dtype == torch.float64 else np.float32)
    scratch = _Scratch(compute, min(BLOCK_BYTES // compute.itemsize, pieces.size))
    with np.errstate(all="ignore"):  # infinities and NaN are results like others
        for start, stop in pieces:
            _update_range(table, hyperparameters, start, stop, scratch)


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
    scratch: _Scratch,
) -> None:
    stored, compute = _STORED[table.dtype], scratch.dtype
    dtypes = (stored, stored, compute, compute, compute)
    first = 0
    for *addresses, elements in table.columns.T.tolist():
        begin, end = max(start - first, 0), min(stop - first, elements)
        first += elements
        for low in range(begin, end, scratch.size):
            high = min(low + scratch.size, end)
            arrays = [
                _array_at(address, dtype, low, high) if address else None
                for address, dtype in zip(addresses, dtypes, strict=True)
            ]
            _update_block(arrays, hyperparameters, scratch)


def _array_at(address: int, dtype: np.dtype[Any], low: int, high: int) -> Array:
    """The elements from ``low`` to ``high`` of an array in memory, as an array."""
    size = (high - low) * dtype.itemsize
    memory = (ctypes.c_byte * size).from_address(address + low * dtype.itemsize)
    return np.frombuffer(memoryview(memory), dtype)


def _update_block(
    arrays: Sequence[Any],  # as ``Operands``, (n,) each; None where there is none
    hyperparameters: Hyperparameters,
    scratch: _Scratch,
) -> None:
    param, grad, *state = arrays
    h = hyperparameters
    factors = h.in_float64 if scratch.dtype == np.float64 else h.in_float32
    p, g = (_widened(each, scratch) for each in (param, grad))
    numbers = [each if each is None else _Numbers(scratch, each) for each in state]
    p, *new = _rmsprop(p, g, *numbers, factors, *h.switches)
    # Each is written once, whole: who updates it at the same time finds no product yet to be added
    # to.
    for array, result in zip(state, new, strict=True):
        if array is not None:
            np.copyto(array, result.array)
    _narrow(p.array, out=param)


def _widened(stored: Array, scratch: _Scratch) -> _Numbers:
    """Stored elements in the compute type; exact."""
    if stored.dtype == scratch.dtype:
        return _Numbers(scratch, stored)
    taken = scratch.take()
    wide = taken[: len(stored)]
    if stored.dtype == np.uint16:
        np.left_shift(stored, 16, out=wide.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(wide, stored)
    return _Numbers(scratch, wide, taken)


def _narrow(wide: Array, out: Array) -> None:
    """Numbers as they are stored, rounded to nearest even."""
    if out.dtype != np.uint16:
        np.copyto(out, wide, casting="same_kind")
        return
    # On the bits: add half of the last place that is kept, less one if that is even.
    bits = wide.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    rounded[np.isnan(wide)] = 0x7FC0
    out[...] = rounded
