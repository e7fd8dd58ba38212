"""Counting a step in compiled code: in one call, where NumPy takes several."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numba import types

from hogstream.kernels.backends.numba_atomics import floats_at
from hogstream.kernels.backends.numba_compile import with_the_gil
from hogstream.optim.object_access import data_pointer_of, handle_of


def add_one_to(shown: torch.Tensor, rest: torch.Tensor) -> Callable[[], object]:
    """``step_counts.Counter.add_one`` of tensors that the caller keeps.

    Args:
        shown: The counts: float32, shape (n,), contiguous, on the CPU.
        rest: What they do not show: the same.
    """
    return partial(_add_one, handle_of(shown), handle_of(rest), shown.numel())


@with_the_gil(types.int64(*[types.int64] * 3))
def _add_one(
    shown: int,  # the tensor, as compiled code takes it: float32, (counts,)
    rest: int,  # the same
    counts: int,
) -> int:
    shown_at, rest_at = floats_at(data_pointer_of(shown)), floats_at(data_pointer_of(rest))
    for index in range(counts):
        count, more = shown_at[index], rest_at[index]
        if count + more != count:  # somebody has set it since
            more = np.float32(0)
        more += np.float32(1)
        total = count + more
        rest_at[index] = more - (total - count)  # both differences are exact
        shown_at[index] = total
    return 0
