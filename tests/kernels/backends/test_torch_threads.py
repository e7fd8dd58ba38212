"""Compiled kernels on torch's own OpenMP threads: no others beside them, and left as they were."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hogstream.kernels.backends import openmp
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands
from process_testing import run_python
from update_testing import (
    DTYPES,
    THREADS,
    Backend,
    assert_same_bits,
    extreme,
    fresh_state,
    normal,
)

numba_pieces = pytest.importorskip("hogstream.kernels.backends.numba_pieces")
numba_compile = pytest.importorskip("hogstream.kernels.backends.numba_compile")
torch_threads = openmp.torch_threads()
pytestmark = [
    pytest.mark.skipif(torch_threads is None, reason="torch has no OpenMP threads here"),
    pytest.mark.usefixtures("several_threads"),
]

# Worth several of torch's threads, and not worth waking one of the pool.
SIZE = THREADS * numba_pieces.MIN_ELEMENTS_PER_TORCH_THREAD + 77


@pytest.fixture(autouse=True)
def _mode() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)


NUMBA, NUMPY = Backend("numba", "cpu"), Backend("numpy", "cpu")


def call_in_c(function: Callable[[int], object]) -> Any:
    """A kernel that calls a function of Python's, on whichever thread it runs, with the job."""
    called = ctypes.CFUNCTYPE(None, ctypes.c_int64)(function)
    address = ctypes.cast(called, ctypes.c_void_p).value
    return numba_pieces.Kernel(address, called, compiled=None)


def seen_by_all(
    look: Callable[[], object], elements: int = SIZE, threads: int = THREADS
) -> list[object]:
    """What each thread sees that an update of so many elements runs on; they must be so many."""
    everyone, seen = threading.Barrier(threads), []

    def meet(job: int) -> None:
        seen.append(look())
        everyone.wait(timeout=60)

    run_in_pieces(meet, elements)
    return seen


def run_in_pieces(function: Callable[[int], object], elements: int) -> None:
    """Calls a function on all threads that so many elements are worth, with the job."""
    param = torch.empty(elements)
    table = LaunchTable([Operands(param, param, param)])
    numba_pieces.run_in_pieces(call_in_c(function), table)


# Compiled code alone calls them.
_take_piece, _in_update = numba_pieces.take_piece, numba_pieces.in_update


@numba_compile.njit
def take_piece(job: int) -> Any:
    return _take_piece(job)


@numba_compile.njit
def in_update(job: int, share: int, start: int, stop: int, elements: int) -> Any:
    return _in_update(job, share, start, stop, elements)


def pieces_of(job: int, elements: int) -> Iterator[tuple[int, int]]:
    """Takes pieces of one update until there is none left, as where they begin and end in it."""
    while (piece := take_piece(job)) != (0, 0, 0):
        begin, end, _ = in_update(job, *piece, elements)
        if begin < end:
            yield begin, end


def thread_number() -> int:
    """Which of torch's threads calls this."""
    assert torch_threads is not None
    number: int = ctypes.CFUNCTYPE(ctypes.c_int)(torch_threads.number)()
    return number


def assert_cover(pieces: Iterable[tuple[int, int]], elements: int) -> None:
    """Each element is in one of the pieces."""
    end = 0
    for start, stop in sorted(pieces):
        assert start == end < stop
        end = stop
    assert end == elements


def flushes() -> bool:
    """Whether the calling thread makes zeros of denormals."""
    product: torch.Tensor = torch.tensor([1e-20]) * 1e-20
    return product.item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [SIZE, 7 * numba_pieces.PIECE_ELEMENTS + 1], ids=str)
def test_threads_change_no_bit(dtype, size):
    state, grad = fresh_state(normal(size, dtype, seed=0)), extreme(size, dtype, seed=1)
    split = NUMBA.update(state, grad)
    torch.set_num_threads(1)
    assert_same_bits(split, NUMBA.update(state, grad))
    assert_same_bits(split, NUMPY.update(state, grad))


