"""An update that is split over CPU threads: the same bits, every element once, and after a fork."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hogstream.kernels import rmsprop_
from hogstream.kernels.cpu_threads import MIN_SLICE_BYTES, run_in_slices, slice_bounds
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


def test_an_error_in_any_slice_is_raised():
    array = np.zeros(THREADS * MIN_SLICE_BYTES, np.uint8)
    array[-1] = 1

    def refuse_ones(part: Any) -> None:
        if part.any():
            raise ArithmeticError("a one")
        part += 2

    with pytest.raises(ArithmeticError, match="a one"):
        run_in_slices(refuse_ones, (array,))
    # The other slices have ended by the time that it is raised.
    last, _ = slice_bounds(array, THREADS)[-1]
    assert np.all(array[:last] == 2)


@given(
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    slices=st.integers(0, 9),  # in bytes, hypothesis would rarely draw enough for two
    more=st.integers(0, 10_000),
    offset=st.integers(0, 100),
    threads=st.sampled_from([1, 2, 3, 4, 7, 16]),
)
def test_slices_cover_every_element_once(dtype, slices, more, offset, threads):
    size = slices * MIN_SLICE_BYTES // np.dtype(dtype).itemsize + more
    array = np.empty(offset + size, dtype)[offset:]
    bounds = slice_bounds(array, threads)

    starts, stops = zip(*bounds, strict=True)
    assert (starts[0], *stops) == (*starts, size)
    assert 1 <= len(bounds) <= threads

    lengths = [stop - start for start, stop in bounds]
    assert max(lengths) - min(lengths) <= 2 * CACHE_LINE // array.itemsize
    assert len(bounds) == 1 or min(lengths) * array.itemsize >= MIN_SLICE_BYTES - CACHE_LINE
    assert all(array[start:].ctypes.data % CACHE_LINE == 0 for start in starts[1:])
