"""The kernels of the update as the loop of CUDA lanes launches them, and as a graph does.

This module needs Triton, for its kernels' constants.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from hogstream.kernels.backends.triton_launch import EXPONENTS, STORAGE, switch_constants
from hogstream.kernels.backends.triton_rows import tile_of, unit_of
from hogstream.kernels.hyperparameters import Switches
from hogstream.kernels.rows import RowOperands
from hogstream.scheduler.lanes.base import LaneSettings
from hogstream.scheduler.lanes.cuda_calls import (
    FINITE_FUNCTION,
    FUNCTION,
    KERNEL,
    PROGRAM,
    RANGE_FUNCTION,
    TILE,
    UNIT,
)
from hogstream.scheduler.lanes.cuda_device import CudaDevice, Function


class UpdateKernels(NamedTuple):
    """What an update launches.

    Attributes:
        update: The kernel of the update.
        finite: That which looks at its gradient first; None if nobody asks.
        block: How many elements a program of either takes.
    """

    update: Function
    finite: Function | None
    block: int

    def words(self) -> Any:
        """As the loop reads them: int64, shape (``KERNEL``,)."""
        return _words(self.update, self.finite, self.block)


def update_kernels(device: CudaDevice, settings: LaneSettings, switches: Switches) -> UpdateKernels:
    """The kernels of updates, compiled and loaded when they are first asked for.

    Args:
        device: Where.
        settings: What is the same for all updates.
        switches: Of the updates.
    """
    dtype, block = settings.shared.flat.dtype, _block(settings)
    constants = {
        "STORAGE": STORAGE[dtype],
        "GRAD_STORAGE": STORAGE[dtype],
        **switch_constants(switches),
        "SCALED": False,
        "LR_ON_DEVICE": False,
        "CHECKED": settings.check_finite,
        "BLOCK": block,
        "COUNTED": settings.races is not None,
    }
    update = device.function("rmsprop_kernel", constants)
    return UpdateKernels(update, _finite(device, settings), block)


class RowKernels:
    """The kernels of updates and copies of rows, compiled and loaded when first asked for."""

    def __init__(self, device: CudaDevice, settings: LaneSettings) -> None:
        """Asks for none yet.

        Args:
            device: Where.
            settings: What is the same for all updates.
        """
        self._device, self._settings = device, settings
        self._locked = settings.row_locks is not None
        self._kept: dict[tuple[object, ...], Any] = {}  # by what they are, and by their tile
        self._addresses: dict[tuple[object, ...], int] = {}  # by where all lies

    def update(self, switches: Switches, tensors: RowOperands) -> int:
        """Where a ``KERNEL`` is of updates of a table; it lives as long as this.

        Args:
            switches: Of the updates.
            tensors: Of one.
        """
        return self._address(switches, tensors)

    def copy(self, tensors: RowOperands) -> int:
        """The same of copies of rows, which are in the place of gradients."""
        return self._address(None, tensors)

    def compile(self, switches: Switches) -> None:
        """Compiles what updates and copies of all parameters need, wherever gradients lie."""
        for view in self._settings.shared.views.values():
            if view.dim():
                table = view.view(len(view), math.prod(view.shape[1:]))
                # State has no say: it may lie as the table does, or not.
                tensors = RowOperands(table, table, table, None, None, None, None, table)
                for unit, of in product({unit_of(tensors), 1}, (switches, None)):
                    self._in_tile(of, tile_of(tensors, unit, locked=self._locked))

    def _address(self, of: Switches | None, tensors: RowOperands) -> int:
        """Of a kernel of updates, or of copies if there are no switches."""
        param, ms, grads = tensors.param, tensors.ms, tensors.grads
        key = of, param.data_ptr(), param.shape[1], ms.data_ptr(), grads.data_ptr() % 16
        address = self._addresses.get(key)
        if address is None:
            tile = tile_of(tensors, unit_of(tensors), locked=self._locked)
            address = self._addresses[key] = self._in_tile(of, tile)
        return address

    def _in_tile(self, of: Switches | None, tile: dict[str, int]) -> int:
        key = of, *tile.values()
        if key not in self._kept:
            self._kept[key] = self._of_copy(tile) if of is None else self._of_update(of, tile)
        address: int = self._kept[key].ctypes.data
        return address

    def _of_update(self, switches: Switches, tile: dict[str, int]) -> Any:
        settings, device = self._settings, self._device
        dtype = settings.shared.flat.dtype
        constants = {
            "STORAGE": STORAGE[dtype],
            "GRAD_STORAGE": STORAGE[dtype],
            **switch_constants(switches),
            "ROWWISE": False,
            "LAZY": False,
            "SCALED": False,
            "LR_ON_DEVICE": False,
            "CHECKED": True,  # by the verdict of those that look first
            "COUNTED": settings.races is not None,
            "LOCKED": self._locked,
            **tile,
        }
        words = _words(
            device.function("row_rmsprop_kernel", constants),
            _finite(device, settings),
            _block(settings),
        )
        return _with_tile(words, tile, device.function("row_range_kernel", {}))

    def _of_copy(self, tile: dict[str, int]) -> Any:
        bits, _ = EXPONENTS[self._settings.shared.flat.dtype]
        constants = {"BITS": bits, "LOCKED": self._locked, **tile}
        return _with_tile(_words(self._device.function("row_copy_kernel", constants)), tile)


def _block(settings: LaneSettings) -> int:
    """How many elements a program of a kernel takes that is not of rows."""
    race_block = settings.backend.race_block
    assert race_block is not None
    return race_block(settings.shared.flat.dtype, settings.shared.flat.device)


def _finite(device: CudaDevice, settings: LaneSettings) -> Function | None:
    """What looks whether gradients are finite; None if nobody asks."""
    if not settings.check_finite:
        return None
    bits, exponent = EXPONENTS[settings.shared.flat.dtype]
    constants = {"BITS": bits, "EXPONENT": exponent, "BLOCK": _block(settings)}
    return device.function("finite_kernel", constants)


def _words(update: Function, finite: Function | None = None, block: int = 0) -> Any:
    """A ``KERNEL``: int64, with 0 for what it has only of rows."""
    words = np.zeros(KERNEL, np.int64)
    words[FUNCTION : FUNCTION + 3] = update
    if finite is not None:
        words[FINITE_FUNCTION : FINITE_FUNCTION + 3] = finite
    words[PROGRAM] = block
    return words


def _with_tile(words: Any, tile: dict[str, int], looks: Function | None = None) -> Any:
    """The same with what it has of rows."""
    if looks is not None:
        words[RANGE_FUNCTION : RANGE_FUNCTION + 3] = looks
    words[TILE], words[UNIT] = tile["ROWS"], tile["UNIT"]
    return words
