"""Every backend gives the bits of the plain NumPy formula, and so of every other backend."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from hogstream.kernels import rmsprop_
from hogstream.kernels.backends.numpy_kernels import BLOCK_BYTES
from hogstream.kernels.reference import plain_expression_
from update_testing import (
    ALL_VARIANTS,
    BACKENDS,
    COMPUTE,
    DTYPES,
    FULL,
    VARIANTS,
    Backend,
    State,
    assert_same_bits,
    bits,
    extreme,
    formula,
    fresh_state,
    normal,
    special_operands,
    update_,
    worn_state,
)

# Either side of the blocks of NumPy (by compute type), compiled and interpreted Triton.
BLOCKS = [1 << 10, 1 << 16, BLOCK_BYTES // 8, BLOCK_BYTES // 4]
SIZES = sorted({0, 1, 7, *(block + more for block in BLOCKS for more in (-1, 0, 1))})

SIXTEEN_BITS = [pytest.param(torch.float16, id="float16"), pytest.param(torch.bfloat16, id="bf16")]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_variants_over_several_steps(backend, dtype, options):
    check_steps(backend, 5001, dtype, options)


@pytest.mark.parametrize("options", ALL_VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_variant_of_one_dtype(backend, options):
    check_steps(backend, 77, torch.float32, options)


def check_steps(backend: Backend, size: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Compares three steps from a fresh state."""
    actual = expected = fresh_state(normal(size, dtype, seed=0), **options)
    for step in range(3):
        grad = extreme(size, dtype, seed=1 + step)
        actual = backend.update(actual, grad, **options)
        expected = formula(expected, grad, **options)
        assert_same_bits(actual, expected)


def test_any_two_switches_have_every_combination_among_the_variants():
    def pairs(variants: list[Any]) -> set[tuple[str, str]]:
        return {
            pair
            for variant in variants
            for pair in combinations(variant.id.replace("lr-in-", "lr_in_").split("-"), 2)
        }

    assert len(ALL_VARIANTS) == 2 * 3 * 2 * 2 * 3
    assert pairs(VARIANTS) == pairs(ALL_VARIANTS)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values_in_every_operand(backend, dtype, options):
    state, grad = special_operands(dtype, **options)
    assert_same_bits(backend.update(state, grad, **options), formula(state, grad, **options))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_around_the_blocks(backend, dtype, size):
    # Each size with all of the state and with none, of one dtype of 16 bits and one of more each.
    dtypes = list(COMPUTE)
    options = FULL if (SIZES.index(size) + dtypes.index(dtype)) % 2 else {}
    state, grad = worn_state(size, dtype, seed=size, **options), extreme(size, dtype, seed=1)
    assert_same_bits(backend.update(state, grad, **options), formula(state, grad, **options))


# Factors that are the last that float32 holds, or that a kernel might take for absent.
LIMITS: list[dict[str, Any]] = [
    {"lr": 0.0},
    {"lr": 0.1, "alpha": 0.0},
    {"alpha": 1 - 2**-24},
    {"alpha": 1.0, "centered": True},
    {"eps": 0.0},
    {"eps": 0.0, **FULL},
    {"eps": 1e-45},
    {"lr": 3.4e38},
    {"weight_decay": 1e-45},
    {"lr": 1 / 3, "weight_decay": 1e-9, "decoupled_weight_decay": True},
    {"lr": 2.0, "weight_decay": 0.5, "decoupled_weight_decay": True},
    {"momentum": 1.0},
    {"momentum": 1.5, "lr_in_momentum": True},
    {"momentum": 1e-45},
    {"momentum": 3.4e38, "centered": True},
    {"momentum": 0.0, "lr_in_momentum": True},
]
# And some that only float64 holds.
LIMITS_OF_FLOAT64: list[dict[str, Any]] = [
    {"alpha": 1 - 1e-12},
    {"eps": 1e-50},
    {"lr": 1e300},
    {"weight_decay": 1e-60},
    {"momentum": 1 - 1e-12},
    {"momentum": 1e300, "lr_in_momentum": True},
]


@pytest.mark.parametrize("options", LIMITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_at_their_limits(backend, dtype, options):
    state, grad = worn_state(1001, dtype, seed=2, **options), normal(1001, dtype, seed=1)
    assert_same_bits(backend.update(state, grad, **options), formula(state, grad, **options))


@pytest.mark.parametrize("options", LIMITS_OF_FLOAT64, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_that_only_float64_holds(backend, options):
    state = worn_state(1001, torch.float64, seed=2, **options)
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
    updated = backend.update(fresh_state(param), torch.ones_like(param), lr=0.0).param
    assert torch.equal(bits(updated), bits(param))


@pytest.mark.parametrize("exponent", range(-12, 8, 3))
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_16_bit_parameter_is_rounded_as_torch_rounds(backend, dtype, exponent):
    # With alpha = eps = 0 and a gradient of 1 the step is lr to the bit. A power of two is half a
    # unit in the last place of the parameters of one binade: a tie, that goes to the even one.
    param = every_value(dtype)
    state, lr = fresh_state(param), 2.0**exponent
    updated = backend.update(state, torch.ones_like(param), lr=lr, alpha=0.0, eps=0.0).param
    assert torch.equal(bits(updated), bits((param.float() - lr).to(dtype)))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_16_bit_gradient_is_read_as_torch_reads_it(backend, dtype):
    grad = every_value(dtype)
    state = fresh_state(torch.ones_like(grad))
    ms = backend.update(state, grad, alpha=0.0).ms
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
    state, grad = worn_state(840, dtype, seed=0, **FULL), normal(840, dtype, seed=5)
    updated = formula(state, grad, **FULL)

    flat = state.map(lambda tensor: tensor.to(backend.device, copy=True))
    update_(flat.map(layout), layout(grad.to(backend.device)), backend=backend.name, **FULL)

    # Seen through the same view, the formula's flat result; outside it, the old values.
    for old, new in zip(state, updated, strict=True):
        assert old is not None
        assert new is not None
        layout(old).copy_(layout(new))
    assert_same_bits(flat.map(torch.Tensor.cpu), state)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_give_the_bits_of_tensors(backend, dtype):
    if backend.device != "cpu":
        pytest.skip("NumPy arrays are on the CPU")
    rng = np.random.default_rng(0)
    param, grad = (rng.standard_normal((30, 41)).astype(dtype, order="F") for _ in range(2))
    compute = np.float64 if dtype is np.float64 else np.float32
    ms, grad_avg, buffer = (np.zeros_like(param, dtype=compute) for _ in range(3))
    arrays = param, ms, grad_avg, buffer
    expected = formula(State(*map(torch.tensor, arrays)), torch.tensor(grad), **FULL)
    rmsprop_(
        param, grad, ms, grad_avg=grad_avg, momentum_buffer=buffer, backend=backend.name, **FULL
    )
    assert_same_bits(State(*map(torch.tensor, arrays)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_that_start_inside_an_element(backend):
    if backend.device != "cpu":
        pytest.skip("NumPy arrays are on the CPU")
    state, grad = worn_state(999, torch.float32, 0, **FULL), normal(999, torch.float32, seed=5)
    expected = formula(state, grad, **FULL)

    def moved(tensor: torch.Tensor) -> Any:
        array = np.frombuffer(bytearray(1 + 4 * 999), np.float32, offset=1)
        assert not array.flags.aligned
        array[:] = tensor.numpy()
        return array

    arrays = state.map(moved)
    update_(arrays, moved(grad), backend=backend.name, **FULL)
    assert_same_bits(arrays.map(torch.tensor), expected)
