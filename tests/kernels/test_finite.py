"""Whether a gradient is finite: every backend sees every infinity and NaN, and nothing else."""

from __future__ import annotations

import pytest
import torch

from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import check_operands
from update_testing import BACKENDS, COMPUTE, DTYPES, Backend, extreme, special


def all_finite(backend: Backend, *grads: torch.Tensor) -> bool:
    """What a backend finds, of a table of gradients unless it is Numba."""
    if backend.name == "numba":
        from hogstream.kernels.backends import numba_kernels

        finite = numba_kernels.finite_function(str(grads[0].dtype).removeprefix("torch."))
        return all(finite.ctypes(grad.data_ptr(), grad.numel()) for grad in grads)
    moved = [grad.to(backend.device) for grad in grads]
    others = [(torch.empty_like(g), torch.empty_like(g, dtype=COMPUTE[g.dtype])) for g in moved]
    table = LaunchTable(
        [check_operands(param, grad, ms) for grad, (param, ms) in zip(moved, others, strict=True)]
    )
    if backend.name == "numpy":
        from hogstream.kernels.backends import numpy_kernels

        return numpy_kernels.all_finite(table)
    from hogstream.kernels.backends import triton_launch

    verdict = torch.tensor([7], dtype=torch.int32, device=backend.device)
    triton_launch.check_finite_(table, verdict)
    assert verdict.item() in (0, 1)
    return verdict.item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_special_value_by_itself(backend, dtype):
    for value in special(dtype):
        grad = value.repeat(100)
        assert all_finite(backend, grad) == bool(value.isfinite()), value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_16_bit_value(backend, dtype):
    values = torch.arange(1 << 16).to(torch.uint16).view(dtype)
    finite = values[values.isfinite()]
    assert len(finite) < len(values)
    assert all_finite(backend, finite)
    for value in values[~values.isfinite()][::37]:
        assert not all_finite(backend, value.reshape(1))


# Around a cache line, the lines that Numba looks at together, and a block of NumPy.
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 127, 128, 129, 300_000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_wherever_it_is(backend, dtype, size):
    grad = extreme(size + 1, dtype, seed=0)[1:]  # not aligned
    assert all_finite(backend, grad)
    for index in {0, size // 2, size - 1} if size else ():
        for value in (torch.inf, -torch.inf, torch.nan):
            spoiled = grad.clone()
            spoiled[index] = value
            assert not all_finite(backend, spoiled)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_gradient_of_a_table(backend):
    grads = [torch.ones(size) for size in (3, 0, 5, 70_000)]
    assert all_finite(backend, *grads)
    for index in (0, 2, 3):
        spoiled = [grad.clone() for grad in grads]
        spoiled[index][-1] = torch.nan
        assert not all_finite(backend, *spoiled)
