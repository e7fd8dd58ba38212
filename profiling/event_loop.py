"""The event loop that measurements run on: uvloop where it works, else asyncio's own."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from importlib import import_module
from typing import Any, TypeVar

T = TypeVar("T")

_uvloop: Any = None
with suppress(Exception):  # not installed, or not for this Python: whatever it raises
    _uvloop = import_module("uvloop")

#: Which event loop it is, such as ``"uvloop 0.23.0"`` or ``"asyncio"``.
EVENT_LOOP = "asyncio" if _uvloop is None else f"uvloop {_uvloop.__version__}"


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine as ``asyncio.run`` does, and returns what it returns.

    uvloop schedules faster, which tells where an update is small.
    """
    if _uvloop is None:
        return asyncio.run(main)
    result: T = _uvloop.run(main)
    return result
