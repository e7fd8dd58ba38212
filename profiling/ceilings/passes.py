"""One call that goes over memory as a copy does, or as an update does, with all cores."""

from __future__ import annotations

from collections.abc import Callable

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
    if device.type == "cuda":
        return lambda: target.copy_(source)
    to, of = target.numpy(), source.numpy()

    def copy(_: LaunchTable, pieces: Pieces) -> None:
        for start, stop in pieces:
            np.copyto(to[start:stop], of[start:stop])

    table = LaunchTable([Operands(target, source, target)])
    return lambda: run_in_pieces(copy, table)


def update_shaped_pass(device: torch.device, elements: int) -> Callable[[], object]:
    """A call with the memory traffic of an update of ``elements`` of float32, but no arithmetic.

    It reads three arrays and writes two of them in place, with all cores.
    """
    param, grad, ms = operands = Operands(*(torch.ones(elements, device=device) for _ in range(3)))
    if device.type == "cuda":
        from hogstream.profiling.ceilings.triton_passes import update_shaped

        return lambda: update_shaped(param, grad, ms)
    table = LaunchTable([operands])
    if available_backends()["numba"] is None:
        from hogstream.profiling.ceilings import numba_passes

        def pass_over() -> Operands:
            numba_passes.update_shaped(table)
            return operands  # which the table's addresses need alive

        return pass_over
    p, g, m = (tensor.numpy() for tensor in operands)

    def add(_: LaunchTable, pieces: Pieces) -> None:
        for start, stop in pieces:
            for low in range(start, stop, _NUMPY_BLOCK):
                part = slice(low, min(low + _NUMPY_BLOCK, stop))
                np.add(m[part], g[part], out=m[part])
                np.add(p[part], g[part], out=p[part])

    return lambda: run_in_pieces(add, table)
