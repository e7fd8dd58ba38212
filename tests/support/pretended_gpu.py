"""Collects tests as if there were a GPU, and prints which would use it, with and without the mark.

It is a script, as what tests are is decided when they are imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

import pytest
import torch


class _Collected:
    """A plugin that keeps what would run on a GPU.

    Attributes:
        marked: Names of tests with the mark.
        unmarked: Those without.
    """

    def __init__(self) -> None:
        self.marked: list[str] = []
        self.unmarked: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Called once all tests are there."""
        for item in session.items:
            if item.get_closest_marker("gpu"):  # not a keyword, as names of folders are too
                self.marked.append(item.nodeid)
            elif "cuda" in map(_type, _parameters(item)):
                self.unmarked.append(item.nodeid)


def _parameters(item: pytest.Item) -> Iterable[Any]:
    return item.callspec.params.values() if hasattr(item, "callspec") else ()


def _type(parameter: Any) -> str | None:
    """The type of the device that a test's parameter is, or has."""
    device = getattr(parameter, "device", parameter)
    if isinstance(device, torch.device):
        return device.type
    return device.partition(":")[0] if isinstance(device, str) else None


def main() -> None:
    """Collects what the command line names, and prints both lists in JSON, in the last line."""
    torch.cuda.is_available = lambda: True
    collected = _Collected()
    status = pytest.main(["--collect-only", "-qq", *sys.argv[1:]], plugins=[collected])
    print(json.dumps([collected.marked, collected.unmarked]))
    sys.exit(status)


if __name__ == "__main__":
    main()
