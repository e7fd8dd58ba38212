"""Where tests of Triton's kernels run: on a GPU if there is one, else interpreted, on the CPU."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch

from hogstream.kernels import available_backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

_Test = TypeVar("_Test")
_missing = available_backends()["triton"]

#: The marks of a test that runs there: on a GPU it is one of the tests that need it.
MARKS = [
    pytest.mark.skipif(_missing is not None, reason=str(_missing)),
    # The interpreter computes in NumPy, and warns of the infinities and NaN that tests feed it.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    *([pytest.mark.gpu] if DEVICE.type == "cuda" else []),
]


def on_tritons_device(test: _Test) -> _Test:
    """Marks a test that runs there."""
    for mark in MARKS:
        test = mark(test)
    return test
