"""CUDA lanes on the driver of tests: hundreds of random runs, and what those reach rarely."""

from __future__ import annotations

import pytest

from simulation import simulate

CHUNK = 25


@pytest.mark.parametrize("first", range(0, 400, CHUNK))
def test_seeds(first: int, capfd: pytest.CaptureFixture[str]) -> None:
    with capfd.disabled():  # a seed that hangs says where, and ends Python
        for seed in range(first, first + CHUNK):
            simulate(seed)
