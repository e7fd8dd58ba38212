"""Random programs around the optimizer."""

from __future__ import annotations

import pytest

from optimizer_fuzz import draw


@pytest.mark.parametrize(
    "seeds",
    [range(10), *(pytest.param(range(n, n + 20), marks=pytest.mark.slow) for n in (10, 30, 50))],
    ids=str,
)
def test_every_step_is_that_of_plain_numpy(seeds, try_seeds):
    try_seeds("optimizer", draw, seeds)
