"""Random cases by their seeds: always the same ones here, and more by ``make fuzz``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from fuzzing import Case, fuzz_again, try_seed

TrySeeds = Callable[[str, Callable[[int], Case], Sequence[int]], None]


@pytest.fixture
def try_seeds(capfd: pytest.CaptureFixture[str]) -> TrySeeds:
    """Runs the cases of some seeds of a fuzz."""

    def run(fuzz: str, draw: Callable[[int], Case], seeds: Sequence[int]) -> None:
        with capfd.disabled():  # a case that hangs says where, and ends Python
            for seed in seeds:
                try_seed(draw, seed, fuzz_again(fuzz, seed))

    return run
