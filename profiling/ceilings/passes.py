"""Calls that go over memory as a copy does, or as an update does, with all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from hogstream.kernels.backends.cpu_threads import Pieces, run_in_pieces
from hogstream.kernels.backends.select import available_backends
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands

_NUMPY_BLOCK = 1 << 15


def copy_pass(device: torch.device, elements: int) -> Callable[[], object]:
    """A call that copies ``elements`` of float32 to another array, with all cores."""
    target, source = (torch.ones(elements, device=device) for _ in range(2))
    return partial(target.copy_, source)


def update_shaped_passes(device: torch.device, elements: int) -> list[Callable[[], Operands]]:
    """Calls with the memory traffic of an update of ``elements`` of float32, and little arithmetic.

    Each reads three arrays, writes the first and last of them in place, and returns all: torch's
    own update of that kind, which is fused SGD with momentum, and then additions of the middle one
    to both others, on a CPU with and without prefetches.
    """
    operands = Operands(*(torch.ones(elements, device=device) for _ in range(3)))
    return [_returning(operands, call) for call in (_sgd(operands), *_additions(operands))]


def _returning(operands: Operands, call: Callable[[], object]) -> Callable[[], Operands]:
    def pass_over() -> Operands:
        call()
        return operands  # which a table's addresses need alive

    return pass_over


def _sgd(operands: Operands) -> Callable[[], object]:
    """``ms = ms / 2 + grad``, and then ``param = param - ms / 2``."""
    param, grad, ms = operands[:3]
    optimizer = torch.optim.SGD([param], lr=0.5, momentum=0.5, fused=True)
    optimizer.state[param]["momentum_buffer"] = ms

    def step() -> None:
        param.grad = grad
        optimizer.step()

    return step


def _additions(operands: Operands) -> Iterator[Callable[[], object]]:
    if operands.param.device.type == "cuda":
        from hogstream.profiling.ceilings import triton_passes

        yield partial(triton_passes.update_shaped, *operands[:3])
        return
    table = LaunchTable([operands])
    if available_backends()["numba"] is None:
        from hogstream.profiling.ceilings import numba_passes

        for ahead in (False, True):
            yield partial(numba_passes.update_shaped, table, ahead)
        return
    p, g, m = (tensor.numpy() for tensor in operands[:3])

    def add(_: LaunchTable, pieces: Pieces) -> None:
        for start, stop in pieces:
            for low in range(start, stop, _NUMPY_BLOCK):
                part = slice(low, min(low + _NUMPY_BLOCK, stop))
                np.add(m[part], g[part], out=m[part])
                np.add(p[part], g[part], out=p[part])

    yield partial(run_in_pieces, add, table)
