"""What is compiled for `step`, where it can be: Python does the same elsewhere."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType

from hogstream.kernels.backends import check_backend

_log = logging.getLogger(__name__)


@cache
def compiled_module(name: str) -> ModuleType | None:
    """A module of this folder that takes Numba; None if it cannot be imported here."""
    try:
        check_backend("numba")
        return importlib.import_module(f"hogstream.optim.{name}")
    except Exception as error:  # each of Numba, CPython and torch may be other than is expected
        _log.debug("Python does the work of %s, as it can't be compiled: %r", name, error)
        return None
