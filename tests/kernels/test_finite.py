"""Whether a gradient is finite: every backend sees every infinity and NaN, and nothing else."""

from __future__ import annotations

import pytest
import torch

from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import check_operands
from update_testing import COMPUTE, CPU_BACKENDS, DTYPES, extreme, special


def all_finite(backend: str, grad: torch.Tensor) -> bool:
    if backend == "numba":
        from hogstream.kernels import numba_backend

        finite = numba_backend.all_finite(str(grad.dtype).removeprefix("torch."))
        return finite(grad.data_ptr(), grad.numel())
    from hogstream.kernels import numpy_backend

    param, ms = torch.empty_like(grad), torch.empty_like(grad, dtype=COMPUTE[grad.dtype])
    return numpy_backend.all_finite(LaunchTable([check_operands(param, grad, ms)]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_each_special_value_by_itself(backend, dtype):
    for value in special(dtype):
        grad = value.repeat(100)
        assert all_finite(backend.name, grad) == bool(value.isfinite()), value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_every_16_bit_value(backend, dtype):
    values = torch.arange(1 << 16).to(torch.uint16).view(dtype)
    finite = values[values.isfinite()]
    assert len(finite) < len(values)
    assert all_finite(backend.name, finite)
    for value in values[~values.isfinite()]:
        assert not all_finite(backend.name, value.reshape(1))


# Around a cache line, the lines that Numba looks at together, and a block of NumPy.
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 127, 128, 129, 300_000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_wherever_it_is(backend, dtype, size):
    grad = extreme(size + 1, dtype, seed=0)[1:]  # not aligned
    assert all_finite(backend.name, grad)
    for index in {0, size // 2, size - 1} if size else ():
        for value in (torch.inf, -torch.inf, torch.nan):
            spoiled = grad.clone()
            spoiled[index] = value
            assert not all_finite(backend.name, spoiled)


def test_numpy_looks_at_every_gradient_of_a_table():
    from hogstream.kernels import numpy_backend

    grads = [torch.ones(size) for size in (3, 0, 5)]
    operands = [check_operands(torch.ones_like(g), g, torch.ones_like(g)) for g in grads]
    table = LaunchTable(operands)
    assert numpy_backend.all_finite(table)
    grads[2][4] = torch.nan
    assert not numpy_backend.all_finite(table)
