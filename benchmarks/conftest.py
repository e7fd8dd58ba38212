"""What all benchmarks share: the device, and calls that wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

Time = Callable[[Callable[[], object]], None]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def time(benchmark: Any, device: torch.device) -> Time:
    """Times a call, with what it has the device do, after one that compiles what it needs."""

    def timed(call: Callable[[], object]) -> None:
        def call_and_wait() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()

        call_and_wait()
        benchmark(call_and_wait)

    return timed
