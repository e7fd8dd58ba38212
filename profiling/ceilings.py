"""What memory can do: the bandwidth of a copy, and of an update without its arithmetic."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from hogstream.kernels.backends import available_backends
from hogstream.kernels.cpu_threads import run_in_slices

ELEMENTS = 1 << 24
REPEATS = 9


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
    source, target = (torch.ones(elements, device=device) for _ in range(2))
    if device.type == "cuda":
        return lambda: target.copy_(source)
    arrays = target.numpy(), source.numpy()
    return lambda: run_in_slices(np.copyto, arrays)


def update_shaped_pass(device: torch.device, elements: int) -> Callable[[], object]:
    """A call with the memory traffic of an update of ``elements`` of float32, but no arithmetic.

    It reads three arrays and writes two of them in place, with all cores.
    """
    param, grad, ms = (torch.ones(elements, device=device) for _ in range(3))
    if device.type == "cuda":
        from hogstream.profiling.triton_ceiling import update_shaped

        return lambda: update_shaped(param, grad, ms)
    arrays = param.numpy(), grad.numpy(), ms.numpy()
    kernel = _numpy_update_shaped if available_backends()["numba"] else _numba_update_shaped()
    return lambda: run_in_slices(kernel, arrays)


@cache
def _numba_update_shaped() -> Callable[..., None]:
    import numba

    @numba.njit(nogil=True, cache=True)
    def update_shaped(param: Any, grad: Any, ms: Any) -> None:
        for i in range(param.size):
            g = grad[i]
            ms[i] = ms[i] + g
            param[i] = param[i] + g

    return update_shaped


def _numpy_update_shaped(param: Any, grad: Any, ms: Any, block: int = 1 << 15) -> None:
    for start in range(0, param.size, block):
        part = slice(start, start + block)
        np.add(ms[part], grad[part], out=ms[part])
        np.add(param[part], grad[part], out=param[part])
