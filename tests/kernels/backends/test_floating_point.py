"""Each thread has a floating-point mode of its own: who works for another takes the other's."""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from hogstream.kernels import rmsprop_
from hogstream.kernels.backends.cpu_threads import MIN_BYTES_PER_THREAD, Pieces, run_in_pieces
from hogstream.kernels.backends.floating_point import FloatingPointMode
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands
from update_testing import THREADS

pytestmark = pytest.mark.usefixtures("several_threads")
#: FE_UPWARD of ``fenv.h``.
UPWARD = {"x86_64": 0x800, "aarch64": 0x400000}.get(platform.machine())


@pytest.fixture(autouse=True)
def _mode() -> Iterator[None]:
    mode = FloatingPointMode()
    yield
    mode.set()


def flushes() -> bool:
    """Whether the calling thread makes zeros of denormals."""
    return float(np.float32(1e-20) * np.float32(1e-20)) == 0.0


def rounds_up() -> bool:
    return float(np.float32(1) + np.float32(1e-9)) > 1.0


def modes_of_threads() -> list[tuple[bool, bool]]:
    """Those of all threads that share an update, the caller among them."""
    param = torch.zeros(THREADS * MIN_BYTES_PER_THREAD // 4)
    everyone = threading.Barrier(THREADS)
    seen = []

    def look(_: LaunchTable, pieces: Pieces) -> None:
        seen.append((flushes(), rounds_up()))
        everyone.wait(timeout=60)
        list(pieces)

    run_in_pieces(look, LaunchTable([Operands(param, param, param)]))
    return seen


def test_helpers_take_the_mode_of_each_caller() -> None:
    """Whoever started them, and whomever they helped before."""
    for flush in (False, True, False, True):
        assert torch.set_flush_denormal(flush)
        assert modes_of_threads() == [(flush, False)] * THREADS
    with ThreadPoolExecutor(1) as another:  # with a mode of its own
        another.submit(torch.set_flush_denormal, False).result()
        assert another.submit(modes_of_threads).result() == [(False, False)] * THREADS
    assert modes_of_threads() == [(True, False)] * THREADS


@pytest.mark.skipif(UPWARD is None, reason="FE_UPWARD is not known here")
def test_helpers_round_as_the_caller_does() -> None:
    assert ctypes.PyDLL(None).fesetround(UPWARD) == 0
    assert modes_of_threads() == [(False, True)] * THREADS
    assert ctypes.PyDLL(None).fesetround(0) == 0
    assert modes_of_threads() == [(False, False)] * THREADS


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("elements", [1, 1000, 3 * MIN_BYTES_PER_THREAD // 4 + 77])
def test_denormals_become_zeros_in_all_of_an_update_or_in_none(backend: str, elements: int) -> None:
    grad = torch.zeros(elements)
    for flush in (False, True, False, True):
        assert torch.set_flush_denormal(flush)
        param, ms = torch.empty(elements), torch.zeros(elements)
        param.view(torch.int32).fill_(1000)  # times 2**-149
        rmsprop_(
            param, grad, ms, weight_decay=0.5, decoupled_weight_decay=True, lr=1.0, backend=backend
        )
        bits = param.view(torch.int32)
        assert bits.eq(0 if flush else 500).all()
