"""Updates of tensors too large to be there: offsets beyond 2^31 elements."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from hogstream.kernels.backends.numpy_rows import update_ as update_rows_by_numpy_
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import ELEMENTS, LaunchTable
from hogstream.kernels.operands import COMPUTE_DTYPES, Operands
from hogstream.kernels.rows import RowOperands, RowUpdate
from ptx_checks import options_of, state_of
from ptx_compiling import Compiled
from ptx_machine import Pretended, execute
from ptx_machine.scalars import UNSIGNED, Array
from ptx_rows import operands_of, table_of
from ptx_updates import Device, Watch
from row_making import NUMBER, assert_same_rows
from update_testing import assert_same_bits, update_

#: How many elements: offsets in them need 33 bits, and in bytes more.
_ELEMENTS = (1 << 32) + (1 << 20) + 77


def check_far_offsets(compiled: Compiled, aligned: bool = True) -> int:
    """Runs blocks near 0, 2^31, 2^32 and the end of one tensor; returns how many elements.

    Of rows those are updated that lie there, whose gradients do too.

    Args:
        compiled: A form; without race counters.
        aligned: Whether the tensors are aligned for accesses of 128 bits.
    """
    if compiled.form.of_rows:
        return _FarRows(compiled, aligned).check()
    far = _Far(compiled, aligned)
    if compiled.form.updates:
        far.check_update()
    else:
        far.check_verdict()
    return len(far.places)


class _Far:
    """A parameter, gradient and state that are pretended.

    Attributes:
        places: Which elements are looked at.
    """

    def __init__(self, compiled: Compiled, aligned: bool) -> None:
        self._compiled = compiled
        self._device = Device()
        dtype = getattr(torch, compiled.form.dtype)
        compute = COMPUTE_DTYPES[dtype]
        self._dtypes = {"param": dtype, "grad": dtype, "ms": compute}
        self._dtypes |= {"grad_avg": compute} if compiled.form.centered else {}
        self._dtypes |= {"momentum_buffer": compute} if compiled.form.momentum else {}
        self._regions = {
            name: self._device.memory.pretend(
                name,
                _ELEMENTS * each.itemsize,
                partial(_page, each),
                0 if aligned else each.itemsize,
            )
            for name, each in self._dtypes.items()
        }
        one = Operands(**{name: torch.empty(1, dtype=each) for name, each in self._dtypes.items()})
        self._table = LaunchTable([one])
        self._table.columns[ELEMENTS] = _ELEMENTS
        for name, region in self._regions.items():
            self._table.columns[Operands._fields.index(name)] = region.base
        last = (_ELEMENTS - 1) // compiled.block
        borders = [(1 << bits) // compiled.block for bits in (31, 32)]
        self._blocks = [0, *(border + by for border in borders for by in (-1, 0)), last]
        self.places = np.concatenate([self._elements_of(block) for block in self._blocks])

    def check_update(self) -> None:
        """Compares an update with NumPy's."""
        options = options_of(self._compiled.form)
        device, hyperparameters = self._device, Hyperparameters(**options)
        watch = Watch.of(self._compiled.form, device, hyperparameters.lr)
        before = self._read()
        launch = device.update(self._compiled, self._table, hyperparameters, watch)
        execute(launch, device.memory, self._blocks)
        expected = state_of(before)
        update_(expected, before.grad, backend="numpy", **options)
        assert_same_bits(state_of(self._read()), expected)

    def check_verdict(self) -> None:
        """Hides one infinite element in each block."""
        found = self._device.put("verdict", torch.zeros(1, dtype=torch.int32))
        launch = self._device.check_finite(self._compiled, self._table, found)
        execute(launch, self._device.memory, self._blocks)
        assert found.item() == 0
        dtype, grads = self._dtypes["grad"], self._regions["grad"]
        infinite = torch.tensor([torch.inf], dtype=dtype).view(torch.uint8).numpy()
        for block in self._blocks:
            address = _addresses(grads, self._elements_of(block)[-1:], dtype)
            kept = grads.load(address, dtype.itemsize, None)
            grads.store(address, infinite.view(UNSIGNED[8 * dtype.itemsize]))
            found.zero_()
            execute(launch, self._device.memory, [block])
            assert found.item() == 1, f"block {block}"
            grads.store(address, kept)

    def _elements_of(self, block: int) -> Array:
        size = self._compiled.block
        return np.arange(block * size, min((block + 1) * size, _ELEMENTS))

    def _read(self) -> Operands:
        return Operands(**{name: self._values(name) for name in self._regions})

    def _values(self, name: str) -> torch.Tensor:
        region, dtype = self._regions[name], self._dtypes[name]
        octets = region.load(_addresses(region, self.places, dtype), dtype.itemsize, None)
        return torch.from_numpy(octets).view(dtype)


