"""What ``rmsprop_`` refuses, before it changes anything, and the message that says why."""

from __future__ import annotations

import re
from itertools import permutations
from math import inf, nan, nextafter
from typing import Any

import numpy as np
import pytest
import torch

from hogstream.kernels import rmsprop_
from update_testing import FULL

Arguments = dict[str, Any]
OPERANDS = ("param", "grad", "ms", "grad_avg", "momentum_buffer")


def good_arguments() -> Arguments:
    return {name: torch.full((2, 3), 0.5) for name in OPERANDS} | FULL


def array(dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.full((2, 3), 0.5, dtype)


def read_only() -> np.ndarray[Any, Any]:
    values = array()
    values.flags.writeable = False
    return values


def overlapping(*names: str) -> dict[str, torch.Tensor]:
    """Operands of six elements, of which each shares its last two with the next."""
    buffer = torch.full((16,), 0.5)
    return {name: buffer[4 * i : 4 * i + 6].reshape(2, 3) for i, name in enumerate(names)}


ONES = torch.ones(2, 3)
SPARSE = ONES.to_sparse()
META = torch.ones(2, 3, device="meta")
GAPS = torch.ones(2, 6)[:, ::2]
OTHER_ORDER = torch.ones(3, 2).T
PACKED = np.zeros((2, 3), [("value", np.float32), ("flag", np.int8)])["value"]


class Metres(np.ndarray[Any, Any]):
    """An array with a unit, as those of astropy and unyt have one."""

    def __array_ufunc__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("no unit is given")


MASKED: Any = np.ma.masked_array(array(), mask=[[1, 0, 0], [0, 0, 0]])
PLAIN = "must be a plain NumPy array, got a {}, whose class has arithmetic of its own"

ARRAYS = "must be a NumPy array or a torch tensor"
DTYPES = "must be float16, bfloat16, float32 or float64"
NATIVE = "must be native float16, float32 or float64"
BLOCK = "must fill one block of memory (contiguous, or a permutation of that), got shape (2, 3)"
SHAPE = "have the shape of param, (2, 3)"
BACKENDS = "backend must be one of triton, numba, numpy or None"

# Each message with the arguments that it refuses, which replace those of a good call.
WRONG_TYPES: dict[str, Arguments] = {
    f"param {ARRAYS}, got list": {"param": [0.5] * 6},
    f"grad {ARRAYS}, got float32": {"grad": np.float32(1)},
    **{
        f"{name} {PLAIN.format(type(given).__name__)}": {name: given}
        for name in OPERANDS
        for given in (MASKED, array().view(Metres))
    },
    f"param {DTYPES}, got int32": {"param": ONES.int()},
    f"param {DTYPES}, got complex64": {"param": ONES * 1j},
    f"param {DTYPES}, got float8_e5m2": {"param": ONES.to(torch.float8_e5m2)},
    f"param {NATIVE}, got int64": {"param": array(np.int64)},
    f"param {NATIVE}, got >f4": {"param": array(">f4")},
    f"ms {NATIVE}, got >f8": {"ms": array(">f8")},
    f"grad {DTYPES}, got int64": {"grad": ONES.long()},
    "ms must be float32 for float32 params, got float64": {"ms": ONES.double()},
    "ms must be float32 for bfloat16 params, got bfloat16": dict.fromkeys(
        OPERANDS, ONES.bfloat16()
    ),
    f"grad_avg {ARRAYS}, got float": {"grad_avg": 0.5},
    f"momentum_buffer {NATIVE}, got >f4": {"momentum_buffer": array(">f4")},
    "grad_avg must be float32 for float32 params, got float64": {"grad_avg": ONES.double()},
    "momentum_buffer must be float32 for float32 params, got float16": {
        "momentum_buffer": ONES.half()
    },
}
WRONG_VALUES: dict[str, Arguments] = {
    f"grad must {SHAPE}, got (3, 2)": {"grad": torch.ones(3, 2)},
    f"grad must {SHAPE}, got (1, 3)": {"grad": torch.ones(1, 3)},
    f"ms must be dense and {SHAPE}, got strided, (6,)": {"ms": torch.ones(6)},
    f"ms must be dense and {SHAPE}, got sparse_coo, (2, 3)": {"ms": SPARSE},
    "param must be dense, got layout sparse_coo": {"param": SPARSE},
    "grad must be dense, got layout sparse_coo": {"grad": SPARSE},
    "grad must be on cpu as param, got meta": {"grad": META},
    "ms must be on cpu as param, got meta": {"ms": META},
    "takes cpu tensors, got one on meta": dict.fromkeys(OPERANDS, META),
    f"param {BLOCK} with strides (6, 2)": {"param": GAPS},
    f"grad {BLOCK} with strides (6, 2)": {"grad": GAPS},
    f"ms {BLOCK} with strides (6, 2)": {"ms": GAPS},
    f"param {BLOCK} with strides (0, 0)": {"param": torch.ones(1, 1).expand(2, 3)},
    "param must be contiguous, got strides of (-12, 4) bytes": {"param": array()[::-1]},
    "grad must be contiguous, got strides of (15, 5) bytes": {"grad": PACKED},
    "grad must have the strides of param, (3, 1), got (1, 2)": {"grad": OTHER_ORDER},
    "ms must have the strides of param, (3, 1), got (1, 2)": {"ms": OTHER_ORDER},
    "param must be memory as it is, got a lazily negated": {"param": torch._neg_view(ONES)},
    "param must be writable, got a read-only array": {"param": read_only()},
    "ms must be writable, got a read-only array": {"ms": read_only()},
    f"grad_avg must be dense and {SHAPE}, got strided, (3, 2)": {"grad_avg": torch.ones(3, 2)},
    f"momentum_buffer must be dense and {SHAPE}, got sparse_coo": {"momentum_buffer": SPARSE},
    "grad_avg must be on cpu as param, got meta": {"grad_avg": META},
    f"momentum_buffer {BLOCK} with strides (6, 2)": {"momentum_buffer": GAPS},
    "grad_avg must have the strides of param, (3, 1), got (1, 2)": {"grad_avg": OTHER_ORDER},
    "momentum_buffer must be memory as it is, got a lazily": {
        "momentum_buffer": torch._neg_view(ONES)
    },
    "grad_avg must be writable, got a read-only array": {"grad_avg": read_only()},
    "momentum_buffer must be writable, got a read-only array": {"momentum_buffer": read_only()},
    **{
        f"{one} and {other} must not overlap in memory": overlapping(one, other)
        for one, other in permutations(OPERANDS, 2)
    },
    "grad_avg must be given with centered, got None": {"grad_avg": None},
    "momentum_buffer must be given with momentum, got None": {"momentum_buffer": None},
    "grad_avg must be None without centered, got Tensor": {"centered": False},
    "momentum_buffer must be None without momentum, got Tensor": {"momentum": 0.0},
    f"{BACKENDS}, got 'cuda'": {"backend": "cuda"},
    f"{BACKENDS}, got ['numpy']": {"backend": ["numpy"]},
}
NUMBERS = {
    "lr": "a finite number >= 0",
    "alpha": "a number >= 0 and <= 1",
    "eps": "a finite number >= 0",
    "weight_decay": "a finite number >= 0",
    "momentum": "a finite number >= 0",
}
SWITCHES = [
    "centered",
    "lr_in_momentum",
    "eps_inside_sqrt",
    "decoupled_weight_decay",
    "maximize",
]


@pytest.mark.parametrize(("message", "arguments"), WRONG_TYPES.items(), ids=WRONG_TYPES.keys())
def test_refuses_operands_of_a_wrong_type(message, arguments):
    check_refused(TypeError, message, arguments)


@pytest.mark.parametrize(("message", "arguments"), WRONG_VALUES.items(), ids=WRONG_VALUES.keys())
def test_refuses_operands_that_do_not_fit(message, arguments):
    check_refused(ValueError, message, arguments)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(-0.1, "-0.1"), (-inf, "-inf"), (inf, "inf"), (nan, "nan"), (10**400, "inf")],
    ids=["negative", "-inf", "inf", "nan", "beyond_float64"],
)
@pytest.mark.parametrize("name", NUMBERS)
def test_refuses_numbers_out_of_range(name, value, shown):
    check_refused(ValueError, f"{name} must be {NUMBERS[name]}, got {shown}", {name: value})