@pytest.mark.parametrize(
    ("elements", "threads"),
    [
        (2 * numba_pieces.MIN_ELEMENTS_PER_TORCH_THREAD - 1, 1),
        (2 * numba_pieces.MIN_ELEMENTS_PER_TORCH_THREAD, THREADS),
        (SIZE, THREADS),
    ],
)
def test_small_updates_run_on_the_caller_alone_and_others_on_all(elements, threads):
    seen = seen_by_all(threading.get_ident, elements, threads)
    assert len(set(seen)) == threads
    assert threading.get_ident() in seen


@pytest.mark.parametrize(
    ("elements", "shares"),
    [
        (2 * numba_pieces.MIN_ELEMENTS_PER_TORCH_THREAD + 1, 2),
        (SIZE, THREADS),
        (7 * numba_pieces.PIECE_ELEMENTS + 1, THREADS),
    ],
)
def test_each_thread_takes_its_share_and_then_what_others_left(elements, shares):
    everyone = threading.Barrier(THREADS)
    first: dict[int, int | None] = {}
    pieces: list[tuple[int, int]] = []

    def work(job: int) -> None:
        taken = list(itertools.islice(pieces_of(job, elements), 1))
        first[thread_number()] = taken[0][0] if taken else None
        everyone.wait(timeout=60)
        pieces.extend([*taken, *pieces_of(job, elements)])

    run_in_pieces(work, elements)
    share = -(-elements // (16 * shares)) * 16
    assert first == {
        thread: thread * share if thread < shares else None for thread in range(THREADS)
    }
    assert_cover(pieces, elements)


@given(st.integers(0, 200), st.integers(1, 5), st.integers(-50, 0), st.integers(1, 100))
def test_pieces_cover_an_update_once_and_are_empty_beside_it(elements, shares, start, size):
    job = (ctypes.c_int64 * numba_pieces._TAKEN)()
    job[numba_pieces._SHARES] = shares
    seen: list[int] = []
    for share in range(shares):
        for first in range(start, 250, size):  # beyond the share's end
            piece = share, first, first + size
            begin, end, _ = in_update(ctypes.addressof(job), *piece, elements)
            assert begin <= end
            seen += range(begin, end)
    assert sorted(seen) == list(range(elements))


@pytest.mark.parametrize("at_work", range(THREADS))
def test_one_thread_does_what_the_others_are_late_for(at_work):
    elements = 7 * numba_pieces.PIECE_ELEMENTS + 1
    pieces: list[tuple[int, int]] = []

    def work(job: int) -> None:
        if thread_number() == at_work:
            pieces.extend(pieces_of(job, elements))

    run_in_pieces(work, elements)
    assert_cover(pieces, elements)


def test_all_work_in_the_mode_of_the_caller():
    for flush in (False, True, False):
        assert torch.set_flush_denormal(flush)
        assert seen_by_all(flushes) == [flush] * THREADS


def test_threads_of_torch_get_their_own_mode_back():
    assert seen_by_all(flushes) == [False] * THREADS  # torch's threads have started
    assert torch.set_flush_denormal(True)
    assert seen_by_all(flushes) == [True] * THREADS
    seen = []
    everyone = threading.Barrier(THREADS)

    def look(_: int) -> None:  # with no mode given
        seen.append(flushes())
        everyone.wait(timeout=60)

    assert torch_threads is not None
    torch_threads.parallel(call_in_c(look).address, 0, 0, 0)
    assert sorted(seen) == [False, False, True]  # the caller's own is as it was set


def test_callers_on_several_threads_have_teams_of_their_own():
    with ThreadPoolExecutor(2) as callers:
        for future in [callers.submit(seen_by_all, threading.get_ident) for _ in range(2)]:
            assert len(set(future.result())) == THREADS


STARTS = """
import os, sys, torch
from hogstream.kernels import rmsprop_

torch.set_num_threads(3)
param, grad, ms = (torch.ones(1 << 22) for _ in range(3))
rmsprop_(param[:8], grad[:8], ms[:8])  # compiles
torch.sin(param)
threads = len(os.listdir("/proc/self/task"))
rmsprop_(param, grad, ms)
print(len(os.listdir("/proc/self/task")) - threads)
"""


@pytest.mark.slow
def test_no_thread_is_started_beside_those_of_torch():
    assert run_python("-c", STARTS).split() == ["0"]