class _FarTable(NamedTuple):
    """A table that is pretended, or a column.

    Attributes:
        region: It.
        dtype: Of its elements.
        of_row: The shape of a row: (D,), or ().
    """

    region: Pretended
    dtype: torch.dtype
    of_row: tuple[int, ...]

    def rows(self, which: torch.Tensor) -> torch.Tensor:
        """Some of its rows."""
        width = math.prod(self.of_row)
        places = (which.numpy()[:, None] * width + np.arange(width)).reshape(-1)
        addresses = _addresses(self.region, places, self.dtype)
        octets = self.region.load(addresses, self.dtype.itemsize, None)
        return torch.from_numpy(octets).view(self.dtype).reshape(len(which), *self.of_row)


class _FarRows:
    """A table and gradients that are pretended, and rows near 0, 2^31, 2^32 and the end."""

    def __init__(self, compiled: Compiled, aligned: bool) -> None:
        self._compiled, self._aligned = compiled, aligned
        self._device = device = Device()
        form = compiled.form
        self._width = width = form.columns * (1 if form.unit > 1 else 3)
        self._shape = shape = -(-_ELEMENTS // width), width
        borders = [(1 << bits) // width for bits in (31, 32)]
        rows = [0, *(border + by for border in borders for by in (-1, 0, 0, 1)), shape[0] - 1]
        self._rows = device.put("rows", torch.tensor(rows))
        self._order = device.put("order", torch.tensor(rows[::-1]))
        self._tables = table_of(form, shape, self._pretend)
        grad_dtype = getattr(torch, form.grad_dtype or form.dtype)
        self._grads = self._pretend(shape, grad_dtype, "grads")

    def check(self) -> int:
        """Compares an update with NumPy's, of a table of these rows alone."""
        form, device = self._compiled.form, self._device
        hyperparameters = Hyperparameters(**options_of(form))
        expected = self._read()
        update_rows_by_numpy_(RowUpdate.of(expected, NUMBER), hyperparameters)
        verdict = device.put("verdict", torch.ones(1, dtype=torch.int32))
        watch = Watch.of(form, device, hyperparameters.lr)
        words = self._words()
        launch = device.update_rows(self._compiled, words, hyperparameters, verdict, watch)
        execute(launch, device.memory)
        assert verdict.item() == 0, "rows that are in the table"
        assert_same_rows(self._read(), expected)
        return expected.grads.numel()

    def _pretend(self, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> _FarTable:
        size, offset = math.prod(shape) * dtype.itemsize, 0 if self._aligned else dtype.itemsize
        region = self._device.memory.pretend(name, size, partial(_page, dtype), offset)
        return _FarTable(region, dtype, shape[1:])

    def _words(self) -> list[int]:
        """As ``row_words``."""
        bases = {name: each.region.base for name, each in self._tables.items()}
        bases["grads"] = self._grads.region.base
        return [
            *(bases.get(name, 0) for name in RowOperands._fields[:7]),
            *(self._rows.data_ptr(), self._order.data_ptr(), len(self._rows), self._shape[0]),
            *(self._width // self._compiled.form.unit, NUMBER, NUMBER.bit_length()),
        ]

    def _read(self) -> RowOperands:
        """A table of those rows alone, and their gradients in their order."""
        touched, compact = self._rows.unique(return_inverse=True)
        table = {name: each.rows(touched) for name, each in self._tables.items()}
        return operands_of(table, self._grads.rows(self._order), compact)


def _addresses(region: Pretended, places: Array, dtype: torch.dtype) -> Array:
    return np.uint64(region.base) + places.astype(np.uint64) * np.uint64(dtype.itemsize)


def _page(dtype: torch.dtype, offset: int) -> Array:
    """What memory holds at first: other numbers on each page, all positive, as ``ms`` are."""
    random = np.random.default_rng(offset)
    values = torch.from_numpy(random.standard_exponential(Pretended.PAGE // dtype.itemsize))
    octets: Array = values.to(dtype).view(torch.uint8).numpy()
    return octets
