"""How parameters of 16 bits are rounded: by chance or with what is left, alike on all backends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hogstream.kernels import rounding
from hogstream.kernels.backends.numpy_kernels import BLOCK_BYTES
from hogstream.kernels.backends.select import select_backend
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands
from update_testing import (
    BACKENDS,
    FULL,
    Backend,
    assert_same_bits,
    extreme,
    normal,
    special,
    special_operands,
    worn_state,
)

HALVES = [pytest.param(torch.float16, id="float16"), pytest.param(torch.bfloat16, id="bfloat16")]
ROUNDINGS = [
    pytest.param({"stochastic_rounding": True}, id="stochastic"),
    pytest.param({"kahan_sum": True}, id="compensated"),
]
HIGHEST_BIT = 0x9E37_79B9_7F4A_7C15
KEYS = [1, 1 << 32, HIGHEST_BIT, (1 << 64) - 1]
# Around the blocks of compiled and interpreted Triton and of NumPy, in a table with empty ones.
SIZES = [0, 1, 1023, 1025, (1 << 16) + 1, 0, BLOCK_BYTES // 4 + 1]


def worn(size: int, dtype: torch.dtype, seed: int, options: dict[str, Any]) -> Operands:
    """Operands of an update with some of either rounding, before it."""
    param, *state = worn_state(size, dtype, seed, **FULL)
    left = (0.3 * torch.finfo(dtype).eps * normal(size, torch.float64, seed + 7)).to(dtype)
    tensors: list[Any] = [param, normal(size, dtype, seed + 8), *state]
    return Operands(*[*tensors, left if "kahan_sum" in options else None])


def updated(
    backend: Backend, group: list[Operands], options: dict[str, Any], key: int
) -> list[Operands]:
    """A table after an update of copies of its tensors, on the CPU."""
    copies = [moved(each, backend.device) for each in group]
    hyperparameters = Hyperparameters(lr=1e-3, **{**FULL, **options})
    update_: Any = select_backend(backend.name, torch.device(backend.device).type).update_
    update_(LaunchTable(copies), hyperparameters, key=key)
    return [moved(each, "cpu") for each in copies]


def moved(operands: Operands, device: str) -> Operands:
    tensors: list[Any] = [each if each is None else each.to(device, copy=True) for each in operands]
    return Operands(*tensors)


NUMPY, *OTHERS = BACKENDS


@pytest.mark.parametrize("options", ROUNDINGS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", OTHERS)
def test_backends_round_a_table_alike(backend, dtype, options):
    group = [worn(size, dtype, 10 * seed, options) for seed, size in enumerate(SIZES)]
    results = (updated(each, group, options, HIGHEST_BIT) for each in (backend, NUMPY.values[0]))
    for got, wanted in zip(*results, strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("options", ROUNDINGS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", OTHERS)
def test_backends_round_special_values_alike(backend, dtype, options):
    (param, *state), grad = special_operands(dtype, **FULL)
    left = param.reshape(17, 17, 17).permute(1, 2, 0).flatten()
    tensors: list[Any] = [param, grad, *state, left if "kahan_sum" in options else None]
    group = [Operands(*tensors)]
    expected = updated(NUMPY.values[0], group, options, HIGHEST_BIT)
    assert_same_bits(updated(backend, group, options, HIGHEST_BIT)[0], expected[0])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_update_is_rounded_by_its_place_in_the_table_and_by_the_key(backend, dtype):
    options = {"stochastic_rounding": True}
    one = worn(2000, dtype, 0, options)
    first, second = updated(backend, [one, one], options, HIGHEST_BIT)
    (alone,) = updated(backend, [one], options, HIGHEST_BIT)
    (low,) = updated(backend, [one], options, HIGHEST_BIT ^ 1)
    (high,) = updated(backend, [one], options, HIGHEST_BIT ^ 1 << 63)
    assert_same_bits(first, alone)
    for other in (second, low, high):
        assert 200 < (other.param != alone.param).sum() < 1800
        assert torch.equal(other.ms, alone.ms)


def words(values: Any) -> Any:
    return np.asarray(values).astype(np.uint32)


def random_at(places: Any, key: int) -> Any:
    """NumPy's random words of places."""
    of_words = rounding.over(rounding.random, mixed=rounding.mixed)
    places = np.asarray(places, np.uint64)
    with np.errstate(over="ignore"):
        return of_words(
            places.astype(np.uint32),
            (places >> np.uint64(32)).astype(np.uint32),
            np.uint32(key & 0xFFFF_FFFF),
            np.uint32(key >> 32),
        )


