"""What memory can do: the bandwidth of a copy, and of an update without its arithmetic."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from hogstream.kernels.backends import available_backends
from hogstream.kernels.cpu_threads import Pieces, run_in_pieces
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands

ELEMENTS = 1 << 24
REPEATS = 9
_NUMPY_BLOCK = 1 << 15


def measure_ceilings(device: torch.device) -> dict[str, Any]:
    """Measures a device's bandwidth over float32 arrays too large for its caches.

    ``copy`` reads one array and writes another: 8 bytes an element. ``update_shaped`` reads three
    and writes two of them in place: 20 bytes an element, as an update does. Each is the median of
    nine, in 1e9 bytes/s, with all cores.

    Args:
        device: A CPU or CUDA device.
    """
    elements = ELEMENTS << 2 if device.type == "cuda" else ELEMENTS
    copy, update_shaped = copy_pass(device, elements), update_shaped_pass(device, elements)
    timings = interleave({"copy": copy, "update_shaped": update_shaped}, device, REPEATS)
    return {
        "elements": elements,
        "copy_gigabytes_per_second": 8e-9 * elements / statistics.median(timings["copy"]),
        "update_shaped_gigabytes_per_second": 20e-9
        * elements
        / statistics.median(timings["update_shaped"]),
    }


def interleave(
    calls: dict[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Times several calls in turn, so that drift of the machine strikes them alike.

    Args:
        calls: By name; each is called once beforehand to warm up.
        device: Synchronised around each call, if it is a GPU.
        repeats: How many times each is timed.

    Returns:
        Seconds of each call, ``repeats`` for each name.
    """
    synchronize: Callable[[], None] = (
        partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    )
    for call in calls.values():
        call()
    timings: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            timings[name].append(time.perf_counter() - start)
    return timings


def copy_pass(device: torch.device, elements: int) -> Callable[[], object]:
    """A call that copies ``elements`` of float32 to another array, with all cores."""
    target, source = (torch.ones(elements, device=device) for _ in range(2))
    if device.type == "cuda":
        return lambda: target.copy_(source)
    to, of = target.numpy(), source.numpy()

    def copy(_: LaunchTable, pieces: Pieces) -> bool:
        for start, stop in pieces:
            np.copyto(to[start:stop], of[start:stop])
        return pieces.done()

    table = LaunchTable([Operands(target, source, target)])
    return lambda: run_in_pieces(copy, table)


def update_shaped_pass(device: torch.device, elements: int) -> Callable[[], object]:
    """A call with the memory traffic of an update of ``elements`` of float32, but no arithmetic.

    It reads three arrays and writes two of them in place, with all cores.
    """
    param, grad, ms = operands = Operands(*(torch.ones(elements, device=device) for _ in range(3)))
    if device.type == "cuda":
        from hogstream.profiling.triton_ceiling import update_shaped

        return lambda: update_shaped(param, grad, ms)
    table = LaunchTable([operands])
    if available_backends()["numba"] is None:
        from hogstream.profiling import numba_ceiling

        def pass_over() -> Operands:
            run_in_pieces(numba_ceiling.update_shaped, table)
            return operands  # which the table's addresses need alive

        return pass_over
    p, g, m = (tensor.numpy() for tensor in operands)

    def add(_: LaunchTable, pieces: Pieces) -> bool:
        for start, stop in pieces:
            for low in range(start, stop, _NUMPY_BLOCK):
                part = slice(low, min(low + _NUMPY_BLOCK, stop))
                np.add(m[part], g[part], out=m[part])
                np.add(p[part], g[part], out=p[part])
        return pieces.done()

    return lambda: run_in_pieces(add, table)
