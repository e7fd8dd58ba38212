"""What a machine can do, as ceilings on what its updates do.

``measure_ceilings`` is quick and of the same run: the bandwidth beyond the caches of a copy, and of
an update without its arithmetic. ``machine_ceilings`` is measured once a machine: the same for each
level of its memory, and how often a second it can launch and its event loop can turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from functools import partial
from typing import Any

import numpy as np
import torch

from hogstream.kernels.backends.cpu_threads import Pieces, run_in_pieces
from hogstream.kernels.backends.select import available_backends
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import COMPUTE_DTYPES, Operands
from hogstream.profiling.ceilings.cache import remember
from hogstream.profiling.ceilings.host import launch_rate, turn_rate
from hogstream.profiling.ceilings.memory import bandwidths, memory_levels
from hogstream.profiling.results.confidence import Interval
from hogstream.profiling.turns import (
    COPY,
    LAUNCHES,
    TURNS,
    UPDATE_SHAPED,
    Rate,
    describe,
    sample_in_turn,
)

ELEMENTS = 1 << 24
REPEATS = 9
_NUMPY_BLOCK = 1 << 15
_EXCEEDED = 1.1  # by more than what drift from one minute to the next explains


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


def machine_ceilings(device: torch.device, *, fresh: bool = False) -> dict[str, Any]:
    """The ceilings of a machine: measured at first, in ten seconds or so, and then remembered.

    Everything is sampled nine times in turn, for 20 ms or more each.

    Args:
        device: A CPU or CUDA device of it.
        fresh: Measure anew, and remember that.

    Returns:
        What goes into JSON output: ``measured``, the time in UTC; ``levels`` of memory, smallest
        first, each with its name as ``level``, ``bytes`` of its working set over all ``threads``
        (null on a GPU), ``cache_bytes`` that one of its caches holds (null for memory), and in 1e9
        bytes/s, with all cores, ``copy_gigabytes_per_second`` and
        ``update_shaped_gigabytes_per_second`` (null for small caches where there is no Numba);
        ``launches_per_second`` and ``event_loop_turns_per_second``. Each rate has a ``median``, its
        95 % ``interval`` and the ``samples``.
    """
    return remember(device, partial(_measure_machine, device), fresh=fresh)


def shares(result: dict[str, Any], ceilings: dict[str, Any], *, depth: int) -> dict[str, Any]:
    """What a result of the benchmark is, as shares of the ceilings of its machine.

    Args:
        result: One of ``results`` in JSON output.
        ceilings: From ``machine_ceilings``.
        depth: How many updates of a worker could be in flight: no more are served by a turn of the
            event loop.

    Returns:
        ``level``: the smallest whose cache holds the parameters and ``ms``. ``bandwidth``: of its
        update-shaped one. ``launch_rate``: one launch an update, but on a GPU one a batch, which is
        a graph; and each process launches. ``event_loop_rate``: a turn for ``depth`` updates, of
        each process. What is not known is null.
    """
    dtype: torch.dtype = getattr(torch, result["dtype"])
    size = result["elements"] * (dtype.itemsize + COMPUTE_DTYPES[dtype].itemsize)
    levels: list[dict[str, Any]] = ceilings.get("levels", [])
    level = next((each for each in levels if (each["cache_bytes"] or size) >= size), {})
    speed, processes = result["updates_per_second"], result.get("processes", 1)
    batch = 1 if result["device"] == "cpu" else result.get("batch", 1)

    def share(of: float, ceiling: dict[str, Any] | None, each: int = 1) -> float | None:
        return None if ceiling is None else of / (each * ceiling["median"])

    return {
        "level": level.get("level"),
        "bandwidth": share(result["gigabytes_per_second"], level.get(UPDATE_SHAPED)),
        "launch_rate": share(speed, ceilings.get(LAUNCHES), processes * batch),
        "event_loop_rate": share(speed, ceilings.get(TURNS), processes * depth),
    }


def ceiling_warnings(ceilings: dict[str, Any], results: Iterable[dict[str, Any]] = ()) -> list[str]:
    """Why a machine's ceilings may be none: they spread too widely, or results exceed them.

    Args:
        ceilings: From ``machine_ceilings``.
        results: With their ``share_of_ceilings``.
    """
    named = {"launches": ceilings[LAUNCHES], "turns of the event loop": ceilings[TURNS]}
    for level in ceilings["levels"]:
        named[f"{level['level']} copy"] = level[COPY]
        named[f"{level['level']} update-shaped"] = level[UPDATE_SHAPED]
    wide = [
        name
        for name, rate in named.items()
        if rate is not None
        and not (rate["interval"] and not Interval(rate["median"], *rate["interval"]).wide)
    ]
    shares = [
        share
        for each in results
        for share in each["share_of_ceilings"].values()
        if isinstance(share, float)
    ]
    said = []
    if wide:
        said.append(f"spread too widely to conclude from: {', '.join(wide)}")
    if shares and max(shares) > _EXCEEDED:
        said.append(f"are exceeded by some results, to {100 * max(shares):.0f} %")
    if not said:
        return []
    return [
        f"Ceilings of this machine {'; and they '.join(said)}. They were measured at "
        f"{ceilings['measured']}; if it was busy then, measure anew: hogstream ceilings --fresh."
    ]


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
    names = list(calls)
    for index in range(repeats):
        first = index % len(names)  # each goes first in its turn
        for name in names[first:] + names[:first]:
            synchronize()
            start = time.perf_counter()
            calls[name]()
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
        from hogstream.profiling.ceilings.triton_passes import update_shaped

        return lambda: update_shaped(param, grad, ms)
    table = LaunchTable([operands])
    if available_backends()["numba"] is None:
        from hogstream.profiling.ceilings import numba_passes

        def pass_over() -> Operands:
            run_in_pieces(numba_passes.update_shaped, table)
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


def _measure_machine(device: torch.device) -> dict[str, Any]:
    levels = memory_levels(device)
    with bandwidths(levels, device) as of_memory:
        rates: dict[Any, Rate | None] = {
            LAUNCHES: launch_rate(device),
            TURNS: turn_rate(),
            **of_memory,
        }
        known = {key: rate for key, rate in rates.items() if rate is not None}
        samples = sample_in_turn(known, REPEATS)
    described = {key: describe(samples[key]) if key in samples else None for key in rates}
    return {
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "levels": [
            {
                "level": level.name,
                "bytes": level.bytes,
                "threads": level.threads,
                "cache_bytes": level.cache_bytes,
                COPY: described[level, COPY],
                UPDATE_SHAPED: described[level, UPDATE_SHAPED],
            }
            for level in levels
        ],
        LAUNCHES: described[LAUNCHES],
        TURNS: described[TURNS],
    }