@pytest.mark.parametrize("key", KEYS)
def test_random_words_are_those_of_the_hash_and_of_all_64_bits_of_a_place(key):
    places = [0, 1, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, rounding.PLACES, 3 * rounding.PLACES + 7]

    def mixed(x: int) -> int:  # in Python's integers, which do not wrap
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFF_FFFF
        x = (x ^ x >> 15) * 0x846CA68B & 0xFFFF_FFFF
        return x ^ x >> 16

    wanted = [
        mixed(mixed((place ^ key) & 0xFFFF_FFFF) ^ (place >> 32) ^ (key >> 32)) for place in places
    ]
    assert random_at(places, key).tolist() == wanted
    assert len(set(wanted)) == len(places)


def rounded_to(dtype: torch.dtype, values: torch.Tensor, random: Any) -> torch.Tensor:
    """What random words make of float32."""
    function = {torch.bfloat16: rounding.bfloat16, torch.float16: rounding.float16}[dtype]
    by_words = rounding.over(function, where=np.where)
    made = by_words(values.numpy().view(np.uint32), words(random)).astype(np.int16)
    return torch.from_numpy(made).view(dtype)


def neighbours(dtype: torch.dtype) -> torch.Tensor:
    """All magnitudes of a dtype in their order, in float64; beyond the greatest, what would follow.

    To round there is to round to infinity.
    """
    every = torch.arange(1 << 15, dtype=torch.int16).view(dtype).double()
    every = every[every.isfinite()]
    return torch.cat([every, 2 * every[-1:] - every[-2:-1]])


#: How many random bits decide: for each dtype, of 16 or of 13 below the last place.
DECIDING = {torch.bfloat16: 16, torch.float16: 13}


@pytest.mark.parametrize("dtype", HALVES)
def test_up_is_as_likely_as_the_fraction_is_great(dtype):
    """Of the deciding bits all values are tried: so many round up, of float64, as there should."""
    bits, grid = DECIDING[dtype], neighbours(dtype)
    random = np.arange(1 << bits, dtype=np.uint64) << np.uint64(32 - bits)
    values = [*extreme(6, torch.float32, 0).tolist(), *normal(6, torch.float32, 1).tolist()]
    values += [*special(torch.float32)[:5].tolist(), 3.1e-5, 1.2e-7, 4e-8, 65_000.0, 65_510.0]
    for value in torch.tensor(values).abs().unique():
        magnitude = value.double()
        if magnitude >= grid[-1]:
            continue
        above = int(torch.searchsorted(grid, magnitude, right=True))
        low, high = grid[above - 1], grid[above]
        for sign in (1, -1):
            got = rounded_to(dtype, (sign * value).expand(len(random)).contiguous(), random)
            magnitudes = got.double().abs()
            if high == grid[-1]:
                magnitudes = torch.where(magnitudes.isinf(), high, magnitudes)
            assert ((magnitudes == low) | (magnitudes == high)).all()
            assert torch.equal(got.signbit(), torch.full_like(got, sign < 0, dtype=torch.bool))
            ups = int((magnitudes == high).sum())
            fraction = float((magnitude - low) / (high - low)) * len(random)
            assert fraction - 1 < ups <= fraction + 1e-9, (float(value), ups, fraction)


@pytest.mark.parametrize("dtype", HALVES)
def test_what_the_dtype_holds_is_kept_whatever_the_random_bits(dtype):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    for random in (0, 0xFFFF_FFFF):
        got = rounded_to(dtype, every.float(), np.full(len(every), random))
        nan = every.isnan()
        assert torch.equal(got.isnan(), nan)
        assert torch.equal(got[~nan].view(torch.int16), every[~nan].view(torch.int16))
