"""What an update costs, in numbers that no clock blurs: calls, and launches."""

from __future__ import annotations

import pytest
import torch

from counting import counted_calls, hold
from hogstream.kernels import multi_tensor_rmsprop_, rmsprop_
from update_testing import BACKENDS, FULL, Backend

LAUNCH = {
    "numpy": "kernels.backends.numpy_kernels.update_in_pieces_",
    "numba": "kernels.backends.numba_kernels.update_in_pieces_",
    "triton": "kernels.backends.triton_launch.launch",
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tensors", [1, 30])
def test_a_list_is_one_launch(backend: Backend, tensors: int) -> None:
    params, grads, mss, grad_avgs, buffers = (
        [torch.ones(5, device=backend.device) for _ in range(tensors)] for _ in range(5)
    )
    with counted_calls() as counts:
        multi_tensor_rmsprop_(
            *(params, grads, mss),
            grad_avgs=grad_avgs,
            momentum_buffers=buffers,
            backend=backend.name,
            **FULL,
        )
    assert counts[LAUNCH[backend.name]] == 1
    if backend.name == "triton" and backend.device == "cpu":
        # The interpreter calls the kernel for each program: one for each of these small tensors.
        kernels = (
            "kernels.backends.triton_kernels.rmsprop_kernel",
            "kernels.backends.triton_kernels.multi_tensor_rmsprop_kernel",
        )
        assert sum(counts[each] for each in kernels) == tensors


# Python calls of ours for each tensor of a list: its operands named and checked (5), made tensors
# (3), two found not to be negated (2) and two compared (4), each found dense (6) and laid flat (3),
# and each held against all others (3); then the table is found that it goes into.
CALLS_FOR_EACH_TENSOR = 27
# And for one by itself: the same, what it is made with and whether float32 holds that, its backend,
# its table, and the update, with the threads that it is worth (2).
CALLS = 57


def test_checks_take_few_calls() -> None:
    pytest.importorskip("numba")
    param, grad, ms = (torch.ones(5) for _ in range(3))
    rmsprop_(param, grad, ms, backend="numba")  # compiles
    with counted_calls() as counts:
        rmsprop_(param, grad, ms, backend="numba")
    hold(f"{counts}\ncalls for one tensor", counts.total(), CALLS)
    totals = []
    for tensors in (10, 50):
        lists = [[torch.ones(5) for _ in range(tensors)] for _ in range(3)]
        with counted_calls() as counts:
            multi_tensor_rmsprop_(*lists, backend="numba")
        totals.append(counts.total())
    few, many = totals
    hold("calls for each tensor of a list", (many - few) / 40, CALLS_FOR_EACH_TENSOR)
