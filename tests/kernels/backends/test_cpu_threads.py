"""An update that is split over CPU threads: the same bits, every element once, and after a fork.

Compiled kernels run on torch's threads; ``test_torch_threads`` has what is theirs alone.
"""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hogstream.kernels.backends import cpu_threads
from hogstream.kernels.backends.cpu_threads import (
    MIN_BYTES_PER_THREAD,
    Pieces,
    call_on,
    run_in_pieces,
)
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands
from process_testing import may_fork_with_threads, run_to_end
from update_testing import (
    CPU_BACKENDS,
    DTYPES,
    THREADS,
    State,
    assert_same_bits,
    extreme,
    fresh_state,
    normal,
    update_,
)

pytestmark = pytest.mark.usefixtures("several_threads")


def splittable(dtype: torch.dtype, seed: int) -> tuple[State, torch.Tensor]:
    """The operands of an update that is worth ``THREADS`` threads."""
    size = THREADS * MIN_BYTES_PER_THREAD // dtype.itemsize + 1001
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
    state, grad = splittable(torch.float32, seed=0)
    expected = backend.update(state, grad)  # its threads are running by now
    state.map(torch.Tensor.share_memory_)
    child = multiprocessing.get_context("fork").Process(
        target=update_, args=(state, grad), kwargs={"backend": backend.name}
    )
    assert run_to_end(child) == 0
    assert_same_bits(state, expected)


class Refused(ArithmeticError):
    pass


def table_of(param: torch.Tensor) -> LaunchTable:
    return LaunchTable([Operands(param, param, param)])


@pytest.mark.parametrize("bad", [0, -1], ids=["first", "last"])
def test_an_error_in_any_piece_is_raised_when_no_thread_is_left_at_work(bad):
    array = torch.zeros(THREADS * MIN_BYTES_PER_THREAD // 4)
    array[bad] = 1
    at_work: set[int] = set()

    def refuse_ones(_: LaunchTable, pieces: Pieces) -> None:
        at_work.add(threading.get_ident())
        try:
            for start, stop in pieces:
                if array[start:stop].any():
                    raise Refused
        finally:
            at_work.remove(threading.get_ident())

    with pytest.raises(Refused):
        run_in_pieces(refuse_ones, table_of(array))
    assert not at_work


class Interrupted(BaseException):
    pass


def test_an_interrupt_is_raised_when_no_thread_is_left_at_work():
    """What they work on may be freed then."""
    main = threading.get_ident()
    started, interrupted = threading.Event(), threading.Event()
    left = []

    def interrupt(*_: object) -> None:
        interrupted.set()
        raise Interrupted

    def work() -> None:
        if threading.get_ident() == main:
            assert started.wait(timeout=60)
            return
        started.set()
        signal.pthread_kill(main, signal.SIGINT)
        assert interrupted.wait(timeout=60)
        left.append(threading.get_ident())

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(Interrupted):
            call_on(2, work)
        assert left
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt_at(place: int, interrupt: Callable[[], None]) -> Callable[..., Any]:
    """A profile function that calls ``interrupt``, which raises, at a place in ``call_on``.

    Python handles signals where a function begins and where a call has returned. Counted are such
    places in all of its module, and in the pool's ``submit``.
    """
    counted = itertools.count()

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if code.co_filename != cpu_threads.__file__ and code.co_name != "submit":
            return
        if event in ("call", "c_return") and next(counted) == place:
            interrupt()

    return profile


class Helpers:
    """What helpers do until the caller is interrupted, or for a while, and who has done it."""

    def __init__(self) -> None:
        self.caller = threading.get_ident()
        self.begun: list[int] = []
        self.left: list[int] = []
        self._interrupted = threading.Event()

    def work(self) -> None:
        if threading.get_ident() == self.caller:
            return
        self.begun.append(1)
        self._interrupted.wait(timeout=0.05)
        sum(range(20_000))  # for as long, one that is not waited for is at work
        self.left.append(1)

    def interrupt(self) -> None:
        self._interrupted.set()
        raise Interrupted


def test_wherever_an_interrupt_comes_no_thread_is_left_at_work():
    for place in itertools.count():
        helpers = Helpers()
        sys.setprofile(interrupt_at(place, helpers.interrupt))
        try:
            call_on(3, helpers.work)
            break
        except Interrupted:
            assert len(helpers.begun) == len(helpers.left), place
        finally:
            sys.setprofile(None)
    assert place > 5


class Exhausted(ThreadPoolExecutor):
    """Starts one thread; for another, there is no room."""

    def _adjust_thread_count(self) -> None:
        if self._threads:
            raise RuntimeError("can't start new thread")
        super()._adjust_thread_count()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_goes_on_with_the_threads_that_there_are(backend, monkeypatch):
    with Exhausted(THREADS) as pool:
        monkeypatch.setattr("hogstream.kernels.backends.cpu_threads._pool", pool)
        state, grad = splittable(torch.float32, seed=0)
        split = backend.update(state, grad)
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert_same_bits(split, backend.update(state, grad))


@given(
    elements=st.integers(0, 500),
    size=st.integers(0, 100),
    turns=st.lists(st.integers(0, 3), max_size=60),
)
def test_pieces_are_taken_once_and_cover_all(elements, size, turns):
    pieces = Pieces(elements, size)
    threads = [iter(pieces) for _ in range(4)]
    taken: list[int] = []
    for turn in [*turns, *range(4)]:  # each goes on where it was, in any order
        for start, stop in itertools.islice(threads[turn], 1):
            taken += range(start, stop)
    for thread in threads:
        for start, stop in thread:
            taken += range(start, stop)
    assert sorted(taken) == list(range(elements))


@pytest.mark.parametrize(
    ("bytes_", "threads"),
    [
        (2 * MIN_BYTES_PER_THREAD - 4, 1),
        (2 * MIN_BYTES_PER_THREAD, 2),
        (9 * MIN_BYTES_PER_THREAD, THREADS),
    ],
)
def test_small_updates_run_on_one_thread(bytes_, threads):
    everyone = threading.Barrier(threads)
    seen = []

    def meet(_: LaunchTable, pieces: Pieces) -> None:
        seen.append(threading.get_ident())
        everyone.wait(timeout=60)
        list(pieces)

    run_in_pieces(meet, table_of(torch.empty(bytes_ // 4)))
    assert len(set(seen)) == threads
