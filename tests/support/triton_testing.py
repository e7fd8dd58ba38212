"""Where tests of Triton's kernels run: on a GPU if there is one, else interpreted, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hogstream.kernels import available_backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

_missing = available_backends()["triton"]

# The interpreter computes in NumPy, and warns of the infinities and NaN that tests feed it.
INTERPRETER_WARNS = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
#: The marks of a test that runs there: on a GPU it is one of the tests that need it.
MARKS = [
    pytest.mark.skipif(_missing is not None, reason=str(_missing)),
    INTERPRETER_WARNS,
    *([pytest.mark.gpu] if DEVICE.type == "cuda" else []),
]


def on_tritons_device(test: Callable[..., object]) -> Any:
    """Marks a test that runs there."""
    marked: Any = test
    for mark in MARKS:
        marked = mark(marked)
    return marked
