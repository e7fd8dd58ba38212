"""Random runs of ``ProcessScheduler``."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from process_fuzz import draw

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_main_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spawned process imports that of its parent, and pytest's may run all tests again."""
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))


@pytest.mark.parametrize("seed", [2, 9, 25])
def test_every_update_that_is_counted_is_there_whoever_dies(seed, try_seeds):
    try_seeds("process", draw, [seed])
