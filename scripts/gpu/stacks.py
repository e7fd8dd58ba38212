"""A plugin of pytest: a test that runs when its job is nearly over shows the stacks of its threads.

Not when it has taken so and so long: one that is merely slow would show them too, and up to Python
3.12 to read the stacks of threads that go on meanwhile may crash. And not when the job is
interrupted: an event loop has SIGINT for itself.
"""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Iterator

import pytest

# Of a test that begins after that.
_LEAST_SECONDS = 1.0
_stderr = -1


def pytest_addoption(parser: pytest.Parser) -> None:
    """Has an option that says when the job is nearly over."""
    parser.addoption("--stacks-at", type=float, required=True, help="by time.monotonic")


def pytest_configure() -> None:
    """Keeps what is not captured of tests, which are yet to begin."""
    global _stderr
    _stderr = os.dup(2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Has a thread of the system's wait for that time while a test runs."""
    left = item.config.getoption("stacks_at") - time.monotonic()
    faulthandler.dump_traceback_later(max(left, _LEAST_SECONDS), file=_stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
