"""Every backend gives the bits of the plain NumPy formula, and so of every other backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hogstream.kernels import rmsprop_
from hogstream.kernels.backends.numpy_kernels import BLOCK_BYTES
from hogstream.kernels.reference import plain_expression_
from update_testing import (
    BACKENDS,
    COMPUTE,
    DTYPES,
    VARIANTS,
    State,
    assert_same_bits,
    bits,
    extreme,
    formula,
    fresh_state,
    normal,
    special,
)

# Either side of the blocks of NumPy (by compute type), compiled and interpreted Triton.
BLOCKS = [1 << 10, 1 << 16, BLOCK_BYTES // 8, BLOCK_BYTES // 4]
SIZES = sorted({0, 1, 7, *(block + more for block in BLOCKS for more in (-1, 0, 1))})

SIXTEEN_BITS = [pytest.param(torch.float16, id="float16"), pytest.param(torch.bfloat16, id="bf16")]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_variants_over_several_steps(backend, dtype, options):
    actual = expected = fresh_state(normal(5001, dtype, seed=0))
    for step in range(3):
        grad = extreme(5001, dtype, seed=1 + step)
        actual = backend.update(actual, grad, **options)
        expected = formula(expected, grad, **options)
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values_in_every_operand(backend, dtype, options):
    values, of_ms = special(dtype).double(), special(COMPUTE[dtype]).double()
    param, grad, ms = torch.cartesian_prod(values, values, of_ms).T.contiguous()
    state, grad = State(param.to(dtype), ms.to(COMPUTE[dtype])), grad.to(dtype)
    assert_same_bits(backend.update(state, grad, **options), formula(state, grad, **options))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_around_the_blocks(backend, dtype, size):
    state, grad = fresh_state(normal(size, dtype, seed=size)), extreme(size, dtype, seed=1)
    assert_same_bits(backend.update(state, grad), formula(state, grad))


# Factors that are the last that float32 holds, or that a kernel might take for absent.
LIMITS: list[dict[str, Any]] = [
    {"lr": 0.0},
    {"lr": 0.1, "alpha": 0.0},
    {"alpha": 1 - 2**-24},
    {"eps": 0.0},
    {"eps": 1e-45},
    {"lr": 3.4e38},
    {"weight_decay": 1e-45},
    {"lr": 1 / 3, "weight_decay": 1e-9, "decoupled_weight_decay": True},
    {"lr": 2.0, "weight_decay": 0.5, "decoupled_weight_decay": True},
]
# And some that only float64 holds.
LIMITS_OF_FLOAT64 = [{"alpha": 1 - 1e-12}, {"eps": 1e-50}, {"lr": 1e300}, {"weight_decay": 1e-60}]


@pytest.mark.parametrize("options", LIMITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_at_their_limits(backend, dtype, options):
    state, grad = fresh_state(normal(1001, dtype, seed=0)), normal(1001, dtype, seed=1)
    assert_same_bits(backend.update(state, grad, **options), formula(state, grad, **options))


@pytest.mark.parametrize("options", LIMITS_OF_FLOAT64, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_that_only_float64_holds(backend, options):
    state = fresh_state(normal(1001, torch.float64, seed=0))
    grad = normal(1001, torch.float64, seed=1)
    assert_same_bits(backend.update(state, grad, **options), formula(state, grad, **options))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_expression_that_users_write(backend, dtype):
    rng = np.random.default_rng(0)
    param, ms = rng.standard_normal(100_001).astype(dtype), np.zeros(100_001, dtype)
    actual = State(torch.tensor(param), torch.tensor(ms))
    for step in range(5):
        grad = extreme(param.size, actual.param.dtype, seed=step)
        plain_expression_(param, grad.numpy(), ms)
        actual = backend.update(actual, grad)
    assert_same_bits(actual, State(torch.from_numpy(param), torch.from_numpy(ms)))


def every_value(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(1 << 16).to(torch.uint16).view(dtype)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_16_bit_parameter_survives_a_step_of_zero(backend, dtype):
    param = every_value(dtype)
    updated, _ = backend.update(fresh_state(param), torch.ones_like(param), lr=0.0)
    assert torch.equal(bits(updated), bits(param))


@pytest.mark.parametrize("exponent", range(-12, 8, 3))
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_16_bit_parameter_is_rounded_as_torch_rounds(backend, dtype, exponent):
    # With alpha = eps = 0 and a gradient of 1 the step is lr to the bit. A power of two is half a
    # unit in the last place of the parameters of one binade: a tie, that goes to the even one.
    param = every_value(dtype)
    state, lr = fresh_state(param), 2.0**exponent
    updated, _ = backend.update(state, torch.ones_like(param), lr=lr, alpha=0.0, eps=0.0)
    assert torch.equal(bits(updated), bits((param.float() - lr).to(dtype)))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_16_bit_gradient_is_read_as_torch_reads_it(backend, dtype):
    grad = every_value(dtype)
    state = fresh_state(torch.ones_like(grad))
    _, ms = backend.update(state, grad, alpha=0.0)
    assert torch.equal(bits(ms), bits(grad.float().square()))


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scalar": lambda flat: flat[:1].reshape(()),
    "one_element": lambda flat: flat[:1].reshape(1, 1, 1),
    "matrix": lambda flat: flat.reshape(24, 35),
    "offset_1": lambda flat: flat[1:],
    "offset_3": lambda flat: flat[3:-2],
    "middle_rows": lambda flat: flat.reshape(24, 35)[3:9],
    "transposed": lambda flat: flat.reshape(24, 35).T,
    "permuted": lambda flat: flat.reshape(2, 3, 4, 5, 7).permute(4, 0, 3, 1, 2),
    "channels_last": lambda flat: flat.reshape(4, 5, 6, 7).permute(0, 3, 1, 2),
    "size_one_axes": lambda flat: flat.reshape(24, 1, 35, 1).permute(3, 2, 1, 0),
    "empty": lambda flat: flat[:0].reshape(0, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_views(backend, dtype, layout):
    param, grad = normal(840, dtype, seed=0), normal(840, dtype, seed=1)
    ms = normal(840, COMPUTE[dtype], seed=2).square()
    updated = formula(State(param, ms), grad)

    flat = [tensor.to(backend.device, copy=True) for tensor in (param, grad, ms)]
    rmsprop_(*map(layout, flat), backend=backend.name)

    # Seen through the same view, the formula's flat result; outside it, the old values.
    layout(param).copy_(layout(updated.param))
    layout(ms).copy_(layout(updated.ms))
    assert_same_bits(State(flat[0].cpu(), flat[2].cpu()), State(param, ms))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_give_the_bits_of_tensors(backend, dtype):
    if backend.device != "cpu":
        pytest.skip("NumPy arrays are on the CPU")
    rng = np.random.default_rng(0)
    param, grad = (rng.standard_normal((30, 41)).astype(dtype, order="F") for _ in range(2))
    state = fresh_state(torch.tensor(param))
    ms = np.zeros_like(param, dtype=np.float64 if dtype is np.float64 else np.float32)
    expected = formula(state, torch.tensor(grad))
    rmsprop_(param, grad, ms, backend=backend.name)
    assert_same_bits(State(torch.tensor(param), torch.tensor(ms)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_that_start_inside_an_element(backend):
    if backend.device != "cpu":
        pytest.skip("NumPy arrays are on the CPU")
    state, grad = (
        fresh_state(normal(999, torch.float32, seed=0)),
        normal(999, torch.float32, seed=1),
    )
    expected = formula(state, grad)
    arrays = []
    for tensor in (state.param, grad, state.ms):
        array = np.frombuffer(bytearray(1 + 4 * 999), np.float32, offset=1)
        assert not array.flags.aligned
        array[:] = tensor.numpy()
        arrays.append(array)
    rmsprop_(*arrays, backend=backend.name)
    updated = State(torch.tensor(arrays[0]), torch.tensor(arrays[2]))
    assert_same_bits(updated, expected)