@pytest.mark.parametrize("alpha", [nextafter(1, 2), 1.5])
def test_refuses_alpha_greater_than_1(alpha):
    check_refused(ValueError, f"alpha must be {NUMBERS['alpha']}, got {alpha}", {"alpha": alpha})


@pytest.mark.parametrize("value", ["0.1", None, True, 0.1j, [0.1]], ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_refuses_what_is_not_a_number(name, value):
    check_refused(TypeError, f"{name} must be {NUMBERS[name]}, got {value!r}", {name: value})


@pytest.mark.parametrize("name", NUMBERS)
def test_refuses_a_tensor_of_several_numbers(name):
    message = f"Tensor {name} must be 1-element, got shape (2,)"  # as torch has it
    check_refused(ValueError, message, {name: torch.ones(2)})


@pytest.mark.parametrize("value", [1, None, "yes"])
@pytest.mark.parametrize("name", SWITCHES)
def test_refuses_switches_that_are_not_bools(name, value):
    check_refused(TypeError, f"{name} must be True or False, got {value!r}", {name: value})


def check_refused(error: type[Exception], message: str, wrong: Arguments) -> None:
    arguments = good_arguments() | wrong
    before = contents(arguments)
    with pytest.raises(error, match=re.escape(message)):
        rmsprop_(**arguments)
    assert contents(arguments) == before


def contents(arguments: Arguments) -> list[Any]:
    operands = [arguments[name] for name in OPERANDS]
    return [values(operand) for operand in operands if operand is not META and operand is not None]


def values(operand: Any) -> Any:
    dense = operand.to_dense() if isinstance(operand, torch.Tensor) else np.array(operand)
    return dense.tolist()
