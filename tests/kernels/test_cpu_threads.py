"""An update that is split over CPU threads: the same bits, every element once, and after a fork."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hogstream.kernels import rmsprop_
from hogstream.kernels.cpu_threads import MIN_SLICE_BYTES, run_in_slices, slice_bounds
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands
from process_testing import may_fork_with_threads, run_to_end
from update_testing import (
    CPU_BACKENDS,
    DTYPES,
    State,
    assert_same_bits,
    extreme,
    fresh_state,
    normal,
)

THREADS = 3
CACHE_LINE = 64


@pytest.fixture(autouse=True)
def _several_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)


def splittable(dtype: torch.dtype, seed: int) -> tuple[State, torch.Tensor]:
    """The operands of an update that is worth ``THREADS`` slices, of unequal lengths."""
    size = THREADS * MIN_SLICE_BYTES // dtype.itemsize + 1001
    return fresh_state(normal(size, dtype, seed)), extreme(size, dtype, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_threads_change_no_bit(backend, dtype):
    state, grad = splittable(dtype, seed=0)
    split = backend.update(state, grad)
    torch.set_num_threads(1)
    assert_same_bits(split, backend.update(state, grad))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_many_threads_may_update_at_once(backend):
    operands = [splittable(torch.float32, seed) for seed in range(4)]
    with ThreadPoolExecutor(len(operands)) as callers:
        together = list(callers.map(lambda both: backend.update(*both), operands))
    for state, (before, grad) in zip(together, operands, strict=True):
        assert_same_bits(state, backend.update(before, grad))


@may_fork_with_threads
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_forked_child_may_update(backend):
    (param, ms), grad = splittable(torch.float32, seed=0)
    expected = backend.update(State(param, ms), grad)  # its threads are running by now
    for tensor in (param, ms):
        tensor.share_memory_()
    run_to_end(
        multiprocessing.get_context("fork").Process(
            target=rmsprop_, args=(param, grad, ms), kwargs={"backend": backend.name}
        )
    )
    assert_same_bits(State(param, ms), expected)


def table_of(*params: torch.Tensor) -> LaunchTable:
    return LaunchTable([Operands(param, param, param) for param in params])


def test_an_error_in_any_slice_is_raised():
    array = torch.zeros(THREADS * MIN_SLICE_BYTES // 4)
    array[-1] = 1

    def refuse_ones(_: LaunchTable, start: int, stop: int) -> None:
        part = array[start:stop]
        if part.any():
            raise ArithmeticError("a one")
        part += 2

    with pytest.raises(ArithmeticError, match="a one"):
        run_in_slices(refuse_ones, table_of(array))
    # The other slices have ended by the time that it is raised.
    last, _ = slice_bounds(table_of(array), THREADS)[-1]
    assert torch.all(array[:last] == 2)


@given(
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
    slices=st.lists(st.integers(0, 5), min_size=1, max_size=4),  # of each tensor
    more=st.integers(0, 10_000),
    offset=st.integers(0, 100),
    threads=st.sampled_from([1, 2, 3, 4, 7, 16]),
)
def test_slices_cover_every_element_once(dtype, slices, more, offset, threads):
    sizes = [count * MIN_SLICE_BYTES // dtype.itemsize + more for count in slices]
    params = [torch.empty(offset + size, dtype=dtype)[offset:] for size in sizes]
    bounds = slice_bounds(table_of(*params), threads)

    starts, stops = zip(*bounds, strict=True)
    assert (starts[0], *stops) == (*starts, sum(sizes))
    assert 1 <= len(bounds) <= threads

    lengths = [stop - start for start, stop in bounds]
    assert max(lengths) - min(lengths) <= 2 * CACHE_LINE // dtype.itemsize
    assert len(bounds) == 1 or min(lengths) * dtype.itemsize >= MIN_SLICE_BYTES - CACHE_LINE

    # A cut is between two tensors, or on a cache line of the one that it is in.
    ends = list(accumulate(sizes))
    for start in starts[1:]:
        inside = next(i for i, end in enumerate(ends) if start < end)
        position = start - (ends[inside] - sizes[inside])
        assert position == 0 or params[inside][position:].data_ptr() % CACHE_LINE == 0
