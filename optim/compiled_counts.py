"""Counting a step in compiled code: in one call, where NumPy takes several."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from hogstream.kernels.backends.numba_compile import with_the_gil

_COUNTS = types.CPointer(types.float32)


@with_the_gil(types.int64(_COUNTS, _COUNTS, types.int64))
def add_one(
    shown: Any,  # address of counts: float32, (counts,)
    rest: Any,  # address of what they do not show: float32, (counts,)
    counts: int,
) -> int:
    """As ``step_counts.Counter.add_one``."""
    for index in range(counts):
        count, more = shown[index], rest[index]
        if count + more != count:  # somebody has set it since
            more = np.float32(0)
        more += np.float32(1)
        total = count + more
        rest[index] = more - (total - count)  # both differences are exact
        shown[index] = total
    return 0
