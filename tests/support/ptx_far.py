"""Updates of tensors too large to be there: offsets beyond 2^31 elements."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from hogstream.kernels import rmsprop_
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import COMPUTE_DTYPES, Operands
from ptx_compiling import Compiled
from ptx_machine import execute
from ptx_machine.memory import Pretended
from ptx_machine.scalars import UNSIGNED, Array
from ptx_updates import Device, Watch
from update_testing import State, assert_same_bits

#: How many elements: offsets in them need 33 bits, and in bytes more.
_ELEMENTS = (1 << 32) + (1 << 20) + 77


def check_far_offsets(compiled: Compiled, aligned: bool = True) -> int:
    """Updates blocks near 0, 2^31, 2^32 and the end of one tensor; returns how many elements.

    Args:
        compiled: A form; without race counters.
        aligned: Whether the tensors are aligned for accesses of 128 bits.
    """
    dtype = getattr(torch, compiled.form.dtype)
    device = Device()
    types = Operands(dtype, dtype, COMPUTE_DTYPES[dtype])  # type: ignore[arg-type]
    regions = [
        device.memory.pretend(
            name, _ELEMENTS * each.itemsize, partial(_page, each), 0 if aligned else each.itemsize
        )
        for name, each in zip(Operands._fields, types, strict=True)
    ]
    table = LaunchTable([Operands(*(torch.empty(1, dtype=each) for each in types))])
    table.columns[:, 0] = [*(region.base for region in regions), _ELEMENTS]
    last = (_ELEMENTS - 1) // compiled.block
    blocks = [0, *((1 << bits) // compiled.block + by for bits in (31, 32) for by in (-1, 0)), last]
    places = np.concatenate([_elements_of(each, compiled.block) for each in blocks])
    before = [_read(region, places, each) for region, each in zip(regions, types, strict=True)]
    if not compiled.form.updates:
        return _check_verdict(compiled, device, table, regions[1], blocks)
    watch = Watch(
        device.put("lr", torch.tensor(0.01).double()) if compiled.form.lr_on_device else None,
        device.put("verdict", torch.zeros(1, dtype=torch.int32)) if compiled.form.checked else None,
    )
    numbers = {
        "weight_decay": 0.1 if compiled.form.coupled else 0.0,
        "eps_inside_sqrt": compiled.form.eps_inside_sqrt,
    }
    execute(
        device.update(compiled, table, Hyperparameters(**numbers), watch), device.memory, blocks
    )
    param, grad, ms = before
    rmsprop_(param, grad, ms, backend="numpy", **numbers)
    after = [_read(region, places, each) for region, each in zip(regions, types, strict=True)]
    assert_same_bits(State(after[0], after[2]), State(param, ms))
    return len(places)


def _check_verdict(
    compiled: Compiled, device: Device, table: LaunchTable, grads: Pretended, blocks: list[int]
) -> int:
    dtype = getattr(torch, compiled.form.dtype)
    found = device.put("verdict", torch.zeros(1, dtype=torch.int32))
    launch = device.check_finite(compiled, table, found)
    execute(launch, device.memory, blocks)
    assert found.item() == 0
    infinite = torch.tensor([torch.inf], dtype=dtype).view(torch.uint8).numpy()
    for block in blocks:
        place = grads.base + int(_elements_of(block, compiled.block)[-1]) * dtype.itemsize
        address = np.array([place], np.uint64)
        kept = grads.load(address, dtype.itemsize, None)
        grads.store(address, infinite.view(UNSIGNED[8 * dtype.itemsize]))
        found.zero_()
        execute(launch, device.memory, [block])
        assert found.item() == 1, f"block {block}"
        grads.store(address, kept)
    return len(blocks)


def _elements_of(block: int, size: int) -> Array:
    return np.arange(block * size, min((block + 1) * size, _ELEMENTS))


def _read(region: Pretended, places: Array, dtype: torch.dtype) -> torch.Tensor:
    addresses = np.uint64(region.base) + places.astype(np.uint64) * np.uint64(dtype.itemsize)
    octets = region.load(addresses, dtype.itemsize, None).view(np.uint8)
    return torch.from_numpy(octets.copy()).view(dtype)


def _page(dtype: torch.dtype, offset: int) -> Array:
    """What memory holds at first: other numbers on each page, all positive, as ``ms`` are."""
    random = np.random.default_rng(offset)
    values = torch.from_numpy(random.standard_exponential(Pretended.PAGE // dtype.itemsize))
    return values.to(dtype).view(torch.uint8).numpy()
