"""Updates of tensors too large to be there: offsets beyond 2^31 elements."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import ELEMENTS, LaunchTable
from hogstream.kernels.operands import COMPUTE_DTYPES, Operands
from ptx_checks import options_of, state_of
from ptx_compiling import Compiled
from ptx_machine import Pretended, execute
from ptx_machine.scalars import UNSIGNED, Array
from ptx_updates import Device, Watch
from update_testing import assert_same_bits, update_

#: How many elements: offsets in them need 33 bits, and in bytes more.
_ELEMENTS = (1 << 32) + (1 << 20) + 77


def check_far_offsets(compiled: Compiled, aligned: bool = True) -> int:
    """Runs blocks near 0, 2^31, 2^32 and the end of one tensor; returns how many elements.

    Args:
        compiled: A form; without race counters.
        aligned: Whether the tensors are aligned for accesses of 128 bits.
    """
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


def _addresses(region: Pretended, places: Array, dtype: torch.dtype) -> Array:
    return np.uint64(region.base) + places.astype(np.uint64) * np.uint64(dtype.itemsize)


def _page(dtype: torch.dtype, offset: int) -> Array:
    """What memory holds at first: other numbers on each page, all positive, as ``ms`` are."""
    random = np.random.default_rng(offset)
    values = torch.from_numpy(random.standard_exponential(Pretended.PAGE // dtype.itemsize))
    octets: Array = values.to(dtype).view(torch.uint8).numpy()
    return octets
