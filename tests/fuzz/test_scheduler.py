"""Random runs of ``StreamScheduler``."""

from __future__ import annotations

import pytest

from scheduler_fuzz import draw


@pytest.mark.parametrize(
    "seeds",
    [range(10), *(pytest.param(range(n, n + 30), marks=pytest.mark.slow) for n in (10, 40, 70))],
    ids=str,
)
def test_every_update_that_is_counted_is_there_and_every_run_ends(seeds, try_seeds):
    try_seeds("scheduler", draw, seeds)
