"""The levels of a device's memory, and the bandwidth of each.

A level is measured over a working set of half of its caches: well inside them. It must be beyond
those of the level below, or the level is left out. Memory is measured over four times the last
caches, or more. On a CPU all cores work at once, each on a slice of its own, and pass over it again
and again in compiled code, with prefetches and without, of which the faster counts; on a GPU the
programs of one launch do. A GPU's registers and L1 are left out: they hold nothing from one launch
to the next.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from threading import Barrier
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from hogstream.kernels.backends.select import available_backends
from hogstream.profiling.environment import caches, usable_core_numbers
from hogstream.profiling.results.records import COPY, UPDATE_SHAPED
from hogstream.profiling.turns import Rate

# How many arrays share out the working set, and how many bytes an element are read and written.
_ARRAYS = {COPY: 2, UPDATE_SHAPED: 3}
_BYTES_PER_ELEMENT = {COPY: 8, UPDATE_SHAPED: 20}

_MEMORY_BYTES = {"cpu": 192 << 20, "cuda": 768 << 20}  # at least
_LINE_BYTES = 64
# How many programs of a kernel, of 128 threads and 64 registers each, fit a multiprocessor.
_RESIDENT_PROGRAMS = 8
# Where there is no Numba: what a call of NumPy works on, and below which slices its cost tells.
_NUMPY_BLOCK = 1 << 15
_NUMPY_LEAST_BYTES = 1 << 20

Floats = npt.NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True)
class MemoryLevel:
    """A level of memory.

    Attributes:
        name: ``L1``, ``L2`` and so on, or ``memory``.
        bytes: The working set that it is measured over, of all threads.
        threads: How many there are; None on a GPU.
        cache_bytes: What one of its caches holds; None for memory.
    """

    name: str
    bytes: int
    threads: int | None
    cache_bytes: int | None


def memory_levels(device: torch.device) -> list[MemoryLevel]:
    """The levels that a device tells of and that can be told apart, smallest first."""
    threads = len(usable_core_numbers()) if device.type == "cpu" else None
    levels, below = [], 0
    for cache in caches(device):
        total = cache.bytes * cache.count
        if total // 2 >= below:
            size = _rounded(total // 2, device)
            levels.append(MemoryLevel(cache.level, size, threads, cache.bytes))
        below = total
    size = _rounded(max(_MEMORY_BYTES[device.type], 4 * below), device)
    return [*levels, MemoryLevel("memory", size, threads, None)]


@contextmanager
def bandwidths(
    levels: list[MemoryLevel], device: torch.device
) -> Iterator[dict[tuple[MemoryLevel, str], Rate]]:
    """What measures each level in this context, by level and ``COPY`` or ``UPDATE_SHAPED``.

    What cannot be measured is left out: small caches, with no Numba.
    """
    if device.type == "cuda":
        passes = {
            level: partial(_pass_on_gpu, level, torch.ones(level.bytes // 4, device=device))
            for level in levels
        }
        yield _rates(passes)
        return
    with ThreadPoolExecutor(len(usable_core_numbers())) as pool:
        team = _Team(pool)
        yield _rates({level: partial(_pass_on_cpu, team, team.slices(level)) for level in levels})


def _rates(
    passes: Mapping[MemoryLevel, Callable[[str, int], float]],
) -> dict[tuple[MemoryLevel, str], Rate]:
    """By level and kind, from the seconds of passes of a kind over a level."""
    numba = available_backends()["numba"] is None
    return {
        (level, kind): Rate(
            partial(seconds_of, kind),
            1e-9 * _BYTES_PER_ELEMENT[kind] * level.bytes / (4 * _ARRAYS[kind]),
        )
        for level, seconds_of in passes.items()
        if numba or level.threads is None or level.bytes // level.threads >= _NUMPY_LEAST_BYTES
        for kind in _ARRAYS
    }


def _rounded(size: int, device: torch.device) -> int:
    """At most so many bytes: whole cache lines or blocks, as many for all who share them out."""
    arrays = 6  # a multiple of two and three
    if device.type == "cpu":
        unit = arrays * _LINE_BYTES * len(usable_core_numbers())
        return size - size % unit
    from hogstream.profiling.ceilings.triton_passes import BLOCK

    unit = arrays * 4 * BLOCK
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    full = unit // 2 * processors * _RESIDENT_PROGRAMS
    unit = full if size >= full else unit
    return size - size % unit


def _pass_on_gpu(level: MemoryLevel, buffer: torch.Tensor, kind: str, passes: int) -> float:
    """Seconds of passes over a buffer: in one launch if a cache holds it, else a launch each."""
    from hogstream.profiling.ceilings import triton_passes

    call: Callable[..., None] = triton_passes.copy if kind == COPY else triton_passes.update_shaped
    arrays = buffer.chunk(_ARRAYS[kind])
    torch.cuda.synchronize(buffer.device)
    start = time.perf_counter()
    if level.cache_bytes is None:
        for _ in range(passes):
            call(*arrays)
    else:
        call(*arrays, passes=passes)
    torch.cuda.synchronize(buffer.device)
    return time.perf_counter() - start


def _pass_on_cpu(team: _Team, slices: list[Floats], kind: str, passes: int) -> float:
    """Seconds in which all threads pass over their slices, which are in cache before."""
    return min(_seconds_of(team, slices, call, passes) for call in _ways(kind))


def _seconds_of(
    team: _Team, slices: list[Floats], call: Callable[[Floats, int], None], passes: int
) -> float:
    team.do(lambda index: call(slices[index], 1))
    spans = team.do(partial(_time_passes, call, slices, passes))
    return max(end for _, end in spans) - min(start for start, _ in spans)


def _time_passes(
    call: Callable[[Floats, int], None], slices: list[Floats], passes: int, index: int
) -> tuple[float, float]:
    start = time.perf_counter()
    call(slices[index], passes)
    return start, time.perf_counter()


class _Team:
    """A thread on each core that this process may use."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._cores = usable_core_numbers()
        self._barrier = Barrier(len(self._cores))

    def do(self, work: Callable[[int], T]) -> list[T]:
        """Calls a function with the number of each thread, on all of them at once."""

        def on_core(index: int) -> T:
            if hasattr(os, "sched_setaffinity"):
                with suppress(OSError):  # not permitted: then the system places it
                    os.sched_setaffinity(0, {self._cores[index]})  # of the calling thread
            self._barrier.wait()  # so none of them does two
            return work(index)

        try:
            return list(self._pool.map(on_core, range(len(self._cores))))
        except BaseException:  # such as that a thread could not be started, for which others wait
            self._barrier.abort()
            raise

    def slices(self, level: MemoryLevel) -> list[Floats]:
        """A slice of a working set for each thread, in memory that is near its core."""
        elements = level.bytes // 4 // len(self._cores)
        slices: list[Floats] = [
            torch.empty(elements, dtype=torch.float32, device="cpu").numpy() for _ in self._cores
        ]
        self.do(lambda index: slices[index].fill(1.0))
        return slices


def _ways(kind: str) -> list[Callable[[Floats, int], None]]:
    """Ways to pass over a slice so many times, of which the fastest counts."""
    if available_backends()["numba"] is not None:
        return [_copy_passes if kind == COPY else _update_shaped_passes]
    from hogstream.profiling.ceilings import numba_passes

    if kind == COPY:
        return [numba_passes.copy_passes]
    return [partial(numba_passes.update_shaped_passes, ahead=ahead) for ahead in (False, True)]


def _copy_passes(buffer: Floats, passes: int) -> None:
    """As that of ``numba_passes``."""
    target, source = buffer.reshape(2, -1)
    for _ in range(passes):
        np.copyto(target, source)


def _update_shaped_passes(buffer: Floats, passes: int) -> None:
    """As that of ``numba_passes``, a block at a time, which stays in cache between its calls."""
    param, grad, ms = buffer.reshape(3, -1)
    for _ in range(passes):
        for low in range(0, len(param), _NUMPY_BLOCK):
            part = slice(low, low + _NUMPY_BLOCK)
            np.add(ms[part], grad[part], out=ms[part])
            np.add(param[part], grad[part], out=param[part])
