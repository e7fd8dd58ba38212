"""A counter made of RMSprop: the shared state that shows a lost update."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from hogstream.scheduler import SharedParameters


@pytest.fixture(params=["numba", "numpy"])
def backend(request: pytest.FixtureRequest) -> str:
    """One for each kind of CPU lane: compiled, and called from Python."""
    return str(request.param)


@pytest.fixture
def counters() -> SharedParameters:
    """Large enough that updates which may overlap will."""
    return SharedParameters({"counters": torch.zeros(1 << 18)})


@pytest.fixture(autouse=True)
def no_thread_left_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    assert not [name for name in left if not name.startswith("hogstream-kernel")], left
